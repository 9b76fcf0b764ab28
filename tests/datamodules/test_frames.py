from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from numbered_video import numbered_frame, read_numbers
from PIL import Image

from datamodules.decoders import frame_files, iter_images
from datamodules.decoding import UnreadableVideoError
from datamodules.frames import FramesDataModule, find_videos
from datamodules.listing import Video
from datamodules.sampler import ClipRequest
from datamodules.video import VideoClips


def write_frames(folder: Path, num_frames: int, name: str = "frame_{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_frames):
        Image.fromarray(numbered_frame(number)).save(folder / name.format(number))
    return folder


def data_of(root: Path, **options: Any) -> FramesDataModule:
    return FramesDataModule(str(root), **{"num_frames": 4, "resolution": 32, "batch_size": 2, **options})


def videos_of(data: FramesDataModule, split: Any) -> dict[str, int]:
    """Paths relative to the root, with their labels."""
    dataset = data.make_dataset(split)
    assert isinstance(dataset, VideoClips)
    return {video.path.relative_to(data.found_root()).as_posix(): video.label for video in dataset.videos}


class TestFrameFolders:
    @pytest.mark.parametrize("name", ["{}.png", "frame_{}.png", "take 2_{}.JPG", "{:07d}.jpeg"])
    def test_frames_come_in_the_order_of_their_numbers(self, tmp_path: Path, name: str) -> None:
        folder = write_frames(tmp_path / "video", 12, name)
        frames = np.stack(list(Video(folder, 0, 12, decoder="images").frames(1, 6, 2)))
        assert frames.dtype == np.uint8
        assert read_numbers(frames) == [1, 3, 5, 7, 9, 11]

    def test_other_files_are_no_frames(self, tmp_path: Path) -> None:
        folder = write_frames(tmp_path / "video", 3)
        for name in ("notes.txt", ".hidden_9.png", "Thumbs.db"):
            (folder / name).write_bytes(b"")
        assert len(frame_files(folder)) == 3

    def test_grey_and_transparent_images_become_colour(self, tmp_path: Path) -> None:
        (tmp_path / "video").mkdir()
        for number, mode in enumerate(["L", "RGBA", "P", "RGB"]):
            Image.new(mode, (8, 6)).save(tmp_path / "video" / f"{number}.png")
        frames = list(iter_images(tmp_path / "video", 0, 4, 1))
        assert [frame.shape for frame in frames] == [(6, 8, 3)] * 4

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
    def test_a_broken_image_is_an_unreadable_video(self, tmp_path: Path, content: bytes) -> None:
        folder = write_frames(tmp_path / "video", 3)
        (folder / "frame_1.png").write_bytes(content)
        with pytest.raises(UnreadableVideoError, match="video"):
            list(iter_images(folder, 0, 3, 1))

    def test_a_truncated_image_is_an_unreadable_video(self, tmp_path: Path) -> None:
        folder = write_frames(tmp_path / "video", 3)
        content = (folder / "frame_1.png").read_bytes()
        (folder / "frame_1.png").write_bytes(content[: len(content) // 2])
        with pytest.raises(UnreadableVideoError, match="video"):
            list(iter_images(folder, 0, 3, 1))

    def test_frames_that_vanished_are_an_unreadable_video(self, tmp_path: Path) -> None:
        folder = write_frames(tmp_path / "video", 3)
        with pytest.raises(UnreadableVideoError, match="video"):
            list(iter_images(folder, 0, 9, 1))


class TestFindingVideos:
    def test_files_and_folders_of_frames_are_found_at_any_depth(self, tmp_path: Path, small_avi: bytes) -> None:
        write_frames(tmp_path / "a" / "b" / "c", 1)
        write_frames(tmp_path / "looks_like_a_file.mp4", 1)
        (tmp_path / "a" / "clip.AVI").write_bytes(small_avi)
        (tmp_path / "a" / "text.txt").write_text("")
        write_frames(tmp_path / ".longtake", 1)
        found = [path.relative_to(tmp_path).as_posix() for path in find_videos(tmp_path)]
        assert found == ["a/b/c", "a/clip.AVI", "looks_like_a_file.mp4"]

    @pytest.mark.parametrize("held_out", ["val", "test"])
    def test_sub_folders_are_the_splits_where_they_exist(self, tmp_path: Path, small_avi: bytes, held_out: str) -> None:
        write_frames(tmp_path / "train" / "one", 6)
        write_frames(tmp_path / held_out / "two", 6)
        (tmp_path / "train" / "three.avi").write_bytes(small_avi)
        data = data_of(tmp_path)
        assert videos_of(data, "train") == {"train/one": 0, "train/three.avi": 0}
        assert videos_of(data, "val") == {f"{held_out}/two": 0}

    def test_val_is_preferred_to_test(self, tmp_path: Path) -> None:
        for split in ("train", "val", "test"):
            write_frames(tmp_path / split / "video", 6)
        assert videos_of(data_of(tmp_path), "val") == {"val/video": 0}

    def test_without_splits_a_fixed_share_is_held_out_whatever_the_seed(self, tmp_path: Path) -> None:
        for number in range(20):
            write_frames(tmp_path / f"video_{number}", 4)
        val = videos_of(data_of(tmp_path, val_fraction=0.2), "val")
        train = videos_of(data_of(tmp_path, val_fraction=0.2), "train")
        assert len(val) == 4
        assert len(train) == 16
        assert not set(val) & set(train)
        assert videos_of(data_of(tmp_path, val_fraction=0.2, seed=9), "val") == val
        assert set(val) < set(videos_of(data_of(tmp_path, val_fraction=0.4), "val"))
        assert sorted(val) != sorted(f"video_{number}" for number in range(4))

    def test_folders_are_classes_numbered_over_both_splits(self, tmp_path: Path, small_avi: bytes) -> None:
        write_frames(tmp_path / "train" / "walk" / "clip", 4)
        write_frames(tmp_path / "val" / "jump" / "clip", 4)
        (tmp_path / "train" / "run").mkdir()
        (tmp_path / "train" / "run" / "clip.avi").write_bytes(small_avi)
        data = data_of(tmp_path)
        assert videos_of(data, "train") == {"train/run/clip.avi": 1, "train/walk/clip": 2}
        assert videos_of(data, "val") == {"val/jump/clip": 0}

    def test_a_video_outside_of_the_classes_means_that_there_are_none(self, tmp_path: Path) -> None:
        write_frames(tmp_path / "train" / "walk" / "clip", 4)
        write_frames(tmp_path / "train" / "clip", 4)
        write_frames(tmp_path / "val" / "walk" / "clip", 4)
        data = data_of(tmp_path)
        assert {**videos_of(data, "train"), **videos_of(data, "val")} == {
            "train/walk/clip": 0,
            "train/clip": 0,
            "val/walk/clip": 0,
        }

    def test_short_videos_are_left_out(self, tmp_path: Path) -> None:
        for name, length in (("a", 6), ("b", 7), ("c", 8)):
            write_frames(tmp_path / "train" / name, length)
        write_frames(tmp_path / "val" / "d", 7)
        assert videos_of(data_of(tmp_path, frame_stride=2), "train") == {"train/b": 0, "train/c": 0}


def test_batches_mix_files_and_folders(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    write_frames(tmp_path / "train" / "a", 6)
    write_video(tmp_path / "train" / "b.avi", 6)
    write_frames(tmp_path / "val" / "c", 6)
    data = data_of(tmp_path)
    data.prepare_data()
    data.setup()
    assert next(iter(data.train_dataloader()))["video"].shape == (2, 3, 4, 32, 32)
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0]]
    assert (tmp_path / ".longtake" / "index.jsonl").is_file()


class TestErrors:
    def test_a_root_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere .*--data.root or LONGTAKE_FRAMES"):
            data_of(tmp_path / "nowhere").setup()

    def test_a_root_with_too_few_videos_says_what_was_expected(self, tmp_path: Path) -> None:
        write_frames(tmp_path / "only", 4)
        with pytest.raises(FileNotFoundError, match=r"0 videos for training and 1 for validation: .*\.webm.*\.png"):
            data_of(tmp_path).setup()

    @pytest.mark.parametrize("fraction", [0.0, 1.0])
    def test_a_fraction_that_empties_a_split_is_refused(self, tmp_path: Path, fraction: float) -> None:
        with pytest.raises(ValueError, match=r"val_fraction=.*--data.val_fraction"):
            data_of(tmp_path, val_fraction=fraction)


class Recorder(LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], 0.1)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_are_whole_numbers_until_they_are_on_the_device(
    tmp_path: Path, antialias: bool, num_workers: int
) -> None:
    """Workers hand over a quarter of the memory; modules get float32 in [-1, 1], to the bit what the data set gives."""
    for name in ("train/a", "train/b", "val/c"):
        write_frames(tmp_path / name, 6)
    data = data_of(tmp_path, antialias=antialias, num_workers=num_workers)
    data.prepare_data()
    data.setup()
    handed_over = next(iter(data.train_dataloader()))["video"]
    assert handed_over.dtype == (torch.uint8 if antialias else torch.float32)
    module = Recorder()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, use_distributed_sampler=False, enable_model_summary=False, **options)  # type: ignore[arg-type] # mixed types
    trainer.fit(module, datamodule=data)
    trained, validated = module.batches[-1], module.batches[0]
    for batch, split in ((trained, "train"), (validated, "val")):
        for video, index in zip(batch["video"], batch["index"].tolist(), strict=True):
            assert video.dtype == torch.float32
            assert torch.equal(video, data.datasets[split][ClipRequest(index)]["video"])
