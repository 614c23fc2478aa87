"""The state of a stateful FusedLIF: whose it is, where it goes, what may not be done with it."""

import contextlib
import copy
import io
import multiprocessing
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import iirsnn
from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.functional import lif
from iirsnn.ops import reference
from tests.processes import join, printed, start_many


def stateful(**options):
    return FusedLIF(0.8, 0.9, stateful=True, **options)


def started(*shape, **options):
    neuron = stateful(**options)
    neuron(torch.rand(3, *(shape or (4,))))
    return neuron


@pytest.mark.parametrize("reset", reference.RESETS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_stream_in_pieces_equals_the_whole(reset, grad):
    x = (torch.randn(9, 2, 5) + 0.4).requires_grad_(grad)
    neuron, whole = stateful(reset=reset, backend="auto"), FusedLIF(0.8, 0.9, reset=reset)
    with contextlib.nullcontext() if grad else torch.no_grad():
        pieces = torch.cat([neuron(piece) for piece in x.split([1, 2, 6])])
        assert torch.equal(pieces, whole(x))
        assert not torch.equal(neuron(x), pieces)
        neuron.reset_state()
        assert torch.equal(neuron(x), pieces)


def test_each_piece_has_the_gradient_of_a_sequence_from_its_state():
    x = torch.randn(6, 2, 5) + 0.4
    neuron = stateful()
    pieces = [piece.clone().requires_grad_() for piece in x.split([2, 4])]
    spikes = [neuron(piece) for piece in pieces]
    torch.cat(spikes).sum().backward()  # after all of them: no state was written over
    v = None
    for piece in pieces:
        alone = piece.detach().clone().requires_grad_()
        s, v = lif(alone, 0.8, 0.9, v, return_v=True)
        s.sum().backward()
        v = v.detach()
        assert torch.equal(piece.grad, alone.grad)


def test_the_state_is_detached():
    neuron = stateful()
    for _ in range(2):  # a second backward through the first piece would raise
        neuron(torch.rand(3, 4, requires_grad=True)).sum().backward()
    assert not neuron.state.requires_grad


def test_the_state_stays_one_tensor_that_nobody_else_holds():
    neuron = stateful(return_v=True)
    assert neuron.state is None
    _, v = neuron(torch.rand(3, 4))
    state = neuron.state
    assert torch.equal(state, v)
    v.fill_(7.0)
    assert not (state == 7).any()
    neuron(torch.rand(2, 4))
    neuron.reset_state()
    neuron(torch.rand(2, 4))
    assert neuron.state is state


def test_the_state_is_neither_parameter_nor_buffer():
    neuron = started()
    assert set(neuron.state_dict()) == {"threshold", "leak"}
    assert list(neuron.buffers()) == []
    buffer = io.BytesIO()
    torch.save(neuron.state_dict(), buffer)


def test_the_state_follows_to():
    neuron = started()
    before = neuron.state.clone()
    assert neuron.half().state.dtype == torch.float32  # membranes are never 16 bits
    assert neuron.to(torch.bfloat16).state.dtype == torch.float32
    assert torch.equal(neuron.state, before)
    assert neuron.double().state.dtype == torch.float64
    assert neuron.float().state.dtype == torch.float32
    assert torch.equal(neuron.state, before)
    assert not neuron.share_memory().state.is_shared()
    assert neuron.to("meta").state.device.type == "meta"
    assert neuron.to_empty(device="cpu").state is None


def test_the_state_takes_the_precision_of_its_input():
    neuron = started()
    neuron(torch.rand(2, 4, dtype=torch.float64))
    assert neuron.state.dtype == torch.float64
    neuron(torch.rand(2, 4).bfloat16())
    assert neuron.state.dtype == torch.float32


@pytest.mark.parametrize("way", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_goes_on_from_the_same_state_by_itself(way):
    neuron = started()
    twin = way(neuron)
    x = torch.rand(3, 4)
    first = neuron(x)
    assert torch.equal(twin(x), first)
    neuron(x)
    assert not torch.equal(twin.state, neuron.state)


def _advance(queue, neuron):
    with torch.no_grad():
        neuron(torch.full((3, 4), 0.7))
    queue.put(neuron.state.tolist())


def test_a_process_that_gets_the_neuron_gets_a_state_of_its_own():
    context = multiprocessing.get_context("forkserver")
    neuron, queue = started().share_memory(), context.Queue()
    before = neuron.state.clone()
    process = context.Process(target=_advance, args=(queue, neuron))
    process.start()
    state = queue.get(timeout=120)
    process.join()
    assert torch.equal(neuron.state, before)
    assert state != before.tolist()


def test_another_batch_needs_reset_state():
    neuron = started()
    with pytest.raises(ValueError, match=r"expected \[T, 4\] on cpu.* got \(3, 5\).*reset_state"):
        neuron(torch.rand(3, 5))
    with pytest.raises(ValueError, match=r"got .* on meta; call reset_state"):
        neuron(torch.rand(3, 4, device="meta"))
    neuron.reset_state()
    assert neuron(torch.rand(3, 5)).shape == (3, 5)


def test_reset_state_of_a_network():
    net = iirsnn.TimeSequential(
        nn.Linear(4, 5), BatchNormLIF(nn.BatchNorm1d(5), stateful()), FusedLIF(), stateful()
    ).eval()
    x = torch.randn(3, 2, 4)
    first, second = net(x), net(x)
    assert not torch.equal(first, second)
    iirsnn.reset_state(net)
    assert torch.equal(net(x), first)
    iirsnn.reset_state(net)
    assert net(torch.randn(3, 7, 4)).shape == (3, 7, 5)


def test_inference_and_then_training():
    x = torch.rand(3, 4)
    neuron, wanted = stateful(), stateful()
    with torch.inference_mode():
        neuron(x)
        neuron(x)
    with torch.no_grad():
        wanted(x)
        wanted(x)
    s = neuron(x.clone().requires_grad_())
    s.sum().backward()
    assert torch.equal(s, wanted(x))
    with torch.inference_mode():
        neuron(x)
    wanted(x)
    assert torch.equal(neuron.state, wanted.state)


def test_a_network_made_in_inference_mode_trains_no_other():
    neuron = started()
    with torch.inference_mode():
        neuron(torch.rand(3, 4))
        neuron.reset_state()
        neuron(torch.rand(3, 6))
    neuron(torch.rand(3, 6, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpointed_stateful_neuron_raises(reentrant):
    run = partial(checkpoint, use_reentrant=reentrant)
    x = torch.rand(3, 4, requires_grad=True)
    run(FusedLIF(), x).sum().backward()  # without state there is nothing wrong
    s = run(stateful(), x)
    with pytest.raises(RuntimeError, match="no call of a stateful neuron inside a backward pass"):
        s.sum().backward()


def test_averaged_models_do_not_average_the_state():
    model = nn.Sequential(nn.Linear(4, 4), stateful(learn_leak=False))
    averaged = AveragedModel(model, use_buffers=True)
    for batch in (2, 2, 5):
        iirsnn.reset_state(model)
        model(torch.rand(3, batch, 4)).sum().backward()
        averaged.update_parameters(model)
    assert averaged.module[1].state is None
    torch.testing.assert_close(averaged.module[1].leak, model[1].leak)


def _two_processes():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    neuron = stateful(learn_threshold=False)
    alone = copy.deepcopy(neuron)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), neuron))
    linear = model.module[0]
    for step in range(3):
        x = torch.rand(3, 2 + rank, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        with torch.no_grad():
            expected = alone(linear(x))
        s = model(x)
        assert torch.equal(s, expected)
        s.sum().backward()
        assert torch.equal(neuron.state, alone.state)
    gathered = [None, None]
    dist.all_gather_object(gathered, neuron.state)
    assert gathered[0].shape != gathered[1].shape
    dist.destroy_process_group()


def test_data_parallel_training_leaves_each_process_its_state(tmp_path):
    logs = tmp_path / "logs"
    assert join(start_many(_two_processes, count=2, logs=logs)) == [0, 0], printed(logs)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_stateful_neuron_compiles_whole(compiler, backend):
    torch.compiler.reset()
    neuron, wanted = stateful(backend=backend), stateful()
    compiled = torch.compile(neuron, fullgraph=True, backend=compiler)
    for grad in (False, True, True):
        x = torch.randn(3, 2, 5)
        grads = []
        for f in (compiled, wanted):  # a gradient is of the state before the call
            own = x.clone().requires_grad_(grad)
            s = f(own)
            if grad:
                s.backward(torch.linspace(-1, 1, s.numel()).view(s.shape))
            grads.append((s, own.grad))
        torch.testing.assert_close(grads[0], grads[1])
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(neuron.state, wanted.state)


def test_a_capture_needs_a_state(monkeypatch):
    """On a fake device: what a CUDA graph would replay is the write into a tensor that stays."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    neuron = stateful(backend="reference")
    with pytest.raises(RuntimeError, match="expected a call before the capture of a CUDA graph"):
        neuron(torch.rand(3, 4))
