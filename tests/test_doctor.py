"""Doctor: every check made, each with its cure; without a network all passes up to the missing download."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fake_hub import GATED, SECRET, UNREACHED, Hub
from small_run import profile, save_base
from typer.testing import CliRunner

from qtale_lib import doctor, machine, preflight
from qtale_lib.cli import app
from qtale_lib.config import Profile, load_profile
from qtale_lib.doctor import Line, examine
from qtale_lib.errors import UserError
from qtale_lib.estimates import STAGES, Speed
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.machine import Gpu, Machine
from qtale_lib.profile_files import SHIPPED

GIB = 2**30
PINNED = "0" * 39 + "1"
FAST = Speed(400e12, 50e12, 1)
NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def big(gpu: float = 80, memory: float = 128, free: float | None = None) -> Machine:
    """One GPU of so many GiB in a machine of so many."""
    return Machine((Gpu("0", "a GPU", int(gpu * GIB), int(gpu * GIB)),), int(memory * GIB),
                   int((free or memory) * GIB), 16)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "owner" / "small")


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Results and figures in a folder of their own."""
    monkeypatch.setenv("QTALE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    return tmp_path


def by_subject(settings: Profile, now: Machine | None = None) -> dict[str, Line]:
    """The lines; every one that is not ok is one sentence, and nothing is left on disk."""
    lab = Lab(settings)
    lines = examine(lab, now or big(), FAST)
    assert not lab.directory.exists() and not lab.figures.exists()
    for line in lines:
        assert "\n" not in line.text and ". " not in line.text and not line.text.endswith(".")
    return {line.subject: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_offline_every_profile_passes_up_to_the_missing_download(places, monkeypatch, name):
    Hub(places / "cache", UNREACHED).install(monkeypatch, offline=True)
    lines = by_subject(load_profile(name))
    refused = {subject for subject, line in lines.items() if line.status == "refusal"}
    if load_profile(name).base == "microworld":
        assert not refused
    else:
        assert refused - {"data"} == {"base"}  # the data may be a download too
        assert "HF_HUB_OFFLINE forbids to fetch it; unset that, call `hf download " in lines["base"].text
    if name == "stories260k":  # of a base that is in no list nothing can be estimated before it is here
        assert lines["estimates"].status == "warning"
        return
    assert all("peak about" in lines[stage].text and "roughly" in lines[stage].text for stage in STAGES)
    assert "results about" in lines["disk"].text


def test_a_base_that_can_be_fetched_is_a_warning_and_only_its_config_is(places, monkeypatch, small):
    hub = Hub(places / "cache", small.parents[1]).install(monkeypatch)
    lines = by_subject(profile("owner/small", revision=PINNED))
    assert lines["base"].status == "warning" and "a run fetches it, 0.0 GiB" in lines["base"].text
    assert {what for what, *_ in hub.fetched} == {"config.json"}
    preflight.check_base(profile("owner/small", revision=PINNED))  # fetches the rest
    lines = by_subject(profile("owner/small", revision=PINNED))
    assert {line.status for line in lines.values()} == {"ok"}


def test_a_token_is_seen_and_never_shown(places, monkeypatch):
    Hub(places / "cache", GATED, token=SECRET).install(monkeypatch)
    lines = by_subject(load_profile("llama2-7b"))
    assert lines["token"] == Line("ok", "token", "the hub's client has one")
    assert "no access; accept its licence at https://huggingface.co/meta-llama/" in lines["base"].text
    assert not [line for line in lines.values() if SECRET in line.text]
    Hub(places / "cache", GATED).install(monkeypatch)
    lines = by_subject(load_profile("llama2-7b"))
    assert (lines["token"].status, lines["base"].status) == ("warning", "refusal")
    assert "set HF_TOKEN, or call `hf auth login`" in lines["token"].text


def test_what_does_not_fit_is_refused_by_how_much_and_what_nearly_does_not_is_warned_of(places, monkeypatch):
    Hub(places / "cache", UNREACHED).install(monkeypatch, offline=True)
    large = load_profile("llama3.1-8b", tasks=["alpaca"])
    refused = by_subject(large, big(gpu=12))["fine-tune"]
    needed, has, short = map(float, re.findall(r"([\d.]+) GiB", refused.text))
    assert refused.status == "refusal" and has == pytest.approx(12 * 0.92 - 0.5, abs=0.051)
    assert short == pytest.approx(needed - has, abs=0.11) and needed > 15
    assert "of memory on a GPU" in refused.text and "lower training.batch_size" in refused.text
    nearly = by_subject(large, big(gpu=(needed * 1.05 + 0.5) / 0.92))["fine-tune"]
    assert nearly.status == "warning" and "little room" in nearly.text
    assert by_subject(large, big())["fine-tune"].status == "ok"
    slow = next(
        line for line in examine(Lab(large), big(), Speed(1e10, 1e10, 1)) if line.subject == "fine-tune"
    )
    assert slow.status == "warning" and "longer than anybody waits" in slow.text


def test_a_run_refuses_what_does_not_fit_before_it_fetches_or_computes(places, monkeypatch, small):
    hub = Hub(places / "cache", small.parents[1]).install(monkeypatch)
    lab = Lab(profile("owner/small", revision=PINNED))
    monkeypatch.setattr(machine, "look", lambda: Machine((), GIB, GIB // 4, 2))
    with pytest.raises(UserError, match=r"about 0\.6 GiB of memory, and 0\.2 GiB can be had: 0\.\d GiB"):
        lab.compute(all_jobs(lab.profile))
    assert {what for what, *_ in hub.fetched} == {"config.json"} and not lab.directory.exists()
    monkeypatch.setattr(machine, "look", lambda: big(gpu=8, memory=128, free=0.5))
    with pytest.raises(UserError, match=r"loading the base needs about 0\.6 GiB of memory, and 0\.5 GiB"):
        lab.compute(all_jobs(lab.profile))


def test_with_fresh_the_fit_is_looked_at_before_anything_is_removed(places, monkeypatch, small):
    lab = Lab(profile(small))
    monkeypatch.setattr(machine, "look", lambda: Machine((), GIB, GIB // 4, 2))
    with pytest.raises(UserError, match="too little"):
        preflight.check(lab, all_jobs(lab.profile), afresh=True)
    preflight.check(lab, all_jobs(lab.profile))  # what is in the store can be read on any machine


def test_a_full_disk_is_refused_by_how_much(places, monkeypatch, small):
    Hub(places / "cache", UNREACHED).install(monkeypatch, offline=True)
    usage = shutil.disk_usage(places)._replace(free=GIB)
    monkeypatch.setattr(preflight.psutil, "disk_usage", lambda place: usage)
    text = by_subject(load_profile("llama3.2-3b"))["disk"].text
    assert (
        "results and base need about " in text and "and 1.0 GiB are free: " in text and "too little" in text
    )
    assert by_subject(profile(small))["disk"].status == "ok"


def test_damage_is_found_here_too_and_does_not_stop_the_rest(places, small):
    base = shutil.copytree(small, places / "base")
    (base / "tokenizer.json").unlink()
    (places / "data").mkdir()
    lines = by_subject(profile(base, data_dir=str(places / "data"), group_size=24))
    assert "holds no tokenizer" in lines["base"].text
    assert str(places / "data") in lines["data"].text
    assert "does not divide" in lines["settings"].text
    assert lines["folders"].status == "ok" and lines["versions"].status in ("ok", "warning")


def test_another_version_than_pinned_is_a_warning(places, monkeypatch, small):
    tools = {
        "pins": lambda asked: {"torch": "0.1", "numpy": "2"},
        "installed": {"torch": "9", "numpy": "2"}.get,
    }
    monkeypatch.setattr(doctor.runpy, "run_path", lambda path: tools)
    line = by_subject(profile(small))["versions"]
    assert (line.status, line.text.split(";")[0]) == ("warning", "torch is 9, not 0.1")


def test_an_unknown_base_that_cannot_be_reached_has_no_estimate(places, monkeypatch):
    Hub(places / "cache", UNREACHED).install(monkeypatch)
    lines = by_subject(profile("owner/unknown"))
    assert lines["base"].status == "refusal" and lines["estimates"].status == "warning"
    assert not set(STAGES) & set(lines)


def test_the_command_ends_with_2_where_a_run_would_be_refused(places, monkeypatch, small):
    monkeypatch.setattr(machine, "multiplications", lambda dtype: 1e11)
    (places / "mine.yaml").write_text(
        f"extends: smoke\nbase: {small}\n"
    )  # all that a model of one's own needs
    done = CliRunner().invoke(app, ["doctor", "--profile", str(places / "mine.yaml")])
    assert done.exit_code == 0 and done.output.count("\n") == 12 and "refusal" not in done.output
    (places / "mine.yaml").write_text(f"extends: smoke\nbase: {small}\ngroup_size: 24\n")
    done = CliRunner().invoke(app, ["doctor", "--profile", str(places / "mine.yaml")])
    assert done.exit_code == 2 and "refusal  settings" in done.output
