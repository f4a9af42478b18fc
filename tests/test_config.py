"""Profiles: what the shipped ones say, what a user's own inherits, what is refused and how, and digests."""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qtale_lib import jobs
from qtale_lib.config import BITS, CSQA, EARLIER, LABELS, METHODS, TASKS, Profile, load_profile
from qtale_lib.errors import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "qtale_lib" / "profiles").glob("*.yaml"))
GRID = ("tasks", "methods", "bits", "seeds")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the current folder, an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def to(name: str, text: str | bytes) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return to


def refusal(name: str, **overrides) -> str:
    with pytest.raises(UserError) as refused:
        load_profile(name, **overrides)
    assert refused.value.exit_code == 2
    sentence = str(refused.value)
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
    return sentence


# The shipped profiles


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_load_by_name_and_by_path(path):
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert load_profile(path) == profile == load_profile(str(path))


def test_tiny_is_the_papers_grid_on_the_embedded_world():
    tiny = load_profile("tiny")
    assert (tiny.base, tiny.data, tiny.data_dir, tiny.extends) == ("microworld", "microworld", None, None)
    assert (tiny.tasks, tiny.bits, tiny.seeds) == (TASKS, (16, 4, 3, 2), (0,))
    assert tiny.methods == ("full", "dllm", "qtale") == METHODS[:3]
    assert len(TASKS) == 9 and set(TASKS) - set(CSQA) == {"mmlu", "alpaca"}


def test_tiny_says_every_setting_since_all_else_extends_it():
    says = yaml.safe_load((ROOT / "qtale_lib/profiles/tiny.yaml").read_text())
    assert set(says) == set(Profile.model_fields) - {"name", "extends"}


def test_tiny_full_is_tiny_over_seeds_and_along_theta_as_its_plan_says():
    full, tiny = load_profile("tiny-full"), load_profile("tiny")
    changed = {"name", "extends", "methods", "seeds", "theta_sweep", "limit"}
    same = [name for name in Profile.model_fields if name not in changed]
    assert full.extends == "tiny" and full.digest(*same) == tiny.digest(*same)
    assert full.limit.model_copy(update={"test": tiny.limit.test}) == tiny.limit
    runs = jobs.runs(full)
    specs = [spec for run in runs for spec in jobs.evaluation_specs(full, run)]
    searches = sum(run.routed for run in runs) * len(full.bits)
    plan = (ROOT / "qtale_lib/profiles/tiny-full.yaml").read_text()
    for count, what in (
        (len(runs), "fine-tunings"), (len(jobs.all_jobs(full)) - len(runs), "evaluation jobs"),
        (len(specs), "evaluations of up to"), (searches, "θ searches"),
    ):  # fmt: skip
        assert re.search(rf"\b{count:,}\s+(#\s+)?{what}", plan), (count, what)
    assert f"{full.limit.test:,} questions" in plan and min(full.theta_sweep) > 0


def test_smoke_is_small():
    smoke = load_profile("smoke")
    assert (smoke.extends, smoke.tasks, smoke.bits) == ("tiny", ("arc_easy", "alpaca"), (16, 4))
    assert smoke.max_steps <= 24 and smoke.limit.test <= 24 and smoke.seeds == (0,)


# A user's own


def test_own_profile_changes_what_it_says_and_inherits_the_rest(write):
    path = write("mine.yaml", "limit: {test: 5}\nseeds: 3\ntraining:\n  lr: 1e-4\nbits: [4]\n")
    mine, tiny = load_profile(path).model_dump(), load_profile("tiny").model_dump()
    tiny.update(name="mine", extends="tiny", seeds=(0, 1, 2), bits=(4,))
    tiny["limit"]["test"] = 5
    tiny["training"]["lr"] = 0.0001
    assert mine == tiny


def test_empty_file_is_tiny_by_another_name(write):
    mine = load_profile(write("my own_run.yaml", ""))
    assert (mine.name, mine.extends, mine.digest()) == ("my-own_run", "tiny", load_profile("tiny").digest())


