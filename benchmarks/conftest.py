"""What the benchmarks share: pieces timed in turns, and facts of the machine in the JSON."""

import time

import pytest
import torch

import iirsnn


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["iirsnn"] = iirsnn.env_report()


@pytest.fixture
def in_turns():
    """Times several functions round robin, so that a busy moment of the machine hits all of them.

    in_turns({name: function}, rounds) -> {name: median seconds}; each is called once before.
    """

    def run(functions, rounds=15):
        times = {name: [] for name in functions}
        for function in functions.values():
            function()
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                result = function()
                times[name].append(time.perf_counter() - start)
                del result  # freed outside the measured time
        return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}

    return run
