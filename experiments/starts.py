"""The record of a run's starts in its folder: when, from which step, with which code, libraries and machine."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"


def record_start(folder: Path, step: int, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Add a start to the record.

    Args:
        folder: The run's.
        step: Optimizer steps done before.
        about: Plain types: what may differ from start to start.

    Returns:
        What was recorded of the start before; None if this is the first.
    """
    before = read_starts(folder)
    now = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "step": step, **about}
    partial = folder / f".{STARTS}.partial"
    partial.write_text("".join(json.dumps(start) + "\n" for start in [*before, now]))
    partial.replace(folder / STARTS)  # a run that is killed here leaves no line that ends too early
    return before[-1] if before else None


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded of the starts, the first one first; none for a run of before there was a record.

    Raises:
        ValueError: If the file is damaged: says where.
    """
    file = folder / STARTS
    starts = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            starts.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is damaged in line {number} ({error.msg}): delete that line, or the file; it is a record, and "
                "no run depends on it."
            ) from error
    return starts


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a nested configuration says, by dotted name; lists count as one value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{name}.{rest}": leaf for rest, leaf in leaves(value).items()}
        else:
            found[name] = value
    return found
