"""Frame by frame: how close predicted videos are to the true ones (MAGVIT's convention on BAIR)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.metrics.detectors import full_precision
from models.metrics.samples import SampleMetric
from models.tokenizers.losses import LPIPS

_GREY = (0.2125, 0.7154, 0.0721)


def frame_psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, for values in [-1, 1]: `[B, 3, T, H, W]` to `[B, T]` float64.

    Infinite where the two are equal; no cap.
    """
    errors = (video.double() - reference.double()).square().mean(dim=(1, 3, 4))
    return 10 * (4 / errors).log10()


def frame_ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each frame's grey values: `[B, 3, T, H, W]` to `[B, T]` float64.

    Gaussian window of 11 pixels and sigma 1.5, its valid region only, k1 = 0.01, k2 = 0.03. Variances are clipped at 0,
    covariances at the product of the deviations.

    Raises:
        ValueError: If frames are smaller than the window.
    """
    if min(video.shape[3:]) < 11:
        raise ValueError(f"SSIM's window is 11 x 11 pixels; the frames are {video.shape[3]} x {video.shape[4]}.")
    place = torch.arange(-5, 6, device=video.device, dtype=torch.float64)
    window = torch.exp(-0.5 * (place / 1.5) ** 2)
    window = window / window.sum()
    weights = torch.tensor(_GREY, dtype=torch.float64, device=video.device)

    def grey(x: Tensor) -> Tensor:  # in [0, 1], [B T, 1, H, W]
        return rearrange(torch.einsum("bcthw,c->bthw", (x.double() + 1) / 2, weights), "b t h w -> (b t) 1 h w")

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    x, y = grey(video), grey(reference)
    mean_x, mean_y = blur(x), blur(y)
    var_x = (blur(x * x) - mean_x**2).clamp(min=0)
    var_y = (blur(y * y) - mean_y**2).clamp(min=0)
    covariance, bound = blur(x * y) - mean_x * mean_y, (var_x * var_y).sqrt()
    covariance = covariance.clamp(-bound, bound)
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    ssim = ssim / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return ssim.mean(dim=(1, 2, 3)).view(video.shape[0], video.shape[2])


class FrameScore(SampleMetric):
    """Base of scores that compare frames, are averaged over a video's frames, and then over videos.

    Args:
        futures: Predicted videos for each true one. Of several, PSNR and SSIM take the best (MCVD's rule, 100 on BAIR),
            LPIPS the mean.
    """

    takes_best = False

    def __init__(self, futures: int = 1) -> None:
        if futures < 1:
            raise ValueError(f"futures={futures} must be at least 1.")
        super().__init__(("videos",), 1, torch.zeros(2))
        self.futures = futures

    def score(self, video: Tensor, reference: Tensor) -> Tensor:
        """Compare videos `[B, 3, T, H, W]` in [-1, 1]: `[B]`, means over frames."""
        raise NotImplementedError

    def accepts(self, rows: Tensor) -> bool:
        """An infinite score is one; a score of NaN is a video of NaN."""
        return not bool(rows.isnan().any())

    def fold(self, state: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Count rows and add them."""
        return state + torch.cat([state.new_tensor([len(rows)]), rows.sum(dim=0)])

    def update(self, video: Tensor, reference: Tensor, index: Tensor | None = None) -> None:
        """Add videos.

        Args:
            video: `[B * futures, 3, T, H, W]` in [-1, 1], the futures of a video together.
            reference: `[B, 3, T, H, W]`.
            index: `[B]` int64, which video each is; a repeated index counts once. None if none repeats.

        Raises:
            ValueError: If the shapes do not belong together.
        """
        if video.shape != (len(reference) * self.futures, *reference.shape[1:]):
            raise ValueError(
                f"{self.futures} videos for each of {list(reference.shape)} were expected, got {list(video.shape)}."
            )
        scores = self.score(video, reference.repeat_interleave(self.futures, dim=0)).view(len(reference), self.futures)
        self.add_rows(
            "videos", scores.amax(1, keepdim=True) if self.takes_best else scores.mean(1, keepdim=True), index
        )

    def compute(self) -> Tensor:
        """Return the mean over videos, a float64 scalar.

        Raises:
            ValueError: If there are none.
        """
        count, total = self.finish("videos")[0]
        if count == 0:
            raise ValueError("There are no videos to score.")
        return total / count


class PSNR(FrameScore):
    """Mean over videos of the mean PSNR of their frames, dB; see `frame_psnr`."""

    higher_is_better = True
    takes_best = True
    name = "psnr"

    def score(self, video: Tensor, reference: Tensor) -> Tensor:
        """Return `[B]` in dB."""
        return frame_psnr(video, reference).mean(dim=1)


class SSIM(FrameScore):
    """Mean over videos of the mean SSIM of their frames; see `frame_ssim`."""

    higher_is_better = True
    takes_best = True
    name = "ssim"

    def score(self, video: Tensor, reference: Tensor) -> Tensor:
        """Return `[B]`, 1 for equal videos."""
        return frame_ssim(video, reference).mean(dim=1)


class PerceptualDistance(FrameScore):
    """Mean over videos of the mean LPIPS of their frames, with VGG16 and in its own range [-1, 1].

    Args:
        lpips: The network, see `LPIPS.from_folder`.
        futures: Predicted videos for each true one, all of which count.
    """

    higher_is_better = False
    name = "lpips_vgg"

    def __init__(self, lpips: LPIPS, futures: int = 1) -> None:
        super().__init__(futures)
        self.lpips = lpips

    def score(self, video: Tensor, reference: Tensor) -> Tensor:
        """Return `[B]`, 0 for equal videos."""
        distances = [video.new_zeros(0)]
        with full_precision(video.device):
            for frames, true in zip(video.float().transpose(1, 2), reference.float().transpose(1, 2), strict=True):
                distances.append(self.lpips(frames, true).view(1))  # of [T, 3, H, W]: the mean over the frames
        return torch.cat(distances)
