"""What neurons do: membranes computed again, rasters, and pictures of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from iirsnn import FusedLIF
from iirsnn.errors import RunError
from iirsnn.ops.reference import RESETS
from iirsnn.report import activity
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    ("shape", "channels"), [((4, 3, 5, 2, 2), 5), ((4, 3, 6), 6), ((1, 7), None)]
)
def test_a_neuron_spikes_where_its_membrane_is_above_its_threshold(reset, shape, channels):
    torch.manual_seed(0)
    neuron = FusedLIF(0.8, 0.9, channels=channels, reset=reset, backend="reference")
    if channels:
        with torch.no_grad():
            neuron.threshold.uniform_(0.5, 1.5)
            neuron.leak.uniform_(0.5, 1.0)
    current = torch.randn(shape) + 0.3
    spikes = neuron(current).detach()
    membranes = torch.stack(list(activity.membranes(neuron, current, spikes)))
    assert membranes.shape == current.shape
    assert torch.equal(membranes > 1, spikes > 0)
    assert 0 < spikes.sum() < spikes.numel()


def test_record_of_a_trained_network(pipeline):
    images = pipeline.test_images(16)
    network = pipeline.trained("T2")
    recorded = activity.record(network, images)
    assert recorded.timesteps == 2
    assert [layer.raster.shape for layer in recorded.layers] == [(2, 40), (2, 40), (2, 32)]
    fired = []
    hooks = [
        neuron.register_forward_hook(lambda _, __, spikes: fired.append(spikes))
        for neuron in activity.neurons(network)
    ]
    with torch.no_grad():
        network.eval()(images)
    assert [hook.remove() for hook in hooks] == [None] * 3  # three layers, none recorded twice
    for layer, spikes in zip(recorded.layers, fired, strict=True):
        assert layer.membranes.sum() == pytest.approx(1)
        above = layer.membranes[activity.EDGES[:-1] > 0.95].sum()
        assert above == pytest.approx(float(spikes.mean()), abs=0.01)
        assert layer.thresholds.shape == layer.leaks.shape == (1,)
        assert layer.raster.any()
    last = fired[-1][:, 0].numpy() > 0  # 32 neurons: all are shown
    assert np.array_equal(recorded.layers[-1].raster, last)


def test_pictures_of_a_run(pipeline, tmp_path):
    activity.write(pipeline, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("raster.png", "membranes.png", "thresholds.png")
    }
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert len(set(picture.convert("L").tobytes())) > 20


def test_a_run_without_a_spiking_stage(tmp_path, quick):
    with (
        RunFolder.create(tmp_path / "run", quick) as folder,
        pytest.raises(RunError, match="no spiking stage is finished yet"),
    ):
        activity.write(Pipeline(folder, open_data(quick)), tmp_path)
