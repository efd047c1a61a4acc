"""What a recipe names: token files with their manifests, and the tokenizer of fill-in-the-middle.

In: a `Recipe`. Out: for each source its files, with the spans to train on and to hold out, and the ids of the three
pieces. ValueError where files, manifests and tokenizers do not belong together.
"""

from __future__ import annotations

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k2_megatron.data.held_out import complement, held_out_spans
from k2_megatron.data.manifest import CheckedTokenFile, manifest_path, read_manifest
from k2_megatron.data.permutation import hash64
from k2_megatron.data.plan import check_sizes
from k2_megatron.data.recipe import Recipe, SourceRecipe
from k2_megatron.data.tokenizer import load_tokenizer, made_by

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


def open_sources(recipe: Recipe, threads: int) -> tuple[list[dict[str, Any]], list[list[SourceFile]]]:
    """Every manifest once (with its path under "path"), and for each source its files."""
    paths_of = [_manifest_paths(name, source) for name, source in recipe.sources.items()]
    paths = sorted({path for found in paths_of for path in found})
    manifests = [{**read_manifest(path), "path": path} for path in paths]
    known = [manifest for manifest in manifests if manifest.get("tokenizer")]  # foreign files' do not say
    for manifest in known:
        if manifest["tokenizer"]["fingerprint"] != known[0]["tokenizer"]["fingerprint"]:
            raise ValueError(
                f"{manifest['path']}: made with another tokenizer than {known[0]['path']}; a plan needs one tokenizer"
            )
    numbers = {path: number for number, path in enumerate(paths)}
    files_of = [[(path, entry) for path in found for entry in manifests[numbers[path]]["files"]] for found in paths_of]
    for (name, source), found in zip(recipe.sources.items(), files_of, strict=True):
        if source.documents and len(found) > 1:
            raise ValueError(
                f"sources.{name}: documents needs a single token file, and {', '.join(source.tokens)} names "
                f"{len(found)}; name one of them, or leave documents out"
            )
    jobs = [
        (source, numbers[path], path.parent / entry["name"], entry)
        for source, found in zip(recipe.sources.values(), files_of, strict=True)
        for path, entry in found
    ]
    with ThreadPoolExecutor(threads) as pool:
        files = iter(list(pool.map(lambda job: _source_file(recipe, *job), jobs)))
    return manifests, [[next(files) for _ in found] for found in files_of]


def _manifest_paths(source_name: str, source: SourceRecipe) -> list[Path]:
    """The manifests that a source names. ValueError where one is named twice: each of its rows would be."""
    found: dict[str, Path] = {}
    for pattern in source.tokens:
        name = str(manifest_path(pattern))
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise ValueError(
                f"{name}: no such manifest; make the tokens with tools/preprocess_data.py, or write a manifest for "
                "Megatron's files with tools/inspect_data.py manifest PREFIX"
            )
        for path in paths:
            if os.path.realpath(path) in found:
                raise ValueError(
                    f"sources.{source_name}: {path} is named twice in tokens (again by {pattern!r}): it would repeat "
                    "all its rows; name it once, and give repeats or share"
                )
            found[os.path.realpath(path)] = Path(path)
    return list(found.values())


def _source_file(recipe: Recipe, source: SourceRecipe, manifest: int, prefix: Path, entry: dict) -> SourceFile:
    """Decide, document by document, what of a file is held out. The hash is of the file's name, not of the source's:
    two sources over one file hold out the same documents."""
    check_sizes(prefix, entry)
    file = CheckedTokenFile(prefix, entry)
    if source.documents or recipe.held_out_fraction:  # else nothing of the .idx is read
        file.check_whole_index()
    first, end = source.documents or (0, file.documents)
    if end > file.documents:
        raise ValueError(f"{prefix}: has {file.documents} documents, the recipe asks for {first}..{end}")
    start, stop = file.first_token(first), file.first_token(end)
    key = hash64(recipe.seed, "held out", entry["name"])
    held_out = held_out_spans(file, first, end, recipe.held_out_fraction, key)
    return SourceFile(prefix, manifest, entry, complement(held_out, start, stop), held_out)


@dataclass(frozen=True)
class FimPieces:
    """The ids of the three pieces, and the fingerprint of the tokenizer where reading rows needs it."""

    ids: dict[str, int]
    tokenizer: str | None


def fim_pieces(recipe: Recipe, manifests: list[dict[str, Any]]) -> FimPieces | None:
    """What plan.json says of fill-in-the-middle. ValueError where the tokenizer has no such piece, or did not make the
    tokens: its pieces would be other ids than the model knows them by."""
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
    for manifest in manifests:
        made_with = manifest.get("tokenizer")
        if made_with and not made_by(made_with, tokenizer):
            raise ValueError(
                f"fim.tokenizer: {recipe.fim.tokenizer} (fingerprint {tokenizer.fingerprint}) is not the tokenizer "
                f"that made {manifest['path']} (fingerprint {made_with['fingerprint']}); name that one"
            )
    ids = {name: token for name, token in found.items() if token is not None}
    return FimPieces(ids, tokenizer.fingerprint if recipe.fim.cut == "characters" else None)
