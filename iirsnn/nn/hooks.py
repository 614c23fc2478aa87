"""Whether a module does what its class and its parameters say."""

from __future__ import annotations

from torch import nn


def changed_by_hooks(module: nn.Module) -> bool:
    """Whether a call may give something else: by a forward hook, or a forward of its own.

    Weight norms and prunings of torch.nn.utils are such hooks: between calls weights may be old.
    """
    hooks = module._forward_pre_hooks or module._forward_hooks
    return bool(hooks) or "forward" in module.__dict__
