import csv
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import ShortToLongCurriculum

Batches = Callable[..., Iterable[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]


def bound(schedule: str = "linear", total_steps: int = 10, seed: int = 0, **options: Any) -> ShortToLongCurriculum:
    callback = ShortToLongCurriculum(schedule, **options)
    callback.bind(total_steps=total_steps, max_frames=32, frames_per_latent=4, seed=seed)
    return callback


class WindowLoader:
    """Batches with the window lengths of a list of optimizer steps."""

    def __init__(self, frames_at: Callable[[int], int], steps: list[int]) -> None:
        self.window_frames = [frames_at(step) for step in steps]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for frames in self.window_frames:
            yield {
                "video": torch.zeros(2, 3, frames, 8, 8),
                "index": torch.arange(2),
                "window_start": 0,
                "window_frames": frames,
                "margin_before": 0,
            }

    def __len__(self) -> int:
        return len(self.window_frames)


def test_linear_schedule_in_frames() -> None:
    callback = bound("linear", total_steps=10, full_length_from=0.7)
    assert [callback.frames_at(step) for step in range(10)] == [4, 8, 12, 16, 20, 24, 28, 32, 32, 32]


def test_fraction_is_whole_for_the_last_thirty_percent() -> None:
    callback = bound("fraction", total_steps=1000)
    assert {callback.frames_at(step) for step in range(700, 1000)} == {32}
    early = [callback.frames_at(step) for step in range(100)]
    assert all(frames % 4 == 0 and 4 <= frames <= 32 for frames in early)
    assert sum(early) / 100 < 16


def test_frames_are_a_function_of_step_and_seed_alone() -> None:
    frames = [bound("uniform").frames_at(step) for step in range(30)]
    backwards = bound("uniform")
    assert [backwards.frames_at(step) for step in reversed(range(30))][::-1] == frames
    assert [bound("uniform", seed=1).frames_at(step) for step in range(30)] != frames


def test_longest_takes_any_number_of_frames_and_no_end() -> None:
    callback = ShortToLongCurriculum()
    callback.bind(total_steps=-1, max_frames=17, frames_per_latent=4, seed=0)
    assert callback.frames_at(5) == 17
    assert callback.expected_frames_at(5) == 17


def test_other_schedules_need_whole_latent_frames() -> None:
    with pytest.raises(ValueError, match=r"latent frames of 4 frames each, but num_frames=17 .*--data\.num_frames"):
        ShortToLongCurriculum("uniform").bind(total_steps=10, max_frames=17, frames_per_latent=4, seed=0)


@pytest.mark.parametrize("schedule", ["linear", "fraction"])
def test_schedules_over_the_run_need_max_steps(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"max_steps=-1: set --trainer\.max_steps"):
        bound(schedule, total_steps=-1)


def test_unbound_schedule_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"call bind\(total_steps"):
        ShortToLongCurriculum("fraction").frames_at(0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("full_length_from", 0.0),
        ("full_length_from", 1.5),
        ("steps_per_frame", 0.0),
        ("width", -1.0),
        ("width", float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} .*--curriculum\.{argument}"):
        ShortToLongCurriculum(**{argument: value})


def test_lengths_and_their_mean_are_logged_at_each_step(
    toy_module: LightningModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = bound("gaussian", steps_per_frame=2, width=1.0)
    logger = CSVLogger(str(tmp_path))
    trainer = make_trainer(callbacks=[callback], logger=logger, max_steps=5)
    trainer.fit(toy_module, WindowLoader(callback.frames_at, list(range(5))))
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [float(row["train/clip_frames"]) for row in rows] == [callback.frames_at(step) for step in range(5)]
    means = [float(row["train/clip_frames_mean"]) for row in rows]
    assert means == pytest.approx([callback.expected_frames_at(step) for step in range(5)])
    assert "frames" not in rows[0]
    assert trainer.progress_bar_metrics == {"frames": callback.frames_at(4)}


def test_wrong_length_of_the_first_batch_stops_the_run(toy_module: LightningModule, make_trainer: MakeTrainer) -> None:
    callback = bound("linear")
    trainer = make_trainer(callbacks=[callback], max_steps=1)
    with pytest.raises(RuntimeError, match=r"window_frames=32, but the curriculum's frames_at\(0\) is 4"):
        trainer.fit(toy_module, WindowLoader(lambda step: 32, [0]))


def test_data_without_windows_stops_the_run(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[bound("linear")], max_steps=1)
    with pytest.raises(RuntimeError, match="the data module ignores the curriculum"):
        trainer.fit(toy_module, batches(1))


def test_later_drift_is_reported_once_and_does_not_stop_the_run(
    toy_module: LightningModule, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = bound("linear")
    trainer = make_trainer(callbacks=[callback], max_steps=4)
    with caplog.at_level(logging.WARNING, logger="callbacks.curriculum"):
        trainer.fit(toy_module, WindowLoader(callback.frames_at, [0, 0, 1, 2]))  # late by one from the second batch on
    messages = [record.getMessage() for record in caplog.records if record.name == "callbacks.curriculum"]
    assert len(messages) == 1
    assert "the batch for step 1 has window_frames=4, but the curriculum's frames_at(1) is 8" in messages[0]
    assert trainer.global_step == 4


def test_each_fit_checks_its_first_batch(toy_module: LightningModule, make_trainer: MakeTrainer) -> None:
    callback = bound("linear")
    make_trainer(callbacks=[callback], max_steps=1).fit(toy_module, WindowLoader(callback.frames_at, [0]))
    with pytest.raises(RuntimeError, match="the batch for step 0 has window_frames=8"):
        make_trainer(callbacks=[callback], max_steps=1).fit(type(toy_module)(), WindowLoader(callback.frames_at, [1]))


def test_longest_checks_nothing(toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer) -> None:
    callback = bound("longest")
    trainer = make_trainer(callbacks=[callback], max_steps=1)
    trainer.fit(toy_module, batches(1))
    assert trainer.callback_metrics["train/clip_frames"] == 32


def test_unbound_longest_stays_out_of_the_way(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[ShortToLongCurriculum()], max_steps=1)
    trainer.fit(toy_module, batches(1))
    assert trainer.global_step == 1
    assert "train/clip_frames" not in trainer.callback_metrics


def test_accumulated_batches_share_the_length_of_their_step(
    toy_module: LightningModule, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = bound("linear")
    trainer = make_trainer(callbacks=[callback], max_steps=3, accumulate_grad_batches=2)
    with caplog.at_level(logging.WARNING, logger="callbacks.curriculum"):
        trainer.fit(toy_module, WindowLoader(callback.frames_at, [0, 0, 1, 1, 2, 2]))
    assert trainer.global_step == 3
    assert not [record for record in caplog.records if record.name == "callbacks.curriculum"]


def test_resumed_run_expects_the_length_of_its_step(
    toy_module: LightningModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = bound("linear")
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(toy_module, WindowLoader(callback.frames_at, [0, 1, 2]))
    trainer.save_checkpoint(tmp_path / "at_3.ckpt")

    resumed = bound("linear")
    trainer = make_trainer(callbacks=[resumed], max_epochs=2)
    trainer.fit(type(toy_module)(), WindowLoader(resumed.frames_at, [3, 4, 5]), ckpt_path=tmp_path / "at_3.ckpt")
    assert trainer.global_step == 6

    trainer = make_trainer(callbacks=[bound("linear")], max_epochs=2)
    with pytest.raises(RuntimeError, match="the batch for step 3 has window_frames=4"):
        trainer.fit(type(toy_module)(), WindowLoader(resumed.frames_at, [0, 1, 2]), ckpt_path=tmp_path / "at_3.ckpt")
