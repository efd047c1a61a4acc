"""Thin adapters to other packages' kernels, behind our signatures and checks: Apex and Transformer Engine.

In:   arguments that the op's own checks have passed.      Out: the package's result.
NOT YET RUN against the packages themselves, which need a GPU build: the tests use modules of the same signatures.
Sources of those signatures: apex.normalization.fused_layer_norm.fused_rms_norm_affine (before and since it became a
torch custom op), apex.multi_tensor_apply and amp_C.multi_tensor_adam; transformer_engine.pytorch: RMSNorm,
attention.rope.apply_rotary_pos_emb, cross_entropy.parallel_cross_entropy (>= 2.3: before it there is neither ignore_idx
nor interleaved, and rope lies elsewhere).
"""

from __future__ import annotations

import importlib

import torch

from k2_megatron.kernels.checks import require


def _attribute(op, module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{op}: {module}:{name} is not there ({error}); install the package or choose another backend"
        ) from error


def rms_norm(backend, x, weight, epsilon, zero_centered):
    if backend == "apex":
        require(not zero_centered, "rms_norm", "apex has no zero-centered gamma; use backend 'cuda'")
        require(weight.dtype == x.dtype, "rms_norm", "weight is {} and x {}; apex takes one dtype for both; use "
                "backend 'cuda'", weight.dtype, x.dtype)  # fmt: skip
        function = _attribute("rms_norm", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine")
        return function(x, weight, weight.shape, epsilon)
    # TE offers the norm as a module only: one without storage of its own lends its forward to our weight.
    module_class = _attribute("rms_norm", "transformer_engine.pytorch", "RMSNorm")
    module = module_class(
        weight.shape[0], eps=epsilon, dtype=weight.dtype, device="meta", zero_centered_gamma=zero_centered
    )
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def rotary(q, k, cos, sin, positions, interleaved):
    require(positions is None, "rotary", "transformer_engine takes no positions; use backend 'cuda'")
    function = _attribute("rotary", "transformer_engine.pytorch.attention.rope", "apply_rotary_pos_emb")
    # TE forms the cosines itself, of angles: those in (-pi, pi] give the table's values back to fp32 rounding.
    angles = torch.atan2(sin, cos)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    angles = angles[:, None, None]
    return tuple(function(x, angles, tensor_format="sbhd", interleaved=interleaved, fused=True) for x in (q, k))


def cross_entropy(logits, labels, group, settings):
    require(settings.z_loss == 0, "cross_entropy", "transformer_engine has no z-loss; use backend 'cuda'")
    function = _attribute("cross_entropy", "transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")
    return function(logits, labels, settings.label_smoothing, False, group, settings.ignore_index)


def adamw_(
    parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale,
    learning_rate, beta1, beta2, epsilon, weight_decay, step,
):  # fmt: skip
    require(not copies and gradient_scale is None, "adamw", "apex writes no model copies and takes no gradient_scale")
    applier = _attribute("adamw", "apex.multi_tensor_apply", "multi_tensor_applier")
    kernel = _attribute("adamw", "amp_C", "multi_tensor_adam")
    overflow = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)
    decoupled, bias_correction = 1, True
    applier(kernel, overflow, [gradients, parameters, exp_avg, exp_avg_sq], learning_rate, beta1, beta2, epsilon, step,
            decoupled, bias_correction, weight_decay)  # fmt: skip
