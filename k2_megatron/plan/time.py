"""How long training takes on a given device at a given utilization: arithmetic, not a prediction of the utilization."""

from k2_megatron.config import Config
from k2_megatron.config.flops import flops_of_tokens
from k2_megatron.runtime.devices import Device, peak_bf16_flops

PLANNED_DEVICES = ("A100", "H100")
PLANNED_UTILIZATIONS = (0.3, 0.4, 0.5)


def training_seconds(config: Config, device_name: str, utilization: float) -> float:
    """Seconds for all tokens of the run on `config.world_size` devices at this model FLOPs utilization.

    Attention is counted full, the convention of `k2_megatron.config.flops`. ValueError for an unknown device.
    """
    peak = peak_bf16_flops(Device("cuda", 0, "nccl", device_name))
    if peak is None:
        raise ValueError(f"device {device_name!r}: its peak is not known; add it to k2_megatron/runtime/devices.py")
    flops = flops_of_tokens(config.model, config.tokens_by_length_at(config.train.steps), "full")
    return flops / (config.world_size * peak * utilization)
