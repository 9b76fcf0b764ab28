from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.metrics import Features, KernelDistance, cut_windows, window_starts
from models.metrics.distances import kernel_distance
from models.random import keyed_generator

ToyFeatures = Callable[[Tensor], Features]


def draw(key: int, n: int, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=keyed_generator(key), dtype=torch.float64)


def double_loop(x: Tensor, y: Tensor) -> float:
    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((float(a[i] @ b[j]) / a.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_equals_the_double_loop() -> None:
    x, y = draw(1, 6), draw(2, 9) + 0.5
    assert float(kernel_distance(x, y)) == pytest.approx(double_loop(x, y), rel=1e-12)


def test_blocks_of_samples_do_not_show() -> None:
    x, y = draw(1, 1500, 3), draw(2, 1030, 3)
    kernel = (torch.cat([x, y]) @ torch.cat([x, y]).T / 3 + 1) ** 3
    kxx, kyy, kxy = kernel[:1500, :1500], kernel[1500:, 1500:], kernel[:1500, 1500:]
    expected = (kxx.sum() - kxx.trace()) / (1500 * 1499) + (kyy.sum() - kyy.trace()) / (1030 * 1029) - 2 * kxy.mean()
    assert float(kernel_distance(x, y)) == pytest.approx(float(expected), rel=1e-9)


def test_is_zero_on_average_for_one_distribution_and_negative_for_a_set_with_itself() -> None:
    values = torch.stack([kernel_distance(draw(2 * i, 40), draw(2 * i + 1, 40)) for i in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert (values < 0).any()
    assert kernel_distance(draw(1, 40), draw(1, 40)) < 0


def test_metric_counts_each_sample_once_in_any_order(toy_features: ToyFeatures) -> None:
    x, y = draw(1, 1300), draw(2, 30) + 0.5  # more than other metrics keep
    metric = KernelDistance(toy_features(x).card)
    for rows in torch.randperm(1300, generator=keyed_generator(0)).split(100):
        metric.update(toy_features(x[rows]), real=True, index=rows)
    metric.update(toy_features(x[:4]), real=True, index=torch.arange(4))
    metric.update(toy_features(y), real=False)
    assert float(metric.compute()) == pytest.approx(float(kernel_distance(x, y)), rel=1e-9)
    assert metric.name == "kernel_toy"
    metric.reset_generated()
    metric.update(toy_features(x), real=False)
    assert float(metric.compute()) == pytest.approx(float(kernel_distance(x, x)), rel=1e-6)


def test_one_sample_is_too_few(toy_features: ToyFeatures) -> None:
    with pytest.raises(ValueError, match="there are 1 and 6"):
        kernel_distance(draw(1, 1), draw(2, 6))


def test_windows_of_the_published_protocols() -> None:
    assert list(window_starts(128, 16, 8, include_last=False)) == list(range(0, 105, 8))  # MeBT: 14
    assert list(window_starts(30, 16, 1)) == list(range(15))  # BAIR, debiased
    assert list(window_starts(1024, 16, 16)) == list(range(0, 1024, 16))  # TATS: 64 pieces
    with pytest.raises(ValueError, match="No windows of 16 frames every 8 in a video of 15"):
        window_starts(15, 16, 8)


def test_windows_of_a_video_stay_together() -> None:
    video = torch.arange(2 * 6).view(2, 1, 6, 1, 1).expand(2, 3, 6, 4, 4)
    windows = cut_windows(video, range(0, 4, 2), 3)
    assert windows.shape == (4, 3, 3, 4, 4)
    assert windows[:, 0, :, 0, 0].tolist() == [[0, 1, 2], [2, 3, 4], [6, 7, 8], [8, 9, 10]]
