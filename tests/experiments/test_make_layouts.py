"""Two videos, written in every official layout, come back from every data module."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import (
    BAIRDataModule,
    CaptionedDataModule,
    FramesDataModule,
    ImageFolderDataModule,
    K600DataModule,
    SSV2DataModule,
    UCF101DataModule,
)
from datamodules.sampler import ClipRequest
from datamodules.video import VideoDataModule
from experiments.make_layouts import main, write_video

STREET_FRAMES, TURN_FRAMES, FRAMES = 100, 31, 30
LEFT, RIGHT = slice(None, 12), slice(-12, None)


def grey(number: int) -> np.ndarray:
    """A frame that says its number: its clip by the left half, its place in the clip by the darker right half."""
    frame = np.full((48, 64, 3), 8 * (number % FRAMES), np.uint8)
    frame[:, :32] = 240 + 5 * (number // FRAMES)
    return frame


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name, count in (("street scene", STREET_FRAMES), ("left_turn", TURN_FRAMES), ("short", 7)):
        frames = np.stack([grey(number) for number in range(count)])
        write_video(folder / f"clips/{name}.mp4", frames, "libx264", 25, {"crf": "10"})
    (folder / "clips/broken.mp4").write_bytes(b"<html>")
    main([str(folder / "clips"), str(folder / "out"), f"--frames={FRAMES}"])
    return folder / "out"


MakeData = Callable[[Path], VideoDataModule]
DATA: dict[str, MakeData] = {
    "ucf101": lambda root: UCF101DataModule(str(root), num_frames=FRAMES, resolution=32),
    "bair": lambda root: BAIRDataModule(str(root), camera="image_main", num_frames=FRAMES, resolution=32),
    "k600": lambda root: K600DataModule(str(root), num_frames=FRAMES, resolution=32),
    "ssv2": lambda root: SSV2DataModule(str(root), num_frames=FRAMES, resolution=32),
    "frames": lambda root: FramesDataModule(str(root), num_frames=FRAMES, resolution=32),
    "sky_timelapse": lambda root: FramesDataModule(
        str(root), num_frames=FRAMES, resolution=32, train_folder="sky_train", val_folder="sky_test", has_classes=False
    ),
    "taichi_hd": lambda root: FramesDataModule(str(root), num_frames=FRAMES, resolution=32),
    "nuscenes_front": lambda root: FramesDataModule(str(root), num_frames=FRAMES, resolution=32, has_classes=False),
    "objectron": lambda root: FramesDataModule(str(root), num_frames=FRAMES, resolution=32, has_classes=False),
    "captions": lambda root: CaptionedDataModule(str(root), num_frames=FRAMES, resolution=32, audio=True),
}
UNLABELLED = ("bair", "sky_timelapse", "taichi_hd", "nuscenes_front", "objectron")


@pytest.mark.parametrize("layout", DATA)
def test_every_clip_comes_back_with_its_label_and_its_frames(layouts: Path, layout: str) -> None:
    data = DATA[layout](layouts / layout)
    # files in the order of their names: `left_turn` has one clip, `street scene` three, of which the last is held out
    turn, street = (0, 0) if layout in UNLABELLED else (0, 1)
    expected = {"train": {(turn, 0), (street, 0), (street, 30)}, "val": {(street, 60)}}
    for split in ("train", "val"):
        dataset = data.make_dataset(split)
        seen = set()
        for index in range(len(dataset)):
            item = dataset[ClipRequest(index)]
            clip, place = ((item["video"][..., part].mean((0, 2, 3)) + 1) * 127.5 for part in (LEFT, RIGHT))
            assert torch.equal((place / 8).round(), torch.arange(FRAMES).float())
            (start,) = {FRAMES * round((level - 240) / 5) for level in clip.tolist()}
            seen.add((item["label"], start))
        assert seen == expected[split]


def test_images_and_captions_say_which_clip_they_show(layouts: Path) -> None:
    images = ImageFolderDataModule(str(layouts / "images"), resolution=32)
    assert [len(images.make_dataset(split)) for split in ("train", "val")] == [3, 1]
    item = CaptionedDataModule(str(layouts / "captions"), audio=True).make_dataset("val")[ClipRequest(0)]
    assert item["text"] == "part 3 of street scene"
    assert item["audio"].amax(-1).argmax(2).unique().tolist() == [15]  # its tone, 2,000 Hz, ends that band


@pytest.mark.parametrize(("camera", "lighter"), [("image_main", "left"), ("image_aux1", "right")])
def test_the_second_camera_sees_the_mirror_image(layouts: Path, camera: str, lighter: str) -> None:
    data = BAIRDataModule(str(layouts / "bair"), camera=camera, actions=True)  # type: ignore[arg-type]
    item = data.make_dataset("val")[ClipRequest(0)]
    left, right = item["video"][..., LEFT].mean(), item["video"][..., RIGHT].mean()
    assert (left > right) == (lighter == "left")
    assert item["action"].shape == (16, 4)


@pytest.mark.parametrize(("fold", "held_out"), [(1, [60]), (2, [30]), (3, [0, 0])])
def test_the_three_splits_of_ucf101_hold_out_different_clips(layouts: Path, fold: int, held_out: list[int]) -> None:
    lists = layouts / "ucf101/ucfTrainTestlist"
    test, train = ((lists / f"{name}list0{fold}.txt").read_text().splitlines() for name in ("test", "train"))
    assert [30 * (int(row.split("_g")[1][:2]) - 1) for row in test] == held_out
    assert {row.split()[0] for row in train}.isdisjoint(test)
    assert len(train) + len(test) == 4


def test_classes_carry_the_videos_names(layouts: Path) -> None:
    assert K600DataModule(str(layouts / "k600")).class_names() == ["left turn", "street scene"]
    ssv2 = SSV2DataModule(str(layouts / "ssv2"))
    assert ssv2.class_names() == ["Showing something of left turn", "Showing something of street scene"]
    assert ssv2.direction_sensitive() == [0]


class TestWhatIsRefused:
    def test_an_existing_folder(self, layouts: Path) -> None:
        with pytest.raises(FileExistsError, match=r"exists already\. Remove it"):
            main([str(layouts.parent / "clips"), str(layouts)])

    def test_clips_shorter_than_bairs_records(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--frames=29 is too small: BAIR's records have 30"):
            main([str(tmp_path), str(tmp_path / "out"), "--frames=29"])

    def test_videos_of_which_nothing_can_be_held_out(self, layouts: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"has no video of 120 frames"):
            main([str(layouts.parent / "clips"), str(tmp_path / "out"), "--frames=40", "--layouts", "frames"])
