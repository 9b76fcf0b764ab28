import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from models.random import keyed_generator


class ToyModule(LightningModule):
    """Trains one number beside a frozen part; its samples are noise from their seeds, and it remembers each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.frozen = nn.Dropout()
        self.calls: list[dict[str, Any]] = []

    def on_train_start(self) -> None:
        self.frozen.eval()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.layer(batch["video"].mean().view(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        modes = {name: module.training for name, module in self.named_modules()}
        self.calls.append(
            {"modes": modes, "grad": torch.is_grad_enabled(), "seeds": seeds, "batch": batch, "step": self.global_step}
        )
        torch.rand(3)  # a careless draw from the global stream
        return torch.stack([torch.rand(3, 5, 8, 6, generator=keyed_generator(s)) * 2 - 1 for s in seeds.tolist()])


class Loader:
    """Hands out what it was given; Lightning takes a bare list for several loaders."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ValidatedToyModule(ToyModule):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass


@pytest.fixture
def toy_module() -> ToyModule:
    return ToyModule()


@pytest.fixture
def validated_module() -> ValidatedToyModule:
    return ValidatedToyModule()


@pytest.fixture
def batches() -> Callable[..., Loader]:
    def make(count: int, batch_size: int = 4, **extra: Any) -> Loader:
        video = torch.zeros(batch_size, 3, 4, 8, 8)
        return Loader([{"video": video, "index": torch.arange(batch_size), **extra} for _ in range(count)])

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: Any) -> Trainer:
        # Lightning 2.6 builds a LeafSpec, which newer versions of torch deprecate; lasts until the end of the test
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        quiet = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        }
        return Trainer(**(quiet | options))

    return make
