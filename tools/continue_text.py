"""Continue a prompt with the newest checkpoint of a run.

python tools/continue_text.py runs/toy --prompt "My fellow citizens"
"""

import argparse
import math
import sys
from pathlib import Path

from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.evaluate.continue_text import continue_tokens
from k2_megatron.evaluate.one_process import loaded_model
from k2_megatron.runtime.mistakes import run_program


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Continue a prompt with the newest checkpoint of a run.")
    parser.add_argument("run", type=Path, help="the run folder, such as runs/toy")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokenizer", help="tokenizer file or folder; default: the one of the run's configuration")
    parser.add_argument("--new-tokens", type=int, default=60, help="tokens to add at most (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 is surer, 0 takes the likeliest (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=40, help="choose among so many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default %(default)s)")
    options = parser.parse_args(arguments)
    check(options)
    with loaded_model(options.run) as (config, step, model):
        path = options.tokenizer or config.data.tokenizer
        if path is None:
            raise ValueError(f"{options.run} names no data.tokenizer; give one with --tokenizer")
        tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"{path} has {tokenizer.vocab_size} pieces, the model {config.model.vocab_size}: it was trained with "
                "another tokenizer; give that one with --tokenizer"
            )
        tokens = continue_tokens(
            model,
            tokenizer.encode(options.prompt),
            new_tokens=options.new_tokens,
            sequence_length=config.model.sequence_length,
            end_of_document=tokenizer.end_of_document,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
        )
        print(f"step {step} continues:\n{options.prompt}{tokenizer.decode(tokens)}")
    return 0


def check(options: argparse.Namespace) -> None:
    """ValueError naming the option whose value cannot be used."""
    for option, value, fits, asked in (
        ("--new-tokens", options.new_tokens, options.new_tokens >= 1, "1 or more"),
        ("--temperature", options.temperature, 0 <= options.temperature < math.inf, "a number from 0"),
        ("--top-k", options.top_k, options.top_k >= 1, "1 or more"),
        ("--seed", options.seed, abs(options.seed) < 1 << 63, "a number of 64 bits"),
        ("--prompt", repr(options.prompt), _is_text(options.prompt), "text in the terminal's encoding, UTF-8"),
    ):
        if not fits:
            raise ValueError(f"{option} {value}: give {asked}")


def _is_text(prompt: str) -> bool:
    """Python hands on bytes that are no UTF-8 as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
