"""Writes generated videos to a folder while they come."""

import json
import math
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.media import MP4Writer, contact_sheet, tile, to_uint8


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
        self.shown: torch.Tensor | None = None  # [num_on_sheet or 3 times that, 3, T, H, W] uint8, on disk
        self.strip = 1  # videos on the sheet for each that is made
        self.num_written = 0
        self.started = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Any],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the videos of one batch, each named by its seed, while their pieces come: none is in memory whole."""
        names = [f"seed={seed:06d}" for seed in prediction["seeds"].tolist()]
        given = "condition" in prediction
        with ExitStack() as files:
            results, edits = (
                [files.enter_context(MP4Writer(self.folder / f"{name}{end}.mp4", self.fps)) for name in names if wanted]
                for end, wanted in (("", True), ("_edit", given))
            )
            first = 0
            for piece in prediction["pieces"]:
                frames = slice(first, first + piece.shape[2])
                strips = to_uint8(piece)[:, None]  # [B, 1, 3, n, H, W]
                if given:
                    is_made = ~prediction["known"][:, frames].cpu()  # [B, n, H, W]
                    mask = is_made.to(torch.uint8).mul(255)[:, None].expand_as(strips[:, 0])
                    condition = to_uint8(prediction["condition"][:, :, frames])
                    strips = torch.stack([condition, mask, strips[:, 0]], dim=1)
                for row, strip in enumerate(strips):
                    results[row].write(rearrange(strip[-1], "rgb t h w -> t h w rgb").numpy())
                    if given:
                        edits[row].write(tile(strip, columns=3))
                self._show(strips, frames, batch["num_frames"])
                first = frames.stop
        self.num_written += len(names)

    def _show(self, strips: torch.Tensor, frames: slice, num_frames: int) -> None:
        """Keep these frames of those videos for the sheet that are among the first."""
        if self.shown is None:
            self.strip = strips.shape[1]
            shape = (self.num_on_sheet * self.strip, 3, num_frames, *strips.shape[-2:])
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:  # once mapped, it needs no name
                self.shown = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=torch.uint8)
            self.shown = self.shown.view(shape)
        rows = self.shown[self.num_written * self.strip :]
        strips = strips.flatten(0, 1)[: len(rows)]
        rows[: len(strips), :, frames] = strips

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the contact sheet and the numbers; rank 0 writes of its own samples.

        `seconds_per_video` is that of one process, with loading and writing.
        """
        if not trainer.is_global_zero or self.shown is None:
            return
        self.shown = self.shown[: self.num_written * self.strip]
        contact_sheet(self.shown).save(self.folder / "contact_sheet.png")
        with MP4Writer(self.folder / "grid.mp4", self.fps) as file:
            for piece in self.shown.split(16, dim=2):
                file.write(tile(piece, 3 if self.strip == 3 else 4))
        seconds = time.perf_counter() - self.started
        about = self.about | {"seconds_per_video": seconds / self.num_written}
        (self.folder / "samples.json").write_text(json.dumps(about, indent=2) + "\n")
