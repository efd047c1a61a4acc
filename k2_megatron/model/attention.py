"""Self-attention: megatron-core's projections, our rotary op on their output, torch's scaled_dot_product_attention."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from k2_megatron.kernels.rotary_packed import rotary_packed
from k2_megatron.model.context_parallel import causal_attention_of_two_pieces
from k2_megatron.model.transformer_config import K2TransformerConfig


class K2SelfAttention(SelfAttention):
    """SelfAttention whose rotation is one call of ours on q and k where the QKV projection left them.

    megatron-core passes the rotary tensor to `forward` and rotates copies; here `forward` keeps it and the rotation
    happens in `get_query_key_value_tensors`, which under recompute runs again with the rest.
    """

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs):
        self._rotary_tables = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._rotary_tables = None

    def get_query_key_value_tensors(self, hidden_states, *_unused, **_also_unused):
        """q_SBND, k_SBKD (rotated) and v_SBKD of this tensor rank's heads."""
        packed_SBGD, _sizes = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        cos_SR, sin_SR = self._rotary_tables.unbind(0)
        return rotary_packed(
            packed_SBGD, cos_SR, sin_SR, self.hidden_size_per_attention_head, backend=self.config.kernels["rotary"]
        )


class K2CoreAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention: flash kernels on GPU and CPU, no S x S scores.

    Grouped-query attention passes the k and v heads unrepeated. Dao et al. 2022 (FlashAttention) for the algorithm.
    """

    def __init__(
        self,
        config: K2TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"K2 attends causally; asked for {attn_mask_type}"
        assert attention_type == "self", f"K2 has self-attention alone; asked for {attention_type}"
        self.softmax_scale = softmax_scale
        group = pg_collection.cp if pg_collection is not None else None
        self._context_group = group if group is not None and group.size() > 1 else None

    def forward(self, query_SBND, key_SBKD, value_SBKD, attention_mask=None, /, **_unused) -> torch.Tensor:
        """q_SBND, k and v of K <= N heads -> context [S, B, N * D]; S is S / C under context parallelism."""
        sequence, batch, heads, head_dim = query_SBND.shape
        if self._context_group is not None:
            context_BNSD = causal_attention_of_two_pieces(
                query_SBND, key_SBKD, value_SBKD, self.softmax_scale, self._context_group
            )
            return context_BNSD.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3),
            key_SBKD.permute(1, 2, 0, 3),
            value_SBKD.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key_SBKD.shape[2] != heads,
        )
        return context_BNSD.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)
