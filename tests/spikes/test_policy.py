"""From a finding to an amendment: the declared policy, and K2-65B's own history replayed by it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import k2_megatron.train.spikes.rollback as rollback
from k2_megatron.config import Config, load_config
from k2_megatron.config.schema import Spikes
from k2_megatron.data.amendments import amended
from k2_megatron.data.recipe import chunk_order, load_recipe
from k2_megatron.data.schedule import Amendment, Schedule
from k2_megatron.train.checkpoints.manifest import CheckpointError
from k2_megatron.train.spikes.detector import Finding, State, observe
from k2_megatron.train.spikes.policy import Decision, amendment, decide
from k2_megatron.train.spikes.rollback import fitting_amendment

ROLLBACK = Spikes(policy="rollback", scope="chunk", max_rollbacks=2)
MALIGNANT = Finding("malignant", 250, 150, 154, 30.0, 9.0, 1.5, 0.3)


@pytest.mark.parametrize(
    ("settings", "kind", "checkpoints", "done", "expected"),
    [
        (Spikes(), "malignant", [100, 200], 0, ("watch", None)),
        (ROLLBACK, "spike", [100, 200], 0, ("watch", None)),
        (ROLLBACK, "benign", [100, 200], 0, ("watch", None)),
        (ROLLBACK, "malignant", [50, 100, 149, 150, 200], 0, ("go back", 149)),  # that of step 150 holds its update
        (ROLLBACK, "malignant", [100, 200], 1, ("go back", 100)),
        (ROLLBACK, "malignant", [100, 200], 2, ("stop", None)),
        (ROLLBACK, "malignant", [150, 200], 0, ("stop", None)),
    ],
)
def test_decision(settings, kind, checkpoints, done, expected):
    finding = Finding(**{**vars(MALIGNANT), "kind": kind})
    decision = decide(settings, finding, checkpoints, done)
    assert (decision.kind, decision.checkpoint_step) == expected


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, told) makes this process one of the ranks; rank 0 leaves what it tells in `told`."""

    def become(rank: int, told: list) -> None:
        def broadcast(values):
            told[:] = values if rank == 0 else told
            values[:] = told

        ranks = SimpleNamespace(get_rank=lambda: rank, broadcast_object_list=broadcast)
        monkeypatch.setattr(rollback, "distributed", ranks)

    return become


def refusing(times: int, monkeypatch) -> None:
    """The folder of checkpoints cannot be listed so many times."""
    tried = []

    def listing(_folder):
        tried.append(1)
        if len(tried) <= times:
            raise CheckpointError("checkpoints cannot be read (Input/output error); restore access to it")
        return [Path("step_00000100"), Path("step_00000200")]

    monkeypatch.setattr(rollback, "complete_checkpoints", listing)


def decided(spikes: Spikes, finding: Finding, retry_seconds: float = 0.01) -> Decision:
    checkpoint = SimpleNamespace(retry_seconds=retry_seconds)
    data = SimpleNamespace(ledger=SimpleNamespace(amendments=[]))
    return rollback.decide_together(SimpleNamespace(spikes=spikes, checkpoint=checkpoint), finding, Path("x"), data)


def test_where_nothing_is_done_no_checkpoint_is_looked_for(monkeypatch, as_rank):
    refusing(10**6, monkeypatch)
    as_rank(0, [])
    assert decided(Spikes(), MALIGNANT).kind == "watch"
    for kind in ("spike", "benign"):
        assert decided(ROLLBACK, Finding(**{**vars(MALIGNANT), "kind": kind})).kind == "watch"


def test_folder_that_cannot_be_read_is_tried_again_and_every_rank_hears_what_comes_of_it(monkeypatch, as_rank, capsys):
    for refused, kind in ((1, "go back"), (10**6, "stop")):
        refusing(refused, monkeypatch)
        told: list = []
        as_rank(0, told)
        decision = decided(ROLLBACK, MALIGNANT)
        as_rank(1, told)
        assert decided(ROLLBACK, MALIGNANT) == decision
        assert decision.kind == kind
        assert "cannot be read (Input/output error); restore access to it; trying again in" in capsys.readouterr().err
    assert decision.reason.startswith("malignant spike: began at step 150, called at 154; going back is not possible: ")


class ChunkRows:
    """A feed of one row a sample."""

    def __init__(self, schedule: Schedule, rows_per_chunk: int | None = None) -> None:
        self.schedule, self.order = schedule, SimpleNamespace(rows_per_chunk=rows_per_chunk)

    def after(self, fields: dict) -> Schedule:
        return amended(self.schedule, fields, self.order.rows_per_chunk, fields["sequence_length"])

    def row_range(self, first_sample: int, count: int) -> tuple[int, int]:
        return first_sample, count


def small_k2(steps_per_chunk: int, batch: int) -> Config:
    """K2's 360 chunks with few steps each."""
    return load_config(
        "examples/k2_65b/stage1.toml",
        [
            f"train.steps={360 * steps_per_chunk}",
            f"train.global_batch={batch}",
            f"checkpoint.every_steps={steps_per_chunk}",
            "checkpoint.chunks=",
            "train.compare_replicas_every_steps=",
            "train.micro_batch=1",
            "parallel.ranks=32",
            "optimizer.warmup_steps=10",
            "spikes.policy=rollback",
            "spikes.scope=chunk",
            "spikes.max_rollbacks=2",
            "spikes.window_steps=32",
            "spikes.benign_steps=20",
        ],
    )


