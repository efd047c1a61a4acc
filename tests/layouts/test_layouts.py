"""Every layout trains the same model: weights, losses and gradients against one process, five steps in float32.

The first loss and the first gradients differ by the order of summation alone; afterwards Adam, which divides by the
root of a tiny second moment, lets that rounding grow. Bounds, relative: first loss 1e-6, later losses 1e-5; gradient
norms 1e-4; losses by sample and norms by layer 1e-6 in the first step, 1e-4 later.
"""

import math

import layout_faults
import pytest
import torch
from small_run import VOCABULARY

from k2_megatron.certify.first_steps import FirstSteps

ONE_PROCESS: dict[str, object] = {}
LAYOUTS = {
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2-sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2-vp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp2-sharded": (2, {"parallel.distributed_optimizer": True}),
    "cp2": (2, {"parallel.context": 2}),
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "tp2-sp-dp2-sharded": (
        4,
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.distributed_optimizer": True},
    ),
    "pp2-vp2-dp2-sharded": (
        4,
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.distributed_optimizer": True},
    ),
    "cp4": (4, {"parallel.context": 4}),
    "tp2-sp-cp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
    "pp2-cp2-sharded": (4, {"parallel.pipeline": 2, "parallel.context": 2, "parallel.distributed_optimizer": True}),
}
FIRST_DETAILS, LATER_DETAILS = 1e-6, 1e-4
FIRST_LOSS, LATER_LOSSES, GRADIENT_NORMS, GRADIENTS = 1e-6, 1e-5, 1e-4, 1e-5
# bfloat16 keeps 8 bits: two orders of summation differ by some 2^-9 in an activation, and the mean over 256 positions
# of a loss by less.
BFLOAT16_LOSSES, BFLOAT16_GRADIENT_NORMS = 2e-3, 2e-2

in_every_layout = pytest.mark.parametrize(("ranks", "settings"), LAYOUTS.values(), ids=LAYOUTS)


def differences(expected, found, first_loss=FIRST_LOSS, losses=LATER_LOSSES, grad_norms=GRADIENT_NORMS) -> list[str]:
    """What of two trainings differs by more than the bounds, one line each."""
    lines = []
    for name, values, bounds in (
        ("loss", (expected.losses, found.losses), [first_loss] + [losses] * (len(expected.losses) - 1)),
        ("gradient norm", (expected.grad_norms, found.grad_norms), [grad_norms] * len(expected.losses)),
        ("held-out loss", ([expected.held_out_loss], [found.held_out_loss]), [losses]),
    ):
        for step, (a, b, bound) in enumerate(zip(*values, bounds, strict=True), 1):
            if not abs(b - a) <= bound * abs(a):
                lines.append(f"{name} of step {step}: {b} against {a}, relative {abs(b / a - 1):.1e} over {bound}")
    return lines


def detail_differences(expected: FirstSteps, found: FirstSteps, first: float, later: float) -> list[str]:
    """Steps whose losses by sample or norms by layer are not those of `expected`, with the largest relative error."""
    lines = []
    for step, (a, b) in enumerate(zip(details(expected), details(found), strict=True), 1):
        for name in a:
            error = float((torch.tensor(b[name]) / torch.tensor(a[name]) - 1).abs().max())
            if not error <= (first if step == 1 else later):
                lines.append(f"{name} of step {step}: off by {error:.1e}")
    return lines


def details(training: FirstSteps) -> list[dict[str, tuple[float, ...]]]:
    return [
        {
            "sample losses": losses,
            "activation_rms": layers.activation_rms,
            "gradient_norm": (
                *layers.gradient_norm,
                layers.embedding_gradient_norm,
                layers.output_gradient_norm,
            ),
        }
        for losses, layers in zip(training.sample_losses, training.layers, strict=True)
    ]


def gradient_differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], bound: float) -> list[str]:
    """Names whose gradients differ in norm by more than `bound` of the expected norm."""
    assert expected.keys() == found.keys()
    return [
        f"{name}: off by {float(difference):.1e} of its norm"
        for name, gradient in expected.items()
        if not (difference := (found[name] - gradient).norm() / gradient.norm()) <= bound
    ]


@in_every_layout
def test_initial_weights_are_the_same(train, ranks, settings):
    assert train(ranks, settings).training.initial_weights == train(1, ONE_PROCESS).training.initial_weights


