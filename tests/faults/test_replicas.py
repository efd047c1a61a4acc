"""A bit that flips in one data-parallel replica is found by comparing replicas, named, and never saved."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import pretrain, results_of, run_ranks
from run_results import events_of, steps_of, stored_state
from training_rank import TORCH_KERNELS, training_rank

from k2_megatron.train.model_chunks import unwrapped
from k2_megatron.train.optimizer import set_learning_rate
from k2_megatron.train.replicas import _sum_of_bits, compare_replicas, majority_of, replicated_tensors
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.step import train_step

CASES = 100
STEPS = 5
# Five steps of three replicas, saved after 2, 4 and 5
SETTINGS = ["parallel.data=3", "train.global_batch=6", f"train.steps={STEPS}", "checkpoint.every_steps=2"]
# A model as small as it gets: many flips, each of them compared
TINY = ["model.layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.heads=2", "model.kv_heads=2"]
NO_EVALUATION = ["train.evaluate_every_steps=", "train.evaluate_batches=", "data.held_out="]


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element, in place."""
    integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flipped = 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
    tensor.detach().view(-1).view(integer)[element] ^= flipped


def _flip_and_compare(config_path: Path, settings: list[str]) -> list[tuple[str, str, str]]:
    """In each case flip a random bit of a random tensor on a random rank; (rank, tensor, what comparing said)."""
    with training_rank(config_path, settings) as (config, _, _, parts):
        data = open_run_data(config)
        set_learning_rate(parts.optimizer, 1e-3, 0.1)
        train_step(config, parts, data.train, 0)
        tensors = [(one.name, one.tensor) for one in replicated_tensors(parts)]
        chance, said = random.Random(5), [("none", "none", str(compare_replicas(parts)))]
        for _ in range(CASES):
            victim, (name, tensor) = chance.randrange(parts.groups.world_size), chance.choice(tensors)
            element, bit = chance.randrange(tensor.numel()), chance.randrange(8 * tensor.element_size())
            if parts.groups.rank == victim:
                flip_bit(tensor, element, bit)
            difference = compare_replicas(parts)
            if parts.groups.rank == victim:
                flip_bit(tensor, element, bit)
            said.append((f"data {victim})", name, str(difference)))
        said.append(("none", "none", str(compare_replicas(parts))))
    return said


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_flipped_bit_is_found_and_its_rank_and_tensor_named(small_config, tmp_path, precision):
    settings = [*SETTINGS, *NO_EVALUATION, *TINY, f"train.precision={precision}"]
    said = results_of(run_ranks(_flip_and_compare, 3, (small_config, settings), tmp_path))
    assert said[0] == said[1] == said[2], "every rank hears the same"
    assert said[0][0][2] == said[0][-1][2] == "None"
    cases = said[0][1:-1]
    assert [case for case in cases if not case[2].endswith(f"{case[0]} in {case[1]}")] == []
    kinds = {name.split(" of ")[0] for _, name, _ in cases if " of " in name}
    assert kinds == {"exp_avg", "exp_avg_sq", *(["main parameter"] if precision == "bfloat16" else [])}


def _flip_norms_and_compare(config_path: Path, settings: list[str]) -> list[tuple[str, str, str]]:
    """Flip a bit of each weight and moment that tensor ranks hold alike, and of one that they share out, each time on
    another rank: (rank, tensor, what comparing said)."""
    with training_rank(config_path, settings, TORCH_KERNELS) as (config, _, _, parts):
        data = open_run_data(config)
        set_learning_rate(parts.optimizer, 1e-3, 0.1)
        for step in range(2):
            train_step(config, parts, data.train, step)
        said = [("none", "none", str(compare_replicas(parts)))]
        tensors = [(one.name, one.tensor) for one in replicated_tensors(parts)]
        alike = [(name, tensor) for name, tensor in tensors if name.endswith("norm.weight")]
        for number, (name, tensor) in enumerate([*alike, tensors[0]]):
            victim = number % parts.groups.world_size
            if parts.groups.rank == victim:
                flip_bit(tensor, number % tensor.numel(), number)
            said.append((f"rank {victim} ", name, str(compare_replicas(parts))))
            if parts.groups.rank == victim:
                flip_bit(tensor, number % tensor.numel(), number)
    return said


