"""The command line: commands, inheritance between experiment files, and errors that say what to do."""

import contextlib
import io
import json
import logging
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_experiments import write_experiment
from torch._utils import ExceptionWrapper

import experiments.cli
from datamodules.decoding import UnreadableVideoError
from experiments.cli import LIGHTNING_COMMANDS, SMALL_COMMANDS, console, main
from experiments.lightning_cli import run


def resolved(*words: str) -> dict[str, Any]:
    """The configuration that `longtake fit WORDS` would run with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", *words, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())


# Commands


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    for command in (*LIGHTNING_COMMANDS, *SMALL_COMMANDS):
        assert f"  {command} " in out


def test_no_command_is_a_call_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.startswith("usage: longtake COMMAND")


def test_unknown_command_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["trian"])
    assert "no command 'trian'" in str(exit_info.value.code)
    assert "  fit " in str(exit_info.value.code)


def test_arguments_of_the_process_are_taken_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["longtake", "--help"])
    main()
    assert "usage: longtake COMMAND" in capsys.readouterr().out


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun -m experiments.cli fit` does what `longtake fit` does."""
    monkeypatch.setattr(sys, "argv", ["cli.py", "fitt"])
    with (
        pytest.raises(SystemExit, match="there is no command 'fitt'"),
        pytest.warns(RuntimeWarning, match="sys.modules"),
    ):
        runpy.run_module("experiments.cli", run_name="__main__")


def test_help_of_a_model_says_what_its_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--model.help=MeBTModule"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Latent bottleneck tokens." in out
    assert "Path of the frozen tokenizer" in out


# Errors of the console command


