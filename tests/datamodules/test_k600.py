from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.k600 import K600DataModule
from datamodules.listing import VideoWindow
from datamodules.sampler import ClipRequest
from datamodules.video import VideoClips

# Identifiers may begin with `-` or `_`, and two may differ in case alone.
TRAIN = [
    ("abseiling", "-aBcDeFgHiJ", 3),
    ("abseiling", "-abcdefghij", 3),
    ("tie, knotting (not on a tie)", "_x0123456-9", 120),
    ("massaging person's head", "abcd_012345", 0),
]
VAL = [("massaging person's head", "LAcSOxdNrmI", 61), ("abseiling", "yq_M1PMw2hY", 38)]
MakeRoot = Callable[..., Path]


@pytest.fixture(scope="session")
def small_mp4(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> bytes:
    path = tmp_path_factory.mktemp("mp4") / "clip.mp4"
    return write_video(path, 20, codec="libx264", options={"preset": "ultrafast"}).read_bytes()


def write_list(file: Path, rows: Sequence[tuple[str, str, int]], split: str, quoted: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'"{label}",{name},{start},{start + 10},{split}' for label, name, start in rows]
    if not quoted:
        lines = [line.replace('"', "").replace(" ", "_") for line in lines]
    file.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]) + "\n")


@pytest.fixture
def make_root(tmp_path: Path, small_mp4: bytes) -> MakeRoot:
    """Kinetics-600 in small, in a heap as CVDF's script leaves it, or in a folder for each class."""

    def make(folders: bool = False, annotations: str = "annotations", suffix: str = ".csv") -> Path:
        for split, rows in (("train", TRAIN), ("val", VAL)):
            write_list(tmp_path / annotations / f"{split}{suffix}", rows, split)
            for label, name, start in rows:
                place = tmp_path / split / label.replace(" ", "_") if folders else tmp_path / split
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{name}_{start:06d}_{start + 10:06d}.mp4").write_bytes(small_mp4)
        return tmp_path

    return make


def data_of(root: Path, **options: Any) -> K600DataModule:
    return K600DataModule(str(root), **{"num_frames": 4, "resolution": 32, "batch_size": 2, **options})


def labels(data: K600DataModule, split: Any) -> dict[str, int]:
    return {path.name[:11]: label for path, label in data.listing()[split].items()}


@pytest.mark.parametrize("layout", [{}, {"folders": True}, {"annotations": "."}, {"suffix": ".txt"}])
def test_labels_come_from_the_lists_in_each_layout(make_root: MakeRoot, layout: dict[str, Any]) -> None:
    data = data_of(make_root(**layout))
    assert data.class_names() == ["abseiling", "massaging person's head", "tie, knotting (not on a tie)"]
    assert labels(data, "train") == {"-aBcDeFgHiJ": 0, "-abcdefghij": 0, "_x0123456-9": 2, "abcd_012345": 1}
    assert labels(data, "val") == {"LAcSOxdNrmI": 1, "yq_M1PMw2hY": 0}


def test_batches_hold_video_label_and_index(make_root: MakeRoot) -> None:
    data = data_of(make_root())
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (2, 3, 4, 32, 32)
    assert batch["label"].tolist() == [[0, 0, 2, 1][index] for index in batch["index"]]
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[1, 0]]


def test_one_class_written_in_two_ways_is_one(make_root: MakeRoot) -> None:
    root = make_root()
    write_list(root / "annotations/val.csv", VAL, "val", quoted=False)
    data = data_of(root)
    assert data.class_names()[1] == "massaging person's head"
    assert labels(data, "val") == {"LAcSOxdNrmI": 1, "yq_M1PMw2hY": 0}


def test_a_validation_list_of_another_name_is_found(make_root: MakeRoot) -> None:
    root = make_root()
    (root / "annotations/val.csv").rename(root / "annotations/validate.csv")
    (root / "val").rename(root / "validate")
    assert len(data_of(root).listing()["val"]) == 2


def test_names_need_no_leading_zeros_and_starts_may_be_fractions(make_root: MakeRoot) -> None:
    root = make_root()
    (root / "val/yq_M1PMw2hY_000038_000048.mp4").rename(root / "val/yq_M1PMw2hY_38_48.MP4")
    file = root / "annotations/val.csv"
    file.write_text(file.read_text().replace(",38,48,", ",38.0,48.0,"))
    assert len(data_of(root).listing()["val"]) == 2


def test_six_clips_of_each_validation_video_are_spread_over_time_and_place(make_root: MakeRoot) -> None:
    val = data_of(make_root(), val_windows=2, val_crops=3).make_dataset("val")
    windows = [video for video in val.videos if isinstance(video, VideoWindow)]
    assert len(windows) == 2 * 6
    assert {(w.first_frame, w.crop) for w in windows} == {(start, (i, 3)) for start in (0, 16) for i in range(3)}
    assert [w.label for w in windows[:4]] == [1, 0, 1, 0]
    whole = data_of(make_root(), resolution=64).make_dataset("val")  # a crop of 64 of 128 columns: nothing is resized
    wide = data_of(make_root(), resolution=64, val_windows=2, val_crops=3).make_dataset("val")
    assert whole[ClipRequest(0)]["video"].shape == wide[ClipRequest(11)]["video"].shape == (3, 4, 64, 64)


