"""What the benchmarks share: contenders timed in turns, and the file the results go to."""

import itertools
import random
import time
from pathlib import Path

import pytest
import record
import torch
import traffic
from contenders import LIMIT, available
from one_process import cache_misses as misses_of

import iirsnn
from iirsnn.measure import provenance
from iirsnn.train import freed_memory


def pytest_addoption(parser):
    group = parser.getgroup("iirsnn", "benchmarks of iirsnn")
    group.addoption("--results", type=Path, help="JSON (default: build/bench/<machine>.json)")
    group.addoption("--full", action="store_true", help="every row, not the telling ones alone")
    group.addoption("--resume", action="store_true", help="leave out groups of this commit")
    group.addoption(
        "--allocator",
        choices=freed_memory.POLICIES,
        default="retain",
        help="freed memory stays with the process, as iirsnn train has it, or goes back",
    )
    group.addoption("--stop-after", type=float, help="seconds after which no group begins")


def pytest_configure(config):
    traffic.watch_inductor()
    kept = freed_memory.apply(config.getoption("--allocator"))
    config.stash[ALLOCATOR] = "retain" if kept else "system"
    config.addinivalue_line("markers", "telling: timed without --full as well")
    config.stash[STARTED] = time.monotonic()


STARTED, ALLOCATOR = pytest.StashKey(), pytest.StashKey()


def results_file(config):
    return config.getoption("--results") or record.default_file(record.BUILD)


def key_of(item):
    """The id of a test's group: its file's subject and its parameters."""
    return item.nodeid.split("/")[-1].removeprefix("bench_").replace(".py::test_", "/")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is not telling (unless --full) and what --resume finds done."""
    done = {}
    if config.getoption("--resume"):
        commit = commit_of_code()
        groups = record.load(results_file(config))["groups"]
        done = {key for key, group in groups.items() if group["commit"] == commit}
    full = config.getoption("--full")
    out = [
        item
        for item in items
        if key_of(item) in done or not (full or item.get_closest_marker("telling"))
    ]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def say(request):
    return lambda line: tell(request.config, line)


def tell(config, line):
    """A line on the terminal at once, whether or not pytest captures what tests print."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.get_terminal_writer().line(line, flush=True)


def pytest_runtest_setup(item):
    seconds = time.monotonic() - item.config.stash[STARTED]
    limit = item.config.getoption("--stop-after")
    if limit is not None and seconds > limit:
        pytest.skip(f"--stop-after {limit:.0f}: run again with --resume")
    items = item.session.items
    place = f"[{items.index(item) + 1} of {len(items)}, {seconds:.0f} s]"
    tell(item.config, f"\n{place} {key_of(item)}")


def pytest_sessionfinish(session):
    if session.items and results_file(session.config).exists():
        tell(session.config, f"\nresults: {results_file(session.config)}")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["iirsnn"] = iirsnn.env_report()


def commit_of_code():
    """The commit, marked as modified only where more than results and documents are."""
    return provenance.commit(ignore=("benchmarks/results", "*.md"))


@pytest.fixture
def full(request):
    """Whether every contender takes part, those that have to be compiled for minutes too."""
    return request.config.getoption("--full")


def one_round(functions, times, order=None):
    """Calls each function once and appends its seconds to times[name]."""
    for name in order or functions:
        start = time.perf_counter()
        result = functions[name]()
        times[name].append(time.perf_counter() - start)
        del result  # freed outside the measured time


SLOW = 8  # times the limit: such contenders sit out most rounds where rounds are many


@pytest.fixture
def race(benchmark, request):
    """Times the contenders of one group in turns and puts them into the results file.

    race(functions, facts, rows, seconds, rounds): functions {name: call}, `limit` among them;
    facts and rows go into the group and its contenders as they are. Between rounds[0] and rounds[1]
    rounds, as `seconds` allow, in an order drawn anew each time; contenders many times slower than
    the limit take part in rounds[0] of them, evenly spread. pytest-benchmark times whole rounds.
    """

    def run(functions, facts, rows, seconds, rounds=(5, 51), limit=LIMIT):
        slow, count = set(), rounds[0]
        if rounds[0] != rounds[1]:
            first = {name: [] for name in functions}
            one_round(functions, first)
            slow = {name for name, taken in first.items() if taken[0] > SLOW * first[limit][0]}
            fast = sum(taken[0] for name, taken in first.items() if name not in slow)
            spent = rounds[0] * sum(first[name][0] for name in slow)
            count = max(rounds[0], min(rounds[1], int((seconds - spent) / fast)))
        every = count // rounds[0]
        times = {name: [] for name in functions}
        order, draw, turns = list(functions), random.Random(0), itertools.count()

        def turn():
            draw.shuffle(order)
            whole = next(turns) % every == 0
            one_round(functions, times, order if whole else [n for n in order if n not in slow])

        benchmark.pedantic(turn, rounds=count, iterations=1)
        found = record.summary(times, limit)
        for name, row in found.items():
            row.update(rows.get(name, {}))
        group = {
            **facts,
            "allocator": request.config.stash[ALLOCATOR],
            "commit": commit_of_code(),
            "contenders": found,
        }
        benchmark.extra_info.update(group)
        keep(request, group)
        for name, row in found.items():
            line = f"  {name:<36} {row['median_ms']:10.3f} ms {row['ratio']:7.2f} x {limit}"
            tell(request.config, f"{line} ({row['rounds']} rounds)")

    return run


@pytest.fixture
def keep_group(request):
    """keep_group(facts, rows): puts a group that `race` did not time into the results file."""
    return lambda facts, rows: keep(
        request, {**facts, "commit": commit_of_code(), "contenders": rows}
    )


def keep(request, group):
    found, missing = available()
    facts = {
        **record.machine(),
        "versions": dict([c.version.split() for c in found]),
        "missing": missing,
        "notes": {c.name: c.note for c in found if c.note},
    }
    if request.config.getoption("--full"):
        facts["cache_misses"] = request.getfixturevalue("cache_misses")
    for row in group["contenders"].values():
        row["capability"] = facts["capability"]
    group["processor"] = facts["processor"]
    record.store(results_file(request.config), facts, key_of(request.node), group)


@pytest.fixture(scope="session")
def cache_misses():
    """Last-level-cache misses per neuron and timestep, or why they were not counted, in words."""
    timesteps, elements, counted = 4, 2**23, {}
    for name in ("iirsnn", "torch.compile", "SpikingJelly"):
        counted[name] = misses_of(name, timesteps, elements)
        if isinstance(counted[name], str):
            return f"not counted: {counted[name]}"
    return "forward and backward, T = 4, per neuron and timestep: " + ", ".join(
        f"{name} {count / elements:.3f}" for name, count in counted.items()
    )
