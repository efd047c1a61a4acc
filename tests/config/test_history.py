"""A run that goes on under another batch or length: every step's samples and tokens, before the change and after."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2_megatron.config import Config, load_config, load_run_config
from k2_megatron.config.batch import carried_over, stages_of_saved
from k2_megatron.config.changes import changes, keys_given
from k2_megatron.data.ledger import Ledger
from k2_megatron.train.position import KEYS, change_at, going_on_from, taken_before

TOY = "examples/toy/toy.toml"  # global batch 16, 256 tokens
RAMP = "train.batch_ramp={start=4, increment=4, samples=96}"  # 4 from step 0, 8 from 8, 12 from 12, 16 from 15


def test_a_changed_length_goes_on_at_the_next_whole_sample():
    assert carried_over(1000, 2048, 8192) == 250
    assert carried_over(1001, 2048, 8192) == 251  # 3/4 of a sample is left out, nothing twice
    assert carried_over(1001, 8192, 2048) == 4004
    assert carried_over(1001, 2048, 2048) == 1001


def gone_on(lives: list[tuple[int, int, int]], ramp: str | None = None) -> Config:
    """The configuration of the last of several lives (steps, batch, length), each resumed from a checkpoint of the one
    before, as a start reads it: from the manifest's tables."""
    config, reached = None, 0
    for steps, batch, length in lives:
        given = [f"train.global_batch={4 * batch}", f"model.sequence_length={length}"]
        fresh = load_config(TOY, [*given, *([ramp] if ramp and config is None else [])])
        saved = config and stages_of_saved(config.model_dump(exclude_none=True))
        config = fresh.going_on(reached, saved) if saved else fresh
        reached += steps
    assert config is not None
    return config


@settings(deadline=None, max_examples=60)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([16, 32, 48, 64, 96, 256])),
        min_size=1,
        max_size=5,
    ),
    ramp=st.sampled_from([None, "train.batch_ramp={start=4, increment=4, samples=40}"]),
)
def test_no_token_is_trained_twice_and_less_than_a_sample_left_out(lives, ramp):
    """Against walking through the tokens step by step."""
    if ramp and lives[0][1] < 2:
        lives = [(lives[0][0], 2, lives[0][2]), *lives[1:]]
    config = gone_on(lives, ramp)
    first = load_config(
        TOY,
        [f"train.global_batch={4 * lives[0][1]}", f"model.sequence_length={lives[0][2]}", *([ramp] if ramp else [])],
    )
    step = token = trained = 0
    for number, (steps, batch, length) in enumerate(lives):
        for _ in range(steps):
            size = first.global_batch_at(step) if number == 0 else 4 * batch
            begin = config.consumed_samples_at(step) * length
            assert 0 <= begin - token < length, "less than one sample is left out"
            assert (config.global_batch_at(step), config.sequence_length_at(step)) == (size, length)
            assert config.consumed_tokens_at(step) == trained
            step, token, trained = step + 1, begin + size * length, trained + size * length
    assert config.consumed_tokens_at(step) == trained == sum(config.tokens_by_length_at(step).values())
    assert config.position_at(step) * length == token
    if number > 0 and lives[-1][1:] != lives[-2][1:]:
        assert config.total_samples == token // length + 4 * batch * (240 - step)


def test_without_a_change_nothing_is_recorded():
    for overrides in ([], [RAMP]):
        config = load_config(TOY, overrides)
        for step in (1, 8, 9, 15, 100):
            assert config.going_on(step, config.stages) == config
    assert "history" not in load_config(TOY).to_toml()
    twice = gone_on([(5, 4, 256), (3, 8, 256)])
    assert [stage.first_step for stage in twice.train.history] == [0, 5]
    assert gone_on([(5, 4, 256), (3, 8, 256), (2, 8, 256), (1, 8, 256)]).train.history == twice.train.history


def test_going_back_to_before_the_change_moves_it_there():
    config = gone_on([(10, 4, 256), (5, 8, 512)])
    back = config.going_on(6, config.stages)
    assert [tuple(stage.model_dump().values()) for stage in back.train.history] == [(0, 0, 16, 256), (6, 48, 32, 512)]
    assert config.going_on(10, config.stages) == config == config.going_on(12, config.stages)


