"""`longtake import-weights`: turn what TATS or MeBT has released into bundles. Nothing in the file is executed.

A tokenizer becomes one bundle. A prior, which holds its tokenizers, becomes a folder with a bundle of each, and
`prior.ckpt`, a checkpoint for `longtake sample` and `longtake validate`; MeBT's is itself a bundle too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.import_tats import add_transformer_options, write_transformer
from experiments.messages import HelpFormatter
from models.import_mebt import import_mebt, import_mebt_tokenizer, is_mebt
from models.import_tats import is_tats_transformer
from models.tokenizers import VQGAN3D
from models.weights import import_tats_tokenizer, save_bundle


def main(args: Sequence[str]) -> None:
    """Write `model.safetensors`, `config.json` and `provenance.json` from an official checkpoint."""
    parser = argparse.ArgumentParser(prog="longtake import-weights", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("source", type=Path, help="Lightning checkpoint of the official code")
    parser.add_argument("destination", type=Path, help="folder to make, such as weights/vqgan3d_ucf101")
    parser.add_argument(
        "--downsample",
        type=int,
        nargs=3,
        metavar=("FRAMES", "ROWS", "COLUMNS"),
        help="what one code covers, which no shape tells; by default what the checkpoint says, if it does",
    )
    add_transformer_options(parser)
    options = parser.parse_args(args)
    downsample = tuple(options.downsample) if options.downsample else None
    if is_mebt(options.source):
        write_mebt(options.source, options.destination, downsample)
        return
    if is_tats_transformer(options.source):
        write_transformer(options, downsample)
        return
    tokenizer, config, provenance = import_tats_tokenizer(options.source, downsample)
    save_bundle(options.destination, tokenizer, config, provenance)
    describe_tokenizer(options.destination, tokenizer, provenance)


def describe_tokenizer(folder: Path, tokenizer: VQGAN3D, provenance: dict[str, Any]) -> None:
    """Print what was written."""
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    factors = " x ".join(str(factor) for factor in tokenizer.downsample)
    print(
        f"{folder}: {parameters:,} parameters, {tokenizer.codebook_size:,} codes of {factors} pixels, "
        f"{provenance['downsample_from']} say so"
    )


def write_mebt(source: Path, destination: Path, downsample: tuple[int, int, int] | None) -> None:
    """Write the bundles of a prior and its tokenizer, and a checkpoint that the commands of Lightning read."""
    import lightning
    import torch

    from models.weights import state_digest

    network, config, provenance = import_mebt(source)
    tokenizer, tokenizer_config, tokenizer_provenance = import_mebt_tokenizer(
        source, provenance["tokenizer_file"], downsample
    )
    save_bundle(destination, network, config, provenance)
    save_bundle(destination / "tokenizer", tokenizer, tokenizer_config, tokenizer_provenance)
    t, h, _ = provenance["latent_shape"]
    frames, rows, _ = tokenizer.downsample
    sizes = ("codebook_size", "dim", "num_heads", "num_latents", "blocks")
    hyper_parameters = {name: config["init_args"][name] for name in sizes} | {
        "tokenizer": str(destination / "tokenizer"),
        "num_frames": t * frames,
        "resolution": h * rows,
        "downsample": list(tokenizer.downsample),
    }
    torch.save(
        {
            "state_dict": {f"network.{name}": tensor for name, tensor in network.state_dict().items()},
            "hyper_parameters": hyper_parameters,
            "global_step": provenance["step"],
            "epoch": 0,
            "pytorch-lightning_version": lightning.__version__,
            "tokenizer_digest": state_digest(tokenizer.state_dict()),
        },
        destination / "prior.ckpt",
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{destination}: {parameters:,} parameters, {len(network.kinds)} blocks, clips of {t * frames} frames at "
        f"{h * rows} x {h * rows}"
    )
    describe_tokenizer(destination / "tokenizer", tokenizer, tokenizer_provenance)
    print(f"Sample with --ckpt_path={destination / 'prior.ckpt'} --model.tokenizer={destination / 'tokenizer'}")
