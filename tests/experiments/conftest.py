"""One run of each tiny experiment that all tests may read, and a working directory to make more."""

from pathlib import Path

import pytest
from tiny_experiments import make_bundle, write_tiny_experiments

from experiments.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer.yaml` and `mebt.yaml`, their runs below `runs`, and two bundles. Read only.

    `exported` is the tokenizer of the run. The prior uses `tokenizer`, whose codes are all in use: six steps teach the
    other one two or three.
    """
    folder = tmp_path_factory.mktemp("world")
    make_bundle(folder / "tokenizer")
    write_tiny_experiments(folder, folder / "tokenizer")
    for experiment in ("tokenizer", "mebt"):
        main(["fit", f"--config={folder / experiment}.yaml", f"--run_root={folder / 'runs'}"])
    main(["export", str(folder / "runs/tokenizer/version_0/checkpoints/last.ckpt"), str(folder / "exported")])
    return folder


@pytest.fixture(scope="session")
def tokenizer_run(world: Path) -> Path:
    return world / "runs/tokenizer/version_0"


@pytest.fixture(scope="session")
def mebt_run(world: Path) -> Path:
    return world / "runs/mebt/version_0"


@pytest.fixture
def tiny(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with `tokenizer.yaml` and `mebt.yaml`, the latter with a trained tokenizer."""
    write_tiny_experiments(tmp_path, world / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path
