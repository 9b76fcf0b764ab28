"""W.A.L.T's ablations and benchmark are no tests; that they can be run, and what they give, is."""

from pathlib import Path

import pytest

from experiments.ablations import walt as ablation
from experiments.benchmarks import walt as benchmark


@pytest.mark.slow
def test_the_main_claims_can_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compared = ablation.compare("quick", tmp_path / "walt")
    assert {name: list(comparison.arms()) for name, comparison in compared.items()} == {
        "walt_self_conditioning": ["full method", "without"],
        "walt_zero_terminal_snr": ["full method", "signal left in the last step"],
    }
    runs = {run.arm: run for comparison in compared.values() for run in comparison.runs}
    assert all(run.scores.keys() == {"frechet_random_i3d", "oracle", "val_loss"} for run in runs.values())
    assert len({run.scores["frechet_random_i3d"] for run in runs.values()}) == 3  # the arms do differ
    assert all(len(run.curve) == 2 for run in runs.values())


def test_long_compares_all_of_the_papers_table() -> None:
    arms = {arm for _, arms in (ablation.MAIN | ablation.OTHERS).values() for arm in arms}
    assert len(arms) == 11
    assert len(ablation.OTHERS) == 6


@pytest.mark.slow
def test_windows_and_sampling_can_be_measured() -> None:
    rows = {row.name: row for row in benchmark.run(quick=True)}
    assert rows.keys() >= {"windows against full attention", "windows against DiT", "samples, 2 DDIM steps"}
    assert all(row.value > 0 for row in rows.values() if row.name != "self-conditioning in 0.9 of the steps")
    kept = [rows[f"kept for the backward pass: {name}"].value for name in ("windows", "full attention")]
    assert kept[0] < kept[1]
