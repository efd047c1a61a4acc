"""evaluations.jsonl: torn lines, numbers that are none, identity; and the figures that stand in it."""

import math

import pytest

from k2_megatron.evaluate.figures import loss_figures, mean_figures
from k2_megatron.evaluate.results import append_result, identity_of, read_results


def result(step, **more):
    text = {"name": "held_out", "kind": "rows", "hash": "ab"}
    found = {"step": step, "checkpoint": {"manifest": f"m{step}"}, "text": text, "settings": {"rows": 8}}
    return {**found, "figures": {"loss": 1.5}, **more}


def test_a_torn_line_costs_itself_alone(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    assert read_results(path) == []
    append_result(path, result(1))
    append_result(path, result(2, figures={"loss": math.nan}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # a kill in the midst of the second
    assert [one["step"] for one in read_results(path)] == [1]
    append_result(path, result(3))
    assert [one["step"] for one in read_results(path)] == [1, 3]
    path.write_bytes(whole + b'{"event": "evaluation", "step": 9}\n[]\n')
    steps = read_results(path)
    assert [one["step"] for one in steps] == [1, 2] and math.isnan(steps[1]["figures"]["loss"])


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        append_result(tmp_path / "nowhere" / "evaluations.jsonl", result(1))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "folder")


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": {"manifest": "m2"}},
        {"settings": {"rows": 9}},
        {"text": {"name": "held_out", "kind": "rows", "hash": "cd"}},
        {"text": {"name": "more", "kind": "rows", "hash": "ab"}},
    ],
)
def test_identity_tells_apart_what_gives_other_figures(other):
    assert identity_of(result(1, layout="tp2")) == identity_of(result(1, layout="tp1"))
    assert identity_of(result(1)) != identity_of(result(1, **other))


def test_loss_is_over_tokens_and_its_error_over_units():
    equal = loss_figures([4.0, 8.0, 6.0], [2, 2, 2])
    assert equal["loss"] == 3.0 and equal["perplexity"] == pytest.approx(math.exp(3.0))
    assert equal["loss_error"] == pytest.approx(mean_figures("loss", [2.0, 4.0, 3.0])["loss_error"])
    unequal = loss_figures([1.0, 9.0], [1, 3], 8)
    assert unequal["loss"] == 2.5 and unequal["bits_per_byte"] == pytest.approx(10 / math.log(2) / 8)
    assert loss_figures([1.0], [1])["loss_error"] is None
    assert loss_figures([math.inf, 1.0], [1, 1])["perplexity"] == math.inf
    assert math.isnan(loss_figures([math.nan, 1.0], [1, 1])["perplexity"])
