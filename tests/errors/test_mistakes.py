"""What a user gets wrong: one line that says what was asked, what was found and what to do, and exit code 2."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from endings import MISTAKE, says_one_line
from rank_processes import rank_environment

import pretrain_k2
from k2_megatron.data.manifest import manifest_of_foreign_files

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"  # 4096 pieces


@pytest.fixture
def tokens(text_folder, tmp_path) -> Path:
    """A copy of the training tokens, to be damaged; the prefix."""
    for suffix in (".bin", ".idx"):
        shutil.copy(text_folder / f"train{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


def test_run_folder_of_another_configuration(attempt, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    outcomes = attempt({"train.steps": 6, "run.seed": 8, "optimizer.beta2": 0.9})
    says_one_line(
        outcomes,
        MISTAKE,
        f"{tmp_path / 'run'} holds a run of another configuration: ",
        "run.seed was 7 and is now 8 (the initial weights and the data order came from it)",
        "Give run.folder another name, or undo these changes to resume",
    )
    assert "checkpoint.every_steps" not in outcomes[0].stderr, "what does not shape the training may change"
    assert "optimizer.beta2" not in outcomes[0].stderr, "what --set changes on purpose may change"


def test_missing_data_file(attempt, tmp_path):
    outcomes = attempt({"data.train": tmp_path / "nowhere"})
    says_one_line(outcomes, MISTAKE, f"{tmp_path}/nowhere.bin: no such file; make it with tools/preprocess_data.py")
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_run_folder_that_cannot_be_made(attempt):
    said = "run.folder /proc/no_folder cannot be written (No such file or directory: /proc/no_folder); make room or"
    says_one_line(attempt({"run.folder": "/proc/no_folder"}), MISTAKE, said)


@pytest.mark.parametrize("until", ["0", "-3", "2.5", "soon"])
def test_until_that_is_no_step(until, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain_k2.main(["run.toml", f"--until={until}"])
    assert f"--until: '{until}' is no step: they are counted from 1" in capsys.readouterr().err


def test_plan_or_dry_run_and_not_both(capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain_k2.main(["run.toml", "--plan", "--dry-run"])
    assert "--dry-run: not allowed with argument --plan" in capsys.readouterr().err


def test_truncated_data_file(attempt, tokens):
    content = tokens.with_suffix(".bin").read_bytes()
    tokens.with_suffix(".bin").write_bytes(content[:-100])
    outcomes = attempt({"data.train": tokens})
    says_one_line(outcomes, MISTAKE, f"{tokens}.bin: {len(content) - 100} bytes, its .idx describes {len(content)}")


def test_altered_tokens_are_found_before_they_are_trained_on(attempt, tokens, tmp_path):
    manifest_of_foreign_files(str(tokens))
    content = bytearray(tokens.with_suffix(".bin").read_bytes())
    for place in range(0, len(content), 1000):  # in every block, so that the first step meets one
        content[place] ^= 1
    tokens.with_suffix(".bin").write_bytes(content)
    says_one_line(attempt({"data.train": tokens}), MISTAKE, f"{tokens}.bin: bytes ", "differ from their hash")
    steps = [json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert "step" not in steps


def test_tokens_of_a_larger_vocabulary(attempt, tokens):
    manifest_of_foreign_files(str(tokens), {"vocab_size": 4096})
    outcomes = attempt({"data.train": tokens})
    says_one_line(outcomes, MISTAKE, f"{tokens}: made with a tokenizer of 4096 pieces, model.vocab_size is 256")


def test_token_ids_beyond_the_vocabulary(attempt):
    says_one_line(attempt({"model.vocab_size": 96}), MISTAKE, "train.bin", "model.vocab_size is 96")


def test_tokenizer_of_a_larger_vocabulary(attempt):
    outcomes = attempt({"data.tokenizer": TOKENIZER})
    says_one_line(outcomes, MISTAKE, f"{TOKENIZER}", "4096 pieces", "model.vocab_size is 256")


def test_missing_tokenizer(attempt, tmp_path):
    says_one_line(attempt({"data.tokenizer": tmp_path / "none.json"}), MISTAKE, f"{tmp_path}/none.json: no such tokeni")


def test_layout_that_divides_nothing_is_told_whole(attempt):
    (outcome,) = attempt(
        {
            "model.heads": 6,
            "model.kv_heads": 6,
            "model.hidden_size": 66,
            "model.vocab_size": 257,
            "parallel.tensor": 4,
            "parallel.pipeline": 3,
            "train.global_batch": 9,
        }
    )
    assert outcome.exit_code == MISTAKE
    for line in (
        "model.heads = 6: must be a multiple of parallel.tensor = 4; nearest are 4 and 8",
        "model.layers = 4: must be a multiple of parallel.pipeline * parallel.virtual_pipeline = 3 * 1 = 3",
        "model.vocab_size = 257: must be a multiple of parallel.tensor = 4",
        "train.global_batch = 9: must be a multiple of train.micro_batch * parallel.data = 2 * 1 = 2",
    ):
        assert line in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_ranks_that_do_not_fill_the_layout(attempt):
    (outcome,) = attempt({"parallel.tensor": 2}, environment=rank_environment(0, 3, 1))
    assert outcome.exit_code == MISTAKE
    assert "ranks started = 3: must be a multiple of parallel.tensor * pipeline * context" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_configuration_that_is_no_file(tmp_path):
    from rank_processes import pretrain

    says_one_line(pretrain(1, tmp_path / "no.toml", [], tmp_path), MISTAKE, "no.toml: cannot be read")


def test_port_in_use(attempt):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        step = {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": "7",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        outcomes = attempt({}, environment=step)
    says_one_line(outcomes, MISTAKE, f"port {port} on 127.0.0.1 is in use", "set MASTER_PORT to a free port")


def without_transformer_engine() -> None:
    sys.modules["transformer_engine"] = None


def without_wandb() -> None:
    sys.modules["wandb"] = None


@pytest.mark.parametrize("ranks", [1, 2])
def test_transformer_engine_missing(attempt, ranks):
    settings = {"model.implementation": "transformer_engine", "parallel.data": ranks}
    outcomes = attempt(settings, ranks, fault=without_transformer_engine)
    says_one_line(outcomes, MISTAKE, "Transformer Engine, which is not installed", 'pip install "k2_megatron[te]"')


def test_wandb_missing(attempt):
    outcomes = attempt({"log.wandb": "project"}, fault=without_wandb)
    says_one_line(outcomes, MISTAKE, "Weights & Biases, which is not installed", 'pip install "k2_megatron[wandb]"')


def test_checkpoint_of_other_data(attempt, finished_run, text_folder, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    other = {"data.train": text_folder / "held_out", "data.held_out": text_folder / "train"}
    outcomes = attempt({"train.steps": 6, **other})
    says_one_line(outcomes, MISTAKE, "the checkpoint of step 6 was trained on data", "put the old files back")


def test_mistake_in_our_code_keeps_its_traceback(attempt):
    (outcome,) = attempt({}, fault=broken_step)
    assert outcome.exit_code == 1
    assert "Traceback" in outcome.stderr
    assert "a defect" in outcome.stderr


def broken_step() -> None:
    import pretrain_k2

    def step(*_unused, **_unused_too):
        return int("a defect")  # a ValueError, but raised by Python and not by a check of ours

    pretrain_k2.train_step = step
