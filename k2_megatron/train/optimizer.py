"""megatron-core's optimizer around an AdamW of ours.

megatron-core takes Apex's or Transformer Engine's FusedAdam and, without both, torch's AdamW, whose `step` lives in
the per-parameter state; its reshardable checkpoint format reads `step` from the parameter group and fails with
KeyError. Our AdamW keeps it there. The slot is a module global, so filling it is a patch: this file is where it is
done, for megatron-core 0.16.x, and it needs doing in both modules because each binds the name for itself.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
import torch
import torch.distributed as distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from k2_megatron.config import Config
from k2_megatron.kernels.adamw import AdamW
from k2_megatron.kernels.gradient_norm import clip_factor, gradient_norm_squared
from k2_megatron.model.transformer_config import DTYPES
from k2_megatron.train.gradient_tree import TreeSummedGradients
from k2_megatron.train.model_chunks import unwrapped
from k2_megatron.train.order_free import largest_square, order_free_sums, squares_of


def wrap_model(
    config: Config, chunks: Sequence[torch.nn.Module], collection: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Put each chunk in Float16Module (bfloat16 alone) and DistributedDataParallel with fp32 gradient buffers, whose
    gradients are added up as a tree where the configuration asks for it."""
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=False,
        average_in_collective=False,
    )
    wrapper, leaves = DistributedDataParallel, config.train.gradient_leaves
    if leaves is not None:
        wrapper = functools.partial(TreeSummedGradients, leaves=leaves, context_size=config.parallel.context)
    wrapped = []
    for index, chunk in enumerate(chunks):
        settings = chunk.config
        if config.train.precision == "bfloat16":
            chunk = Float16Module(settings, chunk)
        # Later chunks of an interleaved stage get one bucket: their gradients are ready when the stage is done.
        wrapped.append(wrapper(settings, buffers, chunk, disable_bucketing=index > 0, pg_collection=collection))
    return wrapped


def build_optimizer(
    config: Config,
    chunks: Sequence[DistributedDataParallel],
    kernels: Mapping[str, str],
    collection: ProcessGroupCollection,
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
    built = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False, pg_collection=collection)
    for part in built.chained_optimizers:
        if isinstance(part, Float16OptimizerWithFloat16Params) and not part.is_stub_optimizer:
            _write_copies_with_the_update(part)
    _mark_places(built, chunks, config.model.layers)
    return built


def _write_copies_with_the_update(part: Float16OptimizerWithFloat16Params) -> None:
    """Have AdamW write the bfloat16 parameters in the pass that updates the main ones, in place of a pass of its own.

    megatron-core has no hook for leaving out its own copy, so that method of this one object is replaced. The
    distributed optimizer copies into a buffer that is then gathered, and keeps its own way.
    """
    for weights, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        part.optimizer.model_copies.update(zip(mains, weights, strict=True))
    part._copy_main_params_to_model_params = lambda: None


def _fill_adam_slot(backend: str) -> None:
    core_optimizer.Adam = functools.partial(AdamW, backend=backend)
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.Adam = AdamW  # asked by isinstance, never called
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True
    distributed_optimizer.USING_TE_OPTIMIZER = False


