"""Which clips a cache holds, where they come from, and what a cache's header says about that."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from datamodules.listing import Video
from datamodules.mixed import MixedDataModule
from datamodules.video import Split, VideoClips, VideoDataModule

# What changes nothing about a clip, or is nobody else's business.
_NOT_THE_TRANSFORM = {
    "root",
    "root_variable",
    "cache_dir",
    "decoder",
    "read_timeout",
    "max_bad_fraction",
    "verify",
    "batch_size",
    "val_batch_size",
    "num_workers",
    "_class_path",
    "_instantiator",
}


class CoveringWindows(VideoClips):
    """All windows of each video instead of one: they begin every `stride` frames, and the last one ends with the video.

    Args:
        clips: The data set whose videos are covered, and whose clips' length, crop and flip the windows have.
        stride: Frames of the video from one window to the next; None for a clip's length, so that they do not overlap.
        name: What the log calls it.

    Raises:
        ValueError: If the stride is no distance.
    """

    def __init__(self, clips: VideoClips, stride: int | None, name: str) -> None:
        self.__dict__.update(clips.__dict__)  # all but which clips there are
        stride = clips.span if stride is None else stride
        if stride < 1:
            raise ValueError(f"window_stride={stride} is no distance: at least 1 (--window_stride).")
        last_starts = [video.num_frames - clips.span for video in clips.videos]
        windows = [
            (video, start)
            for video, last in zip(clips.videos, last_starts, strict=True)
            for start in sorted({*range(0, last, stride), last})
        ]
        self.videos = [video for video, _ in windows]
        self.starts = [start for _, start in windows]
        rank_zero_info(f"{name}: {len(windows)} windows cover {len(clips.videos)} videos.")

    def start(self, index: int, epoch: int) -> int:
        """Return the frame of the video at which a window begins: the same in all epochs."""
        return self.starts[index]


def clip_origin(dataset: Dataset[dict[str, Any]], index: int, epoch: int = 0) -> tuple[str, int]:
    """Return the name of the video that sample `index` shows, and the frame of the video at which its clip begins.

    A data set that has no videos of its own numbers its samples.
    """
    if not isinstance(dataset, VideoClips):
        return str(index), 0
    return video_name(dataset.videos[index]), dataset.start(index, epoch)


def video_name(video: Video) -> str:
    """Return the file's name with its folder's: enough to find it again, and nobody's personal path."""
    return "/".join(video.path.parts[-2:])


def provenance(data: VideoDataModule, datasets: Mapping[Split, Dataset[dict[str, Any]]]) -> dict[str, Any]:
    """Return what a header says about the data: its class and options, and a digest of the list of its clips.

    Raises:
        ValueError: if images are mixed into the videos.
    """
    if isinstance(data, MixedDataModule):
        raise ValueError(f"{type(data).__name__} cannot be cached: a cache holds videos alone (--data).")
    options = {name: value for name, value in data.hparams.items() if name not in _NOT_THE_TRANSFORM}
    return {
        "num_frames": data.num_frames,
        "resolution": data.resolution,
        "transform": json.loads(json.dumps({"class": type(data).__name__, **options}, default=str)),
        "data_digest": {split: _digest(dataset) for split, dataset in datasets.items()},
    }


def _digest(dataset: Dataset[dict[str, Any]]) -> str:
    digest = sha256(str(len(dataset)).encode())  # type: ignore[arg-type] # torch's Dataset declares no length
    if isinstance(dataset, VideoClips):
        for video in dataset.videos:
            digest.update(f"{video_name(video)} {video.label} {video.num_frames}\n".encode())
    return digest.hexdigest()
