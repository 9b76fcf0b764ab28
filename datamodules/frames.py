"""Any folder of videos, or of folders of frames (Sky Time-lapse, Taichi-HD), or both."""

import os
import re
from collections.abc import Iterator
from hashlib import sha256
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.decoding import UnreadableVideoError, index_videos
from datamodules.video import Split, Video, VideoClips, VideoDataModule, indexed_videos

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


class FrameFolder(Video):
    """A folder whose images are the frames of a video, in the order of the number that ends their names."""

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` as uint8 `[H, W, 3]`.

        Raises:
            UnreadableVideoError: if one of them is not there or cannot be read.
        """
        try:
            files = frame_files(self.path)
            for number in range(start, start + count * stride, stride):
                with Image.open(files[number]) as image:
                    yield np.array(image.convert("RGB"))
        except (OSError, IndexError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise UnreadableVideoError(f"{self.path}: {error}") from error


def frame_files(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted by the last number in the name's stem: 2 comes before 10."""
    images = [f for f in folder.iterdir() if f.name.lower().endswith(FRAME_SUFFIXES) and f.name[0] != "."]
    return sorted(images, key=lambda file: (int((re.findall(r"\d+", file.stem) or ["0"])[-1]), file.name))


class FramesDataModule(VideoDataModule):
    """Any folder: each video file in it, and each folder that holds images, is a video.

    If the root has sub-folders `train` and `val` (or `test`), they are the splits. Otherwise the `val_fraction` of the
    videos whose names hash lowest is the validation set; no seed enters, so that it stays the same in all runs.
    Where every video lies in a sub-folder of its split, these sub-folders are the classes, numbered in alphabetical
    order over both splits; otherwise all labels are 0.

    Args:
        root: the folder.
        val_fraction: share of the videos to validate on, if the folder has no splits.
        num_frames: frames of a clip; shorter videos are left out.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        antialias: whether the bilinear resize filters when it shrinks.
        random_crop: whether training clips are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training clips are mirrored.
        cache_dir: where to keep the index of the videos; `<root>/.longtake` by default.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 decodes in the main process.
        seed: key of the data order and of all random choices in clips.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 128,
        antialias: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} leaves a split empty: between 0 and 1 (--data.val_fraction)."
            )
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def prepare_data(self) -> None:
        """Index the videos, in one process of each machine; the others read the index."""
        videos = {**self._labels()["train"], **self._labels()["val"]}
        index_videos([path for path in videos if path.is_file()], self.root, self.cache_dir)

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if there is no such folder, or no video in it.
        """
        labels = self._labels()[split]
        files = {path: label for path, label in labels.items() if path.is_file()}
        videos = indexed_videos(files, index_videos(list(files), self.root, self.cache_dir))
        videos += [
            FrameFolder(path, label, len(frame_files(path))) for path, label in labels.items() if path not in files
        ]
        return VideoClips(
            sorted(videos, key=lambda video: video.path),
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            antialias=self.antialias,
            random_crop=self.random_crop and split == "train",
            horizontal_flip=self.horizontal_flip and split == "train",
            name=f"{self.root.name} {split}",
        )

    def _labels(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits with their labels."""
        classes = self._class_folders()
        names = sorted({name for folders in classes.values() for name in folders.values()})
        # a video outside of all class folders has the empty path as its class: then there are none
        numbers = dict.fromkeys(names, 0) if Path() in names else {name: number for number, name in enumerate(names)}
        return {split: {path: numbers[name] for path, name in found.items()} for split, found in classes.items()}

    def _class_folders(self) -> dict[Split, dict[Path, Path]]:
        """Return the videos of both splits, with the folder that each lies in, relative to its split's folder."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"No folder {self.root} to read videos from (--data.root).")
        train, val = self.root / "train", self.root / "val" if (self.root / "val").is_dir() else self.root / "test"
        if train.is_dir() and val.is_dir():
            places: dict[Split, Path] = {"train": train, "val": val}
            found: dict[Split, dict[Path, Path]] = {
                split: {path: path.relative_to(place).parent for path in find_videos(place)}
                for split, place in places.items()
            }
        else:
            folders = {path: path.relative_to(self.root).parent for path in find_videos(self.root)}
            ranked = sorted(folders, key=lambda path: _hash(path.relative_to(self.root)))
            held_out = set(ranked[: ceil(self.val_fraction * len(ranked))])
            found = {
                "train": {path: folder for path, folder in folders.items() if path not in held_out},
                "val": {path: folder for path, folder in folders.items() if path in held_out},
            }
        if not (found["train"] and found["val"]):
            raise FileNotFoundError(
                f"{self.root} (--data.root) has {len(found['train'])} videos for training and {len(found['val'])} for "
                f"validation: expected at least one each, files ({' '.join(VIDEO_SUFFIXES)}) or folders of frames "
                f"({' '.join(FRAME_SUFFIXES)})."
            )
        return found


def find_videos(folder: Path) -> list[Path]:
    """Return, sorted, all video files in a folder and all folders that hold images; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in files if not name.startswith(".")]
        found += [Path(place, name) for name in visible if name.lower().endswith(VIDEO_SUFFIXES)]
        if any(name.lower().endswith(FRAME_SUFFIXES) for name in visible):
            found.append(Path(place))
    return sorted(found)


def _hash(path: Path) -> str:
    return sha256(path.as_posix().encode()).hexdigest()
