"""What a valid file becomes: derived numbers, overrides, the batch ramp, the way back to TOML, the fingerprint."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from k2_megatron.config import Config, load_config
from k2_megatron.config.__main__ import main, reference
from k2_megatron.config.batch import constant_stages, consumed_samples, ramp_stages, stage_at
from k2_megatron.config.schema import SECTIONS
from k2_megatron.kernels.dispatch import BACKENDS, OPS, PEER_OPS

TOY, STAGE1, STAGE2 = "examples/toy/toy.toml", "examples/k2_65b/stage1.toml", "examples/k2_65b/stage2.toml"
RAMP = "train.batch_ramp={start=4, increment=4, samples=96}"


def test_numbers_that_follow_from_stage_1():
    config = load_config(STAGE1)
    assert config.world_size == 480
    assert config.parallel.data == 15
    assert config.checkpoint.every_steps == 941
    assert config.checkpoints == 360
    assert config.checkpoint.every_steps * config.train.global_batch == 1_919_640
    assert config.tokens_per_step == 4_177_920
    assert config.total_samples == 691_070_400
    assert config.total_tokens == 1_415_312_179_200
    assert config.micro_batches_at(0) == config.micro_batches_at(338_759) == 34
    assert config.model.head_dim == 128
    assert config.layers_per_chunk == 20


def test_derived_numbers_are_not_written_in_stage_1():
    values = {line.split("#")[0].strip() for line in Path(STAGE1).read_text().splitlines()}
    assert not any(number in value.split() for value in values for number in ("941", "15", "4177920", "128"))


def test_each_value_of_the_k2_files_has_its_source():
    for path in (STAGE1, STAGE2):
        lines = Path(path).read_text().splitlines()
        unsourced = [line for line in lines if "=" in line.split("#")[0] and "#" not in line]
        assert [line for line in unsourced if not line.startswith(("every_steps", "tensorboard"))] == [], path


def test_stage_2_continues_the_model_of_stage_1():
    first, second = load_config(STAGE1), load_config(STAGE2)
    differing = {key for key, value in first.model if value != getattr(second.model, key)}
    assert differing == {"sequence_length", "rope_base"}
    assert second.tokens_per_step == first.tokens_per_step
    assert second.total_tokens == pytest.approx(69.4e9, rel=1e-3)


def test_ranks_that_run_decide_data_parallelism():
    assert load_config(STAGE1, world_size=32 * 30).parallel.data == 30
    assert load_config(TOY, world_size=8).parallel.data == 2
    assert load_config(TOY, ["parallel.data=4"], world_size=8).parallel.data == 2
    assert load_config(TOY, ["parallel.data=4"]).parallel.data == 4
    assert load_config(TOY, ["parallel.ranks=16"]).parallel.data == 4
    one_rank = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"]
    assert load_config(TOY, one_rank, world_size=1).world_size == 1


def test_overrides_are_toml_values_or_text():
    config = load_config(
        TOY,
        [
            "run.folder=runs/a b#c",
            "data.tokenizer='quoted'",
            "optimizer.learning_rate = 3e-3",
            "optimizer.weight_decay=0",
            "parallel.sequence=false",
            "model.kernels={default='cpu', rms_norm='torch'}",
            "model.kernels.swiglu=torch",
            "optimizer.clip_grad_norm=",
            "train.steps=30",
            "train.steps=60",
        ],
    )
    assert config.run.folder == "runs/a b#c"
    assert config.data.tokenizer == "quoted"
    assert config.optimizer.learning_rate == 3e-3
    assert config.optimizer.weight_decay == 0.0
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.parallel.sequence is False
    assert [config.model.kernels.backend(op) for op in ("rms_norm", "rotary", "swiglu")] == ["torch", "cpu", "torch"]
    assert config.optimizer.clip_grad_norm is None
    assert config.train.steps == 60


EDGES = [
    ["run.seed=9223372036854775807"],
    ['model.kernels={default="apex", rotary="torch", cross_entropy="torch", swiglu="torch"}'],
    ["parallel.pipeline=1"],
    ["parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false"],
    ["parallel.virtual_pipeline=2"],
    ["parallel.data=2", "parallel.distributed_optimizer=true"],
    ["parallel.data=2", "train.compare_replicas_every_steps=1"],
    ["model.sequence_length=255", "parallel.sequence=false"],
    [
        *("model.implementation=transformer_engine", "model.kernels.adamw=torch", "parallel.context=4"),
        *("parallel.distributed_optimizer=true", "parallel.sequence=false", "model.sequence_length=200"),
    ],
    ["optimizer.warmup_steps=239"],
    ["optimizer.schedule=wsd", "optimizer.decay_steps=220"],
    ["optimizer.schedule=constant", "optimizer.min_learning_rate="],
    ["optimizer.min_learning_rate=1.5e-3"],
    ["optimizer.min_learning_rate=0.0"],
    ["checkpoint.keep_every_steps=160"],
    ["checkpoint.chunks=", "checkpoint.every_steps=1000"],
    [RAMP, "train.steps=16", "optimizer.warmup_steps=0", "checkpoint.chunks=1"],
    ["train.batch_ramp={start=4, increment=12, samples=64}"],
    ["parallel.virtual_pipeline=2", "train.batch_ramp={start=8, increment=8, samples=64}"],
    ["data.held_out=", "train.evaluate_every_steps=", "train.evaluate_batches="],
]


@pytest.mark.parametrize("overrides", EDGES, ids=[",".join(overrides) for overrides in EDGES])
def test_what_is_just_right_is_accepted(overrides):
    load_config(TOY, overrides)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_that_may_be_named_are_those_that_there_are(backend, op):
    if backend not in PEER_OPS or op in PEER_OPS[backend]:
        assert load_config(TOY, [f"model.kernels.{op}={backend}"]).model.kernels.backend(op) == backend
    else:
        with pytest.raises(ValueError, match=f"model.kernels.{op} = "):
            load_config(TOY, [f"model.kernels.{op}={backend}"])


def test_tree_is_frozen():
    config = load_config(TOY)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train = None


def test_built_without_a_file_it_is_checked_as_well():
    tree = load_config(TOY).model_dump(exclude_none=True)
    tree["model"]["heads"] = 6
    with pytest.raises(ValueError, match=r"model.heads = 6: must be a multiple of model.kv_heads = 4"):
        Config.model_validate(tree)


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        (TOY, []),
        (STAGE1, []),
        (STAGE2, []),
        (TOY, [RAMP, 'run.folder="a\\"b\\\\c\\t\\u007f é"', "model.kernels.adamw=torch", "optimizer.epsilon=1e-300"]),
        (TOY, ["optimizer.schedule=wsd", "optimizer.decay_steps=10", "optimizer.clip_grad_norm="]),
    ],
)
def test_round_trip_through_toml(tmp_path, path, overrides):
    config = load_config(path, overrides)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    again = load_config(file)
    assert again == config
    assert again.to_toml() == config.to_toml()
    assert again.fingerprint == config.fingerprint


def test_fingerprint_names_the_training_and_not_the_layout():
    toy = load_config(TOY)
    same = load_config(
        TOY,
        [
            "parallel.tensor=1",
            "parallel.sequence=false",
            "train.micro_batch=2",
            "run.folder=x",
            "data.train=y",
            "model.kernels=torch",
            "log.every_steps=1",
            "checkpoint.keep_last=",
            "train.recompute=full",
        ],
    )
    assert same.fingerprint == toy.fingerprint
    assert len(toy.fingerprint) == 16
    assert (toy.train.micro_batch, same.train.micro_batch) == (4, 2)
    changes = ["run.seed=1", "optimizer.beta2=0.9", "train.global_batch=32", "train.steps=120", "model.rope_base=5e5"]
    for change in [*changes, "train.precision=bfloat16", RAMP]:
        assert load_config(TOY, [change]).fingerprint != toy.fingerprint, change


def test_every_field_says_what_it_means():
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"
            assert field.description.strip().endswith("."), f"{name}.{key}"


def test_reference_lists_every_key_with_default_and_meaning():
    lines = reference().splitlines()
    assert [line.split("]")[0][1:] for line in lines if line.startswith("[")] == list(SECTIONS)
    entries = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line and line[0] not in " ["}
    assert entries["steps"] == "required"
    assert entries["batch_ramp"] == "left out"
    assert entries["batch_ramp.increment"] == "required"
    assert entries["kernels"] == '{default = "auto"}'
    assert entries["kernels.adamw"] == "left out"
    assert {key for section in SECTIONS.values() for key in section.model_fields} <= set(entries)
    assert "    Transformer layers." in lines


def test_reference_takes_no_configuration_for_checked(monkeypatch, capsys):
    """What is ignored must not look like what was found right."""
    monkeypatch.setattr(sys, "argv", ["config", "run.toml"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unrecognized arguments: run.toml" in capsys.readouterr().err


# The batch ramp


def test_ramp_of_known_numbers():
    # 96 samples in three shares of 32: 8 steps of 4, 4 steps of 8, then 12 until 96 are consumed (3 steps: 100).
    stages = [(stage.first_step, stage.first_sample, stage.global_batch) for stage in ramp_stages(4, 4, 96, 16, 256)]
    assert stages == [(0, 0, 4), (8, 32, 8), (12, 64, 12), (15, 100, 16)]
    config = load_config(TOY, [RAMP])
    assert [config.global_batch_at(step) for step in (0, 7, 8, 11, 12, 14, 15, 239)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [config.micro_batches_at(step) for step in (0, 8, 12, 15)] == [1, 2, 3, 4]
    assert [config.consumed_samples_at(step) for step in (0, 1, 8, 9, 15, 16)] == [0, 4, 32, 40, 100, 116]
    assert config.consumed_tokens_at(9) == 40 * 256
    assert config.total_samples == 100 + 225 * 16


@settings(deadline=None)
@given(
    start=st.integers(1, 60),
    increment=st.integers(1, 40),
    growths=st.integers(1, 9),
    samples=st.integers(1, 4000),
    steps=st.integers(0, 400),
)
def test_ramp_is_what_adding_up_step_by_step_gives(start, increment, growths, samples, steps):
    """Against the definition: the batch grows once for each share of `samples` that has been consumed."""
    full = start + growths * increment
    stages = ramp_stages(start, increment, samples, full, 8)
    consumed = 0
    for step in range(steps):
        assert consumed_samples(stages, step) == consumed
        batch = full if consumed >= samples else start + consumed * growths // samples * increment
        assert stage_at(stages, step).global_batch == batch
        consumed += batch
    assert consumed_samples(stages, steps) == consumed


def test_no_step_is_before_the_first():
    with pytest.raises(ValueError, match="step -1 asked for"):
        stage_at(constant_stages(8, 8), -1)
