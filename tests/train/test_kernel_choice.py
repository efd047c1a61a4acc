"""The compiled CPU kernels and the torch references train the same run: losses over 50 steps of real text."""

import pytest
from rank_processes import pretrain, results_of
from run_results import steps_of
from small_run import overrides

STEPS = 50
# bfloat16 keeps 8 bits: where the backends round a sum to different neighbours (2^-8 = 4e-3 of it) the runs part, in a
# few of many sums. Measured: 8e-8 and 2.3e-4.
RELATIVE = {"float32": 1e-5, "bfloat16": 2e-3}


@pytest.mark.parametrize("precision", sorted(RELATIVE))
def test_cpu_and_torch_losses_agree_over_fifty_steps(precision, small_config, tmp_path):
    losses = {}
    for kernels in ("cpu", "torch"):
        settings = {
            "run.folder": tmp_path / kernels,
            "train.steps": STEPS,
            "train.precision": precision,
            "train.evaluate_every_steps": STEPS,
            "optimizer.learning_rate": 1.5e-3,  # the toy's
            "optimizer.warmup_steps": 10,
            "model.kernels": kernels,
        }
        results_of(pretrain(1, small_config, overrides(settings), tmp_path / f"ranks_{kernels}"))
        losses[kernels] = [step["loss"] for step in steps_of(tmp_path / kernels).values()]
    assert len(losses["cpu"]) == len(losses["torch"]) == STEPS
    assert losses["cpu"] != losses["torch"], "bit-equal losses mean that one backend ran twice"
    worst = max(abs(a - b) / b for a, b in zip(losses["cpu"], losses["torch"], strict=True))
    print(f"{precision}: worst relative difference {worst:.2e}")
    assert worst < RELATIVE[precision]
