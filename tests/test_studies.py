"""Studies: what their plans promise, one store, one command, archives, and notebooks without results."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from pool_work import run_here
from small_run import profile, save_base

from qtale_lib import archive, studies, tables
from qtale_lib import lab as lab_module
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.execution_ratio import frame, front_table, gains_table
from qtale_lib.jobs import runs
from qtale_lib.lab import run_spec
from qtale_lib.studies import NAMES, SHIPPED, Committed, Study, study_of
from qtale_lib.theta_aims import aimed

MOST = 600  # fine-tunings of all studies past the paper


def fine_tunings(study: Study) -> int:
    """Distinct ones: those that several settings have in common are one."""
    return len({
        json.dumps([lab.settings("finetune", run_spec(run)), run_spec(run)], sort_keys=True)
        for lab in study.labs for run in runs(lab.profile)
    })  # fmt: skip


@pytest.mark.parametrize("notebook", NAMES)
def test_plans_keep_to_the_budget_and_to_three_seeds(notebook):
    study = study_of(notebook)
    promised = int(study.path.read_text().split(" fine-tunings")[0].split()[-1])
    assert fine_tunings(study) == promised and len(study.profile.seeds) == 3
    assert study.plan.notebook == notebook


def test_all_plans_together_keep_to_the_budget():
    assert sum(fine_tunings(study_of(notebook)) for notebook in NAMES) <= MOST


@pytest.mark.parametrize("notebook", NAMES)
def test_the_small_study_of_smoke_varies_what_the_shipped_one_does(notebook, tmp_path):
    small, whole = study_of(notebook, "smoke", tmp_path), study_of(notebook, root=tmp_path)
    assert small.plan.factors.keys() <= whole.plan.factors.keys()
    assert small.plan.notebook == notebook and small.profile.name != whole.profile.name
    assert small.is_small() and not whole.is_small()


def test_one_changed_line_is_the_study_on_another_model(tmp_path):
    shipped = study_of("08")
    line = f"extends: {shipped.path}\nbase: someone/model\n"
    (tmp_path / "mine.yaml").write_text(line)
    mine = study_of("08", str(tmp_path / "mine.yaml"))
    assert {setting.profile.base for setting in mine.settings} == {"someone/model"}
    assert [s.profile.model_copy(update={"base": "", "name": ""}) for s in mine.settings] == [
        s.profile.model_copy(update={"base": "", "name": "", "extends": str(shipped.path)})
        for s in shipped.settings
    ]
    with pytest.raises(UserError, match="is not 10"):
        study_of("10", str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match="no study's name; there are"):
        studies.find("executionratio")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"notebook": "05"}, "notebook .* must be 08, 09 or 10"),
        ({"alongside": {"training.lr": {"seeds": 1}}}, "names training.lr, which is not varied"),
        ({"alongside": {"max_steps": {"seed": 1}}}, "gives max_steps the value 3"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(tmp_path, changes, said):
    plan = {"extends": "smoke", "notebook": "08", "factors": {"max_steps": [3]}, **changes}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError, match=said):
        Study(tmp_path / "mine.yaml")


# A small one, computed.


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """The study of smoke on a random model, computed."""
    folder = tmp_path_factory.mktemp("study")
    small = profile(save_base(folder / "base")).model_dump(mode="json", exclude={"name", "extends"})
    kept = ("base", "max_steps", "limit", "group_size", "quantization", "calibration", "probes")
    plan = {
        "theta_aims": ["ratio 0.9 by layer"],
        "extends": str(SHIPPED / "execution_ratio.smoke.yaml"),
        **{name: small[name] for name in kept},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(plan))
    made = study_of("08", str(folder / "small.yaml"), folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "run_tasks", run_here)
        assert {outcome.status for outcome in made.compute()} == {"done"}
    return made


def test_it_is_computed_once_and_shown(study, tmp_path):
    assert study.missing() == [] and study.state().endswith("9 of 9 jobs are done.")
    assert study.compute() == [] and study.is_small()
    shown = frame(study)
    assert set(shown.curve) == {"qtale", "dllm", "targets"} and len(shown) == 2 * 2 * (4 + 4 + 2)
    cell = ("arc_easy", "qtale", 0, 16, "ratio 0.9 by layer")
    assert aimed(study.own, cell[4], *cell[:4]) == 0.9
    assert study.own.answers[cell].execution_ratio == pytest.approx(0.9, abs=0.08)
    kept = study.keep(front_table(shown, study), tmp_path)
    assert isinstance(kept, tables.Table) and (tmp_path / "execution_ratio_front.csv").is_file()


def test_its_fingerprint_is_that_of_its_results(study, tmp_path):
    again, empty = (Study(study.path, root) for root in (study.root, tmp_path))
    assert again.fingerprint() == study.fingerprint() != empty.fingerprint()


def test_its_archive_holds_every_setting_once(study, tmp_path):
    first, *others = study.labs
    (file,) = archive.archive(first, tmp_path / "archive", others)
    other = Study(study.path, tmp_path / "clone")
    restored = archive.restore(other.labs[0], tmp_path / "archive")
    assert other.missing() == [] and frame(other).equals(frame(study))
    stored = [path for path in (first.store.root).glob("*/*.json") if path.parent.name in archive.KINDS]
    assert restored == len(stored) and file.stat().st_size > 0


# Nothing computed.


def test_without_results_a_notebook_says_which_command_computes_them(tmp_path):
    study = study_of("08", root=tmp_path)
    shown = study.keep(gains_table(study), tmp_path / "tables", tmp_path)
    assert isinstance(shown, Committed)
    assert "`python -m qtale_lib study execution_ratio` computes" in shown._repr_markdown_()
    assert not (tmp_path / "tables").exists()
    assert not study.is_small()  # hours are not begun unasked
    assert study.picture("curves", Path("drawn.png"), tmp_path) == Path("drawn.png")


def test_without_results_the_committed_reference_is_shown(tmp_path):
    study = study_of("08", root=tmp_path)
    place = partial(tmp_path.joinpath)
    for path, text in (
        (place("results/reference/execution_ratio/tables/execution_ratio_gains.md"), "| once measured |"),
        (place("figures/reference/execution_ratio/curves.png"), ""),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    shown = study.keep(gains_table(study), tmp_path / "tables", tmp_path)
    assert "| once measured |" in shown.text and "committed reference" in shown.text
    assert study.picture("curves", Path("drawn.png"), tmp_path).parent.name == "execution_ratio"


def test_a_plain_profile_has_one_lab_and_a_study_one_a_setting():
    assert [lab.profile for lab in studies.labs("smoke")] == [load_profile("smoke")]
    assert len(studies.labs("execution_ratio")) == 4
    assert not studies.is_study("tiny") and studies.is_study(str(SHIPPED / "execution_ratio.yaml"))
