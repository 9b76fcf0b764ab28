"""Videos whose frames say their own number, to the eye and to the ear, written with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numbered_video import numbered_frame
from torch import Tensor

from datamodules.audio import BANDS, SAMPLING_RATE

BAND_HERTZ = SAMPLING_RATE / 2 / BANDS


def tone_band(number: int) -> int:
    """The band that frame `number` sounds in: neighbours lie far from each other."""
    return 4 + (number * 7) % 40


def heard_bands(audio: Tensor) -> list[int]:
    """The loudest band in the middle of each frame, from `[1, T, 64, 16]`."""
    return audio[0, :, :, 6:10].mean(-1).argmax(-1).tolist()


def write_sound_video(
    path: Path, num_frames: int, codec: str = "aac", fps: int = 25, rate: int = 44100, delay_frames: int = 0
) -> Path:
    """Write `num_frames` numbered frames; each sounds in its own band, from frame `delay_frames` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = np.arange(rate * num_frames // fps) / rate
    bands = np.array([tone_band(number) for number in range(num_frames)])
    hertz = (bands[np.minimum((seconds * fps).astype(int), num_frames - 1)] + 0.5) * BAND_HERTZ
    wave = (0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)[delay_frames * rate // fps :]
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=fps)
        video.width, video.height, video.pix_fmt, video.bit_rate = 64, 64, "yuv420p", 400_000
        sound = container.add_stream(codec, rate=rate, layout="mono")
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 64), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        samples.sample_rate, samples.pts = rate, delay_frames * rate // fps
        samples.time_base = Fraction(1, rate)
        for part in av.AudioResampler(sound.codec_context.format, "mono", rate).resample(samples):
            container.mux(sound.encode(part))
        container.mux(sound.encode())
    return path


def sine(hertz: float, seconds: float = 0.5, amplitude: float = 1.0) -> Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE)
