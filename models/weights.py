"""Tokenizers and priors as files: bundles of safetensors and JSON, checkpoints, and the official names of parameters.

A bundle is a folder with `model.safetensors`, `config.json` (class and arguments, recursively) and `provenance.json`
(where the weights came from). Nothing here unpickles foreign objects.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.tokenizers import VQGAN3D

logger = logging.getLogger(__name__)

BUNDLE_VERSION = 1
MANIFEST = "manifest.json"  # beside checkpoints: size, hash and step of each

# TATS' tokenizer: what only its training needs, and the version of how the rest is mapped.
_TATS_TRAINING_ONLY = ("image_discriminator.", "video_discriminator.", "perceptual_model.")
TATS_MAPPING_VERSION = 1

# MeBT: our parameter names and the released ones; the shapes are the same.
_MEBT_NAMES = (
    (r"^token_embedding\.", "tok_emb."),
    (r"^position_embedding$", "pos_emb"),
    (r"^mask_embedding$", "mask_emb"),
    (r"^latent_embedding$", "sos_emb"),
    (r"^norm\.", "transformer.ln_f."),
    (r"^head\.", "transformer.head."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"transformer.blocks.\1.ln\2."),
    (r"^blocks\.(\d+)\.attention\.", r"transformer.blocks.\1.attn."),
    (r"^blocks\.(\d+)\.mlp\.", r"transformer.blocks.\1.mlp."),
)


def official_mebt_name(name: str) -> str:
    """Name in a released MeBT checkpoint of our parameter `name`."""
    return _official_name(name, _MEBT_NAMES)


def _official_name(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    raise KeyError(name)


# TATS: the same for its transformers.
_TATS_NAMES = (
    (r"^token_embedding\.", "transformer.tok_emb."),
    (r"^position_embedding$", "transformer.pos_emb"),
    *_MEBT_NAMES[4:],
)


def official_tats_name(name: str) -> str:
    """Name in a released TATS checkpoint of our parameter `name`."""
    return _official_name(name, _TATS_NAMES)


def state_digest(state: dict[str, Tensor]) -> str:
    """Sha256 over names, types, shapes and values: what identifies a set of weights, whatever file it lies in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build(config: dict[str, Any]) -> Any:
    """Build a network from `{"class_path": ..., "init_args": {...}}`, recursively; only those of `models` are built.

    Raises:
        ValueError: If a class is no network, or lies outside this project's `models` package.
    """
    module_name, _, class_name = config["class_path"].rpartition(".")
    found = None
    if module_name.split(".")[0] == "models":
        with contextlib.suppress(ModuleNotFoundError):
            found = getattr(importlib.import_module(module_name), class_name, None)
    # a module of ours also holds what it imports, and functions that write files
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"A bundle asks for {config['class_path']!r}; only networks of `models` are built.")
    arguments = {
        key: build(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in (config.get("init_args") or {}).items()
    }
    return found(**arguments)


def build_tokenizer(config: dict[str, Any]) -> VQGAN3D:
    """Build a tokenizer, see `build`.

    Raises:
        ValueError: If the configuration is that of another network.
    """
    tokenizer = build(config)
    if not isinstance(tokenizer, VQGAN3D):
        raise ValueError(f"{config['class_path']} is no tokenizer: expected models.tokenizers.VQGAN3D.")
    return tokenizer


def load_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load weights strictly, with one error that lists what does not fit.

    Raises:
        ValueError: If names or shapes differ.
    """
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own.keys() - state.keys()]
    wrong += [f"unexpected {name}" for name in state.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit its configuration: " + "; ".join(sorted(wrong)))
    model.load_state_dict(state)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project without executing anything in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged, or no checkpoint: expected what torch.save writes.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        kinds = ", ".join(re.findall(r"GLOBAL (\S+)", str(error))) or "of an unknown kind"
        raise ValueError(
            f"{path} holds Python objects ({kinds}) besides tensors and plain values. Reading them could run any code: "
            "refused."
        ) from error
    except Exception as error:
        raise ValueError(f"{path} is damaged, or no checkpoint ({str(error).partition('. ')[0]})") from error


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a folder of checkpoints says: file name to `bytes`, `sha256`, `step`, `written`."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def check_whole(path: Path) -> None:
    """Compare a checkpoint with its entry in the manifest, or, where there is none, with its own checksums.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    entry = read_manifest(path.parent).get(path.name)
    if entry is None:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is damaged, or no checkpoint ({error}).") from error
        if bad is not None:
            raise ValueError(f"{path} is damaged: {bad} in it has another checksum than it says.")
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, of {entry['bytes']:,} that were written.")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written.")


