"""Videos or images with captions, listed in JSON lines."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.audio import SoundClips
from datamodules.decoders import IMAGE_SUFFIXES, Decoder
from datamodules.images import ImageFile
from datamodules.index import index_videos
from datamodules.listing import Video, indexed_videos
from datamodules.sampler import ClipRequest
from datamodules.video import Split, VideoClips, VideoFilesDataModule

_FIELDS: dict[str, tuple[type, bool]] = {
    "path": (str, True),
    "text": (str, True),
    "start": (int, False),
    "label": (int, False),
}


@dataclass(frozen=True)
class Caption:
    """One line of a list.

    Args:
        path: the video or image.
        text: what it shows.
        start: the frame of the video at which its clip begins; None for a random one in each epoch.
        label: its class.
        line: where the list says so, such as `train.jsonl:3`.
    """

    path: Path
    text: str
    start: int | None
    label: int
    line: str


def read_captions(file: Path, root: Path) -> list[Caption]:
    """Read a list: one JSON object a line with `path`, `text`, and if wanted `start` (a frame number) and `label`.

    Args:
        file: the list; empty lines are skipped.
        root: folder that the paths are relative to.

    Raises:
        FileNotFoundError: if the list is not there.
        ValueError: if a line is not as expected; it says which.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No list of captions {file} (--data.train_list, --data.val_list, --data.root).")
    captions = []
    # not `splitlines`: a caption may hold one of the other characters that it takes for the end of a line
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            row = _checked(text, f"{file}:{number}")
            path = root / row["path"]
            captions.append(
                Caption(path, row["text"], row.get("start"), row.get("label", 0), line=f"{file.name}:{number}")
            )
    if not captions:
        raise ValueError(f"{file}: the list is empty.")
    return captions


