"""Networks of other libraries before and after `replace_neurons`: spikes, losses, time of a step.

    python benchmarks/replace_neurons.py neurons          every kind of neuron, checked
    python benchmarks/replace_neurons.py network NAME     one of NETWORKS, compared and timed
    python benchmarks/replace_neurons.py report           the tables of docs/replace_neurons.md

Each writes its part of --json. Images are random; both networks start from the same weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, machine
from torch import Tensor, nn

from iirsnn import replace_neurons
from iirsnn.conversion import Replacement
from iirsnn.measure.provenance import commit

BASED = "spikingjelly.activation_based"
STEPS = 10
SECONDS = 15.0  # of timing, after which no new round begins


@dataclass(frozen=True)
class Network:
    """A model, its images, and how it is called: class scores [B, classes]."""

    package: str
    model: nn.Module
    images: Tensor
    scores: Callable[[nn.Module, Tensor], Tensor]
    what: str


# ---- The networks ----


def csnn() -> Network:
    example = importlib.import_module(f"{BASED}.examples.conv_fashion_mnist")
    reset_net = importlib.import_module(f"{BASED}.functional").reset_net

    def scores(model: nn.Module, images: Tensor) -> Tensor:
        reset_net(model)
        return model(images)

    return Network(
        "spikingjelly",
        example.CSNN(T=4, channels=64),
        torch.rand(16, 1, 28, 28),
        scores,
        "CSNN of its examples, 64 channels, T = 4, 16 images of 28x28",
    )


def sew_resnet() -> Network:
    functional = importlib.import_module(f"{BASED}.functional")
    neuron = importlib.import_module(f"{BASED}.neuron")
    surrogate = importlib.import_module(f"{BASED}.surrogate")
    model = importlib.import_module(f"{BASED}.model.sew_resnet").sew_resnet18(
        pretrained=False,
        cnf="ADD",
        num_classes=10,
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(model, "m")

    def scores(model: nn.Module, images: Tensor) -> Tensor:
        functional.reset_net(model)
        return model(images.expand(4, *images.shape)).mean(0)

    return Network(
        "spikingjelly",
        model,
        torch.rand(4, 3, 64, 64),
        scores,
        "sew_resnet18, IFNode, ATan, detached reset, T = 4, 4 images of 64x64",
    )


class Unrolled(nn.Module):
    """Two layers of Leaky, one call a timestep, as in snnTorch's tutorials."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        leaky = importlib.import_module("snntorch").Leaky
        self.timesteps = timesteps
        self.hidden, self.lif_hidden = nn.Linear(784, 1000), leaky(beta=0.95)
        self.out, self.lif_out = nn.Linear(1000, 10), leaky(beta=0.95)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        v_hidden, v_out = self.lif_hidden.init_leaky(), self.lif_out.init_leaky()
        membranes = []
        for _ in range(self.timesteps):
            s, v_hidden = self.lif_hidden(self.hidden(x), v_hidden)
            _, v_out = self.lif_out(self.out(s), v_out)
            membranes.append(v_out)
        return torch.stack(membranes).mean(0)


def unrolled() -> Network:
    return Network(
        "snntorch",
        Unrolled(25),
        torch.rand(128, 1, 28, 28),
        lambda model, images: model(images),
        "784-1000-10 of Leaky, T = 25, 128 images of 28x28",
    )


def norse_sequential() -> Network:
    norse = importlib.import_module("norse.torch")
    fast = norse.LIFParameters(tau_mem_inv=torch.tensor(400.0))
    model = norse.SequentialState(
        norse.Lift(nn.Conv2d(1, 32, 5)),
        norse.LIF(fast),
        norse.Lift(nn.MaxPool2d(2)),
        norse.Lift(nn.Conv2d(32, 32, 5)),
        norse.LIF(fast),
        nn.Flatten(2),
        nn.Linear(32 * 64, 10),
        norse.LI(),
    )
    return Network(
        "norse",
        model,
        torch.rand(16, 1, 28, 28),
        lambda model, images: model(4 * images.expand(8, *images.shape))[0].mean(0),
        "SequentialState, two convolutions with LIF, T = 8, 16 images of 28x28",
    )