def test_without_windows_validation_draws_a_place_and_crops_the_centre(make_root: MakeRoot) -> None:
    val = data_of(make_root(), resolution=64, random_crop=True, horizontal_flip=True).make_dataset("val")
    assert (val.random_crop, val.horizontal_flip) == (False, False)
    frame = (val[ClipRequest(0)]["video"][:, 0] + 1) * 127.5  # [3, 64, 64], the middle four of eight bars
    start = val.start(0, epoch=0)
    bits = [int(frame[:, :, 8 + 16 * bar].mean() > 127) for bar in range(4)]
    assert bits == [(start >> bit) & 1 for bit in range(2, 6)]


class TestWhatDiffers:
    def test_missing_videos_are_listed_where_they_should_be_counted_and_named(self, make_root: MakeRoot) -> None:
        root = make_root()
        missing = root / "train/-aBcDeFgHiJ_000003_000013.mp4"
        missing.unlink()
        data = data_of(root)
        assert data.listing()["train"][missing] == 0
        with pytest.warns(UserWarning, match=r"1 of 4 videos .* left out, such as: .*-aBcDeFgHiJ_000003_000013\.mp4"):
            assert len(data.make_dataset("train")) == 3

    @pytest.mark.parametrize(
        "name",
        [
            "not_in_list_000003_000013.mp4",
            "-aBcDeFgHiJ_000004_000014.mp4",  # of another second: another version of Kinetics
            "-aBcDeFgHiJ.mp4",
            "notes.mp4",
        ],
    )
    def test_files_of_no_list_are_counted_named_and_left_out(self, make_root: MakeRoot, name: str) -> None:
        root = make_root()
        (root / "train" / name).write_bytes(b"anything")
        with pytest.warns(UserWarning, match=rf"train: 1 files are in no list and left out, such as .*/{name}"):
            assert len(data_of(root).listing()["train"]) == 4

    def test_videos_of_both_lists_are_left_out_of_training(self, make_root: MakeRoot, small_mp4: bytes) -> None:
        root = make_root()
        write_list(root / "annotations/val.csv", [*VAL, ("abseiling", "-aBcDeFgHiJ", 50)], "val")
        (root / "val/-aBcDeFgHiJ_000050_000060.mp4").write_bytes(small_mp4)
        data = data_of(root)
        with pytest.warns(
            UserWarning, match=r"1 videos are in both lists and left out of training, such as -aBcDeFgHiJ"
        ):
            data.listing()
        assert labels(data, "train").keys() == {"-abcdefghij", "_x0123456-9", "abcd_012345"}
        assert labels(data, "val").keys() == {"LAcSOxdNrmI", "yq_M1PMw2hY", "-aBcDeFgHiJ"}

    def test_damaged_videos_are_left_out(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "train/abcd_012345_000000_000010.mp4").write_bytes(b"<html>")
        with pytest.warns(UserWarning, match=r"1 of 4 videos cannot be read and are left out.*abcd_012345"):
            assert isinstance(dataset := data_of(root).make_dataset("train"), VideoClips)
        assert len(dataset) == 3


class TestWhatIsMissing:
    def test_no_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LONGTAKE_K600", raising=False)
        with pytest.raises(FileNotFoundError, match=r"set --data.root or LONGTAKE_K600\. .*cvdfoundation"):
            K600DataModule().setup()
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            data_of(tmp_path / "nowhere").setup()

    def test_no_list(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "annotations/val.csv").unlink()
        with pytest.raises(FileNotFoundError, match=r"no list val\.txt or val\.csv or .* in .*annotations"):
            data_of(root).setup()

    def test_a_list_of_another_form_is_refused(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "annotations/train.txt").write_text("abseiling/-aBcDeFgHiJ_000003_000013.mp4 0\n")
        with pytest.raises(
            ValueError, match=r"train\.txt has no column label, youtube_id, time_start: expected a header"
        ):
            data_of(root).setup()

    def test_no_video(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "val").rename(root / "elsewhere")
        with pytest.raises(
            FileNotFoundError, match=r"none of the 2 videos .*/val: expected .*LAcSOxdNrmI_000061_000071\.mp4 "
        ):
            data_of(root).setup()

    @pytest.mark.parametrize("option", ["val_windows", "val_crops"])
    def test_no_window(self, option: str) -> None:
        with pytest.raises(ValueError, match=rf"{option}=0 is too small: at least 1 \(--data\.{option}\)"):
            K600DataModule(**{option: 0})
