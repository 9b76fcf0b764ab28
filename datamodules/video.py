"""What all video data modules share: clips of video files, and the loaders of any data set of clips."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datamodules.decoders import Decoder
from datamodules.decoding import UnreadableVideoError
from datamodules.index import Entry, Level, index_entries, index_videos
from datamodules.listing import Video, check_windows, evaluation_windows, indexed_videos
from datamodules.quarantine import Places, Quarantine
from datamodules.sampler import (
    ClipBatchSampler,
    ClipRequest,
    Curriculum,
    ResumableLoader,
    ValidationBatchSampler,
    collate_clips,
    float_video,
    make_item,
)
from models.random import keyed_generator

Split = Literal["train", "val"]

_START_STREAM, _CROP_STREAM, _FLIP_STREAM, _SUBSTITUTE_STREAM = 121, 122, 123, 124
_SUBSTITUTES = 10
# Too many unreadable videos stop a run, but not on the evidence of its first reads alone.
_READS_TO_JUDGE = 100

_log = logging.getLogger(__name__)


class VideoClips(Dataset[dict[str, Any]]):
    """One clip a video and epoch: uniform over all starts that fit, from the key (seed, epoch, index).

    Frames are resized so that the shorter side becomes `resolution`, and cropped to a square, or to `resolution` x
    `width` pixels where that attribute is set, at the centre or at a place drawn from the key. Videos shorter than a
    clip are left out, and how many remain is logged. A video that fails while it is read goes into quarantine, and is
    replaced by another one, drawn from (seed, epoch, index, attempt); the item's index tells which video it really
    shows. If there are too many such videos, reading stops.

    Args:
        videos: where the clips come from.
        num_frames: frames of a clip.
        frame_stride: distance of neighbouring frames of a clip in the video.
        resolution: height and width, in pixels.
        seed: key of all random choices.
        antialias: whether the bilinear resize filters when it shrinks, and then rounds to whole numbers, as PIL does.
        random_crop: whether to crop at a random place instead of the centre.
        horizontal_flip: whether to mirror half of the clips.
        name: what the log calls this data set.
        quarantine: list of videos that are not to be read; by default one of this process, empty at first.
        max_bad_fraction: share of the videos that may fail (at least one video, unless it is 0), judged after 100
            reads.
        mirrored_labels: label of each label's mirror image; None if a mirror changes none.

    Raises:
        ValueError: if no video is long enough.
    """

    width: int | None = None

    def __init__(
        self,
        videos: Sequence[Video],
        num_frames: int,
        frame_stride: int,
        resolution: int,
        seed: int,
        antialias: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        name: str = "data set",
        quarantine: Quarantine | None = None,
        max_bad_fraction: float = 0.01,
        mirrored_labels: Sequence[int] | None = None,
    ) -> None:
        self.span = (num_frames - 1) * frame_stride + 1
        self.videos = self.long_enough(videos)
        length = f"{num_frames} frames at stride {frame_stride}"
        if not self.videos:
            longest = max((video.num_frames for video in videos), default=0)
            raise ValueError(
                f"{name}: none of {len(videos)} videos holds {length}; the longest has {longest} frames. "
                "Lower --data.num_frames or --data.frame_stride."
            )
        rank_zero_info(f"{name}: {len(self.videos)} of {len(videos)} videos hold a clip of {length}.")
        self.num_frames = num_frames
        self.frame_stride = frame_stride
        self.resolution = resolution
        self.seed = seed
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.name = name
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.mirrored_labels = mirrored_labels
        self.max_bad_fraction = max_bad_fraction
        self._remember_places()
        self._reads = 0
        if known := self.quarantined():
            rank_zero_warn(
                f"{name}: {len(known)} of {len(self._places)} videos are in quarantine ({self.quarantine}): others are "
                f"shown in their place. {'; '.join(list(known.values())[:3])}"
            )

    def _remember_places(self) -> None:
        self._places = Places(video.place for video in self.videos)  # several clips may show one video
        self.most_bad = ceil(self.max_bad_fraction * len(self._places))

    def long_enough(self, videos: Sequence[Video]) -> Sequence[Video]:
        """Return the videos that hold a clip."""
        return [video for video in videos if video.num_frames >= self.span]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return float_video(self.stored(request))

    def stored(self, request: ClipRequest) -> dict[str, Any]:
        """Return the item with `video` `[3, T', H, W]` as it was read, uint8 unless `antialias` is off.

        A quarter of the memory to hand over from a worker to the device, where `float_video` makes `[request]` of it.

        Raises:
            UnreadableVideoError: if neither this video nor others in its place can be read, or too many are bad.
        """
        worker = get_worker_info()
        before, self._reads = self._reads, self._reads + (worker.num_workers if worker else 1)  # of all workers
        if before < _READS_TO_JUDGE <= self._reads:
            self._judge()
        candidate, reason = request, ""
        for attempt in range(1, _SUBSTITUTES + 2):
            video = self.videos[candidate.index]
            if video.place not in self.quarantine:
                try:
                    return self.item(candidate)
                except UnreadableVideoError as error:
                    reason = str(error)
                self.quarantine.add(video.place, reason)
                _log.warning(
                    "Another video is shown instead of one that cannot be read (%d of %d so far): %s",
                    len(self.quarantined()), len(self._places), reason,
                )  # fmt: skip
                self._judge()
            position = self._uniform(_SUBSTITUTE_STREAM, request.epoch, request.index, attempt)
            candidate = replace(request, index=int(position * len(self.videos)))
        reason = reason or self.quarantined()[self.videos[request.index].place.absolute()]
        raise UnreadableVideoError(
            f"{self.videos[request.index].path} and {_SUBSTITUTES} videos drawn in its place cannot be read, the last "
            f"because of: {reason}"
        )

    def item(self, request: ClipRequest) -> dict[str, Any]:
        """Return all that belongs to this clip and no other: what else a subclass reads, it adds here.

        Raises:
            UnreadableVideoError: if something of it cannot be read.
        """
        return make_item(request, self.read(request), self._label(request))

    def quarantined(self) -> Mapping[Path, str]:
        """Return which videos are in quarantine and why, as all processes know it by now."""
        return self.quarantine.reasons(self._places)

    def _judge(self) -> None:
        """Stop if too many videos are bad; what other processes found counts too."""
        bad = self.quarantined()
        if self._reads >= _READS_TO_JUDGE and len(bad) > self.most_bad:
            raise UnreadableVideoError(
                f"{self.name}: {len(bad)} of {len(self._places)} videos cannot be read, and {self.most_bad} may be "
                f"(--data.max_bad_fraction). `longtake doctor` examines all. Quarantine list ({self.quarantine}):"
                + "".join(f"\n  {reason}" for reason in list(bad.values())[:20])
                + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")
            )

    def start(self, index: int, epoch: int) -> int:
        """Return the frame of the video at which its clip begins in an epoch."""
        starts = self.videos[index].num_frames - self.span + 1
        return int(self._uniform(_START_STREAM, epoch, index) * starts)

    def _uniform(self, stream: int, *keys: int) -> float:
        """Draw from [0, 1)."""
        return float(torch.rand((), generator=keyed_generator(self.seed, stream, *keys), dtype=torch.float64))

    def _is_mirrored(self, request: ClipRequest) -> bool:
        return self.horizontal_flip and self._uniform(_FLIP_STREAM, request.epoch, request.index) < 0.5

    def _label(self, request: ClipRequest) -> int:
        label = self.videos[request.index].label
        if self.mirrored_labels is not None and self._is_mirrored(request):
            return self.mirrored_labels[label]
        return label

    def read(self, request: ClipRequest) -> Tensor:
        """Read the frames asked for, of this video and no other.

        Returns:
            `[3, T', H, W]`, uint8, or without antialiasing float32 in [-1, 1].

        Raises:
            UnreadableVideoError: if one of them cannot be read.
        """
        video, key = self.videos[request.index], (request.epoch, request.index)
        start = self.start(request.index, request.epoch) + request.read_start * self.frame_stride
        count = self.num_frames - request.read_start if request.read_frames is None else request.read_frames
        place = [self._uniform(_CROP_STREAM, *key, axis) for axis in (1, 2)] if self.random_crop else None
        # one by one: a long clip of a large video is never in memory whole
        frames = (self._resize_and_crop(frame, place) for frame in video.frames(start, count, self.frame_stride))
        first = next(frames)
        kept = torch.uint8 if self.antialias else torch.float32  # of all frames, though some may need no resizing
        clip = torch.empty(3, count, *first.shape[1:], dtype=kept)  # [3, T, H, W]
        clip[:, 0] = first
        for number, frame in enumerate(frames, start=1):
            clip[:, number] = frame
        if self._is_mirrored(request):
            clip = clip.flip(3)
        return clip if self.antialias else clip.div_(127.5).sub_(1).clamp_(-1, 1)

    def _resize_and_crop(self, frame: np.ndarray, place: Sequence[float] | None) -> Tensor:
        """Make a frame just large enough, and crop it at the centre or elsewhere.

        With antialiasing in whole numbers, as PIL does, which takes a quarter of the time; else in floating point.

        Args:
            frame: uint8 `[h, w, 3]`.
            place: where in the spare rows and columns to crop, each from 0 to 1; None for the centre.

        Returns:
            `[3, H, W]` of 0 to 255, uint8 or float32.
        """
        image = torch.from_numpy(frame).permute(2, 0, 1)  # [3, h, w]
        wanted = (self.resolution, self.resolution if self.width is None else self.width)
        pixels, side = max(zip(wanted, image.shape[1:], strict=True), key=lambda pair: pair[0] / pair[1])
        if pixels != side:
            size = [max(p, round(s * pixels / side)) for p, s in zip(wanted, image.shape[1:], strict=True)]
            image = image if self.antialias else image.float()
            image = F.interpolate(image[None], size, mode="bilinear", antialias=self.antialias)[0]
        spare = [s - p for s, p in zip(image.shape[1:], wanted, strict=True)]
        if place is None:
            top, left = (pixels // 2 for pixels in spare)
        else:
            top, left = (int(share * (pixels + 1)) for share, pixels in zip(place, spare, strict=True))
        return image[:, top : top + wanted[0], left : left + wanted[1]]


class _Stored(Dataset[dict[str, Any]]):
    """Clips as they were read."""

    def __init__(self, clips: VideoClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return self.clips.stored(request)


def _use_one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)


class VideoDataModule(LightningDataModule):
    """Batches of clips from a train and a val data set; the base of all video data modules.

    A subclass says what its data sets are (`make_dataset`); order, ranks, resuming and curriculum are settled here.
    Batches hold `video` float32 `[B, 3, T, H, W]` in [-1, 1], `label` int64 `[B]` and `index` int64 `[B]`; under a
    curriculum training batches also hold the plain integers `window_start`, `window_frames` and `margin_before`.
    Pixels of files are uint8 on their way from the workers, and float32 once the Trainer has brought them to the
    device; who iterates over `train_dataloader` alone calls `on_after_batch_transfer` for that.

    Use it with `Trainer(use_distributed_sampler=False)`: the ranks share the clips out themselves.

    Args:
        num_frames: frames of a clip.
        frame_stride: distance of neighbouring frames of a clip in the source video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 reads in the main process.
        seed: key of the data order and of all random choices in clips.
    """

    def __init__(
        self,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 128,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        for name, value, least in (
            ("num_frames", num_frames, 1),
            ("frame_stride", frame_stride, 1),
            ("resolution", resolution, 1),
            ("batch_size", batch_size, 1),
            ("val_batch_size", self.val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small: at least {least} (--data.{name}).")
        self.num_frames = num_frames
        self.frame_stride = frame_stride
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.curriculum: Curriculum | None = None
        self.datasets: dict[Split, Dataset[dict[str, Any]]] = {}

    def make_dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        """Return the map-style data set of a split.

        It has a length, and its item for a `ClipRequest` is `make_item(request, video, label)`: the requested frames of
        the clip, float32 in [-1, 1]. It is pickled to worker processes.
        """
        raise NotImplementedError

    def set_curriculum(self, frames_at: Callable[[int], int], margin_frames: int | None, frame_multiple: int) -> None:
        """Let training use windows of changing length; validation keeps whole clips. Call it before fit.

        Args:
            frames_at: pure function from the optimizer step to the length of the window, in frames.
            margin_frames: frames to read on each side of the window, clipped at the clip's ends; None reads all.
            frame_multiple: the window starts at a multiple of this.
        """
        self.curriculum = Curriculum(frames_at, margin_frames, frame_multiple)

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets that the stage needs, once."""
        splits: tuple[Split, ...] = ("train", "val") if stage in (None, "fit") else ("val",)
        for split in splits:
            if split not in self.datasets:
                self.datasets[split] = self.make_dataset(split)

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled training batches, resumable at any batch; pixels of files are uint8 until the device."""
        options: dict[str, Any] = {}
        if (trainer := self.trainer) is not None:
            options = {
                "rank": trainer.global_rank,
                "world_size": trainer.world_size,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "limit_batches": trainer.limit_train_batches,
                "reshuffle": not trainer.overfit_batches,  # type: ignore[attr-defined] # set outside its class
            }
        sampler = ClipBatchSampler(
            self._size("train"), self.batch_size, self.num_frames, self.seed, curriculum=self.curriculum, **options
        )
        clips = self.datasets["train"]
        stored = _Stored(clips) if isinstance(clips, VideoClips) else clips
        return ResumableLoader(stored, sampler, **self._loader_options())

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Turn pixels into float32 in [-1, 1] where the batch is by now; the Trainer calls it."""
        return float_video(batch)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return validation batches in order, each clip whole."""
        return self.ordered_dataloader("val")

    def ordered_dataloader(self, split: Split) -> DataLoader[dict[str, Any]]:
        """Return all clips of a split in order, each clip whole, as epoch 0 shows them, shared out to the ranks."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ValidationBatchSampler(self._size(split), self.val_batch_size, rank, world_size)
        return DataLoader(self.datasets[split], batch_sampler=sampler, **self._loader_options())

    def num_quarantined(self) -> int:
        """Return how many videos of the data sets in use are in quarantine, as all processes know it by now."""
        bad = [clips.quarantined() for clips in self.datasets.values() if hasattr(clips, "quarantined")]
        return len(set().union(*bad))

    def _size(self, split: Split) -> int:
        return len(self.datasets[split])  # type: ignore[arg-type] # torch's Dataset declares no length

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            # the time that clips take differs with their place in the video: more of them in stock level it out
            "prefetch_factor": 4 if self.num_workers else None,
            "worker_init_fn": _use_one_thread,
            "collate_fn": collate_clips,
            "pin_memory": torch.cuda.is_available(),
        }


