"""The data sections that experiments can take as a base: each one through the command line's parser."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import datamodules
from datamodules.video import VideoDataModule
from experiments.cli import ROOT, main
from experiments.doctor import files_data_module

PRESETS = {file.stem: file for file in sorted((ROOT / "experiments/_base/data").glob("*.yaml"))}

# data sets with validation windows: data module, frames, resolution, windows and crops of each validation video
WINDOWED = {
    "bair_16f_64": ("BAIRDataModule", 16, 64, 1, 1),
    "bair_16f_64_debiased": ("BAIRDataModule", 16, 64, 15, 1),
    "k600_16f_64": ("K600DataModule", 16, 64, 2, 3),
    "k600_16f_128": ("K600DataModule", 16, 128, 2, 3),
    "k600_17f_128": ("K600DataModule", 17, 128, 2, 3),
    "ssv2_16f_64": ("SSV2DataModule", 16, 64, 2, 1),
    "ssv2_16f_128": ("SSV2DataModule", 16, 128, 2, 1),
}
UNWINDOWED = sorted(PRESETS.keys() - WINDOWED.keys())


def resolved(*words: str) -> dict[str, Any]:
    """The data section of what `longtake fit WORDS` would run with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", *words, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())["data"]


def test_there_are_presets_of_all_these_data_sets() -> None:
    kinds = {name.rpartition("f_128")[0].rpartition("_")[0] for name in UNWINDOWED}
    assert WINDOWED.keys() <= PRESETS.keys()
    assert kinds == {"ucf101", "sky_timelapse", "taichi_hd", "nuscenes_front", "objectron"}


@pytest.mark.parametrize("name", UNWINDOWED)
def test_a_preset_makes_its_data_module_as_a_base_and_as_a_second_file(name: str, tmp_path: Path) -> None:
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"base: [{ROOT / 'experiments/mebt_16f.yaml'}, {PRESETS[name]}]\n")
    as_base = resolved(f"--config={experiment}")
    as_second = resolved(f"--config={ROOT / 'experiments/mebt_16f.yaml'}", f"--config={PRESETS[name]}")
    assert as_base == as_second
    assert as_base["init_args"]["num_workers"] == 8  # of the experiment
    arguments = {key: value for key, value in as_base["init_args"].items() if key != "root"}
    data = getattr(datamodules, as_base["class_path"].rpartition(".")[2])(str(tmp_path), **arguments)
    frames = int(next(part for part in name.split("_") if part.endswith("f"))[:-1])
    assert (data.num_frames, data.resolution) == (frames, 128)
    assert data.frame_stride == (4 if name == "taichi_hd_16f_128" else 1)
    assert data.antialias == (not name.endswith("tats"))


@pytest.mark.parametrize(
    ("name", "variable", "folders"),
    [
        ("sky_timelapse_16f_128", "LONGTAKE_SKY_TIMELAPSE", ("sky_train/v/v_1", "sky_test/w/w_1")),
        ("taichi_hd_128f_128", "LONGTAKE_TAICHI_HD", ("train/abc#000080#000300", "test/def#000001#000200")),
        ("nuscenes_front_16f_128", "LONGTAKE_NUSCENES", ("train/scene-0001", "val/scene-0003")),
        ("objectron_16f_128", "LONGTAKE_OBJECTRON", ("train/bike/batch-1/3", "test/bike/batch-2/0")),
    ],
)
def test_a_preset_finds_its_layout_below_the_folder_that_the_environment_names(
    name: str, variable: str, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.jpg")
    monkeypatch.delenv(variable, raising=False)
    data = files_data_module(str(PRESETS[name]), [])
    with pytest.raises(FileNotFoundError, match=rf"set --data\.root or {variable}"):
        data.listing()
    monkeypatch.setenv(variable, str(tmp_path))
    assert data.listing() == {"train": {tmp_path / folders[0]: 0}, "val": {tmp_path / folders[1]: 0}}
    assert data.class_names() == []


@pytest.mark.parametrize("name", WINDOWED)
def test_a_preset_with_windows_goes_over_an_experiment_with_the_published_numbers(name: str) -> None:
    class_name, num_frames, resolution, windows, crops = WINDOWED[name]
    config = resolved(f"--config={ROOT / 'experiments/vqgan3d_ucf101.yaml'}", f"--config={PRESETS[name]}")
    assert config["class_path"].split(".")[-1] == class_name
    given = config["init_args"]
    assert (given["num_frames"], given["resolution"]) == (num_frames, resolution)
    assert (given["val_windows"], given.get("val_crops", 1)) == (windows, crops)
    assert given["horizontal_flip"] == (class_name == "BAIRDataModule")
    assert given["batch_size"] == 2  # the experiment's own
    data = getattr(datamodules, class_name)(**given)
    assert isinstance(data, VideoDataModule)
