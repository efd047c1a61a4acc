"""Each quantity alone, changed a little in a record: the verdict names it, and nothing else changes."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from k2_megatron.certify import deviations
from k2_megatron.certify.certificate import table
from k2_megatron.certify.perturbed import moved, perturb
from k2_megatron.certify.record import RECORD, read_record
from k2_megatron.certify.verdict import judge, require_reference, rounding_of
from k2_megatron.convert.names import places
from k2_megatron.convert.torch_dist import TorchDistSource, read_manifest
from k2_megatron.runtime.groups import Groups

CHANGES = {float: lambda value: 1.0001 * value, bool: lambda value: not value, str: lambda value: f"another{value}"}


@pytest.fixture(scope="session")
def rounding(reference):
    return rounding_of(read_record(reference))


def change_in(told, keys):
    for key in keys[:-1]:
        told = told[key]
    told[keys[-1]] = CHANGES[type(told[keys[-1]])](told[keys[-1]])


def projection_in(folder, kind, layer=2):
    """The elements of a layer's attention projection in a checkpoint, to be written, and where their first stands."""
    source = TorchDistSource(folder, read_manifest(folder))
    place = next(one for one in places(source.shape) if one.layer == layer and "linear_proj" in one.entry.ours)
    key = source.key(kind, place)
    chunk = max(
        (one for one in source.stored.tensors[key].chunks if one.offsets[0] == layer), key=lambda one: one.offsets
    )
    start = source._payload(key, chunk, source.dtypes[kind]).position
    elements = np.memmap(folder / chunk.file, np.float32, "r+", start, (chunk.sizes[-2], chunk.sizes[-1]))
    return elements, chunk.offsets[-2:]


NUMBERS = {
    deviations.INITIAL_WEIGHTS: (["first_steps", "initial_weights"], 0, "", "how they are initialized"),
    deviations.LAYER_OUTPUTS: (
        ["first_steps", "layers", 1, "activation_rms", 2],
        2,
        "layer 2",
        "first step was the same",
    ),
    deviations.SAMPLE_LOSSES: (
        ["first_steps", "sample_losses", 0, 5],
        1,
        "sample 5 of the batch",
        "the order in which",
    ),
    deviations.LOSS: (["first_steps", "losses", 0], 1, "", "losses of all samples were the same"),
    deviations.LAYER_GRADIENTS: (
        ["first_steps", "layers", 0, "output_gradient_norm"],
        1,
        "output",
        "how the norms are",
    ),
    # Of the second step: by the first's the clipping of its gradients is undone, and all of them would be off.
    deviations.GRADIENT_NORM: (["first_steps", "grad_norms", 1], 2, "", "The first step was the same"),
    deviations.COPIES: (["first_steps", "unlike_copies", 0], 1, "another", "each copy's gradients"),
    deviations.HELD_OUT_LOSS: (["first_steps", "held_out_loss"], 2, "", "look at the evaluation"),
    deviations.RANKS: (["ranks_agree"], 2, "", "ranks tell the same in step 2."),
}


@pytest.mark.parametrize(("quantity", "change"), NUMBERS.items(), ids=NUMBERS)
def test_a_number_that_is_off_by_a_ten_thousandth_is_found(reference, sound, rounding, tmp_path, quantity, change):
    keys, step, where, said = change
    shutil.copytree(sound, tmp_path / "record")
    path = tmp_path / "record" / RECORD
    told = json.loads(path.read_text())
    change_in(told, keys)
    path.write_text(json.dumps(told))
    base, record = read_record(reference), read_record(tmp_path / "record")
    verdict = judge(base, rounding, record)
    assert [(one.quantity, one.step, one.where) for one in verdict.judged if not one.same] == [(quantity, step, where)]
    assert said in table(base, verdict, record).splitlines()[-1]


