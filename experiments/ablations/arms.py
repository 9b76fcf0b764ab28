"""Arms of a comparison: run each once a seed, keep what was finished, and say who won only if the spread allows it."""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.shards import read_header
from datamodules.tokens import COMMAND

Curve = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Run:
    """One training of one arm.

    Args:
        arm: Name of the arm.
        seed: Its seed.
        seconds: Wall-clock time.
        curve: What was watched along the way, as (step, value).
        scores: What was measured at the end.
    """

    arm: str
    seed: int
    seconds: float
    curve: Curve
    scores: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What a script found.

    Args:
        title: What was compared, a heading.
        runs: All runs.
        score: Name of the score that decides.
        lower_is_better: Its direction.
        watched: What the curves show, with its unit.
        setting: Sizes, steps, data: what a reader must know to judge the numbers.
        along: What the curves run along.
    """

    title: str
    runs: list[Run]
    score: str
    lower_is_better: bool
    watched: str
    setting: str
    along: str = "step"

    def arms(self) -> dict[str, list[Run]]:
        """Runs by arm, in the order of the first appearance."""
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        return arms

    def verdict(self) -> str:
        """The best arm, or `inconclusive`: if the seeds of either of the two best spread as far as these differ."""
        ranked = [([run.scores[self.score] for run in runs], arm) for arm, runs in self.arms().items()]
        ranked.sort(key=lambda entry: statistics.fmean(entry[0]), reverse=not self.lower_is_better)
        (best, winner), (second, _) = ranked[0], ranked[1]
        difference = abs(statistics.fmean(best) - statistics.fmean(second))
        spread = max(max(best) - min(best), max(second) - min(second))
        if min(len(best), len(second)) < 2 or spread >= difference:
            return "inconclusive"
        return f"{winner} is best"


def finished_run(folder: Path, arm: str, seed: int, train: Callable[[Path], tuple[Curve, dict[str, float]]]) -> Run:
    """Run one arm, or read what it gave if it was finished before.

    Args:
        folder: Of the whole comparison.
        arm: Name of the arm.
        seed: Its seed.
        train: Trains in the folder that it is given, and returns the curve and the scores.

    Returns:
        The run, also written to `<folder>/<arm>-<seed>/run.json`. What a run left that was stopped is removed.
    """
    place = folder / f"{arm.replace(' ', '_').replace('/', '_')}-{seed}"
    file = place / "run.json"
    if not file.is_file():
        shutil.rmtree(place, ignore_errors=True)
        start = time.perf_counter()
        curve, scores = train(place)
        place.mkdir(parents=True, exist_ok=True)
        run = Run(arm, seed, time.perf_counter() - start, curve, scores)
        file.write_text(json.dumps(asdict(run), indent=2) + "\n")
    return Run(**json.loads(file.read_text()))


def tokenized(folder: Path, words: list[str]) -> Path:
    """Return the cache of this folder; `longtake tokenize <words>` makes it, or goes on with it, unless it is whole."""
    from experiments.lightning_cli import run

    try:
        read_header(folder, "tokens", COMMAND)
    except FileNotFoundError:
        run(["tokenize", *words, f"--out={folder}"])
    return folder


def logged_curve(run_folder: Path, tag: str) -> Curve:
    """Read a scalar that a run logged, `[(step, value), ...]`.

    Args:
        run_folder: `runs/<experiment>/version_<n>`.
        tag: Its name, such as `val/loss`.

    Raises:
        ValueError: If the run logged no such thing.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if tag not in tags:
        raise ValueError(f"{run_folder} holds no curve of {tag!r}. It holds: {', '.join(sorted(tags))}.")
    return [(event.step, event.value) for event in events.Scalars(tag)]


def write(comparison: Comparison, folder: Path, name: str) -> str:
    """Write `<name>.json`, `<name>.md` (title, setting, table) and `<name>.png` (curves); return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    scores = list(comparison.runs[0].scores)
    lines = [
        f"### {comparison.title}: {comparison.verdict()}",
        "",
        comparison.setting,
        "",
        f"| arm | seeds | {' | '.join(scores)} | seconds |",
        f"| --- | --- | {' | '.join('---' for _ in scores)} | --- |",
    ]
    for arm, runs in comparison.arms().items():
        cells = [_mean_and_range([run.scores[score] for run in runs]) for score in scores]
        seconds = statistics.fmean(run.seconds for run in runs)
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", f"Mean over the seeds, and their range. `{comparison.score}` decides. ![curves]({name}.png)", ""]
    text = "\n".join(lines)
    (folder / f"{name}.md").write_text(text)
    _plot(comparison, folder / f"{name}.png")
    return text


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _plot(comparison: Comparison, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for color, (arm, runs) in enumerate(comparison.arms().items()):
        for number, run in enumerate(runs):
            steps, values = zip(*run.curve, strict=True)
            axes.plot(steps, values, color=f"C{color}", alpha=0.8, label=arm if number == 0 else None)
    axes.set_xlabel(comparison.along)
    axes.set_ylabel(comparison.watched)
    axes.set_title(f"{comparison.title}: {comparison.verdict()}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
