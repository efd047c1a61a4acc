"""Small models in Hugging Face's form, and both conversions of them, for the tests of this folder."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from k2_megatron.convert import logits
from k2_megatron.convert.export_model import ExportOptions, export_hugging_face
from k2_megatron.convert.import_model import ImportOptions, import_hugging_face
from k2_megatron.convert.torch_dist import TorchDistSource, checkpoint_folder, read_manifest

LAYERS = 3
ROPE_BASE = 50000.0


def write_llama(
    folder: Path,
    *,
    kv_heads: int = 4,
    tied: bool = False,
    vocabulary: int = 128,
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
    rope_base: float = ROPE_BASE,
) -> LlamaForCausalLM:
    """A seeded random model, saved by transformers in several shards."""
    torch.manual_seed(kv_heads + vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        tie_word_embeddings=tied,
        initializer_range=0.1,  # so that logits, and with them a wrong row, are large
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm's weight in the place of another
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="150KB")
    return model


def import_model(load: Path, save: Path, **options) -> Path:
    return import_hugging_face(ImportOptions(load, save, **{"proof": False, **options}))


def export_model(load: Path, save: Path, **options) -> Path:
    return export_hugging_face(ExportOptions(load, save, **{"proof": False, **options}))


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs run here: a process of their own takes seconds to start."""
    monkeypatch.setattr(logits, "process_pool", lambda count, **_how: ThreadPoolExecutor(count))


def source_of(path: Path) -> TorchDistSource:
    folder = checkpoint_folder(path)
    return TorchDistSource(folder, read_manifest(folder))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def require_same_tensors(first: Path, second: Path) -> None:
    """Same names, dtypes, shapes and bits."""
    ours, theirs = stored_tensors(first), stored_tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        different = (tensor.view(integer) != other.view(integer)).nonzero()
        assert not len(different), f"{name} differs first at {different[0].tolist()}"


def model_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
