"""Where the time went: journals whose answer is known by arithmetic."""

import pytest
from journals import event, resume, start, step

from k2_megatron.report.goodput import goodput_of, parts_of
from k2_megatron.report.reading import told_of

# A life of 100 s: steps 1 to 4 (one of them doubted once), an evaluation, a save; killed in step 5. 50 s later a life
# of 50 s that goes on from step 3, goes back to 3 by itself and is stopped by a hang.
JOURNAL = [
    start(0),
    step(1, 12, 2.0),  # 10 s until it began
    step(2, 15, 2.0),  # 1 s between
    event("incident", 20, kind="in doubt", step=3, made_again=True),  # 5 s for nothing
    step(3, 24, 4.0),
    event("evaluation", 31, step=3, held_out_loss=4.0),  # 7 s
    event("checkpoint", 41, step=3, stall_seconds=9.0, seconds=9.0, bytes=1),  # and 1 s between
    step(4, 100, 59.0),
    event("amendment", 130, reason="by hand"),  # to the run that lies still
    start(150),  # down for 50 s
    resume(153, 3),
    step(4, 160, 4.0),  # 6 s until it began
    event("spike", 161, step=4, kind="malignant", decision="go back"),  # 1 s between
    event("rollback", 166, from_step=4, step=3, amendment=None),  # 5 s, and until the next step begins
    step(4, 173, 4.0),  # 3 s
    event("incident", 200, kind="hang", step=4),  # 27 s
]
PARTS = {
    "kept": 2 + 2 + 4 + 4,
    "repeated": 59 + 4,
    "in vain": 5,
    "starting": 10 + 6,
    "saving": 9,
    "evaluation": 7,
    "going back": 5 + 3,
    "hung": 27,
    "down": 50,
    "between": 1 + 1 + 1,
}


def time_of(events):
    told = told_of(events)
    seconds = told.columns["step_seconds"]
    return told, parts_of(told.account, seconds, told.stands), goodput_of(told.account, seconds, told.stands)


def test_every_second_belongs_to_the_part_that_arithmetic_says():
    told, parts, goodput = time_of(JOURNAL)
    assert told.account.wall == 200
    assert parts == pytest.approx(PARTS)
    assert sum(PARTS.values()) == 200
    assert goodput == pytest.approx(12 / 200)


def test_what_is_done_by_hand_to_a_stopped_run_is_no_time_of_it():
    by_hand = event("rollback", 500, from_step=4, step=3, amendment=None, reason="by hand: to see it again")
    told, parts, _ = time_of([*JOURNAL, by_hand])
    assert told.account.wall == 200, "the run ended before"
    assert parts["kept"] == 8, "step 4 is taken back all the same"
    assert parts["repeated"] == 67


def test_a_journal_without_a_start_has_no_goodput():
    assert time_of([])[2] is None
    assert time_of([step(1, 5)])[2] is None


def test_a_save_before_the_first_step_is_not_counted_twice():
    save = event("checkpoint", 8, step=0, stall_seconds=3.0, seconds=3.0, bytes=1)
    _, parts, _ = time_of([start(0), save, step(1, 12, 2.0)])
    assert parts == pytest.approx({"kept": 2, "starting": 7, "saving": 3})
