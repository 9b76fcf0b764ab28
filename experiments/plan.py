"""`longtake plan`: what an experiment costs, before any GPU is paid for.

The training step of the experiment's own module runs at its full size on tensors that have shapes and no values
(torch's fake tensors), so that nothing is estimated by formula: FLOPs are those that torch's counter sees, activations
are the tensors that autograd keeps for the backward pass. Attention counts whole, causal or not, as in torch's counter.

What is assumed: weights, gradients and optimizer states in float32, AdamW (8 bytes a parameter), and that GPUs keep
what the CPU's kernels keep. Not counted are the allocator's fragments, the communication's own buffers beyond DDP's
copy of the gradients, validation, samples and scores.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lightning_modules
from callbacks import ShortToLongCurriculum
from datamodules.audio import BANDS, COLUMNS
from experiments.lightning_cli import parsed
from experiments.messages import HelpFormatter
from lightning_modules import COMMITModule, MeBTModule, TATSModule, VQGAN3DModule, WALTModule
from lightning_modules.generator import VideoGenerator
from models.priors.mebt import SampleMask, mask_window, masked_token_loss
from models.tokenizers import LPIPS, VQGAN3D
from models.weights import build, build_tokenizer

EXPERIMENTS = Path(__file__).parent
# Training clips of an epoch: what a token cache holds once.
TRAINING_CLIPS = {"UCF101DataModule": 9_537, "BAIRDataModule": 43_264, "SSV2DataModule": 168_913}
GIB = 2**30


@dataclass(frozen=True)
class Trace:
    """What one pass costs, for the clips of one GPU.

    Args:
        flops: Of the pass.
        saved_bytes: What autograd keeps for the backward pass, besides the parameters themselves.
    """

    flops: float
    saved_bytes: int


@dataclass(frozen=True)
class Plan:
    """What an experiment needs. Bytes and FLOPs are those of one GPU; hours those of all together."""

    experiment: str
    parts: dict[str, int]  # trained parameters
    tokens: int  # of a clip
    gpus: int
    clips_per_gpu: int
    training_flops: float  # a step, at the curriculum's mean length
    tokenizer_flops: float  # a step, without a token cache
    activation_bytes: int  # at the full length
    frozen_bytes: int
    state_bytes: dict[str, float]  # strategy to weights, gradients, optimizer, average
    step_seconds: float
    step_seconds_cached: float
    steps: int
    gpu_hours: float
    checkpoint_bytes: int
    token_cache_bytes: int | None  # of the training clips, once

    @property
    def parameters(self) -> int:
        """All that are trained."""
        return sum(self.parts.values())

    def memory(self, strategy: str) -> float:
        """Bytes on each GPU."""
        return self.state_bytes[strategy] + self.activation_bytes + self.frozen_bytes


# Shapes without values


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this, tensors are made without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def traced(step: Callable[[], Tensor | None], parameters: Sequence[Tensor], precision: str = "32-true") -> Trace:
    """Run a step, and the backward pass of the loss that it returns; count its FLOPs and what is kept in between.

    Args:
        step: What to run. None as its result says that there is no backward pass.
        parameters: Whose memory is not counted.
        precision: The Trainer's; `bf16-mixed` runs under autocast.
    """
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, tuple[Any, int]] = {}  # the storage itself too, so that no other one takes its place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with counter:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("bf16")),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = step()
        if loss is not None:
            loss.backward()
    return Trace(counter.get_total_flops(), sum(size for _, size in kept.values()))


class _Nowhere:
    """Stands for torch's tracker of modules: that one cannot be about in a penalty on gradients, which R1 is."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *_: object) -> None:
        """There was nothing to track."""


