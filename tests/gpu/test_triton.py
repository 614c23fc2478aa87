"""The Triton kernels on a device: pytest -m gpu, or make gpu-check for the whole of it."""

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
from tests.lif_cases import CASES, FEW, Case, Implementation, inputs, options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run `make gpu-check` on a machine with one",
    ),
]


@pytest.fixture(scope="module")
def triton_ops():
    reason = iirsnn.backend.why_not("triton", "cuda")
    if reason is not None:
        pytest.fail(reason)
    return Implementation.of("triton_", "cuda")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(CASES)
def test_forward(triton_ops, case):
    lif_cases.check_forward(case, triton_ops)


@named(CASES)
def test_backward(triton_ops, case):
    lif_cases.check_backward(case, triton_ops)


@named(CASES)
def test_packed(triton_ops, case):
    lif_cases.check_packed(case, triton_ops)


@named([case for case in CASES if case.dtype == torch.float32])
def test_spikes_and_membranes_have_the_bits_of_cpu_and_cuda(triton_ops, case):
    a = inputs(case)
    on = a.to("cuda")
    how = options(case)
    got = triton_ops.forward(on.x, on.threshold, on.leak, on.v0, *how, True)
    others = [("cpu", Implementation.of(""), a)]
    if iirsnn.backend.why_not("cuda", "cuda") is None:
        others.append(("cuda", Implementation.of("", "cuda"), on))
    for name, ops, b in others:
        wanted = ops.forward(b.x, b.threshold, b.leak, b.v0, *how, True)
        assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, wanted, strict=True)), name


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(triton_ops, timesteps):
    lif_cases.check_special_values(triton_ops, timesteps)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
def test_split(triton_ops, reset):
    lif_cases.check_split(triton_ops, reset)


def test_repeats(triton_ops):
    lif_cases.check_repeats(triton_ops)


def test_refused(triton_ops):
    lif_cases.check_refused(triton_ops)


def step(ops, a, case):
    """Forward, packed and backward of a case, as one list of tensors."""
    parameters, how = (a.x, a.threshold, a.leak, a.v0), options(case)
    s, v = ops.forward(*parameters, *how, True)
    bits, _ = ops.packed(*parameters, *how[:2], False)
    return [s, v, bits, *ops.backward(a.grad_s, a.grad_v, *parameters, *how, True)]


@named(FEW)
def test_graph_capture(triton_ops, case):
    a = inputs(case).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(triton_ops, a, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(triton_ops, a, case)
    fresh = inputs(case, seed=1).to("cuda")
    for name, tensor in vars(a).items():
        if tensor is not None:
            tensor.copy_(getattr(fresh, name))
    graph.replay()
    for got, wanted in zip(captured, step(triton_ops, fresh, case), strict=True):
        assert torch.equal(got, wanted)


@named(FEW)
def test_never_waits_for_the_device(triton_ops, case):
    a = inputs(case).to("cuda")
    step(triton_ops, a, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(triton_ops, a, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_x(triton_ops):
    case = Case("second device", (3, 2, 40))
    got = step(triton_ops, inputs(case).to("cuda:1"), case)
    assert torch.cuda.current_device() == 0
    wanted = step(triton_ops, inputs(case).to("cuda:0"), case)
    assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("timesteps", [1, 2])
def test_more_than_2_to_the_31_elements(triton_ops, timesteps):
    lif_cases.check_more_than_2_to_the_31_elements(triton_ops, timesteps)


def test_lif_through_autograd(triton_ops):
    """functional.lif with backend="triton": gradients are near those of the CPU's."""
    a = inputs(Case("autograd", (4, 2, 6, 5, 5), threshold_channels=True))

    def gradients(device, backend):
        x, threshold = (t.to(device).requires_grad_() for t in (a.x, a.threshold))
        s = iirsnn.functional.lif(x, threshold, 0.8, surrogate="atan", backend=backend)
        return torch.autograd.grad(s, (x, threshold), a.grad_s.to(device))

    pairs = zip(gradients("cuda", "triton"), gradients("cpu", "auto"), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_stays_fused_under_autocast(triton_ops):
    layer = torch.nn.Linear(16, 24, device="cuda")
    x = torch.randn(5, 8, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        s = iirsnn.functional.lif(layer(x), backend="triton")
    assert s.dtype == torch.bfloat16
    names = {event.key for event in profile.key_averages()}
    assert "iirsnn::triton_lif_forward" in names


@pytest.mark.parametrize("timesteps", [1, 3])
def test_opcheck(triton_ops, timesteps):
    case = Case("opcheck", (timesteps, 2, 6, 10), threshold_channels=True)
    a = inputs(case).to("cuda")
    leaves = [t.requires_grad_() for t in (a.x, a.threshold, a.leak)]
    op = torch.ops.iirsnn.triton_lif_forward
    torch.library.opcheck(op, (*leaves, None, *options(case), False))


@pytest.mark.parametrize("timesteps", [1, 4, 11])
def test_compiles_into_one_graph_and_never_again(triton_ops, timesteps):
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
def test_compute_sanitizer(triton_ops, tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer (it comes with the CUDA toolkit) on PATH")
    if "IIRSNN_SANITIZED" in os.environ:
        pytest.skip("this is the run inside compute-sanitizer")
    names = " or ".join(("test_repeats", "test_split", "test_special_values"))
    command = [program, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "pytest"]
    run = subprocess.run(
        [*command, "-q", "-m", "gpu", "-k", names, __file__],
        env={**os.environ, "IIRSNN_SANITIZED": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
