"""Run all scripts of this folder, or those named: a table of each, one of all, JSON files, and some plots."""

import argparse
import importlib
from pathlib import Path

from experiments.benchmarks.report import Measurement, report, stored, summary


def main() -> None:
    """Measure, print and write."""
    scripts = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    scripts = [name for name in scripts if not name.startswith("_") and name != "report"]
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("scripts", nargs="*", help=f"some of: {', '.join(scripts)}; by default all")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs; the numbers say little")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files")
    parser.add_argument(
        "--compare", type=Path, help="folder of an earlier run's JSON files: shows the change since then"
    )
    options = parser.parse_args()
    if unknown := set(options.scripts) - set(scripts):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(scripts)}")
    names = options.scripts or scripts
    before = {name: stored(options.compare, name, options.quick) for name in names} if options.compare else {}
    measured: dict[str, list[Measurement]] = {}
    for name in names:
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        measured[name] = module.run(options.quick)
        report(name, measured[name], options.out, options.quick)
        if hasattr(module, "plot"):
            module.plot(measured[name], options.out / f"{name}.png")
    summary(measured, before)


if __name__ == "__main__":
    main()
