"""config.json and safetensors headers with values that no model has: one line that names the value, never a crash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import import_model, model_config, write_llama
from safetensors.torch import save_file

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.export_model import MANIFEST
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.safetensors_file import INDEX, read_header, read_index
from k2_megatron.convert.verify import verify_export

SETTINGS: dict[str, tuple[str, Any, str]] = {
    "no-heads": ("num_attention_heads", 0, "num_attention_heads is 0"),
    "negative-layers": ("num_hidden_layers", -1, "num_hidden_layers is -1"),
    "true-layers": ("num_hidden_layers", True, "num_hidden_layers is True"),
    "text-for-a-size": ("num_key_value_heads", "four", "num_key_value_heads is 'four'"),
    "infinite-vocabulary": ("vocab_size", float("inf"), "vocab_size is inf"),
    "uneven-heads": ("num_attention_heads", 3, "3 heads do not divide hidden_size 64"),
    "uneven-kv-heads": ("num_key_value_heads", 3, "3 KV heads do not divide 4 heads"),
    "text-for-rope": ("rope_parameters", "default", "its RoPE is described by 'default'"),
    "text-for-the-base": ("rope_parameters", {"rope_theta": "big"}, "rope_theta is 'big'"),
    "text-for-epsilon": ("rms_norm_eps", "small", "rms_norm_eps is 'small'"),
    "text-for-the-context": ("max_position_embeddings", "256", "max_position_embeddings is '256'"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strange") / "hf"
    write_llama(folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_no_model_has_is_named(llama: Path, tmp_path: Path, name: str) -> None:
    key, value, wanted = SETTINGS[name]
    (tmp_path / "config.json").write_text(json.dumps({**model_config(llama), key: value}))
    with pytest.raises(ConversionError) as refused:
        ModelFacts.from_hugging_face(tmp_path)
    assert wanted in str(refused.value)


def test_a_thousand_million_layers_are_refused_before_their_names_are_made(llama: Path, tmp_path: Path) -> None:
    """Names of as many tensors fill the memory of the machine."""
    (tmp_path / "config.json").write_text(json.dumps({**model_config(llama), "num_hidden_layers": 10**9}))
    with pytest.raises(ConversionError, match=r"holds 30 tensors, config.json says 1000000000 layers"):
        HuggingFaceSource(llama, ModelFacts.from_hugging_face(tmp_path))


def test_what_transformers_alone_refuses_is_told_by_the_proof(llama: Path, tmp_path: Path) -> None:
    """Its errors do not come through from a process of its own: they cannot be unpickled."""
    for path in llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**model_config(llama), "initializer_range": "wide"}))
    with pytest.raises(ConversionError, match=r"transformers cannot read .*config\.json: .*initializer_range"):
        import_model(tmp_path, tmp_path / "run", proof=True)
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


HEADERS: dict[str, dict[str, Any]] = {
    "no-dtype": {"dtype": None},
    "dtype-list": {"dtype": ["F32"]},
    "no-shape": {"shape": None},
    "text-shape": {"shape": "ab"},
    "broken-shape": {"shape": [1.5, 2]},
    "negative-shape": {"shape": [-2, -3]},
    "one-offset": {"data_offsets": [0]},
    "text-offsets": {"data_offsets": ["0", "24"]},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_entry_of_another_form_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"norm": torch.ones(2, 3)}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["norm"].update(HEADERS[name])
    text = json.dumps({"norm": {key: value for key, value in header["norm"].items() if value is not None}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ConversionError, match=r"header is damaged .* norm"):
        read_header(path)


INDICES = {
    "no-map": "{}",
    "list": "[]",
    "number": '{"weight_map": {"a": 1}}',
    "nothing": '{"weight_map": {"a": null}}',
    "list-of-files": '{"weight_map": {"a": ["b"]}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_another_form_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(INDICES[name])
    with pytest.raises(ConversionError, match=r"index\.json is damaged .*; fetch it again"):
        read_index(tmp_path)


def test_json_nested_without_end_is_damage_wherever_it_stands(tmp_path: Path) -> None:
    """The parser gives up with an error that is no ValueError."""
    deep = b"[" * 100_000
    (tmp_path / "config.json").write_bytes(deep)
    with pytest.raises(ConversionError, match=r"config\.json is damaged"):
        ModelFacts.from_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ConversionError, match="header is damaged"):
        read_header(tmp_path / "model.safetensors")
    (tmp_path / MANIFEST).write_bytes(deep)
    assert "is damaged" in verify_export(tmp_path, workers=1)[0]
