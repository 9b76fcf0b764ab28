"""The experiments of COMMIT: size and settings as published, a step at toy size, learning, samples by task."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_experiments import EVERY_RUN, read_video, write_experiment

from experiments.cli import ROOT, main
from experiments.lightning_cli import expanded_configs, run
from lightning_modules import COMMITModule
from models.priors.tasks import TASKS, condition_tokens

FILES = {file.stem: file for file in sorted((ROOT / "experiments").glob("*commit*.yaml"))}
EIGHT, TEN = TASKS[:8], TASKS[:10]
TOY = {
    "codebook_size": 16,
    "downsample": "[4,8,8]",
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "warmup_steps": 0,
    "sampling.num_steps": 2,
}


def merged(file: Path) -> dict[str, Any]:
    """The experiment with its parents, as plain values: data modules are not asked."""

    def update(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return old | {key: update(old.get(key), value) for key, value in new.items()}

    content: dict[str, Any] = {}
    for path in expanded_configs(file):
        content = update(content, yaml.safe_load(path.read_text()))
    return content


@pytest.mark.parametrize(
    ("name", "parameters", "tasks", "max_steps"),
    [
        ("commit_b_ucf101", 87_301_991, ("class_conditional",), 74_000),
        ("commit_l_ucf101", 305_567_847, ("class_conditional",), 74_000),
        ("commit_b_bair", 87_224_322, ("frame_prediction",), 67_600),
        ("commit_l_bair", 305_464_322, ("frame_prediction",), 135_200),
        ("commit_b_bair_mt8", 87_236_625, EIGHT, 202_800),
        ("commit_l_bair_mt8", 305_480_721, EIGHT, 270_400),
        ("commit_b_k600", 87_224_322, ("frame_prediction",), 270_000),
        ("commit_l_k600", 305_464_322, ("frame_prediction",), 540_000),
        ("commit_b_ssv2_mt10", 87_370_431, TEN, 474_480),
        ("commit_l_ssv2_mt10", 305_659_071, TEN, 948_960),
    ],
)
def test_published_experiments_have_their_size_tasks_and_length(
    name: str, parameters: int, tasks: tuple[str, ...], max_steps: int
) -> None:
    config = merged(FILES[name])
    data, model = config["data"]["init_args"], dict(config["model"]["init_args"])
    sampling = model.pop("sampling", {})
    with torch.device("meta"):
        module = COMMITModule(**model, num_frames=data["num_frames"], resolution=data["resolution"])
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert f"{parameters:,}" in FILES[name].read_text()
    assert module.latent_shape == (4, 16, 16)
    assert module.tasks == tasks
    assert config["trainer"]["max_steps"] == max_steps
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert data["batch_size"] == 32
    expected = {"bair": ("exp", 400.0), "k600": ("linear", 7.5)}.get(name.split("_", 2)[2], ("cosine", 4.5))
    assert (sampling.get("schedule", "cosine"), sampling.get("choice_temperature", 4.5)) == expected
    rule, past_frames = module.hparams["condition_mask"], module.hparams["past_frames"]
    given = condition_tokens("frame_prediction", module.latent_shape, module.downsample, rule, past_frames)
    assert given.sum() == (512 if "k600" in name else 256)


@pytest.mark.parametrize("name", FILES)
def test_experiment_makes_a_step_and_a_validation_at_toy_size(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {f"model.{key}": value for key, value in TOY.items()} | {
        "model.tokenizer": world / "tokenizer",
        "data": "MovingShapesDataModule",
        "data.num_train": 4,
        "data.num_val": 2,
        "data.batch_size": 2,
        "data.resolution": 32,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": "true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    cli = run(["fit", f"--config={FILES[name]}", *(f"--{key}={value}" for key, value in flags.items())])
    assert cli.config.fit.run_name == name
    assert cli.trainer.global_step == 1
    tasks = merged(FILES[name])["model"]["init_args"]["tasks"]
    assert {"train/loss", "val/loss", *(f"val/loss_{task}" for task in tasks)} <= cli.trainer.callback_metrics.keys()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def commit_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy COMMIT for three tasks, trained for some steps, and its experiment."""
    folder = tmp_path_factory.mktemp("commit")
    init_args = {
        "tokenizer": str(world / "tokenizer"),
        "codebook_size": 16,
        "tasks": ["class_conditional", "frame_prediction", "dynamic_inpainting"],
        "num_classes": 12,
        "dim": 32,
        "depth": 2,
        "num_heads": 2,
        "dropout": 0.0,
        "init_std": 0.1,
        "lr": 1.0e-2,
        "warmup_steps": 5,
        "sampling": {"num_steps": 3},
    }
    trainer = EVERY_RUN["trainer"] | {"max_steps": 60, "val_check_interval": 20}
    trainer.pop("callbacks")
    model = {"class_path": "COMMITModule", "init_args": init_args}
    write_experiment(
        folder / "commit.yaml", EVERY_RUN, model=model, trainer=trainer, checkpoint={"every_n_train_steps": 60}
    )
    main(["fit", f"--config={folder / 'commit.yaml'}", f"--run_root={folder / 'runs'}"])
    return folder / "commit.yaml", folder / "runs/commit/version_0"


def curve(run_folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder)).Reload()
    return [event.value for event in events.Scalars(name)]


def test_training_through_the_command_line_learns_every_task(commit_run: tuple[Path, Path]) -> None:
    for task in ("class_conditional", "frame_prediction", "dynamic_inpainting"):
        losses = curve(commit_run[1], f"val/loss_{task}")
        assert len(losses) == 3
        assert losses[-1] < math.log(16) - 0.2  # of 16 codes: most is learned before the first validation
    train = curve(commit_run[1], "train/loss")
    assert len(train) == 60
    assert np.mean(train[-15:]) < np.mean(train[:15]) - 0.3


