"""The straggler report: the slow rank is named with its phase, whoever waits for it; equal slowness names nobody."""

import time

import pytest
from rank_processes import pretrain, results_of
from run_results import events_of
from small_run import overrides

from k2_megatron.train.phases import slowest

NAMES = ("data", "forward", "backward", "optimizer", "checkpoint")
EVERYWHERE = ("data", "forward", "backward", "optimizer")
PAUSE_SECONDS = 0.1  # many times a step of the small run, so that a busy machine does not decide


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
    ],
)
def test_slowest(by_rank, stages, expected):
    found = slowest(by_rank, stages, [f"rank {number}" for number in range(len(by_rank))])
    assert (found and (found.rank, found.phase, found.ratio)) == expected


def pauses(slow: dict[int, tuple[str | tuple[str, ...], tuple[int, ...]]]) -> None:
    """{step: (phase or phases, the ranks that pause in them)}."""
    import torch.distributed as distributed

    import k2_megatron.train.step as step_module
    import pretrain_k2
    from k2_megatron.data.feed import Feed
    from k2_megatron.kernels.adamw import AdamW
    from k2_megatron.model.layer import K2SwiGLU

    now = [0]

    def pause(phase: str) -> float:
        wanted, of_ranks = slow.get(now[0], ("", ()))
        seconds = PAUSE_SECONDS if phase in wanted and distributed.get_rank() in of_ranks else 0.0
        time.sleep(seconds)
        return seconds

    def before(owner, name: str, phase: str) -> None:
        right = getattr(owner, name)

        def with_pause(*arguments, **keywords):
            pause(phase)
            return right(*arguments, **keywords)

        setattr(owner, name, with_pause)

    before(AdamW, "step", "optimizer")
    train_step, tokens, activation = step_module.train_step, Feed.tokens, K2SwiGLU.forward

    def step(config, groups, chunks, optimizer, feed, number, *rest):
        now[0] = number + 1
        return train_step(config, groups, chunks, optimizer, feed, number, *rest)

    def slow_tokens(self, first_sample, count):
        self.seconds_waited += pause("data")
        return tokens(self, first_sample, count)

    def pause_in_backward(_gradient) -> None:
        pause("backward")

    def slow_activation(self, packed):
        pause("forward")
        result = activation(self, packed)
        if result.requires_grad:
            result.register_hook(pause_in_backward)
        return result

    pretrain_k2.train_step, Feed.tokens, K2SwiGLU.forward = step, slow_tokens, slow_activation


def data_parallel_pauses() -> None:
    pauses({2: ("data", (1,)), 4: ("forward", (0,)), 6: (EVERYWHERE, (0, 1))})


def tensor_parallel_pauses() -> None:
    pauses({2: ("forward", (1,)), 4: ("backward", (0,)), 6: ("optimizer", (1,)), 8: (EVERYWHERE, (0, 1))})


@pytest.mark.parametrize(
    ("settings", "fault", "expected"),
    [
        (
            {"parallel.data": 2, "train.steps": 6},
            data_parallel_pauses,
            {2: (1, "data"), 4: (0, "forward"), 6: None},
        ),
        (
            {"parallel.tensor": 2, "train.steps": 8},
            tensor_parallel_pauses,
            {2: (1, "forward"), 4: (0, "backward"), 6: (1, "optimizer"), 8: None},
        ),
    ],
    ids=["data", "tensor"],
)
def test_slow_rank_is_named_although_the_others_wait_for_it(small_config, tmp_path, settings, fault, expected):
    more = {
        "run.folder": tmp_path / "run",
        "log.phases_every_steps": 2,
        "train.micro_batch": 4,
        "train.evaluate_every_steps": settings["train.steps"],
    }
    outcomes = pretrain(2, small_config, overrides({**settings, **more}), tmp_path / "output", fault=fault)
    results_of(outcomes)
    told = events_of(tmp_path / "run", "phases")
    assert {
        event["step"]: event["slow"] and (event["slow"]["rank"], event["slow"]["phase"]) for event in told
    } == expected
    assert [set(event["seconds"]) for event in told] == [set(NAMES)] * len(told)
    assert all(len(values) == 2 for event in told for values in event["seconds"].values())
    rank, phase = expected[2]
    (line,) = [line for line in outcomes[0].stdout.splitlines() if line.startswith("step 2: rank")]
    assert f"step 2: rank {rank} (" in line and f"is slow in {phase}, " in line
