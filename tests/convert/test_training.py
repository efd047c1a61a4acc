"""Where training meets conversion: it starts from a converted model, and what it saves under TP and PP comes out."""

import shutil
from pathlib import Path

import numpy
import pytest
from conversions import export_model, import_model, model_config, source_of, write_llama
from legacy_checkpoint import known_model, write_legacy
from rank_processes import pretrain
from run_results import events_of, steps_of

from k2_megatron.config import load_config
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.import_model import ImportOptions
from k2_megatron.convert.logits import compare_logits
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import places
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.transformers_model import TransformersModel
from k2_megatron.convert.verify import verify_training
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest
from k2_megatron.train.summary import resume_changes, resume_report

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"
CONFIG = """
[run]
folder = "{folder}"
seed = 1
[model]
layers = {layers}
hidden_size = 64
ffn_hidden_size = 172
heads = 4
kv_heads = {kv_heads}
vocab_size = 256
sequence_length = 32
rope_base = {rope_base}
[parallel]
{layout}
[data]
train = "{text}/train"
[train]
steps = {steps}
micro_batch = 2
global_batch = 4
precision = "{precision}"
[optimizer]
learning_rate = 1e-3
schedule = "constant"
"""


def write_config(path: Path, run: Path, text_folder: Path, **chosen) -> Path:
    values = {"layers": 4, "kv_heads": 2, "rope_base": 50000.0, "steps": 1, "precision": "float32", **chosen}
    path.write_text(CONFIG.format(folder=run, text=text_folder, **values), encoding="utf-8")
    return path


def train(tmp_path: Path, text_folder: Path, precision: str, ranks: int, layout: str) -> Path:
    """Import a model of 250 pieces under a training configuration with 256, train a step; the run folder."""
    write_llama(tmp_path / "hf", kv_heads=2, vocabulary=250, layers=4)
    shutil.copyfile(TOKENIZER, tmp_path / "hf" / "tokenizer.json")
    run = tmp_path / "run"
    config = write_config(tmp_path / "train.toml", run, text_folder, precision=precision, layout=layout)
    import_model(tmp_path / "hf", run, config=config, tensor=1)
    start(config, ranks, run, "step_00000000")
    return run


