"""How a number is made: protocols as data, read from `experiments/protocols/<name>.yaml`.

Two numbers are comparable if everything between the clips of a data set and the number is the same. A protocol says all
of it: which clips are real and how they are cut, how many videos are generated and from what, which detector looks at
them, how often. Its hash is over what it says, so that a changed protocol is another one, whatever it is called.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).parent / "protocols"
SCORES = ("frechet", "kernel", "inception_score", "psnr_ssim", "lpips", "oracle", "nll")
# What a protocol says about itself, and what has no bearing on the numbers.
_DESCRIPTIVE = ("title", "source", "used_by", "note", "name", "tasks")


@dataclass(frozen=True)
class Windows:
    """Pieces of long videos, each of which is compared with one set of short real clips.

    Args:
        frames: Frames of a piece.
        stride: From one piece to the next.
        include_last: Whether a piece may end with the video; MeBT's 14 pieces of 128 frames leave that one out.
    """

    frames: int
    stride: int
    include_last: bool = True


@dataclass(frozen=True)
class Protocol:
    """A protocol.

    Args:
        name: Name of its file; of a protocol with tasks, `<name>/<task>`.
        title: What it measures, for people.
        source: Who has described it, and where.
        data: `class_path` of the data module and `init_args`: all that decides which pixels a clip has.
        split: Of the data, where real clips and conditions come from.
        frames: Frames that are scored, the first of each generated video.
        samples: Generated videos of each repeat.
        detector: What compares videos: `i3d` (FVD), `random_i3d` (works offline, no FVD) or `inception` (images, FID).
        scores: Some of `SCORES`. `inception_score` and `lpips` are left out, with a note, where their weights are not
            given; `nll`, where the model's clips are not as long as the data's.
        profile: Pipeline of I3D.
        real: Real clips of each repeat; None takes all of the split once.
        order: `drawn` draws clips at random, each once before any comes again, another window and crop each time and in
            each repeat; `listed` takes those of the data's list.
        repeat_real: Whether a real clip counts as often as videos are generated from it.
        repeats: How often all is repeated, with other seeds.
        labels: Classes of generated videos: those of the real clips, or all `even`.
        given_frames: First frames that are given to the model.
        task: What is given to a model of several tasks.
        tasks: Tasks that the protocol is used with, one at a time; empty where there is one only.
        size: Height and width at which videos are compared; None for that of the data. Bilinear.
        windows: Pieces of long videos that are compared instead of the whole.
        prompts: File beside the protocol with a text for each class: generated videos are asked for by text.
        seed: Key of all draws.
        used_by: Papers that take real clips from the training split, as this protocol does.
        note: What is not known, or was our choice.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: str
    title: str
    source: str
    data: Mapping[str, Any]
    split: Literal["train", "val"]
    frames: int
    samples: int
    detector: Literal["i3d", "random_i3d", "inception"]
    scores: tuple[str, ...]
    profile: Literal["tf", "videogpt", "stylegan_v"] | None = None
    real: int | None = None
    order: Literal["drawn", "listed"] = "drawn"
    repeat_real: bool = False
    repeats: int = 1
    labels: Literal["clips", "even"] = "clips"
    given_frames: int = 0
    task: str | None = None
    tasks: tuple[str, ...] = ()
    size: int | None = None
    windows: Windows | None = None
    prompts: str | None = None
    seed: int = 0
    used_by: tuple[str, ...] = ()
    note: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = {
            f"split={self.split}: train or val": self.split in ("train", "val"),
            f"detector={self.detector}: i3d, random_i3d or inception": self.detector
            in ("i3d", "random_i3d", "inception"),
            f"profile={self.profile}: tf, videogpt or stylegan_v for i3d, none for others": (
                self.profile in ("tf", "videogpt", "stylegan_v") if self.detector == "i3d" else self.profile is None
            ),
            f"order={self.order}: drawn or listed": self.order in ("drawn", "listed"),
            f"labels={self.labels}: clips or even": self.labels in ("clips", "even"),
            f"scores={list(self.scores)}: some of {', '.join(SCORES)}": bool(self.scores)
            and set(self.scores) <= set(SCORES),
            f"samples={self.samples}, repeats={self.repeats}, frames={self.frames}: at least 2, 1 and 1": self.samples
            >= 2
            and self.repeats >= 1
            and self.frames >= 1,
            f"real={self.real}: at least 2, or null": self.real is None or self.real >= 2,
            f"given_frames={self.given_frames}: 0 to {self.frames - 1}": 0 <= self.given_frames < self.frames,
            f"data={dict(self.data)}: class_path and init_args": set(self.data) == {"class_path", "init_args"},
            f"task={self.task}: one of {', '.join(self.tasks)} (--task)": not self.tasks or self.task in self.tasks,
            "windows and given_frames or frame scores together": self.windows is None
            or not (self.given_frames or {"psnr_ssim", "lpips"} & set(self.scores)),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Protocol {self.name} cannot have {rule}.")

    def content(self) -> dict[str, Any]:
        """All that the numbers depend on, as plain values."""
        content = {key: value for key, value in asdict(self).items() if key not in _DESCRIPTIVE}
        return json.loads(json.dumps(content))  # tuples are lists, as in a file

    @property
    def digest(self) -> str:
        """Sha256 of the content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def known_protocols() -> list[str]:
    """Names of the protocols that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_protocol(name: str, task: str | None = None) -> Protocol:
    """Read a protocol.

    Args:
        name: One that comes with the project, or the path of a file of one's own. A file's `base` names the protocol
            beside it that it differs from.
        task: What is asked of the model, for a protocol of several tasks.

    Raises:
        FileNotFoundError: If there is none of this name.
        ValueError: If it says what no protocol says, does not say what all do, or a task is missing.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no protocol {name} (--protocol). Give a .yaml file, or one of: {', '.join(known_protocols())}."
        )
    content = _with_bases(path)
    allowed = {entry.name for entry in fields(Protocol)} - {"name", "texts"}
    if unknown := content.keys() - allowed:
        raise ValueError(f"{path}: a protocol does not say {', '.join(sorted(unknown))}.")
    required = {"title", "source", "data", "split", "frames", "samples", "detector", "scores"}
    if missing := required - content.keys():
        raise ValueError(f"{path}: a protocol has to say {', '.join(sorted(missing))}.")
    for key in ("scores", "tasks", "used_by"):
        content[key] = tuple(content.get(key, ()))
    if content.get("windows"):
        content["windows"] = Windows(**content["windows"])
    if content.get("prompts"):
        content["texts"] = yaml.safe_load((path.parent / content["prompts"]).read_text())
    tasks = content["tasks"]
    if task is not None and not tasks:
        raise ValueError(f"Protocol {path.stem} has no tasks to choose from (--task={task}).")
    if task is not None:
        content["task"] = task
    protocol = Protocol(name=path.stem, **content)
    return replace(protocol, name=f"{path.stem}/{protocol.task}") if tasks else protocol


def _with_bases(path: Path) -> dict[str, Any]:
    """A file's content, laid over that of its base."""
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no protocol: expected keys such as `data:` and `samples:`.")
    base = content.pop("base", None)
    return (_with_bases(path.parent / base) if base else {}) | content
