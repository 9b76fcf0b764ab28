"""How many clips a second FVD and its companions take, and how little of it is not the network.

Weights are random: they cost the same. The overhead is what updating the metrics and computing their values takes, over
the time of the network for the same clips.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.benchmarks.report import Measurement
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


def time_detector(detector: Detector, clips: int, resolution: int, device: torch.device) -> float:
    """Clips a second of the network, preprocessing included."""
    detector = detector.to(device)
    video = draw_clips(clips, resolution, device)
    detector(video[:1])
    return clips / seconds(lambda: detector(video), device)


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


def run(quick: bool) -> list[Measurement]:
    """Measure the networks, and what the metrics add to them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    big = device.type == "cuda"
    small, full = random_i3d(), full_size_detector()
    speed = time_detector(small, 512 if big else 4 if quick else 32, 64, device)
    speed_at_224 = time_detector(full, 128 if big else 1 if quick else 8, 128, device)
    target = 2000 / 60 if big else None  # of a GPU: 2,000 clips a minute
    rows = [
        Measurement("random_i3d, clips of 16 x 64 x 64", speed, "clips/s"),
        Measurement("I3D at 224 x 224, clips of 16 x 128 x 128", speed_at_224, "clips/s", at_least=target),
    ]
    # a metric's share of an evaluation of 2,048 real and 2,048 generated clips
    count, batch = (256 if quick else 2048), 16
    for make in (FrechetDistance, KernelDistance, InceptionScore):
        update, compute = time_metric(make, small.card, count, batch, device)
        share = (update + compute) * speed_at_224 / (2 * count)
        details = {
            "clips_of_each_set": count,
            "update_seconds": update,
            "compute_seconds": compute,
            "share_of_random_i3d": (update + compute) * speed / (2 * count),
        }
        name = f"{make.__name__} of {count:,} clips a set, beyond I3D at 224 x 224"
        rows.append(Measurement(name, 100 * share, "%", at_most=10.0, details=details))
    return rows
