"""Distances between two sets of features: Frechet and kernel.

Frechet (Unterthiner et al., 2018): with means m and covariances C of the two sets,

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),   tr (C1 C2)^(1/2) = |R1 R2^T|_*,   C = R^T R,

where |.|_* is the sum of singular values. R is not unique: the centred features over sqrt(n - 1) are one, and so is the
triangle of their QR decomposition, which stays d x d while features stream past. Covariances are never formed. That
would square the condition number, and lose half of the digits wherever there are fewer samples than dimensions.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from models.metrics.detectors import Detector, DetectorCard, Features
from models.metrics.samples import SampleMetric

logger = logging.getLogger(__name__)

_FEW_SAMPLES = 2048


def add_rows(triangle: Tensor, rows: Tensor) -> Tensor:
    """Update the triangle of a QR decomposition by more rows.

    The decomposed matrix has a one before each feature vector. So its triangle holds number, mean and spread:

        [ sqrt n   sqrt n m ]
        [      0          R ],   R^T R = sum of (x - m) (x - m)^T

    Args:
        triangle: `[d + 1, d + 1]` float64, zeros before there are any rows.
        rows: `[n, d]` float64.
    """
    ones = rows.new_ones(len(rows), 1)
    return torch.linalg.qr(torch.cat([triangle, torch.cat([ones, rows], dim=1)]), mode="r").R


def merge_triangles(triangles: Tensor) -> Tensor:
    """Join the triangles of sets of samples: `[W, d + 1, d + 1]` to `[d + 1, d + 1]`."""
    return torch.linalg.qr(triangles.flatten(0, 1), mode="r").R


def moments(triangle: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return number, mean `[d]` and `R` `[d, d]` of a triangle."""
    root = triangle[0, 0]
    return round(float(root) ** 2), triangle[0, 1:] / root, triangle[1:, 1:]


def frechet_distance(first: Tensor, second: Tensor, ddof: int = 1) -> Tensor:
    """Squared Frechet distance of the Gaussians fitted to two sets, float64.

    Args:
        first: Triangle of the one set.
        second: Triangle of the other.
        ddof: Covariances divide by `n - ddof`.

    Raises:
        ValueError: If a set has fewer than two samples.
    """
    (n1, mean1, root1), (n2, mean2, root2) = moments(first), moments(second)
    if min(n1, n2) < 2:
        raise ValueError(f"A Frechet distance needs two samples of each set at least; there are {n1} and {n2}.")
    root1, root2 = root1 / (n1 - ddof) ** 0.5, root2 / (n2 - ddof) ** 0.5
    spread = root1.square().sum() + root2.square().sum()
    distance = (mean1 - mean2).square().sum() + spread - 2 * torch.linalg.svdvals(root1 @ root2.T).sum()
    if distance < -1e-6 * spread:
        raise ArithmeticError(f"The Frechet distance came out as {float(distance)}: the decomposition failed.")
    return distance.clamp(min=0)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`(x y / d + 1)^3`: `[m, d]` and `[n, d]` to `[m, n]`."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy under the cubic kernel, float64; may be negative.

    Args:
        x: `[m, d]` float64.
        y: `[n, d]` float64.

    Raises:
        ValueError: If a set has fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"A kernel distance needs two samples of each set at least; there are {len(x)} and {len(y)}.")
    within = [(_kernel_sum(rows, rows) - _diagonal_sum(rows)) / (len(rows) * (len(rows) - 1)) for rows in (x, y)]
    return within[0] + within[1] - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([polynomial_kernel(block, y).sum() for block in x.split(1024)]).sum()


def _diagonal_sum(x: Tensor) -> Tensor:
    return ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()


def card_of(detector: Detector | DetectorCard) -> DetectorCard:
    """Return the card of a detector, or the card itself."""
    return detector.card if isinstance(detector, Detector) else detector


def check_card(features: Features, card: DetectorCard) -> None:
    """Refuse features of another detector.

    Raises:
        ValueError: If they are not from the detector of `card`.
    """
    if features.card != card:
        raise ValueError(
            f"Features of {features.card.name} ({features.card.weights}) do not belong to a metric of {card.name} "
            f"({card.weights}): numbers of two detectors cannot be compared."
        )


