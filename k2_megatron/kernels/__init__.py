"""Fused operations of the model, one file each: equation, torch reference, torch.library ops, autograd, choice of
backend.

In:   tensors of megatron-core's layouts, and a backend's name: "cuda" and "cpu" run our compiled kernels (csrc/),
      "torch" the reference, "apex" and "transformer_engine" those packages' kernels where they are installed.
Out:  the same numbers whichever backend computes them, to its rounding; dispatch.py says which would run here and why
      (`python -m k2_megatron.kernels` prints it).
"""
