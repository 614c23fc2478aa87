"""What events cost beside dense products: measured, kept, and what is decided by it."""

import errno
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iirsnn import SpikeConv2d, SpikeLinear
from iirsnn.nn import events_or_dense
from iirsnn.nn.events_or_dense import Cost
from iirsnn.nn.products import LINEAR, Geometry, Work
from tests.nn.test_spike_layers import sparse_reals, spikes

pytest.importorskip("iirsnn._C", reason="spike layers by events need iirsnn._C")

pytestmark = pytest.mark.usefixtures("built_in_costs")

FLOAT, HALF = torch.float32, torch.bfloat16
SAME = Geometry((1, 1), (1, 1), (1, 1), 1)
CONV = Work((2, 64, 8, 8), (64, 64, 3, 3), SAME)
FULLY_CONNECTED = Work((8, 256, 1, 1), (256, 256, 1, 1), LINEAR)


@pytest.fixture
def calibrated(monkeypatch, tmp_path):
    """Measures into a cache of its own, and returns the cache's file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("IIRSNN_CALIBRATE", "1")
    monkeypatch.setattr(events_or_dense, "_SECONDS", 0.0)
    for bound in ("_AGREE", "_SETTLED"):
        monkeypatch.setattr(events_or_dense, bound, math.inf)  # on a busy machine too
    events_or_dense._cost.cache_clear()
    yield events_or_dense.cache_path()
    events_or_dense._cost.cache_clear()


def found(work=CONV, dtype=FLOAT):
    """The costs of everything that is asked of a layer, read from the file."""
    events_or_dense._cost.cache_clear()
    return {key: cost_of(*key, work, dtype) for key in events_or_dense.BUILT_IN[dtype]}


def cost_of(which, kind, work, dtype):
    (cost,) = events_or_dense.costs((which,), kind, work, dtype)
    return cost


def never(*args):
    pytest.fail("measured, or asked for, in vain")


# ---- Measured once ----


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize(
    "work",
    [
        CONV,
        FULLY_CONNECTED,
        Work((3, 64, 9, 7), (32, 16, 5, 3), Geometry((1, 1), (2, 0), (1, 2), 4)),
    ],
    ids=["convolution", "linear", "groups and dilation"],
)
def test_costs_are_measured_once(monkeypatch, calibrated, work, dtype):
    first = found(work, dtype)
    assert all(math.isfinite(cost.fixed) and 0 <= cost.slope < math.inf for cost in first.values())
    assert list(calibrated.parent.iterdir()) == [calibrated]
    monkeypatch.setattr(events_or_dense, "measure", never)
    assert found(work, dtype) == first


def test_a_convolution_that_strides_has_no_events_backward_to_its_input(calibrated):
    layer = SpikeConv2d(16, 16, 3, stride=2, padding=1)
    layer(spikes((2, 16, 8, 8), 0.1).requires_grad_()).sum().backward()
    measured = [json.loads(json.loads(line)[0])[0] for line in lines_of(calibrated)]
    assert measured == ["forward", "weight_grad"]


def lines_of(file):
    return [line for line in file.read_text().splitlines() if line]


def test_other_kernels_and_numbers_of_threads_are_measured_anew(monkeypatch, tmp_path):
    from iirsnn import _C

    kernels, path = tmp_path / "_C.so", events_or_dense.cache_path
    monkeypatch.setattr(_C, "__file__", str(kernels))
    paths = set()
    for content in (b"old", b"new"):
        kernels.write_bytes(content)
        events_or_dense._cache_path.cache_clear()
        paths.add(path())
    threads, best = torch.get_num_threads(), _C.build_info()["cpu_capability"]
    try:
        _C.set_cpu_capability("portable")
        paths.add(path())
        _C.set_cpu_capability(best)
        torch.set_num_threads(threads + 1)
        paths.add(path())
    finally:
        _C.set_cpu_capability(best)
        torch.set_num_threads(threads)
        events_or_dense._cache_path.cache_clear()
    assert len(paths) == (4 if best != "portable" else 3)


def test_what_is_measured_has_a_key_of_its_own(monkeypatch, calibrated):
    costs = iter(range(100))
    monkeypatch.setattr(
        events_or_dense, "measure", lambda *_: (Cost(float(next(costs)), 0.0), True)
    )
    strided = CONV._replace(geometry=SAME._replace(stride=(2, 2)))
    works = CONV, strided, CONV._replace(weight=(32, 64, 3, 3)), CONV._replace(size=(2, 64, 4, 4))
    asked = [
        ("forward", "bits", FLOAT),
        ("forward", "counts", FLOAT),
        ("weight_grad", "bits", FLOAT),
        ("forward", "bits", HALF),
    ]
    found = [cost_of(*key, work, dtype).fixed for work in works for *key, dtype in asked]
    assert found == [*range(16)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[["a"',
        "\0\xff",
        "[" * 100000,
        '["KEY", [NaN, 1]]',
        '["KEY", 1]',
        '["KEY", [1',
        f'["KEY", [1{"0" * 400}, 1]]',
    ],
)
def test_lines_that_are_damaged_are_measured_anew(monkeypatch, calibrated, text):
    key = json.dumps(["forward", "bits", "float32", *events_or_dense.representative(CONV)])
    calibrated.parent.mkdir()
    calibrated.write_text(text.replace('"KEY"', json.dumps(key)))  # without an end of the line
    monkeypatch.setattr(events_or_dense, "measure", lambda *_: (Cost(0.5, 2.0), True))
    for _ in range(2):  # measured, and then read
        events_or_dense._cost.cache_clear()
        assert cost_of("forward", "bits", CONV, FLOAT) == Cost(0.5, 2.0)
        monkeypatch.setattr(events_or_dense, "measure", never)


def test_processes_that_measure_together_end_with_the_same(monkeypatch, calibrated):
    def other(*_):  # while this one measures
        key = json.dumps(["forward", "bits", "float32", *events_or_dense.representative(CONV)])
        calibrated.write_text(json.dumps([key, [0.25, 1.0]]) + "\n")
        return Cost(0.5, 2.0), True

    monkeypatch.setattr(events_or_dense, "measure", other)
    assert cost_of("forward", "bits", CONV, FLOAT) == Cost(0.25, 1.0)


def test_built_in_costs_where_a_full_disk_takes_a_part_of_the_line(monkeypatch, calibrated):
    read = events_or_dense._read
    monkeypatch.setattr(events_or_dense, "measure", lambda *_: (Cost(0.5, 2.0), True))

    def cut(file, key):
        if file.exists():
            file.write_bytes(file.read_bytes()[:20])
        return read(file, key)

    monkeypatch.setattr(events_or_dense, "_read", cut)
    assert found() == events_or_dense.BUILT_IN[FLOAT]


def test_built_in_costs_where_no_cache_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(events_or_dense, "measure", never)
    monkeypatch.setenv("IIRSNN_CALIBRATE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert found() == events_or_dense.BUILT_IN[FLOAT]
    monkeypatch.setenv("IIRSNN_CALIBRATE", "0")
    assert found(dtype=HALF) == events_or_dense.BUILT_IN[HALF]


@pytest.mark.parametrize(
    ("outputs", "channels", "more"), [(10, 64, 3.2), (64, 64, 1.0), (96, 1, 1.0)]
)
def test_built_in_costs_know_tiles_that_are_not_filled(outputs, channels, more):
    work = Work((2, channels, 8, 8), (outputs, channels, 3, 3), SAME)
    cost, starts = (
        cost_of("forward", "bits", work, FLOAT),
        192 / min(192, 3 * channels),
    )
    assert (cost.fixed, cost.slope) == pytest.approx((more * starts * 0.09, more * 1.2))
    turned = Work((2, outputs, 8, 8), (channels, outputs, 3, 3), SAME)
    cost = cost_of("input_grad", "reals", turned, FLOAT)
    assert (cost.fixed, cost.slope) == pytest.approx((more * starts * 0.1, more * 1.5))


def test_what_is_measured_is_the_layer_with_as_many_images_as_tell():
    many = Work((640, 64, 32, 32), (64, 64, 3, 3), SAME)
    assert events_or_dense.representative(many) == many._replace(size=(16, 64, 32, 32))
    assert events_or_dense.representative(CONV) == CONV
    small = Work((1000, 512, 2, 2), (512, 512, 3, 3), SAME)
    for images, timed in ((1000, 64), (64, 64), (63, 32), (5, 4), (1, 1)):
        work = small._replace(size=(images, 512, 2, 2))
        assert events_or_dense.representative(work).size == (timed, 512, 2, 2)
    large = Work((8, 64, 224, 224), (64, 64, 3, 3), SAME)
    assert events_or_dense.representative(large).size == (1, 64, 56, 224)
    dilated = large._replace(geometry=SAME._replace(padding=(50, 50), dilation=(50, 50)))
    assert events_or_dense.representative(dilated).size == (1, 64, 101, 224)
    depthwise = Work((640, 512, 14, 14), (512, 1, 3, 3), SAME._replace(groups=512))
    assert events_or_dense.representative(depthwise).size == (16, 512, 14, 14)
    few = Work((64, 64, 512, 512), (1, 64, 1, 1), LINEAR)
    assert math.prod(events_or_dense.representative(few).size) <= 2**22
    wide = Work((64, 25088, 1, 1), (4096, 25088, 1, 1), LINEAR)
    assert events_or_dense.representative(wide) == Work(
        (64, 2048, 1, 1), (2048, 2048, 1, 1), LINEAR
    )


def test_a_cost_is_a_line_through_two_times():
    assert events_or_dense._line(dense=2.0, sparse=0.4, denser=1.0) == Cost(0.1, 1.0)
    noise = events_or_dense._line(dense=2.0, sparse=1.0, denser=0.9)
    assert noise == Cost(0.5, 0.0)


def test_times_that_do_not_agree_are_not_kept(monkeypatch, calibrated):
    monkeypatch.setattr(events_or_dense, "_AGREE", 1.25)
    monkeypatch.setattr(events_or_dense, "_SETTLED", 1.5)
    monkeypatch.setattr(events_or_dense, "_PATIENCE", 0.02)
    asked = "forward", "bits", CONV, FLOAT
    times = iter(2.0**i for i in range(1000))  # dense, events, events at more spikes, and again
    monkeypatch.setattr(events_or_dense, "_seconds", lambda call: next(times))
    doubtful = events_or_dense._line(1.0, 2.0, 4.0)
    assert events_or_dense.measure(*asked) == (doubtful, False)
    times = iter(2.0**i for i in range(1000))
    assert cost_of(*asked) == doubtful  # this process's, and asked for no more
    monkeypatch.setattr(events_or_dense, "measure", never)
    assert cost_of(*asked) == doubtful
    assert lines_of(calibrated) == []


def test_times_that_agree_end_it(monkeypatch, calibrated):
    monkeypatch.setattr(events_or_dense, "_AGREE", 1.25)
    taken = []
    monkeypatch.setattr(events_or_dense, "_seconds", lambda call: taken.append(call) or 1.0)
    assert cost_of("forward", "bits", CONV, FLOAT) == Cost(1.0, 0.0)
    assert len(taken) == 2 * 3
    assert len(lines_of(calibrated)) == 1


def test_one_process_measures_at_a_time(monkeypatch, calibrated):
    fcntl = pytest.importorskip("fcntl", reason="no locks of POSIX")
    held = []

    def measured(*_):
        with calibrated.open("ab") as other:  # as another process would
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held.append(True)
        return Cost(0.5, 2.0), True

    monkeypatch.setattr(events_or_dense, "measure", measured)
    cost_of("forward", "bits", CONV, FLOAT)
    assert held == [True]
    monkeypatch.setattr(events_or_dense, "_WAIT", 0.02)
    with calibrated.open("ab") as other:  # one that hangs is not waited for
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cost_of("weight_grad", "bits", CONV, FLOAT) == Cost(0.5, 2.0)


def test_a_file_system_without_locks_is_not_waited_for(monkeypatch, calibrated):
    fcntl = pytest.importorskip("fcntl", reason="no locks of POSIX")

    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(events_or_dense.time, "sleep", never)
    monkeypatch.setattr(events_or_dense, "measure", lambda *_: (Cost(0.5, 2.0), True))
    assert cost_of("forward", "bits", CONV, FLOAT) == Cost(0.5, 2.0)


def test_modes_do_not_see_what_is_measured(calibrated):
    layer, x = SpikeConv2d(16, 16, 3, padding=1), spikes((2, 16, 8, 8), 0.1)
    counts = []
    for _ in range(2):  # measured, and then read
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        counts.append(counter.get_total_flops())
    assert lines_of(calibrated)
    assert counts[0] == counts[1]


# ---- The decision, with faked costs ----


def fake(monkeypatch, fixed, slope, changes=()):
    """The same cost everywhere, but for `changes`: {(pass, kind): cost}."""

    def costs(passes, kind, work, dtype):
        return [dict(changes).get((which, kind), Cost(fixed, slope)) for which in passes]

    monkeypatch.setattr(events_or_dense, "costs", costs)


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0.0, "events"), (0.94, "events"), (0.96, "dense"), (1.0, "dense")],
)
def test_a_tie_is_for_dense(monkeypatch, density, expected):
    fake(monkeypatch, 0.0, 1.0)
    ways, reason = events_or_dense.decide("auto", "bits", density, CONV, FLOAT)
    assert ways == (expected, expected)
    assert f"density {density:.3f} of bits" in reason
    by_events = events_or_dense.input_by_events("auto", lambda: density, CONV, FLOAT)
    assert by_events == (expected == "events")
    for mode in ("events", "dense"):
        assert events_or_dense.decide(mode, "bits", density, CONV, FLOAT)[0] == (mode, mode)
        by_events = events_or_dense.input_by_events(mode, never, CONV, FLOAT)
        assert by_events == (mode == "events")


def test_each_pass_and_kind_has_its_own_costs_however_high(monkeypatch):
    slow = {("forward", "counts"): Cost(40.0, 400.0), ("input_grad", "reals"): Cost(3.0, 0.0)}
    fake(monkeypatch, 0.0, 1.0, slow)
    assert events_or_dense.decide("auto", "counts", 0.01, CONV, FLOAT)[0] == ("dense", "events")
    assert events_or_dense.decide("auto", "bits", 0.01, CONV, FLOAT)[0] == ("events", "events")
    assert not events_or_dense.input_by_events("auto", never, CONV, FLOAT)  # at no density


def test_images_that_events_cannot_address_are_dense(monkeypatch):
    fake(monkeypatch, 0.0, 0.0)
    large = Work((1, 1, 6000, 6000), (1, 1, 1, 1), LINEAR)
    for mode in ("auto", "events"):
        ways, reason = events_or_dense.decide(mode, "bits", 0.1, large, FLOAT)
        assert (ways, "cannot address" in reason) == (("dense", "dense"), True)
        assert not events_or_dense.input_by_events(mode, never, large, FLOAT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("layer", "size"), [(SpikeConv2d(45, 8, 3), (2, 45, 8, 8)), (SpikeLinear(45, 8), (2, 45))]
)
def test_layers_can_be_traced(calibrated, layer, size):
    x = spikes(size)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("mode", ["auto", "events", "dense"])
def test_images_smaller_than_the_kernel_are_refused_as_torch_does(calibrated, mode):
    layer = SpikeConv2d(4, 8, 3, dilation=(1, 3))
    layer.set_mode(mode)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        layer(spikes((1, 4, 5, 3)))
    assert not calibrated.exists()


def test_a_layer_does_what_the_costs_say(monkeypatch):
    torch.manual_seed(0)
    layer, x = SpikeConv2d(64, 64, 3, padding=1), spikes((2, 64, 8, 8), 0.2).requires_grad_()
    for slope, expected in ((1.0, "events"), (5.0, "dense")):
        fake(monkeypatch, 0.0, slope)
        layer(x).backward(sparse_reals((2, 64, 8, 8)))
        decision = layer.decision
        assert {decision.forward, decision.weight_grad, decision.input_grad} == {expected}
