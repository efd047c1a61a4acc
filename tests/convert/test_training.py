"""Where training meets conversion: it starts from a converted model, and what it saves under TP and PP comes out."""

from pathlib import Path

import pytest
from conversions import export_model, import_model, model_config, source_of, write_llama
from rank_processes import pretrain
from run_results import events_of, steps_of

from k2_megatron.convert.logits import Bound, compare_logits
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.transformers_model import TransformersModel
from k2_megatron.convert.verify import verify_training

CONFIG = """
[run]
folder = "{folder}"
seed = 1
[model]
layers = 3
hidden_size = 64
ffn_hidden_size = 172
heads = 4
kv_heads = 2
vocab_size = 256
sequence_length = 32
rope_base = 50000.0
[parallel]
{layout}
[data]
train = "{text}/train"
[train]
steps = 1
micro_batch = 2
global_batch = 4
precision = "{precision}"
[optimizer]
learning_rate = 1e-3
schedule = "constant"
"""


def train(tmp_path: Path, text_folder: Path, precision: str, ranks: int, layout: str) -> Path:
    """Import a model of 250 pieces under a training configuration with 256, train a step; the run folder."""
    write_llama(tmp_path / "hf", kv_heads=2, vocabulary=250)
    config = tmp_path / "train.toml"
    config.write_text(
        CONFIG.format(folder=tmp_path / "run", text=text_folder, precision=precision, layout=layout), encoding="utf-8"
    )
    import_model(tmp_path / "hf", tmp_path / "run", config=config, tensor=1)
    outcomes = pretrain(ranks, config, [], tmp_path / "ranks")
    assert [outcome.exit_code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    # The fingerprint of the loaded weights is compared by pretrain_k2.py itself: it would have stopped.
    assert events_of(tmp_path / "run", "resume")[0]["checkpoint"] == "step_00000000"
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("precision", "ranks", "layout"),
    [
        ("bfloat16", 2, "distributed_optimizer = true\ndata = 2"),
        ("float32", 6, "tensor = 2\npipeline = 3"),
    ],
    ids=["bfloat16-distributed-optimizer", "float32-pipeline"],
)
def test_training_starts_from_a_converted_model_and_its_checkpoint_comes_out(
    tmp_path: Path, text_folder: Path, precision: str, ranks: int, layout: str
) -> None:
    run = train(tmp_path, text_folder, precision, ranks, layout)
    assert steps_of(run)[1]["loss"] < 8.0
    trained = source_of(run)
    assert verify_training(run / "checkpoints" / "step_00000001", workers=1) == []
    export_model(run, tmp_path / "out", shard_bytes=100_000)  # undoes the padding, by the run's record
    assert model_config(tmp_path / "out")["vocab_size"] == 250
    facts = ModelFacts.from_hugging_face(tmp_path / "out")
    assert facts.shape.used_vocabulary == 250
    assert facts.rope_base == 50000.0
    proof = compare_logits(TransformersModel(tmp_path / "out"), trained, facts, Bound.for_weights(equal=True))
    assert proof.difference <= 1e-5 * max(1.0, proof.largest_logit), proof
