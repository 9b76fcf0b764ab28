"""Scores of a video against the one it should equal."""

from torch import Tensor


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, for values in [-1, 1] (peak 2).

    Args:
        video: `[B, 3, T, H, W]`.
        reference: The same shape.

    Returns:
        `[B]`; infinite where the two are equal.
    """
    return 10 * (4.0 / (video - reference).square().flatten(1).mean(dim=1)).log10()
