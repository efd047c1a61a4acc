"""The record of a layout's first steps: a folder that is written by its ranks, under any launcher, and compared later.

    record.json            what was computed (first_steps.py), by what: configuration, code, versions, kernels, device
    step_00000001/         the checkpoint after the first step, whose first moments are the gradients
    step_00000003/         and that after the last, for the weights
    perturbed_1/ ...       records of repeats in which every result is moved by a rounding (perturbed.py)

Two checkpoints of the usual form: each rank writes its share, and any number of ranks reads it.
"""

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as distributed

from k2_megatron.certify.first_steps import FirstSteps, train_first_steps
from k2_megatron.certify.layouts import name_of
from k2_megatron.certify.perturbed import perturb
from k2_megatron.config import Config
from k2_megatron.kernels.dispatch import choices, choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import Device
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.groups import Groups, build_groups, connect, disconnect
from k2_megatron.runtime.launch import RankEnvironment
from k2_megatron.runtime.seeds import require_determinism, seed_everything
from k2_megatron.train.agreement import code_and_configuration, open_agreed_data, require_agreement
from k2_megatron.train.checkpoints.load import as_rank_0_sees
from k2_megatron.train.checkpoints.manifest import folder_name
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.layer_norms import LayerNorms
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.run_data import RunData
from k2_megatron.train.run_folder import provenance
from k2_megatron.train.watchdog import collective_timeout_seconds

RECORD = "record.json"
_FORMAT = 1
_RENDEZVOUS_SECONDS = 600.0


@dataclass(frozen=True)
class Record:
    """A record that was read: `facts` tell by what it was computed; `ranks_agree` whether all ranks told the same."""

    folder: Path
    facts: dict[str, Any]
    first_steps: FirstSteps
    ranks_agree: bool
    perturbed: list["Record"]

    @property
    def after_first_step(self) -> Path:
        return self.folder / folder_name(1)

    @property
    def after_last_step(self) -> Path:
        return self.folder / folder_name(len(self.first_steps.losses))


def record(
    config: Config, environment: RankEnvironment, device: Device, folder: Path, *, steps: int, repeats: int
) -> None:
    """Be one rank of a record in the layout of `config`; `repeats` more trainings are perturbed."""
    with cpu_stands_in_for_cuda(device.type):
        if config.train.deterministic:
            require_determinism()
        connect(environment, device, _RENDEZVOUS_SECONDS)
        require_agreement(code_and_configuration(config))
        groups = build_groups(config.parallel, collective_timeout_seconds(config.watchdog))
        as_rank_0_sees(groups, lambda: _begin(folder))
        data = open_agreed_data(config, writer=False)
        kernels = choose_backends(config.model.kernels, device.type)
        for number in range(repeats + 1):
            place = folder / f"perturbed_{number}" if number else folder
            began = time.monotonic()
            found = _train(config, device, groups, kernels, data, place, steps, number)
            gc.collect()  # a model is a circle of references, and the next repeat needs its room
            everywhere: list = [None] * groups.world_size
            distributed.all_gather_object(everywhere, asdict(found))
            facts = _facts(config, device, data, steps, number, time.monotonic() - began)
            if groups.rank == 0:
                agree = all(of_rank == everywhere[0] for of_rank in everywhere)
                _write(place, {"format": _FORMAT, **facts, "ranks_agree": agree, "first_steps": everywhere[0]})
            distributed.barrier()
        disconnect()


def _begin(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is there and is no empty folder: name one that does not exist")
    folder.mkdir(parents=True, exist_ok=True)


def _train(
    config: Config,
    device: Device,
    groups: Groups,
    kernels: Mapping[str, str],
    data: RunData,
    folder: Path,
    steps: int,
    number: int,
) -> FirstSteps:
    seed_everything(config.run.seed, groups)
    built = build_model(config, kernels, groups.collection)
    if number:
        perturb(built, groups, number)
    chunks = wrap_model(config, built, groups.collection)
    parts = Parts(groups, chunks, build_optimizer(config, chunks, kernels, groups.collection), device.torch)
    writer = CheckpointWriter(folder, groups, asynchronous=False, retry_seconds=config.checkpoint.retry_seconds)

    def save(step: int) -> None:
        writer.save(step, config, parts, data.position())
        writer.wait()

    return train_first_steps(config, parts, data, kernels, steps, save)


def _facts(config: Config, device: Device, data: RunData, steps: int, number: int, seconds: float) -> dict[str, Any]:
    """By what a record was computed. No name of a machine is among it: a certificate is for others to read."""
    return {
        "layout": name_of(config.parallel),
        "ranks": config.world_size,
        "steps": steps,
        "repeat": number,
        "fingerprint": config.fingerprint,
        "data": data.fingerprint,
        "held_out": data.held_out.fingerprint if data.held_out else None,
        "device": device.name,
        "communication": device.backend,
        "kernels": {choice.op: choice.backend for choice in choices(config.model.kernels, device.type)},
        "versions": {name: value for name, value in provenance().items() if name != "host"},
        "seconds": seconds,
        "config": config.model_dump(exclude_none=True),
    }


def _write(folder: Path, content: dict[str, Any]) -> None:
    write_file(folder / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> Record:
    """A record with its perturbed repeats. ValueError where there is none, or it is not whole."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError("another version of this project wrote it")
        told = content.pop("first_steps")
        agree, layers = content.pop("ranks_agree"), told.pop("layers")
        samples = [tuple(of_step) for of_step in told.pop("sample_losses")]
        found = FirstSteps(**told, layers=[_layer_norms(of_step) for of_step in layers], sample_losses=samples)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: {folder} is no whole record; make it with tools/certify_layout.py record"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error}); make the record again") from None
    repeats = sorted(folder.glob(f"perturbed_*/{RECORD}"), key=lambda repeat: int(repeat.parent.name.split("_")[1]))
    return Record(folder, content, found, agree, [read_record(repeat.parent) for repeat in repeats])


def _layer_norms(told: dict[str, Any]) -> LayerNorms:
    lists = {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
    return LayerNorms(**{**told, **lists})
