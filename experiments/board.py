"""What TensorBoard shows of a run beside its numbers: groups of charts, configuration, machine, hyper-parameters."""

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from experiments.charts import CHARTS
from experiments.evaluate import code_version
from experiments.starts import leaves


def environment(trainer: Trainer) -> dict[str, Any]:
    """Describe code, libraries, machine and processes, as plain types."""
    device = trainer.strategy.root_device
    return {
        "code": code_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "torchvision", "av")},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processes": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "cpu cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "host": platform.node(),
    }


def write_layout(writer: SummaryWriter, features: Collection[str]) -> None:
    """Group the scalars of a run in TensorBoard's tab "Custom scalars"; once a run, of which it takes the first.

    Args:
        writer: Of the run, on rank 0.
        features: What the run has; see `Chart.needs`.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for chart in CHARTS:
        if not chart.needs or chart.needs in features:
            # the plugin matches beginnings
            layout.setdefault(chart.group, {})[chart.title] = ["Multiline", [f"{chart.pattern}$"]]
    writer.add_custom_scalars(layout)


def write_hyper_parameters(writer: SummaryWriter, config: Mapping[str, Any], scores: Sequence[str]) -> None:
    """Give TensorBoard's tab "HParams" a row for the run, whose scores are the last values of its scalars.

    `SummaryWriter.add_hparams` would do so in a folder and an event file of its own, as if it were another run.

    Args:
        writer: Of the run, on rank 0.
        config: The resolved configuration; of its sections model, data and curriculum, numbers, texts and switches are
            taken, and what of the trainer changes results.
        scores: Names of scalars.
    """
    trainer = {key: config["trainer"].get(key) for key in ("max_steps", "precision", "accumulate_grad_batches")}
    sections = {key: config[key] for key in ("seed_everything", "model", "data", "curriculum") if key in config}
    values = {
        name.replace("init_args.", "").replace("class_path", "class"): value
        for name, value in leaves(sections | {"trainer": trainer}).items()
        if isinstance(value, bool | int | float | str)
    }
    experiment, session, _ = hparams(values, dict.fromkeys(scores, 0.0))
    for summary in (experiment, session):
        writer._get_file_writer().add_summary(summary)


def as_code(text: str) -> str:
    """Return a text as Markdown that TensorBoard shows line by line."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def as_table(values: Mapping[str, Any]) -> str:
    """Return names and values as a Markdown table."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])
