"""The CUDA kernels on a device: pytest -m gpu, or make gpu-check for the whole of it."""

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

CUDA = Implementation.of("", "cuda")
CPU = Implementation.of("")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run `make gpu-check` on a machine with one",
    ),
]


@pytest.fixture(autouse=True)
def compiled():
    reason = iirsnn.backend.why_not("cuda", "cuda")
    if reason is not None:
        pytest.fail(reason)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(CASES)
def test_forward(case):
    lif_cases.check_forward(case, CUDA)


@named(CASES)
def test_backward(case):
    lif_cases.check_backward(case, CUDA)


@named(CASES)
def test_packed(case):
    lif_cases.check_packed(case, CUDA)


@named(CASES)
def test_same_bits_as_the_cpu(case):
    """Forward, grad_x and grad_v0. Sums over neurons are taken in another order."""
    a = inputs(case)
    on = a.to("cuda")
    how = options(case)
    need = case.need_parameter_grads

    def run(ops, a):
        s, v = ops.forward(a.x, a.threshold, a.leak, a.v0, *how, True)
        parameters = (a.x, a.threshold, a.leak, a.v0)
        grad_x, _, _, grad_v0 = ops.backward(a.grad_s, a.grad_v, *parameters, *how, need)
        return s, v, grad_x, grad_v0

    for got, wanted in zip(run(CUDA, on), run(CPU, a), strict=True):
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(timesteps):
    lif_cases.check_special_values(CUDA, timesteps)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
def test_split(reset):
    lif_cases.check_split(CUDA, reset)


def test_repeats():
    lif_cases.check_repeats(CUDA)


def test_refused():
    lif_cases.check_refused(CUDA)


def step(a, case):
    """Forward, packed and backward of a case, as one list of tensors."""
    parameters, how = (a.x, a.threshold, a.leak, a.v0), options(case)
    s, v = CUDA.forward(*parameters, *how, True)
    bits, _ = CUDA.packed(*parameters, *how[:2], False)
    return [s, v, bits, *CUDA.backward(a.grad_s, a.grad_v, *parameters, *how, True)]


@named(FEW)
def test_graph_capture(case):
    a = inputs(case).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(a, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(a, case)
    fresh = inputs(case, seed=1).to("cuda")
    for name, tensor in vars(a).items():
        if tensor is not None:
            tensor.copy_(getattr(fresh, name))
    graph.replay()
    for got, wanted in zip(captured, step(fresh, case), strict=True):
        assert torch.equal(got, wanted)


@named(FEW)
def test_never_waits_for_the_device(case):
    a = inputs(case).to("cuda")
    step(a, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(a, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@named(FEW)
def test_runs_on_the_current_stream(case):
    """The inputs arrive late on the same stream; a launch elsewhere would read what was before."""
    ready = inputs(case).to("cuda")
    wanted = step(ready, case)
    late = inputs(case, seed=1).to("cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, tensor in vars(late).items():
            if tensor is not None:
                tensor.copy_(getattr(ready, name))
        got = step(late, case)
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_x():
    case = Case("second device", (3, 2, 40))
    got = step(inputs(case).to("cuda:1"), case)
    assert torch.cuda.current_device() == 0
    wanted = step(inputs(case).to("cuda:0"), case)
    assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, wanted, strict=True))


def test_mixed_devices_are_refused():
    a = inputs(Case("mixed", (3, 2, 40)))
    with pytest.raises(ValueError, match="threshold"):
        CUDA.forward(
            *(a.x.cuda(), a.threshold, a.leak.cuda(), None, "soft", 0.0, True, "triangle", 0.3),
            False,
        )


@pytest.mark.parametrize("timesteps", [1, 2])
def test_more_than_2_to_the_31_elements(timesteps):
    lif_cases.check_more_than_2_to_the_31_elements(CUDA, timesteps)


def test_lif_through_autograd():
    """functional.lif picks the CUDA kernels; gradients are near those of the CPU's."""
    a = inputs(Case("autograd", (4, 2, 6, 5, 5), threshold_channels=True))

    def gradients(device):
        x, threshold = (t.to(device).requires_grad_() for t in (a.x, a.threshold))
        s = iirsnn.functional.lif(x, threshold, 0.8, surrogate="atan")
        return torch.autograd.grad(s, (x, threshold), a.grad_s.to(device))

    for got, wanted in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_stays_fused_under_autocast():
    layer = torch.nn.Linear(16, 24, device="cuda")
    x = torch.randn(5, 8, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        s = iirsnn.functional.lif(layer(x))
    assert s.dtype == torch.bfloat16
    names = {event.key for event in profile.key_averages()}
    assert "iirsnn::lif_forward" in names


def test_opcheck():
    a = inputs(Case("opcheck", (3, 2, 40))).to("cuda")
    how = ("soft", 0.0, True, "triangle", 0.3)
    x, threshold, leak = (t.requires_grad_() for t in (a.x, a.threshold, a.leak))
    torch.library.opcheck(
        torch.ops.iirsnn.lif_forward.default, (x, threshold, leak, None, *how, True)
    )


def test_compiles_into_one_graph():
    x = torch.randn(4, 8, 33, device="cuda")

    @torch.compile(fullgraph=True)
    def f(x):
        return iirsnn.functional.lif(x * 2.0, 1.0, 0.9, backend="cuda") + 1.0

    assert torch.equal(f(x), iirsnn.functional.lif(x * 2.0, 1.0, 0.9, backend="cuda") + 1.0)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
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
