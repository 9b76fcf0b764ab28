import csv
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import Throughput

Batches = Callable[..., Iterable[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]


class FakeClock:
    """Stands still, except where a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", clock)
    return clock


@pytest.fixture
def timed_module(toy_module: LightningModule, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> LightningModule:
    """A training step of 2 s."""
    step = type(toy_module).training_step

    def training_step(self: LightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
        clock.now += 2
        return step(self, batch, batch_idx)

    monkeypatch.setattr(type(toy_module), "training_step", training_step)
    return toy_module


def test_clips_per_second_and_seconds_per_step(
    timed_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[Throughput()], max_steps=6, log_every_n_steps=3)
    trainer.fit(timed_module, batches(6, batch_size=4))
    assert trainer.callback_metrics["train/clips_per_second"] == 2
    assert trainer.callback_metrics["train/seconds_per_step"] == 2
    assert not {"train/tokens_per_second", "data/quarantined_videos"} & trainer.callback_metrics.keys()
    assert trainer.progress_bar_metrics == {"clips/s": 2, "s/step": 2}


def test_tokens_per_second_if_the_module_counts_tokens(
    timed_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    timed_module.tokens_per_batch = 1024
    trainer = make_trainer(callbacks=[Throughput()], max_steps=2, log_every_n_steps=2)
    trainer.fit(timed_module, batches(2))
    assert trainer.callback_metrics["train/tokens_per_second"] == 512
    assert trainer.progress_bar_metrics == {"tokens/s": 512, "s/step": 2}


def test_all_ranks_are_counted(
    toy_module: LightningModule,
    batches: Batches,
    make_trainer: MakeTrainer,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(callbacks=[Throughput()], max_steps=1)
    monkeypatch.setattr(Trainer, "world_size", 8)
    callback = Throughput()
    (batch,) = batches(1)
    logged: dict[str, float] = {}
    monkeypatch.setattr(toy_module, "log", lambda name, value, **_: logged.update({name: value.item()}))
    monkeypatch.setattr(Trainer, "global_step", 0)
    callback.on_train_start(trainer, toy_module)
    clock.now += 2
    monkeypatch.setattr(Trainer, "global_step", 1)
    callback.on_train_batch_end(trainer, toy_module, None, batch, 0)
    assert logged["train/clips_per_second"] == 8 * 4 / 2
    assert logged["train/seconds_per_step"] == 2


def test_accumulated_batches_are_one_step(
    timed_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[Throughput()], max_epochs=1, log_every_n_steps=2, accumulate_grad_batches=3)
    trainer.fit(timed_module, batches(12, batch_size=4))
    assert trainer.callback_metrics["train/seconds_per_step"] == 6
    assert trainer.callback_metrics["train/clips_per_second"] == 2


def test_validation_does_not_count(
    timed_module: LightningModule,
    validated_module: LightningModule,
    batches: Batches,
    make_trainer: MakeTrainer,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def validation_step(self: LightningModule, batch: dict[str, Any], batch_idx: int) -> None:
        clock.now += 100

    monkeypatch.setattr(type(validated_module), "validation_step", validation_step)
    trainer = make_trainer(callbacks=[Throughput()], max_steps=4, log_every_n_steps=4, val_check_interval=1)
    trainer.fit(validated_module, batches(4), batches(1))
    assert clock.now == 4 * 2 + 4 * 100
    assert trainer.callback_metrics["train/seconds_per_step"] == 2


def test_each_value_is_of_its_own_interval(
    timed_module: LightningModule,
    batches: Batches,
    make_trainer: MakeTrainer,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    step = type(timed_module).training_step

    def slow_start(self: LightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
        clock.now += 98 if batch_idx == 0 else 0
        return step(self, batch, batch_idx)

    monkeypatch.setattr(type(timed_module), "training_step", slow_start)
    logger = CSVLogger(str(tmp_path))
    trainer = make_trainer(callbacks=[Throughput()], logger=logger, max_steps=4, log_every_n_steps=2)
    trainer.fit(timed_module, batches(4))
    rows = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    assert [(int(row["step"]), float(row["train/seconds_per_step"])) for row in rows] == [(1, 51), (3, 2)]


def test_videos_in_quarantine_are_counted_if_the_data_module_counts_them(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    class Data(LightningDataModule):
        bad = 0

        def train_dataloader(self) -> Iterable[dict[str, Any]]:
            return batches(2)

        def num_quarantined(self) -> int:
            self.bad += 1
            return self.bad

    trainer = make_trainer(callbacks=[Throughput()], max_steps=2, log_every_n_steps=1)
    trainer.fit(toy_module, Data())
    assert trainer.callback_metrics["data/quarantined_videos"] == 2


def test_the_real_clock_is_read(toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[Throughput()], max_steps=2)
    began = time.perf_counter()
    trainer.fit(toy_module, batches(2))
    assert 0 < trainer.callback_metrics["train/seconds_per_step"] < time.perf_counter() - began
