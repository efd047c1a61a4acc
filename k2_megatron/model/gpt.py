"""megatron-core's GPTModel with K2's rotary tables and our vocabulary-parallel cross-entropy."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.rotary import rotary_tables


class RotaryTables(torch.nn.Module):
    """In GPTModel's `rotary_pos_emb` slot: cos and sin of fp32 angles, computed once for each length.

    Returns [2, S, D/2] fp32. megatron-core only hands the tensor on to the attention layers (through recompute as
    well, which takes tensors alone, hence one tensor and not two).
    """

    def __init__(self, head_dim: int, base: float, sequence_length: int) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.sequence_length = sequence_length
        self._tables_2SR: torch.Tensor | None = None

    def get_rotary_seq_len(self, *_unused) -> int:
        return self.sequence_length

    def forward(self, sequence_length: int, **_unused) -> torch.Tensor:
        if self._tables_2SR is None or self._tables_2SR.shape[1] != sequence_length:
            tables = rotary_tables(sequence_length, self.head_dim, self.base, torch.cuda.current_device())
            self._tables_2SR = torch.stack(tables)
        return self._tables_2SR


class K2Model(GPTModel):
    """One pipeline stage (or interleaved chunk) of K2."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, position_embedding_type="rope", **kwargs)
        self.rotary_pos_emb = RotaryTables(self.config.kv_channels, self.rotary_base, self.max_sequence_length)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [B, S] int64, logits [S, B, V / tensor] -> loss [B, S] fp32; backward overwrites the logits."""
        loss_SB = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            group=self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None,
            backend=self.config.kernels["cross_entropy"],
        )
        return loss_SB.transpose(0, 1)
