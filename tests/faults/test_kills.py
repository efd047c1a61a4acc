"""SIGKILL at named and at random instants: the resumed run is the uninterrupted one, to the bit (the long form is `make
drill`); and that the comparison sees each thing that could be lost."""

import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from aimed_kills import FILE, LATEST, PLACES
from drill import LAYOUTS, deal_kills, drill, table
from drill_faults import KILLS, aimed_kill
from rank_processes import pretrain, results_of
from run_results import differences
from torch.distributed.checkpoint import FileSystemReader

STEPS = 4
SETTINGS = [f"train.steps={STEPS}", "train.evaluate_every_steps=2", "checkpoint.every_steps=2"]


def test_five_kills_lose_nothing(small_config, tmp_path):
    faults = [
        aimed_kill("in forward", False, rank=1),
        aimed_kill("in the optimizer", False, rank=0),
        aimed_kill(FILE, True, rank=1),
        aimed_kill(LATEST, False, rank=0),
        KILLS[0],
    ]
    rows = list(drill(small_config, tmp_path, faults, seed=11, layout=LAYOUTS[2], steps=28).values())
    print(table(rows))
    assert sum(row.tried for row in rows) == len(faults) == 5
    for row in rows:
        assert row.survived == row.tried, row.text()
        assert not row.lost, row.text()


def test_fifty_kills_hit_each_rank_at_each_place():
    sizes = [2, 2, 2, 4, 4]
    hands = deal_kills(50, sizes, random.Random(1))
    assert [len(hand) for hand in hands] == [10] * 5
    aimed = [fault.aim for hand in hands for fault in hand if fault.aim]
    assert sorted(aimed) == sorted((rank, *place) for rank in range(4) for place in PLACES)
    for size, hand in zip(sizes, hands, strict=True):
        assert all(fault.aim[0] < size for fault in hand if fault.aim)


def _draw_in_every_step(restored: bool) -> None:
    """Training that draws from every generator, as K2's does not; perhaps resumed without them."""
    import random

    import numpy
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    import k2_megatron.train.checkpoints.load as checkpoint_load
    import pretrain_k2

    train_step = pretrain_k2.train_step

    def step(*arguments, **more):
        with get_cuda_rng_tracker().fork():
            torch.rand(1)
        random.random(), numpy.random.rand(), torch.rand(1)
        return train_step(*arguments, **more)

    pretrain_k2.train_step = step
    if not restored:
        checkpoint_load.restore_random_states = lambda _states: None


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory) -> Path:
    """A run that draws random numbers, and was not disturbed."""
    folder = tmp_path_factory.mktemp("drawing") / "run"
    settings = [*SETTINGS, f"run.folder={folder}"]
    draw = partial(_draw_in_every_step, True)
    results_of(pretrain(1, small_config, settings, folder.with_name("output"), draw))
    return folder


@pytest.mark.parametrize("restored", [True, False])
def test_generators_go_on_where_they_were(small_config, tmp_path, whole, restored):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    (folder / "checkpoints" / "latest").write_text("step_00000002\n")
    settings = [*SETTINGS, f"run.folder={folder}"]
    results_of(pretrain(1, small_config, settings, tmp_path / "output", partial(_draw_in_every_step, restored)))
    assert differences(whole, folder, STEPS) == ([] if restored else ["generators"])


def _flip_stored(run: Path, name: str) -> None:
    """Flip a bit in the middle of the last checkpoint's entry of this name."""
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    places = FileSystemReader(folder).read_metadata().storage_data
    (place, *_) = [place for index, place in places.items() if index.fqn.startswith(name)]
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def _tell(file: str, event: str, key: str, run: Path, *, again: bool = False) -> None:
    """Change a letter or digit of `key` in the last event of this kind; or have it told so and then rightly."""
    lines = (run / file).read_text().splitlines(keepends=True)
    number = max(number for number, line in enumerate(lines) if f'"event": "{event}"' in line)
    before, value, after = re.split(rf'("{key}": "?[^",}}]*)', lines[number], maxsplit=1)
    changed = f"{before}{value[:-8]}{int(value[-8], 16) ^ 1:x}{value[-7:]}{after}"
    lines[number : number + (not again)] = [changed]
    (run / file).write_text("".join(lines))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (partial(_flip_stored, name="embedding."), "1 weights"),
        (partial(_flip_stored, name="optimizer.state.param."), "1 weights"),
        (partial(_flip_stored, name="optimizer.state.exp_avg."), "1 moments"),
        (partial(_flip_stored, name="optimizer.state.exp_avg_sq."), "1 moments"),
        (partial(_flip_stored, name="random_states"), "generators"),
        (partial(_tell, "journal.jsonl", "step", "loss"), "journal"),
        (partial(_tell, "journal.jsonl", "step", "loss", again=True), "journal"),
        (partial(_tell, "journal.jsonl", "step", "grad_norm"), "journal"),
        (partial(_tell, "journal.jsonl", "evaluation", "held_out_loss"), "journal"),
        (partial(_tell, "ledger.jsonl", "position", "chain"), "ledger"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, (*value.args, *value.keywords.values()))),
)
def test_comparison_sees(tmp_path, whole, change, found):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert differences(whole, folder, STEPS) == []
    change(run=folder)
    assert differences(whole, folder, STEPS) == [found]
