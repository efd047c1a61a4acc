"""from-k2-legacy: shards written in the old format from a known model, with its Adam state, under several layouts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conversions import export_model, in_this_process, source_of, stored_tensors
from legacy_checkpoint import change, known_model, legacy_folder, options, write_legacy

from k2_megatron.convert.describe import describe
from k2_megatron.convert.errors import ConversionError, ProofFailed
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.legacy_k2 import Home, LegacyK2Source
from k2_megatron.convert.legacy_model import LegacyModel
from k2_megatron.convert.logits import compare_logits
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Entry, Place, places
from k2_megatron.convert.torch_dist import read_manifest
from k2_megatron.convert.transformers_model import TransformersModel

LAYOUTS = [(1, 1, 1, 3), (2, 3, 1, 3), (2, 2, 2, 8)]  # tensor, pipeline, virtual pipeline, layers


@pytest.mark.parametrize(("tensor", "pipeline", "virtual", "layers"), LAYOUTS)
def test_weights_and_adam_state_arrive_to_the_bit(
    tmp_path: Path, tensor: int, pipeline: int, virtual: int, layers: int
) -> None:
    weights, moments = known_model(tmp_path / "hf", layers)
    write_legacy(tmp_path / "iter_0000941", weights, moments, tensor, pipeline, virtual)
    saved = import_legacy(options(tmp_path, tensor=2), optimizer=True)
    assert saved.name == "step_00000941"
    export_model(tmp_path / "run", tmp_path / "back")
    for name, tensor_out in stored_tensors(tmp_path / "back").items():
        assert torch.equal(tensor_out, weights[name].bfloat16()), name
    ours = source_of(tmp_path / "run")
    from safetensors.torch import save_file

    facts = ModelFacts.from_hugging_face(tmp_path / "hf")
    for kind, named in {"main": weights, **moments}.items():
        for path in (tmp_path / "hf").glob("model*"):
            path.unlink()
        save_file(named, tmp_path / "hf" / "model.safetensors")  # moments in the clothes of weights
        theirs = HuggingFaceSource(tmp_path / "hf", facts)
        for place in places(facts.shape):
            rows = place.entry.size(facts.shape)[0]
            assert (ours.read(kind, place, 0, rows) == theirs.read("weights", place, 0, rows)).all(), (kind, place)


@pytest.mark.parametrize(("tensor", "pipeline", "virtual", "layers"), LAYOUTS)
def test_old_code_ours_and_transformers_give_the_same_logits(
    tmp_path: Path, tensor: int, pipeline: int, virtual: int, layers: int
) -> None:
    """Three implementations on the same weights: the old layout from its shards, ours after the import, and Llama."""
    weights, moments = known_model(tmp_path / "hf", layers)
    folder = tmp_path / "iter_0000941"
    write_legacy(folder, weights, moments, tensor, pipeline, virtual)
    import_legacy(options(tmp_path, pipeline=pipeline), optimizer=True)
    ours = source_of(tmp_path / "run")
    facts = LegacyK2Source(folder).facts
    export_model(tmp_path / "run", tmp_path / "back")  # the bfloat16 weights, for transformers
    for reference in (LegacyModel(folder), TransformersModel(tmp_path / "back")):
        proof = compare_logits(reference, ours, facts)
        assert proof.largest_logit > 1.0, "the logits are too small for the comparison to mean anything"
        assert proof.difference <= 1e-5 * max(1.0, proof.largest_logit), proof
        assert proof.divergence <= 1e-10, proof


@pytest.mark.parametrize("optimizer", [True, False])
def test_the_proof_of_old_shards_holds_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: bool
) -> None:
    """With Adam's state weights in float32 are its fp32 parameters, of which the shards' weights are the roundings."""
    in_this_process(monkeypatch)
    legacy_folder(tmp_path)
    import_legacy(options(tmp_path, precision="float32", proof=True), optimizer=optimizer)


def wrong_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved stages read as if they were not: chunk after chunk of stage 0, then of stage 1."""
    right = LegacyK2Source.home

    def home(self: LegacyK2Source, place: Place) -> Home:
        if place.layer is None:
            return right(self, place)
        part, layer = divmod(place.layer, self.shape.layers // 4)
        return Home(*divmod(part, 2), place.entry.legacy.format(layer=layer))

    monkeypatch.setattr(LegacyK2Source, "home", home)


def wrong_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank after rank as they lie in the files: gate and up of a rank, then gate and up of the next."""
    right = LegacyK2Source._pieces

    def pieces(self: LegacyK2Source, entry: Entry, rows: int, columns: int):
        return right(self, replace(entry, rows="same") if entry.rows == "gate_up" else entry, rows, columns)

    monkeypatch.setattr(LegacyK2Source, "_pieces", pieces)


def wrong_query_key_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused rows taken for all queries, all keys, all values of a rank, as older versions had them."""
    right = LegacyK2Source._read_local

    def read(self: LegacyK2Source, kind, tensor, home, first_row, part):
        if "query_key_value" not in home.name:
            return right(self, kind, tensor, home, first_row, part)
        heads = self.shape.heads // self.tensor_parallel
        whole = numpy.empty((3 * heads * self.shape.head_dim, part.shape[1]), part.dtype)
        right(self, kind, tensor, home, 0, whole)
        rows = whole.reshape(3, heads, self.shape.head_dim, -1).swapaxes(0, 1).reshape(whole.shape)
        part[...] = rows[first_row : first_row + len(part)]

    monkeypatch.setattr(LegacyK2Source, "_read_local", read)


@pytest.mark.parametrize("wrong", [wrong_stages, wrong_gate_and_up, wrong_query_key_value])
def test_the_proof_sees_a_wrong_arrangement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    """Every tensor arrives, whole and with the right shape, and the model is another one."""
    weights, moments = known_model(tmp_path / "hf", layers=8)
    folder = tmp_path / "iter_0000941"
    write_legacy(folder, weights, moments, 2, 2, 2)
    wrong(monkeypatch)
    import_legacy(options(tmp_path), optimizer=False)
    facts = LegacyK2Source(folder, optimizer=False).facts
    proof = compare_logits(LegacyModel(folder), source_of(tmp_path / "run"), facts)
    assert proof.difference > 100 * proof.allowed_difference, proof
    assert not proof.holds


def test_a_failed_proof_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy_folder(tmp_path)
    wrong_gate_and_up(monkeypatch)
    with pytest.raises(ProofFailed, match="the two models disagree, so nothing was published"):
        import_legacy(options(tmp_path, proof=True), optimizer=False)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def swap_states(state: dict) -> None:
    """The same shapes in another order: the q-k-v matrices of layers 0 and 1 exchange their fp32 copies."""
    mains = state["optimizer"]["fp32_from_fp16_params"][0]
    mains[1], mains[5] = mains[5], mains[1]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (swap_states, "does not round to the weight"),
        (lambda s: s.update(iteration=942), "is of iteration 942"),
        (
            lambda s: s["model"]["language_model"]["encoder"].pop("layers.1.mlp.dense_4h_to_h.weight"),
            "lacks encoder.layers.1",
        ),
        (lambda s: s["model"]["language_model"].update(pooler={"weight": torch.ones(2)}), "holds pooler.weight"),
        (
            lambda s: s["model"]["language_model"]["encoder"]["final_layernorm.weight"].add_(1),
            "differs between tensor ranks",
        ),
        (lambda s: s["optimizer"].pop("fp32_from_fp16_params"), "a distributed one"),
        (lambda s: _steps_in_groups(s, 934), "Adam made 934 updates, that of other ranks 941"),
        (
            lambda s: s["optimizer"]["optimizer"]["param_groups"][0].update(step=9),
            "Adam made 9 and 941 updates of diff",
        ),
        (lambda s: s.update(checkpoint_version=1.0), "has checkpoint_version 1.0"),
        (lambda s: s.pop("model"), "holds neither model nor model0"),
        (lambda s: s.pop("args"), "lacks the arguments"),
    ],
    ids=[
        "order",
        "iteration",
        "missing",
        "unknown",
        "mixed",
        "optimizer",
        "updates",
        "uneven",
        "version",
        "no-model",
        "no-arguments",
    ],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path, edit, text: str) -> None:
    folder = legacy_folder(tmp_path)
    change(folder / "mp_rank_01_000" / "model_optim_rng.pt", edit)
    with pytest.raises(ConversionError, match=text):
        import_legacy(options(tmp_path), optimizer=True)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def _steps_in_groups(state: dict, updates: int) -> None:
    for group in state["optimizer"]["optimizer"]["param_groups"]:
        group["step"] = updates


