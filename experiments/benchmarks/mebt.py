"""MeBT is linear in the number of tokens: time and peak memory of a forward and backward pass, half of them masked.

On a CPU every measurement has a process of its own, whose peak of resident memory is read from the kernel: what other
measurements left behind does not count, nor does what importing torch takes. On a GPU the allocator is asked.
"""

import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from experiments.benchmarks.report import Measurement, peak_memory, reset_peak
from models.blocks.attention import Attention
from models.priors.mebt import PUBLISHED_STACK, BlockKind, MeBT
from models.random import keyed_generator

SIZES = tuple(1024 * 2**i for i in range(7))  # 1k to 64k tokens
COMPARED_AT = 8192  # full attention is measured up to here only
# Of bf16 matrix products, without sparsity, by the device's name: what the share that is used is a share of.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        num_tokens: Positions; half of them are masked.
        dim: Width.
        num_latents: Latents.
        codebook_size: Codes.
        kind: `mebt`, the same with `materialised` scores, or as many blocks of `full` attention.
        masked: Fraction of masked tokens.
        repeats: Passes after the first one, which is not counted; 0 counts the first one.
    """

    num_tokens: int
    dim: int
    num_latents: int
    codebook_size: int
    kind: Literal["mebt", "materialised", "full"] = "mebt"
    masked: float = 0.5
    repeats: int = 2


class MaterialisedAttention(Attention):
    """The same attention with its scores written out, as the release has it."""

    def forward(self, query: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend, see `Attention`; there is always a context here."""
        q, k, v = self.query(query), self.key(context), self.value(context)
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads) for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # [B, heads, N, S]
        return self.proj(rearrange(scores.softmax(dim=-1) @ v, "b heads n d -> b n (heads d)"))


