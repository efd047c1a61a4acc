"""The old K2 training code's forward pass, straight from its rank files: what an import from there is compared with.

It follows that code's layout and not our name table: a rank's QKV is viewed as [its heads, 3 D] and split, its first
MLP matrix is halved into gate and up, what the ranks' output projections give is added, and activations pass the model
chunks in the order of the pipeline. In float32 throughout; files are mapped, and a block of rows is widened at a time.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from k2_megatron.convert.legacy_file import load_safely, model_chunks, model_tensors, rank_files
from k2_megatron.convert.logits import row_blocks

_ROPE_BASE = 10000.0

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LegacyModel:
    """The model of one iteration folder, as a reference for `logits.prove`."""

    folder: Path

    @property
    def name(self) -> str:
        return "the old code's layout"

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, vocabulary] of `tokens` [sequences, tokens]."""
        arguments: argparse.Namespace = self._state(0, 0)["args"]
        epsilon: float = getattr(arguments, "norm_epsilon", getattr(arguments, "layernorm_epsilon", 1e-5))
        hidden_BSH = self._embed(tokens)
        for stage, chunk, layer in self._forward_order():
            ranks = self._weights(stage, chunk, f"encoder.layers.{layer}.")
            normal = _rms_norm(hidden_BSH, ranks[0]["input_layernorm.weight"], epsilon)
            hidden_BSH = hidden_BSH + sum(_attention(normal, rank, arguments, len(ranks)) for rank in ranks)
            normal = _rms_norm(hidden_BSH, ranks[0]["post_attention_layernorm.weight"], epsilon)
            hidden_BSH = hidden_BSH + sum(_mlp(normal, rank) for rank in ranks)
        stages, chunks = self._pipeline()
        norm = self._weights(stages - 1, chunks - 1, "encoder.final_layernorm.")[0]
        normal = _rms_norm(hidden_BSH, norm["weight"], epsilon)
        return torch.cat(
            [_times(normal, rank["weight"]) for rank in self._weights(stages - 1, chunks - 1, "output_layer.")], -1
        )

    def _pipeline(self) -> tuple[int, int]:
        """(stages, model chunks a stage)."""
        stages = 1 + max(stage for _tensor, stage in rank_files(self.folder))
        return stages, len(model_chunks(self._state(0, 0), self.folder))

    def _forward_order(self) -> Iterator[tuple[int, int, int]]:
        """(stage, model chunk, layer in it) in the order in which activations pass them."""
        stages, chunks = self._pipeline()
        for chunk in range(chunks):
            for stage in range(stages):
                model = model_chunks(self._state(0, stage), self.folder)[chunk]
                names = [name for name, _tensor in model_tensors(model, self.folder) if "input_layernorm" in name]
                yield from ((stage, chunk, layer) for layer in range(len(names)))

    def _state(self, tensor: int, stage: int) -> dict:
        """A rank's file, mapped: what is not touched costs no memory."""
        return load_safely(rank_files(self.folder)[tensor, stage], map_location="cpu", mmap=True)

    def _weights(self, stage: int, chunk: int, prefix: str) -> list[Weights]:
        """The tensors below `prefix`, mapped, one dictionary a tensor rank."""
        paths = rank_files(self.folder)
        found = []
        for tensor in range(1 + max(tensor for tensor, _stage in paths)):
            model = model_chunks(self._state(tensor, stage), paths[tensor, stage])[chunk]
            named = dict(model_tensors(model, paths[tensor, stage]))
            found.append({name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)})
        return found

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each rank has the rows of its part of the vocabulary."""
        parts = self._weights(0, 0, "embedding.word_embeddings.")
        rows = parts[0]["weight"].shape[0]
        hidden = torch.zeros(*tokens.shape, parts[0]["weight"].shape[1])
        for number, part in enumerate(parts):
            mine = (tokens >= number * rows) & (tokens < (number + 1) * rows)
            hidden[mine] = part["weight"][tokens[mine] - number * rows].float()
        return hidden


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def _times(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """inputs @ matrix.T, a block of whose rows is in float32 at a time."""
    return torch.cat([inputs @ matrix[first:last].float().T for first, last in row_blocks(*matrix.shape)], -1)


def _attention(normal_BSH: torch.Tensor, rank: Weights, arguments: argparse.Namespace, ranks: int) -> torch.Tensor:
    """A rank's share of the output of causal self-attention."""
    sequences, length, hidden = normal_BSH.shape
    heads, size = arguments.num_attention_heads, hidden // arguments.num_attention_heads
    grouped = getattr(arguments, "group_query_attention", False)
    groups = (getattr(arguments, "num_query_groups", None) or heads) if grouped else heads
    mixed = _times(normal_BSH, rank["self_attention.query_key_value.weight"])
    mixed = mixed.view(sequences, length, groups // ranks, -1).split([heads // groups * size, size, size], -1)
    query, key, value = (part.reshape(sequences, length, -1, size).transpose(1, 2) for part in mixed)
    output = scaled_dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True, enable_gqa=True)
    return _times(output.transpose(1, 2).flatten(2), rank["self_attention.dense.weight"])


def _rotate(heads_BNSD: torch.Tensor) -> torch.Tensor:
    """Rotary positions over whole heads, halves paired."""
    length, size = heads_BNSD.shape[-2:]
    frequencies = _ROPE_BASE ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    first, second = heads_BNSD.chunk(2, -1)
    return heads_BNSD * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def _mlp(normal: torch.Tensor, rank: Weights) -> torch.Tensor:
    """A rank's share of the output of SwiGLU."""
    gate, up = _times(normal, rank["mlp.dense_h_to_4h.weight"]).chunk(2, -1)
    return _times(silu(gate) * up, rank["mlp.dense_4h_to_h.weight"])
