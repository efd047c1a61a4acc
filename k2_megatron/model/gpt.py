"""megatron-core's GPTModel with K2's rotary tables and our vocabulary-parallel cross-entropy."""

import torch
import torch.distributed as distributed
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region

from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rotary import rotary_tables
from k2_megatron.model.context_parallel import context_positions


class RotaryTables(torch.nn.Module):
    """In GPTModel's `rotary_pos_emb` slot: cos and sin of fp32 angles at the positions of this context rank, computed
    once for each length.

    Returns [2, S / C, D/2] fp32. megatron-core only hands the tensor on to the attention layers (through recompute as
    well, which takes tensors alone, hence one tensor and not two).
    """

    def __init__(
        self, head_dim: int, base: float, sequence_length: int, context_group: distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.sequence_length = sequence_length
        self._context_group = context_group
        self._of_length: tuple[int, torch.Tensor] | None = None

    def get_rotary_seq_len(self, *_unused) -> int:
        return self.sequence_length

    def forward(self, sequence_length: int, **_unused) -> torch.Tensor:
        if self._of_length is None or self._of_length[0] != sequence_length:
            tables_2SR = torch.stack(
                rotary_tables(sequence_length, self.head_dim, self.base, torch.cuda.current_device())
            )
            if self._context_group.size() > 1:
                group = self._context_group
                held = context_positions(sequence_length, group.rank(), group.size()).to(tables_2SR.device)
                tables_2SR = tables_2SR[:, held]
            self._of_length = sequence_length, tables_2SR
        return self._of_length[1]


class OutputLayer(ColumnParallelLinear):
    """The output projection; while `defers` is set it hands on the hidden states, for a loss that makes the logits
    itself, some tokens at a time."""

    defers = False

    def forward(self, hidden_SBH, *args, **kwargs):
        return (hidden_SBH, None) if self.defers else super().forward(hidden_SBH, *args, **kwargs)


class GPTModelWithK2Loss(GPTModel):
    """GPTModel with our vocabulary-parallel cross-entropy, whole or in chunks of `config.loss_chunk_tokens`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, position_embedding_type="rope", **kwargs)
        if self.post_process:
            # GPTModel builds the layer by name; only its forward changes.
            self.output_layer.__class__ = OutputLayer

    def forward(self, *args, labels: torch.Tensor | None = None, **kwargs):
        if self.post_process:
            self.output_layer.defers = labels is not None and self.config.loss_chunk_tokens is not None
        return super().forward(*args, labels=labels, **kwargs)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [B, S] int64, logits [S, B, V / tensor] (hidden states when the output layer deferred) -> loss [B, S]
        fp32; backward overwrites the logits."""
        labels_SB = labels.transpose(0, 1).contiguous()
        if self.output_layer.defers:
            return self._chunked_loss(labels_SB, logits).transpose(0, 1)
        loss_SB = vocab_parallel_cross_entropy(
            logits, labels_SB, group=self._tensor_group, backend=self.config.kernels["cross_entropy"]
        )
        return loss_SB.transpose(0, 1)

    def _chunked_loss(self, labels_SB: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Loss [S, B] from hidden states [S, B, H], or [S / tensor, B, H] under sequence parallelism."""
        sequence_parallel = self.config.sequence_parallel
        if sequence_parallel:  # gathered forwards, summed and scattered backwards, as the projection itself does
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        loss_T = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.output_layer.weight,
            labels_SB.reshape(-1),
            group=self._tensor_group,
            chunk_tokens=self.config.loss_chunk_tokens,
            reduce_hidden_gradient=not sequence_parallel,
            backend=self.config.kernels["cross_entropy"],
        )
        return loss_T.view(labels_SB.shape)

    @property
    def _tensor_group(self):
        return self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None


class K2Model(GPTModelWithK2Loss):
    """One pipeline stage (or interleaved chunk) of K2."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = RotaryTables(
            self.config.kv_channels, self.rotary_base, self.max_sequence_length, self.pg_collection.cp
        )
