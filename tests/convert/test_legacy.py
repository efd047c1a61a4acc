"""from-k2-legacy: shards written in the old format from a known model, with its Adam state, under several layouts."""

import os
from pathlib import Path

import pytest
import torch
from conversions import export_model, source_of, stored_tensors, write_llama
from legacy_checkpoint import write_legacy

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.import_model import ImportOptions
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import places


def known_model(folder: Path) -> tuple[dict, dict]:
    """(fp32 weights, moments) by Hugging Face's names; the weights also lie in `folder`."""
    write_llama(folder)
    weights = stored_tensors(folder)
    generator = torch.Generator().manual_seed(3)
    moments = {
        kind: {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return weights, moments


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 3)])
def test_weights_and_adam_state_arrive_to_the_bit(tmp_path: Path, tensor: int, pipeline: int) -> None:
    weights, moments = known_model(tmp_path / "hf")
    write_legacy(tmp_path / "iter_0000941", weights, moments, tensor, pipeline)
    saved = import_legacy(ImportOptions(tmp_path / "iter_0000941", tmp_path / "run", tensor=2), optimizer=True)
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


def legacy_folder(tmp_path: Path, tensor: int = 2, pipeline: int = 1) -> Path:
    weights, moments = known_model(tmp_path / "hf")
    write_legacy(tmp_path / "iter_0000941", weights, moments, tensor, pipeline)
    return tmp_path / "iter_0000941"


def change(path: Path, edit) -> None:
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


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
    ],
    ids=["order", "iteration", "missing", "unknown", "mixed", "optimizer"],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path, edit, text: str) -> None:
    folder = legacy_folder(tmp_path)
    change(folder / "mp_rank_01_000" / "model_optim_rng.pt", edit)
    with pytest.raises(ConversionError, match=text):
        import_legacy(ImportOptions(folder, tmp_path / "run"), optimizer=True)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_missing_rank_is_named(tmp_path: Path) -> None:
    folder = legacy_folder(tmp_path, 2, 3)
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ConversionError, match="tensor rank 1, pipeline rank 1"):
        import_legacy(ImportOptions(folder, tmp_path / "run"), optimizer=True)


class RunsACommand:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = legacy_folder(tmp_path)
    change(folder / "mp_rank_00_000" / "model_optim_rng.pt", lambda s: s.update(args=RunsACommand(tmp_path / "evil")))
    with pytest.raises(ConversionError, match="cannot be read safely"):
        import_legacy(ImportOptions(folder, tmp_path / "run"), optimizer=True)
    assert not (tmp_path / "evil").exists()
