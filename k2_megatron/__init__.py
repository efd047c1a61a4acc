"""Pretraining of K2-65B and its family under tensor, pipeline and data parallelism. Read `pretrain_k2.py` first."""

__version__ = "0.1.0"
