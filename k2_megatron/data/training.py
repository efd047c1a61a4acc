"""Train a byte-level BPE tokenizer: every byte has a piece, so no text is unknown (the toy's 4,096 pieces).

In: texts. Out: a `tokenizers.Tokenizer`, the same bytes for the same texts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LARGEST_VOCABULARY = (1 << 31) - 1


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]):
    """BPE (Sennrich et al. 2016) over GPT-2's byte alphabet; special tokens take the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not special_tokens or "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"--special-tokens {list(special_tokens)}: give one or more, none of them empty or twice")
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"--vocab-size {vocab_size}: at most {LARGEST_VOCABULARY}, as token ids are int32")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size {vocab_size}: bytes and special tokens alone take {smallest} pieces")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
