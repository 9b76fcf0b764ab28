"""The comparison of tokenizers runs, in toy size; and a run of so many CPU seconds takes no more."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.media import write_mp4
from datamodules.shapes import MovingShapes
from experiments.ablations import tokenizers
from experiments.ablations.arms import Curve
from experiments.ablations.tokenizers import SIZES, CPUBudget, Setting, Size, cut_videos, experiment
from models.metrics import psnr
from models.tokenizers import VQGAN3D, ContinuousLatents, TimeAgnosticDecoder, TimeAgnosticEncoder
from models.weights import build


def test_every_comparison_has_its_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, dict[str, Any]] = {}

    def pretend(
        place: Path, seed: int, size: Size, setting: Setting, frames: Path | None
    ) -> tuple[Curve, dict[str, float]]:
        (place / "run/version_0").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "sheet.png")
        files[str(place.relative_to(tmp_path))] = experiment(size, setting, frames)
        return [(0, 1.0)], {"psnr": 20.0, "joined_psnr": 18.0}

    monkeypatch.setattr(tokenizers, "train", pretend)
    found = tokenizers.compare("long", tmp_path)
    assert {name: list(comparison.arms()) for name, comparison in found.items()} == {
        "tokenizer_families": ["time_agnostic", "magvit", "causal"],
        "tokenizer_padding": ["zero", "replicate", "reflect"],
        "tokenizer_inflation": ["scratch", "average", "central"],
        "tokenizer_axes": ["3d", "2d"],
        "tokenizer_halving": ["deferred", "early"],
    }
    assert all(len(runs) == SIZES["long"].seeds for one in found.values() for runs in one.arms().values())
    assert found["tokenizer_padding"].score == "joined_psnr"
    start = files["inflation/central-1"]["model"]["init_args"]
    assert start["inflate_from"] == str(tmp_path / "inflation/2d-1/run/version_0/checkpoints/last.ckpt")
    assert files["inflation/2d-1"]["data"]["init_args"]["num_frames"] == 1
    for file in (file for name, file in files.items() if name.endswith("-0")):  # what the arms name can be built
        networks = file["model"]["init_args"]["tokenizer"]["init_args"]
        with torch.device("meta"):
            assert build(networks["encoder"]).downsample == build(networks["decoder"]).downsample
    with Image.open(tmp_path / "shapes/sheet.png") as sheet:
        assert sheet.height > 3 * 8


@pytest.mark.slow
def test_arms_train_and_are_measured(tmp_path: Path) -> None:
    size = SIZES["quick"]
    flat = replace(tokenizers.magvit(size, **tokenizers.FLAT), num_frames=1)
    tokenizers.arm(tmp_path, "2d", 0, size, flat)
    start = {"inflate_from": str(tokenizers.newest(tmp_path / "2d-0") / "checkpoints/last.ckpt")}
    runs = [
        tokenizers.arm(tmp_path, "central", 0, size, replace(tokenizers.magvit(size), model=start)),
        tokenizers.arm(tmp_path, "causal", 0, size, replace(tokenizers.causal(size), model={"lr": 1e-3})),
    ]
    for run in runs:
        assert run.scores["psnr"] > 0
        assert run.scores["psnr_of_mean_frame"] > run.scores["psnr"]
        assert 1 <= run.scores["perplexity"] <= 256
        assert run.scores["steps"] == len(run.curve) == size.steps
        assert (tmp_path / f"{run.arm}-0/sheet.png").is_file()


def test_joined_windows_are_decoded_as_one_video() -> None:
    """An encoder of single frames knows no windows: nothing is lost where they meet."""
    options: dict[str, Any] = {"base_channels": 2, "downsample": (1, 2, 2), "is_2d": True}
    torch.manual_seed(0)
    networks = TimeAgnosticEncoder(**options), TimeAgnosticDecoder(**options)
    tokenizer = VQGAN3D(networks[0], ContinuousLatents(4), networks[1]).eval()
    clips = MovingShapes("val", 2, 16, resolution=32)
    whole = [clips.render(i, 0, 64)[None] for i in range(2)]
    expected = [psnr(tokenizer.decode(tokenizer.encode(video).latents), video).item() for video in whole]
    assert tokenizers.joined_psnr(tokenizer, clips, 2) == pytest.approx(sum(expected) / 2, rel=1e-4)


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
