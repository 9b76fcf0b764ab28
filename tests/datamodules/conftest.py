"""Videos whose frames say their own number, written with PyAV."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS = 8
WriteVideo = Callable[..., Path]


def numbered_frame(number: int, width: int = 128, height: int = 64) -> np.ndarray:
    """Vertical bars, white for the ones of the frame's number: wide enough to survive any codec."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    columns = [255 * bits[x * BITS // width] for x in range(width)]
    return np.broadcast_to(np.array(columns, np.uint8)[None, :, None], (height, width, 3)).copy()


def read_number(frame: np.ndarray) -> int:
    width = frame.shape[1]
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum((frame[:, x].mean() > 127) << bit for bit, x in enumerate(centres))


def read_numbers(video: np.ndarray) -> list[int]:
    return [read_number(frame) for frame in video]


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    def write(
        path: Path,
        num_frames: int,
        codec: str = "mpeg4",
        width: int = 128,
        height: int = 64,
        options: dict[str, str] | None = None,
        **codec_settings: Any,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for name, value in codec_settings.items():
                setattr(stream.codec_context, name, value)
            for number in range(num_frames):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def small_avi(tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo) -> bytes:
    """The bytes of an AVI of 20 frames, to be copied into data sets."""
    return write_video(tmp_path_factory.mktemp("avi") / "clip.avi", 20, bit_rate=200_000).read_bytes()
