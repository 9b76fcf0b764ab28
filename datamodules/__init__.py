"""From files to batches: one LightningDataModule per data set."""

from datamodules.audio import AudioFramesDataModule
from datamodules.bair import BAIRDataModule
from datamodules.captions import CaptionedDataModule
from datamodules.frame_cache import FrameCacheDataModule
from datamodules.frames import FramesDataModule
from datamodules.images import ImageFolderDataModule
from datamodules.k600 import K600DataModule
from datamodules.mixed import MixedDataModule
from datamodules.shapes import MovingShapesDataModule
from datamodules.spectrograms import SpectrogramDataModule
from datamodules.ssv2 import SSV2DataModule
from datamodules.tokens import TokenDataModule
from datamodules.ucf101 import UCF101DataModule

__all__ = [
    "AudioFramesDataModule",
    "BAIRDataModule",
    "CaptionedDataModule",
    "FrameCacheDataModule",
    "FramesDataModule",
    "ImageFolderDataModule",
    "K600DataModule",
    "MixedDataModule",
    "MovingShapesDataModule",
    "SSV2DataModule",
    "SpectrogramDataModule",
    "TokenDataModule",
    "UCF101DataModule",
]
