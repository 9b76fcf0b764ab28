"""Checkpoints on schedule, and one at the end."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's checkpoints, and one of the last step.

    Lightning keeps those on schedule alone: what a run learned after its last multiple of `every_n_train_steps` would
    be lost, the end of a learning rate's decay among it.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless that has been done."""
        candidates = self._monitor_candidates(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        super().on_train_end(trainer, pl_module)
