"""The section `fvd` of the command line, with the random I3D that works offline."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

import callbacks.fvd
from experiments.lightning_cli import run
from models.metrics import Detector, random_i3d

QUICK = ["--fvd.every_n_steps=2", "--fvd.num_samples=3", "--fvd.final_samples=0", "--trainer.max_steps=2"]


@pytest.mark.parametrize(
    ("experiment", "name", "real"),
    [("tokenizer", "reconstruction_frechet_random_i3d", "3"), ("mebt", "frechet_random_i3d", "4")],
)
def test_both_stages_are_measured_against_the_shapes(tiny: Path, experiment: str, name: str, real: str) -> None:
    cli = run(["fit", f"--config={experiment}.yaml", *QUICK])
    with (tiny / f"runs/{experiment}/version_0/{name}_16f.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["step"], row["made"], row["real_clips"]) == ("2", "3", real)
    assert float(row[name]) > 0
    assert float(row["shapes_overall"]) < 0.99  # nothing has learned to draw in two steps
    assert f"metrics/{name}_16f_3" in cli.trainer.callback_metrics
    assert len(list((tiny / "runs/real_features").glob("random_i3d-*.safetensors"))) == 1


def test_validation_of_a_tokenizer_says_its_rfvd_where_a_detector_is_given(
    tiny: Path, tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config=tokenizer.yaml", f"--ckpt_path={tokenizer_run / 'checkpoints/last.ckpt'}"]
    card = replace(random_i3d().card, published={"reconstruction_frechet": "rfvd"})
    detector = Detector(random_i3d().network, card)
    monkeypatch.setattr(callbacks.fvd, "load_i3d", lambda file, profile: detector)
    cli = run(["validate", *words, "--fvd.weights=i3d.pt", "--fvd.num_samples=3"])
    assert float(cli.trainer.callback_metrics["metrics/rfvd_16f_3"]) > 0
    assert {"val/psnr", "metrics/shapes_overall"} <= cli.trainer.callback_metrics.keys()
    assert not list(tiny.glob("*.csv"))


def test_codes_are_measured_against_the_pixels_of_another_data_module(tiny: Path) -> None:
    run(["tokenize", "--config=mebt.yaml", "--out=codes"])
    cached = ["--config=mebt.yaml", "--data=TokenDataModule", "--data.root=codes", *QUICK]
    with pytest.raises(ValueError, match=r"TokenDataModule hold no pixels.*--fvd\.data"):
        run(["fit", *cached])
    pixels = ["--fvd.data=MovingShapesDataModule", "--fvd.data.resolution=32", "--fvd.data.num_val=4"]
    cli = run(["fit", *cached, *pixels])
    assert "metrics/frechet_random_i3d_16f_3" in cli.trainer.callback_metrics
