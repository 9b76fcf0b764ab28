import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.decoding import UnreadableVideoError
from datamodules.images import ImageClips, ImageFile, ImageFiles, ImageFolderDataModule, shrunk
from datamodules.sampler import ClipRequest

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_image(path: Path, colour: Any = (255, 0, 0), size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def imagenet(root: Path, per_class: int = 2) -> Path:
    """Three classes in ImageNet's layout; the colour tells the class."""
    for split in ("train", "val"):
        for wnid, colour in zip(("n01", "n02", "n03"), COLOURS.values(), strict=True):
            for number in range(per_class):
                write_image(root / split / wnid / f"{wnid}_{number}.JPEG", colour)
    return root


def data_of(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"resolution": 32, "batch_size": 3, **options})


class TestShrunk:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((333, 500), (32, 48)), ((8, 16), (32, 64))],
    )
    def test_the_shorter_side_gets_the_resolution(self, size: tuple[int, int], expected: tuple[int, int]) -> None:
        assert shrunk(Image.new("RGB", size), 32).size == expected

    def test_halving_averages_exactly(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (256, 128, 3)).astype(np.uint8)
        found = np.array(shrunk(Image.fromarray(pixels), 32)).astype(float)
        expected = pixels.reshape(64, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(found - expected).max() <= 2  # Pillow rounds up to one level after each halving

    def test_the_rest_is_bicubic(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        expected = image.resize((38, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(np.array(shrunk(image, 32)), np.array(expected))


class TestItems:
    def test_an_image_is_a_clip_of_one_frame(self, tmp_path: Path) -> None:
        data = data_of(imagenet(tmp_path), batch_size=6)
        data.setup()
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        assert (batch["video"].shape, batch["video"].dtype) == ((6, 3, 1, 32, 32), torch.float32)
        assert (batch["is_image"].dtype, batch["is_image"].tolist()) == (torch.bool, [True] * 6)
        assert sorted(batch["label"].tolist()) == [0, 0, 1, 1, 2, 2]
        # the class's colour is +1 in its channel and -1 in the others
        means = batch["video"].mean((2, 3, 4))
        assert torch.allclose(means, 2 * torch.eye(3)[batch["label"]] - 1, atol=0.05)

    def test_the_middle_is_kept_unless_asked_otherwise(self, tmp_path: Path) -> None:
        pixels = np.zeros((32, 96, 3), np.uint8)
        pixels[:, 32:64] = 255
        for split in ("train", "val"):
            (tmp_path / split / "a").mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
        middle = data_of(tmp_path).make_dataset("train")
        assert torch.all(middle[ClipRequest(0)]["video"] == 1)
        moved = data_of(tmp_path, random_crop=True).make_dataset("train")
        shares = [moved[ClipRequest(0, epoch)]["video"].mean().item() for epoch in range(20)]
        assert len(set(shares)) > 5
        assert shares == [moved[ClipRequest(0, epoch)]["video"].mean().item() for epoch in range(20)]
        held_out = data_of(tmp_path, random_crop=True).make_dataset("val")
        assert all(torch.all(held_out[ClipRequest(0, epoch)]["video"] == 1) for epoch in range(5))

    def test_half_of_the_training_images_are_mirrored_on_request(self, tmp_path: Path) -> None:
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16] = 255
        for split in ("train", "val"):
            (tmp_path / split / "a").mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
        dataset = data_of(tmp_path, horizontal_flip=True).make_dataset("train")
        mirrored = [bool(dataset[ClipRequest(0, epoch)]["video"][0, 0, 0, 0] < 0) for epoch in range(40)]
        assert 10 < sum(mirrored) < 30

    @pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
    def test_every_mode_becomes_colour(self, tmp_path: Path, mode: str) -> None:
        suffix = "jpg" if mode == "CMYK" else "png"
        path = write_image(tmp_path / f"a.{suffix}", (204, 204, 204), mode=mode)
        (pixels,) = ImageFile(path, 0, num_frames=1, resolution=32).frames(0, 1, 1)
        assert pixels.shape == (32, 38, 3)
        assert np.abs(pixels.astype(int) - 204).max() <= 3


class TestBrokenImages:
    @pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n broken"])
    def test_another_image_takes_the_place_always_the_same(
        self, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        imagenet(tmp_path, per_class=3)
        (tmp_path / "train" / "n01" / "n01_1.JPEG").write_bytes(content)
        with caplog.at_level(logging.WARNING):
            data = data_of(tmp_path)
            data.setup()
            items = [data.datasets["train"][ClipRequest(1, 4)] for _ in range(2)]
        assert items[0]["index"] == items[1]["index"] != 1
        assert items[0]["label"] == items[0]["index"] // 3
        assert items[0]["is_image"] is True
        assert "n01_1.JPEG" in caplog.text
        assert data.num_quarantined() == 1

    def test_a_broken_image_is_known_to_the_next_run(self, tmp_path: Path) -> None:
        imagenet(tmp_path, per_class=3)
        (tmp_path / "train" / "n01" / "n01_1.JPEG").write_bytes(b"")
        data_of(tmp_path).make_dataset("train")[ClipRequest(1)]
        with pytest.warns(UserWarning, match="1 of 9 videos are in quarantine"):
            data_of(tmp_path).make_dataset("train")

    def test_a_truncated_image_is_broken(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(UnreadableVideoError, match=r"a\.jpg"):
            list(ImageFile(path, 0, num_frames=1, resolution=32).frames(0, 1, 1))

    def test_an_absurdly_large_image_is_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_image(tmp_path / "a.png", size=(64, 64))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UnreadableVideoError, match=r"a\.png.*exceeds limit"):
            list(ImageFile(path, 0, num_frames=1, resolution=32).frames(0, 1, 1))


class TestFolders:
    def test_classes_are_numbered_over_both_splits(self, tmp_path: Path) -> None:
        for name in ("train/n03/a.JPEG", "train/n01/b.png", "val/n02/c.jpg", "val/n03/d.webp"):
            write_image(tmp_path / name)
        (tmp_path / "train" / "n01" / "notes.txt").write_text("")
        (tmp_path / "train" / "n01" / ".hidden.png").write_bytes(b"")
        found = {}
        for split in ("train", "val"):
            videos = data_of(tmp_path).make_dataset(split).videos
            found |= {video.path.relative_to(tmp_path).as_posix(): video.label for video in videos}
        assert found == {"train/n01/b.png": 0, "train/n03/a.JPEG": 2, "val/n02/c.jpg": 1, "val/n03/d.webp": 2}

    def test_the_list_of_files_stays_small_and_travels_to_workers(self, tmp_path: Path) -> None:
        names = [f"train/n{number // 1000:08d}/n{number // 1000:08d}_{number}.JPEG" for number in range(5_000)]
        files = ImageFiles(tmp_path, names, [0] * len(names), 32)
        assert len(pickle.dumps(files)) < 50 * len(names)
        assert files[4_999].path == tmp_path / names[-1]
        assert [file.path.name for file in files[:2]] == ["n00000000_0.JPEG", "n00000000_1.JPEG"]
        clips = ImageClips(files, 32, seed=0)
        assert isinstance(clips.videos, ImageFiles)
        assert len(pickle.dumps(clips)) < 60 * len(names)
        assert tmp_path / names[7] in clips._places
        assert tmp_path / "train/other.JPEG" not in clips._places

    def test_names_beyond_ascii_are_found(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            write_image(tmp_path / split / "käfer" / "größe 1.png")
        assert data_of(tmp_path).make_dataset("val")[ClipRequest(0)]["video"].shape == (3, 1, 32, 32)

    def test_a_missing_split_is_named(self, tmp_path: Path) -> None:
        write_image(tmp_path / "train" / "a" / "0.png")
        with pytest.raises(FileNotFoundError, match=r"No folder .*val .*--data.root"):
            data_of(tmp_path).setup()

    def test_a_flat_folder_is_told_what_was_expected(self, tmp_path: Path) -> None:
        write_image(tmp_path / "train" / "a" / "0.png")
        write_image(tmp_path / "val" / "0.png")
        with pytest.raises(FileNotFoundError, match=r"No images in .*val: expected val/<class>/.*class folders first"):
            data_of(tmp_path).setup()

    def test_more_than_one_frame_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"num_frames=16: an image is a clip of one frame"):
            data_of(tmp_path, num_frames=16)
