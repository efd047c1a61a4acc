"""Text files as sources: which files are meant, what each is, its bytes as they were before compression.

In: paths, folders and globs. Out: `Source`s in the order of their names, and how much of one is held in memory at once.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

PIECE_BYTES = 2 << 20  # smaller ones cost no time, larger ones leave less memory to the encoder's words
READ_BYTES = 1 << 20
ROOM_BYTES = 8 << 20  # of a document, for which other things make room
MAX_DOCUMENT_BYTES = 64 << 20  # a longer line is rejected, so that a worker's memory stays bounded
LARGE_WINDOW_BYTES = 64 << 20  # of zstandard; beyond it, a worker has less room for a document:
MAX_BEHIND_LARGE_WINDOW_BYTES = 16 << 20  # one of 50 MB behind 128 MiB took 339 MB
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}
COMPRESSIONS = (".gz", ".zst", ".xz")


@dataclass(frozen=True)
class Source:
    """One input file. `name` is its path below what was asked for: the same on every machine."""

    name: str
    path: str
    kind: str  # "jsonl", "parquet" or "txt"
    compression: str  # "", ".gz", ".zst" or ".xz"
    size: int  # bytes on disk
    modified_ns: int  # when its content last changed, as the file system tells

    @property
    def splittable(self) -> bool:
        """Whether a worker can start in the middle of it."""
        return self.kind == "jsonl" and not self.compression


def find_sources(
    inputs: Sequence[str], output_prefix: str | None = None, announce: Callable[[str], None] = lambda text: None
) -> list[Source]:
    """Every text file that `inputs` (files, folders, globs) name, in the order of their names; what a job writes under
    `output_prefix` is none, should it lie among them. `announce` is told how many they are and were passed over.

    ValueError where there is no text file, part of a folder or a link cannot be read, two files have one name, or two
    inputs name one file twice.
    """
    found: dict[str, Source] = {}
    first_named: dict[str, tuple[Source, str]] = {}  # by what links lead to: the first of its sources, and its input
    others: list[str] = []
    for asked in inputs:
        folder, paths, hidden = _files_of(asked)
        paths = [path for path in paths if not (output_prefix and _is_output(path, output_prefix))]
        sources = [source_at(path, os.path.relpath(path, folder or ".")) for path in paths]
        chosen = [source for source in sources if source is not None]
        others += [path for path, source in zip(paths, sources, strict=True) if source is None] + hidden
        if not chosen:
            raise ValueError(
                f"{asked}: no text file there; give .jsonl, .parquet or .txt files (.gz, .zst, .xz compressed or not)"
            )
        for source in chosen:
            _add(source, asked, found, first_named)
    passed_over = f" ({len(others)} others passed over, first: {others[0]})" if others else ""
    announce(f"{len(found)} text {'file' if len(found) == 1 else 'files'}{passed_over}")
    return [found[name] for name in sorted(found)]


def _add(source: Source, asked: str, found: dict[str, Source], first_named: dict[str, tuple[Source, str]]) -> None:
    """ValueError where another file has its name, or an earlier input has named its file otherwise; links that lead one
    folder's names to one file are meant."""
    place = os.path.realpath(source.path)
    other = found.setdefault(source.name, source)
    if os.path.realpath(other.path) != place:
        raise ValueError(f"{other.path} and {source.path} have one name; give the folder that holds both")
    first, first_asked = first_named.setdefault(place, (source, asked))
    if other is source and first_asked != asked:
        raise ValueError(
            f"{first.path} (of --input {first_asked}) and {source.path} (of {asked}) are one file, whose documents "
            "would be taken twice; leave out one of the two inputs"
        )


def _files_of(asked: str) -> tuple[str, list[str], list[str]]:
    """(the folder below which sources are named, the files there, what is passed over: in a folder what is hidden as
    from a glob, of a glob the folders whose files it does not match); a name that exists is no pattern."""
    if os.path.isdir(asked):
        paths = list(_walk(asked, frozenset()))
        hidden = [path for path in paths if os.path.basename(path).startswith(".")]
        return asked, [path for path in paths if not os.path.basename(path).startswith(".")], hidden
    if os.path.exists(asked):
        return os.path.dirname(asked), [asked], []
    wildcards = [asked.index(mark) for mark in "*?[" if mark in asked]
    beginning = os.path.dirname(asked[: min(wildcards, default=None)])
    paths = [path for path in glob.glob(asked, recursive=True) if not _goes_in_a_circle(path, beginning)]
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if not os.path.isdir(path)]
    return beginning, files, [] if "**" in asked else folders


