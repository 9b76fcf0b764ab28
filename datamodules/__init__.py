"""From files to batches: one LightningDataModule per data set."""

from datamodules.frame_cache import FrameCacheDataModule
from datamodules.frames import FramesDataModule
from datamodules.shapes import MovingShapesDataModule
from datamodules.tokens import TokenDataModule
from datamodules.ucf101 import UCF101DataModule

__all__ = ["FrameCacheDataModule", "FramesDataModule", "MovingShapesDataModule", "TokenDataModule", "UCF101DataModule"]