def _steps_beside_moments(state: dict, updates: int) -> None:
    """As torch's Adam has them."""
    for group in state["optimizer"]["optimizer"]["param_groups"]:
        del group["step"]
    for moments in state["optimizer"]["optimizer"]["state"].values():
        moments["step"] = torch.tensor(float(updates))


@pytest.mark.parametrize("place", [_steps_in_groups, _steps_beside_moments])
def test_adams_own_count_and_the_configurations_samples_come_along(tmp_path: Path, place: Callable) -> None:
    """7 of 941 updates were skipped, and the old run did not store its samples."""
    folder = legacy_folder(tmp_path, 2, 3)
    for path in folder.glob("*/*.pt"):
        change(path, lambda state: (place(state, 934), delattr(state["args"], "consumed_train_samples")))
    manifest = read_manifest(import_legacy(options(tmp_path), optimizer=True))
    assert (manifest["step"], manifest["optimizer_step"]) == (941, 934)
    assert (manifest["consumed_samples"], manifest["consumed_tokens"]) == (
        941,
        941 * 32,
    )  # a sample a step by start.toml
    weights_alone = import_legacy(replace(options(tmp_path), save=tmp_path / "weights-alone"), optimizer=False)
    assert read_manifest(weights_alone)["optimizer_step"] == 0


