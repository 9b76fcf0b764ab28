"""Writes generated videos to a folder while they come."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.media import contact_sheet, tile, to_uint8, write_mp4


class SampleWriter(BasePredictionWriter):
    """One mp4 for each seed, a contact sheet, and what the samples are as JSON.

    Where a prediction says which pixels were known, another mp4 for each seed shows side by side what was given, the
    mask (white is what was made), and the result; so do the rows of the contact sheet.

    Args:
        folder: Where to write; created if need be.
        fps: Frames a second.
        about: Plain values to write into `samples.json` beside the seconds.
        num_on_sheet: Videos on the contact sheet, at most.
    """

    def __init__(self, folder: Path, fps: float, about: dict[str, Any], num_on_sheet: int = 16) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.fps = fps
        self.about = about
        self.num_on_sheet = num_on_sheet
        self.shown: list[torch.Tensor] = []
        self.num_written = 0
        self.columns = 4
        self.started = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, torch.Tensor],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the videos `[B, 3, T, H, W]` of one batch, each named by its seed."""
        videos = to_uint8(prediction["video"])
        for row, (seed, video) in enumerate(zip(prediction["seeds"].tolist(), videos, strict=True)):
            frames = rearrange(video, "rgb t h w -> t h w rgb").numpy()
            write_mp4(self.folder / f"seed={seed:06d}.mp4", frames, self.fps)
            self.num_written += 1
            strip = [video]
            if "condition" in prediction:
                is_made = ~prediction["known"][row].cpu()
                mask = is_made.to(torch.uint8).mul(255).expand_as(video)
                strip = [to_uint8(prediction["condition"][row]), mask, video]
                write_mp4(self.folder / f"seed={seed:06d}_edit.mp4", tile(torch.stack(strip), columns=3), self.fps)
            if self.num_written <= self.num_on_sheet:
                self.shown += strip
                self.columns = 3 if len(strip) == 3 else 4

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the contact sheet and the numbers; rank 0 writes of its own samples.

        `seconds_per_video` is that of one process, with loading and writing.
        """
        if not trainer.is_global_zero:
            return
        videos = torch.stack(self.shown)
        contact_sheet(videos).save(self.folder / "contact_sheet.png")
        write_mp4(self.folder / "grid.mp4", tile(videos, self.columns), self.fps)
        seconds = time.perf_counter() - self.started
        about = self.about | {"seconds_per_video": seconds / self.num_written}
        (self.folder / "samples.json").write_text(json.dumps(about, indent=2) + "\n")