@pytest.mark.parametrize(
    ("step", "kind", "quantities", "said"),
    [
        (
            1,
            "exp_avg",
            [deviations.GRADIENTS, deviations.GRADIENT_ELEMENTS],
            "the gradients of 1 of 27 parameters are not",
        ),
        (2, "main", [deviations.WEIGHTS, deviations.WEIGHT_ELEMENTS], "look at the update"),
    ],
)
def test_one_wrong_element_is_found_and_placed(reference, sound, rounding, tmp_path, step, kind, quantities, said):
    shutil.copytree(sound, tmp_path / "record")
    elements, (row, column) = projection_in(tmp_path / "record" / f"step_{step:08d}", kind)
    elements[3, 1] += np.abs(elements).max()
    elements.flush()
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    where = f"{name} [{row + 3}, {column + 1}]"
    base, record = read_record(reference), read_record(tmp_path / "record")
    verdict = judge(base, rounding, record)
    assert said in table(base, verdict, record).splitlines()[-1]
    assert [(one.quantity, one.where) for one in verdict.judged if not one.same] == list(
        zip(quantities, [name, where], strict=True)
    )


@pytest.mark.parametrize(
    ("turned", "moved", "counted"),
    [
        (deviations.LEFT_OUT, 0.0, []),
        (deviations.LEFT_OUT + 1, 0.0, [deviations.WEIGHTS, deviations.WEIGHT_ELEMENTS]),
        (0, 1e-5, [deviations.WEIGHTS]),
    ],
    ids=["as many as may turn", "one more", "all by a little"],
)
def test_weights_may_differ_by_a_few_elements_that_adam_turned_and_not_by_a_little_everywhere(
    reference, sound, rounding, tmp_path, turned, moved, counted
):
    shutil.copytree(sound, tmp_path / "record")
    elements, _ = projection_in(tmp_path / "record" / "step_00000002", "main")
    elements[0, :turned] += 2 * (1.5e-3 + 3e-3)  # the learning rates of the two steps
    elements *= 1 + moved
    elements.flush()
    verdict = judge(read_record(reference), rounding, read_record(tmp_path / "record"))
    assert [one.quantity for one in verdict.judged if not one.same] == counted


def test_what_is_not_finite_is_different_and_no_reference(reference, rounding):
    record = read_record(reference)
    broken = replace(record, first_steps=replace(record.first_steps, losses=[math.nan, math.nan]))
    different = [one.quantity for one in judge(record, rounding, broken).judged if not one.same]
    assert different == [deviations.LOSS, deviations.LOSS]
    with pytest.raises(ValueError, match="nothing to compare with"):
        require_reference(broken)
    with pytest.raises(ValueError, match="its own ranks tell different numbers"):
        require_reference(replace(record, ranks_agree=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_moved_by_a_unit_in_the_last_place_at_most(dtype):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = moved(values, torch.Generator().manual_seed(2))
    shifts = ((found.double() - values.double()) / values.double()).abs()
    assert found.dtype == dtype
    assert 0.2 < float((shifts > 0).double().mean()) and float(shifts.max()) <= 2 * torch.finfo(dtype).eps


def test_tensor_ranks_move_what_they_hold_alike_and_others_do_not():
    def output(number=1, **place):
        ranks = {"tensor_rank": 0, "context_rank": 0, "data_rank": 0, "pipeline_rank": 0, **place}
        groups = Groups(None, 0, 4, **ranks, context_size=1, data_size=2, pipeline_size=1)
        model = torch.nn.Identity()
        model.weight = torch.nn.Parameter(torch.zeros(1))
        if number:
            perturb([model], groups, number)
        inputs = torch.linspace(1, 2, 64, requires_grad=True)
        result = model(inputs)
        result.backward(torch.linspace(2, 3, 64))
        return result.detach(), inputs.grad

    result, gradient = output()
    for same, other in zip(output(), output(tensor_rank=1), strict=True):
        assert torch.equal(same, other)
    for other in (output(number=0), output(number=2), output(data_rank=1)):
        assert not torch.equal(result, other[0]) and not torch.equal(gradient, other[1])


def test_repeats_differ_from_the_reference_and_from_each_other(reference):
    record = read_record(reference)
    norms = [record.first_steps.grad_norms, *(repeat.first_steps.grad_norms for repeat in record.perturbed)]
    assert len(norms) == 4 and len({tuple(of_run) for of_run in norms}) == 4
    weights = {repeat.first_steps.initial_weights for repeat in [record, *record.perturbed]}
    assert len(weights) == 1
