"""Figures: every format written, the CSV equal to what was plotted, the same frame the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_lab import LAYERS, FakeLab
from matplotlib.image import imread

from qtale_lib import figures, noise, overview
from qtale_lib.measurements import Measurements

STORE = Measurements(FakeLab(tasks=["arc_easy", "siqa"]))
LOW = STORE.lowest_layers("arc_easy")
DRAWN = {
    "figure_1": (figures.overview, lambda: overview.frame(STORE)),
    "figure_2": (figures.heatmaps, lambda: STORE.ratios_by_layer("dllm")),
    "figure_3": (figures.ratios_and_flips, lambda: STORE.lowest_by_epoch("dllm")),
    "figure_4": (figures.noise, noise.frame),
    "figure_5": (figures.logit_histograms, lambda: STORE.histograms("dllm")),
    "theta_curves": (figures.theta_curves, lambda: STORE.theta_curves()),
    "figure_7": (figures.flips_compared, lambda: STORE.lowest_by_epoch("dllm", "qtale")),
}


def drawn(name: str):
    draw, frame = DRAWN[name]
    data = frame()
    return draw(data), data


def line_points(axis, marked: bool) -> np.ndarray:
    """All points of an axis's lines [n, 2]: of those with markers only, or with strokes only."""
    lines = [
        line
        for line in axis.lines
        if (line.get_linestyle() == "None") == marked and len(line.get_xdata()) > 2
    ]
    return np.concatenate([line.get_xydata() for line in lines])


@pytest.mark.parametrize("name", DRAWN)
def test_all_formats_are_written_with_the_plotted_data(name, tmp_path):
    figure, data = drawn(name)
    paths = figures.save(figure, data, name, tmp_path)
    assert [path.name for path in paths.values()] == [
        f"{name}.{suffix}" for suffix in ("pdf", "png", "svg", "csv")
    ]
    assert all(path.stat().st_size > 500 for path in paths.values())
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data.reset_index(drop=True), check_dtype=False)


@pytest.mark.parametrize("name", ["figure_2", "figure_5"])
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    def digests(directory: Path) -> list[str]:
        figure, data = drawn(name)
        paths = figures.save(figure, data, name, directory)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()]

    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_fonts_are_embedded_whole_and_no_date_is_written(tmp_path):
    figure, data = drawn("figure_2")
    paths = figures.save(figure, data, "figure_2", tmp_path)
    written = paths["pdf"].read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written and b"CreationDate" not in written
    assert b"<dc:date>" not in paths["svg"].read_bytes()


@pytest.mark.parametrize("name", DRAWN)
def test_sizes_are_those_of_a_papers_column(name, tmp_path):
    figure, data = drawn(name)
    assert figure.get_figwidth() in (figures.COLUMN, figures.PAGE)
    png = figures.save(figure, data, name, tmp_path)["png"]
    height, width, _ = imread(png).shape
    assert width == pytest.approx(300 * figure.get_figwidth(), abs=2)
    assert height == pytest.approx(300 * figure.get_figheight(), abs=2)


def test_heatmaps_show_the_frames_ratios():
    figure, data = drawn("figure_2")
    for axis, (_, part) in zip(figure.axes, data.groupby("task", sort=False), strict=False):
        assert np.allclose(
            axis.images[0].get_array(), part.pivot(index="epoch", columns="layer", values="ratio")
        )


def test_flips_are_points_and_their_closed_form_lines():
    figure, data = drawn("figure_7")
    for axis, (_, part) in zip(figure.axes, data.groupby("layer"), strict=True):
        part = part.sort_values(["method", "epoch"])
        assert np.allclose(line_points(axis, True), part[["epoch"]].assign(y=100 * part.flip))
        assert np.allclose(line_points(axis, False), part[["epoch"]].assign(y=100 * part.flip_expected))


def test_figure_3_shows_ratios_and_flips_of_each_layer():
    figure, data = drawn("figure_3")
    part = data.sort_values(["layer", "epoch"])
    assert np.allclose(line_points(figure.axes[0], False), part[["epoch"]].assign(y=100 * part.ratio))
    assert np.allclose(line_points(figure.axes[1], True), part[["epoch"]].assign(y=100 * part.flip))


def test_histograms_show_the_frames_shares():
    figure, data = drawn("figure_5")
    axis = figure.axes[0]
    first = data[(data.layer == LOW[0]) & (data.epoch == 0) & (data.kind == "execute")]
    values, edges, _ = axis.patches[0].get_data()
    assert np.allclose(values, 100 * first["count"] / first["count"].sum())
    assert np.allclose(edges, [*first.left, first.right.iloc[-1]])


def test_overview_fills_memory_and_fades_with_execution():
    figure, data = drawn("figure_1")
    assert list(dict.fromkeys(data.panel)) == list("abcde")
    for axis, (_, part) in zip(figure.axes, data.groupby("panel"), strict=True):
        fills = [patch.get_width() for patch in axis.patches[::2]]
        assert len(fills) == LAYERS and np.allclose(fills, part.fill)
    shades = [patch.get_alpha() for patch in figure.axes[2].patches[::2]]
    assert np.argsort(shades).tolist() == np.argsort(data[data.panel == "c"].executed.to_numpy()).tolist()


def test_overview_counts_memory_and_execution():
    data = overview.frame(STORE).groupby("panel")
    assert data.fill.mean()["d"] == pytest.approx((4 + (16 + 4) / 128) / 16)
    final = [STORE.lab.probes(task, "qtale", 0)[-1]["ratio"] for task in ("arc_easy", "siqa")]
    assert data.executed.mean()["e"] == pytest.approx(np.mean(final))
    assert abs(data.executed.mean()["b"] - data.executed.mean()["c"]) <= 0.5 / LAYERS
    assert (data.fill.mean()["b"], data.fill.mean()["c"]) == (data.executed.mean()["b"], 1.0)


@pytest.mark.parametrize(
    "changes", [{"methods": ["full"]}, {"bits": [16]}, {"methods": ["dllm"], "bits": [4]}]
)
def test_what_was_not_run_is_said(changes, tmp_path):
    store = Measurements(FakeLab(tasks=["piqa"], **changes))
    data = overview.frame(store)
    figure = figures.overview(data)
    missing = data[data.layer.isna()].panel.tolist()
    said = [
        axis.get_title()[1]
        for axis in figure.axes
        if figures.NOT_RUN in [text.get_text() for text in axis.texts]
    ]
    assert said == missing and len(missing) >= 1
    for draw in (
        figures.heatmaps,
        figures.flips_compared,
        figures.logit_histograms,
        figures.ratios_and_flips,
    ):
        nothing = draw(store.layers[:0])
        assert [text.get_text() for text in nothing.axes[0].texts] == [figures.NOT_RUN]
    figures.save(nothing, store.layers[:0], "figure_3", tmp_path)


def test_one_task_and_one_epoch_are_enough():
    frame = STORE.ratios_by_layer("dllm")
    figure = figures.heatmaps(frame[(frame.task == "siqa") & (frame.epoch == 0)])
    assert figure.axes[0].images[0].get_array().shape == (1, LAYERS)


@pytest.mark.parametrize("styles", [list(figures.LINES.values()), figures.RANKED])
def test_lines_differ_in_more_than_colour(styles):
    for name in ("linestyle", "marker", "color"):
        assert len({style[name] for style in styles}) == len(styles)
