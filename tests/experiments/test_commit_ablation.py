"""COMMIT's comparison at toy size: all arms are trained and scored, and what is written names them."""

import math
from pathlib import Path

import pytest
import torch

from experiments.ablations import commit
from experiments.ablations.arms import write
from experiments.benchmarks import commit as benchmark
from experiments.task_sheet import main as draw_tasks
from models.priors.tasks import TASKS


@pytest.mark.slow
def test_all_arms_are_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = commit.compare("quick", tmp_path / "quick/commit")
    assert {name: list(comparison.arms()) for name, comparison in found.items()} == {
        "commit_masking": ["COMMIT", "mask loss only", "no condition in training", "frequencies of codes"],
        "commit_condition": ["COMMIT", "mask and reconstruct", "prefix condition", "latent masking"],
        "commit_decoding": ["COMMIT decoding", "MaskGIT decoding", "AR decoding"],
    }
    for comparison in found.values():
        assert all(math.isfinite(run.scores[comparison.score]) for run in comparison.runs)
        assert comparison.verdict() == "inconclusive"  # of one seed
    scores = found["commit_masking"].runs[0].scores
    assert {"accuracy known", "accuracy of copying", "known pixels, inpainting, dB below"} <= scores.keys()
    assert 0 <= scores["accuracy of copying"] <= 1
    table = (tmp_path / "quick/commit_tasks.md").read_text().splitlines()
    assert len(table) == 2 + 9
    assert table[2].startswith("| frame_prediction | ")
    assert write(found["commit_masking"], tmp_path, "commit_masking").startswith("### COMMIT's masking")


@pytest.mark.slow
def test_the_benchmark_counts_twelve_network_calls() -> None:
    overhead, speed = benchmark.run(quick=True)[:2]
    assert overhead.value > 1.0  # of the sum of what it contains
    assert overhead.details["network_calls"] == 12
    assert (overhead.at_most, speed.unit) == (1.1, "clips/s")


def test_a_sheet_shows_condition_mask_and_tokens_of_ten_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr("experiments.task_sheet.draw", lambda sheet, file: drawn.update(sheet))
    draw_tasks(["--out", str(tmp_path / "tasks.png")])
    assert tuple(drawn) == TASKS[:10]
    for task, images in drawn.items():
        condition, mask, tokens = images.values()
        assert condition.shape == mask.shape == tokens.shape == (128, 4 * 132, 3), task
    mask = list(drawn["central_inpainting"].values())[1]
    assert mask[64, 64].tolist() == [255] * 3  # made
    assert mask[2, 2].tolist() == [0] * 3
    assert "tokens: 256 of 1024 are conditions" in drawn["frame_prediction"]
    assert torch.equal(
        torch.from_numpy(list(drawn["class_conditional"].values())[1])[:, :128].unique(), torch.tensor([255])
    )
