"""Who takes part in bench_event.py: networks, their makers, and the files of other runtimes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iirsnn import FusedLIF, Network, Readout, SharedDropout, convert
from iirsnn.conversion import fold_batch_norm
from iirsnn.event import EventNetwork
from iirsnn.models import ModelConfig, build
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder

Contender = Callable[[Tensor], object]
Draw = Callable[[int], Tensor]  # batch -> images [batch, C, H, W], new ones in every call
IMAGE = (3, 32, 32)
DENSE_FP32 = (
    "torch eager",
    "torch eager channels_last",
    "torch.compile",
    "ONNX Runtime",
    "OpenVINO",
)
DENSE_INT8 = ("ONNX Runtime int8", "OpenVINO int8")
#: What a sweep over densities runs: no minutes of compilation.
STRONGEST = (
    "events fp32",
    "events bf16",
    "events int8",
    "torch eager channels_last",
    "ONNX Runtime",
    "OpenVINO",
    *DENSE_INT8,
)


# ---- The networks ----


def at_density(name: str, density: float, pool: str) -> tuple[Network, Network]:
    """A ReLU network and an SNN at T = 1 each of whose layers spikes at `density`, random weights.

    Thresholds are the percentile of each layer's current that lets this fraction through.
    """
    generator = torch.Generator().manual_seed(0)
    ann = build(ModelConfig(name, pool=pool, batch_norm=False), 10, IMAGE).eval()
    images = torch.randn(32, *IMAGE, generator=generator)
    return ann, convert(ann, images, 100 * (1 - density), timesteps=1).eval()


def noise(batch: int) -> Tensor:
    return torch.randn(batch, *IMAGE)


def trained(run: Path, stage: int) -> tuple[Network, Network, Draw]:
    """The ReLU network and the SNN of a run, and what draws random test images."""
    folder = RunFolder.read(run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    ann = pipeline.trained("ann").eval()
    fold_batch_norm(ann)
    test = pipeline.splits.test

    def draw(batch: int) -> Tensor:
        chosen = torch.randint(len(test), (batch,)).tolist()
        return torch.stack([image for image, _ in test.__getitems__(chosen)])

    return ann, pipeline.trained(f"T{stage}").eval(), draw


# ---- The contenders ----


def torch_eager(ann: Network, layout: torch.memory_format) -> Contender:
    model = copy.deepcopy(ann).to(memory_format=layout)

    @torch.no_grad()
    def run(x: Tensor) -> object:
        return model(x.contiguous(memory_format=layout))

    return run


def torch_compile(ann: Network) -> Contender:
    from torch._inductor import config

    dense = copy.deepcopy(ann).to(memory_format=torch.channels_last)
    model = torch.compile(dense, dynamic=False)

    @torch.no_grad()
    def run(x: Tensor) -> object:
        with config.patch(freezing=True):
            return model(x.contiguous(memory_format=torch.channels_last))

    return run


def snn_in_torch(snn: Network) -> Contender:
    @torch.no_grad()
    def run(x: Tensor) -> object:
        return snn(x)

    return run


def spikingjelly(snn: Network) -> Contender:
    """The same network from SpikingJelly's multi-step layers."""
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    functional = importlib.import_module("spikingjelly.activation_based.functional")
    layer = importlib.import_module("spikingjelly.activation_based.layer")
    modules: list[nn.Module] = []
    for module in snn.layers:
        if isinstance(module, FusedLIF):
            modules.append(neuron.IFNode(module.threshold.item(), v_reset=None, step_mode="m"))
        elif not isinstance(module, SharedDropout):
            modules.append(layer.SeqToANNContainer(copy.deepcopy(module)))
    last = nn.Linear(snn.layers[-1].in_features, snn.layers[-1].out_features)
    last.load_state_dict(snn.layers[-1].state_dict())
    modules[-1] = layer.SeqToANNContainer(last)
    model = nn.Sequential(*modules).eval()

    @torch.no_grad()
    def run(x: Tensor) -> object:
        functional.reset_net(model)
        return model(x.expand(snn.timesteps, *x.shape)).sum(0)

    return run


