"""Random numbers of layers that take them from torch's own generator, such as dropout: keyed by the step, too."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from models.random import keyed_seed

_LAYER_STREAM = 102


class StepSeed(Callback):
    """Seeds torch's own generators at each training batch, from (seed, step, batch, rank).

    So a resumed run drops out what an uninterrupted one does, without a state to save, and ranks drop out differently.
    Modules without a `seed` are left alone.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed them."""
        seed = getattr(pl_module, "seed", None)
        if seed is not None:
            torch.manual_seed(keyed_seed(seed, trainer.global_step, _LAYER_STREAM, batch_idx, trainer.global_rank))
