import math
from itertools import pairwise

import pytest

from models.schedules import learning_rate_factor


def test_the_rate_is_constant_unless_told_otherwise() -> None:
    assert [learning_rate_factor(step) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_warm_up_is_linear_and_never_zero() -> None:
    factors = [learning_rate_factor(step, warmup_steps=4) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_half_cosine_goes_from_one_to_zero_and_stays_there() -> None:
    factors = [learning_rate_factor(step, decay_steps=8) for step in range(11)]
    assert factors[:9] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(9)])
    assert factors[0] == 1.0
    assert factors[4] == pytest.approx(0.5)
    assert factors[8:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("warmup_steps", "decay_steps"), [(0, 100), (10, 100), (99, 100), (10, None)])
def test_rate_rises_through_the_warm_up_and_does_not_rise_after_it(warmup_steps: int, decay_steps: int | None) -> None:
    factors = [learning_rate_factor(step, warmup_steps, decay_steps) for step in range(120)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(a < b for a, b in pairwise(factors[: warmup_steps + 1]))
    assert factors[warmup_steps] == 1.0
    assert all(a >= b for a, b in pairwise(factors[warmup_steps:]))


@pytest.mark.parametrize("warmup_steps", [10, 11, 50])
def test_a_run_shorter_than_its_warm_up_does_not_divide_by_zero(warmup_steps: int) -> None:
    factors = [learning_rate_factor(step, warmup_steps, decay_steps=10) for step in range(60)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[-1] == 0.0
