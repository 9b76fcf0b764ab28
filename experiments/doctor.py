"""`longtake doctor`: what a data set holds, what of it can be used, and what is wrong with it."""

import argparse
import json
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.messages import HelpFormatter

if TYPE_CHECKING:  # the rest of the package takes seconds to import, and --help should not wait for it
    from datamodules.index import Entry
    from datamodules.video import VideoFilesDataModule

_CLIPS_TO_TIME = 8
_LINES = 10  # of a list in the report; the JSON file has all


def main(args: Sequence[str]) -> None:
    """Examine a data set, print and save the report; the exit code is 1 if something is wrong.

    With `--detector`, examine the weights of a metric's network instead (`experiments.detector_check`).
    """
    if any(word.split("=")[0] == "--detector" for word in args):
        from experiments.detector_check import main as check_detector

        check_detector(args)
        return
    parser = argparse.ArgumentParser(
        prog="longtake doctor",
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog="All other options are those of the data module: --data.root, --data.num_frames, --data.decoder, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="CLASS|FILE",
        help="a data module such as UCF101DataModule, or an experiment file",
    )
    parser.add_argument("--out", type=Path, help="folder of report.txt and report.json; runs/doctor/<class> by default")
    parser.add_argument(
        "--quick", action="store_true", help="read headers alone: seconds instead of hours, but headers lie"
    )
    parser.add_argument("--again", action="store_true", help="look once more at files that could not be read before")
    options, words = parser.parse_known_args(args)

    data = files_data_module(options.data, words)
    began = time.perf_counter()
    report = examine(data, "quick" if options.quick else "full", options.again)
    report["seconds_taken"] = round(time.perf_counter() - began, 1)
    text = as_text(report)
    out = options.out or Path("runs/doctor") / type(data).__name__
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.txt").write_text(text + "\n")
    print(f"{text}\n\nSaved: {out / 'report.txt'}, {out / 'report.json'}")
    if report["wrong"]:
        raise SystemExit(1)


def files_data_module(name: str, words: Sequence[str]) -> "VideoFilesDataModule":
    """Make the data module that a class name, or an experiment file, and options describe.

    Raises:
        ValueError: if the file has no such section, or the module has no files to examine.
    """
    from datamodules.video import VideoFilesDataModule
    from experiments.data_module import data_module

    if name.endswith((".yaml", ".yml")):
        data = data_module([Path(name)], words, "doctor")
    else:
        data = data_module([], [f"--data={name}", *words], "doctor")
    if not isinstance(data, VideoFilesDataModule):
        raise ValueError(f"{type(data).__name__} reads no files that could be examined (--data).")
    return data


def examine(data: "VideoFilesDataModule", level: Any, again: bool = False) -> dict[str, Any]:
    """Look at all files of a data module, and count.

    Args:
        data: it has `listing()`, `class_names()`, `entries()`, `quarantine()` and the geometry of a clip.
        level: `quick` or `full`.
        again: whether to look once more at files that could not be read before.

    Returns:
        The report, as plain types.
    """
    listing, names = data.listing(), data.class_names()
    entries = data.entries(level, again)
    places = {path: _places(path, entry) for path, entry in entries.items()}
    quarantined = data.quarantine().reasons({place for found in places.values() for place in found})
    span = (data.num_frames - 1) * data.frame_stride + 1

    usable = {  # how many videos of each file
        path: sum(place not in quarantined for place in places[path])
        for path, entry in entries.items()
        if _num_frames(entry) >= span
    }
    kinds = {path: _kind(entry, span) for path, entry in entries.items()}
    problems: dict[str, Any] = {
        kind: {str(path): entries[path].error for path in entries if kinds[path] == kind}
        for kind in ("corrupt", "truncated", "missing")
    }
    problems["quarantined"] = {str(place): reason for place, reason in quarantined.items()}
    problems |= _copies(listing, entries)

    splits: dict[str, dict[str, Any]] = {}
    for split, labels in listing.items():
        counts = Counter(kinds[path] for path in labels)
        counts["quarantined"] = sum(place in quarantined for path in labels for place in places[path])
        readable = [path for path in labels if entries[path].info or not entries[path].error]
        lengths = {path: _num_frames(entries[path]) * entries[path].num_videos for path in readable}
        splits[split] = {
            "videos": sum(entries[path].num_videos for path in labels),
            "usable": sum(usable.get(path, 0) for path in labels),
            **{kind: counts[kind] for kind in ("too_short", "corrupt", "truncated", "missing", "quarantined")},
            "frames": sum(lengths.values()),
            "hours": sum(lengths[path] / fps for path in readable if (fps := _fps(entries[path]))) / 3600,
            "gigabytes": sum(_num_bytes(path, entries[path]) for path in readable) / 1e9,
            "clips": sum(usable.get(path, 0) * (_num_frames(entries[path]) - span + 1) for path in labels),
            "classes": _classes(labels, names, entries, usable),
        }
    problems["empty"] = [f"{split}: no video is long enough" for split, found in splits.items() if not found["usable"]]
    problems["empty"] += [
        f"train: no usable video of class {name}"
        for name, counted in splits["train"]["classes"].items()
        if not counted["usable"]
    ]
    return {
        "data": type(data).__name__,
        "root": str(data.found_root()),
        "level": level,
        "clip": {name: getattr(data, name) for name in ("num_frames", "frame_stride", "resolution")},
        "splits": splits,
        "problems": problems,
        "estimates": _estimates(data, splits) if level == "full" and all(s["usable"] for s in splits.values()) else {},
        "wrong": any(problems.values()),
    }


