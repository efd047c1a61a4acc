"""Our checkpoints as a source: torch_dist folders with their manifest, whatever layout wrote the chunks."""

import json
import re
from pathlib import Path

import numpy as np

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.files import OpenFiles
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Place, Shape, places
from k2_megatron.convert.numbers import BITS
from k2_megatron.convert.safetensors_file import read_exactly
from k2_megatron.convert.source import KEY_PREFIX, Kind
from k2_megatron.convert.torch_blob import Payload, find_payload
from k2_megatron.convert.torch_metadata import METADATA, Chunk, Tensor, read_metadata
from k2_megatron.train.checkpoint_manifest import MANIFEST, content_hash

_STEP = re.compile(r"step_\d{8,}")
_PRECISIONS = ("float32", "bfloat16")


class TorchDistSource:
    """Reads rows of our tensors out of the chunks that hold them.

    Raises ConversionError unless the folder's keys are exactly those of its manifest's model, each fully covered by
    its chunks.
    """

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.shape: Shape = ModelFacts.from_config(manifest["config"]["model"]).shape
        self.folder = folder
        self.implementation: str = manifest["config"]["model"].get("implementation", "k2")
        self.stored = read_metadata(folder)
        self.dtypes: dict[Kind, str] = {}
        self._files = OpenFiles(folder)
        self._payloads: dict[tuple[str, int], Payload] = {}
        self._check(folder)

    def key(self, kind: Kind, place: Place) -> str:
        return KEY_PREFIX[kind] + place.entry.key(self.implementation)

    def read(self, kind: Kind, place: Place, first_row: int, last_row: int) -> np.ndarray:
        key = self.key(kind, place)
        columns = place.entry.size(self.shape)[1]
        rows = np.empty((last_row - first_row, columns), BITS[self.dtypes[kind]])
        for chunk in self._chunks(key, place):
            row, column, height, width = _plane(chunk, place)
            first, last = max(first_row, row), min(last_row, row + height)
            if first >= last:
                continue
            part = rows[first - first_row : last - first_row, column : column + width]
            start = self._payload(key, chunk, self.dtypes[kind]).position + (first - row) * width * rows.itemsize
            self._read_into(part, chunk.file, start)
        return rows

    def read_bytes_total(self, kinds: tuple[Kind, ...]) -> int:
        return sum(self.shape.parameters * BITS[self.dtypes[kind]].itemsize for kind in kinds)

    def object_bytes(self, key: str) -> bytes:
        """A byte object (generator states, extra state) as it is stored."""
        chunk = self.stored.objects[key]
        found = np.empty(chunk.length, np.uint8)
        read_exactly(self._files.descriptor(chunk.file), found, chunk.position, self._files.folder / chunk.file)
        return found.tobytes()

    def _chunks(self, key: str, place: Place) -> list[Chunk]:
        return [c for c in self.stored.tensors[key].chunks if place.layer is None or c.offsets[0] == place.layer]

    def _payload(self, key: str, chunk: Chunk, dtype: str) -> Payload:
        where = (chunk.file, chunk.position)
        if where not in self._payloads:
            what = f"{self._files.folder / chunk.file}: {key} at byte {chunk.position}"
            payload = find_payload(self._files.descriptor(chunk.file), chunk.position, chunk.length, what)
            if payload.dtype != dtype or payload.shape != chunk.sizes:
                raise ConversionError(
                    f"{what} holds {payload.dtype} {payload.shape}, {METADATA} says {dtype} {chunk.sizes}: "
                    "files were mixed up"
                )
            self._payloads[where] = payload
        return self._payloads[where]

    def _read_into(self, part: np.ndarray, file: str, position: int) -> None:
        whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
        read_exactly(self._files.descriptor(file), whole, position, self._files.folder / file)
        if whole is not part:
            part[...] = whole

    def _check(self, folder: Path) -> None:
        """Every tensor of the folder has its place in the table, and every place its tensor."""
        unused = set(self.stored.tensors)
        for kind, prefix in KEY_PREFIX.items():
            keys = {self.key(kind, place): place for place in places(self.shape)}
            present = keys.keys() & unused
            if kind != "weights" and not present:
                continue
            missing = sorted(keys.keys() - present)
            if missing:
                raise ConversionError(
                    f"{folder} lacks {missing[0]} ({len(missing)} of its {prefix or 'weight'} tensors)"
                )
            dtypes = {self.stored.tensors[key].dtype for key in keys}
            if len(dtypes) != 1 or not dtypes <= BITS.keys():
                raise ConversionError(
                    f"{folder} stores its {kind} as {', '.join(sorted(dtypes))}; one float dtype is read"
                )
            self.dtypes[kind] = dtypes.pop()
            for key, place in keys.items():
                self._check_covered(folder, key, self.stored.tensors[key], place)
            unused -= keys.keys()
        if unused:
            raise ConversionError(f"{folder} holds {sorted(unused)[0]}, which the name table does not know")

    def _check_covered(self, folder: Path, key: str, tensor: Tensor, place: Place) -> None:
        rows, columns = place.entry.size(self.shape)
        one = (rows,) if place.entry.cut == "whole" else (rows, columns)
        shape = (self.shape.layers, *one) if place.entry.stacked else one
        if tensor.shape != shape:
            raise ConversionError(f"{folder}: {key} is {list(tensor.shape)}, its manifest's model says {list(shape)}")
        covered = sum(int(np.prod(chunk.sizes, dtype=np.int64)) for chunk in tensor.chunks)
        corners = {chunk.offsets for chunk in tensor.chunks}
        if covered != int(np.prod(shape, dtype=np.int64)) or len(corners) != len(tensor.chunks):
            raise ConversionError(f"{folder}: the chunks of {key} do not cover it exactly")


