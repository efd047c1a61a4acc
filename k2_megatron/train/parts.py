"""What one rank trains with, or evaluates with, in one value: what steps, saves and loads are given."""

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


@dataclass(frozen=True)
class ModelParts:
    """What one rank evaluates with: the same without an optimizer, and `chunks` wrapped for their precision alone."""

    groups: Groups
    chunks: Sequence
    device: torch.device


AnyParts = Parts | ModelParts
