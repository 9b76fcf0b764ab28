"""Moving shapes: an embedded data set that needs no files, for demos, tests and quick experiments.

Coloured shapes move at constant speed through a textured box and bounce off its walls. All geometry is in units of the
box (x to the right, y down, both in [0, 1]), so that a clip looks the same at every resolution. The path of a bouncing
shape has a closed form, so that any range of frames is drawn without the ones before it.

On request, clips come with captions, with sound (a click when a shape meets a wall) and with copies of low resolution,
or are still images: what conditional models and joint training need, without a file.
"""

from dataclasses import dataclass
from math import ceil, floor, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.audio import SAMPLING_RATE, WINDOW, spectrogram
from datamodules.sampler import ClipRequest, make_item
from datamodules.video import Split, VideoDataModule
from models.random import keyed_generator
from models.shapes_world import CLASS_NAMES, COLOURS, MOTIONS, SHAPES, signed_distance

MAX_FRAMES = 512
UNITS_PER_SECOND = 25  # of time; it matters for sound alone
CLICK_HERTZ = (500.0, 1000.0, 2000.0, 4000.0)  # of a circle, square, triangle, cross

_STREAMS = {"train": 111, "val": 112}
_STILL_STREAMS = {"train": 113, "val": 114}
_CLICK_SECONDS, _CLICK_DECAY_SECONDS = 0.05, 0.01
_PALETTE = torch.tensor(list(COLOURS.values()))  # [6, 3]
_VELOCITY = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]], dtype=torch.float64)  # [motion, xy]
_TEXTURE_WAVES = 5
_ADVERBS = ("horizontally", "vertically", "diagonally")


@dataclass(frozen=True)
class Scene:
    """The truth about a clip of O objects, front to back: object 0 is never hidden and gives the label.

    Args:
        label: index into `CLASS_NAMES`: shape kind x number of motions + motion kind, of object 0. A still image shows
            no motion: its label is the number of `CLASS_NAMES` + shape kind.
        shapes: `[O]` int64, index into `SHAPES`.
        motions: `[O]` int64, index into `MOTIONS`.
        colours: `[O]` int64, index into `COLOURS`; no two objects of a clip share one.
        radii: `[O]` float64, half the width and height of the objects, in units of the box.
        positions: `[O, T, 2]` float64, centres (x, y) in units of the box.
        bounces: (time, object) of each meeting with a wall that can be heard in these frames, in units of time; empty
            in a data set without sound.
    """

    label: int
    shapes: Tensor
    motions: Tensor
    colours: Tensor
    radii: Tensor
    positions: Tensor
    bounces: tuple[tuple[float, int], ...] = ()


def caption(scene: Scene) -> str:
    """Say what a scene shows, such as "a red circle moves horizontally in front of a blue square".

    The front object comes first, the others from front to back. A still image's caption does not speak of motion.
    """
    names = [
        f"a {list(COLOURS)[colour]} {SHAPES[shape]}"
        for colour, shape in zip(scene.colours.tolist(), scene.shapes.tolist(), strict=True)
    ]
    text = names[0]
    if scene.label < len(CLASS_NAMES):
        text += f" moves {_ADVERBS[int(scene.motions[0])]}"
    if len(names) > 1:
        behind = " and ".join([", ".join(names[1:-1]), names[-1]] if len(names) > 2 else names[1:])
        text += f" in front of {behind}"
    return text


