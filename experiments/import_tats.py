"""What `longtake import-weights` makes of a transformer that TATS has released."""

import argparse

from models.import_tats import import_tats_transformer
from models.weights import save_bundle, state_digest


def add_transformer_options(parser: argparse.ArgumentParser) -> None:
    """Add what the shapes of a released transformer do not tell."""
    options = parser.add_argument_group("transformers of TATS", "what no shape tells, if the file's options do not say")
    options.add_argument(
        "--resolution", type=int, help="height and width of the video in pixels; by default what the file says"
    )
    options.add_argument(
        "--num_heads", type=int, help="attention heads, 16 in all published models; by default what the file says"
    )
    options.add_argument(
        "--audio_downsample",
        type=int,
        nargs=3,
        metavar=("FRAMES", "BANDS", "COLUMNS"),
        help="what a code of the sound covers, for a model that hears; by default what the file says",
    )


def write_transformer(options: argparse.Namespace, downsample: tuple[int, int, int] | None) -> None:
    """Write a bundle of each tokenizer, and a checkpoint that `sample` and `validate` read."""
    import lightning
    import torch

    audio_downsample = tuple(options.audio_downsample) if options.audio_downsample else None
    released = import_tats_transformer(
        options.source, downsample, audio_downsample, options.resolution, options.num_heads
    )
    folder = options.destination
    if folder.exists():
        raise FileExistsError(f"{folder} exists already. Remove it first, or choose another destination.")
    for name, (tokenizer, config, provenance) in released.tokenizers.items():
        save_bundle(folder / name, tokenizer, config, provenance)
    digests = {name: state_digest(parts[0].state_dict()) for name, parts in released.tokenizers.items()}
    paths = {name: str(folder / name) for name in released.tokenizers}
    content = {
        "state_dict": {f"network.{name}": tensor for name, tensor in released.network.state_dict().items()},
        "hyper_parameters": released.settings | paths,
        "provenance": released.provenance,
        "global_step": released.provenance["step"] or 0,
        "epoch": 0,
        "pytorch-lightning_version": lightning.__version__,
        "tokenizer_digest": digests["tokenizer"],
    }
    if "text_vocabulary" not in released.settings:  # which words the ids stand for is told by the user alone
        content["condition_digest"] = digests.get("audio_tokenizer")
    torch.save(content, folder / "prior.ckpt")
    parameters = sum(parameter.numel() for parameter in released.network.parameters())
    settings = released.settings
    kind = f"{settings['num_classes']} classes" if settings["num_classes"] else "no condition"
    kind = "text" if "text_length" in settings else "sound" if "audio_tokenizer" in paths else kind
    print(
        f"{folder}: {parameters:,} parameters, mask {settings['mask']}, {kind}, clips of {settings['num_frames']} "
        f"frames at {settings['resolution']} x {settings['resolution']}, latent_stride {settings['latent_stride']}"
    )
    print(f"Sample with --ckpt_path={folder / 'prior.ckpt'} --model.tokenizer={folder / 'tokenizer'}")
