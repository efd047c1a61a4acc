"""Task files: what is wrong with a line, how pairs are encoded, how choices are marked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from k2_megatron.evaluate.scorer import Scored
from k2_megatron.evaluate.tasks import Task, encode_pair, read_items

WORDS = SimpleNamespace(end_of_document=0, encode=lambda text: [ord(letter) for letter in text])


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


QUESTION = {"context": "2 + 2 =", "choices": ["4", "five"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Expecting"),
        ("[]", "is no JSON object"),
        ({"choices": ["a", "b"], "answer": 0}, '"context" is None'),
        ({"context": "a"}, 'must have "choices" and "answer", or "completion"'),
        ({**QUESTION, "completion": "4"}, 'must have "choices" and "answer", or "completion"'),
        ({**QUESTION, "choices": ["4"]}, "a list of two texts or more"),
        ({**QUESTION, "choices": ["4", ""]}, "a list of two texts or more"),
        ({**QUESTION, "answer": 2}, "the number of a choice, 0 to 1"),
        ({**QUESTION, "answer": True}, "the number of a choice, 0 to 1"),
        ({**QUESTION, "joint": 1}, '"joint" is 1'),
        ({"context": "a", "completion": ""}, "\"completion\" is ''"),
        ({"context": "a", "completion": "b"}, "questions and completions in one file"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, says):
    path = write(tmp_path / "task.jsonl", QUESTION, "", line)
    with pytest.raises(ValueError) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and says in str(error.value)


def test_file_without_a_line_and_an_ending_that_fills_more_than_the_window(tmp_path):
    with pytest.raises(ValueError, match="holds no line"):
        read_items(write(tmp_path / "empty.jsonl", ""))
    path = write(tmp_path / "long.jsonl", {"context": "a", "completion": "bcdefg"})
    with pytest.raises(ValueError, match=r"line 1: 7 tokens to predict, and the window has room for 1 to 6"):
        Task(path, WORDS, 6)
    assert Task(path, WORDS, 7).cut == 0
    assert Task(write(path, {"context": "ab", "completion": "bcdefg"}), WORDS, 7).cut == 1


def test_pairs_are_encoded_together_and_spaces_go_to_the_ending():
    ids = {"ab": 1, "a": 2, "b": 3, " ": 4}

    def encode(text):
        found = []
        while text:
            piece = text[:2] if text[:2] in ids else text[0]
            found.append(ids[piece])
            text = text[len(piece) :]
        return found

    tokenizer = SimpleNamespace(end_of_document=0, encode=encode)
    assert encode_pair(tokenizer, "b", "a") == ([3], [2])
    assert encode_pair(tokenizer, "b  ", "a") == ([3], [4, 4, 2])
    assert encode_pair(tokenizer, "", "a") == ([0], [2])
    assert encode_pair(tokenizer, "  ", "a") == ([0], [4, 4, 2])
    assert encode_pair(tokenizer, "a", "b") == ([2], [3])  # "ab" is one piece: nothing is left behind the context's


def test_a_space_is_put_between_unless_one_is_there(tmp_path):
    lines = [("a", "b"), ("a ", "b"), ("a", " b"), ("", "b")]
    items = [{"context": context, "completion": completion} for context, completion in lines]
    path = write(tmp_path / "task.jsonl", *items, {"context": "a", "completion": "b", "joint": ""})
    predicted = ["".join(map(chr, window.tokens[1 + window.first :])) for window in Task(path, WORDS, 9).windows]
    assert predicted == [" b", " b", " b", "b", "b"]


class Fixed:
    """A scorer that takes its losses from a list, and says the likeliest tokens that it is given."""

    def __init__(self, losses, greedy=()):
        self.losses, self.greedy = losses, greedy

    def score(self, windows, *, greedy=False):
        for number, window in enumerate(windows):
            each = np.full(window.counted, self.losses[number] / window.counted)
            yield Scored(each, np.array(self.greedy[number]) if greedy else np.zeros(0, dtype=np.int64))


def test_choices_by_sum_by_character_and_by_byte(tmp_path):
    """Sums 3 < 4 < 5; by character 3 / 1 > 4 / 2 > 5 / 4; by byte 3 / 1 > 5 / 4 > 4 / 6: three different choices."""
    choices = ["a", "\u4e16\u754c", "abcd"]
    questions = [{"context": "", "choices": choices, "answer": answer} for answer in (0, 1, 2, 2)]
    figures = Task(write(tmp_path / "task.jsonl", *questions), WORDS, 9).figures(Fixed([3.0, 4.0, 5.0] * 4))
    assert [figures[name] for name in ("acc", "acc_norm", "acc_bytes")] == [0.25, 0.5, 0.25]
    assert figures["acc_error"] == pytest.approx(0.25)  # of 1, 0, 0, 0: sqrt(0.75 / 3 / 4)
    assert figures["questions"] == 4


def test_completion_matches_when_each_token_is_the_likeliest(tmp_path):
    items = [{"context": "x ", "completion": "ab"}, {"context": "x ", "completion": "cd"}]
    path = write(tmp_path / "task.jsonl", *items)
    figures = Task(path, WORDS, 9).figures(Fixed([3.0, 6.0], [[32, 97, 98], [32, 99, 101]]))
    assert (figures["greedy_match"], figures["log_likelihood"]) == (0.5, -4.5)
    assert (figures["loss"], figures["tokens"]) == (1.5, 6)
