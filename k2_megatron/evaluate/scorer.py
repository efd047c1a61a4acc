"""What a model says of windows: the loss of every token that counts, and where asked the token it would have taken.

In: a rank's part of the model in any layout; windows of any lengths, the same on every rank. Out: their `Scored`, in
order, equal on every rank. Windows are sorted by length, so that a batch is padded little, and shared out over the
data-parallel ranks; what stands behind a window's end changes nothing, since attention is causal.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from math import lcm
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as distributed

from k2_megatron.config import Config
from k2_megatron.evaluate.windows import Window
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.model.context_parallel import context_positions
from k2_megatron.model.gpt import RotaryTables
from k2_megatron.train.model_chunks import unwrapped
from k2_megatron.train.parts import ModelParts
from k2_megatron.train.step import through_pipeline

T = TypeVar("T")

LENGTH_STEP = 32  # lengths are rounded up to multiples: few shapes, and rows that begin where vector loads like it
CALLS_A_BLOCK = 64  # that are sorted together: enough to be padded little, little enough to hold
MICRO_BATCHES_A_STAGE = 4  # in one call of a pipeline, whose bubble then takes (P - 1) / (5 P - 1) of the time


class Scored(NamedTuple):
    """Of the predictions of a window that count: `losses` float64 in nats; `greedy` int64, the likeliest tokens, empty
    when they were not asked for."""

    losses: np.ndarray
    greedy: np.ndarray


class Scorer:
    """One model in evaluation. `tokens` counts the predictions made so far, `seconds` the time they took; `tell` is
    called after every batch."""

    def __init__(self, config: Config, parts: ModelParts) -> None:
        self.config, self.parts = config, parts
        self.longest = config.model.sequence_length
        parallel, groups = config.parallel, parts.groups
        interleaved = parallel.virtual_pipeline > 1
        # Rows that every rank's pipeline takes; an interleaved one takes its micro-batches by stages.
        self._unit = config.train.micro_batch * groups.data_size * (parallel.pipeline if interleaved else 1)
        several = MICRO_BATCHES_A_STAGE * parallel.pipeline if parallel.pipeline > 1 else 1
        self._rows_a_call = max(self._unit, config.train.micro_batch * groups.data_size * several)
        self._length_step = lcm(
            LENGTH_STEP,
            parallel.tensor if parallel.sequence else 1,
            2 * parallel.context if parallel.context > 1 else 1,
        )
        self.tokens, self.seconds = 0, 0.0
        self.tell: Callable[[], None] = lambda: None

    def score(self, windows: Iterable[Window], *, greedy: bool = False) -> Iterator[Scored]:
        """What the model says of each window, in their order."""
        waiting = iter(windows)
        while block := list(islice(waiting, self._rows_a_call * CALLS_A_BLOCK)):
            yield from self._score_block(block, greedy)

    def timed(self, action: Callable[[], T], tokens: int) -> T:
        """What `action`, which makes so many predictions, returns."""
        began = time.monotonic()
        found = action()
        self.seconds += time.monotonic() - began
        self.tokens += tokens
        self.tell()
        return found

    def _score_block(self, block: Sequence[Window], greedy: bool) -> list[Scored]:
        order = sorted(range(len(block)), key=lambda number: -block[number].length)
        found: dict[int, Scored] = {}
        for start in range(0, len(order), self._rows_a_call):
            numbers = order[start : start + self._rows_a_call]
            rows = [block[number].tokens for number in numbers]
            counted = sum(block[number].counted for number in numbers)
            losses, likeliest = self.timed(partial(self._run, rows, greedy), counted)
            for row, number in enumerate(numbers):
                of_row = slice(block[number].first, block[number].length)
                found[number] = Scored(losses[row, of_row], likeliest[row, of_row] if greedy else likeliest[0])
        return [found[number] for number in range(len(block))]

    def _run(self, rows: Sequence[np.ndarray], greedy: bool) -> tuple[np.ndarray, np.ndarray]:
        """(losses float64 [rows, S], likeliest tokens int64 [rows, S], or [1, 0]) of rows of at most S + 1 tokens."""
        longest = max(map(len, rows)) - 1
        assert longest <= self.longest, f"a window of {longest} tokens; the model reads {self.longest}"
        length = min(-(-longest // self._length_step) * self._length_step, self.longest)
        tokens = np.zeros((-(-len(rows) // self._unit) * self._unit, length + 1), dtype=np.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        told = self._forward(torch.from_numpy(tokens).to(self.parts.device), greedy)
        losses, likeliest = told[0].cpu().numpy(), told[1:].long().cpu().numpy()
        return losses, likeliest[0] if greedy else np.zeros((1, 0), dtype=np.int64)

    def _forward(self, tokens: torch.Tensor, greedy: bool) -> torch.Tensor:
        """tokens [N, S + 1] -> float64 [1 or 2, N, S] on every rank: losses, and likeliest tokens, exact in float64."""
        groups, size, length = self.parts.groups, self.config.train.micro_batch, tokens.shape[1] - 1
        held = context_positions(length, groups.context_rank, groups.context_size).to(tokens.device)
        numbers = range(groups.data_rank, len(tokens) // size, groups.data_size)

        def micro_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for number in numbers:
                rows = tokens[number * size : (number + 1) * size]
                yield rows[:, held], rows[:, held + 1]

        with torch.no_grad(), _rows_of(self.parts.chunks, length):
            told = through_pipeline(
                self.config,
                self.parts,
                partial(_greedy_step if greedy else _loss_step, groups.collection.tp),
                [micro_batches() for _ in self.parts.chunks],
                micro_batches=len(numbers),
                micro_batch=size,
                sequence_length=length,
                forward_only=True,
            )
        everything = torch.zeros(2 if greedy else 1, len(tokens), length, dtype=torch.float64, device=tokens.device)
        if groups.is_last_stage and groups.tensor_rank == 0:  # of those that hold the same, one speaks
            for number, of_micro_batch in zip(numbers, told, strict=True):
                for plane, values_BS in enumerate(of_micro_batch["planes"]):
                    everything[plane, number * size : (number + 1) * size][:, held] = values_BS.double()
        distributed.all_reduce(everything)
        return everything


@contextmanager
def _rows_of(chunks: Sequence, length: int) -> Iterator[None]:
    """Rotary tables as long as the rows are, for the while; Transformer Engine's are made for what they are given."""
    tables = [getattr(unwrapped(chunk), "rotary_pos_emb", None) for chunk in chunks]
    ours = [(table, table.sequence_length) for table in tables if isinstance(table, RotaryTables)]
    for table, _ in ours:
        table.sequence_length = length
    try:
        yield
    finally:
        for table, before in ours:
            table.sequence_length = before


