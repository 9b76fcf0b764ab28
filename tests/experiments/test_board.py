"""What TensorBoard shows of a run: all of it once, in groups."""

import re
from pathlib import Path

import pytest
from probes import FAIL_AT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from experiments.charts import chart_of
from experiments.cli import main
from experiments.starts import read_starts


def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def layout_of(events: EventAccumulator) -> Layout:
    (entry,) = events.Tensors("custom_scalars__config__")
    return Layout.FromString(entry.tensor_proto.string_val[0])


@pytest.mark.parametrize("name", ["tokenizer_run", "mebt_run"])
def test_every_scalar_is_in_one_chart_of_the_layout(name: str, request: pytest.FixtureRequest) -> None:
    events = events_of(request.getfixturevalue(name))
    patterns = [
        pattern
        for category in layout_of(events).category
        for chart in category.chart
        for pattern in chart.multiline.tag
    ]
    for scalar in set(events.Tags()["scalars"]) - {"epoch"}:
        assert sum(re.match(pattern, scalar) is not None for pattern in patterns) == 1, scalar


def test_groups_that_a_run_cannot_have_are_left_out(tokenizer_run: Path, mebt_run: Path) -> None:
    of_tokenizer, of_mebt = (
        {category.title for category in layout_of(events_of(run)).category} for run in (tokenizer_run, mebt_run)
    )
    assert of_tokenizer - of_mebt == {"Scores", "Codebook", "Discriminator"}
    assert of_mebt - of_tokenizer == {"Curriculum", "Masks"}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("train/loss", "Loss"),
        ("val/loss_frame_prediction", "Loss"),
        ("val/nll_0.25", "Loss"),
        ("train/mse", "Loss"),
        ("train/feature_matching", "Loss"),
        ("train/refine_tokens", "Masks"),
        ("train/window_usage", "Codebook"),
        ("train/logits_fake", "Discriminator"),
        ("train/grad_norm_disc", "Gradients"),
        ("train/tokens_per_second", "Throughput"),
        ("metrics/frechet_random_i3d_16f_256", "Scores"),
        ("metrics/shapes_colour", "Scores"),
        ("val/psnr", "Scores"),
        ("epoch", None),
    ],
)
def test_scalars_of_all_modules_have_their_group(name: str, group: str | None) -> None:
    chart = chart_of(name)
    assert (chart and chart.group) == group


def test_configuration_environment_and_hyper_parameters_are_there(mebt_run: Path) -> None:
    events = events_of(mebt_run)
    (config,) = events.Tensors("run/config/text_summary")
    assert b"    class_path: lightning_modules.MeBTModule" in config.tensor_proto.string_val[0]
    (environment,) = events.Tensors("run/environment/text_summary")
    assert b"| torch |" in environment.tensor_proto.string_val[0]
    summaries = events.summary_metadata
    start = HParamsPluginData.FromString(summaries["_hparams_/session_start_info"].plugin_data.content)
    hyper_parameters = start.session_start_info.hparams
    assert hyper_parameters["model.lr"].number_value == 1e-3
    assert hyper_parameters["model.class"].string_value.endswith("MeBTModule")
    assert hyper_parameters["curriculum.schedule"].string_value == "fraction"
    assert len(list(mebt_run.glob("events.*"))) == 1


def test_a_resumed_run_adds_its_start_and_what_has_changed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("runs/mebt/version_0")
    with monkeypatch.context() as patch:
        patch.setenv(FAIL_AT, "3")
        with pytest.raises(RuntimeError, match="the power is gone"):
            main(["fit", "--config=mebt.yaml"])
    main(["fit", f"--resume={run}"])
    main(["fit", f"--resume={run}", "--trainer.max_steps=7"])
    starts = read_starts(run)
    assert [start["step"] for start in starts] == [0, 3, 6]
    assert Path(starts[0]["experiment"]).name == "mebt.yaml"
    events = events_of(run)
    assert [entry.step for entry in events.Tensors("run/config/text_summary")] == [0, 6]
    assert [entry.step for entry in events.Tensors("run/environment/text_summary")] == [0]
    layout_of(events)  # there is one
    assert [entry.step for entry in events.Scalars("train/loss")] == list(range(7))
    assert [entry.step for entry in events.Images("samples/video")] == [6]
