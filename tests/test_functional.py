"""functional.lif: layouts, checks, backends, autograd, torch.compile, export, autocast."""

import ctypes
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from iirsnn import FusedLIF, Network, Readout
from iirsnn.functional import lif
from iirsnn.ops import backend, reference


class Ops(TorchDispatchMode):
    """Records the iirsnn ops that run, with the layout of their x, and every other op's name."""

    def __init__(self):
        super().__init__()
        self.iirsnn = []
        self.others = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("iirsnn::"):
            x = args[2] if name == "iirsnn::lif_backward" else args[0]
            self.iirsnn.append((name.removeprefix("iirsnn::"), x.dtype, x.stride(), x.data_ptr()))
        else:
            self.others.append(name)
        return func(*args, **(kwargs or {}))


def channels_last(x):
    """[T, B, C, H, W] with C innermost."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "the same current at every timestep": lambda x: x[:1].expand(x.shape),
    "a slice of time": lambda x: torch.cat([x, x])[::2],
    "from the middle of a batch-first tensor": lambda x: torch.stack([x, x], 1)[:, 0],
}
COPIED = {
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded neurons": lambda x: x[..., :1].expand(x.shape),
    "time backwards in place": lambda x: x.flatten()[: x[0].numel() + 4].as_strided(
        x.shape, (1, *x.stride()[1:])
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_layout_is_read_in_place_and_kept(layout):
    x = LAYOUTS[layout](torch.randn(3, 2, 4, 5, 6) + 0.5)
    with Ops() as ops:
        s = lif(x, 0.8, 0.9)
    assert ops.iirsnn == [("lif_forward", x.dtype, x.stride(), x.data_ptr())]
    assert s.stride() == (x[0].numel(), *x.stride()[1:])
    assert torch.equal(s, lif(x, 0.8, 0.9, backend="reference"))


@pytest.mark.parametrize("layout", COPIED)
def test_any_other_layout_is_copied_once(layout):
    x = COPIED[layout](torch.randn(3, 2, 4, 5, 6) + 0.5)
    with Ops() as ops:
        s = lif(x, 0.8, 0.9)
    assert [(name, stride) for name, _, stride, _ in ops.iirsnn] == [
        ("lif_forward", x.contiguous().stride())
    ]
    assert ops.others.count("aten::clone") == 1
    assert torch.equal(s, lif(x, 0.8, 0.9, backend="reference"))


@pytest.mark.parametrize(
    "shape", [(1, 1), (5,), (4, 0, 3), (3, 1), (2, 7, 1, 1, 1), (9, 1025)], ids=str
)
def test_odd_tiny_and_empty_shapes(shape):
    x = torch.randn(shape) + 0.5
    s, v = lif(x, return_v=True)
    s_ref, v_ref = lif(x, return_v=True, backend="reference")
    assert s.shape == x.shape
    assert v.shape == x.shape[1:]
    assert torch.equal(s, s_ref)
    assert torch.equal(v, v_ref)


def test_one_timestep_is_a_comparison():
    x = torch.randn(1, 1000)
    assert torch.equal(lif(x, 0.3, 0.5), (x > 0.3).float())


def test_parameters_may_be_numbers_scalars_or_per_channel_and_of_any_float_dtype():
    x = torch.randn(3, 2, 4, 5) + 0.5
    expected = lif(x, torch.full((4,), 0.75), torch.full((4,), 0.5))
    for threshold in (0.75, torch.tensor(0.75), torch.tensor([0.75]).half()):
        for leak in (0.5, torch.tensor([[0.5]]).double(), torch.full((4, 1), 0.5)):
            assert torch.equal(lif(x, threshold, leak), expected)


def test_gradients_reach_parameters_of_any_shape_and_dtype():
    x = torch.randn(3, 2, 4, 5) + 0.5
    threshold = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    leak = torch.full((4, 1), 0.5, requires_grad=True)
    lif(x, threshold, leak).sum().backward()
    assert threshold.grad.shape == ()
    assert threshold.grad.dtype == torch.float64
    assert threshold.grad != 0
    assert leak.grad.shape == (4, 1)
    assert leak.grad.abs().min() > 0


@pytest.mark.parametrize("wanted", ["x", "threshold", "leak", "v0"])
def test_each_gradient_can_be_asked_for_alone(wanted):
    tensors = {
        "x": torch.randn(4, 2, 3, dtype=torch.float64) + 0.4,
        "threshold": torch.tensor([0.9], dtype=torch.float64),
        "leak": torch.tensor([0.8], dtype=torch.float64),
        "v0": torch.randn(2, 3, dtype=torch.float64),
    }
    tensors[wanted].requires_grad_()
    grads = []
    for name in ("cpu", "reference"):
        s, v = lif(**tensors, return_v=True, backend=name)
        (grad,) = torch.autograd.grad(s.square().sum() + v.sum(), tensors[wanted])
        grads.append(grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_membrane_alone():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    _, v = lif(x, return_v=True)
    (got,) = torch.autograd.grad(v.sum(), x)
    _, v = lif(x, return_v=True, backend="reference")
    (wanted,) = torch.autograd.grad(v.sum(), x)
    torch.testing.assert_close(got, wanted)


def test_a_gradient_that_is_the_same_everywhere_or_in_another_layout():
    x = channels_last(torch.randn(3, 2, 4, 5, 6)).requires_grad_()
    weight = torch.randn(2, 4, 5, 6)
    for loss in (
        lambda s: s.sum(),
        lambda s: (s.mean(0) * weight).sum(),
        lambda s: (s * weight).sum(),
    ):
        (got,) = torch.autograd.grad(loss(lif(x)), x)
        (wanted,) = torch.autograd.grad(loss(lif(x, backend="reference")), x)
        torch.testing.assert_close(got, wanted)
        assert got.stride() == x.stride()


def test_gradcheck_where_the_function_is_smooth():
    # without reset the membrane is smooth in everything but the threshold
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    leak = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    v0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: lif(a[0], 1.0, a[1], a[2], reset="none", return_v=True)[1], (x, leak, v0)
    )


@pytest.mark.parametrize("reset", reference.RESETS)
def test_a_split_sequence_equals_the_whole_forward_and_backward(reset):
    x = (torch.randn(11, 2, 3, 8, dtype=torch.float64) + 0.4).requires_grad_()
    threshold = torch.tensor([0.8, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    leak = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64, requires_grad=True)
    how = {"reset": reset, "detach_reset": False, "surrogate": "atan", "return_v": True}
    weight = torch.randn(11, 2, 3, 8, dtype=torch.float64)
    wanted = (x, threshold, leak)

    s, v = lif(x, threshold, leak, **how)
    whole = torch.autograd.grad((s * weight).sum() + v.sum(), wanted)
    pieces, v_piece = [], None
    for piece in x.split([1, 4, 6]):
        s_piece, v_piece = lif(piece, threshold, leak, v_piece, **how)
        pieces.append(s_piece)
    split = torch.autograd.grad((torch.cat(pieces) * weight).sum() + v_piece.sum(), wanted)
    assert torch.equal(torch.cat(pieces), s)
    assert torch.equal(v_piece, v)
    for got, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_v0", [False, True], ids=["", "v0"])
@pytest.mark.parametrize("timesteps", [1, 4, 40])
def test_only_the_arguments_are_kept_for_backward(timesteps, with_v0):
    x = torch.randn(timesteps, 64, requires_grad=True)
    threshold = torch.ones(1, requires_grad=True)
    leak = torch.ones(1, requires_grad=True)
    v0 = torch.randn(64, requires_grad=True) if with_v0 else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lif(x, threshold, leak, v0, return_v=True)
    own = {t.data_ptr() for t in (x, threshold, leak, v0) if t is not None}
    assert {t.data_ptr() for t in kept} == own


def peak_growth(run):
    """By how many bytes the process's resident memory grew, at its highest, while `run` ran."""

    def status(key):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {key} in /proc/self/status")

    run()  # whatever is set up once is set up now
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there for the taking
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    result = run()
    growth = status("VmHWM") - before
    del result
    return growth


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="no /proc/self/clear_refs to measure peak memory with; run on Linux",
)
@pytest.mark.parametrize("timesteps", [1, 4, 8, 20])
def test_no_membrane_sequence_is_ever_allocated(timesteps):
    size = 24 << 20  # bytes of x, of s, of a membrane sequence
    x = torch.ones(timesteps, size // 4 // timesteps, requires_grad=True)
    slack = size // 4
    assert size - slack < peak_growth(lambda: lif(x)) < size + slack

    s = lif(x)
    grad_s = torch.ones_like(s)
    backward = lambda: torch.autograd.grad(s, x, grad_s, retain_graph=True)  # noqa: E731
    assert size - slack < peak_growth(backward) < size + slack
    # the measure does see such memory: the reference keeps at least one more [T, N]
    assert peak_growth(lambda: lif(x, backend="reference")) > 2 * size - slack


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, r"x: expected a tensor \[T, \*neurons\], got list"),
        ({"x": torch.ones(2, 3).int()}, TypeError, "x: expected float32, .* got torch.int32"),
        ({"x": torch.ones(0, 3)}, ValueError, r"x: expected shape \[T, \*neurons\] with T >= 1"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape .* got \(\)"),
        ({"threshold": 0.0}, ValueError, "threshold: expected a finite number > 0, got 0.0"),
        ({"threshold": -1}, ValueError, "threshold: expected a finite number > 0, got -1"),
        ({"threshold": torch.zeros(1)}, ValueError, "threshold: expected finite values > 0, got 0"),
        ({"threshold": torch.ones(4)}, ValueError, r"threshold: expected 1 element, or C .*\(4,\)"),
        ({"x": torch.ones(2, 3, 0), "threshold": torch.ones(0)}, ValueError, r"or C .* got \(0,\)"),
        (
            {"x": torch.ones(2, 3, 0), "threshold": torch.ones(0), "leak": torch.ones(0)},
            ValueError,
            r"threshold: expected 1 element, or C .* got \(0,\)",
        ),
        ({"threshold": torch.ones(1).int()}, TypeError, "threshold: expected a floating point"),
        ({"leak": math.nan}, ValueError, "leak: expected a finite number, got nan"),
        ({"leak": torch.tensor(math.inf)}, ValueError, "leak: expected finite values, got inf"),
        ({"leak": torch.ones(3, device="meta")}, ValueError, "leak: expected a tensor on cpu"),
        ({"v0": 0.5}, TypeError, r"v0: expected a tensor \[\*neurons\], got float"),
        ({"v0": torch.ones(2)}, ValueError, r"v0: expected shape \(2, 3\) on cpu, got \(2,\)"),
        (
            {"v0": torch.ones(2, 3) + 1j},
            TypeError,
            "v0: expected a real tensor, got torch.complex64",
        ),
        ({"reset": "sharp"}, ValueError, "reset: expected one of soft, hard, .* got 'sharp'"),
        ({"v_reset": math.inf}, ValueError, "v_reset: expected a finite number, got inf"),
        ({"surrogate": "spline"}, ValueError, "surrogate: expected one of .* got 'spline'"),
        ({"surrogate_scale": 0.0}, ValueError, "surrogate_scale: expected a finite number > 0"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of auto, .* got 'tpu'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(arguments, error, message):
    good = {"x": torch.ones(5, 2, 3)}
    lif(**good)
    with pytest.raises(error, match=message):
        lif(**good | arguments)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_asked_for_by_name_runs_or_raises(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"backend: expected one that can run, got '{name}'"):
        lif(torch.ones(2, 3), backend=name)


def test_auto_takes_the_compiled_kernels():
    with Ops() as ops:
        lif(torch.ones(2, 3))
    assert [name for name, *_ in ops.iirsnn] == ["lif_forward"]


def test_without_kernels_auto_warns_once_and_names_reason_and_cure(monkeypatch):
    monkeypatch.setattr(backend, "_compiled_reason", {"import": "iirsnn._C is not compiled"})
    monkeypatch.setattr(backend, "_direct", {})
    monkeypatch.setattr(backend, "_warned", set())
    x = torch.randn(3, 10)
    with pytest.warns(
        RuntimeWarning, match=r"iirsnn._C is not compiled.*Cure: `pip install"
    ) as seen:
        s = lif(x)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lif(x), s)
        assert torch.equal(lif(x, backend="reference"), s)
    with pytest.raises(RuntimeError, match=r"got 'cpu': iirsnn\._C is not compiled"):
        lif(x, backend="cpu")


def test_meta_tensors_give_shapes():
    s, v = lif(torch.empty(3, 2, 4, device="meta"), return_v=True)
    assert (s.device.type, s.shape, v.shape) == ("meta", (3, 2, 4), (2, 4))


def model(x, threshold, leak):
    s, v = lif(x * 2, threshold, leak, return_v=True)
    return s * 3, v


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_with_dynamic_time_and_batch(compiler):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    threshold = torch.tensor([0.9], requires_grad=True)
    leak = torch.tensor([0.8], requires_grad=True)
    for timesteps, batch in ((3, 4), (5, 2), (2, 6)):
        x = torch.randn(timesteps, batch, 3, 4, requires_grad=True)
        results = []
        for f in (compiled, model):
            s, v = f(x, threshold, leak)
            grads = torch.autograd.grad(s.sum() + v.square().sum(), (x, threshold, leak))
            results.append((s, v, *grads))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    # a learned value that changes is read from memory, not compiled in
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad():
            threshold.fill_(1.5)
        assert torch.equal(compiled(x, threshold, leak)[0], model(x, threshold, leak)[0])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("surrogate", ["triangle", "atan"])
def test_plain_operators_in_compiled_code(compiler, surrogate, monkeypatch):
    """What torch.compile is given for a GPU at T = 1: the spikes and grad_x of the kernels."""
    monkeypatch.setitem(backend.PLAIN_IN_COMPILED_CODE, "cpu", 1)
    torch.compiler.reset()

    def layer(x, threshold, leak):
        return lif(x * 2, threshold, leak, surrogate=surrogate) * 0.5

    graphs = []

    def seen(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=seen, dynamic=False)
    threshold = torch.tensor([0.9, 1.1, 0.7, 1.3], requires_grad=True)
    leak = torch.tensor([0.8], requires_grad=True)
    for timesteps, plain in ((1, True), (2, False)):
        x = torch.randn(timesteps, 3, 4, 6, 5, requires_grad=True)
        results = []
        for f in (compiled, layer):
            s = f(x, threshold, leak)
            leaves = (x, threshold, leak)
            grads = torch.autograd.grad(s, leaves, torch.ones_like(s) / 3, allow_unused=True)
            results.append((s, *grads))
        assert ("iirsnn" in graphs[-1]) != plain
        (s, grad_x, *grads), (s_eager, grad_x_eager, *grads_eager) = results
        assert torch.equal(s, s_eager)
        assert torch.equal(grad_x, grad_x_eager)
        for got, wanted in zip(grads, grads_eager, strict=True):
            got, wanted = (torch.zeros(()) if g is None else g for g in (got, wanted))
            torch.testing.assert_close(got, wanted.reshape(got.shape))


def test_only_auto_and_no_membrane_is_plain_in_compiled_code():
    x = torch.empty(1, 3, device="meta")
    for table in ({"meta": 1}, {"meta": 0}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "PLAIN_IN_COMPILED_CODE", table)
            chosen = [
                backend.choose_compiled(*arguments).forward is reference.lif_forward
                for arguments in (
                    ("auto", x, None),
                    ("cpu", x, None),
                    ("auto", x, x[0]),
                    ("auto", x.expand(2, 3), None),
                )
            ]
            assert chosen == [table["meta"] == 1, False, False, False]


def test_compiled_reference_and_packed():
    x = torch.randn(3, 4, 5)
    compiled = torch.compile(
        lambda x: (lif(x, backend="reference"), lif(x, packed=True).unpack()),
        fullgraph=True,
        backend="aot_eager",
    )
    for s in compiled(x):
        assert torch.equal(s, lif(x))


def test_compiled_channels_last_keeps_its_layout():
    torch.compiler.reset()
    x = channels_last(torch.randn(2, 3, 4, 5, 5))
    s = torch.compile(lif, fullgraph=True, backend="inductor")(x)
    assert s.stride() == x.stride()
    assert torch.equal(s, lif(x))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor([0.9]))
        self.leak = torch.nn.Parameter(torch.tensor([0.8]))

    def forward(self, x):
        return lif(x, self.threshold, self.leak)


