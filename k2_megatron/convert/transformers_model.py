"""transformers' LlamaForCausalLM over a model folder, layer by layer: what from-hf and to-hf are compared with.

The code, the names and the library that finds tensors in safetensors files are transformers' side of it, not ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.logits import ROWS
from k2_megatron.convert.safetensors_file import read_index

if TYPE_CHECKING:
    import torch


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
        try:
            from transformers import AutoConfig, LlamaForCausalLM
        except ImportError:
            raise ConversionError(
                'the proof runs transformers, which is not installed: pip install "k2_megatron[eval]", or --no-proof'
            ) from None
        import torch

        config = AutoConfig.from_pretrained(self.folder)
        layers, tied = config.num_hidden_layers, config.tie_word_embeddings
        config.num_hidden_layers, config.vocab_size, config.pad_token_id, config.tie_word_embeddings = 1, 1, None, False
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).float().eval().model
        norm, model.norm = model.norm, torch.nn.Identity()
        stored = _StoredTensors(self.folder)
        hidden = stored.rows("model.embed_tokens.weight", tokens)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            parameters = dict(model.layers[0].named_parameters())
            for stored_name in stored.names(prefix):  # one at a time: a state dict would hold the layer twice
                parameters.pop(stored_name.removeprefix(prefix)).copy_(stored.whole(stored_name))
            assert not parameters, f"{self.folder} lacks {sorted(parameters)} of layer {layer}"
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
            for first in range(0, rows, ROWS):
                yield matrix[first : min(first + ROWS, rows)].float()
