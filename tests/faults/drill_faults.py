"""The faults that a drill tries: how each is made, at which instant, and how the ranks must end.

A fault is chosen before the ranks start: some are armed in the ranks themselves (`arm`), the others are done to them
from outside (`strike`). Afterwards the run is started again, and must come out as if nothing had happened.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aimed_kills import SAVE_PLACES, Aim, die_at, wrong_death
from damaged_files import Damage, damage_the_newest, damage_the_pointer, damage_the_tokens, lose_power
from rank_processes import Rank, rank_environment, run_pretrain
from run_results import events_told
from torch.distributed import TCPStore

from k2_megatron.config import load_config
from k2_megatron.runtime.mistakes import INTERRUPTED, LOST_PEER

START_SECONDS = 120.0  # a life must have trained its first step by then; some ten times what a busy machine takes
END_SECONDS = 60.0  # ranks that are left alone by another must be gone by then


class Life:
    """The ranks of a run from one start to its end."""

    def __init__(
        self,
        config: Path,
        settings: Sequence[str],
        world_size: int,
        output: Path,
        arm: Callable[[], None] | None = None,
    ) -> None:
        self._again = partial(Life, config, settings, world_size, output.with_name(f"{output.name}_again"))
        self.token_prefix = Path(load_config(config, settings).data.train)
        arguments = ([str(config), *(part for setting in settings for part in ("--set", setting))], arm)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            Rank(run_pretrain, arguments, rank_environment(rank, world_size, self._store.port), output / f"{rank}")
            for rank in range(world_size)
        ]

    def again(self) -> "Life":
        """The same start once more, with nothing armed."""
        return self._again()

    @property
    def ended(self) -> bool:
        return all(rank.process.exitcode is not None for rank in self.ranks)

    @property
    def codes(self) -> list[int]:
        return [rank.process.exitcode for rank in self.ranks]

    def told(self, rank: int) -> str:
        """What a rank has said on stderr."""
        return (self.ranks[rank].folder / "stderr").read_text()

    def wait(self, arrived: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait until `arrived`, or the end of all ranks. AssertionError, and the ranks killed, when neither comes."""
        deadline = time.monotonic() + seconds
        while not arrived() and not self.ended:
            if time.monotonic() > deadline:
                for rank in self.ranks:
                    rank.kill()
                raise AssertionError(f"nothing happened for {seconds:.0f} s; see {self.ranks[0].folder.parent}")
            time.sleep(0.002)

    def send(self, number: signal.Signals, victims: Sequence[int]) -> None:
        for victim in victims:
            if self.ranks[victim].process.exitcode is None:
                os.kill(self.ranks[victim].process.pid, number)

    def end(self, but: Sequence[int] = ()) -> bool:
        """Wait until all ranks are gone, but those named; whether they were in time. Whoever is left is killed."""
        deadline = time.monotonic() + END_SECONDS
        waited = [rank for number, rank in enumerate(self.ranks) if number not in but]
        while any(rank.process.exitcode is None for rank in waited) and time.monotonic() < deadline:
            time.sleep(0.02)
        in_time = all(rank.process.exitcode is not None for rank in waited)
        for rank in self.ranks:
            rank.kill()
        return in_time


Strike = Callable[[Life, Path, random.Random], str | None]


@dataclass(frozen=True)
class Fault:
    """`strike(life, run, chance)` does it and returns what was wrong with the end, or None; `arm(chance, output)` gives
    what each rank runs before it trains; `fits(layout)` is False where the fault cannot be made; `background` says how
    the life must save, None that it does not matter; `aim` is the rank and place of a kill from within."""

    name: str
    strike: Strike
    arm: Callable[[random.Random, Path], Callable[[], None]] | None = None
    fits: Callable[[Sequence[str]], bool] = lambda _layout: True
    background: bool | None = None
    aim: tuple[int, str, bool] | None = None


def _wait_a_while(life: Life, chance: random.Random) -> None:
    until = time.monotonic() + chance.uniform(0.0, 1.0)
    life.wait(lambda: time.monotonic() > until)


def _wait_for_a_save(life: Life, run: Path, chance: random.Random) -> None:
    life.wait(lambda: any((run / "checkpoints").glob(".step_*.writing")))
    time.sleep(chance.uniform(0.0, 0.15))  # a save of this size takes about that long


