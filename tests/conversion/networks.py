"""Small networks that hold, each in a few layers, what large ones are made of."""

import torch
import torch.nn.functional as F
from torch import nn


def trained_like(ann, seed=0):
    """Norms with scales and shifts as a training leaves them, and the statistics of noise."""
    torch.manual_seed(seed)
    for module in ann.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.1, 0.3)
    for _ in range(20):
        ann.train()(images(16))
    return ann.eval()


def images(count, channels=3, size=8, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


class Residual(nn.Module):
    """Stem, max pool, two blocks of which one has a convolution beside it; F.relu and add."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.beside = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.second(self.first(x)) + x)
        x = torch.relu(self.second[0](x) + self.beside(x))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Dense(nn.Module):
    """Concats of pooled spikes and currents; norms that no layer feeds alone; pre-activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10), nn.BatchNorm2d(14)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 4, 1)])
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        x = self.pool(self.act(self.stem(x)))
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(self.act(norm(x)))], 1)
        return self.head(self.norms[-1](x).mean((2, 3)))


class Shuffle(nn.Module):
    """Depthwise and grouped convolutions, chunk, channel shuffle, spikes of unlike thresholds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.branch = nn.Sequential(
            *[nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)],
            *[nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()],
        )
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, 10 * self.branch(right)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        x = self.grouped(x.view(batch, -1, height, width)).clamp(0, 2)
        x = self.head(self.up(x).relu_())
        return x.mean(dim=(2, 3))


class SpikesOut(nn.Module):
    """Ends as SqueezeNet does: the mean of what a ReLU gives."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *[nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(8, 5, 1)],
            *[nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))],
        )

    def forward(self, x):
        return torch.flatten(self.layers(x), 1)


NETWORKS = [Residual, Dense, Shuffle, SpikesOut]
