import json
import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_video import numbered_frame, read_number, read_numbers

from datamodules import decoding
from datamodules.decoding import UnreadableVideoError, VideoInfo, index_videos, probe, read_frames, rotate

NUM_FRAMES = 60
FORMATS: dict[str, dict[str, Any]] = {
    "bframes.avi": {"codec": "mpeg4", "codec_tag": "XVID", "max_b_frames": 2, "gop_size": 300, "bit_rate": 400_000},
    "bframes.mp4": {"codec": "libx264", "max_b_frames": 2, "gop_size": 12},
    "bframes.mkv": {"codec": "libx264", "max_b_frames": 3, "gop_size": 12},
    "odd.webm": {"codec": "libvpx-vp9", "width": 131, "height": 67, "gop_size": 20},
    "hidden_frames.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "program_stream.mpg": {"codec": "mpeg2video", "max_b_frames": 2, "gop_size": 12},
    "plain.mov": {"codec": "mpeg4", "gop_size": 12, "bit_rate": 400_000},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, NUM_FRAMES, **settings) for name, settings in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_counted_exactly(videos: dict[str, Path], name: str) -> None:
    info = probe(videos[name])
    assert (info.num_frames, info.rotation, info.key_frames[0]) == (NUM_FRAMES, 0, 0)
    assert (info.width, info.height) == (FORMATS[name].get("width", 128), FORMATS[name].get("height", 64))


