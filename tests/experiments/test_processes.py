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

import numpy as np
import pytest
import torch
from five_experiments import differences, write_five_experiments
from probes import read_ledger
from tiny_experiments import read_video, write_tiny_experiments

from experiments.cli import ROOT, main
from experiments.lightning_cli import run
from lightning_modules.load import load_generator

HERE = Path(__file__).parent
TIME_LIMIT = 300  # seconds; on two idle cores it takes a tenth
TWO_PROCESSES = ["--trainer.devices=2", "--data.batch_size=1", "--trainer.strategy=ddp_find_unused_parameters_true"]

# Beside the tokenizer and MeBT; without dropout, whose masks each process draws for itself.
OTHERS = {"tats": [], "commit": ["--model.dropout=0"], "walt": []}
EVALUATION = [
    *("--config=mebt.yaml", "--ckpt_path=runs/mebt/version_0/checkpoints/last.ckpt"),
    *("--protocol=tiny.yaml", "--out=evaluated"),
]
TINY_PROTOCOL = """
base: {shapes_16}
data: {{class_path: MovingShapesDataModule, init_args: {{num_frames: 16, resolution: 32, num_val: 4, seed: 42}}}}
samples: 4
repeats: 2
""".format(shapes_16=ROOT / "experiments/protocols/shapes_16.yaml")


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, which ends with the block at the latest."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
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
    """A folder in which two processes have kept codes, trained the tokenizer and the prior, and sampled from it."""
    folder = tmp_path_factory.mktemp("two_processes")
    write_tiny_experiments(folder, world / "tokenizer")
    write_five_experiments(folder / "five")
    others = [
        ["fit", f"--config=five/{name}.yaml", *TWO_PROCESSES, "--trainer.strategy=ddp", *OTHERS[name]]
        for name in OTHERS
    ]
    sharding = f"--config={ROOT / 'experiments/_base/trainer/fsdp.yaml'}"
    sharded = ["fit", "--config=five/walt.yaml", sharding, "--trainer.accelerator=cpu", *TWO_PROCESSES[:2]]
    commands = [
        [*sharded, "--run_root=sharded"],
        [*sharded, "--run_root=again", "--ckpt_path=sharded/walt/version_0/checkpoints/step=4.ckpt"],
        *others,
        ["tokenize", "--config=mebt.yaml", *TWO_PROCESSES, "--out=codes", "--shard_items=3"],
        ["fit", "--config=tokenizer.yaml", *TWO_PROCESSES, "--trainer.max_steps=2"],
        ["fit", "--config=mebt.yaml", *TWO_PROCESSES, "--trainer.strategy=ddp"],
        [
            *("sample", "--config=mebt.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", "--out=samples"),
            *("--ckpt_path=runs/mebt/version_0/checkpoints/last.ckpt", "--num_samples=3", "--batch_size=1"),
        ],
        ["evaluate", *EVALUATION, "--trainer.devices=2", "--trainer.strategy=ddp", "--batch_size=2"],
    ]
    (folder / "tiny.yaml").write_text(TINY_PROTOCOL)
    (folder / "commands.json").write_text(json.dumps(commands))
    with started([sys.executable, str(HERE / "commands.py"), "commands.json"], folder) as process:
        try:
            code = process.wait(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            code = None
    assert code == 0, (folder / "output.txt").read_text()
    return folder


@pytest.mark.parametrize("experiment", ["tokenizer", "mebt", *OTHERS])
def test_two_processes_end_with_the_same_weights(two_processes: Path, experiment: str) -> None:
    run_folder = two_processes / f"runs/{experiment}/version_0"
    first, second = (torch.load(run_folder / f"end.{rank}.pt", weights_only=True)["state"] for rank in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("experiment", ["tokenizer", "mebt"])
def test_two_processes_see_what_one_with_twice_the_batch_sees(
    two_processes: Path, world: Path, experiment: str
) -> None:
    first, second = (read_ledger(two_processes / f"runs/{experiment}/version_0", rank) for rank in range(2))
    for one, other, both in zip(first, second, read_ledger(world / f"runs/{experiment}/version_0"), strict=False):
        assert one[1] + other[1] == both[1]  # clips
        assert one[2:] == other[2:] == both[2:]  # windows
    assert [entry[0] for entry in first] == {"tokenizer": [0, 1], "mebt": [0, 1, 2, 3, 4, 5]}[experiment]


def test_a_prior_on_two_processes_equals_one_with_twice_the_batch(two_processes: Path, mebt_run: Path) -> None:
    two, one = (
        torch.load(folder / "end.0.pt", weights_only=True)
        for folder in (two_processes / "runs/mebt/version_0", mebt_run)
    )
    for name, tensor in one["state"].items():
        # a rounding error, where six steps have moved the weights by up to 6e-3
        assert torch.allclose(two["state"][name], tensor, rtol=0, atol=2e-6), name
    assert two["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"].item(), abs=1e-5)


@pytest.mark.parametrize("experiment", OTHERS)
def test_the_other_priors_on_two_processes_equal_one_with_twice_the_batch(
    two_processes: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_processes)
    words = [f"--config=five/{experiment}.yaml", "--run_root=one", *OTHERS[experiment]]
    main(["fit", *words, "--trainer.log_every_n_steps=1"])
    folders = [two_processes / root / experiment / "version_0" for root in ("one", "runs")]
    one, two = (torch.load(folder / "checkpoints/step=6.ckpt", weights_only=True) for folder in folders)
    for part in {"state_dict", "current_model_state"} & one.keys():  # W.A.L.T's run keeps an average, too
        for name, tensor in one[part].items():
            assert torch.allclose(two[part][name], tensor, rtol=0, atol=1e-5), name  # they have moved by up to 6e-3
    ends = [torch.load(folder / "end.0.pt", weights_only=True)["metrics"]["val/loss"] for folder in folders]
    assert ends[0] == pytest.approx(ends[1].item(), abs=1e-5)
    assert [a[1] + b[1] for a, b in zip(*(read_ledger(folders[1], rank) for rank in range(2)), strict=True)] == [
        entry[1] for entry in read_ledger(folders[0])
    ]


def test_a_sharded_generator_equals_one_that_is_not_and_saves_single_files_it_resumes_from(
    two_processes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With averaged weights; made on the meta device, with the weights that it would have had."""
    monkeypatch.chdir(two_processes)
    files = [f"{root}/walt/version_0/checkpoints/step=6.ckpt" for root in ("runs", "sharded", "again")]
    whole, sharded, again = (torch.load(file, weights_only=True) for file in files)
    assert sharded["state_dict"].keys() == whole["state_dict"].keys()
    for part in ("state_dict", "current_model_state"):
        for name, tensor in whole[part].items():
            assert torch.allclose(sharded[part][name], tensor, rtol=0, atol=1e-5), name
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        assert differences(again[part], sharded[part]) == []
    module = load_generator(files[1])  # in one process
    assert all(torch.equal(tensor, sharded["state_dict"][name]) for name, tensor in module.state_dict().items())


def test_a_tokenizer_on_two_processes_equals_one_with_twice_the_batch(two_processes: Path, tokenizer_run: Path) -> None:
    """Batch norm, codebook and discriminators count all clips, so both compute the same, up to rounding.

    Adam takes a step of the full learning rate however small a gradient is, also where it is zero but for rounding, as
    that of a bias before a batch norm is. So single weights differ, and all together are compared.
    """
    two, one, later = (
        torch.load(folder / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]
        for folder, step in ((two_processes / "runs/tokenizer/version_0", 2), (tokenizer_run, 2), (tokenizer_run, 6))
    )
    assert torch.equal(two["tokenizer.quantizer.N"], one["tokenizer.quantizer.N"])  # how often each code was chosen
    weights = [name for name in one if name.endswith(".weight")]
    distance = sum((two[name] - one[name]).abs().sum() for name in weights)
    moved = sum((later[name] - one[name]).abs().sum() for name in weights)  # in four steps more
    assert distance < 0.02 * moved


def test_two_processes_keep_the_codes_that_one_keeps(two_processes: Path, tiny: Path) -> None:
    main(["tokenize", "--config=mebt.yaml", "--out=codes", "--shard_items=3"])
    assert len(list(Path("codes").rglob("*.bin"))) == 5  # 8 clips and 4
    for file in [*Path("codes").rglob("*.bin"), *Path("codes").rglob("index.json")]:
        assert (two_processes / file).read_bytes() == file.read_bytes(), file


def test_two_processes_share_the_seeds_out(two_processes: Path, tiny: Path) -> None:
    checkpoint = two_processes / "runs/mebt/version_0/checkpoints/last.ckpt"
    words = ["--config=mebt.yaml", f"--ckpt_path={checkpoint}", "--num_samples=3", "--batch_size=3", "--out=samples"]
    main(["sample", *words])
    names = [f"seed={seed:06d}.mp4" for seed in range(3)]
    for folder in (two_processes / "samples", tiny / "samples"):
        assert sorted(path.name for path in folder.glob("seed=*")) == names
        assert json.loads((folder / "samples.json").read_text())["seeds"] == [0, 1, 2]
    for name in names:
        two, one = (read_video(folder / "samples" / name).astype(float) for folder in (two_processes, tiny))
        assert np.abs(two - one).mean() < 0.5  # equal, but for what rounding and the codec make of it


def test_two_processes_evaluate_as_one(two_processes: Path, tiny: Path) -> None:
    (tiny / "tiny.yaml").write_text(TINY_PROTOCOL)
    shutil.copytree(two_processes / "runs", tiny / "runs", symlinks=True)
    main(["evaluate", *EVALUATION])
    one, two = (json.loads((folder / "evaluated/results.json").read_text()) for folder in (tiny, two_processes))
    assert one["protocol"]["hash"] == two["protocol"]["hash"]
    assert one["scores"].keys() == two["scores"].keys()
    for name, score in one["scores"].items():
        # validation draws its masks by batch, so that a likelihood is of other masks
        tolerance = 0.02 if name.startswith("nll") else 1e-5
        assert two["scores"][name]["values"] == pytest.approx(score["values"], rel=tolerance, abs=1e-6), name


def test_a_run_that_is_killed_goes_on_at_its_newest_checkpoint(tiny: Path) -> None:
    """The console command, with two processes; one with twice the batch goes on."""
    longtake = Path(sys.executable).with_name("longtake")
    schedule = ["--curriculum.schedule=gaussian", "--curriculum.steps_per_frame=3"]  # knows no end of the run
    words = [*TWO_PROCESSES, *schedule, "--trainer.max_steps=100000", "--samples.at_validation=false"]
    folder = tiny / "runs/mebt/version_0"
    with started([str(longtake), "fit", "--config=mebt.yaml", *words], tiny) as process:
        deadline = time.monotonic() + TIME_LIMIT
        while not list(folder.glob("checkpoints/step=*.ckpt")):
            assert process.poll() is None, (tiny / "output.txt").read_text()
            assert time.monotonic() < deadline, (tiny / "output.txt").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)

    before = read_ledger(folder)
    saved = max(int(path.stem.removeprefix("step=")) for path in folder.glob("checkpoints/step=*.ckpt"))
    one_process = ["--trainer.devices=1", "--trainer.strategy=auto", "--data.batch_size=2"]
    trainer = run(["fit", f"--resume={folder}", *one_process, f"--trainer.max_steps={saved + 2}"]).trainer
    after = read_ledger(folder)[len(before) :]
    assert [entry[0] for entry in after] == [saved, saved + 1]
    assert trainer.global_step == saved + 2
    assert len(list(folder.glob("events.*"))) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
