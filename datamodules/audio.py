"""Sound beside the frames: one small spectrogram for each frame of a clip.

TATS generates video of drummers from their sound (AudioSet-Drums). A second tokenizer reads that sound as a clip of
spectrograms in [-1, 1], one channel, 64 x 16, one a frame. How they were made is not published; here it is this:

- Sound is mixed to one channel and resampled to 16 kHz.
- A frame is heard from the moment it is shown until the clip's next frame is. This time is cut into 16 columns of equal
  length. So sound stays with its frame at every frame rate and stride.
- A column is the Fourier transform of the 512 samples (32 ms, Hann window) around its middle. Its 256 bins above zero
  are summed to the energy of 64 bands, each 125 Hz wide, the lowest one first.
- Energy is in decibels relative to a full-scale sine within the band, from -80 (-1, silence) to 0 (+1).
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.decoding import UnreadableVideoError
from datamodules.frames import FramesDataModule
from datamodules.sampler import ClipRequest
from datamodules.video import Split, Video, VideoClips

SAMPLING_RATE = 16_000
BANDS, COLUMNS = 64, 16
WINDOW = 512
_FLOOR_DECIBELS = -80.0

_log = logging.getLogger(__name__)


def spectrogram(waveform: Tensor, edges: Tensor, first_sample: int = 0) -> Tensor:
    """Return one spectrogram for each interval of time.

    Args:
        waveform: `[S]` float, in [-1, 1], `SAMPLING_RATE` samples a second; before and after it is silence.
        edges: `[T + 1]` float64 seconds: interval k goes from edge k to edge k + 1.
        first_sample: the number of the waveform's first sample; sample n belongs to the time n / `SAMPLING_RATE`.

    Returns:
        `[1, T, 64, 16]` float32 in [-1, 1]: the lowest band first, then time.
    """
    shares = (torch.arange(COLUMNS, dtype=torch.float64) + 0.5) / COLUMNS
    middles = edges[:-1, None] + edges.diff()[:, None] * shares  # [T, 16]
    first = (middles * SAMPLING_RATE).round().long() - WINDOW // 2 - first_sample
    before, after = max(0, -int(first.min())), max(0, int(first.max()) + WINDOW - len(waveform))
    heard = F.pad(waveform.float(), (before, after)).unfold(0, WINDOW, 1)[first + before]  # [T, 16, 512]
    hann = torch.hann_window(WINDOW)
    spectrum = torch.view_as_real(torch.fft.rfft(heard * hann)[..., 1:])  # [T, 16, 256, 2]
    # a sine of amplitude 1 has the energy of WINDOW x sum(hann^2) / 4 in all bins together (Parseval)
    energy = spectrum.square().unflatten(2, (BANDS, -1)).sum((3, 4)) / (WINDOW * hann.square().sum() / 4)  # [T, 16, 64]
    decibels = 10 * energy.clamp(min=10 ** (_FLOOR_DECIBELS / 10)).log10()
    return (1 - 2 * decibels / _FLOOR_DECIBELS).clamp(-1, 1).transpose(1, 2)[None]  # [1, T, 64, 16]


def read_sound(path: str | Path, end_seconds: float) -> Tensor:
    """Decode the sound of a file from time 0 to the end of the part that is needed.

    It is decoded from the beginning, since not every container can seek in its sound to the sample. Where the file has
    no more sound, or none that can be decoded, the result ends early.

    Returns:
        `[S]` float32, one channel, `SAMPLING_RATE` samples a second.
    """
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLING_RATE)
    end = int(end_seconds * SAMPLING_RATE) + 1
    offset, parts, length = None, [], 0
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            for frame in chain(container.decode(audio=0), [None]):
                if frame is not None and offset is None:
                    offset = round((frame.time or 0.0) * SAMPLING_RATE)
                for resampled in resampler.resample(frame):
                    parts.append(torch.from_numpy(resampled.to_ndarray()[0].copy()))
                    length += len(parts[-1])
                if length + (offset or 0) >= end:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        _log.warning("The sound of %s ends in an error, silence follows: %s", path, error)
    waveform = torch.cat(parts) if parts else torch.zeros(0)
    # sound may begin after the picture, or before it (an encoder's run-up): then padding takes away
    return F.pad(waveform, (max(offset or 0, -length), 0))[:end]


def frame_times(path: str | Path, num_frames: int, extra: int = 1) -> Tensor:
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
        UnreadableVideoError: if it tells neither times nor a rate.
    """
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)  # its frames have been read
        packets = [packet for packet in container.demux(stream) if packet.size]
        found = {packet.dts if container.format.name == "avi" else packet.pts for packet in packets}
        stamps = sorted(stamp for stamp in found if stamp is not None)
        if len(stamps) != num_frames or num_frames == 1:
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise UnreadableVideoError(f"{path}: has neither a time stamp for each frame nor a frame rate.")
            return torch.arange(num_frames + extra, dtype=torch.float64) / float(rate)
        times = torch.tensor(stamps, dtype=torch.float64) * float(stream.time_base or 0)
    distance = (times[-1] - times[0]) / (num_frames - 1)
    return torch.cat([times, times[-1] + distance * torch.arange(1, extra + 1)])


def has_sound(path: str | Path) -> bool:
    """Tell whether a file can be opened and declares an audio stream."""
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            return bool(container.streams.audio)
    except (av.FFmpegError, OSError, ValueError):
        return False


class SoundClips(Dataset[dict[str, Any]]):
    """Clips of video files with their sound: the item of `VideoClips`, and `audio` `[1, T, 64, 16]` in [-1, 1].

    Videos without a sound track are left out. To find them, each file is opened once.

    Args:
        clips: the clips; their list of videos is shortened.
        name: what the log calls this data set.

    Raises:
        ValueError: if no video has sound.
    """

    def __init__(self, clips: VideoClips, name: str = "data set") -> None:
        videos: Sequence[Video] = clips.videos
        with ThreadPoolExecutor() as pool:
            sounds = list(pool.map(has_sound, (video.path for video in videos)))
        clips.videos = [video for video, sound in zip(videos, sounds, strict=True) if sound]
        if not clips.videos:
            raise ValueError(f"{name}: none of {len(videos)} videos has a sound track.")
        rank_zero_info(f"{name}: {len(clips.videos)} of {len(videos)} videos have sound.")
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        item = self.clips[request]
        video, stride = self.clips.videos[item["index"]], self.clips.frame_stride
        first = self.clips.start(item["index"], request.epoch) + request.read_start * stride
        times = frame_times(video.path, video.num_frames, extra=stride)
        edges = times[first::stride][: item["video"].shape[1] + 1]
        waveform = read_sound(video.path, float(edges[-1]) + WINDOW / SAMPLING_RATE)
        return item | {"audio": spectrogram(waveform, edges)}


class AudioFramesDataModule(FramesDataModule):
    """Any folder of videos, with their sound: as `FramesDataModule`, and batches also hold `audio`.

    `audio` is float32 `[B, 1, T, 64, 16]` in [-1, 1], a spectrogram for each frame. Videos without sound are left out.
    """

    def make_dataset(self, split: Split) -> SoundClips:  # type: ignore[override] # it has all that a loader asks for
        """Return the clips of a split, with sound."""
        return SoundClips(super().make_dataset(split), name=f"sound, {split}")
