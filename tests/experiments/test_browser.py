"""What a person sees: TensorBoard and the report, opened in headless Chromium."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.report import main as report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]
Open = Callable[..., str]
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"


@pytest.fixture
def open_page(tmp_path: Path) -> Open:
    """Opens an address, and returns the page's elements as they are once its scripts have run."""

    def command(address: str, *options: str) -> str:
        words = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",  # which root cannot have; the pages are our own
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            address,
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=180, check=True).stdout

    return command


def tags_of(address: str) -> dict[str, Any]:
    """The images of all runs that TensorBoard has read by now."""
    with urllib.request.urlopen(f"{address}data/plugin/images/tags") as answer:
        return {run: tags for run, tags in json.load(answer).items() if tags}


@pytest.fixture(scope="module")
def tensorboard(mebt_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard over one run, at a free port: its address."""
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    words = [sys.executable, "-m", "tensorboard.main", f"--logdir={mebt_run.parent}", "--port=0"]
    with log.open("w") as opened, subprocess.Popen(words, stdout=opened, stderr=opened) as server:
        try:
            deadline = time.monotonic() + 180
            while (found := re.search(r"http://localhost:\d+/", log.read_text())) is None:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            # it serves pages before it has read the run, and a page asks again only after half a minute
            while not tags_of(found.group()):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield found.group()
        finally:
            server.terminate()


def test_tensorboard_plays_the_samples(tensorboard: str, open_page: Open) -> None:
    options = ("--window-size=1300,2000", "--virtual-time-budget=20000", "--dump-dom")
    page = open_page(f"{tensorboard}?tagFilter=samples#timeseries", *options)
    assert 'title="samples/video"' in page
    (source,) = re.findall(r'<img[^>]* src="([^"]*imageData[^"]*)"', page)
    with urllib.request.urlopen(tensorboard + unescape(source).removeprefix("/")) as answer:
        assert answer.headers["Content-Type"] == "image/gif"
        assert Image.open(answer).n_frames > 1


def test_tensorboard_draws_the_curves_in_groups(tensorboard: str, open_page: Open, tmp_path: Path) -> None:
    options = ("--window-size=1300,2000", "--virtual-time-budget=20000")
    page = open_page(f"{tensorboard}?tagFilter=train/loss#timeseries", *options, "--dump-dom")
    assert 'title="train/loss"' in page
    assert "<line-chart" in page
    # what is drawn by this tab is hidden from the dump
    shot = tmp_path / "custom.png"
    open_page(f"{tensorboard}#custom_scalars", *options, f"--screenshot={shot}")
    with Image.open(shot) as image:
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 100  # an empty tab has a few dozen


@pytest.mark.parametrize(("option", "is_dark"), [(DARK, True), (LIGHT, False)])
def test_the_report_fits_a_phone_in_light_and_dark(
    mebt_run: Path, tmp_path: Path, open_page: Open, option: str, is_dark: bool
) -> None:
    page = tmp_path / "report.html"
    report([str(mebt_run), f"--out={page}"])
    shot = tmp_path / "phone.png"
    open_page(page.as_uri(), "--window-size=390,3000", option, f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (np.median(pixels) < 60) == is_dark
    assert (pixels[:, -8:] == pixels[0, 0]).all()  # the margin: nothing is wider than the screen
    # curves: pixels of the first colour, which the page has for each scheme
    colour = {True: (0x6E, 0xA8, 0xFE), False: (0x25, 0x63, 0xC9)}[is_dark]
    assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 8).sum() > 200
