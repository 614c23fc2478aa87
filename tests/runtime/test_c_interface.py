"""iirsnn.h itself: what it refuses, who owns what, and threads that let go of a network."""

import ctypes
import subprocess
import sys
import threading
from ctypes import byref, c_int64, c_uint64, c_void_p

import numpy as np
import pytest

from iirsnn import runtime
from iirsnn.errors import UsageError
from iirsnn.runtime.library import Facts, Layer, library, set_capability
from tests.event.networks import levels
from tests.runtime.test_network import saved, vgg

OK, BAD_ARGUMENT, BAD_FILE = 0, 1, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model, x = vgg()
    path = tmp_path_factory.mktemp("c") / "net"
    saved(path, model, x)
    return path, x.numpy()


@pytest.fixture
def network(file):
    handle = c_void_p()
    assert library().iirsnn_load_file(bytes(file[0]), byref(handle)) == OK
    yield handle
    library().iirsnn_release(handle)


def message():
    return library().iirsnn_message().decode()


def run(network, x, call=None, threads=1, logits=None):
    logits = np.empty((len(x), 10), np.float32) if logits is None else logits
    place = None if call is None else byref(call)
    status = library().iirsnn_run(
        network, x.ctypes.data, len(x), threads, logits.ctypes.data, place
    )
    return status, logits


def test_null_is_refused_everywhere(file, network):
    bits, place = ctypes.POINTER(c_uint64)(), c_void_p()
    x = file[1].ctypes.data
    calls = {
        "load_file": [(None, byref(place)), (b"net", None)],
        "load_memory": [(None, 0, byref(place)), (b"net", 3, None)],
        "describe": [(None, byref(Facts())), (network, None)],
        "prepare": [(None, x, 16, 16, 3, x), (network, None, 16, 16, 3, x)],
        "run": [
            (None, x, 1, 1, x, None),
            (network, None, 1, 1, x, None),
            (network, x, 1, 1, 0, None),
        ],
        "layer_of": [(None, 0, byref(Layer()))],
        "memory_of": [(None, byref(c_int64()))],
        "spikes_of": [(None, 0, byref(bits))],
        "set_capability": [(None,)],
    }
    for name, cases in calls.items():
        for arguments in cases:
            assert getattr(library(), f"iirsnn_{name}")(*arguments) == BAD_ARGUMENT, name
            assert "got NULL" in message()
    for name in ("release", "retain", "free_call"):
        getattr(library(), f"iirsnn_{name}")(None)
    assert library().iirsnn_class_name(None, 0) is None
    assert library().iirsnn_image_notes(None) is None


def test_numbers_out_of_range(file, network):
    _, x = file
    assert library().iirsnn_run(network, 0, 0, 1, 0, None) == OK  # no images are no error
    assert library().iirsnn_run(network, x.ctypes.data, -1, 1, x.ctypes.data, None) == BAD_ARGUMENT
    assert message() == "count: expected 0 or more images, got -1"
    assert run(network, x, threads=-1)[0] == BAD_ARGUMENT
    assert message() == "threads: expected 0 or more, got -1"
    call = c_void_p()
    assert run(network, x, call)[0] == OK
    layers, last = runtime.load(file[0]).layers, Layer()
    for index in (-1, layers, 1 << 40):
        assert library().iirsnn_layer_of(call, index, byref(last)) == BAD_ARGUMENT
        assert message() == f"index: expected a layer below {layers}, got {index}"
    assert library().iirsnn_layer_of(call, layers - 1, byref(last)) == OK
    bits = ctypes.POINTER(c_uint64)()
    assert library().iirsnn_spikes_of(call, layers - 1, byref(bits)) == BAD_ARGUMENT
    assert message() == f"index: expected a layer with neurons, got {layers - 1}"
    library().iirsnn_free_call(call)
    assert library().iirsnn_class_name(network, 0) is None  # the file has no names


def test_outputs_are_left_alone_by_a_failure(file, network):
    _, x = file
    logits, bad = np.full((len(x), 10), 7, np.float32), x.copy()
    bad[-1, -1, -1, -1] = np.inf
    call = c_void_p(1)
    assert run(network, bad, call, logits=logits)[0] == BAD_ARGUMENT
    assert (logits == 7).all()
    assert call.value == 1
    place = c_void_p(1)
    assert library().iirsnn_load_memory(b"x" * 99, 99, byref(place)) == BAD_FILE
    assert library().iirsnn_load_file(b"/no/such/file", byref(place)) == BAD_FILE
    assert message() == "/no/such/file: No such file or directory"
    assert library().iirsnn_load_file(b"/", byref(place)) == BAD_FILE
    assert place.value == 1


def test_a_message_is_of_its_thread(network):
    assert library().iirsnn_describe(network, None) == BAD_ARGUMENT
    here, there = message(), []
    thread = threading.Thread(target=lambda: there.append(message()))
    thread.start()
    thread.join()
    assert here
    assert there == [""]


def test_threads_that_let_go_of_a_network_while_others_run_it(file):
    path, x = file
    handle = c_void_p()
    assert library().iirsnn_load_file(bytes(path), byref(handle)) == OK
    expected = run(handle, x)[1]
    retain = library().iirsnn_retain
    retain.argtypes, retain.restype = [c_void_p], None
    start, wrong = threading.Barrier(5), []

    def caller():
        start.wait()
        for _ in range(5):
            call = c_void_p()
            status, logits = run(handle, x, call, threads=2)
            library().iirsnn_free_call(call)
            if status != OK or not np.array_equal(logits, expected):
                wrong.append(status)
        library().iirsnn_release(handle)

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        retain(handle)
        thread.start()
    start.wait()
    library().iirsnn_release(handle)  # the one who loaded it goes while all of them run
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_outlives_its_network(file):
    path, x = file
    handle, call, layer, size = c_void_p(), c_void_p(), Layer(), c_int64()
    assert library().iirsnn_load_file(bytes(path), byref(handle)) == OK
    assert run(handle, x, call)[0] == OK
    library().iirsnn_release(handle)
    assert library().iirsnn_layer_of(call, 0, byref(layer)) == OK
    assert layer.kind == b"neurons"
    assert library().iirsnn_memory_of(call, byref(size)) == OK
    assert size.value > 8 * layer.height * layer.width * len(x)
    library().iirsnn_free_call(call)


def test_a_capability_that_is_not_there():
    before = library().iirsnn_capability()
    with pytest.raises(UsageError, match=r"cpu capability: expected .* got 'mmx'"):
        set_capability("mmx")
    assert library().iirsnn_capability() == before
    for name in levels():
        set_capability(name)
        assert library().iirsnn_capability().decode() == name
    assert library().iirsnn_capability() == before


def test_no_memory_for_a_network(file):
    """Whatever memory is left, loading either works or says that there is none."""
    code = (
        "import resource, sys\n"
        "import iirsnn.runtime\n"
        "from iirsnn.runtime.library import library\n"
        "library()\n"
        "ended = []\n"
        "for kilobytes in range(0, 6000, 100):\n"
        "    now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (now + 1024 * kilobytes, -1))\n"
        "    try:\n"
        "        iirsnn.runtime.load(sys.argv[1])\n"
        "        ended.append('loaded')\n"
        "    except MemoryError:\n"
        "        ended.append('no memory')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "print(ended[0], ended[-1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file[0]], capture_output=True, text=True)
    assert done.stdout == "no memory loaded\n", done.stderr
