"""Pretraining of K2-65B and its family under tensor, pipeline and data parallelism. Read `pretrain_k2.py` first."""

from k2_megatron.runtime.quiet import silence_dependencies

__version__ = "0.1.0"

silence_dependencies()  # before anything below imports megatron-core, which warns while it is imported