def _checked(text: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{line}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{line}: expected an object with path and text, got {text.strip()[:80]}")
    for name, (kind, required) in _FIELDS.items():
        value = row.get(name)
        if value is None and not required:
            row.pop(name, None)
        # a bool is an int to Python, and no number is negative here
        elif not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            expected = "a string" if kind is str else "a number from 0 on"
            raise ValueError(f"{line}: {name} has to be {expected}, got {value!r}.")
    if unknown := set(row) - set(_FIELDS):
        raise ValueError(f"{line}: unknown {', '.join(sorted(unknown))}. A line holds {', '.join(_FIELDS)}.")
    return row


@dataclass(frozen=True, kw_only=True)
class CaptionedVideo(Video):
    """A video or image with what its line says of it; `source` reads the frames."""

    text: str
    start: int | None
    source: Video

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` as uint8 `[H, W, 3]`."""
        return self.source.frames(start, count, stride)


class CaptionedClips(VideoClips):
    """Clips with their captions: the item of `VideoClips`, with `text` and `is_image`.

    If a file cannot be read, the caption is that of the clip which takes its place.
    """

    videos: Sequence[CaptionedVideo]  # of this kind only

    def item(self, request: ClipRequest) -> dict[str, Any]:
        """Return the item of this clip and no other, with its caption."""
        return super().item(request) | {"text": self.videos[request.index].text, "is_image": self.num_frames == 1}

    def start(self, index: int, epoch: int) -> int:
        """Return the frame at which the clip begins: the one that its line names, or a random one."""
        start = self.videos[index].start
        return super().start(index, epoch) if start is None else start


class CaptionedDataModule(VideoFilesDataModule):
    """Videos with captions, or images with captions (`num_frames=1`).

    A list is a file with one JSON object a line:

        {"path": "clips/0001.mp4", "text": "a dog runs over a beach", "start": 40, "label": 3}

    `path` is relative to the root. `start` is the number of the frame at which the clip begins; without it a clip
    begins anywhere, elsewhere in each epoch. `label` is 0 by default. Batches hold `text`, a list of strings, and
    `is_image` `[B]`, which is True for clips of one frame; text is tokenised and encoded by the model.

    Args:
        root: the folder that paths and lists are relative to.
        train_list: the training clips.
        val_list: the validation clips.
        num_frames: frames of a clip; shorter videos are left out. 1 for images.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        width: width of a clip, where it is another one than the height.
        antialias: whether the bilinear resize of video filters when it shrinks. Images are resized as ADM does.
        random_crop: whether training clips are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training clips are mirrored; captions that say left or right turn wrong.
        audio: whether batches hold `audio` `[B, 1, T, 64, 16]` too; videos without sound are left out.
        cache_dir: where to keep the index of the files and the quarantine list; `<root>/.longtake` by default.
        decoder: `pyav` is right for every file. `torchcodec` needs its package and FFmpeg's libraries, and files whose
            time stamps can be trusted (no AVI).
        read_timeout: seconds after which a file is given up; videos are then read in child processes. null waits.
        max_bad_fraction: share of the files that may turn out unreadable before the run stops (at least one file,
            unless it is 0), judged after 100 reads.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 decodes in the main process.
        seed: key of the data order and of all random choices in clips.
    """

    def __init__(
        self,
        root: str,
        train_list: str = "train.jsonl",
        val_list: str = "val.jsonl",
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 128,
        width: int | None = None,
        antialias: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        audio: bool = False,
        cache_dir: str | None = None,
        decoder: Decoder = "pyav",
        read_timeout: float | None = None,
        max_bad_fraction: float = 0.01,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            num_frames,
            frame_stride,
            resolution,
            antialias=antialias,
            random_crop=random_crop,
            horizontal_flip=horizontal_flip,
            cache_dir=cache_dir,
            decoder=decoder,
            read_timeout=read_timeout,
            max_bad_fraction=max_bad_fraction,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.lists: dict[Split, str] = {"train": train_list, "val": val_list}
        self.width = width
        self.audio = audio

    def captions(self, split: Split) -> list[Caption]:
        """Return the lines of a split's list."""
        return read_captions(self.found_root() / self.lists[split], self.found_root())

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the files that the lists name, each once, with the label of its last line."""
        return {split: {caption.path: caption.label for caption in self.captions(split)} for split in get_args(Split)}

    def class_names(self) -> Sequence[str]:
        """Return none: the lists number their labels, and do not name them."""
        return []

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if a list is not there, or none of its files can be read.
            ValueError: if a list has a bad line, or lists images for clips of several frames.
        """
        clips = self.make_clips(self._listed_videos(self.captions(split)), split, CaptionedClips)
        clips.width = self.width
        return SoundClips(clips, f"{self.found_root().name} {split}") if self.audio else clips

    def _listed_videos(self, captions: list[Caption]) -> list[CaptionedVideo]:
        """Return what a list names and can be read, in its order."""
        labels = {caption.path: caption.label for caption in captions}
        index = index_videos(list(labels), self.found_root(), self.cache_dir, self.read_timeout)
        readable = indexed_videos(labels, index, self.decoder, self.read_timeout)
        if not readable:
            raise FileNotFoundError(
                f"None of the {len(labels)} files of the list can be read (paths are relative to --data.root), such as "
                f"{index[captions[0].path]}"
            )
        sources: dict[Path, Video] = {video.path: video for video in readable}
        span = (self.num_frames - 1) * self.frame_stride + 1
        videos, too_late = [], []
        for caption in captions:
            if caption.path not in sources:
                continue
            source = sources[caption.path]
            if _is_image(caption.path):
                if self.num_frames != 1 or caption.start is not None:
                    raise ValueError(
                        f"{caption.line}: {caption.path.name} is an image: a clip of one frame (--data.num_frames 1) "
                        f"without a start, but num_frames={self.num_frames} and start={caption.start}. "
                        "MixedDataModule trains on videos and images together."
                    )
                source = ImageFile(caption.path, caption.label, num_frames=1, resolution=self.resolution)
            if caption.start is not None and caption.start + span > source.num_frames:
                too_late.append(f"{caption.line} ({source.num_frames} frames, start {caption.start})")
                continue
            videos.append(
                CaptionedVideo(
                    source.path,
                    caption.label,
                    source.num_frames,
                    source.key_frames,
                    read_timeout=self.read_timeout,
                    text=caption.text,
                    start=caption.start,
                    source=source,
                )
            )
        if too_late:
            rank_zero_warn(
                f"{len(too_late)} of {len(captions)} captions are left out, since their video ends before a clip of "
                f"{self.num_frames} frames at stride {self.frame_stride} does, such as: {'; '.join(too_late[:3])}"
            )
        return videos


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES)
