"""Two processes train as one with twice the batch, and a run that is killed goes on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import read_ledger
from tiny_experiments import write_tiny_experiments

from experiments.cli import main
from experiments.lightning_cli import run

HERE = Path(__file__).parent
TIME_LIMIT = 150
TWO_PROCESSES = ["--trainer.devices=2", "--data.batch_size=1", "--trainer.strategy=ddp_find_unused_parameters_true"]

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, which ends with the block at the latest."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def two_processes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have trained the tokenizer and the prior, and sampled from it."""
    folder = tmp_path_factory.mktemp("two_processes")
    write_tiny_experiments(folder, world / "tokenizer")
    commands = [
        ["fit", "--config=tokenizer.yaml", *TWO_PROCESSES],
        ["fit", "--config=mebt.yaml", *TWO_PROCESSES, "--trainer.strategy=ddp"],
        [
            *("sample", "--config=mebt.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", "--out=samples"),
            *("--ckpt_path=runs/mebt/version_0/checkpoints/last.ckpt", "--num_samples=3", "--batch_size=1"),
        ],
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    with started([sys.executable, str(HERE / "commands.py"), "commands.json"], folder) as process:
        try:
            code = process.wait(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            code = None
    assert code == 0, (folder / "output.txt").read_text()
    return folder


def ends(folder: Path, experiment: str, ranks: int) -> list[dict[str, Any]]:
    run_folder = folder / f"runs/{experiment}/version_0"
    return [torch.load(run_folder / f"end.{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("experiment", ["tokenizer", "mebt"])
def test_two_processes_end_with_the_same_weights(two_processes: Path, experiment: str) -> None:
    first, second = (end["state"] for end in ends(two_processes, experiment, 2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("experiment", ["tokenizer", "mebt"])
def test_two_processes_train_as_one_with_twice_the_batch(two_processes: Path, world: Path, experiment: str) -> None:
    single = world / f"runs/{experiment}/version_0"
    ledgers = [read_ledger(two_processes / f"runs/{experiment}/version_0", rank) for rank in range(2)]
    for first, second, both in zip(*ledgers, read_ledger(single), strict=True):
        assert first[1] + second[1] == both[1]  # clips
        assert first[2:] == second[2:] == both[2:]  # windows
    (two, _), (one,) = ends(two_processes, experiment, 2), ends(world, experiment, 1)
    start = torch.load(single / "checkpoints/step=2.ckpt", weights_only=True)["state_dict"]
    for name, tensor in one["state"].items():
        moved = (tensor - start[name]).double().abs().max() if tensor.is_floating_point() else 0
        difference = (tensor.double() - two["state"][name].double()).abs().max()
        print(name, float(moved), float(difference))
    for name in ("val/loss",):
        print(one["metrics"][name], two["metrics"][name])
    assert 0


def test_two_processes_share_the_seeds_out(two_processes: Path, tiny: Path) -> None:
    made = json.loads((two_processes / "samples/samples.json").read_text())
    assert made["seeds"] == [0, 1, 2]
    assert sorted(path.name for path in (two_processes / "samples").glob("seed=*")) == [
        f"seed={seed:06d}.mp4" for seed in range(3)
    ]
