"""What `python -m benchmarks.kernels` measures: no candidate finds its inputs in the cache, and packages are called as
they are meant to be (modules of the same signatures stand in: liger-kernel 0.6's transformers/functional.py, quack's
rmsnorm.py)."""

from __future__ import annotations

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks import kernel_workloads, kernels
from benchmarks.kernel_workloads import EPSILON, HIDDEN, Workload, rms_norm_workload, swiglu_workload
from k2_megatron.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference


@pytest.fixture
def packages(monkeypatch):
    """liger_kernel and quack, as they call their functions and name their arguments."""

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place, "it would overwrite the gradient that every candidate is given"
        return rms_norm_reference(X, W, eps)

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place
        return add_rms_norm_reference(X, R, W, eps)

    def quack_rmsnorm(
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
    ):
        assert prenorm == (residual is not None)
        return add_rms_norm_reference(x, residual, weight, eps) if prenorm else rms_norm_reference(x, weight, eps)

    def install(name, **functions):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("liger_kernel", "liger_kernel.transformers", "quack"):
        install(name)
    install(
        "liger_kernel.transformers.functional",
        liger_rms_norm=liger_rms_norm,
        liger_fused_add_rms_norm=liger_fused_add_rms_norm,
        liger_swiglu=lambda a, b: F.silu(a) * b,
    )
    install("quack.rmsnorm", rmsnorm=quack_rmsnorm)


@pytest.mark.parametrize(
    ("workload", "inputs", "names"),
    [
        (lambda: rms_norm_workload(3, torch.float32, "cuda", add=False), [(3, HIDDEN), (HIDDEN,)], {"liger", "quack"}),
        (
            lambda: rms_norm_workload(3, torch.float32, "cuda", add=True),
            [(3, HIDDEN), (3, HIDDEN), (HIDDEN,)],
            {"liger", "quack"},
        ),
        (lambda: swiglu_workload(3, 8, torch.float32, "cuda"), [(3, 16)], {"liger"}),
    ],
)
def test_packages_compute_what_eager_computes(packages, workload, inputs, names):
    candidates = workload().candidates
    assert names <= set(candidates)
    tensors = [torch.randn(shape) for shape in inputs]
    for name in names:
        torch.testing.assert_close(candidates[name](*tensors), candidates["eager"](*tensors), rtol=1e-5, atol=1e-5)
    assert EPSILON == 1e-5


def test_on_a_cpu_packages_for_gpus_are_left_out(packages):
    assert set(kernel_workloads.rms_norm_workload(3, torch.float32, "cpu", add=False).candidates) == {"ours", "eager"}


def test_every_launch_has_inputs_of_its_own(monkeypatch):
    """Of three candidates on the same inputs the second and the third would read what the first left in the cache."""
    monkeypatch.setattr(kernels, "ROTATION_BYTES", {"cpu": 4 << 24})
    monkeypatch.setattr(kernels, "COPY_BYTES", {"cpu": 64})
    launches = []

    def candidate(name):
        def run(x):
            launches.append((name, x.data_ptr()))
            return x * 1

        return run

    names = ("ours", "eager", "liger")
    workload = Workload(
        "double", "4", torch.float32, 32, 0, lambda: (torch.ones(4),), lambda inputs: (),
        {name: candidate(name) for name in names},
    )  # fmt: skip
    times = kernels.measure(workload, "cpu", 6, with_compile=False)
    assert {name: len(values) for name, values in times["forward"].items()} == dict.fromkeys((*names, "copy"), 6)
    sets = len({inputs for _, inputs in launches})
    assert sets == 4
    for start in range(len(launches) - sets + 1):
        assert len({inputs for _, inputs in launches[start : start + sets]}) == sets
    timed = [name for name, _ in launches[len(names) :]]
    assert {timed[start] for start in range(0, len(timed), len(names))} == set(names), "the same one always begins"


class Recorded(torch.autograd.Function):
    """Notes where the gradients that a backward reads lie, beside the inputs of its forward."""

    @staticmethod
    def forward(ctx, x, launches):
        ctx.x, ctx.launches = x.data_ptr(), launches
        return x + 1, x + 2

    @staticmethod
    def backward(ctx, *gradients):
        ctx.launches.append((ctx.x, *(gradient.data_ptr() for gradient in gradients)))
        return gradients[0] + gradients[1], None


