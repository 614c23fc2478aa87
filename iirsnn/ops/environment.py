"""What can run here, and why not."""

from __future__ import annotations

import platform
import sys

import torch

from ..versions import installed
from .backend import why_not


def env_report() -> str:
    """Versions, the backends with the reason where one cannot run, and what was compiled."""
    cuda = torch.cuda.is_available()
    rows = {
        "iirsnn": installed("iirsnn"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
        f"{torch.get_num_threads()} CPU threads",
        "triton": installed("triton"),
        "device": torch.cuda.get_device_name() if cuda else "no CUDA device",
    }
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")):
        reason = why_not(name, device)
        if reason is None and device == "cuda" and not cuda:
            reason = "built, but there is no CUDA device"
        rows[f"backend {name}"] = "yes" if reason is None else f"no: {reason}"
    rows["backend reference"] = "yes"
    module = sys.modules.get("iirsnn._C")
    if module is not None:
        info = module.build_info()
        rows["compiled with"] = f"{info['compiler']} {info['flags'].replace(',', ' ')}"
        lowest, highest = info["lowest_capability"], info["compiled_capability"]
        compiled = f"for {highest} alone" if lowest == highest else f"up to {highest}"
        rows["cpu capability"] = f"{info['cpu_capability']} (compiled {compiled})"
        rows["cuda archs"] = info["cuda_archs"] or "none"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
