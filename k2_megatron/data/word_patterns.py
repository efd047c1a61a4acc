"""What a tokenizer.json's pre-tokenizer does to a run of letters, digits or symbols.

In: its settings. Out: whether a long text may be cut in such a run: the run up to the cut is then a word as it was, and
the rest is one that begins there; and whether it may be cut behind one, before white space.
"""

from __future__ import annotations

import json
import re
from typing import Any

# What counts characters, and what counts digits alone, as many do.
COUNTED_DIGITS = re.compile(r"(\\\\p\{N\w?\}|\\\\d|\[0-9\])\{\d+(,\d*)?\}")
COUNTED = re.compile(r'"FixedLength"|\{\d+(,\d*)?\}')

# GPT-4's, Llama 3's and Qwen's, but for how many digits go together. (o200k's is another kind: it looks for a small
# letter behind all large ones, however many, before it takes the first.)
KNOWN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = re.compile(r"\\p\{N\}(\{1,3\}|\+)")


def counts_characters(settings: dict[str, Any] | None) -> bool:
    """Whether text other than numbers is split after so many characters, counted from where it begins."""
    return COUNTED.search(COUNTED_DIGITS.sub("", json.dumps(settings))) is not None


def counts_digits(settings: dict[str, Any] | None) -> bool:
    return COUNTED.search(json.dumps(settings)) is not None


def keeps_runs(settings: dict[str, Any] | None) -> bool:
    """Whether it is known to go on with letters, with digits that it does not count, and with symbols as it would begin
    them, and to end no word of these sooner for what stands far behind."""
    if settings is None:
        return True
    parts = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    return all(_part_keeps_runs(part) for part in parts)


def ends_words_before_spaces(settings: dict[str, Any] | None) -> bool:
    """Whether it is known to end a word before white space, whatever stands around: but for newlines behind symbols, no
    alternative of GPT-2's pattern or KNOWN goes on from another character to white space, and none looks back."""
    if settings is None or not keeps_runs(settings):
        return False
    parts = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    first = next((part for part in parts if part["type"] != "Digits"), {"type": "Digits"})  # Digits keeps white space
    return first["type"] == "Split" or (first["type"] == "ByteLevel" and bool(first["use_regex"]))


def _part_keeps_runs(part: dict[str, Any]) -> bool:
    if part["type"] in ("ByteLevel", "Digits", "Metaspace"):
        return True
    if part["type"] != "Split" or part["behavior"] != "Isolated" or part["invert"]:
        return False
    return DIGITS.sub(r"\\p{N}", part["pattern"].get("Regex", "")) == KNOWN
