"""Checkpoints in the old K2 training code's format, written from a known model by means of its own description.

mp_rank_TT_PPP/model_optim_rng.pt, one file a rank: dim 0 of QKV, gate-and-up and vocabulary is cut over tensor ranks,
dim 1 of the two output projections; a rank's first MLP matrix is its gate over its up; QKV is grouped by head. The
optimizer holds fp32 copies and moments in two groups: weight decay (matrices), none (norms), in the model's order.
With interleaved stages ("model0", "model1", ...) 8 layers on 2 stages of 2 chunks are [0, 1] [4, 5] and [2, 3] [6, 7].
"""

import argparse
import enum
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from conversions import stored_tensors, write_llama

from k2_megatron.convert.import_model import ImportOptions


def old_enumeration(name: str) -> type[enum.Enum]:
    """A class that pickles as the old code's, from a module that exists nowhere."""
    module = types.ModuleType("megatron.model.enums")
    found = enum.Enum("ModelType", {name: 1}, module="megatron.model.enums")
    module.ModelType = found  # type: ignore[attr-defined]
    sys.modules["megatron.model.enums"] = module
    return found


def write_legacy(
    folder: Path,
    weights: dict[str, torch.Tensor],
    moments: dict[str, dict[str, torch.Tensor]],
    tensor: int,
    pipeline: int,
    virtual: int = 1,
    iteration: int = 941,
) -> None:
    """`weights` are fp32 by Hugging Face's names; `moments` are exp_avg and exp_avg_sq by the same names."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    arguments = argparse.Namespace(
        num_layers=layers,
        hidden_size=weights["model.norm.weight"].numel(),
        ffn_hidden_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_attention_heads=4,
        padded_vocab_size=weights["lm_head.weight"].shape[0],
        seq_length=32,
        norm_epsilon=1e-5,
        swiglu=True,
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        rotary_percent=1.0,
        params_dtype=torch.bfloat16,
        consumed_train_samples=iteration * 8,
        model_type=old_enumeration("encoder_or_decoder")(1),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        world_size=2 * tensor * pipeline,  # two data-parallel ranks, of which the first saves
    )
    for stage in range(pipeline):
        for rank in range(tensor):
            cut = [{kind: _rank_tensors(named, rank, tensor, chunk * pipeline + stage, pipeline * virtual, layers)
                    for kind, named in {"main": weights, **moments}.items()} for chunk in range(virtual)]  # fmt: skip
            path = folder / f"mp_rank_{rank:02d}_{stage:03d}"
            path.mkdir(parents=True)
            arguments.rank = stage * 2 * tensor + rank
            torch.save(_state(arguments, cut, iteration), path / "model_optim_rng.pt")


def _rank_tensors(
    named: dict[str, torch.Tensor], rank: int, ranks: int, stage: int, stages: int, layers: int
) -> dict[str, torch.Tensor]:
    """A rank's tensors of one model chunk: the `stage`-th of `stages` consecutive parts of the model."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, 0)[rank].clone()

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, 1)[rank].clone()

    found = {}
    if stage == 0:
        found["embedding.word_embeddings.weight"] = rows(named["model.embed_tokens.weight"])
    for local in range(layers // stages):
        theirs, mine = f"model.layers.{stage * layers // stages + local}.", f"encoder.layers.{local}."
        heads = [named[f"{theirs}self_attn.{part}_proj.weight"].view(4, -1, named["model.norm.weight"].numel())
                 for part in "qkv"]  # fmt: skip
        found[mine + "input_layernorm.weight"] = named[theirs + "input_layernorm.weight"].clone()
        found[mine + "self_attention.query_key_value.weight"] = rows(torch.cat(heads, 1).flatten(0, 1))
        found[mine + "self_attention.dense.weight"] = columns(named[theirs + "self_attn.o_proj.weight"])
        found[mine + "post_attention_layernorm.weight"] = named[theirs + "post_attention_layernorm.weight"].clone()
        found[mine + "mlp.dense_h_to_4h.weight"] = torch.cat(
            [rows(named[theirs + "mlp.gate_proj.weight"]), rows(named[theirs + "mlp.up_proj.weight"])]
        )
        found[mine + "mlp.dense_4h_to_h.weight"] = columns(named[theirs + "mlp.down_proj.weight"])
    if stage == stages - 1:
        found["encoder.final_layernorm.weight"] = named["model.norm.weight"].clone()
        found["output_layer.weight"] = rows(named["lm_head.weight"])
    return found


def _language_model(main: dict[str, torch.Tensor]) -> dict:
    found: dict = {"encoder": {}}
    for name, tensor in main.items():
        part, rest = name.split(".", 1)
        if part == "encoder":
            found["encoder"][rest] = tensor.bfloat16()
        elif part == "embedding":
            found["embedding"] = {"word_embeddings": {"weight": tensor.bfloat16()}}
        else:
            found["output_layer"] = {"weight": tensor.bfloat16()}
    return {"language_model": found}


def _state(arguments: argparse.Namespace, chunks: list[dict[str, dict[str, torch.Tensor]]], iteration: int) -> dict:
    keys = [(chunk, name) for chunk, cut in enumerate(chunks) for name in cut["main"]]
    groups = [[key for key in keys if chunks[key[0]]["main"][key[1]].dim() == dimensions] for dimensions in (2, 1)]
    numbers = {key: number for number, key in enumerate(groups[0] + groups[1])}
    models = [_language_model(cut["main"]) for cut in chunks]
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **({"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}),
        "optimizer": {
            "optimizer": {
                "state": {
                    number: {kind: chunks[chunk][kind][name] for kind in ("exp_avg", "exp_avg_sq")}
                    for (chunk, name), number in numbers.items()
                },
                "param_groups": [
                    {"params": [numbers[key] for key in group], "wd_mult": decay, "lr": 1e-4, "step": iteration}
                    for group, decay in zip(groups, (1.0, 0.0), strict=True)
                ],
            },
            "fp32_from_fp16_params": [[chunks[chunk]["main"][name] for chunk, name in group] for group in groups],
        },
        "opt_param_scheduler": {"max_lr": 1.5e-4, "num_steps": iteration * 8},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": numpy.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }


def known_model(folder: Path, layers: int = 3, vocabulary: int = 128) -> tuple[dict, dict]:
    """(fp32 weights, moments) by Hugging Face's names; the weights also lie in `folder`."""
    write_llama(folder, layers=layers, vocabulary=vocabulary, rope_base=10000.0)
    weights = stored_tensors(folder)
    generator = torch.Generator().manual_seed(3)
    moments = {
        kind: {name: torch.randn(tensor.shape, generator=generator).abs() for name, tensor in weights.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return weights, moments


def options(tmp_path: Path, **chosen) -> ImportOptions:
    return ImportOptions(tmp_path / "iter_0000941", tmp_path / "run", **{"proof": False, **chosen})


def legacy_folder(tmp_path: Path, tensor: int = 2, pipeline: int = 1) -> Path:
    """A sound iteration of 3 layers, where `options` looks for it."""
    weights, moments = known_model(tmp_path / "hf")
    write_legacy(tmp_path / "iter_0000941", weights, moments, tensor, pipeline)
    return tmp_path / "iter_0000941"


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Edit the state in a file. Unpickling runs whatever was put there before: once a file."""
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)
