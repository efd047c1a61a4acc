"""The learning rate as a pure function of the step: its value at every edge, and its shape between them."""

import itertools

import pytest
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.train.schedule import learning_rate_at

PEAK, FLOOR = 4e-3, 4e-4


@pytest.fixture
def rates(small_config):
    """rates(schedule, steps, warmup, decay) -> the learning rate of every step."""

    def every(schedule: str, steps: int, warmup: int, decay: int | None = None) -> list[float]:
        settings = {
            "optimizer.schedule": schedule,
            "optimizer.learning_rate": PEAK,
            "optimizer.min_learning_rate": "" if schedule == "constant" else FLOOR,
            "optimizer.warmup_steps": warmup,
            "optimizer.decay_steps": decay or "",
            "train.steps": steps,
            "train.evaluate_every_steps": "",
            "train.evaluate_batches": "",
            "data.held_out": "",
        }
        config = load_config(small_config, overrides(settings))
        return [learning_rate_at(config, step) for step in range(steps)]

    return every


@pytest.mark.parametrize(("schedule", "decay"), [("cosine", None), ("wsd", 20), ("constant", None)])
def test_warmup_is_linear_and_ends_at_the_peak(rates, schedule, decay):
    found = rates(schedule, 100, 4, decay)
    assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert found[4] == pytest.approx(PEAK)
    assert max(found) == pytest.approx(PEAK)


def test_cosine_ends_at_the_floor_and_halves_in_the_middle(rates):
    found = rates("cosine", 105, 4)
    assert found[-1] == pytest.approx(FLOOR)
    assert found[54] == pytest.approx((PEAK + FLOOR) / 2)
    assert found[4 + 25] == pytest.approx(FLOOR + (PEAK - FLOOR) * (2 + 2**0.5) / 4)  # cos(pi / 4)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[4:]))


def test_wsd_stays_at_the_peak_and_falls_in_a_line_to_the_floor(rates):
    found = rates("wsd", 100, 4, 20)
    assert found[4:80] == [PEAK] * 76
    falls = [earlier - later for earlier, later in itertools.pairwise(found[79:])]
    assert falls == pytest.approx([(PEAK - FLOOR) / 20] * 20)
    assert found[-1] == pytest.approx(FLOOR)


def test_constant_stays_at_the_peak(rates):
    assert rates("constant", 50, 0) == [PEAK] * 50


def test_without_warmup_the_first_step_has_the_peak(rates):
    assert rates("cosine", 10, 0)[0] == rates("wsd", 10, 0, 5)[0] == PEAK


def test_shortest_runs_have_a_rate(rates):
    assert rates("cosine", 1, 0) == [PEAK]
    assert rates("cosine", 2, 1) == [PEAK, PEAK]
    assert rates("wsd", 1, 0, 1) == [FLOOR]


def test_k2_reaches_its_published_rates():
    config = load_config("examples/k2_65b/stage1.toml")
    assert learning_rate_at(config, config.optimizer.warmup_steps - 1) == pytest.approx(1.5e-4)
    assert learning_rate_at(config, config.train.steps - 1) == pytest.approx(1.5e-5)
