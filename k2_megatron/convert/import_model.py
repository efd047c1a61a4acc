"""from-hf: a Hugging Face model becomes a checkpoint that pretrain_k2.py starts from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2_megatron.config import Config, load_config
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.estimate import announce, proof_phase
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.journal import sole_writer
from k2_megatron.convert.logits import prove
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.to_torch_dist import TorchDistJob, empty_extra_state
from k2_megatron.convert.training_side import (
    Product,
    aside_folder,
    check_layout,
    files_as_they_are,
    require_new,
    seal,
    write_checkpoint,
    writing_phases,
)
from k2_megatron.convert.transformers_model import TransformersModel, require_transformers
from k2_megatron.convert.workers import Workers
from k2_megatron.runtime.durable import write_file
from k2_megatron.train.checkpoints.imported_record import RECORD, TOKENIZER, Record, copy_tokenizer


@dataclass(frozen=True)
class ImportOptions:
    """What a person chooses. `config` is the training configuration to start with; without it one is made."""

    load: Path
    save: Path
    config: Path | None = None
    precision: str | None = None
    vocab_size: int | None = None
    tensor: int = 1
    pipeline: int = 1
    workers: int = 1
    proof: bool = True


def import_hugging_face(options: ImportOptions) -> Path:
    """Convert, compare, prove, publish; returns the checkpoint. ConversionError names what stands against it."""
    require_new(options.save, 0)
    if options.proof:
        require_transformers()
    facts = ModelFacts.from_hugging_face(options.load)
    source = HuggingFaceSource(options.load, facts)
    config = training_config(options, facts, source.dtypes["weights"])
    facts = facts.with_vocabulary(vocab_size=config.model.vocab_size)
    source.shape = facts.shape
    job = TorchDistJob(
        source,
        aside_folder(options.save, 0),
        config.train.precision,
        options.tensor,
        options.pipeline,
        objects=empty_extra_state(facts.shape),
    )
    check_layout(facts.shape, options.tensor, options.pipeline)
    phases = writing_phases(job, options.workers)
    phases += [proof_phase(source.read_bytes_total(("weights",)))] if options.proof else []
    announce(phases, options.load, options.save)
    with sole_writer(job.folder):
        require_new(options.save, 0)  # again: another may have finished before the lock was ours
        return _write_proved(options, job, source, facts, config)


def _write_proved(
    options: ImportOptions, job: TorchDistJob, source: HuggingFaceSource, facts: ModelFacts, config: Config
) -> Path:
    record = Record(
        "from-hf",
        str(options.load.resolve()),
        source.dtypes["weights"],
        facts.shape.used_vocabulary,
        facts.tied_embeddings,
        facts.context,
        facts.rope_base,
        json.loads((options.load / "config.json").read_text()),
    )
    beginning = {
        "step": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "layout": f"converted-tp{options.tensor}-pp{options.pipeline}",
        "data": None,
        "conversion": record.as_json(),
    }
    files = {tensor.file for tensor in source.tensors.values()} | {"config.json"}
    plan = {"source": files_as_they_are(options.load, files), "precision": job.precision,
            "vocabulary": facts.shape.vocab_size, "tensor": options.tensor, "pipeline": options.pipeline}  # fmt: skip
    with Workers(options.workers) as workers:
        product = write_checkpoint(job, config, beginning, plan, workers)
        _tell_rounding(product, source)
        written = seal(product, job, workers)
    if options.proof:
        proof = prove(TransformersModel(options.load), written, facts, product.exact_kind, source.dtypes["weights"])
        product.record_proof(proof)
    options.save.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(options.load, options.save / TOKENIZER)
    write_file(options.save / RECORD, json.dumps(record.as_json(), indent=1) + "\n")
    write_file(options.save / "start.toml", config.to_toml())
    return product.publish()


def _tell_rounding(product: Product, source: HuggingFaceSource) -> None:
    if product.rounding.values:
        print(
            f"{product.rounding.values:,} of {source.shape.parameters:,} weights were rounded from "
            f"{source.dtypes['weights']} to {product.manifest['precision']} (largest relative change "
            f"{product.rounding.largest:.2g}); the fp32 parameters of the optimizer have them exactly"
        )


def training_config(options: ImportOptions, facts: ModelFacts, source_dtype: str) -> Config:
    """The configuration that training starts with: the given one, checked against the model, or a plain one."""
    if options.config is not None:
        config = load_config(options.config)
        _check_agrees(options, config, facts)
        return config
    precision = options.precision or ("float32" if source_dtype == "float32" else "bfloat16")
    model = facts.model_table()
    if options.vocab_size is not None:
        model["vocab_size"] = options.vocab_size
    table = {
        "run": {"folder": str(options.save), "seed": 1},
        "model": model,
        "data": {"train": "name the training data here"},
        "train": {"steps": 1000, "micro_batch": 1, "global_batch": 1, "precision": precision},
        "optimizer": {"learning_rate": 1e-5, "schedule": "constant"},
    }
    try:
        return Config.model_validate(table)
    except ValueError as error:
        raise ConversionError(f"{options.load} cannot be trained: {' '.join(str(error).split())}") from None


def _check_agrees(options: ImportOptions, config: Config, facts: ModelFacts) -> None:
    wanted: dict[str, Any] = facts.model_table()
    del wanted["sequence_length"]  # training may use another length than the model was made for
    differing = []
    for key, value in wanted.items():
        mine = getattr(config.model, key)
        if (mine < value) if key == "vocab_size" else (mine != value):
            differing.append(f"model.{key} is {mine}, the model has {value}")
    if options.precision not in (None, config.train.precision):
        differing.append(f"--precision {options.precision} contradicts train.precision {config.train.precision}")
    if options.vocab_size not in (None, config.model.vocab_size):
        differing.append(f"--vocab-size {options.vocab_size} contradicts model.vocab_size {config.model.vocab_size}")
    if config.model.implementation != "k2":
        differing.append("model.implementation must be k2")
    if differing:
        raise ConversionError(f"{options.config} does not describe {options.load}: {'; '.join(differing)}")
