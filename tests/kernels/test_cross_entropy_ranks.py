"""Vocab-parallel cross-entropy over 1, 2 and 4 gloo ranks equals one process, with one collective.

The four processes start once and go through all cases; each leaves its results in a file for the parent to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from kernel_backends import on_cpu

from k2_megatron.kernels import cross_entropy
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy

RANKS = 4
SEQUENCE, BATCH, VOCABULARY, HIDDEN = 5, 2, 44, 12


@dataclass(frozen=True)
class RankCase:
    op: str
    ranks: int
    backend: str
    dtype: torch.dtype = torch.float32
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __str__(self):
        return f"{self.op}-{self.ranks}-{self.backend}-{str(self.dtype)[6:]}-{self.label_smoothing}-{self.z_loss}"

    def inputs(self):
        """Whole logits (or hidden and weight) and labels, the same in every process."""
        generator = torch.Generator().manual_seed(11)
        labels = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=generator)
        labels[1, 0] = -100
        if self.op == "logits":
            logits = torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator) * 3
            return (logits.to(self.dtype),), labels
        hidden = torch.randn(SEQUENCE * BATCH, HIDDEN, generator=generator).to(self.dtype)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(self.dtype)
        return (hidden, weight), labels.flatten()

    def run(self, group=None, rank=0, ranks=1):
        """loss, and the gradient of each input of this rank's shard."""
        tensors, labels = self.inputs()
        shard = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
        options = {
            "group": group,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "backend": self.backend,
        }
        if self.op == "logits":
            leaves = (tensors[0][..., shard].clone().requires_grad_(),)
            loss = vocab_parallel_cross_entropy(leaves[0] * 1, labels, **options)
        else:
            leaves = (tensors[0].clone().requires_grad_(), tensors[1][shard].clone().requires_grad_())
            loss = linear_cross_entropy(*leaves, labels, chunk_tokens=4, **options)
        (loss * torch.arange(1.0, 1 + loss.numel()).view(loss.shape)).sum().backward()
        return loss.detach(), [leaf.grad for leaf in leaves]


OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)]
CASES = [
    *(RankCase("logits", ranks, backend, torch.float32, *options) for ranks in (1, 2, 4) for backend in ("cpu", "torch")
      for options in OPTIONS),
    *(RankCase("logits", ranks, "cpu", torch.bfloat16, 0.1, 1e-2) for ranks in (2, 4)),
    *(RankCase("linear", ranks, backend, torch.float32, *options) for ranks in (2, 4) for backend in ("cpu", "torch")
      for options in OPTIONS),
]  # fmt: skip


def refusals_of_unequal_shards(group, rank):
    """{path: the message} where rank 0's shard has 20 of the 44 columns and rank 1's the other 24."""
    first, last = ((0, 20), (20, 44))[rank]
    found = {}
    for op, backend in (("logits", "cpu"), ("logits", "torch"), ("linear", "cpu"), ("linear", "torch")):
        tensors, labels = RankCase(op, 2, backend).inputs()

        def loss(op=op, tensors=tensors, labels=labels, backend=backend):
            if op == "logits":
                return vocab_parallel_cross_entropy(tensors[0][..., first:last], labels, group=group, backend=backend)
            return linear_cross_entropy(tensors[0], tensors[1][first:last], labels, group=group, backend=backend)

        try:
            loss()
        except ValueError as error:
            found[f"{op} {backend}"] = str(error)
    # In a compiled graph the op itself looks.
    statistics = torch.zeros(2, 3 * 4 + 1)
    statistics[:, -1] = torch.tensor([20.0, 24.0])
    try:
        torch.ops.k2_megatron.cross_entropy_loss(statistics, torch.zeros(4, dtype=torch.int64), 44, 0.0, 0.0, -100)
    except ValueError as error:
        found["op"] = str(error)
    return found


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS,
                            timeout=timedelta(seconds=60))  # fmt: skip
    groups = {ranks: dist.new_subgroups(ranks)[0] for ranks in (1, 2, 4)}
    results = {}
    for case in CASES:
        group = groups[case.ranks]
        with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers:
            loss, gradients = case.run(group, dist.get_rank(group), case.ranks)
        results[str(case)] = (loss, gradients, gathers.call_count, group._get_sequence_number_for_group())
    results["unequal"] = refusals_of_unequal_shards(groups[2], dist.get_rank(groups[2]))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Each rank's results by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_equal_one_process(case, ranked):
    loss, gradients = case.run()
    results = [rank[str(case)] for rank in ranked[: case.ranks]]
    for found, _, gathers, _ in results:
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(found, results[0][0]), "ranks disagree about the loss"
        assert gathers == (case.ranks > 1)
    # Sums of products of the projection cancel; the loss's own gradient does not.
    float32 = 1e-5 if case.op == "linear" else 1e-6
    tolerance = {"rtol": 2**-7, "atol": 0} if case.dtype == torch.bfloat16 else {"rtol": float32, "atol": float32}
    sharded = torch.cat([found[-1] for _, found, _, _ in results], dim=-1 if case.op == "logits" else 0)
    torch.testing.assert_close(sharded, gradients[-1], **tolerance)
    if case.op == "linear":
        for _, found, _, _ in results:
            torch.testing.assert_close(found[0], gradients[0], **tolerance)


@on_cpu
def test_unequal_shards_are_refused_on_every_rank_by_name_and_width(ranked):
    for results in ranked:
        assert len(results["unequal"]) == 5, results["unequal"]
        for path, message in results["unequal"].items():
            assert message.startswith("cross_entropy: the ranks' shards have unequal numbers of columns: "), path
            assert "rank 0 has 20, rank 1 has 24" in message, path


@on_cpu
def test_on_a_gpu_widths_are_looked_at_once_a_width(monkeypatch):
    """Looking waits for the device, here a stand-in: tensors that say they are on one."""
    looks = []
    monkeypatch.setattr(cross_entropy, "require_equal_widths", lambda _everyone: looks.append(True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    everyone, group = SimpleNamespace(is_cuda=True), mock.Mock(spec=dist.ProcessGroup)
    for capturing, columns, expected in ((True, 8, 0), (False, 8, 1), (False, 8, 1), (False, 9, 2), (False, 8, 2)):
        cross_entropy._check_widths_once(everyone, group, columns)
        assert len(looks) == expected, (capturing, columns)


@on_cpu
def test_one_collective_a_loss(ranked):
    """gloo numbers a group's collectives: the losses of the logits need one each, forward and backward together."""
    for ranks in (2, 4):
        numbers = [ranked[0][str(case)][3] for case in CASES if case.op == "logits" and case.ranks == ranks]
        assert [after - before for before, after in pairwise(numbers)] == [1] * (len(numbers) - 1)
