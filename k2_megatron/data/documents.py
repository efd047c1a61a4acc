"""Where the tokens of a row came from: document, file, and line of the source text.

In: a row of a source, and the manifest of its token file. Out: the documents in it, and the line each was read from.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from k2_megatron.data.rows import RowStore


@dataclass(frozen=True)
class DocumentSpan:
    """A document's share of a row: tokens first_token..end_token-1 of one file; `ends`: the document ends there."""

    source: str
    file: str  # name of the token file
    document: int  # number in that file
    first_token: int
    end_token: int
    ends: bool


def describe_row(store: RowStore, source: int, row: int, source_name: str) -> list[DocumentSpan]:
    """The documents of one row, in order."""
    stream, position = store.locate(source, row)
    found = []
    for first, end in stream.parts(position, store.row_length + 1):
        while first < end:
            document = stream.file.document_at(first)
            stop = int(stream.file.document_start(document + 1))
            name = os.path.basename(stream.file.prefix)
            found.append(DocumentSpan(source_name, name, document, first, min(end, stop), stop <= end))
            first = min(end, stop)
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
