"""Initial weights: normal, independent, a function of seed, name and place; and the fingerprint of weights."""

import math
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from one_rank_model import one_rank
from rank_processes import Rank
from small_run import overrides

import k2_megatron.model.initialize as initialize
from k2_megatron.kernels.dispatch import extension
from k2_megatron.model.initialize import _fill_normal, _normal, _splitmix64, hash_mix, hash_mix_reference

ROWS, COLUMNS = 48, 40


def filled(name: str = "w", seed: int = 1, layer: int = 0, rows: slice = slice(None), columns: slice = slice(None)):
    """The values that a rank owning these rows and columns of layer `layer` of the stack `name` fills in."""
    row, column = range(ROWS)[rows], range(COLUMNS)[columns]
    shard = ShardedTensor.from_rank_offsets(
        name,
        torch.zeros(len(row), len(column)),
        (0, layer, 3),
        (1, row.start // len(row), ROWS // len(row)),
        (2, column.start // len(column), COLUMNS // len(column)),
        prepend_axis_num=1,
    )
    _fill_normal(shard, seed, 1.0)
    return shard


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [  # the reference implementation's first outputs, as published with it and in the tests of other languages
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_splitmix64_gives_the_reference_values(seed, outputs):
    found = _splitmix64(torch.arange(len(outputs)), seed)
    assert [int(value) % 2**64 for value in found] == outputs


def test_numbers_are_standard_normal():
    count = 1 << 20
    z = _normal(torch.arange(count), 12345)
    within = 5 / math.sqrt(count)  # five standard errors
    assert abs(z.mean()) < within
    assert abs(z.square().mean() - 1) < within * math.sqrt(2)
    assert abs((z**4).mean() - 3) < within * math.sqrt(96)
    # Kolmogorov: the largest gap to the normal's distribution function; 1.95 is passed once in a thousand
    normal = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    assert (normal - (torch.arange(count) + 0.5) / count).abs().max() * math.sqrt(count) < 1.95
    assert abs((z[1:] * z[:-1]).mean()) < within, "neighbours are independent"


def test_a_shard_holds_its_part_of_the_whole():
    whole = filled().data
    assert torch.equal(filled(rows=slice(16, 32)).data, whole[16:32])
    assert torch.equal(filled(columns=slice(20, 40)).data, whole[:, 20:])
    assert torch.equal(filled(rows=slice(24, 48), columns=slice(0, 10)).data, whole[24:, :10])


def test_size_of_a_block_changes_nothing(monkeypatch):
    whole = filled().data
    monkeypatch.setattr(initialize, "_BLOCK", 7 * COLUMNS)
    assert torch.equal(filled().data, whole)


@pytest.mark.parametrize("other", [{"name": "v"}, {"seed": 2}, {"layer": 1}, {"layer": 2}], ids=str)
def test_other_name_seed_or_layer_is_independent(other):
    a, b = filled().data.flatten(), filled(**other).data.flatten()
    assert not (a == b).any()
    assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def built_weights(config_path: Path, settings: list[str]) -> dict[str, torch.Tensor]:
    with one_rank(config_path, settings) as (_config, _groups, _kernels, model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def weights(small_config, folder, settings) -> dict[str, torch.Tensor]:
    outcome = Rank(built_weights, (small_config, overrides(settings)), {}, folder).finish()
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.result


def test_every_weight_has_its_standard_deviation(small_config, tmp_path):
    layers, init_std = 4, 0.02
    found = weights(small_config, tmp_path, {})
    assert len(found) == 3 + 6 * layers
    for name, weight in found.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        writes_residual = "linear_proj" in name or "linear_fc2" in name
        std = init_std / math.sqrt(2 * layers) if writes_residual else init_std
        error = 5 / math.sqrt(weight.numel())
        assert abs(weight.mean() / std) < error, name
        assert abs(weight.square().mean().sqrt() / std - 1) < error / math.sqrt(2), name


def test_no_two_weights_are_alike(small_config, tmp_path):
    """Same-shaped weights of different layers, and gate and up within one, are uncorrelated."""
    found = {name: weight for name, weight in weights(small_config, tmp_path, {}).items() if "norm" not in name}
    for layer in range(4):
        packed = found.pop(f"decoder.layers.{layer}.mlp.linear_fc1.weight")
        found[f"gate {layer}"], found[f"up {layer}"] = packed.chunk(2)
    names = list(found)
    for place, name in enumerate(names):
        for other in names[:place]:
            if found[name].shape == found[other].shape:
                a, b = found[name].flatten(), found[other].flatten()
                assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a)), f"{name} and {other}"


def test_seed_decides(small_config, tmp_path):
    first = weights(small_config, tmp_path / "a", {})
    again = weights(small_config, tmp_path / "b", {})
    other = weights(small_config, tmp_path / "c", {"run.seed": 8})
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


# The fingerprint


def test_fingerprint_of_parts_adds_up_to_that_of_the_whole():
    total = hash_mix(filled())
    assert sum(hash_mix(filled(rows=slice(first, first + 16))) for first in (0, 16, 32)) == total
    assert sum(hash_mix(filled(columns=slice(first, first + 20))) for first in (0, 20)) == total


@pytest.mark.skipif(extension("cpu")[0] is None, reason=extension("cpu")[1] or "-")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_fingerprint_is_the_references(dtype, threads):
    """Of whole tensors, of rows and columns cut out of them, of vectors, and of views with gaps."""
    numbers = torch.randn(2 * 96, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [
        numbers,
        numbers[::2, :700],
        numbers[5:9].T,
        numbers[:, :1],
        numbers[3],
        numbers.view(-1)[:70_001],
        numbers[:0],
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for view in views:
            for part in (0, 2):  # of three such parts along the last axis
                place = (view.dim(), part, 3)
                shard = ShardedTensor.from_rank_offsets("w", view, (0, 1, 4), place, prepend_axis_num=1)
                assert hash_mix(shard) == hash_mix_reference(shard), (view.shape, view.stride(), part)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.complex128])
@pytest.mark.parametrize("compute", [hash_mix, hash_mix_reference])
def test_fingerprint_refuses_elements_that_the_extension_would_read_beyond(compute, dtype):
    shard = ShardedTensor.from_rank_offsets("w", torch.zeros(8, 8).to(dtype))
    with pytest.raises(ValueError, match=rf"w: the fingerprint takes elements of 2, 4 or 8 bytes, not {dtype}"):
        compute(shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_one_flipped_bit(dtype):
    shard = ShardedTensor.from_rank_offsets("w", torch.randn(8, 8).to(dtype))
    before = hash_mix(shard)
    bits = shard.data.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    for bit in range(15):
        bits[3, 5] ^= 1 << bit
        assert hash_mix(shard) != before
        bits[3, 5] ^= 1 << bit
    assert hash_mix(shard) == before


def test_fingerprint_sees_what_a_sum_would_not():
    shard = filled()
    before = hash_mix(shard)
    shard.data[[3, 4]] = shard.data[[4, 3]]
    assert hash_mix(shard) != before, "two rows exchanged"
    zero, negative = filled(), filled()
    zero.data[0, 0], negative.data[0, 0] = 0.0, -0.0
    assert hash_mix(zero) != hash_mix(negative), "zero and minus zero"
    one, two = filled(), filled(layer=1)
    two.data.copy_(one.data)
    assert hash_mix(one) != hash_mix(two), "another layer's weights"