def gradient_squares(
    optimizer: MegatronOptimizer, layers: int, device: torch.device, order_free: bool = False
) -> torch.Tensor:
    """[layers + 2] fp64: sums of squares of the gradient of each layer, of the embedding, and of the output projection
    with the final norm; the same on every rank. Their sum is the square of the global norm. What is not finite is inf.

    One kernel for all tensors of a layer, of AdamW's backend (Apex has none that adds up in a fixed order: torch's
    then). Replicas count once: megatron-core says which gradients take part, and over which ranks they are summed; of
    the others, which tensor ranks hold alike, it is seen that they are finite. Without the distributed optimizer each
    replica has sums of its own: equal, unless a machine erred, and then the largest holds for all, so that every rank
    decides the same of the step. With `order_free` the sums are the same to the bit however the optimizer is sharded.
    """
    optimizer.prepare_grads()
    summed_over = optimizer.get_grad_stats_parallel_group()
    if order_free:
        squares = _order_free_squares(optimizer, layers, device, summed_over)
    else:
        squares = torch.zeros(layers + 2, dtype=torch.float64, device=device)
        for place, factor, tensors, backend in _gradients(optimizer):  # 0 times what is not finite is NaN
            squares[place] += factor * gradient_norm_squared(tensors, backend=backend)
        distributed.all_reduce(squares, group=summed_over)
        squares.nan_to_num_(nan=math.inf, posinf=math.inf)  # gloo's and NCCL's maximum pass a NaN over
    if summed_over.size() < distributed.get_world_size():
        distributed.all_reduce(squares, op=distributed.ReduceOp.MAX)
    return squares


def _gradients(optimizer: MegatronOptimizer) -> Iterator[tuple[int, bool, list[torch.Tensor], str]]:
    """(place, whether it counts, gradients, backend of their norm) of this rank."""
    for part in optimizer.chained_optimizers:
        counted = {id(gradient) for gradient in part.get_main_grads_for_grad_norm()}
        gradients: dict[tuple[int, bool], list[torch.Tensor]] = {}
        for main in part.get_parameters():
            if main.grad is not None:
                gradients.setdefault((main.place, id(main.grad) in counted), []).append(main.grad)
        backend = "torch" if part.optimizer.backend == "apex" else part.optimizer.backend
        for (place, counts), tensors in gradients.items():
            yield place, counts, tensors, backend


def _order_free_squares(
    optimizer: MegatronOptimizer, layers: int, device: torch.device, group: distributed.ProcessGroup
) -> torch.Tensor:
    largest = torch.zeros(layers + 2, dtype=torch.float64, device=device)
    held = [(place, counts, tensors) for place, counts, tensors, _ in _gradients(optimizer)]
    for place, counts, tensors in held:
        square = largest_square(tensors)  # of what does not count, only whether it is finite: 0 or NaN
        largest[place] = torch.maximum(largest[place], square if counts else square - square)
    pieces = (
        (place, piece) for place, counts, tensors in held if counts for one in tensors for piece in squares_of(one)
    )
    return torch.tensor(order_free_sums(largest, pieces, group), dtype=torch.float64, device=device)


def _mark_places(optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], layers: int) -> None:
    """Write onto each main parameter where `gradient_squares` counts it: megatron-core gives them no names."""
    places: dict[torch.Tensor, int] = {}
    for chunk in map(unwrapped, chunks):
        for parameter in chunk.parameters():
            places[parameter] = layers + 1
        if chunk.pre_process:
            places.update(dict.fromkeys(chunk.embedding.parameters(), layers))
        for layer in chunk.decoder.layers:
            places.update(dict.fromkeys(layer.parameters(), layer.layer_number - 1))
    for part in optimizer.chained_optimizers:
        mains = {parameter: parameter for parameter in places}
        mains.update({parameter: parameter.main_param for parameter in places if hasattr(parameter, "main_param")})
        if isinstance(part, DistributedOptimizer):  # whose float32 parameters are cut as well
            for models, shards in zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True):
                mains.update(zip(models, shards, strict=True))
        for parameter, main in mains.items():
            if main is not None:  # of another rank
                main.place = places[parameter]  # type: ignore[attr-defined]


def update(optimizer: MegatronOptimizer, norm: torch.Tensor, clip_grad_norm: float | None) -> None:
    """One AdamW update by the gradients whose `norm` is given, scaled down to `clip_grad_norm` in the same pass."""
    scale = clip_factor(norm, clip_grad_norm) if clip_grad_norm else None
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer.gradient_scale = scale
    optimizer.step_with_ready_grads()


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Write this step's rates into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
