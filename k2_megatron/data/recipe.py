"""The recipe: which sources, how much of each, in how many chunks, in what order. A strict TOML file.

In: a TOML file (examples/toy/data.toml, examples/k2_65b/data_stage1.toml). Out: a frozen `Recipe`. ValueError lists
every problem of the file at once. Token paths are relative to the current directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from k2_megatron.config.toml_text import tomllib

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
# A chunk is shuffled in memory, and plan.json names each chunk: beyond these a plan fills the machine. K2's has 360
# chunks of 1.9 M rows.
LARGEST_CHUNK_ROWS = 500_000_000
MOST_CHUNKS = 1_000_000


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Order(Section):
    """Chunk numbers or ranges "a-b" (both ends in it) that leave the ascending order."""

    first: tuple[int | str, ...] = Field(default=(), strict=False)
    """Trained first, in this order; the rest follows ascending."""
    last: tuple[int | str, ...] = Field(default=(), strict=False)
    """Deferred to the end, in this order."""


class FillInTheMiddle(Section):
    """The three pieces of fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255) and the tokenizer with them."""

    tokenizer: str
    prefix: str = "<fim_prefix>"
    middle: str = "<fim_middle>"
    suffix: str = "<fim_suffix>"
    cut: Literal["tokens", "characters"] = "tokens"
    """Where documents are cut in three: between tokens (training needs no tokenizer), or between characters, each part
    tokenized on its own when a row is read (as StarCoder and K2 did; training then loads this very tokenizer)."""


class SourceRecipe(Section):
    """One source of the mixture: a share of all rows, or how often its own rows are repeated."""

    tokens: tuple[str, ...] = Field(strict=False, min_length=1)
    """Prefixes of token files, or globs of their manifests."""
    share: PositiveFloat | None = None
    """Part of the rows that repeats leave, relative to the other shares (percentages will do)."""
    repeats: PositiveFloat | None = None
    """How often each row is used; 0.5 uses every second."""
    max_repeats: PositiveFloat | None = None
    """Refuse a plan that repeats this source more often than this."""
    documents: tuple[int, int] | None = Field(None, strict=False)
    """Use documents first..end-1 of the (single) token file only."""
    fim_psm: Fraction = 0.0
    """Part of the documents reordered as prefix, suffix, middle."""
    fim_spm: Fraction = 0.0
    """Part of the documents reordered as suffix, prefix, middle."""

    @model_validator(mode="after")
    def _check(self) -> SourceRecipe:
        if (self.share is None) == (self.repeats is None):
            raise ValueError("give either share or repeats")
        if self.fim_psm + self.fim_spm > 1.0:
            raise ValueError("fim_psm + fim_spm is more than 1")
        if self.documents and not 0 <= self.documents[0] < self.documents[1]:
            raise ValueError("documents = [first, end] with 0 <= first < end")
        if self.documents and len(self.tokens) > 1:
            raise ValueError("documents needs a single token file")
        return self


class Recipe(Section):
    """A whole recipe."""

    sequence_length: PositiveInt
    """Tokens a row trains on: model.sequence_length."""
    chunks: Annotated[int, Field(gt=0, le=MOST_CHUNKS)]
    """Parts of the plan, each with the whole mixture."""
    rows_per_chunk: Annotated[int, Field(gt=0, le=LARGEST_CHUNK_ROWS)] | None = None
    """Rows of a chunk; left out (repeats only), as many as the sources give."""
    seed: int
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the documents that is never trained on."""
    order: Order = Order()
    fim: FillInTheMiddle | None = None
    sources: dict[str, SourceRecipe] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        chunk_order(self.order, self.chunks)
        if self.rows_per_chunk is None and any(source.share is not None for source in self.sources.values()):
            raise ValueError("rows_per_chunk: needed where a source has a share")
        if self.fim is None and any(source.fim_psm or source.fim_spm for source in self.sources.values()):
            raise ValueError("fim: a source has fim_psm or fim_spm; add [fim] with the tokenizer that has the pieces")
        if len(self.sources) > 1 << 16:
            raise ValueError(f"sources: {len(self.sources)}, at most {1 << 16}")
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a recipe, e.g. examples/toy/data.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    sources = tables.get("sources")
    for source in sources.values() if isinstance(sources, dict) else ():  # what else it may be is told below
        if isinstance(source, dict) and isinstance(source.get("tokens"), str):
            source["tokens"] = [source["tokens"]]
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc'])) or 'recipe'}: {_text(item)}" for item in error.errors()]
        raise ValueError("\n".join([f"{path}: {len(lines)} problem(s)", *lines])) from None


def _text(item: Any) -> str:
    found = "" if isinstance(item["input"], dict | list) else f" (found {item['input']!r})"
    return item["msg"].removeprefix("Value error, ") + found


def chunk_order(order: Order, chunks: int) -> list[int]:
    """The chunk trained at each position: `first`, then the others ascending, then `last`. ValueError if not one."""
    first, last = _numbers(order.first), _numbers(order.last)
    named = first + last
    wrong = [chunk for chunk in named if not 0 <= chunk < chunks]
    if wrong:
        raise ValueError(f"order: chunk {wrong[0]} does not exist; there are {chunks}, numbered from 0")
    if len(set(named)) < len(named):
        twice = next(chunk for chunk in named if named.count(chunk) > 1)
        raise ValueError(f"order: chunk {twice} is named twice")
    return first + sorted(set(range(chunks)) - set(named)) + last


def _numbers(entries: tuple[int | str, ...]) -> list[int]:
    numbers: list[int] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)-(\d+)", entry) if isinstance(entry, str) else None
        if isinstance(entry, int):
            numbers.append(entry)
        elif match and int(match[1]) <= int(match[2]):
            numbers += range(int(match[1]), int(match[2]) + 1)
        else:
            raise ValueError(f"order: {entry!r} is neither a chunk number nor a range such as '0-15'")
    return numbers
