"""What people do with a converted folder, and the folders they bring: transformers' Auto classes, the hub's cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    ROPE_BASE,
    export_model,
    import_model,
    model_config,
    require_same_tensors,
    stored_tensors,
    write_llama,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.export_model import _special_ids
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.evaluate.continue_text import continue_tokens
from k2_megatron.evaluate.one_process import loaded_model

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"
PROMPT = "My fellow citizens, the state of the Union is"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # megatron-core's, on loading
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_continues_a_text_as_we_do(tmp_path: Path, tied: bool) -> None:
    """Greedily, by its own tokenizer class and its generate(): the same pieces, the same tokens."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    write_llama(tmp_path / "hf", kv_heads=2, tied=tied, vocabulary=tokenizer.vocab_size)
    import_model(tmp_path / "hf", tmp_path / "run", tensor=2)
    export_model(tmp_path / "run", tmp_path / "out", tokenizer=TOKENIZER, shard_bytes=400_000)

    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        theirs_tokenizer.eos_token_id == tokenizer.end_of_document
    )  # transformers 4 adds a token of its own without it
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = theirs_tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :].tolist()

    with loaded_model(tmp_path / "run") as (config, _step, ours):
        assert tokenizer.encode(PROMPT) == prompt["input_ids"][0].tolist()
        mine = continue_tokens(
            ours,
            tokenizer.encode(PROMPT),
            new_tokens=24,
            sequence_length=config.model.sequence_length,
            end_of_document=None,
            temperature=1.0,
            top_k=1,
            seed=0,
        )
    assert len(set(mine)) > 4, "a model that repeats itself compares little"
    assert mine == theirs
    assert theirs_tokenizer.decode(mine) == tokenizer.decode(mine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_from_config_json_what_the_checkpoint_is(tmp_path: Path, dtype: str, tied: bool) -> None:
    write_llama(tmp_path / "hf", kv_heads=2, tied=tied, vocabulary=131)
    import_model(tmp_path / "hf", tmp_path / "run", vocab_size=136)
    export_model(tmp_path / "run", tmp_path / "out", dtype=dtype, shard_bytes=60_000)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.vocab_size, config.num_key_value_heads, config.max_position_embeddings) == (131, 2, 256)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": ROPE_BASE}
    assert config.tie_word_embeddings is tied
    assert config.dtype == getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.generation_config.eos_token_id == 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = stored_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert ("lm_head.weight" in stored) is not tied


def to_hub_cache(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub keeps one: links in snapshots/REVISION to blobs/HASH."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123456789abcdef"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def test_vocabulary_is_not_cut_below_the_tokenizer_that_goes_with_it(tmp_path: Path) -> None:
    """Ids without a row: transformers would load the folder and fail, or read beyond, at the first such piece."""
    write_llama(tmp_path / "hf", kv_heads=2, tied=False, vocabulary=131)
    import_model(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConversionError, match=r"--vocab-size 130 cuts off pieces of .*tokenizer.json, which has 4096"):
        export_model(tmp_path / "run", tmp_path / "out", tokenizer=TOKENIZER, used_vocabulary=130)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", kv_heads=2)
    shutil.copyfile(TOKENIZER, tmp_path / "hf" / "tokenizer.json")
    cache = tmp_path / "models--people--model"
    snapshot = to_hub_cache(tmp_path / "hf", cache)
    import_model(snapshot, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_symlink()]
    shutil.rmtree(cache)  # nothing of the result hangs on it
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=100_000)
    require_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


def test_a_cache_folder_without_its_revision_is_told_which_to_take(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    snapshot = to_hub_cache(tmp_path / "hf", tmp_path / "cache")
    with pytest.raises(ConversionError, match=f"give {snapshot}"):
        import_model(tmp_path / "cache", tmp_path / "run")


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def lose_a_blob(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.unlink()
    path.symlink_to("../../blobs/incomplete")


def cut_a_shard(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])


def point_the_index_elsewhere(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00005.safetensors"
    path.write_text(json.dumps(index))


def leave_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of", "../model-00001-of"))


def change_config(**values):
    def change(folder: Path) -> None:
        config = {**model_config(folder), **values}
        (folder / "config.json").write_text(json.dumps(config))

    return change


WRONG_FOLDERS = {
    "lost-shard": (lose_a_shard, r"model-00002-of-0000\d.safetensors is missing"),
    "lost-blob": (lose_a_blob, r"model-00002-of-0000\d.safetensors is missing"),
    "cut-shard": (cut_a_shard, r"model-00002-of-0000\d.safetensors has \d+ bytes, its header announces"),
    "index": (point_the_index_elsewhere, r"holds model.norm.weight, which the index puts in|is in the index"),
    "outside": (leave_the_folder, "points outside its folder"),
    "layers": (change_config(num_hidden_layers=4), "missing model.layers.3"),
    "fewer-layers": (change_config(num_hidden_layers=2), "no place for model.layers.2"),
    "width": (change_config(intermediate_size=176), r"gate_proj.weight is \[172, 64\], config.json says \[176, 64\]"),
    "mistral": (change_config(model_type="mistral"), "model_type is 'mistral', not 'llama'"),
    "llama3-rope": (
        change_config(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}),
        r"its RoPE is scaled \(llama3\)",
    ),
    "old-scaled-rope": (
        change_config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        r"its RoPE is scaled \(linear\)",
    ),
    "head-size": (change_config(head_dim=32), "head_dim is 32, not hidden_size / heads = 16"),
    "quantized": (change_config(quantization_config={"quant_method": "fp8"}), "it is quantized"),
    "text": (lambda folder: (folder / "config.json").write_text("[]"), r"config.json is damaged|describes a model"),
}


@pytest.mark.parametrize("wrong", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path: Path, wrong: str) -> None:
    wound, text = WRONG_FOLDERS[wrong]
    write_llama(tmp_path / "hf")
    wound(tmp_path / "hf")
    with pytest.raises(ConversionError, match=text) as refused:
        import_model(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_tied_embeddings_that_are_stored_twice_must_be_equal(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", tied=True)
    tensors = stored_tensors(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    import_model(tmp_path / "hf", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    assert model_config(tmp_path / "back")["tie_word_embeddings"] is True
    tensors["lm_head.weight"][127, 63] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match="ties the embeddings, and the stored lm_head"):
        import_model(tmp_path / "hf", tmp_path / "again")


def test_an_old_config_json_means_what_it_says(tmp_path: Path) -> None:
    """As transformers 4 wrote it, and its first versions: RoPE base beside the sizes, no KV heads, no head size."""
    model = write_llama(tmp_path / "hf")
    config = model_config(tmp_path / "hf")
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "dtype"):
        config.pop(key, None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_theta": ROPE_BASE, "rope_scaling": None}))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")  # one file, no index
    import_model(tmp_path / "hf", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
        assert torch.equal(model(tokens).logits, again)


@pytest.mark.parametrize(
    ("pieces", "end", "expected"),
    [
        (["a", "<|im_end|>"], 1, "<|im_end|>"),  # no name that we know
        (["a", "</s>", "<|eot_id|>"], [2, 1], "<|eot_id|>"),  # the model's own before the usual one
        (["a", "</s>"], 0, "</s>"),
        (["a", "b"], 1, None),
    ],
)
def test_a_tokenizer_that_came_alone_is_told_the_end_of_the_model(tmp_path: Path, pieces, end, expected) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    for piece in pieces[1:]:
        (backend.add_special_tokens if piece.startswith("<") else backend.add_tokens)([piece])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert _special_ids(tmp_path / "tokenizer.json", tmp_path, {"eos_token_id": end}) == {}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("eos_token") == expected
