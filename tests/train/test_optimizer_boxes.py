"""The distributed optimizer is saved and loaded from each rank's own part: nothing is gathered, in memory or over the
network. That the bits are right, from and to every layout, is tests/resume/test_layout_matrix.py."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import results_of, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_rank import TORCH_KERNELS, training_rank

from k2_megatron.train.checkpoint import load_checkpoint
from k2_megatron.train.checkpoint_save import CheckpointWriter
from k2_megatron.train.checkpoint_state import model_state, optimizer_state, part_bytes
from k2_megatron.train.optimizer_boxes import boxes


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
    with training_rank(config_path, SETTINGS, TORCH_KERNELS) as (config, device, groups, _, chunks, optimizer):
        optimizer_state(optimizer, model_state(chunks), loading=True)  # makes the moments, as a first step would
        ways = {
            "foreground": {"asynchronous": False},
            "background": {"asynchronous": True},
            "memory taken before": {"asynchronous": True, "part_bytes": part_bytes(chunks, groups)},
        }
        for step, (name, how) in enumerate(ways.items(), 1):
            saver = CheckpointWriter(folder, groups, **how)
            for again in ("", " again"):
                with Traffic() as traffic:
                    saver.save(step, config, chunks, optimizer, device.torch, {})
                saved = saver.wait()
                found[name + again] = traffic.sent, traffic.made
        with Traffic() as traffic:
            load_checkpoint(saved.folder, config, groups, chunks, optimizer, device.torch)
        found["load"] = traffic.sent, 0
        return saved.bytes // groups.world_size, found


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
