"""From files to batches: one LightningDataModule per data set."""

from datamodules.bair import BAIRDataModule
from datamodules.frame_cache import FrameCacheDataModule
from datamodules.frames import FramesDataModule
from datamodules.k600 import K600DataModule
from datamodules.shapes import MovingShapesDataModule
from datamodules.ssv2 import SSV2DataModule
from datamodules.tokens import TokenDataModule
from datamodules.ucf101 import UCF101DataModule

__all__ = [
    "BAIRDataModule",
    "FrameCacheDataModule",
    "FramesDataModule",
    "K600DataModule",
    "MovingShapesDataModule",
    "SSV2DataModule",
    "TokenDataModule",
    "UCF101DataModule",
]
