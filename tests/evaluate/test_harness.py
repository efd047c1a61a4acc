"""The adapter for lm-evaluation-harness, against a stand-in of the classes and functions that it uses.

lm-eval 0.4.13 itself was run by hand: dev/LOG.md has the figures.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch.distributed as distributed

from k2_megatron.evaluate.scorer import Scored
from k2_megatron.evaluate.texts import HarnessWanted

END = 0
TOKENIZER = SimpleNamespace(
    end_of_document=END,
    encode=lambda text: [ord(letter) - 96 if letter != " " else 30 for letter in text],
    decode=lambda ids: "".join(" " if token == 30 else chr(96 + token) for token in ids),
)


class NextLetter:
    """A scorer whose model says that each letter is followed by the next one, and z by the document's end. A loss is
    1 where that is right, 10 where not."""

    longest, tokens = 6, 7

    def score(self, windows, *, greedy=False):
        for window in windows:
            inputs, labels = window.tokens[:-1][window.first :], window.tokens[1:][window.first :]
            likeliest = np.where(inputs == 26, END, inputs + 1)
            yield Scored(np.where(likeliest == labels, 1.0, 10.0), likeliest if greedy else likeliest[:0])


@pytest.fixture
def harness(monkeypatch):
    """k2_megatron.evaluate.harness over the stand-in; `said` is what its simple_evaluate is asked for and returns."""

    class LM:
        def __init__(self):
            self._rank, self._world_size = 0, 1

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name in ("letters", "broken", "tag")]

    said = {}

    def simple_evaluate(**asked):
        said.update(asked)
        if asked["tasks"] == ["broken"]:
            raise ConnectionError("no data set\nand more")
        if asked["tasks"] == ["tag"]:
            return {"results": {"a": {}, "b": {}}}
        found = {"alias": "letters", "sample_len": 2, "acc,none": np.float64(0.5), "acc_stderr,none": "N/A"}
        return {"results": {"letters": {**found, "exact_match,strict": 1}}}

    modules = {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("api")}
    modules |= {"lm_eval.api.model": ModuleType("model"), "lm_eval.tasks": ModuleType("tasks")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.tasks"].TaskManager = TaskManager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "k2_megatron.evaluate.harness", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda told: None)
    module = importlib.import_module("k2_megatron.evaluate.harness")
    yield SimpleNamespace(module=module, said=said)
    sys.modules.pop("k2_megatron.evaluate.harness", None)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def test_likelihoods_and_greedy_continuations(harness):
    model = harness.module.HarnessModel(NextLetter(), TOKENIZER)
    found = model.loglikelihood([asked("ab", "cd"), asked("ab", "ce"), asked("", "a")])
    assert found == [(-2.0, True), (-11.0, False), (-1.0, True)]
    with pytest.raises(ValueError, match="asks for 7 tokens"):
        model.loglikelihood([asked("a", "bcdefgh")])


def test_rolling_likelihood_counts_each_token_once(harness):
    model = harness.module.HarnessModel(NextLetter(), TOKENIZER)
    found = model.loglikelihood_rolling([asked("abcdefghij"), asked("ac"), asked("")])
    assert found == [-10.0, -11.0, 0.0]


@pytest.mark.parametrize(
    ("context", "settings", "text"),
    [
        ("ab", {"until": ["e"], "max_gen_toks": 4}, "cd"),
        ("ab", {"until": "ef", "max_gen_toks": 5}, "cd"),
        ("ab", {"until": [], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}, "cde"),
        ("abcdefgh", {"until": [], "max_gen_toks": 3}, "ijk"),  # the context is cut
        ("xy", {"until": [], "max_gen_toks": 5}, "z"),  # the document ends
    ],
)
def test_greedy_text_up_to_a_stop(harness, context, settings, text):
    model = harness.module.HarnessModel(NextLetter(), TOKENIZER)
    assert model.generate_until([asked(context, settings), asked("ab", {"max_gen_toks": 1})]) == [text, "c"]


def test_what_greedy_continuation_cannot_do_is_said(harness):
    model = harness.module.HarnessModel(NextLetter(), TOKENIZER)
    with pytest.raises(ValueError, match="sampled"):
        model.generate_until([asked("a", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ValueError, match="256 new tokens, and the model reads 6"):
        model.generate_until([asked("a", {})])


def test_tasks_and_their_figures(harness):
    wanted = HarnessWanted(("letters",), include="folder", shots=5, limit=10)
    (task,) = harness.module.open_tasks(wanted, TOKENIZER, {"scoring": 1})
    assert (task.hash, task.settings) == ("lm_eval 9.9", {"scoring": 1, "shots": 5, "limit": 10})
    assert [*task.figures(NextLetter()).items()] == [
        ("acc", 0.5), ("exact_match,strict", 1), ("sample_len", 2), ("tokens", 7)
    ]  # fmt: skip
    given = harness.said
    assert (given["num_fewshot"], given["limit"], given["tasks"]) == (5, 10, ["letters"])
    assert given["task_manager"].include_path == "folder"


def test_tasks_that_fail_are_mistakes(harness):
    with pytest.raises(ValueError, match="--lm-eval nonesuch: lm-eval has no such task"):
        harness.module.open_tasks(HarnessWanted(("letters", "nonesuch")), TOKENIZER, {})
    broken, tag = harness.module.open_tasks(HarnessWanted(("broken", "tag")), TOKENIZER, {})
    with pytest.raises(ValueError, match=r"--lm-eval broken: ConnectionError: no data set$"):
        broken.figures(NextLetter())
    with pytest.raises(ValueError, match="no figures of its own; name a, b"):
        tag.figures(NextLetter())
