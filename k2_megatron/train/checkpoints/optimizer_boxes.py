"""A rank's part of the distributed optimizer as boxes of the global tensors: saved and loaded without a gather.

megatron-core lays the parameters of a model chunk end to end and gives each data- (and context-) parallel rank one
range of that, so of a parameter a rank may hold any range of its elements in row-major order. Such a range is a few
boxes; of a matrix at most the end of a row, whole rows and the beginning of a row. torch_dist stores boxes:

    in:   the optimizer and the sharded weights, which say where a parameter lies in its global tensor
    out:  ShardedTensors of main parameters and moments; they are views, so a load fills the optimizer's own memory

No rank sends or holds what is another's, and the tensors on disk have the names and shapes that a gather gives them
("fully_reshardable"), so any layout reads them. The ranges are megatron-core 0.16's: `_get_model_param_range_map`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

STATE = "optimizer.state."


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """The boxes that elements [first, last) of a row-major tensor are, in the order of their elements."""
    if first == last:
        return
    if len(shape) == 1:
        yield (first,), (last - first,)
        return
    row_size = math.prod(shape[1:])
    row, column = divmod(first, row_size)
    rows = 0 if column else (last - first) // row_size
    if rows:
        yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        end = first + rows * row_size
    else:
        end = min(last, (row + 1) * row_size)
        for offsets, sizes in boxes(shape[1:], column, end - row * row_size):
            yield (row, *offsets), (1, *sizes)
    yield from boxes(shape, end, last)


def built(value: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors that an entry of sharded weights stands for: itself, or the parts it is stored in (gate and up)."""
    return list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]


def optimizer_boxes(part: DistributedOptimizer, model: dict) -> Iterator[ShardedTensor]:
    """What this rank holds of main parameters and moments, as `optimizer.state.<kind>.<parameter>`.

    A parameter that tensor-parallel ranks or the two ends of the pipeline hold alike has the weights' main replica.
    """
    entries = {
        value.data: value for value in nested_values(model) if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    groups = (
        *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
    )
    for parameters, mains in groups:
        for parameter, main in zip(parameters, mains, strict=True):
            held = part._get_model_param_range_map(parameter)["param"]
            assert main.numel() == held.size, f"a main parameter has {main.numel()} elements, its range {held.size}"
            moments = part.optimizer.state[main]
            tensors = {"param": main, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            for shard in built(entries[parameter]):
                for kind, flat in tensors.items():
                    yield from _boxes_of(shard, f"{STATE}{kind}.{shard.key}", flat.detach(), held.start, parameter)


def _boxes_of(
    shard: ShardedTensor, key: str, flat: torch.Tensor, start: int, parameter: torch.Tensor
) -> Iterator[ShardedTensor]:
    """The boxes of `shard`, a view of `parameter`, that `flat` holds: elements [start, start + len(flat)) of it."""
    assert shard.data.is_contiguous(), f"{shard.key}: a part of a parameter is no range of it"
    before = (shard.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    first, last = max(start - before, 0), min(start + flat.numel() - before, shard.data.numel())
    layers = shard.prepend_axis_num  # axes that the global tensor has in front: layers are stacked
    place = first + before - start
    for offsets, sizes in boxes(tuple(shard.local_shape), first, max(first, last)):
        size, shape = math.prod(sizes), (1,) * layers + sizes
        origin = (0,) * layers + offsets
        yield replace(
            shard,
            key=key,
            data=flat[place : place + size].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_offset=tuple(map(sum, zip(shard.global_offset, origin, strict=True))),
            axis_fragmentations=None,  # no regular grid
            replica_id=(*shard.replica_id[:2], 0),  # pipeline, tensor, and data, where each element has one holder
            prepend_axis_num=0,
        )
        place += size
