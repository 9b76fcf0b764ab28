"""What a cache of keys and values saves TATS, how long long videos take, and how it compares with MeBT.

All networks are 24 blocks of width 256 (published: 1024) with random weights: they cost the same. Times are of the
codes alone, without the tokenizer, which both systems share.
"""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.report import Measurement, peak_memory, reset_peak, seconds_in_turn, seconds_of
from models.blocks.causal import KVCache
from models.priors.autoregressive import AutoregressiveSampling, slide
from models.priors.decoding import ConfidenceDecoding, confidence_decode, seeded_noise
from models.priors.mebt import MeBT
from models.priors.tats import TATS

FRAMES = (16, 32, 64, 128)
LONG_FRAMES = 1024  # of the paper's long videos, 4 to a latent frame
GAPS_AT_ONCE = 8
SHORT_RUNS = 25  # steps with a cache in the time of about one without
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes a second of the device's memory


class GrowingCache(KVCache):
    """The cache of a few lines that most code has: new keys and values are concatenated to the old ones."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers, 1 << 30, is_static=False)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate."""
        for buffers, new in ((self._keys, keys), (self._values, values)):
            old = buffers[layer]
            buffers[layer] = new if old is None else torch.cat([old[:, :, : self.filled], new], dim=2)
        read = self._keys[layer], self._values[layer]
        assert read[0] is not None
        assert read[1] is not None
        return read[0], read[1]


def network_of(sizes: dict[str, int], frames: int, mask: Any = "causal") -> TATS:
    """A TATS with random weights for a window of latent frames."""
    grid = (frames, sizes["side"], sizes["side"])
    return TATS(sizes["codes"], grid, sizes["dim"], sizes["depth"], sizes["heads"], mask=mask).eval()


def cached_step(network: TATS, cache: KVCache, batch: int, position: int) -> Callable[[], Tensor]:
    """Return a function that draws the token at a position, all before it being cached already."""
    network.extend(torch.zeros(batch, position, dtype=torch.int64), torch.arange(position), cache)

    def step() -> Tensor:
        cache.clear(kept=position)
        return network.head(network.extend(torch.zeros(batch, 1, dtype=torch.int64), torch.tensor([position]), cache))

    return step


def uncached_step(network: TATS, batch: int, position: int) -> Callable[[], Tensor]:
    """Return a function that draws the token at a position and computes all before it again."""
    tokens = torch.zeros(batch, position + 1, dtype=torch.int64)
    return lambda: network.head(network._features(tokens)[:, -1])