def test_a_chain_is_followed_from_each_files_own_folder(write):
    write("shared/parent.yaml", "extends: smoke\ngroup_size: 4\nbits: [16, 3]\n")
    mine = load_profile(write("runs/child.yaml", "extends: ../shared/parent.yaml\nbits: [2]\n"))
    assert (mine.name, mine.extends) == ("child", "../shared/parent.yaml")
    assert (mine.group_size, mine.bits, mine.tasks) == (4, (2,), ("arc_easy", "alpaca"))


def test_places_are_sought_from_the_file_that_names_them_then_from_here(write, monkeypatch):
    for folder in ("runs/model", "model", "runs/data", "only-here"):
        Path(folder).mkdir(parents=True)
    write("runs/parent.yaml", "base: model\ndata_dir: ./data\n")
    child = load_profile(write("child.yaml", "extends: runs/parent.yaml\n"))
    assert (child.base, child.data_dir) == (str(Path("runs/model").resolve()), Path("runs/data").resolve())
    here = load_profile(write("runs/other.yaml", "base: only-here\ndata_dir: only-here\n"))
    assert (here.base, here.data_dir) == (str(Path("only-here").resolve()), Path("only-here").resolve())


def test_a_base_that_is_no_folder_stays_a_name(write):
    assert load_profile(write("a.yaml", "base: owner/model\nrevision: abc\n")).base == "owner/model"


def test_data_from_outside_replaces_the_files_and_an_override_both(write, monkeypatch):
    for folder in ("in-file", "outside", "override"):
        Path(folder).mkdir()
    path = write("a.yaml", "data_dir: in-file\n")
    assert load_profile(path).data_dir == Path("in-file").resolve()
    monkeypatch.setenv("QTALE_DATA_DIR", "outside")
    assert load_profile(path).data_dir == Path("outside").resolve()
    assert load_profile(path, data_dir="override").data_dir == Path("override").resolve()
    monkeypatch.setenv("QTALE_DATA_DIR", "nowhere")
    assert refusal(path).startswith("QTALE_DATA_DIR: data_dir (= nowhere) must be ")


def test_overrides_are_merged_key_by_key():
    profile = load_profile("tiny", seeds=2, limit={"test": None})
    assert profile.seeds == (0, 1) and profile.limit.test is None
    assert profile.limit.train == load_profile("tiny").limit.train


def test_the_readmes_example_is_a_profile(write):
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for folder in ("models/my-llama", "data"):
        (Path("..") / folder).mkdir(parents=True)
    assert load_profile(write("mine.yaml", example)).seeds == (0, 1, 2)


def test_a_profile_cannot_be_changed():
    with pytest.raises(ValidationError):
        load_profile("tiny").training.lr = 1.0


# What is refused, in one sentence: file, key, value, what is allowed

