"""No bad file kills or hangs a run: it is replaced, listed and counted, and only too many of them stop it."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader

from datamodules.decoding import UnreadableVideoError, require_regular_file
from datamodules.frames import FramesDataModule
from datamodules.listing import Video
from datamodules.quarantine import Quarantine
from datamodules.reader import ReaderProcess
from datamodules.sampler import ClipRequest, collate_clips
from datamodules.video import VideoClips, VideoFilesDataModule

BAD = ("empty", "truncated", "three_frames", "text", "pipe", "vanished", "denied", "slow", "deadly")


class TestTheList:
    def test_processes_share_it_and_a_file_that_changes_leaves_it(self, tmp_path: Path, small_avi: bytes) -> None:
        files = [tmp_path / f"{name}.avi" for name in "abc"]
        for file in files:
            file.write_bytes(small_avi)
        one, other = Quarantine(tmp_path), Quarantine(tmp_path)
        one.add(files[0], "a.avi: broken")
        one.add(files[0], "a.avi: broken again")
        other.add(files[1], "b.avi: broken")
        assert one.reasons(files) == {files[0]: "a.avi: broken", files[1]: "b.avi: broken"}
        assert one.reasons(files[1:]) == {files[1]: "b.avi: broken"}
        lines = (tmp_path / ".longtake" / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["reason"] for line in lines] == ["a.avi: broken", "b.avi: broken"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert Quarantine(Path()).reasons(files) == one.reasons(files)
            assert Path("b.avi") in one
        os.utime(files[0], (1, 1))
        assert Quarantine(tmp_path).reasons(files) == {files[1]: "b.avi: broken"}

    def test_a_disk_that_is_full_stops_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for place in (tmp_path / ".longtake", tmp_path / "home"):
            place.write_text("a file stands where the folder should be")
        quarantine = Quarantine(tmp_path)
        quarantine.add(tmp_path / "a.avi", "broken")
        assert quarantine.reasons([tmp_path / "a.avi"]) == {tmp_path / "a.avi": "broken"}
        assert "cannot be written" in caplog.text


class TestEveryKindOfBadFile:
    """Files that were whole when they were indexed, and went bad then."""

    @pytest.fixture
    def root(self, tmp_path: Path, small_avi: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
        root = tmp_path / "root"
        for split, names in (("train", (*BAD, *(f"good_{number}" for number in range(9)))), ("val", ("good",))):
            (root / split).mkdir(parents=True)
            for name in names:
                (root / split / f"{name}.avi").write_bytes(small_avi)
        monkeypatch.setattr(ReaderProcess, "script", Path(__file__).with_name("stub_reader.py"))
        monkeypatch.setattr("datamodules.reader._readers", threading.local())  # an earlier test's is the real one
        return root

    @staticmethod
    def spoil(train: Path, write_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        content = (train / "empty.avi").read_bytes()
        (train / "empty.avi").write_bytes(b"")
        (train / "truncated.avi").write_bytes(content[: len(content) // 2])
        write_video(train / "three_frames.avi", 3)
        (train / "text.avi").write_text("<html>Not found</html>")
        (train / "vanished.avi").unlink()
        (train / "pipe.avi").unlink()
        os.mkfifo(train / "pipe.avi")
        opened = av.open

        def refuse_denied(file: str, *args: Any, **options: Any) -> Any:  # root may read all files, whatever their mode
            if "denied" in file:
                raise av.PermissionError(13, "Permission denied", file)
            return opened(file, *args, **options)

        monkeypatch.setattr(av, "open", refuse_denied)

    @pytest.mark.parametrize(("num_workers", "read_timeout"), [(0, None), (2, None), (0, 3.0), (2, 3.0)])
    def test_it_is_replaced_by_a_good_one_and_listed(
        self,
        root: Path,
        write_video: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        num_workers: int,
        read_timeout: float | None,
    ) -> None:
        FramesDataModule(str(root)).prepare_data()  # all are well
        data = FramesDataModule(
            str(root),
            num_frames=4,
            resolution=32,
            batch_size=1,
            num_workers=num_workers,
            read_timeout=read_timeout,
            max_bad_fraction=1.0,
        )
        data.setup()
        self.spoil(root / "train", write_video, monkeypatch)
        expected = set(BAD) - ({"slow", "deadly"} if read_timeout is None else {"denied"})  # the child may read it
        seen: list[int] = []
        epochs = 2 if read_timeout is None else 1  # starting processes that read is what takes time
        for epoch in range(epochs):
            loader = data.train_dataloader()
            loader.batch_sampler.set_epoch(epoch)
            for batch in loader:
                assert batch["video"].shape == (1, 3, 4, 32, 32)
                seen.append(int(batch["index"]))
        dataset = data.datasets["train"]
        assert isinstance(dataset, VideoClips)
        paths = [video.path for video in dataset.videos]
        bad = data.quarantine().reasons(paths)
        assert {path.stem for path in bad} == expected
        assert len(seen) == epochs * len(paths)
        assert {paths[index].stem for index in seen} <= {path.stem for path in paths} - expected
        assert "pipe.avi: is a pipe" in bad[root / "train" / "pipe.avi"]
        if read_timeout is not None:
            assert "not read within 3 seconds" in bad[root / "train" / "slow.avi"]
            assert "has died" in bad[root / "train" / "deadly.avi"]


class TestTooMany:
    @staticmethod
    def clips(tmp_path: Path, num_bad: int, num_good: int, **options: Any) -> VideoClips:
        folder = Path(os.path.relpath(tmp_path))  # roots may be relative
        videos = [Video(folder / f"gone_{number}.avi", 0, 20) for number in range(num_bad)]
        for number in range(num_good):
            videos.append(Video(tmp_path / f"good_{number}.avi", 1, 20))
            videos[-1].path.touch()  # what it shows is made up
        return VideoClips(videos, 1, 1, 16, seed=0, **options)

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def frames(video: Video, start: int, count: int, stride: int) -> Any:
            require_regular_file(video.path)
            return iter([np.zeros((16, 16, 3), np.uint8)] * count)

        monkeypatch.setattr(Video, "frames", frames)

    def test_a_run_with_too_many_bad_files_stops_with_the_list(self, tmp_path: Path) -> None:
        dataset = self.clips(tmp_path, 3, 117, name="toys")  # 2 of 120 may fail
        for index in [*range(99)]:
            dataset[ClipRequest(index)]  # too early to judge
        with pytest.raises(UnreadableVideoError) as stopped:
            dataset[ClipRequest(99)]
        message = str(stopped.value)
        assert message.startswith("toys: 3 of 120 videos cannot be read, and 2 may be (--data.max_bad_fraction).")
        assert "longtake doctor" in message
        assert all(f"/gone_{number}.avi: " in message for number in range(3))

    def test_as_many_as_allowed_do_not_stop_it(self, tmp_path: Path) -> None:
        dataset = self.clips(tmp_path, 2, 118)
        assert {dataset[ClipRequest(index)]["label"] for index in range(120)} == {1}

    def test_one_bad_file_stops_no_small_data_set_unless_none_is_allowed(self, tmp_path: Path) -> None:
        lenient, strict = (self.clips(tmp_path, 1, 9, max_bad_fraction=share) for share in (0.01, 0.0))
        for epoch in range(12):
            for index in range(10):
                lenient[ClipRequest(index, epoch)]
        for index in range(99):
            strict[ClipRequest(index % 10)]
        with pytest.raises(UnreadableVideoError, match=r"1 of 10 videos cannot be read, and 0 may be"):
            strict[ClipRequest(9)]

    def test_late_failures_stop_it_at_once(self, tmp_path: Path) -> None:
        dataset = self.clips(tmp_path, 3, 117)
        for index in range(3, 120):
            dataset[ClipRequest(index)]
        for index in (0, 1):
            dataset[ClipRequest(index)]
        with pytest.raises(UnreadableVideoError, match="3 of 120"):
            dataset[ClipRequest(2)]

    def test_what_another_process_found_counts(self, tmp_path: Path) -> None:
        one, other = (self.clips(tmp_path, 3, 117, quarantine=Quarantine(tmp_path)) for _ in range(2))
        for index in (0, 1):
            other[ClipRequest(index)]
        for index in range(3, 120):
            one[ClipRequest(index)]
        with pytest.raises(UnreadableVideoError, match="3 of 120"):
            one[ClipRequest(2)]

    def test_the_next_run_knows_the_list_reads_none_of_it_and_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = self.clips(tmp_path, 1, 9, quarantine=Quarantine(tmp_path))
        substitute = first[ClipRequest(0)]["index"]
        caplog.clear()
        with pytest.warns(UserWarning, match=r"1 of 10 videos are in quarantine \(.*quarantine\.jsonl\).*gone_0"):
            second = self.clips(tmp_path, 1, 9, quarantine=Quarantine(tmp_path))
        assert second[ClipRequest(0)]["index"] == substitute  # the same order of the same draws
        assert "cannot be read" not in caplog.text

    def test_the_log_counts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        dataset = self.clips(tmp_path, 2, 118)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "datamodules.video"):
            for index in (0, 1, 0):
                dataset[ClipRequest(index)]
        assert ["(1 of 120 so far)" in m for m in caplog.messages] == [True, False]
        assert "(2 of 120 so far): " in caplog.messages[1]

    def test_workers_stop_the_run_with_one_message(self, tmp_path: Path) -> None:
        dataset = self.clips(tmp_path, 40, 80, name="toys", quarantine=Quarantine(tmp_path))
        requests = [[ClipRequest(index)] for index in range(120)]
        loader = DataLoader(dataset, batch_sampler=requests, num_workers=2, collate_fn=collate_clips)  # type: ignore[arg-type]
        with pytest.raises(UnreadableVideoError) as stopped:
            list(loader)
        assert str(stopped.value).startswith("toys: 4")
        assert "Traceback" not in str(stopped.value)


@pytest.mark.parametrize(("option", "value"), [("read_timeout", 0.0), ("max_bad_fraction", 1.5)])
def test_impossible_settings_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}={value}.*--data\.{option}"):
        VideoFilesDataModule(**{option: value})  # type: ignore[arg-type]
