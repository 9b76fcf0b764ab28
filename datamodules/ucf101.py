"""UCF-101 (Soomro et al., 2012): 13,320 clips of 101 actions, 320x240 at 25 frames a second."""

from pathlib import Path
from typing import Any, Literal

from datamodules.video import Split, VideoFilesDataModule


class UCF101DataModule(VideoFilesDataModule):
    """UCF-101: one clip a video, from a random place in each epoch.

    The root holds the videos, as the official archive has them (`UCF-101/<Class>/v_*.avi`) or as the flat THUMOS
    archive has them (`UCF101/v_*.avi`), and the official lists: `ucfTrainTestlist/` with classInd.txt, trainlist0N.txt
    and testlist0N.txt. Files are found whatever the case of their names, since archives and lists spell
    `HandstandPushups` differently. A label is the number in classInd.txt, from 0, of the class that the list names.
    Validation uses the split's test list.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_UCF101 by default.
        split: which of the three official splits.
        **options: those of every data module that reads files.
    """

    title = "UCF-101"
    root_variable = "LONGTAKE_UCF101"
    source = (
        "The data set is at https://www.crcv.ucf.edu/data/UCF101.php: UCF101.rar holds the videos, "
        "UCF101TrainTestSplits-RecognitionTask.zip the lists (ucfTrainTestlist)."
    )

    def __init__(self, root: str | None = None, split: Literal[1, 2, 3] = 1, **options: Any) -> None:
        super().__init__(root, **options)
        self.split = split

    def class_names(self) -> list[str]:
        """Return the classes in the order of classInd.txt."""
        rows = [row.split() for row in self._lines("classInd.txt")]
        return [name for _, name in sorted(rows, key=lambda row: int(row[0]))]

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of the split's lists, in their order; those that are missing where they should be.

        Raises:
            FileNotFoundError: if the root or the lists are not there, or a list has no video at all.
        """
        root = self.found_root()
        numbers = {name: number for number, name in enumerate(self.class_names())}
        folder = next((root / name for name in ("UCF-101", "UCF101") if (root / name).is_dir()), root / "UCF-101")
        files = {file.name.lower(): file for file in sorted(folder.rglob("*")) if file.suffix.lower() == ".avi"}
        splits: tuple[tuple[Split, str], ...] = ("train", "trainlist"), ("val", "testlist")
        found: dict[Split, dict[Path, int]] = {}
        for split, kind in splits:
            list_name = f"{kind}0{self.split}.txt"
            # a row is `Class/v_Name.avi`, in train lists with the label behind it
            rows = [row.split()[0].split("/") for row in self._lines(list_name)]
            if unknown := {class_ for class_, _ in rows} - numbers.keys():
                raise ValueError(f"UCF-101: classInd.txt lacks classes of {list_name}: {', '.join(sorted(unknown))}.")
            if not any(name.lower() in files for _, name in rows):
                raise FileNotFoundError(
                    f"UCF-101: none of the {len(rows)} videos of {list_name} is below {root}: expected "
                    f"UCF-101/<Class>/v_*.avi or UCF101/v_*.avi {self.hint()}"
                )
            found[split] = {files.get(name.lower(), folder / class_ / name): numbers[class_] for class_, name in rows}
        return found

    def _lines(self, list_name: str) -> list[str]:
        file = self.found_root() / "ucfTrainTestlist" / list_name
        if not file.is_file():
            raise FileNotFoundError(f"UCF-101: no list {file} {self.hint()}")
        return [line for line in file.read_text().splitlines() if line.strip()]
