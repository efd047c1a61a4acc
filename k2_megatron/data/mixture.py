"""How many rows of each source, in all and in each chunk: exact integers, spread as evenly as integers can be.

In: shares, repeats and the rows each source has. Out: totals that sum to chunks x rows_per_chunk, and for each chunk
how many rows of each source have been used when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from k2_megatron.data.recipe import LARGEST_CHUNK_ROWS, Recipe

CLOCK = 1 << 80  # the plan's duration in ticks, fine enough that rows of one source never share a tick


def rows_of_sources(recipe: Recipe, available: Sequence[int]) -> tuple[int, list[int]]:
    """(rows a chunk, rows of each source in the whole plan) for sources with `available` rows of their own.

    Repeats ask for repeats x available rows; shares divide what is left of chunks x rows_per_chunk by proportion. With
    repeats alone and rows_per_chunk given, the repeats are proportions, and the plan may not ask for more than that.
    ValueError names what does not fit.
    """
    sources = list(recipe.sources.items())
    asked = [
        round(Fraction(str(source.repeats)) * rows) if source.repeats is not None else 0
        for (_, source), rows in zip(sources, available, strict=True)
    ]
    empty = [name for (name, _), rows in zip(sources, available, strict=True) if rows == 0]
    if empty:
        raise ValueError(f"sources.{empty[0]}: no whole row of {recipe.sequence_length + 1} tokens; give it more text")
    shares = [Fraction(str(source.share or 0)) for _, source in sources]
    rows_per_chunk = recipe.rows_per_chunk or sum(asked) // recipe.chunks
    total = recipe.chunks * rows_per_chunk
    if total == 0:
        raise ValueError(f"chunks = {recipe.chunks}: the sources give {sum(asked)} rows in all; use fewer chunks")
    if rows_per_chunk > LARGEST_CHUNK_ROWS:
        raise ValueError(
            f"the sources with their repeats give chunks of {rows_per_chunk} rows, at most {LARGEST_CHUNK_ROWS} fit in "
            "memory; lower repeats, use more chunks, or give rows_per_chunk"
        )
    if any(shares):
        rest = total - sum(asked)
        if rest < 0:
            raise ValueError(f"repeats alone ask for {sum(asked)} rows, chunks x rows_per_chunk is {total}")
        divided = apportion(rest, shares)
        totals = [fixed + shared for fixed, shared in zip(asked, divided, strict=True)]
    else:
        if total > sum(asked):
            raise ValueError(
                f"chunks x rows_per_chunk asks for {total} rows, the sources with their repeats give {sum(asked)}; "
                "lower rows_per_chunk or raise repeats"
            )
        totals = apportion(total, [Fraction(rows) for rows in asked])
    for (name, source), rows, own in zip(sources, totals, available, strict=True):
        if rows == 0:
            raise ValueError(
                f"sources.{name}: gets none of the {total} rows; raise its share or repeats, or leave it out"
            )
        if source.max_repeats is not None and rows > source.max_repeats * own:
            raise ValueError(
                f"sources.{name}: its share repeats it {rows / own:.2f} times ({rows} rows of {own}), max_repeats is "
                f"{source.max_repeats}; lower the share, or give it more text"
            )
    return rows_per_chunk, totals


def apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` divided in proportion to `weights`, by largest remainder (ties to the first)."""
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    floors = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (floors[number] - exact[number], number))
    for number in by_remainder[: total - sum(floors)]:
        floors[number] += 1
    return floors


def used_after_chunks(totals: Sequence[int], chunks: int) -> list[list[int]]:
    """[chunks + 1][sources]: rows of each source used before chunk c (and, last, in all).

    The k-th of a source's n rows is due at time (k + 1/2) / n; chunks take rows as they fall due, so that every chunk
    has the same size and every source advances evenly. Rows due at one instant are taken in the order of the sources.
    """
    rows_per_chunk, left_over = divmod(sum(totals), chunks)
    assert left_over == 0, f"{sum(totals)} rows do not divide into {chunks} chunks"
    return [_used_at(totals, chunk * rows_per_chunk) for chunk in range(chunks + 1)]


def _used_at(totals: Sequence[int], rows: int) -> list[int]:
    """How many rows of each source are among the first `rows` to fall due."""
    low, high = 0, CLOCK  # invariant: due before `low` <= rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(_due(total, middle) for total in totals) <= rows else (low, middle - 1)
    used = [_due(total, low) for total in totals]
    for number, total in enumerate(totals):
        if sum(used) < rows:  # these share the next tick
            used[number] += min(_due(total, low + 1) - used[number], rows - sum(used))
    assert sum(used) == rows, f"{sum(used)} rows due, not {rows}"
    return used


def _due(total: int, tick: int) -> int:
    """How many k in 0..total-1 have floor((2 k + 1) CLOCK / (2 total)) < tick."""
    return min(total, max(0, (2 * total * tick - CLOCK + 2 * CLOCK - 1) // (2 * CLOCK)))
