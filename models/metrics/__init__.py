"""Scores of videos and codes."""

from models.metrics.c3d import load_c3d
from models.metrics.classes import ClassCoherence, InceptionCoherence, InceptionScore
from models.metrics.codes import conditional_entropy, perplexity
from models.metrics.detectors import Detector, DetectorCard, Features, Preprocessing
from models.metrics.distances import (
    FrechetDistance,
    KernelDistance,
    ReconstructionFrechetDistance,
    SlidingFrechetDistance,
    cut_windows,
    window_starts,
)
from models.metrics.frames import PSNR, SSIM, PerceptualDistance, frame_psnr, frame_ssim
from models.metrics.i3d import load_i3d, random_i3d
from models.metrics.inception import load_inception
from models.metrics.pixels import psnr

__all__ = [
    "PSNR",
    "SSIM",
    "ClassCoherence",
    "Detector",
    "DetectorCard",
    "Features",
    "FrechetDistance",
    "InceptionCoherence",
    "InceptionScore",
    "KernelDistance",
    "PerceptualDistance",
    "Preprocessing",
    "ReconstructionFrechetDistance",
    "SlidingFrechetDistance",
    "conditional_entropy",
    "cut_windows",
    "frame_psnr",
    "frame_ssim",
    "load_c3d",
    "load_i3d",
    "load_inception",
    "perplexity",
    "psnr",
    "random_i3d",
    "window_starts",
]