def _goes_in_a_circle(path: str, beginning: str) -> bool:
    """Whether a path comes, below its beginning, to a folder in which it is already: `**` follows links back up."""
    below = os.path.relpath(os.path.dirname(path) or ".", beginning or ".")
    names = [] if below == os.curdir else below.split(os.sep)
    folders = [os.path.realpath(os.path.join(beginning, *names[:depth])) for depth in range(len(names) + 1)]
    return len(set(folders)) < len(folders)


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    """What is below a folder, in order, through links, too; hidden folders themselves, and not what they hold. A link
    back to one of the folders `above` is not followed."""
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be read ({error.strerror}), so that part of --input would be missing; have it readable, "
            "or name the files to take"
        ) from None
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(entry.path, above | {place})
        else:
            yield entry.path


def _is_output(path: str, prefix: str) -> bool:
    """Whether preprocessing under `prefix` writes a file of this name that looks like text."""
    name, begin = os.path.realpath(path), os.path.join(os.path.realpath(os.path.dirname(prefix)), "")
    begin += os.path.basename(prefix)
    manifest = name.startswith(begin + "_") and name.endswith("_document.manifest.json")
    return manifest or name == begin + ".rejects.jsonl" or name.startswith(os.path.join(begin + ".shards", ""))


def source_at(path: str, name: str) -> Source | None:
    """One file as a source; None where its name is not that of a text, or it is no file. ValueError where it is a link
    to nothing."""
    base, suffix = os.path.splitext(path)
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = KINDS.get(os.path.splitext(base)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        return None
    try:
        facts = os.stat(path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); put back what it is a link to, or remove it"
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        return None
    return Source(name, path, kind, compression, facts.st_size, facts.st_mtime_ns)


def decompressed(source: Source, raw: IO[bytes]) -> IO[bytes]:
    """The uncompressed bytes of a source whose file is open as `raw`. EOFError where they were cut to none: what
    compresses nothing writes a header all the same."""
    if source.compression and source.size == 0:
        raise EOFError("cut short: it has no bytes")
    if source.compression == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if source.compression == ".xz":
        from k2_megatron.data.xz_file import XzFile

        return cast(IO[bytes], io.BufferedReader(XzFile(raw), READ_BYTES))
    if source.compression == ".zst":
        from k2_megatron.data.zstandard_file import ZstandardFile

        return cast(IO[bytes], io.BufferedReader(ZstandardFile(raw), READ_BYTES))
    return raw


def longest_document(file: IO[bytes] | None) -> int:
    """Bytes of the longest document that is taken of an open source, of which the beginning has been read."""
    behind_large = _window_bytes(file) > LARGE_WINDOW_BYTES
    return min(MAX_DOCUMENT_BYTES, MAX_BEHIND_LARGE_WINDOW_BYTES) if behind_large else MAX_DOCUMENT_BYTES


def too_long(file: IO[bytes] | None) -> str:
    """Why a longer one is rejected."""
    reason = f"longer than {longest_document(file) >> 20} MiB"
    window = _window_bytes(file)
    if window <= LARGE_WINDOW_BYTES:
        return reason
    return f"{reason}, behind zstandard's window of {window >> 20} MiB: compress the file with a smaller one (zstd -19)"


def _window_bytes(file: IO[bytes] | None) -> int:
    return getattr(getattr(file, "raw", None), "window_bytes", 0)


def why_not_utf8(content: bytes | bytearray | memoryview) -> str:
    try:
        if len(content) < READ_BYTES:
            str(content, "utf-8")
            return ""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for first in range(0, len(content) + 1, READ_BYTES):  # a string of the whole could take four bytes a character
            part = content[first : first + READ_BYTES]
            decoder.decode(part, final=first + READ_BYTES > len(content))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    return ""