UNTOLD = "(which of them is right cannot be told)"


def test_copies_of_two_tensor_ranks_are_compared(small_config, tmp_path):
    """Both are named; what they share out has no copy."""
    settings = ["parallel.tensor=2", "train.global_batch=2", *NO_EVALUATION, *TINY]
    first, second = results_of(run_ranks(_flip_norms_and_compare, 2, (small_config, settings), tmp_path))
    assert first == second
    clean, *norms, shared_out = first
    assert clean[2] == shared_out[2] == "None"
    assert len(norms) == 9, "weight and both moments of three norms"
    for _, name, told in norms:
        ranks = [f"rank {rank} (tensor {rank}, pipeline 0, context 0, data 0) in {name}" for rank in range(2)]
        assert told == f"{'; '.join(ranks)} {UNTOLD}"


def test_copies_of_tensor_ranks_and_replicas_name_the_rank_together(small_config, tmp_path):
    """Four copies have a majority where two replicas have none."""
    layout = ["parallel.tensor=2", "parallel.data=2", "parallel.sequence=true", "parallel.distributed_optimizer=true"]
    settings = [*layout, "train.global_batch=4", "train.precision=bfloat16", *NO_EVALUATION, *TINY]
    said = results_of(run_ranks(_flip_norms_and_compare, 4, (small_config, settings), tmp_path))
    assert all(other == said[0] for other in said)
    clean, *norms, shared_out = said[0]
    assert clean[2] == "None" and len(norms) == 3
    for rank, name, told in norms:
        assert told.startswith(rank) and told.endswith(f") in {name}"), told
    assert shared_out[2].count(f"in {shared_out[1]}") == 2 and shared_out[2].endswith(UNTOLD), "two replicas"


IN_EACH_STEP = [
    "train.precision=bfloat16",
    "parallel.distributed_optimizer=true",
    "train.compare_replicas_every_steps=1",
]


def _flip_and_train(config_path: Path, settings: list[str]) -> list[tuple[str, str, bool, str]]:
    """In each step but the last flip a random bit of a random weight of a random rank, and take it back afterwards:
    (rank, weight, whether the step was applied, what comparing said)."""
    with training_rank(config_path, settings, TORCH_KERNELS) as (config, _, _, parts):
        data = open_run_data(config)
        set_learning_rate(parts.optimizer, 1e-3, 0.1)
        weights = list(unwrapped(parts.chunks[0]).named_parameters())
        chance, said = random.Random(7), []
        for _ in range(CASES):
            victim, (name, weight) = chance.randrange(parts.groups.world_size), chance.choice(weights)
            place = chance.randrange(weight.numel()), chance.randrange(8 * weight.element_size())
            if parts.groups.rank == victim:
                flip_bit(weight, *place)
            result = train_step(config, parts, data.train, 0)
            if parts.groups.rank == victim:
                flip_bit(weight, *place)
            said.append((f"data {victim})", name, result.updated, str(result.difference)))
        result = train_step(config, parts, data.train, 0)
        said.append(("none", "none", result.updated, str(result.difference)))
    return said