def start(config: Path, ranks: int, run: Path, checkpoint: str) -> None:
    """Train to the end of the configuration, from `checkpoint`."""
    outcomes = pretrain(ranks, config, [], run.with_name(f"{run.name}-ranks"))
    assert [outcome.exit_code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    # The fingerprint of the loaded weights is compared by pretrain_k2.py itself: it would have stopped.
    assert events_of(run, "resume")[0]["checkpoint"] == checkpoint


@pytest.mark.parametrize(
    ("precision", "ranks", "layout"),
    [
        ("bfloat16", 2, "distributed_optimizer = true\ndata = 2"),
        ("float32", 4, "tensor = 2\npipeline = 2\nvirtual_pipeline = 2"),
    ],
    ids=["bfloat16-distributed-optimizer", "float32-interleaved-pipeline"],
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
    proof = compare_logits(TransformersModel(tmp_path / "out"), trained, facts)
    assert proof.difference <= 1e-5 * max(1.0, proof.largest_logit), proof


def test_the_record_of_an_imported_model_follows_its_weights(tmp_path: Path, text_folder: Path) -> None:
    """from-hf with padding, a step of training, then another folder by reshard, or by a second stage: to-hf still
    knows the padding, the token ids and the tokenizer."""
    run = train(tmp_path, text_folder, "float32", 1, "")
    reshard(run, tmp_path / "resharded", tensor=2, pipeline=2, workers=1)
    second = write_config(tmp_path / "second.toml", tmp_path / "second", text_folder, layout="")
    second.write_text(second.read_text() + f'[checkpoint]\nstart_from = "{run}"\n')
    outcomes = pretrain(1, second, [], tmp_path / "second-ranks")
    assert outcomes[0].exit_code == 0, outcomes[0].stderr
    for name in ("resharded", "second"):
        saved = export_model(tmp_path / name, tmp_path / f"{name}-hf")
        assert model_config(saved)["vocab_size"] == 250, name
        assert model_config(saved)["bos_token_id"] == 1, name
        assert (saved / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes(), name


def test_the_record_of_another_model_is_not_mixed_in(tmp_path: Path) -> None:
    for name, vocabulary in (("one", 128), ("other", 132)):
        write_llama(tmp_path / f"{name}-hf", vocabulary=vocabulary)
        import_model(tmp_path / f"{name}-hf", tmp_path / name)
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"conversion\.json is the record of another model"):
        reshard(tmp_path / "one", tmp_path / "other", tensor=1, pipeline=1, workers=1)


def test_training_goes_on_from_old_shards_with_their_adam_state(tmp_path: Path, text_folder: Path) -> None:
    """One step with Adam's old state and one from zero state, on the same weights and rows: the gradient is the same,
    so the moments differ by what came from the shards, decayed once."""
    weights, moments = known_model(tmp_path / "hf", layers=4, vocabulary=256)
    write_legacy(tmp_path / "iter_0000941", weights, moments, 2, 2, 2, iteration=3)
    trained = {}
    for name, optimizer in (("with", True), ("without", False)):
        run = tmp_path / name
        chosen = {"kv_heads": 4, "rope_base": 10000.0, "precision": "bfloat16", "layout": "tensor = 2", "steps": 4}
        config = write_config(tmp_path / f"{name}.toml", run, text_folder, **chosen)
        import_legacy(
            ImportOptions(tmp_path / "iter_0000941", run, config=config, pipeline=4, proof=False), optimizer=optimizer
        )
        before = source_of(run)
        start(config, 2, run, "step_00000003")
        assert events_of(run, "resume")[0]["step"] == 3
        trained[name] = source_of(run)
        if optimizer:
            shards = before
    for kind, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        for place in places(shards.shape):
            rows = place.entry.size(shards.shape)[0]
            old, with_state, without = (
                source.read(kind, place, 0, rows).view(numpy.float32) for source in (shards, *trained.values())
            )
            assert old.any()
            numpy.testing.assert_allclose(
                with_state - without, decay * old, rtol=0, atol=1e-5, err_msg=str((kind, place))
            )


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model of RoPE base 50,000, norm epsilon 1e-5 and context 256."""
    folder = tmp_path_factory.mktemp("imported")
    write_llama(folder / "hf", kv_heads=2, vocabulary=256, layers=4)
    import_model(folder / "hf", folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "model.rope_base was 50000.0 and is now 10000.0 (another model: begin a new run with checkpoint.start"),
        ("rope_base = 50000.0\nnorm_epsilon = 1e-6", "model.norm_epsilon was 1e-05 and is now 1e-06 (another model"),
    ],
    ids=["rope-base-left-out", "norm-epsilon"],
)
def test_an_imported_model_does_not_start_as_another(imported: Path, tmp_path: Path, line: str, says: str) -> None:
    config = write_config(tmp_path / "train.toml", imported, tmp_path, layout="")
    config.write_text(config.read_text().replace("rope_base = 50000.0", line))
    folder = imported / "checkpoints" / "step_00000000"
    with pytest.raises(CheckpointError, match="is an imported model of another configuration") as refused:
        resume_changes(load_config(config), read_manifest(folder), folder, ())
    assert says in str(refused.value)


def test_what_differs_of_an_imported_model_is_told(imported: Path, tmp_path: Path) -> None:
    """Another length and another batch are the new training's own."""
    config = load_config(write_config(tmp_path / "train.toml", imported, tmp_path, layout="", steps=9))
    folder = imported / "checkpoints" / "step_00000000"
    manifest = {**read_manifest(folder), "step": 3, "consumed_samples": 24}  # as from-k2-legacy writes it
    found = resume_changes(config, manifest, folder, ())
    assert [(change.key, change.outcome) for change in found] == [("model.sequence_length", "accepted")]
    text = resume_report(config, manifest, folder, [], found)
    assert "accepted: model.sequence_length was 256 and is now 32 (an imported model may be" in text
    assert "the imported run had consumed 24 samples; by this configuration it is 12" in text


def test_an_imported_checkpoint_beyond_the_end_is_refused(imported: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "train.toml", imported, tmp_path, layout=""))
    folder = imported / "checkpoints" / "step_00000000"
    with pytest.raises(CheckpointError, match="is of step 941"):
        resume_changes(config, {**read_manifest(folder), "step": 941}, folder, ())