def _loss_step(_tensor_group, iterator, model):
    tokens, labels = next(iterator)
    return model(tokens, None, None, labels=labels), lambda loss_BS: (loss_BS.new_zeros(()), {"planes": [loss_BS]})


def _greedy_step(tensor_group, iterator, model):
    """Without labels the last stage gives logits, this tensor rank's columns of them."""
    tokens, labels = next(iterator)
    output = model(tokens, None, None)

    def tell(logits_BSV):
        several = tensor_group.size() > 1
        loss_BS = vocab_parallel_cross_entropy(
            logits_BSV,
            labels.contiguous(),
            group=tensor_group if several else None,
            backend=unwrapped(model).config.kernels["cross_entropy"],
        )
        planes = [loss_BS, _likeliest(logits_BSV, tensor_group)]
        return loss_BS.new_zeros(()), {"planes": planes}

    return output, tell


def _likeliest(logits_BSV: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """The ids [B, S] of the largest logits over all ranks of `group`."""
    largest, ids = logits_BSV.float().max(dim=-1)
    if group.size() == 1:
        return ids
    mine = torch.stack([largest.double(), (ids + group.rank() * logits_BSV.shape[-1]).double()])
    everyone = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
    distributed.all_gather_into_tensor(everyone, mine, group=group)
    largest_of, ids_of = everyone.view(group.size(), *mine.shape).unbind(1)
    best = largest_of.argmax(dim=0, keepdim=True)
    return ids_of.gather(0, best)[0]
