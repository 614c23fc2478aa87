"""The guard on ratios: what iirsnn lost between a committed results file and new ones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import LIMIT, Group, load

LOSS = 0.25  # a ratio may be this much larger than the committed one


def compare(
    committed: dict[str, Any], measured: dict[str, Any], loss: float = LOSS
) -> tuple[list[str], list[str]]:
    """(what iirsnn lost, what could not be compared), a line each; times play no part.

    A contender of ours loses where its ratio to the limit of the same run grew by more than
    `loss`, for every group that was measured and has a limit.
    """
    lost, unknown = [], []
    for key, group in measured["groups"].items():
        if LIMIT not in group["contenders"]:
            continue
        before = committed["groups"].get(key)
        if before is None:
            unknown.append(f"{key}: not in the committed results")
            continue
        ours = {name for name in group["contenders"] if name.startswith("iirsnn")}
        ours |= {name for name in before["contenders"] if name.startswith("iirsnn")}
        for name in sorted(ours):
            rows = [g["contenders"].get(name) for g in (before, group)]
            if rows[0] is None or rows[1] is None:
                side = "committed results" if rows[0] is None else "new run"
                unknown.append(f"{key}: {name} is not in the {side}")
            elif rows[1]["ratio"] > (1 + loss) * rows[0]["ratio"]:
                lost.append(
                    f"{key}: {name} takes {rows[1]['ratio']:.2f} x the limit, "
                    f"committed {rows[0]['ratio']:.2f}"
                )
    return lost, unknown


def least(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Runs as one: of each group and contender the row with the smallest ratio to the limit, where
    the group has one."""
    groups: dict[str, Group] = {}
    for run in runs:
        for key, group in run["groups"].items():
            contenders = groups.setdefault(key, {**group, "contenders": {}})["contenders"]
            for name, row in group["contenders"].items():
                contenders[name] = min(
                    contenders.get(name, row), row, key=lambda r: r.get("ratio", 0)
                )
    return {"groups": groups}


def check(committed: Path, *new: Path) -> int:
    measured = least(map(load, new))
    if not measured["groups"]:
        print(f"bench-check: {', '.join(map(str, new))} holds no group", file=sys.stderr)
        return 2
    lost, unknown = compare(load(committed), measured)
    without = Counter(
        key.partition("[")[0]
        for key, group in measured["groups"].items()
        if LIMIT not in group["contenders"]
    )
    for name, count in without.items():
        print(f"bench-check: not compared: {name}: {count} without a {LIMIT} to compare with")
    for line in unknown:
        print(f"bench-check: not compared: {line}")
    for line in lost:
        print(f"bench-check: lost: {line}")
    compared = len(measured["groups"]) - without.total()
    compared -= len({line.split(":")[0] for line in unknown})
    print(f"bench-check: {compared} groups compared with {committed.name}, {len(lost)} losses")
    return 1 if lost or not compared else 0
