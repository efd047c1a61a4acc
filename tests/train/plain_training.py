"""The same training written without megatron-core: transformers' Llama, torch's AdamW, whole batches; and ours."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from one_rank_model import llama_with_weights_of, one_rank

import k2_megatron.train.optimizer as optimizer_module
import k2_megatron.train.step as step_module
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.step import train_step

STEPS, PEAK, FLOOR, WARMUP, BATCH = 5, 3e-3, 3e-4, 2, 8


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    grad_norms: list[float]


def ours_and_plain(config_path: Path, settings: list[str], fault) -> tuple[Steps, Steps]:
    if fault is not None:
        fault()
    with one_rank(config_path, settings) as (config, groups, kernels, model):
        data = open_run_data(config)
        plain = _plain(llama_with_weights_of(model, config), open_run_data(config).train)
        chunks = wrap_model(config, [model], groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        losses, grad_norms = [], []
        for step in range(STEPS):
            optimizer_module.set_learning_rate(optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
            result = train_step(config, groups, chunks, optimizer, data.train, step, torch.device("cpu"))
            losses.append(result.loss)
            grad_norms.append(result.grad_norm)
        return Steps(losses, grad_norms), plain


def _plain(llama: torch.nn.Module, feed) -> Steps:
    matrices = [parameter for parameter in llama.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in llama.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, grad_norms = [], []
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP)))
        for group in adam.param_groups:
            group["lr"] = PEAK * (step + 1) / WARMUP if step < WARMUP else FLOOR + (PEAK - FLOOR) * cosine
        rows = torch.from_numpy(feed.tokens(step * BATCH, BATCH).astype("int64"))
        logits = llama(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0).item())
        adam.step()
        losses.append(loss.item())
    return Steps(losses, grad_norms)


# Faults that equality between layouts cannot see, since every layout has them


def labels_not_shifted() -> None:
    right = step_module.micro_batches
    step_module.micro_batches = lambda *given: ((tokens, tokens) for tokens, _labels in right(*given))


def loss_a_quarter() -> None:
    right = step_module._run_schedule

    def quarter(*given, **named):
        return right(*given, **named) / 4

    step_module._run_schedule = quarter


def norms_decay_too() -> None:
    right = optimizer_module.set_learning_rate

    def everywhere(optimizer, learning_rate: float, weight_decay: float) -> None:
        right(optimizer, learning_rate, weight_decay)
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay

    optimizer_module.set_learning_rate = everywhere


def gradients_not_clipped() -> None:
    right = step_module.update
    step_module.update = lambda optimizer, norm, _clip_grad_norm: right(optimizer, norm, None)
