"""The ways to get frames of a video by their number, all with one signature, and the test that a second one must pass.

PyAV is the reference: it counts frames from the beginning, and is right for every file. torchcodec finds frames by
their time stamps. So it is refused for files whose stamps do not number the frames (AVI has none), and for each
container and codec it must first show, on a file of the data set, that it gives the frames that PyAV gives.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from datamodules.decoding import UnreadableVideoError, VideoInfo, iter_frames, require_regular_file

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*FRAME_SUFFIXES, ".webp")
Decoder = Literal["pyav", "torchcodec"]
FrameReader = Callable[[Path, int, int, int, Sequence[int]], Iterator[np.ndarray]]

_CHUNK = 16  # frames of one call of torchcodec: a long clip of a large video is never in memory whole
_CONFORMANCE_FRAMES = 32
# Levels of 255. Both convert 8-bit video bit for bit alike, 10-bit video about 3 levels apart; a wrong frame may be
# nearer than that, so that it must also be nearer to the right one than to its neighbours.
_TOLERANCE = 6.0
_conforming: set[tuple[str, str]] = set()


def frame_files(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted by the last number in the name's stem: 2 comes before 10."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES) and name[0] != "."]
    return [folder / name for name in sorted(names, key=_number_and_name)]


def _number_and_name(name: str) -> tuple[int, str]:
    return int((re.findall(r"\d+", os.path.splitext(name)[0]) or ["0"])[-1]), name


def iter_images(
    folder: Path, start: int, count: int, stride: int = 1, key_frames: Sequence[int] = (0,)
) -> Iterator[np.ndarray]:
    """Yield frames `start, start + stride, ...` of a folder of images as uint8 `[H, W, 3]`.

    Raises:
        UnreadableVideoError: if one of them is not there or cannot be read.
    """
    try:
        files = frame_files(folder)
        for number in range(start, start + count * stride, stride):
            require_regular_file(files[number])
            with Image.open(files[number]) as image:
                yield np.array(image.convert("RGB"))
    except UnreadableVideoError:
        raise
    # Pillow raises SyntaxError for a broken PNG, and its own error for an image that would not fit into memory
    except (OSError, IndexError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableVideoError(f"{folder}: {error}") from error


def iter_torchcodec(
    path: Path, start: int, count: int, stride: int = 1, key_frames: Sequence[int] = (0,)
) -> Iterator[np.ndarray]:
    """Yield frames `start, start + stride, ...` as uint8 `[H, W, 3]`; torchcodec turns them as the file says.

    Raises:
        UnreadableVideoError: if one of them cannot be read.
        ValueError: if torchcodec is not installed, or does not find FFmpeg's libraries.
    """
    require_regular_file(path)
    numbers = list(range(start, start + count * stride, stride))
    try:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        for first in range(0, count, _CHUNK):
            yield from decoder.get_frames_at(numbers[first : first + _CHUNK]).data.numpy()
    except (ImportError, RuntimeError, IndexError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        # its libraries are loaded at import, or from version 0.15 on when the first decoder is made
        if isinstance(error, ImportError) or "load libtorchcodec" in reason:
            raise ValueError(
                f"--data.decoder=torchcodec cannot be used here: {reason.partition('. ')[0]}. It takes the package "
                "torchcodec (the extra "
                "`torchcodec`) and FFmpeg's shared libraries on the machine. --data.decoder=pyav needs neither."
            ) from error
        raise UnreadableVideoError(f"{path}: {reason}") from error


DECODERS: dict[str, FrameReader] = {"pyav": iter_frames, "torchcodec": iter_torchcodec, "images": iter_images}


def require_decoder(decoder: Decoder, index: Mapping[Path, VideoInfo]) -> None:
    """See that a decoder gives the right frames of all these files, by what is known of them.

    At the first use for a container and codec, the first such file is decoded with it and with PyAV.

    Raises:
        ValueError: if it cannot.
    """
    if decoder == "pyav":
        return
    files = {path: info for path, info in index.items() if info.container != "images"}
    refused = [path for path, info in files.items() if not info.has_stamps]
    if refused:
        raise ValueError(
            f"--data.decoder={decoder} finds frames by their time stamps, and {len(refused)} of {len(files)} files "
            f"have none to be trusted (AVI, or missing or repeated ones), such as {', '.join(map(str, refused[:3]))}. "
            "Use --data.decoder=pyav."
        )
    for path, info in files.items():
        kind = (info.container, info.codec)
        if kind not in _conforming:
            require_conformance(path, info, DECODERS[decoder], decoder)
            _conforming.add(kind)


def require_conformance(path: Path, info: VideoInfo, read: FrameReader, name: str) -> None:
    """Compare a decoder with sequential decoding on one file: each frame alone, backwards, and strided runs.

    Raises:
        ValueError: if a frame is missing, has another size, or is not the one that belongs to its number.
    """
    frames = iter_frames(path, 0, info.num_frames)
    reference = dict(enumerate(map(_thinned, islice(frames, _CONFORMANCE_FRAMES))))
    tail = deque(map(_thinned, frames), maxlen=3)  # the last frame is where decoders fail first
    reference |= {info.num_frames - len(tail) + place: frame for place, frame in enumerate(tail)}

    last = max(number for number in reference if number < _CONFORMANCE_FRAMES)
    requests = [(number, 1, 1) for number in sorted(reference, reverse=True)]
    requests += [(0, last // stride + 1, stride) for stride in (1, 3)]
    for start, count, stride in requests:
        wanted = range(start, start + count * stride, stride)
        try:
            found = [_thinned(frame) for frame in read(path, start, count, stride, info.key_frames)]
        except UnreadableVideoError as error:
            raise ValueError(_not_conforming(name, info, f"frames {list(wanted)}: {error}")) from error
        for number, frame in zip(wanted, found, strict=True):
            distances = {
                other: float(np.abs(frame - reference[other]).mean())
                if frame.shape == reference[other].shape
                else 255.0
                for other in range(number - 3, number + 4)
                if other in reference
            }
            nearest = min(distances, key=lambda other: (distances[other], abs(other - number)))
            if distances[number] > distances[nearest] or distances[number] > _TOLERANCE:
                raise ValueError(
                    _not_conforming(
                        name, info, f"frame {number} of {path} differs by {distances[number]:.1f} of 255 levels from "
                        f"PyAV's, and {nearest} is the nearest",
                    )
                )  # fmt: skip


def _not_conforming(name: str, info: VideoInfo, what: str) -> str:
    return (
        f"--data.decoder={name} does not give the frames of sequential decoding for {info.codec} in {info.container}: "
        f"{what}. Use --data.decoder=pyav."
    )


def _thinned(frame: np.ndarray) -> np.ndarray:
    """Every n-th pixel, so that a whole video fits into memory: at most about 128 a side."""
    step = max(1, min(frame.shape[:2]) // 128)
    return frame[::step, ::step].astype(np.float32)
