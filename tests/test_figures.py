"""Figures: every format written, the CSV equal to what was plotted, the same frame the same bytes."""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_bench import made_up
from fake_lab import LAYERS, FakeLab
from matplotlib.image import imread
from matplotlib.text import Text

from qtale_lib import benchmark_figures, benchmark_report, figures, noise, overview
from qtale_lib.measurements import Measurements

STORE = Measurements(FakeLab(tasks=["arc_easy", "siqa"]))
BENCH = made_up(prefill=(32, 512, 2048), decode=(1, 4, 16))
LOW = STORE.lowest_layers("arc_easy")
SEEDS = Measurements(FakeLab(tasks=["arc_easy"], seeds=[0, 1, 2]))
DRAWN = {
    "figure_1": (figures.overview, lambda: overview.frame(STORE)),
    "figure_2": (figures.heatmaps, lambda: STORE.ratios_by_layer("dllm")),
    "figure_3": (figures.ratios_and_flips, lambda: STORE.lowest_by_epoch("dllm")),
    "figure_4": (figures.noise, noise.frame),
    "figure_5": (figures.logit_histograms, lambda: STORE.histograms("dllm")),
    "theta_curves": (figures.theta_curves, lambda: STORE.theta_curves()),
    "figure_7": (figures.flips_compared, lambda: STORE.lowest_by_epoch("dllm", "qtale")),
    "bench_latency": (benchmark_figures.latency, lambda: benchmark_report.latency_frame(BENCH)),
    "bench_memory": (benchmark_figures.memory, lambda: benchmark_report.memory_frame(BENCH)),
}
COLUMN_WIDE = ("figure_3", "figure_4", "figure_7", "theta_curves", "bench_memory")
THETA = STORE.theta_curves()
MANY = Measurements(FakeLab(tasks=["arc_easy", "mmlu", "alpaca"])).theta_curves()
VARIANTS = {
    "one pass": lambda: benchmark_figures.latency(benchmark_report.latency_frame(made_up(decode=()))),
    "no packed model": lambda: benchmark_figures.memory(benchmark_report.memory_frame(made_up(memory=None))),
    "no prompt": lambda: benchmark_figures.memory(benchmark_report.memory_frame(made_up(prefill=()))),
    "one task": lambda: figures.heatmaps(STORE.ratios_by_layer("dllm").query("task == 'siqa'")),
    "ratios of several seeds": lambda: figures.ratios_and_flips(SEEDS.lowest_by_epoch("dllm")),
    "flips of several seeds": lambda: figures.flips_compared(SEEDS.lowest_by_epoch("dllm", "qtale")),
    "logits of several seeds": lambda: figures.logit_histograms(SEEDS.histograms("dllm")),
    "no data": figures.empty,
    "32 layers": lambda: figures.overview(layers(32)),
    "all groups": lambda: figures.theta_curves(MANY.assign(stderr=0.5)),
    "one curve": lambda: figures.theta_curves(THETA.query("method == 'qtale' and bits == 4")),
    "one layer": lambda: figures.flips_compared(STORE.lowest_by_epoch("dllm").query(f"layer == {LOW[0]}")),
}
FIGURES = {**{name: lambda name=name: drawn(name)[0] for name in DRAWN}, **VARIANTS}
every = pytest.mark.parametrize("name", FIGURES)


def drawn(name: str):
    draw, frame = DRAWN[name]
    data = frame()
    return draw(data), data


def layers(count: int) -> pd.DataFrame:
    """Figure 1's frame for a model of that many layers."""
    first = overview.frame(STORE).groupby("panel").head(1)
    rows = first.loc[first.index.repeat(count)]
    return rows.assign(layer=[*range(count)] * len(first), executed=1.0)


