"""NIR and ONNX: networks written, read and run by others give the same spikes and classes."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nir
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Network, Readout, convert, from_nir, to_nir, to_onnx
from iirsnn.conversion import NeuronConfig
from iirsnn.conversion.nir import _without_groups
from iirsnn.conversion.plain_graph import as_graph
from iirsnn.models import MembraneBlock, ModelConfig, ResidualBlock, build
from iirsnn.nn import neurons

from .networks import NETWORKS, Residual, Shuffle, images, trained_like


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def stem_and_block():
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    return [*stem, ResidualBlock(4, 6, 2, batch_norm=True)]


def networks():
    """(name, SNN at T = 1) of the package's own networks and of others."""
    torch.manual_seed(0)
    config = ModelConfig(layers=[6, "A", 8], hidden=[12], batch_norm=True)
    vgg = trained_like(build(config, 5, (3, 8, 8)))
    residual = Network([*stem_and_block(), nn.MaxPool2d(2), nn.Flatten(), Readout(24, 5)])
    blocks = [MembraneBlock(4, 4, batch_norm=True), MembraneBlock(4, 6, 2, batch_norm=True)]
    stem = [nn.Conv2d(3, 4, 3, padding=1), *blocks]
    currents = Network([*stem, nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), Readout(6, 5)])
    anns = {"vgg": vgg, "block": trained_like(residual), "currents": trained_like(currents)}
    anns |= {kind.__name__: trained_like(kind()) for kind in NETWORKS}
    x = images(16, seed=1)
    for name, ann in anns.items():
        yield name, convert(ann, x, timesteps=1).eval()
    settings = NeuronConfig(keep_batch_norm=True, per_channel=True)
    yield "kept norms", convert(anns["Residual"], x, timesteps=1, neuron=settings).eval()


@pytest.mark.parametrize(("name", "snn"), list(networks()))
@torch.no_grad()
def test_onnx_gives_the_logits_at_one_timestep(name, snn, tmp_path):
    x = images(64, seed=2)
    to_onnx(snn, tmp_path / "net.onnx", (3, 8, 8))
    logits = run(tmp_path / "net.onnx", x)
    expected = snn(x)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    close = (logits - expected).abs().amax(1) < 1e-4  # a rounding may flip a spike
    assert close.float().mean() > 0.95
    assert torch.equal(run(tmp_path / "net.onnx", x[:1]).argmax(1), expected[:1].argmax(1))


def test_a_neuron_is_greater_and_cast(tmp_path):
    snn = Network([nn.Conv2d(3, 4, 3), FusedLIF(0.5), nn.Flatten(), Readout(144, 5)])
    to_onnx(snn, tmp_path / "net.onnx", (3, 8, 8))
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds == ["Conv", "Greater", "Cast", "Flatten", "MatMul", "Add", "Identity"]


def test_what_is_no_nir_graph_or_timestep_is_refused():
    with pytest.raises(TypeError, match=r"graph: expected a nir\.NIRGraph.*, got str"):
        from_nir("net.nir", 4)
    with pytest.raises(ValueError, match=r"timesteps: expected an integer of at least 1, got 2\.5"):
        from_nir(chain(n=nir.IF(ones(), ones())), 2.5)


def test_onnx_has_no_time(tmp_path):
    snn = Network([nn.Conv2d(3, 4, 3), FusedLIF(), nn.Flatten(), Readout(144, 5)])
    snn.timesteps = 2
    with pytest.raises(ValueError, match="timesteps: expected 1 for ONNX, got 2"):
        to_onnx(snn, tmp_path / "net.onnx", (3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Residual, Shuffle])
@torch.no_grad()
def test_torch_export_gives_the_logits_at_one_timestep(kind):
    snn = convert(trained_like(kind()), images(8, seed=1), timesteps=1).eval()
    x = images(4, seed=2)
    program = torch.export.export(snn, (x,))
    torch.testing.assert_close(program.module()(x), snn(x))


# ---- NIR ----


@torch.no_grad()
def averaging(**options):
    """Average pools, a residual block, neurons of every leak; thresholds of a conversion."""
    torch.manual_seed(0)
    ann = Network(
        [
            *[*stem_and_block(), nn.AvgPool2d(2), nn.Conv2d(6, 6, 1, groups=3, bias=False)],
            *[nn.ReLU(), nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), Readout(9, 5)],
        ],
        (3, 8, 8),
    )
    snn = convert(trained_like(ann), images(8, seed=1), neuron=NeuronConfig(**options)).eval()
    for neuron in neurons(snn):
        neuron.threshold.mul_(torch.linspace(0.8, 1.2, len(neuron.threshold)))
    return snn


@pytest.mark.parametrize("leak", [1.0, 0.75])
@pytest.mark.parametrize("per_channel", [False, True])
@torch.no_grad()
def test_a_network_comes_back_from_nir(leak, per_channel, tmp_path):
    snn = averaging(leak=leak, per_channel=per_channel)
    nir.write(str(tmp_path / "net.nir"), to_nir(snn))
    graph = nir.read(str(tmp_path / "net.nir"))
    back = from_nir(graph, timesteps=4).eval()
    kind = nir.IF if leak == 1 else nir.LIF
    assert sum(isinstance(node, kind) for node in graph.nodes.values()) == 5
    assert back.image_shape == (3, 8, 8)
    x = images(16, seed=2)
    snn.timesteps = 4
    for name, one in as_graph(snn).graph_module.named_modules():
        if isinstance(one, FusedLIF):
            other = back.graph_module.get_submodule(name.replace(".", "_"))
            torch.testing.assert_close(one.leak, other.leak.expand_as(one.leak), rtol=0, atol=1e-6)
            assert torch.equal(one.threshold, other.threshold)
    same = (back(x) - snn(x) / 4).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9  # tau is float32: a rounding may flip a spike
    assert same.all() or leak != 1


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@torch.no_grad()
def test_a_convolution_of_groups_is_one_without_in_nir(kind):
    conv = kind(6, 9, 3, groups=3)
    dense = kind(6, 9, 3)
    dense.weight.copy_(_without_groups(conv.weight, 3))
    dense.bias.copy_(conv.bias)
    x = torch.randn(2, 6, *[5] * (conv.weight.dim() - 2))
    torch.testing.assert_close(dense(x), conv(x))


