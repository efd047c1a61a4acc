"""Hugging Face to ours and back: equal to the bit, and the same logits by transformers' code and by ours."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conversions import (
    ROPE_BASE,
    export_model,
    import_model,
    in_this_process,
    model_config,
    require_same_tensors,
    source_of,
    stored_tensors,
    write_llama,
)
from transformers import AutoModelForCausalLM

from k2_megatron.convert import import_model as import_model_code
from k2_megatron.convert.errors import ConversionError, ProofFailed
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.logits import DIVERGENCE_BOUND, LOGITS_BOUND, Proof, compare_logits
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import EMBEDDING, OUTPUT, Place
from k2_megatron.convert.numbers import Rounding, change_dtype, to_float32
from k2_megatron.convert.transformers_model import TransformersModel
from k2_megatron.train.checkpoints.manifest import manifest_text

SHAPES = {
    "multi-head": ({}, {}),
    "grouped-query": ({"kv_heads": 2}, {"tensor": 2}),
    "one-kv-head": ({"kv_heads": 1}, {"pipeline": 3}),
    "tied": ({"tied": True, "kv_heads": 2}, {}),
    "odd-vocabulary": ({"vocabulary": 131}, {}),
    "padded-vocabulary": ({"vocabulary": 131}, {"vocab_size": 136, "tensor": 4, "pipeline": 3}),
    "tied-and-padded": ({"vocabulary": 131, "tied": True}, {"vocab_size": 132}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip_is_equal_to_the_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, options = SHAPES[name]
    write_llama(tmp_path / "hf", dtype=dtype, **model)
    import_model(tmp_path / "hf", tmp_path / "run", **options)
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=100_000)
    require_same_tensors(tmp_path / "hf", tmp_path / "back")
    before, after = model_config(tmp_path / "hf"), model_config(tmp_path / "back")
    for key in ("vocab_size", "tie_word_embeddings", "num_key_value_heads", "max_position_embeddings", "eos_token_id"):
        assert before[key] == after[key], key
    assert after["rope_theta"] == ROPE_BASE


@pytest.mark.parametrize("name", SHAPES)
def test_our_model_gives_transformers_logits(tmp_path: Path, name: str) -> None:
    model, options = SHAPES[name]
    write_llama(tmp_path / "hf", **model)
    import_model(tmp_path / "hf", tmp_path / "run", **options)
    facts = ModelFacts.from_hugging_face(tmp_path / "hf")
    proof = compare_logits(TransformersModel(tmp_path / "hf"), source_of(tmp_path / "run"), facts)
    assert proof.largest_logit > 1.0, "the logits are too small for the comparison to mean anything"
    assert proof.difference <= 1e-5 * max(1.0, proof.largest_logit), proof
    assert proof.divergence <= 1e-10, proof


def test_bfloat16_model_is_loaded_by_transformers_unedited_and_gives_the_same_logits(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", kv_heads=2, dtype=torch.bfloat16)
    import_model(tmp_path / "hf", tmp_path / "run", tensor=2)
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=100_000)
    tokens = torch.arange(96).view(2, 48) % 128
    for dtype in (torch.bfloat16, torch.float32):
        first, second = (_logits(tmp_path / name, dtype, tokens) for name in ("hf", "back"))
        assert torch.equal(first, second), f"{dtype}: {(first - second).abs().max()}"
    facts = ModelFacts.from_hugging_face(tmp_path / "back")
    proof = compare_logits(TransformersModel(tmp_path / "back"), source_of(tmp_path / "run"), facts)
    assert proof.difference <= 1e-5 * max(1.0, proof.largest_logit), proof


def test_tokenizer_and_generation_settings_come_along_or_may_be_missing(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    import_model(tmp_path / "hf", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"
    export_model(tmp_path / "run", tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def _logits(folder: Path, dtype: torch.dtype, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens).logits


def test_the_proof_sees_two_exchanged_rows(tmp_path: Path) -> None:
    """A wrong permutation of keys inside one head: the model still talks, and the proof must refuse it."""
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    exchange_rows(tmp_path / "hf", KEYS, slice(3, 4), slice(5, 6))
    facts = ModelFacts.from_hugging_face(tmp_path / "hf")
    proof = compare_logits(TransformersModel(tmp_path / "hf"), source_of(tmp_path / "run"), facts)
    assert proof.difference > LOGITS_BOUND * max(1.0, proof.largest_logit), proof
    assert proof.divergence > DIVERGENCE_BOUND, proof


def exchange_rows(folder: Path, tensor: str, one: slice, other: slice) -> None:
    """Two ranges of rows of `tensor` in each other's place."""
    from safetensors.torch import save_file

    path = next(path for path in folder.glob("*.safetensors") if tensor in _names(path))
    tensors = {name: found for name, found in stored_tensors(folder).items() if name in _names(path)}
    rows = tensors[tensor]
    rows[one], rows[other] = rows[other].clone(), rows[one].clone()
    save_file(tensors, path)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert changes.keys() <= config.keys()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