def run_console(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the console command says when it stops."""
    monkeypatch.setattr(sys, "argv", ["longtake", *words])
    with pytest.raises(SystemExit) as exit_info:
        console()
    return str(exit_info.value.code)


def test_console_says_our_errors_in_one_message(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = run_console(monkeypatch, "fit", "--config=nowhere.yaml")
    assert message.startswith(f"longtake: error: No experiment file {tiny / 'nowhere.yaml'}.")
    assert "--debug shows where" in message


def test_console_shows_the_traceback_when_asked_to(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["longtake", "fit", "--config=nowhere.yaml", "--debug"])
    with pytest.raises(FileNotFoundError):
        console()


def test_console_keeps_the_traceback_of_errors_that_are_no_message_for_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parse_a_config(args: list[str]) -> None:
        json.loads("{")  # raised inside the standard library: a ValueError too

    monkeypatch.setattr(experiments.cli, "main", parse_a_config)
    with pytest.raises(json.JSONDecodeError):
        console()


def test_console_says_in_one_message_what_stopped_a_worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_as_a_loader_does(args: list[str]) -> None:
        try:
            raise UnreadableVideoError("toys: 2 of 3 videos cannot be read:\n  a.avi: broken")
        except UnreadableVideoError:
            error = ExceptionWrapper(where="in DataLoader worker process 0")
        error.reraise()  # inside torch, with the worker's traceback as its message

    monkeypatch.setattr(experiments.cli, "main", fail_as_a_loader_does)
    message = run_console(monkeypatch, "fit")
    assert message.startswith("longtake: error: toys: 2 of 3 videos cannot be read:\n  a.avi: broken\n(--debug")


# Experiment files


def test_a_file_holds_only_what_differs_from_its_base(tiny: Path) -> None:
    write_experiment(tiny / "child.yaml", base="mebt.yaml", model={"init_args": {"lr": 0.25}})
    child, parent = resolved("--config=child.yaml"), resolved("--config=mebt.yaml")
    assert child["model"]["init_args"].pop("lr") == 0.25
    assert parent["model"]["init_args"].pop("lr") == 1e-3
    assert (child.pop("run_name"), parent.pop("run_name")) == ("child", "mebt")
    assert (child.pop("base"), parent.pop("base")) == ("mebt.yaml", None)
    assert child == parent


def test_bases_are_found_relative_to_the_file_that_names_them(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny / "deep/deeper").mkdir(parents=True)
    (tiny / "elsewhere").mkdir()
    write_experiment(tiny / "deep/middle.yaml", base="../mebt.yaml", trainer={"max_steps": 11, "log_every_n_steps": 12})
    write_experiment(tiny / "deep/deeper/child.yaml", base="../middle.yaml", trainer={"log_every_n_steps": 13})
    monkeypatch.chdir(tiny / "elsewhere")
    config = resolved("--config=../deep/deeper/child.yaml")
    assert config["trainer"]["max_steps"] == 11
    assert config["trainer"]["log_every_n_steps"] == 13
    assert config["model"]["init_args"]["dim"] == 16


def test_several_bases_are_read_in_their_order(tiny: Path) -> None:
    write_experiment(tiny / "first.yaml", trainer={"max_steps": 11, "log_every_n_steps": 12})
    write_experiment(tiny / "second.yaml", trainer={"max_steps": 21})
    write_experiment(tiny / "child.yaml", base=["mebt.yaml", "first.yaml", "second.yaml"])
    trainer = resolved("--config=child.yaml")["trainer"]
    assert (trainer["max_steps"], trainer["log_every_n_steps"]) == (21, 12)


def test_a_circle_of_bases_is_reported_with_its_members(tiny: Path) -> None:
    write_experiment(tiny / "a.yaml", base="b.yaml")
    write_experiment(tiny / "b.yaml", base="a.yaml")
    with pytest.raises(ValueError, match=r"in a circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        main(["fit", "--config=a.yaml"])


def test_a_missing_base_is_named_with_the_file_that_asks_for_it(tiny: Path) -> None:
    write_experiment(tiny / "child.yaml", base="parent.yaml")
    with pytest.raises(FileNotFoundError, match=r"No experiment file .*parent\.yaml \(the base of .*child\.yaml\)"):
        main(["fit", "--config=child.yaml"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "holds no experiment: expected keys"), ("model: [\n", "is no YAML: (?s:.*)line 2")],
)
def test_a_file_that_is_no_experiment_is_named(tiny: Path, content: str, message: str) -> None:
    (tiny / "broken.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"broken\.yaml {message}"):
        main(["fit", "--config=broken.yaml"])


def test_later_files_and_flags_win(tiny: Path) -> None:
    write_experiment(tiny / "later.yaml", trainer={"max_steps": 11}, model={"init_args": {"lr": 0.25, "dim": 32}})
    config = resolved("--config=mebt.yaml", "--config=later.yaml", "--model.lr=0.5")
    assert config["trainer"]["max_steps"] == 11
    assert (config["model"]["init_args"]["dim"], config["model"]["init_args"]["lr"]) == (32, 0.5)
    assert config["run_name"] == "mebt"  # the first file is the experiment


@pytest.mark.parametrize("flag", ["--config", "-c"])
def test_a_base_is_read_however_the_file_is_given(tiny: Path, flag: str) -> None:
    write_experiment(tiny / "child.yaml", base="mebt.yaml", trainer={"max_steps": 11})
    config = resolved(flag, "child.yaml")
    assert config["trainer"]["max_steps"] == 11
    assert config["model"]["init_args"]["dim"] == 16


def test_option_and_value_may_be_two_words(tiny: Path) -> None:
    config = resolved("--config", "mebt.yaml", "--model.lr", "0.5", "--run_name", "mine")
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["run_name"] == "mine"


# Linked keys


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--model.num_frames", "--data.num_frames"),
        ("--model.init_args.num_frames", "--data.num_frames"),
        ("--model.resolution", "--data.resolution"),
        ("--model.init_args.resolution", "--data.resolution"),
        ("--model.seed", "--seed_everything"),
        ("--model.init_args.seed", "--seed_everything"),
        ("--data.seed", "--seed_everything"),
        ("--data.init_args.seed", "--seed_everything"),
    ],
)
@pytest.mark.parametrize("separator", ["=", " "])
def test_flag_for_a_key_that_follows_another_is_refused(tiny: Path, option: str, instead: str, separator: str) -> None:
    words = f"{option}{separator}32".split()
    with pytest.raises(ValueError, match=f"{option} follows {instead} and cannot be given by itself. Give {instead}"):
        main(["fit", "--config=mebt.yaml", *words])


@pytest.mark.parametrize(
    ("section", "key", "instead"),
    [
        ("model", "num_frames", "--data.num_frames"),
        ("model", "resolution", "--data.resolution"),
        ("model", "seed", "--seed_everything"),
        ("data", "seed", "--seed_everything"),
    ],
)
@pytest.mark.parametrize("is_short", [True, False])
def test_key_that_follows_another_is_refused_in_a_file(
    tiny: Path, section: str, key: str, instead: str, is_short: bool
) -> None:
    values = {key: 32} if is_short else {"init_args": {key: 32}}
    write_experiment(tiny / "parent.yaml", base="mebt.yaml", **{section: values})
    write_experiment(tiny / "child.yaml", base="parent.yaml")
    with pytest.raises(ValueError, match=rf"parent\.yaml sets {section}: {key}, which follows {instead}"):
        main(["fit", "--config=child.yaml"])


def test_source_of_a_link_reaches_all_that_follow_it(tiny: Path) -> None:
    words = ["--data.num_frames=8", "--data.resolution=40", "--seed_everything=7", "--trainer.max_steps=1"]
    cli = run(["fit", "--config=mebt.yaml", *words])
    assert (cli.model.num_frames, cli.model.latent_shape, cli.model.seed) == (8, (2, 5, 5), 7)
    assert (cli.datamodule.num_frames, cli.datamodule.resolution, cli.datamodule.seed) == (8, 40, 7)


# Typing errors


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--model.lrr=3", "'lrr' is not accepted"),
        ("--model.lr=much", '"lr".*Expected a .*float.*much'),
        ("--model.blocks=[latent]", '"blocks".*latent_enc.*latent'),
        ("--model.sampling.num_stepz=3", "sampling.num_stepz"),
        ("--model=MeBT", "MeBT"),
        ("--data.batchsize=3", "'batchsize' is not accepted"),
        ("--data.batch_size=few", '"batch_size".*Expected a .*int.*few'),
        ("--trainer.max_stepz=3", "--trainer.max_stepz"),
        ("--trainer.max_steps=few", '"trainer.max_steps".*Expected a .*int.*few'),
        ("--curriculum.schedule=fast", '"curriculum.schedule".*longest.*fast'),
        ("--curiculum.schedule=linear", "--curiculum.schedule"),
    ],
)
def test_wrong_flag_ends_in_one_message_that_names_it(
    tiny: Path, word: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config=mebt.yaml", word])
    error = capsys.readouterr().err
    assert_moderate_and_naming(error, named)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"init_args": {"lrr": 3}}}, "'lrr' is not accepted"),
        ({"model": {"init_args": {"lr": "much"}}}, '"lr".*Expected a .*float.*much'),
        ({"modell": {"init_args": {"lr": 3}}}, "modell"),
        ({"data": {"init_args": {"batchsize": 3}}}, "'batchsize' is not accepted"),
        ({"trainer": {"max_stepz": 3}}, "trainer.max_stepz"),
        ({"curriculum": {"schedul": "linear"}}, "curriculum.schedul"),
    ],
)
def test_wrong_key_in_a_file_ends_in_one_message_that_names_it(
    tiny: Path, sections: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tiny / "child.yaml", base="mebt.yaml", **sections)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config=child.yaml"])
    assert_moderate_and_naming(capsys.readouterr().err, named)


def assert_moderate_and_naming(error: str, named: str) -> None:
    assert len(error) < 1000  # the usage alone would be six times that
    assert error.count("error:") == 1
    assert re.search(named, " ".join(error.split()))


def test_missing_model_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit"])
    assert "fit.model" in capsys.readouterr().err


# Quiet


def test_a_run_warns_of_nothing_and_advertises_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sys, "argv", ["longtake", "fit", "--config=mebt.yaml"])  # as a process of its own has it
    with caplog.at_level(logging.INFO):
        main(["fit", "--config=mebt.yaml", "--trainer.max_steps=1"])
    assert not [str(warning.message) for warning in recwarn]
    assert "litlogger" not in caplog.text
    assert "max_steps=1" in caplog.text  # the log was there to be read
