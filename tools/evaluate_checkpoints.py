"""Evaluate the checkpoints of a run: on its held-out data, on other texts, on tasks.

    python tools/evaluate_checkpoints.py runs/toy
    python tools/evaluate_checkpoints.py runs/toy --newest --text news=news.jsonl.xz --task questions.jsonl
    python tools/evaluate_checkpoints.py runs/k2 --every 3 --set parallel.tensor=8 --lm-eval hellaswag,arc_easy
    srun --ntasks=8 python tools/evaluate_checkpoints.py runs/k2 --steps 941,1882 --set parallel.tensor=8

The run is only read, and may be training. Results are appended to evaluations.jsonl in its folder; what stands there is
not computed again. docs/evaluate.md says what is computed. Exit codes: 0 done, 1 a checkpoint is damaged and was passed
over, 2 a mistake.
"""

import argparse
import sys
from pathlib import Path

from k2_megatron.evaluate.chosen import chosen_checkpoints
from k2_megatron.evaluate.evaluation import COLLECTIVE_TIMEOUT_SECONDS, Request, evaluate_all
from k2_megatron.evaluate.results import RESULTS
from k2_megatron.evaluate.texts import HarnessWanted, Wanted, named_paths, open_texts
from k2_megatron.runtime.launch import read_environment, run_local_ranks, single_rank
from k2_megatron.runtime.mistakes import leave, run_program
from k2_megatron.runtime.tool import INTERRUPTED, NOT_SOUND


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    environment = read_environment()
    request = request_of(options)
    folders = chosen_checkpoints(
        options.run, steps=_steps(options.steps), newest=options.newest, every=_positive("--every", options.every)
    )
    try:
        if environment is None:  # a plain start: tell mistakes once, here, and only then start ranks
            config = request.any_config(folders, None)
            if config.world_size > 1:
                open_texts(request.wanted, config, request.run)
                return run_local_ranks([__file__, *arguments], config.world_size, COLLECTIVE_TIMEOUT_SECONDS)
        return NOT_SOUND if evaluate_all(request, folders, environment or single_rank()) else 0
    except KeyboardInterrupt:
        if environment is None or environment.rank == 0:
            print(f"interrupted; the same command goes on with what is not yet in {request.output}", file=sys.stderr)
        return INTERRUPTED


def request_of(options: argparse.Namespace) -> Request:
    """What the options ask for. ValueError naming the option whose value cannot be used."""
    taken = {"held_out"}
    names = tuple(name for name in (options.lm_eval or "").split(",") if name)
    if options.lm_eval is not None and not names:
        raise ValueError("--lm-eval: give tasks, as in --lm-eval hellaswag,arc_easy")
    if options.shots is not None and options.shots < 0:
        raise ValueError(f"--shots {options.shots}: give 0 or more")
    harness = HarnessWanted(names, options.lm_eval_include, options.shots, _positive("--limit", options.limit))
    wanted = Wanted(
        held_out=options.held_out,
        data=named_paths("--data", options.data, taken),
        texts=named_paths("--text", options.text, taken),
        tasks=named_paths("--task", options.task, taken),
        harness=harness if names else None,
        rows=_positive("--rows", options.rows),
        window=_positive("--window", options.window),
        context=_positive("--context", options.context),
        tokenizer=options.tokenizer,
        key=options.text_key,
    )
    return Request(
        options.run,
        options.output or options.run / RESULTS,
        wanted,
        tuple(options.set),
        _positive("--micro-batch", options.micro_batch),
        options.again,
    )


def _positive(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{option} {value}: give 1 or more")
    return value


def _steps(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--steps {text}: give steps with commas between, as in --steps 80,160")
    return [int(part) for part in parts]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_checkpoints.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="the run folder, such as runs/toy")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", metavar="N,N", help="checkpoints of these steps; default: every one there is")
    which.add_argument("--newest", action="store_true", help="the one that a resume would take")
    which.add_argument("--every", type=int, metavar="N", help="those at multiples of N x checkpoint.every_steps")
    add("--no-held-out", dest="held_out", action="store_false", help="leave out the run's own held-out data")
    add("--data", nargs="+", default=[], metavar="[NAME=]PATH", help="plans, or prefixes of token files")
    add("--text", nargs="+", default=[], metavar="[NAME=]PATH", help="text files, folders or globs, encoded here")
    add("--task", nargs="+", default=[], metavar="[NAME=]FILE", help="questions or completions (docs/evaluate.md)")
    add("--lm-eval", metavar="TASK,TASK", help="tasks of lm-evaluation-harness, where it is installed")
    add("--lm-eval-include", metavar="FOLDER", help="a folder with more tasks of lm-evaluation-harness")
    add("--shots", type=int, metavar="N", help="examples before each question of --lm-eval (default: the task's)")
    add("--limit", type=int, metavar="N", help="questions of each --lm-eval task (default: all)")
    add("--rows", type=int, metavar="N", help="rows of the held-out data and of --data (default: docs/evaluate.md)")
    add("--window", type=int, metavar="N", help="longest window of --text and --task (default: the sequence length)")
    add("--context", type=int, metavar="N", help="tokens before each that counts in --text (default: half a window)")
    add("--tokenizer", metavar="PATH", help="tokenizer file or folder (default: the run's)")
    add("--text-key", default="text", metavar="KEY", help="the key or column that holds the text (default: text)")
    add("--micro-batch", type=int, metavar="N", help="rows in one forward pass of a rank (default: the run's)")
    add("--set", action="append", default=[], metavar="section.key=value", help="layout and kernels: parallel.tensor=2")
    add("--output", type=Path, metavar="FILE", help=f"where results go (default: {RESULTS} in the run folder)")
    add("--again", action="store_true", help="compute also what stands there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(lambda: run_program(main, sys.argv[1:]))
