"""The comparison of tokenizers runs, in toy size; and a run of so many CPU seconds takes no more."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.media import write_mp4
from experiments.ablations import tokenizers
from experiments.ablations.arms import write
from experiments.ablations.tokenizers import SIZES, CPUBudget, cut_videos


@pytest.mark.slow
def test_every_arm_trains_and_is_measured(tmp_path: Path) -> None:
    found = tokenizers.compare("quick", tmp_path / "runs")
    assert {name: list(comparison.arms()) for name, comparison in found.items()} == {
        "tokenizer_families": ["time_agnostic", "magvit", "causal"],
        "tokenizer_padding": ["zero", "replicate", "reflect"],
        "tokenizer_inflation": ["scratch", "average", "central"],
    }
    for name, comparison in found.items():
        assert all(run.scores["psnr"] > 0 and run.scores["steps"] == SIZES["quick"].steps for run in comparison.runs)
        assert "psnr_of_mean_frame" in write(comparison, tmp_path, name)
    with (
        Image.open(tmp_path / "runs/shapes/sheet.png") as sheet,
        Image.open(tmp_path / "runs/shapes/causal-0/sheet.png") as one,
    ):
        assert sheet.height > 3 * one.height - 1


class Idle(LightningModule):
    """Each step keeps a core busy for a hundredth of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_run_ends_with_its_cpu_time() -> None:
    budget = CPUBudget(0.5)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1000, callbacks=[budget], accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(Idle(), DataLoader(torch.zeros(1000)))
    assert 5 < trainer.global_step <= 50
    assert 0.4 < budget.used < 0.6
    assert trainer.max_steps == trainer.global_step  # where a cosine that ends with the run has ended


def test_the_end_of_each_video_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shades = np.linspace(0, 255, 100).astype(np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (100, 48, 64, 3))
    write_mp4(tmp_path / "videos/long.mp4", frames, 25)
    write_mp4(tmp_path / "videos/short.mp4", frames[:20], 25)
    (tmp_path / "videos/damaged.mp4").write_bytes((tmp_path / "videos/long.mp4").read_bytes()[:1000])
    cut_videos(tmp_path / "videos", tmp_path / "cut", 32)
    pieces = {
        str(folder.relative_to(tmp_path / "cut")): len(list(folder.iterdir()))
        for folder in (tmp_path / "cut").glob("*/*")
    }
    assert pieces == {"train/long-0": 32, "train/long-32": 32, "val/long": 25, "train/short-0": 20}
    with Image.open(tmp_path / "cut/val/long/0000.png") as image:
        assert image.size == (32, 32)
        assert abs(np.asarray(image).mean() - shades[75]) < 5
    assert "damaged.mp4: read 0 frames" in caplog.text
