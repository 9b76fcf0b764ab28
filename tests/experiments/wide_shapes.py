"""Moving shapes that are wider than high, for experiments of 9:16."""

from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules import MovingShapesDataModule
from datamodules.sampler import ClipRequest
from datamodules.video import Split


class WideShapes(Dataset[dict[str, Any]]):
    """Clips, and beside each its mirror image, as far as there is room."""

    def __init__(self, clips: Dataset[dict[str, Any]], width: int) -> None:
        self.clips = clips
        self.width = width

    def __len__(self) -> int:
        return len(self.clips)  # type: ignore[arg-type]

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        item = self.clips[request]
        return item | {"video": torch.cat([item["video"], item["video"].flip(3)], dim=3)[..., : self.width]}


class WideShapesDataModule(MovingShapesDataModule):
    def __init__(
        self,
        width: int,
        num_train: int = 64,
        num_val: int = 4,
        num_frames: int = 9,
        resolution: int = 32,
        texture: float = 0.0,
        captions: bool = False,
        stills: bool = False,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_train=num_train,
            num_val=num_val,
            num_frames=num_frames,
            resolution=resolution,
            texture=texture,
            captions=captions,
            stills=stills,
            batch_size=batch_size,
            seed=seed,
        )
        self.width = width

    def make_dataset(self, split: Split) -> WideShapes:  # type: ignore[override]
        return WideShapes(super().make_dataset(split), self.width)
