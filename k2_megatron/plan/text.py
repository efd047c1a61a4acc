"""The plan of a run as text: what `pretrain_k2.py --plan` prints before anything is built.

In: a Config. Out: lines a person reads. Every number comes from the formulas of this folder and of k2_megatron.config;
nothing here computes one that is not also a function there.
"""

from k2_megatron.config import Config
from k2_megatron.config.flops import flops_of_tokens, flops_per_token, hardware_flops_per_token
from k2_megatron.config.leaves import data_sizes, levels_of_a_rank
from k2_megatron.plan.memory import ELEMENT_BYTES, micro_batch_tokens, rank_memory
from k2_megatron.plan.parameters import model_parameters, rank_parameters
from k2_megatron.plan.schedule import bubble, chunks_in_flight
from k2_megatron.plan.time import PLANNED_DEVICES, PLANNED_UTILIZATIONS, training_seconds

GIB = 2**30
NOT_COUNTED = "device context, communication buffers, fragmentation"


def plan_text(config: Config) -> str:
    """The whole plan: parameters, layout, batches, FLOPs, memory a rank, time, files."""
    blocks = [
        _parameters(config),
        _layout(config),
        _batches(config),
        _flops(config),
        _memory(config),
        *([_time(config)] if config.train.precision == "bfloat16" else []),
        _files(config),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in blocks)


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: weights, fp32 main weights (also where they are the same), two fp32 moments; 14 bytes a
    parameter under bfloat16, 16 under float32."""
    return model_parameters(config).total * (ELEMENT_BYTES[config.train.precision] + 4 + 8)


def kept_checkpoints(config: Config) -> tuple[int, int]:
    """(checkpoints on disk when the run has finished, most that there are while the last is saved)."""
    checkpoint, steps = config.checkpoint, config.train.steps

    def kept(saves: int, last: int) -> int:
        """Of the first saves, the newest of which is of step `last`."""
        if checkpoint.keep_last is None:
            return saves
        newest = min(max(2, checkpoint.keep_last), saves)
        if checkpoint.keep_every_steps is None:
            return newest
        # The newest are the last step and the multiples of every_steps before it.
        first = last if newest == 1 else (saves - newest + 1) * checkpoint.every_steps
        return newest + (first - 1) // checkpoint.keep_every_steps

    before = config.checkpoints - 1
    return kept(config.checkpoints, steps), kept(before, before * checkpoint.every_steps) + 1


def _parameters(config: Config) -> tuple[str, list[str]]:
    counts, model = model_parameters(config), config.model
    rows = {
        "embedding": (counts.embedding, f"vocabulary {model.vocab_size:,} x hidden {model.hidden_size:,}"),
        "attention": (counts.attention, f"{model.heads} heads of {model.head_dim}, {model.kv_heads} for k and v"),
        "mlp": (counts.mlp, f"SwiGLU, {model.ffn_hidden_size:,} wide"),
        "layer norms": (counts.layer_norms, "two a layer"),
        "final norm": (counts.final_norm, ""),
        "output": (counts.output, "not tied to the embedding"),
    }
    lines = [f"{name:<12}{count:>18,}  {note}".rstrip() for name, (count, note) in rows.items()]
    total = f"{'total':<12}{counts.total:>18,}  {counts.without_embeddings:,} without embedding and output"
    return f"parameters ({model.layers} layers)", [*lines, total]


def _layout(config: Config) -> tuple[str, list[str]]:
    parallel = config.parallel
    sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    lines = [f"{sizes} x data {parallel.data} = {config.world_size} ranks"]
    chunks = f"{parallel.virtual_pipeline} chunk{'s' if parallel.virtual_pipeline > 1 else ''} a stage"
    lines.append(f"{chunks}, {config.layers_per_chunk} layers a chunk")
    lines.append(
        f"sequence parallelism {_on(parallel.sequence)}, distributed optimizer "
        f"{_on(parallel.distributed_optimizer)}, recompute {config.train.recompute}"
    )
    if (leaves := config.train.gradient_leaves) is not None:
        sizes = ", ".join(map(str, data_sizes(leaves)))
        own = len(levels_of_a_rank(leaves, parallel.data))
        more = f", {own} more gradient buffer{'s' if own > 1 else ''} a rank" if own else ""
        lines.append(f"gradients are added up as a tree of {leaves} leaves{more}: the same bits with data {sizes}")
    if parallel.pipeline > 1:
        idle = bubble(config, config.train.steps - 1)
        lines.append(f"pipeline bubble {idle:.1%} of the useful time, {idle / (1 + idle):.1%} of the whole")
    return "layout", lines


def _on(value: bool) -> str:
    return "on" if value else "off"


def _batches(config: Config) -> tuple[str, list[str]]:
    model, train = config.model, config.train
    lines = [f"{train.steps:,} steps, {config.total_samples:,} samples of {model.sequence_length:,} tokens"]
    if train.history:
        lines = [
            f"{train.steps:,} steps, to before sample {config.total_samples:,} of {model.sequence_length:,} tokens"
        ]
    lines.append(f"{config.total_tokens:,} tokens in all, {config.tokens_per_step:,} a step at the full batch")
    present = train.history[-1].first_step if train.history else 0
    for stage in config.stages:
        begin = f"from step {stage.first_step:,}"
        if train.history:
            begin += f", sample {stage.first_sample:,} of {stage.sequence_length:,} tokens"
        line = f"{begin}: global batch {stage.global_batch:,}"
        if stage.first_step >= present:  # those before it were done, in whatever layout
            micro_batches = config.micro_batches_at(stage.first_step)
            ranks = f"{config.parallel.data} data-parallel ranks"
            line += f" = {micro_batches} micro-batches of {train.micro_batch} on {ranks}"
        lines.append(line)
    return "batches", lines


def _flops(config: Config) -> tuple[str, list[str]]:
    lines, tokens = [], config.tokens_by_length_at(config.train.steps)
    for attention in ("full", "causal"):
        model_flops = flops_per_token(config.model, attention)
        hardware = hardware_flops_per_token(config.model, attention, config.train.recompute, micro_batch_tokens(config))
        extra = f", {hardware:.4g} with what is recomputed" if hardware != model_flops else ""
        lines.append(
            f"{model_flops:.4g} a token, {flops_of_tokens(config.model, tokens, attention):.4g} in all, "
            f"attention counted {attention}{extra}"
        )
    return "model FLOPs (three forward passes' worth)", lines


def _memory(config: Config) -> tuple[str, list[str]]:
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    lines = [f"{'stage':>5}{'ranks':>7}{'parameters':>16}" + "".join(f"{kind:>13}" for kind in kinds) + "  in flight"]
    for stage in range(config.parallel.pipeline):
        memory = rank_memory(config, stage)
        cells = "".join(f"{getattr(memory, kind) / GIB:>13.3f}" for kind in kinds)
        ranks = config.world_size // config.parallel.pipeline
        parameters = rank_parameters(config, stage).total
        lines.append(f"{stage:>5}{ranks:>7}{parameters:>16,}{cells}{chunks_in_flight(config, stage):>11}")
    lines.append(f"activations and logits are estimates; not counted: {NOT_COUNTED}")
    return "memory a rank, GiB", lines


def _time(config: Config) -> tuple[str, list[str]]:
    lines = []
    for device in PLANNED_DEVICES:
        days = [
            f"{training_seconds(config, device, utilization) / 86400:,.1f} days at {utilization:.0%}"
            for utilization in PLANNED_UTILIZATIONS
        ]
        lines.append(f"{config.world_size} x {device}: {', '.join(days)}")
    return "time at a given model FLOPs utilization (attention counted full)", lines


def _files(config: Config) -> tuple[str, list[str]]:
    token_bytes = 2 if config.model.vocab_size <= 2**16 else 4
    one, (kept, most) = checkpoint_bytes(config), kept_checkpoints(config)
    lines = [
        f"run folder    {config.run.folder}",
        f"training data {config.data.train}, {_size(config.total_tokens * token_bytes)} read as "
        f"{token_bytes}-byte tokens",
    ]
    if config.data.held_out is not None:
        lines.append(f"held out      {config.data.held_out}, every {config.train.evaluate_every_steps:,} steps")
    lines.append(
        f"checkpoints   every {config.checkpoint.every_steps:,} steps "
        f"({config.checkpoint.every_steps * config.tokens_per_step:,} tokens at the full batch), "
        f"{config.checkpoints:,} in all"
    )
    peak = f", {most:,} while the last is saved: {_size(one * most)}" if most > kept else ""
    lines.append(f"              {_size(one)} each, {kept:,} kept: {_size(one * kept)}{peak}")
    return "files (relative paths: from the current directory)", lines


def _size(count: int) -> str:
    return f"{count / 1e12:,.4g} TB" if count >= 1e12 else f"{count / 1e9:,.4g} GB"
