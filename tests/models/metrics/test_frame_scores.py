import math

import pytest
import torch
from torch import Tensor

from models.metrics import PSNR, SSIM, PerceptualDistance, frame_psnr, frame_ssim
from models.metrics.samples import SampleMetric
from models.random import keyed_generator
from models.tokenizers import LPIPS


def video(key: int, *shape: int) -> Tensor:
    return torch.rand(*(shape or (2, 3, 3, 16, 20)), generator=keyed_generator(key)) * 2 - 1


def test_psnr_of_a_constant_offset() -> None:
    reference = video(1) * 0.5
    offsets = torch.tensor([0.1, 0.5])  # on [0, 1]
    values = frame_psnr(reference + 2 * offsets.view(2, 1, 1, 1, 1), reference)
    for row, offset in zip(values, offsets.tolist(), strict=True):
        assert row.tolist() == pytest.approx([-20 * math.log10(offset)] * 3, abs=1e-4)


def test_psnr_is_the_mean_over_frames_not_over_pixels() -> None:
    reference = torch.zeros(1, 3, 2, 4, 4)
    predicted = reference.clone()
    predicted[:, :, 0], predicted[:, :, 1] = 2.0, 0.02
    metric = PSNR()
    metric.update(predicted, reference)
    assert float(metric.compute()) == pytest.approx((0 + 40) / 2, abs=1e-4)


def test_psnr_of_equal_frames_is_infinite() -> None:
    metric = PSNR()
    metric.update(video(1), video(1))
    assert float(metric.compute()) == math.inf


def test_ssim_of_equal_frames_is_one_and_both_sides_are_alike() -> None:
    x, y = video(1), video(2)
    assert frame_ssim(x, x).flatten().tolist() == pytest.approx([1] * 6, abs=1e-12)
    assert torch.allclose(frame_ssim(x, y), frame_ssim(y, x), atol=1e-12)
    assert (frame_ssim(x, y) < 0.5).all()


def test_ssim_is_the_mean_over_weighted_windows_of_grey_values() -> None:
    x, y = video(1), (video(1) * 0.8 + 0.2 * video(2)).clamp(-1, 1)
    x, y = x[:1, :, :1], y[:1, :, :1]
    weights = torch.tensor([0.2125, 0.7154, 0.0721], dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1)
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    a, b = (torch.einsum("chw,c->hw", (z[0, :, 0].double() + 1) / 2, weights) for z in (x, y))
    values = []
    for i in range(16 - 10):
        for j in range(20 - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(frame_ssim(x, y)) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match=r"11 x 11 pixels; the frames are 10 x 16"):
        frame_ssim(video(1, 1, 3, 1, 10, 16), video(1, 1, 3, 1, 10, 16))


@pytest.mark.parametrize("metric", [PSNR(futures=3), SSIM(futures=3)])
def test_the_best_of_several_futures_counts(metric: PSNR | SSIM) -> None:
    reference = video(1)
    noise = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.6, 0.9]).view(6, 1, 1, 1, 1)
    futures = (1 - noise) * reference.repeat_interleave(3, dim=0) + noise * video(2, 6, 3, 3, 16, 20)
    metric.reset()
    metric.update(futures, reference)
    best = metric.score(futures[[1, 3]], reference)
    assert float(metric.compute()) == pytest.approx(float(best.mean()), rel=1e-9)


class PixelDistance(LPIPS):
    """Stands in for VGG: mean squared difference, and remembers what it was shown."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen = x
        return (x - y).square().mean()


def test_lpips_sees_frames_in_its_own_range_and_counts_all_futures() -> None:
    lpips = PixelDistance()
    metric = PerceptualDistance(lpips, futures=2)
    reference, futures = video(1), video(2, 4, 3, 3, 16, 20)
    metric.update(futures, reference)
    expected = (futures - reference.repeat_interleave(2, dim=0)).square().mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(lpips.seen, futures[-1].transpose(0, 1))  # [T, 3, H, W] in [-1, 1]


def test_lpips_of_equal_videos_is_zero() -> None:
    lpips = LPIPS()
    for head in lpips.heads:
        head.data.fill_(0.1)
    metric = PerceptualDistance(lpips)
    metric.update(video(1, 1, 3, 2, 16, 16), video(1, 1, 3, 2, 16, 16))
    assert float(metric.compute()) == 0


@pytest.mark.parametrize("metric", [PSNR(), SSIM(), PerceptualDistance(PixelDistance())], ids=lambda m: m.name)
def test_each_video_counts_once_however_they_are_batched(metric: SampleMetric) -> None:
    x, y = video(1, 5, 3, 2, 12, 12), video(2, 5, 3, 2, 12, 12)
    metric.reset()
    for rows in ([0], [1, 2, 3], [], [4], [1]):
        metric.update(x[rows], y[rows], torch.tensor(rows, dtype=torch.int64))
    assert float(metric.compute()) == pytest.approx(float(metric.score(x, y).double().mean()), rel=1e-6)


def test_shapes_must_belong_together() -> None:
    with pytest.raises(ValueError, match=r"2 videos for each of \[2, 3, 3, 16, 20\] were expected, got \[2, 3, 3, 16"):
        PSNR(futures=2).update(video(1), video(2))
    with pytest.raises(ValueError, match="futures=0 must be at least 1"):
        SSIM(futures=0)
    with pytest.raises(ValueError, match="not finite"):
        PSNR().update(video(1) * math.nan, video(2))