class VideoFilesDataModule(VideoDataModule):
    """Clips of video files and folders of frames; the base of the data modules that find them in their own layouts.

    A subclass says where the files are and what they show: `listing` and `class_names`, and in the class attributes its
    `title`, the environment variable `root_variable` that may name its folder, and the `source` of the data set.

    Args:
        root: folder of the data set; an environment variable by default.
        num_frames: frames of a clip; shorter videos are left out.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        antialias: whether the bilinear resize filters when it shrinks, and then rounds to whole numbers, as PIL does.
        random_crop: whether training clips are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training clips are mirrored.
        val_windows: clips of each validation video along time, evenly spaced, the first one of all videos first; null
            takes one at a place drawn from the seed.
        val_crops: clips of each validation video along its longer side, evenly spaced; 1 takes the centre.
        cache_dir: where to keep the index of the videos and the quarantine list; `<root>/.longtake` by default.
        decoder: `pyav` is right for every file. `torchcodec` needs its package and FFmpeg's libraries, and files whose
            time stamps can be trusted (no AVI).
        read_timeout: seconds after which a file is given up; files are then read in child processes. null waits.
        max_bad_fraction: share of the videos that may turn out unreadable before the run stops (at least one video,
            unless it is 0), judged after 100 reads.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 decodes in the main process.
        seed: key of the data order and of all random choices in clips.
    """

    title = "The data set"
    root_variable = ""
    source = ""

    def __init__(
        self,
        root: str | None = None,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 128,
        antialias: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        val_windows: int | None = None,
        val_crops: int = 1,
        cache_dir: str | None = None,
        decoder: Decoder = "pyav",
        read_timeout: float | None = None,
        max_bad_fraction: float = 0.01,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        if read_timeout is not None and read_timeout <= 0:
            raise ValueError(f"read_timeout={read_timeout} leaves no time to read: null or more (--data.read_timeout).")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction} is no share: 0 to 1 (--data.max_bad_fraction).")
        check_windows(val_windows, val_crops)
        self.root = root
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.val_windows = val_windows
        self.val_crops = val_crops
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.decoder: Decoder = decoder
        self.read_timeout = read_timeout
        self.max_bad_fraction = max_bad_fraction

    def listing(self) -> Mapping[Split, Mapping[Path, int]]:
        """Return the files (or folders of frames) of each split with their labels, whether they can be read or not.

        Raises:
            FileNotFoundError: if the data set is not there.
        """
        raise NotImplementedError

    def class_names(self) -> Sequence[str]:
        """Return the names of the labels 0, 1, ...; empty where there are no classes."""
        raise NotImplementedError

    def mirrored_labels(self) -> Sequence[int] | None:
        """Return the label of each label's mirror image; None if a mirror changes none."""
        return None

    def found_root(self) -> Path:
        """Return the folder of the data set, from the option or from the environment.

        Raises:
            FileNotFoundError: if it is not given, or not there.
        """
        root = self.root or os.environ.get(self.root_variable)
        if not root:
            raise FileNotFoundError(f"{self.title} has no folder: set {self._root_options()}. {self.source}".rstrip())
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{self.title}: no folder {root} {self.hint()}")
        return Path(root)

    def hint(self) -> str:
        """Return the end of an error message: which option is meant, and where to get the data set."""
        return f"({self._root_options()}). {self.source}".rstrip()

    def _root_options(self) -> str:
        return f"--data.root or {self.root_variable}" if self.root_variable else "--data.root"

    def entries(self, level: Level = "full", again: bool = False) -> dict[Path, Entry]:
        """Examine all files of the listing that are not yet in the index; see `index_entries`."""
        paths = list({path: None for files in self.listing().values() for path in files})
        root, timeout = self.found_root(), self.read_timeout
        return index_entries(paths, root, self.cache_dir, level, timeout, show_progress=True, again=again)

    def quarantine(self) -> Quarantine:
        """Return the list of videos that failed while they were read."""
        return Quarantine(self.found_root(), self.cache_dir)

    def prepare_data(self) -> None:
        """Index the videos, in one process of each machine; the others read the index."""
        self.entries()

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if the data set is not there.
        """
        labels = self.listing()[split]
        index = index_videos(list(labels), self.found_root(), self.cache_dir, self.read_timeout)
        videos = indexed_videos(labels, index, self.decoder, self.read_timeout)
        if split == "val" and (self.val_windows, self.val_crops) != (None, 1):
            span = (self.num_frames - 1) * self.frame_stride + 1
            videos = evaluation_windows(videos, span, self.val_windows, self.val_crops) or videos
        return self.make_clips(videos, split)

    def make_clips(self, videos: Sequence[Video], split: Split, kind: type[VideoClips] = VideoClips) -> VideoClips:
        """Return the clips of videos of a split, as the options have them."""
        flip = self.horizontal_flip and split == "train"
        return kind(
            videos,
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            antialias=self.antialias,
            random_crop=self.random_crop and split == "train",
            horizontal_flip=flip,
            name=f"{self.found_root().name} {split}",
            quarantine=self.quarantine(),
            max_bad_fraction=self.max_bad_fraction,
            mirrored_labels=self.mirrored_labels() if flip else None,
        )