@pytest.mark.parametrize("name", FORMATS)
def test_any_start_and_stride_give_the_frames_of_sequential_decoding(videos: dict[str, Path], name: str) -> None:
    path = videos[name]
    with av.open(str(path)) as container:
        reference = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read_numbers(reference) == list(range(NUM_FRAMES))
    key_frames = probe(path).key_frames
    draw = random.Random(0)
    for _ in range(10):
        stride = draw.randint(1, 5)
        count = draw.randint(1, (NUM_FRAMES - 1) // stride + 1)
        start = draw.randint(0, NUM_FRAMES - 1 - (count - 1) * stride)
        frames = read_frames(path, start, count, stride, key_frames)
        assert np.array_equal(frames, reference[start : start + count * stride : stride])


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.mkv", "odd.webm"])
def test_reading_begins_at_key_frames_where_there_are_some(videos: dict[str, Path], name: str) -> None:
    info = probe(videos[name])
    assert len(info.key_frames) > 2
    for key in info.key_frames[1:]:
        numbered = list(decoding._decode_from(videos[name], key))
        assert [number for number, _ in numbered] == list(range(key, NUM_FRAMES))
        assert [read_number(frame.to_ndarray(format="rgb24")) for _, frame in numbered] == list(range(key, NUM_FRAMES))


def test_avi_is_always_read_from_the_start(videos: dict[str, Path]) -> None:
    assert probe(videos["bframes.avi"]).key_frames == (0,)


def test_a_wrong_key_frame_costs_time_and_no_frame(videos: dict[str, Path]) -> None:
    for wrong in (3, 7, 41):
        numbers = read_numbers(read_frames(videos["bframes.mp4"], 45, 5, key_frames=(0, wrong)))
        assert numbers == [45, 46, 47, 48, 49]


def test_key_frames_that_later_packets_precede_are_no_place_to_begin() -> None:
    # decode order I0 P3 B1 B2 | I6 B4 B5 P7: after the second I come frames that are shown before it
    open_group = [decoding._Packet(stamp, key, False) for stamp, key in [(0, True), (3, False), (1, False), (2, False)]]
    open_group += [
        decoding._Packet(stamp, key, False) for stamp, key in [(6, True), (4, False), (5, False), (7, False)]
    ]
    closed_group = [
        decoding._Packet(stamp, key, False) for stamp, key in [(0, True), (2, False), (1, False), (3, True)]
    ]
    assert decoding._key_frames(open_group) == (0,)
    assert decoding._key_frames(closed_group) == (0, 3)


@pytest.mark.parametrize("doubtful", [(3, True, True), (2, True, False), (None, True, False)])
def test_missing_repeated_or_discarded_stamps_leave_only_the_first_frame(doubtful: tuple[Any, ...]) -> None:
    packets = [decoding._Packet(0, True, False), decoding._Packet(2, True, False), decoding._Packet(*doubtful)]
    assert decoding._key_frames(packets) == (0,)


def test_reading_past_the_end_is_an_error_that_names_file_and_frame(videos: dict[str, Path]) -> None:
    with pytest.raises(UnreadableVideoError, match=r"bframes.avi: ends after 60 frames, but frame 60 was expected"):
        read_frames(videos["bframes.avi"], 50, 11)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_reading_starts_no_threads(videos: dict[str, Path]) -> None:
    before = len(os.listdir("/proc/self/task"))
    frames = decoding.iter_frames(videos["bframes.mp4"], 20, 3)
    next(frames)
    assert len(os.listdir("/proc/self/task")) == before
    frames.close()


class TestRotation:
    # counterclockwise, as PyAV tells it, with the first two rows and columns of the matrix in an mp4's track header
    @pytest.mark.parametrize(("degrees", "matrix"), [(90, (0, -1, 1, 0)), (180, (-1, 0, 0, -1)), (-90, (0, 1, -1, 0))])
    def test_frames_are_turned_as_the_file_says(
        self, tmp_path: Path, write_video: Callable[..., Path], degrees: int, matrix: tuple[int, ...]
    ) -> None:
        path = write_video(tmp_path / "turned.mp4", 8, codec="libx264")
        content = bytearray(path.read_bytes())
        a, b, c, d = (value * 2**16 for value in matrix)
        place = content.index(b"tkhd") + 4 + 40
        content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
        path.write_bytes(content)
        info = probe(path)
        frames = read_frames(path, 0, 8)
        assert (info.rotation - degrees) % 360 == 0
        assert (info.width, info.height) == (128, 64)
        assert frames.shape == ((8, 64, 128, 3) if degrees == 180 else (8, 128, 64, 3))
        # turned back, the bars are where they were
        assert [read_number(rotate(frame, -degrees)) for frame in frames] == list(range(8))

    def test_positive_angles_turn_counterclockwise(self) -> None:
        image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
        assert rotate(image, 90)[..., 0].tolist() == [[2, 5], [1, 4], [0, 3]]
        assert rotate(image, -90)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]
        assert rotate(image, 0)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_cover_pictures_are_not_taken_for_the_video(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    plain = write_video(tmp_path / "plain.mp4", 5, codec="libx264")
    covered = tmp_path / "covered.mp4"
    with av.open(str(plain)) as source, av.open(str(covered), "w") as target:
        picture = target.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 640, 480, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        video = target.add_stream_from_template(source.streams.video[0])
        image = av.VideoFrame.from_ndarray(np.full((480, 640, 3), 200, np.uint8), format="rgb24")
        for packet in [*picture.encode(image), *picture.encode()]:
            target.mux(packet)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = video
                target.mux(packet)
    with av.open(str(covered)) as container:
        assert len(container.streams.video) == 2  # otherwise this shows nothing
    assert read_numbers(read_frames(covered, 0, 5)) == [0, 1, 2, 3, 4]


class TestUnreadableFiles:
    @pytest.fixture
    def broken(self, tmp_path: Path, videos: dict[str, Path]) -> dict[str, Path]:
        mp4 = videos["bframes.mp4"].read_bytes()
        contents = {
            "empty.mp4": b"",
            "page.mp4": b"<html>Not found</html>",
            "cut.mp4": mp4[: len(mp4) // 2],  # the index of an mp4 is at its end
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        with av.open(str(tmp_path / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
            sound.rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
        return {name: tmp_path / name for name in [*contents, "sound.mp4", "missing.mp4"]}

    @pytest.mark.parametrize("name", ["empty.mp4", "page.mp4", "cut.mp4", "sound.mp4", "missing.mp4"])
    def test_probing_raises_an_error_that_names_the_file(self, broken: dict[str, Path], name: str) -> None:
        with pytest.raises(UnreadableVideoError, match=name):
            probe(broken[name])

    def test_a_cut_avi_counts_the_frames_it_still_has(self, tmp_path: Path, videos: dict[str, Path]) -> None:
        with av.open(str(videos["bframes.avi"])) as container:
            places = [packet.pos for packet in container.demux(video=0) if packet.size]
        path = tmp_path / "cut.avi"
        path.write_bytes(videos["bframes.avi"].read_bytes()[: places[30]])
        info = probe(path)
        assert 28 <= info.num_frames <= 30
        assert read_numbers(read_frames(path, 0, info.num_frames))[:28] == list(range(28))

    def test_damaged_packets_are_an_error_of_reading(self, tmp_path: Path, videos: dict[str, Path]) -> None:
        content = bytearray(videos["bframes.mp4"].read_bytes())
        with av.open(str(videos["bframes.mp4"])) as container:
            places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        for position, size in places[30:]:
            content[position : position + size] = b"\xff" * size
        path = tmp_path / "damaged.mp4"
        path.write_bytes(content)
        assert probe(path).num_frames == NUM_FRAMES  # found only by decoding all of it
        with pytest.raises(UnreadableVideoError, match=r"damaged\.mp4"):
            read_frames(path, 0, NUM_FRAMES)


class TestIndex:
    @pytest.fixture
    def root(self, tmp_path: Path, small_avi: bytes) -> Path:
        root = tmp_path / "root"
        (root / "class").mkdir(parents=True)
        for name in ("a.avi", "class/b.avi"):
            (root / name).write_bytes(small_avi)
        (root / "broken.avi").write_bytes(b"no video")
        return root

    @pytest.fixture
    def probed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        names: list[str] = []

        def counting(path: Path) -> VideoInfo:
            names.append(Path(path).name)
            return probe(path)

        monkeypatch.setattr(decoding, "probe", counting)
        return names

    @staticmethod
    def paths(root: Path) -> list[Path]:
        return [root / "a.avi", root / "broken.avi", root / "class" / "b.avi"]

    def test_files_are_probed_once_and_failures_are_remembered(self, root: Path, probed: list[str]) -> None:
        first = index_videos(self.paths(root), root)
        assert isinstance(info := first[root / "a.avi"], VideoInfo)
        assert info.num_frames == 20
        assert isinstance(reason := first[root / "broken.avi"], str)
        assert "broken.avi" in reason
        assert sorted(probed) == ["a.avi", "b.avi", "broken.avi"]
        assert index_videos(self.paths(root), root) == first
        assert len(probed) == 3

    def test_a_changed_file_is_probed_again_alone(
        self, root: Path, probed: list[str], write_video: Callable[..., Path]
    ) -> None:
        index_videos(self.paths(root), root)
        probed.clear()
        write_video(root / "a.avi", 7)
        assert index_videos(self.paths(root), root)[root / "a.avi"] == VideoInfo(7, 128, 64, 0)
        assert probed == ["a.avi"]

    def test_a_touched_file_of_the_same_size_is_probed_again(self, root: Path, probed: list[str]) -> None:
        index_videos(self.paths(root), root)
        probed.clear()
        os.utime(root / "a.avi", (1, 1))
        index_videos(self.paths(root), root)
        assert probed == ["a.avi"]

    def test_a_root_that_was_moved_keeps_its_index(self, root: Path, probed: list[str]) -> None:
        index_videos(self.paths(root), root)
        probed.clear()
        moved = root.rename(root.with_name("moved"))
        assert len(index_videos(self.paths(moved), moved)) == 3
        assert probed == []

    def test_the_index_is_written_whole_and_nothing_else_is_left(self, root: Path) -> None:
        index_videos(self.paths(root), root)
        assert [file.name for file in (root / ".longtake").iterdir()] == ["videos.json"]
        assert set(json.loads((root / ".longtake" / "videos.json").read_text())["videos"]) == {
            "a.avi",
            "broken.avi",
            "class/b.avi",
        }

    @pytest.mark.parametrize("content", ["{", '{"version": 0, "videos": {"a.avi": 1}}'])
    def test_a_broken_or_old_index_is_made_anew(self, root: Path, probed: list[str], content: str) -> None:
        (root / ".longtake").mkdir()
        (root / ".longtake" / "videos.json").write_text(content)
        index_videos(self.paths(root), root)
        assert len(probed) == 3
        assert json.loads((root / ".longtake" / "videos.json").read_text())["version"] == 1

    def test_another_folder_may_hold_the_index(self, root: Path, tmp_path: Path, probed: list[str]) -> None:
        for _ in range(2):
            index_videos(self.paths(root), root, tmp_path / "cache")
        assert len(probed) == 3
        assert not (root / ".longtake").exists()
        assert len(list((tmp_path / "cache").glob("videos-*.json"))) == 1

    def test_a_root_that_cannot_be_written_falls_back_to_the_home_folder_and_says_so(
        self,
        root: Path,
        tmp_path: Path,
        probed: list[str],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (root / ".longtake").write_text("a file stands where the folder should be")
        with caplog.at_level(logging.WARNING, "datamodules.decoding"):
            for _ in range(2):
                index_videos(self.paths(root), root)
        assert len(probed) == 3
        assert len(list((tmp_path / "home" / ".cache" / "longtake").glob("videos-*.json"))) == 1
        assert len(caplog.messages) == 1
        assert "--data.cache_dir" in caplog.messages[0]


def test_numbers_in_test_frames_can_be_read_back() -> None:
    assert [read_number(numbered_frame(number)) for number in range(256)] == list(range(256))