def materialised(module: Any) -> Any:
    """A module from the meta device with fake tensors in place of its own."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


# What each module does in a training step


def mebt_step(module: MeBTModule, batch: dict[str, Tensor], frames: int) -> Tensor:
    """Half of the tokens masked, which is the mean of the linear schedule; the cost is linear in that."""
    codes = batch["codes"][:, :frames]
    num_tokens = codes[0].numel()
    masks = [SampleMask(0, num_tokens, 0, max(1, num_tokens // 2))] * len(codes)
    window = mask_window(torch.rand(len(codes), num_tokens), masks, module.hparams["target_budget"])
    nll = module.masked_nll(codes, 0, window, module.labels(batch), module.hparams["label_smoothing"])
    return masked_token_loss(nll, window, module.hparams["rho_power"])


def tats_step(module: TATSModule, batch: dict[str, Tensor], frames: int) -> Tensor:
    """All codes of a clip, after any condition: what makes its tokens counts for nothing."""
    network, codes = module.network, batch["codes"][:, : frames : module.latent_stride].flatten(1)
    condition = codes.new_zeros(len(codes), network.condition_length) if network.condition_size else None
    targets = codes + network.condition_size
    return nn.functional.cross_entropy(network.code_logits(codes, condition).float().transpose(1, 2), targets)


def commit_step(module: COMMITModule, batch: dict[str, Tensor], frames: int) -> Tensor:
    """All tokens, for a task with a class if the model has classes."""
    codes = batch["codes"].flatten(1)
    prefix = (codes,) if module.network.masking == "prefix" else ()
    logits = module.network(codes, batch["label"] if module.num_classes else None, 0, *prefix)
    return module.network.nll(logits, codes, module.hparams["label_smoothing"]).mean()


def walt_step(module: WALTModule, batch: dict[str, Tensor], frames: int) -> Tensor:
    """One pass with gradient; `walt_estimate` is the one before it."""
    latents = batch["latents"]
    times = torch.rand(len(latents))
    conditions: dict[str, Tensor] = {}
    if module.num_classes:
        conditions["label"] = batch["label"]
    if module.frame_prediction:
        conditions["past"] = torch.cat([latents, latents[:, :1]], dim=1)
    if module.reads_text:
        shape = len(latents), module.hparams["text_tokens"]
        conditions["text"] = torch.randn(*shape, module.hparams["text_dim"])
        conditions["text_mask"] = torch.ones(shape, dtype=torch.bool)
    if module.enlarges:
        conditions |= {"low_res": nn.functional.avg_pool3d(latents, (1, 2, 2)), "low_res_times": times}
    return module.squared_errors(latents, torch.randn_like(latents), times, twice=False, **conditions).mean()


def gan_step(module: VQGAN3DModule, batch: dict[str, Tensor], adversary: bool) -> Tensor:
    """The tokenizer's half of a step, or that of its discriminators."""
    tokenizer, video = module.tokenizer, batch["video"]
    pixels = tokenizer.to_native(tokenizer.reconstructed_frames(video))
    frames = torch.zeros(len(video), dtype=torch.long)
    discriminators = [net for net in (module.image_discriminator, module.video_discriminator) if net is not None]
    tokenizer.requires_grad_(not adversary)
    for network in discriminators:
        network.requires_grad_(adversary)
    if adversary:
        terms, _ = module.discriminator_losses(pixels, batch["reconstruction"], frames)
        return module.discriminator_loss(terms)
    reconstruction, encoded = tokenizer(video)
    terms = module.generator_losses(pixels, reconstruction, encoded, frames, adversarial=bool(discriminators))
    factors = {}
    if module.adaptive_weight and discriminators:
        factors["gan"] = module._gradient_ratio(terms)
    return module.generator_loss(terms, factors)


STEPS: dict[type, Callable[..., Tensor]] = {
    MeBTModule: mebt_step,
    TATSModule: tats_step,
    COMMITModule: commit_step,
    WALTModule: walt_step,
}


def generator_traces(module: VideoGenerator, batch_size: int, precision: str, mean_frames: float) -> tuple[float, int]:
    """FLOPs of a training step at the curriculum's mean length, and bytes kept at the full one.

    Args:
        module: With fake tensors.
        batch_size: Clips.
        precision: The Trainer's.
        mean_frames: Mean number of latent frames over the run; between one and all of them cost is a straight line.
    """
    t, h, w = module.latent_shape
    batch = {
        "codes": torch.randint(0, module.codebook_size or 1, (batch_size, t, h, w)),
        "label": torch.zeros(batch_size, dtype=torch.long),
    }
    if isinstance(module, WALTModule):
        batch["latents"] = torch.randn(batch_size, module.latent_dim, t, h, w)
    step, parameters = STEPS[type(module)], list(module.parameters())
    full = traced(lambda: step(module, batch, t), parameters, precision)
    flops = full.flops
    if mean_frames < t:
        one = traced(lambda: step(module, batch, 1), parameters, precision)
        flops = one.flops + (full.flops - one.flops) * (mean_frames - 1) / (t - 1)
    if isinstance(module, WALTModule) and module.self_conditioning:

        def estimate() -> None:
            with torch.no_grad():
                walt_step(module, batch, t)

        flops += module.self_conditioning * traced(estimate, parameters, precision).flops
    return flops, full.saved_bytes


