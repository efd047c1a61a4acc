"""Which backend is chosen, the printed table, and the adapters to Apex and Transformer Engine.

The adapters run against modules of those packages' signatures with torch's arithmetic: what is tested is that the
arguments arrive where they belong. The packages themselves have not run here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_backends import on_cpu

from k2_megatron.kernels import dispatch, library
from k2_megatron.kernels.adamw import AdamW
from k2_megatron.kernels.cross_entropy import cross_entropy_reference, vocab_parallel_cross_entropy
from k2_megatron.kernels.dispatch import OPS, Choice, choose_backend
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from k2_megatron.kernels.rotary import rotary, rotary_reference, rotary_tables
from k2_megatron.kernels.swiglu import swiglu


@pytest.fixture
def built(monkeypatch):
    """Pretends which extensions are built: built(cpu="", cuda="reason")."""

    module = SimpleNamespace(device_count=lambda: 1, architectures="sm_80,sm_90,compute_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def pretend(**reasons):
        monkeypatch.setattr(
            dispatch, "extension", lambda backend: (None if reasons[backend] else module, reasons[backend])
        )

    return pretend


def test_auto_takes_the_compiled_kernels_where_they_are(built, monkeypatch):
    built(cpu="", cuda="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for op in OPS:
        assert choose_backend(op, "auto", "cpu") == Choice(op, "cpu", "compiled kernels for cpu")
        assert choose_backend(op, "auto", "cuda") == Choice(op, "cuda", "compiled kernels for cuda")
        assert choose_backend(op, "torch", "cuda") == Choice(op, "torch", "asked for")


def test_auto_falls_back_to_torch_and_says_why(built, monkeypatch):
    built(cpu="_cpu is not built", cuda="_cuda is not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("swiglu", "auto", "cpu") == Choice("swiglu", "torch", "_cpu is not built")
    assert choose_backend("swiglu", "auto", "cuda") == Choice("swiglu", "torch", "_cuda is not built")
    assert choose_backend("swiglu", "auto", "mps") == Choice("swiglu", "torch", "no kernels for this device")


@pytest.mark.parametrize(
    ("op", "requested", "device", "message"),
    [
        ("softmax", "auto", "cpu", "unknown op 'softmax'; known: rms_norm, rotary"),
        ("rotary", "fast", "cpu", "rotary asks for backend 'fast'; known: auto, cuda, cpu, torch"),
        ("rotary", "cuda", "cpu", "backend 'cuda' runs on cuda tensors, and this run's device is 'cpu'. Use \"auto\""),
        ("rotary", "cpu", "cuda", "backend 'cpu' runs on cpu tensors, and this run's device is 'cuda'"),
        ("rotary", "cuda", "cuda", "torch sees no CUDA device"),
        ("adamw", "cpu", "cpu", "_cpu is not built"),
        ("rotary", "apex", "cuda", r"apex has no rotary \(it offers rms_norm, adamw\)"),
        ("rms_norm", "apex", "cpu", "apex runs on CUDA devices, not on 'cpu'"),
        ("rms_norm", "apex", "cuda", "the package apex is not installed"),
        ("adamw", "transformer_engine", "cuda", "transformer_engine has no adamw"),
        ("rotary", "transformer_engine", "cuda", "the package transformer_engine is not installed"),
    ],
)
def test_a_request_that_cannot_be_met(op, requested, device, message, built, monkeypatch):
    built(cpu="_cpu is not built", cuda="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        choose_backend(op, requested, device)


@pytest.mark.parametrize(
    ("devices", "capability", "built", "reason"),
    [
        (0, (9, 0), "sm_90", r"_cuda finds no device though torch \(CUDA .*\) does: the driver is too old"),
        (1, (7, 5), "sm_80", r"Turing has compute capability 7\.5; the kernels need 8\.0"),
        (1, (8, 0), "sm_90", r"built for sm_90, and Turing has compute capability 8\.0; .* K2_CUDA_ARCHITECTURES=80"),
        (1, (8, 0), "sm_86", "built for sm_86"),
        (1, (10, 0), "sm_90", "built for sm_90"),
        (1, (8, 6), "sm_80", None),
        (1, (12, 0), "sm_80,sm_90,compute_90", None),
    ],
)
def test_a_device_on_which_our_kernels_cannot_run(monkeypatch, devices, capability, built, reason):
    module = SimpleNamespace(device_count=lambda: devices, architectures=built)
    monkeypatch.setattr(dispatch, "extension", lambda backend: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    choice = choose_backend("rms_norm", "auto", "cuda")
    if reason is None:
        assert choice.backend == "cuda"
        return
    assert choice.backend == "torch"
    assert re.search(reason, choice.reason)
    with pytest.raises(ValueError, match=reason):
        choose_backend("rms_norm", "cuda", "cuda")


@on_cpu
def test_the_table_names_every_op():
    shown = subprocess.run(
        [sys.executable, "-m", "k2_megatron.kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert all(op in shown for op in OPS)
    assert "k2_megatron._cpu: built" in shown


def test_a_cuda_call_gets_the_current_stream_and_its_failure_is_named(monkeypatch):
    """The calls into torch.cuda are stand-ins: the order of device, stream and launch is what is tested."""
    device, calls = torch.device("cuda", 3), []

    @contextmanager
    def guard(chosen):
        calls.append(("enter", chosen))
        yield
        calls.append(("leave", chosen))

    class Cuda:
        def swiglu_forward(self, *arguments):
            calls.append(("launch", *arguments))
            if arguments[0] == 0:
                raise RuntimeError("swiglu_forward: cudaErrorInvalidValue (invalid argument)")

    monkeypatch.setattr(library, "extension", lambda backend: (Cuda(), ""))
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 700 + index, raising=False)
    library.run("swiglu", "swiglu_forward", device, 1, 2)
    assert calls == [("enter", device), ("launch", 1, 2, 703), ("leave", device)]
    with pytest.raises(RuntimeError, match=r"swiglu: swiglu_forward on cuda:3: .*cudaErrorInvalidValue"):
        library.run("swiglu", "swiglu_forward", device, 0)


def test_an_op_without_its_extension_says_how_to_get_it(monkeypatch):
    reason = "k2_megatron._cpu is not built"
    monkeypatch.setattr(library, "extension", lambda backend: (None, reason))
    with pytest.raises(RuntimeError, match=r"swiglu: k2_megatron\._cpu is not built, or use backend 'torch'"):
        swiglu(torch.zeros(2, 4), backend="cpu")


@pytest.fixture
def package(monkeypatch):
    """Installs a module with the given attributes, and its parents, for one test."""

    def install(name, **attributes):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)

    return install


X, WEIGHT = torch.randn(3, 8), torch.rand(8)


def test_apex_rms_norm(package):
    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        assert tuple(normalized_shape) == (8,)
        return rms_norm_reference(input, weight, eps)

    package("apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    assert torch.equal(rms_norm(X, WEIGHT, 1e-3, backend="apex"), rms_norm_reference(X, WEIGHT, 1e-3))
    y, h = add_rms_norm(X, X, WEIGHT, 1e-3, backend="apex")
    assert torch.equal(y, rms_norm_reference(2 * X, WEIGHT, 1e-3))
    assert torch.equal(h, 2 * X)
    with pytest.raises(ValueError, match="apex has no zero-centered gamma"):
        rms_norm(X, WEIGHT, 1e-3, zero_centered=True, backend="apex")
    with pytest.raises(ValueError, match=r"weight is torch\.float32 and x torch\.bfloat16; apex takes one dtype"):
        rms_norm(X.bfloat16(), WEIGHT, 1e-3, backend="apex")


@pytest.mark.parametrize("zero_centered", [False, True])
def test_transformer_engine_rms_norm_differentiates_by_our_weight(package, zero_centered):
    class RMSNorm(torch.nn.Module):
        def __init__(self, normalized_shape, eps=1e-5, sequence_parallel=None, dtype=None, zero_centered_gamma=False,
                     device="cuda"):  # fmt: skip
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))
            self.eps, self.zero_centered = eps, zero_centered_gamma

        def forward(self, x):
            return rms_norm_reference(x, self.weight, self.eps, self.zero_centered)

    package("transformer_engine.pytorch", RMSNorm=RMSNorm)
    weight = WEIGHT.clone().requires_grad_()
    y = rms_norm(X, weight, 1e-3, zero_centered=zero_centered, backend="transformer_engine")
    assert torch.equal(y, rms_norm_reference(X, weight, 1e-3, zero_centered))
    y.sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_transformer_engine_rotary(package, interleaved):
    def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", start_positions=None, interleaved=False, fused=False):
        assert (tensor_format, fused, freqs.dtype, freqs.dim()) == ("sbhd", True, torch.float32, 4)
        half = freqs[:, 0, 0, ::2] if interleaved else freqs[:, 0, 0, : freqs.shape[-1] // 2]
        return rotary_reference(t, t, half.cos(), half.sin(), None, interleaved)[0]

    package("transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
    q, k, tables = torch.randn(9, 2, 3, 16), torch.randn(9, 2, 1, 16), rotary_tables(9, 12, 100.0, "cpu")
    found = rotary(q, k, *tables, interleaved=interleaved, backend="transformer_engine")
    torch.testing.assert_close(found, rotary_reference(q, k, *tables, None, interleaved), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="transformer_engine takes no positions"):
        rotary(q, k, *tables, positions=torch.zeros(9, 2).int(), backend="transformer_engine")


def test_transformer_engine_cross_entropy(package):
    def parallel_cross_entropy(inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None,
                               ignore_idx=-100, is_cg_capturable=False):  # fmt: skip
        assert (reduce_loss, dist_process_group) == (False, None)
        return cross_entropy_reference(inp, target, label_smoothing, 0.0, ignore_idx)

    package("transformer_engine.pytorch.cross_entropy", parallel_cross_entropy=parallel_cross_entropy)
    logits, labels = torch.randn(3, 2, 7), torch.tensor([[0, 1], [2, -1], [6, 3]])
    found = vocab_parallel_cross_entropy(
        logits, labels, label_smoothing=0.1, ignore_index=-1, backend="transformer_engine"
    )
    torch.testing.assert_close(found, cross_entropy_reference(logits, labels, 0.1, 0.0, -1))
    with pytest.raises(ValueError, match="transformer_engine has no z-loss"):
        vocab_parallel_cross_entropy(logits, labels, z_loss=0.1, ignore_index=-1, backend="transformer_engine")


def test_apex_adamw(package):
    def multi_tensor_adam(
        chunk_size, noop_flag, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay
    ):
        assert (int(noop_flag), mode, bias_correction, chunk_size) == (0, 1, True, 2048 * 32)
        for g, p, m, v in zip(*lists, strict=True):
            p.mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m / (1 - beta1**step), (v / (1 - beta2**step)).sqrt_().add_(eps), value=-lr)

    package("amp_C", multi_tensor_adam=multi_tensor_adam)

    def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
        return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)

    package("apex.multi_tensor_apply", multi_tensor_applier=multi_tensor_applier)
    ours, theirs = torch.ones(5), torch.ones(5)
    for parameter, backend in ((ours, "torch"), (theirs, "apex")):
        optimizer = AdamW([parameter], lr=0.1, weight_decay=0.1, backend=backend)
        for scale in (1.0, -2.0):
            parameter.grad = torch.arange(5.0) * scale
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_package_of_another_shape_is_one_clear_line(package):
    package("transformer_engine.pytorch")
    with pytest.raises(ValueError, match=r"rms_norm: transformer_engine\.pytorch:RMSNorm is not there"):
        rms_norm(X, WEIGHT, 1e-3, backend="transformer_engine")
