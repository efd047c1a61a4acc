"""Every mistake a configuration can hold, made once: the message names the key, the value found and the remedy."""

import re

import pytest

from k2_megatron.config import load_config
from k2_megatron.config.checks import CHECKS

TOY = "examples/toy/toy.toml"

# (the check or the kind of mistake, what is set, what the one line about it must say)
MISTAKES = [
    ("type", ["model.layers='4'"], 'model.layers = "4": should be a valid integer. Transformer layers.'),
    ("text", ["run.folder=7"], "run.folder = 7: should be a valid string; quote it to make it text."),
    ("bool", ["parallel.sequence=1"], "parallel.sequence = 1: should be a valid boolean."),
    ("range", ["train.steps=0"], "train.steps = 0: should be greater than 0."),
    ("range", ["optimizer.beta2=1.0"], "optimizer.beta2 = 1.0: should be less than 1."),
    ("finite", ["optimizer.learning_rate=inf"], "optimizer.learning_rate = inf: should be a finite number."),
    ("choice", ["optimizer.schedule=linear"], "optimizer.schedule = \"linear\": should be 'cosine', 'wsd' or"),
    (
        "choice",
        ["model.kernels=gpu"],
        "model.kernels.default = \"gpu\": should be 'auto', 'cuda', 'cpu', 'torch', 'apex' or 'transformer_engine'",
    ),
    ("choice", ["model.kernels.swiglu=triton"], 'model.kernels.swiglu = "triton": should be'),
    ("choice", ["model.kernels.swiglu=apex"], 'model.kernels.swiglu = "apex": should be'),
    (
        "seed",
        ["run.seed=9223372036854775808"],
        "run.seed = 9223372036854775808: should be less than 9223372036854775808",
    ),
    ("zero", ["checkpoint.keep_every_steps=0"], "checkpoint.keep_every_steps = 0: should be greater than 0."),
    ("table", ["train.batch_ramp=3"], "train.batch_ramp = 3: should be a table."),
    ("missing", ["model.heads="], "model.heads: is missing. Query heads;"),
    ("missing", ["train.batch_ramp.start=4"], "train.batch_ramp.increment: is missing."),
    ("unknown", ["train.stepz=9"], "train.stepz = 9: is no key; did you mean steps?"),
    ("unknown", ["train.learning_rate=9"], "train.learning_rate = 9: is no key; did you mean optimizer.learning_rate?"),
    ("unknown", ["train.zzz=9"], "train.zzz = 9: is no key; known in train are steps, micro_batch"),
    (
        "unknown",
        ["model.kernels.gelu=cpu"],
        'model.kernels.gelu = "cpu": is no key; known in model.kernels are default',
    ),
    ("unknown section", ["modle.layers=4"], "modle = {layers = 4}: is no section; did you mean model?"),
    ("unknown section", ["zzz.layers=4"], "zzz = {layers = 4}: is no section; known are run, model"),
    ("override", ["train.steps"], '--set = "train.steps": must read section.key=value'),
    ("override", ["steps=4"], '--set = "steps=4": must read section.key=value'),
    ("override", ["train.steps.more=4"], '--set = "train.steps.more=4": steps is a value, not a table'),
    (
        "hidden_by_heads",
        ["model.heads=6", "model.kv_heads=6"],
        "model.hidden_size = 256: must be a multiple of model.heads = 6; nearest are 252 and 258",
    ),
    ("even_head_dim", ["model.hidden_size=12"], "model.heads = 4: gives an odd head dimension 3"),
    (
        "heads_by_kv_heads",
        ["model.kv_heads=8"],
        "model.heads = 4: must be a multiple of model.kv_heads = 8; nearest is 8",
    ),
    (
        "heads_by_tensor",
        ["parallel.tensor=8"],
        "model.heads = 4: must be a multiple of parallel.tensor = 8; nearest is 8",
    ),
    ("kv_heads_by_tensor", ["model.kv_heads=1"], "model.kv_heads = 1: must be a multiple of parallel.tensor = 2"),
    (
        "ffn_by_tensor",
        ["model.ffn_hidden_size=687"],
        "model.ffn_hidden_size = 687: must be a multiple of parallel.tensor",
    ),
    (
        "vocabulary_by_tensor",
        ["model.vocab_size=4095"],
        "model.vocab_size = 4095: must be a multiple of parallel.tensor = 2; nearest are 4094 and 4096",
    ),
    (
        "kernel_overrides_with_transformer_engine",
        ["model.implementation=transformer_engine", "model.kernels.rms_norm=torch"],
        'model.kernels.rms_norm = "torch": has no effect with model.implementation = "transformer_engine"',
    ),
    (
        "default_kernels_compute_every_op",
        ["model.kernels=apex"],
        'model.kernels.default = "apex": has no rotary, cross_entropy, swiglu: name it beside the ops that it has',
    ),
    (
        "default_kernels_compute_every_op",
        ['model.kernels={default="transformer_engine", adamw="torch"}'],
        'model.kernels.default = "transformer_engine": has no swiglu: name it',
    ),
    (
        "chunked_loss_is_ours",
        ["model.kernels.cross_entropy=transformer_engine", "model.loss_chunk_tokens=64"],
        "model.loss_chunk_tokens = 64: needs a cross-entropy of ours, not transformer_engine's",
    ),
    (
        "layers_by_stages",
        ["parallel.virtual_pipeline=4"],
        "model.layers = 4: must be a multiple of parallel.pipeline * parallel.virtual_pipeline = 2 * 4 = 8",
    ),
    (
        "virtual_pipeline_needs_stages",
        ["parallel.pipeline=1", "parallel.virtual_pipeline=2"],
        "parallel.virtual_pipeline = 2: has no effect with parallel.pipeline = 1",
    ),
    (
        "sequence_needs_tensor",
        ["parallel.tensor=1"],
        "parallel.sequence = true: has no effect with parallel.tensor = 1",
    ),
    (
        "sharded_optimizer_needs_replicas",
        ["parallel.distributed_optimizer=true"],
        "parallel.distributed_optimizer = true: has no effect with one data-parallel rank",
    ),
    (
        "comparing_needs_replicas",
        ["train.compare_replicas_every_steps=5", "parallel.tensor=1", "parallel.sequence=false"],
        "train.compare_replicas_every_steps = 5: has no effect with one rank a stage",
    ),
    (
        "sequence_length_splits",
        ["model.sequence_length=255"],
        "model.sequence_length = 255: must be a multiple of parallel.tensor = 2; nearest are 254 and 256",
    ),
    (
        "sequence_length_splits",
        ["model.sequence_length=252", "parallel.context=2"],
        "model.sequence_length = 252: must be a multiple of 2 * parallel.context = 4 times parallel.tensor = 2",
    ),
    (
        "batches_divide",
        ["train.global_batch=18"],
        "train.global_batch = 18: must be a multiple of train.micro_batch * parallel.data = 4 * 1 = 4; nearest are 16",
    ),
    (
        "batches_divide",
        ["train.batch_ramp={start=6, increment=2, samples=64}"],
        "train.batch_ramp.start = 6: must be a multiple of train.micro_batch * parallel.data = 4 * 1 = 4",
    ),
    (
        "gradient_leaves_divide",
        ["train.gradient_leaves=12", "parallel.data=2", "train.global_batch=48"],
        "train.gradient_leaves = 12: goes with parallel.data = 12, 6, 3, 1, which is 2: change one of them",
    ),
    (
        "gradient_leaves_divide",
        ["train.gradient_leaves=8"],
        "train.global_batch = 16: must be a multiple of train.micro_batch * train.gradient_leaves = 4 * 8 = 32;",
    ),
    (
        "gradient_leaves_divide",
        ["train.gradient_leaves=2", "train.batch_ramp={start=4, increment=12, samples=64}"],
        "train.batch_ramp.start = 4: must be a multiple of train.micro_batch * train.gradient_leaves = 4 * 2 = 8",
    ),
    (
        "interleaved_micro_batches",
        ["parallel.virtual_pipeline=2", "train.global_batch=12"],
        "train.global_batch = 12: makes 3 micro-batches, and the interleaved schedule needs a multiple of",
    ),
    (
        "interleaved_micro_batches",
        ["parallel.virtual_pipeline=2", "train.batch_ramp={start=8, increment=4, samples=64}"],
        "train.batch_ramp.increment = 4: makes 1 micro-batches",
    ),
    (
        "ramp_reaches_full_batch",
        ["train.batch_ramp={start=16, increment=4, samples=64}"],
        "train.batch_ramp.start = 16: must be below train.global_batch = 16",
    ),
    (
        "ramp_reaches_full_batch",
        ["train.batch_ramp={start=4, increment=8, samples=64}"],
        "train.batch_ramp.increment = 8: must divide train.global_batch - start = 16 - 4 = 12",
    ),
    (
        "ramp_ends_within_run",
        ["train.batch_ramp={start=4, increment=4, samples=64000}"],
        "train.batch_ramp.samples = 64000: the ramp takes",
    ),
    (
        "ramp_ends_within_run",
        ["train.batch_ramp={start=4, increment=4, samples=96}", "train.steps=15"],
        "train.batch_ramp.samples = 96: the ramp takes 15 steps and train.steps = 15 never sees the full batch",
    ),
    (
        "evaluation_is_whole",
        ["data.held_out="],
        "train.evaluate_every_steps = 80: has no effect without data.held_out: give that too, or remove it",
    ),
    (
        "evaluation_is_whole",
        ["train.evaluate_every_steps=", "train.evaluate_batches="],
        'data.held_out = "runs/toy_data/held_out": has no effect without train.evaluate_every_steps and',
    ),
    (
        "warmup_ends_within_run",
        ["optimizer.warmup_steps=240"],
        "optimizer.warmup_steps = 240: must be below train.steps = 240",
    ),
    (
        "decay_fits_schedule",
        ["optimizer.decay_steps=9"],
        'optimizer.decay_steps = 9: has no effect with schedule = "cosine": remove it',
    ),
    ("decay_fits_schedule", ["optimizer.schedule=wsd"], 'optimizer.decay_steps: is missing: schedule = "wsd" needs'),
    (
        "decay_fits_schedule",
        ["optimizer.schedule=wsd", "optimizer.decay_steps=221"],
        "optimizer.decay_steps = 221: must be at most train.steps - warmup_steps = 220",
    ),
    (
        "floor_fits_schedule",
        ["optimizer.schedule=constant"],
        'optimizer.min_learning_rate = 0.00015: has no effect with schedule = "constant": remove it',
    ),
    ("floor_fits_schedule", ["optimizer.min_learning_rate="], "optimizer.min_learning_rate: is missing: schedule ="),
    (
        "floor_fits_schedule",
        ["optimizer.min_learning_rate=0.1"],
        "optimizer.min_learning_rate = 0.1: must not exceed optimizer.learning_rate = 0.0015",
    ),
    (
        "kept_checkpoints_exist",
        ["checkpoint.keep_every_steps=100"],
        "checkpoint.keep_every_steps = 100: must be a multiple of checkpoint.every_steps = 80; nearest are 80 and 160",
    ),
    (
        "start_optimizer_needs_start",
        ["checkpoint.start_optimizer=kept"],
        'checkpoint.start_optimizer = "kept": has no effect without checkpoint.start_from: remove it',
    ),
    (
        "kept_checkpoints_exist",
        ["checkpoint.keep_every_steps=80", "checkpoint.keep_last="],
        "checkpoint.keep_every_steps = 80: has no effect without checkpoint.keep_last",
    ),
    (
        "retries_end_before_the_watchdog_does",
        ["watchdog.pause_seconds=240"],
        "checkpoint.retry_seconds = 120.0: must be less than half of watchdog.pause_seconds = 240, which",
    ),
    (
        "retries_end_before_the_watchdog_does",
        ["checkpoint.retry_seconds=150"],
        "checkpoint.retry_seconds = 150.0: must be less than half of watchdog.pause_minimum_seconds = 300, which",
    ),
    (
        "spike_policy_is_whole",
        ["spikes.max_rollbacks=2"],
        'spikes.max_rollbacks = 2: has no effect with spikes.policy = "watch"',
    ),
    ("spike_policy_is_whole", ["spikes.policy=rollback"], 'spikes.scope: is missing: spikes.policy = "rollback"'),
    (
        "going_back_finds_a_checkpoint",
        ["spikes.policy=skip", "spikes.scope=batches", "spikes.max_rollbacks=1", "checkpoint.chunks=1"],
        'spikes.policy = "skip": goes back to a checkpoint, and checkpoint.every_steps = 240 makes none before',
    ),
    (
        "resolve",
        ["parallel.ranks=6"],
        "parallel.ranks = 6: must be a multiple of parallel.tensor * pipeline * context = 2 * 2 * 1 = 4",
    ),
    ("resolve", ["parallel.ranks=8", "parallel.data=2"], "parallel.ranks = 8: says again what parallel.data = 2 says"),
    ("resolve", ["checkpoint.chunks=7"], "checkpoint.chunks = 7: must divide train.steps = 240"),
    ("resolve", ["checkpoint.every_steps=80"], "checkpoint.chunks = 3: says again what every_steps = 80 says"),
]


