"""Runs that were killed go on as if nothing had happened, and what cannot go on says why in one message."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from five_experiments import MODULES, differences, last_ledger, write_five_experiments

from callbacks.checkpoint import CheckpointWriteError
from experiments.arguments import resumed
from experiments.cli import ROOT, main
from experiments.runs import claimed, newest_checkpoint
from models.random import keyed_generator
from models.weights import read_manifest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the five experiments; runs of them that were not interrupted appear below `runs`."""
    folder = tmp_path_factory.mktemp("five")
    write_five_experiments(folder)
    return folder


def train(experiment: Path, root: Path, *words: str) -> None:
    main(["fit", f"--config={experiment}", f"--run_root={root}", *words])


@pytest.mark.parametrize("name", MODULES)
def test_a_run_that_was_killed_ends_as_one_that_was_not(name: str, five: Path, tmp_path: Path) -> None:
    """Bit by bit, from what lies on the disk after a kill. `make test-faults` kills with a signal, and more often."""
    experiment = five / f"{name}.yaml"
    train(experiment, five / "runs", "--resume=auto")  # there is nothing to go on with: a run begins
    straight, ours = five / "runs" / name / "version_0", tmp_path / name / "version_0"
    shutil.copytree(straight, ours, symlinks=True)
    draws = keyed_generator(7, list(MODULES).index(name))
    killed_at = int(torch.randint(2, 6, (), generator=draws))
    for path in ours.glob("checkpoints/step=*.ckpt"):
        if int(path.stem.removeprefix("step=")) > killed_at:
            path.rename(path.with_name(f".{path.name}.part"))  # it was about to be renamed
    if torch.rand((), generator=draws) < 0.5:
        (ours / "checkpoints/manifest.json").unlink()  # or it had been, and the manifest did not know

    train(experiment, tmp_path, "--resume=must", "--data.num_workers=2")
    one, other = (torch.load(run / "checkpoints/step=6.ckpt", weights_only=True) for run in (ours, straight))
    assert one["global_step"] == 6
    assert differences(one, other) == []
    assert last_ledger(ours) == last_ledger(straight)  # the same clips and windows
    assert [path.name for path in ours.parent.iterdir()] == ["version_0"]


