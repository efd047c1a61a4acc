"""Which row stands at which position: a plan's chunks (plan.py), or, for a prefix, each epoch shuffled anew.

In: positions, counted from 0 over the whole run. Out: row records (rows.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from k2_megatron.data.permutation import Permutation, hash64
from k2_megatron.data.rows import pack


class Order(Protocol):
    """Row records by position: a plan's, or a prefix's."""

    @property
    def rows_per_chunk(self) -> int | None: ...

    def records(self, positions: np.ndarray) -> np.ndarray: ...

    def prefetch(self, position: int) -> None: ...


class EpochOrder:
    """The rows of one source, each epoch in a new order."""

    rows_per_chunk = None

    def __init__(self, epoch_rows: int, seed: int):
        self.epoch_rows, self.seed = epoch_rows, seed

    def records(self, positions: np.ndarray) -> np.ndarray:
        out = np.empty(len(positions), dtype=np.uint64)
        epochs = positions // self.epoch_rows
        for epoch in np.unique(epochs).tolist():
            order = Permutation(self.epoch_rows, hash64(self.seed, "epoch", epoch))
            out[epochs == epoch] = pack(0, order(positions[epochs == epoch] % self.epoch_rows))
        return out

    def prefetch(self, position: int) -> None:
        """Nothing to read ahead."""
