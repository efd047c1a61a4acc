"""A run of six steps with checkpoints at two, four and six, texts and tasks, and the tool in any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_ranks import DOCUMENTS, evaluate
from rank_processes import Outcome, Rank, pretrain, results_of, run_ranks
from small_run import overrides
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

SETTINGS = {"train.steps": 6, "train.evaluate_every_steps": 2, "checkpoint.every_steps": 2}


@pytest.fixture(scope="session")
def trained(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained(ranks, settings) -> the run's folder; each once a session. Copy it, change nothing in it."""
    known: dict[tuple, Path] = {}

    def once(ranks: int = 1, settings: dict[str, object] | None = None) -> Path:
        key = (ranks, tuple(sorted((settings or {}).items())))
        if key not in known:
            folder = tmp_path_factory.mktemp("trained")
            given = overrides({**SETTINGS, **(settings or {}), "run.folder": folder / "run"})
            results_of(pretrain(ranks, small_config, given, folder / "output"))
            known[key] = folder / "run"
        return known[key]

    return once


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Outcome]]:
    """evaluation(run, *arguments, ranks=1, fault=None) -> the outcomes of the tool's ranks."""

    def start(run: Path, *arguments: object, ranks: int = 1, fault: Callable[[], None] | None = None) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("output")
        given = ([str(run), *map(str, arguments)], fault)
        if ranks == 1:
            return [Rank(evaluate, given, {}, folder).finish()]
        return run_ranks(evaluate, ranks, given, folder)

    return start


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a text and two tasks, encoded by bytes as the small run's data is."""
    folder = tmp_path_factory.mktemp("texts")
    letters = sorted(set(ByteLevel.alphabet()) - {"\u00ff"})  # of 256 pieces one ends documents: that of no UTF-8 byte
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, **{one: n for n, one in enumerate(letters, 1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "bytes.json"))
    questions = [{"context": "It is", "choices": ["so", "not", "\u00e9"], "answer": n % 3} for n in range(5)]
    completions = [{"context": "It is", "completion": " "}, {"context": "", "completion": "The union"}]
    for name, lines in (("news", [{"text": text} for text in DOCUMENTS]), ("quiz", questions), ("rest", completions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--tokenizer", folder / "bytes.json", "--text", folder / "news.jsonl"]
    return [str(one) for one in [*given, "--task", folder / "quiz.jsonl", folder / "rest.jsonl"]]
