"""BatchNorm folded into the weights of the layer before it."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_FUSE: dict[tuple[type, type], Callable[..., nn.Module]] = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def fold_batch_norm(model: nn.Module) -> None:
    """Fold, in place, each BatchNorm that follows a Conv2d or Linear of a Sequential into it.

    Uses the running statistics, so the result equals the model in eval mode.
    """
    for parent in list(model.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        kept: list[nn.Module] = []
        for module in parent:
            both = folded(kept[-1], module) if kept else None
            if both is None:
                kept.append(module)
            else:
                kept[-1] = both
        if len(kept) < len(parent):
            del parent[:]
            parent.extend(kept)


def folded(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """A copy of a Conv2d or Linear with the BatchNorm after it folded in; None for other pairs.

    Raises:
        ValueError: a BatchNorm without running statistics.
    """
    fuse = _FUSE.get((type(layer), type(norm)))
    if fuse is None:
        return None
    if norm.running_mean is None:
        raise ValueError(f"expected running statistics to fold, got {norm}")
    # torch folds in eval mode alone
    both = fuse(copy.deepcopy(layer).eval(), copy.deepcopy(norm).eval())
    return both.train(norm.training)
