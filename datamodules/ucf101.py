"""UCF-101 (Soomro et al., 2012): 13,320 clips of 101 actions, 320x240 at 25 frames a second."""

import os
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.decoding import index_videos
from datamodules.video import Split, VideoClips, VideoDataModule, indexed_videos

ROOT_VARIABLE = "LONGTAKE_UCF101"

_SOURCE = (
    "The data set is at https://www.crcv.ucf.edu/data/UCF101.php: UCF101.rar holds the videos, "
    "UCF101TrainTestSplits-RecognitionTask.zip the lists (ucfTrainTestlist)."
)


class UCF101DataModule(VideoDataModule):
    """UCF-101: one clip a video, from a random place in each epoch.

    The root holds the videos, as the official archive has them (`UCF-101/<Class>/v_*.avi`) or as the flat THUMOS
    archive has them (`UCF101/v_*.avi`), and the official lists: `ucfTrainTestlist/` with classInd.txt, trainlist0N.txt
    and testlist0N.txt. A label is the class's number in classInd.txt, from 0. Validation uses the split's test list.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_UCF101 by default.
        split: which of the three official splits.
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
        root: str | None = None,
        split: Literal[1, 2, 3] = 1,
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
        self.root = root
        self.split = split
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def prepare_data(self) -> None:
        """Index the videos, in one process of each machine; the others read the index."""
        root = self._found_root()
        videos = [*self._listed_videos("train"), *self._listed_videos("val")]
        index_videos(videos, root, self.cache_dir)

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of the official train or test list.

        Raises:
            FileNotFoundError: if the root, the lists or the videos are not there.
        """
        labels = self._listed_videos(split)
        videos = indexed_videos(labels, index_videos(list(labels), self._found_root(), self.cache_dir))
        return VideoClips(
            videos,
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            antialias=self.antialias,
            random_crop=self.random_crop and split == "train",
            horizontal_flip=self.horizontal_flip and split == "train",
            name=f"UCF-101 {split}",
        )

    def _found_root(self) -> Path:
        root = self.root or os.environ.get(ROOT_VARIABLE)
        if not root:
            raise FileNotFoundError(f"UCF-101 has no folder: set --data.root or {ROOT_VARIABLE}. {_SOURCE}")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"UCF-101: no folder {root} (--data.root or {ROOT_VARIABLE}). {_SOURCE}")
        return Path(root)

    def _listed_videos(self, split: Split) -> dict[Path, int]:
        """Return the videos of a list that are there, with their labels, in the list's order."""
        root = self._found_root()
        list_name = f"{'train' if split == 'train' else 'test'}list0{self.split}.txt"
        files = self._files(root)
        # a row is `Class/v_Name.avi`, in train lists with the label behind it
        rows = [row.split()[0].split("/") for row in _lines(root / "ucfTrainTestlist" / list_name)]
        class_numbers = {}
        for row in _lines(root / "ucfTrainTestlist" / "classInd.txt"):
            number, name = row.split()
            class_numbers[name] = int(number) - 1
        present = {files[name.lower()]: class_numbers[class_] for class_, name in rows if name.lower() in files}
        if not present:
            raise FileNotFoundError(
                f"UCF-101: none of the {len(rows)} videos of {list_name} is below {root}: expected "
                f"UCF-101/<Class>/v_*.avi or UCF101/v_*.avi (--data.root or {ROOT_VARIABLE}). {_SOURCE}"
            )
        if len(present) < len(rows):
            missing = [name for _, name in rows if name.lower() not in files]
            rank_zero_warn(
                f"UCF-101: {len(missing)} of {len(rows)} videos of {list_name} are missing below {root}, "
                f"such as {', '.join(missing[:3])}."
            )
        return present

    @staticmethod
    def _files(root: Path) -> dict[str, Path]:
        """Return the video files by their names in lower case: archives and lists disagree on `HandstandPushups`."""
        folders = [root / name for name in ("UCF-101", "UCF101") if (root / name).is_dir()]
        return {file.name.lower(): file for folder in folders for file in sorted(folder.rglob("*.avi"))}


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"UCF-101: no list {file} (--data.root or {ROOT_VARIABLE}). {_SOURCE}")
    return [line for line in file.read_text().splitlines() if line.strip()]
