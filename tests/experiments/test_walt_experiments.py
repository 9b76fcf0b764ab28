"""W.A.L.T's experiments: published sizes, a falling loss at toy size, and the commands on a run of theirs."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_experiments import EVERY_RUN, read_video, write_experiment

import datamodules
from experiments.cli import ROOT, main
from lightning_modules import WALTModule

FILES = {file.stem: file for file in sorted((ROOT / "experiments").glob("*walt*.yaml")) if "vqgan" not in file.stem}
FILES = {name: file for name, file in FILES.items() if "tokenizer" not in name}


def resolved(name: str) -> dict[str, Any]:
    """What `longtake fit --print_config` prints; skips where this installation lacks the experiment's data module."""
    needs = yaml.safe_load(FILES[name].read_text()).get("data", {}).get("class_path")
    if needs and not hasattr(datamodules, needs):
        pytest.skip(f"there is no {needs}")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--config={FILES[name]}", "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())


def curve(run_folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_all_experiments_are_found() -> None:
    assert FILES.keys() == {"demo_walt", "walt_imagenet256", "walt_l_k600", "walt_l_ucf101", "walt_xl_ucf101"}


@pytest.mark.parametrize(
    ("name", "parameters", "reported"),
    [
        ("walt_l_ucf101", 313_238_408, 313e6),
        ("walt_xl_ucf101", 460_019_080, 460e6),
        ("walt_l_k600", 313_143_176, 313e6),
        ("walt_imagenet256", 459_815_304, 460e6),
    ],
)
def test_network_has_the_published_size(name: str, parameters: int, reported: float) -> None:
    """Built from the files alone, so that it is tested without their data modules too."""
    config: dict[str, Any] = {"model": {}, "data": {}}
    files = [FILES[name]]
    while base := yaml.safe_load(files[0].read_text()).get("base"):
        files.insert(0, files[0].parent / base)
    for file in files:
        for section in config:
            config[section] |= (yaml.safe_load(file.read_text()).get(section) or {}).get("init_args") or {}
    with torch.device("meta"):
        module = WALTModule(**config["model"], **{key: config["data"][key] for key in ("num_frames", "resolution")})
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == parameters
    assert count == pytest.approx(reported, rel=0.01)


TOY_DATA = {"resolution": 32, "batch_size": 4, "num_train": 64, "num_val": 4, "texture": 0.0, "num_workers": 0}
TOY_MODEL = {
    "latent_dim": 12,
    "depth": 2,
    "dim": 32,
    "num_heads": 4,
    "spatiotemporal_window": [2, 2],
    "lr": 5e-3,
    "warmup_steps": 0,
    "statistics_clips": 16,
    "downsample": [4, 8, 8],
    "sampling": {"num_steps": 2},
}


@pytest.mark.parametrize("name", FILES)
def test_experiment_learns_at_toy_size(
    name: str, continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved(name)
    monkeypatch.chdir(tmp_path)
    frames = min(config["data"]["init_args"]["num_frames"], 9)
    toy = {
        "data": {"class_path": "MovingShapesDataModule", "init_args": {**TOY_DATA, "num_frames": frames}},
        "model": {"init_args": {**TOY_MODEL, "tokenizer": str(continuous_tokenizer)}},
        "trainer": {**EVERY_RUN["trainer"], "max_steps": 120, "val_check_interval": 5, "strategy": "auto"},
        "checkpoint": {"every_n_train_steps": 120},
        "samples": {"every_n_steps": 120, "at_validation": False, "num_videos": 1},
        "ema": {"decay": 0.0},  # of 120 steps, the published average would remember the beginning alone
    }
    toy["trainer"] |= {"precision": "32-true", "limit_val_batches": 1}
    Path("toy.yaml").write_text(yaml.safe_dump(toy))
    main(["fit", f"--config={FILES[name]}", "--config=toy.yaml"])
    run = tmp_path / "runs" / name / "version_0"
    losses = curve(run, "train/loss")
    assert len(losses) == 120
    assert losses[0] == pytest.approx(1, abs=0.4)  # the untrained network predicts nothing
    validation = curve(run, "val/loss")  # the same noise each time, unlike training's
    assert validation[-1] < 0.97 * validation[0], validation
    assert list((run / "samples").glob("*.mp4"))


# The commands


@pytest.fixture
def walt(continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `walt.yaml`, six steps of a W.A.L.T for classes and known frames."""
    monkeypatch.chdir(tmp_path)
    init_args = {**TOY_MODEL, "tokenizer": str(continuous_tokenizer), "num_classes": 12, "frame_prediction": 0.5}
    data = {**EVERY_RUN["data"], "init_args": {**EVERY_RUN["data"]["init_args"], "num_frames": 9}}
    model = {"class_path": "WALTModule", "init_args": {**init_args, "dim": 16}}
    write_experiment(tmp_path / "walt.yaml", EVERY_RUN, data=data, model=model, samples={"at_validation": False})
    return tmp_path


def test_a_resumed_run_is_the_uninterrupted_one_and_its_samples_follow_from_their_seeds(walt: Path) -> None:
    main(["fit", "--config=walt.yaml"])
    straight = walt / "runs/walt/version_0"
    assert {path.name for path in (straight / "checkpoints").iterdir()} >= {"step=4.ckpt", "step=6.ckpt"}
    main(["fit", "--config=walt.yaml", f"--ckpt_path={straight / 'checkpoints/step=4.ckpt'}"])
    ours, theirs = (
        torch.load(walt / f"runs/walt/version_{version}/checkpoints/step=6.ckpt", weights_only=True)
        for version in (0, 1)
    )
    assert ours["state_dict"].keys() == theirs["state_dict"].keys() >= {"latent_mean", "latent_std"}
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name

    checkpoint = f"--ckpt_path={straight / 'checkpoints/step=6.ckpt'}"
    sample = ["sample", "--config=walt.yaml", checkpoint, "--num_frames=13"]
    main([*sample, "--out=all", "--num_samples=3", "--batch_size=2", "--first_seed=5"])
    main([*sample, "--out=one", "--num_samples=1", "--first_seed=6"])
    video = read_video(walt / "all/seed=000006.mp4")
    assert video.shape == (13, 32, 32, 3)
    difference = video.astype(int) - read_video(walt / "one/seed=000006.mp4")
    assert abs(difference).max() <= 8  # matrix products round differently in other batches, and the codec adds to it
    about = json.loads((walt / "all/samples.json").read_text())
    assert about["sampling"]["num_steps"] == 2
    assert about["seeds"] == [5, 6, 7]


def test_a_clip_length_that_does_not_fit_is_one_message(walt: Path) -> None:
    with pytest.raises(ValueError, match=r"num_frames=16 does not fit a causal tokenizer: it takes 1 \+ 4k frames"):
        main(["fit", "--config=walt.yaml", "--data.num_frames=16"])


def test_guidance_without_condition_dropout_is_one_message(walt: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a model without condition"):
        main(["fit", "--config=walt.yaml", "--model.sampling.guidance_scale=2", "--model.condition_dropout=0"])
