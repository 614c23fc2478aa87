"""The LIF neuron alone: forward, backward and both, over T, sizes, dtypes and threads; and with
parameters of one element a channel, over map sizes, against scalar ones.

    pytest benchmarks/bench_lif.py --benchmark-only -s

Before it is timed, every contender has to give the spikes and the gradient of the reference: the
same bits in fp32; in bf16, where libraries round membranes differently, 99 % of the spikes.
"""

from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from contenders import LIMIT, REUSED, Contender, Limit, available, current, iirsnn_lif, prepared
from traffic import Kept, Traffic

CHANNELS, SIDE = 64, 32
IN_CACHE = 8 * 2**20  # bytes of x
ALL = torch.get_num_threads()


def last_level_cache():
    """Bytes of the largest cache."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) * 1024 if path.exists() else 2**25


SIZES = {"in": IN_CACHE, "out": max(2**25, last_level_cache())}


class Case:
    """x of one size, dtype and T, the contenders' calls on it, and their bytes."""

    def __init__(self, timesteps, dtype, size):
        torch._dynamo.reset()
        torch.manual_seed(0)
        found, _ = available()
        element = torch.empty(0, dtype=dtype).element_size()
        batch = max(1, round(SIZES[size] / element / (timesteps * CHANNELS * SIDE * SIDE)))
        self.x = current((timesteps, batch, CHANNELS, SIDE, SIDE), dtype)
        self.g = torch.randn(self.x.shape).to(dtype)
        self.calls = {what: {} for what in ("forward", "backward", "both")}
        self.rows = {what: {} for what in self.calls}
        self.out = torch.empty_like(self.x)
        limit = Contender(LIMIT, Limit, "torch")
        self.expected = None
        reference = next(c for c in found if c.name == "reference")
        for contender in (limit, reference, *(c for c in found if c is not reference)):
            self.add(contender)
        x, g, out = self.x, self.g, self.out
        reused = {
            "forward": lambda: out.copy_(x),
            "backward": lambda: torch.add(x, g, out=out),
            "both": lambda: (out.copy_(x), torch.add(x, g, out=out))[0],
        }
        for what, call in reused.items():
            self.calls[what][REUSED] = call

    def add(self, contender):
        name, neuron = contender.name, contender.neuron()
        x = prepared(contender, self.x)
        leaf = x.detach().clone().requires_grad_() if x is self.x else x.requires_grad_()
        plain = leaf.detach()
        s = neuron(leaf)  # the graph of backward()
        g = (self.g.transpose(0, 1) if contender.batch_first else self.g).to(s.dtype)

        def forward():
            with torch.no_grad():
                return neuron(plain)

        def backward():
            return torch.autograd.grad(s, leaf, g, retain_graph=True)[0]

        def both():
            return torch.autograd.grad(neuron(leaf), leaf, g)[0]

        if name == "torch.compile":  # compiles before anything is counted
            forward()
            both()
        with Traffic() as inference:
            inferred = forward()
        with Kept() as kept, Traffic() as training:
            s = neuron(leaf)
        with Traffic() as back:
            grad = backward()
        difference = self.check(contender, s.detach(), inferred, grad)
        moved = {"forward": inference.bytes, "backward": back.bytes}
        moved["both"] = training.bytes + back.bytes
        for what, call in (("forward", forward), ("backward", backward), ("both", both)):
            self.calls[what][name] = call
            self.rows[what][name] = {"bytes": moved[what] / self.x.numel(), **difference}
        self.rows["both"][name]["kept"] = kept.bytes / self.x.numel()

    def check(self, contender, s, inferred, grad):
        """Spikes with and without gradient, and the gradient, are those of the reference."""
        if contender.name == LIMIT:
            return {}
        found = [s, inferred, grad * contender.input_scale]
        if contender.batch_first:
            found = [tensor.transpose(0, 1) for tensor in found]
        if self.expected is None:
            self.expected = found
        counts = [
            int((a != b).sum()) / b.numel() for a, b in zip(found, self.expected, strict=True)
        ]
        allowed = 0.0 if self.x.dtype == torch.float32 else 0.01
        if max(counts[:2]) > allowed or (allowed == 0 and counts[2] > 0):
            raise AssertionError(f"{contender.name}: not the reference's spikes: {counts}")
        return {"other_spikes": counts[0], "other_gradients": counts[2]}


