"""Generators from files: from bundles, which hold all that sampling needs, and from checkpoints."""

import importlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lightning_modules.generator import VideoGenerator
from models.weights import load_state, read_checkpoint


def generator_config(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Class and arguments of the generator that wrote a checkpoint, as plain types.

    Raises:
        ValueError: If none did.
    """
    arguments = dict(checkpoint.get("hyper_parameters") or {})
    class_path = arguments.pop("_class_path", None) or checkpoint.get("class_path")
    arguments.pop("_instantiator", None)
    if class_path is None or "tokenizer_digest" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of a generator: it names no class, or no tokenizer.")
    return {"class_path": class_path, "init_args": arguments}


def build_generator(config: dict[str, Any], tokenizer: str | None = None) -> VideoGenerator:
    """Build a generator from its configuration, with another path to its tokenizer if one is given.

    Raises:
        ValueError: If the class is none of ours.
    """
    package, _, name = config["class_path"].rpartition(".")
    found = getattr(importlib.import_module("lightning_modules"), name, None)
    is_ours = package.split(".")[0] in ("", "lightning_modules")
    if not (is_ours and isinstance(found, type) and issubclass(found, VideoGenerator)):
        raise ValueError(
            f"A bundle asks for {config['class_path']!r}; only generators of `lightning_modules` are built."
        )
    return found(**config["init_args"] | ({"tokenizer": tokenizer} if tokenizer else {}))


def load_generator(path: str | Path, tokenizer: str | Path | None = None) -> VideoGenerator:
    """Load a generator with its tokenizer, to sample from: in eval mode, without gradients.

    Args:
        path: A bundle made by `longtake export`, or a checkpoint. Averaged weights are taken where there are some.
        tokenizer: Where the tokenizer of a checkpoint is now; None looks where it was. A bundle has its own.

    Raises:
        FileNotFoundError: If nothing is there, or a folder that is no bundle.
        ValueError: If it is no generator, its weights do not fit, or the tokenizer is another one.
    """
    path = Path(path)
    if path.is_dir():
        missing = [name for name in ("config.json", "model.safetensors", "tokenizer") if not (path / name).exists()]
        if missing:
            raise FileNotFoundError(f"{path} is no bundle of a generator: it holds no {' and no '.join(missing)}.")
        module = build_generator(json.loads((path / "config.json").read_text()), str(path / "tokenizer"))
        state = load_file(path / "model.safetensors")
        digest = json.loads((path / "provenance.json").read_text())["tokenizer_digest"]
    else:
        checkpoint = read_checkpoint(path)
        module = build_generator(generator_config(checkpoint, path), str(tokenizer) if tokenizer else None)
        state, digest = checkpoint["state_dict"], checkpoint["tokenizer_digest"]
    load_state(module, state, path)
    module.on_load_checkpoint({"tokenizer_digest": digest})  # loads the tokenizer, and compares
    return module.eval().requires_grad_(False)
