"""How a prior finds its tokenizer: bundles, checkpoints, and what is refused before any data is loaded."""

import json
from pathlib import Path

import pytest
import torch
from tiny_experiments import make_bundle

from datamodules import MovingShapesDataModule
from datamodules.shapes import MovingShapes
from experiments.cli import main
from experiments.lightning_cli import run
from models.weights import load_tokenizer, state_digest


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("data was loaded")

    monkeypatch.setattr(MovingShapesDataModule, "make_dataset", refuse)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("command", ["fit", "validate", "sample", "tokenize"])
def test_missing_tokenizer_stops_every_command_and_names_those_that_make_one(
    tiny: Path, mebt_run: Path, command: str
) -> None:
    extra = {"fit": [], "tokenize": ["--out=codes"]}.get(command, [f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"])
    with pytest.raises(FileNotFoundError) as error:
        main([command, "--config=mebt.yaml", "--model.tokenizer=nowhere", *extra])
    assert "No tokenizer at nowhere (--model.tokenizer, TOKENIZER= in make)" in str(error.value)
    assert "make train EXP=" in str(error.value)
    assert "longtake export runs/<experiment>/version_0/checkpoints/last.ckpt nowhere" in str(error.value)
    assert sorted(path.name for path in tiny.iterdir()) == ["mebt.yaml", "tokenizer.yaml"]


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"quantizer": {"codebook_size": 32}}, r"downsample=\(4, 8, 8\) and codebook_size=32"),
        (
            {"encoder": {"downsample": [2, 8, 8]}, "decoder": {"downsample": [2, 8, 8]}},
            r"downsample=\(2, 8, 8\) and codebook_size=16",
        ),
    ],
)
def test_tokenizer_of_another_geometry_is_refused(tiny: Path, changes: dict[str, dict], theirs: str) -> None:
    make_bundle(tiny / "other", **changes)
    with pytest.raises(ValueError, match=rf"The tokenizer at other has {theirs}, the model expects \(4, 8, 8\) and 16"):
        main(["fit", "--config=mebt.yaml", "--model.tokenizer=other"])


@pytest.mark.parametrize("command", ["validate", "sample"])
def test_checkpoint_is_refused_with_another_tokenizer_of_the_same_geometry(
    tiny: Path, mebt_run: Path, command: str, world: Path
) -> None:
    own, other = (state_digest(load_tokenizer(world / name).state_dict())[:12] for name in ("tokenizer", "exported"))
    words = [f"--model.tokenizer={world / 'exported'}", f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"]
    with pytest.raises(ValueError, match=rf"trained on tokenizer {own}, but .*exported is {other}.*--model.tokenizer"):
        main([command, "--config=mebt.yaml", *words])
    assert not list(tiny.glob("**/*.mp4"))


def test_resuming_with_another_tokenizer_is_refused(tiny: Path, mebt_run: Path, world: Path) -> None:
    words = [f"--model.tokenizer={world / 'exported'}", f"--ckpt_path={mebt_run / 'checkpoints/step=2.ckpt'}"]
    with pytest.raises(ValueError, match="The checkpoint was trained on tokenizer"):
        main(["fit", "--config=mebt.yaml", *words])


def test_bundle_and_the_checkpoint_it_was_made_from_are_one_tokenizer(
    tiny: Path, world: Path, tokenizer_run: Path
) -> None:
    words = ["--config=mebt.yaml", "--trainer.max_steps=1", "--checkpoint.every_n_train_steps=1"]
    main(["fit", *words, f"--model.tokenizer={world / 'exported'}"])
    checkpoint = "--ckpt_path=runs/mebt/version_0/checkpoints/last.ckpt"
    tokenizer = f"--model.tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}"
    assert run(["validate", "--config=mebt.yaml", checkpoint, tokenizer]).trainer.callback_metrics["val/loss"] > 0


def test_export_makes_a_bundle_that_equals_its_checkpoint(world: Path, tokenizer_run: Path) -> None:
    paths = (world / "exported", tokenizer_run / "checkpoints/last.ckpt")
    bundle, checkpoint = (load_tokenizer(path) for path in paths)
    video = torch.stack([MovingShapes("train", 4, 16, resolution=32).render(index) for index in range(4)])
    encoded = bundle.encode(video)
    assert len(encoded.codes.unique()) > 1
    assert torch.equal(encoded.codes, checkpoint.encode(video).codes)
    assert torch.equal(bundle.decode(encoded.latents), checkpoint.decode(encoded.latents))
    assert not bundle.training
    assert not any(parameter.requires_grad for parameter in bundle.parameters())


def test_bundle_says_where_its_weights_come_from(world: Path, tokenizer_run: Path) -> None:
    provenance = json.loads((world / "exported/provenance.json").read_text())
    newest = (tokenizer_run / "checkpoints/last.ckpt").resolve().name
    assert newest == "step=6.ckpt"
    assert (provenance["step"], provenance["weights"], provenance["bundle_version"]) == (6, "averaged weights", 1)
    assert provenance["digest"] == state_digest(load_tokenizer(world / "exported").state_dict())


def test_export_says_what_it_made(tiny: Path, tokenizer_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(tokenizer_run / "checkpoints/step=2.ckpt"), "weights/mine"])
    count = sum(parameter.numel() for parameter in load_tokenizer("weights/mine").parameters())
    assert capsys.readouterr().out == f"weights/mine: averaged weights of step 2, {count:,} parameters\n"


def test_export_refuses_to_overwrite(tiny: Path, tokenizer_run: Path) -> None:
    (tiny / "mine").mkdir()
    (tiny / "mine/notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="mine exists already"):
        main(["export", str(tokenizer_run / "checkpoints/last.ckpt"), "mine"])
    assert [path.name for path in (tiny / "mine").iterdir()] == ["notes.txt"]


def test_export_of_nothing_is_refused(tiny: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at runs/nothing\.ckpt"):
        main(["export", "runs/nothing.ckpt", "mine"])
