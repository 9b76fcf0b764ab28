"""Benchmarks are no tests; that they can be run, and what they write, is."""

import json
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import data
from experiments.benchmarks.report import Measurement, report, seconds_of, stored, summary


def test_a_report_names_the_machine_and_says_which_targets_are_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Measurement("faster", 5.5, "x", at_least=5.0),
        Measurement("slower", 1.2, "x", at_most=1.15, details={"ours_ms": 12.0}),
        Measurement("neither", 7.0, "files/s"),
    ]
    report("data", rows, tmp_path / "bench", quick=True)
    content = json.loads((tmp_path / "bench/data.json").read_text())
    assert [row["met"] for row in content["measurements"]] == [True, False, None]
    assert content["measurements"][1]["details"] == {"ours_ms": 12.0}
    assert content["quick"] is True
    assert content["machine"].keys() >= {"cpu", "cores", "gpu", "load_average", "python", "torch"}
    table = capsys.readouterr().out
    assert "NO" in table
    assert "quick: toy sizes" in table


def test_times_are_medians_after_a_first_call() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), least_seconds=0.0, least_runs=3) >= 0
    assert len(calls) == 4


def test_scripts_are_found_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "run", lambda quick: [Measurement("quick" if quick else "whole", 1.0, "x")])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", f"--out={tmp_path}", "data"])
    benchmarks.main()
    assert json.loads((tmp_path / "data.json").read_text())["measurements"][0]["name"] == "quick"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "there is no benchmark speed; there are: commit, data, " in capsys.readouterr().err


@pytest.mark.slow
def test_the_data_path_can_be_measured() -> None:
    rows = {row.name: row for row in data.run(quick=True)}
    assert len(rows) == 8
    assert all(row.value > 0 for row in rows.values())
    assert rows["cached codes: batches/s / tokenizing online"].value > 1


def test_a_run_is_compared_with_an_earlier_one_of_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report("toy", [Measurement("speed", 8.0, "clips/s")], tmp_path, quick=True)
    before = {"toy": stored(tmp_path, "toy", quick=True)}
    capsys.readouterr()
    summary({"toy": [Measurement("speed", 10.0, "clips/s"), Measurement("new", 1.0, "x")]}, before)
    assert "+25%" in capsys.readouterr().out
    assert stored(tmp_path, "other", quick=True) == {}
    with pytest.raises(ValueError, match=r"toy\.json was measured with other sizes \(--quick\)"):
        stored(tmp_path, "toy", quick=False)
