"""`longtake export`: turn a checkpoint into a bundle to pass on: safetensors and JSON, nothing that executes.

A tokenizer's bundle is what priors take. A generator's bundle is self-contained: `longtake sample --bundle` and
`lightning_modules.load.load_generator` need nothing besides. It holds the generator (`model.safetensors`,
`config.json`), its tokenizer as a bundle of its own (`tokenizer/`), where both came from (`provenance.json`), and what
the command line needs to know (`experiment.yaml`, without paths of the machine that it was trained on).
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.messages import HelpFormatter
from models.weights import read_checkpoint, save_bundle, tokenizer_from_checkpoint


def main(args: Sequence[str]) -> None:
    """Write the bundle of a tokenizer's or a generator's checkpoint."""
    parser = argparse.ArgumentParser(
        prog="longtake export", description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a run, runs/.../checkpoints/last.ckpt")
    parser.add_argument("destination", type=Path, help="folder to make, such as weights/vqgan3d_ucf101")
    parser.add_argument("--tokenizer", type=Path, help="of a generator, where it is now; by default where it was")
    options = parser.parse_args(args)
    content = read_checkpoint(options.checkpoint)
    if "tokenizer_digest" in content:
        provenance, parameters = export_generator(content, options.checkpoint, options.destination, options.tokenizer)
    else:
        tokenizer, config, provenance = tokenizer_from_checkpoint(options.checkpoint)
        save_bundle(options.destination, tokenizer, config, provenance)
        parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    print(f"{options.destination}: {provenance['weights']} of step {provenance['step']}, {parameters:,} parameters")


def export_generator(
    checkpoint: dict[str, Any], path: Path, destination: Path, tokenizer: Path | None
) -> tuple[dict[str, Any], int]:
    """Write a generator's bundle so that it appears whole or not at all.

    Args:
        checkpoint: What the file at `path` holds.
        path: Of the checkpoint.
        destination: Folder to make.
        tokenizer: Where its tokenizer is; None looks where it was.

    Returns:
        Where the weights come from, and how many parameters they are.

    Raises:
        FileExistsError: If the destination exists.
        FileNotFoundError: If the tokenizer is not there.
        ValueError: If the tokenizer is another one, or the weights do not fit.
    """
    from lightning_modules.load import generator_config, load_generator

    if destination.exists():
        raise FileExistsError(f"{destination} exists already. Remove it first, or choose another destination.")
    config = generator_config(checkpoint, path)
    module = load_generator(path, tokenizer)
    source = Path(module.tokenizer_path)
    if source.is_dir():
        tokenizer_config = json.loads((source / "config.json").read_text())
        tokenizer_provenance = json.loads((source / "provenance.json").read_text())
    else:
        _, tokenizer_config, tokenizer_provenance = tokenizer_from_checkpoint(source)
    config["init_args"]["tokenizer"] = "tokenizer"
    if (config["init_args"].get("sampling") or {}).get("interpolation"):
        config["init_args"]["sampling"]["interpolation"] = None  # a file beside the bundle, named when sampling
    provenance = {
        "source": path.name,
        "step": checkpoint["global_step"],
        "weights": "averaged weights" if "current_model_state" in checkpoint else "raw weights",
        "tokenizer_digest": checkpoint["tokenizer_digest"],
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".bundle-") as scratch:
        new = Path(scratch) / destination.name
        save_bundle(new, module, config, provenance)
        save_bundle(new / "tokenizer", module.tokenizer, tokenizer_config, tokenizer_provenance)
        experiment = yaml.safe_dump(bundled_experiment(checkpoint, config))
        (new / "experiment.yaml").write_text(experiment)
        os.replace(new, destination)
    return provenance, sum(parameter.numel() for parameter in module.parameters())


def bundled_experiment(checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the command line needs: the model, the data without paths, the precision."""
    arguments = config["init_args"]
    run = checkpoint.get("config") or {}
    size = {name: arguments[name] for name in ("num_frames", "resolution")}
    data = run.get("data") or {"class_path": "datamodules.MovingShapesDataModule", "init_args": size}
    kept = {
        name: value for name, value in data["init_args"].items() if not (isinstance(value, str) and os.sep in value)
    }
    linked = {"num_frames", "resolution", "seed", "tokenizer"}
    return {
        "seed_everything": arguments["seed"],
        "model": {
            "class_path": config["class_path"],
            "init_args": {name: value for name, value in arguments.items() if name not in linked},
        },
        "data": {"class_path": data["class_path"], "init_args": kept | size},
        "trainer": {"precision": (run.get("trainer") or {}).get("precision") or "32-true", "devices": 1},
    }
