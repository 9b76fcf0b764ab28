"""The short-to-long curriculum: decides how many frames a training step sees, logs it, and checks that it happened."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from models.priors.curriculum import Schedule, draw_length, expected_length, length_probabilities

logger = logging.getLogger(__name__)


class ShortToLongCurriculum(Callback):
    """Trains on short windows first and on whole clips later (MeBT's short-to-long curriculum).

    The number of frames is a pure function of the optimizer step, `frames_at`. The data module asks it ahead of time,
    with the steps that its batches are for; this callback logs it and compares it with the batches that arrive. The
    step is all the state there is, so nothing is saved and nothing has to be resumed.

    Args:
        schedule: `longest` trains on whole clips always. `fraction` moves a Gaussian of lengths from one latent frame
            to the whole clip over the first `full_length_from` of the run, then stays at the whole clip. `linear`
            does so with a single length at each step. `gaussian` is that of MeBT's release, by absolute step; its own
            `gaussian2` and `gaussian100000_2` have fixed numbers. `uniform` draws all lengths alike.
        full_length_from: fraction of `--trainer.max_steps`, in (0, 1], from which on every clip is whole; for
            `fraction` and `linear`.
        steps_per_frame: optimizer steps in which `gaussian` moves by one latent frame (b of the release).
        width: standard deviation of `gaussian` and `fraction`, in latent frames (c of the release).
        margin: frames to read on either side of the window. Null reads as many as the tokenizer's receptive field needs
            for the window's codes to be those of the whole clip; 0 reads, and encodes, the window alone.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        schedule: Schedule = "longest",
        full_length_from: float = 0.7,
        steps_per_frame: float = 100_000,
        width: float = 2.0,
        margin: int | None = None,
    ) -> None:
        if not 0 < full_length_from <= 1:
            raise ValueError(
                f"full_length_from={full_length_from} is no fraction of the run: it must lie in (0, 1] "
                "(--curriculum.full_length_from)."
            )
        if not steps_per_frame > 0:
            raise ValueError(f"steps_per_frame={steps_per_frame} must be positive (--curriculum.steps_per_frame).")
        if not width > 0:
            raise ValueError(f"width={width} must be positive (--curriculum.width).")
        if margin is not None and margin < 0:
            raise ValueError(f"margin={margin} must be null, 0 or more frames (--curriculum.margin).")
        self.schedule: Schedule = schedule
        self.full_length_from = full_length_from
        self.steps_per_frame = steps_per_frame
        self.width = width
        self.margin = margin
        self._is_bound = False
        self._first_batch_seen = False
        self._drift_reported = False

    def bind(self, total_steps: int, max_frames: int, frames_per_latent: int, seed: int) -> None:
        """Tell the schedule about the run; the command line does so before fit.

        Args:
            total_steps: optimizer steps of the run, `trainer.max_steps`; -1 will do where the schedule has no end.
            max_frames: frames of a whole clip.
            frames_per_latent: frames that one latent frame stands for, the tokenizer's temporal downsampling.
            seed: the run's seed, the key of the draws.

        Raises:
            ValueError: if the schedule needs `total_steps` and there are none, or if a whole clip is not a whole
                number of latent frames.
        """
        if self.schedule != "longest" and max_frames % frames_per_latent:
            raise ValueError(
                f"the curriculum schedule {self.schedule!r} cuts clips to latent frames of {frames_per_latent} frames "
                f"each, but num_frames={max_frames} is no multiple of that: change --data.num_frames, or set "
                "--curriculum.schedule=longest."
            )
        # `longest` knows one length, the whole clip, which then need not be a number of latent frames (1 + 4k frames)
        self._frames_per_length = max_frames if self.schedule == "longest" else frames_per_latent
        self._max_length = max_frames // self._frames_per_length
        self._total_steps = total_steps
        self._seed = seed
        self._is_bound = True
        self._probabilities_at(0)  # a schedule that lacks its total_steps is refused here, not in the data loader

    def frames_at(self, step: int) -> int:
        """Frames of the training clips at an optimizer step: equal on all ranks and whenever it is asked.

        Raises:
            RuntimeError: if `bind` was not called.
        """
        return draw_length(self._probabilities_at(step), self._seed, step) * self._frames_per_length

    def expected_frames_at(self, step: int) -> float:
        """Mean number of frames at an optimizer step, under the schedule.

        Raises:
            RuntimeError: if `bind` was not called.
        """
        return expected_length(self._probabilities_at(step)) * self._frames_per_length

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check again at the first batch of each fit."""
        self._first_batch_seen = False
        self._drift_reported = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the clip length of the batch, and log it with the schedule's mean.

        Raises:
            RuntimeError: if the data module ignores the curriculum, or the first batch is not of the step's length.
        """
        if self.schedule == "longest" and not self._is_bound:
            return
        step = trainer.global_step  # of the optimizer: the same for all batches that are accumulated for one step
        frames = self.frames_at(step)
        if self.schedule != "longest":
            self._check(batch, frames, step, trainer.is_global_zero)

        # tensors in host memory: a Python number would be copied to the device, which waits for it
        pl_module.log("train/clip_frames", torch.tensor(float(frames)))
        pl_module.log("train/clip_frames_mean", torch.tensor(self.expected_frames_at(step)))
        pl_module.log("frames", torch.tensor(float(frames)), prog_bar=True, logger=False)

    def _check(self, batch: Any, frames: int, step: int, is_global_zero: bool) -> None:
        if not isinstance(batch, Mapping) or "window_frames" not in batch:
            raise RuntimeError(
                f"the data module ignores the curriculum: schedule {self.schedule!r} asks for {frames} frames at step "
                f"{step}, but the batch has no 'window_frames'. Give the data module the schedule "
                "(set_curriculum) before fit, or set --curriculum.schedule=longest."
            )
        if batch["window_frames"] != frames:
            message = (
                f"the batch for step {step} has window_frames={batch['window_frames']}, but the curriculum's "
                f"frames_at({step}) is {frames}: the data module counts other steps than the optimizer makes "
                "(--trainer.accumulate_grad_batches, a resumed run, or a schedule bound to another run)."
            )
            if not self._first_batch_seen:
                raise RuntimeError(message)
            if not self._drift_reported and is_global_zero:
                logger.warning("%s", message)
            self._drift_reported = True
        self._first_batch_seen = True

    def _probabilities_at(self, step: int) -> np.ndarray:
        if not self._is_bound:
            raise RuntimeError(
                "the curriculum does not know its run yet: "
                "call bind(total_steps, max_frames, frames_per_latent, seed) before fit."
            )
        return length_probabilities(
            self.schedule,
            step,
            self._max_length,
            total_steps=self._total_steps,
            full_length_from=self.full_length_from,
            steps_per_frame=self.steps_per_frame,
            width=self.width,
        )
