import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered_video import numbered_frame, read_number
from PIL import Image

from datamodules.bair import BAIRDataModule
from datamodules.decoding import UnreadableVideoError
from datamodules.sampler import ClipRequest
from datamodules.tfrecord import encode_example, write_records
from datamodules.video import VideoClips

MakeRoot = Callable[..., Path]


def features(record: int, frames: int = 30, jpeg: bool = False) -> dict[str, Any]:
    """A record as the archive has it. Frame k of the main camera shows k, that of the other one 200 - k."""
    content: dict[str, Any] = {}
    for number in reversed(range(frames)):  # no order is promised
        for camera, shown in (("image_main", number), ("image_aux1", 200 - number)):
            image = numbered_frame(shown, 64, 64)
            data = io.BytesIO()
            Image.fromarray(image).save(data, "JPEG")
            content[f"{number}/{camera}/encoded"] = data.getvalue() if jpeg else image.tobytes()
        content[f"{number}/action"] = [record, number, 0.5, -1.0]
        content[f"{number}/endeffector_pos"] = [record, number, 0.25]
    return content


def payload(record: int, frames: int = 30, jpeg: bool = False) -> bytes:
    return encode_example(features(record, frames, jpeg))


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """BAIR in small: 3 test records, and training files of 2 and 3."""

    def make(jpeg: bool = False) -> Path:
        for name, first, last in (("test", 0, 2), ("train", 3, 4), ("train", 5, 7)):
            folder = tmp_path / "softmotion30_44k" / name
            folder.mkdir(parents=True, exist_ok=True)
            payloads = [payload(record, jpeg=jpeg) for record in range(first, last + 1)]
            write_records(folder / f"traj_{first}_to_{last}.tfrecords", payloads)
        return tmp_path

    return make


def data_of(root: Path, **options: Any) -> BAIRDataModule:
    return BAIRDataModule(str(root), batch_size=2, **options)


def shown(video: torch.Tensor) -> list[int]:
    """Numbers that a clip's frames show."""
    return [read_number(((frame + 1) * 127.5).permute(1, 2, 0).numpy()) for frame in video.unbind(1)]


def test_training_clips_begin_at_each_of_the_fifteen_places(make_root: MakeRoot) -> None:
    train = data_of(make_root()).make_dataset("train")
    assert len(train) == 5
    starts = [200 - shown(train[ClipRequest(0, epoch, read_frames=1)]["video"])[0] for epoch in range(120)]
    assert set(starts) == set(range(15))


@pytest.mark.parametrize(("camera", "sign", "first"), [("image_aux1", -1, 200), ("image_main", 1, 0)])
@pytest.mark.parametrize("jpeg", [False, True])
def test_clips_show_consecutive_frames_of_the_camera(
    make_root: MakeRoot, camera: Any, sign: int, first: int, jpeg: bool
) -> None:
    val = data_of(make_root(jpeg), camera=camera).make_dataset("val")
    video = val[ClipRequest(1)]["video"]
    assert video.shape == (3, 16, 64, 64)
    assert shown(video) == [first + sign * frame for frame in range(16)]


def test_raw_pixels_come_through_exactly(make_root: MakeRoot) -> None:
    video = data_of(make_root()).make_dataset("val")[ClipRequest(0)]["video"]
    image = torch.from_numpy(numbered_frame(200, 64, 64)).permute(2, 0, 1)
    assert torch.equal(video[:, 0], image / 127.5 - 1)


def test_the_debiased_protocol_has_all_windows_of_all_test_records(make_root: MakeRoot) -> None:
    val = data_of(make_root(), val_windows=15, actions=True).make_dataset("val")
    assert len(val) == 3 * 15
    items = [val[ClipRequest(index)] for index in range(len(val))]
    seen = {(int(item["action"][0, 0]), 200 - shown(item["video"])[0]) for item in items}
    assert seen == {(record, start) for record in range(3) for start in range(15)}
    assert [int(item["action"][0, 1]) for item in items[:3]] == [0, 0, 0]  # the standard protocol comes first


def test_a_random_window_of_each_test_record_is_the_same_in_every_run(make_root: MakeRoot) -> None:
    root = make_root()
    starts = [
        [
            shown(data_of(root, val_windows=None, seed=seed).make_dataset("val")[ClipRequest(i)]["video"])[0]
            for i in range(3)
        ]
        for seed in (0, 0, 1)
    ]
    assert starts[0] == starts[1] != starts[2]


def test_actions_belong_to_the_frames_of_the_clip(make_root: MakeRoot) -> None:
    train = data_of(make_root(), num_frames=8, frame_stride=2, actions=True).make_dataset("train")
    for request in (ClipRequest(3, 5), ClipRequest(3, 6, 2, 2, read_start=1, read_frames=4)):
        item = train[request]
        frames = [200 - number for number in shown(item["video"])]
        assert item["action"].dtype == item["endeffector_pos"].dtype == torch.float32
        assert item["action"].tolist() == [[6.0, frame, 0.5, -1.0] for frame in frames]
        assert item["endeffector_pos"].tolist() == [[6.0, frame, 0.25] for frame in frames]


