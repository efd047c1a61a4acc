"""SIGKILL at many moments of preprocessing, with one bad line in a hundred: the same command then makes what an
undisturbed one makes, byte for byte, keeps each finished shard, and counts every line once."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from rank_processes import Rank
from token_corpora import make_job, outputs

INSTANTS = 20
DOCUMENTS, BAD_LINES = 198, 2


def _in_fork(action: Callable[[], object]) -> int:
    """The code with which a process ends that does `action`; negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(number: int | None) -> list[str]:
    """Have this process killed at its `number`-th call that brings something to the disk; the calls made."""
    calls: list[str] = []

    def counted(name: str) -> Callable:
        original = getattr(os, name)

        def call(*arguments, **keywords):
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return original(*arguments, **keywords)

        return call

    os.fsync = lambda _descriptor: None  # no power is lost here, and waiting for a disk is dear
    for name in ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"):
        setattr(os, name, counted(name))
    return calls


def _kill_and_go_on(text: Path, tokenizer: str, scratch: Path) -> tuple[int, list[str]]:
    """(how many instants there are, what was wrong after a kill at which)."""
    import gigatoken  # noqa: F401  what the encoder imports, once for all forks

    from k2_megatron.data import shards
    from k2_megatron.data.preprocess import preprocess

    def run(folder: Path, kill: int | None = None, keep: Path | None = None) -> None:
        job = make_job([text], tokenizer, folder / "x", shard_bytes=32 << 10, one_file=True)
        calls = _kill_at(kill)
        if keep:
            made, make = [], shards._OpenShard.__init__

            def noted(self, maker, source, number):
                made.append(number)
                make(self, maker, source, number)

            shards._OpenShard.__init__ = noted
        totals = preprocess(job, workers=1, max_bad_fraction=0.02)
        facts = {"calls": len(calls), "made": made if keep else [], "totals": totals}
        (keep or scratch / "facts").write_text(json.dumps(facts))

    assert _in_fork(lambda: run(scratch / "whole")) == 0
    instants = json.loads((scratch / "facts").read_text())["calls"]
    wanted, wrong = outputs(scratch / "whole"), []
    for kill in sorted(random.Random(20).sample(range(instants), INSTANTS)):
        folder = scratch / str(kill)
        if _in_fork(lambda folder=folder, kill=kill: run(folder, kill)) != -signal.SIGKILL:
            wrong.append(f"instant {kill}: not killed")
        finished = [int(path.stem.split(".")[-1]) for path in folder.glob("x.shards/*.json")]
        if _in_fork(lambda folder=folder: run(folder, keep=scratch / "facts")) != 0:
            wrong.append(f"instant {kill}: it did not go on")
            continue
        facts = json.loads((scratch / "facts").read_text())
        again = set(finished) & set(facts["made"])
        if again:
            wrong.append(f"instant {kill}: finished shards {again} were made again")
        if (facts["totals"]["documents"], facts["totals"]["rejected"]) != (DOCUMENTS, BAD_LINES):
            wrong.append(f"instant {kill}: {facts['totals']}")
        if outputs(folder) != wanted:
            wrong.append(f"instant {kill}: other files")
        shutil.rmtree(folder)
    return instants, wrong


def test_killed_at_any_instant_the_same_command_gives_the_same_files(tmp_path, speeches, toy_tokenizer):
    lines = [json.dumps({"text": speeches[number % 40][: 900 + number]}) for number in range(DOCUMENTS)]
    for place in (50, 150):
        lines.insert(place, '{"text": 5')
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    arguments = (tmp_path / "in.jsonl", toy_tokenizer, tmp_path)
    outcome = Rank(_kill_and_go_on, arguments, {"RAYON_NUM_THREADS": "1"}, tmp_path / "output").finish()
    assert outcome.exit_code == 0, outcome.stderr
    instants, wrong = outcome.result
    assert instants > INSTANTS
    assert wrong == []