class Foreign:
    """Stands for an object of a class that is not ours: it holds the state that was pickled, and does nothing."""

    state: object = None  # of one that was pickled without any: pickle calls no constructor

    def __init__(self, *args: object, **options: object) -> None:
        self.state: object = args

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_foreign_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of another project without executing anything in it.

    Torch's restricted reader takes tensors and plain values. Whatever else the file names becomes an inert `Foreign`
    instead of what its name says, such as the `argparse.Namespace` of old Lightning checkpoints.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read that way.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert: list[Any] = [(type(name.rpartition(".")[2], (Foreign,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            # mapped: the moments of the optimizer, most of such a file, are never read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        kinds = ", ".join(re.findall(r"GLOBAL (\S+)", str(error))) or "what is neither tensor nor plain value"
        raise ValueError(f"{path} asks for {kinds}. That could run any code: refused.") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged, or no checkpoint of torch 1.6 or later ({reason}).") from error


def import_tats_tokenizer(
    path: Path, downsample: tuple[int, int, int] | None = None, prefix: str = ""
) -> tuple[VQGAN3D, dict[str, Any], dict[str, Any]]:
    """Read a tokenizer that TATS has released (or MeBT, whose tokenizer is the same).

    Widths, the codebook and the kind of norm are read off the tensors' shapes, factors are not: all kernels look alike.
    The release's pixel range [-0.5, 0.5], batch statistics and borders are part of the configuration. Discriminators
    and the perceptual network are left out.

    Args:
        path: A Lightning checkpoint of the official code.
        downsample: Frames, rows and columns that one code covers; None takes them from the stored hyper-parameters.
        prefix: Beginning of the tokenizer's names, in a checkpoint that holds more.

    Returns:
        The tokenizer, the configuration that `build` makes it from, and where its weights come from.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read safely, is no such tokenizer, lacks tensors or holds others, or does not say
            what its shapes do not tell.
    """
    checkpoint = read_foreign_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it holds no state_dict.")
    stored = (checkpoint.get("hyper_parameters") or {}).get("args")
    arguments = stored.state if isinstance(stored, Foreign) and isinstance(stored.state, dict) else {}
    names = {name: name[len(prefix) :] for name in checkpoint["state_dict"] if name.startswith(prefix)}
    state = {
        re.sub(r"^codebook\.", "quantizer.", name): checkpoint["state_dict"][whole]
        for whole, name in names.items()
        if not name.startswith(_TATS_TRAINING_ONLY)
    }
    if foreign := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path} holds what is no tensor among its weights: {', '.join(foreign)}.")
    first, codebook = state.get("encoder.conv_first.conv.weight"), state.get("quantizer.embeddings")
    if first is None or codebook is None:
        raise ValueError(f"{path} is no tokenizer of TATS: it holds no encoder.conv_first or no codebook.embeddings.")
    factors = list(downsample or arguments.get("downsample") or [])
    if len(factors) != 3:
        raise ValueError(f"{path} does not say how much it downsamples: give --downsample, such as --downsample 4 8 8.")
    if arguments.get("padding_type", "replicate") != "replicate":
        raise ValueError(
            f"{path} was trained with padding_type={arguments['padding_type']}, which the official code used in a part "
            "of the network only; only `replicate` can be imported."
        )
    state["quantizer.initialized"] = torch.tensor(True)
    norm = "batch" if "encoder.final_block.0.running_mean" in state else "group"
    part = {"base_channels": first.shape[0], "downsample": factors, "norm": norm, "padding": "replicate"}
    restarts = not arguments.get("no_random_restart", False)
    quantizer = {
        "codebook_size": codebook.shape[0],
        "dim": codebook.shape[1],
        "restart_threshold": float(arguments.get("restart_thres", 1.0)) if restarts else 0.0,
        "released_restart": True,
    }
    config = {
        "class_path": "models.tokenizers.VQGAN3D",
        "init_args": {
            "encoder": {
                "class_path": "models.tokenizers.TimeAgnosticEncoder",
                "init_args": {"in_channels": first.shape[1], **part},
            },
            "quantizer": {"class_path": "models.tokenizers.VectorQuantizer", "init_args": quantizer},
            "decoder": {
                "class_path": "models.tokenizers.TimeAgnosticDecoder",
                "init_args": {"out_channels": first.shape[1], **part},
            },
            "pixel_range": [-0.5, 0.5],
        },
    }
    tokenizer = build_tokenizer(config)
    load_state(tokenizer, state, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": path.name,
        "source_sha256": digest,
        "step": checkpoint.get("global_step"),
        "weights": "weights released by TATS",
        "mapping": "tats tokenizer",
        "mapping_version": TATS_MAPPING_VERSION,
        "downsample_from": "--downsample" if downsample else "the stored hyper-parameters",
    }
    return tokenizer, config, provenance


def tokenizer_from_checkpoint(path: Path) -> tuple[VQGAN3D, dict[str, Any], dict[str, Any]]:
    """Read the tokenizer of a VQGAN3DModule checkpoint.

    Weight averaging saves the average as `state_dict`, beside the raw weights under a key of its own. So the averaged
    weights are taken when there are any, and the provenance says which they are.

    Returns:
        The tokenizer, the configuration that `build` makes it from, and where its weights come from.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a tokenizer, or its weights do not fit its configuration.
    """
    checkpoint = read_checkpoint(path)
    config = (checkpoint.get("hyper_parameters") or {}).get("tokenizer")
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no tokenizer checkpoint: its hyper-parameters name no tokenizer.")
    state = {
        name.removeprefix("tokenizer."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("tokenizer.")
    }
    tokenizer = build_tokenizer(config)
    load_state(tokenizer, state, path)
    provenance = {
        "source": path.name,
        "step": checkpoint["global_step"],
        "weights": "averaged weights" if "current_model_state" in checkpoint else "raw weights",
    }
    return tokenizer, config, provenance


def save_bundle(folder: Path, model: nn.Module, config: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write a bundle so that it appears whole or not at all.

    Raises:
        FileExistsError: If the folder exists already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already. Remove it first, or choose another destination.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        save_file(state, new / "model.safetensors")
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        details = {"bundle_version": BUNDLE_VERSION, "digest": state_digest(state), **provenance}
        (new / "provenance.json").write_text(json.dumps(details, indent=2) + "\n")
        os.replace(new, folder)


def load_tokenizer(path: str | Path) -> VQGAN3D:
    """Load a tokenizer for frozen use: in eval mode, without gradients.

    Args:
        path: A bundle folder, or a checkpoint of VQGAN3DModule.

    Raises:
        FileNotFoundError: If nothing is there, or a folder that is no bundle.
        ValueError: If it is no tokenizer, or the weights do not fit the configuration beside them.
    """
    path = Path(path)
    if path.is_dir():
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} is no tokenizer bundle: it holds no {' and no '.join(missing)}.")
        tokenizer = build_tokenizer(json.loads((path / "config.json").read_text()))
        load_state(tokenizer, load_file(path / "model.safetensors"), path)
    else:
        tokenizer, _, provenance = tokenizer_from_checkpoint(path)
        logger.info("Tokenizer %s: %s of step %d.", path, provenance["weights"], provenance["step"])
    return tokenizer.eval().requires_grad_(False)


def load_prior(path: str | Path) -> nn.Module:
    """Load a prior for frozen use: in eval mode, without gradients.

    Args:
        path: A bundle folder that `longtake import-weights` has made, or a checkpoint that MeBT has released.

    Returns:
        The network; MeBT's is called as `network(codes [B, N], context [B, S], targets [B, M])`.

    Raises:
        FileNotFoundError: If nothing is there, or a folder that is no bundle.
        ValueError: If it is no prior, or the weights do not fit the configuration beside them.
    """
    from models.import_mebt import import_mebt  # which itself needs what is above

    path = Path(path)
    if path.is_dir():
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} is no bundle: it holds no {' and no '.join(missing)}.")
        config = json.loads((path / "config.json").read_text())
        if not config["class_path"].startswith("models.priors."):
            raise ValueError(f"{config['class_path']} is no prior: expected a network of models.priors.")
        network: nn.Module = build(config)
        load_state(network, load_file(path / "model.safetensors"), path)
    else:
        network, _, _ = import_mebt(path)
    return network.eval().requires_grad_(False)
