"""What a model is besides its weights: Hugging Face's config.json and our [model] table, one from the other."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.names import Shape

_DEFAULT_ROPE_BASE = 10000.0  # LlamaConfig's default, where config.json is silent


@dataclass(frozen=True)
class ModelFacts:
    """The sizes, and what the forward pass needs beside them."""

    shape: Shape
    context: int
    rope_base: float
    norm_epsilon: float
    tied_embeddings: bool = False

    @classmethod
    def from_config(cls, model: dict[str, Any]) -> "ModelFacts":
        """From the [model] table that a checkpoint's manifest holds. ConversionError when a size is not there."""
        sizes = ("layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "vocab_size", "sequence_length")
        lacking = [key for key in sizes if type(model.get(key)) is not int or model[key] < 1]
        numbers = ("rope_base", "norm_epsilon")
        lacking += [key for key in numbers if type(model.get(key, 1.0)) not in (int, float)]
        lacking += ["implementation"] if not isinstance(model.get("implementation", "k2"), str) else []
        if lacking:
            raise ConversionError(f"its [model] table lacks {', '.join(lacking)}")
        shape = Shape(
            layers=model["layers"],
            hidden_size=model["hidden_size"],
            ffn_hidden_size=model["ffn_hidden_size"],
            heads=model["heads"],
            kv_heads=model["kv_heads"],
            vocab_size=model["vocab_size"],
            used_vocabulary=model["vocab_size"],
        )
        return cls(
            shape,
            model["sequence_length"],
            model.get("rope_base", _DEFAULT_ROPE_BASE),
            model.get("norm_epsilon", 1e-5),
        )

    @classmethod
    def from_hugging_face(cls, folder: Path) -> "ModelFacts":
        """From config.json. ConversionError for a model that is not Llama-shaped, naming every reason."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            revisions = sorted(folder.glob("snapshots/*/config.json"))  # a model's folder in the hub's cache
            remedy = f"give {revisions[-1].parent}" if revisions else "give a Hugging Face model folder"
            if isinstance(error, PermissionError):
                remedy = "restore access to it"
            raise ConversionError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path} is damaged ({error}); fetch it again") from None
        if not isinstance(config, dict):
            raise ConversionError(f"{path} is damaged (it holds no table); fetch it again")
        reasons = _not_llama(config)
        if reasons:
            raise ConversionError(f"{path} describes a model this tool does not convert: {'; '.join(reasons)}")
        shape = Shape(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            used_vocabulary=config["vocab_size"],
        )
        return cls(
            shape,
            context=config.get("max_position_embeddings") or 2048,
            rope_base=float(_rope(config).get("rope_theta") or config.get("rope_theta") or _DEFAULT_ROPE_BASE),
            norm_epsilon=config.get("rms_norm_eps") or 1e-6,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def with_vocabulary(self, vocab_size: int | None = None, used: int | None = None) -> "ModelFacts":
        """The same model with `vocab_size` rows of which `used` are the tokenizer's. ConversionError if too few."""
        rows, used = vocab_size or self.shape.vocab_size, used or self.shape.used_vocabulary
        if used > rows:
            raise ConversionError(f"the vocabulary has {used} entries in use, {rows} rows cannot hold them")
        return replace(self, shape=replace(self.shape, vocab_size=rows, used_vocabulary=used))

    def model_table(self) -> dict[str, Any]:
        """Our [model] table."""
        shape = self.shape
        return {
            "layers": shape.layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "vocab_size": shape.vocab_size,
            "sequence_length": self.context,
            "rope_base": self.rope_base,
            "norm_epsilon": self.norm_epsilon,
        }

    def hugging_face_config(self, dtype: str, kept: dict[str, Any]) -> dict[str, Any]:
        """config.json of LlamaForCausalLM. `kept` is an earlier config.json, whose other keys stay (token ids)."""
        shape = self.shape
        ours = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.used_vocabulary,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_hidden_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        dropped = {"rope_parameters", "dtype", "transformers_version", "_name_or_path", "pretraining_tp", "auto_map"}
        return {**{key: value for key, value in kept.items() if key not in dropped}, **ours}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _malformed(config: dict[str, Any]) -> list[str]:
    """What of config.json has no value that the sizes and numbers of a model can have."""
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    reasons = [f"it lacks {key}" for key in needed if config.get(key) is None]
    sizes = [(key, config.get(key)) for key in (*needed, "num_key_value_heads", "max_position_embeddings")]
    reasons += [f"{key} is {size!r}" for key, size in sizes if size is not None and (type(size) is not int or size < 1)]
    rope = _rope(config)
    if not isinstance(rope, dict):
        return [*reasons, f"its RoPE is described by {rope!r}, not by a table"]
    numbers = [(key, config.get(key)) for key in ("rms_norm_eps", "rope_theta")] + [
        ("rope_theta", rope.get("rope_theta"))
    ]
    return reasons + [
        f"{key} is {number!r}"
        for key, number in numbers
        if number is not None and (type(number) not in (int, float) or not 0 < number < math.inf)
    ]


def _not_llama(config: dict[str, Any]) -> list[str]:
    reasons = (
        [f"model_type is {config.get('model_type')!r}, not 'llama'"] if config.get("model_type") != "llama" else []
    )
    malformed = _malformed(config)
    if malformed:
        return reasons + malformed
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        reasons.append(f"its RoPE is scaled ({kind}), which K2 has no setting for")
    reasons += [f"{key} is true: K2 has no biases" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if config.get("quantization_config"):
        reasons.append("it is quantized (dequantize it first)")
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act is {config['hidden_act']!r}, not 'silu'")
    return reasons + _uneven_heads(config)


def _uneven_heads(config: dict[str, Any]) -> list[str]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    reasons = [f"{heads} heads do not divide hidden_size {hidden}"] if hidden % heads else []
    if heads % kv_heads:
        reasons.append(f"{kv_heads} KV heads do not divide {heads} heads")
    if config.get("head_dim") not in (None, hidden // heads):
        reasons.append(f"head_dim is {config['head_dim']}, not hidden_size / heads = {hidden // heads}")
    return reasons
