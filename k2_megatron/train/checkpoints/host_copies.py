"""Host memory for the copies that are written while training goes on, kept from one save to the next.

The system clears every page of fresh memory, which takes longer than the copy: pages are taken ahead of the first save.
"""

from collections.abc import Sequence
from mmap import PAGESIZE

import torch


class HostCopies:
    """The last copies made, in one piece of memory that the next ones overwrite."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Take `size` bytes from the system now."""
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._memory[::PAGESIZE] = 0

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A copy of each, contiguous; good until this is called again."""
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self._memory.numel():
            self._memory = self._memory.new_empty(0)  # given back before more is asked for
            self._memory = self._memory.new_empty(size)
        copies: dict[int, torch.Tensor] = {}
        start = 0
        # The largest elements first, so that each lies at a multiple of its size
        for number in sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size()):
            tensor = tensors[number]
            part = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[number] = part.copy_(tensor)
            start += tensor.nbytes
        return [copies[number] for number in range(len(tensors))]