LIST = "must be a list of at least one, none twice, of"
ALL_TASKS = "piqa, boolq, siqa, arc_easy, arc_challenge, winogrande, openbookqa, mmlu, alpaca"
SEEDS = "must be a count of 1 to 1000, or a list of whole numbers from 0 on, none twice"
WHOLE = "must be a whole number of at least 1"
KEYS = "allowed there are"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bits: [16, 5]", f"bits (= 5) {LIST} 16, 8, 4, 3, 2"),
        ("bits: [yes]", f"bits (= true) {LIST} 16, 8, 4, 3, 2"),
        ("bits: ['4']", f'bits (= "4") {LIST} 16, 8, 4, 3, 2'),
        ("bits: 4", f"bits (= 4) {LIST} 16, 8, 4, 3, 2"),
        ("bits: [4, 4]", f"bits (= [4, 4]) {LIST} 16, 8, 4, 3, 2"),
        ("bits: []", f"bits (= []) {LIST} 16, 8, 4, 3, 2"),
        ("tasks: [Piqa]", f'tasks (= "Piqa") {LIST} {ALL_TASKS} (did you mean piqa)'),
        ("tasks: [piqa, piqa]", f'tasks (= ["piqa", "piqa"]) {LIST} {ALL_TASKS}'),
        ("tasks:", f"tasks (= null) {LIST} {ALL_TASKS}"),
        ("methods: [full, qtail]",
         f'methods (= "qtail") {LIST} full, dllm, qtale, noisy_full (did you mean qtale)'),
        ("seeds: []", f"seeds (= []) {SEEDS}"),
        ("seeds: 0", f"seeds (= 0) {SEEDS}"),
        ("seeds: true", f"seeds (= true) {SEEDS}"),
        ("seeds: '3'", f'seeds (= "3") {SEEDS}'),
        ("seeds: [0, -1]", f"seeds (= -1) {SEEDS}"),
        ("seeds: [1, 1]", f"seeds (= [1, 1]) {SEEDS}"),
        ("seeds: 10000000000000", f"seeds (= 10000000000000) {SEEDS}"),
        ("max_steps: -3", f"max_steps (= -3) {WHOLE}, or null"),
        ("max_steps: 1.5", f"max_steps (= 1.5) {WHOLE}, or null"),
        ("max_steps: no", f"max_steps (= false) {WHOLE}, or null"),
        ("theta_sweep: [0.1, 1]",
         "theta_sweep (= 1) must be a list of numbers above 0 and below 1, none twice; [] for no sweep"),
        ("limit: {train: 0}", f"limit.train (= 0) {WHOLE}, or null"),
        ("limit: 100", "limit (= 100) must be a mapping with the keys train, calibration, test"),
        ("limit: {tests: 5}",
         f"limit.tests (= 5) is no key of a profile (did you mean test); {KEYS} train, calibration, test"),
        ("group_size: 0", f"group_size (= 0) {WHOLE}, or -1 for one group per row"),
        ("group_size: true", f"group_size (= true) {WHOLE}, or -1 for one group per row"),
        ("overlong: cutt", "overlong (= \"cutt\") must be 'drop' or 'cut' (did you mean cut)"),
        ("training: {lr: '1e-3'}", 'training.lr (= "1e-3") must be a number above 0'),
        ("training: {lr: .nan}", "training.lr (= NaN) must be a number above 0"),
        ("training: {lr: .inf}", "training.lr (= Infinity) must be a number above 0"),
        ("training: {betas: [0.9]}",
         "training.betas (= [0.9]) must be two numbers of at least 0 and below 1"),
        ("training: {betas: [0.9, 1]}", "training.betas (= 1) must be two numbers of at least 0 and below 1"),
        ("routing: {always_run_tokens: 0}", f"routing.always_run_tokens (= 0) {WHOLE}"),
        ("lora: {target_modules: [q, q]}",
         f'lora.target_modules (= ["q", "q"]) {LIST} names of linear layers'),
        ("calibration: {fine_step: 0.1}",
         "calibration.fine_step (= 0.1) must be a number above 0 and at most coarse_step"),
        ("quantization: {backend: autoawq, method: rtn}",
         'quantization.method (= "rtn") must be awq or, with backend native, rtn, gptq or magr_gptq'),
        ("pruning: {weights: wanda 1.5}",
         'pruning.weights (= "wanda 1.5") must be none, or magnitude or wanda with a share or pattern, such '
         "as wanda 0.5 or wanda 2:4 (did you mean wanda)"),
        ("pruning: {layers: sleb}",
         'pruning.layers (= "sleb") must be none, block_influence or sleb with a number of layers, or '
         "early_exit with a confidence, such as sleb 3 or early_exit 0.9"),
        ("quantization: {backend: autoawq, widths: mixed}",
         'quantization.widths (= "mixed") must be uniform or, with backend native, mixed'),
        ("base: ./nope",
         "base (= ./nope) must be microworld, an existing folder, a name in QTALE_MODELS_DIR, or a hub id"),
        ("base: 5", "base (= 5) must be a text (in quotes if it reads as a number)"),
        ("revision: 1234567",
         "revision (= 1234567) must be a text (in quotes if it reads as a number), or null"),
        ("data_dir: nope", "data_dir (= nope) must be the path of an existing folder, or null"),
        ("data_dir: false", "data_dir (= false) must be the path of an existing folder, or null"),
        ("name: a/b", 'name (= "a/b") must be a word of letters, digits, dots, _ and -'),
        ("extends: 5", "extends (= 5) must be a profile's name, a path ending in .yaml, or null"),
        ("extends: null\nbits: [4]",
         "base is missing; it must be a text (in quotes if it reads as a number)"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_sentence(write, text, sentence):
    assert refusal(write("bad.yaml", text + "\n")) == f"bad.yaml: {sentence}."


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            "taks: [piqa]",
            'taks (= ["piqa"]) is no key of a profile (did you mean tasks); allowed there are name, ',
        ),
        (
            "epochs: 3",
            "epochs (= 3) is no key of a profile (did you mean training.epochs); allowed there are name, ",
        ),
        ("zzz: {a: 1}", 'zzz (= {"a": 1}) is no key of a profile; allowed there are name, extends, base, '),
        ("1: 2", "1 (= 2) is no key of a profile; allowed there are "),
        ("training: 5", "training (= 5) must be a mapping with the keys epochs, batch_size, "),
        (
            "extends: tny",
            "extends (= tny) cannot be followed: tny is no profile's name (did you mean tiny); ",
        ),
        ("extends: no.yaml", "extends (= no.yaml) cannot be followed: no.yaml is not there; "),
        ("extends: bad.yaml", "extends (= bad.yaml) leads in a circle back to bad.yaml; "),
        ("name: tiny", "name (= tiny) must be none of "),
        ("name: reference", "name (= reference) must be none of "),
    ],
)
def test_a_bad_key_or_parent_is_one_sentence(write, text, start):
    assert refusal(write("bad.yaml", text + "\n")).startswith(f"bad.yaml: {start}")


