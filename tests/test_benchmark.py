"""The benchmark: what it runs is what it says it runs, its result is whole, its targets follow from it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from fake_bench import made_up, stopped
from test_cli import qtale
from typer.testing import CliRunner

from qtale_lib import benchmark, benchmark_budget, benchmark_models, benchmark_report, benchmark_work, cli
from qtale_lib.adaptive import record_routes
from qtale_lib.benchmark import Cell, Settings, Subject, Variant
from qtale_lib.benchmark_budget import Budget, Deadline, OutOfTime, rounds
from qtale_lib.benchmark_models import (
    FORMATS,
    HEAD_BITS,
    Family,
    draw_routes,
    kept_layers,
    kv_bytes,
    packed_copy,
    random_model,
    twin,
    weight_bytes,
)
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.quantization.packed_linear import PackedLinear
from qtale_lib.store import read_json, write_json

SIZES = {
    "vocab_size": 70, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
ROUTED = 4
CLOCK = partial(benchmark.seconds, device="cpu")
ids = torch.arange(12)[None] % 70


@pytest.fixture(scope="module")
def plain():
    return random_model(SIZES, "cpu")


@pytest.fixture(scope="module", params=FORMATS)
def family(plain, request):
    form = request.param
    return Family(plain if form == "bf16" else packed_copy(plain, HEAD_BITS[form]), [1, 2, 4])


def subject(family: Family, kind: str, kept: int | None) -> Subject:
    return Subject(family, Variant("bf16", kind, kept), torch.Generator().manual_seed(0))


# The models.


def test_the_head_is_packed_where_the_format_says_so(plain):
    heads = [packed_copy(plain, bits).lm_head for bits in HEAD_BITS.values()]
    assert [isinstance(head, PackedLinear) for head in heads] == [bits == 4 for bits in HEAD_BITS.values()]


@pytest.mark.parametrize(("size", "kept", "rows"), [(16, 2, 8), (16, 1, 4), (2, 1, 1)])
def test_fewer_rows_are_the_share_that_executes(plain, size, kept, rows):
    cell, runs = Cell("decode", size, 4, 70, "cpu"), subject(Family(plain, [kept]), "fewer rows", kept)
    cell.warm_up(runs)
    assert runs.cache.layers[0].keys.shape[0] == rows and runs.model is runs.family.plain
    assert cell.measures(runs.variant)
    assert not Cell("decode", 1, 4, 70, "cpu").measures(runs.variant)
    assert not Cell("prefill", 16, 4, 70, "cpu").measures(runs.variant)


@pytest.mark.parametrize("kind", ["random", "layerwise", "open"])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_routes_execute_exactly_the_share_asked_for(kind, kept):
    generator = torch.Generator().manual_seed(1)
    executed = draw_routes(kind, kept, ROUTED, 3, 16, 2, generator)
    assert executed.shape == (ROUTED, 3, 16) and executed[..., :2].all()
    if kind == "random":
        assert (executed.sum((0, 2)) == kept * 16).all()
        single = draw_routes(kind, kept, ROUTED, 5, 1, 0, generator)
        assert (single.sum(0) == kept).all()
    if kind == "layerwise":
        assert executed.all(2).all(1).sum() == kept
    if kind == "open" or kept == ROUTED:
        assert executed.all()


def test_other_seeds_draw_other_routes():
    draws = [draw_routes("random", 2, 4, 1, 30, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("ratio", "layers", "kept"), [(0.25, 20, 5), (0.5, 30, 15), (0.01, 8, 1), (1, 8, 8)])
def test_ratios_become_whole_layers(ratio, layers, kept):
    assert kept_layers(ratio, layers) == kept


@torch.no_grad()
def test_routers_decide_as_forced_in_prompts_and_decoding(family):
    runs = subject(family, "random", 2)
    runs.start(ids)
    with record_routes(family.routed) as routes:
        runs.run(ids)
        told = [torch.stack([gap[..., 0] > gap[..., 1] for gap in family.forced.logits])]
        for _ in range(3):
            runs.ready(ids[:, :1])
            told.append(torch.stack([gap[..., 0] > gap[..., 1] for gap in family.forced.logits]))
            runs.run(ids[:, :1])
    assert torch.equal(routes.executed[2:], torch.cat(told, 2)) and routes.executed[:2].all()
    assert routes.executed[2:].sum() == 2 * 15 and runs.pairs == int(routes.executed.sum())


@torch.no_grad()
def test_all_gates_open_is_the_plain_model(family):
    runs = subject(family, "open", 4)
    runs.start(ids)
    torch.testing.assert_close(family.routed(ids).logits, family.plain(ids).logits)


@torch.no_grad()
def test_the_ideal_has_layers_removed_and_shares_the_weights(family):
    assert sorted(family.ideal) == [1, 2]  # with all four it would be the plain model
    for kept, model in family.ideal.items():
        layers = model.model.layers
        assert len(layers) == 2 + kept == model.config.num_hidden_layers
        assert [layer.self_attn.layer_idx for layer in layers] == list(range(2 + kept))
        calls = []
        handles = [layer.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for layer in layers]
        cache = model(ids, use_cache=True).past_key_values
        assert len(calls) == 2 + kept == len(cache.layers)
        for handle in handles:
            handle.remove()
    ours = {tensor.data_ptr() for tensor in family.plain.parameters()}
    assert {tensor.data_ptr() for tensor in model.parameters()} <= ours
    assert len(family.plain.model.layers) == 6 and family.plain.config.num_hidden_layers == 6


@torch.no_grad()
def test_a_twin_computes_the_same_and_changes_alone(family):
    other = twin(family.plain)
    assert torch.equal(other(ids).logits, family.plain(ids).logits)
    del other.model.layers[0]
    assert len(family.plain.model.layers) == 6


@pytest.mark.parametrize(("kind", "kept"), [("random", 1), ("random", 2), ("layerwise", 2), ("open", 4)])
@torch.no_grad()
def test_the_cache_holds_r_of_a_full_one(family, kind, kept):
    full, runs = subject(family, "plain", 4), subject(family, kind, kept)
    for each in (full, runs):
        each.start(ids)
        each.run(ids)
    share = runs.pairs / full.pairs
    allocated, filled = kv_bytes(runs.cache)
    assert filled == pytest.approx(share * kv_bytes(full.cache)[0], rel=1e-6)
    assert allocated == pytest.approx(filled, rel=0.01)


def test_weights_read_are_those_of_the_layers_executed(plain):
    layer = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 128 + 2 * 128)  # bfloat16
    head = 2 * (70 * 128 + 128)
    router = 4 * (128 * 16 + 16 + 16 + 2 * 16 + 2)
    routed = Family(plain, []).routed
    assert weight_bytes(plain, 4) == 6 * layer + head
    assert weight_bytes(plain, 1) == 3 * layer + head
    assert weight_bytes(routed, 1) == 3 * layer + head + 4 * router
    assert weight_bytes(packed_copy(plain), 4) < 0.3 * 6 * layer + head


# Scoring; a trained run of it is timed in test_end_to_end.py.


def test_scoring_is_left_out_without_a_trained_run(tmp_path):
    times = benchmark_work.evaluation_times(Lab("smoke", tmp_path), 1, CLOCK, math.inf)
    assert times["dense"] is None and "no trained run" in times["left_out"]
    table = benchmark_report.target_table(made_up(evaluation=times))
    assert any("Scoring was left out" in note for note in table.notes)


# A whole run.


@pytest.fixture(scope="module")
def small_shape():
    shape = benchmark_models.BenchShape(lambda: dict(SIZES), "cpu", (16,), (1, 2), context=16, repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark_models.SHAPES, "tiny", shape)
        patch.setattr(benchmark, "COPIED", 2**20)
        yield


@pytest.fixture(scope="module")
def kept(small_shape):
    """Every state of a result that was given to be kept, in order."""
    said, states = [], []
    settings = Settings("tiny", ("passes", "training"), ratios=(0.5, 1.0), threads=1)
    made = benchmark.bench(settings, said.append, lambda state: states.append(copy.deepcopy(state)))
    assert len(said) == 5 and made == states[-1]
    return states


@pytest.fixture(scope="module")
def result(kept):
    return kept[-1]


def test_every_block_of_passes_and_every_part_is_kept_as_soon_as_it_is_measured(kept):
    assert [state["finished"] for state in kept] == [False, False, False, True]
    blocks = ["decode, batch 1", "decode, batch 2", "prefill 16", "the training step"]
    assert [benchmark_report.lacking(state) for state in kept] == [blocks[1:], blocks[2:], blocks[3:], []]
    for state in kept:
        assert state["times"] == kept[-1]["times"][: len(state["times"])]
        assert state["memory"]["file"] > 10**4 and state["targets"] == benchmark_report.targets(state)
        assert state["provenance"]["seconds"] > 0


def test_a_budget_is_kept_by_training_and_search_too(small_shape):
    settings = Settings("tiny", ("training", "search"), seconds=0.001, repeats=50, threads=1)
    made = benchmark.bench(settings, lambda line: None)
    assert made["training"]["plain"]["count"] == made["training"]["routed"]["count"] == 1
    assert made["search"]["native"] is made["search"]["autoawq"] is None and made["finished"]
    assert set(made["search"]["left_out"]) == {"native", "autoawq"}


def test_the_result_is_whole_and_readable(result, tmp_path):
    write_json(tmp_path / "result.json", result)
    read = read_json(tmp_path / "result.json")
    assert read == json.loads(json.dumps(result)) and read["schema"] == benchmark_report.SCHEMA
    cells = {("decode", 1), ("decode", 2), ("prefill", 16)}
    kinds = {
        ("plain", 1),
        ("open", 1),
        ("ideal", 0.5),
        ("random", 0.5),
        ("layerwise", 0.5),
        ("routers", None),
    }
    found = {(r["phase"], r["size"], r["format"], r["variant"], r["ratio"]) for r in read["times"]}
    expected = {(*cell, form, *kind) for cell in cells for form in FORMATS for kind in kinds}
    assert found == expected | {("decode", 2, form, "fewer rows", 0.5) for form in FORMATS}
    for row in read["times"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["count"] == (2 if row["phase"] == "prefill" else 2 * benchmark.STEPS)
    assert read["machine"]["threads"] == 1 and read["machine"]["memory_bytes"] > 2**28
    assert read["memory"]["file"] > 10**4 and len(read["targets"]) == 18
    assert read["search"] is None and read["training"]["tokens"] == 128
    for name in ("plain", "routed"):
        taken = read["training"][name]
        assert 0 < taken["low"] <= taken["seconds"] <= taken["high"] and taken["count"] == 2


def test_the_result_names_neither_host_nor_place(result, tmp_path):
    import platform

    text = json.dumps(result)
    assert "/" not in json.dumps(result["machine"]) and str(tmp_path.parent) not in text
    assert "/tmp" not in text and "/home" not in text
    assert len(platform.node()) < 4 or platform.node() not in text


def test_the_caches_of_a_run_hold_r_of_a_full_one(result):
    frame = benchmark_report.kv_frame(result)
    assert (frame.filled / frame.expected - 1).abs().max() < 0.01
    assert benchmark_report.kv_error(result) < 0.01
    random = frame[frame.variant == "random"]
    assert random.execution_ratio.tolist() == pytest.approx([(2 + 0.5 * 4) / 6] * len(random))


def test_a_training_step_leaves_the_shared_model_alone(plain):
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    times = benchmark_work.training_times(plain, 12, 1, CLOCK, math.inf)
    assert times["plain"]["seconds"] > 0 and times["routed"]["seconds"] > 0
    after = plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.skipif(sys.platform != "linux", reason="autoawq is installed on Linux only")
def test_both_awq_searches_are_timed_over_one_layer_and_few_tokens():
    times = benchmark_work.search_times(SIZES, CLOCK, math.inf)
    assert times["native"]["seconds"] > 0 and times["autoawq"]["seconds"] > 0
    assert (times["layers"], times["tokens"], times["left_out"]) == (1, benchmark_work.SEARCHED_TOKENS, {})


@pytest.mark.skipif(sys.platform != "linux", reason="autoawq is installed on Linux only")
def test_what_autoawq_cannot_search_is_left_out_with_its_reason():
    times = benchmark_work.search_times({**SIZES, "num_key_value_heads": 1}, CLOCK, math.inf)
    assert times["native"]["seconds"] > 0 and times["autoawq"] is None
    assert "multiples of 64" in times["left_out"]["autoawq"]


def test_a_search_that_does_not_end_in_time_is_stopped_and_left_out(monkeypatch):
    def endless(model, rows):
        for _ in itertools.count():
            torch.ones(1).add(1)

    searches = {"native": lambda model, rows: None, "autoawq": endless}
    monkeypatch.setattr(benchmark_work, "SEARCHES", searches)
    times = benchmark_work.search_times(SIZES, CLOCK, time.monotonic() + 1)
    assert times["native"]["count"] == 1 and times["autoawq"] is None
    assert times["left_out"] == {"autoawq": "it had not ended after the 1 s that --seconds left for it"}


def test_a_deadline_stops_work_at_its_next_call_of_torch_and_only_then():
    with Deadline(math.inf):
        assert torch.ones(2).sum() == 2
    with pytest.raises(OutOfTime, match="0 s"), Deadline(0.0):
        torch.ones(2).sum()
    assert torch.ones(2).sum() == 2


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(benchmark_budget.time, "monotonic", lambda: self.now)


def test_a_budget_is_shared_by_the_pieces_that_are_left(monkeypatch):
    clock = Clock(monkeypatch)
    budget = Budget(60, 3)
    assert budget.next_end() == 120
    clock.now = 110  # sooner than it had to
    assert budget.next_end() == 135
    clock.now = 150
    assert budget.next_end() == 160
    assert Budget(None, 1).next_end() == math.inf


@pytest.mark.parametrize(("end", "count"), [(0, 1), (119, 1), (120, 2), (149, 4), (math.inf, 5)])
def test_rounds_that_would_end_too_late_are_left_out(monkeypatch, end, count):
    clock = Clock(monkeypatch)
    for _ in rounds(5, end):
        clock.now += 10
    assert clock.now == 100 + 10 * count


def test_a_budget_of_seconds_leaves_rounds_out(plain):
    families = {"bf16": Family(plain, [2])}
    settings = dataclasses.replace(Settings("tiny").complete(), repeats=50)
    with torch.no_grad():
        rows = benchmark._measure(
            Cell("decode", 1, 16, 70, "cpu"), families, [Variant("bf16", "plain", 4)], settings, 0.0
        )
    assert rows[0]["count"] == benchmark.STEPS


def test_the_ideal_of_all_layers_is_the_plain_model():
    found = benchmark.variants(("bf16",), [2, 4], 4)
    assert Variant("bf16", "ideal", 2) in found and Variant("bf16", "open", 4) in found
    assert not [v for v in found if v.kind in ("ideal", "random") and v.kept == 4]


# The report.


def measured(result, name: str):
    (row,) = [row for row in result["targets"] if row["target"].startswith(name)]
    return pytest.approx(row["measured"]) if row["measured"] is not None else None, row["met"]


def test_targets_follow_from_the_numbers():
    result = made_up()
    assert measured(result, "decode, batch 1: half the routed layers by") == (1.08, True)
    assert measured(result, "decode, batch 16: all gates") == (1.05, True)
    assert measured(result, "decode, batch 1: bf16 by int4") == (2.5, True)
    assert measured(result, "decode, batch 1: bf16 plain by int4") == (2.5 / (0.6 * 1.08), True)
    assert measured(result, "the same with lm_head in 4 bits") == (100 / 30 / (0.6 * 1.08), True)
    assert measured(result, "decode, batch 16: half the routed layers by") == (1.04, True)
    own = "decode, batch 16: half the routed layers of each row's own by"
    assert measured(result, f"{own} those removed") == (1.08, True)
    assert measured(result, f"{own} all layers on half the rows") == (1.08 / 0.9, None)
    assert measured(result, "memory that loading") == (1.1, True)
    assert measured(result, "scoring with learned routes") == (1.6, True)
    assert measured(result, "KV bytes") == (0.0, True)
    share = {"routers": 0.2 * 0.1, "random": 0.6 * 1.08}
    assert measured(result, "decode, batch 1: the routers' share") == (
        share["routers"] / share["random"],
        None,
    )


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"prefill": (), "decode": (1,)}, 11),
        ({"prefill": (512,), "decode": ()}, 7),
        ({"prefill": (), "decode": (), "memory": None}, 3),
        ({"training": None, "search": None, "evaluation": None}, 15),
        ({"memory": {"file": 10, "added": None, "group": 128}}, 17),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed(changes, left):
    rows = made_up(**changes)["targets"]
    assert len(rows) == 18 and sum(row["measured"] is not None for row in rows) == left
    assert all(row["met"] is None for row in rows if row["measured"] is None)
    verdicts = benchmark_report.target_table(made_up(**changes)).text.verdict
    assert (verdicts == "not measured here").sum() == 18 - left


def test_a_search_that_was_left_out_is_named_with_its_reason():
    search = {"native": {"seconds": 0.5}, "autoawq": None, "layers": 1, "tokens": 64}
    table = benchmark_report.target_table(made_up(search={**search, "left_out": {"autoawq": "no time"}}))
    verdict = table.text.set_index("target").verdict["AWQ search: ours by autoawq's"]
    assert verdict == "not measured here"
    assert "autoawq's search was left out: no time." in table.notes
    sizes = [note for note in table.notes if "1 of the shape's layers in float32, on 64" in note]
    assert len(sizes) == 1


def test_an_unfinished_result_says_what_it_lacks_and_a_finished_one_nothing():
    lacks = "decode, batch 16; prefill 512; the training step; the AWQ search; scoring"
    for result, said in ((stopped(), True), (made_up(), False)):
        setting = benchmark_report.setting_table(result).text
        assert (setting.setting.iloc[0] == "unfinished" and lacks in setting.value.iloc[0]) is said
        assert any(lacks in note for note in benchmark_report.target_table(result).notes) is said
    assert len(benchmark_report.latency_table(stopped()).text)


def test_a_ratio_near_the_half_stands_for_it_and_a_distant_one_does_not():
    times = benchmark_report.Times(made_up())
    assert times.row("decode", 1, "bf16", "ideal", 0.45)["ratio"] == 0.5
    assert times.row("decode", 1, "bf16", "ideal", 0.1) is None


def test_the_roofline_is_bytes_by_the_pace_of_a_copy():
    frame = benchmark_report.roofline_frame(made_up())
    row = frame[(frame["format"] == "bf16") & (frame.variant == "plain")].iloc[0]
    assert row.floor == pytest.approx(1000 * 10**9 / 1e10) and row.ms == pytest.approx(100)
    assert len(frame) == 12


# The command line, and where a profile's benchmarks lie.


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--shape", "huge"], 'There is no shape "huge"'),
        (
            ["--parts", "passes,rest"],
            '--parts (= "passes,rest") must be among passes, training, search, evaluation',
        ),
        (["--formats", "int3"], '--formats (= "int3") must be among bf16, int4'),
        (["--ratios", "0,1"], "--ratios must lie above 0"),
        (["--ratios", "half"], '--ratios (= "half") must be numbers'),
        (["--prefill", "5,x"], '--prefill (= "5,x") must be numbers'),
        (["--prefill", "3"], "--prefill must be at least 8 tokens at R = 0.25"),
        (["--context", "2"], "--context must be at least 8 tokens"),
        (["--decode", "0"], "--decode counts from 1"),
        (["--repeats", "0"], "--repeats must be above 0"),
        (["--seconds", "-1"], "--seconds must be above 0"),
        (["--prefill", "none", "--decode", "none"], "Neither prefill nor decoding"),
        (["--device", "tpu"], '--device (= "tpu") must be cpu or cuda'),
    ],
)
def test_what_cannot_be_measured_is_refused(given, sentence):
    shape = [] if "--shape" in given else ["--shape", "tiny"]
    refused = CliRunner().invoke(cli.app, ["bench", *shape, *given]).exception
    assert isinstance(refused, UserError) and sentence in str(refused)


def test_a_refusal_is_one_sentence_and_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = qtale("bench", "--shape", "tiny", "--out", str(tmp_path / "file" / "a.json"))
    assert done.returncode == 2 and "--out (= " in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_shape_for_a_gpu_says_so():
    with pytest.raises(UserError, match=r"llama-3\.1-8b is measured on a GPU"):
        Settings("llama-3.1-8b").complete()


def test_options_choose_a_part(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(benchmark, "bench", lambda settings, *_: asked.append(settings) or made_up())
    path = tmp_path / "deep" / "a.json"
    options = {"shape": "tiny", "prefill": "none", "decode": "1,16", "formats": "int4", "ratios": "0.5,1"}
    options |= {"repeats": "2", "seconds": "9", "out": str(path)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(cli.app, ["bench", *words])
    assert done.exit_code == 0, done.output
    assert "Targets" in done.output and read_json(path)["schema"] == benchmark_report.SCHEMA
    (given,) = asked
    assert (given.prefill, given.decode, given.formats, given.ratios) == ((), (1, 16), ("int4",), (0.5, 1.0))
    assert (given.repeats, given.seconds, given.context) == (2, 9.0, 16)


def test_what_was_measured_before_a_kill_is_kept_and_an_earlier_result_too(monkeypatch, tmp_path):
    def killed(settings, say, keep, lab):
        keep(stopped())
        raise KeyboardInterrupt

    def whole(settings, say, keep, lab):
        keep(stopped())
        keep(made_up())
        return made_up()

    path, unfinished = tmp_path / "a.json", tmp_path / "a.unfinished.json"
    words = ["bench", "--shape", "tiny", "--out", str(path)]
    for measure, left in ((killed, {unfinished}), (whole, {path}), (killed, {path, unfinished})):
        monkeypatch.setattr(benchmark, "bench", measure)
        CliRunner().invoke(cli.app, words)
        assert set(tmp_path.iterdir()) == left
    assert read_json(path)["finished"] and read_json(unfinished) == json.loads(json.dumps(stopped()))


def test_an_unfinished_benchmark_is_shown_if_there_is_no_finished_one_of_its_shape(tmp_path):
    lab = Lab("smoke", tmp_path)

    def shown_with(name: str, bench: dict) -> tuple[str, bool] | None:
        write_json(benchmark_report.folder(lab) / name, bench)
        found = benchmark_report.stored(lab)
        return found and (found["shape"]["name"], found["finished"])

    assert shown_with("tiny.unfinished.json", stopped(shape="tiny")) is None  # made anew in seconds
    assert shown_with("tiny.json", made_up(shape="tiny")) == ("tiny", True)
    assert shown_with("tinyllama-1.1b.unfinished.json", stopped()) == ("tinyllama-1.1b", False)
    assert shown_with("tinyllama-1.1b.json", made_up()) == ("tinyllama-1.1b", True)


def test_the_largest_shape_is_shown_and_a_small_one_measured_if_there_is_none(tmp_path):
    lab, called = Lab("smoke", tmp_path), []

    def run(command, **_):
        called.append(command)
        write_json(benchmark_report.folder(lab) / "tiny.json", made_up(shape="tiny"))
        return subprocess.CompletedProcess(command, 0, "", "")

    assert benchmark_report.stored(lab) is None
    before = benchmark_report.fingerprint(lab)
    assert benchmark_report.of_profile(lab, run)["shape"]["name"] == "tiny"
    assert called[0][1:6] == ["-m", "qtale_lib", "bench", "--shape", "tiny"]
    assert benchmark_report.fingerprint(lab) != before
    write_json(benchmark_report.folder(lab) / "tinyllama-1.1b.json", made_up())
    assert benchmark_report.of_profile(lab, run)["shape"]["name"] == "tinyllama-1.1b"
    assert len(called) == 1


def test_a_failed_benchmark_says_why(tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "much\nno room left\n")

    with pytest.raises(UserError, match="no room left"):
        benchmark_report.of_profile(Lab("smoke", tmp_path), run)


def test_reading_a_benchmark_needs_no_torch():
    code = "import sys, qtale_lib.benchmark_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
