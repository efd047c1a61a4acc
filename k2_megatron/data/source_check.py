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
        source = _find(entry["name"], folders)
        if source.size != entry["bytes"]:
            raise ValueError(
                f"{source.path}: {source.size} bytes, {entry['bytes']} when its tokens were made; {REMEDY}"
            )
        digests = _contents(source, keys, [size for size, _ in entry["content"]])
        for number, ((size, expected), digest) in enumerate(zip(entry["content"], digests, strict=True)):
            if digest != expected:
                raise ValueError(
                    f"{source.path}: another text than when its tokens were made, in part {number} of "
                    f"{len(entry['content'])} ({size} bytes of text); {REMEDY}"
                )
    return len(manifest["sources"])


REMEDY = "put back the file that was read, or make the tokens again"


def _find(name: str, folders: Sequence[Path]) -> Source:
    for folder in folders:
        path = folder / name
        source = source_at(str(path), name) if path.is_file() else None
        if source is not None:
            return source
    raise ValueError(f"{name}: not below {', '.join(map(str, folders))}; name the folders that --input named")


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
