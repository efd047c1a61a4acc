"""What a conversion remembers: where a model came from and what was changed, so that the way back can undo it.

from-hf leaves `conversion.json` and the tokenizer's files in the run folder; checkpoints trained from there are found
their way back by it: token ids and generation settings, vocabulary padding, tied embeddings, context length. Whatever
carries such weights into another run folder (reshard, checkpoint.start_from) carries the record along.
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from k2_megatron.runtime.durable import make_folder, sync, write_file
from k2_megatron.train.checkpoints.manifest import CheckpointError

RECORD = "conversion.json"
FORMAT = 1
TOKENIZER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Record:
    """`config_json` and the sizes are the source's own."""

    direction: str
    source: str
    dtype: str
    used_vocabulary: int
    tied_embeddings: bool
    context: int
    rope_base: float
    config_json: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "versions": versions()}


def find_record(folder: Path, manifest: dict) -> Record | None:
    """The record of a checkpoint: its own, or that of the run it belongs to. CheckpointError when it is damaged."""
    found = _stored_record(folder, manifest)
    return None if found is None else Record(**{field.name: found[field.name] for field in fields(Record)})


def carry_record(folder: Path, manifest: dict, run_folder: Path) -> None:
    """Give a run folder that goes on with the weights of checkpoint `folder` its record, if it has one, and tokenizer.

    CheckpointError when the record is damaged.
    """
    found = _stored_record(folder, manifest)
    if found is None:
        return
    make_folder(run_folder)
    copy_tokenizer(_run_folder(folder) / TOKENIZER, run_folder / TOKENIZER)
    write_file(run_folder / RECORD, json.dumps(found, indent=1) + "\n")


def require_own_record(folder: Path, manifest: dict, run_folder: Path) -> None:
    """CheckpointError when `run_folder` holds the record of another model than that of checkpoint `folder`."""
    found, path = _stored_record(folder, manifest), run_folder / RECORD
    if path.is_file() and _read_record(path) != found:
        raise CheckpointError(f"{path} is the record of another model than {folder}; remove it, or take another folder")


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _stored_record(folder: Path, manifest: dict) -> dict[str, Any] | None:
    if manifest.get("conversion") is not None:
        return _sound_record(manifest["conversion"], folder / "k2.json")
    path = _run_folder(folder) / RECORD
    return _read_record(path) if path.is_file() else None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return _sound_record(json.loads(path.read_text()), path)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the conversion record {path} is damaged ({error}); put it back") from None


def _sound_record(found: Any, path: Path) -> dict[str, Any]:
    lacking = [field.name for field in fields(Record) if not isinstance(found, dict) or field.name not in found]
    if lacking:
        raise CheckpointError(
            f"the conversion record in {path} is damaged (it lacks {', '.join(lacking)}); put it back"
        )
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {found.get('format')!r}, this version reads {FORMAT}")
    return found


def tokenizer_files(source: Path) -> dict[str, Path]:
    """What `source` (a folder, or a .json or .model file) has of a tokenizer, by the names that readers expect."""
    if source.is_file():
        return {f"tokenizer{source.suffix}": source} if source.suffix in (".json", ".model") else {}
    return {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what `tokenizer_files` finds into `folder`, so that it survives a power cut."""
    found = tokenizer_files(source)
    if not found:
        return
    make_folder(folder)
    for name, path in found.items():
        shutil.copyfile(path, folder / name)
        sync(folder / name)
    sync(folder)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("k2_megatron", "torch", "megatron-core", "numpy", "safetensors", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
