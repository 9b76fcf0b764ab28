"""Images as videos of one frame: ImageNet, or any folder of images in class folders."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
from PIL import Image

from datamodules.decoders import IMAGE_SUFFIXES
from datamodules.decoding import UnreadableVideoError, require_regular_file
from datamodules.listing import Video
from datamodules.quarantine import Quarantine
from datamodules.sampler import ClipRequest
from datamodules.video import Split, VideoClips, VideoFilesDataModule


@dataclass(frozen=True, kw_only=True)
class ImageFile(Video):
    """An image file: a video of one frame, which is read with its shorter side at `resolution`."""

    resolution: int

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield the image as uint8 `[H, W, 3]`.

        Raises:
            UnreadableVideoError: if it cannot be read.
        """
        try:
            require_regular_file(self.path)
            with Image.open(self.path) as image:
                yield np.array(shrunk(image.convert("RGB"), self.resolution))
        # Pillow raises SyntaxError for a broken PNG, and an error of its own for absurd sizes
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, UnreadableVideoError):
                raise
            raise UnreadableVideoError(f"{self.path}: {error}") from error


def shrunk(image: Image.Image, resolution: int) -> Image.Image:
    """Bring the shorter side to `resolution` as ADM does (Dhariwal and Nichol, 2021), whose evaluator judges ImageNet.

    Halve by averaging while it is at least twice too large, then resize bicubically.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


class ImageFiles(Sequence[ImageFile]):
    """Image files and their labels in three arrays: a list of a million objects would be copied by each worker.

    An image takes as many bytes as its name has, and 12 more.

    Args:
        root: folder that the names are relative to.
        names: file names below it.
        labels: their classes.
        resolution: shorter side when read.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], resolution: int) -> None:
        self.root = root
        encoded = [os.fsencode(name) for name in names]
        self.names = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.labels = np.array(labels, np.int32)
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...

    @overload
    def __getitem__(self, index: slice) -> "Sequence[ImageFile]": ...

    def __getitem__(self, index: int | slice) -> "ImageFile | Sequence[ImageFile]":
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # a number from the end, or an IndexError
        path = self.root / os.fsdecode(self.names[self.ends[index] : self.ends[index + 1]])
        return ImageFile(path, int(self.labels[index]), num_frames=1, resolution=self.resolution)


class ImageClips(VideoClips):
    """Images as clips of one frame, `[3, 1, H, W]`, with `is_image` True: cropped, mirrored, replaced like videos.

    Args:
        files: the images.
        resolution: height and width, in pixels.
        seed: key of all random choices.
        random_crop: whether to crop at a random place instead of the centre.
        horizontal_flip: whether to mirror half of the images.
        name: what the log calls this data set.
        quarantine: list of images that are not to be read; by default one of this process, empty at first.
        max_bad_fraction: share of the images that may fail (at least one, unless it is 0), judged after 100 reads.
    """

    def __init__(
        self,
        files: ImageFiles,
        resolution: int,
        seed: int,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        name: str = "data set",
        quarantine: Quarantine | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            files,
            1,
            1,
            resolution,
            seed,
            random_crop=random_crop,
            horizontal_flip=horizontal_flip,
            name=name,
            quarantine=quarantine,
            max_bad_fraction=max_bad_fraction,
        )

    def long_enough(self, videos: Sequence[Video]) -> Sequence[Video]:
        """Return all, as they are: each holds its one frame."""
        return videos

    def item(self, request: ClipRequest) -> dict[str, Any]:
        """Return the item of this image and no other."""
        return super().item(request) | {"is_image": True}


class ImageFolderDataModule(VideoFilesDataModule):
    """Images in class folders, as ImageNet has them: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`.

    Classes are numbered in alphabetical order of their folders, over both splits: for ImageNet, whose folders are
    called by WordNet numbers, that is the usual order. Its validation images come in one flat folder and have to be
    sorted into class folders first. Batches hold `video` `[B, 3, 1, H, W]` and `is_image` `[B]`, all True.

    Args:
        root: the folder that holds `train` and `val`.
        resolution: height and width, in pixels; resized as ADM does.
        random_crop: whether training images are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training images are mirrored.
        num_frames: frames of a clip, which is 1 for an image.
        cache_dir: where to keep the list of images that could not be read; `<root>/.longtake` by default.
        max_bad_fraction: share of the images that may turn out unreadable before the run stops (at least one, unless it
            is 0), judged after 100 reads.
        batch_size: training images per batch and process.
        val_batch_size: validation images per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 reads in the main process.
        seed: key of the data order and of all random choices.
    """

    def __init__(
        self,
        root: str,
        resolution: int = 256,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        num_frames: int = 1,
        cache_dir: str | None = None,
        max_bad_fraction: float = 0.01,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            num_frames,
            1,
            resolution,
            random_crop=random_crop,
            horizontal_flip=horizontal_flip,
            cache_dir=cache_dir,
            max_bad_fraction=max_bad_fraction,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if num_frames != 1:
            raise ValueError(f"num_frames={num_frames}: an image is a clip of one frame (--data.num_frames 1).")

    def prepare_data(self) -> None:
        """Do nothing: a million small files are faster read than examined before. The doctor examines them."""

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the images of both splits with their labels."""
        root, splits = self.found_root(), get_args(Split)
        return {
            split: {root / name: label for name, label in zip(*self._names(split), strict=True)} for split in splits
        }

    def class_names(self) -> list[str]:
        """Return the names of the class folders of both splits, in alphabetical order."""
        root, splits = self.found_root(), ("train", "val")
        for split in splits:
            if not (root / split).is_dir():
                raise FileNotFoundError(f"No folder {root / split} to read images from (--data.root).")
        places = [place for split in splits for place in os.scandir(root / split)]
        return sorted({place.name for place in places if place.is_dir() and place.name[0] != "."})

    def make_dataset(self, split: Split) -> ImageClips:
        """Return the images of a split.

        Raises:
            FileNotFoundError: if the folders or the images are not there.
        """
        root = self.found_root()
        names, labels = self._names(split)
        return ImageClips(
            ImageFiles(root, names, labels, self.resolution),
            self.resolution,
            self.seed,
            random_crop=self.random_crop and split == "train",
            horizontal_flip=self.horizontal_flip and split == "train",
            name=f"{root.name} {split}",
            quarantine=self.quarantine(),
            max_bad_fraction=self.max_bad_fraction,
        )

    def _names(self, split: Split) -> tuple[list[str], list[int]]:
        """Return the images of a split, relative to the root, and their labels."""
        root = self.found_root()
        names, labels = [], []
        for label, name in enumerate(self.class_names()):
            folder = root / split / name
            found = sorted(f for f in os.listdir(folder) if _is_image(f)) if folder.is_dir() else []
            names += [f"{split}/{name}/{file}" for file in found]
            labels += [label] * len(found)
        if not names:
            raise FileNotFoundError(
                f"No images in {root / split}: expected {split}/<class>/ with files {' '.join(IMAGE_SUFFIXES)} "
                f"(--data.root). A flat folder has to be sorted into class folders first."
            )
        return names, labels


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."
