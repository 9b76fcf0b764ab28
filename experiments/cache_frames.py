"""`longtake cache-frames`: decode the videos of an experiment's data module once, at training size."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.messages import HelpFormatter


def main(args: Sequence[str]) -> None:
    """Write the cache that `--data FrameCacheDataModule` trains from; what was interrupted goes on."""
    parser = argparse.ArgumentParser(
        prog="longtake cache-frames",
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog="All other options are those of the data module: --data.root=..., --data.resolution=..., and so on.\n"
        "--data.num_workers processes decode.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help="experiment file, whose data section counts; by default none: give --data=CLASS",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--jpeg",
        type=int,
        metavar="QUALITY",
        help="keep JPEG files of this quality (1 to 95): smaller, lossy; by default raw pixels",
    )
    parser.add_argument("--shard_items", type=int, help="videos of a shard; by default as many as make 128 MiB")
    options, data_words = parser.parse_known_args(args)

    from datamodules.frame_cache import FrameWriter
    from experiments.data_module import data_module

    data = data_module(options.config, data_words, "cache-frames")
    data.prepare_data()
    data.setup("fit")
    FrameWriter(options.out, data, options.jpeg, options.shard_items).run()
    kept = "raw" if options.jpeg is None else f"JPEG {options.jpeg}, lossy"
    print(f"{options.out}: frames of {data.resolution} x {data.resolution} pixels, {kept}")
