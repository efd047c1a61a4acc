"""Faults that a distributed run has had, put back on purpose: the comparison of layouts must see each of them."""

import dataclasses

import torch

import k2_megatron.model.build as build
import k2_megatron.model.context_parallel as context_parallel
import k2_megatron.model.gpt as gpt
import k2_megatron.train.layer_norms as layer_norms
import k2_megatron.train.step as step
from k2_megatron.model.norm import K2RMSNorm


def tensor_parallel_weights_unmarked() -> None:
    """Each tensor rank's part counts as a copy, and one rank's part alone enters the gradient norm."""
    build.mark_tensor_parallel = lambda model: None


def norms_unmarked_for_sequence_parallelism() -> None:
    """Each tensor rank keeps the norm gradients of its own positions."""
    marked = K2RMSNorm.__init__

    def unmarked(self, *args, **kwargs) -> None:
        marked(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    K2RMSNorm.__init__ = unmarked


def batched_messages_between_two_interleaved_stages() -> None:
    """Next and previous stage are one rank, and megatron-core's batched messages pair up wrongly."""
    right = build.transformer_config

    def batched(config, kernels):
        return dataclasses.replace(right(config, kernels), overlap_p2p_comm=False, batch_p2p_comm=True)

    build.transformer_config = batched


def replicas_read_the_same_samples() -> None:
    """Every data-parallel rank reads what rank 0 reads."""
    right = step.micro_batches

    def same(config, parts, *rest):
        first = dataclasses.replace(parts.groups, data_rank=0)
        return right(config, dataclasses.replace(parts, groups=first), *rest)

    step.micro_batches = same


def weights_drawn_from_the_generator_of_the_rank() -> None:
    """megatron-core's own way: every rank draws its weights in turn."""

    def drawn(model, seed, init_std, *_unused) -> None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=init_std)

    build.initialize_weights = drawn


def one_micro_batch_left_out() -> None:
    """The last micro-batch of each rank repeats the one before it."""
    right = step.micro_batches

    def repeated(*arguments):
        batches = list(right(*arguments))
        return iter([*batches[:-1], batches[-2]])

    step.micro_batches = repeated


def keys_in_the_order_of_the_context_ranks() -> None:
    """Keys and values stand as the ranks sent them, not as the sequence goes."""

    def unordered(local, group):
        return context_parallel.gather_from_sequence_parallel_region(local, group=group)

    context_parallel.gather_sequence = unordered


def every_context_rank_rotates_like_the_first() -> None:
    """The rotary tables are those of the sequence's beginning on every context rank."""

    def beginning(sequence_length, rank, size):
        return torch.arange(sequence_length // size)

    gpt.context_positions = beginning


def each_context_rank_reports_its_own_mean() -> None:
    """The shares of the context ranks are added up as if each were the whole mean."""
    right = step._forward

    def whole(groups, *rest):
        loss_BS, mean_loss = right(groups, *rest)

        def reported(loss_BS):
            loss, report = mean_loss(loss_BS)
            return loss, {key: value * groups.context_size for key, value in report.items()}

        return loss_BS, reported

    step._forward = whole


def a_copy_of_the_norms_has_other_gradients() -> None:
    """Tensor rank 1 doubles the gradients of its norms, which no other rank sees: Adam divides by their size."""
    right = step._finalizer

    def finalizer(config):
        def finalize(model, *arguments, **keywords) -> None:
            right(config)(model, *arguments, **keywords)
            for chunk in model:
                for name, parameter in chunk.named_parameters():
                    if "norm" in name and keywords["pg_collection"].tp.rank() == 1:
                        parameter.main_grad.mul_(2)

        return finalize

    step._finalizer = finalizer


def copies_of_hidden_states_counted_twice() -> None:
    """Every tensor rank adds the hidden states that all of them hold."""
    right = layer_norms.ActivationSquares.__init__

    def everywhere(self, parts, *rest):
        first = dataclasses.replace(parts.groups, tensor_rank=0)
        right(self, dataclasses.replace(parts, groups=first), *rest)

    layer_norms.ActivationSquares.__init__ = everywhere


def samples_in_the_order_of_the_ranks() -> None:
    """The losses of each data rank's samples stand together."""
    right = step._run_schedule

    def by_rank(config, parts, *rest, **named):
        loss, samples = right(config, parts, *rest, **named)
        size, ranks = config.train.micro_batch, parts.groups.data_size
        ranked = [
            samples[start + offset]
            for rank in range(ranks)
            for start in range(rank * size, len(samples), ranks * size)
            for offset in range(size)
        ]
        return loss, tuple(ranked)

    step._run_schedule = by_rank
