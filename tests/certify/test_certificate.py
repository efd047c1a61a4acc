"""The tool says "same" of sound layouts, "different" of the faults of tests/layouts, and in JSON what on the screen."""

import json
import re
import signal

import certify_tool
import layout_faults
import pytest
from loaded_tool import loaded_tool

from k2_megatron.certify.verdict import FACTOR
from k2_megatron.runtime import launch

TOOL = loaded_tool("certify_layout")


@pytest.fixture
def local_ranks(monkeypatch, tmp_path):
    """A plain start of ranks forks them, which have their imports behind them."""
    started = []

    def fork(arguments, ranks, *_):
        assert arguments[1] == "record"
        started.append(ranks)
        folder = tmp_path / "ranks" / str(len(started))
        return max(certify_tool.record_on_ranks(ranks, arguments[2:], folder), key=abs)

    monkeypatch.setattr(launch, "run_local_ranks", fork)
    return started


def rows(screen: str) -> list[list[str]]:
    """The cells of the table's lines: quantity, difference, rounding, bound, verdict, place."""
    lines = [line for line in screen.splitlines() if re.match(r"  (?!first different)\S.*\b(same|DIFFERENT)\b", line)]
    return [re.split(r"\s{2,}", line.strip(), maxsplit=5) for line in lines]


def test_sound_layouts_are_certified_and_the_run_folder_is_not_touched(local_ranks, small_config, tmp_path, capsys):
    output, run = tmp_path / "certificate.json", tmp_path / "run"
    arguments = [str(small_config), "--set", f"run.folder={run}", "--layouts", "tp2,dp2-do,tp2", "--steps", "1"]
    assert TOOL.main([*arguments, "--repeats", "1", "--output", str(output)]) == 0
    assert local_ranks == [1, 2, 2]
    told, screen = json.loads(output.read_text()), capsys.readouterr().out
    assert not run.exists() and not list(tmp_path.glob(".certify_*"))
    assert (told["verdict"], [layout["layout"] for layout in told["layouts"]]) == ("same", ["tp2", "dp2-do"])
    assert screen.splitlines()[-1] == f"SAME as one process, to rounding: tp2, dp2-do; {output}"

    quantities = [one for layout in told["layouts"] for one in layout["quantities"]]
    assert len(rows(screen)) == len(quantities) == 26
    for cells, one in zip(rows(screen), quantities, strict=True):
        assert cells[0] == one["quantity"]
        assert one["same"] and "same" in cells and "DIFFERENT" not in cells
        if one["bound"]:
            shown = [f"{one[key]:.1e}" if one[key] else "0" for key in ("difference", "rounding", "bound")]
            assert cells[1:4] == shown
            assert one["bound"] >= FACTOR * one["rounding"] > 0
            assert not one["difference"] or cells[5] == ", ".join(filter(None, [f"step {one['step']}", one["where"]]))


def test_certificate_says_by_what_it_was_made(reference, sound, tmp_path):
    output = tmp_path / "certificate.json"
    assert TOOL.main(["compare", str(reference), str(sound), "--output", str(output)]) == 0
    told = json.loads(output.read_text())
    layout = told["layouts"][0]
    assert told["seed"] == 7 and told["repeats"] == 3 and told["reference"]["ranks"] == 1
    assert (layout["layout"], layout["ranks"], layout["communication"], layout["steps"]) == ("tp2-sp", 2, "gloo", 2)
    assert layout["config"]["parallel"]["tensor"] == 2 and layout["versions"]["torch"] and layout["kernels"]["adamw"]
    assert layout["data"] == told["reference"]["data"] and "host" not in output.read_text()
    parameters = {one["where"].split(" [")[0] for one in layout["compared"] if "of each parameter" in one["quantity"]}
    assert len(parameters) == 3 + 4 * 6, "embedding, output, final norm, and six in each of four layers"


FAULTS = [
    (layout_faults.weights_drawn_from_the_generator_of_the_rank, "pp2", "initial weights", "initialized"),
    (layout_faults.samples_in_the_order_of_the_ranks, "dp2", "loss of each sample", "Their mean was the same"),
    (layout_faults.copies_of_hidden_states_counted_twice, "tp2", "output of each layer (RMS)", "outputs of layers are"),
    (layout_faults.a_copy_of_the_norms_has_other_gradients, "tp2", "copies that ranks hold", "added up over ranks"),
    (layout_faults.norms_unmarked_for_sequence_parallelism, "tp2-sp", "gradient of each parameter, norm", "layernorm"),
]


