"""What a person sees: lines on the console, the clock, and TensorBoard's copy of the journal."""

import sys
from types import SimpleNamespace

import pytest
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.train.views import Views, clock


def step_event(step: int) -> dict:
    return {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": 1.25,
        "learning_rate": 3e-4,
        "tokens_per_second": 12345.6,
        "step_seconds": 2.0,
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (85, "1:25"),
        (3599.7, "1:00:00"),
        (3725, "1:02:05"),
        (1e6, "277:46:40"),
    ],
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


@pytest.fixture
def views(small_config, tmp_path):
    def make(enabled: bool = True, **settings) -> Views:
        given = {"train.steps": 10, "train.evaluate_every_steps": 5, "log.every_steps": 4, **settings}
        return Views(load_config(small_config, overrides(given)), tmp_path, enabled=enabled)

    return make


def test_first_last_and_every_fourth_step_are_shown(views, capsys):
    shown = views()
    for step in range(1, 11):
        shown.step(step_event(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  1", "step  4", "step  8", "step 10"]
    assert lines[1] == "step  4/10  loss 1.2500  grad norm 1.250  lr 3.00e-04  12,346 tokens/s  0:12 left"


def test_other_ranks_show_nothing(views, capsys):
    shown = views(enabled=False)
    shown.step(step_event(1))
    shown.say("a sentence")
    shown.close()
    assert capsys.readouterr().out == ""


def test_tensorboard_holds_every_step(views, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = views(**{"log.tensorboard": True})
    layers = {"gradient_norm": [0.5, 0.25], "activation_rms": [1.0, 2.0], "embedding_gradient_norm": 0.125}
    for step in (1, 2, 3):
        shown.step({**step_event(step), **({"layers": layers} if step == 2 else {})})
    shown.evaluation(3, 2.5)
    shown.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("loss")] == [
        (step, pytest.approx(5.0 / step)) for step in (1, 2, 3)
    ]
    assert [scalar.value for scalar in read.Scalars("held_out_loss")] == [2.5]
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("activation_rms/layer_002")] == [(2, 2.0)]
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("embedding_gradient_norm")] == [(2, 0.125)]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_weights_and_biases_that_fails_is_one_line(views, monkeypatch, capsys, failing):
    class Library(SimpleNamespace):
        def __getattr__(self, name):
            def call(*_arguments, **_keywords):
                if name == failing:
                    raise RuntimeError("no network")
                return self

            return call

    monkeypatch.setitem(sys.modules, "wandb", Library())
    shown = views(**{"log.wandb": "k2"})
    for step in (1, 2):
        shown.step(step_event(step))
    shown.close()
    said = capsys.readouterr().err
    assert said.startswith("Weights & Biases ") and said.count("(no network); the journal ") == said.count("\n") == 1
