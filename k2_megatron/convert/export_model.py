"""to-hf: one of our checkpoints becomes a folder that transformers, vLLM and the rest load unedited."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2_megatron.convert.errors import ConversionError, ProofFailed
from k2_megatron.convert.estimate import CONVERT, Phase, announce, proof_phase
from k2_megatron.convert.fingerprint import as_text
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.journal import JOURNAL, sole_writer
from k2_megatron.convert.logits import prove
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.numbers import Rounding
from k2_megatron.convert.safetensors_file import INDEX
from k2_megatron.convert.source import Kind
from k2_megatron.convert.to_hugging_face import HuggingFaceJob, tied_rows_equal
from k2_megatron.convert.torch_dist import TorchDistSource, checkpoint_folder, read_manifest
from k2_megatron.convert.transformers_model import TransformersModel, require_transformers
from k2_megatron.convert.work import require_space, run_units
from k2_megatron.convert.workers import Workers
from k2_megatron.runtime.durable import sync, write_file
from k2_megatron.train.checkpoints.file_hash import XXH3, file_facts, hash_file
from k2_megatron.train.checkpoints.imported_record import (
    TOKENIZER,
    Record,
    copy_tokenizer,
    find_record,
    tokenizer_files,
    versions,
)

MANIFEST = "k2_conversion.json"


@dataclass(frozen=True)
class ExportOptions:
    """What a person chooses. `weights` is "model" (as trained with) or "main" (the optimizer's fp32 parameters)."""

    load: Path
    save: Path
    dtype: str | None = None
    weights: str = "model"
    used_vocabulary: int | None = None
    tokenizer: Path | None = None
    shard_bytes: int = 5_000_000_000
    workers: int = 1
    proof: bool = True


def export_hugging_face(options: ExportOptions) -> Path:
    """Convert, check the fingerprint, prove, publish; returns the folder. ConversionError otherwise; CheckpointError
    where the record of an imported model is damaged."""
    _require_new(options.save)
    if options.proof:
        require_transformers()
    folder = checkpoint_folder(options.load)
    manifest = read_manifest(folder)
    source = TorchDistSource(folder, manifest)
    record = find_record(folder, manifest)
    tokenizer = options.tokenizer or _tokenizer_of(folder, manifest)
    if tokenizer is not None and not tokenizer_files(tokenizer):
        raise ConversionError(f"{tokenizer} holds no tokenizer file this tool knows; give --tokenizer another path")
    kind: Kind = "weights" if options.weights == "model" else "main"
    if kind not in source.dtypes:
        raise ConversionError(f"{folder} holds no fp32 parameters; leave out --weights main")
    tied = tied_rows_equal(source, kind) if record and record.tied_embeddings else False
    facts = exported_facts(options, manifest, record, tied)
    if options.used_vocabulary is not None and tokenizer is not None:
        _refuse_cut_pieces(tokenizer, options.used_vocabulary)
    aside = options.save.with_name(f".{options.save.name}.converting")
    dtype = options.dtype or manifest["precision"]
    job = HuggingFaceJob(
        source, facts.shape, aside, kind, dtype, manifest["precision"], facts.tied_embeddings, options.shard_bytes
    )
    announce(_phases(options, job), folder, options.save)
    with sole_writer(aside):
        _require_new(options.save)  # again: another may have finished before the lock was ours
        results, rounding = _write_shards(options, job, manifest)
        _write_companions(tokenizer, aside, record, facts, dtype)
        proof = None
        if options.proof:
            HuggingFaceSource(aside, facts)  # what was written has the tensors of its config.json
            proof = prove(TransformersModel(aside), source, facts, kind, dtype)
            print(proof)
        about = _manifest(aside, folder, manifest, results, rounding, str(proof) if proof else None)
        _publish(aside, about, options.save)
    return options.save


def _phases(options: ExportOptions, job: HuggingFaceJob) -> list[Phase]:
    read, written = job.source.read_bytes_total((job.kind,)), sum(unit.bytes for unit in job.units())
    phases = [Phase("convert", CONVERT, read, written, options.workers)]
    return [*phases, proof_phase(written)] if options.proof else phases


def _require_new(save: Path) -> None:
    if save.exists():
        raise ConversionError(f"{save} exists; remove it or give another --save")


def _write_shards(options: ExportOptions, job: HuggingFaceJob, manifest: dict) -> tuple[list[dict], Rounding]:
    """The shards' facts, and what was rounded. ConversionError unless the weights read are those that were saved."""
    units, aside = job.units(), job.folder
    require_space(aside, sum(unit.bytes for unit in units))
    plan = {"source": str(job.source.folder.resolve()), "weights": manifest["weights"], "kind": job.kind,
            "dtype": job.dtype, "shape": job.shape.__dict__, "tied": job.tied,
            "shard_bytes": options.shard_bytes}  # fmt: skip
    with Workers(options.workers) as workers:
        results, totals = run_units(job, units, plan, workers)
    print(totals.text())
    found = as_text(sum(result["fingerprint"] for result in results))
    if found != manifest["weights"]:
        raise ProofFailed(
            f"the weights read from {job.source.folder} have fingerprint {found}, those saved had "
            f"{manifest['weights']}: the checkpoint is damaged or mixed up; `verify` names the file. Nothing was "
            f"published (remove {aside})"
        )
    rounding = Rounding()
    for result in results:
        rounding.add(Rounding(result["rounded"], result["largest_rounding"]))
    if rounding.values:
        print(
            f"{rounding.values:,} weights were rounded to {job.dtype} (largest relative change {rounding.largest:.2g})"
        )
    if len(results) > 1:
        (aside / INDEX).write_text(job.index_text(results))
    return results, rounding


def _publish(aside: Path, about: dict[str, Any], save: Path) -> None:
    """Give the folder its name when all of it would survive a power cut."""
    for name in about["files"]:
        sync(aside / name)
    (aside / JOURNAL).unlink()
    write_file(aside / MANIFEST, json.dumps(about, indent=1))
    os.rename(aside, save)
    sync(save.resolve().parent)


def exported_facts(options: ExportOptions, manifest: dict, record: Record | None, tied: bool) -> ModelFacts:
    """The model as Hugging Face gets it: vocabulary padding and untying undone where they are on record."""
    facts = ModelFacts.from_config(manifest["config"]["model"])
    if record is not None:
        context = max(facts.context, record.context) if facts.rope_base == record.rope_base else facts.context
        facts = replace(facts, tied_embeddings=record.tied_embeddings and tied, context=context)
        facts = facts.with_vocabulary(used=record.used_vocabulary)
    return facts.with_vocabulary(used=options.used_vocabulary)


def _write_companions(
    tokenizer: Path | None, aside: Path, record: Record | None, facts: ModelFacts, dtype: str
) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    if tokenizer is None:
        print("no tokenizer is known for this checkpoint: give one with --tokenizer, or copy its files beside")
    else:
        copy_tokenizer(tokenizer, aside)
    kept = dict(record.config_json) if record else {}
    kept.update(_special_ids(tokenizer, aside, kept))
    config = facts.hugging_face_config(dtype, kept)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = aside / "generation_config.json"
    if not generation.exists():
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        generation.write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")


def _tokenizer_of(folder: Path, manifest: dict) -> Path | None:
    """The run's own tokenizer: what from-hf left in the run folder, or what its configuration names."""
    beside = folder.resolve().parent.parent / TOKENIZER
    named = manifest["config"].get("data", {}).get("tokenizer")
    candidates = [beside, *([Path(named)] if named else [])]
    return next((path for path in candidates if path.is_file() or (path.is_dir() and any(path.iterdir()))), None)


def _refuse_cut_pieces(tokenizer: Path, used: int) -> None:
    """ConversionError where the tokenizer has more pieces than rows are kept: some ids would have none."""
    from k2_megatron.data.tokenizer import load_tokenizer

    models = [
        path for name, path in tokenizer_files(tokenizer).items() if name in ("tokenizer.json", "tokenizer.model")
    ]
    pieces = load_tokenizer(str(models[0])).vocab_size if models else 0
    if pieces > used:
        raise ConversionError(
            f"--vocab-size {used} cuts off pieces of {models[0]}, which has {pieces}; give {pieces} or more, or "
            "another --tokenizer"
        )


def _special_ids(tokenizer: Path | None, aside: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """The end of a document as eos_token_id, unless the model came with one of its own.

    A tokenizer.json that came alone gets a tokenizer_config.json: without it transformers 4 takes the class of Llama's
    own tokenizer, which adds tokens beyond the vocabulary.
    """
    if tokenizer is None or not (aside / "tokenizer.json").is_file():
        return {}
    alone = not (aside / "tokenizer_config.json").exists()
    if not alone and "eos_token_id" in kept:
        return {}
    from k2_megatron.data.tokenizer import load_tokenizer

    path = str(aside / "tokenizer.json")
    # K2 begins no sequence with a special token, so there is no bos_token_id to speak of.
    own = {} if "eos_token_id" in kept else {"bos_token_id": None, "eos_token_id": load_tokenizer(path).end_of_document}
    if alone:
        piece = _end_piece(path, {**kept, **own}["eos_token_id"])
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= {"eos_token": piece} if piece is not None else {}
        (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return own


def _end_piece(path: str, end: int | list[int] | None) -> str | None:
    """The piece that ends a text: the special one of the model's id (or ids), else one of the usual names."""
    from tokenizers import Tokenizer

    from k2_megatron.data.tokenizer import END_OF_DOCUMENT_PIECES

    tokenizer = Tokenizer.from_file(path)
    added = tokenizer.get_added_tokens_decoder()
    ends = [added[number] for number in (end if isinstance(end, list) else [end]) if number in added]
    special = [piece.content for piece in ends if piece.special]
    usual = [piece for piece in END_OF_DOCUMENT_PIECES if tokenizer.token_to_id(piece) is not None]
    return next(iter([*special, *usual]), None)


def _manifest(
    aside: Path, folder: Path, manifest: dict, results: list[dict], rounding: Rounding, proof: str | None
) -> dict[str, Any]:
    tensors = {name: digest for result in results for name, digest in result["tensors"].items()}
    files = {result["file"]: file_facts(result) for result in results}
    companions = (path for path in aside.iterdir() if path.name not in files and path.name != JOURNAL)
    files.update((path.name, hash_file(path, XXH3)) for path in companions)
    return {
        "format": 1,
        "direction": "to-hf",
        "source": str(folder.resolve()),
        "step": manifest["step"],
        "consumed_tokens": manifest.get("consumed_tokens"),
        "weights": manifest["weights"],
        "rounded": rounding.values,
        "proof": proof,
        "versions": versions(),
        "files": dict(sorted(files.items())),
        "tensors": tensors,
    }
