"""The head of a report: what the run is, how far it is, on what it ran. (name, text) pairs, for a page or a console.

In:  a `ReportedRun`. Out: facts as its files tell them; what they do not tell is said so in one line, or left out.
"""

import math
from collections.abc import Iterator
from datetime import datetime, timezone

import numpy as np

from k2_megatron.plan.parameters import model_parameters
from k2_megatron.report.goodput import WORDS
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.soundness import newest_checkpoint
from k2_megatron.train.heartbeats import HEARTBEATS, read_heartbeats

Fact = tuple[str, str]
NO_STEP = "the journal tells of no step"


def facts_of(run: ReportedRun) -> list[Fact]:
    """All of them, in the order in which they are shown."""
    return [*_standing(run), *_model(run), *_machine(run), *_results(run)]


def moment(seconds: float) -> str:
    """A time as the journal has it, to the second, in UTC."""
    if math.isnan(seconds):
        return "time not told"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """12.3 s, 5 min 2 s, 3 h 4 min, 2 d 5 h."""
    if math.isnan(seconds):
        return "not told"
    if abs(seconds) < 60:
        return f"{seconds:.1f} s"
    whole = round(abs(seconds))
    sign = "-" if seconds < 0 else ""
    for large, small, units in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if whole >= large:
            one, two = units.split()
            return f"{sign}{whole // large:,} {one} {whole % large // small} {two}"
    raise AssertionError(f"{seconds} s are a minute or more")


def amount(count: float) -> str:
    """983,040; 1.415 T; exact below a million."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return f"{count:,.0f}"


def state_of(run: ReportedRun) -> str:
    """Whether it is finished, in words."""
    if not run.lives:
        return "not started: the journal tells of no start" if run.told.events else "the journal tells of nothing yet"
    end, total = run.lives[-1].end, run.config.train.steps
    if end == "finished":
        return "finished"
    reached = f"at step {run.told.steps[-1]:,} of {total:,}" if len(run.told.steps) else "before its first step"
    words = f"stopped by {end}" if any(rare.kind == "stop" for rare in run.lives[-1].told) else end
    return f"{words}, {reached}"


def _standing(run: ReportedRun) -> Iterator[Fact]:
    account, told = run.told.account, run.told
    yield "state", state_of(run)
    if account.wall:
        yield "time", f"{moment(account.began)} to {moment(account.ended)}: {duration(account.wall)}"
    goodput = run.goodput
    if goodput is not None and len(told.steps):
        yield "goodput", f"{goodput:.1%} of that in steps that stand; {_starts(run)}"
    beats = read_heartbeats(run.folder / HEARTBEATS)
    times = [beat["time"] for beat in beats if isinstance(beat.get("time"), int | float)]
    if times:
        yield "heartbeats", f"{len(times)} ranks, the last sign {moment(max(times))}"
    if len(told.steps):
        tokens = told.standing("consumed_tokens")[-1]
        of_all = f"{amount(run.config.total_tokens)} tokens of the whole run"
        done = "tokens not told" if math.isnan(tokens) else f"{amount(tokens)} tokens trained"
        yield "steps", f"{told.steps[-1]:,} of {run.config.train.steps:,}; {done}, {of_all}"
    else:
        yield "steps", NO_STEP
    yield "newest checkpoint", newest_checkpoint(run.folder)[1]


def _starts(run: ReportedRun) -> str:
    back = len(run.told.of_kind("rollback"))
    undone = int(np.sum(~run.told.stands))
    words = [f"{len(run.lives)} start{'s' if len(run.lives) > 1 else ''}"]
    words += [f"{back} rollback{'s' if back > 1 else ''}"] if back else []
    words += [f"{undone:,} steps taken back or made again"] if undone else []
    return ", ".join(words)


def _model(run: ReportedRun) -> Iterator[Fact]:
    config, parameters = run.config, model_parameters(run.config)
    model, train, optimizer = config.model, config.train, config.optimizer
    heads = f"{model.heads} heads" + (f" ({model.kv_heads} of keys)" if model.kv_heads != model.heads else "")
    yield (
        "model",
        f"{model.layers} layers, hidden {model.hidden_size:,}, FFN {model.ffn_hidden_size:,}, {heads}, vocabulary "
        f"{model.vocab_size:,}; {model.implementation}",
    )
    yield "parameters", f"{parameters.total:,} ({parameters.without_embeddings:,} without embedding and output)"
    yield (
        "batch",
        f"{train.global_batch:,} sequences of {model.sequence_length:,} tokens, {config.tokens_per_step:,} tokens a "
        f"step{', after a ramp' if train.batch_ramp else ''}",
    )
    yield (
        "optimizer",
        f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, {optimizer.warmup_steps:,} steps of "
        f"warm-up; {train.precision}, recompute {train.recompute}, seed {config.run.seed}",
    )
    yield "configuration", f"{config.fingerprint} (its fingerprint)"
    origin = next((life.origin for life in run.lives if life.origin), None)
    if origin:
        yield "begun from", f"{origin.get('checkpoint')}, step {origin.get('step')}, moments {origin.get('optimizer')}"


def _machine(run: ReportedRun) -> Iterator[Fact]:
    if not run.lives:
        return
    start = run.lives[-1].start
    yield "layout", f"{start.get('layout', 'not told')}, {run.config.world_size:,} ranks"
    launcher, host = start.get("launcher", "not told"), start.get("host", "not told")
    yield "machine", f"{start.get('device', 'not told')}; started by {launcher}, rank 0 on {host}"
    kernels = start.get("kernels")
    if isinstance(kernels, dict):
        yield "kernels", "; ".join(f"{op}: {choice}" for op, choice in kernels.items())
    yield "code", f"k2_megatron {start.get('k2_megatron')}, revision {start.get('revision') or 'not known'}"
    versions = [f"{name} {start[name]}" for name in ("python", "torch", "megatron-core", "numpy") if start.get(name)]
    if versions:
        yield "versions", ", ".join(versions)
    yield "data", f"{run.config.data.train}, fingerprint {start.get('data', 'not told')}"


def _results(run: ReportedRun) -> Iterator[Fact]:
    told = run.told
    if not len(told.steps):
        return
    losses, speeds = told.standing("loss"), told.standing("tokens_per_second")
    yield (
        "training loss",
        f"{losses[0]:.4f} at step {told.steps[0]:,}, {losses[-1]:.4f} at step {told.steps[-1]:,}",
    )
    evaluation = told.last("evaluation")
    if evaluation and "held_out_loss" in evaluation.event:
        yield "held-out loss", f"{evaluation.event['held_out_loss']:.4f} at step {evaluation.event['step']:,}"
    if np.isfinite(speeds).any():
        used = told.standing("model_flops_utilization")
        share = f", MFU {np.nanmedian(used):.1%}" if np.isfinite(used).any() else ", MFU not known for this device"
        yield "speed", f"{np.nanmedian(speeds):,.0f} tokens/s{share} (medians over the steps)"


def time_lines(run: ReportedRun) -> list[tuple[str, float, float]]:
    """(part in words, seconds, share of the wall time) of all parts."""
    wall = run.told.account.wall
    return [(WORDS[part], seconds, seconds / wall if wall else 0.0) for part, seconds in run.time_parts.items()]
