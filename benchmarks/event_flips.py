"""Spikes of the event engine that differ from PyTorch's on a run's test images, each explained.

python benchmarks/event_flips.py RUN --json benchmarks/results/event-flips.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

from iirsnn.event import EventNetwork
from iirsnn.event.flips import Flip, trace_flips
from iirsnn.measure.provenance import commit, machine
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = RunFolder.read(options.run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    test = pipeline.splits.test
    model = pipeline.trained("T1").eval()
    net = EventNetwork.from_model(model)
    flips: list[Flip] = []
    classes, spikes = 0, 0
    for first in range(0, len(test), options.batch):
        chosen = list(range(first, min(len(test), first + options.batch)))
        images = torch.stack([image for image, _ in test.__getitems__(chosen)])
        found = trace_flips(net, model, images)
        for flip in found:
            flip.image += first
        flips.extend(found)
        with torch.no_grad():
            classes += int((net(images).argmax(1) != model(images).argmax(1)).sum())
        spikes += sum(layer.neurons for layer in net.statistics()) * len(chosen)
    roots = [flip for flip in flips if flip.root]
    result = {
        "machine": machine(),
        "commit": commit(),
        "torch": torch.__version__,
        "run": options.run.name,
        "images": len(test),
        "neurons": spikes,
        "classes_that_differ": classes,
        "flips": len(flips),
        "images_with_flips": len({flip.image for flip in flips}),
        "roots": len(roots),
        "roots_by_layer": Counter(flip.layer for flip in roots),
        "largest_root_distance_in_roundings": max((f.distance for f in roots), default=0.0),
        "consequences": len(flips) - len(roots),
        "unexplained": sum(not flip.explained for flip in flips),
        "root_flips": [vars(flip) for flip in roots],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "root_flips"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
