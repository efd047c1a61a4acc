"""The rare events of a run in words, one line each, with the file that tells more.

In:  what the journal tells. Out: `Line`s, for the table of a page and for a console.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from k2_megatron.report.facts import duration
from k2_megatron.report.reading import Rare, Told
from k2_megatron.train.spikes.watch import DOSSIERS

ROUTINE = ("checkpoint", "evaluation")  # many, and of no surprise


@dataclass(frozen=True)
class Line:
    """`path`: a file or folder of the run that tells more, relative to the run folder."""

    time: float
    kind: str
    step: int | None
    text: str
    path: str | None = None
    stands: bool = True


def event_lines(told: Told, folder: Path) -> list[Line]:
    """A line for every rare event, in the order of the journal."""
    return [_line(rare, folder) for rare in told.rare]


def _line(rare: Rare, folder: Path) -> Line:
    event = rare.event
    try:
        text = _TEXTS.get(rare.kind, _as_it_is)(event)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):  # written by another version, or by hand
        text = _as_it_is(event)
    step = event.get("step") if rare.kind != "start_from" else None
    kind = "straggler" if rare.kind == "phases" else rare.kind
    return Line(rare.time, kind, step, text, _path(event, folder), rare.stands)


def _path(event: Mapping, folder: Path) -> str | None:
    """The dossier or stacks that an event names, where they are in the run folder."""
    if event["event"] == "spike" and event.get("dossier"):
        path = Path(DOSSIERS) / Path(str(event["dossier"])).name
    elif event.get("stacks"):  # the folder may have been moved since
        path = Path("incidents") / Path(str(event["stacks"])).name
    else:
        return None
    return str(path) if (folder / path).exists() else None


def _start(event: Mapping) -> str:
    revision = str(event.get("revision") or "revision not known")[:12]
    return f"{event.get('layout')}, by {event.get('launcher')} on {event.get('host')}, code {revision}"


def _resume(event: Mapping) -> str:
    changes = [f"{change.get('key')} {change.get('was')!r} → {change.get('now')!r}" for change in event["changes"]]
    doubts = list(map(str, event.get("doubts", ())))
    return "; ".join([f"from {event.get('checkpoint')}, saved under {event.get('saved_layout')}", *doubts, *changes])


def _start_from(event: Mapping) -> str:
    return f"weights of {event.get('checkpoint')} (step {event.get('step')}), moments {event.get('optimizer')}"


def _checkpoint(event: Mapping) -> str:
    stall, seconds = event.get("stall_seconds", 0.0), event.get("seconds", 0.0)
    return f"{event.get('bytes', 0):,} bytes in {duration(seconds)}; the run waited {duration(stall)}"


def _evaluation(event: Mapping) -> str:
    return f"held-out loss {event.get('held_out_loss')}"


def _spike(event: Mapping) -> str:
    words = "called" if event.get("kind") == "spike" else event.get("kind")
    layers = event.get("layers") or ()
    most = f"; most: {layers[0].get('signal')}" if layers and isinstance(layers[0], dict) else ""
    return (
        f"{words}, from step {event.get('onset')}; loss {event.get('loss_deviation', 0.0):.1f} deviations above "
        f"{event.get('usual_loss', 0.0):.4f}{most}; decision: {event.get('decision')}"
    )


def _rollback(event: Mapping) -> str:
    amendment = event.get("amendment")
    text = f"from step {event.get('from_step')} back to step {event.get('step')}"
    if isinstance(amendment, dict):
        what = f"chunk {amendment['chunk']}" if amendment.get("chunk") is not None else _samples(amendment)
        text += f"; {amendment.get('action')} {what} from sample {amendment.get('from_sample')} on"
    reason = event.get("reason") or (amendment or {}).get("reason")
    return f"{text}; {reason}" if reason else text


def _samples(amendment: Mapping) -> str:
    first, end = amendment["samples"]
    return f"samples {first} to {end - 1}"


def _incident(event: Mapping) -> str:
    kind, words = event.get("kind"), []
    if "loss" in event:
        words.append(f"loss {event['loss']:.6g}, gradient norm {event.get('grad_norm', 0.0):.6g}")
    if "made_again" in event:
        words.append("the step was made again" if event["made_again"] else "no update was made")
    for key in ("ranks", "behind", "samples", "phase"):
        if event.get(key):
            words.append(f"{key}: {_short(event[key])}")
    return "; ".join([f"{kind}", *words])


def _straggler(event: Mapping) -> str:
    slow = event["slow"]
    usual = "its own earlier median" if slow.get("before") else "the median of its like"
    return f"{slow.get('place')} is slow in {slow.get('phase')}, {slow.get('ratio')} times {usual}"


def _stop(event: Mapping) -> str:
    return f"{event.get('reason')}; saved at step {event.get('saved_step')}"


def _amendment(event: Mapping) -> str:
    return f"by hand, in the ledger: {event.get('reason')}"


def _as_it_is(event: Mapping) -> str:
    return _short({key: value for key, value in event.items() if key not in ("event", "time", "step")})


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} ... ({len(text)} characters)"


_TEXTS: dict[str, Callable[[Mapping], str]] = {
    "start": _start,
    "resume": _resume,
    "start_from": _start_from,
    "checkpoint": _checkpoint,
    "evaluation": _evaluation,
    "spike": _spike,
    "rollback": _rollback,
    "incident": _incident,
    "phases": _straggler,
    "stop": _stop,
    "amendment": _amendment,
}
