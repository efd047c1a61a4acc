"""What can be checked of a run in passing: its newest checkpoint, and its ledger. Each answer is a line of text.

Not read are the checkpoints' files (their sizes are compared) and the tokens; `tools/convert_checkpoint.py verify` and
`tools/inspect_data.py verify` read them.
"""

from dataclasses import dataclass
from pathlib import Path

from k2_megatron.data.inspected_run import Run
from k2_megatron.data.ledger import Ledger
from k2_megatron.report.run import ReportedRun
from k2_megatron.train.checkpoints.folders import candidate_checkpoints, complete_checkpoints
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest, step_of
from k2_megatron.train.verify_data import verify_chain

CHAIN_SAMPLES = 1_000_000  # the chain over as many is computed again, in about a second


@dataclass(frozen=True)
class Check:
    """`holds` is None where it was not, or could not be, checked."""

    what: str
    holds: bool | None
    text: str


def newest_checkpoint(folder: Path) -> tuple[int | None, str]:
    """(the step of the newest checkpoint that seems sound, a line on it)."""
    try:
        candidates, doubt = candidate_checkpoints(folder / "checkpoints")
    except CheckpointError as error:
        return None, str(error)
    passed = [doubt] if doubt and candidates else []
    for checkpoint in candidates:
        problem = _problem_of(checkpoint)
        if problem is None:
            remark = f" ({'; '.join(passed)})" if passed else ""
            return step_of(checkpoint), f"{checkpoint.name}: manifest whole, sizes of files agree{remark}"
        passed.append(problem)
    return None, "; ".join(passed) or "none"


def _problem_of(checkpoint: Path) -> str | None:
    try:
        manifest = read_manifest(checkpoint)
        for name, facts in manifest["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != facts["bytes"]:
                return f"{checkpoint.name}/{name} has {size} bytes, {facts['bytes']} were written"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def ledger_checks(run: ReportedRun) -> list[Check]:
    """Whether the ledger is what the run wrote, as far as that is quick to see."""
    try:
        ledger = Ledger(run.folder)
    except (ValueError, OSError) as error:
        return [Check("lines", False, str(error))]
    if not ledger.entries:
        return [Check("lines", None, "nothing in it: no checkpoint was saved, and no row skipped or deferred")]
    count = len(ledger.entries)
    checks = [Check("lines", True, f"{count} lines follow from one another")]
    checks.append(_marks(run, ledger))
    checks.append(_checkpoints(run.folder, ledger))
    checks.append(_chain(run, ledger))
    return checks


def _marks(run: ReportedRun, ledger: Ledger) -> Check:
    try:
        for mark, told in run.told.ledger_marks:
            ledger.check_lines(mark, told)
    except ValueError as error:
        return Check("journal", False, str(error))
    marks = run.told.ledger_marks
    if not marks:
        return Check("journal", None, "the journal does not tell how the ledger ended")
    return Check("journal", True, f"has the lines that the journal tells of ({len(marks)} tellings that differ)")


def _checkpoints(folder: Path, ledger: Ledger) -> Check:
    count = 0
    try:
        for checkpoint in complete_checkpoints(folder / "checkpoints"):
            ledger.check_mark(read_manifest(checkpoint))
            count += 1
    except ValueError as error:
        return Check("checkpoints", False, str(error))
    return Check("checkpoints", True if count else None, f"has the lines that {count} checkpoints tell of")


def _chain(run: ReportedRun, ledger: Ledger) -> Check:
    positions = ledger.positions
    if not positions:
        return Check("rows", None, "no position is recorded yet")
    most = max(entry["consumed_samples"] for entry in positions)
    command = f"python tools/inspect_data.py verify {run.folder}"
    if most > CHAIN_SAMPLES:
        return Check("rows", None, f"the chain over {most:,} samples was not computed again here: {command}")
    try:
        data = Run(run.folder)
        _ = data.feed
    except (ValueError, OSError) as error:
        return Check("rows", None, f"the chain was not computed again here, the data cannot be opened: {error}")
    try:
        count = len(list(verify_chain(data)))
    except (ValueError, OSError) as error:
        return Check("rows", False, str(error))
    return Check("rows", True, f"the chain over the rows consumed holds at {count} positions, computed again")


def ledger_facts(folder: Path) -> list[tuple[str, str]]:
    """How far the ledger says the run is, and what was amended."""
    try:
        ledger = Ledger(folder)
    except (ValueError, OSError):
        return []
    facts = []
    if ledger.positions:
        last = ledger.positions[-1]
        at = f", step {last['step']:,}" if "step" in last else ""
        facts.append(("last position", f"{last['consumed_samples']:,} samples consumed{at}, chain {last['chain']}"))
    for entry in ledger.amendments:
        what = f"chunk {entry['chunk']}" if "chunk" in entry else "samples {} to {}".format(*_range(entry["samples"]))
        facts.append(
            ("amendment", f"{entry['action']} {what} from sample {entry['from_sample']:,} on: {entry['reason']}")
        )
    return facts


def _range(samples: list[int]) -> tuple[str, str]:
    return f"{samples[0]:,}", f"{samples[1] - 1:,}"
