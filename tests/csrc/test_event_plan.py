"""How the work of the event engine is cut up: csrc/event/plan.cpp, compiled alone."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
PRECISIONS = ("fp32", "bf16", "int8")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan(question, *numbers) -> [[numbers]]."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (apt-get install g++)")
    program = tmp_path_factory.mktemp("plan") / "plan"
    sources = [HERE / "event_plan.cpp", CSRC / "event" / "plan.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-psabi", f"-I{CSRC}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)

    def ask(question, *numbers):
        text = " ".join([question, *map(str, numbers)])
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        return [list(map(int, line.split())) for line in done.stdout.splitlines()]

    return ask


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("images", [1, 5, 200])
@pytest.mark.parametrize(
    ("out", "rows"),
    [
        ((70, 7, 6), False),
        ((256, 9, 9), False),
        ((512, 2, 2), True),
        ((10, 1, 1), True),
        ((3, 224, 224), False),
    ],
)
@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tasks_are_the_whole_layer_once(plan, out, rows, images, threads, wide, precision):
    covered = np.zeros((out[0], images, out[1]), np.int8)
    for output, outputs, first, count, top, height in plan(
        "tasks", *out, images, 2, PRECISIONS.index(precision), int(rows), threads, wide
    ):
        assert min(outputs, count, height) > 0
        covered[output : output + outputs, first : first + count, top : top + height] += 1
    assert (covered == 1).all()


def test_a_large_layer_has_tasks_for_every_thread(plan):
    fp32, tiles, rows = 0, 0, 1
    assert len(plan("tasks", 64, 32, 32, 1, 1, fp32, tiles, 4, 0)) >= 3 * 4
    assert len(plan("tasks", 128, 32, 32, 1, 1, fp32, tiles, 4, 1)) >= 3 * 4
    assert len(plan("tasks", 4096, 1, 1, 1, 1, fp32, rows, 4, 0)) >= 4


@pytest.mark.parametrize(("groups", "most"), [(1, 1), (2, 1), (1, 4), (1, 60)])
def test_sums_of_16_bits_are_carried_over_before_they_overflow(plan, groups, most):
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (6, 200 // groups, 9))
    carries = plan("carries", 6, groups, 200 // groups, 9, most, *weight.flat)
    carries = np.array(carries).reshape(-1, 9)
    dense = np.zeros((6, 200, 9))
    for k in range(6):
        group = k // (6 // groups)
        dense[k, group * 200 // groups : (group + 1) * 200 // groups] = abs(weight[k]) * most
    sums = np.zeros(6)
    for word, row in enumerate(carries):
        for tap, carry in enumerate(row):
            block = dense[:, 64 * word : 64 * (word + 1), tap].sum(1)
            if carry == 2:
                assert block.max() > 32767  # else it would do without
                sums = np.zeros(6)
                continue
            assert carry == int((sums + block).max() > 32767)
            sums = block if carry else sums + block
            assert sums.max() <= 32767


def test_taps_lie_inside_the_image(plan):
    height, width = 5, 4
    window = [3, 2, 2, 1, 2, 3, 2, 1, 2, 3]  # kernel, stride, dilation, padding before and after
    out_height, out_width = (height + 4 - 4 - 1) // 2 + 1, width + 4 - 3
    for top, bottom in [(0, out_height), (1, 2)]:
        taps = plan("taps", 1, height, width, *window, top, bottom)
        assert len(taps) == 6
        for index, (pixel, position, rows, columns) in enumerate(taps):
            ky, kx = divmod(index, 2)
            inside = [
                (y, x)
                for y in range(top, bottom)
                for x in range(out_width)
                if 0 <= 2 * y + 2 * ky - 2 < height and 0 <= x + 3 * kx - 1 < width
            ]
            assert rows * columns == len(inside)
            if inside:
                y, x = inside[0]
                assert pixel == (2 * y + 2 * ky - 2) * width + x + 3 * kx - 1
                assert position == (y - top) * out_width + x
