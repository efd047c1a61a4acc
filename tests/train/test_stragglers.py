"""Who is slow is seen in the seconds of all ranks; equal slowness names nobody."""

from statistics import median

import numpy as np
import pytest

from k2_megatron.train.stragglers import _of_themselves, slowest

NAMES = ("data", "forward", "backward", "optimizer", "checkpoint")


def ranks(*seconds: tuple[float, ...]) -> list[dict[str, float]]:
    return [dict(zip(NAMES, of_rank, strict=True)) for of_rank in seconds]


ALIKE = (0.01, 1.0, 2.0, 0.1, 0.0)


@pytest.mark.parametrize(
    ("by_rank", "stages", "expected"),
    [
        (ranks(ALIKE, ALIKE, ALIKE, ALIKE), [0, 0, 0, 0], None),
        (ranks(ALIKE, (0.01, 1.4, 2.8, 0.14, 0.0), ALIKE), [0, 0, 0], None),
        (ranks(ALIKE, (0.01, 2.0, 2.0, 0.1, 0.0), ALIKE), [0, 0, 0], (1, "forward", 2.0)),
        (ranks(ALIKE, ALIKE, (0.01, 1.6, 6.0, 0.1, 0.0)), [0, 0, 0], (2, "backward", 3.0)),
        (ranks((3.0, 1.0, 2.0, 0.1, 0.0), ALIKE), [0, 0], (0, "data", 300.0)),
        # Less than a twentieth of the step
        (ranks((0.05, 1.0, 2.0, 0.1, 0.0), ALIKE), [0, 0], None),
        # The last stage has the output layer: it is compared with its own kind
        (ranks(ALIKE, ALIKE, (0.0, 3.0, 6.0, 0.1, 0.0), (0.0, 3.0, 6.0, 0.1, 0.0)), [0, 0, 1, 1], None),
        (ranks(ALIKE, (0.0, 3.0, 6.0, 0.1, 0.0)), [0, 1], None),
        # Alone in its stage: with the other stages, of which the first reads rows
        (ranks((0.5, 1.0, 2.0, 0.1, 0.0), ALIKE, (0.01, 2.0, 2.0, 0.1, 0.0), (0.0, 3.0, 6.0, 0.1, 0.0)), [0, 1, 2, 3],
         (2, "forward", 2.0)),
    ],
)  # fmt: skip
def test_slowest(by_rank, stages, expected):
    found = slowest(by_rank, stages, names(by_rank))
    assert (found and (found.rank, found.phase, found.ratio)) == expected


def names(by_rank) -> list[str]:
    return [f"rank {number}" for number in range(len(by_rank))]


LAST = (0.01, 3.0, 6.0, 0.1, 0.0)


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        (ranks(ALIKE, LAST), None),
        (ranks(ALIKE, (0.01, 3.0, 12.0, 0.1, 0.0)), (1, "backward", 2.0)),
        (ranks((0.01, 2.0, 2.0, 0.1, 0.0), LAST), (0, "forward", 2.0)),
        # A batch three times as large, storage that is slow for all
        (ranks((0.03, 3.0, 6.0, 0.1, 0.0), (0.03, 9.0, 18.0, 0.1, 0.0)), None),
        (ranks((0.51, 1.0, 2.0, 0.1, 0.0), (0.51, 3.0, 6.0, 0.1, 0.0)), None),
    ],
)
def test_rank_alone_in_its_stage_is_compared_with_itself(by_rank, expected):
    earlier = [ranks(ALIKE, LAST)] * 4
    found = slowest(by_rank, [0, 1], names(by_rank), earlier)
    assert (found and (found.rank, found.phase, found.ratio)) == expected
    assert found is None or (found.before and "times its own earlier median" in found.words)
    assert slowest(by_rank, [0, 1], names(by_rank), earlier[:3]) is None


SHARE = 0.1  # of a stage's layers: an output layer whose FLOPs are so many may take 1.3 times a stage


