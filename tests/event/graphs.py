"""Small networks of every kind of graph, as torch.fx sees them; inputs are [B, C, H, W]."""

import torch
import torch.nn.functional as F
from torch import nn

from iirsnn import FusedLIF
from iirsnn.models.graph import Affine, mean_over_time, merge_time, split_time
from iirsnn.nn import direct


class Graph(nn.Module):
    """`body`, which takes `first` and then `fire` for neurons, and its mean over time."""

    averages = True

    def __init__(self):
        super().__init__()
        self.timesteps = 1
        self.build()

    def build(self):
        raise NotImplementedError

    def body(self, x, timesteps):
        raise NotImplementedError

    def forward(self, images):
        x = self.body(images, self.timesteps)
        return mean_over_time(x, self.timesteps) if self.averages else x


class Timed(nn.Module):
    """A Graph as the module of a GraphNetwork, whose timesteps are an argument."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images, timesteps):
        return mean_over_time(self.inner.body(images, timesteps), timesteps)


def first(neurons, x, timesteps):
    return merge_time(neurons(direct(x, timesteps)))


def fire(neurons, x, timesteps):
    return merge_time(neurons(split_time(x, timesteps)))


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Branches(Graph):
    """Two consumers, grouped convolution, sum of spikes, average pool, concat of unlike units."""

    def build(self):
        self.stem, self.a = conv(1, 6), FusedLIF(channels=6)
        self.left, self.b, self.pool = conv(6, 6, groups=2), FusedLIF(), nn.AvgPool2d(2)
        self.right, self.c = nn.Conv2d(6, 4, 2, stride=2), FusedLIF()
        self.flat, self.head = nn.Flatten(), nn.Linear(90, 3)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        left = self.pool(fire(self.b, self.left(x), timesteps) + x)
        right = fire(self.c, self.right(x), timesteps)
        return self.head(self.flat(torch.cat([left, right], 1)))


class Inception(Graph):
    """Four branches of one source, side by side, of widths that no word holds whole."""

    def build(self):
        self.stem, self.a = conv(2, 70), FusedLIF()
        self.one, self.b = conv(70, 30, 1), FusedLIF()
        self.three, self.c = conv(70, 50), FusedLIF()
        self.five, self.d = conv(30, 20, 5), FusedLIF()
        self.pool, self.e = nn.MaxPool2d(3, 1, 1), FusedLIF()
        self.behind = conv(70, 40, 1)
        self.halve = nn.MaxPool2d(3, 2, 1)
        self.mix, self.f = conv(140, 66), FusedLIF()
        self.mean, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(66, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        one = fire(self.b, self.one(x), timesteps)
        branches = [
            one,
            fire(self.c, self.three(x), timesteps),
            fire(self.d, self.five(one), timesteps),
            fire(self.e, self.behind(self.pool(x)), timesteps),
        ]
        x = self.halve(torch.cat(branches, dim=1))
        return self.head(self.flat(self.mean(fire(self.f, self.mix(x), timesteps))))


class Bottlenecks(Graph):
    """MobileNet's: depthwise convolutions, no neurons behind a block, sums of real values."""

    def build(self):
        self.stem, self.a = conv(2, 16), FusedLIF()
        self.inner = nn.ModuleList()
        for inputs, outputs, stride in ((16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1)):
            wide = 3 * inputs
            depthwise = conv(wide, wide, 3, stride=stride, groups=wide)
            project = conv(wide, outputs, 1, bias=False)
            self.inner.append(
                nn.ModuleList(
                    [conv(inputs, wide, 1), FusedLIF(channels=wide), depthwise, FusedLIF(), project]
                )
            )
        self.last, self.z = conv(40, 72, 1), FusedLIF()
        self.mean, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        for expand, a, depthwise, b, project in self.inner:
            y = project(fire(b, depthwise(fire(a, expand(x), timesteps)), timesteps))
            x = x + y if expand.in_channels == project.out_channels else y
        x = fire(self.z, self.last(x), timesteps)
        return self.head(self.flat(self.mean(x)))


class Dense(Graph):
    """DenseNet's: concats of spikes and real values, norms and neurons without a convolution."""

    def build(self):
        self.stem, self.a, self.pool = conv(2, 20), FusedLIF(), nn.MaxPool2d(2)
        self.unit = quarters(20, bias=False)
        self.inner = nn.ModuleList()
        for inputs in (20, 32):
            self.inner.append(
                nn.ModuleList(
                    [quarters(inputs), FusedLIF(), conv(inputs, 24, 1), FusedLIF(), conv(24, 12)]
                )
            )
        self.norm, self.z, self.narrow = quarters(44), FusedLIF(), conv(44, 22, 1)
        self.halve = nn.AvgPool2d(2)
        self.last_norm, self.last = quarters(22), FusedLIF()
        self.flat, self.head = nn.Flatten(), nn.Linear(22 * 4, 5)

    def body(self, x, timesteps):
        x = self.unit(self.pool(first(self.a, self.stem(x), timesteps)))
        for norm, a, squeeze, b, grow in self.inner:
            y = squeeze(fire(a, norm(x), timesteps))
            x = torch.cat([x, grow(fire(b, y, timesteps))], 1)
        x = self.halve(self.narrow(fire(self.z, self.norm(x), timesteps)))
        return self.head(self.flat(fire(self.last, self.last_norm(x), timesteps)))


