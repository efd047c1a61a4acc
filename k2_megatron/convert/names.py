"""The name table: every weight under our name, Hugging Face's and the old K2 code's, and the rows that correspond.

A tensor here is 2-D, [rows, columns] of one layer (a norm's weight has one column). All three forms of a model hold
the same rows in another order: our fused QKV interleaves q, k and v by query group, our first MLP matrix is gate over
up, and the vocabulary may be padded. `segments` says which rows are which; both directions of every conversion read
it, so that what goes in comes out again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Rows = Literal["same", "vocabulary", "query_key_value", "gate_up"]
Cut = Literal["whole", "rows", "columns"]


@dataclass(frozen=True)
class Shape:
    """The sizes that the table needs. `used_vocabulary` rows are the tokenizer's; the rest of vocab_size is padding."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    used_vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def parameters(self) -> int:
        sizes = (place.entry.size(self) for place in places(self))
        return sum(rows * columns for rows, columns in sizes)


@dataclass(frozen=True)
class Entry:
    """One row of the table. `{layer}` in a name is the layer's number; ours are stacked over layers instead."""

    ours: str
    hugging_face: tuple[str, ...]
    legacy: str
    rows: Rows
    cut: Cut  # what tensor-parallel ranks share out
    transformer_engine: str | None = None  # our name where Transformer Engine fuses the norm into the projection

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hugging_face[0]

    def key(self, implementation: str = "k2") -> str:
        """Our global name, as checkpoints of this model.implementation have it."""
        return self.transformer_engine or self.ours if implementation == "transformer_engine" else self.ours

    def size(self, shape: Shape) -> tuple[int, int]:
        """(rows, columns) of our tensor, in one layer."""
        return _SIZES[self.ours.removeprefix("decoder.layers.")](shape)

    def hugging_face_size(self, index: int, shape: Shape) -> tuple[int, int]:
        """(rows, columns) of the `index`-th tensor that Hugging Face has for this one."""
        rows = sum(segment.rows for segment in segments(self, shape) if segment.tensor == index)
        return rows, self.size(shape)[1]


class Segment(NamedTuple):
    """`rows` consecutive rows: from `row` of Hugging Face's `tensor`-th tensor, at `our_row` of ours."""

    tensor: int
    row: int
    our_row: int
    rows: int


class Place(NamedTuple):
    """One tensor of the model: a row of the table, and the layer where there is one."""

    entry: Entry
    layer: int | None

    @property
    def hugging_face(self) -> tuple[str, ...]:
        return tuple(name.format(layer=self.layer) for name in self.entry.hugging_face)


_LAYER = "model.layers.{layer}."
TABLE = (
    Entry(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        "embedding.word_embeddings.weight",
        "vocabulary",
        "rows",
    ),
    Entry(
        "decoder.layers.input_layernorm.weight",
        (_LAYER + "input_layernorm.weight",),
        "encoder.layers.{layer}.input_layernorm.weight",
        "same",
        "whole",
        transformer_engine="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        "encoder.layers.{layer}.self_attention.query_key_value.weight",
        "query_key_value",
        "rows",
    ),
    Entry(
        "decoder.layers.self_attention.linear_proj.weight",
        (_LAYER + "self_attn.o_proj.weight",),
        "encoder.layers.{layer}.self_attention.dense.weight",
        "same",
        "columns",
    ),
    Entry(
        "decoder.layers.pre_mlp_layernorm.weight",
        (_LAYER + "post_attention_layernorm.weight",),
        "encoder.layers.{layer}.post_attention_layernorm.weight",
        "same",
        "whole",
        transformer_engine="decoder.layers.mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        "decoder.layers.mlp.linear_fc1.weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        "encoder.layers.{layer}.mlp.dense_h_to_4h.weight",
        "gate_up",
        "rows",
    ),
    Entry(
        "decoder.layers.mlp.linear_fc2.weight",
        (_LAYER + "mlp.down_proj.weight",),
        "encoder.layers.{layer}.mlp.dense_4h_to_h.weight",
        "same",
        "columns",
    ),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "encoder.final_layernorm.weight", "same", "whole"),
    Entry("output_layer.weight", ("lm_head.weight",), "output_layer.weight", "vocabulary", "rows"),
)
EMBEDDING, OUTPUT = TABLE[0], TABLE[-1]

_SIZES = {
    "embedding.word_embeddings.weight": lambda s: (s.vocab_size, s.hidden_size),
    "input_layernorm.weight": lambda s: (s.hidden_size, 1),
    "self_attention.linear_qkv.weight": lambda s: ((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden_size),
    "self_attention.linear_proj.weight": lambda s: (s.hidden_size, s.heads * s.head_dim),
    "pre_mlp_layernorm.weight": lambda s: (s.hidden_size, 1),
    "mlp.linear_fc1.weight": lambda s: (2 * s.ffn_hidden_size, s.hidden_size),
    "mlp.linear_fc2.weight": lambda s: (s.hidden_size, s.ffn_hidden_size),
    "decoder.final_layernorm.weight": lambda s: (s.hidden_size, 1),
    "output_layer.weight": lambda s: (s.vocab_size, s.hidden_size),
}


def places(shape: Shape) -> Iterator[Place]:
    """Every tensor of the model once, in the order of the forward pass."""
    stacked = [entry for entry in TABLE if entry.stacked]
    yield Place(EMBEDDING, None)
    for layer in range(shape.layers):
        for entry in stacked:
            yield Place(entry, layer)
    for entry in TABLE[1:]:
        if not entry.stacked:
            yield Place(entry, None)


def segments(entry: Entry, shape: Shape) -> list[Segment]:
    """The rows of `entry`, in the order of our tensor. Padding rows of the vocabulary are in none."""
    if entry.rows == "vocabulary":
        return [Segment(0, 0, 0, shape.used_vocabulary)]
    if entry.rows == "gate_up":
        ffn = shape.ffn_hidden_size
        return [Segment(0, 0, 0, ffn), Segment(1, 0, ffn, ffn)]
    if entry.rows == "query_key_value":
        return _query_key_value_segments(shape)
    return [Segment(0, 0, 0, entry.size(shape)[0])]


def _query_key_value_segments(shape: Shape) -> list[Segment]:
    # Group g of our matrix: the rows of its query heads, of its key head, of its value head.
    key_rows = shape.head_dim
    query_rows = shape.heads // shape.kv_heads * key_rows
    found = []
    for group in range(shape.kv_heads):
        start = group * (query_rows + 2 * key_rows)
        found.append(Segment(0, group * query_rows, start, query_rows))
        found.append(Segment(1, group * key_rows, start + query_rows, key_rows))
        found.append(Segment(2, group * key_rows, start + query_rows + key_rows, key_rows))
    return found
