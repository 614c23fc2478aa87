"""LIF on the CPU: against the plain torch loop, and against the memory traffic it cannot avoid.

pytest benchmarks --benchmark-only: the table's times are of one function each; the ratios, of
functions timed in turns, are in its "extra" columns (--benchmark-json) and printed with -s.
"""

import pytest
import torch

from iirsnn.functional import lif

OPS = torch.ops.iirsnn
HOW = ("soft", 0.0, True, "triangle", 0.3)
SMALL = (4, 8, 64, 32, 32)  # 8 MiB of float32: in the L3 cache of most machines
LARGE = (4, 64, 64, 32, 32)  # 64 MiB of float32: in none's


def report(benchmark, label, ratio, **times):
    benchmark.extra_info[label] = round(ratio, 2)
    shown = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    print(f"\n{label}: {ratio:.2f} ({shown})")


def training_step(x, threshold, leak, backend):
    def step():
        s = lif(x, threshold, leak, backend=backend)
        return torch.autograd.grad(s, (x, threshold, leak), s.detach())

    return step


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_training_step(benchmark, in_turns, backend):
    """Forward and backward with all gradients, T = 4, float32."""
    x = torch.randn(SMALL, requires_grad=True)
    threshold = torch.ones(1, requires_grad=True)
    leak = torch.full((1,), 0.9, requires_grad=True)
    benchmark(training_step(x, threshold, leak, backend))
    if backend == "cpu":
        steps = {name: training_step(x, threshold, leak, name) for name in ("cpu", "reference")}
        times = in_turns(steps, rounds=51)
        report(benchmark, "times faster than eager", times["reference"] / times["cpu"], **times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("timesteps", [1, 4])
def test_forward_out_of_cache(benchmark, in_turns, timesteps, dtype):
    """Reads x, writes s, as x.clone() does."""
    x = torch.randn(LARGE).to(dtype).view(timesteps, -1, *LARGE[2:])
    threshold, leak = torch.ones(1), torch.full((1,), 0.9)

    def forward():
        return OPS.lif_forward(x, threshold, leak, None, *HOW, False)

    benchmark(forward)
    times = in_turns({"forward": forward, "clone": x.clone})
    report(benchmark, "of the time of clone", times["forward"] / times["clone"], **times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("timesteps", [1, 4])
def test_backward_out_of_cache(benchmark, in_turns, timesteps, dtype):
    """Reads x and grad_s, writes grad_x, as torch.add does."""
    x = torch.randn(LARGE).to(dtype).view(timesteps, -1, *LARGE[2:])
    grad_s = torch.randn(x.shape).to(dtype)
    threshold, leak = torch.ones(1), torch.full((1,), 0.9)

    def backward():
        return OPS.lif_backward(grad_s, None, x, threshold, leak, None, *HOW, True)

    benchmark(backward)
    times = in_turns({"backward": backward, "add": lambda: torch.add(x, grad_s)})
    report(benchmark, "of the time of add", times["backward"] / times["add"], **times)


@pytest.mark.parametrize("timesteps", [1, 4])
def test_packed_out_of_cache(benchmark, in_turns, timesteps):
    """Reads x, writes a bit a spike."""
    x = torch.randn(LARGE).view(timesteps, -1, *LARGE[2:])
    threshold, leak = torch.ones(1), torch.full((1,), 0.9)

    def packed():
        return OPS.lif_packed(x, threshold, leak, None, "soft", 0.0, False)

    benchmark(packed)
    times = in_turns({"packed": packed, "sum": x.sum, "clone": x.clone})
    report(benchmark, "of the time of clone", times["packed"] / times["clone"], **times)
