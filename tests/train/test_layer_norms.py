"""What the journal tells of the layers, and when; that it is right: test_against_plain_training, tests/layouts."""

import pytest
from rank_processes import pretrain, results_of
from run_results import steps_of
from small_run import overrides

from k2_megatron.train.layer_norms import LayerNorms

SETTINGS = {"train.steps": 4, "log.layers_every_steps": 2, "train.recompute": "full"}


def test_layers_are_told_of_at_their_interval_and_change_no_step(small_config, tmp_path):
    folders = {}
    for name, more in (("seldom", {}), ("always", {"log.layers_every_steps": 1, "train.recompute": "none"})):
        folders[name] = tmp_path / name
        settings = {**SETTINGS, **more, "run.folder": folders[name]}
        results_of(pretrain(1, small_config, overrides(settings), tmp_path / f"{name}_output"))
    seldom, always = (steps_of(folder) for folder in folders.values())
    assert [number for number, step in seldom.items() if "layers" in step] == [2, 4]
    assert [number for number, step in always.items() if "layers" in step] == [1, 2, 3, 4]
    for number, step in seldom.items():
        assert {key: step[key] for key in step.keys() - {"layers"}} == {
            key: always[number][key] for key in step.keys() - {"layers"}
        }
        if "layers" in step:
            assert step["layers"] == always[number]["layers"]
    layers = always[4]["layers"]
    assert [len(layers["gradient_norm"]), len(layers["activation_rms"])] == [4, 4]
    # Each layer adds to the stream of the one before
    assert layers["activation_rms"] == sorted(layers["activation_rms"])


def test_journal_has_five_digits():
    layers = LayerNorms((0.123456789, 1234567.0), (1e-12, 2.0), 1 / 3, float("inf"))
    rounded = layers.rounded()
    assert rounded["gradient_norm"] == [0.12346, 1234600.0]
    assert rounded["activation_rms"] == [1e-12, 2.0]
    assert rounded["embedding_gradient_norm"] == pytest.approx(1 / 3, rel=1e-5)
    assert rounded["output_gradient_norm"] == float("inf")
