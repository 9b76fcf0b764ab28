"""Kinetics-600 (Carreira et al., 2018): about 390,000 + 30,000 clips of 10 seconds from YouTube, 600 actions.

Copies differ in size, since videos have disappeared: whoever compares numbers has to say which files were used.
"""

import csv
import re
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.index import index_videos
from datamodules.listing import check_windows, evaluation_windows, files_below, found_root, warn_of_differences
from datamodules.video import Split, VideoClips, VideoDataModule, indexed_videos

ROOT_VARIABLE = "LONGTAKE_K600"

# The first that exists is taken. CVDF calls its own csv files incomplete; others call the validation set `validate`.
_LISTS: dict[Split, tuple[str, ...]] = {
    "train": ("train.txt", "train.csv"),
    "val": ("val.txt", "val.csv", "validate.csv", "validation.csv"),
}
_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validate", "validation")}
_COLUMNS = ("label", "youtube_id", "time_start")
# The identifier is 11 characters, of which `-` and `_` may be the first; upper and lower case are different videos.
_NAME = re.compile(r"([A-Za-z0-9_-]{11})_(\d+)_(\d+)")
_SUFFIXES = (".mp4", ".mkv", ".webm")
_SOURCE = (
    "A copy is hosted by CVDF: https://github.com/cvdfoundation/kinetics-dataset, k600_downloader.sh and "
    "k600_extractor.sh give k600/{train,val}/*.mp4 and k600/annotations/{train,val}.{txt,csv}."
)

Clip = tuple[str, int]  # a YouTube identifier and the second at which the clip begins


class K600DataModule(VideoDataModule):
    """Kinetics-600: one clip a video, from a random place in each epoch.

    The root holds `train/` and `val/` with files `<id>_<start>_<end>.mp4`, in a heap (CVDF's) or in folders, and the
    lists `{train,val}.csv` (or .txt), beside them or in `annotations/`: comma-separated, with a header that names
    `label`, `youtube_id` and `time_start`. A file belongs to the row of the same identifier and start. Labels are the
    lists' class names, numbered in alphabetical order.

    Videos that are listed but missing, and files that no list has, are counted in warnings. A YouTube video that is in
    both lists is left out of training.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_K600 by default.
        num_frames: frames of a clip; shorter videos are left out.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        antialias: whether the bilinear resize filters when it shrinks.
        random_crop: whether training clips are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training clips are mirrored.
        val_windows: clips of each validation video along time, evenly spaced, the first one of all videos first; null
            takes one at a place drawn from the seed.
        val_crops: clips of each validation video along its longer side, evenly spaced; 1 takes the centre.
        cache_dir: where to keep the index of the videos; `<root>/.longtake` by default.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 decodes in the main process.
        seed: key of the data order and of all random choices in clips.
    """

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
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        check_windows(val_windows, val_crops)
        self.root = root
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.val_windows = val_windows
        self.val_crops = val_crops
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._listing: dict[Split, dict[Path, int]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(sorted({name for split in _LISTS for name in self._rows(split).values()}))

    def prepare_data(self) -> None:
        """Index the videos, in one process of each machine; the others read the index."""
        listing = self.listing()
        index_videos([*listing["train"], *listing["val"]], self._root(), self.cache_dir)

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if the root, the lists or the videos are not there.
        """
        labels = self.listing()[split]
        videos = indexed_videos(labels, index_videos(list(labels), self._root(), self.cache_dir))
        if split == "val":
            span = (self.num_frames - 1) * self.frame_stride + 1
            videos = evaluation_windows(videos, span, self.val_windows, self.val_crops) or videos
        return VideoClips(
            videos,
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            antialias=self.antialias,
            random_crop=self.random_crop and split == "train",
            horizontal_flip=self.horizontal_flip and split == "train",
            name=f"Kinetics-600 {split}",
        )

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits that are there, with their labels, in the lists' order."""
        if not self._listing:
            rows: dict[Split, dict[Clip, str]] = {split: self._rows(split) for split in _LISTS}
            names = self.class_names
            rank_zero_info(f"Kinetics-600: the lists name {len(names)} classes.")
            label_of = {name: label for label, name in enumerate(names)}
            listing = {split: self._present(split, rows[split], label_of) for split in _LISTS}
            shared = {youtube_id for youtube_id, _ in rows["train"]} & {youtube_id for youtube_id, _ in rows["val"]}
            if shared:
                rank_zero_warn(
                    f"Kinetics-600: {len(shared)} videos are in both lists and left out of training, such as "
                    f"{', '.join(sorted(shared)[:3])}. Do the lists belong to one version of Kinetics?"
                )
                train = listing["train"].items()
                listing["train"] = {path: label for path, label in train if path.name[:11] not in shared}
            self._listing = listing
        return self._listing

    def _present(self, split: Split, rows: dict[Clip, str], label_of: dict[str, int]) -> dict[Path, int]:
        """Return the files of a split that are in its list, and warn of all else."""
        folder = next(
            (self._root() / name for name in _FOLDERS[split] if (self._root() / name).is_dir()), self._root() / split
        )
        files: dict[Clip, Path] = {}
        extra: list[Path] = []
        for file in files_below(folder, _SUFFIXES):
            match = _NAME.fullmatch(file.stem)
            clip = (match[1], int(match[2])) if match else ("", 0)
            if clip in rows and clip not in files:
                files[clip] = file
            else:
                extra.append(file)
        if not files:
            raise FileNotFoundError(
                f"Kinetics-600: none of the {len(rows)} videos of the list is in {folder}: expected files such as "
                f"{_file_name(next(iter(rows)))} (--data.root or {ROOT_VARIABLE}). {_SOURCE}"
            )
        missing = [_file_name(clip) for clip in rows if clip not in files]
        warn_of_differences(f"Kinetics-600 {split}", len(rows), missing, extra)
        return {files[clip]: label_of[name] for clip, name in rows.items() if clip in files}

    def _rows(self, split: Split) -> dict[Clip, str]:
        """Return the clips of a list with the names of their classes."""
        root = self._root()
        files = [folder / name for name in _LISTS[split] for folder in (root / "annotations", root)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"Kinetics-600: no list {' or '.join(_LISTS[split])} in {root / 'annotations'} or {root} "
                f"(--data.root or {ROOT_VARIABLE}). {_SOURCE}"
            )
        with file.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened, skipinitialspace=True)
            absent = [column for column in _COLUMNS if column not in (table.fieldnames or ())]
            if absent:
                raise ValueError(
                    f"{file} has no column {', '.join(absent)}: expected a header such as "
                    "`label,youtube_id,time_start,time_end,split`. Give the list in that form, or remove it to use "
                    f"another one ({', '.join(_LISTS[split])})."
                )
            # spaces, underscores and quotes: copies write one class in several ways
            return {
                (row["youtube_id"], int(float(row["time_start"]))): row["label"].strip("\" '").replace("_", " ")
                for row in table
            }

    def _root(self) -> Path:
        return found_root("Kinetics-600", self.root, ROOT_VARIABLE, _SOURCE)


def _file_name(clip: Clip) -> str:
    return f"{clip[0]}_{clip[1]:06d}_*.mp4"
