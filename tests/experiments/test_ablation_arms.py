import json

import pytest
from PIL import Image

from experiments.ablations.arms import Comparison, Run, finished_run, logged_curve, write


def comparison(first, second, lower_is_better=True):
    runs = [
        Run(arm, seed, 1.0, [(0, 3.0), (10, value)], {"nll": value})
        for arm, values in (("a", first), ("b", second))
        for seed, value in enumerate(values)
    ]
    return Comparison("a against b", runs, "nll", lower_is_better, "NLL, nats", "toy")


def test_the_better_arm_wins_in_the_scores_direction():
    assert comparison([1.0, 1.1], [2.0, 2.1]).verdict() == "a is best"
    assert comparison([1.0, 1.1], [2.0, 2.1], lower_is_better=False).verdict() == "b is best"


def test_a_spread_as_wide_as_the_difference_decides_nothing():
    assert comparison([1.0, 2.0], [1.9, 2.1]).verdict() == "inconclusive"


def test_one_seed_decides_nothing():
    assert comparison([1.0], [2.0, 2.1]).verdict() == "inconclusive"


def test_a_finished_run_is_not_run_again(tmp_path):
    calls = []

    def train(place):
        calls.append(place)
        return [(0, 1.0)], {"nll": 2.0}

    first = finished_run(tmp_path, "with restart", 3, train)
    assert finished_run(tmp_path, "with restart", 3, train) == first
    assert len(calls) == 1
    assert finished_run(tmp_path, "with restart", 4, train).seed == 4


def test_what_is_written_names_the_verdict_and_every_arm(tmp_path):
    text = write(comparison([1.0, 1.1], [2.0, 2.1]), tmp_path, "toy")
    assert text.startswith("### a against b: a is best")
    assert "| a | 2 | 1.050 (1.000 to 1.100) | 1 |" in text
    assert (tmp_path / "toy.md").read_text() == text
    assert json.loads((tmp_path / "toy.json").read_text())["runs"][3]["scores"] == {"nll": 2.1}
    with Image.open(tmp_path / "toy.png") as plot:
        assert plot.size == (700, 400)


def test_a_logged_curve_is_read_back_and_a_missing_one_names_those_there(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/loss", 2.5, 10)
        writer.add_scalar("val/loss", 1.5, 20)
    assert logged_curve(tmp_path, "val/loss") == [(10, 2.5), (20, 1.5)]
    with pytest.raises(ValueError, match=r"holds no curve of 'val/nll'\. It holds: val/loss"):
        logged_curve(tmp_path, "val/nll")
