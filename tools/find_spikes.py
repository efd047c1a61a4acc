"""Find the loss spikes of a run after the fact, in its journal or in a CSV of loss and gradient norm, with a picture.

    python tools/find_spikes.py runs/k2_65b_stage1/journal.jsonl --picture spikes.html
    python tools/find_spikes.py curve.csv --window-steps 64 --threshold 30

A CSV has a heading; columns "step" and "loss" are needed, "grad_norm" is used when it is there. A journal tells of the
layers as well. The detector is the one that watches a training run; its settings are the defaults of section [spikes],
or those given. Prints one line a spike. Steps whose values are not finite are counted and left out.
"""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from k2_megatron.config.schema import Spikes
from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.spikes.after_the_fact import find_spikes, spike_line, write_picture
from k2_megatron.train.spikes.curve import Curve, read_curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("curve", type=Path, help="a journal.jsonl or a .csv")
    parser.add_argument("--picture", type=Path, help="write an HTML page with the curves and the spikes marked")
    parser.add_argument("--window-steps", type=int, default=Spikes().window_steps)
    parser.add_argument("--threshold", type=float, default=Spikes().threshold)
    parser.add_argument("--benign-steps", type=int, default=Spikes().benign_steps)
    arguments = parser.parse_args()
    return run_tool("find_spikes", lambda: tell_spikes(arguments))


def tell_spikes(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    curve = read_curve(arguments.curve)
    spikes = find_spikes(curve, settings)
    for spike in spikes:
        print(spike_line(spike, curve.norms is not None))
    print(f"{len(spikes)} spikes in {len(curve.steps)} steps{remarks(curve, settings)}")
    if arguments.picture:
        write_picture(arguments.picture, curve, spikes)
    return 0


def settings_of(arguments: argparse.Namespace) -> Spikes:
    """The detector's settings. ValueError naming the option that does not fit."""
    given = {key: getattr(arguments, key) for key in ("window_steps", "threshold", "benign_steps")}
    try:
        return Spikes(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = str(wrong["loc"][0])
        option, what = key.replace("_", "-"), wrong["msg"].removeprefix("Input ")
        raise ValueError(f"--{option} {given[key]}: {what}") from None


def remarks(curve: Curve, settings: Spikes) -> str:
    """What the count of spikes does not tell."""
    told = ""
    if curve.left_out:
        steps = "step" if len(curve.left_out) == 1 else "steps"
        told += f"; {len(curve.left_out)} {steps} not finite and left out, the first {curve.left_out[0]}"
    if len(curve.steps) <= settings.window_steps:
        told += f"; nothing is judged before {settings.window_steps} steps are known (--window-steps)"
    return told


if __name__ == "__main__":
    sys.exit(main())