def sinabs_sequential() -> Network:
    sinabs = importlib.import_module("sinabs")
    layers = importlib.import_module("sinabs.layers")
    single = importlib.import_module("sinabs.activation").SingleSpike
    model = nn.Sequential(
        layers.FlattenTime(),
        nn.Conv2d(1, 32, 5),
        layers.IAFSqueeze(batch_size=16, spike_fn=single),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 5),
        layers.LIFSqueeze(tau_mem=8.0, batch_size=16, spike_fn=single),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
        layers.UnflattenTime(batch_size=16),
    )

    def scores(model: nn.Module, images: Tensor) -> Tensor:
        sinabs.reset_states(model)
        return model(4 * images[:, None].expand(-1, 8, -1, -1, -1)).mean(1)

    return Network(
        "sinabs",
        model,
        torch.rand(16, 1, 28, 28),
        scores,
        "Sequential, convolutions with IAFSqueeze and LIFSqueeze, SingleSpike, T = 8, 16 images "
        "of 28x28",
    )


NETWORKS: dict[str, Callable[[], Network]] = {
    "csnn": csnn,
    "sew_resnet18": sew_resnet,
    "snntorch": unrolled,
    "norse": norse_sequential,
    "sinabs": sinabs_sequential,
}


# ---- Compared ----


