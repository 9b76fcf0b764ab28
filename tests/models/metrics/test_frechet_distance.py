import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from models.metrics import Features, FrechetDistance, ReconstructionFrechetDistance, SlidingFrechetDistance
from models.metrics.distances import add_rows, frechet_distance, merge_triangles, moments, window_starts
from models.metrics.samples import KEPT_ROWS
from models.random import keyed_generator

ToyFeatures = Callable[[Tensor], Features]


def draw(key: int, n: int, d: int, decay: float = 0.9) -> Tensor:
    """Features as networks have them: correlated, with a spectrum that falls, away from the origin."""
    rotation = torch.linalg.qr(torch.randn(d, d, generator=keyed_generator(d), dtype=torch.float64)).Q
    x = torch.randn(n, d, generator=keyed_generator(key, n, d), dtype=torch.float64)
    return x * decay ** torch.arange(d) @ rotation + 3


def triangle(x: Tensor) -> Tensor:
    return add_rows(torch.zeros(x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64), x)


def distance(x: Tensor, y: Tensor, ddof: int = 1) -> float:
    return float(frechet_distance(triangle(x), triangle(y), ddof))


def nuclear_norm_form(x: Tensor, y: Tensor) -> float:
    """The distance from raw features: the trace term is the nuclear norm of the product of the centred matrices."""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    trace = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace)


def by_scipy(x: Tensor, y: Tensor) -> float:
    c1, c2 = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(c1 + c2 - 2 * root)


@pytest.mark.parametrize(("n1", "n2"), [(120, 90), (41, 300), (12, 15), (12, 300), (2, 2)])
def test_agrees_with_the_nuclear_norm_of_raw_features_at_any_number_of_samples(n1: int, n2: int) -> None:
    x, y = draw(1, n1, 40), draw(2, n2, 40)
    assert distance(x, y) == pytest.approx(nuclear_norm_form(x, y), rel=1e-9)


def test_agrees_with_the_nuclear_norm_where_covariances_would_drown_in_rounding() -> None:
    """A spectrum over 12 decades, whose squares float64 cannot hold."""
    x, y = draw(1, 300, 40, decay=0.5), draw(2, 30, 40, decay=0.5)
    assert distance(x, y) == pytest.approx(nuclear_norm_form(x, y), rel=1e-9)


@pytest.mark.parametrize(("n1", "n2", "tolerance"), [(200, 150, 1e-6), (20, 25, 1e-3), (20, 200, 1e-3)])
def test_agrees_with_the_matrix_root_of_scipy(n1: int, n2: int, tolerance: float) -> None:
    x, y = draw(1, n1, 40), draw(2, n2, 40)
    assert distance(x, y) == pytest.approx(by_scipy(x, y), rel=tolerance)


@pytest.mark.parametrize("n", [8, 200])
def test_equal_sets_are_at_distance_zero_in_any_order(n: int) -> None:
    x = draw(1, n, 40)
    shuffled = x[torch.randperm(n, generator=keyed_generator(0))]
    assert distance(x, shuffled) <= 1e-9 * float(x.var(0).sum())


def test_is_symmetric() -> None:
    x, y = draw(1, 60, 40), draw(2, 20, 40)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)


@pytest.mark.parametrize("n", [2, 10, 100])
def test_a_shift_costs_its_squared_length(n: int) -> None:
    x, shift = draw(1, n, 40), torch.arange(40).double() / 10
    assert distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-8)


def test_scaling_costs_the_square_of_the_difference() -> None:
    x = draw(1, 100, 20)
    x = x - x.mean(0)
    assert distance(x, 3 * x) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-9)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    design = torch.from_numpy(scipy.linalg.hadamard(16)).double()[:, 1:5]  # orthogonal columns without a mean
    widths, means = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    expected = (widths - 1).square().sum() * 16 / 15 + means.square().sum()
    assert distance(design, design * widths + means) == pytest.approx(float(expected), rel=1e-12)


def test_a_rotation_of_both_sets_changes_nothing() -> None:
    x, y = draw(1, 60, 40), draw(2, 20, 40)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=keyed_generator(5), dtype=torch.float64)).Q
    assert distance(x @ rotation, y @ rotation) == pytest.approx(distance(x, y), rel=1e-8)


@pytest.mark.parametrize("ddof", [0, 1])
def test_covariances_divide_as_asked(ddof: int) -> None:
    x = draw(1, 30, 8)
    count, mean, root = moments(triangle(x))
    assert count == 30
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(root.T @ root / (30 - ddof), np.cov(x.numpy(), rowvar=False, ddof=ddof), rtol=1e-10)
    assert distance(x, 2 * x, ddof) == pytest.approx(
        float(x.mean(0).square().sum() + x.var(0, correction=ddof).sum()), rel=1e-9
    )


