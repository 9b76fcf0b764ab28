import math

import pytest
import torch
from torch import Tensor

from models.metrics import conditional_entropy, perplexity, psnr
from models.metrics.codes import entropy
from models.random import keyed_generator


def uniform_codes(codebook_size: int, *shape: int) -> Tensor:
    return torch.randint(codebook_size, shape, generator=keyed_generator(codebook_size))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1, 1, 1], math.log(4)),
        ([5, 0, 0], 0.0),
        ([3, 1], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        ([[2, 0], [1, 1]], -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))),
    ],
)
def test_entropy_is_that_of_the_counted_distribution(counts: list, expected: float) -> None:
    assert entropy(torch.tensor(counts)).item() == pytest.approx(expected, abs=1e-12)


def test_perplexity_counts_the_codes_in_use() -> None:
    assert perplexity(torch.arange(12).view(1, 3, 2, 2), 64).item() == pytest.approx(12)
    assert perplexity(torch.full((2, 3, 2, 2), 7), 64).item() == pytest.approx(1)
    assert 15.9 < perplexity(uniform_codes(16, 8, 16, 8, 8), 16).item() <= 16


def test_a_code_that_the_previous_one_decides_has_no_entropy_left() -> None:
    first = uniform_codes(5, 6, 1, 4, 4)
    codes = (first + torch.arange(7)[:, None, None]) % 5  # each frame counts one further
    assert conditional_entropy(codes, 5).item() == pytest.approx(0, abs=1e-12)
    assert perplexity(codes, 5).item() > 4


def test_a_code_that_the_previous_one_says_nothing_about_has_all_of_it() -> None:
    value = conditional_entropy(uniform_codes(4, 8, 65, 8, 8), 4).item()
    # 32,768 pairs; the plug-in estimate lies about (K - 1)^2 / 2n = 1.4e-4 below log 4
    assert math.log(4) - 1e-3 < value <= math.log(4)


def test_conditional_entropy_equals_the_sum_over_previous_codes() -> None:
    codes = uniform_codes(3, 2, 5, 2, 2)
    pairs = torch.zeros(3, 3, dtype=torch.float64)
    for previous, current in zip(codes[:, :-1].flatten().tolist(), codes[:, 1:].flatten().tolist(), strict=True):
        pairs[previous, current] += 1
    expected = sum(
        row.sum() / pairs.sum() * -sum(p * p.log() for p in row / row.sum() if p > 0) for row in pairs if row.sum() > 0
    )
    assert conditional_entropy(codes, 3).item() == pytest.approx(float(expected), rel=1e-10)


def test_conditional_entropy_compares_the_same_place_in_neighbouring_frames() -> None:
    """A static picture is known from its past, however many codes it holds; clips do not run into each other."""
    static = uniform_codes(16, 4, 1, 8, 8).expand(-1, 5, -1, -1)
    assert conditional_entropy(static, 16).item() == pytest.approx(0, abs=1e-12)


def test_psnr_of_known_errors() -> None:
    reference = torch.zeros(3, 3, 2, 4, 4)
    video = reference + torch.tensor([2.0, 0.2, 0.02])[:, None, None, None, None]
    assert psnr(video, reference).tolist() == pytest.approx([0.0, 20.0, 40.0], abs=1e-4)


def test_psnr_of_equal_clips_is_infinite_and_each_clip_has_its_own() -> None:
    reference = torch.rand(2, 3, 2, 4, 4, generator=keyed_generator(0))
    video = reference.clone()
    video[1] += 0.5
    values = psnr(video, reference)
    assert values.shape == (2,)
    assert values[0] == math.inf
    assert values[1].item() == pytest.approx(10 * math.log10(4 / 0.25), abs=1e-4)
