"""Every Triton kernel compiled to PTX and executed on the CPU, through the project's launchers.

The emulator checks every access against the bounds and alignment of its array, and counts bytes.
"""

from dataclasses import replace

import iirsnn.kernels  # noqa: F401  (registers the ops)
import pytest
import torch
import triton
from torch.library import opcheck

from tests import lif_cases
from tests.lif_cases import CASES, FEW, Case, Implementation, inputs, options

TRITON = Implementation.of("triton_")
ARCHITECTURES = [
    # The emulator takes a tensor without dimensions, as v is for x [T], for a number.
    *((90, case) for case in CASES if len(case.shape) > 1),
    *((80, case) for case in FEW),
    # sm_100 subtracts a float32 from a bfloat16 in one instruction, which the emulator lacks. Only
    # a first step without v0 has a use for it.
    *((100, replace(case, v0=case.dtype == torch.bfloat16)) for case in FEW),
]
# Packing knows nothing of gradients.
PACKED = [(arch, c) for arch, c in ARCHITECTURES if c.detach and c.surrogate == "triangle"]


def named(architectures):
    ids = [f"sm_{arch} {case.name}" for arch, case in architectures]
    return pytest.mark.parametrize(("arch", "case"), architectures, ids=ids)


@named(ARCHITECTURES)
def test_forward(cudarun, arch, case):
    with cudarun.emulate(arch=arch) as launches:
        lif_cases.check_forward(case, TRITON)
    assert launches or 0 in case.shape


@named(ARCHITECTURES)
def test_backward(cudarun, arch, case):
    with cudarun.emulate(arch=arch) as launches:
        lif_cases.check_backward(case, TRITON)
    assert len(launches) == (0 not in case.shape)


@named(PACKED)
def test_packed(cudarun, arch, case):
    with cudarun.emulate(arch=arch) as launches:
        lif_cases.check_packed(case, TRITON)
    assert launches or 0 in case.shape


def test_special_values(cudarun):
    for timesteps in (1, 3):
        with cudarun.emulate(arch=90):
            lif_cases.check_special_values(TRITON, timesteps)


def test_checkpoints_when_warps_run_in_random_order(cudarun):
    case = Case("T=17", (17, 4, 256), dtype=torch.bfloat16)
    for seed in range(3):
        with cudarun.emulate(arch=90, sched="warp", seed=seed):
            lif_cases.check_backward(case, TRITON)


