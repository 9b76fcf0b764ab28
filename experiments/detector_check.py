"""`longtake doctor --detector`: are these the weights and the arithmetic that published numbers come from?

Runs the sanity values that others have published for the detector of FVD. They need no data: clips that are all black
against clips that are all white, and uniform noise. Within such sets of black or white clips nothing varies, so that
their distance is that of two points, and tests the network and its preprocessing alone.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.messages import HelpFormatter
from models.metrics import Detector, FrechetDistance, load_i3d, random_i3d
from models.metrics.i3d import PROFILES
from models.random import keyed_generator


@dataclass(frozen=True)
class SanityValue:
    """A number that others have published.

    Args:
        name: What it is of.
        low: Smallest value that passes.
        high: Largest.
        source: Who has found which value.
        measure: Computes it.
        is_long: Whether it takes minutes on a CPU.
    """

    name: str
    low: float
    high: float
    source: str
    measure: Callable[[Detector], float]
    is_long: bool = False


def black_and_white(detector: Detector, clips: int, frames: int) -> float:
    """Distance between black and white clips of 64 x 64."""
    metric = FrechetDistance(detector)
    for level, is_real in ((0, True), (255, False)):
        video = torch.full((1, 3, frames, 64, 64), level, dtype=torch.uint8)
        features = detector(video.to(device_of(detector)))
        for _ in range(clips):
            metric.update(features, is_real)
    return float(metric.compute())


def noise(detector: Detector, clips: int = 128) -> float:
    """Distance between two draws of uniform noise in [0, 1), which the network takes for values in [-1, 1]."""
    metric = FrechetDistance(detector)
    for seed, is_real in ((1, True), (2, False)):
        for clip in _noise_clips(seed, clips):
            metric.update(detector(clip.to(device_of(detector))), is_real)
    return float(metric.compute())


def _noise_clips(seed: int, clips: int) -> Iterator[Tensor]:
    draw = np.random.RandomState(seed)  # the published value is of this generator
    for _ in range(clips):  # clip by clip the numbers are those of one draw for all, which would take 2.5 GB
        yield torch.from_numpy(draw.rand(1, 16, 224, 224, 3)).float().movedim(4, 1)


SANITY_VALUES = (
    SanityValue(
        "black against white, 16 clips of 15 frames",
        128,
        137,
        "about 131 (note of the TensorFlow release), 134.24 (an early port to PyTorch)",
        lambda detector: black_and_white(detector, 16, 15),
    ),
    SanityValue(
        "black against white, 8 clips of 30 frames",
        150.6,
        152.0,
        "151.39 (TensorFlow), 151.256 (TorchScript)",
        lambda detector: black_and_white(detector, 8, 30),
    ),
    SanityValue(
        "noise against noise, 128 clips of 16 frames",
        10.128,
        10.148,
        "10.1381 (TensorFlow and TorchScript)",
        noise,
        is_long=True,
    ),
)


def device_of(detector: Detector) -> torch.device:
    """Return where a detector is."""
    return next(detector.parameters()).device


def logits_digest(detector: Detector) -> tuple[str, list[float]]:
    """Name the logits of two fixed clips: sha256 of the float32 bytes, and the first three.

    The digest is a function of the weights, the machine and the version of torch: it tells whether anything has changed
    on one machine. The numbers tell how much.
    """
    video = torch.rand(2, 3, 16, 64, 64, generator=keyed_generator(20)) * 2 - 1
    logits = detector(video.to(device_of(detector))).logits.cpu()
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest(), logits[0, :3].tolist()


def check(detector: Detector, values: Iterable[SanityValue]) -> list[dict[str, object]]:
    """Measure values and compare them with what was published."""
    results = []
    for value in values:
        measured = value.measure(detector)
        passed = value.low <= measured <= value.high
        verdict = "ok" if passed else "FAILED"
        print(f"{verdict:<7}{value.name}: {measured:.4f}, expected {value.low:g} to {value.high:g}; {value.source}")
        details = {key: entry for key, entry in asdict(value).items() if key != "measure"}
        results.append({**details, "measured": measured, "passed": passed})
    return results


def main(args: Sequence[str]) -> None:
    """Check a file of I3D weights against published values, or show what the random detector computes."""
    parser = argparse.ArgumentParser(prog="longtake doctor", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--detector", required=True, metavar="FILE", help="weights of I3D, or random_i3d")
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="tf",
        help="pipeline; the published values are those of tf (default)",
    )
    parser.add_argument(
        "--sha256",
        help="digest of FILE, to accept exactly this one though none is published; by default only published ones",
    )
    parser.add_argument("--quick", action="store_true", help="leave out the values that take minutes on a CPU")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON; by default nowhere")
    options = parser.parse_args(args)

    if options.detector == "random_i3d":
        detector = random_i3d()
    else:
        detector = load_i3d(options.detector, options.profile, options.sha256)
    detector = detector.to(options.device)
    card = detector.card
    digest, first = logits_digest(detector)
    print(f"{card.name}, weights {card.weights}")
    print(f"distances are reported as {card.metric_name('frechet')}")
    print(f"logits of two fixed clips: sha256 {digest}, beginning {', '.join(f'{value:.6f}' for value in first)}")
    results: list[dict[str, object]] = []
    if card.published:
        results = check(detector, [value for value in SANITY_VALUES if not (options.quick and value.is_long)])
    else:
        print("nothing is published for these weights: no values to compare")
    if options.out is not None:
        summary = {
            "detector": card.name,
            "weights": card.weights,
            "reported_as": card.metric_name("frechet"),
            "logits_sha256": digest,
            "first_logits": first,
            "values": results,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": options.device,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    if not all(result["passed"] for result in results):
        raise ValueError(
            f"{options.detector} does not reproduce the published values with profile {options.profile}: its numbers "
            "must not be compared with published ones."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
