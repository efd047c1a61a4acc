"""What must hold between the fields of a configuration. Each check yields problems; none stops another.

In: anything with the sections as attributes: a Config, or the sections of a file whose invalid fields are absent. A
check that meets an absent field ends there: that field has its own problem already. A field that would have no effect
is a problem like any other, so that what stands in a file is what happens.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from k2_megatron.config import batch
from k2_megatron.config.leaves import data_sizes
from k2_megatron.config.problems import Problem


def problems_of(tree: Any) -> list[Problem]:
    """Every problem that the checks find in the sections of `tree`."""
    found: list[Problem] = []
    for check in CHECKS:
        try:
            found.extend(check(tree))
        except AttributeError:
            if not getattr(tree, "incomplete", False):
                raise
    return found


def _divides(tree: Any, key: str, by: str) -> Iterator[Problem]:
    """`key` must be a multiple of `by`; both are dotted."""
    (section, name), (by_section, by_name) = key.split("."), by.split(".")
    value, divisor = getattr(getattr(tree, section), name), getattr(getattr(tree, by_section), by_name)
    if value % divisor:
        yield Problem(key, value, f"must be a multiple of {by} = {divisor}; {_neighbours(value, divisor)}")


def _neighbours(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"nearest are {below} and {below + divisor}" if below else f"nearest is {divisor}"


def hidden_by_heads(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.hidden_size", "model.heads")


def even_head_dim(tree: Any) -> Iterator[Problem]:
    hidden, heads = tree.model.hidden_size, tree.model.heads
    if hidden % heads == 0 and hidden // heads % 2:
        remedy = f"gives an odd head dimension {hidden // heads}; rotary embeddings turn pairs, so make it even"
        yield Problem("model.heads", heads, remedy)


def heads_by_kv_heads(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.heads", "model.kv_heads")


def heads_by_tensor(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.heads", "parallel.tensor")


def kv_heads_by_tensor(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.kv_heads", "parallel.tensor")


def ffn_by_tensor(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.ffn_hidden_size", "parallel.tensor")


def vocabulary_by_tensor(tree: Any) -> Iterator[Problem]:
    yield from _divides(tree, "model.vocab_size", "parallel.tensor")


def kernel_overrides_with_transformer_engine(tree: Any) -> Iterator[Problem]:
    if tree.model.implementation == "transformer_engine":
        for op in ("rms_norm", "rotary", "swiglu"):
            if getattr(tree.model.kernels, op) is not None:
                remedy = (
                    'has no effect with model.implementation = "transformer_engine", which brings its own: remove it'
                )
                yield Problem(f"model.kernels.{op}", getattr(tree.model.kernels, op), remedy)


def default_kernels_compute_every_op(tree: Any) -> Iterator[Problem]:
    kernels = tree.model.kernels
    if lacking := kernels.not_offered():
        remedy = f"has no {', '.join(lacking)}: name it beside the ops that it has, or these with another backend"
        yield Problem("model.kernels.default", kernels.default, remedy)


def chunked_loss_is_ours(tree: Any) -> Iterator[Problem]:
    chunk, backend = tree.model.loss_chunk_tokens, tree.model.kernels.backend("cross_entropy")
    if chunk is not None and backend == "transformer_engine":
        remedy = "needs a cross-entropy of ours, not transformer_engine's: name another backend for it, or remove this"
        yield Problem("model.loss_chunk_tokens", chunk, remedy)


def layers_by_stages(tree: Any) -> Iterator[Problem]:
    layers, pipeline, virtual = tree.model.layers, tree.parallel.pipeline, tree.parallel.virtual_pipeline
    if layers % (pipeline * virtual):
        product = f"parallel.pipeline * parallel.virtual_pipeline = {pipeline} * {virtual}"
        remedy = f"must be a multiple of {product} = {pipeline * virtual}; {_neighbours(layers, pipeline * virtual)}"
        yield Problem("model.layers", layers, remedy)


def virtual_pipeline_needs_stages(tree: Any) -> Iterator[Problem]:
    if tree.parallel.virtual_pipeline > 1 and tree.parallel.pipeline == 1:
        remedy = "has no effect with parallel.pipeline = 1: remove it, or use at least 2 stages"
        yield Problem("parallel.virtual_pipeline", tree.parallel.virtual_pipeline, remedy)


def sequence_needs_tensor(tree: Any) -> Iterator[Problem]:
    if tree.parallel.sequence and tree.parallel.tensor == 1:
        remedy = "has no effect with parallel.tensor = 1: set it to false, or use at least 2 tensor-parallel ranks"
        yield Problem("parallel.sequence", True, remedy)


def sharded_optimizer_needs_replicas(tree: Any) -> Iterator[Problem]:
    # mcore shards over the data-parallel and context-parallel ranks together; with one there is nothing to shard.
    if tree.parallel.distributed_optimizer and tree.parallel.data * tree.parallel.context == 1:
        remedy = "has no effect with one data-parallel rank: set it to false, or use more ranks"
        yield Problem("parallel.distributed_optimizer", True, remedy)


def comparing_needs_replicas(tree: Any) -> Iterator[Problem]:
    every = tree.train.compare_replicas_every_steps
    if every is not None and tree.parallel.tensor * tree.parallel.data * tree.parallel.context == 1:
        remedy = "has no effect with one rank a stage, which holds nothing that another holds as well: remove it"
        yield Problem("train.compare_replicas_every_steps", every, remedy)


def sequence_length_splits(tree: Any) -> Iterator[Problem]:
    # Context parallelism gives each rank two pieces, one from either end, to even out causal attention's work.
    length, parallel = tree.model.sequence_length, tree.parallel
    pieces = 2 * parallel.context if parallel.context > 1 else 1
    shards = parallel.tensor if parallel.sequence else 1
    if length % (pieces * shards):
        parts = [f"2 * parallel.context = {pieces}"] * (pieces > 1) + [f"parallel.tensor = {shards}"] * (shards > 1)
        remedy = f"must be a multiple of {' times '.join(parts)}; {_neighbours(length, pieces * shards)}"
        yield Problem("model.sequence_length", length, remedy)


def batches_divide(tree: Any) -> Iterator[Problem]:
    yield from _batches_divide_by(tree, "parallel.data", tree.parallel.data)


def gradient_leaves_divide(tree: Any) -> Iterator[Problem]:
    data, leaves = tree.parallel.data, tree.train.gradient_leaves
    if leaves is None:
        return
    sizes = data_sizes(leaves)
    if data not in sizes:
        fitting = ", ".join(map(str, sizes))
        remedy = f"goes with parallel.data = {fitting}, which is {data}: change one of them, or leave the leaves out"
        yield Problem("train.gradient_leaves", leaves, remedy)
    yield from _batches_divide_by(tree, "train.gradient_leaves", leaves)


def _batches_divide_by(tree: Any, name: str, parts: int) -> Iterator[Problem]:
    """Each of so many parts of a batch is whole micro-batches."""
    micro = tree.train.micro_batch
    for key, value in _batch_sizes(tree.train):
        if value % (micro * parts):
            rule = f"must be a multiple of train.micro_batch * {name} = {micro} * {parts} = {micro * parts}"
            yield Problem(key, value, f"{rule}; {_neighbours(value, micro * parts)}")


def interleaved_micro_batches(tree: Any) -> Iterator[Problem]:
    parallel = tree.parallel
    if parallel.virtual_pipeline == 1 or parallel.pipeline == 1:
        return
    share = tree.train.micro_batch * parallel.data
    for key, value in _batch_sizes(tree.train):
        if value % share == 0 and value // share % parallel.pipeline:
            rule = f"the interleaved schedule needs a multiple of parallel.pipeline = {parallel.pipeline}"
            near = _neighbours(value, share * parallel.pipeline)
            yield Problem(key, value, f"makes {value // share} micro-batches, and {rule}; {near}")


def _batch_sizes(train: Any) -> Iterable[tuple[str, int]]:
    """The batch sizes that every stage's follows from. All of them divide when start, increment and the full do."""
    yield "train.global_batch", train.global_batch
    if train.batch_ramp is not None:
        yield "train.batch_ramp.start", train.batch_ramp.start
        yield "train.batch_ramp.increment", train.batch_ramp.increment


