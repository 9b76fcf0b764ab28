import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import detector_check
from experiments.detector_check import SanityValue, black_and_white, logits_digest, main
from models.metrics import Detector, load_i3d, random_i3d


@pytest.fixture(scope="module")
def detector() -> Detector:
    return random_i3d()


@pytest.fixture
def published(detector: Detector) -> Detector:
    """The same network under a name that has published values."""
    return Detector(detector.network, replace(detector.card, name="i3d_tf", published={"frechet": "fvd"}))


def test_random_detector_has_nothing_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--detector", "random_i3d", "--out", str(tmp_path / "new" / "check.json")])
    summary = json.loads((tmp_path / "new" / "check.json").read_text())
    assert summary["reported_as"] == "frechet_random_i3d"
    assert summary["values"] == []
    printed = capsys.readouterr().out
    assert summary["logits_sha256"] in printed
    assert "nothing is published for these weights" in printed


def test_digest_of_logits_depends_on_the_weights(detector: Detector) -> None:
    digest, first = logits_digest(detector)
    assert (digest, first) == logits_digest(detector)
    assert len(first) == 3
    assert logits_digest(random_i3d(1))[0] != digest


def test_black_against_white_is_the_squared_distance_of_two_points(detector: Detector) -> None:
    black, white = (detector(torch.full((1, 3, 9, 64, 64), value)).values.double() for value in (-1.0, 1.0))
    expected = float((black - white).square().sum())
    assert black_and_white(detector, clips=3, frames=9) == pytest.approx(expected, rel=1e-9)
    assert expected > 0


def test_noise_is_that_of_one_draw() -> None:
    clips = list(detector_check._noise_clips(1, 2))
    whole = np.random.RandomState(1).rand(2, 16, 224, 224, 3)
    assert torch.equal(torch.cat(clips), torch.from_numpy(whole).float().permute(0, 4, 1, 2, 3))


def values(*ranges: tuple[float, float], is_long: bool = False) -> tuple[SanityValue, ...]:
    return tuple(SanityValue("one", low, high, "a paper", lambda _: 1.0, is_long) for low, high in ranges)


def test_values_within_their_tolerance_pass(
    published: Detector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detector_check, "load_i3d", lambda path, profile, sha256: published)
    monkeypatch.setattr(detector_check, "SANITY_VALUES", values((0.9, 1.1)) + values((5, 6), is_long=True))
    main(["--detector", "weights.pt", "--quick", "--out", str(tmp_path / "check.json")])
    assert "ok     one: 1.0000, expected 0.9 to 1.1; a paper" in capsys.readouterr().out
    assert [value["passed"] for value in json.loads((tmp_path / "check.json").read_text())["values"]] == [True]


def test_a_value_outside_its_tolerance_fails_the_command(published: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_check, "load_i3d", lambda path, profile, sha256: published)
    monkeypatch.setattr(detector_check, "SANITY_VALUES", values((0.9, 1.1), (1.1, 2)))
    with pytest.raises(ValueError, match=r"weights\.pt does not reproduce the published values with profile tf"):
        main(["--detector", "weights.pt"])


def test_published_values_lie_within_their_tolerances() -> None:
    published = [(131, 134.24), (151.39, 151.256), (10.1381,)]
    for value, numbers in zip(detector_check.SANITY_VALUES, published, strict=True):
        assert all(value.low < number < value.high for number in numbers)
        assert value.high - value.low < 0.1 * value.low


def test_missing_file_says_where_it_is_found(tmp_path: Path) -> None:
    assert detector_check.load_i3d is load_i3d
    with pytest.raises(FileNotFoundError, match="No detector weights at"):
        main(["--detector", str(tmp_path / "none.pt")])
