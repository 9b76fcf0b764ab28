"""How far the oracle of the moving shapes can be trusted: its scores of true clips, of damaged ones, and of noise.

Clips are those of two worlds, the data module's default and the demo's. A score of true clips below one is the oracle's
error; each kind of damage has to lower the overall score, of every clip; where there is no object there is no score.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.shapes import MovingShapes, Scene
from experiments.benchmarks.report import Measurement
from models.metrics.shapes_oracle import score_clips
from models.random import keyed_generator
from models.shapes_world import COLOURS, SHAPES


def blur(video: Tensor, sigma: float) -> Tensor:
    """Blur the frames of `[3, T, H, W]` with a Gaussian of `sigma` pixels, edges repeated."""
    reach = 4 * round(sigma + 0.5)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    for dim in (2, 3):
        lines = video.movedim(dim, 3)
        blurred = F.conv1d(F.pad(lines.reshape(-1, 1, lines.shape[3]), (reach, reach), mode="replicate"), kernel)
        video = blurred.view(lines.shape).movedim(3, dim)
    return video


def blocks(video: Tensor, share: float) -> Tensor:
    """Mix `[3, T, H, W]` with its means over blocks of 8 x 8."""
    means = F.interpolate(F.avg_pool2d(video.transpose(0, 1), 8), scale_factor=8).transpose(0, 1)
    return video + share * (means - video)


def without_front_object(scene: Scene) -> Scene:
    """Leave out object 0."""
    return replace(
        scene,
        shapes=scene.shapes[1:],
        motions=scene.motions[1:],
        colours=scene.colours[1:],
        radii=scene.radii[1:],
        positions=scene.positions[1:],
    )


def damaged(dataset: MovingShapes, index: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a clip `[3, T, H, W]` in each state of disrepair."""
    video, scene, frames = dataset.render(index), dataset.ground_truth(index), dataset.num_frames
    half = frames // 2
    generator = keyed_generator(dataset.seed, index)

    def from_the_middle(other: Scene) -> Tensor:
        return torch.cat([video[:, :half], dataset._draw(index, other)[:, half:]], dim=1)

    def at_times(times: Tensor) -> Tensor:
        longer = dataset.ground_truth(index, 0, 2 * frames)
        return dataset._draw(index, replace(longer, positions=longer.positions[:, times]))

    yield "frames shuffled", video[:, torch.randperm(frames, generator=generator)]
    yield "frames frozen", video[:, :1].expand_as(video)
    spare = next(colour for colour in range(len(COLOURS)) if colour not in scene.colours)
    yield (
        "colour changes",
        from_the_middle(replace(scene, colours=torch.cat([torch.tensor([spare]), scene.colours[1:]]))),
    )
    yield "object vanishes", from_the_middle(without_front_object(scene))
    shapes = torch.cat([(scene.shapes[:1] + 1) % len(SHAPES), scene.shapes[1:]])
    yield "shape changes", from_the_middle(replace(scene, shapes=shapes))
    yield "twice as fast", at_times(torch.cat([torch.arange(half), torch.arange(half, 2 * frames - half, 2)]))
    yield "half as fast", at_times(torch.cat([torch.arange(0, 2 * half, 2), torch.arange(2 * half, frames + half)]))
    noise = torch.randn(video.shape, generator=generator)
    for std in (0.02, 0.05, 0.1):
        yield f"noise {std}", video + std * noise
    for sigma in (0.5, 1.0, 2.0, 3.0):
        yield f"blur {sigma}", blur(video, sigma)
    for share in (0.25, 0.5, 0.75, 1.0):
        yield f"blocks {share}", blocks(video, share)


def measure(dataset: MovingShapes, true_clips: int, damaged_clips: int) -> dict[str, dict[str, float]]:
    """Mean scores of each kind of clip, the share of clips whose overall score fell, and clips a second."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    drops: dict[str, list[bool]] = defaultdict(list)
    names: list[str] = []
    seconds = 0.0
    for index in range(true_clips):
        label = torch.tensor([dataset.ground_truth(index).label])
        video = dataset.render(index)
        start = time.process_time()
        scores = score_clips(video[None], label).as_dict()
        seconds += time.process_time() - start
        names = list(scores)
        rows["true"].append(torch.cat(list(scores.values())))
        if index < damaged_clips:
            for kind, clip in damaged(dataset, index):
                rows[kind].append(torch.cat(list(score_clips(clip[None], label).as_dict().values())))
                drops[kind].append(bool(rows[kind][-1][-1] < rows["true"][index][-1]))
    table: dict[str, dict[str, float]] = {}
    for kind, values in rows.items():
        table[kind] = dict(zip(names, torch.stack(values).mean(0).tolist(), strict=True))
        if kind in drops:
            table[kind]["falls"] = sum(drops[kind]) / len(drops[kind])
    table["true"]["clips_per_second"] = true_clips / seconds
    return table


def run(quick: bool) -> list[Measurement]:
    """Measure both worlds, and noise."""
    true_clips, damaged_clips = (4, 2) if quick else (500, 24)
    demo = MovingShapes(
        "val", true_clips, 16, min_objects=1, max_objects=2, size=(0.2, 0.3), speed=(0.025, 0.045), texture=0.0
    )
    rows = []
    for world, dataset in (("default", MovingShapes("val", true_clips)), ("demo", demo)):
        table = measure(dataset, true_clips, damaged_clips)
        true = table.pop("true")
        rows.append(Measurement(f"{world}: speed, 16 frames", true.pop("clips_per_second"), "clips/s"))
        rows += [
            Measurement(f"{world}: {name} of {true_clips} true clips", score, "of 1", at_least=0.98)
            for name, score in true.items()
        ]
        for kind, scores in table.items():
            falls = scores.pop("falls")
            name = f"{world}, {kind}: clips whose score falls"
            rows.append(Measurement(name, falls, "of 1", at_least=1.0, details=scores))
    generator = keyed_generator(0)
    for kind, video in (
        ("uniform", torch.rand(4, 3, 16, 64, 64, generator=generator) * 2 - 1),
        ("Gaussian", torch.randn(4, 3, 16, 64, 64, generator=generator).clamp(-1, 1)),
        ("still grey", torch.zeros(4, 3, 16, 64, 64)),
        ("still red", torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(4, 3, 16, 64, 64)),
    ):
        overall = float(score_clips(video).overall.max())
        rows.append(Measurement(f"{kind}: highest overall score", overall, "of 1", at_most=0.0))
    return rows
