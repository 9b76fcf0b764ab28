"""`longtake compare`: evaluations side by side, if they can be compared at all.

Numbers go into one table only if protocol and detectors are the same, to the hash. What papers report under that very
protocol stands below, from `protocols/published/numbers.yaml`, and nothing else does.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.messages import HelpFormatter
from experiments.protocol import FOLDER, read_protocol

Result = dict[str, Any]
# Scores of which less is better; of all others, more.
LOWER = ("fvd", "rfvd", "kvd", "fid", "frechet", "reconstruction_frechet", "kernel", "nll", "lpips")


def main(args: Sequence[str]) -> None:
    """Print a table, and write it with a plot."""
    parser = argparse.ArgumentParser(prog="longtake compare", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="results.json, the folder that holds it, or a run with evaluations beside it"
    )
    parser.add_argument(
        "--protocol", help="of a run's evaluations, those under this one; by default all, which must be under one"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), help="folder of compare.md, .json and .png"
    )
    options = parser.parse_args(args)
    results = [result for run in options.runs for result in read_results(run, options.protocol)]
    check(results)
    rows = results + published(results)
    table = markdown(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.md").write_text(table)
    (options.out / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, options.out / "compare.png")
    print(table)
    print(f"{options.out}/compare.md, compare.json, compare.png")


def read_results(run: Path, protocol: str | None) -> list[Result]:
    """The results that a path stands for.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is none of `longtake evaluate`.
    """
    if run.is_file():
        files = [run]
    else:
        files = [run / "results.json"] if (run / "results.json").is_file() else sorted(run.glob("*/results.json"))
    try:
        results = [json.loads(file.read_text()) for file in files]
    except json.JSONDecodeError as error:
        raise ValueError(f"{run} holds no results: expected a results.json of longtake evaluate.") from error
    results = [result for result in results if protocol in (None, result["protocol"]["name"])]
    if not results:
        wanted = f" under {protocol}" if protocol else ""
        raise FileNotFoundError(
            f"There are no results of an evaluation{wanted} in {run}: longtake evaluate makes them."
        )
    return results


def check(results: Sequence[Result]) -> None:
    """Refuse to mix what cannot be compared.

    Raises:
        ValueError: If protocols or detectors differ: says which run has which.
    """
    for what, described in (
        ("protocols", _protocol_of),
        ("detectors", _detectors_of),
    ):
        seen = {result["run"] + " " + described(result): described(result) for result in results}
        if len(set(seen.values())) > 1:
            raise ValueError(
                f"These runs were evaluated with different {what}, and their numbers cannot be compared:\n  "
                + "\n  ".join(seen)
                + ("\nChoose one (--protocol)." if what == "protocols" else "")
            )


def _protocol_of(result: Result) -> str:
    return f"{result['protocol']['name']} ({result['protocol']['hash'][:12]})"


def _detectors_of(result: Result) -> str:
    return ", ".join(f"{detector['name']} {detector['weights']}" for detector in result["detectors"].values())


def published(results: Sequence[Result]) -> list[Result]:
    """What papers report of the same quantities under the same protocol, as rows of the table."""
    about = results[0]["protocol"]
    name, _, task = about["name"].partition("/")
    if not (FOLDER / f"{name}.yaml").is_file() or read_protocol(name, task or None).digest != about["hash"]:
        return []  # a protocol of one's own
    ours = {score for result in results for score in result["scores"]}
    reconstructs = {result["conditions"] == "reconstruction" for result in results}
    rows = []
    for entry in yaml.safe_load((FOLDER / "published" / "numbers.yaml").read_text()):
        scores = {key: {"mean": mean, "std": std} for key, (mean, std) in entry["scores"].items() if key in ours}
        is_reconstruction = entry["conditions"] == "reconstruction"
        if entry["protocol"] == about["name"] and scores and is_reconstruction in reconstructs:
            source = entry["source"] + (", as quoted elsewhere" if entry.get("quoted") else "")
            rows.append(
                {"run": f"{entry['model']} (published)", "conditions": entry["conditions"], "scores": scores}
                | {"source": source, "protocol": about}
            )
    return rows


def markdown(results: Sequence[Result]) -> str:
    """A table, one row a result, and below it what the numbers belong to; all of one protocol."""
    names = [name for name in score_names(results) if "_from_frame_" not in name]
    head = ["run", "given", *names, "s/sample", "MiB/sample"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        cells = [result["run"], result["conditions"], *(shown(result["scores"].get(name)) for name in names)]
        seconds, memory = result.get("seconds_per_sample"), result.get("bytes_per_sample")
        cells += ["" if seconds is None else f"{seconds:.3g}", "" if memory is None else f"{memory / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    about = results[0]["protocol"]
    lines += ["", f"Protocol {about['name']} ({about['hash'][:12]}): {about['title']}."]
    for result in results:
        if "source" in result:
            lines.append(f"{result['run']}: {result['source']}.")
            continue
        lines.append(
            f"{result['run']}: checkpoint {result['checkpoint']['sha256'][:12]}, code {result['code']}, "
            f"{result['samples']} samples x {about['repeats']}, {result['real_clips']} real clips, {result['device']}."
            + (" Its real clips are of the split that it was trained on." if result["leak"] else "")
        )
        lines += [f"{result['run']}, left out: {note}." for note in result["notes"]]
    return "\n".join(lines) + "\n"


def score_names(results: Sequence[Result]) -> list[str]:
    """All scores, in the order in which they come."""
    return list(dict.fromkeys(name for result in results for name in result["scores"]))


def shown(score: dict[str, Any] | None) -> str:
    """A score with its deviation, if there is one."""
    if score is None:
        return ""
    return f"{score['mean']:.4g}" if score["std"] is None else f"{score['mean']:.4g} ± {score['std']:.2g}"


def plot(results: Sequence[Result], file: Path) -> None:
    """A panel for each score, a bar for each run; scores along a video are curves in one panel."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = score_names(results)
    curves = list(dict.fromkeys(name.split("_from_frame_")[0] for name in names if "_from_frame_" in name))
    bars = [name for name in names if "_from_frame_" not in name]
    panels = [*bars, *curves]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    labels = [result["run"] for result in results]
    for axis, name in zip(axes.flat, bars, strict=False):
        better = "less" if name.startswith(LOWER) else "more"
        axis.set_title(f"{name} ({better} is better)", fontsize=8)
        for number, result in enumerate(results):
            if score := result["scores"].get(name):
                axis.barh(number, score["mean"], xerr=score["std"], color=f"C{number % 10}")
        axis.set_yticks(range(len(labels)), labels, fontsize=6)
        axis.invert_yaxis()
    for axis, name in zip(axes.flat[len(bars) :], curves, strict=False):
        axis.set_title(f"{name} from frame on", fontsize=8)
        for number, result in enumerate(results):
            found = {key: value for key, value in result["scores"].items() if key.startswith(f"{name}_from_frame_")}
            places = [int(key.rsplit("_", 1)[1]) for key in found]
            axis.plot(
                places, [value["mean"] for value in found.values()], label=labels[number], color=f"C{number % 10}"
            )
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
