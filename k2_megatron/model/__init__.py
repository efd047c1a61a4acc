"""K2's model: megatron-core's GPTModel with a layer specification of ours. No file here asks a global
for a rank; ranks come from the group passed in."""

from k2_megatron.model.build import build_model

__all__ = ["build_model"]