def test_the_file_that_sets_the_value_is_the_one_named(write):
    write("parent.yaml", "bits: [5]\nlimit: {train: x}\n")
    assert refusal(write("child.yaml", "extends: parent.yaml\n")).startswith("parent.yaml: bits (= 5) ")
    assert refusal(write("child.yaml", "extends: parent.yaml\nbits: [4]\n")).startswith(
        "parent.yaml: limit.train "
    )
    assert refusal("tiny", seeds=0) == f"command line or call: seeds (= 0) {SEEDS}."


def test_a_circle_of_two_is_found(write):
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    assert refusal("a.yaml").startswith("b.yaml: extends (= a.yaml) leads in a circle back to a.yaml; ")


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ("bits: [", "bad.yaml, line 1: not readable as YAML ("),
        ("a: 1\nb: 2\na: 3", "bad.yaml, line 3: not readable as YAML (the key a stands there twice); "),
        ("a: !!python/object:os.system b", "bad.yaml, line 1: not readable as YAML ("),
        ("? [1, 2]\n: 3", "bad.yaml, line 1: not readable as YAML ("),
        ("- tasks", 'bad.yaml (= ["tasks"]) must be a mapping: '),
        ("just words", 'bad.yaml (= "just words") must be a mapping: '),
        (b"\xff\xfe\xff", "bad.yaml cannot be read (UnicodeDecodeError)"),
        (b"a: \x07", "bad.yaml cannot be read (ReaderError)"),
        ("bits: &a [*a]", "bad.yaml: bits (= a list) must be "),
    ],
)
def test_a_file_that_is_no_profile_is_one_sentence(write, content, start):
    assert refusal(write("bad.yaml", content)).startswith(start)


def test_names_and_files_that_are_not_there(write):
    assert refusal("nope.yaml").startswith("nope.yaml is not there; ")
    assert refusal("smok").startswith("smok is no profile's name (did you mean smoke); there are llama2-7b, ")
    Path("folder.yaml").mkdir()
    assert refusal("folder.yaml").startswith("folder.yaml is not there; ")