def message(overrides, **options):
    with pytest.raises(ValueError) as caught:
        load_config(TOY, overrides, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "overrides", "line"), MISTAKES, ids=[f"{kind}:{','.join(sets)}" for kind, sets, _ in MISTAKES]
)
def test_mistake_is_named_with_value_and_remedy(kind, overrides, line):
    assert f"\n  {line}" in message(overrides)


def test_every_check_is_triggered():
    in_no_file = {"history_is_of_this_run"}  # test_history.py
    assert {check.__name__ for check in CHECKS} - in_no_file <= {kind for kind, _, _ in MISTAKES}


def test_all_problems_are_reported_at_once():
    """A wrong type in a section hides neither its other mistakes, nor other sections', nor what they mean together."""
    text = message(
        [
            "train.steps='x'",
            "train.precison=float32",
            "train.global_batch=18",
            "model.heads=3",
            "parallel.ranks=6",
            "optimizer.schedule=wsd",
            "log.every_steps=0",
        ]
    )
    assert text.startswith(f"{TOY}: 9 problems\n")
    keys = sorted(re.findall(r"^  ([a-z_.]+)", text, re.MULTILINE))
    assert keys == sorted(
        [
            "train.steps",
            "train.precison",
            "train.global_batch",
            "model.hidden_size",
            "model.heads",
            "model.heads",
            "parallel.ranks",
            "log.every_steps",
            "optimizer.decay_steps",
        ]
    )


def test_ranks_that_do_not_fit_the_layout():
    assert "ranks started = 6: must be a multiple of parallel.tensor * pipeline * context" in message([], world_size=6)
    assert "ranks started = 0: must be a multiple of" in message([], world_size=0)


def test_missing_file_and_broken_toml(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.toml: cannot be read as a configuration: No such file"):
        load_config(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nsteps = 4\n")
    with pytest.raises(ValueError, match=r"broken.toml: is not TOML: .*line 1"):
        load_config(broken)
    broken.write_bytes(b"[train]\nname = '\xff'\n")
    with pytest.raises(ValueError, match=r"broken.toml: is not TOML: 'utf-8'"):
        load_config(broken)


def test_section_that_is_a_value(tmp_path):
    file = tmp_path / "flat.toml"
    file.write_text("train = 4\n")
    with pytest.raises(ValueError, match=r"\n  train = 4: must be a table: \[train\]\n"):
        load_config(file)