@in_every_layout
def test_losses_and_gradient_norms_are_those_of_one_process(train, ranks, settings):
    found = train(ranks, settings)
    assert differences(train(1, ONE_PROCESS).training, found.training) == []
    assert found.ranks_agree, "ranks report different losses, norms or weights"
    assert not any(found.training.unlike_copies)


@in_every_layout
def test_losses_by_sample_and_norms_by_layer_are_those_of_one_process(train, ranks, settings):
    expected, found = train(1, ONE_PROCESS).training, train(ranks, settings).training
    assert detail_differences(expected, found, FIRST_DETAILS, LATER_DETAILS) == []


def test_details_add_up_to_the_whole(train):
    training = train(1, ONE_PROCESS).training
    for loss, norm, samples, layers in zip(
        training.losses, training.grad_norms, training.sample_losses, training.layers, strict=True
    ):
        assert sum(samples) / len(samples) == pytest.approx(loss, rel=1e-6)
        parts = (*layers.gradient_norm, layers.embedding_gradient_norm, layers.output_gradient_norm)
        assert math.hypot(*parts) == pytest.approx(norm, rel=1e-9)


@in_every_layout
def test_every_gradient_of_the_first_step_is_that_of_one_process(train, ranks, settings):
    expected = train(1, ONE_PROCESS).gradients
    assert len(expected) == 9, "embedding, output, final norm, and six kinds in a layer"
    assert gradient_differences(expected, train(ranks, settings).gradients, GRADIENTS) == []


def test_first_loss_is_that_of_a_model_which_knows_nothing(train):
    # The logits' variance, init_std^2 * hidden_size = 0.026, adds half of itself; the sample of positions, the rest.
    assert abs(train(1, ONE_PROCESS).training.losses[0] - math.log(VOCABULARY)) < 0.05


def test_training_is_repeatable_to_the_bit(train, small_config, tmp_path):
    again = train(1, {"run.folder": str(tmp_path)})  # the folder keeps the cache from answering
    assert again.training == train(1, ONE_PROCESS).training


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, ONE_PROCESS), LAYOUTS["tp2-sp"], LAYOUTS["cp2"]],
    ids=["one", "tp2-sp", "cp2"],
)
def test_recomputed_activations_are_the_same_to_the_bit(train, ranks, settings, recompute):
    assert train(ranks, {**settings, "train.recompute": recompute}).training == train(ranks, settings).training


LEAVES = {"train.gradient_leaves": 4}
TP2 = {"parallel.tensor": 2, "parallel.sequence": True, "train.precision": "bfloat16"}


@pytest.mark.parametrize(
    ("one", "more"),
    [
        ((1, {"model.loss_chunk_tokens": 16}), LAYOUTS["pp2-vp2-dp2-sharded"]),
        (LAYOUTS["cp2"], (4, {})),
        ((2, TP2), (4, {"parallel.distributed_optimizer": True})),
    ],
    ids=["pp2-vp2-dp2-sharded-chunked", "cp2-dp2", "tp2-sp-dp2-sharded-bfloat16"],
)
def test_gradient_leaves_make_another_data_size_the_same_to_the_bit(train, one, more):
    """Also sample losses, norms by layer before they are rounded for the journal, and every gradient."""
    expected = train(one[0], {**one[1], **LEAVES})
    found = train(more[0], {**one[1], **more[1], **LEAVES})
    assert found.training == expected.training
    assert found.ranks_agree
    assert all(torch.equal(found.gradients[name], gradient) for name, gradient in expected.gradients.items())


@pytest.mark.parametrize(("ranks", "settings"), [(1, {"model.loss_chunk_tokens": 16}), LAYOUTS["cp2"]])
def test_gradient_leaves_change_nothing_but_rounding(train, ranks, settings):
    expected, found = train(1, ONE_PROCESS), train(ranks, {**settings, **LEAVES})
    assert differences(expected.training, found.training) == []
    assert detail_differences(expected.training, found.training, FIRST_DETAILS, LATER_DETAILS) == []
    assert gradient_differences(expected.gradients, found.gradients, GRADIENTS) == []


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vp2", "dp2-sharded", "cp2", "tp2-pp2"])
def test_bfloat16_stays_within_its_rounding_of_one_process(train, layout):
    ranks, settings = LAYOUTS[layout]
    expected = train(1, {"train.precision": "bfloat16"}).training
    found = train(ranks, {**settings, "train.precision": "bfloat16"}).training
    assert found.initial_weights == expected.initial_weights
    assert differences(expected, found, BFLOAT16_LOSSES, BFLOAT16_LOSSES, BFLOAT16_GRADIENT_NORMS) == []


