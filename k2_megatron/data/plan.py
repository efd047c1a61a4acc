"""The plan: for each chunk its rows, as records (source, row), in the order they are trained. build.py makes it.

In: a plan folder. Out: row records by position, streams to read them from. The folder holds

    plan.json       sizes, sources, files with their hashes, order of the chunks, hashes of the rest; sealed
    locations.json  where the token files' manifests are, relative to this folder; the one file that may be edited
    spans.i64       which tokens of each file may be used: int64 pairs (first, end), file after file
    chunks/NNNNN.rows   uint64 row records of chunk NNNNN (rows.py), 8 bytes a row

Opening reads plan.json and the sizes of the token files; a chunk's records are read, and their hash checked, when the
first of its rows is asked for.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from k2_megatron.data.manifest import CheckedTokenFile, read_manifest
from k2_megatron.data.rows import Stream
from k2_megatron.data.store import read_sealed

if TYPE_CHECKING:
    from k2_megatron.data.tokenizer import Tokenizer

FORMAT = "k2_megatron plan 1"
REBUILD = "build the plan again with tools/build_plan.py, or restore it from a copy"
KEPT_CHUNKS = 2  # chunks whose records stay in memory: this one and the next


def chunk_path(folder: Path, chunk: int) -> Path:
    return folder / "chunks" / f"{chunk:05d}.rows"


class Plan:
    """An open plan. `content` is plan.json; `rows` counts all positions."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content = read_sealed(folder / "plan.json", REBUILD)
        if self.content.get("format") != FORMAT:
            raise ValueError(f"{folder}: format {self.content.get('format')!r}, this reads {FORMAT!r}; {REBUILD}")
        self.fingerprint: str = self.content["xxh3"]
        self.row_length: int = self.content["sequence_length"]
        self.rows_per_chunk: int = self.content["rows_per_chunk"]
        self.chunk_order: list[int] = self.content["chunk_order"]
        self.rows = self.rows_per_chunk * len(self.chunk_order)
        self.sources: list[dict[str, Any]] = self.content["sources"]
        self._check_chunk_files()
        self._loaded: dict[int, Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    def _check_chunk_files(self) -> None:
        for chunk in range(len(self.chunk_order)):
            path = chunk_path(self.folder, chunk)
            size = path.stat().st_size if path.is_file() else None
            if size != 8 * self.rows_per_chunk:
                found = "is missing" if size is None else f"has {size} bytes, not {8 * self.rows_per_chunk}"
                raise ValueError(f"{path}: {found}; {REBUILD}")

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="plan chunk")

    def _read_chunk(self, chunk: int) -> np.ndarray:
        path = chunk_path(self.folder, chunk)
        content = path.read_bytes()
        if xxhash.xxh3_64_hexdigest(content) != self.content["chunks_xxh3"][chunk]:
            raise ValueError(f"{path}: damaged (its hash is not plan.json's); {REBUILD}")
        return np.frombuffer(content, dtype="<u8")

    def load_chunk(self, chunk: int) -> Future[np.ndarray]:
        """Start reading a chunk's records in the background, where that has not been done."""
        with self._lock:
            if chunk not in self._loaded:
                while len(self._loaded) >= KEPT_CHUNKS:
                    self._loaded.pop(next(iter(self._loaded)))
                self._loaded[chunk] = self._reader.submit(self._read_chunk, chunk)
            return self._loaded[chunk]

    def records(self, positions: np.ndarray) -> np.ndarray:
        """Row records uint64 of plan positions: position p is row p % rows_per_chunk of the chunk numbered
        p // rows_per_chunk. The order in which chunks are trained is the schedule's."""
        out = np.empty(len(positions), dtype=np.uint64)
        chunks = positions // self.rows_per_chunk
        for chunk in dict.fromkeys(chunks.tolist()):
            here = chunks == chunk
            out[here] = self.load_chunk(chunk).result()[positions[here] % self.rows_per_chunk]
        return out

    def prefetch(self, position: int) -> None:
        """Have the chunk of a position read in the background."""
        self.load_chunk(position // self.rows_per_chunk)

    def streams(self) -> list[list[Stream]]:
        """For each source the streams of its files. ValueError where a file is missing, cut, or another one."""
        spans = self._read_spans()
        folders = self._token_folders()
        sources = []
        for source in self.sources:
            streams = []
            for file in source["files"]:
                prefix = folders[file["manifest"]] / file["entry"]["name"]
                check_sizes(prefix, file["entry"])
                first, count = file["spans"]
                streams.append(Stream(_opener(prefix, file["entry"]), spans[first : first + count]))
            sources.append(streams)
        return sources

    def _read_spans(self) -> np.ndarray:
        path = self.folder / "spans.i64"
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_64_hexdigest(content) != self.content["spans_xxh3"]:
            raise ValueError(f"{path}: missing or damaged; {REBUILD}")
        return np.frombuffer(content, dtype="<i8").reshape(-1, 2)

    def fim_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that cuts documents between characters, where the recipe asked for that."""
        expected = self.content.get("fim_tokenizer")
        if expected is None:
            return None
        from k2_megatron.data.tokenizer import load_tokenizer

        name = self._locations().get("fim_tokenizer")
        if not isinstance(name, str):
            raise ValueError(f"{self.folder}/locations.json: names no fim_tokenizer; {REBUILD}")
        tokenizer = load_tokenizer(self.folder / name)
        if tokenizer.fingerprint != expected:
            raise ValueError(
                f"{tokenizer.path}: not the tokenizer that {self.folder} was built with; correct fim_tokenizer in its "
                f"locations.json, or {REBUILD}"
            )
        return tokenizer

    def _locations(self) -> dict[str, Any]:
        path = self.folder / "locations.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not an object")
            return content
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: unreadable ({error}); {REBUILD}") from None

    def manifest_paths(self) -> list[Path]:
        """Where the manifests lie, in the order of plan.json's `manifests`."""
        path = self.folder / "locations.json"
        locations = self._locations()
        try:
            paths = [self.folder / name for name in locations["manifests"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: unreadable ({error}); {REBUILD}") from None
        if len(paths) != len(self.content["manifests"]):
            raise ValueError(
                f"{path}: names {len(paths)} manifests, the plan has {len(self.content['manifests'])}; {REBUILD}"
            )
        return paths

    def _token_folders(self) -> list[Path]:
        """The folder of each manifest's token files; the manifests must be those the plan was built from."""
        paths = self.manifest_paths()
        for path, expected in zip(paths, self.content["manifests"], strict=True):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such manifest; restore it, or correct {self.folder}/locations.json where the tokens "
                    "were moved"
                )
            if read_manifest(path)["xxh3"] != expected:
                raise ValueError(f"{path}: not the manifest that {self.folder} was built from; {REBUILD}")
        return [path.parent for path in paths]


def check_sizes(prefix: Path, entry: dict[str, Any]) -> None:
    """ValueError unless `.bin` and `.idx` have the sizes of their entry: three system calls a file, no read."""
    for suffix, key in ((".bin", "bin_bytes"), (".idx", "idx_bytes")):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size if path.is_file() else None
        if size != entry[key]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry[key]}"
            raise ValueError(f"{path}: {found}; restore it, or correct locations.json where the tokens were moved")


def _opener(prefix: Path, entry: dict[str, Any]):
    return lambda: CheckedTokenFile(prefix, entry)