@pytest.mark.parametrize(
    ("by_rank", "stages", "expected"),
    [
        (ranks(ALIKE, ALIKE, (0.0, 1.3, 2.6, 0.13, 0.0)), [0, 1, 2], None),
        (ranks(ALIKE, ALIKE, (0.0, 1.9, 3.8, 0.13, 0.0)), [0, 1, 2], None),
        (ranks(ALIKE, ALIKE, (0.0, 2.0, 6.5, 0.13, 0.0)), [0, 1, 2], (2, "backward", 2.5)),
        (ranks(ALIKE, (0.0, 2.6, 2.0, 0.13, 0.0)), [0, 1], (1, "forward", 2.0)),
        # The first of two stages has less to do than the last
        (ranks((0.5, 2.0, 2.0, 0.1, 0.0), (0.0, 1.2, 2.4, 0.1, 0.0)), [0, 1], (0, "forward", 1.67)),
        (ranks((0.5, 1.7, 2.0, 0.1, 0.0), (0.0, 1.2, 2.4, 0.1, 0.0)), [0, 1], None),
        (ranks(ALIKE, ALIKE, (0.0, 1.0, 9.0, 0.1, 0.0), (0.0, 1.0, 9.0, 0.1, 0.0)), [0, 0, 1, 1], None),
        (ranks(ALIKE), [0], None),  # nobody to be compared with
    ],
)
def test_rank_alone_in_the_last_stage_is_slow_from_the_start(by_rank, stages, expected):
    """In each of four reports, the first of the run."""
    found = slowest(by_rank, stages, names(by_rank), [by_rank] * 3, SHARE)
    assert (found and (found.rank, found.phase, found.ratio)) == expected
    assert slowest(by_rank, stages, names(by_rank), [by_rank] * 2, SHARE) is None, "too few reports"
    alike = ranks(*[ALIKE] * len(by_rank))
    assert slowest(by_rank, stages, names(by_rank), [by_rank, by_rank, alike], SHARE) is None, "not in a row"


def test_stage_that_is_slow_as_a_whole_is_found():
    earlier = [ranks(ALIKE, ALIKE, LAST, LAST)] * 4
    slow = (0.01, 2.0, 4.0, 0.1, 0.0)
    found = slowest(ranks(slow, slow, LAST, LAST), [0, 0, 1, 1], ["0", "1", "2", "3"], earlier)
    assert (found.rank, found.phase, found.before) == (0, "backward", True)


def test_phase_that_seldom_takes_place_is_compared_with_the_times_it_did():
    """Most reports hold no save; each save would be slow beside none, and hide the rank that is slow."""
    saving, slow = (0.01, 1.0, 2.0, 0.1, 5.0), (0.01, 1.0, 4.0, 0.1, 5.0)
    without = [ranks(ALIKE, LAST)] * 8
    by_rank = ranks(saving, (*LAST[:4], 5.0))
    assert slowest(by_rank, [0, 1], names(by_rank), without) is None
    found = slowest(ranks(slow, (*LAST[:4], 5.0)), [0, 1], names(by_rank), without)
    assert (found.rank, found.phase, found.ratio, found.before) == (0, "backward", 2.0, True)
    # Four saves are enough to know how long one takes, among as many reports without
    earlier = [*without, *[by_rank] * 4]
    assert slowest(by_rank, [0, 1], names(by_rank), earlier) is None
    found = slowest(ranks((*saving[:4], 12.0), (*LAST[:4], 5.0)), [0, 1], names(by_rank), earlier)
    assert (found.rank, found.phase, found.ratio, found.before) == (0, "checkpoint", 2.4, True)


def itself_by_definition(rank: int, by_rank: list, earlier: list) -> dict[str, float]:
    usual = {}
    for phase in NAMES:
        took_place = [report for report in earlier if report[rank][phase] > 0]
        if len(took_place) < 4:
            continue
        medians = [median(report[other][phase] for report in took_place) for other in range(len(by_rank))]
        others = [other for other in range(len(by_rank)) if other != rank and medians[other] > 0]
        grown = [by_rank[other][phase] / medians[other] for other in others]
        usual[phase] = medians[rank] * max(1.0, median(grown) if grown else 1.0)
    return usual


@pytest.mark.parametrize("ranks_of_it", [2, 3, 5, 8])
def test_medians_of_all_ranks_at_once_are_those_of_each(ranks_of_it):
    for seed in range(20):
        random = np.random.default_rng(seed)
        values = random.integers(1, 5, (12, ranks_of_it, len(NAMES))) * 0.5  # equal ones among them
        values *= random.random(values.shape) < random.choice([0.3, 0.7, 1.0], (1, 1, len(NAMES)))  # some take no time
        reports = [ranks(*of_ranks) for of_ranks in values.tolist()]
        by_rank, earlier = reports[0], reports[1:]
        expected = [itself_by_definition(rank, by_rank, earlier) for rank in range(ranks_of_it)]
        found = _of_themselves(by_rank, earlier)
        assert [{phase: of[phase] for phase in NAMES if phase in of} for of in found] == [
            pytest.approx(of) for of in expected
        ]


def test_cost_of_a_report_does_not_grow_with_the_square_of_the_ranks():
    """480 ranks took 2.2 s of every rank's processor: earlier reports were read again for each rank."""
    read = []

    class Counted(dict):
        def __getitem__(self, phase):
            read.append(phase)
            return super().__getitem__(phase)

    by_rank = ranks(*[ALIKE] * 32)
    earlier = [[Counted(seconds) for seconds in by_rank] for _ in range(16)]
    assert slowest(by_rank, [rank // 8 for rank in range(32)], names(by_rank), earlier, SHARE) is None
    assert len(read) == 16 * 32 * len(NAMES)
