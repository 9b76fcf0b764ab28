"""Which scalars of a run are looked at together, in TensorBoard's custom scalars and in `longtake report`."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Scalars that are looked at together.

    Args:
        group: What the chart is about.
        title: What the chart shows, unique among all charts.
        pattern: Regular expression of the scalars' names, which they match as a whole.
        needs: What a run must have for there to be such scalars: `tokenizer`, `generator`, `curriculum` or `scores`;
            "" is for all runs.
    """

    group: str
    title: str
    pattern: str
    needs: str = ""


# All but the last two: what belongs to none of them is a part of a loss, whatever a module calls it.
_NAMED = (
    Chart("Loss", "training and validation", r"(train|val)/loss"),
    Chart("Scores", "PSNR (dB)", r"val/psnr", "tokenizer"),
    Chart("Scores", "SSIM, LPIPS", r"val/(ssim|lpips)", "tokenizer"),
    Chart("Scores", "Fréchet and kernel distances", r"metrics/(?!shapes_).+", "scores"),
    Chart("Scores", "the shapes' oracle", r"metrics/shapes_.+", "scores"),
    Chart("Codebook", "perplexity", r"(train|val)/(window_)?perplexity", "tokenizer"),
    Chart("Codebook", "share of codes in use", r"(train|val)/(window_)?usage", "tokenizer"),
    Chart("Codebook", "dead codes", r"train/dead_codes", "tokenizer"),
    Chart("Discriminator", "logits", r"train/(.+_)?logits_.+", "tokenizer"),
    Chart("Discriminator", "accuracy", r"train/(.+_)?disc_accuracy", "tokenizer"),
    Chart("Curriculum", "frames of a clip", r"train/clip_frames(_mean)?", "curriculum"),
    Chart("Masks", "share of tokens", r"train/(mask_ratio|corrupted|.+_tokens)", "generator"),
    Chart("Gradients", "norm before clipping", r"train/grad_norm(_disc)?"),
    Chart("Throughput", "tokens a second", r"train/tokens_per_second", "generator"),
    Chart("Throughput", "clips a second", r"train/clips_per_second"),
    Chart("Throughput", "seconds a step", r"train/seconds_per_step"),
    Chart("Throughput", "videos left out", r"data/quarantined_videos"),
)
_OTHERS = "(?!(" + "|".join(chart.pattern for chart in _NAMED) + ")$)"
CHARTS = (
    _NAMED[0],
    Chart("Loss", "its parts in training", f"{_OTHERS}train/.+"),
    Chart("Loss", "its parts in validation", f"{_OTHERS}val/.+"),
    *_NAMED[1:],
)


def chart_of(name: str) -> Chart | None:
    """Return the chart that a scalar belongs to; None for those that nobody watches, such as `epoch`."""
    return next((chart for chart in CHARTS if re.fullmatch(chart.pattern, name)), None)
