"""Videos of a data set: how they are found and read, and which parts of them are shown for evaluation."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.decoders import DECODERS, Decoder, require_decoder
from datamodules.decoding import VideoInfo
from datamodules.reader import own_reader


@dataclass(frozen=True)
class Video:
    """A video of a data set.

    Args:
        path: a file, or a folder of frames.
        label: its class.
        num_frames: how many frames it has.
        key_frames: frames at which decoding may begin.
        decoder: how to read it, a key of `DECODERS`.
        read_timeout: seconds after which reading is given up, in a child process; None waits for ever.
    """

    path: Path
    label: int
    num_frames: int
    key_frames: tuple[int, ...] = (0,)
    decoder: str = "pyav"
    read_timeout: float | None = None

    @property
    def place(self) -> Path:
        """What the quarantine list calls it."""
        return self.path

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` as uint8 `[H, W, 3]`.

        Raises:
            UnreadableVideoError: if one of them cannot be read.
        """
        where = (start, count, stride, self.key_frames)
        if self.read_timeout is None:
            return DECODERS[self.decoder](self.path, *where)
        return own_reader().call(self.path, self.read_timeout, self.decoder, *where)


def indexed_videos(
    labels: Mapping[Path, int],
    index: Mapping[Path, VideoInfo | str],
    decoder: Decoder = "pyav",
    read_timeout: float | None = None,
) -> list[Video]:
    """Return the readable videos of an index, in the order of `labels`, and warn of the others.

    Raises:
        ValueError: if the decoder does not give the right frames of all of them.
    """
    reasons = [info for path in labels if isinstance(info := index[path], str)]
    if reasons:
        rank_zero_warn(
            f"{len(reasons)} of {len(labels)} videos cannot be read and are left out, such as: {'; '.join(reasons[:3])}"
        )
    readable = {path: info for path in labels if isinstance(info := index[path], VideoInfo)}
    require_decoder(decoder, readable)
    return [
        Video(
            path,
            labels[path],
            info.num_frames,
            info.key_frames,
            "images" if info.container == "images" else decoder,
            read_timeout,
        )
        for path, info in readable.items()
    ]


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield, sorted, the files below a folder that end so, in any case; hidden ones are left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


def warn_of_extra_files(name: str, extra: Sequence[Path]) -> None:
    """Say how many files are in no list, and left out."""
    if extra:
        shown = ", ".join(map(str, extra[:3]))
        rank_zero_warn(f"{name}: {len(extra)} files are in no list and left out, such as {shown}.")


def spaced_starts(num_frames: int, span: int, windows: int) -> list[int]:
    """Return where evaluation windows begin: floor(linspace(0, last start, windows)), the first frame for one window.

    The rule of MAGVIT's evaluation. 15 windows of 16 in 30 frames are all that there are.

    Args:
        num_frames: length of the video.
        span: frames from a window's first to its last one.
        windows: how many.
    """
    last = num_frames - span
    return [last * number // max(windows - 1, 1) for number in range(windows)]


@dataclass(frozen=True, kw_only=True)
class VideoWindow(Video):
    """A part of a video: `num_frames` from `first_frame` on, cut to a square where `crop` says.

    Args:
        first_frame: number of its first frame in the video.
        crop: (i, k) for the i-th of k squares evenly spaced along the longer side, from one end to the other; None
            for the whole picture.
    """

    first_frame: int = 0
    crop: tuple[int, int] | None = None

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` of the window as uint8 `[H, W, 3]`.

        Raises:
            UnreadableVideoError: if one of them cannot be read.
        """
        for frame in super().frames(self.first_frame + start, count, stride):
            yield frame if self.crop is None else _square(frame, *self.crop)


def _square(frame: np.ndarray, number: int, crops: int) -> np.ndarray:
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = ((spare - side) * number // (crops - 1) for spare in (height, width))
    return frame[top : top + side, left : left + side]


def check_windows(val_windows: int | None, val_crops: int) -> None:
    """Refuse numbers of evaluation windows below one."""
    for name, value in (("val_windows", val_windows), ("val_crops", val_crops)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is too small: at least 1 (--data.{name}).")


def evaluation_windows(videos: Iterable[Video], span: int, windows: int | None, crops: int) -> list[Video]:
    """Return the same number of clips of each video that is long enough: windows evenly spaced in time, and in place.

    The first window of every video comes before the second one of any, so that a part of them shows all videos. A
    video that has fewer places than `windows` repeats some.

    Args:
        videos: of video files.
        span: frames from a clip's first to its last one.
        windows: clips along time; None leaves their place open.
        crops: clips along the longer side; one is left to be cropped at the centre.
    """
    long_enough = [video for video in videos if video.num_frames >= span]
    places = [(i, crops) for i in range(crops)] if crops > 1 else [None]
    return [
        VideoWindow(
            **vars(video)
            | {
                "num_frames": video.num_frames if windows is None else span,
                "first_frame": 0 if windows is None else spaced_starts(video.num_frames, span, windows)[number],
                "crop": place,
            }
        )
        for number in range(windows or 1)
        for place in places
        for video in long_enough
    ]
