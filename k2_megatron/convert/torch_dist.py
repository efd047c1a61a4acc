"""Our checkpoints as a source: torch_dist folders with their manifest, whatever layout wrote the chunks."""

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
from k2_megatron.train.checkpoints import manifest as checkpoint_manifest
from k2_megatron.train.checkpoints.folders import latest_checkpoint
from k2_megatron.train.checkpoints.manifest import FOLDER, MANIFEST, CheckpointError

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
    """The checkpoint meant by `path`: one itself, or of a run folder or its checkpoints folder the one that the run
    would go on from; where `latest` does not name that one, it is told."""
    if FOLDER.fullmatch(path.resolve().name):
        return path
    for checkpoints in (path, path / "checkpoints"):
        try:
            folder, doubt = latest_checkpoint(checkpoints)
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        if folder is not None:
            if doubt:
                print(f"{doubt}: {folder.name} is taken, the newest whole one", flush=True)
            return folder
    raise ConversionError(
        f"{path} is neither a checkpoint (step_00000941) nor a run folder with checkpoints/latest{_what_else(path)}"
    )


def _what_else(path: Path) -> str:
    """What a path is that is not ours, and what to do with it."""
    if not path.exists():
        return ": it does not exist; give another --load"
    if any(path.glob("mp_rank_*")):
        return ": it looks like an old K2 iteration, which from-k2-legacy reads"
    if (path / "config.json").is_file():
        return ": it looks like a Hugging Face model, which from-hf reads"
    return "; give another --load"


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete checkpoint, with what a conversion needs in it. ConversionError otherwise."""
    try:
        # A link may have any name, and what it points at too
        manifest = checkpoint_manifest.read_manifest(folder if FOLDER.fullmatch(folder.name) else folder.resolve())
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    path, config = folder / MANIFEST, manifest["config"]
    if manifest["precision"] not in _PRECISIONS:
        raise ConversionError(
            f"{path} has precision {manifest['precision']!r}; {' or '.join(_PRECISIONS)} is read: use the version of "
            "k2_megatron that wrote it"
        )
    if not all(isinstance(config.get(key, {}), dict) for key in ("model", "data")):
        raise ConversionError(f"{path} is damaged (its configuration holds no tables); use another checkpoint")
    try:
        ModelFacts.from_config(config.get("model", {}))
    except ConversionError as error:
        raise ConversionError(f"{path} is damaged ({error}); use another checkpoint") from None
    return manifest
