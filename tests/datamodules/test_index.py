import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered_video import numbered_frame
from PIL import Image

from datamodules import index
from datamodules.decoding import Header, VideoInfo
from datamodules.index import LinesFile, index_entries, index_videos


@pytest.fixture
def root(tmp_path: Path, small_avi: bytes) -> Path:
    root = tmp_path / "root"
    (root / "class").mkdir(parents=True)
    for name in ("a.avi", "class/b.avi"):
        (root / name).write_bytes(small_avi)
    (root / "broken.avi").write_bytes(b"no video")
    return root


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were looked at, in no particular order."""
    names: list[str] = []
    original = index.examine

    def counting(path: Path, level: index.Level) -> dict[str, Any]:
        names.append(path.name)
        return original(path, level)

    monkeypatch.setattr(index, "examine", counting)
    return names


def paths(root: Path) -> list[Path]:
    return [root / "a.avi", root / "broken.avi", root / "class" / "b.avi"]


def test_files_are_examined_once_and_failures_are_remembered(root: Path, examined: list[str]) -> None:
    first = index_videos(paths(root), root)
    assert first[root / "a.avi"] == VideoInfo(20, 128, 64, 0, container="avi", codec="mpeg4")
    assert isinstance(reason := first[root / "broken.avi"], str)
    assert "broken.avi" in reason
    assert sorted(examined) == ["a.avi", "b.avi", "broken.avi"]
    assert index_videos(paths(root), root) == first
    assert len(examined) == 3


def test_the_quick_level_reads_headers_and_the_full_one_replaces_it(root: Path, examined: list[str]) -> None:
    quick = index_entries(paths(root), root, level="quick")
    entry = quick[root / "a.avi"]
    assert entry.header == Header("avi", "mpeg4", 128, 64, 25.0, 20, pytest.approx(0.8))
    assert (entry.info, entry.digest, entry.file[0]) == (None, "", (root / "a.avi").stat().st_size)
    assert "broken.avi" in quick[root / "broken.avi"].error
    full = index_entries(paths(root), root, level="full")
    assert full[root / "a.avi"].info is not None
    assert len(examined) == 6
    assert index_entries(paths(root), root, level="quick") == full  # knows more, and is not lost
    assert len(examined) == 6


def test_equal_files_have_equal_digests(root: Path, write_video: Callable[..., Path]) -> None:
    write_video(root / "other.avi", 20, gop_size=3)
    entries = index_entries([*paths(root), root / "other.avi"], root)
    digests = [entries[root / name].digest for name in ("a.avi", "class/b.avi", "other.avi")]
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 32 for digest in digests)


def test_a_changed_file_is_examined_again_alone(
    root: Path, examined: list[str], write_video: Callable[..., Path]
) -> None:
    index_videos(paths(root), root)
    examined.clear()
    write_video(root / "a.avi", 7)
    assert isinstance(info := index_videos(paths(root), root)[root / "a.avi"], VideoInfo)
    assert info.num_frames == 7
    assert examined == ["a.avi"]


def test_a_touched_file_of_the_same_size_is_examined_again(root: Path, examined: list[str]) -> None:
    index_videos(paths(root), root)
    examined.clear()
    os.utime(root / "a.avi", (1, 1))
    index_videos(paths(root), root)
    assert examined == ["a.avi"]


def test_failures_are_examined_again_when_asked(root: Path, examined: list[str]) -> None:
    index_entries(paths(root), root)
    examined.clear()
    index_entries(paths(root), root, again=True)
    assert examined == ["broken.avi"]


def test_a_file_that_is_not_there_is_an_error_that_is_forgotten(root: Path, small_avi: bytes) -> None:
    late = root / "late.avi"
    assert index_videos([late], root) == {late: f"{late}: is not there."}
    late.write_bytes(small_avi)
    assert isinstance(index_videos([late], root)[late], VideoInfo)


def test_an_index_that_was_stopped_half_way_goes_on(
    root: Path, small_avi: bytes, examined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [root / f"{number}.avi" for number in range(12)]
    for file in files:
        file.write_bytes(small_avi)
    monkeypatch.setattr(index, "_SAVE_EVERY", 2)
    monkeypatch.setattr(index, "ThreadPoolExecutor", lambda **_: original_pool(1))
    finished = index._examined

    def stopped(*args: Any) -> Any:
        for number, found in enumerate(finished(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(index, "_examined", stopped)
    with pytest.raises(KeyboardInterrupt):
        index_videos(files, root)
    monkeypatch.setattr(index, "_examined", finished)
    with open(root / ".longtake" / "index.jsonl", "a") as file:
        file.write('{"version": 2, "path": "7.a')  # killed while it wrote
    examined.clear()
    assert all(isinstance(info, VideoInfo) for info in index_videos(files, root).values())
    assert len(examined) == 7
    examined.clear()
    index_videos(files, root)
    assert examined == []


original_pool = index.ThreadPoolExecutor


def test_files_are_examined_side_by_side(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)

    def meeting(path: Path, level: index.Level) -> dict[str, Any]:
        both.wait()  # returns only if two are here at once
        return {"error": "met"}

    monkeypatch.setattr(index, "examine", meeting)
    assert set(index_videos([root / "a.avi", root / "broken.avi"], root).values()) == {"met"}


def test_superseded_lines_do_not_pile_up(root: Path) -> None:
    for time in range(1, 9):
        for path in paths(root):
            os.utime(path, (time, time))
        index_videos(paths(root), root)
    lines = (root / ".longtake" / "index.jsonl").read_text().splitlines()
    assert len(lines) <= 9


def test_folders_of_frames_are_examined_too(tmp_path: Path, examined: list[str]) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(folder / f"{number}.png")
    first = index_entries([folder], tmp_path)[folder]
    assert first.info == VideoInfo(3, 128, 64, 0, container="images", codec="png")
    assert first.file[0] == 3
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(folder / "3.png")
    second = index_entries([folder], tmp_path)[folder]
    assert second.info is not None
    assert second.info.num_frames == 4
    assert first.digest != second.digest
    (folder / "3.png").write_bytes(b"")
    os.utime(folder, (5, 5))
    assert "frames" in index_entries([folder], tmp_path)[folder].error


def test_truncated_files_are_told_from_others(root: Path, write_video: Callable[..., Path]) -> None:
    mp4 = write_video(root / "whole.mp4", 20, codec="libx264").read_bytes()
    (root / "cut.mp4").write_bytes(mp4[: len(mp4) // 2])  # its index is at its end
    avi = (root / "a.avi").read_bytes()
    (root / "cut.avi").write_bytes(avi[: len(avi) // 2])
    files = [root / name for name in ("whole.mp4", "cut.mp4", "cut.avi", "broken.avi")]
    entries = index_entries(files, root)
    assert [entries[file].is_truncated for file in files] == [False, True, True, False]
    assert [bool(entries[file].error) for file in files] == [False, True, True, True]


class TestTheFile:
    def test_a_root_that_was_moved_keeps_its_index(self, root: Path, examined: list[str]) -> None:
        index_videos(paths(root), root)
        examined.clear()
        moved = root.rename(root.with_name("moved"))
        assert len(index_videos(paths(moved), moved)) == 3
        assert examined == []

    def test_it_has_a_line_for_each_file_and_nothing_else_is_left(self, root: Path) -> None:
        index_videos(paths(root), root)
        assert [file.name for file in (root / ".longtake").iterdir()] == ["index.jsonl"]
        lines = [json.loads(line) for line in (root / ".longtake" / "index.jsonl").read_text().splitlines()]
        assert sorted(line["path"] for line in lines) == ["a.avi", "broken.avi", "class/b.avi"]
        assert all(line["version"] == 2 for line in lines)

    @pytest.mark.parametrize("content", ["{", "[]", '{"version": 1, "path": "a.avi"}', "\ufffd\0"])
    def test_broken_or_old_lines_are_made_anew(self, root: Path, examined: list[str], content: str) -> None:
        (root / ".longtake").mkdir()
        (root / ".longtake" / "index.jsonl").write_text(content)
        for _ in range(2):
            index_videos(paths(root), root)
        assert len(examined) == 3

    def test_another_folder_may_hold_it(self, root: Path, tmp_path: Path, examined: list[str]) -> None:
        for _ in range(2):
            index_videos(paths(root), root, tmp_path / "cache")
        assert len(examined) == 3
        assert not (root / ".longtake").exists()
        assert len(list((tmp_path / "cache").glob("index-*.jsonl"))) == 1

    def test_a_root_that_cannot_be_written_falls_back_to_the_home_folder_and_says_so(
        self,
        root: Path,
        tmp_path: Path,
        examined: list[str],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (root / ".longtake").write_text("a file stands where the folder should be")
        with caplog.at_level(logging.WARNING, "datamodules.index"):
            for _ in range(2):
                index_videos(paths(root), root)
        assert len(examined) == 3
        assert len(list((tmp_path / "home" / ".cache" / "longtake").glob("index-*.jsonl"))) == 1
        assert len(caplog.messages) == 1
        assert "--data.cache_dir" in caplog.messages[0]

    def test_lines_of_many_writers_do_not_mix(self, tmp_path: Path) -> None:
        def write(writer: int) -> None:
            file = LinesFile("list", tmp_path)
            for number in range(50):
                file.append([{"writer": writer, "number": number, "long": "x" * 5000}])

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = LinesFile("list", tmp_path).load()
        assert sorted((line["writer"], line["number"]) for line in found) == [
            (w, n) for w in range(4) for n in range(50)
        ]