class MovingShapes(Dataset[dict[str, Any]]):
    """Clip i of a split is a pure function of (seed, split, i); it is the same in every epoch.

    A shape's motion is horizontal, vertical or diagonal (equal speed along both axes). Its phase is uniform along its
    bouncing path, direction included. Kinds are uniform; a clip's label is that of its front object.

    Args:
        split: `train` or `val`.
        num_clips: size of the data set.
        num_frames: frames of a clip, up to 512.
        frame_stride: frame k of a clip shows time k x frame_stride.
        resolution: height and width, at least 32 pixels.
        seed: key of everything.
        min_objects: least number of shapes.
        max_objects: largest number of shapes, up to 6.
        speed: least and largest speed, in box widths per unit of time.
        size: least and largest half-width of a shape, in box widths.
        texture: strength of the background's pattern, from 0 (flat) to 1 (0.5 to both sides of the shade).
        shade: least and largest mean of the background, from -1 (black) to 0; each clip has its own.
        captions: whether items hold `text`: see `caption`.
        audio: whether items hold `audio` `[1, T, 64, 16]`, a spectrogram for each frame: a click when a shape meets a
            wall, the pitch by its kind, at 25 units of time a second.
        low_res_factor: items hold `low_res` `[3, T, H / factor, W / factor]`, each pixel the mean of those it stands
            for; None for none.
        stills: whether this is a data set of images: clips of one frame, with `is_image` True and other scenes than
            those of the videos.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        split: Split,
        num_clips: int,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 64,
        seed: int = 0,
        min_objects: int = 1,
        max_objects: int = 3,
        speed: tuple[float, float] = (0.02, 0.06),
        size: tuple[float, float] = (0.1, 0.2),
        texture: float = 0.3,
        shade: tuple[float, float] = (-0.5, -0.5),
        captions: bool = False,
        audio: bool = False,
        low_res_factor: int | None = None,
        stills: bool = False,
    ) -> None:
        checks = {
            f"num_frames={num_frames}: from 1 to {MAX_FRAMES}": 1 <= num_frames <= MAX_FRAMES,
            f"resolution={resolution}: at least 32": resolution >= 32,
            f"min_objects={min_objects}, max_objects={max_objects}: 1 <= min <= max <= {len(COLOURS)}": 1
            <= min_objects
            <= max_objects
            <= len(COLOURS),
            f"speed={speed}: 0 <= least <= largest": 0 <= speed[0] <= speed[1],
            f"size={size}: 0 < least <= largest < 0.5": 0 < size[0] <= size[1] < 0.5,
            f"texture={texture}: from 0 to 1": 0 <= texture <= 1,
            f"shade={shade}: -1 <= least <= largest <= 0": -1 <= shade[0] <= shade[1] <= 0,
            f"low_res_factor={low_res_factor}: a divisor of resolution={resolution}": low_res_factor is None
            or (low_res_factor >= 1 and resolution % low_res_factor == 0),
            f"stills={stills}, num_frames={num_frames}, audio={audio}: an image is one frame, without sound": not stills
            or (num_frames == 1 and not audio),
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(f"Moving shapes cannot be drawn with {rule} (--data.{rule.split('=')[0]}).")
        self.split = split
        self.num_clips = num_clips
        self.num_frames = num_frames
        self.frame_stride = frame_stride
        self.resolution = resolution
        self.seed = seed
        self.min_objects = min_objects
        self.max_objects = max_objects
        self.speed = speed
        self.size = size
        self.texture = texture
        self.shade = shade
        self.captions = captions
        self.audio = audio
        self.low_res_factor = low_res_factor
        self.stills = stills
        self.stream = (_STILL_STREAMS if stills else _STREAMS)[split]

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        count = self.num_frames - request.read_start if request.read_frames is None else request.read_frames
        scene = self.ground_truth(request.index, request.read_start, count)
        video = self._draw(request.index, scene)
        more: dict[str, Any] = {}
        if self.captions:
            more["text"] = caption(scene)
        if self.audio:
            more["audio"] = self._sound(scene, request.read_start, count)
        if self.low_res_factor is not None:
            more["low_res"] = F.avg_pool2d(video, self.low_res_factor)
        if self.stills:
            more["is_image"] = True
        return make_item(request, video, scene.label, **more)

    def render(self, index: int, start: int = 0, num_frames: int | None = None) -> Tensor:
        """Return frames `[start, start + num_frames)` of a clip, by default all, as `[3, T, H, W]` in [-1, 1]."""
        count = self.num_frames - start if num_frames is None else num_frames
        return self._draw(index, self.ground_truth(index, start, count))

    def ground_truth(self, index: int, start: int = 0, num_frames: int | None = None) -> Scene:
        """Return what the frames `[start, start + num_frames)` of a clip show, by default all."""
        count = self.num_frames - start if num_frames is None else num_frames
        if not (0 <= index < self.num_clips and start >= 0 and start + count <= MAX_FRAMES):
            raise IndexError(
                f"Clip {index}, frames [{start}, {start + count}) do not exist: "
                f"there are {self.num_clips} clips of up to {MAX_FRAMES} frames."
            )
        generator = keyed_generator(self.seed, self.stream, index)
        objects = int(torch.randint(self.min_objects, self.max_objects + 1, (), generator=generator))
        shapes = torch.randint(len(SHAPES), (objects,), generator=generator)
        motions = torch.randint(len(MOTIONS), (objects,), generator=generator)
        colours = torch.randperm(len(COLOURS), generator=generator)[:objects]
        uniform = torch.rand(objects, 4, generator=generator, dtype=torch.float64)
        radii = self.size[0] + (self.size[1] - self.size[0]) * uniform[:, 0]
        speeds = self.speed[0] + (self.speed[1] - self.speed[0]) * uniform[:, 1]

        # A triangle wave: on the circle of circumference 2 x span, where the second half is the way back.
        time = torch.arange(start, start + count, dtype=torch.float64) * self.frame_stride  # [T]
        span = (1 - 2 * radii)[:, None, None]  # [O, 1, 1]
        velocity = (speeds[:, None] * _VELOCITY[motions])[:, None]  # [O, 1, 2]
        phase = uniform[:, None, 2:] * 2 * span  # [O, 1, 2]
        distance = (phase + velocity * time[:, None]) % (2 * span)  # [O, T, 2]
        positions = radii[:, None, None] + span - (distance - span).abs()  # [O, T, 2]
        label = len(CLASS_NAMES) + int(shapes[0]) if self.stills else int(shapes[0]) * len(MOTIONS) + int(motions[0])
        bounces: list[tuple[float, int]] = []
        if self.audio:
            # A click that began before the first frame may still be heard in it, and a spectrogram looks ahead.
            ahead = WINDOW / SAMPLING_RATE * UNITS_PER_SECOND
            first = start * self.frame_stride - _CLICK_SECONDS * UNITS_PER_SECOND - ahead
            last = (start + count) * self.frame_stride + ahead
            for i, axis in (velocity[:, 0] > 0).nonzero().tolist():
                offset, rate, way = float(phase[i, 0, axis]), float(velocity[i, 0, axis]), float(span[i])
                # the k-th wall is met where the path's length is k x span
                walls = range(ceil((offset + rate * first) / way), floor((offset + rate * last) / way) + 1)
                bounces += [((wall * way - offset) / rate, i) for wall in walls]
        return Scene(label, shapes, motions, colours, radii, positions, tuple(sorted(bounces)))

    def _sound(self, scene: Scene, start: int, count: int) -> Tensor:
        edges = torch.arange(start, start + count + 1, dtype=torch.float64) * self.frame_stride / UNITS_PER_SECOND
        first = floor(float(edges[0]) * SAMPLING_RATE) - WINDOW
        length = ceil(float(edges[-1]) * SAMPLING_RATE) + WINDOW - first
        waveform = torch.zeros(length)
        for time, i in scene.bounces:
            # the click's samples, as far as they lie in the waveform
            begin = time / UNITS_PER_SECOND * SAMPLING_RATE
            number = torch.arange(
                max(ceil(begin), first), min(ceil(begin + _CLICK_SECONDS * SAMPLING_RATE), first + length)
            )
            seconds = (number - begin) / SAMPLING_RATE
            click = (
                0.5 * (-seconds / _CLICK_DECAY_SECONDS).exp() * (2 * pi * CLICK_HERTZ[scene.shapes[i]] * seconds).sin()
            )
            waveform[number - first] += click.float()
        return spectrogram(waveform, edges, first)

    def _draw(self, index: int, scene: Scene) -> Tensor:
        frames, resolution = scene.positions.shape[1], self.resolution
        background = self._background(index)  # [3, H, W]
        video = background[:, None].repeat(1, frames, 1, 1)  # [3, T, H, W]
        pixels = video.view(3, -1)
        frame_offset = torch.arange(frames)[:, None, None] * resolution**2  # [T, 1, 1]
        for i in reversed(range(len(scene.shapes))):  # back to front
            # One window per frame, large enough for the shape and its smooth edge. Pixel p's centre is at p + 0.5.
            radius = float(scene.radii[i]) * resolution
            centres = scene.positions[i] * resolution - 0.5  # [T, 2]
            side = min(int(2 * radius) + 4, resolution)
            corner = (centres - (side - 1) / 2).round().long().clamp(0, resolution - side)  # [T, 2]
            grid = corner[:, :, None] + torch.arange(side)  # [T, 2, P]
            x, y = (grid - centres[:, :, None]).float().unbind(1)  # [T, P] each, from the centre, in pixels
            distance = signed_distance(int(scene.shapes[i]), x[:, None, :], y[:, :, None], radius)  # [T, P, P]
            # Only products and sums of single elements below: exact, whatever else is drawn in the same call.
            coverage = (0.5 - distance).clamp(0, 1).flatten()  # [T P P]
            where = (frame_offset + grid[:, 1, :, None] * resolution + grid[:, 0, None, :]).flatten()  # [T P P]
            under = pixels[:, where]  # [3, T P P]
            pixels[:, where] = under + (_PALETTE[scene.colours[i], :, None] - under) * coverage
        return video

    def _background(self, index: int) -> Tensor:
        # A stream of its own: what the background draws does not depend on how much the objects drew.
        generator = keyed_generator(self.seed, self.stream, index, 1)
        amplitudes = torch.rand(3, _TEXTURE_WAVES, _TEXTURE_WAVES, generator=generator) * 2 - 1  # [C, y, x]
        amplitudes /= amplitudes.square().sum((1, 2), keepdim=True).sqrt()
        position = (torch.arange(self.resolution) + 0.5) / self.resolution
        waves = torch.cos(torch.pi * torch.arange(_TEXTURE_WAVES)[:, None] * position)  # [wave, W]
        texture = (waves.T @ amplitudes @ waves).clamp(-1, 1)  # [3, H, W]
        shade = self.shade[0] + (self.shade[1] - self.shade[0]) * torch.rand((), generator=generator)
        return (shade + 0.5 * self.texture * texture).clamp(-1, 0)


class MovingShapesDataModule(VideoDataModule):
    """Moving shapes (embedded, no files): see `MovingShapes`.

    Args:
        num_train: training clips.
        num_val: validation clips, different ones.
        num_frames: frames of a clip, up to 512.
        frame_stride: frame k of a clip shows time k x frame_stride.
        resolution: height and width, at least 32 pixels.
        min_objects: least number of shapes in a clip.
        max_objects: largest number of shapes in a clip, up to 6.
        speed: least and largest speed, in box widths per unit of time.
        size: least and largest half-width of a shape, in box widths.
        texture: strength of the background's pattern, from 0 (flat) to 1 (0.5 to both sides of the shade).
        shade: least and largest mean of the background, from -1 (black) to 0; each clip has its own.
        captions: whether batches hold `text`, such as "a red circle moves horizontally in front of a blue square".
        audio: whether batches hold `audio` `[B, 1, T, 64, 16]`: a click when a shape meets a wall.
        low_res_factor: batches hold `low_res`, the video at resolution / factor; null for none.
        stills: whether these are images: clips of one frame (`num_frames=1`) with `is_image`, of other scenes than the
            videos' and of four classes more (12 to 15), which name the shape alone.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 draws in the main process.
        seed: key of the clips and of the data order.
    """

    def __init__(
        self,
        num_train: int = 4096,
        num_val: int = 256,
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 64,
        min_objects: int = 1,
        max_objects: int = 3,
        speed: tuple[float, float] = (0.02, 0.06),
        size: tuple[float, float] = (0.1, 0.2),
        texture: float = 0.3,
        shade: tuple[float, float] = (-0.5, -0.5),
        captions: bool = False,
        audio: bool = False,
        low_res_factor: int | None = None,
        stills: bool = False,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        self.sizes = {"train": num_train, "val": num_val}
        self.min_objects = min_objects
        self.max_objects = max_objects
        self.speed = speed
        self.size = size
        self.texture = texture
        self.shade = shade
        self.captions = captions
        self.audio = audio
        self.low_res_factor = low_res_factor
        self.stills = stills

    def class_names(self) -> list[str]:
        """Return shape and colour of each label."""
        return list(CLASS_NAMES)

    def make_dataset(self, split: Split) -> MovingShapes:
        """Return the clips of a split."""
        return MovingShapes(
            split,
            self.sizes[split],
            self.num_frames,
            self.frame_stride,
            self.resolution,
            self.seed,
            self.min_objects,
            self.max_objects,
            self.speed,
            self.size,
            self.texture,
            self.shade,
            self.captions,
            self.audio,
            self.low_res_factor,
            self.stills,
        )
