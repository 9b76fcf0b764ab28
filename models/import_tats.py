"""Transformers that TATS has released: from a checkpoint of the official code to network, tokenizers and settings.

Such a file holds the transformer (`transformer.`), the tokenizer that it was trained on (`first_stage_model.`), the one
of the sound if it hears (`cond_stage_model.`), and the options of its run. What no shape tells (the number of heads,
strides, how manieth latent frames) comes from these options, or has to be given.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.priors.tats import TATS, AttentionMask, attention_mask
from models.tokenizers import VQGAN3D
from models.weights import (
    import_tats_tokenizer,
    load_state,
    official_tats_name,
    read_foreign_checkpoint,
)

MAPPING_VERSION = 1
CLIP_VOCABULARY, TEXT_LENGTH = 49408, 256
SPECTROGRAM = (64, 16)
_MASK = re.compile(r"transformer\.blocks\.\d+\.attn\.mask")


@dataclass(frozen=True)
class ReleasedTATS:
    """What a released file is.

    Args:
        network: The transformer.
        tokenizers: What `import_tats_tokenizer` gives: `tokenizer` of the video, and `audio_tokenizer` if there is
            sound.
        settings: Arguments of `TATSModule` but the paths of the tokenizers.
        provenance: Where the weights come from.
    """

    network: TATS
    tokenizers: dict[str, tuple[VQGAN3D, dict[str, Any], dict[str, Any]]]
    settings: dict[str, Any]
    provenance: dict[str, Any]


def is_tats_transformer(path: Path) -> bool:
    """Whether a file is a released transformer of TATS."""
    return _holds_transformer(read_foreign_checkpoint(path))


def _holds_transformer(checkpoint: Any) -> bool:
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    return isinstance(state, dict) and "transformer.tok_emb.weight" in state


def import_tats_transformer(
    path: Path,
    downsample: tuple[int, int, int] | None = None,
    audio_downsample: tuple[int, int, int] | None = None,
    resolution: int | None = None,
    num_heads: int | None = None,
) -> ReleasedTATS:
    """Read a released transformer: base, class, text, sound, key frames or the frames between them.

    The interpolation is recognised by its mask, which must be the same in all blocks, and that of our network.

    Args:
        path: A Lightning checkpoint of the official code.
        downsample: Pixel frames, rows and columns that one code covers; a transformer's file does not say.
        audio_downsample: The same of the sound's tokenizer: frames, bands and columns.
        resolution: Height and width of the video; None takes the run's option.
        num_heads: Attention heads; None takes the run's option.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read safely, is no such transformer, or does not say what its shapes do not tell.
    """
    checkpoint = read_foreign_checkpoint(path)
    if not _holds_transformer(checkpoint):
        raise ValueError(f"{path} is no transformer of TATS: it holds no transformer.tok_emb.weight.")
    hyper_parameters = checkpoint.get("hyper_parameters") or {}
    stored = getattr(hyper_parameters.get("args"), "state", None)  # of a `Foreign`, which has none if it was empty
    arguments = stored if isinstance(stored, dict) else {}
    state: dict[str, Tensor] = checkpoint["state_dict"]
    if foreign := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path} holds what is no tensor among its weights: {', '.join(foreign)}.")
    if downsample is None:
        raise ValueError(
            f"{path} does not say how much its tokenizer downsamples: give --downsample, such as --downsample 4 8 8."
        )
    resolution = resolution or arguments.get("resolution")
    num_heads = num_heads or arguments.get("n_head")
    for name, value in (("resolution", resolution), ("num_heads", num_heads)):
        if not isinstance(value, int):
            raise ValueError(f"{path} does not say its {name}, and no shape tells: give --{name}.")
    assert resolution is not None
    assert num_heads is not None

    tokenizers = {"tokenizer": import_tats_tokenizer(path, downsample, "first_stage_model.")}
    hearing = any(name.startswith("cond_stage_model.") for name in state)
    if hearing:
        if audio_downsample is None:
            raise ValueError(f"{path} hears: give what a code of its sound covers, such as --audio_downsample 4 8 8.")
        tokenizers["audio_tokenizer"] = import_tats_tokenizer(path, audio_downsample, "cond_stage_model.")
    codebook_size = tokenizers["tokenizer"][0].codebook_size
    assert codebook_size is not None  # TATS' quantizer has codes

    width, block_size = state["transformer.tok_emb.weight"].shape[1], state["transformer.pos_emb"].shape[1]
    condition_size = len(state["transformer.tok_emb.weight"]) - codebook_size
    rows, columns = resolution // downsample[1], resolution // downsample[2]
    stride = max(1, int(arguments.get("sample_every_n_latent_frames") or 0))
    reads = not hearing and (hyper_parameters.get("cond_stage_key") == "text" or condition_size == CLIP_VOCABULARY)

    def condition_length(latent_frames: int) -> int:
        if hearing and audio_downsample is not None:
            sizes = (latent_frames * stride * downsample[0], *SPECTROGRAM)
            lengths = [size // factor for size, factor in zip(sizes, audio_downsample, strict=True)]
            return lengths[0] * lengths[1] * lengths[2]
        return TEXT_LENGTH if reads else 1

    frames = 0
    while condition_length(frames + 1) + (frames + 1) * rows * columns - 1 <= block_size:
        frames += 1
    if frames == 0:
        raise ValueError(
            f"{path} has {block_size} positions, too few for a latent frame of {rows} x {columns} after "
            f"{condition_length(1)} condition tokens: are --downsample and --resolution those of its run?"
        )
    length = condition_length(frames)
    mask = _mask_kind(state, block_size, length, rows * columns, arguments, path)
    depth = len({name.split(".")[2] for name in state if name.startswith("transformer.blocks.")})
    network = TATS(
        codebook_size,
        (frames, rows, columns),
        width,
        depth,
        num_heads,
        condition_size=condition_size,
        condition_length=length,
        mask=mask,
        block_size=block_size,
    )
    official = {official_tats_name(name): name for name in network.state_dict()}
    weights = {
        official.get(name, name): tensor
        for name, tensor in state.items()
        if name.startswith("transformer.") and not _MASK.fullmatch(name)
    }
    load_state(network, weights, path)

    settings: dict[str, Any] = {
        "num_frames": frames * stride * downsample[0],
        "resolution": resolution,
        "downsample": list(downsample),
        "codebook_size": codebook_size,
        "num_classes": 0 if reads or hearing else condition_size,
        "latent_stride": stride,
        "mask": mask,
        "released": mask != "causal",
        "pkeep": float(hyper_parameters.get("pkeep", 1.0)),
        "dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "block_size": block_size,
    }
    if reads:
        settings |= {"text_vocabulary": condition_size, "text_length": length}
    if hearing and audio_downsample is not None:
        settings |= {"audio_downsample": list(audio_downsample), "audio_codebook_size": condition_size}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": path.name,
        "source_sha256": digest,
        "step": checkpoint.get("global_step"),
        "weights": "weights released by TATS",
        "mapping": "tats transformer",
        "mapping_version": MAPPING_VERSION,
    }
    return ReleasedTATS(network.eval(), tokenizers, settings, provenance)


def _mask_kind(
    state: dict[str, Tensor], block_size: int, length: int, frame_tokens: int, arguments: dict[str, Any], path: Path
) -> AttentionMask:
    """Which of our masks the blocks hold; without any, what the run's option `n_unmasked` says."""
    masks = [tensor for name, tensor in state.items() if _MASK.fullmatch(name)]
    if not masks:
        return "closed_boundaries" if arguments.get("n_unmasked") else "causal"
    kinds: tuple[AttentionMask, ...] = ("causal", "closed_boundaries")
    for kind in kinds:
        ours = attention_mask(kind, block_size, length, frame_tokens)
        if all(torch.equal(mask.reshape(block_size, block_size).bool(), ours) for mask in masks):
            return kind
    raise ValueError(
        f"{path} holds attention masks that are neither causal nor those of the interpolation between latent frames of "
        f"{frame_tokens} tokens: are --downsample and --resolution those of its run?"
    )