class FrechetDistance(SampleMetric):
    """Frechet distance between real and generated samples: FVD with I3D, FID with Inception-v3.

    Memory does not depend on the number of samples. Below about 2,048 samples, or as few as dimensions, the value is
    biased upwards by far (roughly in proportion to `1 / n1 + 1 / n2`), and is comparable at equal numbers only: a
    warning says so once.

    Args:
        detector: Whose features come, or its card.
        ddof: Covariances divide by `n - ddof`; None for the detector's convention.
    """

    higher_is_better = False

    def __init__(self, detector: Detector | DetectorCard, ddof: int | None = None) -> None:
        self._make(detector, ("real", "generated"), ddof)

    def _make(self, detector: Detector | DetectorCard, streams: Sequence[str], ddof: int | None) -> None:
        card = card_of(detector)
        size = card.num_features + 1
        super().__init__(streams, card.num_features, torch.zeros(size, size), merge_triangles)
        self.card = card
        self.ddof = card.ddof if ddof is None else ddof
        self._has_warned = False

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("frechet")

    def fold(self, state: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Update the triangle."""
        return add_rows(state, rows)

    def update(self, features: Features, real: bool, index: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Of n samples.
            real: Which of the two sets they belong to.
            index: `[n]` int64, which sample each is; a repeated index counts once. None if none repeats.
        """
        check_card(features, self.card)
        self.add_rows("real" if real else "generated", features.values, index)

    def compute(self) -> Tensor:
        """Return the squared distance, a float64 scalar."""
        return self._between("real", "generated")

    def reset_generated(self) -> None:
        """Begin a new set of generated samples, against the same real ones."""
        for stream in self.streams[1:]:
            self.forget(stream)

    def _between(self, first: str, second: str) -> Tensor:
        triangles = [self.finish(stream)[0] for stream in (first, second)]
        distance = frechet_distance(triangles[0], triangles[1], self.ddof)
        counts = [moments(triangle)[0] for triangle in triangles]
        if not self._has_warned and min(counts) < max(_FEW_SAMPLES, self.width + 1):
            self._has_warned = True
            logger.warning(
                "%s of %d and %d samples with %d features: the estimate is biased upwards; compare it with values at "
                "the same numbers only.",
                self.name,
                *counts,
                self.width,
            )
        return distance


class ReconstructionFrechetDistance(FrechetDistance):
    """Frechet distance between reconstructions of a tokenizer and their own inputs: rFVD."""

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("reconstruction_frechet")


class SlidingFrechetDistance(FrechetDistance):
    """Frechet distance of each window of long generated videos to one set of short real clips (MeBT).

    Args:
        detector: Whose features come, or its card.
        starts: First frame of each window, see `window_starts`.
        ddof: Covariances divide by `n - ddof`; None for the detector's convention.
    """

    def __init__(self, detector: Detector | DetectorCard, starts: Sequence[int], ddof: int | None = None) -> None:
        self._make(detector, ("real", *(f"window_{start}" for start in starts)), ddof)
        self.starts = tuple(starts)

    @property
    def names(self) -> list[str]:
        """What the numbers may be called: one for each window."""
        return [f"{self.name}_from_frame_{start}" for start in self.starts]

    def update(self, features: Features, real: bool, index: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Of n real clips, or of all windows of n videos: `[n * windows, D]`, the windows of a video
                together, as `cut_windows` returns them.
            real: Which of the two.
            index: `[n]` int64, which clip or video each is.
        """
        if real:
            return super().update(features, real, index)
        check_card(features, self.card)
        if len(features) % len(self.starts):
            raise ValueError(f"{len(features)} features are no whole number of videos of {len(self.starts)} windows.")
        for number, stream in enumerate(self.streams[1:]):
            self.add_rows(stream, features.values[number :: len(self.starts)], index)

    def compute(self) -> Tensor:
        """Return the squared distance of each window `[windows]`, float64."""
        return torch.stack([self._between("real", stream) for stream in self.streams[1:]])


class KernelDistance(SampleMetric):
    """Unbiased squared MMD between real and generated samples under `(x y / d + 1)^3`: KVD with I3D.

    The estimator pairs all samples, so all features are kept: 3.2 kB a sample for I3D.

    Args:
        detector: Whose features come, or its card.
    """

    higher_is_better = False

    def __init__(self, detector: Detector | DetectorCard) -> None:
        card = card_of(detector)
        super().__init__(("real", "generated"), card.num_features, torch.zeros(1), fold=False)
        self.card = card

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("kernel")

    def update(self, features: Features, real: bool, index: Tensor | None = None) -> None:
        """Add samples, see `FrechetDistance.update`."""
        check_card(features, self.card)
        self.add_rows("real" if real else "generated", features.values, index)

    def compute(self) -> Tensor:
        """Return the squared discrepancy, a float64 scalar."""
        real, generated = (self.finish(stream)[1] for stream in self.streams)
        return kernel_distance(real, generated)

    def reset_generated(self) -> None:
        """Begin a new set of generated samples, against the same real ones."""
        self.forget("generated")


def window_starts(num_frames: int, window: int, stride: int, include_last: bool = True) -> range:
    """First frames of the windows of a video.

    Args:
        num_frames: Of the video.
        window: Frames of a window.
        stride: From one window to the next; the window's length for pieces that do not overlap (TATS).
        include_last: Whether a window may end with the video. MeBT's 14 windows of 128 frames leave that one out.

    Raises:
        ValueError: If the video is shorter than a window, or the stride is no positive number.
    """
    if num_frames < window or stride < 1:
        raise ValueError(f"No windows of {window} frames every {stride} in a video of {num_frames} frames.")
    return range(0, num_frames - window + (1 if include_last else 0), stride)


def cut_windows(video: Tensor, starts: Sequence[int], window: int) -> Tensor:
    """Cut windows out of `[B, 3, T, H, W]`: `[B * windows, 3, window, H, W]`, the windows of a video together."""
    return torch.stack([video[:, :, start : start + window] for start in starts], dim=1).flatten(0, 1)
