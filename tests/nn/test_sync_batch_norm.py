"""BatchNormLIF with nn.SyncBatchNorm in two processes against one over the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from tests.processes import join, printed, start_many

SHAPE = (3, 5, 6, 4, 4)


def inputs():
    generator = torch.Generator().manual_seed(0)
    x, grad_s = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return 2 * x + 7, grad_s


def modules(norm, **options):
    torch.manual_seed(0)
    neuron = FusedLIF(0.7, 0.8, **options)
    for parameter in [*norm.parameters(), *neuron.parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.0)
    return BatchNormLIF(norm, neuron)


def run(module, x, grad_s):
    leaf = x.clone().requires_grad_()
    s = module(leaf)
    s.backward(grad_s)
    return s.detach(), leaf.grad


def in_each_process():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for affine, momentum, channels in ((True, 0.1, None), (False, None, 6)):
        kinds = {"affine": affine, "momentum": momentum}
        whole = modules(nn.BatchNorm2d(6, **kinds), channels=channels)
        synced = copy.deepcopy(whole)
        synced.norm = nn.SyncBatchNorm.convert_sync_batchnorm(synced.norm)
        x, grad_s = inputs()
        part = slice(0, 2) if rank == 0 else slice(2, 5)  # not the same share
        for _ in range(2):  # the second time on other running statistics
            s, grad_x = run(whole, x, grad_s)
            mine, grad_mine = run(synced, x[:, part], grad_s[:, part])
            assert torch.equal(mine, s[:, part])
            torch.testing.assert_close(grad_mine, grad_x[:, part], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dict(synced.named_buffers()), dict(whole.named_buffers()))
        for name, parameter in synced.named_parameters():
            dist.all_reduce(parameter.grad)
            wanted = whole.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-3, msg=name)
    dist.destroy_process_group()


def test_two_processes_take_the_statistics_of_both(tmp_path):
    logs = tmp_path / "logs"
    assert join(start_many(in_each_process, count=2, logs=logs)) == [0, 0], printed(logs)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_needs_no_group(training):
    x, grad_s = inputs()
    plain = modules(nn.BatchNorm2d(6)).train(training)
    synced = copy.deepcopy(plain)
    synced.norm = nn.SyncBatchNorm.convert_sync_batchnorm(synced.norm)
    if training:
        for got, wanted in zip(run(synced, x, grad_s), run(plain, x, grad_s), strict=True):
            assert torch.equal(got, wanted)
    else:
        assert torch.equal(synced(x), plain(x))
