"""Samples of the module in training, always from the same seeds, as files and in TensorBoard."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.at_rest import at_rest
from callbacks.media import contact_sheet, tile, write_gif_summary, write_mp4
from models.random import keyed_seed


class SampleLogger(Callback):
    """Shows what the module makes of fixed seeds as training goes on.

    The module's `sample_videos(batch, seeds)` makes the videos; its `sample_captions(batch, count)`, if it has one,
    says of each which task it is of and what it was asked for. They go to TensorBoard as a moving grid for each task
    (`samples/<task>`, `samples/video` where there is only one), and all together to `samples/` in the run's folder as
    `step=00001234.mp4` and a contact sheet `.png`.
    By step, they are made from the weights in training and the batch just trained on; at validation, from the first
    validation batch and the weights that are validated (the averaged ones under EMA).

    Args:
        every_n_steps: optimizer steps between samples during training; 0 for none.
        at_validation: sample at each validation too.
        num_videos: videos to show; fewer if the batch is smaller, since the conditions come from the batch.
        seed: the videos' seeds are functions of this number and of their position.
        fps: frames a second of the GIF and the MP4.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        at_validation: bool = True,
        num_videos: int = 4,
        seed: int = 0,
        fps: int = 8,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps={every_n_steps} must be 0 (never) or more (--samples.every_n_steps).")
        if num_videos < 1:
            raise ValueError(
                f"num_videos={num_videos} must be at least 1 (--samples.num_videos); to have no samples, set "
                "--samples.every_n_steps=0 and --samples.at_validation=false."
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative (--samples.seed).")
        if fps < 1:
            raise ValueError(f"fps={fps} must be at least 1 (--samples.fps).")
        self.every_n_steps = every_n_steps
        self.at_validation = at_validation
        self.num_videos = num_videos
        self.seed = seed
        self.fps = fps
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a resumed run's first step as shown: its batches may still be accumulating."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show samples after each `every_n_steps` optimizer steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show samples after the first validation batch."""
        if self.at_validation and not trainer.sanity_checking and batch_idx == 0 and dataloader_idx == 0:
            self._show(trainer, pl_module, batch)

    def _show(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any]) -> None:
        step = trainer.global_step
        if step == self._last_step:  # several batches of one step, or a step and its validation
            return
        self._last_step = step

        # generation and log_dir may communicate, so all ranks take part up to here
        video, tasks, captions = self._generate(trainer, pl_module, batch)
        folder = trainer.log_dir
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # a connector sets it
            return

        for run_logger in trainer.loggers:
            if isinstance(run_logger, TensorBoardLogger):
                for task in dict.fromkeys(tasks):
                    rows = [row for row, other in enumerate(tasks) if other == task]
                    frames = tile(video[rows], math.ceil(math.sqrt(len(rows))), [captions[row] for row in rows])
                    write_gif_summary(run_logger.experiment, f"samples/{task}", frames, self.fps, step)
        # without a logger, log_dir is the working directory or --trainer.default_root_dir: used, but never made
        if folder is not None and (trainer.loggers or Path(folder).is_dir()):
            path = Path(folder) / "samples" / f"step={step:08d}.mp4"
            write_mp4(path, tile(video, math.ceil(math.sqrt(len(video))), captions), self.fps)
            contact_sheet(video, captions=captions).save(path.with_suffix(".png"))

    def _generate(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any]
    ) -> tuple[Tensor, list[str], list[str]]:
        """Make the videos, leaving modes and random numbers of the training as they were.

        Returns:
            `[n, 3, T, H, W]` in [-1, 1], the task of each, and its caption.
        """
        num_videos = min(self.num_videos, len(batch["index"]))
        seeds = torch.tensor([keyed_seed(self.seed, position) for position in range(num_videos)])
        module: Any = pl_module  # an interface, not a class
        with at_rest(trainer, pl_module):
            video = module.sample_videos(batch, seeds)
        if not hasattr(module, "sample_captions"):
            return video, ["video"] * len(video), [""] * len(video)
        tasks, captions = zip(*module.sample_captions(batch, len(video)), strict=True)
        return video, list(tasks), list(captions)
