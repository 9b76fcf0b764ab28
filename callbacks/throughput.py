"""How fast the training goes, without slowing it down."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs tokens and clips a second of all ranks together, and seconds a step, averaged over the logging interval.

    Time is the host's clock and holds everything but validation: data, forward, backward, optimizer, other callbacks.
    The device is never waited for; over an interval of some steps, the host cannot run far ahead of it.

    Clips are counted by the batch's `index`. Tokens are counted if the module has a `tokens_per_batch`, a Python
    integer that its `training_step` sets. Logged: `train/clips_per_second`, `train/tokens_per_second`,
    `train/seconds_per_step`; in the progress bar tokens (otherwise clips) a second, and seconds a step. If the data
    module has a `num_quarantined()`, it is logged as `data/quarantined_videos`: videos that others are shown for.
    """

    def __init__(self) -> None:
        self._paused_at: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first interval."""
        self._begin(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the clock go on, if it was stopped, as if no time had passed."""
        if self._paused_at is not None:
            self._began_at += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log at each `log_every_n_steps`."""
        self._clips += len(batch["index"])
        tokens_per_batch: int | None = getattr(pl_module, "tokens_per_batch", None)
        self._tokens += tokens_per_batch or 0

        step = trainer.global_step
        num_steps = step - self._first_step
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if num_steps == 0 or log_every == 0 or step % log_every:
            return
        seconds = time.perf_counter() - self._began_at
        speeds = {"clips": self._clips * trainer.world_size / seconds}
        if tokens_per_batch is not None:
            speeds["tokens"] = self._tokens * trainer.world_size / seconds

        # tensors in host memory: a Python number would be copied to the device, which waits for it
        for unit, speed in speeds.items():
            pl_module.log(f"train/{unit}_per_second", torch.tensor(speed))
        pl_module.log("train/seconds_per_step", torch.tensor(seconds / num_steps))
        if (num_quarantined := getattr(getattr(trainer, "datamodule", None), "num_quarantined", None)) is not None:
            pl_module.log("data/quarantined_videos", torch.tensor(float(num_quarantined())))
        shown = "tokens" if "tokens" in speeds else "clips"
        pl_module.log(f"{shown}/s", torch.tensor(speeds[shown]), prog_bar=True, logger=False)
        pl_module.log("s/step", torch.tensor(seconds / num_steps), prog_bar=True, logger=False)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._began_at = time.perf_counter()
        self._first_step = step
        self._clips = 0
        self._tokens = 0
