"""reshard: the same checkpoint with its chunks cut for another layout, so that each rank reads whole chunks.

Training loads any layout from any other already; this spares the ranks of a large run from reading parts of chunks.
"""

from dataclasses import replace
from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.convert.errors import ConversionError, ProofFailed
from k2_megatron.convert.estimate import announce
from k2_megatron.convert.journal import sole_writer
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.to_torch_dist import TorchDistJob
from k2_megatron.convert.torch_dist import TorchDistSource, checkpoint_folder, read_manifest
from k2_megatron.convert.training_side import (
    aside_folder,
    check_layout,
    require_new,
    seal,
    write_checkpoint,
    writing_phases,
)
from k2_megatron.convert.verify import training_problems, verify_phases
from k2_megatron.convert.workers import Workers
from k2_megatron.train.checkpoints.imported_record import carry_record, require_own_record, versions

_KEPT_OUT = ("files", "weights", "precision", "config", "format")


def reshard(load: Path, save: Path, tensor: int, pipeline: int, workers: int) -> Path:
    """Verify, rewrite, compare to the bit, publish; returns the checkpoint. ConversionError otherwise; CheckpointError
    where the record of an imported model is damaged or another's."""
    folder = checkpoint_folder(load)
    manifest = read_manifest(folder)
    require_new(save, manifest["step"])
    check_layout(ModelFacts.from_config(manifest["config"]["model"]).shape, tensor, pipeline)
    source = TorchDistSource(folder, manifest)
    job = TorchDistJob(
        source,
        aside_folder(save, manifest["step"]),
        manifest["precision"],
        tensor,
        pipeline,
        source.implementation,
    )
    announce([*verify_phases(manifest, workers), *writing_phases(job, workers)], folder, save)
    with sole_writer(job.folder):
        require_new(save, manifest["step"])  # again: another may have finished before the lock was ours
        with Workers(workers) as processes:
            return _reshard(manifest, save, job, source, processes)


def _reshard(manifest: dict, save: Path, job: TorchDistJob, source: TorchDistSource, workers: Workers) -> Path:
    folder = source.folder
    require_own_record(folder, manifest, save)
    problems = training_problems(folder, manifest, workers)
    if problems:
        raise ProofFailed(f"{folder} is not sound: {'; '.join(problems)}; use another checkpoint")
    try:
        config = Config.model_validate(manifest["config"])
    except ValueError as error:
        raise ConversionError(f"{folder} has a configuration of no use: {' '.join(str(error).split())}") from None
    job = replace(job, objects={key: source.object_bytes(key) for key in source.stored.objects})
    tensor, pipeline = job.tensor_parallel, job.pipeline_parallel
    facts = {key: value for key, value in manifest.items() if key not in _KEPT_OUT}
    facts["chunks"] = f"tp{tensor}-pp{pipeline}"
    facts["resharded"] = {"source": str(folder.resolve()), "versions": versions()}
    plan = {"source": str(folder.resolve()), "weights": manifest["weights"], "tensor": tensor, "pipeline": pipeline}
    product = write_checkpoint(job, config, facts, plan, workers)
    if product.manifest["weights"] != manifest["weights"]:
        raise ProofFailed(
            f"the weights written have fingerprint {product.manifest['weights']}, those read had "
            f"{manifest['weights']}: this is a defect of this tool or of memory; nothing was published (remove "
            f"{product.folder})"
        )
    seal(product, job, workers)
    carry_record(folder, manifest, save)
    return product.publish()
