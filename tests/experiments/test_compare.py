"""One table of evaluations: what is in it, and what must never be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.cli import main
from experiments.protocol import read_protocol

Result = dict[str, Any]


def result(run: str, protocol: str = "ucf101_magvit", **changes: Any) -> Result:
    known = read_protocol(*protocol.split("/"))
    score = {"mean": 100.0, "std": 2.0, "values": [98.0, 102.0]}
    return {
        "run": run,
        "protocol": {"name": known.name, "hash": known.digest, "title": known.title} | known.content(),
        "checkpoint": {"path": "last.ckpt", "sha256": "ab" * 32},
        "conditions": "class",
        "detectors": {"main": {"name": "i3d_tf", "weights": "cd" * 32}},
        "scores": {"fvd": score, "inception_score": score},
        "code": "abc",
        "samples": 10000,
        "real_clips": 10000,
        "seconds_per_sample": 0.5,
        "bytes_per_sample": 2.0**20,
        "device": "cpu",
        "leak": "LEAK: ...",
        "notes": ["lpips: needs its weights"],
    } | changes


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def command(*results: Result, words: tuple[str, ...] = ()) -> str:
        folders = []
        for number, content in enumerate(results):
            folder = tmp_path / f"run{number}/evaluation"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.json").write_text(json.dumps(content))
            folders.append(str(folder.parent))
        main(["compare", *folders, f"--out={tmp_path / 'out'}", *words])
        return capsys.readouterr().out

    return command


def test_published_numbers_stand_beside_ours_under_the_same_protocol_alone(compare, tmp_path: Path) -> None:
    out = compare(result("ours"), result("other", leak=None))
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == "| run | given | fvd | inception_score | s/sample | MiB/sample |"
    assert rows[2] == "| ours | class | 100 ± 2 | 100 ± 2 | 0.5 | 1 |"
    assert "| MAGVIT-L (published) | class | 76 ± 2 | 89.27 ± 0.15 |  |  |" in rows
    assert not any("3D-VQ" in row or "TATS" in row for row in rows)  # other quantities, another protocol
    assert "MAGVIT-L (published): MAGVIT, table 1." in out
    assert out.count("of the split that it was trained on") == 1
    assert "ours, left out: lpips" in out
    assert (tmp_path / "out/compare.md").read_text() in out
    with Image.open(tmp_path / "out/compare.png") as image:
        assert image.width > 300

    changed = result("ours")
    changed["protocol"]["hash"] = "0" * 64  # a protocol of one's own, of the same name
    assert "(published)" not in compare(changed)
    random = result("ours", scores={"frechet_random_i3d": {"mean": 3.0, "std": None, "values": [3.0]}})
    assert "(published)" not in compare(random)


def test_reconstructions_are_compared_with_reconstructions(compare) -> None:
    score = {"mean": 50.0, "std": None, "values": [50.0]}
    out = compare(result("ours", conditions="reconstruction", scores={"rfvd": score}))
    assert "| MAGVIT 3D-VQ-B, central inflation (published) | reconstruction | 58 |" in out
    assert "MAGVIT-L (published)" not in out


def test_mixed_tables_are_refused(compare, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)different protocols.*ours ucf101_magvit.*other ucf101_walt.*--protocol"):
        compare(result("ours"), result("other", "ucf101_walt"))
    changed = copy.deepcopy(result("other"))
    changed["detectors"]["main"]["weights"] = "ef" * 32
    with pytest.raises(ValueError, match=r"(?s)different detectors.*i3d_tf cdcd.*i3d_tf efef"):
        compare(result("ours"), changed)
    assert not (tmp_path / "out").exists()


def test_one_protocol_of_several_can_be_chosen(compare, tmp_path: Path) -> None:
    second = tmp_path / "run0/second"
    second.mkdir(parents=True)
    (second / "results.json").write_text(json.dumps(result("ours", "ucf101_walt")))
    assert "W.A.L.T-L (published)" in compare(result("ours"), words=("--protocol=ucf101_walt",))
    with pytest.raises(FileNotFoundError, match="no results of an evaluation under k600_walt"):
        compare(result("ours"), words=("--protocol=k600_walt",))