def test_every_backward_has_gradients_of_its_own(monkeypatch):
    """One set of them for all launches of a candidate would be in the cache: a quarter of rotary's bytes at K2's."""
    monkeypatch.setattr(kernels, "ROTATION_BYTES", {"cpu": 4 << 24})
    monkeypatch.setattr(kernels, "COPY_BYTES", {"cpu": 64})
    launches: list[tuple[int, ...]] = []
    names = ("ours", "eager", "liger")
    workload = Workload(
        "double", "4", torch.float32, 32, 32, lambda: (torch.ones(4, requires_grad=True),), lambda inputs: inputs,
        {name: lambda x: Recorded.apply(x, launches) for name in names},
    )  # fmt: skip
    kernels.measure(workload, "cpu", 6, with_compile=False)
    assert len(set(launches)) == 4, "each set of inputs has one pair of gradients, the same for all candidates"
    for start in range(len(names), len(launches) - 3):  # behind each one's trial, which is a forward and a backward
        tensors = [tensor for launch in launches[start : start + 4] for tensor in launch]
        assert len(set(tensors)) == 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_module_that_does_not_load_is_one_line(monkeypatch, device):
    monkeypatch.setattr(kernels, "obstacle", lambda op, backend, device_type: f"k2_megatron._{backend} does not load")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(sys, "argv", ["kernels"])
    with pytest.raises(SystemExit, match=rf"^benchmarks.kernels: .* rms_norm: k2_megatron._{device} does not load$"):
        kernels.main()


def test_what_fails_hides_no_other_workload(monkeypatch, tmp_path, capsys):
    def broken(x):
        raise RuntimeError("illegal access")

    def workload(op, run):
        return Workload(op, "4", torch.float32, 32, 0, lambda: (torch.ones(4),), lambda inputs: (), {"ours": run})

    monkeypatch.setattr(kernels, "COPY_BYTES", {"cpu": 64})
    monkeypatch.setattr(kernels, "cpu_workloads", lambda quick: [workload("a", broken), workload("b", torch.neg)])
    monkeypatch.setattr(kernels, "keep_freed_blocks", lambda: None)
    monkeypatch.setattr(sys, "argv", ["kernels", "--no-compile", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"not measured, for the errors above: a 4 float32$"):
        kernels.main()
    assert "RuntimeError: illegal access" in capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert [row["op"] for row in json.loads(file.read_text())["rows"]] == ["b"]


def test_results_are_held_until_as_many_others_have_followed():
    rotation = kernels.Rotation([(1.0,), (2.0,), (3.0,)], [[], [], []])
    for _ in range(4):
        rotation.launch(lambda inputs, gradients: (torch.full((1,), inputs[0]), None))
    assert [float(result) for (result,) in rotation.results] == [2, 3, 1]


class FakeGpu:
    """torch.cuda's events and wait, in milliseconds of a clock of its own: enqueuing takes the host time, too."""

    def __init__(self, enqueuing: float, running: float):
        self.host = self.device = 0.0
        self.enqueuing, self.running, self.waits = enqueuing, running, 0

    def sleep(self, cycles):
        self.device = max(self.device, self.host) + cycles / 2e6
        self.waits += 1

    def run(self):
        self.host += self.enqueuing
        self.device = max(self.device, self.host) + self.running

    def event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.device, self.gpu.host)

    def query(self):
        return self.gpu.host >= self.at

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize(("enqueuing", "waits"), [(0.1, 1), (1.3, 3)])
def test_the_hosts_time_is_not_in_a_round_on_a_gpu(monkeypatch, enqueuing, waits):
    """Five launches of 0.4 ms; the wait of 2 ms is too short to enqueue them where each takes the host 1.3."""
    gpu = FakeGpu(enqueuing, running=0.4)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    assert kernels.milliseconds("cuda", gpu.run) == pytest.approx(0.4)
    assert gpu.waits == waits


