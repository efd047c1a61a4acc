"""What ranks of these tests run: tools/evaluate_checkpoints.py; a scorer beside transformers in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from one_rank_model import llama_with_weights_of, one_rank
from rank_processes import REPOSITORY

from k2_megatron.evaluate.scorer import Scorer
from k2_megatron.evaluate.windows import Window
from k2_megatron.runtime.mistakes import leave, run_program
from k2_megatron.train.parts import ModelParts

DOCUMENTS = ["The union shall never be dissolved. " * 4, "short", "", "na\u00efve caf\u00e9 \u2014 " * 5]


def evaluation_tool():
    """The module tools/evaluate_checkpoints.py."""
    path = REPOSITORY / "tools" / "evaluate_checkpoints.py"
    spec = importlib.util.spec_from_file_location("evaluate_checkpoints", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(arguments: list[str], fault=None) -> None:
    """The tool on this rank, and its exit; `fault` is called before."""
    if fault is not None:
        fault()
    leave(lambda: run_program(evaluation_tool().main, arguments))


def random_windows(longest: int, vocabulary: int) -> list[Window]:
    """Of all lengths, of which parts count."""
    generator = np.random.default_rng(3)
    lengths = [*range(1, longest, 5), longest, longest, 2]
    return [
        Window(generator.integers(0, vocabulary, length + 1), int(generator.integers(0, length))) for length in lengths
    ]


def beside_float64(config_path: Path) -> tuple[float, int, int]:
    """(largest relative difference of a loss from transformers' in float64, greedy tokens that differ, tokens)."""
    with one_rank(config_path, []) as (config, groups, _kernels, model):
        with torch.no_grad():
            for parameter in model.parameters():  # beyond the small initial ones, so that logits differ
                parameter.mul_(3.0)
        reference = llama_with_weights_of(model, config).double().eval()
        scorer = Scorer(config, ModelParts(groups, [model.eval()], torch.device("cpu")))
        windows = random_windows(config.model.sequence_length, config.model.vocab_size)
        difference, wrong, count = 0.0, 0, 0
        plain = scorer.score(windows)
        for window, scored, alone in zip(windows, scorer.score(windows, greedy=True), plain, strict=True):
            tokens = torch.from_numpy(window.tokens)[None]
            with torch.no_grad():
                logits = reference(tokens[:, :-1]).logits[0, window.first :].double()
            labels = tokens[0, 1 + window.first :]
            expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
            assert np.array_equal(scored.losses, alone.losses), "losses depend on what else is asked for"
            difference = max(difference, float(np.abs(scored.losses / expected - 1).max()))
            wrong += int((logits.argmax(-1).numpy() != scored.greedy).sum())
            count += len(labels)
    return difference, wrong, count
