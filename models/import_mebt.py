"""Released MeBT checkpoints: one file holds the prior and its tokenizer.

The kinds of the blocks and the number of heads are not in the weights, whose shapes fit any order: they come from the
stored hyper-parameters, OmegaConf objects that are read as what they hold, without running any code.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from models.priors.mebt import BlockKind, MeBT
from models.tokenizers import VQGAN3D
from models.weights import (
    Foreign,
    build,
    import_tats_tokenizer,
    load_state,
    official_mebt_name,
    read_foreign_checkpoint,
)

MEBT_MAPPING_VERSION = 1
TOKENIZER_PREFIX = "first_stage_model."


def plain(node: Any) -> Any:
    """What an OmegaConf object holds, as dictionaries, lists and values; anything else is returned as it is."""
    if isinstance(node, Foreign) and isinstance(node.state, dict):
        for key in ("_content", "_val"):
            if key in node.state:
                return plain(node.state[key])
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return node


def import_mebt(path: Path) -> tuple[MeBT, dict[str, Any], dict[str, Any]]:
    """Read a prior that MeBT has released.

    Width, positions, latents and codebook are read off the tensors' shapes; heads, kinds of blocks and the latent grid
    come from the stored hyper-parameters.

    Args:
        path: A Lightning checkpoint of the official code.

    Returns:
        The network, the configuration that `build` makes it from, and where its weights come from, with the
        `latent_shape` of its clips.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read safely, is no such prior, lacks tensors or holds others, or does not say what
            its shapes do not tell.
    """
    checkpoint = read_foreign_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it holds no state_dict.")
    state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith(TOKENIZER_PREFIX)}
    if foreign := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path} holds what is no tensor among its weights: {', '.join(foreign)}.")
    missing = [name for name in ("tok_emb.weight", "pos_emb", "mask_emb", "sos_emb") if name not in state]
    if missing:
        raise ValueError(f"{path} is no prior of MeBT: it holds no {' and no '.join(missing)}.")
    stored = plain(checkpoint.get("hyper_parameters") or {})
    settings, mask = stored.get("transformer_config") or {}, (stored.get("mask_config") or {}).get("params") or {}
    unknown = [
        name
        for name, value in (
            ("n_head", settings.get("n_head")),
            ("mode", settings.get("mode")),
            ("n_layer", settings.get("n_layer")),
            ("mask_config.params.shape", mask.get("shape")),
        )
        if not value
    ]
    if unknown:
        raise ValueError(f"{path} does not say {', '.join(unknown)} in its hyper-parameters, which no shape tells.")
    modes = list(settings["mode"])
    modes += ["maskgit"] * (settings["n_layer"] - len(modes))  # as the official code fills up
    if foreign := sorted({str(mode) for mode in modes} - set(get_args(BlockKind))):
        raise ValueError(f"{path} has blocks of unknown kinds: {', '.join(foreign)}.")
    codebook_size, dim = state["tok_emb.weight"].shape
    latent_shape = [int(size) for size in mask["shape"]]
    num_tokens = state["pos_emb"].shape[1]
    if math.prod(latent_shape) != num_tokens:
        raise ValueError(f"{path} has {num_tokens} positions, but clips of {latent_shape} codes.")
    config = {
        "class_path": "models.priors.mebt.MeBT",
        "init_args": {
            "codebook_size": codebook_size,
            "num_tokens": num_tokens,
            "dim": dim,
            "num_heads": int(settings["n_head"]),
            "num_latents": state["sos_emb"].shape[1],
            "blocks": modes,
            "dropout": float(settings.get("resid_pdrop") or 0.0),
        },
    }
    network = build(config)
    names = {name: official_mebt_name(name) for name in network.state_dict()}
    official = set(names.values())
    ours = {name: state[theirs] for name, theirs in names.items() if theirs in state}
    load_state(network, ours | {name: value for name, value in state.items() if name not in official}, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": path.name,
        "source_sha256": digest,
        "step": checkpoint.get("global_step"),
        "weights": "weights released by MeBT",
        "mapping": "mebt prior",
        "mapping_version": MEBT_MAPPING_VERSION,
        "latent_shape": latent_shape,
        "tokenizer_file": Path(
            str((plain(stored.get("first_stage_config")) or {}).get("params", {}).get("ckpt_path"))
        ).name,
    }
    return network, config, provenance


def import_mebt_tokenizer(
    path: Path, tokenizer_file: str, downsample: tuple[int, int, int] | None = None
) -> tuple[VQGAN3D, dict[str, Any], dict[str, Any]]:
    """Read the tokenizer inside a prior that MeBT has released.

    Args:
        path: The prior's checkpoint.
        tokenizer_file: Name of the tokenizer's own file, from the prior's provenance: its `488` stands for 4 x 8 x 8.
        downsample: Frames, rows and columns that one code covers, if the name does not say so.

    Returns:
        As `import_tats_tokenizer`.

    Raises:
        ValueError: As `import_tats_tokenizer`.
    """
    named = re.findall(r"_(\d)(\d)(\d)(?=[_.]|$)", tokenizer_file)  # the last one: before it comes the resolution
    factors = downsample or ((int(named[-1][0]), int(named[-1][1]), int(named[-1][2])) if named else None)
    tokenizer, config, provenance = import_tats_tokenizer(path, factors, TOKENIZER_PREFIX)
    if downsample is None:
        provenance["downsample_from"] = f"the name {tokenizer_file} and the stored hyper-parameters"
    return tokenizer, config, provenance


def is_mebt(path: Path) -> bool:
    """Whether a checkpoint of another project is a prior of MeBT's, by the names of its tensors."""
    checkpoint = read_foreign_checkpoint(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    return isinstance(state, dict) and {"tok_emb.weight", "sos_emb", "mask_emb"} <= state.keys()
