"""transformers' LlamaForCausalLM over a model folder, layer by layer: what from-hf and to-hf are compared with.

The code, the names and the library that finds tensors in safetensors files are transformers' side of it, not ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.logits import row_blocks
from k2_megatron.convert.safetensors_file import read_index

if TYPE_CHECKING:
    import torch


def require_transformers() -> None:
    """ConversionError where it is not installed: asked before anything is converted, for the proof comes last."""
    if find_spec("transformers") is None:
        raise ConversionError(
            'the proof runs transformers, which is not installed: pip install "k2_megatron[proof]", or --no-proof'
        )


@dataclass(frozen=True)
class TransformersModel:
    """The model in `folder`, as a reference for `logits.prove`."""

    folder: Path

    @property
    def name(self) -> str:
        return "transformers"

    def logits(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """[sequences, tokens, vocabulary] of `tokens` [sequences, tokens]. ConversionError without transformers."""
        import torch

        with torch.no_grad():
            return self._logits(tokens)

    def _logits(self, tokens: "torch.Tensor") -> "torch.Tensor":
        require_transformers()
        import torch
        from transformers import AutoConfig, LlamaForCausalLM

        from k2_megatron.convert.layer_parts import fill_as_they_run

        try:
            config = AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # a checker of its own for every setting, whose errors cannot all be pickled
            reason = " ".join(str(error).split())
            raise ConversionError(f"transformers cannot read {self.folder / 'config.json'}: {reason[:300]}") from None
        layers, tied = config.num_hidden_layers, config.tie_word_embeddings
        config.num_hidden_layers, config.vocab_size, config.pad_token_id, config.tie_word_embeddings = 1, 1, None, False
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = LlamaForCausalLM(config).float().eval().model
        model.rotary_emb = type(model.rotary_emb)(config=config)  # its angles are no weights: they are computed
        block, model.norm = model.layers[0], torch.nn.Identity()
        block.input_layernorm, block.post_attention_layernorm, norm = (
            type(block.input_layernorm)(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        stored, layer = _StoredTensors(self.folder), 0

        def fill(name: str, parameter: torch.Tensor) -> None:
            first = 0
            for rows in stored.blocks(f"model.layers.{layer}.{name}"):
                parameter[first : first + len(rows)] = rows
                first += len(rows)
            assert first == len(parameter), f"{self.folder}: {name} of layer {layer} has {first} rows"

        names = {name for name, _parameter in block.named_parameters()}
        fill_as_they_run(block, ("self_attn", "mlp"), fill)
        hidden = stored.rows("model.embed_tokens.weight", tokens)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            found = {name.removeprefix(prefix) for name in stored.names(prefix)}
            assert found == names, f"{self.folder} lacks, or has too much, of layer {layer}: {sorted(found ^ names)}"
            fill("input_layernorm.weight", block.input_layernorm.weight)
            fill("post_attention_layernorm.weight", block.post_attention_layernorm.weight)
            hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        norm.weight.copy_(torch.cat(list(stored.blocks("model.norm.weight"))))
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
        """A tensor in blocks of rows, the file opened for each: the library maps it, and what was read stays mapped."""
        with self._open(name) as file:
            rows, *columns = file.get_slice(name).get_shape()
        for first, last in row_blocks(rows, *(columns or [1])):
            with self._open(name) as file:
                yield file.get_slice(name)[first:last].float()
