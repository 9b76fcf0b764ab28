"""`longtake report`: runs on one page: curves, samples over time, scores with their protocol, and what made them.

The page is one file that needs nothing else, to be mailed, kept, or looked at on a phone.
"""

import argparse
import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from experiments.charts import CHARTS, chart_of
from experiments.compare import published, score_names, shown
from experiments.events import Events, read_events
from experiments.starts import leaves, read_starts
from experiments.svg import NUM_COLOURS, line_chart, short

EXPERIMENTS = Path(__file__).resolve().parent
MAX_BYTES = 10_000_000
PICTURE_BYTES = 6_000_000  # of all pictures together; base64 adds a third
MAX_SHEETS = 8  # of the samples of one run, evenly over time
# Where a run lies and what it went on from is no part of an experiment.
PLACES = ("base", "config", "run_root", "run_name", "run_version", "ckpt_path", "weights_only")


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Args:
        folder: Of the run.
        config: Its resolved configuration.
        events: Its curves and moving pictures.
        starts: Record of its starts, the first one first.
        results: Its evaluations, by their folders.
    """

    folder: Path
    config: dict[str, Any]
    events: Events
    starts: list[dict[str, Any]]
    results: dict[Path, dict[str, Any]]

    @property
    def name(self) -> str:
        """`<experiment>/<version>`."""
        return "/".join(self.folder.resolve().parts[-2:])


def main(args: Sequence[str]) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="longtake report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs: runs/<experiment>/version_<n>")
    parser.add_argument("--out", type=Path, help="the file to write; by default report.html in the first run's folder")
    options = parser.parse_args(args)
    page = render([read_run(folder) for folder in options.runs])
    if len(page) > MAX_BYTES:
        raise ValueError(
            f"The page would have {len(page) / 1e6:.0f} MB, and {MAX_BYTES / 1e6:.0f} MB are the most: report on fewer "
            f"than {len(options.runs)} runs at once."
        )
    out = options.out or options.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page)
    print(f"{out} ({len(page) / 1e6:.1f} MB)")


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: If it is none.
        ValueError: If it holds no curves, or a file of it is damaged.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        below = sorted(str(path.parent) for path in folder.glob("**/config.yaml"))
        remedy = f"Runs below it: {', '.join(below[:5])}." if below else "Give runs/<experiment>/version_<n>."
        raise FileNotFoundError(f"{folder} is no run: there is no config.yaml in it. {remedy}")
    events = read_events(folder)
    if not events.scalars:
        raise ValueError(
            f"{folder} holds no curves: its event files, if there are any, have no scalars. Train it for at least "
            "--trainer.log_every_n_steps steps (make train RESUME=...), with its logger on."
        )
    resolved = _parsed(config)
    if missing := {"model", "trainer"} - resolved.keys():
        raise ValueError(
            f"{config} is no run's configuration: it has no {', '.join(sorted(missing))}. Restore it from a checkpoint "
            "of the run, which holds it as `config`."
        )
    results = {file.parent: _parsed(file) for file in sorted(folder.glob("*/results.json"))}
    return Run(folder, resolved, events, read_starts(folder), results)


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or move it out of the run's folder.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is empty or holds something else: restore it, or move it out of the run's folder.")
    return content


def render(runs: Sequence[Run]) -> bytes:
    """Return the page, UTF-8."""
    num_pictures = sum(len(run.events.pictures) + len(_sheets(run)) + 2 + len(run.results) for run in runs)
    pictures = Pictures(PICTURE_BYTES // num_pictures)
    title = "Longtake: " + ", ".join(run.name for run in runs)
    colours = "".join(f'<li><i class="c{i % NUM_COLOURS}"></i>{escape(run.name)}</li>' for i, run in enumerate(runs))
    body = [
        f"<h1>{escape(runs[0].name if len(runs) == 1 else f'{len(runs)} runs')}</h1>",
        f'<ul class="legend">{colours}</ul>' if len(runs) > 1 else "",
        *(summary(run) for run in runs),
        scores(runs),
        "<h2>Curves</h2>",
        curves(runs),
        *(samples(run, pictures) for run in runs),
        *(origin(run) for run in runs),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
    )
    return (head + "\n".join(body) + "</main></body></html>\n").encode()


def summary(run: Run) -> str:
    """The few numbers that one looks for first."""
    scalars = run.events.scalars
    last = max(max(values) for values in scalars.values())
    starts = f" in {len(run.starts)} starts" if len(run.starts) > 1 else ""
    facts = {
        "model": run.config["model"]["class_path"].rsplit(".", 1)[-1].removesuffix("Module"),
        "last step": f"{last + 1:,} of {run.config['trainer']['max_steps']:,}",
        "wall time": duration(run.events.seconds) + starts,
    }
    for name, text in (("train/loss", "training loss"), ("val/loss", "validation loss"), ("val/psnr", "PSNR (dB)")):
        if name in scalars:
            facts[text] = short(list(scalars[name].values())[-1])
    if speeds := sorted(scalars.get("train/seconds_per_step", {}).values()):
        facts["median step"] = f"{short(speeds[len(speeds) // 2])} s"
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<section aria-label="{escape(run.name, quote=True)}"><dl class="facts">{cells}</dl></section>'


def duration(seconds: float) -> str:
    """Seconds as `3 d 4 h`, `2 h 5 min`, `6 min 7 s` or `8 s`."""
    whole = round(seconds)
    for size, unit, rest_size, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // rest_size} {rest}"
    return f"{whole} s"


def scores(runs: Sequence[Run]) -> str:
    """A table for each protocol; results of different protocols or detectors never share one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for result in run.results.values():
            key = json.dumps([result["protocol"]["hash"], result["detectors"]], sort_keys=True)
            groups.setdefault(key, []).append(result)
    if not groups:
        command = escape(f"make evaluate EXP={runs[0].name.split('/')[0]} CKPT=…")
        return f"<h2>Scores</h2><p>Not evaluated yet: <code>{command}</code> does so.</p>"
    return "<h2>Scores</h2>" + "".join(_score_table(results) for results in groups.values())


