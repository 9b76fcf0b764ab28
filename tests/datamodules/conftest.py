"""Videos whose frames say their own number, written with PyAV."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from numbered_video import numbered_frame

WriteVideo = Callable[..., Path]


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
