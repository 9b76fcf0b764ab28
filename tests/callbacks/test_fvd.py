import csv
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fvd_of_ranks import measure
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from toy_generator import FRAMES, RESOLUTION, ToyGenerator, toy_detector

import callbacks.fvd
from callbacks import EMA, FVDEvaluation
from datamodules.sampler import ClipRequest
from datamodules.shapes import MovingShapesDataModule
from models.metrics import FrechetDistance
from models.random import keyed_generator, keyed_seed

KEY = f"metrics/frechet_toy_{FRAMES}f_6"


@pytest.fixture
def detections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the detector by a quick one; how many clips it has seen in each call."""
    seen: list[int] = []

    def make() -> Any:
        detector = toy_detector()
        detector.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
        return detector

    monkeypatch.setattr(callbacks.fvd, "random_i3d", make)
    return seen


def shapes(**options: Any) -> MovingShapesDataModule:
    sizes = {"num_train": 8, "num_val": 5, "batch_size": 2, "val_batch_size": 3}
    return MovingShapesDataModule(**(sizes | {"num_frames": FRAMES, "resolution": RESOLUTION} | options))


Fit = Callable[..., Trainer]


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Fit:
    def run(module: LightningModule, train_on: Any = None, others: tuple[Any, ...] = (), **options: Any) -> Trainer:
        trainer_options = {name: options.pop(name) for name in ("max_epochs", "fast_dev_run") if name in options}
        options = {"every_n_steps": 2, "num_samples": 6, "final_samples": 0, "cache": str(tmp_path / "cache")} | options
        trainer = make_trainer(
            callbacks=[*others, FVDEvaluation(**options)],
            logger=TensorBoardLogger(str(tmp_path), name="run", version=""),
            max_steps=4,
            limit_val_batches=0,
            enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
            **trainer_options,
        )
        trainer.fit(module, datamodule=train_on or shapes())
        return trainer

    return run


def table(folder: Path, name: str = f"frechet_toy_{FRAMES}f") -> list[dict[str, str]]:
    with (folder / "run" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_distance_goes_to_tensorboard_a_table_and_what_checkpoints_monitor(
    detections: list[int], fit: Fit, tmp_path: Path
) -> None:
    trainer = fit(ToyGenerator(), final_samples=8)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [step for step, _ in logged[KEY]] == [2, 4]
    assert logged[KEY][0][1] > logged[KEY][1][1] > 0  # the noise falls
    assert [step for step, _ in logged[KEY.replace("6", "8")]] == [4]
    assert float(trainer.callback_metrics[KEY]) == pytest.approx(logged[KEY][1][1])
    rows = table(tmp_path)
    assert [(row["step"], row["samples"], row["made"], row["real_clips"]) for row in rows] == [
        ("2", "6", "6", "5"),
        ("4", "6", "6", "5"),
        ("4", "8", "8", "5"),
    ]
    assert float(rows[0]["frechet_toy"]) == pytest.approx(logged[KEY][0][1])
    assert rows[0]["detector_weights"] == "random, none"


def test_the_distance_is_that_of_all_real_clips_and_seeded_samples(detections: list[int], fit: Fit) -> None:
    module, data = ToyGenerator(), shapes()
    trainer = fit(module, data, every_n_steps=4, seed=7)
    detector, dataset = toy_detector(), data.datasets["val"]
    expected = FrechetDistance(detector)
    expected.update(detector(torch.stack([dataset.render(i) for i in range(5)])), real=True)
    seeds = torch.cat([call["seeds"] for call in module.calls])
    assert seeds.tolist() == [keyed_seed(7, i) for i in range(6)]
    noise = [torch.randn(3, FRAMES, RESOLUTION, RESOLUTION, generator=keyed_generator(s)) for s in seeds.tolist()]
    order = torch.cat([call["index"] for call in module.calls]).tolist()
    assert sorted(order[:5]) == list(range(5))
    assert order[5] == order[0]
    clips = [dataset[ClipRequest(i)]["video"] for i in order]
    strength = module.calls[-1]["noise"]
    videos = torch.stack([(clip + strength * z).clamp(-1, 1) for clip, z in zip(clips, noise, strict=True)])
    expected.update(detector(videos), real=False)
    assert float(trainer.callback_metrics[KEY]) == pytest.approx(float(expected.compute()), rel=1e-4)


def test_epochs_are_counted_too(detections: list[int], fit: Fit, tmp_path: Path) -> None:
    module = ToyGenerator()
    trainer = fit(module, shapes(num_train=4), every_n_steps=0, every_n_epochs=1)
    assert [row["step"] for row in table(tmp_path)] == ["2", "4"]
    assert KEY in trainer.callback_metrics


@pytest.mark.parametrize("options", [{"every_n_steps": 0, "final_samples": 8}, {"fast_dev_run": True}])
def test_nothing_is_loaded_when_it_is_off(
    monkeypatch: pytest.MonkeyPatch, fit: Fit, tmp_path: Path, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(callbacks.fvd, "random_i3d", None)
    module = ToyGenerator()
    fit(module, **options)
    assert module.calls == []
    assert not (tmp_path / "cache").exists()


def test_real_features_are_computed_once_for_the_same_clips_and_detector(
    detections: list[int], fit: Fit, tmp_path: Path
) -> None:
    def seen(data: Any, **options: Any) -> int:
        detections.clear()
        fit(ToyGenerator(), data, every_n_steps=100, **options)
        return sum(detections)

    assert seen(shapes()) == 5
    assert seen(shapes(batch_size=1, val_batch_size=1)) == 0
    assert seen(shapes(speed=(0.0, 0.01))) == 5
    assert seen(shapes(), num_real=3) == 3
    assert seen(shapes(), split="train") == 8
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_clip_that_has_changed_is_computed_again(
    detections: list[int], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(ToyGenerator(), every_n_steps=100)
    detections.clear()
    monkeypatch.setattr(type(shapes().make_dataset("val")), "_background", lambda self, index: torch.zeros(3, 32, 32))
    fit(ToyGenerator(), every_n_steps=100)
    assert sum(detections) == 5


def test_lossy_frames_are_no_real_set(detections: list[int], fit: Fit) -> None:
    data = shapes()
    data.lossy = True
    with pytest.raises(ValueError, match=r"lossy=True.*--fvd\.data"):
        fit(ToyGenerator(), data)


class Codes(MovingShapesDataModule):
    """Batches without pixels, as of a cache of codes."""

    def make_dataset(self, split: Any) -> Any:
        class NoPixels(type(super().make_dataset(split))):
            def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
                item = super().__getitem__(request)
                return {"codes": item["video"][0], "label": item["label"], "index": item["index"]}

        dataset = super().make_dataset(split)
        dataset.__class__ = NoPixels
        return dataset


class FromCodes(ToyGenerator):
    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        return super().sample_videos(batch | {"video": batch["codes"][:, None].expand(-1, 3, -1, -1, -1)}, seeds)


def test_cached_codes_need_the_data_that_has_pixels(detections: list[int], fit: Fit, tmp_path: Path) -> None:
    codes = Codes(num_train=8, num_val=5, batch_size=2, num_frames=FRAMES, resolution=RESOLUTION)
    with pytest.raises(ValueError, match=r"Codes hold no pixels.*--fvd\.data"):
        fit(FromCodes(), codes)
    module = FromCodes()
    fit(module, codes, data=shapes())
    assert math.isfinite(float(table(tmp_path)[0]["frechet_toy"]))
    assert "shapes_overall" in table(tmp_path)[0]


def test_other_geometry_is_refused(detections: list[int], fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"real clips are \[3, 9, 64, 64\].*\[3, 9, 32, 32\]"):
        fit(ToyGenerator(), data=shapes(resolution=64))


def test_without_a_data_module_there_is_nothing_to_compare_with(
    detections: list[int], make_trainer: Callable[..., Trainer]
) -> None:
    loader = torch.utils.data.DataLoader([{"video": torch.zeros(3)}])
    trainer = make_trainer(callbacks=[FVDEvaluation(every_n_steps=1)], max_steps=1)
    with pytest.raises(ValueError, match=r"--fvd\.data"):
        trainer.fit(ToyGenerator(), loader, loader)


def test_what_is_not_ready_in_time_is_no_distance(
    detections: list[int], fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 10))  # ten seconds from one look at it to the next
    monkeypatch.setattr(callbacks.fvd.time, "monotonic", lambda: float(next(clock)))
    with pytest.warns(UserWarning, match=r"step 4: 3 of 6 videos were made, then 5 seconds were over"):
        trainer = fit(ToyGenerator(), every_n_steps=4, max_seconds=5.0, oracle_samples=4)
    assert math.isnan(float(trainer.callback_metrics[KEY]))  # not the number of another step
    row = table(tmp_path)[0]
    assert (row["made"], row["frechet_toy"], row["shapes_overall"]) == ("3", "nan", "nan")
    assert KEY not in EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"]


def test_samples_that_are_not_finite_have_no_distance_and_stop_no_training(
    detections: list[int], fit: Fit, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="0 of 6 videos .*not finite"):
        trainer = fit(ToyGenerator(math.inf), every_n_steps=4)
    assert trainer.global_step == 4
    assert table(tmp_path)[0]["frechet_toy"] == "nan"


class ToyTokenizer(ToyGenerator):
    """Shows originals above the same clips, brighter where `error` says so."""

    generate = property()  # hides the parent's: a tokenizer has none

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        return torch.cat([batch["video"], batch["video"] + self.error], dim=3)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_reconstructions_are_compared_with_their_own_inputs(
    detections: list[int], fit: Fit, tmp_path: Path, error: float
) -> None:
    fit(ToyTokenizer(error), final_samples=100)
    rows = table(tmp_path, f"reconstruction_frechet_toy_{FRAMES}f")
    assert [(row["step"], row["samples"]) for row in rows] == [("2", "5"), ("4", "5")]  # and no third with 100
    assert (float(rows[0]["reconstruction_frechet_toy"]) < 1e-6) == (error == 0)
    assert float(rows[0]["shapes_class_accuracy"]) == 1


def test_few_reconstructions_are_compared_with_as_many_clips(detections: list[int], fit: Fit, tmp_path: Path) -> None:
    fit(ToyTokenizer(0.0), num_samples=3)
    row = table(tmp_path, f"reconstruction_frechet_toy_{FRAMES}f")[0]
    assert row["real_clips"] == "3"
    assert float(row["reconstruction_frechet_toy"]) < 1e-6


def test_shapes_are_judged_by_the_oracle_and_other_videos_are_not(
    detections: list[int], fit: Fit, tmp_path: Path
) -> None:
    trainer = fit(ToyGenerator(0.01))
    assert float(trainer.callback_metrics["metrics/shapes_overall"]) > 0.9
    assert "metrics/shapes_class_accuracy" not in trainer.callback_metrics  # it was asked for no class

    noisy = fit(ToyGenerator(0.4), seed=1)
    assert float(noisy.callback_metrics["metrics/shapes_fidelity"]) < 0.5

    others = shapes()
    others.class_names = lambda: ["archery", "bowling"]
    trainer = fit(ToyGenerator(), others, cache=str(tmp_path / "others"))
    assert not any("shapes" in name for name in trainer.callback_metrics)


def test_modes_and_random_numbers_are_as_before(detections: list[int], fit: Fit) -> None:
    states = []
    for every_n_steps in (0, 2):
        module = ToyGenerator()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fit(module, every_n_steps=every_n_steps)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert len(module.calls) == 4
    assert [call["mode"] for call in module.calls] == [False] * len(module.calls)
    assert module.training
    assert not module.frozen.training


def test_averaged_weights_make_the_samples(detections: list[int], fit: Fit) -> None:
    module = ToyGenerator()
    fit(module, others=(EMA(decay=0.5),))
    at_start, after_one, after_two = 0.2, 0.2 * 0.8, 0.2 * 0.8**2
    assert module.calls[0]["noise"] == pytest.approx((at_start + after_one) / 4 + after_two / 2)


def test_a_checkpoint_can_be_kept_for_its_distance(detections: list[int], fit: Fit, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path / "best", "{step}", monitor=KEY, mode="min", save_top_k=1, every_n_train_steps=2
    )
    fit(ToyGenerator(), others=(checkpoint,))
    assert Path(checkpoint.best_model_path).name == "step=4.ckpt"
    assert float(checkpoint.best_model_score) == pytest.approx(float(table(tmp_path)[1]["frechet_toy"]))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("every_n_steps", -1),
        ("every_n_epochs", -1),
        ("num_samples", 1),
        ("final_samples", 1),
        ("num_real", 1),
        ("max_seconds", 0.0),
        ("oracle_samples", -1),
        ("seed", -1),
        ("profile", "tf"),
    ],
)
def test_numbers_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} .*--fvd\."):
        FVDEvaluation(**{argument: value})


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, with the true random I3D."""
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(here / "fvd_of_ranks.py"), str(folder)]
    with (folder / "output.txt").open("w") as output:
        processes = [
            subprocess.Popen(
                command, env=environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}, stdout=output, stderr=output
            )
            for rank in range(2)
        ]
        try:
            codes = [process.wait(timeout=400) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert codes == [0, 0], (folder / "output.txt").read_text()
    return folder


def test_two_ranks_measure_what_one_does(of_two_ranks: Path, tmp_path: Path) -> None:
    measure(tmp_path, devices=1)
    name = f"frechet_random_i3d_{FRAMES}f"
    (one,), (two,) = table(tmp_path, name), table(of_two_ranks, name)
    assert one.keys() == two.keys()
    assert {"frechet_random_i3d", "shapes_overall"} < one.keys()
    assert (one["made"], two["made"]) == ("5", "5")
    for column in one.keys() - {"seconds", "epoch", "detector_weights"}:
        # the network's rounding depends on the size of the batch
        assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-4), column
    (cached,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in (of_two_ranks / "cache").iterdir()] == [cached.name]
