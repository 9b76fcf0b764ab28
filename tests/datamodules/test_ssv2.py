import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from datamodules.sampler import ClipRequest
from datamodules.ssv2 import Annotation, SSV2DataModule, mirrored_labels

TEMPLATES = [
    "Holding [something] next to [something]",
    "Pulling [something] from left to right",
    "Pulling [something] from right to left",
    "Putting [number of] [something] upright on the table",
    "Turning the camera left while filming [something]",
    "Turning the camera right while filming [something]",
    "Plugging [something] into [something] but pulling it right out as you remove your hand",
]
NAMES = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
TRAIN = {"4": 0, "8": 1, "15": 2, "16": 3}
VAL = {"23": 4, "42": 1}
TEST = {"1420": 5}
MakeRoot = Callable[..., Path]


@pytest.fixture(scope="session")
def small_webm(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> bytes:
    """VP9 of odd width with one key frame, in a file that says neither how many frames nor how long it is."""
    folder = tmp_path_factory.mktemp("webm")
    options = {"deadline": "realtime", "cpu-used": "8"}
    file = write_video(folder / "a.webm", 12, codec="libvpx-vp9", width=131, height=67, gop_size=100, options=options)
    with av.open(str(file)) as source, av.open(str(folder / "b.webm"), "w", options={"live": "1"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(folder / "b.webm")) as container:
        assert (container.duration, container.streams.video[0].frames) == (None, 0)
    return (folder / "b.webm").read_bytes()


def row(name: str, label: int) -> dict[str, Any]:
    objects = ["potato", "bottle"][: TEMPLATES[label].count("[something]")]
    return {"id": name, "label": f"caption {name}", "template": TEMPLATES[label], "placeholders": objects}


@pytest.fixture
def make_root(tmp_path: Path, small_webm: bytes) -> MakeRoot:
    """The data set in small, with the lists' old or new names, beside the videos or in a folder."""

    def make(
        prefix: str = "", folder: str = ".", videos: str = "20bn-something-something-v2", suffix: str = "webm"
    ) -> Path:
        lists = {
            "labels": {name: str(label) for label, name in enumerate(NAMES)},
            "train": [row(name, label) for name, label in TRAIN.items()],
            "validation": [row(name, label) for name, label in VAL.items()],
            "test": [{"id": name} for name in TEST],
        }
        for place in (folder, videos):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, content in lists.items():
            (tmp_path / folder / f"{prefix}{name}.json").write_text(json.dumps(content))
        answers = [f"{name};{NAMES[label]}" for name, label in TEST.items()]
        (tmp_path / folder / f"{prefix}test-answers.csv").write_text("\n".join(answers) + "\n")
        for name in (*TRAIN, *VAL, *TEST):
            (tmp_path / videos / f"{name}.{suffix}").write_bytes(small_webm)
        return tmp_path

    return make


def data_of(root: Path, **options: Any) -> SSV2DataModule:
    return SSV2DataModule(str(root), **{"num_frames": 4, "resolution": 32, "batch_size": 2, **options})


def labels(data: SSV2DataModule, split: Any) -> dict[str, int]:
    return {path.stem: label for path, label in data.listing()[split].items()}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"prefix": "something-something-v2-"},
        {"folder": "labels"},
        {"folder": "annotations", "videos": "videos/20bn-something-something-v2"},
        {"suffix": "mp4"},
    ],
)
def test_labels_are_those_of_the_templates_in_each_layout(make_root: MakeRoot, layout: dict[str, str]) -> None:
    data = data_of(make_root(**layout))
    assert labels(data, "train") == TRAIN
    assert labels(data, "val") == VAL
    assert data.class_names() == NAMES


def test_batches_hold_video_label_and_index(make_root: MakeRoot) -> None:
    data = data_of(make_root())
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (2, 3, 4, 32, 32)
    assert batch["label"].tolist() == batch["index"].tolist()
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[4, 1]]


def test_all_frames_of_a_file_that_declares_none_are_used(make_root: MakeRoot) -> None:
    dataset = data_of(make_root(), num_frames=12).make_dataset("train")
    assert [video.num_frames for video in dataset.videos] == [12] * 4
    with pytest.raises(ValueError, match=r"none of 4 videos holds 13 frames"):
        data_of(make_root(), num_frames=13).make_dataset("train")


def test_annotations_keep_captions_and_objects(make_root: MakeRoot) -> None:
    annotations = {path.stem: annotation for path, annotation in data_of(make_root()).annotations()["train"].items()}
    assert annotations["4"] == Annotation(NAMES[0], "caption 4", ("potato", "bottle"))
    assert annotations["16"] == Annotation(NAMES[3], "caption 16", ("potato",))


def test_the_test_list_takes_its_classes_from_the_answers(make_root: MakeRoot) -> None:
    assert labels(data_of(make_root(), val_list="test"), "val") == TEST


def test_windows_of_validation_videos_are_spread_over_time(make_root: MakeRoot) -> None:
    val = data_of(make_root(), val_windows=2).make_dataset("val")
    assert [(video.path.stem, video.label) for video in val.videos] == [("23", 4), ("42", 1)] * 2


