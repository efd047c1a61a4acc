"""Whether the texts that token files were made from are still what they were.

In: a manifest, and the folders that were given to preprocessing. Out: nothing; ValueError names the first file that is
missing or another. Everything is read again, a compressed file to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import Source, source_at

WHOLE = 1 << 62  # bytes of a shard: the file is one


def check_sources(manifest: dict[str, Any], folders: Sequence[Path]) -> int:
    """How many files were read. ValueError where one has no more the content that the manifest's tokens are of."""
    keys = manifest.get("keys", [manifest["key"]]) if manifest["sources"] else []
    for entry in manifest["sources"]:
        found = sorted(_find(entry["name"], folders), key=lambda source: source.size != entry["bytes"])
        problems = (_problem(source, entry, keys) for source in found)  # two folders may have a file of this name
        first = next(problems)
        if first is not None and all(problems):
            raise ValueError(f"{first}; {REMEDY}")
    return len(manifest["sources"])


def _problem(source: Source, entry: dict[str, Any], keys: Sequence[str]) -> str | None:
    """How a file differs from what tokens were made of; None where it does not."""
    if source.size != entry["bytes"]:
        return f"{source.path}: {source.size} bytes, {entry['bytes']} when its tokens were made"
    digests = _contents(source, keys, [size for size, _ in entry["content"]])
    for number, ((size, expected), digest) in enumerate(zip(entry["content"], digests, strict=True)):
        if digest != expected:
            return (
                f"{source.path}: another text than when its tokens were made, in part {number} of "
                f"{len(entry['content'])} ({size} bytes of text)"
            )
    return None


REMEDY = "put back the file that was read, or remove the manifest and make the tokens again"


def _find(name: str, folders: Sequence[Path]) -> list[Source]:
    paths = [folder / name for folder in folders]
    found = [source_at(str(path), name) for path in paths if path.is_file()]
    sources = [source for source in found if source is not None]
    if not sources:
        raise ValueError(f"{name}: not below {', '.join(map(str, folders))}; name the folders that --input named")
    return sources


def _contents(source: Source, keys: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
    """The hash of each of so many bytes of text; of what is left, too, with the last."""
    parts = (memoryview(part) for piece in pieces(source, keys, WHOLE, 0, None) for part in piece.raw)
    part = memoryview(b"")
    for number, size in enumerate(sizes):
        digest, is_last = xxhash.xxh3_64(), number == len(sizes) - 1
        while size or is_last:
            if not part:
                following = next(parts, None)
                if following is None:
                    break
                part = following
                continue
            taken = part if is_last else part[:size]
            digest.update(taken)
            part, size = part[len(taken) :], size - len(taken)
        yield digest.hexdigest()
