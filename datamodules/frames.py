"""Any folder of videos, or of folders of frames (Sky Time-lapse, Taichi-HD), or both."""

import os
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

from datamodules.decoders import FRAME_SUFFIXES
from datamodules.video import Split, VideoFilesDataModule

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class FramesDataModule(VideoFilesDataModule):
    """Any folder: each video file in it, and each folder that holds images, is a video.

    If the root has sub-folders `train` and `val` (or `test`), they are the splits. Otherwise the `val_fraction` of the
    videos whose names hash lowest is the validation set; no seed enters, so that it stays the same in all runs.
    Where every video lies in a sub-folder of its split, these sub-folders are the classes, numbered in alphabetical
    order over both splits; otherwise all labels are 0.

    Args:
        root: the folder; the environment variable that `root_variable` names by default.
        val_fraction: share of the videos to validate on, if the folder has no splits.
        train_folder: sub-folder of the root with the training videos.
        val_folder: sub-folder with the validation videos; `val`, or else `test`, by default.
        has_classes: whether sub-folders are classes; otherwise all labels are 0.
        root_variable: environment variable that may hold the root.
        **options: those of every data module that reads files.
    """

    def __init__(
        self,
        root: str | None = None,
        val_fraction: float = 0.1,
        train_folder: str = "train",
        val_folder: str | None = None,
        has_classes: bool = True,
        root_variable: str = "LONGTAKE_FRAMES",
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} leaves a split empty: between 0 and 1 (--data.val_fraction)."
            )
        self.val_fraction = val_fraction
        self.train_folder = train_folder
        self.val_folder = val_folder
        self.has_classes = has_classes
        self.root_variable = root_variable

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits, sorted by their paths, with their labels.

        Raises:
            FileNotFoundError: if there is no such folder, or a split without any video.
        """
        folders = self._class_folders()
        numbers = {name: number for number, name in enumerate(_class_names(folders))} if self.has_classes else {}
        return {
            split: {path: numbers.get(name.as_posix(), 0) for path, name in sorted(found.items())}
            for split, found in folders.items()
        }

    def class_names(self) -> list[str]:
        """Return the classes, in alphabetical order; none if they are not wanted, or a video lies outside of them."""
        return _class_names(self._class_folders()) if self.has_classes else []

    def _class_folders(self) -> dict[Split, dict[Path, Path]]:
        """Return the videos of both splits, with the folder that each lies in, relative to its split's folder."""
        root = self.found_root()
        default = "val" if (root / "val").is_dir() else "test"
        train, val = root / self.train_folder, root / (self.val_folder or default)
        if train.is_dir() and val.is_dir():
            places: dict[Split, Path] = {"train": train, "val": val}
            found: dict[Split, dict[Path, Path]] = {
                split: {path: path.relative_to(place).parent for path in find_videos(place)}
                for split, place in places.items()
            }
        elif self.train_folder != "train" or self.val_folder is not None:
            raise FileNotFoundError(
                f"{root} (--data.root) has no sub-folders {train.name} and {val.name} (--data.train_folder, "
                "--data.val_folder)."
            )
        else:
            folders = {path: path.relative_to(root).parent for path in find_videos(root)}
            ranked = sorted(folders, key=lambda path: _hash(path.relative_to(root)))
            held_out = set(ranked[: ceil(self.val_fraction * len(ranked))])
            found = {
                "train": {path: folder for path, folder in folders.items() if path not in held_out},
                "val": {path: folder for path, folder in folders.items() if path in held_out},
            }
        if not (found["train"] and found["val"]):
            raise FileNotFoundError(
                f"{root} (--data.root) has {len(found['train'])} videos for training and {len(found['val'])} for "
                f"validation: expected at least one each, files ({' '.join(VIDEO_SUFFIXES)}) or folders of frames "
                f"({' '.join(FRAME_SUFFIXES)})."
            )
        return found


def _class_names(folders: dict[Split, dict[Path, Path]]) -> list[str]:
    names = sorted({name for found in folders.values() for name in found.values()})
    # a video outside of all class folders has the empty path as its class: then there are none
    return [] if Path() in names else [name.as_posix() for name in names]


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
