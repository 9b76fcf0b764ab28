"""Every data fragment goes with an experiment, and asks for what the papers state."""

import contextlib
import io
from typing import Any

import pytest
import yaml

import datamodules
from datamodules.video import VideoDataModule
from experiments.cli import ROOT, main

PRESETS = {file.stem: file for file in sorted((ROOT / "experiments/_base/data").glob("*.yaml"))}

# data module, frames, resolution, windows and crops of each validation video
EXPECTED = {
    "bair_16f_64": ("BAIRDataModule", 16, 64, 1, 1),
    "bair_16f_64_debiased": ("BAIRDataModule", 16, 64, 15, 1),
    "k600_16f_64": ("K600DataModule", 16, 64, 2, 3),
    "k600_16f_128": ("K600DataModule", 16, 128, 2, 3),
    "k600_17f_128": ("K600DataModule", 17, 128, 2, 3),
    "ssv2_16f_64": ("SSV2DataModule", 16, 64, 2, 1),
    "ssv2_16f_128": ("SSV2DataModule", 16, 128, 2, 1),
}


def resolved(preset: str) -> dict[str, Any]:
    """The data section that `longtake fit --config EXPERIMENT --config PRESET --print_config` prints."""
    out = io.StringIO()
    files = (ROOT / "experiments/vqgan3d_ucf101.yaml", PRESETS[preset])
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", *(f"--config={file}" for file in files), "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())["data"]


def test_every_preset_is_expected() -> None:
    assert PRESETS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_goes_over_an_experiment_with_the_published_numbers(name: str) -> None:
    class_name, num_frames, resolution, windows, crops = EXPECTED[name]
    config = resolved(name)
    assert config["class_path"].split(".")[-1] == class_name
    given = config["init_args"]
    assert (given["num_frames"], given["resolution"]) == (num_frames, resolution)
    assert (given["val_windows"], given.get("val_crops", 1)) == (windows, crops)
    assert given["horizontal_flip"] == (class_name == "BAIRDataModule")
    assert given["batch_size"] == 2  # the experiment's own
    data = getattr(datamodules, class_name)(**given)
    assert isinstance(data, VideoDataModule)
