"""The data path, against what the decoder library alone can do, and the caches, against decoding and tokenizing.

All videos are written here: 320 x 240 pixels, MPEG-4 in AVI with B-frames and one key frame, as UCF-101's are. Clips of
16 frames are resized so that the shorter side is 128 pixels, and cropped.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

from datamodules import FrameCacheDataModule, FramesDataModule, TokenDataModule
from datamodules.frame_cache import FrameWriter
from datamodules.index import index_entries
from datamodules.sampler import ClipRequest
from datamodules.tokens import TokenOptions, TokenWriter
from datamodules.video import VideoClips, VideoDataModule
from experiments.benchmarks.report import Measurement, seconds_in_turn, seconds_of
from models.priors.mebt import MeBT
from models.random import keyed_generator
from models.tokenizers import VQGAN3D, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer

CLIP = 16
WIDTH, HEIGHT = 320, 240


def run(quick: bool) -> list[Measurement]:
    """Measure everything."""
    num_videos, length, resolution, batch_size, least_seconds = (6, 40, 64, 2, 0.2) if quick else (24, 180, 128, 8, 3.0)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(num_videos):
            write_video(root / f"videos/train/{number}.avi", number, length)
        write_video(root / "videos/val/0.avi", num_videos, length)

        def data_module(num_workers: int = 0, **options: Any) -> FramesDataModule:
            return FramesDataModule(
                str(root / "videos"), resolution=resolution, batch_size=batch_size, num_workers=num_workers, **options
            )

        rows = index_speed(root, 24 if quick else 400)
        data = data_module()
        data.setup("fit")
        clips = data.datasets["train"]
        assert isinstance(clips, VideoClips)
        rows += [clip_time(clips, least_seconds), loader_speed(data_module, least_seconds)]
        rows += frame_caches(root, data, least_seconds)
        rows += token_cache(root, data, quick, least_seconds)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a loader's worker processes: what is compared here, is compared thread by thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_video(path: Path, number: int, length: int) -> None:
    """Write a texture that moves, so that there is something to decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texture = torch.full((1, 3, HEIGHT, WIDTH), 0.5)
    for cell in (4, 8, 16, 32, 64):  # as in photographs, the finer the weaker
        grain = torch.rand(1, 3, HEIGHT // cell, WIDTH // cell, generator=keyed_generator(number, cell)) - 0.5
        texture += 0.01 * cell * F.interpolate(grain, (HEIGHT, WIDTH), mode="bicubic")
    picture = (texture.clamp(0, 1) * 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "2", "g": "600"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 1_000_000
        for time in range(length):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, (time, 3 * time), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode_and_resize(path: Path, start: int, resolution: int) -> torch.Tensor:
    """What any reader of a clip must do, with the library alone: decode up to it, convert, resize, crop."""
    size = [round(side * resolution / HEIGHT) for side in (HEIGHT, WIDTH)]
    left = (size[1] - resolution) // 2
    frames: list[torch.Tensor] = []
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number >= start:
                rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                image = torch.from_numpy(rgb).permute(2, 0, 1)[None]
                image = F.interpolate(image, size, mode="bilinear", antialias=True)
                frames.append(image[0, :, :, left : left + resolution])
            if len(frames) == CLIP:
                break
    return torch.stack(frames, dim=1).float().div_(127.5).sub_(1).clamp_(-1, 1)


def index_speed(root: Path, count: int) -> list[Measurement]:
    """Files a second and core that are indexed when they are seen for the first time, at both levels."""
    written = sorted((root / "videos").rglob("*.avi"))
    files = [root / f"many/{number}.avi" for number in range(count)]
    (root / "many").mkdir()
    for number, file in enumerate(files):
        os.link(written[number % len(written)], file)
    fresh = iter(range(1000))
    cores = len(os.sched_getaffinity(0))
    rows = []
    for level, target, some in (("quick", 100.0, files), ("full", None, files[: len(written)])):

        def index(level: Any = level, some: Sequence[Path] = some) -> None:
            index_entries(some, root, root / f"index{next(fresh)}", level)

        seconds = seconds_of(index, 0.0)
        details = {"files": len(some), "cores": cores}
        name = f"index at level {level}, a core"
        rows.append(Measurement(name, len(some) / seconds / cores, "files/s", at_least=target, details=details))
    return rows


def clip_time(clips: VideoClips, least_seconds: float) -> Measurement:
    """A random clip of our data set, in units of the library alone."""
    places = [(clips.videos[index].path, clips.start(index, 0)) for index in range(len(clips))]
    bare, ours = seconds_in_turn(
        [
            lambda: [decode_and_resize(*place, clips.resolution) for place in places],
            lambda: [clips[ClipRequest(index)] for index in range(len(clips))],
        ],
        least_seconds,
    )
    details = {"bare_ms": 1000 * bare / len(clips), "ours_ms": 1000 * ours / len(clips)}
    return Measurement("random clip: our time / PyAV alone", ours / bare, "x", at_most=1.15, details=details)


def loader_speed(data_module: Any, least_seconds: float) -> Measurement:
    """Clips a second of a data module with workers, in units of as many processes that only decode and resize.

    One worker for two cores: the process that trains, here that which receives the batches, needs some of them too.
    """
    workers = min(8, max(1, len(os.sched_getaffinity(0)) // 2))
    data = data_module(workers)
    data.setup("fit")
    clips = data.datasets["train"]
    # longer epochs: at an epoch's end workers wait for the last of them, which would weigh too much here
    clips.videos = [*clips.videos] * 16
    loader = data.train_dataloader()
    places = [(clips.videos[index].path, clips.start(index, 0), clips.resolution) for index in range(len(clips))]
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        bare, ours = seconds_in_turn(
            [lambda: pool.map(_decode_only, places, chunksize=2), lambda: [None for _ in loader]], least_seconds
        )
    bare, ours = bare / len(places), ours / (len(loader) * data.batch_size)
    details = {"workers": workers, "bare_clips_per_s": 1 / bare, "ours_clips_per_s": 1 / ours}
    name = f"data module, workers: {workers}: our clips/s / bare processes"
    return Measurement(name, bare / ours, "x", at_least=0.9, details=details)


def _decode_only(place: tuple[Path, int, int]) -> None:
    decode_and_resize(*place)


def frame_caches(root: Path, data: VideoDataModule, least_seconds: float) -> list[Measurement]:
    """Clips a second from the caches of frames, in units of decoding, in one process."""
    decoding = _seconds_a_clip(data, least_seconds)
    rows = []
    for name, jpeg in (("raw", None), ("JPEG 95", 95)):
        FrameWriter(root / name, data, jpeg).run()
        cached = FrameCacheDataModule(str(root / name), resolution=data.resolution, batch_size=data.batch_size)
        cached.setup("fit")
        seconds = _seconds_a_clip(cached, least_seconds)
        size = sum(file.stat().st_size for file in (root / name).rglob("*.bin"))
        details = {"decoding_clips_per_s": 1 / decoding, "cache_clips_per_s": 1 / seconds, "bytes": size}
        title = f"frame cache, {name}: clips/s / decoding"
        # the aim is that of the raw cache: JPEG files are decoded, too
        rows.append(
            Measurement(title, decoding / seconds, "x", at_least=5.0 if jpeg is None else None, details=details)
        )
    return rows


def _seconds_a_clip(data: VideoDataModule, least_seconds: float) -> float:
    loader = data.train_dataloader()
    return seconds_of(lambda: [None for _ in loader], least_seconds) / (len(loader) * data.batch_size)


def token_cache(root: Path, data: VideoDataModule, quick: bool, least_seconds: float) -> list[Measurement]:
    """Time to load cached codes, as a share of a small training step, and in units of tokenizing online."""
    width, dim = (4, 32) if quick else (16, 256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQGAN3D(
            TimeAgnosticEncoder(base_channels=width),
            VectorQuantizer(1024, 256),
            TimeAgnosticDecoder(base_channels=width),
        ).eval()
        t, h, w = tokenizer.latent_shape(CLIP, data.resolution, data.resolution)
        blocks: Sequence[Any] = ("latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec")
        prior = MeBT(1024, t * h * w, dim=dim, num_heads=4, num_latents=64, blocks=blocks)

    @torch.no_grad()
    def encode(video: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = tokenizer.encode(video).codes
        assert codes is not None
        return {"codes": codes}

    about = {"tokenizer_digest": "untrained", "codebook_size": 1024, "downsample": (4, 8, 8)}
    writer = TokenWriter(root / "codes", data, about, TokenOptions(copies=1))
    writer.begin()
    writer.write(encode)
    writer.close()
    cached = TokenDataModule(str(root / "codes"), resolution=data.resolution, batch_size=data.batch_size)
    cached.setup("fit")
    batch = next(iter(cached.train_dataloader()))["codes"].flatten(1)
    order = torch.randperm(batch.shape[1], generator=keyed_generator(0)).expand(len(batch), -1)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)

    def step() -> None:
        context, targets = order.tensor_split(2, dim=1)
        logits = prior(batch, context, targets)
        F.cross_entropy(logits.transpose(1, 2), batch.gather(1, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    pixels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)["video"]
    loading = data.batch_size * _seconds_a_clip(cached, least_seconds)
    training = seconds_of(step, least_seconds)
    decoding = data.batch_size * _seconds_a_clip(data, least_seconds)
    encoding = seconds_of(lambda: encode(pixels), least_seconds)
    details: dict[str, float] = {"batch_size": data.batch_size, "tokens": t * h * w, "width_of_the_prior": dim}
    times = {"loading": loading, "training": training, "decoding": decoding, "encoding": encoding}
    details |= {f"{name}_ms": 1000 * seconds for name, seconds in times.items()}
    return [
        Measurement(
            "cached codes: loading / a small training step", loading / training, "x", at_most=0.05, details=details
        ),
        Measurement(
            "cached codes: batches/s / tokenizing online", (decoding + encoding) / loading, "x", details=details
        ),
    ]
