"""Open files of one folder, by name, for readers that are copied into worker processes: each opens its own."""

import os
from pathlib import Path

_MOST = 64  # a checkpoint of many ranks has more files than a process may hold open


class OpenFiles:
    """Descriptors opened when first asked for, the oldest closed when they are many; a copy in another process starts
    with none. A descriptor is good until the next is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}

    def descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            if len(self._descriptors) >= _MOST:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
        return self._descriptors[name]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]
