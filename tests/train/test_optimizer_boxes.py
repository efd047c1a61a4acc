"""The distributed optimizer is saved and loaded from each rank's own part: nothing is gathered, in memory or over the
network. That the bits are right, from and to every layout, is tests/resume/test_layout_matrix.py."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import Range
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from rank_processes import results_of, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_rank import TORCH_KERNELS, training_rank

from k2_megatron.train.checkpoints.load import load_checkpoint
from k2_megatron.train.checkpoints.manifest import read_manifest, verify_files
from k2_megatron.train.checkpoints.optimizer_boxes import boxes, optimizer_boxes
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import model_state, optimizer_state, part_bytes


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_the_boxes_of_a_range_are_its_elements_in_their_order(shape, data):
    numbers = torch.arange(math.prod(shape)).view(shape)
    first = data.draw(st.integers(0, numbers.numel()))
    last = data.draw(st.integers(first, numbers.numel()))
    found = list(boxes(tuple(shape), first, last))
    parts = [
        numbers[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))] for offsets, sizes in found
    ]
    assert [tuple(part.shape) for part in parts] == [sizes for _, sizes in found], "a box ends beyond the tensor"
    assert [number for part in parts for number in part.flatten().tolist()] == list(range(first, last))
    assert len(found) <= 2 * len(shape) - 1


LAYERS, TENSOR_RANKS = 2, 2
FORMS = ["whole vector", "cut by rows", "cut by columns", "gate and up"]


def _entry(form: str, whole: torch.Tensor, layer: int, rank: int):
    """The sharded weight of one layer and tensor-parallel rank, whose parameter is its part of `whole`."""
    stacked, one = (0, layer, LAYERS), whole[layer]
    if form == "gate and up":
        gate, up = one.chunk(2)
        parameter = torch.cat([half.chunk(TENSOR_RANKS)[rank] for half in (gate, up)])
    else:
        parameter = one if form == "whole vector" else one.chunk(TENSOR_RANKS, dim=int(form == "cut by columns"))[rank]
    axis = {"cut by columns": 2, "whole vector": None}.get(form, 1)
    cut = () if axis is None else ((axis, rank, TENSOR_RANKS),)
    replica = (0, 0, 1)  # the second data-parallel rank, which holds boxes as the first does
    shard = ShardedTensor.from_rank_offsets(
        form, parameter.clone(), stacked, *cut, prepend_axis_num=1, replica_id=replica
    )
    return apply_swiglu_sharded_factory(shard, (stacked,)) if form == "gate and up" else shard


def _holder(parameter: torch.Tensor, first: int, last: int):
    """As much of a distributed optimizer as there is to a replica that holds elements [first, last) of a parameter."""
    main = parameter.flatten()[first:last].clone()
    return SimpleNamespace(
        model_float16_groups=[[parameter]],
        shard_fp32_from_float16_groups=[[main]],
        model_fp32_groups=[[]],
        shard_fp32_groups=[[]],
        optimizer=SimpleNamespace(state={main: {"exp_avg": main + 0.25, "exp_avg_sq": main + 0.5}}),
        _get_model_param_range_map=lambda _parameter: {"param": Range(first, last)},
    )


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 24), max_size=4))
def test_replicas_together_hold_each_element_once_at_its_place(form, cuts):
    shape = (LAYERS, 6) if form == "whole vector" else (LAYERS, 8, 6)
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    found = {kind: torch.full_like(whole, -1) for kind in ("param", "exp_avg", "exp_avg_sq")}
    for layer in range(LAYERS):
        for rank in range(1 if form == "whole vector" else TENSOR_RANKS):
            entry = _entry(form, whole, layer, rank)
            ends = sorted({0, entry.data.numel(), *(cut for cut in cuts if cut < entry.data.numel())})
            for first, last in pairwise(ends):
                for box in optimizer_boxes(_holder(entry.data, first, last), {"model": {"weight": entry}}):
                    place = found[box.key.removeprefix("optimizer.state.").removesuffix(f".{form}")][box.global_slice()]
                    assert place.shape == box.data.shape and (place == -1).all(), "beyond the tensor, or held twice"
                    assert is_main_replica(box.replica_id), "a box that no other rank has would not be written"
                    place.copy_(box.data)
    expected = {"param": whole, "exp_avg": whole + 0.25, "exp_avg_sq": whole + 0.5}
    assert all(torch.equal(found[kind], tensor) for kind, tensor in expected.items())


class Traffic(TorchDispatchMode):
    """Bytes that this thread gives to collectives, and bytes of the storages that its operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.made = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if operation.namespace == "c10d":
            self.sent += sum(tensor.nbytes for tensor in given)
            return result
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made += tensor.untyped_storage().nbytes()
        return result


# Large enough that plans and hashes, which ranks do exchange, are little beside it
SETTINGS = [
    *("model.layers=1", "model.hidden_size=512", "model.ffn_hidden_size=1376", "train.precision=bfloat16"),
    "parallel.distributed_optimizer=true",
]


def _save_and_load(config_path: Path, folder: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """(bytes of this rank's part, {what was done: (bytes sent, bytes of storages made)})."""
    found = {}
    with training_rank(config_path, SETTINGS, TORCH_KERNELS) as (config, _, _, parts):
        optimizer_state(parts.optimizer, model_state(parts.chunks), loading=True)  # makes the moments
        ways = {
            "foreground": {"asynchronous": False},
            "background": {"asynchronous": True},
            "memory taken before": {"asynchronous": True, "part_bytes": part_bytes(parts.chunks, parts.groups)},
        }
        for step, (name, how) in enumerate(ways.items(), 1):
            saver = CheckpointWriter(folder, parts.groups, **how)
            for again in ("", " again"):
                with Traffic() as traffic:
                    saver.save(step, config, parts, {})
                saved = saver.wait()
                found[name + again] = traffic.sent, traffic.made
                assert verify_files(saved.folder, read_manifest(saved.folder)) == []
        with Traffic() as traffic:
            load_checkpoint(saved.folder, read_manifest(saved.folder), config, parts)
        found["load"] = traffic.sent, 0
        return saved.bytes // parts.groups.world_size, found


@pytest.fixture(scope="module")
def costs(small_config: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("boxes")
    return results_of(run_ranks(_save_and_load, 2, (small_config, folder / "checkpoints"), folder / "ranks"))


def test_no_collective_carries_state(costs):
    for part, found in costs:
        for name, (sent, _) in found.items():
            assert sent < 0.05 * part, (name, sent, part)


def test_who_writes_what_is_found_out_once(costs):
    for _, found in costs:
        assert found["background again"][0] < 0.2 * found["background"][0]


@pytest.mark.parametrize(
    ("way", "copies"), [("foreground", 0), ("background", 1), ("background again", 0), ("memory taken before", 0)]
)
def test_a_save_holds_no_more_than_the_copy_of_a_rank_s_part(costs, way, copies):
    for part, found in costs:
        _, made = found[way]
        assert made < (copies + 0.05) * part, (made, part)
        assert made > 0.9 * copies * part, "the copy is not seen: nothing is measured"
