"""A generator whose videos are the true ones, more or less, for tests of what measures it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from models.metrics import Detector, DetectorCard, Preprocessing
from models.random import keyed_generator

FRAMES, RESOLUTION = 9, 32


class ToyGenerator(LightningModule):
    """Its samples are the clips of the batch under noise from their seeds, of the strength that is its one weight."""

    def __init__(self, noise: float = 0.2) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(noise))
        self.frozen = nn.Dropout()
        self.calls: list[dict[str, Any]] = []

    def on_train_start(self) -> None:
        self.frozen.eval()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.noise.square()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # the noise falls by a fifth a step

    def generate(self) -> None: ...

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        self.calls.append({"seeds": seeds, "index": batch["index"], "noise": float(self.noise), "mode": self.training})
        torch.rand(3)  # a careless draw from the global stream
        shape = (3, FRAMES, RESOLUTION, RESOLUTION)
        noise = torch.stack([torch.randn(shape, generator=keyed_generator(seed)) for seed in seeds.tolist()])
        return batch["video"] + self.noise * noise


def toy_detector() -> Detector:
    """Three means of colour and one of their change: fast, and no I3D."""

    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
            change = video.diff(dim=2).abs().mean((1, 2, 3, 4))
            features = torch.cat([video.mean((2, 3, 4)), change[:, None]], dim=1) * self.scale
            return features, features

    return Detector(Means(), DetectorCard("toy", "random, none", 4, 4, Preprocessing(32, "half_pixel")))