def test_batches_hold_what_was_asked_for(make_root: MakeRoot) -> None:
    root = make_root()
    for actions in (False, True):
        data = data_of(root, actions=actions)
        data.prepare_data()
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert batch["video"].shape == (2, 3, 16, 64, 64)
        assert batch["label"].tolist() == [0, 0]
        assert ("action" in batch) == actions
    assert batch["action"].shape == (2, 16, 4)
    assert batch["endeffector_pos"].shape == (2, 16, 3)


def test_flips_are_for_training_alone(make_root: MakeRoot) -> None:
    data = data_of(make_root(), horizontal_flip=True)
    assert (data.make_dataset("train").horizontal_flip, data.make_dataset("val").horizontal_flip) == (True, False)


def test_files_are_listed_by_their_numbers_below_either_folder(make_root: MakeRoot) -> None:
    root = make_root()
    write_records(root / "softmotion30_44k/train/traj_1000_to_1000.tfrecords", [payload(1000)])
    for place in (root, root / "softmotion30_44k"):
        listing = data_of(place).listing()
        assert [path.name for path in listing["train"]] == [
            "traj_3_to_4.tfrecords",
            "traj_5_to_7.tfrecords",
            "traj_1000_to_1000.tfrecords",
        ]
        assert set(listing["val"].values()) == {0}