def tokenizer_traces(module: VQGAN3DModule, clip: tuple[int, ...], batch_size: int, precision: str) -> list[Trace]:
    """The two halves of a GAN's step on clips `[C, T, H, W]`."""
    batch = {"video": torch.rand(batch_size, *clip)}
    module.tokenizer.quantizer.eval()  # the codebook's update counts for nothing, and asks for values
    parameters = [*module.parameters(), *module.buffers()]
    halves = [traced(lambda: gan_step(module, batch, adversary=False), parameters, precision)]
    if module.image_discriminator is not None or module.video_discriminator is not None:
        batch["reconstruction"] = module.tokenizer.to_native(module.tokenizer.reconstructed_frames(batch["video"]))
        halves.append(traced(lambda: gan_step(module, batch, adversary=True), parameters, precision))
    module.requires_grad_(True)
    return halves


# The experiment


def make_module(model: dict[str, Any]) -> Any:
    """The experiment's module with fake tensors."""
    arguments = dict(model["init_args"])
    with torch.device("meta"):
        for name, value in arguments.items():
            if isinstance(value, dict) and "class_path" in value:
                arguments[name] = build(value)
        module = getattr(lightning_modules, model["class_path"].rpartition(".")[2])(**arguments)
    module = materialised(module)
    if isinstance(module, VQGAN3DModule) and module.perceptual_weight > 0:
        module.__dict__["perceptual"] = fake_perceptual(module.perceptual_network)
    return module


class Logits(nn.Module):
    """The perceptual loss by a classifier, without its weights: see `TimmPerceptual`."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.classifier = timm.create_model(network, pretrained=False).eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two images' logits."""
        images = nn.functional.interpolate(torch.cat([x, y]), (224, 224), mode="bilinear")
        return nn.functional.mse_loss(*self.classifier(images).chunk(2))


def fake_perceptual(network: str) -> nn.Module:
    """The perceptual network, without a file of weights."""
    with torch.device("meta"):
        found: Any = LPIPS() if network == "lpips" else Logits(network)
    found = materialised(found).requires_grad_(False)
    found.to = lambda *_: found  # tensors without values cannot be moved
    return found


def frozen_tokenizer(path: str) -> VQGAN3D | None:
    """The tokenizer at a path with fake tensors: as its bundle says, or the experiment of its folder's name."""
    bundle, experiment = Path(path) / "config.json", EXPERIMENTS / f"{Path(path).name}.yaml"
    if bundle.is_file():
        config = json.loads(bundle.read_text())
    elif experiment.is_file():
        config = parsed(["fit", f"--config={experiment}"])["model"]["init_args"]["tokenizer"]
    else:
        return None
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    return materialised(tokenizer).eval().requires_grad_(False)