def test_all_shapes_fit_the_limit_of_the_check_on_a_gpu():
    """Waits before the turns on a slow clock, and the turns themselves: two packages beside torch, who as torch move
    four times the necessary bytes at 2 TB/s, GEMMs at 400 TFLOP/s. Two fifths of the limit are left to all else."""
    script = (Path(__file__).parents[2] / "scripts/gpu_check.sh").read_text()
    limit = int(re.search(r"^part kernels (\d+)", script, re.MULTILINE)[1])
    waits = work = 0.0
    for workload in kernel_workloads.cuda_workloads(quick=False, device="meta"):
        rounds = kernels.rounds_of(workload, "cuda", quick=False) + kernels.WARM_UP_ROUNDS
        linear = workload.op == "linear_cross_entropy"
        both = linear or workload.backward_bytes > 0
        candidates = len(workload.candidates) + (0 if linear or not both else 2)
        waits += rounds * (1 + both) * (candidates + 2) * kernels.WAIT_CYCLES / 1.4e9
        moved = workload.forward_bytes * (1 + both) + workload.backward_bytes
        seconds = moved * (2 + 4 * (candidates - 1)) / 2e12 + (1 + both) * 2 * kernels.COPY_BYTES["cuda"] / 2e12
        if linear:
            tokens, hidden, vocabulary = map(int, workload.shape.split(" x "))
            gemms = (1 + 1) + (4 + 3)  # a round: two forwards, ours with its backward, torch's
            seconds += 2 * gemms * tokens * hidden * vocabulary / 400e12
        work += rounds * kernels.LAUNCHES * seconds
    assert waits + work <= 0.6 * limit, f"{waits:.1f} s of waits and {work:.1f} s of work, limit {limit} s"


def test_the_parts_of_the_check_on_a_gpu_fit_eight_minutes():
    script = (Path(__file__).parents[2] / "scripts/gpu_check.sh").read_text()
    lines = r"^ *(part|beside|together)(?: \"?\$?(\w+)\"? (\d+) .*)?$"
    names, seconds, beside = set(), 0, []
    for kind, name, limit in re.findall(lines, script, re.MULTILINE):
        names.add(name)
        seconds += int(limit) if kind == "part" else max(beside) if kind == "together" else 0
        beside = [*beside, int(limit)] if kind == "beside" else []
    assert {"wheels", "needs", "build", "kernels", "compiled", "train_step", "check", "tests_norm"} <= names
    assert seconds <= 480


def test_k2s_shapes_are_all_there():
    """Sequences of 2048 and 8192 in micro-batches of 1 to 4, whole rows and, under sequence parallelism, an eighth."""
    shapes = {(workload.op, workload.shape) for workload in kernel_workloads.cuda_workloads(False, device="meta")}
    for sequence in (2048, 8192):
        for batch in (1, 2, 3, 4):
            rows = sequence * batch
            wanted = {("rotary", f"{sequence} x {batch} x 8 x 128, q and k"), ("swiglu", f"{rows} x 2752")}
            wanted |= {
                ("rotary_packed", f"{sequence} x {batch} x 8 x 128, q, k, v"),
                ("cross_entropy", f"{rows} x 4004"),
            }
            wanted |= {(op, f"{count} x 8192") for op in ("rms_norm", "add_rms_norm") for count in (rows, rows // 8)}
            assert wanted <= shapes, wanted - shapes


def test_a_copy_of_equal_size_moves_those_bytes_elsewhere_each_time():
    source, target = torch.arange(1.0, 11.0), torch.zeros(10)
    copy = kernels.equal_copies(source, target, moved_bytes=2 * 4 * 3)
    for expected in ([1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]):
        copy()
        assert target.tolist() == expected + [0] * (10 - len(expected))
    target.zero_()
    copy()
    assert target.tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0, 0]
    workload = Workload("double", "4", torch.float32, 100, 0, lambda: (), lambda inputs: (), {})
    times = {"forward": {"ours": [2.0], "copy": [1.0], "equal copy": [1.5], "eager": [3.0]}}
    (row,) = kernels.summarise(workload, times, "cpu")
    assert row["share_of_equal_copy"] == 0.75
    assert row["times_faster_than"] == {"eager": 1.5}


def test_a_slow_copy_flatters_nobody():
    """The same 100 GB/s beside a copy of 100 and one of 200 GB/s: half of what the machine can do, in both rows."""
    workload = Workload("double", "4", torch.float32, 100_000_000, 0, lambda: (), lambda inputs: (), {})
    rows: list[dict] = []
    for rate in (100, 200):
        milliseconds = 2 * kernels.COPY_BYTES["cpu"] / rate / 1e6
        times = {"forward": {"ours": [1.0, 3.0], "copy": [milliseconds]}}
        rows = kernels.with_shares(rows + kernels.summarise(workload, times, "cpu"))
    assert [row["copy_gigabytes_per_second"] for row in rows] == pytest.approx([100, 200])
    assert [row["share_of_copy"] for row in rows] == pytest.approx([0.5, 0.5])
