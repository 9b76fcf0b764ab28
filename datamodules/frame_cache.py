"""Videos decoded once, at training size: `longtake cache-frames` writes them, `FrameCacheDataModule` trains from them.

`shards.py` says how a cache lies on disk. An item is a whole video, resized and cropped at the centre:

    frames    uint8 `[T, H, W, 3]`; or, of a lossy cache, the T frames as JPEG files one after the other
    ends      of a lossy cache, int64 `[T]`: where in `frames` each file ends
    crc32     uint32 `[T]`: checksum of each frame, as it lies there
    label     class
    source    name of the video, UTF-8

A raw cache gives what decoding gives, rounded to 8 bits. A lossy one is smaller, slower to read, and no real set for a
metric: its header and `FrameCacheDataModule.lossy` say so.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.decoding import UnreadableVideoError
from datamodules.listing import Video
from datamodules.sampler import ClipRequest
from datamodules.shards import FORMAT_VERSION, ShardPlan, ShardReader, begin, progress_bar, read_header, write_json
from datamodules.video import Split, VideoClips, VideoDataModule
from datamodules.windows import provenance, video_name

COMMAND = "longtake cache-frames --config <experiment>"

_SHARD_BYTES = 2**27
_FRAMES_AT_ONCE = 256  # of one video, in float32


class FrameWriter:
    """Writes a cache of frames.

    Args:
        folder: Where to.
        data: Gives the videos; set up for fit.
        jpeg_quality: Quality of JPEG files, from 1 to 95; None keeps raw pixels.
        shard_items: Videos of a shard; by default as many as make 128 MiB.

    Raises:
        ValueError: If an option is out of its range, or the data module crops at random.
    """

    def __init__(
        self, folder: Path, data: VideoDataModule, jpeg_quality: int | None = None, shard_items: int | None = None
    ) -> None:
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
            raise ValueError(f"jpeg={jpeg_quality} is no quality: from 1 to 95 (--jpeg).")
        if shard_items is not None and shard_items < 1:
            raise ValueError(f"shard_items={shard_items} is too small: at least 1 (--shard_items).")
        datasets = data.datasets
        if any(isinstance(clips, VideoClips) and clips.random_crop for clips in datasets.values()):
            raise ValueError(
                "A cache of frames holds videos cropped at the centre, and this data module crops at random places. "
                "Give --data.random_crop=false, or train without a cache."
            )
        if shard_items is None:
            frames = [_num_frames(datasets["train"], data, i) for i in range(len(datasets["train"]))]  # type: ignore[arg-type]
            video_bytes = 3 * data.resolution**2 * sum(frames) / len(frames) / (1 if jpeg_quality is None else 8)
            shard_items = max(1, int(_SHARD_BYTES / video_bytes))
        self.folder = folder
        self.num_workers = data.num_workers
        self.header = {
            "format_version": FORMAT_VERSION,
            "kind": "frames",
            "lossy": jpeg_quality is not None,
            "jpeg_quality": jpeg_quality,
            **provenance(data, datasets),
            "shard_items": shard_items,
        }
        self.jobs = {
            split: _ShardJobs(ShardPlan(folder / split, len(dataset), shard_items), dataset, jpeg_quality)  # type: ignore[arg-type]
            for split, dataset in datasets.items()
        }

    def run(self) -> None:
        """Write all shards that are missing, in worker processes if the data module has some, and complete the cache.

        Raises:
            FileExistsError: If the folder holds a complete cache, or something else.
            ValueError: If it holds an unfinished cache of other settings.
        """
        begin(self.folder, self.header)
        for split, jobs in self.jobs.items():
            plan, missing = jobs.plan, jobs.plan.missing()
            loader = DataLoader(jobs, batch_size=None, sampler=missing, num_workers=self.num_workers)
            with progress_bar() as progress:
                task = progress.add_task(f"Caching {split}", total=sum(len(plan.items(shard)) for shard in missing))
                for count in loader:
                    progress.advance(task, int(count))
        for jobs in self.jobs.values():  # before the indices, which make the cache complete
            write_json(jobs.plan.folder / "videos.json", _table(ShardReader(jobs.plan.folder, jobs.plan.index())))
        for jobs in self.jobs.values():
            jobs.plan.close()


class _ShardJobs(Dataset[int]):
    """Shards to be written: asking for one writes it, so that worker processes share them out."""

    def __init__(self, plan: ShardPlan, dataset: Dataset[dict[str, Any]], jpeg_quality: int | None) -> None:
        self.plan = plan
        self.dataset = dataset
        self.jpeg_quality = jpeg_quality

    def __getitem__(self, shard: int) -> int:
        numbers = self.plan.items(shard)
        self.plan.write(shard, [self._item(number) for number in numbers])
        return len(numbers)

    def _item(self, number: int) -> dict[str, Any]:
        if isinstance(self.dataset, VideoClips):
            video = self.dataset.videos[number]
            source, label, frames = video_name(video), video.label, _all_frames(self.dataset, number)
        else:
            clip = self.dataset[ClipRequest(number)]
            source, label, frames = str(number), clip["label"], _rounded(clip["video"])
        item = {"label": int(label), "source": source.encode()}
        if self.jpeg_quality is None:
            return {"frames": frames, "crc32": _checksums(frame.data for frame in frames), **item}
        files = [_jpeg(frame, self.jpeg_quality) for frame in frames]
        blob = np.frombuffer(b"".join(files), np.uint8)
        ends = np.cumsum([len(file) for file in files], dtype=np.int64)
        return {"frames": blob, "ends": ends, "crc32": _checksums(files), **item}


def _all_frames(dataset: VideoClips, number: int) -> np.ndarray:
    """Decode a whole video as the data set shows it: uint8 `[T, H, W, 3]`, no frames if it cannot be read.

    An empty item holds the place of a video that cannot be read: numbers are those of the data set. No other video is
    shown in its place, and it does not go into quarantine: clips of another part of it may well be readable.
    """
    video = dataset.videos[number]
    whole = VideoClips.__new__(VideoClips)  # the same data set, with all of this video as its only clip
    whole.__dict__ |= dataset.__dict__ | {"videos": [video], "horizontal_flip": False, "frame_stride": 1}
    whole.num_frames = whole.span = video.num_frames
    parts = [np.empty((0, dataset.resolution, dataset.resolution, 3), np.uint8)]
    try:
        if reason := dataset.quarantined().get(video.place.absolute()):
            raise UnreadableVideoError(reason)
        for first in range(0, video.num_frames, _FRAMES_AT_ONCE):
            count = min(_FRAMES_AT_ONCE, video.num_frames - first)
            parts.append(_rounded(whole.read(ClipRequest(0, read_start=first, read_frames=count))))
    except UnreadableVideoError as error:
        rank_zero_warn(f"{video_name(video)} cannot be read, and is empty in the cache: {error}")
        return parts[0]
    return np.concatenate(parts)


def _rounded(video: torch.Tensor) -> np.ndarray:
    """Video `[3, T, H, W]`, uint8 or in [-1, 1], to uint8 `[T, H, W, 3]`."""
    if video.dtype != torch.uint8:
        video = ((video + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(video.permute(1, 2, 3, 0).numpy())


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
    file = BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def _checksums(frames: Iterable[bytes | memoryview]) -> np.ndarray:
    return np.array([zlib.crc32(frame) for frame in frames], np.uint32)


def _num_frames(dataset: Dataset[dict[str, Any]], data: VideoDataModule, index: int) -> int:
    return dataset.videos[index].num_frames if isinstance(dataset, VideoClips) else data.num_frames


def _table(reader: ShardReader) -> list[list[Any]]:
    """Return name, label and number of frames of each video."""
    rows = []
    for number in range(len(reader)):
        leaves = reader.leaves(number)
        source, label = leaves["source"].tobytes().decode(), reader.integer(leaves["label"])
        rows.append([source, label, len(leaves["crc32"]) // 4])
    return rows


@dataclass(frozen=True, kw_only=True)
class CachedVideo(Video):
    """A video of a cache of frames.

    Args:
        reader: of its split.
        number: of its item.
    """

    reader: ShardReader
    number: int

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` as uint8 `[H, W, 3]`.

        Raises:
            ValueError: if the file is damaged.
        """
        leaves = self.reader.leaves(self.number)
        checksums = leaves["crc32"].view("<u4")
        lossy = "ends" in leaves
        ends = [0, *leaves["ends"].view("<i8").tolist()] if lossy else []
        raw = None if lossy else self.reader.array(leaves["frames"], "u1")
        for k in range(start, start + count * stride, stride):
            frame: np.ndarray = leaves["frames"][ends[k] : ends[k + 1]] if raw is None else raw[k]
            self.reader.check(self.number, zlib.crc32(frame.data), int(checksums[k]))
            yield frame.copy() if raw is not None else np.array(Image.open(BytesIO(frame.data)))