KEYS = "model.layers.1.self_attn.k_proj.weight"
WRONG_EXPORTS = {
    "sound": lambda folder: None,
    "two-rows": lambda folder: exchange_rows(folder, KEYS, slice(3, 4), slice(5, 6)),
    "two-heads": lambda folder: exchange_rows(folder, KEYS, slice(0, 16), slice(16, 32)),
    "rope-base": lambda folder: edit_config(folder, rope_theta=2 * ROPE_BASE),
    "norm-epsilon": lambda folder: edit_config(folder, rms_norm_eps=1e-6),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_proof_sees_as_much_where_weights_were_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A bound wide enough for rounding would let all of these pass: two exchanged rows move the logits less."""
    in_this_process(monkeypatch)
    write_llama(tmp_path / "hf", kv_heads=2)
    import_model(tmp_path / "hf", tmp_path / "run")
    facts = ModelFacts.from_hugging_face(tmp_path / "hf")
    export_model(tmp_path / "run", tmp_path / "out", dtype=dtype, proof=True)
    for name, wrong in WRONG_EXPORTS.items():
        shutil.copytree(tmp_path / "out", tmp_path / name)
        wrong(tmp_path / name)
        proof = compare_logits(TransformersModel(tmp_path / name), source_of(tmp_path / "run"), facts, dtype=dtype)
        assert proof.holds == (name == "sound"), f"{name}: {proof}"


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "bfloat16"),
        (torch.float16, "bfloat16"),
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "float32"),
    ],
)
def test_the_proof_of_an_import_is_as_narrow_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, precision: str
) -> None:
    in_this_process(monkeypatch)
    write_llama(tmp_path / "hf", kv_heads=2, dtype=dtype)
    found = import_model(tmp_path / "hf", tmp_path / "run", precision=precision, proof=True)
    told = json.loads((found / "k2.json").read_text())["proof"]
    assert "KL divergence" in told
    assert f"(bound {DIVERGENCE_BOUND:g})" in told


def test_logits_that_are_no_numbers_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is finite and both models agree: they overflow alike, and inf - inf is below no bound."""
    in_this_process(monkeypatch)
    model = write_llama(tmp_path / "hf")
    model.model.norm.weight.data.fill_(3e38)
    shutil.rmtree(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match="infinite or no numbers, so nothing can be compared"):
        import_model(tmp_path / "hf", tmp_path / "run", proof=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("share_of_difference", "share_of_divergence", "holds"),
    [(0.9, 0.9, True), (1.1, 0.0, False), (0.0, 1.1, False), (math.nan, 0.0, False), (0.0, math.nan, False)],
)
def test_a_proof_holds_within_both_of_its_bounds(
    share_of_difference: float, share_of_divergence: float, holds: bool
) -> None:
    difference, divergence = share_of_difference * 4.0 * LOGITS_BOUND, share_of_divergence * DIVERGENCE_BOUND
    assert Proof("transformers", difference, 4.0, divergence, 1.0).holds == holds


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_float16_rounds_to_bfloat16_and_comes_back_exactly_from_the_main_parameters(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", dtype=torch.float16)
    import_model(tmp_path / "hf", tmp_path / "run")
    source = source_of(tmp_path / "run")
    assert source.dtypes == {"weights": "bfloat16", "main": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"}
    export_model(tmp_path / "run", tmp_path / "back", weights="main", dtype="float16")
    require_same_tensors(tmp_path / "hf", tmp_path / "back")
    moments = source.read("exp_avg_sq", Place(EMBEDDING, None), 0, 128)
    assert not moments.any()


def test_the_proof_of_main_parameters_runs_our_model_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights trained with are their roundings: compared with those, equal parameters would look unequal."""
    in_this_process(monkeypatch)
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", precision="bfloat16")
    export_model(tmp_path / "run", tmp_path / "back", weights="main", dtype="float32", shard_bytes=100_000, proof=True)
    require_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_tied_embeddings_that_training_pulled_apart_stay_apart(tmp_path: Path) -> None:
    """Re-tied only if recorded and equal: here the record says tied, and one element differs."""
    write_llama(tmp_path / "hf", tied=True)
    untied = write_llama(tmp_path / "untied")
    config = model_config(tmp_path / "untied")
    import_model(tmp_path / "untied", tmp_path / "run")
    manifest_path = tmp_path / "run" / "checkpoints" / "step_00000000" / "k2.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["conversion"]["tied_embeddings"] = True
    manifest_path.write_text(manifest_text(manifest))
    export_model(tmp_path / "run", tmp_path / "back")
    assert model_config(tmp_path / "back")["tie_word_embeddings"] is False is config["tie_word_embeddings"]
    assert torch.equal(stored_tensors(tmp_path / "back")["lm_head.weight"], untied.lm_head.weight)


def test_padding_rows_of_the_vocabulary_are_zeros(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", vocabulary=131)
    import_model(tmp_path / "hf", tmp_path / "run", vocab_size=136, tensor=4)  # blocks of 34 rows: the last has both
    source = source_of(tmp_path / "run")
    for entry in (EMBEDDING, OUTPUT):
        rows = to_float32(source.read("weights", Place(entry, None), 0, 136), "float32")
        assert rows[:131].any(axis=1).all()
        assert not rows[131:].any()


def test_tied_model_trains_with_two_equal_matrices(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", tied=True)
    import_model(tmp_path / "hf", tmp_path / "run")
    source = source_of(tmp_path / "run")
    embedding = source.read("weights", Place(EMBEDDING, None), 0, 128)
    assert numpy.array_equal(embedding, source.read("weights", Place(OUTPUT, None), 0, 128))
    assert embedding.any()


@pytest.mark.parametrize("change", ["extra", "missing", "shape", "bias", "scaled", "nan", "family"])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: str) -> None:
    from safetensors.torch import save_file

    write_llama(tmp_path / "hf")
    tensors = stored_tensors(tmp_path / "hf")
    config = model_config(tmp_path / "hf")
    text = {
        "extra": "no place for model.layers.0.self_attn.q_norm.weight",
        "missing": "missing model.layers.2.mlp.up_proj.weight",
        "shape": "model.norm.weight is",
        "bias": "attention_bias",
        "scaled": "scaled",
        "nan": "infinite values or NaNs",
        "family": "model_type is 'qwen2'",
    }[change]
    if change == "extra":
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    elif change == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(65)
    elif change == "nan":
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    else:
        config.update(
            {"bias": {"attention_bias": True}, "family": {"model_type": "qwen2"}}.get(
                change, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
            )
        )
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=text):
        import_model(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "step_00000000").exists()


def test_every_tensor_used_once_by_the_source(tmp_path: Path) -> None:
    """Old transformers stored inv_freq beside the weights: known, and left out."""
    from safetensors.torch import save_file

    write_llama(tmp_path / "hf")
    tensors = stored_tensors(tmp_path / "hf")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    source = HuggingFaceSource(tmp_path / "hf", ModelFacts.from_hugging_face(tmp_path / "hf"))
    assert source.derived == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
def test_rounding_is_torchs(wanted: str) -> None:
    """Random bits of float32, all exponents and signs, and ties, against torch's own rounding."""
    generator = numpy.random.default_rng(5)
    values = generator.integers(0, 2**32, 20000, dtype=numpy.uint32)
    kept, half = {"bfloat16": (0xFFFF0000, 0x8000), "float16": (0xFFFFE000, 0x1000)}[wanted]
    ties = (values & numpy.uint32(kept)) | numpy.uint32(half)  # halfway between two values: random bits have hardly one
    values = numpy.concatenate([values, ties])
    values = values[numpy.isfinite(values.view(numpy.float32))]
    if wanted == "float16":
        values = values[numpy.abs(values.view(numpy.float32)) < 65504]
    rounding = Rounding()
    found = change_dtype(values, "float32", wanted, rounding)
    exact = torch.from_numpy(values.view(numpy.float32).copy())
    theirs = exact.to(getattr(torch, wanted))
    assert torch.equal(torch.from_numpy(found.view(numpy.int16)), theirs.view(torch.int16))
    assert rounding.values == int((theirs.float() != exact).sum())
    assert numpy.array_equal(to_float32(found, wanted), theirs.float().numpy())


def test_what_is_no_number_stays_so_when_it_is_rounded() -> None:
    """A carry out of its mantissa would make an infinity, or zero, of it."""
    bits = numpy.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], numpy.uint32)
    assert numpy.isnan(to_float32(change_dtype(bits, "float32", "bfloat16"), "bfloat16")).all()


@pytest.mark.parametrize("kind", ["weights", "main"])
def test_what_is_not_read_back_as_it_was_written_is_not_published(tmp_path: Path, monkeypatch, kind: str) -> None:
    """By a disk, or by memory on the way to it; hashes were taken of what was meant."""
    write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    right = import_model_code.write_checkpoint

    def flipped(job, *rest):
        product = right(job, *rest)
        path = job.folder / f"__0_{kind}_layer1.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return product

    monkeypatch.setattr(import_model_code, "write_checkpoint", flipped)
    with pytest.raises(ProofFailed, match=r"\(layer 1\) was not written as it was read"):
        import_model(tmp_path / "hf", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_missing_transformers_is_told_before_anything_is_converted(tmp_path: Path, monkeypatch, capsys) -> None:
    """The proof comes last: a model of 65B had been converted by then."""
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for convert, load in ((import_model, "hf"), (export_model, "run")):
        with pytest.raises(ConversionError, match=r"not installed: pip install .* or --no-proof"):
            convert(tmp_path / load, tmp_path / "new", proof=True)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
