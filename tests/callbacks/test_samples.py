import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import SampleLogger

Batches = Callable[..., Iterable[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_samples_go_to_tensorboard_mp4_and_contact_sheet(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="run")
    trainer = make_trainer(
        logger=logger, callbacks=[SampleLogger(every_n_steps=2, at_validation=False, fps=10)], max_steps=4
    )
    trainer.fit(toy_module, batches(4))

    folder = Path(logger.log_dir) / "samples"
    names = ["step=00000002.mp4", "step=00000002.png", "step=00000004.mp4", "step=00000004.png"]
    assert file_names(folder) == names
    with av.open(str(folder / names[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (2 * 10 + 2, 2 * 8 + 2, 3)  # a grid of 2 x 2 videos
    with Image.open(folder / names[1]) as sheet:
        assert sheet.size == (5 * (11 * 6 + 2) + 2, 4 * (11 * 8 + 2) + 2)  # 4 videos, 5 frames, 11 times larger

    events = EventAccumulator(logger.log_dir).Reload()
    images = events.Images("samples/video")
    assert [image.step for image in images] == [2, 4]
    assert images[0].encoded_image_string.startswith(b"GIF89a")
    assert Image.open(io.BytesIO(images[0].encoded_image_string)).n_frames == 5


def test_seeds_are_the_same_each_time_and_differ_from_each_other(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    make_trainer(callbacks=[SampleLogger(every_n_steps=1, seed=3)], max_steps=2).fit(toy_module, batches(2))
    first, second = (call["seeds"] for call in toy_module.calls)
    assert first.dtype == torch.int64
    assert torch.equal(first, second)
    assert len(set(first.tolist())) == 4

    other = type(toy_module)()
    make_trainer(callbacks=[SampleLogger(every_n_steps=1, seed=4)], max_steps=1).fit(other, batches(1))
    assert not set(first.tolist()) & set(other.calls[0]["seeds"].tolist())


def test_modes_are_restored_and_sampling_has_no_gradients(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1).fit(toy_module, batches(1))
    (call,) = toy_module.calls
    assert not any(call["modes"].values())
    assert not call["grad"]
    assert toy_module.layer.training
    assert not toy_module.frozen.training


def test_modes_are_restored_when_sampling_fails(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no samples today")

    monkeypatch.setattr(toy_module, "sample_videos", fail)
    with pytest.raises(RuntimeError, match="no samples today"):
        make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1).fit(toy_module, batches(1))
    assert toy_module.layer.training
    assert not toy_module.frozen.training


def test_random_numbers_of_the_training_do_not_change(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1)
    before = torch.get_rng_state()
    trainer.fit(toy_module, batches(1))
    assert len(toy_module.calls) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_shows_the_first_batch_only_and_not_the_sanity_check(
    validated_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger()], max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(validated_module, batches(3), batches(2, label="validation"))
    assert [(call["step"], call["batch"]["label"]) for call in validated_module.calls] == [
        (3, "validation"),
        (6, "validation"),
    ]


def test_a_step_and_its_validation_are_shown_once(
    validated_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=3)], max_epochs=1)
    trainer.fit(validated_module, batches(3), batches(1))
    assert [call["step"] for call in validated_module.calls] == [3]


def test_accumulated_batches_are_one_step(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=2)], max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(toy_module, batches(15))
    assert [call["step"] for call in toy_module.calls] == [2, 4]


def test_nothing_is_shown_when_switched_off(
    validated_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=0, at_validation=False)], max_epochs=1)
    trainer.fit(validated_module, batches(2), batches(1))
    assert validated_module.calls == []


def test_small_batches_show_fewer_videos(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer
) -> None:
    make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1).fit(toy_module, batches(1, batch_size=3))
    assert len(toy_module.calls[0]["seeds"]) == 3


def test_without_a_logger_files_go_to_an_existing_folder_only(
    toy_module: LightningModule, batches: Batches, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1).fit(toy_module, batches(1))
    assert file_names(tmp_path / "samples") == ["step=00000001.mp4", "step=00000001.png"]

    missing = tmp_path / "missing"
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1, default_root_dir=missing)
    trainer.fit(type(toy_module)(), batches(1))
    assert not missing.exists()


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_generates_and_writes_nothing(
    validated_module: LightningModule, batches: Batches, make_trainer: MakeTrainer, tmp_path: Path, logger: bool
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=1)], fast_dev_run=1, logger=logger)
    trainer.fit(validated_module, batches(1), batches(1))
    assert len(validated_module.calls) == 1
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_generate_and_write_nothing(
    toy_module: LightningModule,
    batches: Batches,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(callbacks=[SampleLogger(every_n_steps=1)], max_steps=1)
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    trainer.fit(toy_module, batches(1))
    assert len(toy_module.calls) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argument", "value"), [("every_n_steps", -1), ("num_videos", 0), ("seed", -1), ("fps", 0)])
def test_numbers_out_of_range_are_refused(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} .*--samples\.{argument}"):
        SampleLogger(**{argument: value})


def test_each_task_has_a_grid_of_its_own_with_captions(
    toy_module: LightningModule,
    batches: Batches,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sample_captions(batch: dict[str, Any], count: int) -> list[tuple[str, str]]:
        return [("inpainting" if row % 2 else "video", f"class {row}") for row in range(count)]

    monkeypatch.setattr(toy_module, "sample_captions", sample_captions, raising=False)
    logger = TensorBoardLogger(str(tmp_path), name="run")
    trainer = make_trainer(logger=logger, callbacks=[SampleLogger(every_n_steps=1)], max_steps=1)
    trainer.fit(toy_module, batches(1, batch_size=3))

    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["samples/video", "samples/inpainting"]
    (two,), (one,) = events.Images("samples/video"), events.Images("samples/inpainting")
    assert one.width == 22 * 6 + 4  # 6 pixels become 132, so that a caption has room
    assert two.width == 2 * (22 * 6 + 2) + 2
    assert one.height > 22 * 8 + 4 + 10
