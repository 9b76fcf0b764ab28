from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numbered_video import read_numbers

from datamodules.listing import Video, VideoWindow, evaluation_windows, spaced_starts


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 15])
@pytest.mark.parametrize("num_frames", [16, 17, 30, 250])
def test_windows_are_spaced_as_numpy_spaces_them(num_frames: int, windows: int) -> None:
    expected = np.floor(np.linspace(0, num_frames - 16, windows) + 1e-9).astype(int).tolist()
    assert spaced_starts(num_frames, 16, windows) == expected


def test_fifteen_windows_of_sixteen_frames_are_all_that_thirty_have() -> None:
    assert spaced_starts(30, 16, 15) == list(range(15))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Video:
    path = write_video(tmp_path_factory.mktemp("windows") / "a.avi", 20, bit_rate=200_000)
    return Video(path, label=5, num_frames=20)


def test_a_window_shows_its_part_of_the_video(video: Video) -> None:
    first, second = evaluation_windows([video], span=9, windows=2, crops=1)
    assert read_numbers(np.stack(list(first.frames(0, 5, 2)))) == [0, 2, 4, 6, 8]
    assert read_numbers(np.stack(list(second.frames(1, 3, 1)))) == [12, 13, 14]
    assert (second.num_frames, second.label, second.path) == (9, 5, video.path)


def test_crops_are_squares_from_one_end_to_the_other(video: Video) -> None:
    whole = next(video.frames(11, 1, 1))  # [64, 128, 3]
    crops = [next(w.frames(0, 1, 1)) for w in evaluation_windows([video], span=9, windows=2, crops=3)[3:]]
    for crop, left in zip(crops, (0, 32, 64), strict=True):
        np.testing.assert_array_equal(crop, whole[:, left : left + 64])


def test_portraits_are_cropped_from_top_to_bottom(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    path = write_video(tmp_path / "tall.avi", 3, width=64, height=96, bit_rate=200_000)
    whole = next(Video(path, 0, 3).frames(0, 1, 1))
    for number, top in enumerate((0, 16, 32)):
        crop = next(VideoWindow(path, 0, 3, crop=(number, 3)).frames(0, 1, 1))
        np.testing.assert_array_equal(crop, whole[top : top + 64])


def test_the_first_windows_of_all_videos_come_first_and_short_videos_not_at_all(video: Video) -> None:
    videos = [video, Video(Path("b"), 0, num_frames=9), Video(Path("c"), 0, num_frames=8)]
    windows = evaluation_windows(videos, span=9, windows=2, crops=2)
    places = [(w.path.name, w.first_frame, w.crop) for w in windows if isinstance(w, VideoWindow)]
    assert places == [
        ("a.avi", 0, (0, 2)), ("b", 0, (0, 2)), ("a.avi", 0, (1, 2)), ("b", 0, (1, 2)),
        ("a.avi", 11, (0, 2)), ("b", 0, (0, 2)), ("a.avi", 11, (1, 2)), ("b", 0, (1, 2)),
    ]  # fmt: skip


def test_without_windows_the_whole_video_is_left_to_draw_from(video: Video) -> None:
    assert [window.num_frames for window in evaluation_windows([video], span=9, windows=None, crops=3)] == [20] * 3


def test_windows_are_read_as_their_video_is() -> None:
    video = Video(Path("a"), 3, num_frames=20, key_frames=(0, 8), decoder="torchcodec", read_timeout=2.0)
    for window in evaluation_windows([video], span=9, windows=2, crops=3):
        assert (window.key_frames, window.decoder, window.read_timeout) == ((0, 8), "torchcodec", 2.0)
