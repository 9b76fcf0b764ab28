"""One LightningModule a paper: what is learned, how it is optimised and logged, how it samples."""

from lightning_modules.commit import COMMITModule
from lightning_modules.mebt import MeBTModule
from lightning_modules.tats import TATSModule
from lightning_modules.vqgan3d import VQGAN3DModule
from lightning_modules.walt import WALTModule

__all__ = ["COMMITModule", "MeBTModule", "TATSModule", "VQGAN3DModule", "WALTModule"]
