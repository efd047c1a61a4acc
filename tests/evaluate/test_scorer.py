"""What an evaluation changes of a model for the while is put back."""

from types import SimpleNamespace

import pytest
import torch

from k2_megatron.evaluate import scorer
from k2_megatron.model.gpt import RotaryTables
from k2_megatron.train import step


def test_rotary_tables_have_their_length_back_after_windows_of_another(monkeypatch):
    monkeypatch.setattr(scorer, "unwrapped", lambda chunk: chunk)
    tables = RotaryTables(4, 1e4, 32, SimpleNamespace(size=lambda: 1))
    with scorer._rows_of([SimpleNamespace(rotary_pos_emb=tables), SimpleNamespace()], 7):
        assert tables.get_rotary_seq_len() == 7
    assert tables.get_rotary_seq_len() == 32


@pytest.mark.parametrize("training", [True, False])
def test_held_out_evaluation_leaves_the_mode_it_found(monkeypatch, training):
    """An evaluation of checkpoints goes on with the same model: in training's mode it would keep activations for a
    recompute."""
    chunk, modes = torch.nn.Linear(1, 1).train(training), []

    def schedule(*_arguments, **_keywords):
        modes.append(chunk.training)
        return 2.0, (1.0, 3.0)

    monkeypatch.setattr(step, "_run_schedule", schedule)
    config = SimpleNamespace(train=SimpleNamespace(global_batch=2, evaluate_batches=1))
    assert step.evaluate_samples(config, SimpleNamespace(chunks=[chunk]), None) == (2.0, [1.0, 3.0])
    assert modes == [False] and chunk.training is training