@pytest.mark.parametrize(("fault", "layout", "quantity", "said"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_is_different_and_its_first_quantity_is_named(
    record, reference, tmp_path, capsys, fault, layout, quantity, said
):
    output = tmp_path / "certificate.json"
    assert TOOL.main(["compare", str(reference), str(record(layout, fault=fault)), "--output", str(output)]) == 1
    told, screen = json.loads(output.read_text()), capsys.readouterr().out
    assert told["verdict"] == told["layouts"][0]["verdict"] == "different"
    first = told["layouts"][0]["first_different"]
    assert first["quantity"] == quantity and not first["same"]
    (line,) = [line for line in screen.splitlines() if line.startswith("  first different: ")]
    assert quantity in line and first["where"] in line and said in line
    assert screen.splitlines()[-1] == f"DIFFERENT from one process: {layout} (1 of 1); {output}"
    shown = {cells[0]: "DIFFERENT" in cells for cells in rows(screen)}
    assert shown == {one["quantity"]: not one["same"] for one in told["layouts"][0]["quantities"]}
    assert shown[quantity]


def test_a_layout_whose_ranks_fail_is_no_verdict(monkeypatch, small_config, tmp_path, capsys):
    monkeypatch.setattr(launch, "run_local_ranks", lambda *_: 3)
    output = tmp_path / "certificate.json"
    assert TOOL.main([str(small_config), "--layouts", "tp2", "--output", str(output)]) == 3
    assert not output.exists() and "one process was not recorded" in capsys.readouterr().err


MISTAKES = [
    (["--layouts", "tp3"], "layout tp3: model.heads = 4: must be a multiple of parallel.tensor = 3"),
    (["--layouts", "tp2,xp2"], "layout 'xp2': 'xp2' is no part of a layout; give a name such as"),
    (["--layouts", "tp2-tp4"], "layout 'tp2-tp4': 'tp4' stands twice"),
    (["--layouts", ""], "layout '': '' is no part of a layout"),
    (["--ranks", "7"], "--ranks 7: no layout of 7 ranks divides this model and its batch"),
    (["--ranks", "1"], "one process is the reference itself; name --layouts of more ranks"),
    (["--ranks", "0"], "--ranks 0: give 1 or more"),
    (["--steps", "0"], "--steps 0: give 1 or more"),
    (["--steps", "6"], "--steps 6: the run has train.steps = 5"),
    (["--repeats", "0"], "--repeats 0: give 1 or more"),
    (["--set", "data.train=nowhere"], "nowhere"),
    (["--output", "nowhere/certificate.json"], "--output nowhere/certificate.json: there is no folder nowhere"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_started(
    local_ranks, small_config, tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert TOOL.main([str(small_config), "--set", "parallel.tensor=2", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not local_ranks and not list(tmp_path.iterdir())


def test_records_that_cannot_be_compared_are_refused(record, reference, sound, tmp_path, capsys):
    for arguments, said in (
        ([tmp_path, sound], f"{tmp_path} is no whole record"),
        ([sound, reference], f"{sound} has no perturbed repeats"),
        ([reference, record("", settings=("run.seed=8",))], "is of another configuration"),
    ):
        output = tmp_path / "certificate.json"
        assert TOOL.main(["compare", *map(str, arguments), "--output", str(output)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not output.exists()


def test_every_layout_of_four_ranks_is_asked_for(small_config):
    from k2_megatron.certify.layouts import layout_named, layouts_of, name_of
    from k2_megatron.config import load_config

    names = [name_of(parallel) for parallel in layouts_of(load_config(small_config), 4)]
    assert len(names) == len(set(names)) and {"tp4", "tp2-pp2-sp", "pp2-vp2-dp2-do", "cp4", "dp4-do"} <= set(names)
    assert all(name_of(layout_named(name)) == name for name in names)


def test_a_folder_of_records_is_kept_where_it_is_asked_for(small_config, tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    arguments = [str(small_config), "--layouts", "tp2", "--records", str(tmp_path / "kept")]
    assert TOOL.main(arguments) == 2
    assert "is there and is no empty folder" in capsys.readouterr().err


def test_records_are_removed_when_the_tool_is_terminated(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), TOOL.folder_for(None, tmp_path / "certificate.json"):  # noqa: PT012
        assert len(list(tmp_path.iterdir())) == 1
        signal.raise_signal(signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_of_a_launcher_refuses_more_steps_than_the_run_has(small_config, tmp_path):
    arguments = [str(small_config), "--steps", "6", "--output", str(tmp_path / "record")]
    assert certify_tool.record_on_ranks(1, arguments, tmp_path / "ranks") == [2]
    assert "--steps 6: the run has train.steps = 5" in (tmp_path / "ranks" / "rank_0" / "stderr").read_text()
    assert not (tmp_path / "record").exists()


def test_a_record_is_not_written_over(small_config, reference, tmp_path):
    before = (reference / "record.json").read_bytes()
    arguments = [str(small_config), "--steps", "1", "--output", str(reference)]
    assert certify_tool.record_on_ranks(1, arguments, tmp_path) == [2]
    assert "is there and is no empty folder" in (tmp_path / "rank_0" / "stderr").read_text()
    assert (reference / "record.json").read_bytes() == before
