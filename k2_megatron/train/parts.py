"""What one rank trains with, in one value: what steps, saves and loads are given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer

from k2_megatron.runtime.groups import Groups


@dataclass(frozen=True)
class Parts:
    """`groups`: whom the rank works with; `chunks`: its part of the model, wrapped for training, one chunk or several
    (virtual stages); `optimizer` of these; `device`: where they are."""

    groups: Groups
    chunks: Sequence
    optimizer: MegatronOptimizer
    device: torch.device
