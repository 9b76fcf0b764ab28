"""From files to batches: one LightningDataModule per data set."""

from datamodules.audio import AudioFramesDataModule
from datamodules.captions import CaptionedDataModule
from datamodules.frames import FramesDataModule
from datamodules.images import ImageFolderDataModule
from datamodules.mixed import MixedDataModule
from datamodules.shapes import MovingShapesDataModule
from datamodules.tokens import TokenDataModule
from datamodules.ucf101 import UCF101DataModule

__all__ = [
    "AudioFramesDataModule",
    "CaptionedDataModule",
    "FramesDataModule",
    "ImageFolderDataModule",
    "MixedDataModule",
    "MovingShapesDataModule",
    "TokenDataModule",
    "UCF101DataModule",
]
