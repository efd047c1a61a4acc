"""The manifest k2.json of a checkpoint: what a complete one says of itself, and whether its files agree.

    {"format": 2, "step": 941, ..., "files": {name: {"bytes", "aes_lanes"}}, "xxh3": hash of all the rest}

Format 1 is of before aes_lanes (file_hash.py): its files have xxh3, and it is read as before.

Needs no torch: training, `verify` and conversions read it alike.
"""

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from k2_megatron.train.checkpoints.file_hash import HASHES, problem_of_file

MANIFEST = "k2.json"
MANIFEST_FORMAT = 2
READ_FORMATS = (1, MANIFEST_FORMAT)
FOLDER = re.compile(r"step_(\d{8,})")
_ALTERED = "its content was altered: its own xxh3 hash differs"
_FIELDS = {"step": int, "files": dict, "layout": str, "precision": str, "weights": str, "config": dict}
_COUNTS = ("consumed_samples", "consumed_tokens", "optimizer_step")  # integers where they are told


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint that another version of this project wrote: it is not damaged, and must not be passed over."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint folder's name gives. CheckpointError when the name is not a checkpoint's."""
    match = FOLDER.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint folder (its name should look like step_00000941)")
    return int(match.group(1))


def manifest_text(manifest: dict) -> str:
    """What is written into k2.json: the manifest with its format and the hash of its own content."""
    content = {"format": MANIFEST_FORMAT, **{key: value for key, value in manifest.items() if key != "xxh3"}}
    return json.dumps({**content, "xxh3": content_hash(content)}, indent=1)


def content_hash(manifest: dict) -> str:
    """xxh3 of a manifest but for its hash: of its JSON with sorted keys and no spaces."""
    plain = json.loads(json.dumps(manifest))  # as a reader has it: no tuples, all keys text
    plain.pop("xxh3", None)
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. CheckpointError when it is missing or damaged, CheckpointVersionError when
    it is of another format."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore access to it") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from None
    problem = _problem_of_content(manifest, text)
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}); use another checkpoint")
    if manifest["format"] not in READ_FORMATS:
        raise CheckpointVersionError(
            f"{path} has format {manifest['format']!r}, this version reads {' and '.join(map(str, READ_FORMATS))}; "
            "use the version of k2_megatron that wrote it"
        )
    if manifest["step"] != step_of(folder):
        raise CheckpointError(f"{path} belongs to step {manifest['step']}, not to {folder.name}: files were mixed up")
    return manifest


def _problem_of_content(manifest: Any, text: str) -> str | None:
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        return "it is no manifest"
    if manifest["format"] not in READ_FORMATS:  # that version knows what belongs in it; but the number may be damaged
        sound = [content_hash({**manifest, "format": number}) for number in READ_FORMATS]
        return _ALTERED if manifest.get("xxh3") in sound else None
    if "xxh3" in manifest:  # to the byte: a flipped bit in a space or in the case of an exponent is damage, too
        if text != manifest_text(manifest):
            return _ALTERED
    elif _ends_with_its_hash(manifest):  # manifests of earlier versions have none
        return _ALTERED
    wrong = [key for key, kind in _FIELDS.items() if type(manifest.get(key)) is not kind]
    if wrong:
        return f"it lacks {', '.join(wrong)}"
    wrong = [key for key in _COUNTS if key in manifest and type(manifest[key]) is not int]
    if wrong:
        return f"{', '.join(wrong)} is no number"
    for name, facts in manifest["files"].items():
        kinds = {key: type(fact) for key, fact in facts.items()} if isinstance(facts, dict) else {}
        if Path(name).name != name or kinds not in ({"bytes": int, hash_name: str} for hash_name in HASHES):
            return f"what it says of the file {name!r} is no size and hash ({' or '.join(HASHES)})"
    return None


def _ends_with_its_hash(manifest: dict) -> bool:
    """Whether the last value is the hash of all before it, and only its name is wrong."""
    *content, (_, last) = manifest.items()
    return last == content_hash(dict(content))


def is_imported(manifest: dict) -> bool:
    """Whether tools/convert_checkpoint.py brought it in: no run of ours made it, and no row was consumed."""
    return manifest.get("data", "") is None


def verify_files(folder: Path, manifest: dict, part: int = 0, parts: int = 1) -> list[str]:
    """Problems of the `part`-th of `parts` shares of the checkpoint's files: missing, truncated, altered.

    A rank's share is what it wrote: in the same layout it loads most of that afterwards, from memory that holds it now.
    What no rank of a run wrote (a conversion's files) is dealt out evenly.
    """
    problems = []
    writers = {name: _writer_of(name) for name in sorted(manifest["files"])}
    others = [name for name, writer in writers.items() if writer is None]
    own = [name for name, writer in writers.items() if writer is not None and writer % parts == part]
    for name in [*own, *others[part::parts]]:
        try:
            problem = problem_of_file(folder / name, manifest["files"][name])
        except OSError as error:
            problem = f"{folder / name} cannot be read ({error.strerror})"
        if problem:
            problems.append(problem)
    return problems


def _writer_of(name: str) -> int | None:
    """The rank that wrote a file of tensors, "__RANK_NUMBER.distcp"; None of any other file."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return int(found.group(1)) if found else None
