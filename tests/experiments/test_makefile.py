"""The Makefile: targets that print themselves, and words that help when one is wrong."""

import shutil
import subprocess

import pytest

from experiments.cli import ROOT

# the virtual environment counts as installed, whatever its files' dates say: a test installs nothing
MAKE = ["make", "--no-print-directory", "--old-file=.venv/.installed"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAKE, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_make_alone_lists_targets_and_experiments() -> None:
    out = make().stdout
    assert out == make("help").stdout
    for target in ("setup", "demo", "test", "train", "sample", "tokenize", "tensorboard", "check"):
        assert f"  make {target} " in out
    for file in (ROOT / "experiments").glob("*.yaml"):
        assert file.stem in out.split("Experiments: ")[1].split()


@pytest.mark.parametrize("target", ["train", "sample", "tokenize"])
def test_unknown_experiment_is_named_and_the_known_ones_are_listed(target: str) -> None:
    result = make(target, "EXP=nope")
    assert result.returncode != 0
    assert "There is no experiment 'nope'. EXP= one of:" in result.stdout
    assert "mebt_128f " in result.stdout


def test_train_prints_the_command_that_it_runs() -> None:
    out = make("--dry-run", "train", "EXP=mebt_16f", "TOKENIZER=weights/mine", "ARGS=--trainer.max_steps=3").stdout
    expected = "longtake fit --config experiments/mebt_16f.yaml --model.tokenizer=weights/mine --trainer.max_steps=3"
    assert out.splitlines()[-1].endswith(expected)


def test_train_goes_on_with_a_run() -> None:
    out = make("--dry-run", "train", "RESUME=runs/mebt_16f/version_3").stdout
    assert out.splitlines()[-1].endswith("longtake fit --resume runs/mebt_16f/version_3 ")


def test_evaluate_compare_and_report_print_their_commands() -> None:
    words = (
        "--dry-run",
        "evaluate",
        "EXP=mebt_16f",
        "CKPT=here.ckpt",
        "PROTOCOL=ucf101_mebt_16f",
        "ARGS=--batch_size=2",
    )
    expected = (
        "longtake evaluate --config experiments/mebt_16f.yaml --ckpt_path here.ckpt --protocol ucf101_mebt_16f "
        "--batch_size=2"
    )
    assert " ".join(make(*words).stdout.split()).endswith(expected)
    for command, variable in (("compare", "RUNS"), ("report", "RUN")):
        out = make("--dry-run", command, f"{variable}=a b").stdout
        assert out.splitlines()[-1].split()[1:] == [command, "a", "b"]
        assert f"{variable}= folders" in make(command).stdout


def test_sample_asks_for_a_checkpoint_that_exists() -> None:
    result = make("sample", "EXP=mebt_16f", "CKPT=nowhere.ckpt")
    assert result.returncode != 0
    assert "CKPT='nowhere.ckpt' is no file" in result.stdout


def test_import_weights_asks_for_a_file_and_prints_its_command() -> None:
    result = make("import-weights", "SOURCE=nowhere.ckpt", "DEST=weights/mine")
    assert result.returncode != 0
    assert "SOURCE='nowhere.ckpt' is no file" in result.stdout
    words = ["SOURCE=a.ckpt", "DEST=weights/mine", "ARGS=--downsample 4 8 8"]
    out = make("--dry-run", "import-weights", *words).stdout
    assert out.splitlines()[-1].endswith("longtake import-weights a.ckpt weights/mine --downsample 4 8 8")