def _places(path: Path, entry: "Entry") -> list[Path]:
    """What the quarantine list calls the videos of a file."""
    return [path.absolute() / str(number) for number, _, _ in entry.records] or [path.absolute()]


def _kind(entry: "Entry", span: int) -> str:
    if not entry.file:
        return "missing"
    if entry.error:
        return "truncated" if entry.is_truncated else "corrupt"
    return "whole" if _num_frames(entry) >= span else "too_short"


def _num_frames(entry: "Entry") -> int:
    """Frames as counted, or else as the header declares them."""
    if entry.info is not None:
        return entry.info.num_frames
    if entry.header is None or entry.error:
        return 0
    return entry.header.num_frames or round(entry.header.seconds * entry.header.fps)


def _fps(entry: "Entry") -> float:
    return entry.header.fps if entry.header is not None else 0.0


def _num_bytes(path: Path, entry: "Entry") -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return entry.file[0]


def _classes(
    labels: Mapping[Path, int], names: Sequence[str], entries: Mapping[Path, "Entry"], usable: Mapping[Path, int]
) -> dict[str, dict[str, int]]:
    counts = {name: {"videos": 0, "usable": 0} for name in names}
    for path, label in labels.items():
        if names:
            counts[names[label]]["videos"] += entries[path].num_videos
            counts[names[label]]["usable"] += usable.get(path, 0)
    return counts


def _copies(
    listing: Mapping[Any, Mapping[Path, int]], entries: Mapping[Path, "Entry"]
) -> dict[str, list[dict[str, list[str]]]]:
    """Return groups of equal files: those within a split, and those in several, which leak from one to the other."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, labels in listing.items():
        for path in labels:
            groups[entries[path].digest or str(path.resolve())][split].append(str(path))
    found = [{split: sorted(paths) for split, paths in group.items()} for group in groups.values()]
    return {
        "duplicate": [group for group in found if len(group) == 1 and any(len(paths) > 1 for paths in group.values())],
        "leaking": [group for group in found if len(group) > 1],
    }


def _estimates(data: "VideoFilesDataModule", splits: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Read a few training clips, and multiply."""
    import torch

    from datamodules.sampler import ClipRequest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says all that
        dataset = data.make_dataset("train")
    length = len(dataset)
    indices = [number * length // _CLIPS_TO_TIME for number in range(min(_CLIPS_TO_TIME, length))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers do
    began = time.perf_counter()
    for index in indices:
        dataset[ClipRequest(index)]
    seconds = (time.perf_counter() - began) / len(indices)
    torch.set_num_threads(threads)
    return {
        "seconds_per_clip_and_worker": seconds,
        "hours_per_epoch_and_worker": seconds * length / 3600,
        "gigabytes_as_raw_frames": sum(split["frames"] for split in splits.values()) * 3 * data.resolution**2 / 1e9,
    }


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report for people to read."""
    clip, splits = report["clip"], report["splits"]
    lines = [
        f"{report['data']} at {report['root']}, clips of {clip['num_frames']} frames at stride {clip['frame_stride']}, "
        f"level {report['level']}, {report['seconds_taken']} s",
        "",
    ]
    rows = [["", *splits]]
    for key, text in (
        ("videos", "videos in the lists"),
        ("usable", "long enough and readable"),
        ("too_short", "too short"),
        ("corrupt", "corrupt"),
        ("truncated", "truncated"),
        ("missing", "missing"),
        ("quarantined", "in quarantine"),
        ("clips", "different clips"),
        ("frames", "frames"),
        ("hours", "hours"),
        ("gigabytes", "GB on disk"),
    ):
        values = [found[key] for found in splits.values()]
        rows.append([text, *(_short(value) if isinstance(value, float) else f"{value:,}" for value in values)])
    lines += _aligned(rows)
    if any(found["classes"] for found in splits.values()):
        lines += ["", "Usable videos of each class, of all"]
        names = list(next(iter(splits.values()))["classes"])
        counts = {name: [found["classes"][name] for found in splits.values()] for name in names}
        lines += _aligned(
            [["", *splits], *([name, *(f"{c['usable']} of {c['videos']}" for c in counts[name])] for name in names)]
        )
    if estimates := report["estimates"]:
        lines += [
            "",
            f"A clip takes a worker {1000 * estimates['seconds_per_clip_and_worker']:.0f} ms, an epoch "
            f"{_short(estimates['hours_per_epoch_and_worker'])} hours divided by the number of workers. Stored as raw "
            f"frames of {clip['resolution']} pixels, the data set takes "
            f"{_short(estimates['gigabytes_as_raw_frames'])} GB.",
        ]
    for kind, found in report["problems"].items():
        if found:
            shown = list(found.items() if isinstance(found, dict) else found)
            lines += ["", f"{kind} ({len(shown)}):"]
            lines += [f"  {_shown(problem)}" for problem in shown[:_LINES]]
            lines += [f"  and {len(shown) - _LINES} more"] if len(shown) > _LINES else []
    lines += ["", "Something is wrong, see above." if report["wrong"] else "Nothing is wrong."]
    return "\n".join(lines)


def _short(value: float) -> str:
    """Two digits behind the point, or two that count where that would be nothing."""
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def _shown(problem: Any) -> str:
    if isinstance(problem, dict):  # a group of equal files
        return " = ".join(f"{path} ({split})" for split, paths in problem.items() for path in paths)
    return problem if isinstance(problem, str) else problem[1]  # of a path and its reason, which names it


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
