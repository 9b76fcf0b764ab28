"""What a benchmark gives, and how it is shown: one table, one JSON file, and the machine that it belongs to."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """A number.

    Args:
        name: What was measured.
        value: The number.
        unit: Of it.
        at_least: What it should reach, if something.
        at_most: What it should not exceed, if something.
        details: What it was made from, for the JSON file.
    """

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, Any] | None = None

    @property
    def target(self) -> str:
        """The aim, in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is met, None where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


def machine() -> dict[str, Any]:
    """Say on what, and beside what load, the numbers were measured."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def seconds_of(function: Callable[[], Any], least_seconds: float, least_runs: int = 3) -> float:
    """Return the median time of a call, after one that is not counted, over at least so many runs and seconds."""
    return seconds_in_turn([function], least_seconds, least_runs)[0]


def seconds_in_turn(
    functions: Sequence[Callable[[], Any]], least_seconds: float, least_runs: int = 3
) -> tuple[float, ...]:
    """Return the median time of a call of each; they take turns, so that what else the machine does meets all alike."""
    for function in functions:
        function()
    rounds: list[list[float]] = []
    while len(rounds) < least_runs or sum(map(sum, rounds)) < least_seconds * len(functions):
        times = []
        for function in functions:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return tuple(sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True))


def reset_peak(device: str) -> int:
    """Forget the highest memory use so far; bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def report(name: str, measurements: Sequence[Measurement], folder: Path, quick: bool) -> None:
    """Print the table and write the file."""
    about = machine()
    title = f"{name}{' (quick: toy sizes)' if quick else ''}: {about['cpu']}, {about['cores']} cores, {about['gpu']}"
    table = Table("measured", "value", "unit", "target", "met", title=title)
    for row in measurements:
        met = {True: "yes", False: "NO", None: ""}[row.is_met]
        table.add_row(row.name, f"{row.value:,.3g}", row.unit, row.target, met)
    Console(width=120).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "quick": quick,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "measurements": [asdict(row) | {"met": row.is_met} for row in measurements],
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def stored(folder: Path, name: str, quick: bool) -> dict[str, float]:
    """Numbers of an earlier run of a script, by what was measured; empty where it had none.

    Raises:
        ValueError: If that run had other sizes, or another machine.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    about = machine()
    other = [key for key in ("cpu", "cores", "gpu") if content["machine"][key] != about[key]]
    if content["quick"] != quick or other:
        what = "other sizes (--quick)" if content["quick"] != quick else f"another machine ({', '.join(other)})"
        raise ValueError(f"{path} was measured with {what}: its numbers do not compare (--compare).")
    return {row["name"]: row["value"] for row in content["measurements"]}


def summary(measured: Mapping[str, Sequence[Measurement]], before: Mapping[str, Mapping[str, float]]) -> None:
    """Print one table of all scripts, and how each number has changed where there is an earlier one."""
    table = Table("script", "measured", "value", "unit", "met", "before", "change", title="all")
    for name, rows in measured.items():
        for row in rows:
            old = before.get(name, {}).get(row.name)
            met = {True: "yes", False: "NO", None: ""}[row.is_met]
            change = f"{row.value / old - 1:+.0%}" if old else ""
            table.add_row(name, row.name, f"{row.value:,.3g}", row.unit, met, f"{old:,.3g}" if old else "", change)
    Console(width=140).print(table)