def network_of(case: Case) -> MeBT:
    """Build the network, with the published 24 blocks or as many others, and heads of 32 channels."""
    full: BlockKind = "maskgit"
    blocks = (full,) * len(PUBLISHED_STACK) if case.kind == "full" else PUBLISHED_STACK
    network = MeBT(case.codebook_size, case.num_tokens, case.dim, case.dim // 32, case.num_latents, blocks)
    if case.kind == "materialised":
        for block in network.blocks:
            block.attention.__class__ = MaterialisedAttention  # the same parameters
    return network


def measure(case: Case) -> tuple[float, float]:
    """Seconds and bytes of a forward and a backward pass, the least over the repeats and the highest peak."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network_of(case).to(device)
    generator = keyed_generator(0, case.num_tokens)
    codes = torch.randint(case.codebook_size, (1, case.num_tokens), generator=generator).to(device)
    order = torch.randperm(case.num_tokens, generator=generator)[None].to(device)
    context, targets = order.tensor_split([case.num_tokens - round(case.masked * case.num_tokens)], dim=1)

    def step() -> float:
        start = time.perf_counter()
        features = network.features(codes, context, targets)
        network.cross_entropy(features, codes.gather(1, targets)).mean().backward()
        for parameter in network.parameters():
            parameter.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before = reset_peak(device)
    times = [step() for _ in range(1 + case.repeats)]
    return min(times[1:] or times), max(1, peak_memory(device) - before)  # at toy sizes, freed memory may do


def measured(cases: Sequence[Case], apart: bool) -> list[tuple[float, float]]:
    """Measure all cases, each in a process of its own if `apart`."""
    if not apart:
        return [measure(case) for case in cases]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(measure, cases, chunksize=1)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the straight line that fits the logarithms best."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def run(quick: bool) -> list[Measurement]:
    """Measure everything."""
    sizes: tuple[int, ...] = (64, 128, 256) if quick else SIZES
    compared, dim, latents = (256, 64, 16) if quick else (COMPARED_AT, 256, 256)
    apart = not quick and not torch.cuda.is_available()
    linear = [Case(size, 64 if quick else 128, 16 if quick else 128, 64 if quick else 1024) for size in sizes]
    results = measured(linear, apart)
    times, memory = [seconds for seconds, _ in results], [peak for _, peak in results]
    rows = [
        Measurement("peak memory: log-log slope", slope(sizes, memory), "", at_most=1.05, details={}),
        Measurement("time: log-log slope", slope(sizes, times), "", at_most=1.1, details={}),
    ]
    for size, seconds, peak in zip(sizes, times, memory, strict=True):
        details = {"tokens": size, "seconds": seconds, "bytes": peak}
        rows.append(Measurement(f"{size:,} tokens: peak memory", peak / 2**20, "MiB", details=details))
        rows.append(Measurement(f"{size:,} tokens: forward and backward", seconds, "s"))

    cases = [Case(compared, dim, latents, 1024, kind) for kind in ("mebt", "materialised")]
    cases.append(Case(compared, dim, latents, 1024, "full", repeats=0))  # a minute or two: once is enough
    (ours, our_peak), (written_out, their_peak), (full, full_peak) = measured(cases, apart)
    rows += [
        Measurement("scores written out: time / ours", written_out / ours, "x", at_least=1.3),
        Measurement("ours: memory / scores written out", our_peak / their_peak, "x", at_most=0.65),
        Measurement(
            "full attention: time / ours",
            full / ours,
            "x",
            at_least=10.0,
            details={"ours_s": ours, "full_s": full, "ours_bytes": our_peak, "full_bytes": full_peak},
        ),
    ]
    most = Case(sizes[-1], 64, 16 if quick else 128, 64 if quick else 16384, masked=1.0, repeats=0)
    ((seconds, peak),) = measured([most], apart)
    rows.append(
        Measurement(f"{sizes[-1]:,} tokens, all masked, {most.codebook_size:,} codes", peak / 2**30, "GiB", at_most=24)
    )
    if torch.cuda.is_available() and not quick:
        rows += on_a_gpu()
    return rows


def on_a_gpu() -> list[Measurement]:
    """The published 128-frame model in bf16: training steps, compiled and not, and sampling."""
    from models.priors.decoding import DraftAndRevise, draft_and_revise, seeded_noise

    name = torch.cuda.get_device_name()
    peak_flops = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    network = MeBT(16384, 8192).cuda()
    batch = 4
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    codes = torch.randint(16384, (batch, 8192), device="cuda")
    rows = []
    for label, features in (("eager", MeBT.features), ("compiled", torch.compile(MeBT.features, dynamic=True))):

        def step(features: Any = features) -> None:
            context, targets = torch.rand(codes.shape, device="cuda").argsort(1).tensor_split([4096], dim=1)
            with torch.autocast("cuda", torch.bfloat16):
                read = features(network, codes, context, targets)
                loss = network.cross_entropy(read, codes.gather(1, targets)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / 10
        details = {"batch": batch, "peak_bytes": torch.cuda.max_memory_allocated(), "device": name}
        rows.append(Measurement(f"128 frames, {label}: training", batch * 8192 / seconds, "tokens/s", details=details))
        if peak_flops is not None:
            used = batch * training_flops(4096, 4096) / seconds / peak_flops
            rows.append(Measurement(f"128 frames, {label}: share of the peak", 100 * used, "%", at_least=40.0))

    network.eval()
    settings = DraftAndRevise(top_k=32, bootstrap_passes=64, revise_rounds=2, revise_groups=32, revise_temperature=0.1)
    positions = torch.arange(8192, device="cuda").expand(batch, -1)
    noise = seeded_noise(torch.arange(batch), "cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            draft_and_revise(network, torch.zeros_like(positions), positions[:, :0], positions, settings, noise)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    rows.append(Measurement("128 frames, as for UCF-101: sampling a video", seconds / batch, "s", at_most=1.5))
    return rows


def training_flops(num_context: int, num_targets: int, dim: int = 1024, num_latents: int = 256) -> float:
    """Floating-point operations of a training step on a clip, for the published stack: three times a forward pass."""
    flops = 0.0
    for kind in PUBLISHED_STACK:
        queries = num_targets if kind == "latent_dec" else num_latents
        keys = {
            "latent_enc": num_context,
            "latent_self": num_latents,
            "latent_dec": num_latents,
            "lt2l": num_latents + num_targets,
        }[kind]
        flops += 2 * dim**2 * (2 * queries + 2 * keys + 8 * queries)  # query and output, key and value, MLP
        flops += 4 * queries * keys * dim  # scores and sums
    return 3 * (flops + 2 * num_targets * dim * 16384)


def plot(measurements: Sequence[Measurement], file: Path) -> None:
    """Draw time and peak memory against the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = [row.details for row in measurements if row.details and "tokens" in row.details]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, name, unit, scale in zip(axes, ("seconds", "bytes"), ("s", "MiB"), (1.0, 2.0**20), strict=True):
        tokens = [point["tokens"] for point in points]
        values = [point[name] / scale for point in points]
        axis.loglog(tokens, values, "o-", label="MeBT, 24 blocks")
        axis.loglog(tokens, [values[0] * n / tokens[0] for n in tokens], "k:", label="linear")
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"forward and backward, {unit}" if name == "seconds" else f"peak memory, {unit}")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
