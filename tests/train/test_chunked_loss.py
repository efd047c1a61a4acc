"""The loss in chunks of tokens, logits never whole, is the same loss: alone, under tensor and sequence parallelism."""

import pytest
from rank_processes import pretrain, results_of
from run_results import steps_of
from small_run import overrides

LAYOUTS = {
    "one": {},
    "tensor": {"parallel.tensor": 2},
    "sequence": {"parallel.tensor": 2, "parallel.sequence": True},
}


def train(name: str, settings: dict, small_config, folder) -> list[dict]:
    settings = {"run.folder": folder / name, "train.steps": 5, **settings}
    ranks = settings.get("parallel.tensor", 1)
    results_of(pretrain(ranks, small_config, overrides(settings), folder / f"ranks_{name}"))
    return list(steps_of(folder / name).values())


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory) -> list[dict]:
    return train("whole", {}, small_config, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_chunks_change_no_step(layout, whole, small_config, tmp_path):
    # 64 tokens a micro-batch: 24 leaves a last chunk of 16
    settings = {"model.loss_chunk_tokens": 24, **LAYOUTS[layout]}
    chunked = train("chunked", settings, small_config, tmp_path)
    assert len(chunked) == len(whole) == 5
    for number, (ours, expected) in enumerate(zip(chunked, whole, strict=True)):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6 if number == 0 else 1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6 if number == 0 else 1e-4)
