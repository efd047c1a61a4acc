"""Configuration: one strict TOML file in, one frozen tree with its derived numbers out.

    config = load_config("examples/toy/toy.toml", ["train.steps=20"])
    config.model.hidden_size, config.tokens_per_step, config.global_batch_at(0)

`schema.py` has the keys and what they mean, `checks.py` what must hold between them, `tree.py` what follows from them,
`load.py` the way from file and overrides to the tree.
"""

from k2_megatron.config.load import load_config, load_run_config
from k2_megatron.config.tree import Config

__all__ = ["Config", "load_config", "load_run_config"]
