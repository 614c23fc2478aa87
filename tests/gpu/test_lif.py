"""The GPU kernels on a device: pytest -m gpu, or make gpu-check for the whole of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iirsnn
from tests import lif_cases
from tests.gpu.device import ON_A_DEVICE, PREFIXES, prefix
from tests.lif_cases import CASES, FEW, Case, Implementation, inputs, named, options

pytestmark = ON_A_DEVICE


@pytest.fixture(params=list(PREFIXES))
def backend(request):
    """Each of the backends, for the tests of all."""
    return request.param


@pytest.fixture
def ops(backend):
    """The ops of `backend`."""
    return Implementation.of(prefix(backend), "cuda")


def of(name):
    """For a test of one backend alone."""
    return pytest.mark.parametrize("backend", [name])


@named(CASES)
def test_forward(ops, case):
    lif_cases.check_forward(case, ops)


@named(CASES)
def test_backward(ops, case):
    lif_cases.check_backward(case, ops)


@named(CASES)
def test_packed(ops, case):
    lif_cases.check_packed(case, ops)


@of("cuda")
@named(CASES)
def test_same_bits_as_the_cpu(ops, case):
    """Forward, grad_x and grad_v0. Sums over neurons are taken in another order."""
    a = inputs(case)
    how = options(case)
    need = case.need_parameter_grads

    def run(ops, a):
        s, v = ops.forward(a.x, a.threshold, a.leak, a.v0, *how, True)
        parameters = (a.x, a.threshold, a.leak, a.v0)
        grad_x, _, _, grad_v0 = ops.backward(a.grad_s, a.grad_v, *parameters, *how, need)
        return s, v, grad_x, grad_v0

    cpu = Implementation.of("")
    for got, wanted in zip(run(ops, a.to("cuda")), run(cpu, a), strict=True):
        assert torch.equal(got.cpu(), wanted)


@of("triton")
@named([case for case in CASES if case.dtype == torch.float32])
def test_spikes_and_membranes_have_the_bits_of_cpu_and_cuda(ops, case):
    a = inputs(case)
    on = a.to("cuda")
    how = options(case)
    got = ops.forward(on.x, on.threshold, on.leak, on.v0, *how, True)
    others = [("cpu", Implementation.of(""), a)]
    if iirsnn.ops.backend.why_not("cuda", "cuda") is None:
        others.append(("cuda", Implementation.of("", "cuda"), on))
    for name, other, b in others:
        wanted = other.forward(b.x, b.threshold, b.leak, b.v0, *how, True)
        assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, wanted, strict=True)), name


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(ops, timesteps):
    lif_cases.check_special_values(ops, timesteps)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
def test_split(ops, reset):
    lif_cases.check_split(ops, reset)


def test_repeats(ops):
    lif_cases.check_repeats(ops)


def test_refused(ops):
    lif_cases.check_refused(ops)


def step(ops, a, case):
    """Forward, packed and backward of a case, as one list of tensors."""
    parameters, how = (a.x, a.threshold, a.leak, a.v0), options(case)
    s, v = ops.forward(*parameters, *how, True)
    bits, _ = ops.packed(*parameters, *how[:2], False)
    return [s, v, bits, *ops.backward(a.grad_s, a.grad_v, *parameters, *how, True)]


@named(FEW)
def test_graph_capture(ops, case):
    a = inputs(case).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(ops, a, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(ops, a, case)
    fresh = inputs(case, seed=1).to("cuda")
    for name, tensor in vars(a).items():
        if tensor is not None:
            tensor.copy_(getattr(fresh, name))
    graph.replay()
    for got, wanted in zip(captured, step(ops, fresh, case), strict=True):
        assert torch.equal(got, wanted)


@named(FEW)
def test_never_waits_for_the_device(ops, case):
    a = inputs(case).to("cuda")
    step(ops, a, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ops, a, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@of("cuda")
@named(FEW)
def test_runs_on_the_current_stream(ops, case):
    """The inputs arrive late on the same stream; a launch elsewhere would read what was before."""
    ready = inputs(case).to("cuda")
    wanted = step(ops, ready, case)
    late = inputs(case, seed=1).to("cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, tensor in vars(late).items():
            if tensor is not None:
                tensor.copy_(getattr(ready, name))
        got = step(ops, late, case)
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_x(ops):
    case = Case("second device", (3, 2, 40))
    got = step(ops, inputs(case).to("cuda:1"), case)
    assert torch.cuda.current_device() == 0
    wanted = step(ops, inputs(case).to("cuda:0"), case)
    assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, wanted, strict=True))


@of("cuda")
def test_mixed_devices_are_refused(ops):
    a = inputs(Case("mixed", (3, 2, 40)))
    with pytest.raises(ValueError, match="threshold"):
        ops.forward(
            *(a.x.cuda(), a.threshold, a.leak.cuda(), None, "soft", 0.0, True, "triangle", 0.3),
            False,
        )


@pytest.mark.parametrize("timesteps", [1, 2])
def test_more_than_2_to_the_31_elements(ops, timesteps):
    """Offsets beyond 32 bits, in bf16; skips where the device has too little memory."""
    neurons = 2**31 // timesteps + 1024
    needed = 8 * timesteps * neurons + 2**30  # x, grad_s, the spikes or grad_x, and bits
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    x = torch.zeros(timesteps, neurons, dtype=torch.bfloat16, device="cuda")
    x[:, -3:] = 2.0
    parameters = (torch.ones(1, device="cuda"), torch.zeros(1, device="cuda"))
    how = ("soft", 0.0, True, "boxcar", 1.5)
    s, _ = ops.forward(x, *parameters, None, *how, False)
    assert s[:, -3:].eq(1).all()
    assert s.count_nonzero() == 3 * timesteps
    del s
    bits, _ = ops.packed(x, *parameters, None, "soft", 0.0, False)
    assert bits.count_nonzero() == timesteps
    assert bits[:, (neurons - 1) // 8].eq(0b11100000).all()
    s = ops.unpack(bits, list(x.shape), [neurons, 1], torch.bfloat16)
    assert s[:, -3:].eq(1).all()
    assert s.count_nonzero() == 3 * timesteps
    del s, bits
    grad_s = torch.zeros_like(x)
    grad_s[:, -3:] = 3.0
    grad_x, *_ = ops.backward(grad_s, None, x, *parameters, None, *how, True)
    assert grad_x.count_nonzero() == 3 * timesteps
    assert grad_x[-1, -3:].eq(1).all()


def test_lif_through_autograd(ops, backend):
    """Gradients are near those of the CPU's."""
    a = inputs(Case("autograd", (4, 2, 6, 5, 5), threshold_channels=True))

    def gradients(device, backend):
        x, threshold = (t.to(device).requires_grad_() for t in (a.x, a.threshold))
        s = iirsnn.functional.lif(x, threshold, 0.8, surrogate="atan", backend=backend)
        return torch.autograd.grad(s, (x, threshold), a.grad_s.to(device))

    pairs = zip(gradients("cuda", backend), gradients("cpu", "auto"), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_stays_fused_under_autocast(ops, backend):
    """backend="auto" takes the CUDA kernels."""
    asked = "auto" if backend == "cuda" else backend
    layer = torch.nn.Linear(16, 24, device="cuda")
    x = torch.randn(5, 8, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        s = iirsnn.functional.lif(layer(x), backend=asked)
    assert s.dtype == torch.bfloat16
    names = {event.key for event in profile.key_averages()}
    assert f"iirsnn::{PREFIXES[backend]}lif_forward" in names


@pytest.mark.parametrize("timesteps", [1, 3])
def test_opcheck(ops, timesteps):
    case = Case("opcheck", (timesteps, 2, 6, 10), threshold_channels=True)
    a = inputs(case).to("cuda")
    leaves = [t.requires_grad_() for t in (a.x, a.threshold, a.leak)]
    torch.library.opcheck(ops.forward, (*leaves, None, *options(case), False))


@of("cuda")
def test_compiles_into_one_graph(ops):
    x = torch.randn(4, 8, 33, device="cuda")

    @torch.compile(fullgraph=True)
    def f(x):
        return iirsnn.functional.lif(x * 2.0, 1.0, 0.9, backend="cuda") + 1.0

    assert torch.equal(f(x), iirsnn.functional.lif(x * 2.0, 1.0, 0.9, backend="cuda") + 1.0)


@of("triton")
@pytest.mark.parametrize("timesteps", [1, 4, 11])
def test_compiles_into_one_graph_and_never_again(ops, timesteps):
    """Inductor compiles the kernels itself: spikes must have the same bits, whatever its options.

    A learned value that changes compiles nothing anew.
    """

    def f(x, threshold, leak):
        s = iirsnn.functional.lif(x * 2.0, threshold, leak, backend="triton")
        return s + 1.0

    def gradients(fn, a):
        leaves = [t.detach().clone().requires_grad_() for t in (a.x, a.threshold, a.leak)]
        out = fn(*leaves)
        return out, *torch.autograd.grad(out, leaves, a.grad_s)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True)
    a = inputs(Case("compile", (timesteps, 8, 33))).to("cuda")
    for _ in range(3):
        got, wanted = gradients(compiled, a), gradients(f, a)
        assert torch.equal(got[0], wanted[0])
        for g, w in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)
        a.threshold += 0.25
        a.leak -= 0.125
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(a.x.requires_grad_(), *(p.requires_grad_() for p in (a.threshold, a.leak)))
        a.x, a.threshold, a.leak = a.x.detach(), a.threshold.detach(), a.leak.detach()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(ops, backend, tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer (it comes with the CUDA toolkit) on PATH")
    if "IIRSNN_SANITIZED" in os.environ:
        pytest.skip("this is the run inside compute-sanitizer")
    names = " or ".join(("test_repeats", "test_split", "test_special_values"))
    command = [program, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "pytest"]
    run = subprocess.run(
        [*command, "-q", "-m", "gpu", "-k", f"({names}) and {backend}", __file__],
        env={**os.environ, "IIRSNN_SANITIZED": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
