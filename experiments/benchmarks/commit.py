"""What COMMIT's decoding costs beside its network, and how many frames a second it makes."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.report import Measurement, seconds_of
from models.priors.commit import COMMIT, COMMITDecoding, commit_decode
from models.priors.decoding import seeded_noise
from models.tokenizers import VQGAN3D, GradientVectorQuantizer, MAGVITDecoder, MAGVITEncoder

FRAMES = 16
PUBLISHED_FPS = 37.0  # MAGVIT-B on one V100 at 128 pixels (section 4.3 of the paper)


class Stopwatch(nn.Module):
    """The network, with the time that its calls take."""

    def __init__(self, network: COMMIT) -> None:
        super().__init__()
        self.network = network
        self.mask_id, self.masking = network.mask_id, network.masking
        self.seconds: list[float] = []

    def forward(self, *args: Any) -> Tensor:
        """Call it, and wait for it."""
        synchronize(args[0].device)
        start = time.perf_counter()
        logits = self.network(*args)
        synchronize(logits.device)
        self.seconds.append(time.perf_counter() - start)
        return logits


def synchronize(device: torch.device) -> None:
    """Wait for all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(quick: bool) -> list[Measurement]:
    """Decode with random weights, which cost the same, at the size of MAGVIT-B for UCF-101."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dim, depth, num_heads = (64, 2, 4) if quick else (768, 12, 12)
    num_tokens = 64 if quick else 1024
    network = COMMIT(1024, num_tokens, num_classes=101, dim=dim, depth=depth, num_heads=num_heads).eval().to(device)
    batch_size = 64 if device.type == "cuda" and not quick else 1
    measurements = [*decoding(network, batch_size)]
    if device.type == "cuda":
        measurements.append(frames_per_second(network, batch_size, quick))
    return measurements


def decode(network: Any, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
    """Draw codes `[B, N]` of class-conditional clips in 12 steps."""
    nothing = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
    is_condition = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    noise = seeded_noise(torch.arange(batch_size), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return commit_decode(network, nothing, is_condition, COMMITDecoding(), noise, nothing[:, 0])


def decoding(network: COMMIT, batch_size: int) -> list[Measurement]:
    """Clips a second, and the time of 12 steps over that of their 12 forward passes, which are timed within."""
    device = network.position_embedding.device
    watch = Stopwatch(network)
    decode(watch, batch_size, network.num_tokens, device)  # warms up
    ratios, seconds = [], []
    for _ in range(3):
        watch.seconds.clear()
        synchronize(device)
        start = time.perf_counter()
        decode(watch, batch_size, network.num_tokens, device)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        ratios.append(seconds[-1] / sum(watch.seconds))
    details = {
        "clips": batch_size,
        "network_calls": len(watch.seconds),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "device": str(device),
    }
    return [
        Measurement(
            "COMMIT, 12 steps: decoding over 12 forward passes", sorted(ratios)[1], "x", at_most=1.1, details=details
        ),
        Measurement("COMMIT, 12 steps: codes of clips", batch_size / sorted(seconds)[1], "clips/s", details=details),
    ]


def frames_per_second(network: COMMIT, batch_size: int, quick: bool) -> Measurement:
    """Frames of 128 x 128 pixels a second, codes and pixels, with MAGVIT's B tokenizer."""
    device = network.position_embedding.device
    tokenizer = VQGAN3D(MAGVITEncoder(), GradientVectorQuantizer(), MAGVITDecoder(), (0.0, 1.0)).eval().to(device)

    @torch.no_grad()
    def sample() -> None:
        codes = decode(network, batch_size, network.num_tokens, device)
        grid = codes.unflatten(1, (4, 4, 4) if quick else (4, 16, 16))
        with torch.autocast(device.type, torch.bfloat16):
            for part in grid.split(8):
                tokenizer.decode(tokenizer.codes_to_latents(part))
        synchronize(device)

    value = batch_size * FRAMES / seconds_of(sample, 0.1 if quick else 10.0)
    details = {"published_on_a_v100": PUBLISHED_FPS, "clips": batch_size, "precision": "bf16, drawing in float32"}
    return Measurement("COMMIT-B, 12 steps, 128 x 128 pixels", value, "frames/s", at_least=600.0, details=details)
