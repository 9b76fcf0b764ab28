"""How many clips a second FVD and its companions take, and how little of it is not the network.

    python -m experiments.benchmarks.metrics [--quick] [--out DIR]

Prints a table and writes `metrics.json`. Weights are random: they cost the same. The overhead is what updating the
metrics and computing their values takes, over the time of the network for the same clips.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.metrics import (
    Detector,
    DetectorCard,
    Features,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    random_i3d,
)
from models.metrics.i3d import I3D, PROFILES
from models.random import keyed_generator

Row = dict[str, object]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, with all work that it has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def full_size_detector() -> Detector:
    """I3D at 224 x 224 as FVD has it, under a name that is not FVD."""
    small = random_i3d()
    network = I3D()
    network.load_state_dict(small.network.state_dict())
    size = small.card.num_features
    return Detector(
        network, DetectorCard("random_i3d_224", small.card.weights, size, size, PROFILES["tf"].preprocessing)
    )


def draw_clips(count: int, resolution: int, device: torch.device) -> Tensor:
    """Make clips of 16 frames."""
    shape = (count, 3, 16, resolution, resolution)
    return (torch.rand(shape, generator=keyed_generator(resolution)) * 2 - 1).to(device)


def time_detector(detector: Detector, clips: int, resolution: int, device: torch.device) -> Row:
    """Time the network on clips, preprocessing included."""
    detector = detector.to(device)
    video = draw_clips(clips, resolution, device)
    detector(video[:1])
    taken = seconds(lambda: detector(video), device)
    return {"what": detector.card.name, "clips": clips, "resolution": resolution, "clips_per_second": clips / taken}


def time_metric(
    make: Callable[[DetectorCard], FrechetDistance | KernelDistance | InceptionScore],
    card: DetectorCard,
    clips: int,
    batch: int,
    device: torch.device,
) -> tuple[float, float]:
    """Time the updates with `clips` real and as many generated samples, and the computation of the value."""
    values = torch.randn(2 * clips, card.num_features, generator=keyed_generator(clips)).to(device)
    features = Features(values, values, card)
    metric = make(card).to(device)

    def update() -> None:
        for start in range(0, 2 * clips, batch):
            rows = slice(start, start + batch)
            part = Features(features.values[rows], features.logits[rows], card)
            index = torch.arange(2 * clips)[rows]
            if isinstance(metric, InceptionScore):
                metric.update(part, index)
            else:
                metric.update(part, start < clips, index)

    return seconds(update, device), seconds(metric.compute, device)


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.metrics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer clips")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for metrics.json")
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    big = device.type == "cuda"

    detectors = [time_detector(random_i3d(), 512 if big else 4 if options.quick else 32, 64, device)]
    detectors.append(time_detector(full_size_detector(), 128 if big else 1 if options.quick else 8, 128, device))
    print(f"{'detector':<24}{'clips of':>12}{'clips/s':>10}")
    for row in detectors:
        clip = f"16x{row['resolution']}x{row['resolution']}"
        print(f"{row['what']:<24}{clip:>12}{row['clips_per_second']:>10.2f}")

    # a metric's share of an evaluation of 2,048 real and 2,048 generated clips
    count, batch = (256 if options.quick else 2048), 16
    card = random_i3d().card
    metrics: list[Row] = []
    title = f"metric of {count:,} clips a set"
    print(f"\n{title:<32}{'updates':>10}{'value':>10}{'of I3D':>10}{'of 224 x 224':>14}")
    for make in (FrechetDistance, KernelDistance, InceptionScore):
        update, compute = time_metric(make, card, count, batch, device)
        shares = [(update + compute) / (2 * count / float(str(row["clips_per_second"]))) for row in detectors]
        metrics.append(
            {
                "what": make.__name__,
                "clips_of_each_set": count,
                "update_seconds": update,
                "compute_seconds": compute,
                "share_of_random_i3d": shares[0],
                "share_of_i3d_at_224": shares[1],
            }
        )
        print(f"{make.__name__:<32}{update:>8.2f} s{compute:>8.2f} s{shares[0]:>10.2%}{shares[1]:>14.2%}")

    options.out.mkdir(parents=True, exist_ok=True)
    summary = {
        "detectors": detectors,
        "metrics": metrics,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if big else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path = options.out / "metrics.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
