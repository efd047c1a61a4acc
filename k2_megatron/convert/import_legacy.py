"""from-k2-legacy: an iteration of the old K2 training code becomes a checkpoint that goes on, Adam state included."""

from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.estimate import CHECK_ADAM, Phase, announce, proof_phase
from k2_megatron.convert.import_model import ImportOptions, training_config
from k2_megatron.convert.journal import sole_writer
from k2_megatron.convert.legacy_check import LegacyCheck
from k2_megatron.convert.legacy_k2 import LegacyK2Source
from k2_megatron.convert.legacy_model import LegacyModel
from k2_megatron.convert.logits import prove
from k2_megatron.convert.to_torch_dist import TorchDistJob, empty_extra_state
from k2_megatron.convert.training_side import (
    aside_folder,
    check_layout,
    files_as_they_are,
    require_new,
    seal,
    write_checkpoint,
    writing_phases,
)
from k2_megatron.convert.work import run_checks
from k2_megatron.convert.workers import Workers
from k2_megatron.train.checkpoints.imported_record import versions


def import_legacy(options: ImportOptions, *, optimizer: bool) -> Path:
    """Check, convert, compare, publish; returns the checkpoint. ConversionError names what stands against it."""
    source = LegacyK2Source(options.load, optimizer=optimizer)
    step = source.iteration
    require_new(options.save, step)
    config = training_config(options, source.facts, source.dtypes["weights"])
    if config.model.vocab_size != source.shape.vocab_size:
        raise ConversionError(
            f"{options.load} has {source.shape.vocab_size} vocabulary rows, model.vocab_size is "
            f"{config.model.vocab_size}; they are not padded while Adam's state comes along"
        )
    job = TorchDistJob(
        source,
        aside_folder(options.save, step),
        config.train.precision,
        options.tensor,
        options.pipeline,
        objects=empty_extra_state(source.shape),
    )
    check_layout(source.shape, options.tensor, options.pipeline)
    announce(_phases(options, job), options.load, options.save)
    with sole_writer(job.folder):
        require_new(options.save, step)  # again: another may have finished before the lock was ours
        return _write_proved(options, job, source, config)


def _phases(options: ImportOptions, job: TorchDistJob) -> list[Phase]:
    source = job.source
    phases = writing_phases(job, options.workers)
    if "main" in source.dtypes:
        checked = source.read_bytes_total(("weights", "main"))
        phases.insert(0, Phase("check of Adam's order", CHECK_ADAM, checked, workers=options.workers))
    if options.proof:
        phases.append(proof_phase(source.read_bytes_total(("weights",))))
    return phases


def _write_proved(options: ImportOptions, job: TorchDistJob, source: LegacyK2Source, config: Config) -> Path:
    step = source.iteration
    consumed = getattr(source.arguments, "consumed_train_samples", None)
    if options.config is not None and consumed not in (None, config.consumed_samples_at(step)):
        print(
            f"the old run had consumed {consumed:,} samples at iteration {step}; by {options.config} it is "
            f"{config.consumed_samples_at(step):,}, and training goes on from there"
        )
    if consumed is None:
        consumed = config.consumed_samples_at(step)
    updates = step if source.updates is None else source.updates
    beginning = {
        "step": step,
        "optimizer_step": updates if "exp_avg" in source.dtypes else 0,  # moments of zeros are Adam's beginning
        "consumed_samples": consumed,
        "consumed_tokens": consumed * source.facts.context,
        "layout": f"legacy-tp{source.tensor_parallel}-pp{source.pipeline_parallel}",
        "data": None,
        "legacy": {"source": str(options.load.resolve()), "versions": versions()},
    }
    plan = {"source": files_as_they_are(options.load, source.files), "iteration": step, "kinds": sorted(source.dtypes),
            "precision": job.precision, "tensor": options.tensor, "pipeline": options.pipeline}  # fmt: skip
    check = LegacyCheck(source)
    with Workers(options.workers) as workers:
        run_checks(check, check.units(), workers, "check the ranks")
        product = write_checkpoint(job, config, beginning, plan, workers)
        written = seal(product, job, workers)
    if options.proof:
        # fp32 parameters of the shards, rounded, are the shards' weights: LegacyCheck has seen it.
        dtype = source.dtypes["weights"]
        product.record_proof(prove(LegacyModel(options.load), written, source.facts, product.exact_kind, dtype))
    return product.publish()
