"""The pages that are to be typed along, typed along."""

import sys
from pathlib import Path

import av
import pytest
import torch
from pages import run_page
from torch import Tensor, nn

import experiments.evaluate
from experiments.cli import console
from models.metrics import Detector, DetectorCard, Preprocessing


class Colours(nn.Module):
    """Three means: what stands for I3D, of which a clip takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        features = video.mean((2, 3, 4)) * self.scale
        return features, features


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.slow
def test_the_tutorial_leads_from_nothing_to_a_table_of_four_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    card = DetectorCard("random_toy", "random, none", 3, 3, Preprocessing(32, "half_pixel"))
    monkeypatch.setattr(experiments.evaluate, "random_i3d", lambda: Detector(Colours(), card))
    kinds = run_page("tutorial.md")
    assert {kinds.count("yaml") > 5, kinds.count("bash") > 4, kinds.count("python") > 1} == {True}
    for name, frames in (("mebt", 16), ("commit", 16), ("tats", 16), ("walt", 9)):
        with av.open(f"{name}.mp4") as container:
            assert sum(1 for _ in container.decode(video=0)) == frames
        assert len(list(Path("samples", name).glob("seed=*[0-9].mp4"))) == 2
    table = Path("race/compare.md").read_text()
    assert all(f"{name}" in table for name in ("mebt", "commit", "tats", "walt"))


def test_a_paper_is_added_without_a_line_of_the_house_changed() -> None:
    assert run_page("adding_a_paper.md") == ["python", "yaml", "yaml", "bash"]
    assert len(list(Path("samples").glob("seed=*.mp4"))) == 2
    checkpoint = torch.load("runs/maskgit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert "current_model_state" in checkpoint  # averaged weights
    with pytest.raises(SystemExit) as stopped:
        console(["fit", "--config=maskgit.yaml", "--data.num_frames=6"])
    assert "Nearest: 4 or 8 (--data.num_frames)" in str(stopped.value.code)
