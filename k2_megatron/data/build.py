"""Recipe and token files to plans: one to train on and, of the documents held out, one to evaluate on.

In: a `Recipe` and the manifests of its token files. Out: two plan folders (plan.py), the same bytes for the same
recipe, files and seed, on any machine and with any number of threads.
A source's rows come in one fixed shuffled order, again and again if it is repeated: copies of a row are one whole pass
apart, but for the order within a chunk. Each chunk takes its number of rows (mixture.py) and is shuffled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.data.mixture import rows_of_sources, used_after_chunks
from k2_megatron.data.permutation import Permutation, hash64
from k2_megatron.data.plan import FORMAT, chunk_path
from k2_megatron.data.plan_folders import folder_aside, give_names, write_durably
from k2_megatron.data.recipe import Recipe, chunk_order
from k2_megatron.data.recipe_files import FimPieces, SourceFile, fim_pieces, open_sources
from k2_megatron.data.rows import pack
from k2_megatron.data.store import write_sealed
from k2_megatron.runtime.durable import sync


def build_plans(
    recipe: Recipe,
    train_folder: Path,
    held_out_folder: Path | None,
    *,
    threads: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the training plan and, where the recipe holds documents out, the held-out plan. Returns the former.

    ValueError: recipe and files do not fit (named), or the folders hold something already.
    """
    if (recipe.held_out_fraction > 0) != (held_out_folder is not None):
        raise ValueError(
            f"held_out_fraction is {recipe.held_out_fraction}: name a folder for the held-out plan where it is more "
            "than 0, and only there"
        )
    _check_folders(train_folder, held_out_folder)
    manifests, sources = open_sources(recipe, threads)
    fim = fim_pieces(recipe, manifests)
    report(f"{sum(len(files) for files in sources)} token files, {len(manifests)} manifests")
    available = [_rows(files, recipe.sequence_length, False) for files in sources]
    rows_per_chunk, totals = rows_of_sources(recipe, available)
    report(f"{recipe.chunks} chunks of {rows_per_chunk} rows")
    used = used_after_chunks(totals, recipe.chunks)
    order = chunk_order(recipe.order, recipe.chunks)
    parts = {train_folder: _Part(recipe, manifests, sources, available, used, order, fim)}
    if held_out_folder is not None:
        parts = {held_out_folder: _held_out_part(recipe, manifests, sources), **parts}
    with ExitStack() as stack:  # after all that can be refused, so that a refusal leaves no folder behind
        asides = {folder: stack.enter_context(folder_aside(folder)) for folder in parts}
        contents = [_write_plan(part, asides[folder], folder, threads) for folder, part in parts.items()]
        give_names(asides)
    return contents[-1]


def _check_folders(train_folder: Path, held_out_folder: Path | None) -> None:
    if held_out_folder is not None:
        train, held_out = (Path(os.path.realpath(folder)) for folder in (train_folder, held_out_folder))
        if train == held_out:
            raise ValueError(f"{train_folder}: named for both plans; the held-out plan needs a folder of its own")
        if train in held_out.parents or held_out in train.parents:
            raise ValueError(
                f"{train_folder} and {held_out_folder}: one plan's folder lies in the other's; name others"
            )
    for folder in (train_folder, held_out_folder):
        if folder is not None and folder.exists():
            raise ValueError(f"{folder}: exists; remove it, or name another folder")


def _held_out_part(recipe: Recipe, manifests: list[dict[str, Any]], sources: list[list[SourceFile]]) -> _Part:
    """One chunk of every held-out row, each once for every source that its document is of."""
    available = [_rows(files, recipe.sequence_length, True) for files in sources]
    if sum(available) == 0:
        raise ValueError(
            f"held_out_fraction = {recipe.held_out_fraction} holds out no whole row of {recipe.sequence_length + 1} "
            "tokens; raise it, or give more text"
        )
    used = [[0] * len(sources), available]
    return _Part(recipe, manifests, sources, available, used, [0], held_out=True)


