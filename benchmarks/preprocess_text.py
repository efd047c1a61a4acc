"""Text and tokenizers for benchmarks/preprocess.py, made on this machine out of what lies on it.

In: a path to write, folders to look in. Out: a .jsonl file with text under "text"; a tokenizer trained on such a file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (*(sysconfig.get_paths()[name] for name in ("purelib", "stdlib")), "/usr/share/doc", "/usr/share/man")
TEXT_SUFFIXES = frozenset(".py .pyi .md .rst .txt .h .hpp .html .js .gz .1 .3 .5 .7 .8".split())
LARGEST_FILE = 1 << 20  # bytes; larger ones are tables more often than text
VOCABULARY = 32_000
LONGEST_SENTENCE = 4000  # characters that sentencepiece is trained on at once


def make_text(path: Path, megabytes: int) -> None:
    with lzma.open(ROOT / "examples/toy/state_of_the_union.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    written, turn = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            for text in texts:
                cut = 1 + 997 * (turn + 1) % max(1, len(text) - 1)
                written += file.write(json.dumps({"text": text[cut:] + text[:cut]}, ensure_ascii=False) + "\n")
            turn += 1


def text_of(path: Path) -> str | None:
    """A file's text, None where it is none (or short, or a table)."""
    if path.suffix not in TEXT_SUFFIXES or path.is_symlink() or not path.is_file():
        return None
    if not 200 <= path.stat().st_size <= LARGEST_FILE:
        return None
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError):
        return None


def make_varied_text(path: Path, folders: list[str], megabytes: int) -> None:
    """Every different text file below the folders as a document, up to --megabytes."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*"))
    random.Random(1).shuffle(paths)
    seen, written = set(), 0
    with open(path, "w", encoding="utf-8") as file:
        for found in paths:
            text = text_of(found)
            digest = hashlib.blake2b((text or "").encode(), digest_size=8).digest()
            if text is None or "\0" in text or digest in seen:
                continue
            seen.add(digest)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written > megabytes * 1_000_000:
                return


def train_byte_level(path: Path, output: Path) -> None:
    """A tokenizer.json by the project's own training, on every sixth document."""
    from k2_megatron.data.training import train_byte_level_bpe

    with open(path, encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] for number, line in enumerate(lines) if number % 6 == 0)
        train_byte_level_bpe(texts, VOCABULARY, ["<|endoftext|>"]).save(str(output))


def train_sentencepiece(path: Path, output: Path) -> None:
    """A sentencepiece .model with LLaMA's settings (BPE, byte fallback, single digits, spaces kept), on every twelfth
    document."""
    import sentencepiece

    with open(output, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(path),
            model_writer=model,
            model_type="bpe",
            vocab_size=VOCABULARY,
            hard_vocab_limit=False,  # a short text has fewer pieces
            byte_fallback=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST_SENTENCE + 200,
            input_sentence_size=200_000,
            minloglevel=2,
        )


def _sentences(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % 12 == 0:
                yield from (part[:LONGEST_SENTENCE] for part in json.loads(line)["text"].split("\n") if part)
