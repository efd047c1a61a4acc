"""torch's checkpoint writer, hashing what passes through it: no second pass over the data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from k2_megatron.runtime.collector import collector_paused


class _HashingStream:
    """A binary file that hashes what passes through it, in the order written (torch.save never seeks)."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self.digest = xxhash.xxh3_128()
        self.bytes_written = 0

    def write(self, data) -> int:
        self.digest.update(data)
        written = self._stream.write(data)
        self.bytes_written += written
        return written

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
    """torch's file system, keeping {file name: {"bytes", "xxh3"}} of all that is written through it."""

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
        self.files[Path(path).name] = {"bytes": hashing.bytes_written, "xxh3": hashing.digest.hexdigest()}

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
        """{file name: {"bytes", "xxh3"}} of what was written."""
        return self._hashing.files