def test_every_flipped_weight_is_found_in_the_step_that_computes_with_it(small_config, tmp_path):
    """Where the optimizer is sharded, or the weights are bfloat16 copies, the next update would hide it."""
    settings = [*SETTINGS, *NO_EVALUATION, *TINY, *IN_EACH_STEP]
    said = results_of(run_ranks(_flip_and_train, 3, (small_config, settings), tmp_path))
    assert said[0] == said[1] == said[2], "every rank hears the same"
    *cases, last = said[0]
    assert last[2:] == (True, "None"), "the flips left nothing behind"
    wrong = [case for case in cases if case[2] or not case[3].endswith(f"{case[0]} in {case[1]}")]
    assert len(cases) == CASES and wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_of_every_bit_wherever_the_tensor_begins(dtype):
    values = torch.randn(40, dtype=dtype)
    for first in range(5):
        for size in (1, 2, 3, 4, 7, 32):
            tensor = values[first : first + size]
            before = int(_sum_of_bits(tensor))
            assert before == int(_sum_of_bits(tensor.clone())), "also in another place"
            for element, bit in ((0, 0), (size - 1, 15), (size // 2, 8 * tensor.element_size() - 1)):
                flip_bit(tensor, element, bit)
                assert int(_sum_of_bits(tensor)) != before
                flip_bit(tensor, element, bit)


def test_majority_of_two_is_nobody():
    two, three = torch.tensor([[1, 5], [1, 7]]), torch.tensor([[1, 5], [1, 7], [1, 7]])
    assert majority_of(two)[1] is False
    assert majority_of(three)[0].tolist() == [1, 7] and majority_of(three)[1] is True
    assert majority_of(torch.tensor([[1], [2], [3]]))[1] is False


def _flip_on_rank_1_in_step_3() -> None:
    """After the backward pass of step 3, before its update: the weights that the step computed with have changed."""
    import k2_megatron.train.step as step
    from k2_megatron.train.model_chunks import unwrapped

    run, calls = step._run_schedule, []

    def run_and_flip(config, parts, *rest, **keywords):
        loss = run(config, parts, *rest, **keywords)
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            flip_bit(unwrapped(parts.chunks[0]).decoder.layers[2].mlp.linear_fc1.weight, 77, 13)
        return loss

    step._run_schedule = run_and_flip


def ends(small_config: Path, folder: Path, fault: Callable[[], None] | None, *more: str) -> list:
    settings = [*SETTINGS, *NO_EVALUATION, f"run.folder={folder}", *more]
    return pretrain(3, small_config, settings, folder.with_name(f"{folder.name}_output_{len(more)}"), fault=fault)


def test_flipped_bit_stops_the_run_before_it_is_saved(small_config, tmp_path):
    folder = tmp_path / "run"
    outcomes = ends(small_config, folder, _flip_on_rank_1_in_step_3)
    assert [outcome.exit_code for outcome in outcomes] == [3, 3, 3]
    said = "".join(outcome.stderr for outcome in outcomes)
    place = "rank 1 (tensor 0, pipeline 0, context 0, data 1) in decoder.layers.2.mlp.linear_fc1.weight"
    # Unasked it is compared before a save; by then the moments have followed the weights.
    assert said.startswith("step 4: replicas differ") and place.split(" in ")[0] in said
    (incident,) = events_of(folder, "incident")
    assert (incident["kind"], incident["step"], incident["saved_step"]) == ("replicas differ", 4, 2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_00000002"]

    # Compared in every step it is found in the step that it happened in, with nothing but the flipped tensor wrong:
    # also where the sharded optimizer writes every replica's weights anew at each update.
    every, asked = "train.compare_replicas_every_steps=1", tmp_path / "asked"
    outcomes = ends(small_config, asked, _flip_on_rank_1_in_step_3, every, "parallel.distributed_optimizer=true")
    said = "".join(outcome.stderr for outcome in outcomes)
    assert f"step 3: replicas differ, which no computation of ours does: {place}." in said
    assert max(steps_of(asked)) == 2

    # Started again on a sound machine it is the run in which nothing happened.
    results_of(ends(small_config, folder, None, every))
    results_of(ends(small_config, tmp_path / "whole", None))
    assert steps_of(folder) == steps_of(tmp_path / "whole")
    assert stored_state(folder, STEPS) == stored_state(tmp_path / "whole", STEPS)
