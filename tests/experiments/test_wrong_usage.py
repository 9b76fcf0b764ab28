"""What the console command says to whoever types something wrong: what, where, and what to do, and no traceback."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from five_experiments import write_five_experiments

from experiments.cli import SMALL_COMMANDS, console, main
from experiments.lightning_cli import LongtakeParser

Said = tuple[int, str]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experiments of all modules with their tokenizers, `discrete` and `continuous`. Read only."""
    folder = tmp_path_factory.mktemp("five")
    write_five_experiments(folder)
    return folder


@pytest.fixture
def said(
    world: Path, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Said]:
    """Types a command into the console, in an empty folder; returns the exit status and what stands on the terminal.

    `{five}` is the folder of all experiments, `{runs}` that of two runs.
    """
    for name in ("UCF101", "BAIR", "FRAMES"):
        monkeypatch.delenv(f"LONGTAKE_{name}", raising=False)
    monkeypatch.chdir(tmp_path)

    def type_in(line: str) -> Said:
        with pytest.raises(SystemExit) as stopped:
            console(line.format(five=five, runs=world / "runs").split())
        code = stopped.value.code
        error = capsys.readouterr().err
        return (code, error) if isinstance(code, int) else (1, f"{error}{code}")

    return type_in


CKPT = "{runs}/mebt/version_0/checkpoints/last.ckpt"
FIT = "fit --config={five}/mebt.yaml"
SAMPLE = (
    f"sample --config={{five}}/mebt.yaml --model.tokenizer={{runs}}/../tokenizer --ckpt_path={CKPT} --num_samples=1"
)
EVALUATE = f"evaluate --config={{five}}/mebt.yaml --model.tokenizer={{runs}}/../tokenizer --ckpt_path={CKPT}"

