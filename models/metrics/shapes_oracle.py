"""Scores that know the truth about moving shapes, from pixels alone.

The embedded world is simple enough to be read back from its pictures: a clip holds a few objects, each of a colour of
its own, each a circle, square, triangle or cross that keeps its size, moves at constant speed and bounces off the
walls. What a network has generated is a good clip of this world if it can be read in this way. So the oracle recovers
the objects (`recover_objects`) and measures how far they keep to the world's laws (`score_clips`). It needs no real
clips to compare with, no trained network, and few samples; unlike a distance between distributions it says what went
wrong, and for which clip. It does not see whether the clips are as various as those of the world.

How objects are recovered, by analysis and synthesis:

1. An object is a colour, since no two objects of a clip share one. It is in a frame if enough pixels have its colour.
2. The background stands still and is smooth: a least-squares fit of low cosines to the pixels that no colour touches.
3. Each pixel is a mixture of two of background and colours: where two meet, an edge was smoothed over one pixel.
4. Shape, size and place are those of the template that explains these shares best. A search on a coarse grid, by
   Fourier transforms, gives each object one size for each kind of shape and each frame a place; Gauss-Newton steps on
   the full grid follow. Pixels of an object in front say nothing about the one behind.
5. Who is in front shows where the templates overlap. Then 4 is repeated, for now it is known what hides what.

The oracle gives the benefit of the doubt: what is hidden behind another object is not held against a clip, and what is
seen in part counts by how much of the outline is seen. But it does not see shapes in clouds: all scores of a clip are
weighed by how much of its variance the scene that was recovered explains, since in noise the same few colours are
"there" in all frames, and keep to some laws by being everywhere. True clips are explained whole, blurred ones by more
than two thirds, noise not at all.
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.shapes_world import COLOURS, MOTIONS, SHAPES, signed_distance

# What the scores tolerate: at these errors a score is one half.
POSITION_TOLERANCE = 1 / 128  # box widths, half a pixel of 64
SIZE_TOLERANCE = 1 / 128  # box widths
SHAPE_TOLERANCE = 0.02  # squared error, in areas of the object, by which another shape fits better
RESIDUAL_TOLERANCE = 0.05  # mean absolute difference of a pixel, in [-1, 1], from the scene drawn again
EXPLAINED = (0.2, 0.6)  # share of a clip's variance up to which nothing is believed, and from which on all is

MIN_AREA = 1 / 1024  # of the picture: less of a colour is no object
COARSE = 32  # pixels of the grid for the first search
RADII = tuple(0.05 + 0.025 * i for i in range(17))  # to search through, in box widths
SEARCH_FRAMES = 4  # frames in which an object's size is searched for: those that show most of it
BACKGROUND_WAVES = 10  # cosines an axis
STEPS = 3  # of Gauss and Newton
BEYOND = 2  # pixels around the picture
HIDDEN_SHARE = 0.15  # at most so much of a hidden object may stand out behind the others
ENOUGH_EVIDENCE = 0.3  # to foretell from
STANDSTILL = 0.002  # box widths a frame: what is slower does not move

_PALETTE = torch.tensor(list(COLOURS.values()))  # [6, 3]
_DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]])  # [motion, xy]


@dataclass(frozen=True)
class Objects:
    """What was recovered from a clip of T frames: K objects, in the order of the palette.

    Lengths are in box widths, x to the right and y down. What belongs to frames in which an object is not visible has
    no meaning.

    Args:
        colours: `[K]` int64, index into `COLOURS`.
        shapes: `[K]` int64, index into `SHAPES`: the kind that explains the clip best.
        motions: `[K]` int64, index into `MOTIONS`: the nearest to the object's velocity.
        radii: `[K]`, half the width and height.
        speeds: `[K, 2]`, distance along x and y from one frame to the next.
        is_front: `[K]` bool, whether no other object is seen to hide it.
        visible: `[K, T]` bool.
        hidden: `[K, T]` bool: not visible, and rightly so, behind other objects.
        positions: `[K, T, 2]`, centres.
        frame_radii: `[K, T]`.
        shape_errors: `[K, T, 4]`, squared error of each kind of shape, in areas of the object.
        evidence: `[K, T, 2]` in [0, 1]: how much of the outline is seen, of what tells the place along x and y.
    """

    colours: Tensor
    shapes: Tensor
    motions: Tensor
    radii: Tensor
    speeds: Tensor
    is_front: Tensor
    visible: Tensor
    hidden: Tensor
    positions: Tensor
    frame_radii: Tensor
    shape_errors: Tensor
    evidence: Tensor


def coverage(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Share of pixels that a shape covers; all arguments in pixels."""
    return (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)