class Target:
    """What torch.compile asks of Triton's driver, which there is none of without a GPU."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())


@pytest.mark.parametrize(("timesteps", "v0"), [(1, False), (3, True)])
def test_opcheck(cudarun, target, timesteps, v0):
    case = Case("opcheck", (timesteps, 2, 6, 10), v0=v0, threshold_channels=True)
    a = inputs(case)
    leaves = [
        None if t is None else t.clone().requires_grad_() for t in (a.x, a.threshold, a.leak, a.v0)
    ]
    stride = (a.x[0].numel(), *a.x.stride()[1:])
    backward = (a.grad_s, None, a.x, a.threshold, a.leak, a.v0)
    ops = torch.ops.iirsnn
    with cudarun.emulate(arch=90) as launches, torch.no_grad():
        bits, _ = TRITON.packed(a.x, a.threshold, a.leak, a.v0, "soft", 0.0, False)
        opcheck(ops.triton_lif_packed, (a.x, a.threshold, a.leak, a.v0, "soft", 0.0, v0))
        opcheck(ops.triton_unpack_spikes, (bits, list(a.x.shape), list(stride), torch.float32))
        opcheck(ops.triton_lif_backward, (*backward, *options(case), True))
    with cudarun.emulate(arch=90) as launches:
        opcheck(ops.triton_lif_forward, (*leaves, *options(case), v0))
    assert launches


def test_compiled_whole_graph_with_dynamic_shapes(cudarun, target):
    """torch.compile traces into the launchers; its graph, kernels included, runs as eager does."""

    def step(x, threshold, leak):
        s, _ = TRITON.forward(2 * x, threshold, leak, None, *options(Case("", ())), False)
        return 3 * s

    def gradients(fn, a):
        leaves = [t.clone().requires_grad_() for t in (a.x, a.threshold, a.leak)]
        out = fn(*leaves)
        return out, *torch.autograd.grad(out, leaves, a.grad_s)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with cudarun.emulate(arch=90):
        for shape in ((5, 4, 32), (5, 3, 33), (1, 3, 33), (11, 2, 7)):
            a = inputs(Case("compile", shape))
            for got, wanted in zip(gradients(compiled, a), gradients(step, a), strict=True):
                assert torch.equal(got, wanted)


def per_neuron(stats, neurons):
    """Bytes loaded and stored per neuron, by argument number (None arguments are not counted)."""
    return {
        int(name.removeprefix("arg")): (n["ld_bytes"] / neurons, n["st_bytes"] / neurons)
        for name, n in stats.by_array.items()
    }


def run(cudarun, case):
    """Forward and backward -> the Stats of both launches."""
    a = inputs(case)
    with cudarun.emulate(arch=90) as launches:
        TRITON.forward(a.x, a.threshold, a.leak, a.v0, *options(case), case.v0)
        TRITON.backward(
            *(a.grad_s, a.grad_v, a.x, a.threshold, a.leak, a.v0),
            *options(case),
            case.need_parameter_grads,
        )
    (_, _, forward), (_, _, backward) = launches
    return forward, backward


@pytest.mark.parametrize(
    ("timesteps", "dtype", "neurons"),
    [
        *((t, d, 4096) for t in (1, 2, 5, 8) for d in (torch.float32, torch.bfloat16)),
        *((t, torch.float16, 4096) for t in (1, 4)),
        *((t, torch.float32, 4095) for t in (1, 5)),
    ],
)
def test_bytes(cudarun, timesteps, dtype, neurons):
    forward, backward = run(cudarun, Case("bytes", (timesteps, neurons), dtype=dtype))
    row = timesteps * dtype.itemsize
    got_forward, got_backward = per_neuron(forward, neurons), per_neuron(backward, neurons)
    # backward ends in the gradients of parameters, partial sums and counters
    if timesteps == 1:  # x, threshold, s; grad_s, x, threshold, grad_x
        parameters, sums = [(forward, 1), (backward, 2)], [4, 5, 6]
        want_forward, want_backward = {0: (row, 0), 2: (0, row)}, {0: (row, 0), 1: (row, 0)}
        want_backward[3] = (0, row)
    else:  # x, threshold, leak, s; grad_s, x, threshold, leak, grad_x
        parameters = [(forward, 1), (forward, 2), (backward, 2), (backward, 3)]
        sums = [5, 6, 7, 8]
        want_forward, want_backward = {0: (row, 0), 3: (0, row)}, {0: (row, 0), 1: (row, 0)}
        want_backward[4] = (0, row)
    for stats, index in parameters:  # one broadcast sector per warp, no more
        n = stats.by_array[f"arg{index}"]
        assert n["ld_sectors"] == n["ld_requests"] == n["ld_threads"] / 32
        got_forward.pop(index, None) if stats is forward else got_backward.pop(index)
    for index in sums:  # one double per program and sum, and a few that sum them up
        assert backward.by_array[f"arg{index}"]["st_bytes"] <= 16 * (neurons // 512 + 2)
        got_backward.pop(index)
    assert got_forward == want_forward
    assert got_backward == want_backward
    # SpikingJelly 2.0's Triton kernels, by the same tool: 40 and 32 at T = 1, 136 and 96 at T = 5.
    both = sum(map(sum, [*got_forward.values(), *got_backward.values()]))
    assert both == {1: 5, 2: 10, 4: 20, 5: 25, 8: 40}[timesteps] * dtype.itemsize
    if neurons == 4096:
        for stats, want in ((forward, want_forward), (backward, want_backward)):
            for index in want:
                n = stats.by_array[f"arg{index}"]
                threads = n["ld_threads"] + n["st_threads"]
                assert (n["ld_bytes"] + n["st_bytes"]) / threads == 16


@pytest.mark.parametrize("timesteps", [1, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_with_channels(cudarun, timesteps, layout):
    both = {"threshold_channels": True, "leak_channels": True}
    case = Case("bytes", (timesteps, 2, 32, 8, 8), layout, **both)
    neurons = 2 * 32 * 8 * 8
    forward, backward = run(cudarun, case)
    x, s = forward.by_array["arg0"], forward.by_array["arg3" if timesteps > 1 else "arg2"]
    assert x["ld_bytes"] == s["st_bytes"] == 4 * timesteps * neurons
    assert x["ld_bytes"] / x["ld_threads"] == s["st_bytes"] / s["st_threads"] == 16
    g, x = backward.by_array["arg0"], backward.by_array["arg1"]
    grad_x = backward.by_array["arg4" if timesteps > 1 else "arg3"]
    assert g["ld_bytes"] == x["ld_bytes"] == grad_x["st_bytes"] == 4 * timesteps * neurons
    assert grad_x["st_bytes"] / grad_x["st_threads"] == 16


def test_bytes_of_a_long_sequence(cudarun):
    neurons, timesteps, segments = 1024, 19, 2
    forward, backward = run(cudarun, Case("bytes", (timesteps, neurons)))
    got = per_neuron(forward, neurons)
    assert (got[0], got[3]) == ((4 * timesteps, 0), (0, 4 * timesteps))
    got = per_neuron(backward, neurons)
    assert got[0] == (4 * timesteps, 0)
    assert got[1] == (4 * (2 * timesteps - 8), 0)
    assert got[4] == (0, 4 * timesteps)
    assert got[9] == (4 * segments, 4 * segments)


def test_bytes_of_membranes(cudarun):
    neurons = 1024
    forward, backward = run(cudarun, Case("bytes", (2, neurons), v0=True, grad_v=True))
    got = per_neuron(forward, neurons)  # x, threshold, leak, v0, s, v
    assert (got[0], got[3], got[4], got[5]) == ((8, 0), (4, 0), (0, 8), (0, 4))
    got = per_neuron(backward, neurons)  # grad_s, grad_v, x, threshold, leak, v0, grad_x, grad_v0
    assert (got[0], got[1], got[2], got[5]) == ((8, 0), (4, 0), (8, 0), (4, 0))
    assert (got[6], got[7]) == ((0, 8), (0, 4))


@pytest.mark.parametrize("timesteps", [5, 17])
def test_what_every_timestep_shares_is_read_once(cudarun, timesteps):
    neurons = 1024
    forward, backward = run(cudarun, Case("bytes", (timesteps, neurons), "same"))
    assert per_neuron(forward, neurons)[0] == (4, 0)
    assert per_neuron(backward, neurons)[1] == (4, 0)
    _, backward = run(cudarun, Case("bytes", (timesteps, neurons), grad_s="same"))
    assert per_neuron(backward, neurons)[0] == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("timesteps", [1, 5, 11])
def test_bytes_of_packed_spikes(cudarun, timesteps, dtype):
    neurons = 4096
    case = Case("bytes", (timesteps, neurons), dtype=dtype)
    with cudarun.emulate(arch=90) as launches:
        lif_cases.check_packed(case, TRITON)
    (_, _, packed), (_, _, unpack) = launches
    got, row = per_neuron(packed, neurons), timesteps * dtype.itemsize
    assert (got[0], got[3]) == ((row, 0), (0, timesteps / 8))
    assert packed.by_array["arg0"]["ld_bytes"] / packed.by_array["arg0"]["ld_threads"] == 16
    assert per_neuron(unpack, neurons) == {0: (timesteps / 8, 0), 1: (0, row)}
    assert unpack.by_array["arg1"]["st_bytes"] / unpack.by_array["arg1"]["st_threads"] == 16
