"""`longtake cache-frames`: decode the videos of an experiment's data module once, at training size."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(args: Sequence[str]) -> None:
    """Write the cache that `--data FrameCacheDataModule` trains from; what was interrupted goes on."""
    parser = argparse.ArgumentParser(
        prog="longtake cache-frames",
        description=__doc__,
        epilog="All other options are those of the data module: --data.root=..., --data.resolution=..., and so on. "
        "--data.num_workers processes decode.",
    )
    parser.add_argument("--config", type=Path, action="append", default=[], help="experiment file; its data section")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--jpeg", type=int, metavar="QUALITY", help="keep JPEG files (1 to 95) instead of raw pixels: smaller, lossy"
    )
    parser.add_argument("--shard_items", type=int, help="videos of a shard; by default as many as make 128 MiB")
    options, data_words = parser.parse_known_args(args)

    from datamodules.frame_cache import FrameWriter

    data = data_module(options.config, data_words)
    data.prepare_data()
    data.setup("fit")
    FrameWriter(options.out, data, options.jpeg, options.shard_items).run()
    kept = "raw" if options.jpeg is None else f"JPEG {options.jpeg}, lossy"
    print(f"{options.out}: frames of {data.resolution} x {data.resolution} pixels, {kept}")


def data_module(experiments: Sequence[Path], words: Sequence[str]) -> Any:
    """Build the data module of an experiment, without its model.

    Args:
        experiments: Files whose `data` sections count, and those of the files that their `base` names.
        words: Options for the data module, which come last.
    """
    import yaml
    from jsonargparse import ArgumentParser

    import datamodules  # noqa: F401  (class names work without their path once imported)
    from datamodules.video import VideoDataModule
    from experiments.lightning_cli import expanded_configs, refuse_linked_values

    files = [file for experiment in experiments for file in expanded_configs(experiment)]
    refuse_linked_values(words, files)
    parser = ArgumentParser(prog="longtake cache-frames")
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int, default=42)
    parser.add_subclass_arguments(VideoDataModule, "data", required=True)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    with tempfile.TemporaryDirectory() as folder:
        sections = []
        for number, file in enumerate(files):
            content = yaml.safe_load(file.read_text()) or {}
            section = Path(folder) / f"{number}.yaml"
            section.write_text(
                yaml.safe_dump({key: content[key] for key in ("data", "seed_everything") if key in content})
            )
            sections.append(f"--config={section}")
        config = parser.parse_args([*sections, *words])
    return parser.instantiate_classes(config).data
