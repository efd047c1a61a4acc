"""What a conversion remembers: where a model came from and what was changed, so that the way back can undo it.

from-hf leaves `conversion.json` and the tokenizer's files in the run folder; checkpoints trained from there are found
their way back by it: token ids and generation settings, vocabulary padding, tied embeddings, context length.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from k2_megatron.convert.errors import ConversionError

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
    config_json: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "versions": versions()}


def find_record(folder: Path, manifest: dict) -> Record | None:
    """The record of a checkpoint: its own, or that of the run it belongs to. ConversionError when it is damaged."""
    found = manifest.get("conversion")
    path = folder.resolve().parent.parent / RECORD
    try:
        if found is None and path.is_file():
            found = json.loads(path.read_text())
        if found is None:
            return None
        if found["format"] != FORMAT:
            raise ConversionError(f"{path} has format {found['format']!r}, this version reads {FORMAT}")
        return Record(**{key: value for key, value in found.items() if key not in ("format", "versions")})
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"the conversion record of {folder} ({path}) is damaged: {error}; remove it") from None


def tokenizer_files(source: Path) -> dict[str, Path]:
    """What `source` (a folder, or a .json or .model file) has of a tokenizer, by the names that readers expect."""
    if source.is_file():
        return {f"tokenizer{source.suffix}": source} if source.suffix in (".json", ".model") else {}
    return {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what `tokenizer_files` finds into `folder`."""
    found = tokenizer_files(source)
    if found:
        folder.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        shutil.copyfile(path, folder / name)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("k2_megatron", "torch", "megatron-core", "numpy", "safetensors", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
