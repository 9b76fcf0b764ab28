"""`longtake import-weights`: turn a tokenizer that TATS has released into a bundle. Nothing in the file is executed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.weights import import_tats_tokenizer, save_bundle


def main(args: Sequence[str]) -> None:
    """Write `model.safetensors`, `config.json` and `provenance.json` from an official checkpoint."""
    parser = argparse.ArgumentParser(prog="longtake import-weights", description=__doc__)
    parser.add_argument("source", type=Path, help="Lightning checkpoint of the official code")
    parser.add_argument("destination", type=Path, help="folder to make, such as weights/vqgan3d_ucf101")
    parser.add_argument(
        "--downsample",
        type=int,
        nargs=3,
        metavar=("FRAMES", "ROWS", "COLUMNS"),
        help="what one code covers, which no shape tells; needed if the checkpoint does not say",
    )
    options = parser.parse_args(args)
    downsample = tuple(options.downsample) if options.downsample else None
    tokenizer, config, provenance = import_tats_tokenizer(options.source, downsample)
    save_bundle(options.destination, tokenizer, config, provenance)
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    factors = " x ".join(str(factor) for factor in tokenizer.downsample)
    print(
        f"{options.destination}: {parameters:,} parameters, {tokenizer.codebook_size:,} codes of {factors} pixels, "
        f"{provenance['downsample_from']} say so"
    )
