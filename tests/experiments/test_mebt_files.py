"""MeBT's published settings, and the scripts that measure and compare it, at toy size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.ablations import mebt_curriculum
from experiments.arguments import expanded_configs
from experiments.benchmarks import mebt as benchmark
from experiments.cli import ROOT, main
from models.priors.decoding import DraftAndRevise, draft_and_revise, seeded_noise

PRESETS = ROOT / "experiments/_base/sampling"
# steps, choice temperature, top-k, bootstrap, groups, rounds, their temperature; passes; those that reveal nothing
PUBLISHED = {
    "ucf_16f": (128, 6.0, None, 0, 4, 4, 0.7, 144, 4),
    "ucf_128f": (32, 2.0, 32, 64, 32, 2, 0.1, 158, 0),
    "sky_16f": (32, 8.0, None, 0, 2, 2, 0.7, 36, 0),
    "sky_128f": (32, 4.0, 32, 64, 2, 2, 0.7, 98, 0),
    "taichi_16f": (64, 2.0, None, 0, 2, 8, 0.3, 80, 1),
    "taichi_128f": (32, 4.0, 32, 64, 2, 4, 0.1, 102, 0),
}


def preset(name: str) -> DraftAndRevise:
    content = yaml.safe_load((PRESETS / f"mebt_{name}.yaml").read_text())
    return DraftAndRevise(**content["model"]["init_args"]["sampling"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings(name: str) -> None:
    steps, choice, top_k, bootstrap, groups, rounds, temperature, passes, _ = PUBLISHED[name]
    assert preset(name) == DraftAndRevise(
        num_steps=steps,
        choice_temperature=choice,
        top_k=top_k,
        bootstrap_passes=bootstrap,
        revise_groups=groups,
        revise_rounds=rounds,
        revise_temperature=temperature,
    )
    assert f" {passes} passes" in (PRESETS / f"mebt_{name}.yaml").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_video_takes_the_published_number_of_passes_less_those_that_reveal_nothing(name: str) -> None:
    passes, idle = PUBLISHED[name][-2:]
    calls = []

    def predict(codes: torch.Tensor, context: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(targets.shape[1])
        return torch.zeros(1, targets.shape[1], 2)

    positions = torch.arange(8192 if "128" in name else 1024)[None]
    noise = seeded_noise(torch.tensor([0]), "cpu")
    draft_and_revise(predict, positions * 0, positions[:, :0], positions, preset(name), noise)
    assert len(calls) == passes - idle


@pytest.mark.parametrize("name", PUBLISHED)
def test_experiments_sample_as_published(name: str) -> None:
    file = "mebt_" + name.removeprefix("ucf_") + ".yaml"
    sampling: dict[str, Any] = {}
    for config in expanded_configs(ROOT / "experiments" / file):
        content = yaml.safe_load(config.read_text())
        sampling |= content.get("model", {}).get("init_args", {}).get("sampling", {})
    assert DraftAndRevise(**sampling) == preset(name)


@pytest.mark.parametrize(("name", "schedule"), [("sky", "gaussian2"), ("taichi", "gaussian100000_2")])
def test_released_schedules_have_experiments_of_their_own(name: str, schedule: str) -> None:
    *_, parent, own = expanded_configs(ROOT / f"experiments/mebt_{name}_128f_released.yaml")
    assert yaml.safe_load(own.read_text())["curriculum"] == {"schedule": schedule}
    assert yaml.safe_load(parent.read_text())["curriculum"]["schedule"] == "fraction"


def test_a_preset_is_chosen_when_sampling(tiny: Path, mebt_run: Path) -> None:
    words = [f"--config={PRESETS / 'mebt_taichi_16f.yaml'}", "--model.sampling.num_steps=2", "--num_samples=1"]
    checkpoint = f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}"
    task = ["--task=frame_prediction", "--model.sampling.given_frames=8", "--num_frames=24"]
    main(["sample", "--config=mebt.yaml", *words, checkpoint, *task, "--out=made"])
    about = json.loads(Path("made/samples.json").read_text())
    assert about["sampling"]["revise_rounds"] == 8
    assert about["sampling"]["num_steps"] == 2
    assert (about["task"], about["num_frames"]) == ("frame_prediction", 24)


def test_the_cost_of_tokens_can_be_measured(tmp_path: Path) -> None:
    rows = benchmark.run(quick=True)
    assert all(row.value == row.value for row in rows)
    assert sum(" tokens: peak memory" in row.name for row in rows) == 3
    benchmark.plot(rows, tmp_path / "mebt.png")
    assert (tmp_path / "mebt.png").stat().st_size > 10_000
    assert benchmark.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert benchmark.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_scores_written_out_are_the_same_attention() -> None:
    case = benchmark.Case(16, 64, 4, 8)
    network = benchmark.network_of(case)
    order = torch.arange(16)[None]
    before = network(order % 8, order[:, :5], order[:, 5:])
    for block in network.blocks:
        block.attention.__class__ = benchmark.MaterialisedAttention
    torch.testing.assert_close(network(order % 8, order[:, :5], order[:, 5:]), before)


def test_arms_of_the_curriculum_see_as_many_tokens() -> None:
    steps = mebt_curriculum.steps_of("curriculum", 300)
    assert steps > 300
    assert mebt_curriculum.tokens_seen("curriculum", steps, steps) == pytest.approx(300, rel=0.01)
    assert mebt_curriculum.steps_of("full length", 300) == 300


@pytest.mark.slow
def test_the_curriculum_can_be_compared(tmp_path: Path) -> None:
    comparisons = mebt_curriculum.compare("quick", tmp_path)
    assert comparisons.keys() == {"mebt_curriculum", "mebt_curriculum_nll"}
    runs = comparisons["mebt_curriculum"].runs
    assert [run.arm for run in runs] == list(mebt_curriculum.ARMS)
    assert all({"overall", "velocity", "nll", "nll_50"} <= run.scores.keys() and run.curve for run in runs)
    assert all(0 < run.scores["nll"] < 8 for run in runs)
    assert "Counting" in comparisons["mebt_curriculum"].setting