def _rows(files: Sequence[SourceFile], row_length: int, held_out: bool) -> int:
    tokens = [int(np.diff(file.spans(held_out), axis=1).sum()) for file in files]
    return sum(max(0, (count - 1) // row_length) for count in tokens)


@dataclass(frozen=True)
class _Part:
    """What one of the two plans is made of. `rows` of each source there are, `used` of them before each chunk."""

    recipe: Recipe
    manifests: list[dict[str, Any]]
    sources: list[list[SourceFile]]
    rows: list[int]
    used: list[list[int]]
    order: list[int]
    fim: FimPieces | None = None
    held_out: bool = False

    def spans(self) -> list[np.ndarray]:
        return [file.spans(self.held_out) for files in self.sources for file in files]

    def content(self, spans_xxh3: str, chunks_xxh3: list[str]) -> dict[str, Any]:
        """plan.json."""
        made_with = (manifest["tokenizer"] for manifest in self.manifests if manifest.get("tokenizer"))
        return {
            "format": FORMAT,
            "part": "held_out" if self.held_out else "train",
            "sequence_length": self.recipe.sequence_length,
            "rows_per_chunk": sum(self.used[1]),
            "chunk_order": self.order,
            "tokenizer": next(made_with, None),
            "fim": self.fim and self.fim.ids,
            "fim_tokenizer": self.fim and self.fim.tokenizer,
            "manifests": [manifest["xxh3"] for manifest in self.manifests],
            "sources": self._content_of_sources(),
            "rows_used_before_chunk": self.used,
            "spans_xxh3": spans_xxh3,
            "chunks_xxh3": chunks_xxh3,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def _content_of_sources(self) -> list[dict[str, Any]]:
        first_spans = iter(np.cumsum([0, *map(len, self.spans())]).tolist())
        found = []
        for number, (name, source) in enumerate(self.recipe.sources.items()):
            rows, used = self.rows[number], self.used[-1][number]
            files = [
                {
                    "manifest": file.manifest,
                    "entry": {key: value for key, value in file.entry.items() if key != "parts"},
                    "spans": [next(first_spans), len(file.spans(self.held_out))],
                }
                for file in self.sources[number]
            ]
            found.append(
                {
                    "name": name,
                    "rows_available": rows,
                    "rows_used": used,
                    "repeats": used / rows if rows else 0.0,
                    "fim_psm": 0.0 if self.held_out else source.fim_psm,
                    "fim_spm": 0.0 if self.held_out else source.fim_spm,
                    "files": files,
                }
            )
        return found

    def locations(self, folder: Path) -> dict[str, Any]:
        """locations.json."""
        paths = [_way(folder, Path(manifest["path"])) for manifest in self.manifests]
        if self.fim is None or self.fim.tokenizer is None:
            return {"manifests": paths}
        assert self.recipe.fim is not None, "pieces come of a recipe's [fim]"
        return {"manifests": paths, "fim_tokenizer": _way(folder, Path(self.recipe.fim.tokenizer))}


def _way(folder: Path, path: Path) -> str:
    """To `path` from where `folder` is, whatever links lead to the latter: `..` does, too. Links on the way to `path`
    are kept where they lead there from here: whoever moves the tokens points them to the new place."""
    start, place = os.path.realpath(folder), os.path.realpath(path.parent)
    for way in (os.path.relpath(path, folder), os.path.relpath(path, start)):
        if os.path.realpath(os.path.join(start, os.path.dirname(way))) == place:
            return way
    return os.path.relpath(os.path.join(place, path.name), start)


def _write_plan(part: _Part, aside: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Write into `aside` what will be the plan `folder`, safe from a power cut. Returns plan.json."""
    span_bytes = np.concatenate(part.spans()).astype("<i8").tobytes()
    write_durably(aside / "spans.i64", span_bytes)
    (aside / "chunks").mkdir()
    write_chunk = _ChunkWriter(aside, part.recipe.seed, list(part.recipe.sources), part.rows, part.used)
    with ThreadPoolExecutor(threads) as pool:
        chunk_hashes = list(pool.map(write_chunk, range(len(part.order))))
    sync(aside / "chunks")
    content = part.content(xxhash.xxh3_64_hexdigest(span_bytes), chunk_hashes)
    write_durably(aside / "locations.json", (json.dumps(part.locations(folder), indent=1) + "\n").encode())
    write_sealed(aside / "plan.json", content)
    return content


class _ChunkWriter:
    """Writes one chunk's rows; the same bytes in whatever order chunks are written."""

    def __init__(self, folder: Path, seed: int, names: list[str], available: list[int], used: list[list[int]]):
        self.folder, self.seed, self.available, self.used = folder, seed, available, used
        self.orders = [
            Permutation(rows, hash64(seed, "source", name)) if rows else None
            for name, rows in zip(names, available, strict=True)
        ]

    def __call__(self, chunk: int) -> str:
        """The xxh3 of what was written."""
        parts = [
            pack(number, order(np.arange(self.used[chunk][number], self.used[chunk + 1][number]) % order.size))
            for number, order in enumerate(self.orders)
            if order is not None
        ]
        rows = np.concatenate(parts)
        shuffled = np.empty(len(rows), dtype="<u8")
        shuffled[Permutation(len(rows), hash64(self.seed, "chunk", chunk))(np.arange(len(rows)))] = rows
        write_durably(chunk_path(self.folder, chunk), shuffled.data)
        return xxhash.xxh3_64_hexdigest(shuffled.data)
