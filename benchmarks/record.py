"""The results file of the benchmarks: one JSON of groups, written one by one.

A group is what was timed in turns: {"subject", "what", "timesteps", ..., "commit", "contenders":
{name: {"median_ms", "p20_ms", "p80_ms", "ratio", ...}}}. Its ratios are to the contender "limit".
A run that was cut short goes on where it was (--resume).
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
BUILD = FOLDER.parent.parent / "build" / "bench"  # of runs that are not to be committed
LIMIT = "limit"
PLACES = {"in": "in cache", "out": "out of cache"}

#: The modes of spike layers that are timed in turns.
CHOICES = ("auto", "always", "never")

Group = dict[str, Any]


def machine() -> dict[str, str]:
    """What a time belongs to: machine (with threads), processor (with its model), capability."""
    from iirsnn.measure import provenance

    name = provenance.machine()
    return {"machine": name, "processor": processor(), "capability": capability()}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first processor's name, family and model: one name may stand for several."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    rows = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in lines)}
    name = rows.get("model name", platform.machine())
    parts = [f"{key.split()[-1]} {rows[key]}" for key in ("cpu family", "model") if key in rows]
    return f"{name} ({', '.join(parts)})" if parts else name


def capability() -> str:
    """The instruction set that the CPU kernels use; "none" where they are not compiled."""
    from iirsnn.ops.backend import why_not

    if why_not("cpu", "cpu") is not None:
        return "none"
    return importlib.import_module("iirsnn._C").build_info()["cpu_capability"]


def default_file(folder: Path = FOLDER) -> Path:
    """<machine>-<capability>.json in the folder, for the machine this runs on."""
    here = machine()
    name = f"{here['machine']} {here['capability']}".lower()
    return folder / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def load(path: Path) -> dict[str, Any]:
    """{"machine", "groups": {id: group}, ...}; empty where there is no file yet."""
    if not path.exists():
        return {"groups": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def store(path: Path, facts: dict[str, Any], key: str, group: Group) -> None:
    """Adds one group to the file, or replaces it; a kill leaves the old file or the new one."""
    groups = load(path)["groups"]
    groups[key] = group
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "groups": dict(sorted(groups.items()))}, indent=1) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def summary(times: dict[str, list[float]], limit: str = LIMIT) -> dict[str, dict[str, Any]]:
    """Seconds of each round -> median, p20 and p80 in ms, and the median's ratio to the limit."""
    found = {}
    for name, taken in times.items():
        cuts = (
            statistics.quantiles(taken, n=10, method="inclusive") if len(taken) > 1 else taken * 9
        )
        found[name] = {
            "median_ms": 1e3 * statistics.median(taken),
            "p20_ms": 1e3 * cuts[1],
            "p80_ms": 1e3 * cuts[7],
            "rounds": len(taken),
        }
    least = found[limit]["median_ms"]
    for row in found.values():
        row["ratio"] = row["median_ms"] / least
    return found


def contender_names(groups: Iterable[Group]) -> list[str]:
    seen: dict[str, None] = {}
    for group in groups:
        seen.update(dict.fromkeys(group["contenders"]))
    return list(seen)


def chosen(results: dict[str, Any], **wanted: Any) -> list[Group]:
    """Groups whose keys have these values, in order of T and then of density."""
    found = [
        group
        for group in results["groups"].values()
        if all(group.get(key) == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda g: (g.get("timesteps", 0), g.get("density") or 0))


def layout(group: Group) -> str:
    return ", channels_last" if group.get("layout") == "channels_last" else ""


def fastest_other(group: Group) -> float:
    """ms of the fastest contender that is not of this package."""
    return min(
        own["median_ms"]
        for name, own in group["contenders"].items()
        if not name.startswith(("iirsnn", LIMIT))
    )


def regret(group: Group) -> float:
    """Time of auto as a fraction of the better one's of always and never."""
    times = {name: group["contenders"][name]["median_ms"] for name in CHOICES}
    return times["auto"] / min(times["always"], times["never"])


def origin(results: dict[str, Any]) -> str:
    """Machine, processor and capability, in words."""
    return f"{results['machine']}, {results['capability']} ({results['processor']})"
