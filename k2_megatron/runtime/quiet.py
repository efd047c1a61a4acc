"""Warnings of dependencies that the user can do nothing about, silenced in this one place, each by its text."""

import logging
import os
import warnings

_USELESS = (
    # megatron-core announces at import which optional packages it goes on without; the run's own "start" line says
    # which kernels were chosen and why.
    (UserWarning, r".*(Apex|Transformer Engine|transformer_engine|TransformerEngine|flash_attn).*not.*"),
    (UserWarning, r".*[Ff]alling back to (Torch|torch|local).*"),
    (UserWarning, r".*Failed to import.*"),
    (UserWarning, r".*no backend.*will be used.*"),
    # torch.distributed.checkpoint's functional entry points are what megatron-core 0.16 calls.
    (FutureWarning, r".*(load_state_dict|save_state_dict|torch\.distributed.*|ShardedTensor).*deprecated.*"),
    (FutureWarning, r".*Please use.*(DTensor|ShardedTensor|all_gather_into_tensor).*"),
    (UserWarning, r".*TypedStorage is deprecated.*"),
    (UserWarning, r".*barrier\(\): using the device under current context.*"),
    # megatron-core's distributed optimizer asks its float32 shards, views of a parameter, for gradients that it sets.
    (UserWarning, r".*\.grad attribute of a Tensor that is not a leaf Tensor.*"),
    (UserWarning, r".*MLP requires ffn_hidden_size.*"),
    (UserWarning, r".*full scope is deprecated.*"),  # raised for megatron-core's own default
    (DeprecationWarning, r".*"),
)


def silence_dependencies() -> None:
    """Install the filters; call before megatron-core is imported. Warnings of our own are never matched."""
    for category, text in _USELESS:
        warnings.filterwarnings("ignore", message=text, category=category)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    # gloo prints a line per group and rank on stderr through glog's INFO level
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
