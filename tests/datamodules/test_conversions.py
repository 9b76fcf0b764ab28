"""What files come with besides 8-bit 4:2:0 at a constant rate: their frames are the right ones in the right colours."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from numbered_video import numbered_frame, read_numbers

from datamodules.decoding import probe, read_frames

LEVELS = (0, 64, 128, 192, 255)  # of grey, left to right: where a wrong range shows
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (40, 90, 200))


def stripes(values: tuple[Any, ...], width: int = 160, height: int = 64) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    for place, value in enumerate(values):
        image[:, place * width // len(values) : (place + 1) * width // len(values)] = value
    return image


def centres(frame: np.ndarray, count: int) -> np.ndarray:
    """The colours of the stripes, away from their edges: `[count, 3]`."""
    width = frame.shape[1]
    return frame[frame.shape[0] // 2, [int((place + 0.5) * width / count) for place in range(count)]].astype(int)


def write(
    path: Path,
    images: list[np.ndarray],
    codec: str,
    pix_fmt: str,
    color_range: ColorRange | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write images with exactly this pixel format and range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for image in images:
            layout = "rgba" if image.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(image, format=layout)
            frame = frame.reformat(format=pix_fmt, dst_color_range=color_range)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "color_range"),
    [
        ("libx264", "yuv420p", ColorRange.MPEG),
        ("libx264", "yuvj420p", ColorRange.JPEG),
        ("libx264", "yuv420p", ColorRange.JPEG),
        ("libvpx-vp9", "yuv420p", ColorRange.MPEG),
        ("libvpx-vp9", "yuv420p", ColorRange.JPEG),
        ("libx264", "yuv420p10le", ColorRange.MPEG),
        ("libx264", "yuv444p", ColorRange.MPEG),
    ],
)
def test_grey_levels_are_those_that_were_written(
    tmp_path: Path, codec: str, pix_fmt: str, color_range: ColorRange
) -> None:
    suffix = ".webm" if "vp9" in codec else ".mp4"
    path = write(tmp_path / f"grey{suffix}", [stripes(LEVELS)] * 4, codec, pix_fmt, color_range, {"crf": "4"})
    with av.open(str(path)) as container:
        declared = container.streams.video[
            0
        ].codec_context.color_range  # or this shows nothing: limited may be left out
        assert (declared == ColorRange.JPEG) == (color_range == ColorRange.JPEG)
    (frame,) = read_frames(path, 2, 1)
    assert np.abs(centres(frame, len(LEVELS)) - np.array(LEVELS)[:, None]).max() <= 4


@pytest.mark.parametrize("colorspace", [Colorspace.ITU709, Colorspace.ITU601])
def test_colours_follow_the_matrix_that_the_file_names(tmp_path: Path, colorspace: Colorspace) -> None:
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 160, 64, "yuv420p"
        stream.codec_context.colorspace = colorspace
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(stripes(COLOURS), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=colorspace)))
        container.mux(stream.encode())
    (frame,) = read_frames(path, 1, 1)
    assert np.abs(centres(frame, len(COLOURS)) - np.array(COLOURS)).max() <= 8


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv420p"])
def test_ten_bits_show_the_same_frames_and_colours_as_eight(tmp_path: Path, pix_fmt: str) -> None:
    images = [numbered_frame(number) for number in range(10)]
    path = write(tmp_path / "numbers.mp4", images, "libx264", pix_fmt)
    frames = read_frames(path, 0, 10)
    assert frames.dtype == np.uint8
    assert read_numbers(frames) == list(range(10))
    path = write(tmp_path / "colours.mp4", [stripes(COLOURS)] * 3, "libx264", pix_fmt, options={"crf": "4"})
    (frame,) = read_frames(path, 1, 1)
    assert np.abs(centres(frame, len(COLOURS)) - np.array(COLOURS)).max() <= 8


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("alpha.mov", "qtrle", "argb"), ("alpha.mkv", "ffv1", "yuva420p")]
)
def test_transparency_is_left_out_and_colours_stay_as_they_are_stored(
    tmp_path: Path, name: str, codec: str, pix_fmt: str
) -> None:
    opaque = stripes(COLOURS)
    alpha = np.full((*opaque.shape[:2], 1), 90, np.uint8)
    path = write(tmp_path / name, [np.concatenate([opaque, alpha], axis=2)] * 3, codec, pix_fmt)
    with av.open(str(path)) as container:
        assert "a" in container.streams.video[0].codec_context.pix_fmt.replace("rgba", "a")
    frames = read_frames(path, 0, 3)
    assert frames.shape == (3, 64, 160, 3)
    assert np.abs(centres(frames[1], len(COLOURS)) - np.array(COLOURS)).max() <= 8


@pytest.mark.parametrize("name", ["odd.webm", "odd.mkv"])
def test_odd_sizes_are_kept_whole(tmp_path: Path, name: str) -> None:
    codec, pix_fmt = ("libvpx-vp9", "yuv420p") if name.endswith("webm") else ("ffv1", "yuv420p")
    images = [numbered_frame(number, 131, 67) for number in range(5)]
    frames = read_frames(write(tmp_path / name, images, codec, pix_fmt), 0, 5)
    assert frames.shape == (5, 67, 131, 3)
    assert read_numbers(frames) == list(range(5))


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_a_variable_rate_changes_no_numbers(tmp_path: Path, name: str) -> None:
    durations = [1 + 5 * (number % 4 == 0) + 20 * (number == 30) for number in range(50)]
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "2", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90)
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = sum(durations[:number]), Fraction(1, 90)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(path)
    assert info.num_frames == 50
    assert len(info.key_frames) > 2
    for start, count, stride in ((0, 50, 1), (29, 4, 2), (43, 7, 1), (12, 5, 9)):
        numbers = read_numbers(read_frames(path, start, count, stride, info.key_frames))
        assert numbers == list(range(start, start + count * stride, stride))


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [("sound.mp4", "libx264", "aac"), ("sound.avi", "mpeg4", "mp3"), ("sound.webm", "libvpx-vp9", "libopus")],
)
def test_sound_beside_the_picture_changes_nothing(tmp_path: Path, name: str, codec: str, sound: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        audio = container.add_stream(sound, rate=48000)  # the first stream is not the video
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 128, 64, "yuv420p"
        audio.layout = "mono"
        for number in range(30):
            silence = np.zeros((1, 48000 // 25), np.float32)
            samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            samples.rate = 48000
            samples.pts = number * silence.shape[1]
            resampled = av.AudioResampler(audio.codec_context.format, "mono", 48000).resample(samples)
            for part in resampled:
                container.mux(audio.encode(part))
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(audio.encode())
        container.mux(video.encode())
    info = probe(path)
    assert info.num_frames == 30
    assert read_numbers(read_frames(path, 0, 30, 1, info.key_frames)) == list(range(30))
    assert read_numbers(read_frames(path, 17, 4, 3, info.key_frames)) == [17, 20, 23, 26]


def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    webm = write_video(tmp_path / "clip.webm", 12, codec="libvpx-vp9")
    renamed = webm.rename(tmp_path / "clip.mp4")
    info = probe(renamed)
    assert (info.container, info.num_frames) == ("matroska,webm", 12)
    assert read_numbers(read_frames(renamed, 3, 4)) == [3, 4, 5, 6]
