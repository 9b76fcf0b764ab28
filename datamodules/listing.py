"""What the data sets share that are lists of files: where they lie, what is missing, and evaluation windows."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.video import Video


def found_root(name: str, root: str | None, variable: str, source: str) -> Path:
    """Return the folder of a data set, from the option or from the environment.

    Args:
        name: of the data set.
        root: what `--data.root` says.
        variable: the environment variable that takes its place.
        source: where to get the data set, for the error.

    Raises:
        FileNotFoundError: if there is none.
    """
    place = root or os.environ.get(variable)
    if not place:
        raise FileNotFoundError(f"{name} has no folder: set --data.root or {variable}. {source}")
    if not Path(place).is_dir():
        raise FileNotFoundError(f"{name}: no folder {place} (--data.root or {variable}). {source}")
    return Path(place)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield, sorted, the files below a folder that end so, in any case; hidden ones are left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


def warn_of_differences(list_name: str, num_listed: int, missing: Sequence[str], extra: Sequence[str | Path]) -> None:
    """Say how many videos of a list are not there, and how many files are in no list; both are left out."""
    if missing:
        rank_zero_warn(f"{list_name}: {len(missing)} of {num_listed} videos are missing, such as {_first(missing)}.")
    if extra:
        rank_zero_warn(f"{list_name}: {len(extra)} files are in no list and left out, such as {_first(extra)}.")


def _first(names: Sequence[str | Path]) -> str:
    return ", ".join(map(str, names[:3]))


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
            path=video.path,
            label=video.label,
            num_frames=video.num_frames if windows is None else span,
            key_frames=video.key_frames,
            first_frame=0 if windows is None else spaced_starts(video.num_frames, span, windows)[number],
            crop=place,
        )
        for number in range(windows or 1)
        for place in places
        for video in long_enough
    ]
