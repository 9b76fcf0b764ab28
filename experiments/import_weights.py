"""`longtake import-weights`: turn what TATS has released into bundles. Nothing in the file is executed.

A tokenizer becomes one bundle. A transformer, which holds its tokenizers, becomes a folder with a bundle of each, and
`prior.ckpt`, a checkpoint for `longtake sample`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.import_tats import add_transformer_options, write_transformer
from models.import_tats import is_tats_transformer
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
    add_transformer_options(parser)
    options = parser.parse_args(args)
    downsample = tuple(options.downsample) if options.downsample else None
    if is_tats_transformer(options.source):
        write_transformer(options, downsample)
        return
    tokenizer, config, provenance = import_tats_tokenizer(options.source, downsample)
    save_bundle(options.destination, tokenizer, config, provenance)
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    factors = " x ".join(str(factor) for factor in tokenizer.downsample)
    print(
        f"{options.destination}: {parameters:,} parameters, {tokenizer.codebook_size:,} codes of {factors} pixels, "
        f"{provenance['downsample_from']} say so"
    )
