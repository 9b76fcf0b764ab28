"""Scores of videos and codes."""

from models.metrics.codes import conditional_entropy, perplexity
from models.metrics.pixels import psnr

__all__ = ["conditional_entropy", "perplexity", "psnr"]
