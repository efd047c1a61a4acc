"""Questions with choices, and completions, scored by log-likelihood as lm-evaluation-harness scores them.

In: a JSONL file, one {"context", "choices", "answer"} or {"context", "completion"} a line; a tokenizer; a scorer.
Out: acc, acc_norm (by characters), acc_bytes; or log-likelihood and greedy match.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2_megatron.data.tokenizer import Tokenizer
from k2_megatron.evaluate.figures import Figure, mean_figures, perplexity
from k2_megatron.evaluate.scorer import Scored, Scorer
from k2_megatron.evaluate.windows import Window, continuation_window


class Item(NamedTuple):
    """What may follow the context: one completion (answer None), or choices, of which number `answer` is right.
    `joint` stands between; None leaves it to `_joined`."""

    line: int
    context: str
    joint: str | None
    endings: tuple[str, ...]
    answer: int | None


def read_items(path: Path) -> list[Item]:
    """The items of a task file. ValueError with the number of the first line that is none, or of another kind."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a JSONL file") from None
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(number, json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; correct the line") from None
        if items and (item.answer is None) != (items[0].answer is None):
            raise ValueError(
                f"{path}, line {number}: questions and completions in one file; give each kind a file of its own"
            )
        items.append(item)
    if not items:
        raise ValueError(f"{path}: holds no line; give one question or completion a line (docs/evaluate.md)")
    return items


def _item(line: int, found: Any) -> Item:
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    context = found.get("context")
    if not isinstance(context, str):
        raise ValueError(f'"context" is {context!r}, and must be text')
    joint = found.get("joint")
    if not isinstance(joint, str | None):
        raise ValueError(f'"joint" is {joint!r}, and must be text: what stands between the context and what follows it')
    if ("choices" in found) == ("completion" in found):
        raise ValueError('must have "choices" and "answer", or "completion"')
    if "completion" in found:
        if not isinstance(found["completion"], str) or not found["completion"]:
            raise ValueError(f'"completion" is {found["completion"]!r}, and must be text')
        return Item(line, context, joint, (found["completion"],), None)
    choices, answer = found["choices"], found.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise ValueError('"choices" must be a list of two texts or more')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" is {answer!r}, and must be the number of a choice, 0 to {len(choices) - 1}')
    return Item(line, context, joint, tuple(choices), answer)


def encode_pair(tokenizer: Tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of what follows it, as lm-evaluation-harness's `_encode_pair` has them: encoded
    together; spaces at the context's end go to what follows. Before an empty context stands the end of a document."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, ending = context[:-spaces], context[-spaces:] + ending
    if not context:
        return [tokenizer.end_of_document], tokenizer.encode(ending)
    alone, together = tokenizer.encode(context), tokenizer.encode(context + ending)
    following = together[len(alone) :]
    # A tokenizer that merges over the border may leave nothing, or change what is before it; lm-eval lives with that.
    return (alone, following) if following else (alone, tokenizer.encode(ending))


def _joined(item: Item, ending: str) -> str:
    """What follows the context with what stands between: a space, lm-evaluation-harness's default of
    target_delimiter, unless there is one already."""
    if item.joint is not None:
        return item.joint + ending
    has_space = not item.context or item.context[-1].isspace() or ending[0].isspace()
    return ending if has_space else f" {ending}"


class Task:
    """The items of one file as windows, made once for all checkpoints. `cut`: items whose context was cut."""

    def __init__(self, path: Path, tokenizer: Tokenizer, longest: int) -> None:
        self.items = read_items(path)
        self.has_choices = self.items[0].answer is not None
        self.windows: list[Window] = []
        self.cut = 0
        for item in self.items:
            pairs = [encode_pair(tokenizer, item.context, _joined(item, end)) for end in item.endings]
            for _, following in pairs:
                if not 0 < len(following) <= longest:
                    raise ValueError(
                        f"{path}, line {item.line}: {len(following)} tokens to predict, and the window has room for 1 "
                        f"to {longest}; shorten it, or leave it out"
                    )
            self.cut += any(len(before) + len(following) > longest + 1 for before, following in pairs)
            self.windows += [continuation_window(*pair, longest) for pair in pairs]

    def figures(self, scorer: Scorer) -> dict[str, Figure]:
        """Of all items, by this model."""
        scored = list(scorer.score(self.windows, greedy=not self.has_choices))
        if self.has_choices:
            return self._choice_figures([-float(one.losses.sum()) for one in scored])
        return self._completion_figures(scored)

    def _choice_figures(self, likelihoods: Sequence[float]) -> dict[str, Figure]:
        marks: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
        start = 0
        for item in self.items:
            of_item = np.array(likelihoods[start : start + len(item.endings)])
            start += len(item.endings)
            characters = np.array([len(ending) for ending in item.endings])
            sizes = np.array([len(ending.encode()) for ending in item.endings])
            for name, values in zip(marks, (of_item, of_item / characters, of_item / sizes), strict=True):
                marks[name].append(float(int(np.argmax(values)) == item.answer))
        figures: dict[str, Figure] = {}
        for name, of_name in marks.items():
            figures |= mean_figures(name, of_name)
        tokens = sum(window.counted for window in self.windows)
        return {**figures, "questions": len(self.items), "cut": self.cut, "tokens": tokens}

    def _completion_figures(self, scored: Sequence[Scored]) -> dict[str, Figure]:
        labels = [window.tokens[1 + window.first :] for window in self.windows]
        matches = [float(np.array_equal(one.greedy, label)) for one, label in zip(scored, labels, strict=True)]
        likelihoods = [-float(one.losses.sum()) for one in scored]
        tokens = sum(window.counted for window in self.windows)
        loss = -sum(likelihoods) / tokens
        return {
            **mean_figures("greedy_match", matches),
            **mean_figures("log_likelihood", likelihoods),
            "loss": loss,
            "perplexity": perplexity(loss),
            "tokens": tokens,
            "completions": len(self.items),
            "cut": self.cut,
        }