@cache
def _smooth_basis(size: int) -> Tensor:
    """Products of low cosines along y and x, the background's basis `[H W, w w]`."""
    centres = (torch.arange(size) + 0.5) / size
    waves = torch.cos(torch.pi * torch.arange(BACKGROUND_WAVES)[:, None] * centres)  # [w, W]
    return torch.einsum("ay,bx->yxab", waves, waves).flatten(2).flatten(0, 1)


def _fit_background(video: Tensor, touched: Tensor) -> Tensor:
    """Smooth background `[3, H, W]` of a clip `[3, T, H, W]`, from the pixels that are not `touched` `[T, H, W]`."""
    size = video.shape[-1]
    basis = _smooth_basis(size)
    free = (~touched).to(video.dtype)
    count = free.sum(0).flatten()  # [H W]
    mean = ((video * free).sum(1).flatten(1) / count.clamp(min=1)).T  # [H W, 3]
    weighted = basis * count[:, None]
    normal = weighted.T @ basis
    ridge = 1e-4 * len(touched) * size**2 * torch.eye(len(normal))
    centre = mean[count > 0].mean(0) if count.any() else mean.new_full((3,), -0.5)
    waves_of_clip = torch.linalg.solve(normal + ridge, weighted.T @ (mean - centre))  # [w w, 3]
    return (basis @ waves_of_clip + centre).T.view(3, size, size)


def _shares(video: Tensor, cores: Tensor, touched: Tensor, background: Tensor, palette: Tensor) -> Tensor:
    """Shares `[K + 1, T, H, W]` of the K colours and, last, of the background in each pixel.

    Args:
        video: `[3, T, H, W]`.
        cores: `[K, T, H, W]` float, 1 where a pixel has an object's colour.
        touched: `[T, H, W]` bool, where it is not all background.
        background: `[3, H, W]`.
        palette: `[K, 3]`.
    """
    inside = -F.max_pool2d(-cores, 3, 1, 1)
    shares = torch.cat([inside, (~touched)[None].to(inside.dtype)])
    edge = shares.sum(0) == 0  # [T, H, W]
    pixels = video[:, edge]  # [3, n]
    sources = [*palette[:, :, None], background[:, None].expand_as(video)[:, edge]]  # [3, n or 1] each
    lowest = torch.full_like(pixels[0], torch.inf)
    mixtures = pixels.new_zeros(len(sources), pixels.shape[1])
    for i in range(len(sources)):
        for j in range(i):
            axis = sources[j] - sources[i]
            share = (((pixels - sources[i]) * axis).sum(0) / axis.square().sum(0)).clamp(0, 1)  # [n]
            error = (pixels - sources[i] - share * axis).square().sum(0)
            mixture = torch.zeros_like(mixtures)
            mixture[j], mixture[i] = share, 1 - share
            mixtures = torch.where(error < lowest, mixture, mixtures)
            lowest = torch.minimum(lowest, error)
    shares[:, edge] = mixtures
    return shares


