"""What is drawn from a model's logits, whatever the settings."""

import pytest
import torch

from k2_megatron.evaluate.continue_text import continue_tokens

VOCABULARY, LIKELIEST = 7, 5


class FixedLogits(torch.nn.Module):
    """Token 5 is the likeliest everywhere, then 4, 3 ..."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_V = torch.nn.Parameter(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, -1.0]))

    def forward(self, window_BS: torch.Tensor, _positions: None, _mask: None) -> torch.Tensor:
        return self.logits_V.expand(*window_BS.shape, VOCABULARY)


def drawn(**settings) -> list[int]:
    chosen = {"temperature": 0.8, "top_k": 40, "seed": 1, **settings}
    return continue_tokens(FixedLogits(), [1], new_tokens=200, sequence_length=201, end_of_document=None, **chosen)


def test_more_to_choose_from_than_there_are_tokens() -> None:
    assert set(drawn(temperature=5.0, top_k=5000)) == set(range(VOCABULARY))


def test_top_k_draws_from_the_likeliest_alone() -> None:
    assert set(drawn(temperature=5.0, top_k=2)) == {LIKELIEST, LIKELIEST - 1}


@pytest.mark.parametrize("temperature", [0.0, 1e-40])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    assert drawn(temperature=temperature) == [LIKELIEST] * 200
