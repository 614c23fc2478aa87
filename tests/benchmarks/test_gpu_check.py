"""make gpu-check: where there is nothing to check, and rehearsed on the processor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


def test_says_in_one_line_that_there_is_no_gpu():
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "no CUDA device" in run.stderr.splitlines()[-1]


def test_names_of_cases_are_unique_and_the_tests_come_first(gpu_check):
    names = [case.name for case in gpu_check.cases()]
    assert len(set(names)) == len(names)
    assert [name.split()[0] for name in names[:5]] == ["limit", *["test"] * 4]


@pytest.mark.parametrize(
    "name",
    [
        *("limit", "lif T=1 fp32", "bn_lif T=5 bf16", "call T=5"),
        pytest.param("network vgg16 T=1", marks=pytest.mark.slow),
        "network vgg16 bits",
        "network vgg16 snntorch T=1",
        "network vgg16 spikingjelly T=1",
        "compiled batch_norm lif",
    ],
)
def test_a_case_in_a_process_of_its_own(gpu_check, name):
    case = next(case for case in gpu_check.cases() if case.name.startswith(name))
    found = gpu_check.run_case(gpu_check.start(case, "cpu"), 120)
    assert "failed" not in found
    assert all(row["ms"] > 0 for row in found["rows"] if "ms" in row)
    told = [row for row in found["rows"] if {"ms", "us", "missing"} & row.keys()]
    assert told
    assert all("missing" not in row or row["implementation"] != "iirsnn" for row in told)
    assert all(row["us"] > 0 for row in found["rows"] if "us" in row)
    assert all(row["memory_ms"] > 0 for row in told if row["kind"] == "network" and "ms" in row)


def test_nothing_is_imported_while_the_host_is_timed(gpu_check, monkeypatch, tmp_path):
    class Process:
        kill = communicate = staticmethod(lambda: None)

    events = []
    monkeypatch.setattr(gpu_check, "AHEAD", 2)
    monkeypatch.setattr(
        gpu_check, "start", lambda case, device: events.append(case.kind) or Process()
    )
    monkeypatch.setattr(
        gpu_check, "run_case", lambda *_: events.append("run") or {"rows": [], "seconds": 1}
    )
    kinds = ("network", "lif", "bn_lif", "call", "limit", "test")
    chosen = [gpu_check.Case(kind, what=kind) for kind in kinds]
    gpu_check.check(tmp_path / "gpu.json", "cpu", chosen, 60)
    assert " ".join(events) == "network run lif bn_lif call run run run limit test run run"


def test_compiles_ahead_in_several_processes(gpu_check, monkeypatch, tmp_path):
    script = tmp_path / "cases.py"
    script.write_text(
        "import json, os, sys\n"
        f"open({str(tmp_path)!r} + f'/{{os.getpid()}}.told', 'w').write(sys.argv[1])\n"
    )
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    chosen = [gpu_check.Case("lif", 20, what) for what in "abc"] + [gpu_check.Case("test", 20, "d")]
    assert gpu_check.leave_compiled(chosen, "cpu", 2, 60) > 0
    told = [json.loads(path.read_text()) for path in tmp_path.glob("*.told")]
    assert sorted([case["what"] for case in part] for part in told) == [["a", "c"], ["b"]]


def test_what_hangs_or_breaks_ahead_holds_up_nothing(gpu_check, monkeypatch, tmp_path, capsys):
    script = tmp_path / "cases.py"
    script.write_text(
        "import json, sys, time\n"
        "what = json.loads(sys.argv[1])[0]['what']\n"
        "time.sleep(600) if what == 'hangs' else sys.exit(3)\n"
    )
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    chosen = [gpu_check.Case("lif", 20, what) for what in ("hangs", "breaks")]
    assert 2 <= gpu_check.leave_compiled(chosen, "cpu", 2, 2) < 300
    told = capsys.readouterr().out
    assert "exit -9 ahead" in told
    assert "exit 3 ahead" in told


def test_a_missing_library_stands_in_the_table_once(gpu_check):
    row = {"kind": "call", "implementation": "snntorch", "missing": "ImportError: no snntorch"}
    results = {"cases": {name: {"rows": [dict(row)]} for name in ("call T=1", "call T=5")}}
    assert gpu_check.table(results).count("missing: snntorch (call): ImportError: no snntorch") == 1


def test_a_library_that_was_missing_takes_part_once_it_is_there(gpu_check, tmp_path):
    path = tmp_path / "gpu.json"
    here = {"commit": "a", "device": "b", "spikingjelly": "2.0.0", "snntorch": None}
    cases = {"lif": {"rows": [{"ms": 1}]}, "call": {"rows": [{"missing": "no module"}]}}
    path.write_text(json.dumps(here | {"cases": cases}))
    assert gpu_check.kept(path, here) == cases
    assert gpu_check.kept(path, here | {"snntorch": "1.0.0"}) == {"lif": cases["lif"]}
    assert gpu_check.kept(path, here | {"commit": "c"}) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"commit": "a", "device": "b"}'])
def test_a_file_that_holds_no_results_is_named(gpu_check, tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    here = {"commit": "a", "device": "b", "spikingjelly": None, "snntorch": None}
    with pytest.raises(
        SystemExit, match=r"gpu\.json: expected results of a call before, or no file"
    ):
        gpu_check.kept(path, here)
    assert path.read_text() == text


def test_what_is_compiled_ahead_takes_of_the_time(gpu_check, monkeypatch, tmp_path):
    left = []
    monkeypatch.setattr(gpu_check, "leave_compiled", lambda *_: 25.0)
    monkeypatch.setattr(gpu_check, "check", lambda *told: left.append(told[-1]) or {"cases": {}})
    monkeypatch.setattr(gpu_check, "report", lambda *_: None)
    flags = ["--rehearse", "--ahead", "1", "--seconds", "60", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
    assert gpu_check.main() == 0
    assert left == [35.0]


def test_a_case_that_fails_ahead_costs_no_other(gpu_check):
    case = next(case for case in gpu_check.cases() if case.name.startswith("lif T=1 fp32"))
    told = [{**vars(case), "map": "unknown"}, {**vars(case), "dtype": "unknown"}, vars(case)]
    run = subprocess.run(
        [sys.executable, str(gpu_check.SCRIPT), json.dumps(told), "cpu"],
        **{"capture_output": True, "text": True},
    )
    assert run.returncode == 0
    assert run.stdout == ""
    assert run.stderr.count("KeyError") == 1  # the processor has a map of its own


def test_a_case_that_breaks_or_hangs_costs_no_other(gpu_check, monkeypatch, tmp_path):
    script = tmp_path / "cases.py"
    script.write_text(
        "import json, os, sys, time\n"
        "case = json.loads(sys.argv[1])\n"
        f"open({str(tmp_path / 'called')!r}, 'a').write(case['what'] + ' ')\n"
        "sys.stdin.readline()\n"
        f"mended = os.path.exists({str(tmp_path / 'mended')!r})\n"
        "if mended: case['what'] = 'works'\n"
        "time.sleep(60 if case['what'] == 'hangs' else 0)\n"
        "sys.exit('CUDA error: an illegal memory access') if case['what'] == 'breaks' else None\n"
        "print(json.dumps([{**case, 'implementation': 'cuda', 'ms': 1.0, 'ratio': 1.5,"
        " 'cache': 'cold'}]))\n"
    )
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    chosen = [gpu_check.Case("lif", 20, what) for what in ("breaks", "works")]
    chosen.insert(0, gpu_check.Case("lif", 1, "hangs"))
    path = tmp_path / "gpu-fake.json"
    start = time.monotonic()
    results = gpu_check.check(path, "cpu", chosen, 60)
    assert time.monotonic() - start < 50
    assert results == json.loads(path.read_text())
    hangs, breaks, works = results["cases"].values()
    assert hangs["failed"] == "not done after 1 s"
    assert breaks["failed"] == "exit 1: CUDA error: an illegal memory access"
    assert len(works["rows"]) == 1
    assert len(gpu_check.broken(results)) == 2

    called = tmp_path / "called"
    assert sorted(called.read_text().split()) == ["breaks", "hangs", "works"]
    (tmp_path / "mended").touch()  # a second call goes on where the first one failed
    assert gpu_check.broken(gpu_check.check(path, "cpu", chosen, 60)) == []
    assert sorted(called.read_text().split()[3:]) == ["breaks", "hangs"]

    gpu_check.report(path, results)
    assert (tmp_path / "gpu-fake.md").read_text().count("FAILED") == 2
    assert "<svg" in (tmp_path / "gpu-fake-lif.svg").read_text()
    assert gpu_check.deviations(results) == [
        "lif works T=1 fp32 contiguous scalar 64x32x32, works, cuda: 1.50 times the time of the "
        "same bytes, 1.00 predicted"
    ]


def test_predicts_what_the_issue_slots_allow(gpu_check):
    row = {"kind": "bn_lif", "what": "backward", "dtype": "bf16", "timesteps": 5}
    row["layout"] = "channels_last"
    assert gpu_check.predicted(row) == pytest.approx((2 * 1.37 + 3) / 5)
    assert gpu_check.predicted(row | {"layout": "contiguous"}) == pytest.approx(1.072)
    for other in ({"kind": "lif"}, {"what": "forward"}, {"dtype": "fp32"}, {"timesteps": 1}):
        assert gpu_check.predicted(row | other) == 1.0


def test_stops_when_its_time_is_over(gpu_check, tmp_path, capsys):
    results = gpu_check.check(tmp_path / "gpu.json", "cpu", gpu_check.cases(), 0)
    assert results["cases"] == {}
    assert "cases are left: call again" in capsys.readouterr().out
