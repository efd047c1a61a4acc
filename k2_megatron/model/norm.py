"""RMSNorm as megatron-core builds norms: `cls(config=, hidden_size=, eps=)`, weight marked for sequence parallelism."""

import torch

from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.model.transformer_config import K2TransformerConfig


class K2RMSNorm(torch.nn.Module):
    """y_SBH = x_SBH / sqrt(mean(x^2) + epsilon) * weight_H (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, config: K2TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> None:
        super().__init__()
        self.epsilon = eps
        self.backend = config.kernels["rms_norm"]
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Under sequence parallelism each tensor rank sees its own rows: finalize_model_grads sums the gradients of
        # weights so marked over the tensor group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_SBH, self.weight, self.epsilon, zero_centered=self.zero_centered, backend=self.backend)

    def add_and_normalize(self, x_SBH: torch.Tensor, residual_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual) in one pass over memory."""
        return add_rms_norm(
            x_SBH, residual_SBH, self.weight, self.epsilon, zero_centered=self.zero_centered, backend=self.backend
        )
