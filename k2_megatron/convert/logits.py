"""The proof of a conversion: transformers' model and ours, each from its own files, on one seeded batch of tokens.

Layer by layer, so that one layer of each is in memory: transformers' LlamaForCausalLM code with the tensors that the
safetensors library finds under transformers' own names, and our layer as pretrain_k2.py builds it with the tensors of
our checkpoint. Both in float32. Neither side uses the other's name table, so a wrong permutation cannot hide.
"""

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import EMBEDDING, OUTPUT, TABLE, Entry, Place
from k2_megatron.convert.numbers import Rounding, to_float32
from k2_megatron.convert.safetensors_file import read_index
from k2_megatron.convert.torch_dist import TorchDistSource

if TYPE_CHECKING:
    import torch

SEED = 1234
SEQUENCES = 2
TOKENS = 48
_VOCABULARY_BLOCK = 8192


@dataclass(frozen=True)
class Bound:
    """What is accepted: the largest difference of logits, relative to the largest logit (or 1), and the divergence."""

    logits: float
    divergence: float

    @classmethod
    def for_rounding(cls, rounding: Rounding) -> "Bound":
        """Equal weights leave float32's summation order; rounded weights differ by their last bits."""
        return cls(0.1, 1e-2) if rounding.values else cls(1e-4, 1e-8)


class Proof(NamedTuple):
    """The outcome, in nats for the divergence KL(transformers || ours), mean over positions."""

    difference: float
    largest_logit: float
    divergence: float
    same_choice: float
    bound: Bound

    def __str__(self) -> str:
        allowed = self.bound.logits * max(1.0, self.largest_logit)
        return (
            f"logits of both models on {SEQUENCES} x {TOKENS} seeded tokens: largest difference {self.difference:.3g} "
            f"(bound {allowed:.3g}, largest logit {self.largest_logit:.3g}), KL divergence {self.divergence:.3g} "
            f"(bound {self.bound.divergence:g}), same most likely token at {self.same_choice:.1%} of positions"
        )


def prove(source: HuggingFaceSource, ours: TorchDistSource, facts: ModelFacts, bound: Bound) -> Proof:
    """Run both models in a process of their own. ConversionError above the bound, or where transformers is missing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        proof = pool.submit(compare_logits, source.folder, ours, facts, bound).result()
    allowed = bound.logits * max(1.0, proof.largest_logit)
    if not (proof.difference <= allowed and proof.divergence <= bound.divergence):
        raise ConversionError(f"the two models disagree, so nothing was published: {proof}")
    return proof


def compare_logits(folder: Path, ours: TorchDistSource, facts: ModelFacts, bound: Bound) -> Proof:
    """Run both models in this process, which must not be connected to other ranks."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, facts.shape.used_vocabulary, (SEQUENCES, TOKENS), generator=generator)
    with torch.no_grad():
        theirs = transformers_logits(folder, tokens)
        mine = our_logits(ours, facts, tokens)
    if not (torch.isfinite(theirs).all() and torch.isfinite(mine).all()):
        return Proof(math.inf, math.inf, math.inf, 0.0, bound)
    log_theirs, log_mine = theirs.double().log_softmax(-1), mine.double().log_softmax(-1)
    divergence = (log_theirs.exp() * (log_theirs - log_mine)).sum(-1).mean()
    same = (theirs.argmax(-1) == mine.argmax(-1)).double().mean()
    return Proof(
        float((theirs - mine).abs().max()), float(theirs.abs().max()), abs(float(divergence)), float(same), bound
    )


def transformers_logits(folder: Path, tokens: "torch.Tensor") -> "torch.Tensor":
    """[sequences, tokens, vocabulary] of the model in `folder`, by transformers' code and names."""
    try:
        from transformers import AutoConfig, LlamaForCausalLM
    except ImportError:
        raise ConversionError(
            'the proof runs transformers, which is not installed: pip install "k2_megatron[eval]", or --no-proof'
        ) from None
    import torch

    config = AutoConfig.from_pretrained(folder)
    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    config.num_hidden_layers, config.vocab_size, config.pad_token_id, config.tie_word_embeddings = 1, 1, None, False
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float().eval().model
    norm, model.norm = model.norm, torch.nn.Identity()
    stored = _StoredTensors(folder)
    hidden = stored.rows("model.embed_tokens.weight", tokens)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        model.layers[0].load_state_dict({n.removeprefix(prefix): stored.whole(n) for n in stored.names(prefix)})
        hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    norm.load_state_dict({"weight": stored.whole("model.norm.weight")})
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return torch.cat([norm(hidden) @ block.T for block in stored.blocks(head)], -1)


