import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_video import read_numbers
from PIL import Image
from sound_video import heard_bands, tone_band, write_sound_video

from datamodules.captions import CaptionedDataModule
from datamodules.sampler import ClipRequest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two videos of 20 numbered frames, with sound, in a folder."""
    write_sound_video(tmp_path / "clips" / "a.mkv", 20, "pcm_s16le")
    write_sound_video(tmp_path / "clips" / "b.mkv", 20, "pcm_s16le")
    return tmp_path


def write_lists(root: Path, train: list[Any], val: list[Any] | None = None) -> None:
    for split, rows in (("train", train), ("val", val or train)):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def data_of(root: Path, **options: Any) -> CaptionedDataModule:
    return CaptionedDataModule(str(root), **{"num_frames": 4, "resolution": 64, "batch_size": 2, **options})


def shown(video: torch.Tensor) -> list[int]:
    return read_numbers(video.permute(1, 2, 3, 0).add(1).mul(127.5).numpy())


def test_batches_hold_the_texts_of_their_clips(root: Path) -> None:
    write_lists(
        root,
        [
            {"path": "clips/a.mkv", "text": "ein Hund,\u2028größer"},
            "",
            {"path": "clips/b.mkv", "text": 'a "cat"', "label": 7},
        ],
    )
    data = data_of(root)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    texts = {0: "ein Hund,\u2028größer", 1: 'a "cat"'}
    assert batch["text"] == [texts[index] for index in batch["index"].tolist()]
    assert batch["label"].tolist() == [7 * index for index in batch["index"].tolist()]
    assert batch["video"].shape == (2, 3, 4, 64, 64)
    assert batch["is_image"].tolist() == [False, False]
    assert "audio" not in batch
    assert [batch["text"] for batch in data.val_dataloader()] == [["ein Hund,\u2028größer", 'a "cat"']]


def test_texts_cross_worker_processes(root: Path) -> None:
    write_lists(root, [{"path": "clips/a.mkv", "text": "one"}, {"path": "clips/b.mkv", "text": "two"}])
    data = data_of(root, num_workers=1)
    data.setup()
    assert [batch["text"] for batch in data.val_dataloader()] == [["one", "two"]]


def test_a_clip_begins_where_its_line_says_and_else_anywhere(root: Path) -> None:
    rows = [{"path": "clips/a.mkv", "text": str(start), "start": start} for start in (0, 5, 16)]
    write_lists(root, [*rows, {"path": "clips/a.mkv", "text": "anywhere"}])
    dataset = data_of(root).make_dataset("train")
    for index, start in enumerate((0, 5, 16)):
        for epoch in range(3):
            item = dataset[ClipRequest(index, epoch)]
            assert shown(item["video"]) == list(range(start, start + 4))
            assert item["text"] == str(start)
    starts = {shown(dataset[ClipRequest(3, epoch)]["video"])[0] for epoch in range(12)}
    assert len(starts) > 4


def test_sound_begins_where_the_clip_does(root: Path) -> None:
    write_lists(root, [{"path": "clips/a.mkv", "text": "late", "start": 11}])
    data = data_of(root, audio=True, batch_size=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (1, 1, 4, 64, 16)
    assert heard_bands(batch["audio"][0]) == [tone_band(number) for number in range(11, 15)]
    assert batch["text"] == ["late"]


def test_a_clip_that_does_not_fit_behind_its_start_is_left_out_and_named(root: Path) -> None:
    write_lists(root, [{"path": "clips/a.mkv", "text": "x", "start": s} for s in (16, 17)])
    with pytest.warns(UserWarning, match=r"1 of 2 captions .*train.jsonl:2 \(20 frames, start 17\)"):
        dataset: Any = data_of(root).make_dataset("train")
    assert [video.start for video in dataset.videos] == [16]


def test_an_unreadable_video_is_left_out(root: Path) -> None:
    (root / "clips" / "c.mp4").write_bytes(b"<html>")
    write_lists(root, [{"path": f"clips/{name}", "text": name} for name in ("c.mp4", "a.mkv")])
    with pytest.warns(UserWarning, match=r"1 of 2 videos cannot be read"):
        dataset: Any = data_of(root).make_dataset("train")
    assert dataset[ClipRequest(0)]["text"] == "a.mkv"


def test_a_replaced_clip_brings_its_own_caption(root: Path) -> None:
    write_lists(root, [{"path": f"clips/{name}.mkv", "text": name} for name in "ab"])
    data = data_of(root)
    data.setup()
    os.remove(root / "clips" / "a.mkv")
    item = data.datasets["train"][ClipRequest(0, 3)]
    assert (item["index"], item["text"]) == (1, "b")
    assert data.num_quarantined() == 1
    again = data_of(root, max_bad_fraction=0.0)
    with pytest.warns(UserWarning, match=r"a.mkv: .*left out|1 of 2 videos cannot be read"):
        again.setup()


class TestImages:
    def test_images_with_captions_are_clips_of_one_frame(self, tmp_path: Path) -> None:
        for number, size in enumerate([(40, 60), (200, 130)]):
            Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{number}.png")
        write_lists(tmp_path, [{"path": f"{number}.png", "text": f"image {number}"} for number in range(2)])
        data = data_of(tmp_path, num_frames=1, resolution=32)
        data.setup()
        (batch,) = data.val_dataloader()
        assert batch["video"].shape == (2, 3, 1, 32, 32)
        assert batch["is_image"].tolist() == [True, True]
        assert batch["text"] == ["image 0", "image 1"]
        assert batch["video"].mean((0, 2, 3, 4)).tolist() == [1, -1, -1]

    def test_bad_images_are_left_out_or_replaced(self, tmp_path: Path) -> None:
        for number in range(3):
            Image.new("RGB", (40, 40)).save(tmp_path / f"{number}.png")
        (tmp_path / "text.png").write_text("<html>")
        names = ["text.png", "gone.jpg", "0.png", "1.png", "2.png"]
        write_lists(tmp_path, [{"path": name, "text": name} for name in names], [{"path": "0.png", "text": "val"}])
        data = data_of(tmp_path, num_frames=1, resolution=32)
        with pytest.warns(UserWarning, match="2 of 5 videos cannot be read"):
            data.setup()
        dataset: Any = data.datasets["train"]
        assert len(dataset) == 3
        (tmp_path / "1.png").write_bytes(b"")  # since it was examined
        item = dataset[ClipRequest(1)]
        assert item["text"] in ("0.png", "2.png")
        assert list(data.quarantine().reasons(dataset._places)) == [tmp_path / "1.png"]

    def test_an_image_among_videos_is_refused_with_its_line(self, root: Path) -> None:
        Image.new("RGB", (40, 40)).save(root / "i.png")
        write_lists(root, [{"path": "clips/a.mkv", "text": "v"}, {"path": "i.png", "text": "i"}])
        with pytest.raises(ValueError, match=r"train.jsonl:2: i.png is an image.*num_frames=4.*MixedDataModule"):
            data_of(root).setup()


class TestErrors:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{path}", "no JSON"),
            ('["clips/a.mkv"]', "expected an object"),
            ('{"path": "clips/a.mkv"}', "text has to be a string, got None"),
            ('{"text": "x"}', "path has to be a string, got None"),
            ('{"path": "clips/a.mkv", "text": ["x"]}', r"text has to be a string, got \['x'\]"),
            ('{"path": "clips/a.mkv", "text": "x", "start": 1.5}', "start has to be a number from 0 on, got 1.5"),
            ('{"path": "clips/a.mkv", "text": "x", "start": -1}', "start has to be a number from 0 on, got -1"),
            ('{"path": "clips/a.mkv", "text": "x", "label": true}', "label has to be a number from 0 on, got True"),
            (
                '{"path": "clips/a.mkv", "text": "x", "begin": 3}',
                "unknown begin. A line holds path, text, start, label",
            ),
        ],
    )
    def test_a_bad_line_is_named(self, root: Path, line: str, message: str) -> None:
        write_lists(root, [{"path": "clips/a.mkv", "text": "good"}, "", line])
        with pytest.raises(ValueError, match=rf"train.jsonl:3: {message}"):
            data_of(root).setup()

    def test_a_list_whose_files_are_elsewhere_is_refused(self, root: Path) -> None:
        write_lists(root, [{"path": "a.mkv", "text": "x"}, {"path": "b.mkv", "text": "x"}])
        match = r"None of the 2 files of the list .*relative to --data.root.*a.mkv"
        with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(FileNotFoundError, match=match):
            data_of(root).make_dataset("train")

    def test_a_missing_list_is_named(self, root: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"No list of captions .*other.jsonl .*--data.train_list"):
            data_of(root, train_list="other.jsonl").setup()

    def test_an_empty_list_is_refused(self, root: Path) -> None:
        write_lists(root, [""])
        with pytest.raises(ValueError, match=r"train.jsonl: the list is empty"):
            data_of(root).setup()