def spikes_of(model: nn.Module, names: list[str], forward: Callable[[], Any]) -> list[Tensor]:
    """What the neurons of these names put out in one forward pass, in the order of the calls."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return found


class Training:
    """Steps of SGD on one batch."""

    def __init__(self, network: Network, model: nn.Module) -> None:
        self.network, self.model = network, model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.labels = torch.arange(len(network.images)) % 10

    def step(self) -> float:
        scores = self.network.scores(self.model, self.network.images)
        loss = nn.functional.cross_entropy(scores, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def medians(trainings: list[Training]) -> list[tuple[list[float], float]]:
    """Losses of the first STEPS steps, and the median CPU time in ms, of steps taken in turns.

    CPU time of one thread is the time of an idle machine, on a busy one as well.
    """
    torch.set_num_threads(1)
    losses: list[list[float]] = [[] for _ in trainings]
    times: list[list[float]] = [[] for _ in trainings]
    end = time.perf_counter() + SECONDS
    while len(losses[0]) < STEPS or time.perf_counter() < end:
        for each, loss, ms in zip(trainings, losses, times, strict=True):
            start = time.process_time()
            loss.append(each.step())
            ms.append(1e3 * (time.process_time() - start))
    return [
        (loss[:STEPS], statistics.median(ms[2:])) for loss, ms in zip(losses, times, strict=True)
    ]


def compared(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    before = network.model
    after = copy.deepcopy(before)
    table = replace_neurons(after)
    print(table)
    names = [row.name for row in table.replaced]
    pairs = zip(
        *(
            spikes_of(model, names, lambda model=model: network.scores(model, network.images))
            for model in (before, after)
        ),
        strict=True,
    )
    differ = spikes = fired = 0
    for s, s_after in pairs:
        differ += int((s != s_after).sum())
        fired += int((s != 0).sum())
        spikes += s.numel()
    results = medians([Training(network, before), Training(network, after)])
    (losses, ms), (losses_after, ms_after) = results
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses, losses_after, strict=True))
    return {
        "what": network.what,
        "library": f"{network.package} {version(network.package)}",
        "replaced": len(table.replaced),
        "left": [f"{row.name} {row.original}: {row.reason}" for row in table.left],
        "spikes": spikes,
        "fired": fired,
        "spikes_that_differ": differ,
        "first_loss": losses[0],
        "loss_after_ten_steps": [losses[-1], losses_after[-1]],
        "largest_relative_difference_of_a_loss": apart,
        "step_ms": [ms, ms_after],
    }


# ---- Neurons ----


def kinds() -> dict[str, nn.Module]:
    """Neurons of the four libraries, one a row of the table."""
    neuron = importlib.import_module(f"{BASED}.neuron")
    sj = importlib.import_module(f"{BASED}.surrogate")
    snn = importlib.import_module("snntorch")
    surrogate = importlib.import_module("snntorch.surrogate")
    norse = importlib.import_module("norse.torch")
    box = importlib.import_module("norse.torch.functional.lif_box").LIFBoxParameters
    subtract = importlib.import_module("norse.torch.functional.reset").reset_subtract
    layers = importlib.import_module("sinabs.layers")
    activation = importlib.import_module("sinabs.activation")
    multi = {"step_mode": "m"}
    single: dict[str, Any] = {"spike_fn": activation.SingleSpike}
    return {
        "IFNode, defaults": neuron.IFNode(**multi),
        "IFNode, step mode s": neuron.IFNode(),
        "IFNode, v_reset=None, detach_reset": neuron.IFNode(
            v_reset=None, detach_reset=True, **multi
        ),
        "IFNode, v_reset=-0.3": neuron.IFNode(v_reset=-0.3, **multi),
        "LIFNode, defaults": neuron.LIFNode(**multi),
        "LIFNode, tau=3.3, ATan": neuron.LIFNode(tau=3.3, surrogate_function=sj.ATan(), **multi),
        "LIFNode, v_reset=-0.3": neuron.LIFNode(v_reset=-0.3, **multi),
        "LIFNode, decay_input=False, v_reset=None": neuron.LIFNode(
            decay_input=False, v_reset=None, **multi
        ),
        "LIFNode, PiecewiseQuadratic": neuron.LIFNode(
            surrogate_function=sj.PiecewiseQuadratic(), **multi
        ),
        "LIFNode, Erf": neuron.LIFNode(surrogate_function=sj.Erf(), **multi),
        "ParametricLIFNode, defaults": neuron.ParametricLIFNode(**multi),
        "ParametricLIFNode, decay_input=False": neuron.ParametricLIFNode(
            decay_input=False, **multi
        ),
        "QIFNode": neuron.QIFNode(),
        "Leaky, defaults": snn.Leaky(0.9),
        "Leaky, zero": snn.Leaky(0.9, reset_mechanism="zero"),
        "Leaky, none": snn.Leaky(0.9, reset_mechanism="none"),
        "Leaky, reset_delay=False": snn.Leaky(0.9, reset_delay=False),
        "Leaky, zero, reset_delay=False": snn.Leaky(0.9, reset_mechanism="zero", reset_delay=False),
        "Leaky, init_hidden": snn.Leaky(0.9, init_hidden=True),
        "Leaky, learn_beta": snn.Leaky(0.9, learn_beta=True),
        "Leaky, learn_threshold": snn.Leaky(0.9, learn_threshold=True),
        "Leaky, a beta a neuron": snn.Leaky(torch.rand(20)),
        "Leaky, fast_sigmoid": snn.Leaky(0.9, spike_grad=surrogate.fast_sigmoid()),
        "Leaky, triangular": snn.Leaky(0.9, spike_grad=surrogate.triangular()),
        "Leaky, state_quant": snn.Leaky(0.9, state_quant=torch.round),
        "Lapicque, beta": snn.Lapicque(beta=0.8),
        "Lapicque, R and C, zero": snn.Lapicque(R=2.0, C=3.0, reset_mechanism="zero"),
        "Synaptic": snn.Synaptic(0.9, 0.8),
        "LIFBoxCell, defaults": norse.LIFBoxCell(),
        "LIFBoxCell, v_leak=0.1, v_reset=-0.2": norse.LIFBoxCell(
            box(v_leak=torch.tensor(0.1), v_th=torch.tensor(1.1), v_reset=torch.tensor(-0.2))
        ),
        "LIFBoxCell, reset_subtract": norse.LIFBoxCell(box(reset_method=subtract)),
        "LIFBoxCell, triangle, v_th=0.6": norse.LIFBoxCell(
            box(method="triangle", alpha=0.3, v_th=torch.tensor(0.6))
        ),
        "LIFCell, defaults": norse.LIFCell(),
        "LIF, defaults": norse.LIF(),
        "Lift(LIFBoxCell)": norse.Lift(norse.LIFBoxCell()),
        "LIF, record_states": norse.LIF(record_states=True),
        "LIFRecurrent": norse.LIFRecurrent(3, 3),
        "IAF, defaults": layers.IAF(),
        "IAF, SingleSpike": layers.IAF(**single),
        "IAF, SingleSpike, MembraneReset": layers.IAF(
            **single, reset_fn=activation.MembraneReset()
        ),
        "IAFSqueeze, SingleSpike": layers.IAFSqueeze(batch_size=2, **single),
        "LIF, SingleSpike": layers.LIF(tau_mem=5.0, **single),
        "LIF, SingleSpike, tau_syn": layers.LIF(tau_mem=5.0, tau_syn=3.0, **single),
        "LIF, SingleSpike, Gaussian, alphas": layers.LIF(
            tau_mem=5.0,
            train_alphas=True,
            surrogate_grad_fn=activation.Gaussian(),
            **single,
        ),
        "ALIF": layers.ALIF(5.0, 5.0),
    }


def checked() -> list[dict[str, Any]]:
    rows = []
    for label, module in kinds().items():
        row: Replacement = replace_neurons(module).rows[0]
        library = row.original.partition(" ")[0]
        rows.append({"library": library, "label": label, **asdict(row)})
        print(rows[-1])
    return rows


# ---- Tables ----


def neuron_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| library | neuron | surrogate in backward | float64 | float32 | spikes that differ |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['library']} | {row['label']} |"
        if not row["became"]:
            lines.append(f"{start} left: {row['reason']} | | | |")
            continue
        double, single = row["in_float64"], row["in_float32"]
        surrogate = "the library's" if row["surrogate"] == "library" else row["surrogate"]
        lines.append(
            f"{start} {surrogate} | {double['largest']:.0e} | {single['largest']:.0e} | "
            f"{double['flips'] + single['flips']} of {double['spikes'] + single['spikes']:,} |"
        )
    return lines


def network_table(networks: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| library | network | replaced | spikes that differ | loss after ten steps, before and "
        "after | step before | step after | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        if name not in networks:
            continue
        row = networks[name]
        before, after = row["step_ms"]
        loss, loss_after = row["loss_after_ten_steps"]
        lines.append(
            f"| {row['library']} | {row['what']} | {row['replaced']} | "
            f"{row['spikes_that_differ']} of {row['spikes']:,} | {loss:.6f}, {loss_after:.6f} | "
            f"{before:.1f} ms | {after:.1f} ms | {before / after:.2f}x |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("neurons", "network", "report"))
    parser.add_argument("name", nargs="?", choices=NETWORKS)
    parser.add_argument("--json", type=Path, default=FOLDER / "replace-neurons-avx2.json")
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if options.part == "report":
        print("\n".join([*neuron_table(results["neurons"]["rows"]), ""]))
        print("\n".join(network_table(results["networks"])))
        return
    facts = {"commit": commit(["benchmarks/results"]), **machine(), "torch": torch.__version__}
    if options.part == "neurons":
        results["neurons"] = {**facts, "rows": checked()}
    elif options.name is None:
        parser.error("network: expected the name of one")
    else:
        found = {**facts, **compared(options.name)}
        print(json.dumps(found, indent=1))
        results.setdefault("networks", {})[options.name] = found
    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
