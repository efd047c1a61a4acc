"""Five steps of ours, through megatron-core, against the same five written in plain PyTorch."""

import plain_training
import pytest
from rank_processes import Rank
from small_run import overrides

LOSSES, GRADIENT_NORMS = 1e-5, 1e-4  # relative, as between layouts


def both(small_config, tmp_path, settings, fault=None):
    arguments = (small_config, overrides(settings), fault)
    outcome = Rank(plain_training.ours_and_plain, arguments, {}, tmp_path).finish()
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.result


@pytest.mark.parametrize("settings", [{}, {"model.kv_heads": 2, "model.kernels": "torch"}], ids=["compiled", "torch"])
def test_losses_and_gradient_norms_are_those_of_plain_training(small_config, tmp_path, settings):
    ours, plain = both(small_config, tmp_path, settings)
    assert ours.losses == pytest.approx(plain.losses, rel=LOSSES)
    assert ours.grad_norms == pytest.approx(plain.grad_norms, rel=GRADIENT_NORMS)
    for of_step, expected in zip(ours.sample_losses, plain.sample_losses, strict=True):
        assert of_step == pytest.approx(expected, rel=LOSSES)
    for layers, expected in zip(ours.layers, plain.layers, strict=True):
        for name, bound in (
            ("gradient_norm", GRADIENT_NORMS),
            ("activation_rms", LOSSES),
            ("embedding_gradient_norm", GRADIENT_NORMS),
            ("output_gradient_norm", GRADIENT_NORMS),
        ):
            assert getattr(layers, name) == pytest.approx(getattr(expected, name), rel=bound), name


@pytest.mark.parametrize(
    "fault",
    [
        plain_training.labels_not_shifted,
        plain_training.loss_a_quarter,
        plain_training.norms_decay_too,
        plain_training.gradients_not_clipped,
    ],
    ids=lambda fault: fault.__name__,
)
def test_comparison_sees_a_fault(small_config, tmp_path, fault):
    ours, plain = both(small_config, tmp_path, {"optimizer.weight_decay": 0.1}, fault)
    assert ours.losses != pytest.approx(plain.losses, rel=LOSSES)
