"""The straggler report of a run: the slow rank is named with its phase, whoever waits for it."""

import time

import pytest
from rank_processes import pretrain, results_of
from run_results import events_of
from small_run import overrides

EVERYWHERE = ("data", "forward", "backward", "optimizer")
PAUSE_SECONDS = 0.3  # many times a step of the small run, so that a busy machine does not decide


def pauses(
    slow: dict[int, tuple[str | tuple[str, ...], tuple[int, ...]]],
    longer: tuple = (0, "", ()),
    pause_seconds=PAUSE_SECONDS,
) -> None:
    """{step: (phase or phases, the ranks that pause in them)}; the step, phase and ranks that pause longer."""
    import torch.distributed as distributed

    import k2_megatron.train.step as step_module
    import pretrain_k2
    from k2_megatron.data.feed import Feed
    from k2_megatron.kernels.adamw import AdamW
    from k2_megatron.model.layer import K2SwiGLU

    now = [0]

    def pause(phase: str) -> float:
        wanted, of_ranks = slow.get(now[0], ("", ()))
        seconds = pause_seconds if phase in wanted and distributed.get_rank() in of_ranks else 0.0
        if now[0] == longer[0] and phase == longer[1] and distributed.get_rank() in longer[2]:
            seconds *= 4
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

    def step(config, parts, feed, number, **more):
        now[0] = number + 1
        return train_step(config, parts, feed, number, **more)

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
    pauses({2: ("data", (1,)), 4: ("optimizer", (1,)), 6: (EVERYWHERE, (0, 1))})


def last_stage_pauses() -> None:
    """The only rank of the last stage is slow in every step from the first."""
    pauses(dict.fromkeys(range(1, 5), ("backward", (1,))), pause_seconds=0.2)


def pipeline_pauses() -> None:
    """Everyone pauses in every step, so that a busy machine does not decide; in the last, one stage pauses longer."""
    pauses(dict.fromkeys(range(1, 6), (EVERYWHERE, (0, 1))), longer=(5, "forward", (1,)), pause_seconds=0.1)


def tensor_parallel_pauses() -> None:
    pauses({2: ("forward", (1,)), 4: ("backward", (0,)), 6: ("optimizer", (1,)), 8: (EVERYWHERE, (0, 1))})


@pytest.mark.parametrize(
    ("settings", "fault", "expected"),
    [
        (
            # The sharded optimizer gathers the weights within its step, where the others wait for the slow one
            {"parallel.data": 2, "parallel.distributed_optimizer": True, "train.steps": 6},
            data_parallel_pauses,
            {2: (1, "data"), 4: (1, "optimizer"), 6: None},
        ),
        (
            {"parallel.tensor": 2, "train.steps": 8},
            tensor_parallel_pauses,
            {2: (1, "forward"), 4: (0, "backward"), 6: (1, "optimizer"), 8: None},
        ),
        (
            {"parallel.pipeline": 2, "train.steps": 5, "log.phases_every_steps": 1},
            pipeline_pauses,
            {**dict.fromkeys(range(1, 5)), 5: (1, "forward")},
        ),
        (
            {"parallel.pipeline": 2, "train.steps": 4, "log.phases_every_steps": 1},
            last_stage_pauses,
            {**dict.fromkeys(range(1, 4)), 4: (1, "backward")},
        ),
    ],
    ids=["data", "tensor", "pipeline", "last stage"],
)
def test_slow_rank_is_named_although_the_others_wait_for_it(small_config, tmp_path, settings, fault, expected):
    more = {
        "run.folder": tmp_path / "run",
        "log.phases_every_steps": settings.get("log.phases_every_steps", 2),
        "train.micro_batch": 4,
        "train.evaluate_every_steps": settings["train.steps"],
    }
    outcomes = pretrain(2, small_config, overrides({**settings, **more}), tmp_path / "output", fault=fault)
    results_of(outcomes)
    told = events_of(tmp_path / "run", "phases")
    assert {
        event["step"]: event["slow"] and (event["slow"]["rank"], event["slow"]["phase"]) for event in told
    } == expected
    assert [set(event["seconds"]) for event in told] == [{*EVERYWHERE, "checkpoint"}] * len(told)
    assert all(len(values) == 2 for event in told for values in event["seconds"].values())
    step, (rank, phase) = next((step, slow) for step, slow in expected.items() if slow)
    (line,) = [line for line in outcomes[0].stdout.splitlines() if line.startswith(f"step {step}: rank")]
    assert f"step {step}: rank {rank} (" in line and f"is slow in {phase}, " in line
