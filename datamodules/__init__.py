"""From files to batches: one LightningDataModule per data set."""

from datamodules.frames import FramesDataModule
from datamodules.shapes import MovingShapesDataModule
from datamodules.tokens import TokenDataModule
from datamodules.ucf101 import UCF101DataModule

__all__ = ["FramesDataModule", "MovingShapesDataModule", "TokenDataModule", "UCF101DataModule"]
