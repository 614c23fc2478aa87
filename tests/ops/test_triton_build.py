"""What the compilers make of the Triton kernels, read from the machine code: no GPU is needed."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._library.triton import set_wrap_triton_enabled

triton = pytest.importorskip("triton", reason="triton is not installed")

from iirsnn.kernels import lif, lif_backward, packed, single_step  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.lif_cases import Case, Implementation, inputs, options  # noqa: E402

ARCHITECTURES = [80, 90, 100, 120]
TRITON = Implementation.of("triton_")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.float64: "fp64",
    torch.int32: "i32",
}
CHANNELS = {"threshold_channels": True, "leak_channels": True}
CASES = [
    Case("T=1", (1, 4096)),
    Case("T=5", (5, 4096)),
    Case("bfloat16 T=1", (1, 4096), dtype=torch.bfloat16),
    Case("bfloat16 T=8", (8, 4096), dtype=torch.bfloat16),
    Case("channels_last", (3, 2, 64, 8, 8), "channels_last", **CHANNELS),
]
MORE = [
    Case("T=8", (8, 4096), v0=True, grad_v=True),
    Case("T=17", (17, 4096), v0=True, grad_v=True),
    Case("bfloat16 T=5", (5, 4096), dtype=torch.bfloat16),
    Case("float16 T=2", (2, 4096), dtype=torch.float16),
    Case("attached atan", (4, 4096), reset="soft_delayed", detach=False, surrogate="atan"),
    Case("attached hard", (4, 4096), reset="hard", detach=False, surrogate="sigmoid"),
    Case("channels", (3, 2, 8, 16, 16), **CHANNELS),
]
COMPILED = [*((arch, c) for arch in ARCHITECTURES for c in CASES), *((90, c) for c in MORE)]


def for_arch(arch, *case, name):
    """A case of a test: of sm_100 and sm_120, mostly the code of sm_90, for `make test-slow`."""
    return pytest.param(arch, *case, id=name, marks=[pytest.mark.slow] if arch > 90 else [])


def compile_launches(monkeypatch, arch, call, replace=lambda kernel: kernel):
    """The kernels that call() would launch, compiled for arch: {name: CompiledKernel}."""
    kernels = {}

    def run(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        launch = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        signature, constants, hints = {}, {}, {}
        for i, p in enumerate(self.params):
            value = bound[p.name]
            if p.is_constexpr or value is None:
                signature[p.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name] = "*" + TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    hints[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if value < 2**31 else "i64"
        fn = replace(self)
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=hints)
        target = GPUTarget("cuda", arch, 32)
        kernels[self.fn.__name__] = triton.compile(source, target=target, options=launch)

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return kernels


def tool(name: str) -> str:
    """A CUDA binary utility: of the triton wheel, else of the toolkit on PATH."""
    found = TOOLS / name
    where = str(found) if found.exists() else shutil.which(name)
    if where is None:
        pytest.skip(f"needs {name}: it is neither in the triton wheel nor on PATH")
    return where


def global_accesses(kernel, folder: Path, stack: int = 0) -> tuple[list[int], list[int]]:
    """Bits of every global load and store in the machine code, which may use `stack` bytes."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = output(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    resources = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert resources["LOCAL"] == 0
    assert resources["STACK"] <= stack
    assert 0 < resources["REG"] < 255
    sass = output(tool("nvdisasm"), "-c", str(cubin))
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) <= stack // 2

    def bits(mnemonic: str) -> list[int]:
        modifiers = re.findall(rf"\b{mnemonic}\.E(\S*)", sass)
        widths = (re.search(r"\.[SU]?(128|64|16|8)\b", m) for m in modifiers)
        return [int(w[1]) if w else 32 for w in widths]

    return bits("LDG"), bits("STG")


@pytest.mark.parametrize(
    ("arch", "case"),
    [for_arch(arch, case, name=f"sm_{arch} {case.name}") for arch, case in COMPILED],
)
@pytest.mark.parametrize("sums", [False, True])
def test_nothing_spills_and_accesses_are_wide(monkeypatch, tmp_path, arch, case, sums):
    """All but parameters (2 loads) moves 16 bytes at a time, sums over programs (doubles) not."""
    a = inputs(case)

    def call():
        TRITON.forward(a.x, a.threshold, a.leak, a.v0, *options(case), case.v0)
        tensors = a.grad_s, a.grad_v, a.x, a.threshold, a.leak, a.v0
        TRITON.backward(*tensors, *options(case), sums)

    timesteps = case.shape[0]
    for name, kernel in compile_launches(monkeypatch, arch, call).items():
        # From T = 8 on, and where a hard reset has a gradient, ptxas may park up to 4 registers
        # outside the loop for one more block per processor.
        parks = timesteps >= 8 or case.name == "attached hard"
        stack = 16 if name == "lif_backward_kernel" and parks else 0
        loads, stores = global_accesses(kernel, tmp_path, stack)
        if sums and "backward" in name:  # two gradients, one by two ways, and two counters
            loads, stores = ([bits for bits in moved if bits != 64] for moved in (loads, stores))
            assert sum(bits != 128 for bits in stores) <= 5
        else:
            assert set(stores) == {128}
        assert sum(bits != 128 for bits in loads) <= 2
        if name == "lif_forward_kernel" and timesteps <= 8 and case.layout == "contiguous":
            membranes = int(case.v0)
            assert loads.count(128) == stores.count(128) == timesteps + membranes


@pytest.mark.parametrize("arch", [for_arch(arch, name=f"sm_{arch}") for arch in ARCHITECTURES])
@pytest.mark.parametrize("timesteps", [1, 5])
def test_packed_accesses_are_wide(monkeypatch, tmp_path, arch, timesteps):
    """Currents and unpacked spikes move 16 bytes at a time; bits are 1/32 of them."""
    a = inputs(Case("packed", (timesteps, 4096)))

    def call():
        bits, _ = TRITON.packed(a.x, a.threshold, a.leak, None, "soft", 0.0, False)
        TRITON.unpack(bits, a.x.shape, a.x.stride(), a.x.dtype)

    kernels = compile_launches(monkeypatch, arch, call)
    loads, _ = global_accesses(kernels["lif_packed_kernel"], tmp_path)
    assert loads.count(128) == {1: 4, 5: 5}[timesteps]
    assert sum(bits != 128 for bits in loads) <= 2
    _, stores = global_accesses(kernels["unpack_kernel"], tmp_path)
    assert set(stores) == {128}


@pytest.mark.parametrize("timesteps", [1, 11])
@pytest.mark.parametrize("channels", [1, 4])
def test_sizes_beyond_32_bits_compile(monkeypatch, timesteps, channels):
    """Sizes come as 64-bit arguments where they need to: every kernel takes them too."""
    shape = (timesteps, 2**29 + 1, channels, 3)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(channels, device="meta")

    def call():
        if timesteps == 1:
            single_step.single_step_forward(x, p)
            single_step.single_step_backward(x, x, p, "atan", 2.0, True)
        lif.lif_forward(x, p, p, None, "soft", 0.0, True)
        lif_backward.lif_backward(
            x, x[0].float(), x, p, p, x[0].float(), "hard", 0.0, False, "boxcar", 0.5, True
        )
        bits, _ = packed.lif_packed(x, p, p, None, "soft_delayed", 0.0, True)
        packed.unpack_spikes(bits, x.shape, x.stride(), torch.float16)

    with set_wrap_triton_enabled(False):  # as an op has it that is not being traced
        kernels = compile_launches(monkeypatch, 90, call)
    assert len(kernels) == (6 if timesteps == 1 else 4)
