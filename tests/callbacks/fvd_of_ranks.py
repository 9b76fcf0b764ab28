"""What one of two processes measures for the tests of FVD: started once for all, by `python fvd_of_ranks.py FOLDER`.

Lightning finds its process group through the environment.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from toy_generator import FRAMES, RESOLUTION, ToyGenerator

from callbacks import FVDEvaluation
from datamodules.shapes import MovingShapesDataModule


def measure(folder: Path, devices: int) -> ToyGenerator:
    """Train one step and measure 5 samples against 5 real clips, with the true random I3D."""
    module = ToyGenerator()
    fvd = FVDEvaluation(every_n_steps=1, num_samples=5, final_samples=0, num_real=5, cache=str(folder / "cache"))
    Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        logger=TensorBoardLogger(str(folder), name="run", version=""),
        callbacks=[fvd],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_val_batches=0,
    ).fit(
        module,
        datamodule=MovingShapesDataModule(
            num_train=8, num_val=7, num_frames=FRAMES, resolution=RESOLUTION, batch_size=1, val_batch_size=2
        ),
    )
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]), devices=2)