def _score_table(results: list[dict[str, Any]]) -> str:
    about = results[0]["protocol"]
    detectors = ", ".join(f"{card['name']} ({card['weights'][:20]})" for card in results[0]["detectors"].values())
    rows = results + published(results)
    names = [name for name in score_names(results) if "_from_frame_" not in name]
    table = [["run", "given", *names]]
    for row in rows:
        # a score and its deviation stay on one line of a phone
        numbers = [shown(row["scores"].get(name)).replace(" ", "\N{NO-BREAK SPACE}") for name in names]
        table.append([row["run"], row["conditions"], *numbers])
    notes = [f"Protocol {about['name']} ({about['hash'][:12]}): {about['title']}. Detector: {detectors}."]
    for row in rows:
        if "source" in row:
            notes.append(f"{row['run']}: {row['source']}.")
            continue
        notes.append(
            f"{row['run']}: checkpoint {Path(row['checkpoint']['path']).name} ({row['checkpoint']['sha256'][:12]}), "
            f"{row['samples']:,} samples x {about['repeats']}, {row['real_clips']:,} real clips, code {row['code']}, "
            f"{row['device']}."
        )
        notes += [row["leak"]] if row["leak"] else []
        notes += [f"Left out: {note}." for note in row["notes"]]
    return f"<h3>{escape(about['name'])}</h3>{_table(table)}" + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ([escape(cell) for cell in row] for row in rows)
    lines = ["<tr><th>" + "</th><th>".join(head) + "</th></tr>"]
    lines += ["<tr><td>" + "</td><td>".join(row) + "</td></tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def curves(runs: Sequence[Run]) -> str:
    """The charts of TensorBoard's custom scalars: of one run as they are there, of several one for each scalar."""
    names = list(dict.fromkeys(name for run in runs for name in run.events.scalars))
    figures: list[str] = []
    for chart in CHARTS:
        members = [name for name in names if chart_of(name) == chart]
        if members and len(runs) == 1:
            lines = {name: runs[0].events.scalars[name] for name in members}
            figures.append(line_chart(f"{chart.group}: {chart.title}", lines))
            continue
        for name in members:
            lines = {run.name: run.events.scalars.get(name, {}) for run in runs}
            figures.append(line_chart(f"{chart.group}: {name}", lines))
    return f'<div class="charts">{"".join(figures)}</div>'


class Pictures:
    """Puts pictures into the page.

    Args:
        most_bytes: Of each; larger stills are made smaller.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes

    def still(self, file: Path, caption: str) -> str:
        """A picture from a file.

        Raises:
            ValueError: If it is damaged.
        """
        data = file.read_bytes()
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and the report goes without it.") from error
        kind = "png"
        while len(data) > self.most_bytes:
            kind = "webp"
            image.thumbnail((image.width * 3 // 4, image.height * 3 // 4))
            smaller = io.BytesIO()
            image.save(smaller, "WEBP", quality=85)
            data = smaller.getvalue()
        return self._figure(data, kind, caption, "sheet")

    def moving(self, data: bytes, caption: str) -> str:
        """A GIF, or where it would be if it were smaller."""
        if len(data) > self.most_bytes:
            megabytes = len(data) / 1e6
            return f'<p class="note">{escape(caption)}: a GIF of {megabytes:.1f} MB, left to TensorBoard.</p>'
        return self._figure(data, "gif", caption, "moving")

    @staticmethod
    def _figure(data: bytes, kind: str, caption: str, name: str) -> str:
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        text = escape(caption, quote=True)
        return (
            f'<figure class="{name}"><figcaption>{text}</figcaption><img src="{source}" alt="{text}" loading="lazy">'
            "</figure>"
        )


def _sheets(run: Run) -> list[Path]:
    """Contact sheets of the samples along a run, evenly over time, the first and the last among them."""
    files = sorted(run.folder.glob("samples/step=*.png"))
    if len(files) <= MAX_SHEETS:
        return files
    return [files[round(i * (len(files) - 1) / (MAX_SHEETS - 1))] for i in range(MAX_SHEETS)]


def samples(run: Run, pictures: Pictures) -> str:
    """What moves, of the last time that samples were made; sheets over time; sheets of `sample` and `evaluate`."""
    reconstructs = any(name.startswith("samples/reconstruction") for name in run.events.pictures)
    parts = [
        pictures.moving(data, f"{name.removeprefix('samples/')}, step {step:,}")
        for name, (step, data) in run.events.pictures.items()
    ]
    moving = f'<div class="movies">{"".join(parts)}</div>' if parts else ""
    stills = []
    for file in _sheets(run):
        step = int(re.sub(r"\D", "", file.stem))
        stills.append(pictures.still(file, f"step {step:,}"))
    made = sorted(run.folder.glob("samples-*/contact_sheet.png"))[-2:]
    stills += [pictures.still(file, f"longtake sample: {file.parent.name}") for file in made]
    for folder, result in run.results.items():
        if (folder / "contact_sheet.png").is_file():
            stills.append(pictures.still(folder / "contact_sheet.png", f"evaluated: {result['protocol']['name']}"))
    if not parts and not stills:
        return ""
    kind = "Reconstructions, each below its original" if reconstructs else "Samples, from the same seeds each time"
    return f'<h2>{kind}</h2><h3>{escape(run.name)}</h3>{moving}<div class="sheets">{"".join(stills)}</div>'


def origin(run: Run) -> str:
    """What the run was made from: its experiment and what differs from it, environment, starts, configuration."""
    parts = [f"<h2>Origin of {escape(run.name)}</h2>", _differences(run)]
    if run.starts:
        rows = [[name, str(value)] for name, value in run.starts[-1]["environment"].items() if value is not None]
        parts.append("<h3>Environment</h3>" + _table([["of the last start", ""], *rows]))
        starts = [["start", "from step", "code"]]
        starts += [[s["time"], f"{s['step']:,}", s["environment"]["code"]] for s in run.starts]
        parts.append("<h3>Starts</h3>" + _table(starts))
    else:
        parts.append("<p>The environment was not recorded: the run is of before starts.jsonl.</p>")
    text = escape((run.folder / "config.yaml").read_text())
    parts.append(f"<details><summary>Whole configuration</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _differences(run: Run) -> str:
    file = Path((run.starts[0]["experiment"] if run.starts else None) or EXPERIMENTS / f"{run.name.split('/')[0]}.yaml")
    title = f"<h3>Changes to {escape(file.name)}</h3>"
    if not file.is_file():
        return f"{title}<p>Not known: there is no experiment file {escape(str(file))} here.</p>"
    # the defaults of all classes are Lightning's command line's to say, which takes ten seconds to import
    from experiments.arguments import LINKS
    from experiments.lightning_cli import parsed

    try:
        theirs = parsed(["fit", f"--config={file}"])
    except (SystemExit, ValueError, OSError):
        return f"{title}<p>Not known: the file has changed since, and cannot be read as an experiment any more.</p>"
    before, now = (
        {key: value for key, value in leaves(config).items() if key.split(".")[0] not in PLACES}
        for config in (theirs, run.config)
    )
    linked = {target for _, target in LINKS}
    rows = [
        [key, *("" if key not in side else json.dumps(side[key]) for side in (before, now))]
        for key in before | now
        if key not in linked and (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    if not rows:
        return f"{title}<p>None: the run is the experiment as the file says it.</p>"
    return title + _table([["setting", "experiment", "this run"], *rows])


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2329; --soft: #5c6670; --line: #dde1e6; --card: #f6f7f9;
  --c0: #2563c9; --c1: #c2410c; --c2: #15803d; --c3: #9333b8; --c4: #a16207; --c5: #0e7490; --c6: #be185d;
  --c7: #4b5563 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --line: #333a41;
  --card: #1d2226; --c0: #6ea8fe; --c1: #fb923c; --c2: #4ade80; --c3: #d08bf0; --c4: #facc15; --c5: #22d3ee;
  --c6: #f472b6; --c7: #a8b3be } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere }
main { max-width: 1160px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem }
h3 { font-size: 1rem; color: var(--soft); margin: 1.2rem 0 .4rem }
p { margin: .4rem 0; max-width: 75ch } .note, figcaption { color: var(--soft); font-size: .85rem }
figure { margin: 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: .6rem; margin: .6rem 0 }
.facts div { background: var(--card); border-radius: 8px; padding: .5rem .7rem }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; font-weight: 600 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: .8rem }
.chart { background: var(--card); border-radius: 8px; padding: .6rem }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font-size: 10.5px }
.grid { stroke: var(--line); stroke-width: 1 } polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round }
.band { stroke: none; opacity: .18 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .3rem 0 0; padding: 0;
  font-size: .8rem; color: var(--soft) }
.legend b { color: var(--ink); font-weight: 600 }
.legend i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .35em }
.movies { display: flex; flex-wrap: wrap; gap: .8rem } .movies figure { width: min(100%, 340px) }
.movies img { width: 100% } .sheets { display: grid; gap: .8rem; margin-top: .8rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) } .sheet img { width: 100% }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch } table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } th, td { overflow-wrap: normal }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .8rem }
""" + "".join(
    f".c{i} {{ stroke: var(--c{i}) }} i.c{i} {{ background: var(--c{i}) }} "
    f".band.c{i}, circle.c{i} {{ fill: var(--c{i}) }}\n"
    for i in range(NUM_COLOURS)
)
