"""The benchmarks' own measuring: bytes of ops, what is kept, results files and their comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iirsnn import FusedLIF, use_spike_layers
from iirsnn.measure import provenance
from iirsnn.models.vgg import vgg

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import contenders
import kept
import networks
import one_process
import plots
import record
import regressions
import report
import sameness
import tables
import traffic

N = 1000
WORD = 4 * N  # bytes of one float32 tensor of N elements


def moved(function):
    with traffic.Traffic() as counted:
        function()
    return counted.read, counted.written


# ---- Bytes of ops ----


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda x, y: x.clone(), WORD, WORD),
        (lambda x, y: torch.add(x, y), 2 * WORD, WORD),
        (lambda x, y: x * x, WORD, WORD),
        (lambda x, y: x.view(10, 100).t()[2:], 0, 0),
        (lambda x, y: x.add_(y), 2 * WORD, WORD),
        (lambda x, y: x.copy_(y), WORD, WORD),
        (lambda x, y: x.zero_(), 0, WORD),
        (lambda x, y: torch.add(x, y, out=torch.empty(N)), 2 * WORD, WORD),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: torch.zeros_like(x), 0, WORD),
        (lambda x, y: torch.stack([x, y]), 2 * WORD, 2 * WORD),
        (lambda x, y: x > y, 2 * WORD, N),
        (lambda x, y: x[:1].expand(N) + y, 4 + WORD, WORD),
        (lambda x, y: x.sum(), WORD, 4),
        (lambda x, y: x[::2] + 1, WORD // 2, WORD // 2),
    ],
    ids=[
        "clone", "add", "twice-the-same", "views", "in-place", "copy_", "zero_", "out=", "empty",
        "zeros", "stack", "bool", "expanded", "sum", "strided",
    ],
)  # fmt: skip
def test_bytes_of_an_op(function, read, written):
    x, y = torch.randn(N), torch.randn(N)
    assert moved(lambda: function(x, y)) == (read, written)


def test_an_op_of_iirsnn_counts_as_its_arguments_and_results():
    x = torch.randn(4, 250)
    lif = FusedLIF()
    with torch.no_grad():
        read, written = moved(lambda: lif(x))
    assert (read, written) == (WORD + 8, WORD)  # threshold and leak are one float each


def test_a_custom_op_of_another_library_is_entered():
    @torch.library.custom_op("bench_test::plus_three", mutates_args=())
    def plus_three(x: torch.Tensor) -> torch.Tensor:
        return (x + 1) + 2

    assert moved(lambda: plus_three(torch.zeros(N))) == (2 * WORD, 2 * WORD + WORD)


def test_fused_kernels_count_as_their_buffers():
    source = "extern void kernel(float* in_out_ptr0, const float* in_ptr0, float* out_ptr0) {"
    kinds = ["float*", "const float*", "float*"]
    both = [bool(name) for name in traffic._in_out(kinds, source)]
    tensors = [torch.zeros(N), torch.zeros(2 * N), torch.zeros(3 * N)]
    assert traffic.fused_bytes(tensors, kinds, both) == (3 * WORD, 4 * WORD)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="cannot read the arguments"):
        traffic._in_out(["float*"], "void something_else() {")


def test_kept_counts_storages_once_and_no_parameters():
    x = torch.randn(N, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(N))
    with traffic.Kept([weight]) as kept:
        y = x * weight  # keeps x (and the parameter)
        (y * y).sum()  # keeps y, twice
    assert kept.bytes == 2 * WORD


def test_peak_of_a_step():
    size = 64 * 2**20
    found = traffic.peak_of(lambda: torch.ones(size, dtype=torch.uint8))
    assert 0.9 * size < found["peak"] - found["before"] < 1.5 * size


def test_perf_output():
    event = one_process.EVENT
    line = f"12345,,{event},1000,100.00,,\n"
    assert one_process.perf_count(line) == 12345
    unsupported = f"<not supported>,,{event},0,100.00,,\n"
    assert one_process.perf_count(unsupported) == f"perf: {event} not supported"
    assert "no line" in one_process.perf_count("Usage: perf stat\n")


# ---- The contenders ----


def test_current_is_exact_and_never_meets_the_threshold():
    torch.manual_seed(0)
    x = contenders.current((8, 4096))
    v = torch.zeros(4096, dtype=torch.float64)
    expected = []
    for x_t in x.double():
        h = contenders.LEAK * v + x_t
        assert not (h == contenders.THRESHOLD).any()
        expected.append(h > contenders.THRESHOLD)
        v = h - contenders.THRESHOLD * expected[-1]
    s = contenders.iirsnn_lif()(x)
    assert torch.equal(s.bool(), torch.stack(expected))


def test_every_contender_gives_the_same_spikes_and_gradient():
    torch.manual_seed(0)
    found, missing = contenders.available()
    assert {c.name for c in contenders.CONTENDERS} == {c.name for c in found} | set(missing)
    for name, reason in missing.items():
        print(f"not checked: {name}: {reason}")
    x = contenders.current((3, 2, 40))
    grad = torch.randn(x.shape)
    expected = None
    for contender in found:
        if contender.name == "torch.compile":  # the reference, minutes of compilation away
            continue
        leaf = contenders.prepared(contender, x).requires_grad_()
        s = contender.neuron()(leaf)
        g = grad.transpose(0, 1) if contender.batch_first else grad
        (grad_x,) = torch.autograd.grad(s, leaf, g)
        got = [s, grad_x * contender.input_scale]
        got = [t.transpose(0, 1) for t in got] if contender.batch_first else got
        expected = expected or got
        assert all(map(torch.equal, got, expected)), contender.name


def test_a_missing_library_is_reported(monkeypatch):
    absent = contenders.Contender("absent", torch.nn.Identity, "no-such-library")
    monkeypatch.setattr(contenders, "CONTENDERS", (absent,))
    found, missing = contenders.available()
    assert found == []
    assert "no-such-library" in missing["absent"]


def small_network(neuron):
    torch.manual_seed(0)
    network = vgg([8, "A", 8], 10, (3, 32, 32), hidden=(64,), batch_norm=True)
    for i, module in enumerate(network.layers):
        if isinstance(module, torch.nn.ReLU):
            network.layers[i] = neuron()
    network.timesteps = 2
    return network


def test_density_is_forced():
    network = small_network(contenders.iirsnn_lif)
    images = torch.randn(32, 3, 32, 32)
    networks.force_density(network, images, 0.1)
    assert networks.densities(network, images) == pytest.approx([0.1] * 3, abs=0.02)


def test_batch_first_is_the_same_network():
    class BatchFirstLIF(torch.nn.Module):
        over_time = True

        def forward(self, x):
            return contenders.iirsnn_lif()(x.transpose(0, 1)).transpose(0, 1)

    images = torch.randn(4, 3, 32, 32)
    network = small_network(contenders.iirsnn_lif).eval()
    other = networks.BatchFirst(small_network(BatchFirstLIF).layers, 2).eval()
    assert torch.allclose(network(images), other(images), atol=1e-5)


# ---- Layers from the same inputs ----

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def same():
    return sameness.Sameness(small_network(contenders.iirsnn_lif), IMAGES)


def test_every_contender_has_the_same_layers(same):
    for contender in contenders.available()[0]:
        if contender.name == "torch.compile":  # the reference, minutes of compilation away
            continue
        network = small_network(contender.neuron)
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.weight.data *= contender.input_scale
        if contender.batch_first:
            network = networks.BatchFirst(network.layers, 2)
        assert networks.same_layers(same, contender.name, network) < 1e-3


@pytest.mark.parametrize("name", networks.FINISH)
def test_spike_layers_have_the_same_layers(same, name):
    network = networks.FINISH[name](small_network(contenders.iirsnn_lif))
    for mode in ("events", "dense"):
        for module in network.modules():
            if hasattr(module, "set_mode"):
                module.set_mode(mode)
        assert networks.same_layers(same, name, network) < 1e-3


@pytest.mark.parametrize(
    "broken",
    [
        {"surrogate_scale": 1.01},
        {"surrogate": "atan"},
        {"detach_reset": False},
    ],
    ids=str,
)
def test_another_neuron_is_seen(same, broken):
    network = small_network(lambda: contenders.iirsnn_lif(**broken))
    with pytest.raises(AssertionError, match="x: another network: layer 2, FusedLIF: its input's"):
        same.check("x", network)


@pytest.mark.parametrize(("threshold", "leak"), [(1.001, 0.5), (1.0, 0.502)])
def test_another_threshold_or_leak_is_seen(same, threshold, leak):
    network = small_network(lambda: FusedLIF(threshold, leak, surrogate="triangle"))
    with pytest.raises(AssertionError, match="layer 2, FusedLIF: its output"):
        same.check("x", network)


@pytest.mark.parametrize(
    ("op", "what"),
    [
        ("spike_conv2d", "output"),
        ("spike_conv2d_weight", "gradient of weight"),
        ("spike_conv2d_input", "input's gradient"),
    ],
)
def test_a_broken_kernel_is_seen(monkeypatch, same, op, what):
    """Its result is right but for one output channel of it, which is 1 % too large."""
    right = getattr(torch.ops.iirsnn, op)

    def wrong(*args):
        result = right(*args).clone()
        result[:, 0] *= 1.01
        return result

    network = small_network(contenders.iirsnn_lif)
    use_spike_layers(network, "events")
    same.check("x", network)
    monkeypatch.setattr(torch.ops.iirsnn, op, wrong)
    with pytest.raises(AssertionError, match=f"Conv2d: its {what} differs by"):
        same.check("x", network)


def test_gradients_that_are_not_numbers_are_seen(same, monkeypatch):
    network = small_network(contenders.iirsnn_lif)
    with torch.no_grad():
        network.layers[1].weight[0] = float("nan")
    with pytest.raises(AssertionError, match="BatchNorm2d"):
        same.check("x", network)


def test_iirsnn_variants_are_the_same_network():
    images = torch.randn(4, 3, 32, 32)
    expected = small_network(contenders.iirsnn_lif)(images)
    for name, finish in networks.FINISH.items():
        network = finish(small_network(contenders.iirsnn_lif))
        assert torch.allclose(network(images), expected, atol=1e-4), name


# ---- Results ----


def results_of(ratio, key="lif/a", name="iirsnn"):
    limit = {"median_ms": 1.0, "ratio": 1.0}
    ours = {"median_ms": ratio, "ratio": ratio}
    return {"groups": {key: {"contenders": {"limit": limit, name: ours}}}}


def test_summary_has_ratios_to_the_limit():
    found = record.summary({"limit": [1.0, 2.0, 3.0], "a": [6.0, 6.0, 1.0]})
    assert found["limit"]["median_ms"] == 2000
    assert found["a"]["ratio"] == 3
    assert found["a"]["rounds"] == 3


def test_a_loss_of_more_than_a_quarter_fails():
    committed = results_of(1.2)
    assert regressions.compare(committed, results_of(1.49)) == ([], [])
    lost, unknown = regressions.compare(committed, results_of(1.51))
    assert unknown == []
    assert lost == ["lif/a: iirsnn takes 1.51 x the limit, committed 1.20"]


def test_only_our_own_ratios_count_and_nothing_is_dropped():
    assert regressions.compare(results_of(1, name="Norse"), results_of(9, name="Norse")) == ([], [])
    assert regressions.compare(results_of(1), results_of(1, key="b"))[1] == [
        "b: not in the committed results"
    ]
    assert "iirsnn is not in the new run" in regressions.compare(
        results_of(1), results_of(1, name="Norse")
    )[1][0]  # fmt: skip


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (1.3, 1)])
def test_check_says_it_with_its_exit_code(tmp_path, capsys, ratio, code):
    files = [tmp_path / "committed.json", tmp_path / "new.json"]
    for file, value in zip(files, (1.0, ratio), strict=True):
        file.write_text(json.dumps(results_of(value)))
    assert regressions.check(*files) == code
    assert "1 groups compared" in capsys.readouterr().out


def test_a_loss_has_to_show_in_every_run(tmp_path):
    files = [tmp_path / f"{name}.json" for name in ("committed", "slow", "slower", "quick")]
    for file, value in zip(files, (1.0, 1.3, 1.4, 1.2), strict=True):
        file.write_text(json.dumps(results_of(value)))
    committed, slow, slower, quick = files
    assert regressions.check(committed, slow, slower) == 1
    assert regressions.check(committed, slow, quick) == 0


def test_a_group_without_a_limit_is_named_and_not_compared(tmp_path, capsys):
    files = [tmp_path / f"{name}.json" for name in ("committed", "new")]
    for file in files:
        found = results_of(1.0)
        for name in ("event/b[1]", "event/b[2]"):
            found["groups"][name] = {"contenders": {"iirsnn, events": {"median_ms": 2.0}}}
        file.write_text(json.dumps(found))
    assert regressions.check(*files) == 0
    told = capsys.readouterr().out
    assert "not compared: event/b: 2 without a limit to compare with" in told
    assert "1 groups compared" in told


def test_check_of_nothing_fails(tmp_path):
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps(results_of(1.0)))
    assert regressions.check(committed, tmp_path / "absent.json") != 0


def test_a_file_names_machine_and_capability(monkeypatch, tmp_path):
    here = {"machine": "A (B), 2 threads", "processor": "A", "capability": "avx2"}
    monkeypatch.setattr(record, "machine", lambda: here)
    assert record.default_file(tmp_path) == tmp_path / "a-b-2-threads-avx2.json"
    assert record.FOLDER not in record.default_file(record.BUILD).parents


def test_a_processor_has_its_model(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: A B\n\nmodel\t: 2\n"
    )
    assert record.processor(file) == "A B (family 25, model 1)"
    assert record.processor(tmp_path / "absent")


def test_summary_of_another_limit():
    found = record.summary({"never": [2.0], "auto": [1.0]}, limit="never")
    assert found["auto"]["ratio"] == 0.5


def test_break_even_density():
    assert plots.break_even([(0.1, 0.5), (0.3, 1.5)]) == "faster up to a density of 20%"
    assert "slower at every density" in plots.break_even([(0.1, 1.5), (0.3, 2)])
    assert "faster at every density" in plots.break_even([(0.3, 0.9), (0.1, 0.5)])


def test_groups_are_added_one_by_one_and_reported(tmp_path):
    path = tmp_path / "m.json"
    facts = {"machine": "m, 1 threads", "processor": "m (model 1)", "capability": "avx2"}
    facts |= {"versions": {"torch": "2"}, "missing": {"Norse": "absent"}}
    group = {"subject": "lif", "what": "forward", "size": "out", "dtype": "float32", "threads": 1}
    group |= {"elements": 1000, "element_size": 4, "commit": "abc"}
    own = {"median_ms": 1.0, "ratio": 1.0, "bytes": 8.0}
    for timesteps in (4, 1):
        for what in ("forward", "backward"):
            one = {**group, "what": what, "timesteps": timesteps}
            one["contenders"] = {"limit": own, "iirsnn": {**own, "kept": 4.0}}
            record.store(path, facts, f"lif/{what}{timesteps}", one)
    sweep = {"subject": "train_step", "sweep": True, "network": "vgg16", "timesteps": 1}
    sweep |= {"batch": 64, "threads": 1, "commit": "abc"}
    for density in (0.1, 0.2):
        one = {**sweep, "density": density, "contenders": {"limit": own, "iirsnn": own, "x": own}}
        record.store(path, facts, f"train_step/{density}", one)
        record.store(path, facts, f"train_step/s{density}", {**one, "sweep": False})
    memory = {"subject": "memory", "network": "vgg16", "timesteps": 5, "batch": 64, "commit": "abc"}
    mebibyte = 2**20
    memory["contenders"] = {"iirsnn": {"before": 300 * mebibyte, "peak": 1300 * mebibyte}}
    record.store(path, facts, "train_step/memory", memory)
    own = {"median_ms": 2.0, "ratio": 1.0}
    choice = {"subject": "choice", "what": "layer a", "timesteps": 1, "density": 0.3, "batch": 16}
    choice |= {"threads": 1, "commit": "abc"}
    choice["contenders"] = {"never": own, "auto": {**own, "median_ms": 3.0}, "always": own}
    record.store(path, facts, "choice/a", choice)
    event = {"subject": "event", "network": "vgg16", "timesteps": 1, "batch": 1, "threads": 1}
    event |= {"density": 0.15, "commit": "abc", "times_faster": {"fp32": 2.5}}
    event["contenders"] = {"events fp32": own, "OpenVINO": {**own, "median_ms": 5.0}}
    record.store(path, facts, "event/a", event)
    norm = {"subject": "batch_norm", "timesteps": 1, "batch": 2, "channels": 3, "size": 4}
    norm |= {"layout": "contiguous", "dtype": "float32", "threads": 1, "commit": "abc"}
    norm["contenders"] = {"two modules": own, "BatchNormLIF": {**own, "ratio": 0.5}}
    record.store(path, facts, "batch_norm/a", norm)
    results = record.load(path)
    assert len(results["groups"]) == 12
    assert [g["timesteps"] for g in record.chosen(results, what="forward")] == [1, 4]
    written = report.report(path)
    assert {file.name for file in written} == {
        "m.md",
        "m-lif.png",
        "m-train.png",
        "m-density.png",
    }
    text = written[0].read_text()
    assert (
        "| forward, float32, out of cache, time / clone | <= 1.10 | 1.00 at worst (T = 4) |" in text
    )
    assert "# Benchmarks: m, 1 threads, avx2 (m (model 1))" in text
    assert "### LIF forward, out of cache, float32, 1 threads, avx2" in text
    assert "| spike_layers=auto / better of always and never | <= 1.03 | 1.50 at worst" in text
    assert "fp32: best dense / events | >= 3.2 | 2.50 |" in text
    assert "| 1 x 2 x 3 x 4 x 4 | contiguous | float32 | 2.00 | 2.00 | 0.50 |" in text
    assert "Norse did not take part: absent" in text
    assert "| iirsnn | 1300 | 1000 |" in text
    assert "| iirsnn | 1.00 (1000.00); 8.0 B + 4.0 |" in text


def test_the_commit_of_results_ignores_the_results(tmp_path, monkeypatch):
    def git(*arguments):
        name = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True)

    (tmp_path / "results").mkdir()
    for file in ("code.py", "results/a.json"):
        (tmp_path / file).write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code.py"))
    (tmp_path / "results" / "a.json").write_text("2\n")
    assert provenance.commit().endswith("-modified")
    assert not provenance.commit(ignore=["results"]).endswith("-modified")
    (tmp_path / "code.py").write_text("2\n")
    assert provenance.commit(ignore=["results"]).endswith("-modified")


def test_the_neighbours_table_is_relative_to_one_thread_alone(tmp_path):
    rows = {
        "one thread, alone": {"median_ms": 2.0, "p95_ms": 3.0, "most_ms": 4.0},
        "two threads, busy neighbour": {"median_ms": 2.5, "p95_ms": 5.0, "most_ms": 9.0},
    }
    group = {"subject": "neighbour", "what": "engine", "threads": 2, "contenders": rows}
    results = {"capability": "avx2", "groups": {"neighbour/a": group}}
    lines = tables._neighbour_table(results)
    assert lines[-2] == "| engine | two threads, busy neighbour | 2.50 | 1.25 | 2.50 | 4.50 |"


def test_kept_by_a_network_on_tensors_without_values():
    """At most 0.35 of SpikingJelly's, as the documentation says of a GPU."""
    pytest.importorskip("spikingjelly", reason="without it there is nothing to compare with")
    ours, other = "iirsnn, spike layers, BatchNormLIF", "SpikingJelly"
    found = kept.kept(5, 16, torch.bfloat16, "meta", (ours, other))
    assert found[ours] <= 0.35 * found[other]
