"""One EventNetwork in many hands: threads, forks, copies."""

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from iirsnn import convert
from iirsnn.errors import RunError, UsageError
from iirsnn.event import EventNetwork
from iirsnn.models import ModelConfig, build

IMAGE = (3, 12, 12)


def network(pool="average", timesteps=2):
    config = ModelConfig("vgg", layers=[40, "A", 70], hidden=[130], pool=pool)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    calibration = torch.randn(64, *IMAGE, generator=generator)
    return convert(build(config, 10, IMAGE), calibration, 80.0, timesteps=timesteps).eval()


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def net(request):
    return EventNetwork.from_model(network(), 2, precision=request.param)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def images(count):
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(count))


def call(net, count):
    """Logits, spikes and what was counted of one call."""
    logits = net(images(count))
    counted = [(s.spikes, s.additions, s.multiplications, s.weight_bytes) for s in net.statistics()]
    return logits, net.spikes(), counted


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert found[2] == expected[2]


SIZES = (1, 7, 0, 32, 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_four_callers_with_batches_of_any_size(net, threads):
    torch.set_num_threads(1)
    alone = {count: call(net, count) for count in SIZES}
    start = threading.Barrier(4)

    def caller(number):
        torch.set_num_threads(threads)
        start.wait()
        for turn in range(15):
            count = SIZES[(number + turn) % len(SIZES)]
            assert_same(call(net, count), alone[count])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))


def test_statistics_are_those_of_the_thread(net):
    net(images(2))
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(RunError, match="by this thread first"):
            other.submit(net.statistics).result()
        other.submit(net, images(5)).result()
        assert other.submit(net.spikes).result()[0].shape[1] == 5
    assert net.spikes()[0].shape[1] == 2


def test_the_first_call_of_an_unknown_shape_by_many():
    model = torch.nn.Sequential(*network().layers)
    net = EventNetwork.from_model(model, 2)
    assert net.image_shape is None
    start = threading.Barrier(4)

    def caller(number):
        start.wait()
        return net(images(3))

    with ThreadPoolExecutor(4) as pool:
        logits = list(pool.map(caller, range(4)))
    assert net.image_shape == IMAGE
    assert all(torch.equal(one, logits[0]) for one in logits)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_computes_the_same(net):
    torch.set_num_threads(2)
    expected = net(images(7))  # from here on the parent has threads
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(net(images(7)), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(net(images(7)), expected)


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))]
)
def test_copies_compute_the_same(net, twin):
    net.notes["name"] = "digits"
    made = twin(net)
    assert made == net
    assert made.notes == {"name": "digits"}
    assert torch.equal(made(images(3)), net(images(3)))
    made.layers[0].bias += 1
    assert made != net
    assert net != "digits"
    assert "vgg" not in repr(net)
    assert repr(net).count("Layer(") == len(net.layers)


def test_what_a_call_refuses(net):
    with pytest.raises(UsageError, match="expected finite values"):
        net(images(1) / 0)
    logits = net(images(1))
    with pytest.raises(ValueError, match="threads: expected 0 or more, got -1"):
        net._engine.run(images(1).data_ptr(), 1, logits.data_ptr(), -1)
