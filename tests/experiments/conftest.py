"""A tiny world: configurations of seconds, written to a temporary folder."""

from pathlib import Path

import pytest
import yaml

TOKENIZER = {
    "class_path": "models.tokenizers.VQGAN3D",
    "init_args": {
        "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": {"base_channels": 4}},
        "quantizer": {
            "class_path": "models.tokenizers.VectorQuantizer",
            "init_args": {"codebook_size": 16, "dim": 8},
        },
        "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": {"base_channels": 4}},
    },
}
DATA = {
    "class_path": "MovingShapesDataModule",
    "init_args": {"num_frames": 16, "resolution": 32, "batch_size": 2, "num_train": 12, "num_val": 4},
}
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 4,
    "check_val_every_n_epoch": None,
    "val_check_interval": 4,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `tokenizer.yaml` and `mebt.yaml`, and the working directory set to it."""
    tokenizer = {
        "data": DATA,
        "model": {"class_path": "VQGAN3DModule", "init_args": {"tokenizer": TOKENIZER, "perceptual_weight": 0.0}},
        "trainer": TRAINER,
        "checkpoint": {"every_n_train_steps": 2},
    }
    mebt = {
        "data": DATA,
        "model": {
            "class_path": "MeBTModule",
            "init_args": {
                "tokenizer": "tokenizer",
                "codebook_size": 16,
                "dim": 16,
                "num_heads": 2,
                "num_latents": 4,
                "blocks": ["latent_enc", "latent_self", "latent_dec", "lt2l", "latent_dec"],
                "sampling": {"num_steps": 3},
            },
        },
        "curriculum": {"schedule": "fraction", "full_length_from": 0.5},
        "trainer": TRAINER,
        "checkpoint": {"every_n_train_steps": 2},
    }
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(tokenizer))
    (tmp_path / "mebt.yaml").write_text(yaml.safe_dump(mebt))
    monkeypatch.chdir(tmp_path)
    return tmp_path
