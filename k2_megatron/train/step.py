"""One training step, and one evaluation, through megatron-core's pipeline schedules.

In:  what the rank trains with, a feed of token rows, and the step's numbers, which are all functions of the step.
Out: a `StepResult` that is equal on every rank, but for the wait for rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy
import torch
import torch.distributed as distributed
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from k2_megatron.config import Config
from k2_megatron.config.leaves import micro_batches_of_a_rank
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.model.context_parallel import context_positions
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.layer_norms import ActivationSquares, LayerNorms, layer_norms
from k2_megatron.train.optimizer import gradient_squares, update
from k2_megatron.train.parts import AnyParts, Parts
from k2_megatron.train.phases import StepPhases
from k2_megatron.train.replica_gradients import Apart, OwnGradients, find_apart
from k2_megatron.train.replicas import Difference, compare_replicas


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the global batch in nats a token; `grad_norm` is before clipping; `updated` is False
    when loss or gradient was not finite or in doubt, or replicas differed, and the update was therefore not applied;
    `data_seconds` is what this rank waited for rows; `sample_losses` are the means over each sequence, in the order of
    the samples; `layers` is what was asked for of the layers; `difference` is what comparing the replicas found, and
    `apart` who brought other gradients than the rest."""

    loss: float
    grad_norm: float
    updated: bool
    data_seconds: float
    sample_losses: tuple[float, ...]
    layers: LayerNorms | None = None
    difference: Difference | None = None
    apart: Apart | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def micro_batches(
    config: Config, parts: AnyParts, feed: AnyFeed, first_sample: int, global_batch: int
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """This rank's (tokens [B, S / C], labels [B, S / C]) int64, one micro-batch at a time.

    Samples first_sample ... + global_batch belong to the step in every layout, each B in a row to a micro-batch. Of
    these data rank r takes r, r + data_size, ... (with gradient leaves those of one leaf after another), and holds the
    positions of its context rank. Only the first stage reads tokens and only the last reads labels. The micro-batch
    that comes next, this step's or the next step's, is read in the background.
    """
    size, length, groups = config.train.micro_batch, config.model.sequence_length, parts.groups
    held = context_positions(length, groups.context_rank, groups.context_size).to(parts.device)
    numbers = _numbers(config, groups, global_batch)
    for number, following in pairwise([*numbers, global_batch // size + numbers[0]]):
        if not (groups.is_first_stage or groups.is_last_stage):
            yield None, None
            continue
        rows = torch.from_numpy(feed.tokens(first_sample + number * size, size).astype(numpy.int64)).to(parts.device)
        feed.prefetch(first_sample + following * size, size)
        yield rows[:, held], rows[:, held + 1]


def _numbers(config: Config, groups: Groups, global_batch: int) -> list[int]:
    """Which micro-batches of a global batch this rank computes, in its order."""
    count, leaves = global_batch // config.train.micro_batch, config.train.gradient_leaves
    return micro_batches_of_a_rank(count, groups.data_rank, groups.data_size, leaves)


def _forward(groups, scale, iterator, model):
    """`scale`: what the loss is divided by; None leaves it to megatron-core, which divides it by the rank's
    micro-batches, and the gradients by the ranks."""
    tokens, labels = next(iterator)
    loss_BS = model(tokens, None, None, labels=labels)

    def mean_loss(loss_BS):
        # This rank's share of the mean over the sequence; megatron-core multiplies by the context ranks again, whose
        # gradients it averages.
        loss = loss_BS.mean() / (groups.context_size if scale is None else scale)
        # A copy: megatron-core divides the loss by the number of micro-batches in place.
        told = {
            "loss": loss.detach().clone(),
            "sample_losses_B": loss_BS.detach().mean(dim=1) / groups.context_size,
        }
        # The second of three is a number of tokens, which nothing of ours is divided by.
        return (loss, told) if scale is None else (loss, torch.ones((), dtype=torch.int), told)

    return loss_BS, mean_loss


def through_pipeline(
    config: Config,
    parts: AnyParts,
    forward_step: Callable,
    iterators: Sequence[Iterator],
    *,
    micro_batches: int,
    micro_batch: int,
    sequence_length: int,
    forward_only: bool,
) -> list[dict]:
    """What `forward_step` tells of each of this rank's `micro_batches` in its last stage; [] in the others. One
    iterator a chunk."""
    groups, chunks = parts.groups, parts.chunks
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(
        groups.pipeline_size, config.parallel.virtual_pipeline if interleaved else None
    )
    return schedule(
        forward_step_func=forward_step,
        data_iterator=list(iterators) if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=micro_batches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(groups.collection.pp, chunks[0].config),
        pg_collection=groups.collection,
    )


def _run_schedule(
    config: Config,
    parts: AnyParts,
    feed: AnyFeed,
    first_sample: int,
    global_batch: int,
    *,
    forward_only: bool,
    own: OwnGradients | None = None,
) -> tuple[float, tuple[float, ...]]:
    """Forward (and backward) over one global batch; (the mean loss, that of each sample), equal on every rank."""
    groups, chunks = parts.groups, parts.chunks
    count, leaves = global_batch // config.train.micro_batch, config.train.gradient_leaves
    scale = None
    if leaves is not None:
        scale = groups.context_size * count
        for chunk in [] if forward_only else chunks:
            chunk.begin(count // leaves)
    chunks[0].config.finalize_model_grads_func = None if forward_only else own or _finalizer(config)
    losses = through_pipeline(
        config,
        parts,
        partial(_forward, groups, scale),
        [micro_batches(config, parts, feed, first_sample, global_batch) for _ in chunks],
        micro_batches=count // groups.data_size,
        micro_batch=config.train.micro_batch,
        sequence_length=config.model.sequence_length,
        forward_only=forward_only,
    )
    # Of the tensor ranks, which hold the same, one speaks.
    speaks = groups.is_last_stage and groups.tensor_rank == 0
    gather = _gathered_losses if leaves is None else _gathered_losses_in_order
    return gather(config, parts, losses if speaks else [], global_batch)


def _finalizer(config: Config) -> Callable[..., None]:
    """What adds up the gradients over ranks when the schedule has run."""
    return finalize_model_grads if config.train.gradient_leaves is None else _finalize_unscaled


def _finalize_unscaled(model, _tokens, **keywords) -> None:
    """megatron-core would divide the gradients by the number of tokens."""
    finalize_model_grads(model, None, **keywords)


def _gathered_losses(
    config: Config, parts: AnyParts, losses: list[dict], global_batch: int
) -> tuple[float, tuple[float, ...]]:
    """(the mean loss, that of each sample). Each data rank's last stage holds its mean, in shares over its context
    ranks; without `losses` it is another rank."""
    total = torch.zeros(1 + global_batch, dtype=torch.float64, device=parts.device)
    if losses:
        total[0] = torch.stack([item["loss"] for item in losses]).double().mean() / parts.groups.data_size
        own_MB = torch.stack([item["sample_losses_B"] for item in losses])
        total[1:].view(-1, config.train.micro_batch)[_numbers(config, parts.groups, global_batch)] = own_MB.double()
    distributed.all_reduce(total)
    loss, *sample_losses = total.tolist()
    return loss, tuple(sample_losses)


def _gathered_losses_in_order(
    config: Config, parts: AnyParts, losses: list[dict], global_batch: int
) -> tuple[float, tuple[float, ...]]:
    """The same, so that no order of ranks matters: each number has one giver, and the mean is over the samples."""
    groups = parts.groups
    shares = torch.zeros(groups.context_size, global_batch, dtype=torch.float64, device=parts.device)
    if losses:
        own_MB = torch.stack([item["sample_losses_B"] for item in losses])
        own = shares[groups.context_rank].view(-1, config.train.micro_batch)
        own[_numbers(config, groups, global_batch)] = own_MB.double()
    distributed.all_reduce(shares)
    sample_losses = [sum(of_sample) for of_sample in zip(*shares.tolist(), strict=True)]
    total = math.fsum if all(map(math.isfinite, sample_losses)) else sum
    return total(sample_losses) / global_batch, tuple(sample_losses)


def train_step(
    config: Config,
    parts: Parts,
    feed: AnyFeed,
    step: int,
    *,
    activations: ActivationSquares | None = None,
    phases: StepPhases | None = None,
    accept: Callable[[float, float, Apart | None], bool] | None = None,
    compare: bool = False,
) -> StepResult:
    """Gradients over the step's global batch, clipped; then the update, unless something was not finite or replicas
    differed, or `accept` says of loss and gradient norm that they are in doubt. Replicas are compared (with `compare`
    in any step, and their gradients too) before the update, because a sharded optimizer's writes all replicas anew and
    hides a flipped bit.

    With `activations` the result tells of the layers; with `phases` it is measured what this rank spends the step on.
    """
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    if activations:
        activations.begin()
    if phases:
        phases.begin()
    first_sample, global_batch = config.consumed_samples_at(step), config.global_batch_at(step)
    waited = feed.seconds_waited
    own = OwnGradients(_finalizer(config)) if compare else None
    with phases.within(parts.chunks[0].config) if phases else nullcontext():
        loss, sample_losses = _run_schedule(
            config, parts, feed, first_sample, global_batch, forward_only=False, own=own
        )

    order_free = config.train.gradient_leaves is not None
    squares = gradient_squares(parts.optimizer, config.model.layers, parts.device, order_free)
    apart = find_apart(own.sizes, parts.groups, config.spikes.suspect_factor, squares) if own else None
    norm = squares.sum().sqrt()
    grad_norm = norm.item()
    every, difference = config.train.compare_replicas_every_steps, None
    if compare or (every and (step + 1) % every == 0):
        difference = compare_replicas(parts)
    updated = math.isfinite(loss) and math.isfinite(grad_norm) and difference is None
    if updated and accept:
        updated = accept(loss, grad_norm, apart)
    if updated:
        with phases.updating(parts.optimizer) if phases else nullcontext():
            update(parts.optimizer, norm, config.optimizer.clip_grad_norm)
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)  # the update is queued, and the step's seconds are to hold it
    layers = None
    if activations:
        elements = global_batch * config.model.sequence_length * config.model.hidden_size
        layers = layer_norms(squares.tolist(), activations.collect(order_free), elements)
    waited = feed.seconds_waited - waited
    return StepResult(loss, grad_norm, updated, waited, sample_losses, layers, difference, apart)


def evaluate(config: Config, parts: AnyParts, feed: AnyFeed) -> float:
    """Mean loss in nats a token over the first `train.evaluate_batches` global batches of the held-out feed."""
    loss, _ = evaluate_samples(config, parts, feed)
    return loss


def evaluate_samples(config: Config, parts: AnyParts, feed: AnyFeed) -> tuple[float, list[float]]:
    """The same, and the mean of each sample in their order."""
    was_training = [chunk.training for chunk in parts.chunks]
    for chunk in parts.chunks:
        chunk.eval()
    batch, batches = config.train.global_batch, config.train.evaluate_batches
    assert batches, "evaluation was asked for without evaluate_batches; the configuration should have refused that"
    losses: list[float] = []
    of_samples: list[float] = []
    with torch.no_grad():
        for index in range(batches):
            loss, sample_losses = _run_schedule(config, parts, feed, index * batch, batch, forward_only=True)
            losses.append(loss)
            of_samples += sample_losses
    for chunk, training in zip(parts.chunks, was_training, strict=True):
        chunk.train(training)
    return sum(losses) / len(losses), of_samples
