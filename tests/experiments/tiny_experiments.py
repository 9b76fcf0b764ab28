"""Experiments of a second each: a world of 8 clips, a tokenizer with 16 codes, a prior of width 16."""

import copy
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml

from datamodules.shapes import MovingShapes
from models.random import keyed_generator
from models.tokenizers import VQGAN3D
from models.weights import build, save_bundle

TOKENIZER = {
    "class_path": "models.tokenizers.VQGAN3D",
    "init_args": {
        "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": {"base_channels": 4}},
        "quantizer": {
            "class_path": "models.tokenizers.VectorQuantizer",
            "init_args": {"codebook_size": 16, "dim": 8, "restart_threshold": 1.0},
        },
        "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": {"base_channels": 4}},
    },
}
TOKENIZER_MODULE = {
    "class_path": "VQGAN3DModule",
    "init_args": {
        "tokenizer": TOKENIZER,
        "perceptual_weight": 0.0,
        "discriminator_channels": 4,
        "discriminator_layers": 2,
        "discriminator_start_step": 1,
        "lr": 1.0e-3,
    },
}
MEBT_MODULE = {
    "class_path": "MeBTModule",
    "init_args": {
        "codebook_size": 16,
        "dim": 16,
        "num_heads": 2,
        "num_latents": 4,
        "blocks": ["latent_enc", "latent_self", "latent_dec", "lt2l", "latent_dec"],
        "lr": 1.0e-3,
        "sampling": {"num_steps": 3},
    },
}
EVERY_RUN = {
    # four batches an epoch: six steps reach into the second
    "data": {
        "class_path": "MovingShapesDataModule",
        "init_args": {"num_frames": 16, "resolution": 32, "batch_size": 2, "num_train": 8, "num_val": 4},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "check_val_every_n_epoch": None,
        "val_check_interval": 6,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "probes.Ledger"}],
    },
    "checkpoint": {"every_n_train_steps": 2, "save_top_k": -1},
}


def write_experiment(path: Path, *parts: dict[str, Any], **sections: Any) -> None:
    """Write an experiment file; later parts replace whole sections of earlier ones."""
    content: dict[str, Any] = {}
    for part in (*parts, sections):
        content |= part
    path.write_text(yaml.safe_dump(content))


def write_tiny_experiments(folder: Path, tokenizer: Path) -> None:
    """Write `tokenizer.yaml`, and `mebt.yaml` whose tokenizer is at the path given."""
    write_experiment(folder / "tokenizer.yaml", EVERY_RUN, model=TOKENIZER_MODULE, ema={"decay": 0.5})
    init_args = {**MEBT_MODULE["init_args"], "tokenizer": str(tokenizer)}
    write_experiment(
        folder / "mebt.yaml",
        EVERY_RUN,
        model={**MEBT_MODULE, "init_args": init_args},
        curriculum={"schedule": "fraction", "full_length_from": 0.8},
    )


def make_bundle(folder: Path, **changes: dict[str, Any]) -> VQGAN3D:
    """Write a tokenizer that was not trained, but all of whose codes are in use, and look different.

    Args:
        folder: The bundle to make.
        changes: Arguments for its parts.
    """
    config = copy.deepcopy(TOKENIZER)
    for part, arguments in changes.items():
        config["init_args"][part]["init_args"] |= arguments
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build(config).eval()
    with torch.no_grad():
        video = torch.stack([MovingShapes("train", 4, 16, resolution=32).render(index) for index in range(4)])
        vectors = tokenizer.pre_vq_conv(tokenizer.encoder(tokenizer.to_native(video))).movedim(1, -1).flatten(0, -2)
        order = torch.randperm(len(vectors), generator=keyed_generator(0))
        tokenizer.quantizer.embeddings.copy_(vectors[order[: tokenizer.codebook_size]])
        decoded = tokenizer.decode_native(tokenizer.encode(video).latents)
        tokenizer.decoder.conv_last.conv.weight.mul_(0.3 / decoded.std())  # or all videos would be of one grey
    save_bundle(folder, tokenizer, config, {"source": "a test"})
    return tokenizer


def read_video(path: Path) -> np.ndarray:
    """All frames `[T, H, W, 3]` of a file."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
