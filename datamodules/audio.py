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

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.frames import FramesDataModule
from datamodules.reader import own_reader
from datamodules.sampler import ClipRequest
from datamodules.sound import SAMPLING_RATE, WINDOW, has_sound, iter_sound
from datamodules.video import Split, VideoClips

BANDS, COLUMNS = 64, 16
_FLOOR_DECIBELS = -80.0


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


class SoundClips(VideoClips):
    """Clips of video files with their sound: the items of other clips, and `audio` `[1, T, 64, 16]` in [-1, 1].

    Videos without a sound track are left out. To find them, each file is opened once.

    Args:
        clips: the clips; their list of videos is shortened.
        name: what the log calls this data set.

    Raises:
        ValueError: if no video has sound.
    """

    def __init__(self, clips: VideoClips, name: str = "data set") -> None:
        with ThreadPoolExecutor() as pool:
            sounds = list(pool.map(has_sound, (video.path for video in clips.videos)))
        heard = [video for video, sound in zip(clips.videos, sounds, strict=True) if sound]
        if not heard:
            raise ValueError(f"{name}: none of {len(sounds)} videos has a sound track.")
        rank_zero_info(f"{name}: {len(heard)} of {len(sounds)} videos have sound.")
        clips.videos = heard
        clips._remember_places()
        self.__dict__.update(clips.__dict__)
        self.clips = clips

    def item(self, request: ClipRequest) -> dict[str, Any]:
        """Return the item of this clip and no other, with its sound."""
        item = self.clips.item(request)
        video, first = self.videos[request.index], self.start(request.index, request.epoch)
        where = (first + request.read_start * self.frame_stride, item["video"].shape[1], self.frame_stride)
        if video.read_timeout is None:
            edges, waveform = iter_sound(video.path, *where, video.num_frames)
        else:
            edges, waveform = own_reader().call(video.path, video.read_timeout, "sound", *where, video.num_frames)
        return item | {"audio": spectrogram(torch.from_numpy(waveform), torch.from_numpy(edges))}

    def start(self, index: int, epoch: int) -> int:
        """Return the frame of the video at which its clip begins in an epoch."""
        return self.clips.start(index, epoch)


class AudioFramesDataModule(FramesDataModule):
    """Any folder of videos, with their sound: as `FramesDataModule`, and batches also hold `audio`.

    `audio` is float32 `[B, 1, T, 64, 16]` in [-1, 1], a spectrogram for each frame. Videos without sound are left out.
    """

    def make_dataset(self, split: Split) -> SoundClips:
        """Return the clips of a split, with sound."""
        return SoundClips(super().make_dataset(split), name=f"sound, {split}")