def ramp_reaches_full_batch(tree: Any) -> Iterator[Problem]:
    ramp, full = tree.train.batch_ramp, tree.train.global_batch
    if ramp is None:
        return
    if ramp.start >= full:
        remedy = f"must be below train.global_batch = {full}; remove train.batch_ramp for a constant batch"
        yield Problem("train.batch_ramp.start", ramp.start, remedy)
    elif (full - ramp.start) % ramp.increment:
        way = f"train.global_batch - start = {full} - {ramp.start} = {full - ramp.start}"
        yield Problem("train.batch_ramp.increment", ramp.increment, f"must divide {way}")


def ramp_ends_within_run(tree: Any) -> Iterator[Problem]:
    ramp, full = tree.train.batch_ramp, tree.train.global_batch
    if ramp is None or ramp.start >= full or (full - ramp.start) % ramp.increment:
        return
    last = batch.ramp_stages(ramp.start, ramp.increment, ramp.samples, full, tree.model.sequence_length)[-1]
    if last.first_step >= tree.train.steps:
        remedy = (
            f"the ramp takes {last.first_step} steps and train.steps = {tree.train.steps} never sees the full batch"
        )
        yield Problem("train.batch_ramp.samples", ramp.samples, remedy)


def history_is_of_this_run(tree: Any) -> Iterator[Problem]:
    train = tree.train
    if not train.history:
        return
    if not batch.follows(train.history, batch.planned_stages(train, tree.model.sequence_length)):
        remedy = "is the run's own record and was altered: put back what its newest checkpoint says (k2.json)"
        yield Problem("train.history", [stage.model_dump() for stage in train.history], remedy)


