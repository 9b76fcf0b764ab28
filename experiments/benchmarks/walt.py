"""What W.A.L.T's windows, self-conditioning and averaging cost, and how fast it samples; on a GPU, its published sizes.

Tokens are those of the paper's video models, 5 x 16 x 16. All networks have the same width and depth; `full` attends to
all tokens in all layers, with the same position bias, and `DiT` is the plain block (adaptive norm with a projection of
its own in each layer, no position bias, no window).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.ema import averaged_tensors
from experiments.benchmarks.report import Measurement, seconds_of
from models.priors.diffusion import Diffusion, DiffusionSampling, sample
from models.priors.walt import WALT, WALT_SIZES
from models.random import keyed_generator

GPU_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # of dense bf16, from the makers' data sheets


class DiTBlock(nn.Module):
    """Full attention and an MLP, modulated by a projection of the condition."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens `[B, N, D]` and condition `[B, D]`."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.proj(attended)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Blocks between two projections, called as W.A.L.T is."""

    def __init__(self, tokens: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, dim)
        self.positions = nn.Parameter(torch.zeros(tokens, dim))
        self.times = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads) for _ in range(depth))
        self.head = nn.Linear(dim, 8)

    def forward(self, noisy: Tensor, times: Tensor, estimate: Tensor | None = None) -> Tensor:
        """Velocity `[B, 8, t, h, w]`."""
        parts = [noisy, torch.zeros_like(noisy) if estimate is None else estimate]
        x = self.embedding(torch.cat(parts, dim=1).flatten(2).mT) + self.positions
        condition = self.times(times[:, None] / 1000)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x).mT.reshape(noisy.shape)


def train_step(network: nn.Module, latents: Tensor, times: Tensor, twice: bool = False) -> None:
    """Forward and backward, with a first pass if `twice`."""
    estimate = None
    if twice:
        with torch.no_grad():
            estimate = network(latents, times)
    network(latents, times, estimate).square().mean().backward()
    network.zero_grad()


def saved_megabytes(network: nn.Module, latents: Tensor, times: Tensor) -> float:
    """What one forward pass keeps for the backward pass, each storage once; weights are not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(latents, times).square().mean()
    del loss
    return sum(sizes.values()) / 2**20


def sampling_seconds(network: nn.Module, latents: Tensor, num_steps: int) -> float:
    """Wall-clock time of sampling a batch."""

    def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        return network(noisy, times, estimate).float()

    process = Diffusion().to(latents.device)
    generator = keyed_generator(0, device=latents.device)
    start = time.perf_counter()
    with torch.no_grad():
        out = sample(
            process,
            predict,
            lambda: torch.randn(latents.shape, generator=generator, device=latents.device),
            DiffusionSampling(num_steps=num_steps),
        )
    out.sum().item()  # waits for a GPU
    return time.perf_counter() - start


def run(quick: bool) -> list[Measurement]:
    """Measure on the CPU, and the published sizes where there is a GPU."""
    shape, dim, depth, heads = ((5, 8, 8), 64, 2, 4) if quick else ((5, 16, 16), 384, 12, 6)
    settings: dict[str, Any] = {"latent_shape": shape, "dim": dim, "depth": depth, "num_heads": heads}
    tokens = shape[0] * shape[1] * shape[2]
    networks = {
        "windows": WALT(**settings),
        "full attention": WALT(**settings, full_attention=True),
        "DiT": DiT(tokens, dim, depth, heads),
    }
    latents = torch.randn(1, 8, *shape, generator=keyed_generator(1))
    times = torch.tensor([500.0])
    details = {"latents": list(shape), "dim": dim, "depth": depth, "batch": 1}
    least = 0.0 if quick else 8.0
    rows: list[Measurement] = []
    seconds, memory = {}, {}
    for name, network in networks.items():
        seconds[name] = seconds_of(partial(train_step, network, latents, times), least)
        memory[name] = saved_megabytes(network, latents, times)
        rows.append(Measurement(f"training step: {name}", seconds[name], "s", details=details))
        rows.append(Measurement(f"kept for the backward pass: {name}", memory[name], "MiB", details=details))
    for name in ("full attention", "DiT"):
        faster = seconds[name] / seconds["windows"]
        aim = 1.0 if name == "full attention" else None
        rows.append(Measurement(f"windows against {name}", faster, "x as fast", at_least=aim, details=details))
    network = networks["windows"]
    twice = seconds_of(partial(train_step, network, latents, times, twice=True), least)
    share = 0.9 * (twice / seconds["windows"] - 1)
    rows.append(Measurement("self-conditioning in 0.9 of the steps", share, "of a step more", details=details))
    averages = {name: tensor.clone() for name, tensor in averaged_tensors(network).items()}
    weights = averaged_tensors(network)

    def average() -> None:
        torch._foreach_lerp_(list(averages.values()), [weights[name].detach() for name in averages], 1e-3)

    rows.append(
        Measurement(
            "averaging the weights", seconds_of(average, least / 8) / seconds["windows"], "of a step more", at_most=0.05
        )
    )
    steps = 2 if quick else 50
    rows.append(
        Measurement(
            f"samples, {steps} DDIM steps",
            1 / sampling_seconds(network, latents, steps),
            "samples/s",
            details=details,
        )
    )
    if torch.cuda.is_available():
        for size in ("L", "XL"):
            rows += on_gpu(size, batch=2 if quick else 32)
    return rows


def on_gpu(size: str, batch: int) -> list[Measurement]:
    """Training and sampling of a published size, in bf16 and compiled."""
    network = WALT(**WALT_SIZES[size], num_classes=101).cuda()
    model: Callable[..., Tensor] = torch.compile(network)
    latents = torch.randn(batch, 8, 5, 16, 16, device="cuda", generator=keyed_generator(2, device="cuda"))
    times = torch.full((batch,), 500.0, device="cuda")
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(latents, times, latents).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter, torch.autocast("cuda", torch.bfloat16):
        network(latents, times, latents).float().square().mean().backward()
    network.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step, 10.0)
    name = torch.cuda.get_device_name()
    peak = next((tflops for key, tflops in GPU_TFLOPS.items() if key in name), None)
    used = counter.get_total_flops() / seconds / 1e12
    details = {"batch": batch, "tflops": used, "peak_tflops": peak}
    rows = [Measurement(f"{size}: training step of {batch} clips, bf16, compiled", seconds, "s", details=details)]
    if peak is not None:
        rows.append(Measurement(f"{size}: model FLOPs used", 100 * used / peak, "%", at_least=45, details=details))
    rows.append(Measurement(f"{size}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", details=details))
    network.eval()
    with torch.autocast("cuda", torch.bfloat16):
        sampling_seconds(network, latents[:1], 2)
        rows.append(Measurement(f"{size}: 17 frames, 50 steps", sampling_seconds(network, latents[:1], 50), "s"))
    return rows
