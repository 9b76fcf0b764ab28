"""Kinetics-600 (Carreira et al., 2018): about 390,000 + 30,000 clips of 10 seconds from YouTube, 600 actions.

Copies differ in size, since videos have disappeared: whoever compares numbers has to say which files were used.
"""

import csv
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.listing import files_below, warn_of_extra_files
from datamodules.video import Split, VideoFilesDataModule

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
_SECONDS = 10

Clip = tuple[str, int]  # a YouTube identifier and the second at which the clip begins


class K600DataModule(VideoFilesDataModule):
    """Kinetics-600: one clip a video, from a random place in each epoch.

    The root holds `train/` and `val/` with files `<id>_<start>_<end>.mp4`, in a heap (CVDF's) or in folders, and the
    lists `{train,val}.csv` (or .txt), beside them or in `annotations/`: comma-separated, with a header that names
    `label`, `youtube_id` and `time_start`. A file belongs to the row of the same identifier and start. Labels are the
    lists' class names, numbered in alphabetical order.

    Videos that are listed but missing, and files that no list has, are counted in warnings. A YouTube video that is in
    both lists is left out of training.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_K600 by default.
        **options: those of every data module that reads files.
    """

    title = "Kinetics-600"
    root_variable = "LONGTAKE_K600"
    source = (
        "A copy is hosted by CVDF: https://github.com/cvdfoundation/kinetics-dataset, k600_downloader.sh and "
        "k600_extractor.sh give k600/{train,val}/*.mp4 and k600/annotations/{train,val}.{txt,csv}."
    )

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(root, **options)
        self._listing: dict[Split, dict[Path, int]] = {}

    def class_names(self) -> list[str]:
        """Return the lists' class names, in alphabetical order."""
        return sorted({name for split in _LISTS for name in self._rows(split).values()})

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits, in the lists' order; those that are missing where they should be.

        Raises:
            FileNotFoundError: if the root or the lists are not there, or a list has no video at all.
            ValueError: if a list has another form.
        """
        if not self._listing:
            rows: dict[Split, dict[Clip, str]] = {split: self._rows(split) for split in _LISTS}
            names = self.class_names()
            rank_zero_info(f"Kinetics-600: the lists name {len(names)} classes.")
            label_of = {name: label for label, name in enumerate(names)}
            listing = {split: self._files(split, rows[split], label_of) for split in _LISTS}
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

    def _files(self, split: Split, rows: dict[Clip, str], label_of: dict[str, int]) -> dict[Path, int]:
        root = self.found_root()
        folder = next((root / name for name in _FOLDERS[split] if (root / name).is_dir()), root / split)
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
                f"{_file_name(next(iter(rows)))} {self.hint()}"
            )
        warn_of_extra_files(f"Kinetics-600 {split}", extra)
        return {files.get(clip, folder / _file_name(clip)): label_of[name] for clip, name in rows.items()}

    def _rows(self, split: Split) -> dict[Clip, str]:
        """Return the clips of a list with the names of their classes."""
        root = self.found_root()
        files = [folder / name for name in _LISTS[split] for folder in (root / "annotations", root)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"Kinetics-600: no list {' or '.join(_LISTS[split])} in {root / 'annotations'} or {root} {self.hint()}"
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


def _file_name(clip: Clip) -> str:
    name, start = clip
    return f"{name}_{start:06d}_{start + _SECONDS:06d}.mp4"
