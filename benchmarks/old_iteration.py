"""An iteration of the old K2 training code, made of random numbers for benchmarks/convert.py: weights, Adam's state."""

import argparse
from pathlib import Path

import torch

from k2_megatron.convert.names import TABLE, Entry, Shape


def write_old_iteration(folder: Path, shape: Shape, ranks: int) -> int:
    """iter_0000941 of `ranks` tensor ranks and one stage, 14 bytes a parameter; returns its bytes."""
    arguments = argparse.Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.heads,
        padded_vocab_size=shape.vocab_size,
        seq_length=2048,
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=1,
    )
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: 0.02 * torch.randn(shape.hidden_size, generator=generator) for name, _ in _tensors(shape, 1, "whole")
    }
    size = 0
    for rank in range(ranks):
        path = folder / f"mp_rank_{rank:02d}_000" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        arguments.rank = rank
        main = {name: 0.02 * torch.randn(cut, generator=generator) for name, cut in _tensors(shape, ranks)}
        torch.save(_state(arguments, {**main, **whole}, generator), path)
        size += path.stat().st_size
    return size


def _tensors(shape: Shape, ranks: int, only: str | None = None) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape of a rank's part) in the model's order."""
    stacked = [entry for entry in TABLE if entry.stacked]
    found = [(TABLE[0], None), *((entry, layer) for layer in range(shape.layers) for entry in stacked)]
    found += [(entry, None) for entry in TABLE[1:] if not entry.stacked]
    return [
        (entry.legacy.format(layer=layer), _part(entry, shape, ranks))
        for entry, layer in found
        if only in (None, entry.cut)
    ]


def _part(entry: Entry, shape: Shape, ranks: int) -> tuple[int, ...]:
    rows, columns = entry.size(shape)
    if entry.cut == "whole":
        return (rows,)
    return (rows // ranks, columns) if entry.cut == "rows" else (rows, columns // ranks)


def _state(arguments: argparse.Namespace, main: dict[str, torch.Tensor], generator: torch.Generator) -> dict:
    model: dict = {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}
    homes = {
        "embedding": model["embedding"]["word_embeddings"],
        "encoder": model["encoder"],
        "output_layer": model["output_layer"],
    }
    for name, tensor in main.items():
        part, rest = name.split(".", 1)
        homes[part][rest.removeprefix("word_embeddings.")] = tensor.bfloat16()
    groups = [[name for name in main if main[name].dim() == dimensions] for dimensions in (2, 1)]
    numbers = {name: number for number, name in enumerate(groups[0] + groups[1])}
    moments = {
        numbers[name]: {kind: torch.rand(main[name].shape, generator=generator) for kind in ("exp_avg", "exp_avg_sq")}
        for name in main
    }
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 941,
        "model": {"language_model": model},
        "optimizer": {
            "optimizer": {
                "state": moments,
                "param_groups": [{"params": [numbers[name] for name in group], "step": 941} for group in groups],
            },
            "fp32_from_fp16_params": [[main[name] for name in group] for group in groups],
        },
    }
