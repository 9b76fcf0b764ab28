"""The sound of video files, and when their frames are shown; without torch, so that a reading process can do it."""

import logging
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np

from datamodules.decoding import UnreadableVideoError, require_regular_file

SAMPLING_RATE = 16_000
WINDOW = 512  # samples around a moment that say what is heard then

_log = logging.getLogger(__name__)


def read_sound(path: str | Path, end_seconds: float) -> np.ndarray:
    """Decode the sound of a file from time 0 to the end of the part that is needed.

    It is decoded from the beginning, since not every container can seek in its sound to the sample. Where the file has
    no more sound, or none that can be decoded, the result ends early.

    Returns:
        `[S]` float32, one channel, `SAMPLING_RATE` samples a second.
    """
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLING_RATE)
    end = int(end_seconds * SAMPLING_RATE) + 1
    offset, parts, length = None, [np.zeros(0, np.float32)], 0
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            for frame in chain(container.decode(audio=0), [None]):
                if frame is not None and offset is None:
                    offset = round((frame.time or 0.0) * SAMPLING_RATE)
                for resampled in resampler.resample(frame):
                    parts.append(resampled.to_ndarray()[0].copy())
                    length += len(parts[-1])
                if length + (offset or 0) >= end:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        _log.warning("The sound of %s ends in an error, silence follows: %s", path, error)
    waveform = np.concatenate(parts)
    # sound may begin after the picture, or before it (an encoder's run-up): then its beginning is left out
    late = offset or 0
    return np.concatenate([np.zeros(max(late, 0), np.float32), waveform[max(-late, 0) :]])[:end]


def frame_times(path: str | Path, num_frames: int, extra: int = 1) -> np.ndarray:
    """Return when the frames of a video file are shown.

    These are its time stamps, sorted, where each frame has one of its own; otherwise frames are taken to follow each
    other at the declared rate, from time 0. AVI has no stamps, and those that FFmpeg derives for a file with B-frames
    begin one frame late; there, a frame's place in the file is its time.

    Args:
        path: the file.
        num_frames: how many frames it has.
        extra: how many more times to add at the end, at the average distance.

    Returns:
        `[num_frames + extra]` float64 seconds.

    Raises:
        UnreadableVideoError: if it cannot be opened, or tells neither times nor a rate.
    """
    require_regular_file(path)
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            assert isinstance(stream, av.VideoStream)  # its frames have been read
            packets = [packet for packet in container.demux(stream) if packet.size]
            found = {packet.dts if container.format.name == "avi" else packet.pts for packet in packets}
            stamps = sorted(stamp for stamp in found if stamp is not None)
            rate, time_base = stream.average_rate or stream.guessed_rate, float(stream.time_base or 0)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideoError(f"{path}: {error}") from error
    if len(stamps) != num_frames or num_frames == 1:
        if not rate:
            raise UnreadableVideoError(f"{path}: has neither a time stamp for each frame nor a frame rate.")
        return np.arange(num_frames + extra) / float(rate)
    times = np.array(stamps, np.float64) * time_base
    distance = (times[-1] - times[0]) / (num_frames - 1)
    return np.concatenate([times, times[-1] + distance * np.arange(1, extra + 1)])


def has_sound(path: str | Path) -> bool:
    """Tell whether a file can be opened and declares an audio stream."""
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            return bool(container.streams.audio)
    except (av.FFmpegError, OSError, ValueError):
        return False


def iter_sound(path: Path, start: int, count: int, stride: int, num_frames: int) -> Iterator[np.ndarray]:
    """Yield what belongs to frames `start, start + stride, ...` of a file: `count + 1` edges, then the sound.

    Args:
        path: the file.
        start: number of the first frame.
        count: how many frames.
        stride: distance of neighbouring ones.
        num_frames: how many the file has.

    Yields:
        `[count + 1]` float64 seconds: frame k is heard from edge k to edge k + 1; and `[S]` float32, as `read_sound`.

    Raises:
        UnreadableVideoError: if the file tells no times.
    """
    edges = frame_times(path, num_frames, extra=stride)[start::stride][: count + 1]
    yield edges
    yield read_sound(path, float(edges[-1]) + WINDOW / SAMPLING_RATE)
