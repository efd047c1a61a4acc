"""csrc/cross_entropy.cu on the CPU, beyond the common cases: shards, row strides, edges of rows, odd labels."""

from __future__ import annotations

import pytest
import torch
from guarded import DTYPES, Guarded, check_all, empty
from kernel_cases import assert_as_good_as_reference

IGNORED = -100


class Shards:
    """Logits [T, V] cut into `ranks` shards, run through the three calls as the ranks would."""

    def __init__(self, kernels, logits, labels, ranks, *, padding=0, offset=0, smoothing=0.0, z_loss=0.0):
        rows, self.vocabulary = logits.shape
        self.kernels, self.labels, self.rows = kernels, labels, rows
        self.columns, self.stride, self.dtype = (
            self.vocabulary // ranks,
            self.vocabulary // ranks + padding,
            logits.dtype,
        )
        self.smoothing, self.z_loss = smoothing, z_loss
        self.planes = 4 if smoothing else 3
        self.held = {}
        for rank in range(ranks):
            shard = torch.full((rows, self.stride), torch.nan, dtype=logits.dtype)
            shard[:, : self.columns] = logits[:, rank * self.columns : (rank + 1) * self.columns]
            self.held[f"shard {rank}"] = Guarded(shard, offset)

    def statistics(self):
        every = empty((len(self.held), self.planes * self.rows + 1), torch.float32)
        for rank, shard in enumerate(self.held.values()):
            self.kernels.cross_entropy_statistics(
                shard.address, self.stride, self.labels.data_ptr(), every.tensor[rank].data_ptr(), self.planes,
                self.rows, self.columns, rank * self.columns, DTYPES[self.dtype], 0,
            )  # fmt: skip
        every.check("statistics")
        assert (every.tensor[:, -1] == self.columns).all(), "the width goes with the statistics"
        return every.tensor

    def loss(self, statistics=None):
        statistics = self.statistics() if statistics is None else statistics
        loss, lse = empty((self.rows,), torch.float32), empty((self.rows,), torch.float32)
        self.kernels.cross_entropy_loss(
            statistics.data_ptr(), len(self.held), self.planes, self.labels.data_ptr(), loss.address, lse.address,
            self.rows, self.vocabulary, self.smoothing, self.z_loss, IGNORED, 0,
        )  # fmt: skip
        check_all({"loss": loss, "lse": lse})
        return loss.tensor, lse.tensor

    def gradient(self, lse, grad_loss, *, out_offset=None):
        """In place, or into another buffer that is `out_offset` elements off alignment."""
        results = []
        for rank, (name, shard) in enumerate(self.held.items()):
            out = shard if out_offset is None else empty((self.rows, self.stride), self.dtype, out_offset)
            self.kernels.cross_entropy_gradient(
                shard.address, self.stride, self.labels.data_ptr(), lse.data_ptr(), grad_loss.data_ptr(),
                grad_loss.stride(0), out.address, self.stride, self.rows, self.columns, rank * self.columns,
                self.vocabulary, self.smoothing, self.z_loss, IGNORED, DTYPES[self.dtype], 0,
            )  # fmt: skip
            check_all({name: shard, "gradient": out})
            assert out.tensor[:, self.columns :].isnan().all(), "the padding between rows was written"
            results.append(out.tensor[:, : self.columns])
        return torch.cat(results, 1)


def test_more_rows_than_a_grid_has_blocks_are_refused(kernels):
    """2^32 + 1 blocks would be started as one, the rest of the rows left as they are. Left out under the sanitizers,
    which cannot follow an exception out of C++ into a Python that was not linked with them."""
    with pytest.raises(RuntimeError, match="cross_entropy_statistics: CUDA error 9 "):
        kernels.cross_entropy_statistics(0, 1, 0, 0, 3, 2**32 + 1, 1, 0, DTYPES[torch.float32], 0)


def equation(logits, labels, grad_loss, smoothing, z_loss):
    logits = logits.detach().requires_grad_()
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    loss = lse - (1 - smoothing) * target - smoothing * logits.mean(-1) + z_loss * lse.square()
    loss = loss.masked_fill(labels == IGNORED, 0)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, logits, grad_loss.to(loss.dtype))[0]}


def inputs(rows, vocabulary, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1::4] = IGNORED
    return logits, labels, torch.randn(rows, generator=generator)