class TestDirections:
    def test_classes_that_name_left_or_right_are_found_by_their_words(self, make_root: MakeRoot) -> None:
        assert data_of(make_root()).direction_sensitive() == [1, 2, 4, 5]  # `upright` and `right out` are none

    def test_mirrored_labels_exchange_left_and_right(self) -> None:
        assert mirrored_labels(NAMES) == [0, 2, 1, 3, 5, 4, 6]

    def test_nothing_is_mirrored_unless_asked_for(self, make_root: MakeRoot) -> None:
        train = data_of(make_root()).make_dataset("train")
        assert (train.horizontal_flip, train.mirrored_labels) == (False, None)

    def test_half_of_the_training_clips_are_mirrored_with_their_labels(self, make_root: MakeRoot) -> None:
        root = make_root()
        plain, mirrored = (data_of(root, horizontal_flip=flip).make_dataset("train") for flip in (False, True))
        opposite = mirrored_labels(NAMES)
        flips = 0
        for epoch in range(30):
            request = ClipRequest(epoch % 4, epoch)
            before, after = plain[request], mirrored[request]
            if torch.equal(before["video"].flip(3), after["video"]):
                assert after["label"] == opposite[before["label"]]
                flips += 1
            else:
                assert torch.equal(before["video"], after["video"])
                assert after["label"] == before["label"]
        assert 7 < flips < 23  # binomial, 30 draws: 3 standard deviations

    def test_a_window_is_mirrored_as_its_clip_is(self, make_root: MakeRoot) -> None:
        train = data_of(make_root(), horizontal_flip=True).make_dataset("train")
        for epoch in range(6):
            whole = train[ClipRequest(1, epoch)]
            part = train[ClipRequest(1, epoch, window_start=1, window_frames=2, read_start=1, read_frames=2)]
            assert torch.equal(part["video"], whole["video"][:, 1:3])
            assert part["label"] == whole["label"]

    def test_validation_is_never_mirrored(self, make_root: MakeRoot) -> None:
        assert not data_of(make_root(), horizontal_flip=True).make_dataset("val").horizontal_flip

    def test_a_class_without_its_mirror_image_is_refused(self, make_root: MakeRoot) -> None:
        root = make_root()
        names = [name.replace("camera right", "camera up") for name in NAMES]
        (root / "labels.json").write_text(json.dumps({name: str(label) for label, name in enumerate(names)}))
        with pytest.raises(ValueError, match=r"has no `Turning the camera right .*Switch off --data\.horizontal_flip"):
            data_of(root, horizontal_flip=True).make_dataset("train")


class TestWhatDiffers:
    def test_missing_videos_are_listed_where_they_should_be_counted_and_named(self, make_root: MakeRoot) -> None:
        root = make_root()
        missing = root / "20bn-something-something-v2/15.webm"
        missing.unlink()
        data = data_of(root)
        assert data.listing()["train"][missing] == TRAIN["15"]
        with pytest.warns(UserWarning, match=r"1 of 4 videos .* left out, such as: .*15\.webm: is not there"):
            assert len(data.make_dataset("train")) == 3

    def test_files_of_no_list_are_counted_named_and_left_out(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "20bn-something-something-v2/77.webm").write_bytes(b"anything")
        with pytest.warns(UserWarning, match=r"1 files are in no list and left out, such as .*77\.webm"):
            assert labels(data_of(root), "train") == TRAIN


class TestWhatIsRefused:
    def test_a_template_that_is_no_class(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "labels.json").write_text(json.dumps({name: str(label) for label, name in enumerate(NAMES[:3])}))
        with pytest.raises(ValueError, match=r"labels\.json has no class `Putting number of something upright"):
            data_of(root).listing()

    def test_labels_with_a_gap(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "labels.json").write_text(json.dumps({name: str(2 * label) for label, name in enumerate(NAMES)}))
        with pytest.raises(ValueError, match=r"labels are not the numbers from 0 to 6, each once"):
            data_of(root).class_names()

    @pytest.mark.parametrize("content", ["{", '{"4": "Holding"}', '[{"template": "Holding"}]'])
    def test_a_list_of_another_form(self, make_root: MakeRoot, content: str) -> None:
        root = make_root()
        (root / "train.json").write_text(content)
        with pytest.raises(ValueError, match=r"train\.json is no list: expected \[\{\"id\""):
            data_of(root).listing()

    def test_a_test_list_without_answers(self, make_root: MakeRoot) -> None:
        root = make_root()
        (root / "test-answers.csv").write_text("9;Holding something next to something\n")
        with pytest.raises(ValueError, match=r"has no answer for 1 of 1 videos of the test list, such as 1420"):
            data_of(root, val_list="test").listing()
        (root / "test-answers.csv").unlink()
        with pytest.raises(FileNotFoundError, match=r"no list test-answers\.csv in "):
            data_of(root, val_list="test").listing()

    def test_what_is_not_there(self, make_root: MakeRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LONGTAKE_SSV2", raising=False)
        with pytest.raises(FileNotFoundError, match=r"set --data.root or LONGTAKE_SSV2\. Qualcomm"):
            SSV2DataModule().setup()
        with pytest.raises(FileNotFoundError, match=r"no list (labels|train)\.json in .*labels/.*Qualcomm"):
            data_of(tmp_path).setup()
        root = make_root()
        (root / "20bn-something-something-v2").rename(root / ".hidden")
        with pytest.raises(FileNotFoundError, match=r"none of the 4 videos of the train list .*such as 4\.webm"):
            data_of(root).setup()
