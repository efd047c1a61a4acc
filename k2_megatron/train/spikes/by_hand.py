"""Go back by hand: what a run does by itself under spikes.policy, for a run that is stopped (tools/roll_back.py).

The order is that of rollback.py, and then the journal's line. Ended at any moment, by a kill or a full disk, the same
request does what is left and nothing twice: the ledger's last line tells that it has been there.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from k2_megatron.config import Config, load_run_config
from k2_megatron.config.schema import Spikes
from k2_megatron.data.blended import amendable
from k2_megatron.runtime.journal import JOURNAL, Journal, read_events, read_steps
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import step_of
from k2_megatron.train.run_data import RunData, open_run_data
from k2_megatron.train.run_folder import CONFIG, hold_run_folder
from k2_megatron.train.spikes.detector import Finding
from k2_megatron.train.spikes.policy import Decision, amendment
from k2_megatron.train.spikes.rollback import fitting_amendment, set_back


class Unfinished(ValueError):
    """Going back began, and did not come to its end."""

    exit_code = 3


@dataclass(frozen=True)
class Request:
    """`before`: the first bad step. `policy`: which rows go where, None to read them again; its scope alone counts, and
    skip or rollback. `to`: with batches, the last step whose batch goes."""

    before: int
    reason: str
    policy: Spikes | None = None
    to: int | None = None

    @property
    def scope(self) -> str | None:
        return self.policy.scope if self.policy else None

    @property
    def told_reason(self) -> str:
        """As the ledger and the journal have it."""
        return f"by hand: {self.reason}"


@dataclass(frozen=True)
class WentBack:
    """From step `reached` to step `step`; `amended`: the ledger's line, `is_repeated` if it was there before."""

    reached: int
    step: int
    amended: dict | None
    is_repeated: bool


def go_back_by_hand(run: Path, request: Request) -> WentBack:
    """Set the run back to the newest checkpoint before `request.before`, and amend its data order. ValueError, with
    nothing changed, where it cannot be; Unfinished where a disk does not take it."""
    config = _checked(run, request)
    checkpoints = run / "checkpoints"
    with hold_run_folder(config):
        earlier = [step for step in map(step_of, complete_checkpoints(checkpoints)) if step < request.before]
        if not earlier:
            raise ValueError(f"no checkpoint from before step {request.before} is kept in {checkpoints}")
        good = max(earlier)
        journal = Journal(run, writer=True)  # opened first: where it cannot be written nothing is to be changed
        reached = max(read_steps(journal.path), default=good)
        data = open_run_data(config, writer=True)
        fields, is_repeated = None, False
        if request.policy:
            config = config.model_copy(update={"spikes": request.policy})
            fields, is_repeated = _amendment(config, request, good, data)
        try:
            set_back(checkpoints, good)
            if fields and not is_repeated:
                data.ledger.amend(**fields)
            told = {"amendment": fields, "reason": request.told_reason, "ledger": data.ledger.mark()}
            journal.write("rollback", from_step=reached, step=good, **told)
            journal.require_written()
        except (ValueError, OSError) as error:
            raise Unfinished(
                f"the run may be set back to step {good} already, and the rest is not done: {error}. Do not start it; "
                "make room, and give the same command again: it does what is left, and nothing twice"
            ) from None
        finally:
            journal.close()
    return WentBack(reached, good, fields, is_repeated)


def _checked(run: Path, request: Request) -> Config:
    """The configuration of the run, for this folder. ValueError for a request that cannot be meant."""
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run / CONFIG} does not exist: {run} is no run folder")
    if request.to is not None and request.scope != "batches":
        raise ValueError(f"--to {request.to} goes with --defer batches or --skip batches: leave it out, or name one")
    if request.scope == "batches" and (request.to is None or request.to < request.before):
        raise ValueError(
            f"--to is {request.to}: with batches it is the last step whose batch goes, and not before --before"
        )
    made = steps_made(run)
    if request.before > made + 1:
        raise ValueError(f"--before {request.before}: the run has made {made} steps; nothing after them can be bad")
    config = load_run_config(run / CONFIG)
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(run)})})


def steps_made(run: Path) -> float:
    """The last step that the journal or a checkpoint tells of, passed over or not; without end where neither does."""
    steps = [step_of(folder) for folder in complete_checkpoints(run / "checkpoints")]
    if (run / JOURNAL).is_file():
        steps += [event["step"] for event in read_events(run / JOURNAL) if event["event"] in ("step", "incident")]
    return max(steps, default=math.inf)


def _amendment(config: Config, request: Request, good: int, data: RunData) -> tuple[dict, bool]:
    """What the run would write into its ledger by itself, with this reason; and whether its last line says so already,
    since this request was ended before the journal was told."""
    finding = Finding("by hand", request.before, request.before, request.to or request.before, 0.0, 0.0, 0.0, 0.0)
    decision = Decision("go back", request.told_reason, good)
    feed = amendable(data.train)
    wanted = amendment(config, feed, feed.order.rows_per_chunk, decision, finding)
    last = data.ledger.entries[-1] if data.ledger.entries else {}
    if last.get("event") == "amendment" and _is_same(wanted, last):
        return {name: last[name] for name in wanted}, True
    return fitting_amendment(config, finding, decision, data), False


def _is_same(wanted: dict, line: dict) -> bool:
    """Whether the ledger's line is this amendment. Of a chunk only where the order changes is compared: where the line
    has moved it another chunk stands now."""
    asked = {name: list(value) if name == "samples" else value for name, value in wanted.items() if name != "chunk"}
    return ("chunk" in wanted) == ("chunk" in line) and all(line.get(name) == value for name, value in asked.items())
