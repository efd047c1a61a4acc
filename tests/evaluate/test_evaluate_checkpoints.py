"""tools/evaluate_checkpoints.py on a small run: the journal's number, any layout, results kept, checkpoints that go."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
from evaluation_ranks import DOCUMENTS, beside_float64
from rank_processes import Rank, results_of

from k2_megatron.evaluate.results import read_results
from k2_megatron.runtime.journal import read_events

TP2 = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUT_OF = {
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "cp2": (2, ["parallel.context=2"]),
    "dp2": (2, []),
}
# Float32 keeps 24 bits; a loss is some hundred roundings of sums away from the same in another order.
ROUNDING = 1e-5
LARGEST_ERROR_OF_FLOAT32 = 2e-5


def sets(settings):
    return [part for setting in settings for part in ("--set", setting)]


def told_losses(run):
    events = read_events(run / "journal.jsonl")
    return {event["step"]: event["held_out_loss"] for event in events if event["event"] == "evaluation"}


def figures_of(path: Path) -> dict[tuple[int, str], dict]:
    return {(one["step"], one["text"]["name"]): one["figures"] for one in read_results(path)}


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {}), (2, TP2), (2, {"train.gradient_leaves": 4}), (1, {"train.precision": "bfloat16"})]
)
def test_held_out_loss_is_the_journals_to_the_bit_in_its_layout(trained, evaluation, tmp_path, ranks, settings):
    """Two data-parallel ranks with gradient leaves add up their losses by another rule."""
    run, output = trained(ranks, settings), tmp_path / "results.jsonl"
    layout = sets(f"{key}={str(value).lower()}" for key, value in settings.items() if key.startswith("parallel."))
    (said, *_) = evaluation(run, "--output", output, *layout, ranks=ranks)
    assert said.exit_code == 0, said.stderr
    found = {step: figures["loss"] for (step, _), figures in figures_of(output).items()}
    assert found == told_losses(run) and sorted(found) == [2, 4, 6]
    assert said.stdout.count("the journal's, to the bit") == 3


@pytest.fixture(scope="module")
def everything(trained, texts):
    """Arguments for the held-out data by the training loop's code, the same by windows, documents, choices,
    completions."""
    held_out = json.loads((trained() / "checkpoints" / "step_00000006" / "k2.json").read_text())["config"]["data"]
    return ["--newest", "--data", f"again={held_out['held_out']}", "--rows", 8, *texts, "--context", 16]


@pytest.fixture(scope="module")
def in_one_process(trained, evaluation, everything, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "one.jsonl"
    (said,) = evaluation(trained(), *everything, "--output", output)
    assert said.exit_code == 0, said.stderr
    return figures_of(output)


def test_figures_of_one_process_agree_with_each_other(in_one_process):
    figures = {name: found for (_, name), found in in_one_process.items()}
    assert figures.keys() == {"held_out", "again", "news", "quiz", "rest"}
    assert figures["again"]["loss"] == pytest.approx(figures["held_out"]["loss"], rel=ROUNDING)
    news = figures["news"]
    assert news["tokens"] == news["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert news["bits_per_byte"] == pytest.approx(news["loss"] / math.log(2), rel=1e-12)  # a token a byte


@pytest.mark.parametrize(("ranks", "settings"), LAYOUT_OF.values(), ids=LAYOUT_OF)
def test_every_layout_gives_the_figures_of_one_process(
    trained, evaluation, everything, in_one_process, tmp_path, ranks, settings
):
    output = tmp_path / "several.jsonl"
    outcomes = evaluation(trained(), *everything, "--output", output, *sets(settings), ranks=ranks)
    assert [outcome.exit_code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    found = figures_of(output)
    assert found.keys() == in_one_process.keys()
    for key, figures in in_one_process.items():
        for name, value in figures.items():
            other = found[key][name]
            near = value == other or (isinstance(value, float) and math.isclose(value, other, rel_tol=ROUNDING))
            assert near, f"{key}: {name} is {other}, in one process {value}"


def test_losses_and_likeliest_tokens_are_those_of_transformers_in_float64(small_config, tmp_path):
    difference, wrong, count = results_of([Rank(beside_float64, (small_config,), {}, tmp_path / "out").finish()])[0]
    assert difference < LARGEST_ERROR_OF_FLOAT32
    assert wrong == 0 and count > 50


def test_what_stands_in_the_results_is_not_computed_again(trained, evaluation, tmp_path):
    run, output = trained(), tmp_path / "results.jsonl"
    evaluation(run, "--steps", "2,4", "--output", output)
    first = output.read_bytes()
    output.write_bytes(first[:-20])  # killed in the midst of the second
    (said,) = evaluation(run, "--output", output)
    assert "step 2  held_out" in said.stdout and said.stdout.count("evaluated 20") == 1
    assert said.stdout.count("tokens/s") == 2
    assert [one["step"] for one in read_results(output)] == [2, 4, 6]
    (said,) = evaluation(run, "--newest", "--output", output, "--again")
    assert [one["step"] for one in read_results(output)] == [2, 4, 6, 6]
    result = read_results(output)[-1]
    assert result["settings"] == {"scoring": 1, "window_tokens": 32, "precision": "float32", "rows": 8}
    assert (result["figures"]["tokens"], result["text"]["kind"], result["consumed_tokens"]) == (256, "rows", 1536)


def remove_after_the_first(run: Path) -> None:
    """Retention comes when the first checkpoint has been evaluated: one goes before its turn, one while it is read."""
    from k2_megatron.evaluate import evaluation

    fill, calls = evaluation.fill, []

    def fill_and_remove(folder, parts):
        calls.append(folder)
        if len(calls) == 1:
            fill(folder, parts)
            shutil.rmtree(run / "checkpoints" / "step_00000004")
            return
        (folder / "k2.json").unlink()
        shutil.rmtree(folder)
        fill(folder, parts)

    evaluation.fill = fill_and_remove


def test_checkpoints_that_retention_removes_are_passed_over(trained, evaluation, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    (said,) = evaluation(run, fault=partial(remove_after_the_first, run))
    assert said.exit_code == 0, said.stderr
    for step in (4, 6):
        assert f"step_0000000{step} was removed meanwhile, and is passed over" in said.stdout
    assert [one["step"] for one in read_results(run / "evaluations.jsonl")] == [2]


def gone_for_rank_1(run: Path, before: bool) -> None:
    """Retention comes as rank 1 ends its load, or (`before`) alone keeps it from the load that rank 0 is in."""
    from torch import distributed

    from k2_megatron.evaluate import weights
    from k2_megatron.train.checkpoints.manifest import CheckpointError

    load_weights = weights.load_weights

    def load(folder, chunks, device):
        if distributed.get_rank() == 1 and before:
            raise CheckpointError("k2.json is gone")
        load_weights(folder, chunks, device)
        if distributed.get_rank() == 1:
            shutil.rmtree(run / "checkpoints" / folder.name)
            raise CheckpointError("k2.json is gone")

    weights.load_weights = load
    weights.WAITING_SECONDS = 1.0 if before else 60.0


def test_ranks_agree_on_a_checkpoint_that_one_of_them_finds_removed(trained, evaluation, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    outcomes = evaluation(run, "--newest", ranks=2, fault=partial(gone_for_rank_1, run, False))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[1].stderr
    assert "step_00000006 was removed meanwhile, and is passed over" in outcomes[0].stdout
    assert not (run / "evaluations.jsonl").exists()


def test_rank_that_waits_for_one_that_does_not_come_says_so(trained, evaluation, tmp_path):
    outcomes = evaluation(
        trained(), "--output", tmp_path / "results", ranks=2, fault=partial(gone_for_rank_1, "", True)
    )
    assert outcomes[1].exit_code == 2
    assert "k2.json is gone; other ranks have told nothing of theirs for 1 s" in outcomes[1].stderr


def test_damaged_checkpoint_is_named_and_the_others_are_evaluated(trained, evaluation, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for damaged in (run / "checkpoints" / "step_00000002").glob("__*.distcp"):
        content = bytearray(damaged.read_bytes())
        middle = len(content) // 2
        for place in range(0, len(content), 4096):  # somewhere in the weights
            content[place + 8 if place + 8 < len(content) else middle] ^= 0x10
        damaged.write_bytes(content)
        before.pop(damaged)
    (run / "checkpoints" / "step_00000004" / "k2.json").write_text("{")
    before.pop(run / "checkpoints" / "step_00000004" / "k2.json")
    (said,) = evaluation(run)
    assert said.exit_code == 1, said.stderr
    assert "step_00000002 is damaged (" in said.stdout and "k2.json is damaged" in said.stdout
    assert [one["step"] for one in read_results(run / "evaluations.jsonl")] == [6]
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the run is only read
    assert {path.name for path in run.iterdir()} == {path.name for path in trained().iterdir()} | {"evaluations.jsonl"}
