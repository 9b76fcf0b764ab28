"""The experiments of COMMIT: size and settings as published, a step at toy size, learning, samples by task."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_experiments import EVERY_RUN, read_video, write_experiment

from callbacks.media import write_mp4
from datamodules.clip_file import read_clip
from experiments.arguments import expanded_configs
from experiments.cli import ROOT, main
from experiments.lightning_cli import run
from lightning_modules import COMMITModule
from lightning_modules.generator import Condition
from models.priors.tasks import TASKS, condition_tokens

FILES = {file.stem: file for file in sorted((ROOT / "experiments").glob("*commit*.yaml"))}
EIGHT, TEN = TASKS[:8], TASKS[:10]
TOY = {
    "codebook_size": 16,
    "downsample": "[4,8,8]",
    "causal": "false",
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "init_std": 0.1,
    "dropout": 0.0,
    "lr": 1.0e-2,
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
        ("commit_l_magvit2_ucf101", 306_881_639, ("class_conditional",), 74_000),
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
    assert module.latent_shape == ((5, 16, 16) if "magvit2" in name else (4, 16, 16))
    assert module.tasks == tasks
    assert config["trainer"]["max_steps"] == max_steps
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert data["batch_size"] == 32
    published = {"bair": ("exp", 400.0), "k600": ("linear", 7.5), "magvit2_ucf101": ("cosine", 32.0)}
    expected = published.get(name.split("_", 2)[2], ("cosine", 4.5))
    assert (sampling.get("schedule", "cosine"), sampling.get("choice_temperature", 4.5)) == expected
    rule, past_frames = module.hparams["condition_mask"], module.hparams["past_frames"]
    given = condition_tokens("frame_prediction", module.latent_shape, module.downsample, rule, past_frames)
    assert given.sum() == (512 if "k600" in name else 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_experiment_learns_in_twenty_steps_at_toy_size(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    losses: list[float] = []
    step = COMMITModule.training_step

    def watched(module: COMMITModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = step(module, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(COMMITModule, "training_step", watched)
    flags = {f"model.{key}": value for key, value in TOY.items()} | {
        "model.tokenizer": world / "tokenizer",
        "data": "MovingShapesDataModule",
        "data.num_train": 40,
        "data.num_val": 2,
        "data.batch_size": 2,
        "data.num_frames": 16,
        "data.resolution": 32,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": 20,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    cli = run(["fit", f"--config={FILES[name]}", *(f"--{key}={value}" for key, value in flags.items())])
    assert cli.config.fit.run_name == name
    assert cli.trainer.global_step == len(losses) == 20
    assert losses[0] == pytest.approx(math.log(16), abs=0.4)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
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
        "frame_rate": 10,
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


# A video file of the user's own


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 frames of 48 x 40 pixels, 10 a second; red in the upper half, and brighter from frame to frame."""
    path = tmp_path_factory.mktemp("own") / "clip.mp4"
    frames = np.zeros((18, 40, 48, 3), np.uint8)
    frames[:, :20, :, 0] = 100 + 8 * np.arange(18)[:, None, None]
    write_mp4(path, frames, 10)
    return path


