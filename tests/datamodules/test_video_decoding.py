import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_video import numbered_frame, read_number, read_numbers
from torch._utils import ExceptionWrapper

from datamodules import decoding
from datamodules.decoding import (
    TruncatedVideoError,
    UnreadableVideoError,
    bytes_are_missing,
    probe,
    read_frames,
    read_header,
    rotate,
)

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
def test_missing_repeated_or_discarded_stamps_number_no_frames(doubtful: tuple[Any, ...]) -> None:
    packets = [decoding._Packet(0, True, False), decoding._Packet(2, True, False)]
    assert decoding._stamps_number_frames(packets)
    assert not decoding._stamps_number_frames([*packets, decoding._Packet(*doubtful)])


@pytest.mark.parametrize("name", FORMATS)
def test_stamps_are_trusted_where_one_packet_is_one_frame(videos: dict[str, Path], name: str) -> None:
    info = probe(videos[name])
    assert info.has_stamps == (name in ("bframes.mp4", "bframes.mkv", "odd.webm"))
    assert (info.codec, info.container) != ("", "")


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

    @pytest.mark.parametrize("share", [0.5, 0.85])
    @pytest.mark.parametrize("name", ["bframes.avi", "odd.webm", "bframes.mkv", "faststart.mp4"])
    def test_a_missing_end_is_found_where_decoding_gives_no_error(
        self, tmp_path: Path, videos: dict[str, Path], write_video: Callable[..., Path], name: str, share: float
    ) -> None:
        whole = videos.get(name) or write_faststart(tmp_path / "whole.mp4", videos["bframes.mp4"])
        path = tmp_path / name
        with av.open(str(whole)) as container:
            places = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
        path.write_bytes(whole.read_bytes()[: places[int(share * NUM_FRAMES)]])
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "NONE"
            assert 1 <= sum(1 for _ in container.decode(video=0)) < NUM_FRAMES  # no error here
        assert bytes_are_missing(path)
        assert not bytes_are_missing(whole)
        with pytest.raises(TruncatedVideoError, match=rf"{name}: truncated, "):
            probe(path)

    def test_half_of_a_file_that_was_written_to_a_stream_is_found_by_its_length(
        self, tmp_path: Path, videos: dict[str, Path]
    ) -> None:
        content = bytearray(videos["bframes.avi"].read_bytes())
        content[4:8] = b"\0\0\0\0"  # such a file does not say how long it is
        path = tmp_path / "streamed.avi"
        path.write_bytes(content)
        assert probe(path).num_frames == NUM_FRAMES
        with av.open(str(path)) as container:
            places = [packet.pos for packet in container.demux(video=0) if packet.size]
        path.write_bytes(content[: places[NUM_FRAMES // 2]])
        assert not bytes_are_missing(path)
        with pytest.raises(TruncatedVideoError, match=rf"of {NUM_FRAMES} frames are there"):
            probe(path)

    @pytest.mark.parametrize(
        "content", [b"", b"RIFF", b"\x1a\x45\xdf\xa3" * 20, bytes(100), b"\x1a\x45\xdf\xa3" + bytes(80)]
    )
    def test_what_is_no_container_says_nothing_about_its_length(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "some").write_bytes(content)
        bytes_are_missing(tmp_path / "some")  # or this raises

    def test_damaged_packets_are_found_by_decoding_the_last_frame(
        self, tmp_path: Path, videos: dict[str, Path]
    ) -> None:
        content = bytearray(videos["bframes.mp4"].read_bytes())
        with av.open(str(videos["bframes.mp4"])) as container:
            places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        for position, size in places[30:]:
            content[position : position + size] = b"\xff" * size
        path = tmp_path / "damaged.mp4"
        path.write_bytes(content)
        assert read_header(path).num_frames == NUM_FRAMES
        for read in (probe, lambda path: read_frames(path, 0, NUM_FRAMES)):
            with pytest.raises(UnreadableVideoError, match=r"damaged\.mp4"):
                read(path)

    def test_what_would_block_is_refused_before_it_is_opened(self, tmp_path: Path) -> None:
        pipe, folder, device = tmp_path / "pipe.mp4", tmp_path / "folder.mp4", tmp_path / "device.mp4"
        os.mkfifo(pipe)
        folder.mkdir()
        device.symlink_to("/dev/zero")
        for path, kind in ((pipe, "pipe"), (folder, "folder"), (device, "device")):
            for read in (probe, read_header, lambda path: read_frames(path, 0, 1)):
                with pytest.raises(UnreadableVideoError, match=rf"{path.name}: is a {kind}, no regular file"):
                    read(path)

    def test_a_codec_that_nobody_knows_is_an_error_that_names_the_file(
        self, tmp_path: Path, videos: dict[str, Path]
    ) -> None:
        path = tmp_path / "strange.mp4"
        path.write_bytes(videos["bframes.mp4"].read_bytes().replace(b"avc1", b"xyz1").replace(b"avcC", b"xyzC"))
        with pytest.raises(UnreadableVideoError, match=r"strange\.mp4: "):
            probe(path)

    def test_a_file_that_may_not_be_read_is_an_error_that_names_it(
        self, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **options: Any) -> None:  # root may read everything, so that modes do not help
            raise av.PermissionError(13, "Permission denied", "bframes.mp4")

        monkeypatch.setattr(av, "open", refuse)
        with pytest.raises(UnreadableVideoError, match=r"bframes\.mp4: .*Permission denied"):
            probe(videos["bframes.mp4"])


def write_faststart(path: Path, source: Path) -> Path:
    """Copy an mp4 with its index at the beginning."""
    options = {"movflags": "faststart"}
    with av.open(str(source)) as container, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


def test_headers_are_read_without_decoding(videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_packets", None)
    header = read_header(videos["bframes.mp4"])
    assert (header.codec, header.width, header.height, header.fps) == ("h264", 128, 64, 25.0)
    assert (header.num_frames, header.seconds) == (NUM_FRAMES, pytest.approx(2.4))
    assert read_header(videos["odd.webm"]).num_frames == 0  # it does not say


class TestErrorMessages:
    def test_an_error_is_an_oserror_and_travels_between_processes(self) -> None:
        error = pickle.loads(pickle.dumps(TruncatedVideoError("a.avi: truncated")))
        assert isinstance(error, OSError)
        assert str(error) == "a.avi: truncated"

    def test_what_a_loader_makes_of_a_workers_error_is_the_message_again(self) -> None:
        try:
            raise UnreadableVideoError("toys: 2 of 3 videos cannot be read:\n  a.avi: broken\n  b.avi: broken")
        except UnreadableVideoError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(UnreadableVideoError) as raised:
            wrapped.reraise()
        assert str(raised.value) == "toys: 2 of 3 videos cannot be read:\n  a.avi: broken\n  b.avi: broken"


def test_numbers_in_test_frames_can_be_read_back() -> None:
    assert [read_number(numbered_frame(number)) for number in range(256)] == list(range(256))