def texts(figure) -> list[Text]:
    """What is written on the figure, but for tick labels beyond an axis's ends."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = [tick for axis in axes for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    labels = {label for tick in ticks for label in (tick.label1, tick.label2)}
    shown = {tick.label1 for axis in axes if axis.axes.axison for tick in ticks_within(axis)}
    return [text for text in found if text not in labels or text in shown]


def ticks_within(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]


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


@pytest.mark.parametrize("name", ["figure_2", "figure_5", "theta_curves"])
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
def test_sizes_are_those_of_a_papers_column_and_page(name, tmp_path):
    figure, data = drawn(name)
    assert figure.get_figwidth() == (3.25 if name in COLUMN_WIDE else 6.75)
    png = figures.save(figure, data, name, tmp_path)["png"]
    height, width, _ = imread(png).shape
    assert width == pytest.approx(300 * figure.get_figwidth(), abs=2)
    assert height == pytest.approx(300 * figure.get_figheight(), abs=2)


@every
def test_no_text_is_smaller_than_seven_points(name):
    sizes = {text.get_text(): text.get_fontsize() for text in texts(FIGURES[name]())}
    assert sizes and min(sizes.values()) >= 7, sizes


@every
def test_no_text_leaves_the_figure_or_lies_on_another(name):
    figure = FIGURES[name]()
    boxes = {text: text.get_window_extent().padded(-0.5) for text in texts(figure)}
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    clashes = [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert not clashes


@pytest.mark.parametrize("name", COLUMN_WIDE)
def test_marks_at_a_limit_are_whole(name):
    figure, _ = drawn(name)
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() != "None"]
    spines = max(spine.get_zorder() for axis in figure.axes for spine in axis.spines.values())
    assert lines
    assert all(not line.get_clip_on() and line.get_zorder() > spines for line in lines)


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


def test_bands_show_the_spread_over_seeds_and_one_seed_has_none():
    data = SEEDS.lowest_by_epoch("dllm")
    ratio, flips = figures.ratios_and_flips(data).axes
    layer = data[data.layer == sorted(data.layer.unique())[1]]
    for axis, name in ((ratio, "ratio"), (flips, "flip")):
        drawn_at = axis.collections[1].get_paths()[0].vertices[:, 1]
        low, high = (100 * (layer[name] + sign * layer[f"{name}_spread"]) for sign in (-1, 1))
        assert (drawn_at.min(), drawn_at.max()) == pytest.approx((max(low.min(), 0), min(high.max(), 100)))
    said = [text.get_text() for text in figures.ratios_and_flips(data).legends[0].get_texts()]
    assert said.count(figures.SEED_BAND) == 1
    for draw, methods in ((figures.ratios_and_flips, ["dllm"]), (figures.flips_compared, ["dllm", "qtale"])):
        figure = draw(STORE.lowest_by_epoch(*methods))
        assert not any(axis.collections for axis in figure.axes)
        assert figures.SEED_BAND not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_histograms_of_several_seeds_have_bands_from_the_lowest_to_the_highest():
    data = SEEDS.histograms("qtale")
    axis = figures.logit_histograms(data).axes[0]
    part = data[(data.layer == data.layer.min()) & (data.epoch == 0) & (data.kind == "execute")]
    pooled, band = (patch.get_data() for patch in axis.patches[:2])
    assert np.allclose(band.values, part.high) and np.allclose(band.baseline, part.low)
    assert (pooled.values >= band.baseline - 1e-9).all() and (pooled.values <= band.values + 1e-9).all()
    assert len(figures.logit_histograms(STORE.histograms("qtale")).axes[0].patches) == 2


@pytest.mark.parametrize(
    ("gap", "said"), [(-0.04, "0.0"), (0.0, "0.0"), (0.04, "0.0"), (-0.06, "−0.1"), (2.04, "+2.0")]
)
def test_a_gap_that_rounds_to_zero_has_no_sign(gap, said):
    figure = figures.logit_histograms(STORE.histograms("dllm").assign(gap=gap))
    assert {axis.texts[0].get_text() for axis in figure.axes} == {f"mean gap {said}"}


def test_theta_curves_show_scores_by_group_and_then_ratios():
    figure = figures.theta_curves(MANY)
    panels = np.reshape(figure.axes, (4, 2))
    for method, column in zip(("dllm", "qtale"), panels.T, strict=True):
        part = MANY[MANY.method == method]
        for group, axis in zip(("csqa", "mmlu", "alpaca"), column, strict=False):
            wanted = part[part.group == group][["theta", "score"]]
            assert np.allclose(line_points(axis, False), wanted)
        ratios = part.assign(ratio=100 * part.execution_ratio)[["theta", "ratio"]].to_numpy()
        assert sorted(map(tuple, line_points(column[-1], False))) == sorted(map(tuple, ratios))


def test_theta_curves_show_the_noise_of_accuracies():
    figure = figures.theta_curves(THETA.assign(stderr=3.0))
    assert figure.legends[0].get_title().get_text() == figures.BAND
    bands = figure.axes[0].collections
    assert len(bands) == len(set(THETA.bits))
    part = THETA[(THETA.group == "csqa") & (THETA.method == "dllm") & (THETA.bits == min(THETA.bits))]
    corners = bands[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == pytest.approx((part.score.min() - 3, part.score.max() + 3))
    assert not figures.theta_curves(THETA.assign(stderr=float("nan"))).axes[0].collections


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


@pytest.mark.parametrize(
    "styles",
    [list(figures.LINES.values()), figures.RANKED, [figures.QUANTIZED, figures.SIXTEEN]],
)
def test_marks_that_meet_do_not_hide_each_other(styles):
    """A later mark is larger than those below it, and has no face."""
    sizes = [style["markersize"] for style in styles]
    assert sizes == sorted(set(sizes))
    assert all(style.get("markerfacecolor") == "none" or style["marker"] == "x" for style in styles[1:])
