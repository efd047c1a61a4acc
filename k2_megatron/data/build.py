"""Recipe and token files to plans: one to train on and, of the documents held out, one to evaluate on.

In: a `Recipe` and the manifests of its token files. Out: two plan folders (plan.py), the same bytes for the same
recipe, files and seed, on any machine and with any number of threads.
A source's rows come in one fixed shuffled order, again and again if it is repeated: copies of a row are as far apart as
they can be, one whole pass. Each chunk takes its number of rows (mixture.py) and is shuffled.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.data.held_out import complement, held_out_spans
from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.manifest import manifest_path, read_manifest
from k2_megatron.data.mixture import rows_of_sources, used_after_chunks
from k2_megatron.data.permutation import Permutation, hash64
from k2_megatron.data.plan import FORMAT, check_sizes, chunk_path
from k2_megatron.data.recipe import Recipe, SourceRecipe, chunk_order
from k2_megatron.data.rows import pack
from k2_megatron.data.store import write_sealed
from k2_megatron.data.tokenizer import load_tokenizer

ROUND_TRIP = "for (int i = 0; i < 3; ++i)\n\tsum += naïve;  // the tokens of this must decode to it"


@dataclass(frozen=True)
class SourceFile:
    """One token file of a source: where it is, its manifest's entry, and the spans to train on and to hold out."""

    prefix: Path
    manifest: int
    entry: dict[str, Any]
    trained: np.ndarray  # int64 [n, 2]: first and end token
    held_out: np.ndarray

    def spans(self, held_out: bool) -> np.ndarray:
        return self.held_out if held_out else self.trained


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
    if train_folder == held_out_folder:
        raise ValueError(f"{train_folder}: named for both plans; the held-out plan needs a folder of its own")
    for folder in (train_folder, held_out_folder):
        if folder is not None and folder.exists():
            raise ValueError(f"{folder}: exists; remove it, or name another folder")
    fim = _fim_pieces(recipe)
    manifests, sources = _open_sources(recipe, threads)
    report(f"{sum(len(files) for files in sources)} token files, {len(manifests)} manifests")
    available = [_rows(files, recipe.sequence_length, False) for files in sources]
    rows_per_chunk, totals = rows_of_sources(recipe, available)
    report(f"{recipe.chunks} chunks of {rows_per_chunk} rows")
    used = used_after_chunks(totals, recipe.chunks)
    if held_out_folder is not None:  # after all that can be refused, so that a refusal leaves no folder behind
        _write_held_out_plan(recipe, held_out_folder, manifests, sources)
    return _write_plan(
        recipe,
        train_folder,
        manifests,
        sources,
        available,
        used,
        chunk_order(recipe.order, recipe.chunks),
        threads,
        fim,
    )


def _write_held_out_plan(
    recipe: Recipe, folder: Path, manifests: list[dict[str, Any]], sources: list[list[SourceFile]]
) -> None:
    """One chunk of every held-out row, each once."""
    available = [_rows(files, recipe.sequence_length, True) for files in sources]
    if sum(available) == 0:
        raise ValueError(
            f"held_out_fraction = {recipe.held_out_fraction} holds out no whole row of {recipe.sequence_length + 1} "
            "tokens; raise it, or give more text"
        )
    used = [[0] * len(sources), available]
    _write_plan(recipe, folder, manifests, sources, available, used, [0], 1, None, held_out=True)


def _open_sources(recipe: Recipe, threads: int) -> tuple[list[dict[str, Any]], list[list[SourceFile]]]:
    """Every manifest once (with its path under "path"), and for each source its files."""
    paths = sorted({path for source in recipe.sources.values() for path in _manifest_paths(source)})
    manifests = [{**read_manifest(path), "path": path} for path in paths]
    known = [manifest["tokenizer"]["fingerprint"] for manifest in manifests if manifest.get("tokenizer")]
    if len(set(known)) > 1:
        other = next(path for path, print_ in zip(paths, known, strict=False) if print_ != known[0])
        raise ValueError(f"{other}: made with another tokenizer than {paths[0]}; a plan needs one tokenizer")
    numbers = {path: number for number, path in enumerate(paths)}
    jobs = [
        (source, numbers[path], path.parent / entry["name"], entry)
        for source in recipe.sources.values()
        for path in _manifest_paths(source)
        for entry in manifests[numbers[path]]["files"]
    ]
    with ThreadPoolExecutor(threads) as pool:
        files = iter(list(pool.map(lambda job: _source_file(recipe, *job), jobs)))
    counts = [
        sum(len(manifests[numbers[path]]["files"]) for path in _manifest_paths(source))
        for source in recipe.sources.values()
    ]
    return manifests, [[next(files) for _ in range(count)] for count in counts]


def _manifest_paths(source: SourceRecipe) -> list[Path]:
    found = []
    for pattern in source.tokens:
        name = str(manifest_path(pattern))
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise ValueError(
                f"{name}: no such manifest; make the tokens with tools/preprocess_data.py, or write a manifest for "
                "Megatron's files with tools/inspect_data.py manifest PREFIX"
            )
        found += [Path(path) for path in paths]
    return found