WRONG = [
    # Commands and files
    ("fitt", r"no command 'fitt'\. Did you mean fit\?"),
    ("fit", r"fit\.model. An experiment has them: --config experiments/<name>\.yaml"),
    ("fit --config", r"--config: expected one argument"),
    ("fit --config={five}/mbet.yaml", r"No experiment file .*mbet\.yaml\. Did you mean mebt\.yaml\?"),
    ("fit --config={five}/discrete/model.safetensors", r"model\.safetensors (is no YAML|holds no experiment)"),
    # Names and types of options
    (
        f"{FIT} --model.codebok_size=3",
        r"'codebok_size' is not accepted\. Did you mean codebook_size\?.*--model\.help=MeBT",
    ),
    (f"{FIT} --modle.lr=3", r"unrecognized arguments: --modle\.lr=3\. Did you mean model\?"),
    (f"{FIT} --trainer.max_stepz=3", r"--trainer\.max_stepz=3\. Did you mean trainer\.max_steps\?"),
    (f"{FIT} --checkpoint.every_n_train_steps=often", r'"checkpoint\.every_n_train_steps": Expected a int.*often'),
    (f"{FIT} --trainer.precision=fp8", r'"trainer\.precision": .*bf16-mixed.*Given: fp8'),
    (
        f"{FIT} --health.on_bad_step=wait",
        r"\"health\.on_bad_step\": Expected a Literal\['warn', 'skip'\]. Got value: wait",
    ),
    (f"{FIT} --model=TATS", r"TATS"),
    ("fit --config={five}/commit.yaml --model.tasks=[juggling]", r'"tasks": Expected .*frame_prediction.*juggling'),
    # Numbers
    (f"{FIT} --trainer.max_steps=-5", r"max_steps.*-5"),
    (f"{FIT} --data.batch_size=0", r"error: batch_size=0 is too small: at least 1 \(--data\.batch_size\)"),
    (f"{FIT} --data.num_frames=0", r"error: num_frames=0 is too small: at least 1 \(--data\.num_frames\)"),
    (
        f"{FIT} --data.num_frames=3",
        r"error: num_frames=3 is no multiple .* factor 4\. Nearest: 4 \(--data\.num_frames\)",
    ),
    (f"{FIT} --data.resolution=30", r"error: resolution=30 is no multiple .*Nearest: 24 or 32 \(--data\.resolution\)"),
    (f"{FIT} --data.num_workers=-1", r"error: num_workers=-1 is too small: at least 0 \(--data\.num_workers\)"),
    (f"{FIT} --data.num_train=1", r"has 1 clips, fewer than one global batch.*--data\.batch_size"),
    (f"{FIT} --model.lr=-1", r"--model\.lr=-1 is too small: at least 0"),
    (f"{FIT} --model.dim=0", r"--model\.dim=0 is too small: at least 1"),
    (f"{FIT} --model.num_heads=3", r"num_heads=3 does not divide dim=16\..*\(--model\.num_heads\)"),
    (f"{FIT} --trainer.val_check_interval=0", r"--trainer\.val_check_interval=0 is too small"),
    (f"{FIT} --checkpoint.every_n_train_steps=-5", r"--checkpoint\.every_n_train_steps=-5 is too small: at least 0"),
    (f"{FIT} --ema.decay=2", r"decay=2\.0 must be 0 .* between 0 and 1 \(--ema\.decay\)"),
    (f"{FIT} --model.sampling.num_steps=0", r"num_steps=0 must be at least 1 \(--model\.sampling\.num_steps\)"),
    ("fit --config={five}/walt.yaml --data.num_frames=10", r"takes 1 \+ 4k frames\. Nearest: 9 or 13 \(--data\.num"),
    ("fit --config={five}/tokenizer.yaml --data.num_frames=6", r"takes multiples of 4\. Nearest: 4 or 8 \(--data\.num"),
    # The machine
    pytest.param(
        f"{FIT} --trainer.accelerator=gpu",
        r"accelerator=gpu: torch \S+ finds no GPU on this machine.*--trainer\.accelerator=auto",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
    (f"{FIT} --trainer.accelerator=gpuu", r"'gpuu'.*Available names are.*--trainer"),
    (f"{FIT} --trainer.strategy=ddpp", r"'ddpp'.*ddp.*--trainer"),
    # Tokenizers
    (
        f"{FIT} --model.tokenizer=nowhere",
        r"No tokenizer at nowhere \(--model\.tokenizer.*make train EXP=.*longtake export",
    ),
    (f"{FIT} --model.tokenizer={{runs}}", r"runs is no tokenizer bundle: it holds no config\.json"),
    (
        f"{FIT} --model.tokenizer={{five}}/mebt.yaml",
        r"mebt\.yaml is damaged, or no checkpoint: expected what torch\.save",
    ),
    (
        f"{FIT} --model.tokenizer={{five}}/continuous",
        r"codebook_size=None, the model expects .* 16 \(--model\.downsample",
    ),
    (
        "fit --config={five}/walt.yaml --model.tokenizer={five}/discrete",
        r"is not continuous: it has 16 codes.*--model\.tok",
    ),
    # Data
    (f"{FIT} --data=UCF101DataModule", r"UCF-101 has no folder: set --data\.root or LONGTAKE_UCF101"),
    (f"{FIT} --data=UCF101DataModule --data.root=nowhere", r"UCF-101: no folder nowhere \(--data\.root"),
    (
        f"{FIT} --data=BAIRDataModule --data.root={{five}}",
        r"BAIR: no traj_.*tfrecords in .*--data\.root or LONGTAKE_BAIR",
    ),
    (
        f"{FIT} --data=FramesDataModule --data.root=.",
        r"\(--data\.root\) has 0 videos for training.*expected at least one",
    ),
    (
        f"{FIT} --data=FrameCacheDataModule --data.root=nowhere",
        r"No frames at nowhere/cache\.json .*longtake cache-frames",
    ),
    (
        "fit --config={five}/tats.yaml --model.num_classes=3",
        r"Labels from \d to \d+ do not fit num_classes=3 \(--model\.num",
    ),
    (
        "fit --config={five}/walt.yaml --model.num_classes=3",
        r"Labels from \d to \d+ do not fit num_classes=3 \(--model\.num",
    ),
    # Runs and checkpoints
    (f"{FIT} --resume=nowhere", r"nowhere is no run to resume: expected config\.yaml and checkpoints.*--resume runs/"),
    (f"{FIT} --ckpt_path=nowhere.ckpt", r"No checkpoint at nowhere\.ckpt \(--ckpt_path takes a file; --resume RUN"),
    (f"{FIT} --ckpt_path={{five}}/mebt.yaml", r"mebt\.yaml is damaged, or no checkpoint"),
    ("validate --config={five}/mebt.yaml", r"`longtake validate` needs trained weights: --ckpt_path CHECKPOINT"),
    (f"{SAMPLE} --model.dim=32", r"arguments differ .*dim: 16 in the checkpoint, 32 given.*--resume RUN"),
    (
        "sample --bundle={five}/discrete",
        r"discrete is no bundle of a generator: it holds no experiment\.yaml.*longtake export",
    ),
    # Samples
    (f"{SAMPLE} --num_frames=-4", r"num_frames=-4 cannot be generated: .* multiples of 4 \(--num_frames\)"),
    (f"{SAMPLE} --label=cat", r'"label": Expected a int.*Given: cat'),
    (f"{SAMPLE} --out={{five}}/mebt.yaml", r"mebt\.yaml: File exists\. Give another place"),
    (f"{SAMPLE} --out=/proc/nothing", r"/proc/nothing: No such file or directory\. Give another place"),
    # Other commands
    (
        f"{EVALUATE} --protocol=ucf101",
        r"There is no protocol ucf101 \(--protocol\)\. Give a \.yaml file, or one of: .*ucf101_",
    ),
    (f"{EVALUATE} --protocol=ucf101_magvit", r"measures FVD and needs the weights of its detector \(--weights FILE\)"),
    ("tokenize --config={five}/mebt.yaml", r"Give the experiment of a generator, and --out FOLDER"),
    ("tokenize --config={five}/mebt.yaml --out=c --copies=0", r"copies=0, shard_items=1024: at least 1 of each"),
    ("tokenize --config={five}/walt.yaml --out=c", r"has no codes: keep its latents \(--latents bf16\)"),
    ("export nowhere.ckpt out", r"No checkpoint at nowhere\.ckpt"),
    ("export {runs}/tokenizer/version_0/checkpoints/last.ckpt {five}/discrete", r"discrete exists already\. Remove it"),
    (
        "export {runs}/tokenizer/version_0/checkpoints/last.ckpt {five}/mebt.yaml/out",
        r"mebt\.yaml: .*Give another place",
    ),
    ("compare nowhere", r"no results of an evaluation in nowhere: longtake evaluate makes them"),
    ("compare {five}/mebt.yaml", r"mebt\.yaml holds no results: expected a results\.json of longtake evaluate"),
    ("doctor --data UCF101DataModule --data.root=nowhere", r"UCF-101: no folder nowhere"),
    ("doctor --data UCF11DataModule", r"UCF11DataModule"),
    ("plan --config={five}/mebt.yaml --gpus=0", r"--gpus must be at least 1"),
    ("plan", r"give --config experiments/<name>\.yaml, or --all"),
    ("import-weights {five}/mebt.yaml out", r"mebt\.yaml is damaged, or no checkpoint"),
    (f"import-weights {CKPT} out", r"is no tokenizer of TATS"),
    (f"cascade {CKPT} {CKPT} --out c", r"is of a MeBTModule: a cascade is of checkpoints of W\.A\.L\.T"),
    (f"cascade {CKPT} --out c", r"give two checkpoints"),
    ("tasks --input nowhere.mp4", r"No video at nowhere\.mp4 \(--input\)"),
    (f"tasks --checkpoint {CKPT}", r"is of a MeBTModule, not of a COMMIT \(--checkpoint\)"),
    ("tasks --clip -1", r"--clip and --seed must be at least 0"),
    ("demo --out {five}", r"exists already\. Remove it, or choose another place \(--out\)"),
    ("cache-frames --config={five}/mebt.yaml --out c --jpeg 1000", r"jpeg=1000 is no quality: from 1 to 95 \(--jpeg\)"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_is_wrong_and_what_to_do_is_one_message(said: Callable[[str], Said], line: str, message: str) -> None:
    code, error = said(line)
    assert code in (1, 2)
    assert re.search(message, " ".join(error.split())), error
    assert "Traceback" not in error
    assert error.count("error:") == 1
    assert len(error) < 1500


def test_a_file_of_another_user_is_named(said: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that is read-only, or another's: root may write anywhere else."""

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, error = said(f"{FIT} --run_root=theirs")
    assert code == 1
    assert (
        "Nothing can be written to theirs/mebt/version_0 (Permission denied). Give another folder (--run_root)" in error
    )
    code, error = said("export {runs}/tokenizer/version_0/checkpoints/last.ckpt theirs/bundle")
    assert code == 1
    assert "theirs: Permission denied. Give another place" in error


def test_an_error_is_shown_where_it_was_raised_if_asked_for(five: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No tokenizer at nowhere"):
        console(["fit", f"--config={five / 'mebt.yaml'}", "--debug", "--model.tokenizer=nowhere"])


def test_evaluations_under_different_protocols_are_no_table(said: Callable[[str], Said], tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        protocol = {"name": name, "hash": name * 8}
        content = {"run": name, "protocol": protocol, "detectors": {}, "metrics": {}}
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    code, error = said("compare one other")
    assert code == 1
    assert re.search(r"(?s)different protocols.*one \(one.*other \(other.*Choose one \(--protocol\)", error)


# Help


class Stopped(Exception):
    """Carries the parser that was about to parse."""


@pytest.mark.parametrize("command", [*SMALL_COMMANDS, "doctor --detector=x"])
def test_help_of_every_option_says_what_happens_without_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default, or in words; a switch is off, and what is required has none."""

    def stop(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        raise Stopped(parser)

    if command == "demo":
        pytest.skip("one place and one switch")
    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Stopped) as stopped:
        main(command.split())
    parser = stopped.value.args[0]
    shown = " ".join(parser.format_help().split())
    for action in parser._actions[1:]:
        assert action.help, action.dest
        is_said = action.required or action.nargs == 0 or "by default" in action.help
        assert is_said or f"(default: {action.default})" in shown, action.dest


@pytest.mark.parametrize("command", ["fit", "validate", "sample", "evaluate", "tokenize"])
def test_every_option_of_ours_is_described(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and defaults are added by the parser itself; Lightning's own options are described by Lightning."""

    def stop(parser: LongtakeParser, *arguments: Any, **options: Any) -> None:
        raise Stopped(parser)

    monkeypatch.setattr(LongtakeParser, "parse_args", stop)
    with pytest.raises(Stopped) as stopped:
        main([command])
    parser = stopped.value.args[0]._subcommands_action.choices[command]
    silent = [action.dest for action in parser._actions if not action.help and not action.dest.startswith("trainer")]
    assert silent == []
