"""What stands of a journal, and what is left of it when a long run is drawn in buckets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from journals import event, resume, start, step, write_run

from k2_megatron.report.buckets import reduce, running_median, width_for
from k2_megatron.report.lives import KILLED, lives_of
from k2_megatron.report.matrices import COLUMNS, matrices_of
from k2_megatron.report.reading import read_told, told_of
from k2_megatron.runtime.journal import standing_events

KINDS = st.sampled_from(["step", "step", "step", "resume", "rollback", "evaluation", "phases"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(KINDS, st.integers(1, 6)), max_size=30))
def test_what_stands_is_what_the_journal_itself_says_stands(tmp_path_factory, told):
    events = [event(kind, second, step=number, slow=None) for second, (kind, number) in enumerate(told)]
    path = write_run(tmp_path_factory.mktemp("run") / "run", events) / "journal.jsonl"
    found = read_told(path)
    assert found.steps.tolist() == [one["step"] for one in standing_events(path, "step")]
    evaluations = [rare.event["time"] for rare in found.of_kind("evaluation") if rare.stands]
    assert evaluations == [one["time"] for one in standing_events(path, "evaluation")]
    assert found.phases_stand.sum() == len(standing_events(path, "phases"))


@settings(deadline=None)
@given(
    arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e6, 1e6) | st.just(np.nan)),
    st.integers(1, 50),
    st.data(),
)
def test_the_extremes_of_every_bucket_survive_at_their_steps(values, width, data):
    gaps = data.draw(arrays(np.int64, len(values), elements=st.integers(1, 3)))
    steps = np.cumsum(gaps)
    found = reduce(steps, values, width)
    places, drawn = found.extremes
    finite = np.isfinite(values)
    if not finite.any():
        assert len(found) == 0
        return
    first = steps[finite][0]
    for bucket in np.unique((steps[finite] - first) // width):
        inside = finite & ((steps - first) // width == bucket)
        shown = drawn[(places - first) // width == bucket]
        assert shown.max() == values[inside].max()
        assert shown.min() == values[inside].min()
    told = dict(zip(steps.tolist(), values.tolist(), strict=True))
    assert all(told[int(place)] == value for place, value in zip(places, drawn, strict=True))
    assert (np.diff(places) > 0).all()


def test_a_run_of_any_length_has_few_buckets():
    assert width_for(2_000) == 1
    for steps in (2_001, 338_760, 5_000_000):
        assert steps / width_for(steps) <= 1_000


def test_running_median_narrows_at_the_ends():
    assert running_median(np.array([1.0, 9.0, 2.0, 3.0]), 3).tolist() == [1.0, 2.0, 3.0, 3.0]


def test_the_largest_norm_of_a_layer_survives_in_its_column():
    def layers(number):
        norms = [1.0, 2.0, 50.0 if number == 777 else 3.0]
        ends = {"embedding_gradient_norm": 0.5, "output_gradient_norm": 0.25}
        return {"gradient_norm": norms, "activation_rms": [0.1, 0.2, 0.3], **ends}

    events = [start(0), *(step(number, number, layers=layers(number)) for number in range(1, 1_001))]
    events += [resume(2_000, 900), *(step(number, 1_100 + number, layers=layers(1)) for number in range(901, 1_001))]
    told = told_of(events)
    matrix = matrices_of(events, told).layers["gradient_norm"]
    assert matrix.largest.shape[0] == 5
    assert matrix.largest.shape[1] <= COLUMNS
    column = int(np.flatnonzero((matrix.first <= 777) & (matrix.last >= 777))[0])
    assert matrix.largest[:, column].tolist() == [0.5, 1.0, 2.0, 50.0, 0.25]
    assert matrix.median[3, column] == 3.0
    assert (matrix.largest[3] == 50.0).sum() == 1
    assert (np.diff(matrix.first) > 0).all() and matrix.last[-1] == 1_000, "each step once"


def test_ranks_of_two_layouts_share_a_matrix():
    reports = [([1.0, 2.0], [0.5, 0.5]), ([1.0, 1.0, 4.0], [0.0, 0.0, 1.0])]
    seconds = [{"forward": forward, "backward": backward, "checkpoint": [9.0] * 3} for forward, backward in reports]
    events = [event("phases", number, step=number, slow=None, seconds=seconds[number - 1]) for number in (1, 2)]
    found = matrices_of(events, told_of(events))
    assert found.work is not None
    assert found.work.largest[:, 0].tolist()[:2] == [1.5, 2.5]
    assert np.isnan(found.work.largest[2, 0])
    assert found.work.largest[:, 1].tolist() == [1.0, 1.0, 5.0]
    assert found.latest_step == 2


def test_lives_tell_where_they_went_on_and_what_was_changed():
    change = {"key": "train.micro_batch", "was": 2, "now": 4, "outcome": "harmless", "reason": "..."}
    events = [start(0), step(1, 2), step(2, 3), {**start(10), "layout": "tp2-pp1-vp1-cp1-dp1"}]
    events += [resume(11, 1, changes=[change]), step(2, 13), event("stop", 15, step=2, saved_step=2, reason="SIGTERM")]
    first, second = lives_of(told_of(events))
    assert first.end == KILLED
    assert second.end == "SIGTERM"
    assert second.changes == ["layout tp1-pp1-vp1-cp1-dp1 → tp2-pp1-vp1-cp1-dp1", "train.micro_batch: 2 → 4"]
    assert first.ended - first.began == pytest.approx(3)
    assert second.began - first.ended == pytest.approx(7)