def sample(commit_run: tuple[Path, Path], *words: str) -> None:
    checkpoint = commit_run[1] / "checkpoints/last.ckpt"
    main(["sample", f"--config={commit_run[0]}", f"--ckpt_path={checkpoint}", *words])


def test_samples_of_a_task_start_from_the_validation_clips(
    commit_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample(
        commit_run,
        "--task=dynamic_inpainting",
        "--num_samples=3",
        "--first_seed=3",
        "--batch_size=2",
        "--model.sampling.paste_known=true",
        "--out=made",
    )
    about = json.loads(Path("made/samples.json").read_text())
    assert (about["task"], about["label"]) == ("dynamic_inpainting", None)
    data = run(["fit", f"--config={commit_run[0]}", "--trainer.fast_dev_run=1"]).datamodule
    clips = torch.cat([batch["video"] for batch in data.ordered_dataloader("val")])
    for seed in (3, 4, 5):
        clip = (clips[seed % 4].movedim(0, -1).numpy() + 1) * 127.5
        made = read_video(Path(f"made/seed={seed:06d}.mp4")).astype(float)
        known = np.zeros((16, 32, 32), bool)
        known[:, :8] = known[:, 24:] = True  # rows that the box never reaches
        assert np.abs(made - clip)[known].mean() < 12  # an mp4 is lossy
        others = (clips[(seed + 1) % 4].movedim(0, -1).numpy() + 1) * 127.5
        assert np.abs(made - clip)[known].mean() < np.abs(made - others)[known].mean()


def test_samples_of_a_class_need_no_clips(
    commit_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample(commit_run, "--label=7", "--num_samples=1", "--out=made")
    about = json.loads(Path("made/samples.json").read_text())
    assert (about["task"], about["label"]) == ("class_conditional", 7)  # the model's first task
    assert read_video(Path("made/seed=000000.mp4")).shape == (16, 32, 32, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=juggling"], r"task=juggling is none of this model's \(--task\): class_conditional, frame_prediction"),
        (["--task=unconditional"], "task=unconditional is none of this model's"),
        (["--task=frame_prediction", "--label=1"], r"the task frame_prediction has no classes \(--label, --task\)"),
        (["--label=12"], "do not fit num_classes=12"),
    ],
)
def test_tasks_and_labels_that_do_not_fit_are_refused(
    commit_run: tuple[Path, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(commit_run, *words, f"--out={tmp_path / 'made'}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--task=juggling", r"task=juggling is none of MeBT's \(--task\): frame_prediction, frame_interpolation"),
        ("--label=1", r"MeBTModule has no labels to choose from \(--label\)"),
    ],
)
def test_a_model_without_such_tasks_or_labels_refuses_them(tiny: Path, mebt_run: Path, word: str, message: str) -> None:
    checkpoint = mebt_run / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=message):
        main(["sample", "--config=mebt.yaml", f"--ckpt_path={checkpoint}", word, "--out=made"])


# Codes and conditions, computed once


@pytest.fixture(scope="module")
def cached_tasks(commit_run: tuple[Path, Path]) -> Path:
    folder = commit_run[0].parent / "codes"
    main(["tokenize", f"--config={commit_run[0]}", f"--out={folder}"])
    return folder


SHORT = ("--trainer.max_steps=6", "--trainer.val_check_interval=6")


def test_training_from_cached_conditions_is_training_from_pixels(
    commit_run: tuple[Path, Path], cached_tasks: Path, tmp_path: Path
) -> None:
    header = json.loads((cached_tasks / "cache.json").read_text())
    assert header["tasks"] == {"frame_prediction": {"past_frames": 1}, "dynamic_inpainting": {}}
    losses = []
    for name, words in (("pixels", []), ("codes", ["--data=TokenDataModule", f"--data.root={cached_tasks}"])):
        words = [*words, "--samples.every_n_steps=6", f"--run_root={tmp_path}", f"--run_name={name}"]
        main(["fit", f"--config={commit_run[0]}", *SHORT, *words])
        names = ("train/loss", "val/loss_frame_prediction", "val/loss_dynamic_inpainting")
        losses.append([curve(tmp_path / name / "version_0", key) for key in names])
    assert len(losses[0][0]) == 6
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.tasks=[central_inpainting,vertical_outpainting]"], "no condition codes of central_inpainting, vert"),
        (["--model.past_frames=5"], r"frame_prediction: {'past_frames': 1}, not {'past_frames': 5}"),
    ],
)
def test_a_cache_of_other_conditions_is_refused(
    commit_run: tuple[Path, Path], cached_tasks: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [*words, "--data=TokenDataModule", f"--data.root={cached_tasks}", f"--run_root={tmp_path}"]
    with pytest.raises(ValueError, match=message):
        main(["fit", f"--config={commit_run[0]}", *SHORT, *words])


def test_tokenize_keeps_the_tasks_that_are_asked_for(commit_run: tuple[Path, Path], tmp_path: Path) -> None:
    main(["tokenize", f"--config={commit_run[0]}", f"--out={tmp_path / 'one'}", "--tasks=[dynamic_inpainting]"])
    assert set(json.loads((tmp_path / "one/cache.json").read_text())["fields"]) == {"codes", "task/dynamic_inpainting"}
    with pytest.raises(ValueError, match="task=juggling is none of this model's"):
        main(["tokenize", f"--config={commit_run[0]}", f"--out={tmp_path / 'two'}", "--tasks=[juggling]"])