def test_batches_are_taken_from_the_checkpoint_to_the_trip():
    config = small_k2(steps_per_chunk=30, batch=4)
    config = config.model_copy(update={"spikes": Spikes(policy="skip", scope="batches", max_rollbacks=1)})
    decision = decide(config.spikes, MALIGNANT, [120], 0)
    fields = amendment(config, ChunkRows(Schedule([(0, 43200)])), None, decision, MALIGNANT)
    assert (fields["action"], fields["from_sample"], fields["samples"]) == ("skip", 480, (480, 616))
    again = amendment(config, ChunkRows(Schedule([(0, 43200)])), None, decision, MALIGNANT, times_before=2)
    assert again["samples"] == (480, 480 + 4 * 136), "a bad stretch that goes on is passed in few steps"
    with pytest.raises(ValueError, match=r"needs data\.train to be a plan"):
        amendment(
            config.model_copy(update={"spikes": ROLLBACK}), ChunkRows(Schedule([(0, 9)])), None, decision, MALIGNANT
        )


@pytest.mark.parametrize(
    ("policy", "longer", "trip", "times_before", "taken"),
    [
        ("rollback", 0, 10, 0, 40),
        ("rollback", 0, 10, 1, 80),
        ("rollback", 0, 10, 2, 80),  # 160 are more than there are
        ("rollback", 0, 15, 1, 60),  # 120 are all there are, and moving them moves nothing
        ("rollback", 0, 20, 3, 80),
        ("rollback", 60, 15, 1, 120),  # a plan that is longer than the run
        ("rollback", 0, 30, 1, "all that is left of the data"),
        ("skip", 100, 10, 1, 80),
        ("skip", 100, 10, 2, 80),  # the run would come to want 60 rows
        ("skip", 100, 29, 1, "skipping would leave 43184 rows, too few"),
    ],
)
def test_near_the_end_of_the_data_as_much_is_taken_as_leaves_something(policy, longer, trip, times_before, taken):
    """30 steps, of 120 rows, before the run's end."""
    config = small_k2(steps_per_chunk=30, batch=4)
    config = config.model_copy(update={"spikes": Spikes(policy=policy, scope="batches", max_rollbacks=9)})
    good, end = 359 * 30, 360 * 120 + longer
    finding = Finding("malignant", good + 30, good + 2, good + trip, 30.0, 9.0, 1.5, 0.3)
    data = SimpleNamespace(train=ChunkRows(Schedule([(0, end)])))
    arguments = (config, finding, decide(config.spikes, finding, [good], 0), data, times_before)
    if isinstance(taken, str):
        with pytest.raises(ValueError, match=taken):
            fitting_amendment(*arguments)
    else:
        assert fitting_amendment(*arguments)["samples"] == (4 * good, 4 * good + taken)


def test_last_chunk_is_not_moved_to_where_it_is():
    config, finding = small_k2(30, 4), Finding("malignant", 10795, 10775, 10780, 30.0, 9.0, 1.5, 0.3)
    decision = decide(config.spikes, finding, [10740, 10770], 0)
    for order in ([*range(360)], [*range(358), 359, 358]):
        data = SimpleNamespace(train=ChunkRows(Schedule.of_chunks(order, 120), 120))
        with pytest.raises(ValueError, match="all that is left of the data"):
            fitting_amendment(config, finding, decision, data)
    data = SimpleNamespace(train=ChunkRows(Schedule.of_chunks(range(361), 120), 120))
    assert fitting_amendment(config, finding, decision, data)["chunk"] == 359


def test_the_history_of_k2_65b():
    """Chunks 160 and 186 make the loss spike, wherever they come before the end: what K2's people did by hand, moving
    both to the end of a list in the entry script, comes out by itself, in the published order."""
    steps_per_chunk, batch = 30, 4
    config = small_k2(steps_per_chunk, batch)
    rows_per_chunk = steps_per_chunk * batch
    published = load_recipe("examples/k2_65b/data_stage1.toml").order  # as it was in the end
    before = published.model_copy(update={"last": ()})
    schedule = Schedule.of_chunks(chunk_order(before, 360), rows_per_chunk)
    step, state, states, made = 0, State(), {0: State()}, []
    while step < config.train.steps:
        chunk = int(schedule.positions(config.consumed_samples_at(step), 1)[0]) // rows_per_chunk
        step += 1
        bad = chunk in (160, 186) and step <= 358 * steps_per_chunk
        # K2's spikes stayed up for many chunks; here the level rises with the bad chunk
        wobble = ((step * 7919) % 101 - 50) / 5000
        state, finding = observe(state, config.spikes, step, 1.6 + wobble + (0.4 if bad else 0.0), 0.3 + wobble)
        if finding:
            decision = decide(config.spikes, finding, sorted(states)[1:], len(made))
            if decision.kind == "go back":
                fields = amendment(config, ChunkRows(schedule), rows_per_chunk, decision, finding)
                made.append(fields)
                entry = Amendment(fields["action"], fields["from_sample"], fields["chunk"])
                schedule = schedule.amended(entry, rows_per_chunk)
                step = decision.checkpoint_step
                states = {number: kept for number, kept in states.items() if number <= step}
                state = states[step]
                continue
        if step % steps_per_chunk == 0:
            states[step] = state
    assert [(fields["chunk"], fields["from_sample"] // rows_per_chunk) for fields in made] == [(160, 160), (186, 185)]
    trained = [int(schedule.positions(number * rows_per_chunk, 1)[0]) // rows_per_chunk for number in range(360)]
    assert trained == chunk_order(published, 360)
    assert trained[-5:] == [357, 358, 359, 160, 186]
