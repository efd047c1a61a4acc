"""The fields of a run's events in journal.jsonl, event by event; the loop in pretrain_k2.py says when each is written.

In: plain values of the loop. Out: names to values, as `Journal.write` takes them. Losses in nats a token,
times in seconds, sizes in bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.config.changes import Change
from k2_megatron.config.flops import flops_per_token
from k2_megatron.kernels.dispatch import choices
from k2_megatron.runtime.devices import Device, peak_bf16_flops
from k2_megatron.train.checkpoints.save import SaveResult
from k2_megatron.train.checkpoints.state import layout_name
from k2_megatron.train.position import change_at
from k2_megatron.train.run_folder import provenance
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.step import StepResult

MODEL_FLOPS = "6 per matrix parameter and token + causal attention (Narayanan et al. 2021, halved for causality)"


def start_fields(config: Config, launcher: str, device: Device, data: str) -> dict:
    """Of "start": the layout, the machine, which kernel runs each op and why, versions; `data` is its fingerprint."""
    return {
        "layout": layout_name(config),
        "launcher": launcher,
        "device": device.name,
        "kernels": {
            choice.op: f"{choice.backend}: {choice.reason}" for choice in choices(config.model.kernels, device.type)
        },
        "data": data,
        "model_flops": MODEL_FLOPS,
        **provenance(),
    }


def resume_fields(config: Config, manifest: dict, newest: Path, doubts: list[str], found: Sequence[Change]) -> dict:
    """Of "resume": where the run goes on, from what, and which settings differ from the saved ones."""
    step = manifest["step"]
    return {
        "step": step,
        "checkpoint": newest.name,
        "doubts": doubts,
        "saved_layout": manifest["layout"],
        "learning_rate": learning_rate_at(config, step),
        "next_sample": config.consumed_samples_at(step),
        **change_fields(config, step, found),
    }


def change_fields(config: Config, step: int, found: Sequence[Change]) -> dict:
    """Of "resume" and "rollback": the settings that differ, and what a change of batch or length means to the data."""
    return {"changes": [vars(change) for change in found], "position_change": change_at(config, step)}


def step_fields(config: Config, step: int, result: StepResult, step_seconds: float, device: Device) -> dict:
    """Of "step", the `step`th, counted from one; of the model flops' utilization None where the peak is not known."""
    first_sample, consumed = config.consumed_samples_at(step - 1), config.consumed_samples_at(step)
    tokens_per_second = (consumed - first_sample) * config.model.sequence_length / step_seconds
    flops_per_second = tokens_per_second * flops_per_token(config.model, "causal") / config.world_size
    peak = peak_bf16_flops(device)
    fields = {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "highest_sample_loss": max(result.sample_losses),
        "learning_rate": learning_rate_at(config, step - 1),
        "consumed_samples": consumed,
        "consumed_tokens": config.consumed_tokens_at(step),
        "samples": [first_sample, consumed],
        "sequence_length": config.model.sequence_length,
        "step_seconds": step_seconds,
        "data_seconds": result.data_seconds,
        "tokens_per_second": tokens_per_second,
        "model_flops_utilization": flops_per_second / peak if peak else None,
    }
    return {**fields, "layers": result.layers.rounded()} if result.layers else fields


def checkpoint_fields(saved: SaveResult) -> dict:
    """Of "checkpoint": a save that has come to its end."""
    return {
        "step": saved.step,
        "checkpoint": saved.folder.name,
        "stall_seconds": saved.stall_seconds,
        "seconds": saved.seconds,
        "bytes": saved.bytes,
        "bytes_per_second": saved.bytes / saved.seconds,
        "weights": saved.weights,
    }
