"""Something-Something-v2 (Goyal et al., 2017): 220,847 clips of hands doing 174 things to objects, 12 fps.

What the classes mean is motion, and for some of them its direction: "Pulling something from left to right" mirrored is
"Pulling something from right to left". So nothing is mirrored unless asked for, and then the label is mirrored too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.listing import files_below, warn_of_extra_files
from datamodules.video import Split, VideoFilesDataModule

_OPPOSITE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
# Whole words: `upright` is no direction. Neither is the `right` of "pulling it right out as you remove your hand".
_DIRECTION = re.compile(r"\b([Ll]eft|[Rr]ight)\b(?! out)")
_SUFFIXES = (".webm", ".mp4")  # some mirrors rename the files; what they are is seen when they are opened
_FOLDER = "20bn-something-something-v2"  # as the archive has it


@dataclass(frozen=True)
class Annotation:
    """What a list says of a clip.

    Args:
        template: the class's sentence, without brackets: "Holding something next to something".
        caption: the sentence with its objects, empty in the test list.
        placeholders: the objects, in the order in which `something` stands in the template; none in the test list.
    """

    template: str
    caption: str = ""
    placeholders: tuple[str, ...] = ()


def mirrored_labels(class_names: Sequence[str]) -> list[int]:
    """Return the label of each class's mirror image: of the class that says `right` for `left`, mostly of itself.

    Raises:
        ValueError: if a class names a direction, and there is no class for the other one.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    opposite = {name: _DIRECTION.sub(lambda word: _OPPOSITE[word[0]], name) for name in class_names}
    alone = [name for name in class_names if opposite[name] not in labels]
    if alone:
        raise ValueError(
            f"Mirrored clips of `{alone[0]}` belong to no class: labels.json has no `{opposite[alone[0]]}`. "
            "Switch off --data.horizontal_flip."
        )
    return [labels[opposite[name]] for name in class_names]


