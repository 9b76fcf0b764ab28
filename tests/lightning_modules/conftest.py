"""A tokenizer of toy size, as a bundle on the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.shapes import MovingShapes
from models.random import keyed_generator
from models.weights import build, save_bundle

TOKENIZER: dict[str, Any] = {
    "class_path": "models.tokenizers.VQGAN3D",
    "init_args": {
        "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": {"base_channels": 2}},
        "quantizer": {
            "class_path": "models.tokenizers.VectorQuantizer",
            "init_args": {"codebook_size": 16, "dim": 4},
        },
        "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": {"base_channels": 2}},
    },
}


@pytest.fixture(scope="session")
def tokenizer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; 4 x 8 x 8 pixels a code, 16 codes that the encoder really uses on moving shapes."""
    torch.manual_seed(0)
    tokenizer = build(TOKENIZER).eval()
    with torch.no_grad():
        video = torch.stack([MovingShapes("train", 4, 16, resolution=32).render(index) for index in range(4)])
        vectors = tokenizer.pre_vq_conv(tokenizer.encoder(tokenizer.to_native(video))).movedim(1, -1).flatten(0, -2)
        tokenizer.quantizer.embeddings.copy_(vectors[torch.randperm(len(vectors), generator=keyed_generator(0))[:16]])
    folder = tmp_path_factory.mktemp("tokenizers") / "toy"
    save_bundle(folder, tokenizer, TOKENIZER, {"source": "a test"})
    return folder
