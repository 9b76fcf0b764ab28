"""W.A.L.T: a transformer that denoises latents, attending within frames and within windows of space-time in turn.

Gupta, Yu, Sohn, Gu, Hahn, Fei-Fei, Essa, Jiang, Lezama: "Photorealistic Video Generation with Diffusion Models", ECCV
2024. Odd layers attend inside one latent frame (spatial), even layers inside a window of all latent frames
(spatiotemporal). An image passes the attention of the even layers with an identity mask, each token attending to
itself, so that one set of weights learns from images and videos. There is no released code; where the paper is silent,
the docstrings say "our choice".

    x <- x + gate1 * attention(norm(x) (1 + scale1) + shift1)
    x <- x + gate2 * cross_attention(norm(x) (1 + scale2) + shift2, text)      with text only
    x <- x + gate3 * mlp(norm(x) (1 + scale3) + shift3)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.priors.text import ByteTextEncoder

Window = tuple[int, int, int]  # latent frames, rows and columns of tokens

# Depth, width and patch of the paper's models (table 8), with 16 heads everywhere and an MLP of 4 * dim.
WALT_SIZES: dict[str, dict[str, Any]] = {
    "L": {"depth": 24, "dim": 1024},
    "XL": {"depth": 28, "dim": 1152},
    "text-L": {"depth": 24, "dim": 1024, "text_dim": 2048},
    "text-2x": {"depth": 40, "dim": 1408, "text_dim": 2048, "patch_size": 2, "has_low_res": True},
    "text-4x": {"depth": 24, "dim": 1024, "text_dim": 2048, "patch_size": 4, "has_low_res": True},
    # Reconstructed: the table gives width 9216, which would make 71 billion parameters. Read as the width of the MLP
    # beside the width of ViT-e, it makes the 3 billion that the paper reports.
    "text-3B": {"depth": 52, "dim": 1792, "mlp_dim": 9216, "text_dim": 2048},
}


# Windows


def window_partition(x: Tensor, window: Window) -> Tensor:
    """Cut tokens `[B, t, h, w, D]` into windows `[B, W, n, D]`, both in raster order.

    Raises:
        ValueError: If the window does not divide the grid.
    """
    wt, wh, ww = window
    if any(size % part for size, part in zip(x.shape[1:4], window, strict=True)):
        raise ValueError(f"The window {window} does not divide the grid of {tuple(x.shape[1:4])} tokens.")
    return rearrange(x, "b (t wt) (h wh) (w ww) d -> b (t h w) (wt wh ww) d", wt=wt, wh=wh, ww=ww)


def window_reverse(windows: Tensor, window: Window, grid: Window) -> Tensor:
    """Undo `window_partition`: windows `[B, W, n, D]` to the grid `[B, t, h, w, D]`."""
    (wt, wh, ww), (t, h, w) = window, grid
    pattern = "b (t h w) (wt wh ww) d -> b (t wt) (h wh) (w ww) d"
    return rearrange(windows, pattern, t=t // wt, h=h // wh, w=w // ww, wt=wt, wh=wh, ww=ww)


def relative_index(window: Window) -> Tensor:
    """For each pair of tokens in a window, the entry `[n, n]` of the bias table that belongs to their offset."""
    axes = [torch.arange(size) for size in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [n, 3]
    offset = places[:, None] - places[None] + torch.tensor(window) - 1  # [n, n, 3], from 0
    _, rows, columns = (2 * size - 1 for size in window)
    return (offset[..., 0] * rows + offset[..., 1]) * columns + offset[..., 2]


# Attention


class WindowAttention(nn.Module):
    """Self-attention inside windows, or cross-attention from windows to themselves and a text.

    Queries and keys are normalised per head (as in ViT-22B: a learned scale, no bias), which bounds the logits.

    Args:
        dim: Width `D`.
        num_heads: Attention heads.
        window: Window of a relative position bias (Swin), a table per head; None does without.
        qk_norm: Whether queries and keys are normalised.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, window: Window | None = None, qk_norm: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}. Choose a divisor (--model.num_heads).")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.query_norm = nn.LayerNorm(dim // num_heads, bias=False) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(dim // num_heads, bias=False) if qk_norm else nn.Identity()
        entries = math.prod(2 * size - 1 for size in window) if window is not None else 0
        self.relative_bias = nn.Parameter(torch.empty(entries, num_heads)) if window is not None else None

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (heads d) -> (...) heads n d", heads=self.num_heads)

    def forward(
        self,
        x: Tensor,
        bias_index: Tensor | None = None,
        is_image: Tensor | bool = False,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, W, n, D]` windows.
            bias_index: `[n, n]` from `relative_index`, for a layer with a bias.
            is_image: `[B]` rows whose tokens attend to themselves alone, so that values pass as they are; or one answer
                for all.
            text: `[B, W, S, D]` keys and values besides the window's own.
            text_mask: `[B, W, S]` bool, True for tokens of the text that are no padding.

        Returns:
            `[B, W, n, D]`.
        """
        value = self.value(x)
        if is_image is True:
            return self.proj(value)
        context = x if text is None else torch.cat([x, text], dim=2)  # [B, W, n + S, D]
        q = self.query_norm(self._heads(self.query(x)))
        k = self.key_norm(self._heads(self.key(context)))
        v = value if text is None else torch.cat([value, self.value(text)], dim=2)
        mask = None
        if self.relative_bias is not None and bias_index is not None:
            mask = rearrange(self.relative_bias[bias_index], "n m heads -> 1 heads n m").to(q.dtype)
        if text_mask is not None:
            seen = F.pad(text_mask, (x.shape[2], 0), value=True)  # own tokens are never masked: no row is empty
            mask = rearrange(seen, "b w s -> (b w) 1 1 s")
        v = self._heads(v)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)  # the norms give float32
        out = rearrange(out, "(b w) heads n d -> b w n (heads d)", b=x.shape[0])
        if isinstance(is_image, Tensor):
            # not a mask, which would deny videos the fast kernels, and not a split, whose sizes the host would wait for
            out = torch.where(is_image[:, None, None, None], value, out)
        return self.proj(out)


# Conditioning


def timestep_embedding(times: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of times `[...]` as `[..., dim]`, periods from 2 pi to 10,000 * 2 pi (DiT)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
    angles = times[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """Sinusoids and a small MLP: a time, or a level of noise, as a vector of the model's width.

    Args:
        dim: Width `D`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        """Embed times `[...]` as `[..., D]`."""
        return self.mlp(timestep_embedding(times).to(next(self.parameters()).dtype))


class AdaLNLoRA(nn.Module):
    """Modulation of all layers from one condition: a shared projection, and a low-rank difference for each layer.

    W.A.L.T, equation 3: `A_1 = MLP(e)`, `A_i = A_1 + B_i A_i e`. With rank None each layer has a projection of its own
    (the ImageNet model).

    Args:
        dim: Width `D`.
        outputs: Numbers for each channel: 6, or 9 with cross-attention (our choice; it gives the reported 419M).
        depth: Layers.
        rank: Rank of the differences; None for separate projections.
        lora_on_first: Whether the first layer has a difference too. The equation says no, the published parameter
            counts say yes.
    """

    def __init__(self, dim: int, outputs: int, depth: int, rank: int | None = 2, lora_on_first: bool = True) -> None:
        super().__init__()
        self.outputs = outputs
        self.rank = rank
        self.first = 0 if lora_on_first else 1
        shared = 1 if rank is not None else depth
        self.projections = nn.ModuleList(nn.Linear(dim, outputs * dim) for _ in range(shared))
        low_rank = range(depth - self.first) if rank is not None else ()
        self.down = nn.ModuleList(nn.Linear(dim, rank or 0, bias=False) for _ in low_rank)
        self.up = nn.ModuleList(nn.Linear(rank or 0, outputs * dim, bias=False) for _ in low_rank)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """Return each layer's modulation `[outputs, ..., D]` of a condition `[..., D]`."""
        e = F.silu(condition)  # our choice, as DiT
        if self.rank is None:
            flat = [projection(e) for projection in self.projections]
        else:
            shared = self.projections[0](e)
            flat = [shared] * self.first
            flat += [shared + up(down(e)) for down, up in zip(self.down, self.up, strict=True)]
        return [rearrange(a, "... (k d) -> k ... d", k=self.outputs) for a in flat]


# Layers


class WALTLayer(nn.Module):
    """Window attention, cross-attention if there is text, and an MLP, all modulated.

    Args:
        dim: Width `D`.
        num_heads: Attention heads.
        mlp_dim: Width of the MLP.
        window: Window of the attention.
        cross_window: Window of the cross-attention; None without text.
        is_spatiotemporal: Whether the window reaches over frames, so that images must pass with an identity mask.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        window: Window,
        cross_window: Window | None,
        is_spatiotemporal: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.window = window
        self.cross_window = cross_window
        self.is_spatiotemporal = is_spatiotemporal
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = WindowAttention(dim, num_heads, window, qk_norm)
        self.cross_attention = WindowAttention(dim, num_heads, None, qk_norm) if cross_window else None
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def extra_repr(self) -> str:
        """Name the windows."""
        return f"window={self.window}, cross_window={self.cross_window}"

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        bias_index: Tensor,
        is_image: Tensor | bool,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the new tokens.

        Args:
            x: `[B, t, h, w, D]`.
            modulation: `[6 or 9, B, 1 or t, 1, 1, D]`.
            bias_index: As for the attention.
            is_image: As for the attention.
            text: `[B, 1 or t, S, D]`.
            text_mask: `[B, 1 or t, S]`.
        """
        triples = iter(rearrange(modulation, "(branch three) ... -> branch three ...", three=3))
        grid: Window = (x.shape[1], x.shape[2], x.shape[3])

        shift, scale, gate = next(triples)
        windows = window_partition(self.norm(x) * (1 + scale) + shift, self.window)
        attended = self.attention(windows, bias_index, is_image if self.is_spatiotemporal else False)
        x = x + gate * window_reverse(attended, self.window, grid)

        if self.cross_attention is not None and self.cross_window is not None and text is not None:
            shift, scale, gate = next(triples)
            windows = window_partition(self.norm(x) * (1 + scale) + shift, self.cross_window)
            each = (
                windows.shape[1] // text.shape[1]
            )  # windows in one frame, or in the clip where the text is the clip's
            own_text = repeat(text, "b f s d -> b (f each) s d", each=each)
            own_mask = None if text_mask is None else repeat(text_mask, "b f s -> b (f each) s", each=each)
            attended = self.cross_attention(windows, text=own_text, text_mask=own_mask)
            x = x + gate * window_reverse(attended, self.cross_window, grid)

        shift, scale, gate = next(triples)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


# The network


class WALT(nn.Module):
    """Velocity of noisy latents. The defaults are W.A.L.T-L on UCF-101, without classes.

    Args:
        latent_dim: Channels of the latents.
        latent_shape: Latent frames, rows and columns of a clip; one frame makes a model of images.
        dim: Width `D`.
        depth: Layers, spatial and spatiotemporal in turn.
        num_heads: Attention heads.
        mlp_dim: Width of the MLPs; None takes 4 * dim.
        patch_size: Rows and columns of latents in a token.
        spatial_window: Rows and columns of tokens in a spatial window; None takes the whole frame.
        spatiotemporal_window: Rows and columns of tokens in a spatiotemporal window, which has all latent frames; None
            takes half of the frame's rows and columns, as 5 x 8 x 8 on 5 x 16 x 16.
        adaln_rank: Rank of AdaLN-LoRA; None for a full projection in each layer.
        lora_on_first: Whether the first layer has a low-rank part, see `AdaLNLoRA`.
        num_classes: Classes; 0 for none.
        text_dim: Width of the text's vectors; 0 for none.
        byte_tokens: Longest text, in bytes, of an encoder that is trained along, `text_encoder`; 0 for vectors from
            elsewhere.
        joint_images: Whether batches hold stacks of images besides videos; cross-attention is inside frames then.
        has_past: Whether known frames come as more channels.
        has_low_res: Whether a low-resolution latent comes as more channels, with a level of noise.
        qk_norm: Whether queries and keys are normalised.
        full_attention: Whether all layers attend to the whole clip instead of windows: what the paper compares with in
            table 3b. Not for images.

    Raises:
        ValueError: If patches or windows do not divide the latents.
    """

    spatial_index: Tensor
    spatiotemporal_index: Tensor

    def __init__(
        self,
        latent_dim: int = 8,
        latent_shape: Window = (5, 16, 16),
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        patch_size: int = 1,
        spatial_window: tuple[int, int] | None = None,
        spatiotemporal_window: tuple[int, int] | None = None,
        adaln_rank: int | None = 2,
        lora_on_first: bool = True,
        num_classes: int = 0,
        text_dim: int = 0,
        byte_tokens: int = 0,
        joint_images: bool = False,
        has_past: bool = False,
        has_low_res: bool = False,
        qk_norm: bool = True,
        full_attention: bool = False,
    ) -> None:
        super().__init__()
        t, height, width = latent_shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size={patch_size} does not divide latents of {height} x {width} (--model.patch_size)."
            )
        h, w = height // patch_size, width // patch_size
        for name, window in (("spatial_window", spatial_window), ("spatiotemporal_window", spatiotemporal_window)):
            if window is not None and (h % window[0] or w % window[1]):
                raise ValueError(f"{name}={tuple(window)} does not divide {h} x {w} tokens (--model.{name}).")
        if depth < 2 or depth % 2:
            raise ValueError(f"depth={depth}: layers come in pairs, give an even number (--model.depth).")
        rows, columns = spatial_window or (h, w)
        st_rows, st_columns = spatiotemporal_window or (h // 2 if h % 2 == 0 else h, w // 2 if w % 2 == 0 else w)
        windows: tuple[Window, Window] = ((1, rows, columns), (t, st_rows, st_columns))
        if full_attention:
            if joint_images or spatial_window or spatiotemporal_window:
                raise ValueError(
                    "full_attention knows neither windows nor stacks of images: leave --model.spatial_window, "
                    "--model.spatiotemporal_window and --model.joint_images alone."
                )
            windows = ((t, h, w), (t, h, w))
        self.grid: Window = (t, h, w)
        self.num_tokens = t * h * w
        self.latent_dim = latent_dim
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.joint_images = joint_images
        channels = 2 * latent_dim + (latent_dim + 1 if has_past else 0) + (latent_dim if has_low_res else 0)
        self.has_past = has_past
        self.patch_embedding = nn.Linear(channels * patch_size**2, dim)
        self.spatial_positions = nn.Parameter(torch.empty(h, w, dim))
        self.temporal_positions = nn.Parameter(torch.empty(t, dim))
        self.time_embedder = TimeEmbedder(dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim) if num_classes else None  # the last one is "none"
        self.text_encoder = ByteTextEncoder(text_dim, byte_tokens) if byte_tokens else None
        self.text_projection = nn.Linear(text_dim, dim) if text_dim else None
        self.low_res_upsampler = nn.Conv2d(latent_dim, 4 * latent_dim, 3, padding=1) if has_low_res else None
        self.low_res_time_embedder = TimeEmbedder(dim) if has_low_res else None
        self.adaln = AdaLNLoRA(dim, 9 if text_dim else 6, depth, adaln_rank, lora_on_first)
        self.layers = nn.ModuleList()
        for i in range(depth):
            # a text for each image of a stack: its frame's tokens alone may read it
            cross_window = windows[0 if joint_images else i % 2] if text_dim else None
            self.layers.append(
                WALTLayer(dim, num_heads, mlp_dim or 4 * dim, windows[i % 2], cross_window, i % 2 == 1, qk_norm)
            )
        with torch.device("cpu"):
            indices = [relative_index(window) for window in windows]
        self.register_buffer("spatial_index", indices[0], persistent=False)
        self.register_buffer("spatiotemporal_index", indices[1], persistent=False)
        self.final_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, latent_dim * patch_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT does (our choice): each layer starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, WindowAttention) and module.relative_bias is not None:
                nn.init.normal_(module.relative_bias, std=0.02)
        for positions in (self.spatial_positions, self.temporal_positions):
            nn.init.normal_(positions, std=0.02)
        for linear in (*self.adaln.projections, *self.adaln.up, self.final_modulation, self.head):
            nn.init.zeros_(linear.weight)
        for parameter in self.time_embedder.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Parameters under weight decay: the weights of Linear layers and convolutions (our choice)."""
        names = {f"{name}.weight" for name, m in self.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        return [parameter for name, parameter in self.named_parameters() if name in names]

    def forward(
        self,
        noisy: Tensor,
        times: Tensor,
        estimate: Tensor | None = None,
        label: Tensor | None = None,
        past: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        is_image: Tensor | None = None,
        low_res: Tensor | None = None,
        low_res_times: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity. All that is not given is a condition that is absent.

        Args:
            noisy: `[B, C, t, H, W]` latents with noise. Rows are videos, or stacks of t images.
            times: `[B]`, or `[B, t]` for stacks of images with a time each.
            estimate: `[B, C, t, H, W]` the last estimate of the clean latents (self-conditioning).
            label: `[B]`, or `[B, t]` for stacks of images; `num_classes` stands for none.
            past: `[B, C + 1, t, H, W]` known latents, zero elsewhere, and the mask that is 1 where they are known.
            text: `[B, S, E]`, or `[B, t, S, E]` for stacks of images.
            text_mask: `[B, (t,) S]` bool, True for tokens that are no padding.
            is_image: `[B]` bool, rows that are stacks of images.
            low_res: `[B, C, t, H / 2, W / 2]` latents of the stage before.
            low_res_times: `[B]` noise levels of `low_res`.

        Returns:
            `[B, C, t, H, W]`.

        Raises:
            ValueError: If a text or a low-resolution latent is missing, or texts of images come to a model of videos.
        """
        t = self.grid[0]
        parts = [noisy, torch.zeros_like(noisy) if estimate is None else estimate]
        if self.has_past:
            parts.append(noisy.new_zeros(len(noisy), self.latent_dim + 1, *noisy.shape[2:]) if past is None else past)
        if self.low_res_upsampler is not None:
            if low_res is None or low_res_times is None:
                raise ValueError("This model enlarges a video: it needs low_res and low_res_times.")
            frames = rearrange(low_res, "b c t h w -> (b t) c h w")
            larger = F.pixel_shuffle(self.low_res_upsampler(frames), 2)
            parts.append(rearrange(larger, "(b t) c h w -> b c t h w", b=len(noisy)))
        patches = rearrange(
            torch.cat(parts, dim=1),
            "b c t (h p) (w q) -> b t h w (p q c)",
            p=self.patch_size,
            q=self.patch_size,
        )
        x = self.patch_embedding(patches) + self.spatial_positions + self._frame_positions(noisy, is_image)

        condition = self._per_frame(self.time_embedder(times))  # [B, 1 or t, D]
        if self.class_embedding is not None:
            none = times.new_full(times.shape, self.num_classes, dtype=torch.long)
            condition = condition + self._per_frame(self.class_embedding(none if label is None else label))
        if self.low_res_time_embedder is not None:
            condition = condition + self._per_frame(self.low_res_time_embedder(low_res_times))
        if self.text_projection is not None:
            if text is None or (text.ndim == 4 and not self.joint_images):
                raise ValueError("This model reads texts [B, S, E]; [B, t, S, E] with joint_images alone.")
            text = self.text_projection(text if text.ndim == 4 else text[:, None])  # [B, 1 or t, S, D]
            if text_mask is not None and text_mask.ndim == 2:
                text_mask = text_mask[:, None]

        # a clip of one frame is an image
        in_time: Tensor | bool = True if t == 1 else False if is_image is None else is_image
        modulations = self.adaln(condition[:, :, None, None])  # each [6 or 9, B, 1 or t, 1, 1, D]
        for i, (layer, modulation) in enumerate(zip(self.layers, modulations, strict=True)):
            index = self.spatiotemporal_index if i % 2 else self.spatial_index
            x = layer(x, modulation, index, in_time, text, text_mask)

        shift, scale = self.final_modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=-1)
        out = self.head(self.final_norm(x) * (1 + scale) + shift)
        return rearrange(out, "b t h w (p q c) -> b c t (h p) (w q)", p=self.patch_size, q=self.patch_size)

    def _per_frame(self, vectors: Tensor) -> Tensor:
        """`[B, D]` or `[B, t, D]` as `[B, 1 or t, D]`."""
        return vectors if vectors.ndim == 3 else vectors[:, None]

    def _frame_positions(self, noisy: Tensor, is_image: Tensor | None) -> Tensor:
        """`[1 or B, t, 1, 1, D]`: images are at time 0, whatever place in the stack they have."""
        positions = self.temporal_positions[None]  # [1, t, D]
        if is_image is not None:
            positions = torch.where(is_image[:, None, None], positions[:, :1], positions)
        return positions[:, :, None, None]


# Other resolutions


def resized_plane(table: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate a table `[h, w, D]` to other rows and columns, corners on corners, so that the centre stays."""
    plane = rearrange(table, "h w d -> 1 d h w")
    plane = F.interpolate(plane, tuple(size), mode="bilinear", align_corners=True)
    return rearrange(plane, "1 d h w -> h w d")


def resized_state(source: WALT, target: WALT) -> dict[str, Tensor]:
    """Weights of a network for one of another frame: what W.A.L.T fine-tunes 9:16 videos from.

    Absolute and relative positions are interpolated in space; how is our choice. Time must be the same.

    Raises:
        ValueError: If the networks have different depths or numbers of frames.
    """
    ours, theirs = (len(source.layers), source.grid[0]), (len(target.layers), target.grid[0])
    if ours != theirs:
        raise ValueError(
            f"Positions are interpolated in space alone: from {ours[0]} layers and {ours[1]} latent frames to as many, "
            f"not to {theirs[0]} and {theirs[1]}."
        )
    state = dict(source.state_dict())
    state["spatial_positions"] = resized_plane(state["spatial_positions"], target.grid[1:])
    for i, (old, new) in enumerate(zip(source.layers, target.layers, strict=True)):
        assert isinstance(old, WALTLayer)
        assert isinstance(new, WALTLayer)
        (t, h, w), (_, new_h, new_w) = old.window, new.window
        name = f"layers.{i}.attention.relative_bias"
        tables = state[name].unflatten(0, (2 * t - 1, 2 * h - 1, 2 * w - 1))
        size = (2 * new_h - 1, 2 * new_w - 1)
        state[name] = torch.stack([resized_plane(table, size) for table in tables]).flatten(0, 2)
    return state
