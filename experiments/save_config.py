"""What a run was: its configuration beside it, inside its checkpoints and in TensorBoard."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from experiments.board import as_code, as_table, environment, write_hyper_parameters, write_layout
from experiments.starts import leaves, record_start


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration beside the run, inside its checkpoints as plain types, and in TensorBoard.

    Beside it stands what the run is computed with: in TensorBoard, and for each start in `starts.jsonl`.

    Where a run lies and which checkpoint it went on from are no part of an experiment: whoever uses the file again
    makes a new run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        files = [Path(str(file)) for file in config.get("config") or []]
        # the experiment gives the run its name; what stands before it are its parents, behind it overrides
        self._experiment = next((str(file) for file in files if file.stem == config.run_name), None)
        config = config.clone()
        for key in ("base", "run_version", "ckpt_path", "weights_only"):
            config.pop(key, None)
        super().__init__(parser, config, **options)
        self._dumped: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, if there is a run to save it beside: without a logger, it would lie in the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start, and write to TensorBoard what a resumed run has not written already."""
        if not trainer.loggers:
            return
        folder = trainer.log_dir  # communicates, so all ranks ask
        if not trainer.is_global_zero or folder is None:
            return
        text = self.parser.dump(self.config, skip_none=False)
        # 100000 where a float may stand comes back as 100000.0 from a run's file: the same configuration
        values = {name: float(v) if type(v) is int else v for name, v in leaves(yaml.safe_load(text)).items()}
        about: dict[str, Any] = {
            "experiment": self._experiment,
            "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            "environment": environment(trainer),
        }
        before = record_start(Path(folder), trainer.global_step, about)
        for run_logger in trainer.loggers:
            if not isinstance(run_logger, TensorBoardLogger):
                continue
            writer = run_logger.experiment
            if before is None:
                generates = hasattr(pl_module, "generate")
                write_layout(writer, self._features("generator" if generates else "tokenizer"))
                scores = ["train/loss", "val/loss"] + ([] if generates else ["val/psnr"])
                write_hyper_parameters(writer, yaml.safe_load(text), scores)
            if before is None or before["config_sha256"] != about["config_sha256"]:
                writer.add_text("run/config", as_code(text), trainer.global_step)
            if before is None or before["environment"] != about["environment"]:
                writer.add_text("run/environment", as_table(about["environment"]), trainer.global_step)

    def _features(self, kind: str) -> set[str]:
        """What there are scalars of."""
        config = self.config
        has_scores = config.fvd.every_n_steps > 0 or config.fvd.every_n_epochs > 0
        has_curriculum = config.curriculum.schedule != "longest"
        return {kind} | ({"scores"} if has_scores else set()) | ({"curriculum"} if has_curriculum else set())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration to a checkpoint, and forget a step that failed before its end.

        Its batch has been handed out and counted: a resumed run would leave it out, and validate a step early.
        """
        if self._dumped is None:  # it takes a third of a second
            self._dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint["config"] = copy.deepcopy(self._dumped)
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        unfinished = batches["current"]["ready"] - batches["current"]["processed"]
        for count in (batches["current"], batches["total"]):
            count |= {"ready": count["ready"] - unfinished, "started": count["processed"]}
        for loader in loop["state_dict"].get("combined_loader", []):
            loader["batch"] -= unfinished