def mean_latent_frames(config: dict[str, Any], latent_frames: int, frames_per_latent: int) -> float:
    """Mean length of the curriculum over the whole run."""
    curriculum = ShortToLongCurriculum(**config["curriculum"])
    steps = config["trainer"]["max_steps"]
    if curriculum.schedule == "longest":
        return latent_frames
    curriculum.bind(steps, latent_frames * frames_per_latent, frames_per_latent, config["seed_everything"] or 0)
    looks = 200
    total = sum(curriculum.expected_frames_at(look * steps // looks) for look in range(looks))
    return total / looks / frames_per_latent


def make_plan(
    config: dict[str, Any], gpus: int = 8, tflops: float = 312.0, mfu: float = 0.4, clips: int | None = None
) -> Plan:
    """Plan a run.

    Args:
        config: The resolved experiment.
        gpus: How many there are.
        tflops: What one of them could do at best, in 10^12 FLOPs a second.
        mfu: Share of that which training reaches.
        clips: Clips of an epoch, for the token cache; None takes the data set's published number, if there is one.
    """
    data, trainer = config["data"]["init_args"], config["trainer"]
    batch_size, precision = data["batch_size"], str(trainer["precision"] or "32-true")
    with shapes_only():
        module = make_module(config["model"])
        clip = (3, data["num_frames"], data["resolution"], data["resolution"])
        if config["data"]["class_path"].endswith("SpectrogramDataModule"):
            clip = (1, data["num_frames"], BANDS, COLUMNS)
        frozen_bytes, encode_flops, accumulate = 0, 0.0, trainer["accumulate_grad_batches"] or 1
        if isinstance(module, VQGAN3DModule):
            accumulate = module.accumulate_grad_batches
            halves = tokenizer_traces(module, clip, batch_size, precision)
            flops, saved = sum(half.flops for half in halves), max(half.saved_bytes for half in halves)
            parts = {"tokenizer": count(module.tokenizer)}
            parts["discriminators"] = count(module) - parts["tokenizer"]
            tokens, blocks = 1, [module.tokenizer.encoder, module.tokenizer.decoder]
            for size in module.tokenizer.latent_shape(*clip[1:]):
                tokens *= size
            if module.perceptual is not None:
                frozen_bytes = 4 * count(module.perceptual)
            bytes_per_token = 0
        else:
            lengths = mean_latent_frames(config, module.latent_shape[0], module.downsample[0])
            flops, saved = generator_traces(module, batch_size, precision, lengths)
            parts = {name: count(part) for name, part in module.network.named_children() if count(part)}
            parts["embeddings"] = count(module.network) - sum(parts.values())
            parts = {name: number for name, number in parts.items() if number}
            t, h, w = module.latent_shape
            tokens, blocks = t * h * w, list(getattr(module.network, "blocks", getattr(module.network, "layers", [])))
            size = module.codebook_size
            bytes_per_token = (
                2 * module.latent_dim if size is None else 1 if size <= 2**8 else 2 if size <= 2**16 else 4
            )
            if (tokenizer := frozen_tokenizer(module.tokenizer_path)) is not None:
                frozen_bytes = 4 * count(tokenizer)
                video = torch.rand(1, *clip)
                encode_flops = batch_size * encode_cost(tokenizer, video)
        trained = count(module)
        averaged = trained if config["ema"]["decay"] else 0
        if isinstance(module, VQGAN3DModule):
            averaged = min(averaged, parts["tokenizer"])
        largest = max((count(block) for block in blocks), default=0)
    states = 16 * trained + 4 * averaged  # weights, gradients, two moments; the average
    state_bytes = {
        "one": float(states),
        "ddp": float(states + 4 * trained),
        "fsdp": states / gpus + 8 * largest,  # one block at a time is whole, with its gradients
    }
    speed = tflops * 1e12 * mfu
    flops, encode_flops = flops * accumulate, encode_flops * accumulate
    step_seconds = (flops + encode_flops) / speed
    steps = trainer["max_steps"]
    clips = clips or TRAINING_CLIPS.get(config["data"]["class_path"].rpartition(".")[2])
    return Plan(
        experiment=config["run_name"],
        parts=parts,
        tokens=tokens,
        gpus=gpus,
        clips_per_gpu=batch_size * accumulate,
        training_flops=flops,
        tokenizer_flops=encode_flops,
        activation_bytes=saved,
        frozen_bytes=frozen_bytes,
        state_bytes=state_bytes,
        step_seconds=step_seconds,
        step_seconds_cached=flops / speed,
        steps=steps,
        gpu_hours=steps * step_seconds * gpus / 3600,
        checkpoint_bytes=12 * trained + 4 * averaged,
        token_cache_bytes=clips * tokens * bytes_per_token if clips and bytes_per_token else None,
    )


def encode_cost(tokenizer: VQGAN3D, video: Tensor) -> float:
    """FLOPs of the frozen encoder on one clip; the search in the codebook is a matrix product with all entries."""

    def encode() -> None:
        with torch.no_grad():
            features = tokenizer.encoder(tokenizer.to_native(video))
            latents = tokenizer.pre_vq_conv(features)
            codebook = getattr(tokenizer.quantizer, "embeddings", None)
            if codebook is not None:
                torch.mm(latents.movedim(1, -1).flatten(0, -2), codebook.T)

    return traced(encode, list(tokenizer.parameters())).flops


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


# What is printed


def shown(plan: Plan, tflops: float, mfu: float) -> str:
    """A page on one experiment."""
    parts = ", ".join(f"{name} {number:,}" for name, number in plan.parts.items())
    lines = [
        f"{plan.experiment} on {plan.gpus} GPUs, {plan.clips_per_gpu} clips a step on each, "
        f"{plan.clips_per_gpu * plan.gpus} together",
        f"  trained parameters  {plan.parameters:,}: {parts}",
        f"  tokens              {plan.tokens:,} a clip",
        f"  FLOPs               {plan.training_flops:.3e} a step and GPU"
        + (f", and {plan.tokenizer_flops:.3e} for the frozen tokenizer" if plan.tokenizer_flops else ""),
        f"  activations         {plan.activation_bytes / GIB:.2f} GiB a GPU, and {plan.frozen_bytes / GIB:.2f} GiB for "
        "frozen networks",
    ]
    names = {"one": "one GPU", "ddp": "DDP", "fsdp": f"sharded over {plan.gpus}"}
    lines += [
        f"  memory, {names[name]:<16}{plan.memory(name) / GIB:.2f} GiB a GPU, {size / GIB:.2f} of it weights, "
        "gradients, optimizer and averages"
        for name, size in plan.state_bytes.items()
    ]
    cached = f" ({plan.step_seconds_cached:.3f} with cached tokens)" if plan.tokenizer_flops else ""
    lines += [
        f"  time                {plan.step_seconds:.3f} s a step at {mfu:.0%} of {tflops:g} TFLOPS{cached}",
        f"  in all              {plan.steps:,} steps, {plan.gpu_hours:,.0f} GPU-hours",
        f"  disk                {plan.checkpoint_bytes / GIB:.2f} GiB a checkpoint, twice that while one replaces "
        "another",
    ]
    if plan.token_cache_bytes is not None:
        lines.append(f"  token cache         {plan.token_cache_bytes / GIB:.3f} GiB for the training clips, once each")
    return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
    """Markdown, a row an experiment."""
    rows = [
        "| experiment | parameters, M | tokens | clips/GPU | TFLOP/step/GPU | activations, GiB | DDP, GiB "
        "| sharded, GiB | s/step | steps | GPU-hours | checkpoint, GiB |",
        "|" + "---|" * 12,
    ]
    for plan in plans:
        cells = [
            f"`{plan.experiment}`",
            f"{plan.parameters / 1e6:,.1f}",
            f"{plan.tokens:,}",
            f"{plan.clips_per_gpu}",
            f"{(plan.training_flops + plan.tokenizer_flops) / 1e12:,.1f}",
            f"{plan.activation_bytes / GIB:,.1f}",
            f"{plan.memory('ddp') / GIB:,.1f}",
            f"{plan.memory('fsdp') / GIB:,.1f}",
            f"{plan.step_seconds:.2f}",
            f"{plan.steps:,}",
            f"{plan.gpu_hours:,.0f}",
            f"{plan.checkpoint_bytes / GIB:.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(args: Sequence[str]) -> None:
    """Print a page on one experiment, or a table of all."""
    parser = argparse.ArgumentParser(
        prog="longtake plan", description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--config", action="append", default=[], help="experiment file, several as in `longtake fit`; by default --all"
    )
    parser.add_argument("--all", action="store_true", help="a table of all experiments but the demo's")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the run, all machines together")
    parser.add_argument(
        "--tflops", type=float, default=312.0, help="peak of one GPU in TFLOPS; 312: A100 in bf16, 989: H100"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that training reaches, above 0 and up to 1"
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=None,
        help="clips of an epoch, for the token cache; by default what is known of the data set",
    )
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")
    options, words = parser.parse_known_args(args)
    if options.all == bool(options.config):
        parser.error("give --config experiments/<name>.yaml, or --all")
    if options.gpus < 1 or options.tflops <= 0 or not 0 < options.mfu <= 1:
        parser.error("--gpus must be at least 1, --tflops above 0, and --mfu a share")
    files = sorted(EXPERIMENTS.glob("*.yaml")) if options.all else []
    runs = [[f"--config={file}"] for file in files if not file.stem.startswith("demo")]
    plans = [
        make_plan(parsed(["fit", *run, *words]), options.gpus, options.tflops, options.mfu, options.clips)
        for run in runs or [[f"--config={file}" for file in options.config]]
    ]
    if options.json:
        print(json.dumps([asdict(plan) for plan in plans], indent=2))
    else:
        print(table(plans) if options.all else shown(plans[0], options.tflops, options.mfu))
