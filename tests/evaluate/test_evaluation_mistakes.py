"""tools/evaluate_checkpoints.py asked for what is not there or does not fit: one line, before anything is loaded."""

import json
import shutil
import sys

import numpy as np
import pytest
from evaluation_ranks import evaluation_tool
from rank_processes import REPOSITORY

from k2_megatron.data.store import TokenWriter
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.evaluate.texts import open_texts
from k2_megatron.runtime.mistakes import run_program
from k2_megatron.runtime.tool import MISTAKE

TOY_TOKENIZER = str(REPOSITORY / "examples" / "toy" / "tokenizer.json")


@pytest.fixture
def tool():
    return evaluation_tool()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "3"), "has no checkpoint of step 3; it has 2, 4, 6"),
        (("--steps", "2,x"), "--steps 2,x: give steps with commas between"),
        (("--every", "4"), "--every 4: "),
        (("--every", "0"), "--every 0: give 1 or more"),
        (("--rows", "-1"), "--rows -1: give 1 or more"),
        (("--micro-batch", "0"), "--micro-batch 0: give 1 or more"),
        (("--micro-batch", "3"), "train.global_batch = 8: must be a multiple of train.micro_batch"),
        (("--shots", "-1"), "--shots -1: give 0 or more"),
        (("--lm-eval", ","), "--lm-eval: give tasks"),
        (("--text", "a/news.txt", "b/news.txt"), "another text is called news"),
        (("--text", "held_out=a"), "another text is called held_out"),
        (("--task", "a="), "--task a=: give a path, or NAME=PATH"),
        (("--set", "model.layers=2"), "--set model.layers=2: an evaluation takes parallel.*"),
        (("--set", "parallel.tensor=3"), "parallel.tensor = 3"),
        (("--set", "parallel.sequence=true"), "parallel.sequence"),
    ],
)
def test_option_that_cannot_be_used(tool, trained, capsys, arguments, says):
    assert run_program(tool.main, [str(trained()), *arguments]) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said


def test_folder_without_a_checkpoint(tool, tmp_path, capsys):
    assert run_program(tool.main, [str(tmp_path / "nowhere")]) == MISTAKE
    assert "nowhere is no run folder" in capsys.readouterr().err
    assert run_program(tool.main, [str(tmp_path)]) == MISTAKE
    assert "holds no checkpoint; train first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--no-held-out",), "nothing to evaluate on"),
        (("--rows", "100000"), "rows and 100,000 are asked for; lower --rows"),
        (("--data", "nowhere"), "nowhere"),
        (("--text", "EMPTY"), "holds no text; leave it out"),
        (("--text", "WRONG"), "line 2: "),
        (("--text", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--task", "nowhere.jsonl"), "nowhere.jsonl cannot be read (No such file or directory)"),
        (("--text", "EMPTY", "--window", "33"), "--window 33: the model was trained on 32 tokens"),
        (("--text", "EMPTY", "--window", "8", "--context", "9"), "--context 9: a window has 8 tokens"),
        (("--text", "EMPTY", "--tokenizer", TOY_TOKENIZER), "has 4096 pieces, the model 256"),
        (("--text", "EMPTY", "--tokenizer", ""), "names no data.tokenizer"),
        (("--lm-eval", "hellaswag"), 'pip install "k2_megatron[eval]"'),
    ],
)
def test_text_that_does_not_fit(tool, trained, texts, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "WRONG": str(tmp_path / "wrong.jsonl")}
    given = [*texts[:2], *(places.get(argument, argument) for argument in arguments)]
    request = tool.request_of(tool.parse([str(trained()), *given]))
    config = request.any_config(tool.chosen_checkpoints(request.run), None)
    with pytest.raises(ValueError) as error:
        open_texts(request.wanted, config, request.run)
    assert says in str(error.value)


def test_tokenizer_that_did_not_make_the_training_data(tool, trained, texts, tmp_path):
    """Two tokenizers of one size: the record of the token files tells them apart."""
    request = tool.request_of(tool.parse([str(trained()), *texts]))
    config = request.any_config(tool.chosen_checkpoints(request.run), None)
    plan = tmp_path / "data"
    for suffix in (".bin", ".idx"):
        shutil.copy(config.data.train + suffix, f"{plan}{suffix}")
    from k2_megatron.data.manifest import manifest_of_foreign_files

    own = load_tokenizer(texts[1])
    record = {"fingerprint": own.fingerprint, "end_of_document": own.end_of_document, "vocab_size": 256}
    manifest_of_foreign_files(str(plan), record)
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": str(plan)})})
    assert open_texts(request.wanted, config, request.run)
    other = tmp_path / "other.json"
    content = json.loads((tmp_path / own.path).read_text())
    content["model"]["vocab"]["a"], content["model"]["vocab"]["b"] = (content["model"]["vocab"][x] for x in "ba")
    other.write_text(json.dumps(content))
    request = tool.request_of(tool.parse([str(trained()), *texts[2:], "--tokenizer", str(other)]))
    with pytest.raises(ValueError, match="is not the tokenizer that made"):
        open_texts(request.wanted, config, request.run)


def test_held_out_prefix_that_training_reads_more_than_once(tool, trained, tmp_path):
    writer = TokenWriter(str(tmp_path / "short"), np.dtype("<u2"))
    writer.add(np.arange(1, 200), np.array([199]), end_of_document=0)  # 6 rows, of which one batch takes 8
    writer.finish()
    request = tool.request_of(tool.parse([str(trained())]))
    config = request.any_config(tool.chosen_checkpoints(request.run), None)
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out": str(tmp_path / "short")})})
    (held_out,) = open_texts(request.wanted, config, request.run)
    assert held_out.tokens == 8 * 32
