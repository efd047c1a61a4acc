"""Journals written by hand, whose answers are known by arithmetic, and run folders around them."""

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

from small_run import SECTIONS

from k2_megatron.config.toml_text import toml_document

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def event(name: str, second: float, /, **fields) -> dict:
    """An event written `second` seconds after noon."""
    time = (NOON + timedelta(seconds=second)).isoformat(timespec="milliseconds")
    return {"event": name, "time": time, **fields}


def step(number: int, second: float, seconds: float = 1.0, **fields) -> dict:
    """A step of 8 sequences of 32 tokens that ended `second` seconds after noon."""
    told = {
        "loss": 5.0 - number / 100,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "samples": [8 * (number - 1), 8 * number],
        "sequence_length": 32,
        "consumed_tokens": 256 * number,
        "step_seconds": seconds,
        "tokens_per_second": 256 / seconds,
        "model_flops_utilization": None,
    }
    return event("step", second, step=number, **{**told, **fields})


def start(second: float, **fields) -> dict:
    return event("start", second, layout="tp1-pp1-vp1-cp1-dp1", launcher="local", device="a CPU", **fields)


def resume(second: float, step: int, **fields) -> dict:
    told = {"checkpoint": f"step_{step:08d}", "doubts": [], "saved_layout": "tp1-pp1-vp1-cp1-dp1", "changes": []}
    return event("resume", second, step=step, **{**told, "position_change": None, **fields})


def write_run(folder: Path, events: list[dict], tail: str = "", **sections) -> Path:
    """A run folder with these events in its journal and `tail` behind them; `sections` change the configuration."""
    folder.mkdir(parents=True)
    data = {"train": "text/train", "held_out": "text/held_out"}
    whole = {**SECTIONS, "run": {**SECTIONS["run"], "folder": "runs/small"}, "data": data}
    config = {name: {**whole.get(name, {}), **sections.get(name, {})} for name in {**whole, **sections}}
    (folder / "config.toml").write_text(toml_document(config))
    (folder / "journal.jsonl").write_text("".join(json.dumps(told) + "\n" for told in events) + tail)
    return folder