class TestWhatIsRefused:
    def test_a_damaged_record_is_left_out_with_its_place(self, make_root: MakeRoot) -> None:
        file = make_root() / "softmotion30_44k/train/traj_5_to_7.tfrecords"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.warns(
            UserWarning, match=r"BAIR train: .*traj_5_to_7\.tfrecords, record 1 at byte \d+: the payload"
        ):
            assert len(data_of(file.parents[2]).make_dataset("train")) == 4

    def test_a_file_that_holds_less_than_its_name_promises_is_named(self, make_root: MakeRoot) -> None:
        root = make_root()
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", [payload(0)])
        with pytest.warns(UserWarning, match=r"traj_0_to_2\.tfrecords ends after 1 records; its name promises 3"):
            assert len(data_of(root).make_dataset("val")) == 1
        entry = data_of(root).entries()[root / "softmotion30_44k/test/traj_0_to_2.tfrecords"]
        assert entry.is_truncated  # though nothing in the file tells

    def test_a_file_that_holds_more_than_its_name_promises_is_not_cut(self, make_root: MakeRoot) -> None:
        root = make_root()
        file = root / "softmotion30_44k/test/traj_0_to_2.tfrecords"
        write_records(file, [payload(number) for number in range(4)])
        entry = data_of(root).entries()[file]
        assert entry.error.endswith("holds 4 records; its name promises 3")
        assert not entry.is_truncated

    @pytest.mark.parametrize("frames", [29, 31])
    def test_a_record_without_thirty_frames_is_named_with_its_place(self, make_root: MakeRoot, frames: int) -> None:
        root = make_root()
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", [payload(0, frames)] * 3)
        with pytest.raises(
            UnreadableVideoError,
            match=rf"traj_0_to_2\.tfrecords, record 0 at byte 0: expected 30 frames .* found {frames};",
        ):
            data_of(root).make_dataset("val")

    def test_one_such_record_is_replaced_while_training_and_goes_into_quarantine_alone(
        self, make_root: MakeRoot, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = make_root()
        file = root / "softmotion30_44k/train/traj_5_to_7.tfrecords"
        write_records(file, [payload(5), payload(6, 12), payload(7)])
        data = data_of(root, actions=True)
        data.setup()
        train = data.datasets["train"]
        item = train[ClipRequest(3)]
        assert item["index"] != 3
        assert int(item["action"][0, 0]) == [3, 4, 5, 6, 7][item["index"]]
        assert "record 1 at byte" in caplog.text
        assert [train[ClipRequest(index)]["index"] for index in (2, 4)] == [2, 4]  # of the same file
        assert data.num_quarantined() == 1
        with pytest.warns(UserWarning, match=r"1 of 5 videos are in quarantine .*record 1 at byte"):
            again = data_of(root, actions=True).make_dataset("train")
        caplog.clear()
        assert again[ClipRequest(3)]["index"] == item["index"]
        assert caplog.text == ""  # the record was not read
        write_records(file, [payload(5), payload(6), payload(7)])  # another file
        assert data_of(root).make_dataset("train")[ClipRequest(3)]["index"] == 3

    def test_too_many_such_records_stop_the_run(self, make_root: MakeRoot) -> None:
        root = make_root()
        file = root / "softmotion30_44k/train/traj_5_to_7.tfrecords"
        write_records(file, [payload(5), payload(6, 12), payload(7)])
        train = data_of(root, max_bad_fraction=0.0).make_dataset("train")
        for number in range(99):
            train[ClipRequest(number % 5)]
        with pytest.raises(UnreadableVideoError, match=r"1 of 5 videos cannot be read, and 0 may be"):
            train[ClipRequest(0)]

    def test_a_camera_that_is_not_there_is_named_with_those_that_are(self, make_root: MakeRoot) -> None:
        root = make_root()
        content = {key: value for key, value in features(0).items() if "aux1" not in key}
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", [encode_example(content)] * 3)
        with pytest.raises(UnreadableVideoError, match=r"0/image_aux1/encoded .* Its cameras: image_main\."):
            data_of(root).make_dataset("val")

    @pytest.mark.parametrize(
        ("image", "reason"),
        [
            (bytes(12287), r"0/image_aux1/encoded holds 12287 bytes, expected 12288"),
            (b"\xff\xd8\xff\xe0" + bytes(90) + b"\xff\xd9", r"0/image_aux1/encoded is a broken JPEG file"),
        ],
        ids=["short", "broken"],
    )
    def test_an_image_of_another_kind_is_named(self, make_root: MakeRoot, image: bytes, reason: str) -> None:
        root = make_root()
        content = features(0) | {"0/image_aux1/encoded": image}
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", [encode_example(content)] * 3)
        with pytest.raises(UnreadableVideoError, match=rf"record 0 at byte 0: {reason}"):
            data_of(root).make_dataset("val")

    def test_records_without_actions_say_so(self, make_root: MakeRoot) -> None:
        root = make_root()
        content = {key: value for key, value in features(0).items() if "action" not in key}
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", [encode_example(content)] * 3)
        with pytest.raises(UnreadableVideoError, match=r"record 0 at byte 0: no `action` for each frame"):
            data_of(root, actions=True).make_dataset("val")

    def test_a_record_without_actions_among_others_is_replaced(self, make_root: MakeRoot) -> None:
        root = make_root()
        bad = {key: value for key, value in features(1).items() if "action" not in key}
        records = [encode_example(content) for content in (features(0), bad, features(2))]
        write_records(root / "softmotion30_44k/test/traj_0_to_2.tfrecords", records)
        data = data_of(root, actions=True)
        data.setup()
        assert data.datasets["val"][ClipRequest(1)]["index"] != 1
        assert data.num_quarantined() == 1

    def test_checking_at_each_reading_is_a_switch(self, make_root: MakeRoot) -> None:
        root = make_root()
        file = root / "softmotion30_44k/train/traj_3_to_4.tfrecords"
        datasets = {check: data_of(root, verify=check).make_dataset("train") for check in ("once", "always", "never")}
        data = bytearray(file.read_bytes())
        position = data.index(np.zeros(3000, np.uint8).tobytes())
        data[position] ^= 1
        file.write_bytes(data)  # after it was indexed
        indices = {check: dataset[ClipRequest(0)]["index"] for check, dataset in datasets.items()}
        assert indices["once"] == indices["never"] == 0
        assert indices["always"] != 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_frames": 31}, r"span 31, but a record has 30.*--data\.num_frames"),
            ({"num_frames": 16, "frame_stride": 2}, r"16 frames at stride 2 span 31"),
            ({"val_windows": 16}, r"a record has 15 windows of 16 frames at stride 1, not 16 \(--data\.val_windows\)"),
            ({"val_windows": 0}, r"val_windows=0 is too small.*\(--data\.val_windows\)"),
            ({"actions": True, "horizontal_flip": True}, r"Switch off --data\.horizontal_flip or --data\.actions"),
        ],
    )
    def test_options_that_contradict_the_data_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BAIRDataModule("anywhere", **options)

    def test_what_is_not_there_is_named_with_its_source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LONGTAKE_BAIR", raising=False)
        with pytest.raises(FileNotFoundError, match=r"set --data.root or LONGTAKE_BAIR\. .*rail\.eecs\.berkeley\.edu"):
            BAIRDataModule().setup()
        with pytest.raises(FileNotFoundError, match=r"no traj_\*\.tfrecords in .*train .*rail\.eecs\.berkeley\.edu"):
            data_of(tmp_path).setup()


def test_the_environment_names_the_root(make_root: MakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_BAIR", str(make_root()))
    assert isinstance(dataset := BAIRDataModule().make_dataset("train"), VideoClips)
    assert len(dataset) == 5


def test_a_worker_reads_the_same_clips(make_root: MakeRoot) -> None:
    root = make_root()
    alone, helped = data_of(root), data_of(root, num_workers=1)
    for data in (alone, helped):
        data.setup()
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(one["video"], other["video"])