def test_features_far_from_the_origin_keep_their_covariance() -> None:
    x = (torch.randn(4096, 8, generator=keyed_generator(1)) + 1000).float()
    triangles = torch.stack([triangle(part.double()) for part in x.split(100)])
    _, _, root = moments(merge_triangles(triangles))
    np.testing.assert_allclose(root.T @ root / 4095, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-6)


def test_the_bias_falls_as_one_over_the_number_of_samples() -> None:
    """d = 16: with both sets of n the distance of a distribution to itself goes as 1/n, by 4 from step to step."""
    values = [distance(draw(1, n, 16), draw(2, n, 16)) for n in (256, 1024, 4096)]
    assert 2.5 < values[0] / values[1] < 6
    assert 2.5 < values[1] / values[2] < 6


# The metric


@pytest.fixture
def samples(toy_features: ToyFeatures) -> tuple[Features, Features]:
    # more than are kept as they are, so that some are folded
    return toy_features(draw(1, KEPT_ROWS * 2 + 70, 10).float()), toy_features(draw(2, 300, 10).float())


def part(features: Features, rows: slice | Tensor) -> Features:
    return Features(features.values[rows], features.logits[rows], features.card)


def updated(real: Features, generated: Features, size: int = 10_000) -> FrechetDistance:
    metric = FrechetDistance(real.card)
    for features, is_real in ((real, True), (generated, False)):
        for start in range(0, len(features), size):
            rows = slice(start, start + size)
            metric.update(part(features, rows), is_real, torch.arange(len(features))[rows])
    return metric


def test_metric_equals_the_formula(samples: tuple[Features, Features]) -> None:
    expected = nuclear_norm_form(*(features.values.double() for features in samples))
    assert float(updated(*samples).compute()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 700])
