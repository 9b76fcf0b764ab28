"""The page that says what a run is, and what it says when there is none."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_compare import result
from torch.utils.tensorboard import SummaryWriter

from experiments.cli import main
from experiments.events import read_events
from experiments.report import Pictures, duration
from experiments.report import main as report
from experiments.starts import read_starts, record_start
from experiments.svg import distinct, grouped, line_chart, log_ticks, short, ticks


def page_of(out: Path, *runs: Path) -> str:
    main(["report", *map(str, runs), f"--out={out}"])
    return out.read_text()


@pytest.fixture(scope="module")
def page(mebt_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("report") / "page.html", mebt_run)


@pytest.fixture
def copied(mebt_run: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    copy = tmp_path / "runs/mebt/version_0"
    shutil.copytree(mebt_run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return copy


def write_run(folder: Path, **scalars: list[float]) -> Path:
    """A run whose curves are given, without training it."""
    with SummaryWriter(folder) as writer:
        for name, values in scalars.items():
            for step, value in enumerate(values):
                writer.add_scalar(name.replace("__", "/"), value, step)
    (folder / "config.yaml").write_text("model: {class_path: lightning_modules.MeBTModule}\ntrainer: {max_steps: 5}\n")
    return folder


# The page


def test_the_page_needs_nothing_but_itself_and_suits_phones_and_the_dark(page: str) -> None:
    assert len(page) < 10_000_000
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", page)
    assert '<meta name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 100%" in page


def test_the_page_has_curves_samples_and_what_the_run_was_made_from(page: str) -> None:
    for chart in ("Loss: training and validation", "Gradients: norm", "Curriculum: frames", "Throughput: tokens"):
        assert f"<figcaption>{chart}" in page
    assert page.count("<svg ") == page.count('<figure class="chart">')
    assert page.count("data:image/gif;base64,") == 1
    assert page.count("data:image/png;base64,") == 1  # of the one validation
    assert "6 of 6" in page
    assert "lightning" in page
    assert "None: the run is the experiment" in page
    assert "make evaluate EXP=mebt" in page


def test_reconstructions_are_called_so(tokenizer_run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", tokenizer_run)
    assert "Reconstructions, each below its original" in page
    assert "<figcaption>Codebook: perplexity" in page


def test_what_differs_from_the_experiment_is_listed(copied: Path, tmp_path: Path) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.5"))
    page = page_of(tmp_path / "page.html", copied)
    assert "<td>model.init_args.lr</td><td>0.001</td><td>0.5</td>" in page
    (copied / "starts.jsonl").unlink()
    page = page_of(tmp_path / "page.html", copied)
    assert "there is no experiment file" in page
    assert "environment was not recorded" in page


def test_scores_stand_with_their_protocol_and_never_mix(copied: Path, tmp_path: Path) -> None:
    for number, content in enumerate((result("mebt/version_0"), result("mebt/version_0", "ucf101_walt", leak=None))):
        (copied / f"evaluation-{number}").mkdir()
        (copied / f"evaluation-{number}/results.json").write_text(json.dumps(content))
    page = page_of(tmp_path / "page.html", copied).replace("\N{NO-BREAK SPACE}", " ")
    magvit, walt = page.split("<h3>ucf101_walt</h3>")
    assert "<td>mebt/version_0</td><td>class</td><td>100 ± 2</td>" in magvit
    assert "MAGVIT-L (published)" in magvit
    assert "W.A.L.T-L (published)" in walt
    assert "10,000 samples x 4" in magvit
    assert "i3d_tf (cdcd" in magvit
    assert "LEAK" in magvit
    assert "Left out: lpips" in magvit


def test_several_runs_share_charts(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a/version_0", train__loss=[3.0, 2.0], val__loss=[2.5])
    two = write_run(tmp_path / "b/version_1", train__loss=[4.0, 1.0])
    page = page_of(tmp_path / "both.html", one, two)
    assert page.count("<svg ") == 2
    chart = page.split("<figcaption>Loss: train/loss</figcaption>")[1].split("</figure>")[0]
    assert chart.count("<polyline") == 2
    assert "a/version_0 <b>2</b>" in chart
    assert "b/version_1 <b>1</b>" in chart


def test_the_page_lies_in_the_first_run_by_default(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a/version_0", train__loss=[3.0])
    report([str(run)])
    assert (run / "report.html").is_file()


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 400_000
    figure = Pictures(100_000).still(tmp_path / "sheet.png", "a <sheet>")
    assert "data:image/webp" in figure
    assert len(figure) < 140_000
    assert "a &lt;sheet&gt;" in figure
    assert "<img" not in Pictures(10).moving(b"x" * 11, "video")


# Bad input


def test_what_is_no_run_is_refused_with_the_runs_below(mebt_run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mebt is no run: .*Runs below it: .*mebt/version_0"):
        report([str(mebt_run.parent)])
    with pytest.raises(FileNotFoundError, match=r"nowhere is no run: .*Give runs/<experiment>/version_<n>"):
        report([str(tmp_path / "nowhere")])


def test_a_run_without_curves_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"holds no curves: .*log_every_n_steps"):
        report([str(tmp_path)])


def test_a_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, train__loss=[1.0])
    (run / "config.yaml").write_text("lr: 1\n")
    with pytest.raises(ValueError, match=r"is no run's configuration: it has no model, trainer\. Restore it"):
        report([str(run)])


@pytest.mark.parametrize("place", [30, -6])
def test_a_damaged_event_file_is_named_with_the_place(copied: Path, place: int) -> None:
    file = next(copied.glob("events.*"))
    data = bytearray(file.read_bytes())
    data[place] ^= 255
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"events\.out.* is damaged at byte [\d,]+ of .*restore it from a copy"):
        report([str(copied)])


def test_an_event_file_of_a_killed_run_is_read_up_to_its_end(copied: Path) -> None:
    file = next(copied.glob("events.*"))
    whole = read_events(copied).scalars
    file.write_bytes(file.read_bytes()[:-5])
    assert read_events(copied).scalars["train/loss"] == whole["train/loss"]


@pytest.mark.parametrize(
    "name", ["config.yaml", "starts.jsonl", "evaluation/results.json", "samples/step=00000006.png"]
)
def test_other_damaged_files_are_named(copied: Path, tmp_path: Path, name: str) -> None:
    (copied / "evaluation").mkdir()
    (copied / name).write_text("{damaged: [")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged"):
        report([str(copied), f"--out={tmp_path / 'page.html'}"])


# Parts


def test_steps_done_again_after_a_kill_count_once(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path, filename_suffix=".0") as writer:
        for step in range(6):
            writer.add_scalar("train/loss", step, step)
    with SummaryWriter(tmp_path, filename_suffix=".1", purge_step=3) as writer:
        writer.add_scalar("train/loss", 30.0, 3)
    assert read_events(tmp_path).scalars == {"train/loss": {0: 0.0, 1: 1.0, 2: 2.0, 3: 30.0}}


def test_starts_are_kept_in_order(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    assert record_start(tmp_path, 0, {"code": "a"}) is None
    before = record_start(tmp_path, 7, {"code": "b"})
    assert before is not None
    assert before["code"] == "a"
    assert [(start["step"], start["code"]) for start in read_starts(tmp_path)] == [(0, "a"), (7, "b")]


def test_charts_of_unusual_values() -> None:
    drawn = line_chart("t <", {"a": {0: math.nan, 1: 1.0, 2: math.inf}, "b": {0: 5.0}})
    assert "t &lt;" in drawn
    assert "2 values are not finite" in drawn
    assert drawn.count("<circle") == 2
    assert "<svg" not in line_chart("diverged", {"a": {0: math.nan}})
    long = {step: 1.0 + step % 3 for step in range(1000)}
    assert "band" in line_chart("long", {"a": long})
    assert len(grouped([(float(x), 0.0) for x in range(1000)])) <= 120
    assert "logarithmic" in line_chart("steep", {"a": {0: 1e-4, 1: 10.0}})
    absent = line_chart("of one run", {"a": {}, "b": {0: 1.0, 1: 2.0}})
    assert "c1" in absent  # the colour that it has in charts of both
    assert "c0" not in absent
    assert ">a " not in absent


def test_numbers_are_short_and_ticks_round() -> None:
    assert [short(x) for x in (0.12345, 45.61, 1234.0, 12345.0, 3.4e6, 1e-5)] == [
        "0.123", "45.6", "1234", "12.3k", "3.4M", "1e-05",
    ]  # fmt: skip
    assert ticks(0.03, 1.02, 4) == [0.25, 0.5, 0.75, 1.0]
    assert log_ticks(-2.3, 1.1) == [0.01, 0.1, 1.0, 10.0]
    assert distinct([2.7405, 2.741]) == ["2.74", "2.741"]
    assert [duration(s) for s in (5, 367, 7500, 90000)] == ["5 s", "6 min 7 s", "2 h 5 min", "1 d 1 h"]