class Shuffle(Graph):
    """ShuffleNet's: halves of the channels, two convolutions without neurons between, shuffles."""

    def build(self):
        self.stem, self.a = conv(2, 36), FusedLIF()
        self.squeeze, self.b = conv(18, 18, 1), FusedLIF()
        self.depthwise, self.widen, self.c = conv(18, 18, groups=18), conv(18, 18, 1), FusedLIF()
        self.shuffle = nn.ChannelShuffle(2)
        self.last, self.d = conv(36, 40, 1), FusedLIF()
        self.head = nn.Linear(40, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        kept, half = x.chunk(2, dim=1)
        y = fire(self.b, self.squeeze(half), timesteps)
        y = fire(self.c, self.widen(self.depthwise(y)), timesteps)
        x = self.shuffle(torch.cat((kept, y), dim=1))
        return self.head(fire(self.d, self.last(x), timesteps).mean([2, 3]))


class Squeeze(Graph):
    """SqueezeNet's: ends in neurons and a global average, in ceil_mode."""

    def build(self):
        self.stem, self.a = nn.Conv2d(2, 20, 3), FusedLIF()
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.classes, self.b = conv(20, 5, 1), FusedLIF()
        self.mean, self.flat = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()

    def body(self, x, timesteps):
        x = self.pool(first(self.a, self.stem(x), timesteps))
        return self.flat(self.mean(fire(self.b, self.classes(x), timesteps)))


class Residual(Graph):
    """Units on the shortcuts, one for all channels or of each; neurons behind a sum of spikes."""

    def build(self):
        self.stem, self.a = conv(2, 20), FusedLIF()
        self.b, self.c, self.d, self.e = (FusedLIF() for _ in range(4))
        self.one, self.two, self.three = conv(20, 20), conv(20, 20), conv(20, 40, stride=2)
        self.same = Affine(torch.full((20,), 0.75))
        self.unlike, self.down = quarters(20), nn.Conv2d(20, 40, 1, stride=2)
        self.flat, self.head = nn.Flatten(), nn.Linear(40 * 16, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        x = fire(self.b, self.one(x) + self.same(x), timesteps)
        x = fire(self.c, self.unlike(x) + self.two(x), timesteps)
        y = fire(self.d, self.three(x) + self.down(x), timesteps)
        return self.head(self.flat(fire(self.e, y + self.down(x) + y, timesteps)))


class Vgg(Graph):
    """An adaptive pool of more windows than there are rows; neurons behind a flatten."""

    def build(self):
        self.stem, self.a, self.pool = conv(2, 70), FusedLIF(), nn.MaxPool2d(4)
        self.adapt, self.flat = nn.AdaptiveAvgPool2d((7, 3)), nn.Flatten()
        self.hidden, self.b, self.head = nn.Linear(70 * 21, 40), FusedLIF(), nn.Linear(40, 5)

    def body(self, x, timesteps):
        x = self.pool(first(self.a, self.stem(x), timesteps))
        return self.head(fire(self.b, self.hidden(self.flat(self.adapt(x))), timesteps))


class Pools(Graph):
    """Real values in pools of every kind, and neurons of pooled counts."""

    def build(self):
        self.stem, self.largest, self.a = conv(2, 20), nn.MaxPool2d(3, 2, 1), FusedLIF()
        self.one, self.adapt, self.b = conv(20, 20), nn.AdaptiveAvgPool2d((3, 2)), FusedLIF()
        self.pad, self.mean, self.c = nn.ZeroPad2d(1), nn.AvgPool2d(2, 2), FusedLIF()
        self.two, self.ceil = conv(20, 12, 1), nn.MaxPool2d(2, ceil_mode=True)
        self.flat, self.head = nn.Flatten(), nn.Linear(12, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.largest(self.stem(x)), timesteps)
        x = fire(self.b, self.adapt(self.one(x)), timesteps)
        x = fire(self.c, self.mean(self.pad(x)), timesteps)
        return self.head(self.flat(self.ceil(self.two(x))))


class Functions(Graph):
    """Functions and methods in the place of modules."""

    def build(self):
        self.stem, self.a, self.b = conv(2, 20), FusedLIF(), FusedLIF()
        self.one, self.head = conv(20, 30), nn.Linear(120, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        x = F.max_pool2d(F.dropout(x, 0.5, self.training), 2, 3, 1, 1, True)
        left, right = torch.chunk(F.avg_pool2d(x, 2, 1), 2, dim=1)
        x = torch.add(self.one(torch.cat([right, left], -3)), self.one(F.avg_pool2d(x, 2, 1)))
        x = F.adaptive_avg_pool2d(fire(self.b, x, timesteps), (2, 2)).contiguous()
        flat = torch.flatten(x, 1).view(x.size(0), -1)
        return self.head(flat) + self.head(x.reshape(x.shape[0], 120))


def quarters(channels, bias=True):
    """An Affine whose numbers are quarters."""
    generator = torch.Generator().manual_seed(channels)
    weight, shift = torch.randint(1, 5, (2, channels), generator=generator) * 0.25
    return Affine(weight, shift - 0.5 if bias else None)


GRAPHS = (
    Branches, Inception, Bottlenecks, Dense, Shuffle, Squeeze, Residual, Vgg, Pools, Functions,
)  # fmt: skip
