"""A second decoder is refused where it cannot be right, and must show that it is right elsewhere."""

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_video import read_numbers

from datamodules import decoders
from datamodules.decoders import iter_torchcodec, require_conformance, require_decoder
from datamodules.decoding import UnreadableVideoError, iter_frames, probe
from datamodules.index import index_videos
from datamodules.listing import indexed_videos


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    path = tmp_path_factory.mktemp("decoders") / "clip.mp4"
    return write_video(path, 40, codec="libx264", max_b_frames=2, gop_size=12)


class FakeTorchcodec:
    """What we use of torchcodec's `VideoDecoder`, on top of PyAV, with the faults that a test asks for."""

    shift = 0
    opened: list[str]

    def __init__(self, source: str, *, dimension_order: str, num_ffmpeg_threads: int, seek_mode: str) -> None:
        assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
        self.opened.append(Path(source).name)
        self.frames = list(iter_frames(source, 0, probe(source).num_frames))

    def get_frames_at(self, indices: Sequence[int]) -> Any:
        import torch

        found = [self.frames[max(0, index - (self.shift if index else 0))] for index in indices]
        return types.SimpleNamespace(data=torch.from_numpy(np.stack(found)))


@pytest.fixture
def torchcodec(monkeypatch: pytest.MonkeyPatch) -> type[FakeTorchcodec]:
    module = types.ModuleType("torchcodec.decoders")
    fake = type("VideoDecoder", (FakeTorchcodec,), {"opened": []})
    module.VideoDecoder = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setattr(decoders, "_conforming", set())
    return fake


def test_frames_come_by_their_numbers(mp4: Path, torchcodec: type[FakeTorchcodec]) -> None:
    frames = np.stack(list(iter_torchcodec(mp4, 1, 20, 2)))
    assert frames.dtype == np.uint8
    assert read_numbers(frames) == list(range(1, 40, 2))


def test_frames_that_are_not_there_are_an_error_that_names_the_file(
    mp4: Path, torchcodec: type[FakeTorchcodec]
) -> None:
    with pytest.raises(UnreadableVideoError, match=r"clip\.mp4: "):
        list(iter_torchcodec(mp4, 38, 3))


def test_videos_are_read_with_it_once_it_has_conformed(mp4: Path, torchcodec: type[FakeTorchcodec]) -> None:
    index = index_videos([mp4], mp4.parent)
    for _ in range(2):
        (video,) = indexed_videos({mp4: 0}, index, "torchcodec")
        assert video.decoder == "torchcodec"
    opened = len(torchcodec.opened)  # the first use, of the one kind of file
    assert opened > 10
    assert read_numbers(np.stack(list(video.frames(5, 3, 1)))) == [5, 6, 7]
    assert len(torchcodec.opened) == opened + 1


@pytest.mark.parametrize("shift", [1, 2, 3, -1])
def test_frames_beside_the_right_ones_are_refused(mp4: Path, torchcodec: type[FakeTorchcodec], shift: int) -> None:
    torchcodec.shift = shift
    index = index_videos([mp4], mp4.parent)
    with pytest.raises(ValueError, match=r"torchcodec does not give the frames .* for h264 in mov,mp4.*decoder=pyav"):
        indexed_videos({mp4: 0}, index, "torchcodec")


def conform(mp4: Path, change: Callable[[int, np.ndarray], np.ndarray | None]) -> None:
    """Test a decoder that changes the frames of PyAV, or leaves some out."""

    def read(path: Path, start: int, count: int, stride: int, key_frames: Sequence[int]) -> Iterator[np.ndarray]:
        for number, frame in enumerate(iter_frames(path, start, count, stride)):
            if (changed := change(start + number * stride, frame)) is None:
                raise UnreadableVideoError("no more frames")
            yield changed

    require_conformance(mp4, probe(mp4), read, "other")


def test_other_rounding_conforms(mp4: Path) -> None:
    conform(mp4, lambda number, frame: np.clip(frame.astype(int) + 3, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda number, frame: None if number == 39 else frame, "no more frames"),  # the last one
        (lambda number, frame: frame[:, ::-1] if number == 7 else frame, "frame 7 "),
        (lambda number, frame: frame.transpose(1, 0, 2), "differs by 255"),  # not rotated
        (lambda number, frame: frame // 2, "levels"),
    ],
)
def test_wrong_frames_do_not_conform(mp4: Path, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        conform(mp4, change)


def test_a_neighbour_is_told_from_the_right_frame_where_little_moves(tmp_path: Path) -> None:
    path = tmp_path / "slow.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            image = np.full((32, 32, 3), 50 + 3 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

    def one_late(path: Path, start: int, count: int, stride: int, key_frames: Sequence[int]) -> Iterator[np.ndarray]:
        frames = list(iter_frames(path, 0, 20))
        return iter([frames[max(0, number - 1)] for number in range(start, start + count * stride, stride)])

    require_conformance(path, probe(path), iter_frames, "itself")
    with pytest.raises(
        ValueError, match=r"frame 19 .* differs by [34]\.0 of 255 levels from PyAV's, and 18 is the nearest"
    ):
        require_conformance(path, probe(path), one_late, "other")


def test_avi_is_refused_before_anything_is_opened(
    tmp_path: Path, small_avi: bytes, torchcodec: type[FakeTorchcodec]
) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(small_avi)
    with pytest.raises(
        ValueError, match=r"1 of 1 files have none to be trusted \(AVI.*clip\.avi\. Use --data\.decoder=pyav"
    ):
        require_decoder("torchcodec", {path: probe(path)})
    assert torchcodec.opened == []
    require_decoder("pyav", {path: probe(path)})


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'torchcodec'"),
        RuntimeError("Could not load libtorchcodec. Likely causes:\n1. FFmpeg is not there\n2. ..."),
    ],
)
def test_where_it_cannot_be_loaded_one_message_says_what_it_takes(
    mp4: Path, torchcodec: type[FakeTorchcodec], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torchcodec, "__init__", refuse)
    with pytest.raises(
        ValueError, match=r"--data\.decoder=torchcodec cannot be used here: .*FFmpeg's shared"
    ) as raised:
        require_decoder("torchcodec", {mp4: probe(mp4)})
    assert "\n" not in str(raised.value)


def test_the_real_one_conforms_or_says_that_it_cannot_be_loaded(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchcodec")
    monkeypatch.setattr(decoders, "_conforming", set())
    try:
        require_decoder("torchcodec", {mp4: probe(mp4)})
    except ValueError as error:
        assert "cannot be used here" in str(error)  # noqa: PT017 # it depends on the machine's libraries
    else:
        assert read_numbers(np.stack(list(iter_torchcodec(mp4, 3, 5, 7)))) == [3, 10, 17, 24, 31]
