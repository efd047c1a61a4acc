"""K2's model: megatron-core's GPTModel with a layer specification of ours. No file here names a rank."""

from k2_megatron.model.build import build_model

__all__ = ["build_model"]