def _plane(chunk: Chunk, place: Place) -> tuple[int, int, int, int]:
    """(first row, first column, rows, columns) of a chunk in its layer's matrix."""
    if place.layer is not None and chunk.sizes[0] != 1:
        raise ConversionError(f"a chunk of {place.entry.ours} holds {chunk.sizes[0]} layers; one was expected")
    offsets = chunk.offsets[1:] if place.layer is not None else chunk.offsets
    sizes = chunk.sizes[1:] if place.layer is not None else chunk.sizes
    return (offsets[0], 0, sizes[0], 1) if len(sizes) == 1 else (offsets[0], offsets[1], sizes[0], sizes[1])


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint meant by `path`: one itself, a run's checkpoints folder, or a run folder (the latest is taken)."""
    if _STEP.fullmatch(path.resolve().name):
        return path
    for checkpoints in (path, path / "checkpoints"):
        pointer = checkpoints / "latest"
        if pointer.is_file():
            name = pointer.read_text(errors="replace").strip()
            if _STEP.fullmatch(name) and (checkpoints / name / MANIFEST).is_file():
                return checkpoints / name
            raise ConversionError(f"{pointer} says {name!r}, which is no complete checkpoint; give the folder itself")
        complete = [found for found in checkpoints.glob("step_*") if (found / MANIFEST).is_file()]
        if complete:  # a kill came between the last rename and the pointer
            return max(complete, key=lambda found: found.name)
    raise ConversionError(f"{path} is neither a checkpoint (step_00000941) nor a run folder with checkpoints/latest")


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete checkpoint, with what a conversion needs in it. ConversionError otherwise."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{folder} has no {MANIFEST}: it is not a complete checkpoint") from None
    except ValueError as error:
        raise ConversionError(f"{path} is damaged ({error}); use another checkpoint") from None
    if not isinstance(manifest, dict):
        raise ConversionError(f"{path} is damaged (it holds no table); use another checkpoint")
    lacking = [key for key in ("format", "step", "weights", "precision", "config", "files") if key not in manifest]
    if lacking:
        raise ConversionError(f"{path} lacks {', '.join(lacking)}; use another checkpoint")
    if manifest["format"] != 1 or manifest["precision"] not in _PRECISIONS:
        raise ConversionError(
            f"{path} has format {manifest['format']!r} and precision {manifest['precision']!r}; this version reads "
            f"format 1 with {' or '.join(_PRECISIONS)}: use the version of k2_megatron that wrote it"
        )
    problem = _problem_of_form(manifest)
    if problem:
        raise ConversionError(f"{path} is damaged ({problem}); use another checkpoint")
    if "xxh3" in manifest and manifest["xxh3"] != content_hash(manifest):  # those of earlier versions have none
        raise ConversionError(f"{path} is damaged (its content was altered: its own xxh3 hash differs)")
    if f"step_{manifest['step']:08d}" != folder.resolve().name:
        raise ConversionError(f"{path} belongs to step {manifest['step']}, not to {folder.name}: files were mixed up")
    return manifest


def _problem_of_form(manifest: dict) -> str | None:
    """What of a manifest is not of the form that a conversion reads."""
    wanted = {
        "step": int,
        "weights": str,
        "files": dict,
        "config": dict,
        "consumed_samples": int,
        "consumed_tokens": int,
    }
    wrong = [key for key, kind in wanted.items() if key in manifest and type(manifest[key]) is not kind]
    if wrong or manifest["step"] < 0:
        return f"{', '.join(wrong or ['step'])} is not what it should be"
    for name, facts in manifest["files"].items():
        known = isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("xxh3"), str)
        if not known or Path(name).name != name:
            return f"what it says of the file {name!r} is no size and hash"
    config = manifest["config"]
    if not all(isinstance(config.get(key, {}), dict) for key in ("model", "data")):
        return "its configuration holds no tables"
    try:
        ModelFacts.from_config(config.get("model", {}))
    except ConversionError as error:
        return str(error)
    return None