def test_exported_with_dynamic_time_and_batch():
    net = Net()
    shapes = {"x": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    program = torch.export.export(net, (torch.randn(3, 4, 5),), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "iirsnn.lif_forward.default" in targets
    for shape in ((3, 4, 5), (7, 2, 5)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), net(x))


def test_compiled_ahead_of_time(tmp_path):
    """By AOTInductor, into a file that runs without this module: the same bits."""
    network = Network([nn.Conv2d(3, 4, 3), FusedLIF(), nn.Flatten(), Readout(144, 5)]).eval()
    network.timesteps = 3
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "network.pt2"),
            inductor_configs={  # half of the time, for one file that is compiled once
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "aot_inductor.precompile_headers": False,
            },
        )
        loaded = torch._inductor.aoti_load_package(path)
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_fused_in_the_half_dtype(dtype):
    linear = torch.nn.Linear(6, 8)
    threshold = torch.ones(1, requires_grad=True)
    x = torch.randn(3, 4, 6)
    with Ops() as ops:
        with torch.autocast("cpu", dtype=dtype):
            s = lif(linear(x), threshold)
        s.sum().backward()
    assert s.dtype == dtype
    assert [(name, got) for name, got, *_ in ops.iirsnn] == [
        ("lif_forward", dtype),
        ("lif_backward", dtype),
    ]
    assert threshold.grad.dtype == torch.float32
    assert linear.weight.grad.abs().sum() > 0


def test_inference_keeps_nothing():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not lif(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(lif(x), lif(x.detach()))