def _source_file(recipe: Recipe, source: SourceRecipe, manifest: int, prefix: Path, entry: dict) -> SourceFile:
    """Decide, document by document, what of a file is held out. The hash is of the file's name, not of the source's:
    two sources over one file hold out the same documents."""
    check_sizes(prefix, entry)
    file = TokenFile(prefix)
    first, end = source.documents or (0, file.documents)
    if end > file.documents:
        raise ValueError(f"{prefix}: has {file.documents} documents, the recipe asks for {first}..{end}")
    start, stop = int(file.document_start(first)), int(file.document_start(end))
    key = hash64(recipe.seed, "held out", entry["name"])
    held_out = held_out_spans(file, first, end, recipe.held_out_fraction, key)
    return SourceFile(prefix, manifest, entry, complement(held_out, start, stop), held_out)


def _rows(files: Sequence[SourceFile], row_length: int, held_out: bool) -> int:
    tokens = [int(np.diff(file.spans(held_out), axis=1).sum()) for file in files]
    return sum(max(0, (count - 1) // row_length) for count in tokens)


def _write_plan(
    recipe: Recipe,
    folder: Path,
    manifests: list[dict[str, Any]],
    sources: list[list[SourceFile]],
    available: list[int],
    used: list[list[int]],
    order: list[int],
    threads: int,
    fim: FimPieces | None,
    held_out: bool = False,
) -> dict[str, Any]:
    """Write a plan folder aside and rename it into place."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "chunks").mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}); name a folder that you may write to") from None
    spans = [file.spans(held_out) for files in sources for file in files]
    span_bytes = np.concatenate(spans).astype("<i8").tobytes()
    (aside / "spans.i64").write_bytes(span_bytes)
    write_chunk = _ChunkWriter(aside, recipe.seed, list(recipe.sources), available, used)
    with ThreadPoolExecutor(threads) as pool:
        chunk_hashes = list(pool.map(write_chunk, range(len(order))))
    first_spans = iter(np.concatenate([[0], np.cumsum([len(part) for part in spans])]).tolist())
    content = {
        "format": FORMAT,
        "part": "held_out" if held_out else "train",
        "sequence_length": recipe.sequence_length,
        "rows_per_chunk": sum(used[1]),
        "chunk_order": order,
        "tokenizer": next((manifest["tokenizer"] for manifest in manifests if manifest.get("tokenizer")), None),
        "fim": fim and fim.ids,
        "fim_tokenizer": fim and fim.tokenizer,
        "manifests": [manifest["xxh3"] for manifest in manifests],
        "sources": [
            {
                "name": name,
                "rows_available": own,
                "rows_used": total,
                "repeats": total / own if own else 0.0,
                "fim_psm": 0.0 if held_out else source.fim_psm,
                "fim_spm": 0.0 if held_out else source.fim_spm,
                "files": [
                    {
                        "manifest": file.manifest,
                        "entry": {key: value for key, value in file.entry.items() if key != "parts"},
                        "spans": [next(first_spans), len(file.spans(held_out))],
                    }
                    for file in files
                ],
            }
            for (name, source), own, total, files in zip(
                recipe.sources.items(), available, used[-1], sources, strict=True
            )
        ],
        "rows_used_before_chunk": used,
        "spans_xxh3": xxhash.xxh3_64_hexdigest(span_bytes),
        "chunks_xxh3": chunk_hashes,
        "recipe": recipe.model_dump(mode="json"),
    }
    write_sealed(aside / "plan.json", content)
    locations: dict[str, Any] = {"manifests": [os.path.relpath(manifest["path"], folder) for manifest in manifests]}
    if fim and fim.tokenizer:
        assert recipe.fim is not None, "pieces come of a recipe's [fim]"
        locations["fim_tokenizer"] = os.path.relpath(recipe.fim.tokenizer, folder)
    (aside / "locations.json").write_text(json.dumps(locations, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder)
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
        chunk_path(self.folder, chunk).write_bytes(shuffled.data)
        return xxhash.xxh3_64_hexdigest(shuffled.data)


@dataclass(frozen=True)
class FimPieces:
    """The ids of the three pieces, and the fingerprint of the tokenizer where reading rows needs it."""

    ids: dict[str, int]
    tokenizer: str | None


def _fim_pieces(recipe: Recipe) -> FimPieces | None:
    """What plan.json says of fill-in-the-middle. ValueError where the tokenizer has no such piece."""
    if recipe.fim is None:
        return None
    tokenizer = load_tokenizer(recipe.fim.tokenizer)
    pieces = {"prefix": recipe.fim.prefix, "middle": recipe.fim.middle, "suffix": recipe.fim.suffix}
    found = {name: tokenizer.piece_id(piece) for name, piece in pieces.items()}
    missing = [name for name, token in found.items() if token is None]
    if missing:
        raise ValueError(
            f"fim.{missing[0]}: {recipe.fim.tokenizer} has no piece {pieces[missing[0]]!r}; name its pieces"
        )
    if recipe.fim.cut == "characters" and tokenizer.decode(tokenizer.encode(ROUND_TRIP)) != ROUND_TRIP:
        raise ValueError(
            f'fim.cut = "characters": {recipe.fim.tokenizer} does not decode its own ids to the text (has it a '
            'decoder?); cut = "tokens" needs none'
        )
    ids = {name: token for name, token in found.items() if token is not None}
    return FimPieces(ids, tokenizer.fingerprint if recipe.fim.cut == "characters" else None)
