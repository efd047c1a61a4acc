"""The same training written without megatron-core: transformers' Llama, torch's AdamW, whole batches; and ours."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from one_rank_model import llama_with_weights_of, one_rank

import k2_megatron.train.optimizer as optimizer_module
import k2_megatron.train.step as step_module
from k2_megatron.train.layer_norms import ActivationSquares, LayerNorms
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.step import train_step

STEPS, PEAK, FLOOR, WARMUP, BATCH = 5, 3e-3, 3e-4, 2, 8


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    grad_norms: list[float]
    sample_losses: list[list[float]]
    layers: list[LayerNorms]


def ours_and_plain(config_path: Path, settings: list[str], fault) -> tuple[Steps, Steps]:
    if fault is not None:
        fault()
    with one_rank(config_path, settings) as (config, groups, kernels, model):
        data = open_run_data(config)
        plain = _plain(llama_with_weights_of(model, config), open_run_data(config).train)
        chunks = wrap_model(config, [model], groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        parts = Parts(groups, chunks, optimizer, torch.device("cpu"))
        activations = ActivationSquares(parts, config.model.layers, kernels["adamw"])
        results = []
        for step in range(STEPS):
            optimizer_module.set_learning_rate(optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
            results.append(train_step(config, parts, data.train, step, activations=activations))
        ours = Steps(
            [result.loss for result in results],
            [result.grad_norm for result in results],
            [list(result.sample_losses) for result in results],
            [result.layers for result in results],
        )
        return ours, plain


def _plain(llama: torch.nn.Module, feed) -> Steps:
    matrices = [parameter for parameter in llama.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in llama.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps = Steps([], [], [], [])
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP)))
        for group in adam.param_groups:
            group["lr"] = PEAK * (step + 1) / WARMUP if step < WARMUP else FLOOR + (PEAK - FLOOR) * cosine
        rows = torch.from_numpy(feed.tokens(step * BATCH, BATCH).astype("int64"))
        outputs: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _layer, _given, output, outputs=outputs: outputs.append(output))
            for layer in llama.model.layers
        ]
        logits = llama(rows[:, :-1]).logits
        for hook in hooks:
            hook.remove()
        losses_BS = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = losses_BS.mean()
        adam.zero_grad()
        loss.backward()
        steps.layers.append(_plain_layers(llama, outputs))
        steps.sample_losses.append(losses_BS.mean(dim=1).tolist())
        steps.grad_norms.append(torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0).item())
        steps.losses.append(loss.item())
        adam.step()
    return steps


def _plain_layers(llama: torch.nn.Module, outputs: list[torch.Tensor]) -> LayerNorms:
    def norm(*modules: torch.nn.Module) -> float:
        gradients = [parameter.grad.flatten() for module in modules for parameter in module.parameters()]
        return torch.cat(gradients).norm().item()

    model = llama.model
    return LayerNorms(
        tuple(norm(layer) for layer in model.layers),
        tuple(output.square().mean().sqrt().item() for output in outputs),
        norm(model.embed_tokens),
        norm(model.norm, llama.lm_head),
    )


# Faults that equality between layouts cannot see, since every layout has them


def labels_not_shifted() -> None:
    right = step_module.micro_batches
    step_module.micro_batches = lambda *given: ((tokens, tokens) for tokens, _labels in right(*given))


def loss_a_quarter() -> None:
    right = step_module._run_schedule

    def quarter(*given, **named):
        loss, sample_losses = right(*given, **named)
        return loss / 4, sample_losses

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
