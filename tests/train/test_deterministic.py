"""train.deterministic asks torch for repeatable algorithms; without it nothing is asked."""

import pytest
import torch
from rank_processes import Rank
from small_run import overrides

from k2_megatron.runtime.launch import read_environment


def _asked_for(arguments: list[str]) -> bool:
    import pretrain_k2

    assert read_environment() is None, "a plain start of one rank"
    assert pretrain_k2.main(arguments) == 0
    return torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_is_asked_when_the_configuration_asks(deterministic, small_config, tmp_path):
    settings = {"run.folder": tmp_path / "run", "train.steps": 2, "train.evaluate_every_steps": 2}
    settings |= {"optimizer.warmup_steps": 1, "train.deterministic": deterministic}
    arguments = [str(small_config)]
    for setting in overrides(settings):
        arguments += ["--set", setting]
    outcome = Rank(_asked_for, (arguments,), {}, tmp_path / "rank").finish()
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result is deterministic
