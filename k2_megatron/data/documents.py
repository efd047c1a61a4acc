"""Where the tokens of a sample came from: document, file, and line of the source text.

In: a row of a source, and the manifest of its token file. Out: the documents in it, and the line each was read from.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2_megatron.data.rows import RowStore


@dataclass(frozen=True)
class DocumentSpan:
    """A document's share of a row or of a sample: tokens first_token..end_token-1 of one file, which are tokens
    start..end-1 of the sample; `ends`: with the document's end.

    Where fill-in-the-middle `reordered` them, the tokens of the file are all that were reordered together: of these the
    sample holds what it has room for, and three pieces more.
    """

    source: str
    file: str  # name of the token file
    document: int  # number in that file
    first_token: int
    end_token: int
    ends: bool
    start: int
    end: int
    reordered: bool = False
    prefix: str = ""  # where the token file lies: two files may have one name

    def within(self, first: int, end: int, at: int) -> DocumentSpan | None:
        """What lies in tokens first..end-1 of that in which start and end count, `first` now numbered `at`; None for
        nothing."""
        low, high = max(first, self.start), min(end, self.end)
        if low >= high:
            return None
        moved = replace(self, start=low - first + at, end=high - first + at, ends=self.ends and high == self.end)
        if self.reordered:
            return moved
        return replace(
            moved, first_token=self.first_token + low - self.start, end_token=self.end_token + high - self.end
        )


def describe_row(store: RowStore, source: int, row: int, source_name: str) -> list[DocumentSpan]:
    """The documents of one row, in order."""
    stream, position = store.locate(source, row)
    prefix = stream.file.prefix
    name = os.path.basename(prefix)
    found: list[DocumentSpan] = []
    start = 0
    for first, end in stream.parts(position, store.row_length + 1):
        document = stream.file.document_at(first)
        while first < end:
            stop = stream.file.first_token(document + 1)
            last = min(end, stop)
            size = last - first
            if size:  # an empty document holds no token
                place = (document, first, last, stop <= end, start, start + size)
                found.append(DocumentSpan(source_name, name, *place, prefix=prefix))
            first, start, document = last, start + size, document + 1
    return found


def short_names(prefixes: Iterable[str]) -> dict[str, str]:
    """Each file's name, with as many of the folders above it as tell it from the others."""
    whole = {prefix: Path(os.path.realpath(prefix)).parts for prefix in prefixes}
    found: dict[str, str] = {}
    for depth in range(1, 1 + max(map(len, whole.values()), default=0)):
        counts = Counter(parts[-depth:] for parts in set(whole.values()))
        found = {
            prefix: "/".join(parts[-depth:]) for prefix, parts in whole.items() if counts[parts[-depth:]] == 1
        } | found
    return found


def line_of_document(manifest: dict[str, Any], file: str, document: int) -> tuple[str, int] | None:
    """(source file, line from 1) that a document was read from; None for files that were made without a record."""
    entry = next(entry for entry in manifest["files"] if entry["name"] == file)
    for part in entry.get("parts", ()):
        if document < part["documents"]:
            return manifest["sources"][part["source"]]["name"], part["first_line"] + _line(document, part["skipped"])
        document -= part["documents"]
    return None


def _line(document: int, skipped: list[int]) -> int:
    """The document-th line, counted from 0, that is not in `skipped` (ascending)."""
    before = [line - number for number, line in enumerate(skipped)]  # documents before each skipped line
    return document + bisect_right(before, document)
