"""A rank that dies at a named place of a named step: SIGKILL from within, where one from outside would need luck.

In:  one of PLACES, the rank, which step or save of its life, and whether saves run in the background. Out: the process
is gone, and its last line on stderr names the place and the step.

A save in the background is held until training has gone on, so that the kill finds both under way. Where rank 0 alone
comes (it seals and publishes), it tells the rank that is to die by a file, and waits until that is gone.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HELD_SECONDS = 40.0  # for training to go on beside a save, or for the other rank to die

FILE, MANIFEST, LATEST = "half of a file written", "before the manifest", "between save and `latest`"
STEP_PLACES = ("in forward", "in backward", "in the reduction", "in the optimizer")
SAVE_PLACES = (FILE, MANIFEST, LATEST)
OF_RANK_0 = (MANIFEST, LATEST)
PLACES = (*((place, False) for place in (*STEP_PLACES, *SAVE_PLACES)), *((place, True) for place in SAVE_PLACES))


@dataclass(frozen=True)
class Aim:
    """`nth`: the step, or the save, of this life, from 1; `sign`: the file by which rank 0 tells of its place."""

    place: str
    background: bool
    rank: int
    nth: int
    sign: Path


def wrong_death(place: str, background: bool, rank: int, stderr: str) -> str | None:
    """What was wrong with a death, by what the rank said last, or None."""
    if f"killed {place} of " not in stderr:
        return f"rank {rank} did not die {place}: {stderr[-300:]}"
    if background and "training at step" not in stderr:
        return f"the save was not in the background: {stderr[-300:]}"
    return None


def die_at(aim: Aim) -> None:
    """Every rank of the run calls it before it trains."""
    watch = _Watch(aim)
    mine = int(os.environ["RANK"])
    if (aim.place in OF_RANK_0 and mine == 0) or (aim.place not in OF_RANK_0 and mine == aim.rank):
        _PLACES[aim.place](watch)
    elif aim.place in OF_RANK_0 and mine == aim.rank:
        threading.Thread(target=watch.die_at_the_sign, daemon=True).start()


class _Watch:
    """Where the training loop is, by the marks that it sets for the watchdog; and the end."""

    def __init__(self, aim: Aim) -> None:
        from k2_megatron.model.layer import K2TransformerLayer
        from k2_megatron.train.watchdog import STEP, Watchdog

        self.aim = aim
        self.rank = int(os.environ["RANK"])
        self.phase, self.step, self.saved_step = "start", 0, 0
        self.steps, self.saves, self.calls = 0, 0, 0
        self.layers_run = 0  # forward passes of layers in the step
        mark = Watchdog.at

        def at(watchdog, phase, step):
            mark(watchdog, phase, step)
            self.phase, self.step, self.calls, self.layers_run = phase, step, 0, 0
            self.steps += phase == STEP
            if phase == "checkpoint":
                self.saves, self.saved_step = self.saves + 1, step

        def count(*_arguments):
            self.layers_run += self.phase == STEP

        Watchdog.at = at
        before(K2TransformerLayer, "forward", count)

    def in_step(self, call: int) -> bool:
        """Whether this is the `call`-th call at the place, within the step aimed at."""
        if self.phase != "step" or self.steps != self.aim.nth:
            return False
        self.calls += 1
        return self.calls == call

    def in_save(self) -> bool:
        return self.saves == self.aim.nth

    def training_went_on(self) -> bool:
        """Wait for the next step's forward pass. False when there is none: the run is at its end, or waits."""
        deadline = time.monotonic() + HELD_SECONDS
        while self.phase != "end" and time.monotonic() < deadline:
            if self.phase == "step" and self.step >= self.saved_step and self.layers_run:
                return True
            time.sleep(0.001)
        return False

    def arrived(self) -> None:
        """The place is reached, by the rank that dies or by rank 0 for it."""
        if self.aim.background and not self.training_went_on() and self.phase == "end":
            return
        if self.rank == self.aim.rank:
            self.die()
        self.aim.sign.touch()
        deadline = time.monotonic() + HELD_SECONDS
        while self.aim.sign.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)

    def die_at_the_sign(self) -> None:
        while not self.aim.sign.exists():
            time.sleep(0.001)
        if self.aim.background:
            self.training_went_on()
        self.die(self.aim.sign.unlink)

    def die(self, last_act: Callable[[], None] = lambda: None) -> None:
        of = f"step {self.step + 1}" if self.aim.place in STEP_PLACES else f"the save of step {self.saved_step}"
        beside = f", training at step {self.step + 1}" if self.aim.background and self.phase == "step" else ""
        os.write(2, f"rank {self.rank} killed {self.aim.place} of {of}{beside}\n".encode())
        last_act()
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, act: Callable[..., object]) -> None:
    """Have `act` called with the arguments of each call of owner.name, before it."""
    original = getattr(owner, name)

    def called(*arguments, **keywords):
        act(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, called)


def _in_forward(watch: _Watch) -> None:
    from k2_megatron.model.layer import K2TransformerLayer

    before(K2TransformerLayer, "forward", lambda *_: watch.in_step(3) and watch.arrived())


def _in_backward(watch: _Watch) -> None:
    from megatron.core.pipeline_parallel import schedules

    before(schedules, "backward_step", lambda *_: watch.in_step(2) and watch.arrived())


def _in_the_reduction(watch: _Watch) -> None:
    import k2_megatron.train.step as step

    before(step, "finalize_model_grads", lambda *_: watch.in_step(1) and watch.arrived())


def _in_the_optimizer(watch: _Watch) -> None:
    """With half of the tensors updated."""
    from k2_megatron.kernels.adamw import AdamW

    update = AdamW._update

    def half(self, group, lists, gradient_scale):
        if watch.in_step(1):
            update(self, group, tuple(tensors[: len(tensors) // 2] for tensors in lists), gradient_scale)
            watch.arrived()
        update(self, group, lists, gradient_scale)

    AdamW._update = half


def _half_of_a_file_written(watch: _Watch) -> None:
    from k2_megatron.train.checkpoints.hashing_writer import _HashingStream

    calls = []

    def written(*_):
        if watch.in_save():
            calls.append(1)
            if len(calls) == 20:
                watch.arrived()

    before(_HashingStream, "write", written)


def _before_the_manifest(watch: _Watch) -> None:
    import k2_megatron.train.checkpoints.save as checkpoint_save

    before(checkpoint_save, "publish", lambda *_: watch.in_save() and watch.arrived())


def _between_save_and_latest(watch: _Watch) -> None:
    import k2_megatron.train.checkpoints.folders as folders

    before(
        folders,
        "write_file",
        lambda path, _text: path.name == "latest" and watch.in_save() and watch.arrived(),
    )


_PLACES: dict[str, Callable[[_Watch], None]] = {
    STEP_PLACES[0]: _in_forward,
    STEP_PLACES[1]: _in_backward,
    STEP_PLACES[2]: _in_the_reduction,
    STEP_PLACES[3]: _in_the_optimizer,
    FILE: _half_of_a_file_written,
    MANIFEST: _before_the_manifest,
    LATEST: _between_save_and_latest,
}
