import numpy as np
import pytest

from models.priors.curriculum import draw_length, expected_length, length_probabilities

# of 32 latent frames, 128 frames; papers' b and c
SETTINGS = {"total_steps": 1000, "full_length_from": 0.7, "steps_per_frame": 100_000, "width": 2.0}


def probabilities(schedule: str, step: int, max_length: int = 32, **changed: float) -> np.ndarray:
    return length_probabilities(schedule, step, max_length, **(SETTINGS | changed))


@pytest.mark.parametrize(
    ("steps_per_frame", "step", "expected"),
    [  # read off the release: gaussian2 has b = 30,000, gaussian100000_2 has b = 100,000
        (30_000, 0, 2.3),
        (30_000, 100_000, 4.5),
        (30_000, 500_000, 17.7),
        (30_000, 930_000, 30.7),
        (30_000, 1_000_000, 31.4),
        (30_000, 2_000_000, 32.0),
        (100_000, 0, 2.3),
        (100_000, 100_000, 2.8),
        (100_000, 500_000, 6.0),
        (100_000, 930_000, 10.3),
        (100_000, 1_000_000, 11.0),
        (100_000, 2_000_000, 21.0),
    ],
)
def test_gaussian_has_the_expected_lengths_of_the_release(steps_per_frame: int, step: int, expected: float) -> None:
    mean = expected_length(probabilities("gaussian", step, steps_per_frame=steps_per_frame))
    assert mean == pytest.approx(expected, abs=0.051)  # the table has one decimal


def test_gaussian_is_the_formula_of_the_release() -> None:
    b, c, step = 300.0, 2.0, 3_456
    weights = [np.exp(-((step - (length - 1) * b) ** 2) / (2 * (b * c) ** 2)) for length in range(1, 33)]
    actual = probabilities("gaussian", step, steps_per_frame=b, width=c)
    np.testing.assert_allclose(actual, np.array(weights) / np.sum(weights), rtol=1e-12)


def test_gaussian_at_two_million_steps_of_the_long_release_is_rarely_full() -> None:
    assert probabilities("gaussian", 2_000_000)[-1] == pytest.approx(5e-8, rel=0.2)


def test_gaussian_moves_one_latent_frame_every_steps_per_frame() -> None:
    modes = [int(probabilities("gaussian", 100_000 * k).argmax()) for k in range(32)]
    assert modes == list(range(32))


@pytest.mark.parametrize("step", [10**7, 10**9, 10**12])
def test_gaussian_far_beyond_the_last_length_does_not_underflow(step: int) -> None:
    p = probabilities("gaussian", step, steps_per_frame=1_000)
    assert np.isfinite(p).all()
    assert p[-1] > 0.99


@pytest.mark.parametrize("schedule", ["longest", "uniform", "gaussian", "linear", "fraction"])
@pytest.mark.parametrize("max_length", [1, 2, 4, 32])
def test_probabilities_sum_to_one_and_never_get_shorter(schedule: str, max_length: int) -> None:
    steps = [0, 1, 10, 349, 350, 699, 700, 999, 5_000]
    rows = [probabilities(schedule, step, max_length, steps_per_frame=20) for step in steps]
    assert all(row.shape == (max_length,) and (row >= 0).all() for row in rows)
    np.testing.assert_allclose([row.sum() for row in rows], 1, rtol=1e-12)
    assert (np.diff([expected_length(row) for row in rows]) >= -1e-9).all()


def test_longest_is_certain_and_uniform_is_even() -> None:
    assert probabilities("longest", 0).tolist() == [0.0] * 31 + [1.0]
    assert probabilities("uniform", 123).tolist() == [1 / 32] * 32


def test_linear_is_one_length_from_one_to_full() -> None:
    lengths = [expected_length(probabilities("linear", step)) for step in (0, 350, 699, 700, 999)]
    assert lengths == [1, 16, 31, 32, 32]
    assert all(probabilities("linear", step).max() == 1 for step in range(0, 1000, 37))


@pytest.mark.parametrize("step", [700, 701, 850, 999, 1000])
def test_fraction_has_full_length_in_the_last_thirty_percent(step: int) -> None:
    p = probabilities("fraction", step)
    assert p[-1] == 1
    assert expected_length(p) == 32


def test_fraction_is_a_gaussian_about_a_centre_that_moves_linearly() -> None:
    p = probabilities("fraction", 350)  # centre 1 + 31 / 2 = 16.5, far from both ends
    assert expected_length(p) == pytest.approx(16.5, abs=1e-6)
    lengths = np.arange(1, 33)
    assert np.sqrt(p @ (lengths - 16.5) ** 2) == pytest.approx(2.0, abs=1e-3)
    assert probabilities("fraction", 699)[-1] < 1


def test_the_full_length_begins_at_the_exact_step() -> None:
    assert 0.55 * 100 > 55  # what the schedule must not fall for
    changed = {"total_steps": 100, "full_length_from": 0.55}
    assert [probabilities("linear", step, **changed)[-1] for step in (54, 55)] == [0, 1]


def test_whole_run_can_be_short_to_long() -> None:
    changed = {"total_steps": 10, "full_length_from": 1.0}
    assert [probabilities("linear", step, **changed)[-1] for step in (9, 10)] == [0, 1]


@pytest.mark.parametrize("schedule", ["linear", "fraction"])
@pytest.mark.parametrize("total_steps", [-1, 0])
def test_schedules_over_the_run_need_its_length(schedule: str, total_steps: int) -> None:
    with pytest.raises(ValueError, match=r"set --trainer\.max_steps"):
        probabilities(schedule, 0, total_steps=total_steps)


def test_schedules_by_step_do_not_need_the_length_of_the_run() -> None:
    for schedule in ("longest", "uniform", "gaussian"):
        assert probabilities(schedule, 5, total_steps=-1).sum() == pytest.approx(1)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'cosine' is unknown: use longest, uniform, gaussian, gaussian2"):
        probabilities("cosine", 0)


def test_draws_are_equal_for_equal_keys_and_differ_across_steps_and_seeds() -> None:
    p = probabilities("uniform", 0)
    lengths = [draw_length(p, 7, step) for step in range(50)]
    assert lengths == [draw_length(p, 7, step) for step in range(50)]
    assert lengths != [draw_length(p, 8, step) for step in range(50)]
    assert len(set(lengths)) > 15


def test_draws_follow_the_probabilities() -> None:
    p = probabilities("gaussian", 100_000, max_length=6)
    draws = np.array([draw_length(p, 0, step) for step in range(4000)])
    counts = np.bincount(draws, minlength=7)
    assert counts[0] == 0
    expected = 4000 * p
    chi_square = (((counts[1:] - expected) ** 2) / expected).sum()
    assert chi_square < 20.5  # 99.9 % quantile at 5 degrees of freedom; the draws are keyed, so this never flickers


@pytest.mark.parametrize("length", [1, 17, 32])
def test_draws_never_have_probability_zero(length: int) -> None:
    p = np.zeros(32)
    p[length - 1] = 1
    assert {draw_length(p, 0, step) for step in range(50)} == {length}


@pytest.mark.parametrize(("name", "steps_per_frame"), [("gaussian2", 30_000), ("gaussian100000_2", 100_000)])
@pytest.mark.parametrize("step", [0, 500_000, 2_000_000])
def test_schedules_of_the_release_have_fixed_numbers(name: str, steps_per_frame: int, step: int) -> None:
    named = probabilities(name, step, steps_per_frame=7, width=9.0)  # whatever these are
    np.testing.assert_array_equal(named, probabilities("gaussian", step, steps_per_frame=steps_per_frame, width=2.0))