class _StoredTensors:
    """Tensors of a folder of safetensors, through the library, as float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: tensor.file for name, tensor in read_index(folder).items()}

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.files if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")]

    def _open(self, name: str):
        from safetensors import safe_open

        return safe_open(self.folder / self.files[name], framework="pt")

    def whole(self, name: str) -> "torch.Tensor":
        with self._open(name) as file:
            return file.get_tensor(name).float()

    def rows(self, name: str, indices: "torch.Tensor") -> "torch.Tensor":
        import torch

        with self._open(name) as file:
            matrix = file.get_slice(name)
            return (
                torch.stack([matrix[int(i) : int(i) + 1][0] for i in indices.flatten()])
                .float()
                .view(*indices.shape, -1)
            )

    def blocks(self, name: str) -> Iterator["torch.Tensor"]:
        with self._open(name) as file:
            matrix = file.get_slice(name)
            rows = matrix.get_shape()[0]
            for first in range(0, rows, _VOCABULARY_BLOCK):
                yield matrix[first : min(first + _VOCABULARY_BLOCK, rows)].float()


def our_logits(source: TorchDistSource, facts: ModelFacts, tokens: "torch.Tensor") -> "torch.Tensor":
    """[sequences, tokens, used vocabulary] of our checkpoint, by the code that trains it."""

    from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
    from k2_megatron.runtime.devices import Device
    from k2_megatron.runtime.groups import build_groups, connect, disconnect
    from k2_megatron.runtime.launch import single_rank

    device = Device("cpu", 0, "gloo", "CPU")
    with cpu_stands_in_for_cuda("cpu"):
        connect(single_rank(), device, 60.0)
        try:
            config = _one_layer_config(facts)
            return _run_layers(source, facts, config, build_groups(config.parallel), tokens)
        finally:
            disconnect()


def _run_layers(source: TorchDistSource, facts: ModelFacts, config, groups, tokens) -> "torch.Tensor":
    import torch

    from k2_megatron.kernels.dispatch import OPS, choose_backend
    from k2_megatron.model import build_model

    kernels = {op: choose_backend(op, "auto", "cpu").backend for op in OPS}
    model: Any = build_model(config, kernels, groups.collection, initialize=False)[0]
    model.eval()
    rotary = model.rotary_pos_emb(tokens.shape[1])
    hidden_SBH = torch.stack([_rows(source, EMBEDDING, int(t), int(t) + 1)[0] for t in tokens.T.flatten()])
    hidden_SBH = hidden_SBH.view(*tokens.T.shape, -1)
    for layer in range(facts.shape.layers):
        for entry in TABLE:
            if entry.stacked:
                parameter = model.decoder.layers[0].get_parameter(entry.ours.removeprefix("decoder.layers."))
                rows = _rows(source, entry, 0, entry.size(source.shape)[0], layer)
                parameter.copy_(rows.view_as(parameter))
        hidden_SBH, _context = model.decoder.layers[0](hidden_SBH, None, rotary_pos_emb=rotary)
    norm = next(entry for entry in TABLE if entry.ours == "decoder.final_layernorm.weight")
    model.decoder.final_layernorm.weight.copy_(_rows(source, norm, 0, facts.shape.hidden_size)[:, 0])
    normal_BSH = model.decoder.final_layernorm(hidden_SBH).transpose(0, 1)
    used = facts.shape.used_vocabulary
    starts = range(0, used, _VOCABULARY_BLOCK)
    blocks = (_rows(source, OUTPUT, first, min(first + _VOCABULARY_BLOCK, used)) for first in starts)
    return torch.cat([normal_BSH @ block.T for block in blocks], -1)


def _rows(source: TorchDistSource, entry: Entry, first: int, last: int, layer: int | None = None) -> "torch.Tensor":
    import torch

    bits = source.read("weights", Place(entry, layer), first, last)
    return torch.from_numpy(to_float32(bits, source.dtypes["weights"]))


def _one_layer_config(facts: ModelFacts):
    from k2_megatron.config import Config

    model = {**facts.model_table(), "layers": 1, "vocab_size": 8, "sequence_length": TOKENS}
    return Config.model_validate(
        {
            "run": {"folder": "none", "seed": 0},
            "model": model,
            "data": {"train": "none"},
            "train": {"steps": 1, "micro_batch": 1, "global_batch": 1, "precision": "float32"},
            "optimizer": {"learning_rate": 1.0, "schedule": "constant"},
        }
    )


def proof_memory_bytes(facts: ModelFacts) -> int:
    """The larger of both sides: one layer in float32, and the activations, which are small."""
    shape = facts.shape
    elements = sum(math.prod(entry.size(shape)) for entry in TABLE if entry.stacked)
    return 4 * (elements + _VOCABULARY_BLOCK * shape.hidden_size)


__all__ = ["Bound", "Proof", "proof_memory_bytes", "prove"]