def test_batches_of_any_size_give_the_same(samples: tuple[Features, Features], size: int) -> None:
    metric = updated(*samples, size=size)
    metric.update(part(samples[0], slice(0, 0)), real=True, index=torch.zeros(0, dtype=torch.int64))
    assert float(metric.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


def test_the_order_of_samples_does_not_matter(samples: tuple[Features, Features]) -> None:
    order = torch.randperm(len(samples[0]), generator=keyed_generator(3))
    metric = updated(part(samples[0], order), samples[1])
    assert float(metric.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


def test_memory_does_not_grow_with_the_number_of_samples(samples: tuple[Features, Features]) -> None:
    metric = updated(*samples, size=64)
    assert sum(map(len, metric.real_rows)) < 2 * KEPT_ROWS
    assert metric.real_state.shape == (11, 11)


def test_a_repeated_index_counts_once(samples: tuple[Features, Features]) -> None:
    real, generated = samples
    metric = updated(real, generated, size=64)
    metric.update(part(real, slice(0, 3)), real=True, index=torch.arange(3))  # folded long ago
    metric.update(part(real, slice(-2, None)), real=True, index=torch.arange(len(real))[-2:])  # still kept
    assert float(metric.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


def test_a_repeated_index_that_was_counted_is_refused(toy_features: ToyFeatures) -> None:
    metric = FrechetDistance(toy_features(draw(1, 2, 4)).card)
    features, index = toy_features(draw(1, 2 * KEPT_ROWS, 4)), torch.arange(2 * KEPT_ROWS)
    for _ in range(2):
        metric.update(features, real=True, index=index)
    metric.update(features, real=False)
    with pytest.raises(ValueError, match=r"Samples \[0, 1, 2, 3, 4\] were counted more than once"):
        metric.compute()


def test_without_an_index_all_count(toy_features: ToyFeatures) -> None:
    x, y = draw(1, 30, 4), draw(2, 30, 4)
    metric = FrechetDistance(toy_features(x).card)
    for _ in range(2):
        metric.update(toy_features(x), real=True)
    metric.update(toy_features(y), real=False)
    assert float(metric.compute()) == pytest.approx(distance(torch.cat([x, x]), y), rel=1e-9)


def test_a_saved_state_goes_on_as_if_never_interrupted(samples: tuple[Features, Features]) -> None:
    real, generated = samples
    half = len(real) // 2
    first = updated(part(real, slice(0, half)), generated)
    first.persistent(True)
    second = FrechetDistance(real.card)
    second.persistent(True)
    second.load_state_dict(first.state_dict())
    second.update(part(real, slice(half, None)), real=True, index=torch.arange(half, len(real)))
    assert float(second.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


def test_merged_states_are_the_state_of_all(samples: tuple[Features, Features]) -> None:
    real, generated = samples
    first = updated(part(real, slice(0, 900)), part(generated, slice(0, 100)))
    second = FrechetDistance(real.card)
    second.update(part(real, slice(900, None)), real=True, index=torch.arange(900, len(real)))
    second.update(part(generated, slice(100, None)), real=False, index=torch.arange(100, 300))
    second.merge_state(first)
    assert float(second.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


def test_generated_samples_are_forgotten_and_real_ones_stay(samples: tuple[Features, Features]) -> None:
    real, generated = samples
    metric = updated(real, real)
    assert float(metric.compute()) < 1e-9
    metric.reset_generated()
    metric.update(generated, real=False)
    assert float(metric.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-9)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()])
def test_states_stay_in_double_precision(samples: tuple[Features, Features], cast: Callable) -> None:
    metric = updated(*samples)
    cast(torch.nn.ModuleList([metric]))
    assert metric.real_state.dtype == metric.real_rows[0].dtype == torch.float64
    assert metric.real_index[0].dtype == torch.int64
    assert float(metric.compute()) == pytest.approx(float(updated(*samples).compute()), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(toy_features: ToyFeatures, value: float) -> None:
    x = draw(1, 3, 4)
    x[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        FrechetDistance(toy_features(x).card).update(toy_features(x), real=True)


def test_one_sample_is_too_few(toy_features: ToyFeatures) -> None:
    x = toy_features(draw(1, 3, 4))
    metric = FrechetDistance(x.card)
    metric.update(x, real=True)
    metric.update(part(x, slice(0, 1)), real=False)
    with pytest.raises(ValueError, match="two samples of each set at least; there are 3 and 1"):
        metric.compute()


def test_features_of_another_detector_are_refused(toy_features: ToyFeatures) -> None:
    metric = FrechetDistance(toy_features(draw(1, 3, 4)).card)
    with pytest.raises(ValueError, match="numbers of two detectors cannot be compared"):
        metric.update(toy_features(draw(1, 3, 5)), real=True)


def test_indices_must_belong_to_the_samples(toy_features: ToyFeatures) -> None:
    x = toy_features(draw(1, 3, 4))
    with pytest.raises(ValueError, match="Expected 3 sample indices"):
        FrechetDistance(x.card).update(x, real=True, index=torch.arange(2))


def test_few_samples_are_warned_of_once(toy_features: ToyFeatures, caplog: pytest.LogCaptureFixture) -> None:
    x = toy_features(draw(1, 30, 4))
    metric = updated(x, x)
    with caplog.at_level(logging.WARNING):
        metric.compute()
        metric.update(x, real=False)
        metric.compute()
    assert len(caplog.records) == 1
    assert "frechet_toy of 30 and 30 samples with 4 features" in caplog.text


def test_reconstructions_are_named_apart(toy_features: ToyFeatures) -> None:
    x, y = toy_features(draw(1, 30, 4)), toy_features(draw(2, 30, 4))
    metric = ReconstructionFrechetDistance(x.card)
    metric.update(x, real=True, index=torch.arange(30))
    metric.update(y, real=False, index=torch.arange(30))
    assert float(metric.compute()) == pytest.approx(distance(x.values, y.values), rel=1e-9)
    assert metric.name == "reconstruction_frechet_toy"


def test_each_window_is_compared_with_the_same_real_clips(toy_features: ToyFeatures) -> None:
    real, windows = draw(1, 30, 4), draw(2, 20, 12).view(20, 3, 4)
    metric = SlidingFrechetDistance(toy_features(real).card, window_starts(32, 16, 8))
    metric.update(toy_features(real), real=True)
    for rows in (slice(0, 5), slice(5, 20)):
        metric.update(toy_features(windows[rows].flatten(0, 1)), real=False, index=torch.arange(20)[rows])
    expected = [distance(real, windows[:, i]) for i in range(3)]
    assert metric.compute().tolist() == pytest.approx(expected, rel=1e-9)
    assert metric.names == [f"frechet_toy_from_frame_{start}" for start in (0, 8, 16)]
    with pytest.raises(ValueError, match="no whole number of videos of 3 windows"):
        metric.update(toy_features(windows[:1, 0]), real=False)
    metric.reset_generated()
    metric.update(toy_features(real.repeat_interleave(3, dim=0)), real=False)
    assert metric.compute().tolist() == pytest.approx([0, 0, 0], abs=1e-9)