def test_a_change_ends_a_ramp_and_a_length_leaves_it_its_steps():
    ramped = load_config(TOY, [RAMP])
    ended = load_config(TOY, ["train.global_batch=24"]).going_on(10, ramped.stages)
    assert [ended.global_batch_at(step) for step in (7, 8, 9, 10, 200)] == [4, 8, 8, 24, 24]
    assert [ended.consumed_samples_at(step) for step in (8, 10, 11)] == [32, 48, 72]
    over = load_config(TOY).going_on(30, ramped.stages)
    assert [over.consumed_samples_at(step) for step in (9, 20, 40)] == [
        ramped.consumed_samples_at(step) for step in (9, 20, 40)
    ]
    longer = load_config(TOY, [RAMP, "model.sequence_length=512"]).going_on(9, ramped.stages)
    assert [longer.global_batch_at(step) for step in (8, 9, 11, 12, 15)] == [8, 8, 8, 12, 16]
    assert [longer.consumed_samples_at(step) for step in (9, 12, 15)] == [20, 20 + 3 * 8, 20 + 3 * 8 + 3 * 12]
    later = load_config(TOY, [RAMP, "model.sequence_length=512"]).going_on(13, longer.stages)
    assert later.stages == longer.stages


def test_copies_of_tensor_ranks_alone_may_be_compared():
    config = load_config(TOY, ["train.compare_replicas_every_steps=5"])
    assert (config.parallel.tensor, config.parallel.data, config.train.compare_replicas_every_steps) == (2, 1, 5)


def test_a_ramp_that_grows_is_no_change():
    """Length changed at step 3, resumed at 8, where the ramp grows, and at 10."""
    settings = [RAMP, "model.sequence_length=512"]
    changed = load_config(TOY, settings).going_on(3, load_config(TOY, [RAMP]).stages)
    for step in (8, 10):
        later = load_config(TOY, settings).going_on(step, changed.stages)
        assert [stage.first_step for stage in later.train.history] == [0, 3, 8]
        assert later.last_change == later.train.history[1]
        assert change_at(later, step) is None
    assert change_at(changed, 3)["sequence_length"] == [256, 512]
    assert load_config(TOY, settings).last_change is None


def test_a_change_during_a_ramp_is_known_again(tmp_path):
    ledger = Ledger(tmp_path)
    config = load_config(TOY, [RAMP, "model.sequence_length=512"])
    assert taken_before(config, ledger) == set()
    ledger.append("change", from_step=3, from_sample=6, global_batch=4, sequence_length=512)
    assert taken_before(config, ledger) == set(KEYS)
    assert taken_before(load_config(TOY, [RAMP]), ledger) == set()


def test_back_at_an_imported_checkpoint_nothing_of_the_past_is_left():
    """A spike rollback to where the run began, after its length was changed."""
    planned = load_config(TOY, ["model.sequence_length=128"])
    config = planned.going_on(100, load_config(TOY).stages)
    assert config.train.history is not None
    assert going_on_from(config, {"step": 0, "data": None, "config": {}}) == planned


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["train.global_batch=32"], "train.global_batch: it ends the ramp: give --set train.batch_ramp= as well"),
        (["train.global_batch=32", "train.batch_ramp="], None),
        (["train.batch_ramp="], None),
        (
            ["train.batch_ramp={start=8, increment=4, samples=96}"],
            "train.batch_ramp: a run that has begun can only end it: give --set train.batch_ramp=",
        ),
    ],
)
def test_what_may_become_of_a_ramp(overrides, refused):
    was, now = load_config(TOY, [RAMP]), load_config(TOY, [RAMP, *overrides])
    found = changes(now.model_dump(exclude_none=True), was.model_dump(exclude_none=True), keys_given(overrides))
    assert [f"{change.key}: {change.reason}" for change in found if change.outcome == "refused"] == (
        [refused] if refused else []
    )


def test_a_history_is_read_from_the_runs_own_files_alone(tmp_path):
    config = gone_on([(10, 4, 256), (5, 8, 512)])
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_run_config(path) == config
    assert Config.model_validate(config.model_dump(exclude_none=True)) == config
    assert load_config(path).train.history is None, "a start has it from the checkpoint"
    with pytest.raises(ValueError, match=r'--set = "train\.history=": is what the run itself writes'):
        load_config(TOY, ["train.history="])


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("first_step = 10,", "first_step = 9,"),
        ("first_sample = 80,", "first_sample = 79,"),
        ("first_step = 0, first_sample = 0,", "first_step = 0, first_sample = 1,"),
        ("global_batch = 32, sequence_length = 512}", "global_batch = 16, sequence_length = 512}"),
        ("global_batch = 16, sequence_length = 256}", "global_batch = 8, sequence_length = 256}"),
        ("global_batch = 32, sequence_length = 512}", "global_batch = 32, sequence_length = 256}"),
    ],
)
def test_an_altered_history_is_refused(tmp_path, was, now):
    path, text = tmp_path / "config.toml", gone_on([(10, 4, 256), (5, 8, 512)]).to_toml()
    assert text.count(was) == 1
    path.write_text(text.replace(was, now))
    with pytest.raises(ValueError, match=r"train\.history = .*: is the run's own record and was altered"):
        load_run_config(path)
    path.write_text(text.replace("first_step = 10,", 'first_step = "ten",'))
    with pytest.raises(ValueError, match=r'train\.history\.first_step = "ten": should be a valid integer'):
        load_run_config(path)
