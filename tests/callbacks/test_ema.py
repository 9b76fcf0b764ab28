"""Averages of the weights: what is averaged, who sees it, and that a resumed run goes on with both."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.ema import EMA, averaged_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]


class Module(LightningModule):
    """One weight, batch norm, a counter, a codebook that is a moving average, and a critic that is not averaged."""

    not_averaged = ("critic",)

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.critic = nn.Linear(2, 1)
        self.register_buffer("codebook", torch.zeros(2))
        self.accumulate = accumulate
        self.seen: list[Tensor] = []
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.codebook.add_(1)
        optimizer = self.optimizers()
        self.manual_backward(self.critic(self.norm(self.layer(batch))).square().mean())
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            self.history.append(copy.deepcopy(self.state_dict()))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.layer.weight.detach().clone())
        self.seen_codebook = self.codebook.clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def batches(count: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(4, 2, generator=generator) for _ in range(count)], batch_size=None)


def trainer(*callbacks: Callback, max_steps: int = 4, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(max_steps=max_steps, callbacks=list(callbacks), **(quiet | options))


def closed_form(initial: Tensor, history: list[Tensor], decay: float) -> Tensor:
    average = initial
    for weights in history:
        average = decay * average + (1 - decay) * weights
    return average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_its_closed_form_once_a_step(accumulate: int, tmp_path: Path) -> None:
    module, run = Module(accumulate), trainer(EMA(0.7), max_steps=3)
    initial = copy.deepcopy(module.state_dict())
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(module.history) == 3
    # not layer.bias: batch norm takes it out again, so that its gradient is 0 but for rounding
    for name in ("layer.weight", "norm.weight", "norm.running_mean", "norm.running_var"):
        expected = closed_form(initial[name], [state[name] for state in module.history], 0.7)
        assert torch.allclose(checkpoint["state_dict"][name], expected, atol=1e-6), name
        assert not torch.equal(checkpoint["state_dict"][name], module.state_dict()[name]), name
        assert torch.equal(checkpoint["current_model_state"][name], module.state_dict()[name]), name


def test_codebooks_counters_and_discriminators_are_not_averaged(tmp_path: Path) -> None:
    module, run = Module(), trainer(EMA(0.7))
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    for name in ("codebook", "norm.num_batches_tracked", "critic.weight", "frozen.weight"):
        assert torch.equal(saved[name], module.state_dict()[name]), name
    assert averaged_tensors(module).keys() == {
        *(f"layer.{name}" for name in ("weight", "bias")),
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    }


def test_validation_sees_the_average_and_training_goes_on_without_it() -> None:
    with_average, without = Module(), Module()
    initial = with_average.layer.weight.detach().clone()
    trainer(EMA(0.7), val_check_interval=2).fit(with_average, batches(4), batches(1))
    trainer(EMA(0.0), val_check_interval=2).fit(without, batches(4), batches(1))
    for ours, theirs in zip(with_average.history, without.history, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    weights = [state["layer.weight"] for state in without.history]
    assert torch.equal(without.seen[0], weights[1])
    assert torch.allclose(with_average.seen[0], closed_form(initial, weights[:2], 0.7))
    assert torch.allclose(with_average.seen[1], closed_form(initial, weights, 0.7))
    assert torch.equal(with_average.seen_codebook, torch.full((2,), 4.0))


def resumed(path: Path, ema: EMA) -> tuple[Module, dict[str, Any]]:
    module, run = Module(), trainer(ema, max_steps=4, max_epochs=4)
    run.fit(module, batches(1), ckpt_path=path)
    run.save_checkpoint(path.with_name("resumed.ckpt"))
    return module, torch.load(path.with_name("resumed.ckpt"), weights_only=True)


def test_a_resumed_run_has_the_average_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = trainer(EMA(0.7), max_epochs=4)  # one batch an epoch: every step sees the same data
    whole.fit(Module(), batches(1))
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    half = trainer(EMA(0.7), max_steps=2, max_epochs=4)
    half.fit(Module(), batches(1))
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, ours = resumed(tmp_path / "half.ckpt", EMA(0.7))
    theirs = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())


def test_a_checkpoint_saved_during_validation_holds_both(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    module, run = Module(), trainer(EMA(0.7), Saves(), max_steps=2, val_check_interval=2)
    run.fit(module, batches(2), batches(1))
    run.save_checkpoint(tmp_path / "after.ckpt")
    within, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("within", "after"))
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(within[part][name], value) for name, value in after[part].items()), part


def test_going_on_without_the_average_is_refused(tmp_path: Path) -> None:
    run = trainer(EMA(0.7), max_steps=2)
    run.fit(Module(), batches())
    run.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=r"averages its weights, this one does not(.|\n)*--ema\.decay as it was"):
        resumed(tmp_path / "half.ckpt", EMA(0.0))
    with pytest.raises(ValueError, match=r"run had ema=.*0\.7.*this one .*0\.9"):
        resumed(tmp_path / "half.ckpt", EMA(0.9))


def test_an_average_that_begins_later_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(EMA(0.0), max_steps=2)
    module = Module()
    run.fit(module, batches(1), ckpt_path=None)
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert "current_model_state" not in torch.load(tmp_path / "half.ckpt", weights_only=True)
    with caplog.at_level(logging.WARNING, "callbacks.ema"):
        _, checkpoint = resumed(tmp_path / "half.ckpt", EMA(0.7))
    assert "begins with its weights" in caplog.text
    assert "current_model_state" in checkpoint


def test_a_warm_up_forgets_the_beginning_sooner() -> None:
    assert [EMA(0.9, warmup=True).decay_at(step) for step in (1, 2, 1000)] == [2 / 11, 3 / 12, 0.9]
    assert EMA(0.9).decay_at(1) == 0.9


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_does_not_average_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"must be 0 \(no average\) or lie between 0 and 1"):
        EMA(decay)
