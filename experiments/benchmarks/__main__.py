"""Run all scripts of this folder, or those named: a table of each, `runs/bench/<script>.json`, some a plot."""

import argparse
import importlib
from pathlib import Path

from experiments.benchmarks.report import report


def main() -> None:
    """Measure, print and write."""
    scripts = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    scripts = [name for name in scripts if not name.startswith("_") and name != "report"]
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("scripts", nargs="*", help=f"some of: {', '.join(scripts)}; by default all")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs; the numbers say little")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files")
    options = parser.parse_args()
    if unknown := set(options.scripts) - set(scripts):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(scripts)}")
    for name in options.scripts or scripts:
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        measurements = module.run(options.quick)
        report(name, measurements, options.out, options.quick)
        if hasattr(module, "plot"):
            module.plot(measurements, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
