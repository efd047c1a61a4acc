"""torch's checkpoint writer, hashing what passes through it, without copies: no second pass over the data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from k2_megatron.runtime.collector import collector_paused
from k2_megatron.train.checkpoints.file_hash import AES_LANES, new_hash

HASH = AES_LANES
_BLOCK = 256 << 10  # stays in a core's second cache between writing and hashing


class _HashingStream:
    """A binary file that hashes what passes through it, in the order written (torch.save never seeks)."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self.digest = new_hash(HASH)
        self.bytes_written = 0

    def write(self, data) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _BLOCK):
            block = whole[start : start + _BLOCK]
            self._stream.write(block)
            self.digest.update(block)  # after it: read from memory once, for both
        self.bytes_written += len(whole)
        return len(whole)

    def tell(self) -> int:
        return self.bytes_written

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # torch asks for it to fsync, and does not flush: the last buffer would not be on the disk
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


class _HashingFileSystem(FileSystem):
    """torch's file system, keeping {file name: {"bytes", hash}} of all that is written through it."""

    def __init__(self) -> None:
        self.files: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
        self.files[Path(path).name] = {"bytes": hashing.bytes_written, HASH: hashing.digest.hexdigest()}

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """torch's checkpoint writer, whose files are hashed as they are written: no second pass over the data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.fs = self._hashing = _HashingFileSystem()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the tables."""
        with collector_paused():
            super().finish(metadata, results)

    @property
    def files(self) -> dict[str, dict]:
        """{file name: {"bytes", hash}} of what was written."""
        return self._hashing.files


class SavePlanner(MCoreSavePlanner):
    """megatron-core's planner, whose tensors torch's writer takes as they lie in host memory."""

    def create_global_plan(self, all_plans):
        """Put the ranks' plans together."""
        with collector_paused():
            return super().create_global_plan(all_plans)

    def resolve_data(self, write_item):
        """What is written. A tensor in host memory seems to have a storage of its own: a part of a larger one torch's
        writer would copy first, since torch.save writes storages whole."""
        data = super().resolve_data(write_item)
        if not isinstance(data, torch.Tensor) or not data.is_cpu:
            return data
        alone = torch.from_numpy(data.detach().reshape(-1).view(torch.uint8).numpy())
        return alone.view(data.dtype).view(data.shape)
