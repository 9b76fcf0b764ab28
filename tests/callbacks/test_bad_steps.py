"""Steps with bad numbers in modules that have no gate of their own: skipped, written down, and in the end refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from callbacks import TokenizerHealth


class Line(LightningModule):
    """A prior in miniature: automatic optimisation, AdamW with weight decay, a loss that its batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.ones_(self.layer.weight)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return (self.layer.weight * batch["video"].mean()).sum().square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


class States(Callback):
    """What the weights and moments are after each batch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.moments: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state[pl_module.layer.weight]
        self.weights.append(pl_module.layer.weight.item())
        self.moments.append(state["exp_avg"].item() if state else 0.0)
        self.steps.append(trainer.global_step)


def fit(
    make_trainer: Callable[..., Trainer], batches: Any, folder: Path, values: list[float], **options: Any
) -> States:
    """Train on constant videos of these values."""
    loader = batches(0)
    loader.batches = [
        {"video": torch.full((2, 3, 1, 2, 2), value), "index": torch.tensor([10 * i, 10 * i + 1])}
        for i, value in enumerate(values)
    ]
    states = States()
    health = TokenizerHealth(on_bad_step="skip", **options)
    logger = CSVLogger(folder, name="", version="")
    trainer = make_trainer(callbacks=[health, states], logger=logger, max_epochs=1, gradient_clip_val=1.0)
    trainer.fit(Line(), loader)
    return states


def test_a_bad_step_moves_neither_weights_nor_moments_and_is_written_down(
    make_trainer: Callable[..., Trainer], batches: Any, tmp_path: Path
) -> None:
    states = fit(make_trainer, batches, tmp_path, [1.0, 1.0, float("nan"), 1.0, float("inf"), 1.0])
    assert states.steps == [1, 2, 3, 4, 5, 6]  # curriculum and learning rate count on
    for bad in (2, 4):
        assert (states.weights[bad], states.moments[bad]) == (states.weights[bad - 1], states.moments[bad - 1])
    sound = fit(make_trainer, batches, tmp_path / "sound", [1.0] * 4)
    assert [states.weights[i] for i in (0, 1, 3, 5)] == sound.weights
    entries = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["clips"]) for entry in entries] == [(2, [20, 21]), (4, [40, 41])]
    assert entries[0]["reasons"] == ["loss is nan", "grad_norm is nan"]
    assert not (tmp_path / "sound/bad_steps.jsonl").exists()


def test_a_spike_is_skipped_and_does_not_enter_the_mean(
    make_trainer: Callable[..., Trainer], batches: Any, tmp_path: Path
) -> None:
    values = [1.0, 1.01] * 12 + [30.0, 30.0, 1.0]
    states = fit(make_trainer, batches, tmp_path, values, spike=8.0)
    assert states.weights[23] == states.weights[24] == states.weights[25] != states.weights[26]
    entries = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [24, 25]
    assert "loss is 8" in entries[0]["reasons"][0]


def test_bad_steps_in_a_row_end_the_run(make_trainer: Callable[..., Trainer], batches: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"2 steps in a row .*bad_steps\.jsonl in the run's folder names the clips"):
        fit(make_trainer, batches, tmp_path, [1.0, float("nan"), 1.0, *[float("nan")] * 3], max_bad_steps=2)


def test_accumulated_batches_are_skipped_together(
    make_trainer: Callable[..., Trainer], batches: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(
        callbacks=[TokenizerHealth(on_bad_step="skip"), states := States()],
        logger=CSVLogger(tmp_path, name="", version=""),
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    loader = batches(0)
    videos = [1.0, 1.0, float("nan"), 1.0, 1.0, 1.0]
    loader.batches = [{"video": torch.full((1, 1), v), "index": torch.tensor([i])} for i, v in enumerate(videos)]
    trainer.fit(Line(), loader)
    assert states.weights[1] == states.weights[3] != states.weights[5]
    (entry,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert entry["clips"] == [2, 3]


def test_a_spike_without_skipping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spike=3.0 must be 0 or positive, and it skips steps"):
        TokenizerHealth(spike=3.0)
