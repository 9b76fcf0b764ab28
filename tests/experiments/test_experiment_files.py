"""Every published experiment: it parses, has the published size, and makes a step at toy size."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml

from callbacks import ShortToLongCurriculum
from experiments.cli import ROOT, main
from experiments.lightning_cli import run
from lightning_modules import MeBTModule
from models.weights import build

FILES = {file.stem: file for file in sorted((ROOT / "experiments").glob("*.yaml"))}
# W.A.L.T's have a tokenizer of another kind, and a test file of their own
FILES = {name: file for name, file in FILES.items() if not name.startswith(("walt_", "demo_walt"))}
UCF101_FRAMES = 36


@functools.cache
def resolved(name: str, *overrides: str) -> dict[str, Any]:
    """What `longtake fit --print_config` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--config={FILES[name]}", *overrides, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.fixture(scope="session")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few seconds of noise in the folders and lists of UCF-101."""
    root = tmp_path_factory.mktemp("ucf101")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    names = [f"Archery/v_Archery_g0{group}_c01.avi" for group in (1, 2, 3)]
    (lists / "classInd.txt").write_text("1 Archery\n")
    (lists / "trainlist01.txt").write_text(f"{names[0]} 1\n{names[1]} 1\n")
    (lists / "testlist01.txt").write_text(f"{names[2]}\n")
    (root / "UCF-101/Archery").mkdir(parents=True)
    for name in names:
        with av.open(str(root / "UCF-101" / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(UCF101_FRAMES):
                image = np.full((48, 64, 3), 5 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return root


def toy_size(config: dict[str, Any], tokenizer: Path, ucf101: Path) -> list[str]:
    """Flags that shrink an experiment, and leave its kind of model, data, curriculum and precision as they are."""
    data, model = config["data"]["class_path"].split(".")[-1], config["model"]["class_path"].split(".")[-1]
    flags = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": "true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "data.resolution": 32,
        "data.batch_size": 2,
        "data.num_frames": min(config["data"]["init_args"]["num_frames"], 32),
    }
    flags |= {
        "UCF101DataModule": {"data.root": ucf101, "data.num_workers": 0},
        "MovingShapesDataModule": {"data.num_train": 4, "data.num_val": 2},
    }[data]
    flags |= {
        "MeBTModule": {
            "model.tokenizer": tokenizer,
            "model.codebook_size": 16,
            "model.dim": 16,
            "model.num_heads": 2,
            "model.num_latents": 4,
            "model.sampling.num_steps": 2,
        },
        "VQGAN3DModule": {
            "data.num_frames": 8,
            "model.tokenizer.encoder.base_channels": 4,
            "model.tokenizer.decoder.base_channels": 4,
            "model.tokenizer.quantizer.codebook_size": 16,
            "model.tokenizer.quantizer.dim": 8,
            "model.discriminator_channels": 4,
            "model.discriminator_start_step": 0,
        },
    }[model]
    return [f"--{key}={value}" for key, value in flags.items()]


@pytest.mark.parametrize("name", FILES)
def test_experiment_makes_a_step_and_a_validation_at_toy_size(
    name: str, world: Path, ucf101: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = toy_size(resolved(name), world / "tokenizer", ucf101)
    trainer = run(["fit", f"--config={FILES[name]}", *flags]).trainer
    assert trainer.global_step == 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # a trial leaves nothing behind


@pytest.mark.parametrize("name", [name for name in FILES if "mebt" in name])
def test_experiment_resolves_alike_with_and_without_its_tokenizer(name: str, world: Path) -> None:
    with_it = resolved(name, f"--model.tokenizer={world / 'tokenizer'}")
    without = resolved(name, f"--model.tokenizer={world / 'nowhere'}")
    with_it["model"]["init_args"].pop("tokenizer")
    without["model"]["init_args"].pop("tokenizer")
    assert with_it == without


@pytest.mark.parametrize("name", FILES)
def test_experiment_is_named_after_its_file(name: str) -> None:
    assert resolved(name)["run_name"] == name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mebt_16f", 337_177_600), ("mebt_128f", 344_517_632), ("mebt_128f_released", 344_517_632)],
)
def test_prior_has_the_published_size(name: str, parameters: int) -> None:
    config = resolved(name)
    data = config["data"]["init_args"]
    with torch.device("meta"):
        module = MeBTModule(
            **config["model"]["init_args"], num_frames=data["num_frames"], resolution=data["resolution"]
        )
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_tokenizer_has_the_published_size() -> None:
    with torch.device("meta"):
        tokenizer = build(resolved("vqgan3d_ucf101")["model"]["init_args"]["tokenizer"])
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 23_652_227


def mean_lengths(name: str, steps: list[int]) -> list[float]:
    """Mean number of latent frames in training at some steps of an experiment."""
    config = resolved(name)
    curriculum = ShortToLongCurriculum(**config["curriculum"])
    num_frames = config["data"]["init_args"]["num_frames"]
    curriculum.bind(config["trainer"]["max_steps"], num_frames, frames_per_latent=4, seed=config["seed_everything"])
    return [curriculum.expected_frames_at(step) / 4 for step in steps]


def test_mebt_128f_trains_on_the_full_length_for_the_last_thirty_percent() -> None:
    steps = resolved("mebt_128f")["trainer"]["max_steps"]
    last = list(range(steps * 7 // 10, steps, steps // 100))
    assert min(mean_lengths("mebt_128f", [*last, steps - 1])) >= 31
    assert max(mean_lengths("mebt_128f", [0, steps // 10])) < 8  # short before


def test_the_released_schedule_never_reaches_the_full_length() -> None:
    assert resolved("mebt_128f_released")["trainer"]["max_steps"] == 2_000_000
    lengths = mean_lengths("mebt_128f_released", [*range(0, 2_000_000, 50_000), 1_999_999])
    assert max(lengths) < 31
    assert lengths[-1] == pytest.approx(21, abs=0.1)
