"""Initial weights as a pure function of (seed, global parameter name, global index): the same in every layout.

megatron-core draws each rank's weights from that rank's generator, so no two layouts start from the same model. Here
a weight is addressed by the name and the offset that its checkpoint entry carries, and its value is a hash of these
turned into a normal number: u = splitmix64(key + index), z = sqrt(2) erfinv(2u - 1). No state, no draws in order.

Standard deviations follow Megatron: `init_std` for embeddings and input projections, init_std / sqrt(2 layers) for
the two projections that write into the residual stream; norm weights are one.
splitmix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
"""

import ctypes
import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from k2_megatron.kernels.dispatch import extension

_BLOCK = 1 << 20  # elements a block: bounds the float64 and int64 scratch to 32 MB


@torch.no_grad()
def initialize_weights(model: MegatronModule, seed: int, init_std: float, layers: int, zero_centered: bool) -> None:
    """Fill every parameter of one model chunk in place. `layers` is the whole model's depth."""
    filled = set()
    for parameter, shard in _sharded_parameters(model):
        filled.add(parameter)
        if shard.key.endswith(("norm.weight", "norm_weight")):
            shard.data.fill_(0.0 if zero_centered else 1.0)
            continue
        writes_residual = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = init_std / math.sqrt(2 * layers) if writes_residual else init_std
        _fill_normal(shard, seed, std)
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    assert not missing, f"no initial value was defined for {missing}"


def _sharded_parameters(model: MegatronModule) -> Iterator[tuple[int, ShardedTensor]]:
    """Each parameter's shards (two for a packed gate and up), as views into the parameter's storage."""
    by_storage = {parameter.data_ptr(): id(parameter) for parameter in model.parameters()}
    for value in nested_values(model.sharded_state_dict()):
        if isinstance(value, ShardedTensorFactory):
            owner = by_storage[value.data.data_ptr()]
            for shard in nested_values(value.build()):
                yield owner, shard
        elif isinstance(value, ShardedTensor):
            yield by_storage[value.data.data_ptr()], value


def _fill_normal(shard: ShardedTensor, seed: int, std: float) -> None:
    """Fill the shard's local tensor with the values of its place in the global tensor."""
    key = _shard_key(shard, str(seed))
    for rows, index in _global_indices(shard):
        shard.data[rows].copy_(_normal(index, key).mul_(std))


def hash_mix(shard: ShardedTensor) -> torch.Tensor:
    """int64 scalar: wrapping sum over the shard's elements of splitmix64(name, global index, bits of the element).

    ValueError for elements of other than 2, 4 or 8 bytes: the extension would read beyond them.
    """
    _integer_of(shard)
    compiled, _ = extension("cpu")
    if shard.data.device.type != "cpu" or compiled is None:
        return hash_mix_reference(shard)
    matrix = shard.data.detach().reshape(-1, shard.data.shape[-1])  # [1, columns] for a vector
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    columns, total = shard.global_shape[-1], ctypes.c_int64(0)
    *first_row, first_column = shard.global_offset[shard.prepend_axis_num :]
    compiled.fingerprint(
        matrix.data_ptr(),
        matrix.element_size(),
        *matrix.shape,
        matrix.stride(0),
        sum(first_row) * columns + first_column,
        columns,
        _shard_key(shard, "fingerprint") & (1 << 64) - 1,
        ctypes.addressof(total),
        torch.get_num_threads(),
    )
    return torch.tensor(total.value)


def hash_mix_reference(shard: ShardedTensor) -> torch.Tensor:
    """What `hash_mix` computes, in torch, on any device."""
    total = torch.zeros((), dtype=torch.int64, device=shard.data.device)
    key = _shard_key(shard, "fingerprint")
    integer = _integer_of(shard)
    for rows, index in _global_indices(shard):
        bits = shard.data.detach()[rows].contiguous().view(integer).to(torch.int64)
        total += _splitmix64(_splitmix64(index, key) ^ bits, 0).sum()
    return total


def _integer_of(shard: ShardedTensor) -> torch.dtype:
    """The integer type with as many bits as the shard's elements."""
    found = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(shard.data.element_size())
    if found is None:
        raise ValueError(f"{shard.key}: the fingerprint takes elements of 2, 4 or 8 bytes, not {shard.data.dtype}")
    return found


def _shard_key(shard: ShardedTensor, salt: str) -> int:
    # Layers are stacked in front (prepended axes): their number belongs to the name, the rest is the tensor.
    layer = ".".join(map(str, shard.global_offset[: shard.prepend_axis_num]))
    digest = hashlib.sha256(f"{salt}/{shard.key}/{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _global_indices(shard: ShardedTensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of the local tensor, global linear int64 index of each of their elements), in blocks of bounded size."""
    stacked = shard.prepend_axis_num
    shape, offset = shard.data.shape, shard.global_offset[stacked:]
    device = shard.data.device
    if len(shape) == 1:
        yield slice(None), torch.arange(offset[0], offset[0] + shape[0], dtype=torch.int64, device=device)
        return
    rows, columns = shape
    column_index = torch.arange(offset[1], offset[1] + columns, dtype=torch.int64, device=device)
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        row_index = torch.arange(offset[0] + first, offset[0] + last, dtype=torch.int64, device=device)
        yield slice(first, last), row_index[:, None] * shard.global_shape[-1] + column_index[None, :]


def _normal(index: torch.Tensor, key: int) -> torch.Tensor:
    """Standard normal float64 numbers, one for each int64 index, from a 64-bit key.

    float64 throughout: erfinv may round differently in the last place from one machine's vector code to another's,
    and the rounding to the parameter's type then hides it.
    """
    bits = _splitmix64(index, key)
    uniform = _shift_right(bits, 11).to(torch.float64).add_(0.5).mul_(2.0**-53)  # in (0, 1), 53 bits
    return uniform.mul_(2.0).sub_(1.0).erfinv_().mul_(math.sqrt(2.0))


def _splitmix64(index: torch.Tensor, key: int) -> torch.Tensor:
    """The splitmix64 output function of key + (index + 1) * golden ratio; int64 arithmetic wraps as uint64 does."""
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 seen as uint64 (torch's >> on int64 carries the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
