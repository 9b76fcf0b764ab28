"""Run one of the scripts of this folder: `<out>/<script>.md`, `.png` and `.json`; finished runs are not run again."""

import argparse
import importlib
from pathlib import Path

from experiments.ablations.arms import write


def main() -> None:
    """Train the arms, print and write."""
    scripts = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    scripts = [name for name in scripts if not name.startswith("_") and name != "arms"]
    parser = argparse.ArgumentParser(prog="python -m experiments.ablations", description=__doc__)
    parser.add_argument("script", choices=scripts)
    parser.add_argument(
        "--length",
        choices=("quick", "short", "long"),
        default="short",
        help="quick: a few steps, shows that it runs; short: what a CPU does in an hour; long: all arms, for a GPU",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of everything that is made")
    parser.add_argument("--clips", type=Path, help="folder of real videos, for a script that compares on such as well")
    options = parser.parse_args()
    module = importlib.import_module(f"experiments.ablations.{options.script}")
    folder = options.out / options.length
    given = {"clips": options.clips} if options.clips else {}
    for name, comparison in module.compare(options.length, folder / options.script, **given).items():
        print(write(comparison, folder, name))


if __name__ == "__main__":
    main()