def _targets(shares: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """What each object's template is to equal `[K, T, H, W]`, and with what weight.

    Pixels of an object behind it are as good as background, those of any other object have no weight.
    """
    others = shares[:-1]  # [K, T, H, W]
    unknown = (~behind.T & ~torch.eye(len(behind), dtype=torch.bool)).to(shares.dtype)  # [K, K]
    weights = (1 - torch.einsum("kj,jthw->kthw", unknown, others)).clamp(0, 1)
    return (others / weights.clamp(min=1e-6)).clamp(max=1), weights


@dataclass(frozen=True)
class _Templates:
    """Each kind of shape in each of R sizes, on the coarse grid.

    Args:
        spectra: `[4, R, y, x]`, conjugated.
        square_spectra: `[4, R, y, x]`, of the squares, conjugated.
        offsets: `[4, R, y, x]`, to be added to the costs of each place: infinite where the shape would reach beyond the
            walls, and a little for its area, so that of two sizes that explain a half-hidden object the smaller is
            taken.
    """

    spectra: Tensor
    square_spectra: Tensor
    offsets: Tensor


@cache
def _templates() -> _Templates:
    places, radii = torch.fft.fftfreq(COARSE, 1 / COARSE), torch.tensor(RADII) * COARSE  # [COARSE], [R]
    templates = torch.stack(
        [coverage(shape, places, places[:, None], radii[:, None, None]) for shape in range(len(SHAPES))]
    )
    from_centre = (torch.arange(COARSE) + 0.5 - COARSE / 2).abs()
    beyond = from_centre > COARSE / 2 - radii[:, None] + 1  # [R, COARSE]
    offsets = 0.02 * templates.sum((2, 3), keepdim=True).expand_as(templates)
    offsets = offsets.masked_fill(beyond[:, :, None] | beyond[:, None, :], torch.inf)
    return _Templates(torch.fft.rfft2(templates).conj(), torch.fft.rfft2(templates.square()).conj(), offsets)


def _search(targets: Tensor, weights: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find each object's size for each kind of shape, and its place in each frame.

    Args:
        targets: `[K, T, H, W]`.
        weights: `[K, T, H, W]`.
        visible: `[K, T]` bool.

    Returns:
        Radii `[K, 4]` and centres `[K, T, 4, 2]` in pixels of the full grid, and the cost `[K, T, 4]` in coarse pixels.
    """
    templates = _templates()
    products = F.adaptive_avg_pool2d(targets * weights, COARSE)  # [K, T, y, x]
    squares = F.adaptive_avg_pool2d(targets.square() * weights, COARSE).sum((2, 3))  # [K, T]
    products, spectra = torch.fft.rfft2(products), torch.fft.rfft2(F.adaptive_avg_pool2d(weights, COARSE))

    def costs(k: int, frames: Tensor, sizes: Tensor) -> Tensor:
        """Squared error `[n, 4, r, y, x]` of object k's templates of `sizes` `[4, r]` at each place in `[n]` frames."""
        kinds = torch.arange(len(SHAPES))[:, None]
        spectrum = (
            spectra[k, frames, None, None] * templates.square_spectra[kinds, sizes]
            - 2 * products[k, frames, None, None] * templates.spectra[kinds, sizes]
        )
        error = torch.fft.irfft2(spectrum, (COARSE, COARSE)) + squares[k, frames, None, None, None, None]
        return error + templates.offsets[kinds, sizes]

    objects, num_frames = visible.shape
    all_sizes = torch.arange(len(RADII)).expand(len(SHAPES), -1)
    radii = targets.new_zeros(objects, len(SHAPES))
    centres = targets.new_zeros(objects, num_frames, len(SHAPES), 2)
    lowest = targets.new_zeros(objects, num_frames, len(SHAPES))
    for k in range(objects):
        mass = targets[k].mul(weights[k]).sum((1, 2)).masked_fill(~visible[k], -1)
        most_seen = mass.topk(min(SEARCH_FRAMES, int(visible[k].sum()))).indices
        sizes = costs(k, most_seen, all_sizes).flatten(3).amin(3).sum(0).argmin(1)  # [4]
        radii[k] = torch.tensor(RADII)[sizes] * targets.shape[-1]
        frames = visible[k].nonzero()[:, 0]
        lowest[k, frames], place = costs(k, frames, sizes[:, None]).flatten(2).min(2)  # [n, 4]
        centres[k, frames] = torch.stack([place % COARSE, place // COARSE], dim=-1) + 0.5
    return radii, centres * (targets.shape[-1] / COARSE) - 0.5, lowest


def _depth(shares: Tensor, centres: Tensor, radii: Tensor, shapes: Tensor, visible: Tensor) -> Tensor:
    """Whether object k is seen to be behind object j `[K, K]`: j's colour shows where k's template is."""
    size = shares.shape[-1]
    pixels = torch.arange(size)
    inner = (
        torch.stack(
            [
                # well inside: the places are not exact yet
                coverage(int(shape), pixels - c[:, 0, None, None], pixels[:, None] - c[:, 1, None, None], r - size / 32)
                for shape, c, r in zip(shapes, centres, radii, strict=True)
            ]
        )
        * visible[:, :, None, None]
    )  # [K, T, H, W]
    lost = torch.einsum("kthw,jthw->kjt", inner, shares[:-1])
    lost = lost.where(lost > MIN_AREA * size**2, 0).sum(2)  # [K, K]
    behind = lost > lost.T
    behind.fill_diagonal_(False)
    for _ in range(len(behind)):  # behind what is behind
        behind = behind | ((behind.float() @ behind.float()) > 0) & ~behind.T
    return behind


def _refine(
    targets: Tensor, weights: Tensor, visible: Tensor, radii: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gauss-Newton steps on place and size, for each kind of shape, on the full grid.

    Args:
        targets: `[K, T, H, W]`.
        weights: `[K, T, H, W]`.
        visible: `[K, T]` bool.
        radii: `[K, 4]` in pixels.
        centres: `[K, T, 4, 2]` in pixels.

    Returns:
        Centres `[K, T, 4, 2]` and radii `[K, T, 4]` in pixels, errors `[K, T, 4]` in areas of the object, and evidence
        `[K, T, 4, 2]`.
    """
    # Beyond the walls there is nothing: this tells the size of an object at a wall.
    targets, weights = F.pad(targets, (BEYOND,) * 4), F.pad(weights, (BEYOND,) * 4, value=1.0)
    centres = centres + BEYOND
    size = targets.shape[-1]
    objects, frames = visible.nonzero(as_tuple=True)  # [n]
    start, prior = centres[objects, frames].transpose(0, 1), radii[objects].T  # [4, n, 2], [4, n]
    side = min(int(2 * prior.max()) + 8, size) if len(objects) else size
    corner = (start.mean(0) - (side - 1) / 2).round().long().clamp(0, size - side)  # [n, 2]
    grid = corner[:, :, None] + torch.arange(side)  # [n, 2, P]
    window = (objects[:, None, None], frames[:, None, None], grid[:, 1, :, None], grid[:, 0, None, :])
    target, weight = targets[window], weights[window]  # [n, P, P]

    def offsets(centre: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (grid - centre[..., None]).unbind(2)  # [4, n, P] each
        return x[..., None, :], y[..., None]

    def templates(centre: Tensor, radius: Tensor) -> Tensor:
        x, y = offsets(centre)
        return torch.stack([coverage(s, x[s], y[s], radius[s, :, None, None]) for s in range(len(SHAPES))])

    centre, radius = start, prior
    anchor = torch.diag(torch.tensor([0.1, 0.1, 1.0]))
    for _ in range(STEPS):
        x, y = offsets(centre)
        template = templates(centre, radius)  # [4, n, P, P]
        by_x = (F.pad(template, (1, -1)) - F.pad(template, (-1, 1))) / 2
        by_y = (F.pad(template, (0, 0, 1, -1)) - F.pad(template, (0, 0, -1, 1))) / 2
        by_radius = (x * by_x + y * by_y) / radius[..., None, None]  # a template that grows is one seen from nearer
        jacobian = torch.stack([by_x, by_y, by_radius], dim=2).flatten(3)  # [4, n, 3, P P]
        weighted = jacobian * weight.flatten(1)[:, None]
        gradient = (weighted @ (target - template).flatten(2)[..., None])[..., 0]
        gradient[..., 2] += anchor[2, 2] * (prior - radius)
        normal = weighted @ jacobian.transpose(-1, -2) + anchor  # [4, n, 3, 3]
        step = torch.linalg.solve(normal, gradient).clamp(-2, 2)
        centre, radius = centre + step[..., :2], (radius + step[..., 2]).clamp(1, size / 2)
    template = templates(centre, radius)
    error = (weight * (template - target).square()).sum((2, 3)) / template.sum((2, 3)).clamp(min=1)
    slopes = jacobian[:, :, :2].square()
    evidence = (slopes * weight.flatten(1)[:, None]).sum(3) / slopes.sum(3).clamp(min=1e-6)  # [4, n, 2]

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(*visible.shape, len(SHAPES), *values.shape[2:])
        out[objects, frames] = values.transpose(0, 1)
        return out

    return spread(centre - BEYOND), spread(radius), spread(error), spread(evidence)


def _speeds(positions: Tensor, evidence: Tensor) -> Tensor:
    """Distance from frame to frame along each axis `[K, 2]`: the median, for only where it bounces is it another."""
    distance = positions.diff(dim=1).abs()  # [K, T - 1, 2]
    weight = torch.minimum(evidence[:, 1:], evidence[:, :-1])
    return _weighted_median(distance, weight)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Median along axis 1 `[K, n, ...]`; 0 where all weights are."""
    values, order = values.sort(dim=1)
    total = weights.gather(1, order).cumsum(1)
    first = (total < total[:, -1:] / 2).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
    return torch.where(total[:, -1] > 0, values.gather(1, first)[:, 0], 0)


def _reflect(positions: Tensor, radii: Tensor) -> Tensor:
    """Fold positions `[K, ...]` of objects that went through a wall back into the box."""
    radii = radii.view(-1, *[1] * (positions.dim() - 1))
    span = (1 - 2 * radii).clamp(min=1e-3)
    return radii + span - ((positions - radii) % (2 * span) - span).abs()


def _deviations(positions: Tensor, evidence: Tensor, radii: Tensor, speeds: Tensor) -> tuple[Tensor, Tensor]:
    """How far the frames before and after are from where an object comes from and goes to.

    Args:
        positions: `[K, T, 2]`.
        evidence: `[K, T, 2]`, 0 in frames without the object.
        radii: `[K]`.
        speeds: `[K, 2]`.

    Returns:
        Squared distance of the previous frame's position, and of the next one's, if the object moves forwards and if
        it moves backwards: `[K, T, 2 axes, 2 directions]` each; 0 where there is no such frame.
    """
    direction = torch.tensor([1.0, -1.0])
    step = speeds[:, None, :, None] * direction  # [K, 1, 2, 2]
    here = positions[..., None]
    before = (_reflect(here[:, 1:] - step, radii) - here[:, :-1]).square()
    after = (_reflect(here[:, :-1] + step, radii) - here[:, 1:]).square()
    both = ((evidence[:, 1:] > 0) & (evidence[:, :-1] > 0))[..., None]
    return F.pad(before * both, (0, 0, 0, 0, 1, 0)), F.pad(after * both, (0, 0, 0, 0, 0, 1))


def _hidden(
    shares: Tensor,
    behind: Tensor,
    visible: Tensor,
    shapes: Tensor,
    radii: Tensor,
    tracks: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Whether objects that are not visible are where those in front hide them `[K, T]`.

    The place is foretold from the nearest frame in which enough of the object is seen, at constant speed.
    """
    positions, evidence, speeds = tracks
    size = shares.shape[-1]
    hidden = torch.zeros_like(visible)
    before, after = _deviations(positions, evidence, radii, speeds)
    direction = 1.0 - 2.0 * (before + after).argmin(-1)  # [K, T, 2]

    pixels = (torch.arange(size) + 0.5) / size
    for k in range(len(visible)):
        known = (evidence[k].amin(-1) > ENOUGH_EVIDENCE).nonzero()[:, 0]
        missing = (~visible[k]).nonzero()[:, 0]
        if not len(missing) or not len(known) or not behind[k].any():
            continue
        nearest = known[(missing[:, None] - known).abs().argmin(1)]  # [m]
        travelled = direction[k, nearest] * speeds[k] * (missing - nearest)[:, None]
        place = _reflect((positions[k, nearest] + travelled)[None], radii[k : k + 1])[0]  # [m, 2]
        x, y = ((pixels - place[..., None]) * size).unbind(1)  # [m, size] each
        template = coverage(int(shapes[k]), x[:, None], y[:, :, None], radii[k] * size)
        cover = F.max_pool2d(shares[:-1][behind[k]][:, missing].sum(0), 3, 1, 1)
        hidden[k, missing] = (template * (1 - cover)).sum((1, 2)) < HIDDEN_SHARE * template.sum((1, 2))
    return hidden


def recover_objects(video: Tensor) -> tuple[Objects, Tensor]:
    """Read the objects of a clip from its pixels.

    Args:
        video: `[3, T, H, W]` in [-1, 1], T >= 3, H = W >= 32.

    Returns:
        The objects, and the scene drawn again from them `[3, T, H, W]`, on the CPU, where all is computed.
    """
    video = video.detach().float().cpu()
    size = video.shape[-1]
    palette = _PALETTE
    # A colour's channels are all 1 or -1; nowhere on an edge between two colours or with the background is a third
    # one as near as this.
    cores = ((video * palette[:, :, None, None, None]).amin(1) > 0.25).to(video.dtype)  # [6, T, H, W]
    visible = cores.sum((2, 3)) >= MIN_AREA * size**2
    colours = visible.any(1).nonzero()[:, 0]  # [K]
    cores, visible = cores[colours], visible[colours]
    touched = F.max_pool2d(cores.sum(0), 5, 1, 2) > 0
    background = _fit_background(video, touched)
    shares = _shares(video, cores, touched, background, palette[colours])

    objects, num_frames, each = len(colours), video.shape[1], torch.arange(len(colours))
    behind = torch.zeros(objects, objects, dtype=torch.bool)
    kinds = len(SHAPES)
    radii, centres = video.new_zeros(objects, kinds), video.new_zeros(objects, num_frames, kinds, 2)
    costs = video.new_zeros(objects, num_frames, kinds)
    stale = torch.ones_like(each, dtype=torch.bool)
    while stale.any():  # twice at most
        targets, weights = _targets(shares, behind)
        radii[stale], centres[stale], costs[stale] = _search(targets[stale], weights[stale], visible[stale])
        shapes = costs.sum(1).argmin(1)  # [K]
        before, behind = behind, _depth(shares, centres[each, :, shapes], radii[each, shapes], shapes, visible)
        stale = behind.any(0) & ~before.any()
    targets, weights = _targets(shares, behind)
    centres, frame_radii, errors, evidence = _refine(targets, weights, visible, radii, centres)

    shapes = errors.sum(1).argmin(1)
    positions = (centres[each, :, shapes] + 0.5) / size  # [K, T, 2]
    frame_radii = frame_radii[each, :, shapes] / size  # [K, T]
    evidence = evidence[each, :, shapes]  # [K, T, 2]
    clip_radii = _weighted_median(frame_radii, evidence.mean(-1))
    speeds = _speeds(positions, evidence)
    motions = (speeds @ _DIRECTIONS.T).argmax(1)
    found = Objects(
        colours=colours,
        shapes=shapes,
        motions=torch.where(speeds.norm(dim=1) < STANDSTILL, -1, motions),
        radii=clip_radii,
        speeds=speeds,
        is_front=~behind.any(1),
        visible=visible,
        hidden=_hidden(shares, behind, visible, shapes, clip_radii, (positions, evidence, speeds)),
        positions=positions,
        frame_radii=frame_radii,
        shape_errors=errors,
        evidence=evidence,
    )
    order = behind.sum(1).argsort(descending=True, stable=True)  # the hindmost first
    return found, _draw(found, order, background)


def _draw(objects: Objects, order: Tensor, background: Tensor) -> Tensor:
    """Draw recovered objects, in `order`, over a background `[3, H, W]`: `[3, T, H, W]`."""
    size = background.shape[-1]
    pixels = (torch.arange(size) + 0.5) / size
    video = background[:, None].repeat(1, objects.visible.shape[1], 1, 1)
    for k in order.tolist():
        frames = objects.visible[k].nonzero()[:, 0]
        x, y = ((pixels - objects.positions[k, frames, :, None]) * size).unbind(1)
        radius = objects.frame_radii[k, frames, None, None] * size
        covered = coverage(int(objects.shapes[k]), x[:, None], y[:, :, None], radius)  # [f, H, W]
        colour = _PALETTE[objects.colours[k]][:, None, None, None]
        video[:, frames] += (colour - video[:, frames]) * covered
    return video


@dataclass(frozen=True)
class OracleScores:
    """Scores of B clips, `[B]` each, from 0 to 1; a clip without any object has 0 everywhere, and so has noise.

    Args:
        count: constancy of the number of objects: 1 less the mean deviation from its median, relative to it.
        kind: constancy of the kinds of shape: in each frame, how little worse the clip's kind fits than the best one.
        colour: constancy of the colours: each is there (or hidden) always; 0 if in half of the frames.
        size: constancy of the sizes.
        velocity: constancy of the velocities between bounces; 0 for an object that stands still.
        fidelity: how near the clip is to the scene drawn again from what was recovered.
        class_accuracy: whether shape and motion of the front object are those of the label; None without labels. Where
            the clip leaves open which object is in front, one of those that may be is enough.
    """

    count: Tensor
    kind: Tensor
    colour: Tensor
    size: Tensor
    velocity: Tensor
    fidelity: Tensor
    class_accuracy: Tensor | None = None

    @property
    def overall(self) -> Tensor:
        """Mean of all but the class accuracy: so that models with and without labels can be compared."""
        return torch.stack([self.count, self.kind, self.colour, self.size, self.velocity, self.fidelity]).mean(0)

    def as_dict(self) -> dict[str, Tensor]:
        """All scores that there are, by name, `overall` last."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None} | {"overall": self.overall}


def _falloff(errors: Tensor, tolerance: float) -> Tensor:
    """1 without an error, one half at the tolerance."""
    return 1 / (1 + (errors / tolerance).square())


def _weighted_mean(scores: Tensor, weights: Tensor) -> Tensor:
    """Mean over everything, 0 if there is no weight."""
    return (scores * weights).sum() / weights.sum().clamp(min=1e-6)


def _score(video: Tensor, label: int | None) -> list[float]:
    """Scores of one clip, in the order of `OracleScores`."""
    found, drawn = recover_objects(video)
    if not len(found.colours):
        return [0.0] * (6 if label is None else 7)
    there = (found.visible | found.hidden).float()  # [K, T]
    numbers = there.sum(0)
    usual = numbers.median().clamp(min=1)
    count = (1 - (numbers - usual).abs().mean() / usual).clamp(min=0)
    colour = (2 * there.mean(1) - 1).abs().mean()

    seen = found.evidence.mean(-1)  # [K, T]
    errors = found.shape_errors
    of_clip = errors.gather(2, found.shapes[:, None, None].expand(-1, errors.shape[1], 1))[..., 0]
    kind = _weighted_mean(_falloff(of_clip - errors.amin(2), SHAPE_TOLERANCE), seen)
    size = _weighted_mean(_falloff(found.frame_radii - found.radii[:, None], SIZE_TOLERANCE), seen)

    before, after = _deviations(found.positions, found.evidence, found.radii, found.speeds)
    deviation = ((before + after) / 2).amin(-1).sum(-1).sqrt()[:, 1:-1]  # [K, T - 2]
    steadiness = _falloff(deviation, POSITION_TOLERANCE) * (found.motions >= 0)[:, None]
    velocity = _weighted_mean(steadiness, found.evidence.amin(-1).unfold(1, 3, 1).amin(-1))

    fidelity = _falloff((video - drawn).abs().mean(), RESIDUAL_TOLERANCE)
    scores = torch.stack([count, kind, colour, size, velocity, fidelity])
    if label is not None:
        classes = torch.where(found.motions < 0, -1, found.shapes * len(MOTIONS) + found.motions)
        scores = torch.cat([scores, (classes[found.is_front] == label).any()[None]])
    return (scores * _belief(video, drawn)).tolist()


def _belief(video: Tensor, drawn: Tensor) -> Tensor:
    """How far the scene drawn again explains the clip, beyond its mean colour: from 0 to 1, which is reached early."""
    variance = (video - video.mean((1, 2, 3), keepdim=True)).square().sum()
    explained = 1 - (video - drawn).square().sum() / variance.clamp(min=1e-6)
    nothing, all_of_it = EXPLAINED
    return ((explained - nothing) / (all_of_it - nothing)).clamp(0, 1)


def score_clips(video: Tensor, labels: Tensor | None = None) -> OracleScores:
    """Score clips by how well they keep to the laws of the moving shapes.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1], at least 3 frames, square, at least 32 x 32.
        labels: `[B]` int64, what the clips were asked to show (an index into `CLASS_NAMES`), if anything.

    Returns:
        Scores `[B]`, on the CPU, where all is computed.

    Raises:
        ValueError: if the video is of another shape, or not finite.
    """
    batch, *rest = video.shape
    if len(rest) != 4 or rest[0] != 3 or rest[1] < 3 or rest[2] != rest[3] or rest[2] < COARSE:
        raise ValueError(
            f"Expected video [B, 3, T, H, W] with at least 3 frames and H = W >= {COARSE}, got {list(video.shape)}."
        )
    video = video.detach().float().cpu()
    if not video.isfinite().all():
        raise ValueError("The video holds NaN or infinite values; the oracle reads pixels in [-1, 1].")
    scores = [_score(clip, None if labels is None else int(labels[i])) for i, clip in enumerate(video)]
    return OracleScores(*torch.tensor(scores).view(batch, 6 if labels is None else 7).unbind(1))
