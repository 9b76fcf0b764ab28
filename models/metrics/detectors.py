"""From video to features: what a detector is, how it sees a video, and which names its numbers may have.

Two distances are comparable only if the network, its weights and the way to its input are the same. So a `Detector` is
all of these together, it signs the features that it makes with its `DetectorCard`, a metric takes features of one card
only, and the name of a metric is the card's to give: numbers of a detector without published weights are never FVD.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["legacy", "half_pixel", "aligned_corners"]
Quantise = Literal["none", "floor", "round"]
Quantity = Literal[
    "frechet", "reconstruction_frechet", "kernel", "inception_score", "class_coherence", "inception_coherence"
]


@dataclass(frozen=True)
class Preprocessing:
    """The way from a video in [-1, 1] to the input of a network, also in [-1, 1].

    Args:
        size: Height and width of the network's input.
        resize: Where output pixel i of n looks in the m of the input. `legacy`: at `i m / n` (TensorFlow 1);
            `half_pixel`: at `(i + 1/2) m / n - 1/2`; `aligned_corners`: at `i (m - 1) / (n - 1)`. All are bilinear.
        antialias: Whether shrinking averages over all pixels that it covers; for `half_pixel` only. No published
            protocol does.
        crop: Bring the shorter side to `size` and crop the centre, instead of stretching to a square.
        quantise: What becomes of a float video's values between two of the 256 levels: nothing, the lower level
            (TATS, MeBT) or the nearest (StyleGAN-V). Videos that are uint8 stay as they are.
        min_frames: Fewest frames that the network takes.
        max_frames: Most frames that the network takes; None for any number.
    """

    size: int
    resize: Resize
    antialias: bool = False
    crop: bool = False
    quantise: Quantise = "none"
    min_frames: int = 1
    max_frames: int | None = None

    def __call__(self, video: Tensor) -> Tensor:
        """Map `[B, 3, T, H, W]`, uint8 or in [-1, 1], to `[B, 3, T, size, size]` float32 in [-1, 1]."""
        video = quantise(video, self.quantise)
        height, width = video.shape[3:]
        if self.crop:
            scale = self.size / min(height, width)
            height, width = (max(self.size, math.ceil(side * scale)) for side in (height, width))
        else:
            height = width = self.size
        video = resize_frames(video, height, width, self.resize, self.antialias)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return video[..., top : top + self.size, left : left + self.size]


def quantise(video: Tensor, levels: Quantise) -> Tensor:
    """Bring a video to float32 in [-1, 1], and float values to the levels of uint8 where that is asked for."""
    if video.dtype == torch.uint8:
        return video.float() / 127.5 - 1
    video = video.float()
    if levels == "none":
        return video
    # a value that came from uint8 is a rounding error beside its level: it must not fall to the one below
    nudge = 1e-3 if levels == "floor" else 0.5
    return ((video + 1) * 127.5 + nudge).floor().clamp(0, 255) / 127.5 - 1


def resize_frames(video: Tensor, height: int, width: int, resize: Resize, antialias: bool = False) -> Tensor:
    """Resize the frames of `[B, C, T, H, W]` float to `[B, C, T, height, width]`; the input itself if it has that size.

    Raises:
        ValueError: If antialiasing is asked of a rule that has none.
    """
    if antialias and resize != "half_pixel":
        raise ValueError(f"antialias=True goes with resize='half_pixel' only, not with {resize!r}.")
    if video.shape[3:] == (height, width):
        return video
    if resize == "legacy":
        return _legacy_axis(_legacy_axis(video, width, dim=4), height, dim=3)
    frames = video.flatten(1, 2)  # [B, C T, H, W]
    frames = F.interpolate(
        frames, (height, width), mode="bilinear", align_corners=resize == "aligned_corners", antialias=antialias
    )
    return frames.unflatten(1, video.shape[1:3])


def _legacy_axis(x: Tensor, size: int, dim: int) -> Tensor:
    source = x.shape[dim]
    place = torch.arange(size, device=x.device, dtype=torch.float32) * (source / size)
    low = place.long().clamp(max=source - 1)
    fraction = (place - low).view(-1, *(1,) * (x.ndim - 1 - dim))
    below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=source - 1))
    return below + (above - below) * fraction


@dataclass(frozen=True)
class DetectorCard:
    """What makes two features comparable: equal cards.

    Args:
        name: Of network and preprocessing, such as `i3d_tf`.
        weights: Sha256 of the file, or a description that begins with `random`.
        num_features: D.
        num_classes: K of the logits.
        preprocessing: Part of the identity.
        ddof: Whether the protocol's covariances divide by `n - 1` or by n.
        published: The names that this detector's numbers have in the literature. Without one, a number is called
            `<quantity>_<name>`.
    """

    name: str
    weights: str
    num_features: int
    num_classes: int
    preprocessing: Preprocessing
    ddof: int = 1
    published: Mapping[str, str] = field(default_factory=dict)

    def metric_name(self, quantity: Quantity) -> str:
        """Return the name under which a number may be reported: `fvd`, or `frechet_random_i3d`."""
        return self.published.get(quantity, f"{quantity}_{self.name}")


@dataclass(frozen=True)
class Features:
    """What a detector saw.

    Args:
        values: `[n, D]` float32, the features of distances.
        logits: `[n, K]` float32, of the detector's classes.
        card: Of the detector that made them.
    """

    values: Tensor
    logits: Tensor
    card: DetectorCard

    def __len__(self) -> int:
        return len(self.values)


class Detector(nn.Module):
    """A frozen network with its preprocessing.

    Runs in float32 whatever surrounds it: autocast and TF32 are off inside, and casting a module that contains it to
    another type leaves it alone. `detector(video)` returns `Features`; several metrics share them.

    Args:
        network: Takes `[B, 3, T, size, size]` in [-1, 1], returns features `[B, D]` and logits `[B, K]`.
        card: Its name, weights, sizes and preprocessing.
        clips_at_once: Clips that go through the network together: memory, not results.
    """

    def __init__(self, network: nn.Module, card: DetectorCard, clips_at_once: int = 16) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.card = card
        self.clips_at_once = clips_at_once
        self.eval()

    @torch.no_grad()
    def forward(self, video: Tensor) -> Features:
        """Extract features.

        Args:
            video: `[B, 3, T, H, W]`, float in [-1, 1] or uint8. Detectors of images take `[B, 3, 1, H, W]`.

        Raises:
            ValueError: For another layout, values outside of [-1, 1], or a number of frames that it cannot take.
        """
        self._check(video)
        if not len(video):
            values, logits = torch.zeros(0, self.card.num_features), torch.zeros(0, self.card.num_classes)
            return Features(values.to(video.device), logits.to(video.device), self.card)
        with full_precision(video.device):
            outputs = [self.network(self.card.preprocessing(clips)) for clips in video.split(self.clips_at_once)]
        values, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return Features(values, logits, self.card)

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"{self.card.name} takes video [B, 3, T, H, W], channels first; got {list(video.shape)}.")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ValueError(f"{self.card.name} takes float video in [-1, 1] or uint8; got {video.dtype}.")
        frames, limits = video.shape[2], self.card.preprocessing
        if frames < limits.min_frames:
            raise ValueError(f"{self.card.name} needs at least {limits.min_frames} frames; the clips have {frames}.")
        if limits.max_frames is not None and frames > limits.max_frames:
            raise ValueError(f"{self.card.name} takes at most {limits.max_frames} frames; the clips have {frames}.")
        if video.is_floating_point() and video.numel():
            low, high = (float(value) for value in video.aminmax())
            if not (low >= -1.001 and high <= 1.001):  # NaN as well
                raise ValueError(f"{self.card.name} takes float video in [-1, 1]; got values from {low:g} to {high:g}.")

    def train(self, mode: bool = True) -> "Detector":
        """Stay in evaluation."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Detector":
        """Follow to another device, but never to another type."""
        device = fn(torch.empty(0, device=next(self.network.parameters()).device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, no TF32."""
    matmul = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn = torch.backends.cudnn
        with (
            torch.autocast(device.type, enabled=False),
            cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
