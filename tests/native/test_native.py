"""The CPU kernels without torch: the same bits by every compiler, on every instruction set.

IIRSNN_TEST_CLANG=clang++ compiles csrc by clang too, and -m slow for ARM, where a cross compiler is
installed: some minutes, the first time.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.native.toolchain import ARM, CLANG, HOST, ROOT, build, package


def bits(toolchain, **environment) -> dict[str, str]:
    """Hashes by case; a skip where this processor lacks the capability asked for."""
    done = toolchain.run(build(toolchain), **environment)
    if "expected portable, avx2 or avx512" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def expected():
    return bits(HOST, IIRSNN_CPU_CAPABILITY="portable")


def check(found: dict[str, str], expected: dict[str, str]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{len(different)} of {len(expected)} cases differ: {different[:20]}"


def test_cases(expected):
    kinds = {name.split("/")[0] for name in expected}
    assert kinds == {"lif", "lif_forward", "lif_backward", "bn_lif", "event", "spike"}
    assert len(set(expected.values())) > len(expected) / 2


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_same_bits_of_every_instruction_set(expected, capability):
    check(bits(HOST, IIRSNN_CPU_CAPABILITY=capability), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_by_any_number_of_threads(expected, threads):
    check(bits(HOST, THREADS=str(threads)), expected)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make: apt-get install make")
def test_the_sanitizers_have_every_kernel():
    command = ["make", "--dry-run", "--always-make", "KINDS=thread", "build/sanitize/thread/driver"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = {ROOT / name for name in re.findall(r" -c (csrc/\S+\.cpp) ", said)}
    assert sources == set(package.kernel_sources())


@pytest.mark.slow  # compiles all kernels for another processor
def test_same_bits_on_arm(expected):
    check(bits(ARM), expected)


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_same_bits_by_clang(expected, capability):
    if not CLANG.compiler:
        pytest.skip("compiles for some minutes: IIRSNN_TEST_CLANG=clang++ runs it")
    check(bits(CLANG, IIRSNN_CPU_CAPABILITY=capability), expected)
