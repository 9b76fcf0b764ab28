"""A callback for experiment files of tests: what each process saw and ended with, and a failure on demand."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

FAIL_AT = "LONGTAKE_TEST_FAIL_AT_STEP"
SIGTERM_AT = "LONGTAKE_TEST_SIGTERM"


class Ledger(Callback):
    """Writes each training batch to `ledger.<rank>.jsonl` in the run's folder, and the last state to `end.<rank>.pt`.

    Fails inside the step that an environment variable names, after its batch was handed out; another one names the
    training step or validation batch, as `train 3`, in which this process sends SIGTERM to itself.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = Path(str(trainer.log_dir))
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if os.environ.get(FAIL_AT) == str(trainer.global_step):
            raise RuntimeError("the power is gone")
        entry = [trainer.global_step, batch["index"].tolist(), batch.get("window_start"), batch.get("window_frames")]
        with (self.folder / f"ledger.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if os.environ.get(SIGTERM_AT) == f"train {trainer.global_step}":
            signal.raise_signal(signal.SIGTERM)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if os.environ.get(SIGTERM_AT) == f"val {batch_idx}":
            signal.raise_signal(signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end = {"state": pl_module.state_dict(), "metrics": dict(trainer.callback_metrics)}
        torch.save(end, self.folder / f"end.{trainer.global_rank}.pt")


def read_ledger(run: Path, rank: int = 0) -> list[list[Any]]:
    """Entries `[step, indices, window_start, window_frames]`."""
    return [json.loads(line) for line in (run / f"ledger.{rank}.jsonl").read_text().splitlines()]
