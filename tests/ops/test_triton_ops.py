"""The Triton ops as torch sees them: schemas, export, and the source torch.compile takes over.

None of this launches a kernel. opcheck and torch.compile do: see tests/ptx and tests/gpu.
"""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

pytest.importorskip("triton", reason="triton is not installed")

from tests.lif_cases import Case, Implementation, inputs
from tests.ops.test_triton_build import compile_launches

NAMES = ["lif_forward", "lif_backward", "lif_packed", "unpack_spikes"]
TRITON = Implementation.of("triton_")


def forward(x, threshold, leak, v0=None, return_v=False):
    return TRITON.forward(x, threshold, leak, v0, "soft", 0.0, True, "triangle", 0.3, return_v)


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_that_of_the_op_it_twins(name):
    twin, original = (
        str(getattr(torch.ops.iirsnn, prefix + name).default._schema) for prefix in ("triton_", "")
    )
    assert (
        twin.partition("(")[2].partition(") ->")[0]
        == original.partition("(")[2].partition(") ->")[0]
    )


def test_export_with_dynamic_time_and_batch():
    class Layer(torch.nn.Module):
        def forward(self, x, threshold, leak):
            return forward(x, threshold, leak)[0]

    a = inputs(Case("export", (5, 4, 32)))
    shapes = ({0: Dim("T", min=1, max=64), 1: Dim("B", min=1, max=512)}, None, None)
    program = export(Layer(), (a.x, a.threshold, a.leak), dynamic_shapes=shapes)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.iirsnn.triton_lif_forward.default in called


def test_fake_cuda_tensors():
    with FakeTensorMode():
        x = torch.empty(5, 2, 6, 4, 4, device="cuda").to(memory_format=torch.channels_last_3d)
        x = torch.empty(5, 2, 4, 4, 6, device="cuda", dtype=torch.bfloat16).permute(0, 1, 4, 2, 3)
        one = torch.ones(6, device="cuda", requires_grad=True)
        s, v = forward(x, one, one, None, True)
        assert (s.device.type, s.dtype, s.stride()) == ("cuda", torch.bfloat16, x.stride())
        assert (v.dtype, v.stride()) == (torch.float32, x.stride()[1:])
        assert s.requires_grad
        bits, _ = TRITON.packed(x, one, one, None, "soft", 0.0, False)
        assert bits.shape == (5, 24)
        assert TRITON.unpack(bits, x.shape, x.stride(), x.dtype).stride() == x.stride()


@pytest.mark.parametrize("timesteps", [1, 11])
def test_source_that_inductor_copies_is_complete(monkeypatch, tmp_path, timesteps):
    """Inductor copies a kernel and what it calls into a file of its own: that must compile too."""
    wrapper = pytest.importorskip(
        "torch._inductor.codegen.wrapper", reason="torch has no Inductor here"
    )
    collect = wrapper.user_defined_triton_kernel_transitive_closure_source_code
    a = inputs(Case("inductor", (timesteps, 256)))

    def call():
        s, _ = forward(a.x, a.threshold, a.leak)
        TRITON.backward(
            *(s, None, a.x, a.threshold, a.leak, None),
            *("soft", 0.0, False, "sigmoid", 4.0, True),
        )
        TRITON.packed(a.x, a.threshold, a.leak, None, "hard", 0.5, False)

    def copied(kernel):
        path = tmp_path / f"{kernel.__name__}.py"
        head = "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        path.write_text(head + collect(kernel))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, kernel.__name__)

    assert len(compile_launches(monkeypatch, 90, call, copied)) == 3
