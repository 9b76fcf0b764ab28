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

import torch

from datamodules.index import index_videos
from datamodules.listing import check_windows, evaluation_windows, files_below, found_root, warn_of_differences
from datamodules.sampler import ClipRequest
from datamodules.video import Split, VideoClips, VideoDataModule, indexed_videos
from models.random import keyed_generator

ROOT_VARIABLE = "LONGTAKE_SSV2"

_FLIP_STREAM = 131
_OPPOSITE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
# Whole words: `upright` is no direction. Neither is the `right` of "pulling it right out as you remove your hand".
_DIRECTION = re.compile(r"\b([Ll]eft|[Rr]ight)\b(?! out)")
_SUFFIXES = (".webm", ".mp4")  # some mirrors rename the files; what they are is seen when they are opened
_SOURCE = (
    "Qualcomm's developer site gives the data set out for research, after registration: join and unpack the parts to "
    "20bn-something-something-v2/<id>.webm, and put the lists (labels.json, train.json, validation.json) beside it "
    "or in labels/."
)


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


class MirroredClips(VideoClips):
    """Clips of which half are mirrored, with the label that the mirror image has.

    Args:
        mirrored: label of each label's mirror image.
        *args: as for `VideoClips`.
        **options: as for `VideoClips`.
    """

    def __init__(self, mirrored: Sequence[int], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mirrored = mirrored

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        item = super().__getitem__(request)
        generator = keyed_generator(self.seed, _FLIP_STREAM, request.epoch, item["index"])
        if torch.rand((), generator=generator) < 0.5:
            item["video"] = item["video"].flip(3)  # [3, T, H, W]
            item["label"] = self.mirrored[item["label"]]
        return item


class SSV2DataModule(VideoDataModule):
    """Something-Something-v2: one clip a video, from a random place in each epoch.

    The root holds the videos, `<id>.webm`, in any folder (the archive's is `20bn-something-something-v2/`), and the
    lists labels.json, train.json and validation.json, itself or in `labels/` or `annotations/`, with the names of 2022
    or with the older `something-something-v2-` before them. A clip's label is the number that labels.json gives to its
    template, brackets removed.

    Videos that are listed but missing, and files that no list has, are counted in warnings.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_SSV2 by default.
        val_list: which list to validate on; for `test`, test-answers.csv must be there, since test.json has no classes.
        num_frames: frames of a clip; shorter videos are left out.
        frame_stride: distance of neighbouring frames of a clip in the video, 1 for all frames.
        resolution: height and width of a clip, in pixels.
        antialias: whether the bilinear resize filters when it shrinks.
        random_crop: whether training clips are cropped at a random place instead of the centre.
        horizontal_flip: whether half of the training clips are mirrored; labels that name left or right are exchanged.
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
        val_list: Literal["validation", "test"] = "validation",
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
        self.val_list = val_list
        self.antialias = antialias
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.val_windows = val_windows
        self.val_crops = val_crops
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._annotations: dict[Split, dict[Path, Annotation]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The templates, without brackets, by label."""
        file = self._list("labels")
        names = {int(label): name for name, label in json.loads(file.read_text()).items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{file}: the labels are not the numbers from 0 to {len(names) - 1}, each once.")
        return tuple(names[label] for label in range(len(names)))

    @property
    def direction_sensitive(self) -> tuple[int, ...]:
        """Labels of the classes whose template names left or right: what a mirror makes wrong."""
        return tuple(label for label, name in enumerate(self.class_names) if _DIRECTION.search(name))

    def prepare_data(self) -> None:
        """Index the videos, in one process of each machine; the others read the index."""
        listing = self.listing()
        index_videos([*listing["train"], *listing["val"]], self._root(), self.cache_dir)

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of a split.

        Raises:
            FileNotFoundError: if the root, the lists or the videos are not there.
            ValueError: if a template is not in labels.json, or has no mirror image and one is asked for.
        """
        labels = self.listing()[split]
        videos = indexed_videos(labels, index_videos(list(labels), self._root(), self.cache_dir))
        if split == "val":
            span = (self.num_frames - 1) * self.frame_stride + 1
            videos = evaluation_windows(videos, span, self.val_windows, self.val_crops) or videos
        arguments = (videos, self.num_frames, self.frame_stride, self.resolution, self.seed)
        options: dict[str, Any] = {
            "antialias": self.antialias,
            "random_crop": self.random_crop and split == "train",
            "name": f"Something-Something-v2 {split}",
        }
        if self.horizontal_flip and split == "train":
            return MirroredClips(mirrored_labels(self.class_names), *arguments, **options)
        return VideoClips(*arguments, **options)

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the videos of both splits that are there, with their labels, in the lists' order."""
        labels = {name: label for label, name in enumerate(self.class_names)}
        listing: dict[Split, dict[Path, int]] = {}
        for split, annotations in self.annotations().items():
            unknown = sorted({a.template for a in annotations.values()} - labels.keys())
            if unknown:
                raise ValueError(f"{self._list('labels')} has no class `{unknown[0]}`, which a list names.")
            listing[split] = {path: labels[annotation.template] for path, annotation in annotations.items()}
        return listing

    def annotations(self) -> dict[Split, dict[Path, Annotation]]:
        """Return what the lists say of the videos of both splits that are there."""
        if not self._annotations:
            files: dict[str, Path] = {}
            extra: list[Path] = []
            lists: dict[Split, dict[str, Annotation]] = {
                "train": self._rows("train"),
                "val": self._answers() if self.val_list == "test" else self._rows("validation"),
            }
            others = [name for name in ("validation", "test") if name != self.val_list and self._files_of_list(name)]
            listed = set().union(*lists.values(), *(self._rows(name) for name in others))
            for file in files_below(self._root(), _SUFFIXES):
                if file.stem in listed and file.stem not in files:
                    files[file.stem] = file
                else:
                    extra.append(file)
            for split, rows in lists.items():
                missing = [f"{name}.webm" for name in rows if name not in files]
                if len(missing) == len(rows):
                    raise FileNotFoundError(
                        f"Something-Something-v2: none of the {len(rows)} videos of the {split} list is below "
                        f"{self._root()}: expected files such as {missing[0] if missing else '1.webm'} "
                        f"(--data.root or {ROOT_VARIABLE}). {_SOURCE}"
                    )
                warn_of_differences(f"Something-Something-v2 {split}", len(rows), missing, ())
            warn_of_differences("Something-Something-v2", 0, (), extra)
            self._annotations = {
                split: {files[name]: annotation for name, annotation in rows.items() if name in files}
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
        root = self._root()
        folders = (root, root / "labels", root / "annotations")
        names = (f"{name}{suffix}", f"something-something-v2-{name}{suffix}")
        return [folder / file for folder in folders for file in names if (folder / file).is_file()]

    def _list(self, name: str, suffix: str = ".json") -> Path:
        files = self._files_of_list(name, suffix)
        if not files:
            raise FileNotFoundError(
                f"Something-Something-v2: no list {name}{suffix} in {self._root()}, its labels/ or its annotations/ "
                f"(--data.root or {ROOT_VARIABLE}). {_SOURCE}"
            )
        return files[0]

    def _root(self) -> Path:
        return found_root("Something-Something-v2", self.root, ROOT_VARIABLE, _SOURCE)


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")