def cache_rows(sizes: dict[str, int]) -> list[Measurement]:
    """Tokens a second with our cache, against none and against one that grows; they take turns."""
    network = network_of(sizes, 4)
    length = network.block_size
    positions = [length * (2 * i + 1) // 16 for i in range(8)]
    rows = []
    for batch, least in ((1, 10.0), (8, 40.0)):
        seconds = []
        for position in positions:
            ours = cached_step(network, network.new_cache(is_static=False), batch, position)
            growing = cached_step(network, GrowingCache(len(network.blocks)), batch, position)
            none = uncached_step(network, batch, position)
            # many short ones to a turn, so that each has a like share of the time
            turns = [lambda f=f: [f() for _ in range(SHORT_RUNS)] for f in (ours, growing)]
            seconds.append(seconds_in_turn([*turns, none], least_seconds=0.0))
        ours, growing, none = (sum(times) / len(times) for times in zip(*seconds, strict=True))
        ours, growing = ours / SHORT_RUNS, growing / SHORT_RUNS
        details = {"positions": positions, "ours_ms": 1e3 * ours, "growing_ms": 1e3 * growing, "none_ms": 1e3 * none}
        rows += [
            Measurement(f"tokens a second, batch {batch}", batch / ours, "tokens/s", details=details),
            Measurement(f"cache over none, batch {batch}", none / ours, "x", at_least=least, details=details),
            # 0.95: what repeated runs of the same code differ by
            Measurement(
                f"cache over a growing one, batch {batch}", growing / ours, "x", at_least=0.95, details=details
            ),
        ]
    return rows


def long_rows(sizes: dict[str, int]) -> list[Measurement]:
    """Seconds for 1,024 frames, from 8 latent frames of a sliding window, and from 8 positions of the gaps."""
    latent_frames = LONG_FRAMES // 4
    base, between = network_of(sizes, 4), network_of(sizes, 5, "closed_boundaries")
    settings = AutoregressiveSampling(top_k=None, top_p=None, context_frames=1, new_frames=1)
    start = time.perf_counter()
    slide(base, torch.zeros(1, 1, dtype=torch.int64), 8, settings, seeded_noise(torch.tensor([1]), "cpu"))
    of_a_frame = (time.perf_counter() - start) / 8
    tokens = base.frame_tokens
    known = 2 * tokens  # start token and left frame, right frame without its last token
    positions = [known + 3 * tokens * (2 * i + 1) // 16 for i in range(8)]
    steps = (cached_step(between, between.new_cache(is_static=False), GAPS_AT_ONCE, place) for place in positions)
    of_a_step = sum(seconds_of(step, least_seconds=0.2) for step in steps) / len(positions)
    gaps = latent_frames // 4
    hierarchical = (gaps + 1) * of_a_frame + gaps / GAPS_AT_ONCE * 3 * tokens * of_a_step
    details = {
        "latent_frame_seconds": of_a_frame,
        "gap_step_seconds": of_a_step,
        "gaps_at_once": GAPS_AT_ONCE,
        "scaled": "sliding: 8 latent frames of 256; hierarchical: these for 65 keys, 8 of 768 positions of 8 gaps",
    }
    return [
        Measurement("1,024 frames, sliding (scaled)", latent_frames * of_a_frame, "s", details=details),
        Measurement("1,024 frames, hierarchical (scaled)", hierarchical, "s", details=details),
    ]


@torch.inference_mode()
def sample_cost(system: str, frames: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds and MiB of one sample: by how much the memory of this process, which had better be a fresh one, rose."""
    tokens, nothing = frames // 4 * sizes["side"] ** 2, torch.zeros(1, 1, dtype=torch.int64)
    noise = seeded_noise(torch.tensor([1]), "cpu")
    if system == "MeBT":
        mebt = MeBT(sizes["codes"], tokens, sizes["dim"], sizes["heads"], num_latents=sizes["latents"]).eval()
        positions = torch.arange(tokens)[None]
        decoding = ConfidenceDecoding(num_steps=sizes["steps"])
        sample = partial(
            confidence_decode, mebt, torch.zeros_like(positions), positions[:, :0], positions, decoding, noise
        )
    else:
        settings = AutoregressiveSampling(top_k=None, top_p=None, context_frames=1, new_frames=1)
        sample = partial(slide, network_of(sizes, 4), nothing, frames // 4, settings, noise)
    before = reset_peak("cpu")
    start = time.perf_counter()
    sample()
    return time.perf_counter() - start, (peak_memory("cpu") - before) / 2**20


def comparison_rows(sizes: dict[str, int], frames: tuple[int, ...], apart: bool) -> list[Measurement]:
    """Seconds and memory of one sample of MeBT and of TATS, of the same width and the same codes."""
    cases = [
        (system, count, sizes | {"side": min(sizes["side"], 8)}) for count in frames for system in ("MeBT", "TATS")
    ]
    if apart:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            costs = pool.starmap(sample_cost, cases, chunksize=1)
    else:
        costs = [sample_cost(*case) for case in cases]
    rows = []
    for (name, count, _), (seconds, megabytes) in zip(cases, costs, strict=True):
        details = {"system": name, "frames": count, "tokens": count // 4 * cases[0][2]["side"] ** 2}
        rows.append(Measurement(f"{name}, {count} frames", seconds, "s", details=details | {"megabytes": megabytes}))
        rows.append(Measurement(f"{name}, {count} frames: memory", megabytes, "MiB"))
    return rows


def published_size_rows(network: TATS) -> list[Measurement]:
    """Tokens a second of one sample, compiled and not, and how near that is to reading each weight once a token."""
    weights = sum(p.numel() * p.element_size() for name, p in network.named_parameters() if "embedding" not in name)
    device = network.position_embedding.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    bandwidth = next((speed for part, speed in BANDWIDTH.items() if part in name), None)
    half = network.block_size // 2
    count = min(64, half)
    rows = []
    for label in ("eager", "compiled"):
        if label == "compiled":
            network.through_blocks = torch.compile(network.through_blocks)  # type: ignore[method-assign]
        cache = network.new_cache(is_static=True)
        network.extend(torch.zeros(1, half, dtype=torch.int64, device=device), torch.arange(half, device=device), cache)

        def tokens(count: int, cache: KVCache = cache) -> Tensor:
            cache.clear(kept=half)
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            for position in range(half, half + count):
                features = network.extend(token, torch.tensor([position], device=device), cache)
                token = network.head(features[:, -1]).argmax(dim=-1, keepdim=True)
            return token

        # the last token is waited for
        seconds = seconds_of(lambda tokens=tokens: int(tokens(count)), least_seconds=1.0) / count  # type: ignore[misc]
        details = {"weights_bytes": weights, "device": name}
        rows.append(Measurement(f"published size, {label}: one sample", 1 / seconds, "tokens/s", details=details))
        if bandwidth is not None:
            share = 100 * weights / bandwidth / seconds
            rows.append(Measurement(f"published size, {label}: share of the memory's speed", share, "%", at_least=50.0))
    return rows


@torch.inference_mode()
def run(quick: bool) -> list[Measurement]:
    """Measure."""
    sizes = {"side": 16, "codes": 16384, "dim": 256, "depth": 24, "heads": 4, "latents": 256, "steps": 32}
    if quick:
        sizes = {"side": 4, "codes": 32, "dim": 16, "depth": 2, "heads": 2, "latents": 8, "steps": 4}
    rows = (
        cache_rows(sizes) + long_rows(sizes) + comparison_rows(sizes, FRAMES[:2] if quick else FRAMES, apart=not quick)
    )
    if torch.cuda.is_available() and not quick:
        published = TATS(16384, (4, 16, 16), 1024, 24, 16).eval()
        rows += published_size_rows(published.to("cuda", torch.bfloat16))
    return rows


def plot(measurements: list[Measurement], file: Path) -> None:
    """Seconds and memory of a sample against its frames, MeBT and TATS."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [(row.value, row.details) for row in measurements if row.details and "system" in row.details]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name in ("MeBT", "TATS"):
        mine = [
            (details["frames"], seconds, details["megabytes"]) for seconds, details in rows if details["system"] == name
        ]
        frames, seconds, megabytes = zip(*mine, strict=True)
        for panel, values in zip(axes, (seconds, megabytes), strict=True):
            panel.loglog(frames, [max(value, 0.1) for value in values], marker="o", label=name)  # no zeros on a log
            panel.set_xticks(frames, [str(count) for count in frames], minor=False)
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.set_xlabel("frames")
    axes[0].set_ylabel("seconds a sample")
    axes[1].set_ylabel("peak memory above the networks, MiB")
    axes[0].legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
