"""The proof of a conversion: another model's code and ours, each from its own files, on one seeded batch of tokens.

Layer by layer, and in a layer attention, then MLP, so that the larger of the two is in memory (layer_parts.py): a
reference (transformers_model.py, legacy_model.py) with the tensors under its own names, and our layer as
pretrain_k2.py builds it with the tensors of our checkpoint. Both in float32, ours rounded to the dtype of the other
side's files: the weights are equal, and only the order of sums differs. Neither side uses the other's name table, so a
wrong permutation cannot hide.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from k2_megatron.convert.errors import ConversionError, ProofFailed
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import EMBEDDING, OUTPUT, TABLE, Entry, Place
from k2_megatron.convert.numbers import to_float32
from k2_megatron.convert.source import Kind
from k2_megatron.convert.torch_dist import TorchDistSource
from k2_megatron.convert.workers import process_pool, resident_bytes

if TYPE_CHECKING:
    import torch

SEED = 1234
SEQUENCES = 2
TOKENS = 48
LOGITS_BOUND = 1e-4  # of the largest difference of logits, relative to the largest logit (or 1)
DIVERGENCE_BOUND = 1e-8  # nats
_BLOCK_BYTES = 4 << 20  # of a matrix in float32 that are read at once


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of the blocks of a matrix that are read one at a time."""
    step = max(1, _BLOCK_BYTES // (4 * columns))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


class Reference(Protocol):
    """A picklable model by other code, from its own files."""

    @property
    def name(self) -> str: ...

    def logits(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """[sequences, tokens, vocabulary] in float32 of `tokens` [sequences, tokens]."""
        ...


class Proof(NamedTuple):
    """The outcome, in nats for the divergence KL(reference || ours), mean over positions."""

    reference: str
    difference: float
    largest_logit: float
    divergence: float
    same_choice: float

    @property
    def allowed_difference(self) -> float:
        return LOGITS_BOUND * max(1.0, self.largest_logit)

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed_difference and self.divergence <= DIVERGENCE_BOUND

    def __str__(self) -> str:
        return (
            f"logits by {self.reference} and by ours on {SEQUENCES} x {TOKENS} seeded tokens: largest difference "
            f"{self.difference:.3g} (bound {self.allowed_difference:.3g}, largest logit {self.largest_logit:.3g}), "
            f"KL divergence {self.divergence:.3g} (bound {DIVERGENCE_BOUND:g}), same most likely token at "
            f"{self.same_choice:.1%} of positions"
        )


def prove(
    reference: Reference, ours: TorchDistSource, facts: ModelFacts, kind: Kind = "weights", dtype: str | None = None
) -> Proof:
    """Run both models in a process of their own, ours on its `kind`, rounded to the `dtype` of the other side's files.
    ConversionError above the bounds."""
    try:
        with process_pool(1, keep_memory=False) as pool:  # a layer's matrices are given back when the model is
            proof = pool.submit(compare_logits, reference, ours, facts, kind, dtype).result()
            memory = pool.submit(resident_bytes).result()
    except BrokenProcessPool:
        raise ConversionError(
            "the process of the proof died (out of memory, or killed); start the same command again to go on, with "
            "more memory free, or with --no-proof"
        ) from None
    print(f"both models ran in {memory / 1e6:.0f} MB, libraries included")
    if not math.isfinite(proof.difference):
        raise ProofFailed(
            f"logits by {proof.reference} or by ours are infinite or no numbers, so nothing can be compared and "
            "nothing was published: the weights overflow float32; use another checkpoint, or --no-proof"
        )
    if not proof.holds:
        raise ProofFailed(f"the two models disagree, so nothing was published: {proof}")
    return proof


def compare_logits(
    reference: Reference, ours: TorchDistSource, facts: ModelFacts, kind: Kind = "weights", dtype: str | None = None
) -> Proof:
    """As `prove`, in this process, which must not be connected to other ranks."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, facts.shape.used_vocabulary, (SEQUENCES, TOKENS), generator=generator)
    with torch.no_grad():
        theirs = reference.logits(tokens)
        mine = our_logits(ours, facts, tokens, kind, dtype)
    if not (torch.isfinite(theirs).all() and torch.isfinite(mine).all()):
        return Proof(reference.name, math.inf, math.inf, math.inf, 0.0)
    log_theirs, log_mine = theirs.double().log_softmax(-1), mine.double().log_softmax(-1)
    divergence = (log_theirs.exp() * (log_theirs - log_mine)).sum(-1).mean()
    same = (theirs.argmax(-1) == mine.argmax(-1)).double().mean()
    return Proof(
        reference.name,
        float((theirs - mine).abs().max()),
        float(theirs.abs().max()),
        abs(float(divergence)),
        float(same),
    )


def our_logits(
    source: TorchDistSource,
    facts: ModelFacts,
    tokens: "torch.Tensor",
    kind: Kind = "weights",
    dtype: str | None = None,
) -> "torch.Tensor":
    """[sequences, tokens, used vocabulary] of our checkpoint's `kind` (as `dtype`), by the code that trains it."""
    from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
    from k2_megatron.runtime.devices import Device
    from k2_megatron.runtime.groups import build_groups, connect, disconnect
    from k2_megatron.runtime.launch import single_rank

    device = Device("cpu", 0, "gloo", "CPU")
    with cpu_stands_in_for_cuda("cpu"):
        connect(single_rank(), device, 60.0)
        try:
            config = _one_layer_config(facts)
            rows = partial(_rows, source, kind, dtype)
            return _run_layers(rows, facts, config, build_groups(config.parallel), tokens)
        finally:
            disconnect()


def _run_layers(rows: Callable, facts: ModelFacts, config, groups, tokens) -> "torch.Tensor":
    import torch

    from k2_megatron.config.schema import Kernels
    from k2_megatron.convert.layer_parts import fill_as_they_run
    from k2_megatron.kernels.dispatch import choose_backends
    from k2_megatron.model import build_model

    kernels = choose_backends(Kernels(), "cpu")
    model: Any = build_model(config, kernels, groups.collection, initialize=False)[0]
    model.eval()
    rotary = model.rotary_pos_emb(tokens.shape[1])
    hidden_SBH = torch.stack([rows(EMBEDDING, int(t), int(t) + 1)[0] for t in tokens.T.flatten()])
    hidden_SBH = hidden_SBH.view(*tokens.T.shape, -1)
    block, layer = model.decoder.layers[0], 0
    entries = {entry.ours.removeprefix("decoder.layers."): entry for entry in TABLE if entry.stacked}

    def fill(name: str, parameter: torch.Tensor) -> None:
        entry = entries[name]
        matrix = parameter.view(entry.size(facts.shape))
        for first, last in row_blocks(*matrix.shape):
            matrix[first:last] = rows(entry, first, last, layer)

    fill_as_they_run(block, ("self_attention", "mlp"), fill)
    norms = [name for name in entries if not name.startswith(("self_attention.", "mlp."))]
    for number in range(facts.shape.layers):
        layer = number  # which `fill` reads
        for name in norms:
            fill(name, block.get_parameter(name))
        hidden_SBH, _context = block(hidden_SBH, None, rotary_pos_emb=rotary)
    norm = next(entry for entry in TABLE if entry.ours == "decoder.final_layernorm.weight")
    model.decoder.final_layernorm.weight.copy_(rows(norm, 0, facts.shape.hidden_size)[:, 0])
    normal_BSH = model.decoder.final_layernorm(hidden_SBH).transpose(0, 1)
    parts = row_blocks(facts.shape.used_vocabulary, facts.shape.hidden_size)
    blocks = (rows(OUTPUT, first, last) for first, last in parts)
    return torch.cat([normal_BSH @ block.T for block in blocks], -1)


def _rows(
    source: TorchDistSource,
    kind: Kind,
    dtype: str | None,
    entry: Entry,
    first: int,
    last: int,
    layer: int | None = None,
) -> "torch.Tensor":
    import torch

    bits = source.read(kind, Place(entry, layer), first, last)
    exact = torch.from_numpy(to_float32(bits, source.dtypes[kind]))
    return exact if dtype is None else exact.to(getattr(torch, dtype)).float()  # rounded by torch, not by our own code


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
