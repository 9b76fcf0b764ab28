"""Runs that end early and go on: the same batches, numbers and weights as if nothing had happened."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from probes import FAIL_AT, read_ledger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.cli import main
from experiments.lightning_cli import run
from lightning_modules import MeBTModule

Curve = list[tuple[int, float]]


def curves(run_folder: Path) -> dict[str, Curve]:
    """All numbers in TensorBoard, but those that depend on the clock: name to (step, value)."""
    events = EventAccumulator(str(run_folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("train/", "val/")) and "second" not in name]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def checkpoint(run_folder: Path, step: int) -> dict[str, Any]:
    return torch.load(run_folder / f"checkpoints/step={step}.ckpt", weights_only=True)


def fail_and_resume(experiment: str, step: int, every_n_steps: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start an experiment in the working directory, let it fail inside a step, and resume it; the run's folder."""
    with monkeypatch.context() as patch:
        patch.setenv(FAIL_AT, str(step))
        with pytest.raises(RuntimeError, match="the power is gone"):
            main(["fit", f"--config={experiment}.yaml", f"--checkpoint.every_n_train_steps={every_n_steps}"])
    main(["fit", f"--resume=runs/{experiment}/version_0"])
    return Path(f"runs/{experiment}/version_0")


@pytest.mark.parametrize(
    ("experiment", "step", "every_n_steps"),
    [
        ("tokenizer", 3, 6),  # goes on from a checkpoint that the failure itself left, in the middle of an epoch
        ("mebt", 3, 6),
        ("mebt", 4, 6),  # the first step of an epoch
        ("mebt", 4, 2),  # from a regular checkpoint, at the end of an epoch
        ("mebt", 3, 3),  # in the middle of an epoch
    ],
)
def test_a_run_that_failed_goes_on_as_if_it_had_not(
    tiny: Path, world: Path, experiment: str, step: int, every_n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = world / f"runs/{experiment}/version_0"
    resumed = fail_and_resume(experiment, step, every_n_steps, monkeypatch)

    assert [entry[0] for entry in read_ledger(resumed)] == [0, 1, 2, 3, 4, 5]
    assert read_ledger(resumed) == read_ledger(straight)  # the same clips, windows and lengths
    ours, theirs = checkpoint(resumed, 6), checkpoint(straight, 6)
    for name, tensor in theirs["state_dict"].items():  # the codebook too: it is not made anew
        assert torch.equal(ours["state_dict"][name], tensor), name
    averages = [saved.get("current_model_state", {}) for saved in (ours, theirs)]  # the tokenizer's run has some
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], tensor) for name, tensor in averages[1].items())
    assert bool(averages[1]) == (experiment == "tokenizer")
    for one, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        for key, moments in other["state"].items():
            assert all(torch.equal(one["state"][key][name], value) for name, value in moments.items())
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]

    assert [path.name for path in resumed.parent.iterdir()] == ["version_0"]
    assert len(list(resumed.glob("events.*"))) == 2  # before and after, in one folder
    assert curves(resumed) == curves(straight)
    assert [step for step, _ in curves(resumed)["train/loss"]] == [0, 1, 2, 3, 4, 5]


def test_the_last_step_is_saved_whatever_the_schedule_of_checkpoints(tiny: Path) -> None:
    main(["fit", "--config=tokenizer.yaml", "--trainer.max_steps=3", "--checkpoint.every_n_train_steps=2"])
    folder = Path("runs/tokenizer/version_0/checkpoints")
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    main(["fit", "--resume=runs/tokenizer/version_0", "--trainer.max_steps=5"])
    assert [entry[0] for entry in read_ledger(folder.parent)] == [0, 1, 2, 3, 4]


def test_curriculum_of_the_tiny_runs_does_change_the_length(mebt_run: Path) -> None:
    """Or the tests of resuming would not see a curriculum that starts again."""
    assert len({frames for _, _, _, frames in read_ledger(mebt_run)}) > 1


def test_resume_takes_the_newest_checkpoint_that_is_whole(tiny: Path, mebt_run: Path) -> None:
    shutil.copytree(mebt_run, "runs/mebt/version_0", symlinks=True)
    newest = Path("runs/mebt/version_0/checkpoints/step=6.ckpt")
    newest.write_bytes(newest.read_bytes()[:-1000])  # killed while it was written
    with pytest.warns(UserWarning, match=r"Left out: .*step=6\.ckpt is damaged"):
        trainer = run(["fit", "--resume=runs/mebt/version_0"]).trainer
    assert [entry[0] for entry in read_ledger(Path("runs/mebt/version_0"))] == [0, 1, 2, 3, 4, 5, 4, 5]
    assert trainer.global_step == 6


@pytest.mark.parametrize("remove", ["config.yaml", "checkpoints"])
def test_resuming_what_is_no_run_is_refused(tiny: Path, mebt_run: Path, remove: str) -> None:
    shutil.copytree(mebt_run, "runs/mebt/version_0", symlinks=True)
    path = Path("runs/mebt/version_0") / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=r"version_0 is no run to resume: expected config.yaml and checkpoints"):
        main(["fit", "--resume=runs/mebt/version_0"])