class SSV2DataModule(VideoFilesDataModule):
    """Something-Something-v2: one clip a video, from a random place in each epoch.

    The root holds the videos, `<id>.webm`, in any folder (the archive's is `20bn-something-something-v2/`), and the
    lists labels.json, train.json and validation.json, itself or in `labels/` or `annotations/`, with the names of 2022
    or with the older `something-something-v2-` before them. A clip's label is the number that labels.json gives to its
    template, brackets removed.

    Where `horizontal_flip` asks for it, half of the training clips are mirrored, and labels that name left or right are
    exchanged. Videos that are listed but missing, and files that no list has, are counted in warnings.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_SSV2 by default.
        val_list: which list to validate on; for `test`, test-answers.csv must be there, since test.json has no classes.
        **options: those of every data module that reads files.
    """

    title = "Something-Something-v2"
    root_variable = "LONGTAKE_SSV2"
    source = (
        "Qualcomm's developer site gives the data set out for research, after registration: join and unpack the parts "
        "to 20bn-something-something-v2/<id>.webm, and put the lists (labels.json, train.json, validation.json) beside "
        "it or in labels/."
    )

    def __init__(
        self, root: str | None = None, val_list: Literal["validation", "test"] = "validation", **options: Any
    ) -> None:
        super().__init__(root, **options)
        self.val_list = val_list
        self._annotations: dict[Split, dict[Path, Annotation]] = {}

    def class_names(self) -> list[str]:
        """Return the templates, without brackets.

        Raises:
            FileNotFoundError: if there is no labels.json.
            ValueError: if it does not number the classes.
        """
        file = self._list("labels")
        names = {int(label): name for name, label in json.loads(file.read_text()).items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{file}: the labels are not the numbers from 0 to {len(names) - 1}, each once.")
        return [names[label] for label in range(len(names))]

    def direction_sensitive(self) -> list[int]:
        """Return the labels of the classes whose template names left or right: what a mirror makes wrong."""
        return [label for label, name in enumerate(self.class_names()) if _DIRECTION.search(name)]

    def mirrored_labels(self) -> list[int]:
        """Return the label of each label's mirror image; see the function of this name."""
        return mirrored_labels(self.class_names())

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits, in the lists' order; those that are missing where they should be.

        Raises:
            FileNotFoundError: if the root or the lists are not there, or a list has no video at all.
            ValueError: if a list has another form, or a template that labels.json has not.
        """
        labels = {name: label for label, name in enumerate(self.class_names())}
        listing: dict[Split, dict[Path, int]] = {}
        for split, annotations in self.annotations().items():
            unknown = sorted({a.template for a in annotations.values()} - labels.keys())
            if unknown:
                raise ValueError(f"{self._list('labels')} has no class `{unknown[0]}`, which a list names.")
            listing[split] = {path: labels[annotation.template] for path, annotation in annotations.items()}
        return listing

    def annotations(self) -> dict[Split, dict[Path, Annotation]]:
        """Return what the lists say of the videos of both splits."""
        if not self._annotations:
            files: dict[str, Path] = {}
            extra: list[Path] = []
            lists: dict[Split, dict[str, Annotation]] = {
                "train": self._rows("train"),
                "val": self._answers() if self.val_list == "test" else self._rows("validation"),
            }
            others = [name for name in ("validation", "test") if name != self.val_list and self._files_of_list(name)]
            listed = set().union(*lists.values(), *(self._rows(name) for name in others))
            for file in files_below(self.found_root(), _SUFFIXES):
                if file.stem in listed and file.stem not in files:
                    files[file.stem] = file
                else:
                    extra.append(file)
            for split, rows in lists.items():
                if not rows.keys() & files.keys():
                    raise FileNotFoundError(
                        f"Something-Something-v2: none of the {len(rows)} videos of the {split} list is below "
                        f"{self.found_root()}: expected files such as {next(iter(rows), '1')}.webm {self.hint()}"
                    )
            warn_of_extra_files("Something-Something-v2", extra)
            missing = self.found_root() / _FOLDER
            self._annotations = {
                split: {files.get(name, missing / f"{name}.webm"): annotation for name, annotation in rows.items()}
                for split, rows in lists.items()
            }
        return self._annotations

    def _rows(self, list_name: str) -> dict[str, Annotation]:
        """Return the rows of a list by the videos' identifiers."""
        file = self._list(list_name)
        try:
            return {
                str(row["id"]): Annotation(
                    _without_brackets(row.get("template", "")), row.get("label", ""), tuple(row.get("placeholders", ()))
                )
                for row in json.loads(file.read_text())
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{file} is no list: expected [{{"id": "1", "template": "Holding [something]", ...}}, ...]: {error!r}'
            ) from error

    def _answers(self) -> dict[str, Annotation]:
        """Return the test list's videos with the templates of test-answers.csv, whose rows are `<id>;<template>`."""
        templates: dict[str, str] = {}
        for line in self._list("test-answers", ".csv").read_text().splitlines():
            name, _, template = line.partition(";")
            templates[name.strip()] = _without_brackets(template.strip().strip('"'))
        rows = self._rows("test")
        unanswered = [name for name in rows if not templates.get(name)]
        if unanswered:
            raise ValueError(
                f"{self._list('test-answers', '.csv')} has no answer for {len(unanswered)} of {len(rows)} videos of "
                f"the test list, such as {unanswered[0]}: expected rows `<id>;<template>`. "
                "Or use --data.val_list=validation."
            )
        return {name: Annotation(templates[name]) for name in rows}

    def _files_of_list(self, name: str, suffix: str = ".json") -> list[Path]:
        root = self.found_root()
        folders = (root, root / "labels", root / "annotations")
        names = (f"{name}{suffix}", f"something-something-v2-{name}{suffix}")
        return [folder / file for folder in folders for file in names if (folder / file).is_file()]

    def _list(self, name: str, suffix: str = ".json") -> Path:
        files = self._files_of_list(name, suffix)
        if not files:
            raise FileNotFoundError(
                f"Something-Something-v2: no list {name}{suffix} in {self.found_root()}, its labels/ or its "
                f"annotations/ {self.hint()}"
            )
        return files[0]


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")