def _kill(life: Life, run: Path, chance: random.Random, *, every: bool, saving: bool) -> str | None:
    _wait_for_a_save(life, run, chance) if saving else _wait_a_while(life, chance)
    life.send(signal.SIGKILL, range(len(life.ranks)) if every else [chance.randrange(len(life.ranks))])
    if not life.end():
        return "a rank outlived the killed one"
    return None if all(code != 0 for code in life.codes) else "a rank called it success"


def aimed_kill(place: str, background: bool, rank: int, nth: int | None = None) -> Fault:
    """A kill of one rank at one of PLACES, in its `nth` step or save; random by default."""

    def arm(chance: random.Random, output: Path) -> Callable[[], None]:
        drawn = nth or chance.randrange(1, 3 if place in SAVE_PLACES else 8)
        return partial(die_at, Aim(place, background, rank, drawn, output.with_name(f"{output.name}_sign")))

    def strike(life: Life, _run: Path, _chance: random.Random) -> str | None:
        if not life.end():
            return "a rank outlived the killed one"
        if life.codes[rank] != -signal.SIGKILL:
            return f"rank {rank} was to be killed {place}, and ended with {life.codes[rank]}"
        if 0 in life.codes:
            return "a rank called it success"
        return wrong_death(place, background, rank, life.told(rank))

    name = f"one rank killed, {place}{', background' if background else ''}"
    saving = background if place in SAVE_PLACES else None
    return Fault(name, strike, arm, background=saving, aim=(rank, place, background))


def _killed_and(harm: Damage, life: Life, run: Path, chance: random.Random) -> str | None:
    """Kill the run, at any instant or while it saves; then harm its files."""
    complaint = _kill(life, run, chance, every=True, saving=harm is lose_power and chance.random() < 0.5)
    if any(life.codes):  # a run that has ended before the kill is not started again
        harm(run, chance)
    return complaint


def _killed_and_tokens_damaged(life: Life, run: Path, chance: random.Random) -> str | None:
    """Kill the run and damage a file of its tokens: a start names it and trains nothing; then it is put back."""
    complaint = _kill(life, run, chance, every=True, saving=False)
    if complaint or not any(life.codes):
        return complaint
    kept = {path: path.read_bytes() for path in life.token_prefix.parent.glob(f"{life.token_prefix.name}.*")}
    path, told = damage_the_tokens(life.token_prefix, chance), events_told(run, "step")
    again = life.again()
    in_time = again.end()
    path.write_bytes(kept[path])
    if not in_time or 0 in again.codes or events_told(run, "step") != told:
        return f"damaged {path.name} was trained on: codes {again.codes}"
    said = "".join(map(again.told, range(len(again.ranks))))
    # By .bin or .idx, when the two no longer fit each other
    return None if f"error: {life.token_prefix}." in said else f"damaged {path.name} was not named: {said[-300:]}"


def _ask(life: Life, run: Path, chance: random.Random, *, twice: bool = False) -> str | None:
    """One rank is asked to stop, or all of them twice within moments; all save and leave."""
    _wait_a_while(life, chance)
    number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    life.send(number, range(len(life.ranks)) if twice else [chance.randrange(len(life.ranks))])
    if twice:
        time.sleep(chance.uniform(0.0, 0.02))
        life.send(number, range(len(life.ranks)))
    if not life.end():
        return f"not gone after {number.name}"
    hurried = (
        twice and number == signal.SIGINT
    )  # a person who does not wait for the save; a rank may lose the other first
    allowed = {0, INTERRUPTED, LOST_PEER} if hurried else {0}
    return None if set(life.codes) <= allowed else f"codes {life.codes} after {number.name}"


def _stop_one(life: Life, run: Path, chance: random.Random) -> str | None:
    """One rank is stopped by the system; the others end themselves, and the launcher kills it."""
    _wait_a_while(life, chance)
    victim = chance.randrange(len(life.ranks))
    life.send(signal.SIGSTOP, [victim])
    if not life.end(but=[victim]):
        return "ranks wait for ever for the stopped one"
    return None if all(code != 0 for code in life.codes) else "a rank called it success"


def hangs(life: Life, run: Path, chance: random.Random) -> str | None:
    """A rank loops for ever, the others wait for it in a collective: the watchdog of each ends it."""
    if not life.end():
        return "ranks wait for ever for the one that hangs"
    return None if 0 not in life.codes and 4 in life.codes else f"codes {life.codes}, none of them 4"