@pytest.mark.parametrize("path", ["last", "best", "runs/mebt/version_0/checkpoints/step=2.ckpt"])
def test_missing_checkpoint_is_an_error_and_no_start_from_scratch(tiny: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"No checkpoint at {path} .*--resume RUN"):
        main(["fit", "--config=mebt.yaml", f"--ckpt_path={path}"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["validate", "sample"])
def test_commands_that_need_trained_weights_ask_for_them(tiny: Path, command: str) -> None:
    with pytest.raises(ValueError, match=f"`longtake {command}` needs trained weights: --ckpt_path"):
        main([command, "--config=mebt.yaml"])


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("--model.lr=0.5", r"  lr: 0\.001 in the checkpoint, 0\.5 given"),
        ("--model.betas=[0.5,0.6]", r"  betas: \[0\.9, 0\.95\] in the checkpoint, \[0\.5, 0\.6\] given"),
        ("--seed_everything=7", r"  seed: 42 in the checkpoint, 7 given"),
        ("--data.num_frames=32", r"  num_frames: 16 in the checkpoint, 32 given"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_model_argument_that_differs_from_the_checkpoint_is_refused_and_named(
    tiny: Path, mebt_run: Path, flag: str, difference: str, command: str
) -> None:
    path = mebt_run / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=rf"differ from those of .*last\.ckpt:\n{difference}\nGive the experiment"):
        main([command, "--config=mebt.yaml", f"--ckpt_path={path}", flag])


@pytest.mark.parametrize(
    ("flag", "named"), [("--model.lr=0.5", "lr: 0.001"), ("--model.tokenizer.quantizer.decay=0.5", "'decay': 0.99")]
)
def test_tokenizer_argument_that_differs_from_the_checkpoint_is_refused_and_named(
    tiny: Path, tokenizer_run: Path, flag: str, named: str
) -> None:
    path = tokenizer_run / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        main(["fit", "--config=tokenizer.yaml", f"--ckpt_path={path}", flag])


def test_another_seed_of_the_data_is_refused_on_resume(tiny: Path, tokenizer_run: Path) -> None:
    shutil.copytree(tokenizer_run, "runs/tokenizer/version_0", symlinks=True)
    with pytest.raises(ValueError, match="seed: 42 in the checkpoint, 7 given"):
        main(["fit", "--resume=runs/tokenizer/version_0", "--seed_everything=7"])


def test_saved_configuration_makes_a_new_run(tiny: Path, mebt_run: Path) -> None:
    """Also that of a run that was resumed: it names neither the folder nor the checkpoint of the old run."""
    shutil.copytree(mebt_run, "runs/mebt/version_0", symlinks=True)
    main(["fit", "--resume=runs/mebt/version_0", "--trainer.max_steps=7"])
    saved = Path("runs/mebt/version_0/config.yaml")
    cli = run(["fit", f"--config={saved}", "--trainer.max_steps=1"])
    assert cli.trainer.log_dir == "runs/mebt/version_1"
    assert cli.trainer.global_step == 1
    assert len(read_ledger(Path("runs/mebt/version_1"))) == 1


def test_a_run_may_be_named_from_within_its_folders(
    tiny: Path, mebt_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mebt_run, "runs/mebt/version_0", symlinks=True)
    monkeypatch.chdir("runs/mebt")
    main(["fit", "--resume=version_0", "--trainer.max_steps=7"])
    assert [path.name for path in (tiny / "runs/mebt").iterdir()] == ["version_0"]
    assert read_ledger(tiny / "runs/mebt/version_0")[-1][0] == 6


def test_saved_configuration_serves_other_commands(tiny: Path, mebt_run: Path) -> None:
    words = [f"--config={mebt_run / 'config.yaml'}", f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"]
    main(["sample", *words, "--num_samples=1", "--out=made"])
    assert Path("made/seed=000000.mp4").is_file()


def test_saved_configuration_is_whole(tiny: Path, mebt_run: Path) -> None:
    saved = yaml.safe_load((mebt_run / "config.yaml").read_text())
    assert saved.get("base") is None
    assert saved["run_name"] == "mebt"
    assert saved["model"]["init_args"]["dropout"] == 0.0  # defaults too
    assert saved["seed_everything"] == 42


@pytest.mark.parametrize("experiment", ["tokenizer", "mebt"])
def test_checkpoint_holds_plain_types_and_the_resolved_configuration(world: Path, experiment: str) -> None:
    folder = world / f"runs/{experiment}/version_0"
    loaded = checkpoint(folder, 6)  # with weights_only=True
    assert loaded["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert loaded["global_step"] == 6
    assert loaded["hyper_parameters"]["lr"] == 1e-3


def test_checkpoint_of_a_prior_does_not_hold_its_tokenizer(mebt_run: Path) -> None:
    loaded = checkpoint(mebt_run, 6)
    assert all(name.startswith("network.") for name in loaded["state_dict"])
    assert len(loaded["tokenizer_digest"]) == 64


def test_commands_other_than_fit_make_no_run(tiny: Path, mebt_run: Path) -> None:
    before = sorted(tiny.rglob("*"))
    main(["validate", "--config=mebt.yaml", f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"])
    assert sorted(tiny.rglob("*")) == before


def test_validation_of_a_checkpoint_repeats_that_of_its_run(tiny: Path, mebt_run: Path) -> None:
    words = ["--config=mebt.yaml", f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"]
    metrics = run(["validate", *words]).trainer.callback_metrics
    during = torch.load(mebt_run / "end.0.pt", weights_only=True)["metrics"]
    assert metrics["val/loss"] == during["val/loss"]


def test_checkpoint_of_the_command_line_loads_in_python(mebt_run: Path) -> None:
    """With the arguments that were linked or left at their defaults, and the sampling settings as they were typed."""
    module = MeBTModule.load_from_checkpoint(mebt_run / "checkpoints/last.ckpt")
    assert (module.num_frames, module.seed, module.sampling.num_steps) == (16, 42, 3)
    for name, tensor in checkpoint(mebt_run, 6)["state_dict"].items():
        assert torch.equal(module.state_dict()[name], tensor)
