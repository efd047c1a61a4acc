"""megatron-core's optimizer around an AdamW of ours.

megatron-core takes Apex's or Transformer Engine's FusedAdam and, without both, torch's AdamW, whose `step` lives in
the per-parameter state; its reshardable checkpoint format reads `step` from the parameter group and fails with
KeyError. Our AdamW keeps it there. The slot is a module global, so filling it is a patch: this file is where it is
done, for megatron-core 0.16.x, and it needs doing in both modules because each binds the name for itself.
"""

import functools
from collections.abc import Mapping, Sequence

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from k2_megatron.config import Config
from k2_megatron.kernels.adamw import AdamW
from k2_megatron.model.transformer_config import DTYPES


def wrap_model(
    config: Config, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Put each chunk in Float16Module (bfloat16 alone) and DistributedDataParallel with fp32 gradient buffers."""
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=False,
        average_in_collective=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        settings = chunk.config
        if config.train.precision == "bfloat16":
            chunk = Float16Module(settings, chunk)
        # Later chunks of an interleaved stage get one bucket: their gradients are ready when the stage is done.
        wrapped.append(
            DistributedDataParallel(settings, buffers, chunk, disable_bucketing=index > 0, pg_collection=groups)
        )
    return wrapped


def build_optimizer(
    config: Config,
    chunks: Sequence[DistributedDataParallel],
    kernels: Mapping[str, str],
    groups: ProcessGroupCollection,
) -> MegatronOptimizer:
    """AdamW over fp32 main parameters (copies of bf16 ones, or the fp32 ones themselves), decay on matrices alone."""
    optimizer = config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate or 0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad_norm or 0.0,
        bf16=config.train.precision == "bfloat16",
        params_dtype=DTYPES[config.train.precision],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    _fill_adam_slot(kernels["adamw"])
    return get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False, pg_collection=groups)


def _fill_adam_slot(backend: str) -> None:
    core_optimizer.Adam = functools.partial(AdamW, backend=backend)
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.Adam = AdamW  # asked by isinstance, never called
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True
    distributed_optimizer.USING_TE_OPTIMIZER = False


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Write this step's rates into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