@lru_cache(maxsize=1)
def case_of(timesteps, dtype, size, threads):
    torch.set_num_threads(threads)
    return Case(timesteps, dtype, size)


def cases():
    """All T and threads in both sizes for fp32; bf16, and one thread out of cache, at T = 1, 4."""
    for threads in sorted({1, ALL}):
        for size in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                whole = dtype == torch.float32 and (size == "in" or threads == ALL)
                for timesteps in (1, 2, 4, 5, 8) if whole else (1, 4):
                    telling = threads == ALL and dtype == torch.float32 and timesteps in (1, 4)
                    yield pytest.param(
                        timesteps,
                        dtype,
                        size,
                        threads,
                        marks=[pytest.mark.telling] if telling else [],
                        id=f"T{timesteps}-{str(dtype)[6:]}-{size}-{threads}threads",
                    )


@pytest.mark.parametrize("what", ["forward", "backward", "both"])
@pytest.mark.parametrize(("timesteps", "dtype", "size", "threads"), list(cases()))
def test_lif(race, timesteps, dtype, size, threads, what):
    case = case_of(timesteps, dtype, size, threads)
    facts = {
        "subject": "lif",
        "what": what,
        "timesteps": timesteps,
        "dtype": str(dtype)[6:],
        "size": size,
        "threads": threads,
        "elements": case.x.numel(),
        "element_size": case.x.element_size(),
        "spikes": float(case.expected[0].float().mean()),
    }
    seconds, rounds = (1.5, (7, 101)) if size == "in" else (4.0, (5, 25))
    race(case.calls[what], facts, case.rows[what], seconds, rounds)


def maps():
    """Channels and side: of 64 channels; with --full, of as many as other layers have."""
    for side in (7, 14, 28, 149):
        yield pytest.param(CHANNELS, side, id=str(side), marks=pytest.mark.telling)
    few = ((10, 1), (64, 2), (64, 4), (96, 7), (64, 56), (128, 28), (256, 14))
    for channels, side in (*few, (512, 1), (512, 2), (512, 4), (512, 7), (1024, 14), (2048, 7)):
        yield pytest.param(channels, side, id=f"{channels}x{side}")


@pytest.mark.parametrize("what", ["forward", "backward", "backward with parameters"])
@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize(("channels", "side"), list(maps()))
def test_channels(race, channels, side, timesteps, what):
    torch.manual_seed(0)
    batch = max(1, round(IN_CACHE / 4 / (timesteps * channels * side * side)))
    x = current((timesteps, batch, channels, side, side)).requires_grad_()
    g = torch.randn(x.shape)
    learnt = what.endswith("parameters")
    calls = {}
    for name, count in (("scalar", None), ("per channel", channels)):
        neuron = iirsnn_lif(channels=count, learn_threshold=learnt, learn_leak=learnt)
        s, leaves = neuron(x), [x, *neuron.parameters()]
        calls[name] = partial(forward_of, neuron, x.detach())
        if what != "forward":
            calls[name] = partial(torch.autograd.grad, s, leaves, g, retain_graph=True)
    facts = {
        "subject": "lif_channels",
        "what": what,
        "timesteps": timesteps,
        "channels": channels,
        "side": side,
        "threads": torch.get_num_threads(),
        "elements": x.numel(),
    }
    race(calls, facts, {}, 1.0, (7, 101), limit="scalar")


@torch.no_grad()
def forward_of(neuron, x):
    return neuron(x)
