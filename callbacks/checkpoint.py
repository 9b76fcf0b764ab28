"""Checkpoints that survive: written whole or not at all, on schedule, at the end, and when the machine says goodbye."""

import hashlib
import json
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from models.weights import MANIFEST, read_manifest


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class HashedFile:
    """A file for `torch.save` that keeps the hash of what went through it.

    It holds back a failure until `torch.save` is done: raised inside of that, it would come out as another one, or end
    the process.

    Args:
        file: Where the bytes go.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write and count."""
        if self.failure is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.failure = error
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """What `torch.save` calls at the end."""


class WholeCheckpoints(TorchCheckpointIO):
    """Files that are whole or absent, and a manifest that says how large they are and what their hash is.

    A checkpoint is written beside its place, in the same folder, brought to the disk, and renamed. Lightning writes it
    to the machine's temporary folder first, keeping a second copy in memory, and moves it: from one disk to another,
    that is no single act. A file that the manifest does not know was renamed in the moment before a crash; it is whole,
    too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it.

        Raises:
            CheckpointWriteError: If there is no room, or no permission.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                hashed = HashedFile(file)
                torch.save(checkpoint, hashed)  # type: ignore[arg-type] # it writes to whatever has a `write`
                if hashed.failure is not None:
                    raise hashed.failure
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            entry = {
                "bytes": hashed.size,
                "sha256": hashed.digest.hexdigest(),
                "step": checkpoint.get("global_step"),
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._write_manifest(path.parent, {path.name: entry})
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointWriteError(
                f"No checkpoint could be written to {path} ({error.strerror or error}). Checkpoints that were there "
                "are as they were. Make room, or the folder writable, and go on with --resume."
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it, and its entry in the manifest."""
        super().remove_checkpoint(path)
        self._write_manifest(Path(path).parent, {})

    def _write_manifest(self, folder: Path, new: dict[str, Any]) -> None:
        """Add entries, and drop those of files that are gone."""
        entries = {name: entry for name, entry in read_manifest(folder).items() if (folder / name).is_file()} | new
        part = folder / f".{MANIFEST}.part"
        part.write_text(json.dumps(entries, indent=2) + "\n")
        os.replace(part, folder / MANIFEST)


class Checkpoint(ModelCheckpoint):
    """Lightning's checkpoints, written by `WholeCheckpoints`; one of the last step; and one when SIGTERM comes.

    Lightning keeps those on schedule alone: what a run learned after its last multiple of `every_n_train_steps` would
    be lost, the end of a learning rate's decay among it.

    SIGTERM (a cluster that wants its machine back) lets the batch in work end, in training or validation. Then all
    processes stop at the same batch, whichever of them was told, and `save_on_exception` writes a checkpoint. Lightning
    speaks to the other processes from within the signal's handler, where they may be in the midst of something else.
    """

    _handler: Any = None
    _told_to_stop = False
    _is_exceptional = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write whole files."""
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = WholeCheckpoints()

    # The goodbye

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM, in the place of Lightning, which has begun to listen by now."""
        super().on_train_start(trainer, pl_module)
        self._told_to_stop = False
        self._handler = signal.getsignal(signal.SIGTERM)
        try:
            signal.signal(signal.SIGTERM, self._remember)
        except ValueError:  # not in the main thread: nobody can listen there
            self._handler = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._let_go()

    def _let_go(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _remember(self, *_: Any) -> None:
        self._told_to_stop = True

    def _stop_if_told(self, trainer: Trainer) -> None:
        # no collective unless there are several processes; Lightning itself asks them once a batch
        if trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False):
            trainer._signal_connector.received_sigterm = True  # Lightning raises its exception at the batch's end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on schedule; stop if told to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._stop_if_told(trainer)
        if trainer.received_sigterm and self.save_on_exception:
            self._save_now(trainer)  # here, where the loops' counters are those of any checkpoint

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop if told to: a validation may take longer than the cluster waits."""
        self._stop_if_told(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless that is what has failed."""
        self._let_go()
        if not isinstance(exception, CheckpointWriteError):
            self._is_exceptional = True
            super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count as any checkpoint does, also in a validation after an epoch's last batch.

        Lightning would take that batch for one of the next epoch, and number all that follow by one more.
        """
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] if "loops" in checkpoint else None
        # fetching the last batch makes it the last one; only once it was worked on, there is something to take back
        if self._is_exceptional and batches and batches["current"]["ready"] == trainer.num_training_batches:
            for count in (batches["current"], batches["total"]):
                count["completed"] -= count["completed"] == count["ready"]

    # The last step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless that has been done."""
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

    def _save_now(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save, and let all processes know if that failed: those that do not write would wait for ever."""
        failure = ""
        try:
            super()._save_checkpoint(trainer, filepath)
        except CheckpointWriteError as error:
            failure = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others are
        if failure := trainer.strategy.broadcast(failure):
            raise CheckpointWriteError(failure)
