"""The out-of-the-box run, shortened: what `make pretrain` does, from text to a model that has learnt and speaks."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest

from k2_megatron.data.open_feed import open_feed
from k2_megatron.runtime.journal import read_events, read_steps

REPOSITORY = Path(__file__).resolve().parents[2]
TOY = REPOSITORY / "examples" / "toy"
STEPS, HELD_OUT_SAMPLES = 100, 64


def run(*arguments: str, folder: Path) -> str:
    """Run a Python program of the repository in `folder`; what it printed."""
    program, *rest = arguments
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / program), *rest],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder in which the toy was trained, the arguments of its training)."""
    folder = tmp_path_factory.mktemp("toy")
    # The configuration and the recipe name files relative to where they are run.
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    run(
        "tools/preprocess_data.py",
        *("--input", str(TOY / "state_of_the_union.jsonl.xz"), "--tokenizer", str(TOY / "tokenizer.json")),
        *("--output-prefix", "runs/toy_data/speeches", "--append-eod"),
        folder=folder,
    )
    plans = ("--output", "runs/toy_data/train", "--held-out", "runs/toy_data/held_out")
    run("tools/build_plan.py", str(TOY / "data.toml"), *plans, folder=folder)
    settings = {
        "train.steps": STEPS,
        "checkpoint.chunks": 2,
        "train.evaluate_every_steps": STEPS,
        "optimizer.warmup_steps": 10,
    }
    training = [str(TOY / "toy.toml")]
    for key, value in settings.items():
        training += ["--set", f"{key}={value}"]
    run("pretrain_k2.py", *training, folder=folder)
    return folder, training


def unigram_entropy(folder: Path) -> float:
    """Cross-entropy, nats a token, of the held-out rows under the token frequencies of the training rows."""
    shape = {"sequence_length": 256, "seed": 22238, "vocab_size": 4096}
    train = open_feed(folder / "runs/toy_data/train", **shape)
    held_out = open_feed(folder / "runs/toy_data/held_out", **shape)
    counts = Counter(train.tokens(0, 4000)[:, 1:].ravel().tolist())
    total = sum(counts.values()) + 4096  # one more of each, so that none is impossible
    tokens = held_out.tokens(0, HELD_OUT_SAMPLES)[:, 1:].ravel().tolist()
    return -float(numpy.mean([math.log((counts[token] + 1) / total) for token in tokens]))


def test_it_learns_more_than_how_often_tokens_occur(toy, monkeypatch):
    folder, _ = toy
    monkeypatch.chdir(folder)
    (evaluation,) = [e for e in read_events(Path("runs/toy/journal.jsonl")) if e["event"] == "evaluation"]
    assert evaluation["held_out_loss"] < unigram_entropy(folder) - 0.5


def test_the_journal_tells_every_step_once(toy):
    folder, _ = toy
    steps = read_steps(folder / "runs/toy/journal.jsonl")
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert math.isclose(steps[1]["loss"], math.log(4096), rel_tol=0.02)
    start = next(read_events(folder / "runs/toy/journal.jsonl"))
    assert start["event"] == "start"
    assert start["layout"] == "tp2-pp2-vp1-cp1-dp1"
    assert set(start["kernels"]) == {"rms_norm", "rotary", "cross_entropy", "swiglu", "adamw"}


def test_started_again_it_says_that_it_is_finished(toy):
    folder, training = toy
    before = (folder / "runs/toy/checkpoints/latest").read_text()
    printed = run("pretrain_k2.py", *training, folder=folder)
    assert "finished: runs/toy" in printed
    assert (folder / "runs/toy/checkpoints/latest").read_text() == before
    assert sum(event["event"] == "step" for event in read_events(folder / "runs/toy/journal.jsonl")) == STEPS


def test_the_checkpoint_speaks_in_one_process(toy):
    folder, _ = toy
    arguments = ("runs/toy", "--prompt", "My fellow citizens", "--new-tokens", "12")
    first, second = (run("tools/continue_text.py", *arguments, folder=folder) for _ in range(2))
    assert first == second
    assert first.splitlines()[0] == f"step {STEPS} continues:"
    assert first.splitlines()[1].startswith("My fellow citizens")


def test_the_ledger_proves_what_was_trained(toy):
    folder, _ = toy
    printed = run("tools/inspect_data.py", "verify", "runs/toy", folder=folder)
    lines = (folder / "runs/toy/ledger.jsonl").read_text().splitlines()
    positions = [json.loads(line) for line in lines]
    assert positions[-1]["consumed_samples"] == STEPS * 16
    assert positions[-1]["chain"] in printed