def test_a_video_file_is_edited_and_shown_beside_what_was_given(
    commit_run: tuple[Path, Path], clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paste = "--model.sampling.paste_known=true"
    sample(
        commit_run,
        "--task=inpaint_dynamic",
        f"--input={clip_file}",
        "--start=2",
        "--num_samples=2",
        paste,
        "--out=made",
    )
    results = [read_video(Path(f"made/seed=00000{seed}.mp4")).astype(float) for seed in (0, 1)]
    edit = read_video(Path("made/seed=000000_edit.mp4")).astype(float)
    assert edit.shape == (16, 36, 104, 3)  # three videos of 32 x 32 with their borders
    condition, mask, result = (edit[:, 2:34, 2 + 34 * i : 34 + 34 * i] for i in range(3))
    assert np.abs(result - results[0]).mean() < 6  # each has been through the codec
    assert mask[0, 16, 4].mean() > 240  # made
    assert mask[0, 16, 28].mean() < 15  # kept
    assert np.abs(results[0][:, :6] - results[1][:, :6]).mean() < 6  # known to both: pasted
    shown = 100 + 8 * (2 + np.arange(16))
    assert np.abs(condition[:, 2:6, :, 0].mean((1, 2)) - shown).max() < 12  # from frame 2 on
    about = json.loads(Path("made/samples.json").read_text())
    assert (about["task"], about["input"], about["mask"]) == ("dynamic_inpainting", str(clip_file), None)


def test_a_mask_of_ones_own_says_what_is_made(
    commit_run: tuple[Path, Path], clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    white = np.zeros((40, 48), np.uint8)
    white[:, :24] = 255  # the left half
    Image.fromarray(white).save("mask.png")
    sample(commit_run, f"--input={clip_file}", "--mask=mask.png", "--num_samples=1", "--out=made")
    edit = read_video(Path("made/seed=000000_edit.mp4")).astype(float)
    condition, mask = edit[:, 2:34, 2:34], edit[:, 2:34, 36:68]
    assert mask[..., 2:14, :].mean() > 240
    assert mask[..., 18:30, :].mean() < 15
    assert condition[:, 2:12, 2:14].max() < 40  # black where it is to be made
    assert condition[:, 2:12, 18:30, 0].min() > 80
    assert json.loads(Path("made/samples.json").read_text())["task"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=inpaint_dynamic", "--start=3"], r"has 18 frames, too few for 16 from frame 3 on \(--start\)"),
        (["--task=class", "--label=1"], "The task class_conditional does not start from a video: leave out --input"),
        (["--mask=none.png"], r"No mask at none.png \(--mask\)"),
        (["--mask=small.png"], r"shows 32 x 32 pixels, and the video .*clip.mp4 48 x 40: give one of the same size"),
        (["--mask=black.png"], r"all of the pixels are known: expected some that are, and some to be made \(--mask\)"),
        (["--task=inpaint_dynamic", "--input=none.mp4"], r"No video at none.mp4 \(--input\)"),
        (
            ["--task=predict", "--input=fast.mp4"],
            "has 25 frames a second, and this model was trained on 10. Convert it",
        ),
        (["--task=predict", "--input=little.mp4"], r"shows 48 x 24 pixels, and this model makes 32 x 32: give a video"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    commit_run: tuple[Path, Path],
    clip_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32), 255).save("small.png")
    Image.new("L", (48, 40), 0).save("black.png")
    write_mp4("fast.mp4", np.zeros((2, 40, 48, 3), np.uint8), 25)
    write_mp4("little.mp4", np.zeros((2, 24, 48, 3), np.uint8), 10)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample(commit_run, f"--input={clip_file}", "--num_samples=1", "--out=made", *words)


def test_a_model_that_edits_nothing_refuses_an_input(tiny: Path, mebt_run: Path, clip_file: Path) -> None:
    checkpoint = mebt_run / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="MeBTModule does not start from a video: leave out --input"):
        main(["sample", "--config=mebt.yaml", f"--ckpt_path={checkpoint}", f"--input={clip_file}", "--out=made"])


def test_three_lines_of_python_edit_a_video(commit_run: tuple[Path, Path], clip_file: Path) -> None:
    """What docs/commit.md shows."""
    model = COMMITModule.load_from_checkpoint(commit_run[1] / "checkpoints/last.ckpt", map_location="cpu")
    clip = read_clip(clip_file, model.num_frames, resolution=32)
    video = model.generate(Condition(video=clip[None], task="inpaint_dynamic"), model.num_frames, torch.tensor([0]))
    assert video.shape == (1, 3, 16, 32, 32)
    assert clip[0, :, :14].mean(dim=(1, 2)).diff().min() > 0  # it brightens
    assert clip[1].max() < -0.7


# What is refused


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