def import_from_checkout() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_command_line_says_the_sentence_and_exits_with_2(write):
    write("bad.yaml", "bits: [5]\n")
    command = [sys.executable, "-m", "qtale_lib", "run", "--profile", "bad.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=import_from_checkout())
    assert done.returncode == 2
    assert done.stderr.strip() == f"bad.yaml: bits (= 5) {LIST} 16, 8, 4, 3, 2."


# Digests


def shuffled(content: dict, order: st.DrawFn) -> dict:
    keys = order(st.permutations(list(content)))
    return {
        key: shuffled(content[key], order) if isinstance(content[key], dict) else content[key] for key in keys
    }


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_digest_does_not_see_the_order_of_keys(tmp_path_factory, data):
    content = load_profile("tiny").model_dump(mode="json", exclude={*LABELS})
    path = tmp_path_factory.mktemp("order") / "shuffled.yaml"
    path.write_text(yaml.safe_dump(shuffled(content, data.draw), sort_keys=False))
    assert load_profile(path).digest() == load_profile("tiny").digest()


def test_digest_is_the_same_in_every_process():
    code = (
        "from qtale_lib.config import load_profile; print(load_profile('smoke').digest('training', 'lora'))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert told == {load_profile("smoke").digest("training", "lora")}
    assert re.fullmatch(r"[0-9a-f]{16}", *told)


def test_digest_takes_10_and_10_0_for_the_same_number(write):
    whole = load_profile(write("a.yaml", "training: {lambda1: 10, router_lr: 3e-3}\n"))
    real = load_profile(write("b.yaml", "training: {lambda1: 10.0, router_lr: 0.003}\n"))
    assert whole.digest() == real.digest()


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, dict):
        key = next(key for key in value if isinstance(value[key], int | float))
        return {**value, key: value[key] * 2}
    other = {"microworld": "owner/model", "drop": "cut", "compact": "dllm", "float32": "bfloat16"}
    other |= {"test": "validation", "likelihood": "lm_eval"}
    return other[value] if isinstance(value, str) else value[1:] if len(value) > 1 else [7]


@pytest.mark.parametrize("section", [s for s in Profile.model_fields if s not in LABELS])
def test_digest_sees_every_section_and_a_stages_only_its_own(section, tmp_path):
    tiny = load_profile("tiny")
    new = {
        "revision": "abc",
        "data": "hub",
        "alpaca": "cleaned",
        "data_dir": str(tmp_path),
        "group_size": 64,
        "max_steps": 7,
        "max_length": 77,
        "theta_sweep": [0.1],
        "theta_aims": ["ratio 0.6"],
        "pruning": {"weights": "wanda 2:4"},
    }
    profile = load_profile(
        "tiny", **{section: new.get(section) or changed(tiny.model_dump(mode="json")[section])}
    )
    assert profile.digest() != tiny.digest()
    assert profile.digest(section) != tiny.digest(section)
    others = [name for name in Profile.model_fields if name not in (*LABELS, section)]
    assert profile.digest(*others) == tiny.digest(*others)


def test_a_further_seed_leaves_the_stages_digests(write):
    stages = [name for name in Profile.model_fields if name not in (*LABELS, *GRID)]
    more = load_profile(write("more.yaml", "seeds: 5\ntasks: [piqa]\nbits: [16]\nmethods: [full]\n"))
    assert more.digest(*stages) == load_profile("tiny").digest(*stages)


def test_settings_newer_than_kept_results_leave_their_digest():
    tiny = load_profile("tiny")
    settings = tiny.model_dump(mode="json")
    for name, value in EARLIER.items():
        *section, last = name.split(".")
        holder = reduce(lambda found, key: found[key], section, settings)
        assert holder.pop(last) == value
    told = {name: value for name, value in settings.items() if name not in LABELS}
    text = json.dumps(told, sort_keys=True)
    assert tiny.digest() == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert load_profile("tiny", training={"noise": "keyed"}).digest() != tiny.digest()
    assert load_profile("tiny", compute={"gradient_checkpointing": True}).digest() == tiny.digest()


def test_digest_of_no_section_is_an_error():
    with pytest.raises(KeyError, match="trainig"):
        load_profile("tiny").digest("trainig")


@given(st.sampled_from(BITS))
def test_every_bit_width_can_be_asked_for(bits):
    assert load_profile("tiny", bits=[bits]).bits == (bits,)
