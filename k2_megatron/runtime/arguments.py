"""What several command lines take alike."""

import argparse


def step_number(text: str) -> int:
    """A step that a person names, counted from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no step: they are counted from 1")
    return int(text)
