import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from callbacks.media import caption_strip, contact_sheet, gif_bytes, tile, to_uint8, write_gif_summary, write_mp4


def moving_frames(num_frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square that moves over a smooth background: [T, H, W, 3]."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 200, width)
    frames[..., 2] = np.linspace(0, 200, height)[:, None]
    for t in range(num_frames):
        frames[t, 8:16, 4 * t : 4 * t + 8] = (250, 240, 60)
    return frames


def read_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    video = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    assert torch.equal(to_uint8(video.float() / 127.5 - 1), video)
    assert torch.equal(to_uint8(video), video)


def test_to_uint8_rounds_halves_to_even_and_clamps() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 7.0, float("nan"), float("inf")]).view(1, 1, 1, 1, 7)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255, 0, 255]
    assert to_uint8(torch.tensor([129 / 127.5 - 1], dtype=torch.bfloat16)).dtype == torch.uint8


def test_tile_keeps_every_video_inside_a_border() -> None:
    video = torch.randint(0, 200, (3, 3, 4, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = tile(video, columns=2)
    assert grid.shape == (4, 2 * 7 + 2, 2 * 9 + 2, 3)
    assert grid.dtype == np.uint8
    for position, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = 2 + 7 * row, 2 + 9 * column
        cell = grid[:, top : top + 5, left : left + 7]
        np.testing.assert_array_equal(cell, video[position].permute(1, 2, 3, 0).numpy())
        grid[:, top : top + 5, left : left + 7] = 255
    assert (grid == 255).all()  # border and the empty fourth cell


def test_gif_has_all_frames_their_time_and_loops() -> None:
    frames = moving_frames()
    data = gif_bytes(frames, fps=8)
    assert data.startswith(b"GIF89a")
    image = Image.open(io.BytesIO(data))
    assert image.n_frames == 6
    assert image.info["loop"] == 0
    read = []
    for frame in ImageSequence.Iterator(image):
        assert frame.info["duration"] == 120  # 125 ms, in hundredths of a second
        read.append(np.array(frame.convert("RGB")))
    assert np.abs(np.stack(read).astype(int) - frames).mean() < 6  # of 255: a palette of 255 colours


def test_what_stands_still_does_not_flicker_in_a_gif() -> None:
    image = Image.open(io.BytesIO(gif_bytes(moving_frames(), fps=8)))
    background = np.stack([np.array(frame.convert("RGB"))[20:] for frame in ImageSequence.Iterator(image)])
    assert (background == background[0]).all()


def test_still_video_becomes_a_gif_of_the_same_time() -> None:
    image = Image.open(io.BytesIO(gif_bytes(np.zeros((5, 8, 8, 3), np.uint8), fps=10)))
    assert image.size == (8, 8)
    assert image.n_frames == 1
    assert image.info["duration"] == 500


def test_gif_summary_is_read_back_from_the_event_file(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_gif_summary(writer, "samples/video", moving_frames(), fps=8, step=12)
    (path,) = tmp_path.glob("events.*")
    (event,) = (event for event in EventFileLoader(str(path)).Load() if event.summary.value)
    (value,) = event.summary.value
    assert (event.step, value.tag) == (12, "samples/video")
    # the loader turns images into tensors of strings: width, height, data
    width, height, data = value.tensor.string_val
    assert (width, height) == (b"48", b"32")
    assert data.startswith(b"GIF89a")
    assert Image.open(io.BytesIO(data)).n_frames == 6


def test_mp4_is_read_back_as_written(tmp_path: Path) -> None:
    frames = moving_frames()
    path = tmp_path / "new" / "folder" / "video.mp4"
    write_mp4(path, frames, fps=8)
    read = read_mp4(path)
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4  # of 255: lossy, with colour at half resolution
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_mp4_makes_odd_sizes_even_by_repeating_the_edge(tmp_path: Path) -> None:
    frames = moving_frames(height=31, width=47)
    write_mp4(tmp_path / "odd.mp4", frames, fps=29.97)
    read = read_mp4(tmp_path / "odd.mp4")
    assert read.shape == (6, 32, 48, 3)
    assert np.abs(read[:, :31, :47].astype(int) - frames).mean() < 4
    assert np.abs(read[:, 31].astype(int) - read[:, 30]).mean() < 12


def test_mp4_without_libx264_is_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    frames = moving_frames()
    write_mp4(tmp_path / "video.mp4", frames, fps=8)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert np.abs(read_mp4(tmp_path / "video.mp4").astype(int) - frames).mean() < 4


def test_failed_mp4_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, moving_frames(), fps=8)
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        assert self.is_file()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_mp4(path, 255 - moving_frames(), fps=8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_shows_first_and_last_frame_of_each_video_enlarged() -> None:
    video = torch.full((2, 3, 16, 20, 30), -1.0)
    video[:, 0, 0] = 1.0  # the first frame is red, the last one blue
    video[:, 2, -1] = 1.0
    sheet = contact_sheet(video, columns=5)
    cell_height, cell_width = 4 * 20 + 2, 4 * 30 + 2  # 20 pixels times 4 are at least 64
    assert sheet.size == (5 * cell_width + 2, 2 * cell_height + 2)
    for row in range(2):
        y = row * cell_height + cell_height // 2
        assert sheet.getpixel((cell_width // 2, y)) == (255, 0, 0)
        assert sheet.getpixel((4 * cell_width + cell_width // 2, y)) == (0, 0, 255)
        assert sheet.getpixel((2 * cell_width + cell_width // 2, y)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("num_frames", "size", "expected"),
    [(3, 100, (3 * 102 + 2, 102 + 2)), (1, 64, (64 + 4, 64 + 4)), (20, 64, (8 * 66 + 2, 66 + 2))],
)
def test_contact_sheet_never_repeats_frames_and_keeps_large_ones(
    num_frames: int, size: int, expected: tuple[int, int]
) -> None:
    assert contact_sheet(torch.zeros(1, 3, num_frames, size, size)).size == expected


def test_captions_stand_below_videos_and_above_the_rows_of_a_sheet() -> None:
    video = torch.zeros(2, 3, 4, 64, 64)  # grey
    plain, captioned = tile(video, 2), tile(video, 2, ["a red ball that rolls over the table", ""])
    assert captioned.shape[2] == 2 * (128 + 2) + 2
    strip = captioned.shape[1] - (128 + 4)
    assert strip > 20  # two lines
    first, second = captioned[:, -strip:, : 128 + 2], captioned[:, -strip:, 128 + 2 :]
    assert first.min() < 100
    assert second.min() == 255
    assert (captioned == captioned[:1]).all()  # what does not move does not flicker
    assert np.array_equal(tile(video, 2, ["", ""]), plain)

    sheet, bare = contact_sheet(video, captions=["one", "two"]), contact_sheet(video)
    assert sheet.width == bare.width
    assert sheet.height > bare.height + 20


def test_long_captions_end_in_an_ellipsis() -> None:
    short, long, longer = (caption_strip("word " * count, 128, 2) for count in (3, 40, 80))
    assert short.shape == long.shape
    assert torch.equal(long, longer)