@torch.no_grad()
def test_a_graph_network_comes_back_from_nir():
    ann = nn.Sequential(
        *[nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)],
        *[nn.Flatten(), nn.Linear(16, 5), nn.ReLU()],
    )
    snn = convert(trained_like(ann), images(8, seed=1), timesteps=3).eval()
    back = from_nir(to_nir(snn), timesteps=3).eval()
    x = images(8, seed=2)
    torch.testing.assert_close(back(x), snn(x))


@pytest.mark.parametrize(
    ("snn", "message"),
    [
        (
            Network([nn.Conv2d(3, 4, 7), FusedLIF(), nn.MaxPool2d(2), nn.Flatten(), Readout(4, 2)]),
            "layers.2: NIR has .*; got MaxPool2d",
        ),
        (
            Network([nn.Flatten(), nn.Linear(192, 4), FusedLIF(reset="hard"), Readout(4, 2)]),
            "layers.2: NIR has .*; got reset=hard",
        ),
        (
            Network([nn.Flatten(), nn.Linear(192, 4), FusedLIF(leak=1.5), Readout(4, 2)]),
            "layers.2: NIR has .*; got leak from 1.5 to 1.5",
        ),
    ],
)
def test_what_nir_lacks_is_refused_by_name(snn, message):
    with pytest.raises(ValueError, match=message):
        to_nir(snn, (3, 8, 8))


def chain(**nodes):
    names = ["input", *nodes, "output"]
    nodes = {"input": nir.Input(np.array([4])), **nodes, "output": nir.Output(np.array([4]))}
    return nir.NIRGraph(nodes, list(pairwise(names)))


def ones(value=1.0, count=4):
    return np.full(count, value, np.float32)


@torch.no_grad()
def test_a_gain_of_nir_divides_the_threshold():
    graph = chain(lif=nir.LIF(tau=ones(4e-4), r=ones(2), v_leak=ones(0), v_threshold=ones(1.5)))
    (lif,) = neurons(from_nir(graph, 8))
    assert lif.leak.item() == pytest.approx(0.75)
    assert lif.threshold.item() == pytest.approx(1.5 / 0.5)
    (lif,) = neurons(from_nir(graph, 8, decay="exponential"))
    assert lif.leak.item() == pytest.approx(np.exp(-0.25))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            lambda: chain(li=nir.LI(tau=ones(), r=ones(), v_leak=ones(0))),
            "li: expected a node that a layer of ours equals, got LI",
        ),
        (
            lambda: chain(lif=nir.LIF(ones(1e-3), ones(), ones(0.1), ones())),
            "lif .*: expected v_leak = 0",
        ),
        (lambda: chain(n=nir.IF(r=ones(-1), v_threshold=ones())), "n: expected a threshold and a"),
        (
            lambda: nir.NIRGraph(
                {
                    **{"input": nir.Input(np.array([4])), "output": nir.Output(np.array([4]))},
                    **{"n": nir.IF(ones(), ones()), "w": nir.Linear(np.eye(4, dtype=np.float32))},
                },
                [("input", "n"), ("n", "w"), ("w", "n"), ("n", "output")],
            ),
            "expected no cycle, got one through",
        ),
    ],
)
def test_nir_graphs_that_are_refused(graph, message):
    with pytest.raises(ValueError, match=message):
        from_nir(graph())


@torch.no_grad()
def test_a_network_of_sinabs_loads():
    sl = pytest.importorskip("sinabs.layers", reason="needs sinabs: pip install 'sinabs>=3.1'")
    from sinabs.nir import to_nir as sinabs_to_nir

    torch.manual_seed(0)
    iaf = sl.IAFSqueeze(batch_size=1, spike_threshold=torch.tensor(3.0), min_v_mem=None)
    network = nn.Sequential(
        *[nn.Conv2d(3, 4, 3), iaf, sl.SumPool2d(2)],
        *[nn.Flatten(), nn.Linear(36, 5)],
    )
    graph = sinabs_to_nir(network, images(5))
    snn = from_nir(graph, 5).eval()
    x = images(1, seed=2)
    network[1].reset_states()
    expected = network(x.expand(5, -1, -1, -1)).mean(0, keepdim=True)
    # sinabs gives several spikes where a membrane has passed the threshold as often: here none has
    torch.testing.assert_close(snn(x), expected, rtol=0, atol=1e-5)


def test_a_network_of_snntorch_loads(tmp_path):
    """In a process with a nir that snnTorch can write with: sinabs holds the installed one back."""
    pytest.importorskip("snntorch")
    newer = Path(sys.prefix) / "newer-nir"
    if not newer.is_dir():
        pytest.skip(
            "snnTorch writes NIR with nir 1.0.6 or later: "
            f"pip install --no-deps --target {newer} 'nir>=1.0.8'"
        )
    script = Path(__file__).with_name("nir_of_snntorch.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(newer), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "net.nir"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    fired, different = map(int, done.stdout.split()[-2:])
    assert fired > 100, "the case says nothing"
    assert different == 0