def test_bfloat16_is_near_float32(train):
    expected, found = train(1, ONE_PROCESS).training, train(1, {"train.precision": "bfloat16"}).training
    assert differences(expected, found, BFLOAT16_LOSSES, BFLOAT16_LOSSES, BFLOAT16_GRADIENT_NORMS) == []
    assert found.losses != expected.losses


@pytest.mark.parametrize("layout", ["tp2-sp", "cp2", "tp2-pp2"])
def test_grouped_query_attention_divides_over_tensor_ranks(train, layout):
    ranks, settings = LAYOUTS[layout]
    grouped = {"model.kv_heads": 2}
    expected, found = train(1, grouped), train(ranks, {**settings, **grouped})
    assert found.training.initial_weights == expected.training.initial_weights
    assert differences(expected.training, found.training) == []
    assert gradient_differences(expected.gradients, found.gradients, GRADIENTS) == []


@pytest.mark.parametrize("layout", ["dp2", "pp2-vp2"])
def test_batch_ramp_feeds_the_same_samples(train, layout):
    ramp = {"train.global_batch": 16, "train.batch_ramp": "{start = 8, increment = 8, samples = 16}"}
    ranks, settings = LAYOUTS[layout]
    expected = train(1, ramp).training
    assert differences(expected, train(ranks, {**settings, **ramp}).training) == []
    constant = train(1, ONE_PROCESS).training  # the ramp's first two steps are steps of 8
    assert expected.losses[:2] == constant.losses[:2]
    assert expected.losses[2] != constant.losses[2]


def test_kernels_do_not_change_the_result(train):
    expected = train(1, ONE_PROCESS)
    found = train(1, {"model.kernels": "torch"})
    assert differences(expected.training, found.training) == []
    assert gradient_differences(expected.gradients, found.gradients, GRADIENTS) == []


# Which part of the comparison must see a fault: the weights at the start, losses and norms, what is told of samples
# and layers, or gradients by name.
FAULTS = [
    (layout_faults.weights_drawn_from_the_generator_of_the_rank, "pp2", {"weights", "losses", "details", "gradients"}),
    (layout_faults.tensor_parallel_weights_unmarked, "tp2", {"losses", "details", "gradients"}),
    (layout_faults.norms_unmarked_for_sequence_parallelism, "tp2-sp", {"losses", "details", "gradients"}),
    (layout_faults.batched_messages_between_two_interleaved_stages, "pp2-vp2", {"losses", "details", "gradients"}),
    (layout_faults.replicas_read_the_same_samples, "dp2", {"losses", "details", "gradients"}),
    (layout_faults.one_micro_batch_left_out, "pp2", {"losses", "details", "gradients"}),
    (layout_faults.keys_in_the_order_of_the_context_ranks, "cp2", {"losses", "details", "gradients"}),
    (layout_faults.every_context_rank_rotates_like_the_first, "cp2", {"losses", "details", "gradients"}),
    (layout_faults.each_context_rank_reports_its_own_mean, "cp2", {"losses", "details"}),
    (layout_faults.copies_of_hidden_states_counted_twice, "tp2", {"details"}),
    (layout_faults.samples_in_the_order_of_the_ranks, "dp2", {"details"}),
]


@pytest.mark.parametrize(("fault", "layout", "seen"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_comparison_sees_a_fault(train, fault, layout, seen):
    ranks, settings = LAYOUTS[layout]
    expected, found = train(1, ONE_PROCESS), train(ranks, settings, fault)
    disagreements = {
        "weights": expected.training.initial_weights != found.training.initial_weights,
        "losses": bool(differences(expected.training, found.training)),
        "details": bool(detail_differences(expected.training, found.training, FIRST_DETAILS, LATER_DETAILS)),
        "gradients": bool(gradient_differences(expected.gradients, found.gradients, GRADIENTS)),
    }
    assert {name for name, differs in disagreements.items() if differs} == seen
