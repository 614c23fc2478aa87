"""What events cost beside dense products: measured, kept, and what is decided by it."""

import pytest
import torch

from iirsnn import SpikeConv2d
from iirsnn.nn import events_or_dense
from tests.nn.test_spike_layers import sparse_reals, spikes

pytest.importorskip("iirsnn._C", reason="spike layers by events need iirsnn._C")

pytestmark = pytest.mark.usefixtures("built_in_costs")

FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_costs_are_measured_once(monkeypatch, tmp_path, dtype):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("IIRSNN_CALIBRATE", "1")
    monkeypatch.setattr(events_or_dense, "_ROUNDS", 1)
    first = events_or_dense.costs(dtype)
    (file,) = (tmp_path / "iirsnn").iterdir()
    assert file == events_or_dense.cache_path(dtype)
    events_or_dense._costs.cache_clear()
    monkeypatch.setattr(events_or_dense, "calibrate", lambda _: pytest.fail("measured twice"))
    assert events_or_dense.costs(dtype) == first
    assert first.keys() == events_or_dense.BUILT_IN[dtype].keys()
    assert all(by_shape.keys() == set(events_or_dense.SHAPES) for by_shape in first.values())


def test_other_kernels_are_measured_anew(monkeypatch, tmp_path):
    from iirsnn import _C

    kernels = tmp_path / "_C.so"
    monkeypatch.setattr(_C, "__file__", str(kernels))
    paths = set()
    for content in (b"old", b"new"):
        kernels.write_bytes(content)
        events_or_dense._cache_path.cache_clear()
        paths.add(events_or_dense.cache_path(FLOAT))
    paths.add(events_or_dense.cache_path(HALF))
    best = _C.build_info()["cpu_capability"]
    _C.set_cpu_capability("portable")
    try:
        paths.add(events_or_dense.cache_path(FLOAT))
    finally:
        _C.set_cpu_capability(best)
        events_or_dense._cache_path.cache_clear()
    assert len(paths) == (4 if best != "portable" else 3)


@pytest.mark.parametrize("text", ["", "{}", '{"a": 1}', "[1]"])
def test_a_damaged_cache_is_replaced(monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("IIRSNN_CALIBRATE", "1")
    path = events_or_dense.cache_path(FLOAT)
    path.parent.mkdir()
    path.write_text(text)
    measured = costs_of(events_or_dense.Cost(0.5, 2.0))
    monkeypatch.setattr(events_or_dense, "calibrate", lambda _: measured)
    for _ in range(2):  # measured, and then read
        events_or_dense._costs.cache_clear()
        assert events_or_dense.costs(FLOAT) == measured
        monkeypatch.setattr(events_or_dense, "calibrate", lambda _: pytest.fail("measured twice"))


def test_built_in_costs_where_no_cache_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IIRSNN_CALIBRATE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert events_or_dense.costs(FLOAT) is events_or_dense.BUILT_IN[FLOAT]
    monkeypatch.setenv("IIRSNN_CALIBRATE", "0")
    assert events_or_dense.costs(HALF) is events_or_dense.BUILT_IN[HALF]


def test_a_cost_is_a_line_through_two_times():
    assert events_or_dense._cost(dense=2.0, sparse=0.4, denser=1.0) == events_or_dense.Cost(
        0.1, 1.0
    )
    noise = events_or_dense._cost(dense=2.0, sparse=1.0, denser=0.9)
    assert noise == events_or_dense.Cost(0.5, 0.0)


# ---- The decision, with faked costs ----

CONV, LINEAR = events_or_dense.SHAPES[1].product, events_or_dense.SHAPES[5].product


def costs_of(cost, changes=()):
    """The same cost everywhere, but for `changes`: {(pass, kind, shape): cost}."""
    faked = {
        key: dict.fromkeys(events_or_dense.SHAPES, cost) for key in events_or_dense.BUILT_IN[FLOAT]
    }
    for (which, kind, shape), changed in dict(changes).items():
        faked[which, kind][shape] = changed
    return faked


def fake(monkeypatch, fixed, slope, changes=()):
    faked = costs_of(events_or_dense.Cost(fixed, slope), changes)
    monkeypatch.setattr(events_or_dense, "costs", lambda dtype: faked)


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0.0, "events"), (0.94, "events"), (0.96, "dense"), (1.0, "dense")],
)
def test_a_tie_is_for_dense(monkeypatch, density, expected):
    fake(monkeypatch, 0.0, 1.0)
    ways, reason = events_or_dense.decide("auto", "bits", density, CONV, FLOAT)
    assert ways == (expected, expected)
    assert f"density {density:.3f} of bits" in reason
    assert events_or_dense.input_by_events("auto", density, CONV, FLOAT) == (expected == "events")
    for mode in ("events", "dense"):
        assert events_or_dense.decide(mode, "bits", density, CONV, FLOAT)[0] == (mode, mode)
        assert events_or_dense.input_by_events(mode, density, CONV, FLOAT) == (mode == "events")


def test_each_pass_and_kind_has_its_own_costs_however_high(monkeypatch):
    slow = {("forward", "counts", events_or_dense.SHAPES[1]): events_or_dense.Cost(40.0, 400.0)}
    fake(monkeypatch, 0.0, 1.0, slow)
    assert events_or_dense.decide("auto", "counts", 0.01, CONV, FLOAT)[0] == ("dense", "events")
    assert events_or_dense.decide("auto", "bits", 0.01, CONV, FLOAT)[0] == ("events", "events")
    assert events_or_dense.decide("auto", "counts", 0.01, LINEAR, FLOAT)[0] == ("events", "events")


def test_the_most_similar_shape_counts(monkeypatch):
    fake(
        monkeypatch,
        0.0,
        0.0,
        {
            ("forward", "bits", shape): events_or_dense.Cost(i, 0.0)
            for i, shape in enumerate(events_or_dense.SHAPES)
        },
    )

    def nearest(work, **changes):
        return events_or_dense.ratio("forward", "bits", 0.1, work._replace(**changes), FLOAT)

    assert [nearest(shape.product) for shape in events_or_dense.SHAPES] == [*range(6)]
    assert nearest(CONV, images=64, positions=1024, channels=64, outputs=64) == 0
    assert nearest(CONV, images=64, positions=4, channels=512, outputs=512) == 4
    assert nearest(CONV, images=4, positions=4, channels=512, outputs=512) == 3
    assert nearest(LINEAR, images=64, channels=4096, outputs=4096) == 5


def test_outputs_and_channels_that_do_not_fill_a_tile_cost_more(monkeypatch):
    fake(monkeypatch, 0.1, 1.0)

    def ratio(**changes):
        return events_or_dense.ratio("forward", "bits", 0.2, CONV._replace(**changes), FLOAT)

    assert ratio() == pytest.approx(0.3)
    assert ratio(outputs=10) == pytest.approx(3.2 * 0.3)
    assert ratio(channels=1) == pytest.approx(64 * 0.1 + 0.2)


def test_a_layer_does_what_the_costs_say(monkeypatch):
    torch.manual_seed(0)
    layer, x = SpikeConv2d(64, 64, 3, padding=1), spikes((2, 64, 8, 8), 0.2).requires_grad_()
    for slope, expected in ((1.0, "events"), (5.0, "dense")):
        fake(monkeypatch, 0.0, slope)
        layer(x).backward(sparse_reals((2, 64, 8, 8)))
        decision = layer.decision
        assert {decision.forward, decision.weight_grad, decision.input_grad} == {expected}
