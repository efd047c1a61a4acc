"""The learning rate as a pure function of the step, so that no resume and no layout can change it.

`step` counts finished updates: `learning_rate_at(config, 0)` is the rate of the first update. Warm-up is linear from
peak / warmup_steps at the first step to the peak. cosine: Loshchilov & Hutter 2017 (SGDR), one cycle to
min_learning_rate at the last step. wsd (warm-up, stable, decay): Hu et al. 2024 (MiniCPM), linear decay over the last
`decay_steps`. constant: the peak after warm-up.
"""

import math

from k2_megatron.config import Config


def learning_rate_at(config: Config, step: int) -> float:
    """Learning rate of the update that follows `step` finished ones."""
    optimizer = config.optimizer
    peak, floor = optimizer.learning_rate, optimizer.min_learning_rate
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    assert floor is not None, f"schedule {optimizer.schedule} was accepted without min_learning_rate"
    if optimizer.schedule == "cosine":
        span = max(1, config.train.steps - 1 - optimizer.warmup_steps)
        fraction = min(1.0, (step - optimizer.warmup_steps) / span)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    assert optimizer.schedule == "wsd" and optimizer.decay_steps, f"unknown schedule {optimizer.schedule}"
    remaining = config.train.steps - step  # 1 at the last step
    fraction = min(1.0, max(0.0, remaining - 1) / optimizer.decay_steps)
    return floor + (peak - floor) * fraction
