"""A gradient that one replica alone brings is pinned to it, by the sizes before the sum; only in steps made again."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rank_processes import pretrain, results_of, run_ranks
from run_results import events_of, steps_of
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.config.schema import Spikes
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.attempts import Attempts
from k2_megatron.train.doubts import Batch, Doubts, Settled
from k2_megatron.train.model_chunks import named_parameters
from k2_megatron.train.not_finite import where_not_finite
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.replica_gradients import Apart, apart_among
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.spikes.ceiling import FEWEST, Ceiling
from k2_megatron.train.step import StepResult, train_step

WEIGHT = "decoder.layers.2.self_attention.linear_qkv.weight"
FACTOR = 10.0
A, B, C, D = "decoder.layers.0.a", "decoder.layers.13.b", "embedding.c", "decoder.layers.13.d"
USUAL = {A: 1.0, B: 0.5, C: 2.0, D: 1.0}


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([{}, {}], None),
        ([{}, {B: 4.9}], None),
        ([{}, {B: 5e5}], Apart({"rank 1": [B]}, 13)),
        ([{}, {B: 5e5, D: 11.0}], Apart({"rank 1": [B, D]}, 13)),
        ([{}, {}, {B: 30.0, A: 400.0}, {C: 19.0}], Apart({"rank 2": [A, B]})),  # layers below as well: rows
        ([{}, {}, {B: 30.0}, {B: 20.0}], Apart({"rank 2": [B], "rank 3": [B]})),
        ([{}, {C: 3e4}, {}], Apart({"rank 1": [C]})),  # a token that the other rows do not have
        ([{B: 5.0, C: 20.0}, {}, {}], Apart({"rank 0": [B, C]})),
        ([{}, {A: math.nan}], Apart({"rank 1": [A]}, 0, finite=False)),
        ([{}, {A: math.nan, B: 90.0}, {B: 50.0}, {}], Apart({"rank 1": [A]}, finite=False)),  # of numbers no word
        ([{A: math.inf}, {A: math.nan}], None),  # both: nothing to compare with
        ([{A: 0.0}, {A: 0.0}], None),
        ([{A: 0.0}, {A: 1e-6}], None),  # nothing to measure it by
    ],
)
def test_who_stands_apart(replicas, expected):
    """One place in the model; another, whose gradients are all of another size, is not compared with it."""
    everywhere = [((0, 0, 0), f"rank {rank}", USUAL | own) for rank, own in enumerate(replicas)]
    elsewhere = [((1, 0, 0), f"rank {9 - rank}", {A: 1e4, B: 1e4, D: 1e-9}) for rank in range(2)]
    assert apart_among(everywhere + elsewhere, FACTOR) == expected
    assert apart_among(everywhere[:1], FACTOR) is None, "a replica alone"


def _scale(chunks, names: str, times: float) -> list:
    """Gradients of these parameters are so many times as large, before any sum."""
    chosen = [parameter for name, parameter in named_parameters(chunks) if names in name]
    assert chosen
    return [parameter.register_hook(lambda gradient: times * gradient) for parameter in chosen]


def apart_in_steps(config_path: Path, settings: list[str]) -> list[Apart | None]:
    """Of a step that is sound, one with a gradient of rank 3 wrong, one with all of them; and an ordinary one's."""
    environment = read_environment()
    config = load_config(config_path, settings, world_size=environment.world_size)
    device, found = find_device(environment.local_rank), []
    with cpu_stands_in_for_cuda("cpu"):
        connect(environment, device, 60.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        data, kernels = open_run_data(config), dict.fromkeys(OPS, "torch")
        chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        parts = Parts(groups, chunks, optimizer, device.torch)
        for names, compare in (("none", True), (WEIGHT, True), ("weight", True), (WEIGHT, False)):
            scaled = _scale(chunks, names, 1e6) if names != "none" and groups.rank == 3 else []
            result = train_step(config, parts, data.train, 0, accept=lambda *_: False, compare=compare)
            found.append(result.apart)
            for hook in scaled:
                hook.remove()
        disconnect()
    return found


def test_gradient_of_one_rank_is_pinned_to_it_among_tensor_ranks_and_replicas(small_config, tmp_path):
    layout = {"parallel.tensor": 2, "parallel.data": 2, "parallel.distributed_optimizer": True}
    everywhere = results_of(run_ranks(apart_in_steps, 4, (small_config, overrides(layout)), tmp_path))
    assert everywhere[1:] == everywhere[:1] * 3, "the same on every rank"
    sound, one, all_of_them, ordinary = everywhere[0]
    rank = "rank 3 (tensor 1, pipeline 0, context 0, data 1)"
    assert (sound, ordinary) == (None, None)
    assert (one.ranks, one.layer, one.finite) == ({rank: [WEIGHT]}, 2, True)
    assert 0.1 < one.others_norm < 10.0, "of all gradients but those of a million times their size"
    assert (list(all_of_them.ranks), all_of_them.layer) == ([rank], None)


def _large_on_rank_1_for_ever() -> None:
    """From step 18 on, one gradient of rank 1 is a million times what it should be."""
    import os

    import pretrain_k2

    build, train_step, steps = pretrain_k2.build_optimizer, pretrain_k2.train_step, []

    def build_with_fault(config, chunks, *rest):
        if os.environ["RANK"] == "1":
            weight = dict(named_parameters(chunks))[WEIGHT]
            weight.register_hook(lambda gradient: gradient * (1e6 if steps[-1] >= FEWEST + 1 else 1.0))
        return build(config, chunks, *rest)

    def noted(config, parts, feed, step, **more):
        steps.append(step)
        return train_step(config, parts, feed, step, **more)

    pretrain_k2.build_optimizer, pretrain_k2.train_step = build_with_fault, noted


def test_a_replica_that_errs_for_ever_stops_the_run_with_rank_and_layer(small_config, tmp_path):
    folder, step = tmp_path / "run", FEWEST + 2
    settings = ["parallel.data=2", f"train.steps={step + 2}", "train.evaluate_every_steps=20", f"run.folder={folder}"]
    ended = pretrain(2, small_config, settings, tmp_path / "output", _large_on_rank_1_for_ever)
    assert [rank.exit_code for rank in ended] == [3, 3]
    place = "rank 1 (tensor 0, pipeline 0, context 0, data 1)"
    said = "".join(rank.stderr for rank in ended)
    assert f"step {step}: 3 computations" in said
    assert "for one layer on one rank alone, unlike its replicas (gradient norms " in said
    assert f"gradients of {WEIGHT} on {place}" in said
    assert f"spikes.suspect_factor=1e30 until step {step} is saved" in said
    told = events_of(folder, "incident")
    assert [(event["kind"], event["step"]) for event in told] == [("in doubt", step)] * 2 + [
        ("one replica alone", step)
    ]
    assert told[-1]["ranks"] == {place: [WEIGHT]}
    assert list(steps_of(folder)) == list(range(1, step)), "nothing of it was applied"


def test_what_is_applied_or_not_finite_is_pinned_too():
    """The rank stands in the event and in the line, though no rank was asked after the sum."""
    apart = Apart({"rank 1": [WEIGHT]})
    lost = StepResult(math.nan, 1.0, False, 0.0, (1.0,), apart=replace(apart, finite=False))
    assert where_not_finite(lost, 0, None, None) == {"ranks": apart.ranks, "samples_not_finite": {}}
    again = StepResult(2.0, 40.0, True, 0.0, (1.0,), apart=apart)
    attempts, told, said = Attempts(Ceiling(20.0, 10.0), 1, [replace(again, updated=False, apart=None)], [{}]), [], []
    journal = SimpleNamespace(write=lambda _event, **fields: told.append(fields))
    doubts = Doubts(Spikes(), (0, 0), None, journal, said.append)
    doubts.tell(Settled(Batch(7, 0, 1, None), attempts, again, 1.0))
    assert [(event["kind"], event["ranks"]) for event in told] == [("came again", apart.ranks)]
    assert f"applied (far larger than in other replicas: gradients of {WEIGHT} on rank 1" in said[0]
