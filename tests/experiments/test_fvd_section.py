"""The section `fvd` of the command line, with the random I3D that works offline."""

import csv
from pathlib import Path

import pytest

from experiments.lightning_cli import run

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


def test_codes_are_measured_against_the_pixels_of_another_data_module(tiny: Path) -> None:
    run(["tokenize", "--config=mebt.yaml", "--out=codes"])
    cached = ["--config=mebt.yaml", "--data=TokenDataModule", "--data.root=codes", *QUICK]
    with pytest.raises(ValueError, match=r"TokenDataModule hold no pixels.*--fvd\.data"):
        run(["fit", *cached])
    pixels = ["--fvd.data=MovingShapesDataModule", "--fvd.data.resolution=32", "--fvd.data.num_val=4"]
    cli = run(["fit", *cached, *pixels])
    assert "metrics/frechet_random_i3d_16f_3" in cli.trainer.callback_metrics
