"""Sound as if it were video: what a tokenizer of spectrograms is trained on."""

from typing import Any

from torch.utils.data import Dataset

from datamodules.audio import AudioFramesDataModule, SoundClips
from datamodules.sampler import ClipRequest
from datamodules.video import Split


class Spectrograms(Dataset[dict[str, Any]]):
    """The item of a data set with `audio`, which takes the place of `video`.

    Args:
        clips: a data set whose items hold `audio` `[1, T, 64, 16]`.
    """

    def __init__(self, clips: SoundClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        item = self.clips[request]
        return item | {"video": item.pop("audio")}


class SpectrogramDataModule(AudioFramesDataModule):
    """The sound of any folder of videos, without the pictures.

    `video` is float32 `[B, 1, T, 64, 16]` in [-1, 1], a spectrogram of one channel for each frame, whatever the
    resolution.
    """

    def make_dataset(self, split: Split) -> Spectrograms:  # type: ignore[override] # it has all that a loader asks for
        """Return the sounds of a split."""
        return Spectrograms(super().make_dataset(split))