class FrameCacheDataModule(VideoDataModule):
    """Videos decoded once by `longtake cache-frames`: the clips of the data module they come from, without decoding.

    A clip begins at the frame at which it would begin in the original data module (same seed and length of clips), and
    is the original but for rounding to 8 bits, and for JPEG's losses in a lossy cache. Videos are cropped at the
    centre. Those that were too short for a clip of the original data module are not in the cache.

    Args:
        root: folder of the cache.
        num_frames: frames of a clip; shorter videos are left out.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels; must be what was cached.
        horizontal_flip: whether half of the training clips are mirrored.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 reads in the main process.
        seed: key of the data order and of all random choices in clips.
    """

    def __init__(
        self,
        root: str,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 128,
        horizontal_flip: bool = False,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        self.root = Path(root)
        self.horizontal_flip = horizontal_flip

    @property
    def lossy(self) -> bool:
        """Whether the frames went through JPEG: then they are no real set for a metric."""
        return bool(read_header(self.root, "frames", COMMAND)["lossy"])

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if there is no complete cache.
            ValueError: if it holds something else, or another size.
        """
        cached = read_header(self.root, "frames", COMMAND)["resolution"]
        if cached != self.resolution:
            raise ValueError(
                f"{self.root} holds frames of resolution={cached}, not {self.resolution} (--data.resolution)."
            )
        reader = ShardReader(self.root / split)
        table = json.loads((self.root / split / "videos.json").read_text())
        return VideoClips(
            [
                CachedVideo(path=Path(source), label=label, num_frames=num_frames, reader=reader, number=number)
                for number, (source, label, num_frames) in enumerate(table)
            ],
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            horizontal_flip=self.horizontal_flip and split == "train",
            name=f"{self.root.name} {split}",
        )