def check(kernels, rows, vocabulary, dtype, ranks, **options):
    logits, labels, grad_loss = inputs(rows, vocabulary, dtype)
    shards = Shards(kernels, logits, labels, ranks, **options)
    loss, lse = shards.loss()
    found = {"loss": loss, "gradient": shards.gradient(lse, grad_loss)}
    numbers = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
    reference = equation(logits.float(), labels, grad_loss, *numbers)
    reference["gradient"] = reference["gradient"].to(dtype)
    exact = equation(logits.double(), labels, grad_loss, *numbers)
    assert_as_good_as_reference(found, reference, exact, (rows, vocabulary, ranks, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_as_exact_as_torch_on_the_whole(kernels, dtype, ranks):
    check(kernels, 6, 4 * 1001, dtype, ranks, smoothing=0.1, z_loss=1e-3)


def test_rows_of_k2s_shard(kernels):
    """4004 bf16 columns: every second row starts in the middle of 16 bytes."""
    check(kernels, 4, 8 * 4004, torch.bfloat16, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 33])
def test_rows_of_any_length_at_any_address(kernels, dtype, columns):
    for offset in range(4):
        check(kernels, 5, columns, dtype, 1, offset=offset, padding=offset)


def test_long_rows_are_read_in_turns(kernels):
    check(kernels, 2, 40_003, torch.bfloat16, 1, z_loss=1e-4)
    check(kernels, 2, 20_001, torch.float32, 1, smoothing=0.2)


@pytest.mark.parametrize("out_offset", [0, 1, 3])
def test_gradient_into_another_buffer_of_any_alignment(kernels, out_offset):
    logits, labels, grad_loss = inputs(5, 301, torch.bfloat16)
    shards = Shards(kernels, logits, labels, 1)
    _, lse = shards.loss()
    apart = shards.gradient(lse, grad_loss, out_offset=out_offset)
    assert torch.equal(apart, shards.gradient(lse, grad_loss))


def test_one_gradient_for_all_rows(kernels):
    logits, labels, _ = inputs(5, 64, torch.float32)
    shards = Shards(kernels, logits, labels, 2)
    _, lse = shards.loss()
    expanded = shards.gradient(lse, torch.tensor(0.25).expand(5), out_offset=0)
    assert torch.equal(expanded, shards.gradient(lse, torch.full((5,), 0.25), out_offset=0))


def test_shards_of_unequal_widths_give_nan(kernels):
    logits, labels, _ = inputs(5, 64, torch.float32)
    shards = Shards(kernels, logits, labels, 2)
    statistics = shards.statistics()
    statistics[1, -1] += 1
    loss, _ = shards.loss(statistics)
    assert loss.isnan().tolist() == (labels != IGNORED).tolist()


def test_large_logits_do_not_overflow_and_masked_columns_count_nothing(kernels):
    logits = torch.full((3, 40), -torch.inf)
    logits[0, 3], logits[0, 30] = 3e4, 3e4
    logits[1] = 88.0 * torch.arange(40)
    labels = torch.tensor([3, 39, 0])
    loss, lse = Shards(kernels, logits, labels, 4).loss()
    assert torch.allclose(loss[:2], torch.tensor([0.6931472, 0.0]))
    assert lse[2] == -torch.inf


def test_nan_and_inf_logits_show_in_their_row(kernels):
    logits, labels, grad_loss = inputs(6, 160, torch.bfloat16)
    labels[:] = 5
    logits[1, 7], logits[3, 159], logits[4, 0] = torch.nan, torch.inf, torch.nan
    shards = Shards(kernels, logits, labels, 2)
    loss, lse = shards.loss()
    assert loss.isnan().tolist() == [False, True, False, True, True, False]
    assert shards.gradient(lse, grad_loss).isnan().any(1).tolist() == [False, True, False, True, True, False]


def test_ignored_and_weightless_rows_are_zero_whatever_the_logits(kernels):
    logits = torch.full((3, 37), torch.nan, dtype=torch.bfloat16)
    labels, grad_loss = torch.tensor([IGNORED, 4, IGNORED]), torch.tensor([1.0, 0.0, torch.nan])
    shards = Shards(kernels, logits, labels, 1)
    loss, lse = shards.loss()
    assert loss[[0, 2]].tolist() == [0.0, 0.0]
    assert torch.equal(shards.gradient(lse, grad_loss), torch.zeros_like(logits))


@pytest.mark.parametrize("label", [-1, 64, 2**40, -(2**40)])
def test_labels_out_of_range_give_nan_and_read_nothing(kernels, label):
    logits, _, _ = inputs(2, 64, torch.float32)
    shards = Shards(kernels, logits, torch.tensor([3, label]), 2)
    loss, lse = shards.loss()
    assert loss.isnan().tolist() == [False, True]
    assert shards.gradient(lse, torch.ones(2)).isnan().all(1).tolist() == [False, True]
