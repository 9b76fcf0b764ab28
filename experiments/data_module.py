"""The data module of an experiment, without its model: for the commands that look at data alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile

import datamodules  # noqa: F401  (class names work without their path once imported)
from datamodules.video import VideoDataModule
from experiments.arguments import expanded_configs, refuse_linked_values
from experiments.lightning_cli import LongtakeParser


def data_module(experiments: Sequence[Path], words: Sequence[str], command: str) -> VideoDataModule:
    """Build it.

    Args:
        experiments: files whose `data` sections count, and those of the files that their `base` names.
        words: options for the data module, `--data=CLASS` among them where no file names one; they come last.
        command: what the parser's messages call the command.

    Raises:
        ValueError: if nothing says which data module.
    """
    files = [file for experiment in experiments for file in expanded_configs(experiment)]
    refuse_linked_values(words, files)
    contents = [yaml.safe_load(file.read_text()) or {} for file in files]
    sections = [{key: content[key] for key in ("data", "seed_everything") if key in content} for content in contents]
    if not (any("data" in section for section in sections) or any(w.split("=")[0] == "--data" for w in words)):
        named = ", ".join(map(str, experiments)) or "Nothing"
        raise ValueError(f"{named} has no `data` section, and no base of it has: give --data=CLASS.")
    parser = LongtakeParser(prog=f"longtake {command}")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=int, default=42)
    parser.add_subclass_arguments(VideoDataModule, "data", required=True)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    config = parser.parse_args([*(f"--config={json.dumps(section)}" for section in sections), *words])
    data: VideoDataModule = parser.instantiate_classes(config).data
    return data