@pytest.mark.faults
@pytest.mark.parametrize("name", MODULES)
def test_runs_that_sigkill_ends_ten_times_end_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Five runs, each killed twice at random moments, with two workers."""
    write_five_experiments(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed_runs.py"), name, "5", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed at") == 10
    for run in range(5):
        ours, straight = (tmp_path / folder / name / "version_0" for folder in (f"killed{run}", "straight"))
        one, other = (torch.load(max(f.glob("checkpoints/step=40*.ckpt")), weights_only=True) for f in (ours, straight))
        assert differences(one, other) == []
        assert last_ledger(ours) == last_ledger(straight)


# Which run, and which of its checkpoints


@pytest.fixture
def run_folder(mebt_run: Path, tiny: Path) -> Path:
    """A copy of a finished run, as `runs/mebt/version_0` in the working directory."""
    shutil.copytree(mebt_run, "runs/mebt/version_0", symlinks=True)
    return Path("runs/mebt/version_0")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_manifest_tells_each_checkpoint_s_step_and_size(mebt_run: Path) -> None:
    folder = mebt_run / "checkpoints"
    manifest = read_manifest(folder)
    assert {name: entry["step"] for name, entry in manifest.items()} == {f"step={n}.ckpt": n for n in (2, 4, 6)}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest.items())


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_checkpoint_with_one_wrong_bit_is_left_out_and_left_there(run_folder: Path, with_manifest: bool) -> None:
    if not with_manifest:
        (run_folder / "checkpoints/manifest.json").unlink()
    bad = run_folder / "checkpoints/step=6.ckpt"
    flip_a_byte(bad)
    with pytest.warns(UserWarning, match=r"Left out: .*step=6\.ckpt is damaged"):
        assert newest_checkpoint(run_folder).name == "step=4.ckpt"  # type: ignore[union-attr]
    assert bad.is_file()


@pytest.mark.filterwarnings("ignore:Left out")
@pytest.mark.parametrize("how", ["auto", "must", "runs/mebt/version_0"])
def test_no_run_begins_anew_because_all_checkpoints_are_damaged(run_folder: Path, how: str) -> None:
    for path in run_folder.glob("checkpoints/step=*.ckpt"):
        flip_a_byte(path)
    with pytest.raises(ValueError, match=r"None of the 3 checkpoints of .*version_0 is whole"):
        resumed(["fit", "--config=mebt.yaml", f"--resume={how}"])


def test_auto_goes_on_with_the_newest_run_and_keeps_the_experiment_as_given(run_folder: Path) -> None:
    words = ["fit", "--config=mebt.yaml", "--resume", "auto", "--trainer.max_steps=9"]
    newest = run_folder.resolve() / "checkpoints/step=6.ckpt"
    assert resumed(words) == [
        *("fit", "--config=mebt.yaml", f"--ckpt_path={newest}", "--run_root=runs", "--run_name=mebt"),
        *("--run_version=version_0", "--trainer.max_steps=9"),
    ]
    assert resumed(["fit", "--config=mebt.yaml", "--resume=never"]) == ["fit", "--config=mebt.yaml"]
    other_root = ["fit", "--config=mebt.yaml", "--run_root=elsewhere"]
    assert resumed([*other_root, "--resume=auto"]) == other_root


def test_must_fails_where_there_is_nothing(tiny: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--resume must: no run of mebt in runs has a checkpoint"):
        main(["fit", "--config=mebt.yaml", "--resume=must"])
    assert not Path("runs").exists()


def test_auto_needs_to_know_the_experiment() -> None:
    with pytest.raises(ValueError, match="give --config experiments/<name>"):
        resumed(["fit", "--resume=auto"])


# What ends a run, and what it says


@pytest.mark.parametrize("moment", ["train 3", "val 0"])
def test_sigterm_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    moment: str, tiny: Path, mebt_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, at an epoch's last batch, and in the validation after it; the exit status is 143."""
    monkeypatch.setenv("LONGTAKE_TEST_SIGTERM", moment)
    handler = signal.getsignal(signal.SIGTERM)
    words = ["fit", "--config=mebt.yaml", "--resume=auto", "--checkpoint.every_n_train_steps=100"]
    words += ["--trainer.val_check_interval=4"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert list(read_manifest(Path("runs/mebt/version_0/checkpoints"))) == ["step=4.ckpt"]
    monkeypatch.delenv("LONGTAKE_TEST_SIGTERM")
    main(words)
    assert last_ledger(Path("runs/mebt/version_0")) == last_ledger(mebt_run)
    one, other = (
        torch.load(run / "checkpoints/step=6.ckpt", weights_only=True)
        for run in (Path("runs/mebt/version_0"), mebt_run)
    )
    assert differences(one["state_dict"], other["state_dict"]) == []
    assert differences(one["optimizer_states"], other["optimizer_states"]) == []


def test_a_full_disk_ends_the_run_with_one_message_and_older_checkpoints_stay(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    calls = iter(range(100))

    def full(file: int) -> None:
        if next(calls) == 1:  # the second checkpoint
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match=r"step=4\.ckpt \(No space left on device\)\. Checkpoints that were"):
        main(["fit", "--config=mebt.yaml"])
    folder = Path("runs/mebt/version_0/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "manifest.json", "step=2.ckpt"]
    assert newest_checkpoint(folder.parent) == (folder / "step=2.ckpt").resolve()


def test_a_folder_that_cannot_be_written_to_is_one_message(tiny: Path) -> None:
    Path("runs").write_text("a file where the folder should be: no permission looks alike, but not to root")
    with pytest.raises(OSError, match=r"Nothing can be written to runs/mebt/version_0 .*--run_root"):
        main(["fit", "--config=mebt.yaml"])


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mebt/version_0"
    with claimed(folder):
        child = os.fork()
        if child == 0:
            try:
                with claimed(folder):
                    os._exit(1)
            except ValueError as error:
                told = f"is in use by process {os.getppid()} on" in str(error) and "--resume never" in str(error)
                os._exit(0 if told else 2)
        assert os.waitpid(child, 0)[1] == 0
    with claimed(folder):  # free again
        pass


def test_a_resumed_run_says_that_its_tokenizer_is_missing_or_another(run_folder: Path, world: Path) -> None:
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(FileNotFoundError, match=r"No tokenizer at nowhere \(--model\.tokenizer"):
        main(["fit", "--config=mebt.yaml", "--resume=must", "--model.tokenizer=nowhere"])
    with pytest.raises(ValueError, match=r"was trained on tokenizer .* Give the one it was trained on"):
        main(
            [
                *("fit", "--config=mebt.yaml", "--resume=must", f"--model.tokenizer={world / 'exported'}"),
                "--trainer.max_steps=7",
            ]
        )
    assert {path for path in run_folder.glob("checkpoints/*")} <= set(before)
    assert json.loads((run_folder / "checkpoints/manifest.json").read_text()).keys() == {
        f"step={n}.ckpt" for n in (2, 4, 6)
    }
