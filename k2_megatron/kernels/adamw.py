"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) over many tensors at once, in mcore's Apex slot.

    p = p * (1 - learning_rate * weight_decay)
    m = m + (g - m) * (1 - beta1),   v = beta2 * v + (1 - beta2) * g^2
    p = p - learning_rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

In:   fp32 parameters (mcore's main parameters or shards of them) with gradients; optionally the model's low-precision
      copy of each, written in the same pass.      Out: parameters, exp_avg and exp_avg_sq (fp32) updated in place.
Where Apex keeps it, so here: `step` is an int in the parameter group, not a tensor in the state (loading a
fully_reshardable checkpoint through mcore's distributed optimizer needs it there).
"""

from __future__ import annotations

from array import array

import torch

from k2_megatron.kernels import peers
from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_dtype,
    require_no_overlap,
    require_one_device,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.library import DTYPE_CODES, address_of, addresses, pointer, register, run

OP = "adamw"


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias correction, fp32 states; `backend` as in dispatch.py ("apex": its multi-tensor
    kernel).

    mcore passes adam_w_mode (True) besides torch's arguments; anything else it might ask of an optimizer (states in low
    precision, capturable) is refused by name. model_copies maps a parameter to the tensor that its rounded value goes
    to.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        backend: str = "torch",
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **unsupported,
    ):
        require_backend(OP, backend, "apex")
        refused = {name: value for name, value in unsupported.items() if value}
        require(not refused, OP, "options {} are not offered (states are fp32, parameters are fp32 main copies)",
                refused)  # fmt: skip
        require(adam_w_mode and bias_correction, OP, "only decoupled weight decay with bias correction is offered: "
                "adam_w_mode is {}, bias_correction {}", adam_w_mode, bias_correction)  # fmt: skip
        require(lr >= 0 and eps >= 0 and weight_decay >= 0, OP, "lr {}, eps {}, weight_decay {}; none may be "
                "negative", lr, eps, weight_decay)  # fmt: skip
        require(0 <= betas[0] < 1 and 0 <= betas[1] < 1, OP, "betas are {}; both lie in [0, 1)", betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.backend = backend
        self.model_copies: dict[torch.Tensor, torch.Tensor] = {}
        self.gradient_scale: torch.Tensor | None = None  # for callers through whom step's argument does not pass

    def __getstate__(self):
        """For copy.deepcopy and torch.save; torch's own holds the groups and the state alone. In one dict with the
        parameters, so that model_copies come back keyed by the copied ones."""
        own = {name: getattr(self, name) for name in ("backend", "model_copies", "gradient_scale")}
        return super().__getstate__() | own

    def load_state_dict(self, state_dict):
        """Of this class, or of torch.optim.AdamW, whose `step` is in each parameter's state: ValueError where those of
        a group differ."""
        super().load_state_dict(_with_steps_in_groups(state_dict))

    @torch.no_grad()
    def step(self, closure=None, *, gradient_scale: torch.Tensor | None = None):
        """One update. gradient_scale [1] fp32 on the parameters' device multiplies every gradient (clipping, loss
        scale); the attribute of that name where none is given."""
        loss = None
        gradient_scale = self.gradient_scale if gradient_scale is None else gradient_scale
        if gradient_scale is not None:
            require_tensors(OP, gradient_scale=gradient_scale)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for lists in self._lists(group):
                self._update(group, lists, gradient_scale)
        return loss

    def _lists(self, group):
        """Parameters, gradients, both moments and model copies (or None), one set of lists for each pair of dtypes."""
        sets: dict[tuple, tuple[list, ...]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            require(not parameter.grad.is_sparse, OP, "a gradient is sparse; only dense ones are offered")
            require_dtype(OP, "a parameter", parameter, (torch.float32, torch.float64))
            state = self.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            copy = self.model_copies.get(parameter)
            key = (parameter.device, parameter.grad.dtype, None if copy is None else copy.dtype)
            row = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], copy)
            for column, tensor in zip(sets.setdefault(key, ([], [], [], [], [])), row, strict=True):
                column.append(tensor)
        return sets.values()

    def _update(self, group, lists, gradient_scale):
        parameters, gradients, exp_avg, exp_avg_sq, copies = lists
        copies = [] if copies[0] is None else copies
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"])
        if self.backend == "torch":
            _check(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, reference=True)
            _check_memory(parameters, gradients, exp_avg, exp_avg_sq, copies)
            adamw_reference_(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, *numbers)
        elif self.backend == "apex":
            _check(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale)
            peers.adamw_(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, *numbers)
        else:
            require_backend_device(OP, self.backend, parameters[0])
            STEP(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, *numbers)


def _with_steps_in_groups(state_dict):
    """A state_dict with `step` in each group; without it the bias correction would begin anew."""
    states, groups = dict(state_dict["state"]), []
    for index, group in enumerate(state_dict["param_groups"]):
        numbers = [number for number in group["params"] if "step" in states.get(number, {})]
        steps = sorted({int(states[number]["step"]) for number in numbers})
        if steps and "step" not in group:
            require(len(steps) == 1, OP, "the state_dict's parameters of group {} are at steps {}; a group has one "
                    "step: give those at another a group of their own", index, steps)  # fmt: skip
            group = group | {"step": steps[0]}
            for number in numbers:
                states[number] = {name: value for name, value in states[number].items() if name != "step"}
        groups.append(group)
    return state_dict | {"state": states, "param_groups": groups}


def adamw_reference_(
    parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale,
    learning_rate, beta1, beta2, epsilon, weight_decay, step,
):  # fmt: skip
    """The equation with torch's _foreach operations, in place, in the parameters' dtype."""
    gradients = [gradient.to(moment.dtype) for gradient, moment in zip(gradients, exp_avg, strict=True)]
    if gradient_scale is not None:
        gradients = torch._foreach_mul(gradients, gradient_scale.reshape(()))
    torch._foreach_mul_(parameters, 1 - learning_rate * weight_decay)
    torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, epsilon)
    torch._foreach_addcdiv_(parameters, exp_avg, denominators, -learning_rate / (1 - beta1**step))
    if copies:
        torch._foreach_copy_(copies, parameters)


def _check(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, reference=False):
    """reference: fp64 and strided tensors too; what the others need that are given pointers."""
    floats, states = (REFERENCE_FLOATS, (torch.float32, torch.float64)) if reference else (FLOATS, (torch.float32,))
    lists = {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "gradients": gradients}
    if copies:
        lists["model_copies"] = copies
    for name, tensors in lists.items():
        require(len(tensors) == len(parameters), OP, "{} {} for {} parameters", len(tensors), name,
                len(parameters))  # fmt: skip
        if not tensors:
            return
        free = name in ("gradients", "model_copies")
        require_dtype(OP, f"{name}[0]", tensors[0], floats if free else states)
        for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            if not _fits(tensor, tensors[0].dtype, parameter, parameters[0].device, reference):
                _refuse(f"{name}[{index}]", tensor, tensors[0].dtype, parameter, parameters[0].device, index, reference)
    if gradient_scale is not None:
        require_dtype(OP, "gradient_scale", gradient_scale, (torch.float32,))
        elements = gradient_scale.numel()
        require(elements == 1, OP, "gradient_scale has {} elements; it must have one", elements)
        require_one_device(OP, **{"parameters[0]": parameters[0], "gradient_scale": gradient_scale})


def _fits(tensor, dtype, parameter, device, strided) -> bool:
    """Of thousands of tensors a step all should: no names are put together for those that do."""
    same = tensor.dtype == dtype and tensor.shape == parameter.shape and tensor.device == device
    return same and (strided or tensor.is_contiguous())


def _refuse(label, tensor, dtype, parameter, device, index, strided):
    require_dtype(OP, label, tensor, (dtype,))
    require_shape(OP, label, tensor, parameter.shape, f"parameters[{index}]'s shape")
    if not strided:
        require_contiguous(OP, label, tensor)
    raise ValueError(f"{OP}: {label} is on {tensor.device}, parameters[0] on {device}; they must be together")


def _check_memory(parameters, gradients, exp_avg, exp_avg_sq, copies):
    written = {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "model_copies": copies}
    require_no_overlap(OP, written, {"gradients": gradients})


def _step_fake(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, *numbers):
    _check(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale)


def _step_op(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale, learning_rate, beta1, beta2, epsilon,
             weight_decay, step):  # fmt: skip
    _check(parameters, gradients, exp_avg, exp_avg_sq, copies, gradient_scale)
    if not parameters:
        return
    _check_memory(parameters, gradients, exp_avg, exp_avg_sq, copies)
    lists = [addresses(tensors) for tensors in (parameters, gradients, exp_avg, exp_avg_sq, copies)]
    sizes = array("q", [parameter.numel() for parameter in parameters])
    model_dtype = copies[0].dtype if copies else torch.float32
    run(OP, "adamw", parameters[0].device, *(address_of(pointers) if pointers else 0 for pointers in lists),
        address_of(sizes), len(parameters), learning_rate, beta1, beta2, epsilon, weight_decay, step,
        pointer(gradient_scale), DTYPE_CODES[gradients[0].dtype], DTYPE_CODES[model_dtype])  # fmt: skip
    # As torch's in-place operations do: a backward that needs the old values is an error, not a wrong gradient.
    torch.autograd.graph.increment_version([*parameters, *exp_avg, *exp_avg_sq, *copies])


STEP = register(
    "adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] model_copies, Tensor? gradient_scale, float learning_rate, float beta1, float beta2, float epsilon, "
    "float weight_decay, int step) -> ()",
    _step_op,
    _step_fake,
)
