"""`longtake export`: turn a tokenizer's checkpoint into a bundle that a prior can use and that can be passed on."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.weights import save_bundle, tokenizer_from_checkpoint


def main(args: Sequence[str]) -> None:
    """Write `model.safetensors`, `config.json` and `provenance.json` from a VQGAN3DModule checkpoint."""
    parser = argparse.ArgumentParser(prog="longtake export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a tokenizer run, runs/.../checkpoints/last.ckpt")
    parser.add_argument("destination", type=Path, help="folder to make, such as weights/vqgan3d_ucf101")
    options = parser.parse_args(args)
    tokenizer, config, provenance = tokenizer_from_checkpoint(options.checkpoint)
    save_bundle(options.destination, tokenizer, config, provenance)
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    print(f"{options.destination}: {provenance['weights']} of step {provenance['step']}, {parameters:,} parameters")
