"""Tensors whose surroundings must not change: how the tests hand memory to a kernel that checks nothing."""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # k2::DType
CANARY = 0x5A


class Guarded:
    """A tensor in the middle of a larger allocation whose other bytes must not change.

    `offset` shifts it away from 16-byte alignment, by elements.
    """

    def __init__(self, value: torch.Tensor, offset: int = 0) -> None:
        size = value.element_size()
        self.bytes = torch.full((128 + (offset + value.numel()) * size,), CANARY, dtype=torch.uint8)
        start = 16 + (-self.bytes.data_ptr()) % 16 + offset * size
        self.used = slice(start, start + value.numel() * size)
        self.tensor = self.bytes[self.used].view(value.dtype).view(value.shape)
        self.tensor.copy_(value)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, name: str) -> None:
        """Fails if anything around the tensor was written."""
        outside = torch.cat([self.bytes[: self.used.start], self.bytes[self.used.stop :]])
        assert bool((outside == CANARY).all()), f"{name}: bytes outside of the tensor were written"


def empty(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Guarded:
    """An output, filled with NaN: what a kernel forgets to write does not compare equal to anything."""
    return Guarded(torch.full(shape, float("nan"), dtype=dtype), offset)


def check_all(held: dict[str, Guarded]) -> None:
    for name, guarded in held.items():
        guarded.check(name)
