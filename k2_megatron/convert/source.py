"""What every kind of checkpoint offers a conversion: rows of our tensors as bits, whatever form they are stored in."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from k2_megatron.convert.names import Place, Shape

Kind = Literal["weights", "main", "exp_avg", "exp_avg_sq"]
OPTIMIZER_KINDS: tuple[Kind, ...] = ("main", "exp_avg", "exp_avg_sq")
KEY_PREFIX: dict[Kind, str] = {
    "weights": "",
    "main": "optimizer.state.param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}


class Source(Protocol):
    """A readable checkpoint. `dtypes` names the kinds it holds: the weights, and Adam's fp32 parameters and moments."""

    folder: Path
    shape: Shape
    dtypes: dict[Kind, str]

    def read(self, kind: Kind, place: Place, first_row: int, last_row: int) -> np.ndarray:
        """Rows first_row ... last_row - 1 of our tensor at `place`: bits [rows, columns], C-contiguous."""
        ...

    def read_bytes_total(self, kinds: tuple[Kind, ...]) -> int:
        """Bytes that reading `kinds` once takes, for estimates and progress."""
        ...