def onnx_file(ann: Network, path: Path) -> Path:
    """The ReLU network as an ONNX file with a free batch size."""
    onnx = importlib.import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, weights, value = [], [], "images"

    def node(kind: str, inputs: list[str], **attributes) -> None:
        nonlocal value
        output = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, [value, *inputs], [output], **attributes))
        value = output

    def parameters(module: nn.Module) -> list[str]:
        names = []
        for key, tensor in module.named_parameters():
            names.append(f"p{len(weights)}.{key}")
            weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), names[-1]))
        return names

    for module in ann.layers:
        if isinstance(module, nn.Conv2d):
            pads = [*module.padding, *module.padding]
            node("Conv", parameters(module), pads=pads, strides=list(module.stride))
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            kind = "AveragePool" if isinstance(module, nn.AvgPool2d) else "MaxPool"
            size = [module.kernel_size] * 2
            node(kind, [], kernel_shape=size, strides=size)
        elif isinstance(module, (nn.Linear, Readout)):
            node("Gemm", parameters(module), transB=1)
        elif isinstance(module, (nn.ReLU, nn.Flatten)):
            node("Relu" if isinstance(module, nn.ReLU) else "Flatten", [])
        else:
            assert isinstance(module, SharedDropout), module
    shape = ["batch", *(ann.image_shape or ())]
    graph = helper.make_graph(
        nodes,
        "ann",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["batch", None])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def quantised_file(source: Path, target: Path, images: np.ndarray) -> Path:
    """The same in int8: static, per channel, calibrated on the images."""
    quantization = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, 4))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    return target


def onnx_runtime(file: Path, threads: int) -> Contender:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})


def openvino(file: Path, threads: int, precision: str, batch: int) -> Contender:
    core = importlib.import_module("openvino").Core()
    model = core.read_model(file)
    model.reshape([batch, *model.input().partial_shape.get_min_shape()[1:]])
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    return lambda x: compiled(x.numpy())


def contenders(
    ann: Network, snn: Network, batch: int, threads: int, folder: Path, only: tuple[str, ...] = ()
) -> tuple[dict[str, Contender], dict[str, EventNetwork], dict[str, str]]:
    """Those of `only` that can run (all where it is empty), the event networks, why others cannot.

    The event networks come by precision.
    """
    ann_file, int8_file = folder / "ann.onnx", folder / "int8.onnx"
    shape = tuple(ann.image_shape or ())

    def files() -> None:
        if not ann_file.exists():
            onnx_file(ann, ann_file)
        if not int8_file.exists():
            images = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
            quantised_file(ann_file, int8_file, images.numpy())

    nets = {
        precision: EventNetwork.from_model(snn, snn.timesteps, precision=precision)
        for precision in ("fp32", "bf16", "int8")
    }
    makers: dict[str, Callable[[], Contender]] = {
        **{f"events {key}": (lambda net=net: net) for key, net in nets.items()},
        "torch eager": lambda: torch_eager(ann, torch.contiguous_format),
        "torch eager channels_last": lambda: torch_eager(ann, torch.channels_last),
        "torch.compile": lambda: torch_compile(ann),
        "ONNX Runtime": lambda: (files(), onnx_runtime(ann_file, threads))[1],
        "ONNX Runtime int8": lambda: (files(), onnx_runtime(int8_file, threads))[1],
        "OpenVINO": lambda: (files(), openvino(ann_file, threads, "f32", batch))[1],
        "OpenVINO bf16": lambda: (files(), openvino(ann_file, threads, "bf16", batch))[1],
        "OpenVINO int8": lambda: (files(), openvino(int8_file, threads, "f32", batch))[1],
        "SNN in torch": lambda: snn_in_torch(snn),
        "SpikingJelly": lambda: spikingjelly(snn),
    }
    if unknown := set(only) - makers.keys():
        names, got = ", ".join(makers), ", ".join(sorted(unknown))
        raise ValueError(f"contenders: expected names among {names}, got {got}")
    made, missing = {}, {}
    for name, maker in makers.items():
        if only and name not in only:
            continue
        try:
            made[name] = maker()
            made[name](torch.randn(batch, *shape))
        except ImportError as error:
            missing[name] = str(error)
    return made, nets, missing