def evaluation_is_whole(tree: Any) -> Iterator[Problem]:
    given = {
        "train.evaluate_every_steps": tree.train.evaluate_every_steps,
        "train.evaluate_batches": tree.train.evaluate_batches,
        "data.held_out": tree.data.held_out,
    }
    missing = [key for key, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        for key, value in given.items():
            if value is not None:
                yield Problem(key, value, f"has no effect without {' and '.join(missing)}: give that too, or remove it")


def warmup_ends_within_run(tree: Any) -> Iterator[Problem]:
    if tree.optimizer.warmup_steps >= tree.train.steps:
        remedy = f"must be below train.steps = {tree.train.steps}: the run would never reach its learning rate"
        yield Problem("optimizer.warmup_steps", tree.optimizer.warmup_steps, remedy)


def decay_fits_schedule(tree: Any) -> Iterator[Problem]:
    schedule, decay = tree.optimizer.schedule, tree.optimizer.decay_steps
    if schedule != "wsd" and decay is not None:
        yield Problem("optimizer.decay_steps", decay, f'has no effect with schedule = "{schedule}": remove it')
    if schedule == "wsd" and decay is None:
        remedy = 'is missing: schedule = "wsd" needs the length of its final decay, in steps'
        yield Problem("optimizer.decay_steps", None, remedy)
    if schedule == "wsd" and decay is not None and tree.optimizer.warmup_steps + decay > tree.train.steps:
        room = tree.train.steps - tree.optimizer.warmup_steps
        yield Problem("optimizer.decay_steps", decay, f"must be at most train.steps - warmup_steps = {room}")


def floor_fits_schedule(tree: Any) -> Iterator[Problem]:
    schedule, floor = tree.optimizer.schedule, tree.optimizer.min_learning_rate
    key, peak = "optimizer.min_learning_rate", tree.optimizer.learning_rate
    if schedule == "constant" and floor is not None:
        yield Problem(key, floor, 'has no effect with schedule = "constant": remove it')
    if schedule != "constant" and floor is None:
        yield Problem(key, None, f'is missing: schedule = "{schedule}" decays to it (0.0 is allowed)')
    if schedule != "constant" and floor is not None and floor > peak:
        yield Problem(key, floor, f"must not exceed optimizer.learning_rate = {peak}")


def kept_checkpoints_exist(tree: Any) -> Iterator[Problem]:
    every, kept, key = tree.checkpoint.every_steps, tree.checkpoint.keep_every_steps, "checkpoint.keep_every_steps"
    if kept is None:
        return
    if tree.checkpoint.keep_last is None:
        yield Problem(key, kept, "has no effect without checkpoint.keep_last: all checkpoints are kept anyway")
    if kept % every:
        yield Problem(key, kept, f"must be a multiple of checkpoint.every_steps = {every}; {_neighbours(kept, every)}")


def start_optimizer_needs_start(tree: Any) -> Iterator[Problem]:
    kept = tree.checkpoint.start_optimizer
    if kept is not None and tree.checkpoint.start_from is None:
        yield Problem("checkpoint.start_optimizer", kept, "has no effect without checkpoint.start_from: remove it")


def retries_end_before_the_watchdog_does(tree: Any) -> Iterator[Problem]:
    # In one pause the ledger's line is tried again, and a save: this one, or one in the background that is waited for.
    seconds = tree.checkpoint.retry_seconds
    limit, name = min((getattr(tree.watchdog, name), name) for name in ("pause_minimum_seconds", "pause_seconds"))
    if 2 * seconds >= limit:
        remedy = f"must be less than half of watchdog.{name} = {limit:g}, which ends a save that tries for longer"
        yield Problem("checkpoint.retry_seconds", seconds, remedy)


def spike_policy_is_whole(tree: Any) -> Iterator[Problem]:
    policy = tree.spikes.policy
    for name in ("scope", "max_rollbacks"):
        key, value = f"spikes.{name}", getattr(tree.spikes, name)
        if policy == "watch" and value is not None:
            yield Problem(key, value, 'has no effect with spikes.policy = "watch": remove it, or choose a policy')
        if policy != "watch" and value is None:
            yield Problem(key, None, f'is missing: spikes.policy = "{policy}" needs it')


def going_back_finds_a_checkpoint(tree: Any) -> Iterator[Problem]:
    every, steps = tree.checkpoint.every_steps, tree.train.steps
    if tree.spikes.policy != "watch" and every >= steps:
        remedy = f"goes back to a checkpoint, and checkpoint.every_steps = {every} makes none before the last step"
        yield Problem("spikes.policy", tree.spikes.policy, remedy)


CHECKS: tuple[Callable[[Any], Iterator[Problem]], ...] = (
    hidden_by_heads,
    even_head_dim,
    heads_by_kv_heads,
    heads_by_tensor,
    kv_heads_by_tensor,
    ffn_by_tensor,
    vocabulary_by_tensor,
    kernel_overrides_with_transformer_engine,
    default_kernels_compute_every_op,
    chunked_loss_is_ours,
    layers_by_stages,
    virtual_pipeline_needs_stages,
    sequence_needs_tensor,
    sharded_optimizer_needs_replicas,
    comparing_needs_replicas,
    sequence_length_splits,
    batches_divide,
    gradient_leaves_divide,
    interleaved_micro_batches,
    ramp_reaches_full_batch,
    ramp_ends_within_run,
    history_is_of_this_run,
    evaluation_is_whole,
    warmup_ends_within_run,
    decay_fits_schedule,
    floor_fits_schedule,
    kept_checkpoints_exist,
    start_optimizer_needs_start,
    retries_end_before_the_watchdog_does,
    spike_policy_is_whole,
    going_back_finds_a_checkpoint,
)
