"""Windows over a document: every token counts once, each with enough before it; what each window holds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from k2_megatron.evaluate.windows import continuation_window, document_windows


@st.composite
def documents(draw):
    """(number of tokens, longest window, context)."""
    longest = draw(st.integers(1, 12))
    return draw(st.integers(0, 50)), longest, draw(st.integers(1, longest))


@given(documents())
def test_every_token_counts_once_with_its_context(document):
    count, longest, context = document
    tokens = list(range(1, count + 1))  # token k stands at place k, behind the 0 that ends a document
    counted = []
    for window in document_windows(tokens, 0, longest, context):
        assert 1 <= window.length <= longest
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[-1] + 1))
        for place in range(window.first, window.length):
            token = int(window.tokens[place + 1])
            counted.append(token)
            before = place + 1  # tokens of the window that stand before it
            assert before >= min(context, token), f"token {token} has {before} before it"
    assert counted == tokens


@given(documents())
def test_windows_are_full_wherever_the_document_is_long_enough(document):
    count, longest, context = document
    lengths = [window.length for window in document_windows(list(range(1, count + 1)), 0, longest, context)]
    assert all(length == min(longest, count) for length in lengths)


def test_context_of_one_is_the_harness_own_example():
    """The pairs in lm-evaluation-harness's docstring of loglikelihood_rolling: 10 tokens, windows of 4."""
    found = [
        (window.tokens[:-1].tolist(), window.tokens[1 + window.first :].tolist())
        for window in document_windows(list(range(10)), 99, 4, 1)
    ]
    assert found == [([99, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]


def test_continuation_keeps_the_end_of_its_context():
    window = continuation_window([1, 2, 3, 4], [5, 6], 3)
    assert (window.tokens.tolist(), window.first) == ([3, 4, 5, 6], 1)
    whole = continuation_window([1, 2], [5, 6], 3)
    assert (whole.tokens.tolist(), whole.first) == ([1, 2, 5, 6], 1)
