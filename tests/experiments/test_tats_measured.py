"""TATS' benchmark and its comparison run at toy size, and write what they are for."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.ablations import tats_padding
from experiments.benchmarks import tats
from models.blocks.causal import KVCache


def test_all_caches_give_the_same_features() -> None:
    """Or their times would not be those of the same work."""
    network = tats.network_of({"side": 2, "codes": 9, "dim": 16, "depth": 2, "heads": 2}, 3)
    tokens = torch.arange(9)[None] % 9

    def features(cache: KVCache) -> torch.Tensor:
        network.extend(tokens[:, :6], torch.arange(6), cache)
        network.extend(tokens[:, :1], torch.tensor([6]), cache)  # forgotten
        cache.clear(kept=6)
        rows = [network.extend(tokens[:, i : i + 1], torch.tensor([i]), cache) for i in (6, 7, 8)]
        return torch.cat(rows, dim=1)

    with torch.no_grad():
        expected = network._features(tokens)[:, 6:]
        assert torch.allclose(features(network.new_cache(is_static=False)), expected, atol=1e-5)
        assert torch.allclose(features(tats.GrowingCache(2)), expected, atol=1e-5)


@pytest.mark.slow
def test_the_benchmark_runs_and_plots(tmp_path: Path) -> None:
    rows = tats.run(quick=True)
    names = [row.name for row in rows]
    assert {f"cache over none, batch {batch}" for batch in (1, 8)} <= set(names)
    assert {"1,024 frames, sliding (scaled)", "1,024 frames, hierarchical (scaled)"} <= set(names)
    assert [row.at_least for row in rows if row.name.startswith("cache over none")] == [10, 40]
    assert all(row.value > 0 for row in rows if "memory" not in row.name)
    tats.plot(rows, tmp_path / "tats.png")
    with Image.open(tmp_path / "tats.png") as plot:
        assert plot.size == (900, 400)


@pytest.mark.slow
def test_the_published_size_is_measured_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tats.BANDWIDTH, "cpu", 1e10)
    network = tats.network_of({"side": 2, "codes": 9, "dim": 16, "depth": 2, "heads": 2}, 4)
    with torch.inference_mode():
        rows = {row.name: row for row in tats.published_size_rows(network)}
    assert {name.split(":")[0] for name in rows} == {"published size, eager", "published size, compiled"}
    speed, share = (rows[f"published size, eager: {what}"] for what in ("one sample", "share of the memory's speed"))
    weights = 4 * sum(p.numel() for name, p in network.named_parameters() if "embedding" not in name)
    assert share.value == pytest.approx(100 * weights * speed.value / 1e10)


@pytest.mark.slow
def test_the_comparison_of_paddings_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = tats_padding.compare("quick", tmp_path / "runs")
    assert found.keys() == {"tats_padding"}
    comparison = found["tats_padding"]
    assert [(run.arm, run.seed) for run in comparison.runs] == [("zero", 0), ("replicate", 0)]
    for run in comparison.runs:
        assert [start for start, _ in run.curve] == [0, 16]
        assert run.scores["drift"] == pytest.approx(run.curve[1][1] - run.curve[0][1])
        assert (tmp_path / "runs" / f"{run.arm}-0/sheet.png").is_file()
    assert comparison.along == "frame"
    assert comparison.verdict() == "inconclusive"  # one seed
    # a mask is trained on the tokenizer of the replicate arm
    size = tats_padding.SIZES["quick"]
    curve, scores = tats_padding.fill(tmp_path / "runs/mask", "causal", 0, size, tmp_path / "runs")
    assert curve
    assert scores["psnr_between"] > 0
