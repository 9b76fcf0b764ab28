"""Looking at a module in training without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.ema import EMA


@contextmanager
def at_rest(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, the precision of validation; afterwards modes and random numbers are as before."""
    was_training = {module: module.training for module in pl_module.modules()}
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    pl_module.eval()
    try:
        # no_grad, not inference_mode: what the module caches here may be used in training
        with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The averaged weights, if the run keeps some: what validation sees."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    for average in averages:
        average.on_validation_start(trainer, pl_module)
    try:
        yield
    finally:
        for average in averages:
            average.on_validation_end(trainer, pl_module)
