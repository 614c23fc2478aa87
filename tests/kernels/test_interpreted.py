"""Every Triton kernel in Triton's interpreter, against the reference (see conftest.py)."""

import pytest
import torch
import triton
import triton.language as tl
from iirsnn.kernels import launch, tiles
from iirsnn.kernels.launch import forget_plans

from iirsnn.functional import lif
from iirsnn.ops import reference
from tests import lif_cases
from tests.lif_cases import CASES, Implementation, named

TRITON = Implementation.of("triton_", truncates=True)  # Triton's interpreter does


@named(CASES)
def test_forward(case):
    lif_cases.check_forward(case, TRITON)


@named(CASES)
def test_backward(case):
    lif_cases.check_backward(case, TRITON)


@named(CASES)
def test_packed(case):
    lif_cases.check_packed(case, TRITON)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(timesteps):
    lif_cases.check_special_values(TRITON, timesteps)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
def test_split(reset):
    lif_cases.check_split(TRITON, reset)


def test_repeats():
    lif_cases.check_repeats(TRITON)


def test_refused():
    lif_cases.check_refused(TRITON)


def test_float64_is_refused():
    one = torch.ones(1)
    with pytest.raises(TypeError, match="float64"):
        TRITON.forward(
            *(torch.ones(2, 3, dtype=torch.float64), one, one, None),
            *("soft", 0.0, True, "triangle", 0.3, False),
        )


@pytest.mark.parametrize("timesteps", [1, 3])
def test_few_programs_share_many_rows(timesteps, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    forget_plans()
    case = lif_cases.Case(
        "rows", (timesteps, 50, 70), threshold_channels=True, leak_channels=True, v0=timesteps > 1
    )
    lif_cases.check_backward(case, TRITON)


@triton.jit
def is_whole_kernel(out_ptr, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    whole = tiles.is_whole(row_block, col_block, rows, width, ROWS, COLS)
    tl.store(out_ptr + row_block * tl.num_programs(1) + col_block, whole)


@pytest.mark.parametrize(("rows", "width"), [(8, 8), (7, 8), (8, 7), (9, 9), (1, 1), (12, 16)])
def test_a_tile_is_whole_only_where_all_of_its_neurons_exist(rows, width):
    """Outputs are written without a mask then; the interpreter would not notice one too many."""
    out = torch.full((4, 4), 7, dtype=torch.int32)
    is_whole_kernel[(4, 4)](out, rows, width, ROWS=4, COLS=4)
    ends = 4 * torch.arange(1, 5)
    assert torch.equal(out.bool(), (ends[:, None] <= rows) & (ends <= width))


def test_strided_arguments():
    """Parameters and bits that are views with holes."""
    a = lif_cases.inputs(lif_cases.Case("views", (3, 2, 6, 10), threshold_channels=True))
    spread = torch.stack([a.threshold, -a.threshold], 1)[:, 0]
    how = ("soft", 0.0, True, "triangle", 0.3)
    for threshold in (a.threshold, spread):
        s, _ = TRITON.forward(a.x, threshold, a.leak, None, *how, False)
        bits, _ = TRITON.packed(a.x, threshold, a.leak, None, "soft", 0.0, False)
        grads = TRITON.backward(a.grad_s, None, a.x, threshold, a.leak, None, *how, True)
        assert torch.equal(s, reference.lif_forward(a.x, threshold, a.leak, None, *how, False)[0])
        assert torch.equal(bits, reference.pack(s))
        assert grads[1].shape == (6,)
    holes = torch.stack([bits, ~bits], 2)[:, :, 0]
    assert torch.equal(TRITON.unpack(holes, list(s.shape), list(s.stride()), s.dtype), s)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_lif_takes_cpu_tensors(timesteps):
    """functional.lif with backend="triton": spikes, gradients and bits."""
    a = lif_cases.inputs(lif_cases.Case("lif", (timesteps, 2, 6, 7), threshold_channels=True))

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in (a.x, a.threshold)]
        s = lif(*leaves, 0.8, surrogate="atan", backend=backend)
        return s, *torch.autograd.grad(s, leaves, a.grad_s)

    got, wanted = run("triton"), run("reference")
    assert torch.equal(got[0], wanted[0])
    for g, w in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    packed = lif(a.x, a.threshold, 0.8, packed=True, backend="triton")
    assert torch.equal(packed.unpack(backend="triton"), got[0])


def test_no_second_derivative():
    x = torch.randn(2, 8, requires_grad=True)
    s = lif(x, backend="triton")
    (grad,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
