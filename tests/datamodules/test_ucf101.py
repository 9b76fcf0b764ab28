import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.ucf101 import UCF101DataModule
from datamodules.video import VideoClips

CLASSES = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
MakeRoot = Callable[..., Path]


def rows(groups: range, spelling: str = "HandStandPushups") -> list[str]:
    """Rows of a list file: class folder and file name disagree on one class, as in the official lists."""
    names = {"HandstandPushups": spelling}
    return [f"{c}/v_{names.get(c, c)}_g{group:02d}_c01.avi" for c in CLASSES for group in groups]


@pytest.fixture
def make_root(tmp_path: Path, small_avi: bytes) -> MakeRoot:
    """UCF-101 in small: 2 groups for training and 1 to test, lists for split 1 and, swapped, for split 2."""

    def make(flat: bool = False) -> Path:
        lists = tmp_path / "ucfTrainTestlist"
        lists.mkdir()
        lists.joinpath("classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(CLASSES, start=1)))
        train = [f"{row} {CLASSES.index(row.split('/')[0]) + 1}\n" for row in rows(range(8, 10))]
        lists.joinpath("trainlist01.txt").write_text("".join(train))
        lists.joinpath("testlist01.txt").write_text("".join(f"{row}\n" for row in rows(range(1, 2))))
        lists.joinpath("trainlist02.txt").write_text("".join(f"{row} 1\n" for row in rows(range(1, 2))))
        lists.joinpath("testlist02.txt").write_text("".join(f"{row}\n" for row in rows(range(8, 10))))
        # the flat archive spells the file names as the folder is spelled
        for row in rows(range(1, 10), "HandstandPushups" if flat else "HandStandPushups"):
            file = tmp_path / ("UCF101" if flat else "UCF-101") / (row.split("/")[1] if flat else row)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(small_avi)
        return tmp_path

    return make


def data_of(root: Path | None, num_frames: int = 4, **options: int) -> UCF101DataModule:
    return UCF101DataModule(
        None if root is None else str(root), num_frames=num_frames, resolution=32, batch_size=2, **options
    )


def labels(dataset: object) -> dict[str, int]:
    assert isinstance(dataset, VideoClips)
    return {video.path.name: video.label for video in dataset.videos}


@pytest.mark.parametrize("flat", [False, True])
def test_both_archives_give_the_official_split_with_labels_from_zero(make_root: MakeRoot, flat: bool) -> None:
    data = data_of(make_root(flat))
    data.setup()
    spelled = "HandstandPushups" if flat else "HandStandPushups"
    assert labels(data.datasets["val"]) == {
        "v_ApplyEyeMakeup_g01_c01.avi": 0,
        f"v_{spelled}_g01_c01.avi": 1,
        "v_YoYo_g01_c01.avi": 2,
    }
    train = labels(data.datasets["train"])
    assert len(train) == 6
    assert {name[-12:-8] for name in train} == {"_g08", "_g09"}
    assert list(train.values()) == [0, 0, 1, 1, 2, 2]


def test_another_split_reads_its_own_lists(make_root: MakeRoot) -> None:
    data = data_of(make_root(), split=2)
    data.setup()
    assert (len(labels(data.datasets["train"])), len(labels(data.datasets["val"]))) == (3, 6)


def test_batches_hold_video_label_and_index(make_root: MakeRoot) -> None:
    data = data_of(make_root())
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (2, 3, 4, 32, 32)
    assert batch["label"].tolist() == [[0, 0, 1, 1, 2, 2][index] for index in batch["index"]]
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [2, 1]


def test_crops_and_flips_are_for_training_alone(make_root: MakeRoot) -> None:
    data = UCF101DataModule(str(make_root()), random_crop=True, horizontal_flip=True)
    train, val = data.make_dataset("train"), data.make_dataset("val")
    assert (train.random_crop, train.horizontal_flip, val.random_crop, val.horizontal_flip) == (
        True,
        True,
        False,
        False,
    )


def test_videos_too_short_for_the_clip_are_left_out(make_root: MakeRoot, write_video: Callable[..., Path]) -> None:
    root = make_root()
    write_video(root / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi", 7)
    assert len(data_of(root, num_frames=8).make_dataset("train")) == 5
    assert len(data_of(root, num_frames=7).make_dataset("train")) == 6


def test_the_environment_names_the_root(make_root: MakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_UCF101", str(make_root()))
    assert len(data_of(None).make_dataset("train")) == 6


def test_workers_decode_the_same_clips(make_root: MakeRoot) -> None:
    root = make_root()
    alone, helped = data_of(root), data_of(root, num_workers=2)
    for data in (alone, helped):
        data.setup()
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(one["video"], other["video"])


def test_the_class_is_that_of_the_list_in_the_order_of_their_numbers(make_root: MakeRoot) -> None:
    root = make_root()
    lists = root / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("3 ApplyEyeMakeup\n1 HandstandPushups\n2 YoYo\n")
    data = data_of(root)
    assert data.class_names() == ["HandstandPushups", "YoYo", "ApplyEyeMakeup"]
    assert list(data.listing()["val"].values()) == [2, 0, 1]


def test_names_are_found_whatever_their_case(make_root: MakeRoot) -> None:
    root = make_root()
    folder = root / "UCF-101" / "YoYo"
    (folder / "v_YoYo_g08_c01.avi").rename(folder / "V_YOYO_G08_C01.AVI")
    assert len(data_of(root).make_dataset("train")) == 6


class TestWhatIsMissing:
    def test_nothing_is_read_before_setup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LONGTAKE_UCF101", raising=False)
        data = data_of(None)
        with pytest.raises(FileNotFoundError, match=r"set --data.root or LONGTAKE_UCF101\. .*crcv\.ucf\.edu"):
            data.setup()

    def test_a_root_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere \(--data.root or .*crcv\.ucf\.edu"):
            data_of(tmp_path / "nowhere").setup()

    @pytest.mark.parametrize("name", ["classInd.txt", "trainlist01.txt"])
    def test_a_list_that_is_not_there_is_named(self, make_root: MakeRoot, name: str) -> None:
        root = make_root()
        (root / "ucfTrainTestlist" / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no list .*ucfTrainTestlist/{name}.*crcv\.ucf\.edu"):
            data_of(root).setup()

    def test_a_class_without_a_number_is_named(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
        with pytest.raises(ValueError, match=r"classInd.txt lacks classes of trainlist01.txt: HandstandPushups"):
            data_of(root).setup()

    def test_without_any_video_the_expected_folders_are_named(self, make_root: MakeRoot) -> None:
        root = make_root()
        shutil.rmtree(root / "UCF-101")
        with pytest.raises(FileNotFoundError, match=r"none of the 6 videos of trainlist01.txt .*UCF-101/<Class>/v_"):
            data_of(root).setup()

    def test_single_videos_are_counted_and_named_in_a_warning(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "UCF-101" / "YoYo" / "v_YoYo_g09_c01.avi").unlink()
        with pytest.warns(UserWarning, match=r"1 of 6 videos cannot be read .*v_YoYo_g09_c01.avi: is not there"):
            assert len(data_of(root).make_dataset("train")) == 5

    def test_damaged_videos_are_counted_and_named_in_a_warning(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "UCF-101" / "YoYo" / "v_YoYo_g09_c01.avi").write_bytes(b"<html>")
        with pytest.warns(UserWarning, match=r"1 of 6 videos cannot be read and are left out.*v_YoYo_g09_c01.avi"):
            assert len(data_of(root).make_dataset("train")) == 5