def ends_by_itself(code: int, life: Life, run: Path, chance: random.Random) -> str | None:
    """The armed fault stops the run by itself, with this exit code."""
    if not life.end():
        return "the run did not stop"
    return None if set(life.codes) == {code} else f"codes {life.codes}, not {code}"


def loop_for_ever(call: int, rank: str) -> None:
    """In the forward pass of the `call`-th step."""
    import k2_megatron.train.step as step

    run, calls = step._run_schedule, []

    def run_or_hang(*arguments, **keywords):
        calls.append(not keywords["forward_only"])
        while sum(calls) == call and os.environ["RANK"] == rank:
            pass
        return run(*arguments, **keywords)

    step._run_schedule = run_or_hang


def gradient_not_finite(call: int, rank: str) -> None:
    import k2_megatron.train.step as step

    finalize, calls = step.finalize_model_grads, []

    def spoiled(model, *arguments, **keywords):
        calls.append(1)
        # In the step and when it is made again; before the sum, as after it a rank may hold a shard alone
        if len(calls) in (call, call + 1) and os.environ["RANK"] == rank:
            next(model[0].parameters()).main_grad.view(-1)[3] = float("inf")
        finalize(model, *arguments, **keywords)

    step.finalize_model_grads = spoiled


def gradient_too_large(call: int, rank: str) -> None:
    """From the `call`-th step on, of one layer, before the sum over replicas."""
    import pretrain_k2
    from k2_megatron.train.model_chunks import named_parameters

    build, train_step, calls = pretrain_k2.build_optimizer, pretrain_k2.train_step, []

    def build_with_fault(config, chunks, *rest):
        weight = dict(named_parameters(chunks))["decoder.layers.1.mlp.linear_fc2.weight"]
        weight.register_hook(lambda gradient: gradient * (1e6 if len(calls) >= call else 1.0))
        return build(config, chunks, *rest)

    def counted(*arguments, **more):
        calls.append(1)
        return train_step(*arguments, **more)

    pretrain_k2.train_step = counted
    if os.environ["RANK"] == rank:
        pretrain_k2.build_optimizer = build_with_fault


def flip_a_bit(call: int, rank: str) -> None:
    import torch

    import k2_megatron.train.step as step
    from k2_megatron.train.model_chunks import unwrapped

    run, calls = step._run_schedule, []

    def run_and_flip(config, parts, *rest, **keywords):
        result = run(config, parts, *rest, **keywords)
        calls.append(1)
        if len(calls) == call and os.environ["RANK"] == rank:
            bits = unwrapped(parts.chunks[0]).decoder.layers[1].mlp.linear_fc2.weight.data.view(-1).view(torch.int32)
            bits[5] ^= 1 << 21
        return result

    step._run_schedule = run_and_flip


def _armed(what: Callable[[int, str], None], chance: random.Random, _output: Path) -> Callable[[], None]:
    return partial(what, chance.randrange(3, 9), str(chance.randrange(2)))


KILLS = tuple(
    Fault(f"{who} killed, {when}", partial(_kill, every=who == "all ranks", saving=when == "while saving"))
    for who in ("all ranks", "one rank")
    for when in ("any instant", "while saving")
)
OTHERS = (
    Fault("one rank asked to stop (TERM, USR1, INT)", _ask),
    Fault("all ranks asked to stop, twice", partial(_ask, twice=True)),
    Fault("one rank stopped by the system", _stop_one),
    Fault("killed, newest checkpoint damaged", partial(_killed_and, damage_the_newest)),
    Fault("killed, `latest` cut, ahead or garbage", partial(_killed_and, damage_the_pointer)),
    Fault("killed, what was not on the disk is lost", partial(_killed_and, lose_power)),
    Fault("killed, a token file damaged", _killed_and_tokens_damaged),
    Fault("one rank hangs in computing", hangs, partial(_armed, loop_for_ever)),
    Fault("gradient not finite on one rank", partial(ends_by_itself, 5), partial(_armed, gradient_not_finite)),
    Fault(
        "bit flipped in one replica",
        partial(ends_by_itself, 3),
        partial(_armed, flip_a_bit),
        lambda layout: any(setting.startswith("parallel.data=") for setting in layout),
    ),
)