def test_missing_rank_is_named(tmp_path: Path) -> None:
    folder = legacy_folder(tmp_path, 2, 3)
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ConversionError, match="tensor rank 1, pipeline rank 1"):
        import_legacy(options(tmp_path), optimizer=True)


def test_files_of_two_stages_that_changed_places_are_told_apart(tmp_path: Path) -> None:
    """Middle stages have the same names and shapes: only the rank that wrote them tells one from the other."""
    weights, moments = known_model(tmp_path / "hf", layers=8)
    folder = tmp_path / "iter_0000941"
    write_legacy(folder, weights, moments, 1, 4)
    (folder / "mp_rank_00_001").rename(folder / "aside")
    (folder / "mp_rank_00_002").rename(folder / "mp_rank_00_001")
    (folder / "aside").rename(folder / "mp_rank_00_002")
    with pytest.raises(ConversionError, match="was written by tensor rank 0 of stage 2"):
        import_legacy(options(tmp_path), optimizer=True)


def test_inspect_tells_of_old_shards_what_they_hold(tmp_path: Path) -> None:
    weights, moments = known_model(tmp_path / "hf", layers=8)
    write_legacy(tmp_path / "iter_0000941", weights, moments, 2, 2, 2)
    text = describe(tmp_path / "iter_0000941")
    for part in ("iteration 941, TP 2 x PP 2 x VP 2", "weights (bfloat16), main (float32), exp_avg", "7,528 samples",
                 "240,896 tokens", "stage 1 chunk 1, cut over 2 ranks", "344x64", "0.044 MB"):  # fmt: skip
        assert part in text, f"{part} is not in\n{text}"


def test_without_adams_state_any_optimizer_is_read_over(tmp_path: Path) -> None:
    folder = legacy_folder(tmp_path)
    for path in folder.glob("*/*.pt"):
        change(path, lambda s: s["optimizer"].pop("fp32_from_fp16_params"))
    assert import_legacy(options(tmp_path), optimizer=False).name == "step_00000941"
