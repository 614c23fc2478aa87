"""Times of LIF forward and backward on a CUDA device, for make gpu-check (see gpu_check.py).

Every time is compared with what no kernel can beat: x.clone() moves the bytes of a forward pass,
torch.add(x, g) those of a backward pass. All that is compared is timed in turns, round after
round, so that a clock that changes hits all of it. Before each call the device overwrites a large
buffer: that empties its caches and gives the host the time to launch what is measured.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch

from iirsnn.functional import lif
from iirsnn.ops import reference
from iirsnn.ops.backend import why_not

TIMESTEPS = (1, 2, 4, 5, 8)
DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS = 2**27  # per tensor: 512 MiB of float32, far beyond every cache
ROUNDS = 30
HOW = ("soft", 0.0, True, "triangle", 0.3)

Call = Callable[[], Any]


def implementations() -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """{name: f(x, threshold, leak) -> s}, and for each that cannot run the reason."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    missing: dict[str, str] = {}

    def fused(backend: str) -> Callable[..., torch.Tensor]:
        return lambda x, threshold, leak: lif(x, threshold, leak, backend=backend)

    # Its check of the parameters' values waits for the device, which a plain loop would not.
    reference._check_values = lambda threshold, leak: None

    def eager(x: torch.Tensor, threshold: torch.Tensor, leak: torch.Tensor) -> torch.Tensor:
        return reference.lif_forward(x, threshold, leak, None, *HOW, False)[0]

    for backend in ("cuda", "triton"):
        reason = why_not(backend, "cuda")
        if reason is None:
            found[backend] = fused(backend)
        else:
            missing[backend] = reason
    found["eager"] = eager
    # Without donated buffers, so that its backward pass can be timed again and again.
    donating = torch._functorch.config.patch(donated_buffer=False)
    found["torch.compile"] = donating(torch.compile(eager, dynamic=False))
    if importlib.util.find_spec("spikingjelly") is None:
        missing["spikingjelly"] = "not installed"
    else:
        found["spikingjelly"] = _spikingjelly()
    return found, missing


def _spikingjelly() -> Callable[..., torch.Tensor]:
    """SpikingJelly 2's LIFNode over many steps. It learns neither threshold nor leak."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    node = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=None,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        step_mode="m",
    ).cuda()

    def run(x: torch.Tensor, threshold: torch.Tensor, leak: torch.Tensor) -> torch.Tensor:
        functional.reset_net(node)
        return node(x)

    return run


def milliseconds(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """{name: {"p20", "p50", "p80"}} of each call, timed in turns on a cold cache."""
    flush = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            end.synchronize()
            del result
            times[name].append(start.elapsed_time(end))
    cuts = {name: statistics.quantiles(t, n=10) for name, t in times.items()}
    return {name: {"p20": c[1], "p50": c[4], "p80": c[7]} for name, c in cuts.items()}


def peak_bytes(call: Call) -> int:
    """Device memory that one call needs beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(timesteps: int, dtype: torch.dtype, elements: int = ELEMENTS) -> list[dict[str, Any]]:
    """Rows of one T and dtype: every implementation x forward, backward, both, packed."""
    torch._dynamo.reset()
    found, _ = implementations()
    x = torch.randn(timesteps, elements // timesteps // 1024, 1024, device="cuda", dtype=dtype)
    x.mul_(0.8).add_(0.4)
    g = torch.randn_like(x)
    threshold = torch.ones(1, device="cuda", requires_grad=True)
    leak = torch.full((1,), 0.9, device="cuda", requires_grad=True)
    leaf = x.detach().requires_grad_()
    leaves = (leaf, threshold, leak)
    bytes_of_x = x.numel() * x.element_size()

    def forward(fn: Callable[..., torch.Tensor]) -> Call:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return fn(x, threshold, leak)

        return call

    def backward(fn: Callable[..., torch.Tensor]) -> Call:
        s = fn(*leaves)
        return lambda: torch.autograd.grad(s, leaves, g, retain_graph=True, allow_unused=True)

    def both(fn: Callable[..., torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, g, allow_unused=True)

    rows = []
    for what, make, least, reference_name, reference_call in (
        ("forward", forward, 2, "clone", x.clone),
        ("backward", backward, 3, "add", lambda: torch.add(x, g)),
        ("both", both, 5, None, None),
    ):
        calls = {name: make(fn) for name, fn in found.items()}
        if what == "forward":
            for backend in ("cuda", "triton"):
                if backend in found:
                    calls[f"{backend} packed"] = _packed(x, threshold, leak, backend)
        if reference_call is not None:
            calls[reference_name] = reference_call
        else:
            calls["clone + add"] = lambda: (x.clone(), torch.add(x, g))
            reference_name = "clone + add"
        times = milliseconds(calls)
        for name, ms in times.items():
            moved = bytes_of_x * least
            if name.endswith("packed"):
                moved = bytes_of_x + x.numel() // 8
            rows.append(
                {
                    "what": what,
                    "implementation": name,
                    "timesteps": timesteps,
                    "dtype": str(dtype).removeprefix("torch."),
                    "elements": x.numel(),
                    "ms": ms,
                    "bytes_per_second": moved / ms["p50"] * 1e3,  # of the least that must move
                    "ratio": ms["p50"] / times[reference_name]["p50"],
                    "ratio_to": reference_name,
                    "peak_bytes": peak_bytes(calls[name]),
                }
            )
        del calls
    return rows


def _packed(x: torch.Tensor, threshold: torch.Tensor, leak: torch.Tensor, backend: str) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return lif(x, threshold, leak, packed=True, backend=backend)

    return call
