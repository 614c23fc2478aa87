"""How convolutions by events are cut up: csrc/spike/spike_plan.cpp, compiled alone."""

import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
CACHED, CHUNK, TILE, WORD = 192, 1024, 32, 64  # rows, positions, outputs, channels
CONV = (
    *("images", "channels", "height", "width", "outputs", "out_height", "out_width", "groups"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
    *("dilation_h", "dilation_w", "threads"),
)
PLAN = (
    *("block", "blocks", "images", "image_chunks", "rows", "row_chunks", "tiles", "tile_parts"),
    *("units", "grad_blocks", "left", "pitch", "grad_images", "grad_units", "grad_rows"),
    *("grad_tiles", "splits"),
)


def conv(images, channels, size, outputs, kernel, stride, padding, dilation, groups, threads):
    """size, kernel, stride, padding and dilation: (rows, columns)."""
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    numbers = [images, channels, *size, outputs, *out, groups]
    numbers += [*kernel, *stride, *padding, *dilation, threads]
    return SimpleNamespace(**dict(zip(CONV, numbers, strict=True)))


def named():
    one, none = (1, 1), (0, 0)
    for threads in (1, 2, 3, 64):
        for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2)):
            for images in (1, 16, 64):
                yield conv(
                    images, channels, (size, size), channels, (3, 3), one, one, one, 1, threads
                )
        yield conv(64, 4096, one, 4096, one, one, none, one, 1, threads)
        yield conv(2, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3), one, 1, threads)
        yield conv(1, 4, (3, 9000), 4, (3, 3), one, one, one, 1, threads)
        yield conv(5, 90, (6, 6), 40, (3, 3), one, one, one, 5, threads)


def drawn(count):
    draw = random.Random(0)
    while count:
        groups = draw.choice((1, 1, 1, 2, 5))
        found = conv(
            draw.randint(1, 70),
            groups * draw.randint(1, 200),
            (draw.randint(1, 40), draw.randint(1, 40)),
            groups * draw.randint(1, 100),
            (draw.randint(1, 5), draw.randint(1, 5)),
            (draw.randint(1, 3), draw.randint(1, 3)),
            (draw.randint(0, 4), draw.randint(0, 4)),
            (draw.randint(1, 3), draw.randint(1, 3)),
            groups,
            draw.choice((1, 2, 3, 16)),
        )
        if found.out_height > 0 and found.out_width > 0:
            count -= 1
            yield found


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """[(conv, plan)] of every case."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (apt-get install g++)")
    program = tmp_path_factory.mktemp("plan") / "plan"
    sources = [HERE / "spike_plan.cpp", CSRC / "spike" / "spike_plan.cpp"]
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-psabi", f"-I{CSRC}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    convs = [*named(), *drawn(2000)]
    text = "\n".join(" ".join(map(str, vars(c).values())) for c in convs)
    run = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    return [
        (c, SimpleNamespace(**dict(zip(PLAN, map(int, line.split()), strict=True))))
        for c, line in zip(convs, lines, strict=True)
    ]


def covers(part, parts, whole):
    """`parts` of `part` hold `whole`, and none is empty."""
    return part > 0 and (parts - 1) * part < whole <= parts * part


def test_forward_covers_everything_once(plans):
    for c, plan in plans:
        assert plan.block % WORD == 0
        assert covers(plan.block, plan.blocks, c.channels // c.groups), c
        assert covers(plan.images, plan.image_chunks, c.images), c
        assert covers(plan.rows, plan.row_chunks, c.out_height), c
        assert plan.images == 1 or plan.rows == c.out_height, c
        assert plan.tiles == c.groups * (-(-(c.outputs // c.groups) // TILE)), c
        assert 1 <= plan.tile_parts <= plan.tiles, c
        assert plan.units == plan.image_chunks * plan.row_chunks * plan.tile_parts, c


def test_forward_stays_in_the_caches(plans):
    for c, plan in plans:
        assert plan.block * c.kernel_w <= CACHED or plan.block == WORD, c
        assert plan.images * plan.rows * c.out_width <= CHUNK or plan.images * plan.rows == 1, c


def test_forward_has_work_for_every_thread(plans):
    for c, plan in plans:
        most = plan.image_chunks * plan.row_chunks * plan.tiles
        assert plan.units >= min(most, c.threads), c
        if c.threads == 1:
            assert plan.tile_parts == 1, c


def test_weight_gradient_covers_everything_once(plans):
    for c, plan in plans:
        assert covers(WORD, plan.grad_blocks, c.channels // c.groups), c
        assert covers(plan.grad_images, plan.grad_units, c.images), c
        assert covers(TILE, plan.grad_tiles, c.outputs // c.groups), c
        assert 1 <= plan.splits <= plan.grad_units, c
        assert plan.grad_images == 1 or plan.grad_rows == c.out_height, c


def test_weight_gradient_stays_in_the_cache(plans):
    for c, plan in plans:
        positions = plan.grad_images * plan.grad_rows * plan.pitch
        assert positions <= CACHED or plan.grad_images * plan.grad_rows == 1, c


def test_weight_gradient_reads_zeros_beside_a_row(plans):
    """Where a kernel column leads from an input column to none of the output."""
    for c, plan in plans:
        assert plan.pitch == c.out_width + plan.left, c
        for x in range(c.width) if c.width < 100 else (0, c.width - 1):
            for column in range(c.kernel_w):
                place = x + c.padding_w - column * c.dilation_w
                if place % c.stride_w == 0:
                    assert -plan.left <= place // c.stride_w < plan.pitch, c
