"""Set-up: the pins in step, the scripts on a stand-in checkout with a stand-in Python, what git keeps."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

import qtale_lib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_LOCKED = {"torch", "triton"}  # their files differ with the build of torch


def split(requirement: str) -> tuple[str, str, str]:
    """(name, version, marker) of a pin."""
    pin, _, marker = requirement.partition(";")
    name, version = pin.strip().split("==")
    return name, version, marker.strip().replace('"', "'")


DIRECT = [split(pin) for pin in PROJECT["dependencies"]]
EXTRAS = {extra: [split(pin) for pin in pins] for extra, pins in PROJECT["optional-dependencies"].items()}
CLUSTER, BROWSER = (EXTRAS.pop(extra) for extra in ("cluster", "browser"))  # for ./run_tests.sh --all alone
EXTRA = [pin for pins in EXTRAS.values() for pin in pins]
FILES = ("requirements", "requirements-cluster", "requirements-browser")
LOCKS = {name: (ROOT / f"{name}.lock").read_text() for name in FILES}


def locked(name: str) -> list[tuple[str, str, str]]:
    """Every pin of a lock file."""
    return [split(line.rstrip(" \\")) for line in LOCKS[name].splitlines() if re.match(r"[a-z]", line)]


LOCKED = locked("requirements")


# The pins


def test_conda_users_get_the_same_pins():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pip[-1] == "--editable ."
    assert sorted(split(pin) for pin in pip[:-1]) == sorted(DIRECT + EXTRA)
    python = next(entry for entry in conda if str(entry).startswith("python="))
    assert python.split("=")[1] in ("3.11", "3.12", "3.13")


@pytest.mark.parametrize(("name", "version", "marker"), [p for p in DIRECT + EXTRA if p[0] not in NOT_LOCKED])
def test_the_lock_holds_each_direct_pin(name, version, marker):
    assert (name, version, marker) in LOCKED


@pytest.mark.parametrize(
    ("lock", "direct", "new"),
    [
        ("requirements-cluster", CLUSTER, {"grpcio", "msgpack", "protobuf", "ray"}),
        ("requirements-browser", BROWSER, {"axe-playwright-python", "greenlet", "playwright"}),
    ],
)
def test_an_extra_is_added_to_what_the_lock_holds_and_changes_nothing_of_it(lock, direct, new):
    added = locked(lock)
    assert set(direct) < set(added) and not set(direct) & set(LOCKED)
    main = {name: (version, marker) for name, version, marker in LOCKED}
    assert [pin for pin in added if pin[0] in main and pin[1:] != main[pin[0]]] == []
    assert {name for name, _, _ in added} - set(main) == new


@pytest.mark.parametrize(("lock", "least"), list(zip(FILES, (100, 4, 3), strict=True)))
def test_a_lock_is_hashed_whole_and_names_no_place(lock, least):
    entries = re.split(r"\n(?=[a-z])", LOCKS[lock].split("\n", 2)[2])
    assert len(entries) == len(locked(lock)) >= least
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert not re.search(r"://|--index|--find-links|^-e|file:|/home|/tmp", LOCKS[lock], re.M)
    names = {name for name, _, _ in locked(lock)}
    assert not [name for name in names if name in NOT_LOCKED or name.startswith(("nvidia", "cuda"))]


def test_the_lock_says_one_version_for_each_python_and_system():
    from packaging.markers import Marker

    for python in ("3.11.0", "3.11.9", "3.12.0", "3.13.5"):
        for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")):
            here = {
                "python_full_version": python, "python_version": python[:4], "sys_platform": system,
                "platform_machine": machine, "os_name": "posix", "implementation_name": "cpython",
            }  # fmt: skip
            names = [n for n, _, marker in LOCKED if not marker or Marker(marker).evaluate(here)]
            assert len(names) == len(set(names))
            assert {n for n, _, _ in DIRECT} - {"torch"} <= set(names)
            assert ("autoawq" in names) == (system == "linux")


def test_this_environment_holds_the_pins():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/environment.py", "check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# The scripts, on a stand-in checkout: `qtale_lib` says how it was called, `pip` writes down what it was asked

PYTHON = """#!/bin/sh
# A Python of version {version}; `-m venv` makes another of its kind, `-m pip` writes to calls.txt.
case "$1 $2" in
  "-V ") echo "Python {version}" ;;
  "-c import"*) exit {out_of_range} ;;
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip") echo "$@" >> "{root}/calls.txt"
    case "$*" in
      *--require-hashes*) [ ! -e "{root}/no-network" ] ;;
      *"show --quiet"*) exit 1 ;;
    esac || exit
    case "$*" in *browser.lock*) touch "$0.holds-extras" ;; esac ;;
  *environment.py*) echo "$2" >> "{root}/calls.txt"
    [ "$2" = forget-halves ] && exit
    [ -e "{root}/holds-pins" ] && [ "$3" != cluster -o -e "$0.holds-extras" ] ;;
  "-m qtale_lib" | "-m pytest") echo "CALLED $* IN $VIRTUAL_ENV" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts and pins and nothing else, and a stand-in Python beside it."""
    root = tmp_path / "with space" / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in (
        "run_all.sh",
        "run_tests.sh",
        "scripts/setup_env.sh",
        "scripts/environment.py",
        "pyproject.toml",
        "requirements.lock",
        "requirements-cluster.lock",
        "requirements-browser.lock",
    ):
        shutil.copy(ROOT / name, root / name)
    (root / "holds-pins").touch()
    stand_in(root.parent / "python", root)
    return root


def stand_in(path: Path, root: Path, version: str = "3.12.1", out_of_range: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(version=version, root=root, out_of_range=out_of_range))
    path.chmod(0o755)
    return path


def run_all(
    root: Path, *arguments: str, script: str = "run_all.sh", **variables: str
) -> subprocess.CompletedProcess:
    outside = {
        n: v for n, v in os.environ.items() if n not in ("VIRTUAL_ENV", "CONDA_PREFIX", "QTALE_TORCH_INDEX")
    }
    return subprocess.run(
        [root / script, *arguments],
        capture_output=True, text=True, timeout=60, cwd=root.parent,
        env={**outside, "PYTHON": str(root.parent / "python"), **variables},
    )  # fmt: skip


def calls(root: Path) -> list[str]:
    path = root / "calls.txt"
    told = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return told


def test_first_use_installs_torch_then_the_lock_and_the_second_starts_at_once(checkout):
    done = run_all(checkout, "--only", "03, 05")
    assert done.returncode == 0, done.stderr
    assert f"CALLED -m qtale_lib run --only 03, 05 IN {checkout}/.venv" in done.stdout
    installs = [call for call in calls(checkout) if " install " in call]
    torch = next(f"{name}=={version}" for name, version, _ in DIRECT if name == "torch")
    assert torch in installs[0] and "--index-url" not in installs[0]
    assert "--require-hashes --no-deps" in installs[1] and "requirements.lock" in installs[1]
    assert "--editable" in installs[-1]
    assert any("triton==" in call for call in installs) == (sys.platform == "linux")

    started = time.monotonic()
    again = run_all(checkout)
    assert time.monotonic() - started < 3
    assert "CALLED" in again.stdout and again.stderr == "" and calls(checkout) == []


def test_torch_comes_from_another_index_where_one_is_named(checkout):
    assert run_all(checkout, QTALE_TORCH_INDEX="https://example.org/cpu").returncode == 0
    with_index = [call for call in calls(checkout) if "--index-url https://example.org/cpu" in call]
    assert len(with_index) == 1 and "torch==" in with_index[0]


def test_an_interrupted_set_up_is_told_and_goes_on(checkout):
    (checkout / "no-network").touch()
    cut = run_all(checkout)
    assert cut.returncode == 1 and "CALLED" not in cut.stdout
    assert "call this again" in cut.stderr.splitlines()[-1]
    calls(checkout)
    (checkout / "no-network").unlink()
    assert "CALLED" in run_all(checkout).stdout
    told = calls(checkout)
    assert "forget-halves" in told and any("--require-hashes" in call for call in told)


def test_a_set_up_that_misses_the_pins_is_not_called_ready(checkout):
    (checkout / "holds-pins").unlink()
    done = run_all(checkout)
    assert done.returncode == 1 and "differs from the pins" in done.stderr
    assert not (checkout / ".venv/qtale-stamp").exists()


@pytest.mark.parametrize("change", ["requirements.lock", "pyproject.toml"])
def test_new_pins_are_installed_over_the_old(checkout, change):
    run_all(checkout)
    calls(checkout)
    path = checkout / change
    path.write_text(path.read_text().replace("torch==2.", "torch==3.") + "# more\n")
    assert "CALLED" in run_all(checkout).stdout
    assert any("--require-hashes" in call for call in calls(checkout))


def test_all_tests_and_they_alone_add_ray_and_playwright(checkout):
    def asked(*arguments: str, **variables: str) -> list[str]:
        done = run_all(checkout, *arguments, **variables)
        assert done.returncode == 0 and "CALLED" in done.stdout, done.stderr
        return [call for call in calls(checkout) if re.search("(cluster|browser).lock", call)]

    assert asked() == [] and asked(script="run_tests.sh") == []
    added = asked("--all", script="run_tests.sh")
    assert len(added) == 2 and all("--require-hashes --no-deps" in call for call in added)
    assert asked("--all", script="run_tests.sh") == [] and asked() == []


def test_ray_cut_off_while_installing_is_told_and_goes_on(checkout):
    run_all(checkout)
    (checkout / "no-network").touch()
    cut = run_all(checkout, "--all", script="run_tests.sh")
    assert cut.returncode == 1 and "CALLED" not in cut.stdout
    assert "requirements-cluster.lock could not be installed" in cut.stderr.splitlines()[-1]
    (checkout / "no-network").unlink()
    assert "CALLED" in run_all(checkout, "--all", script="run_tests.sh").stdout


def test_an_active_environment_that_holds_the_pins_is_used_as_it_is(checkout):
    active = checkout.parent / "active"
    stand_in(active / "bin/python", checkout)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = run_all(checkout, **{variable: str(active)})
        assert "CALLED" in done.stdout and done.stderr == ""
    assert calls(checkout) == ["check", "check"] and not (checkout / ".venv").exists()


def test_an_active_environment_without_the_pins_is_passed_over(checkout):
    active = stand_in(checkout.parent / "active/bin/python", checkout.parent / "elsewhere").parents[1]
    done = run_all(checkout, VIRTUAL_ENV=str(active))
    assert f"IN {checkout}/.venv" in done.stdout, done.stderr


def test_a_wrong_python_is_told_in_a_sentence(checkout):
    old = stand_in(checkout.parent / "old", checkout, version="3.10.4", out_of_range=1)
    done = run_all(checkout, PYTHON=str(old))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"Python 3.11, 3.12 or 3.13 is needed, but {old} is Python 3.10.4; " in done.stderr
    assert "is not there; install one" in run_all(checkout, PYTHON="/no/such/python").stderr
    assert not (checkout / ".venv").exists()


def test_help_needs_no_set_up(checkout):
    done = run_all(checkout, "--only", "03", "--help")
    assert done.returncode == 0 and not (checkout / ".venv").exists() and calls(checkout) == []
    for option in ("--profile", "--data-dir", "--only", "--seeds", "--fresh"):
        assert option in done.stdout


def test_packages_cut_off_while_installing_are_forgotten(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    packages = next(tmp_path.glob("lib/python*/site-packages"))
    for name, files in {"whole": ("METADATA", "RECORD"), "half": ("METADATA",)}.items():
        (packages / f"{name}-1.0.dist-info").mkdir()
        for file in files:
            (packages / f"{name}-1.0.dist-info" / file).write_text(f"Name: {name}\nVersion: 1.0\n")
    subprocess.run([tmp_path / "bin/python", ROOT / "scripts/environment.py", "forget-halves"], check=True)
    assert [path.name for path in packages.glob("*.dist-info")] == ["whole-1.0.dist-info"]


@pytest.mark.parametrize(
    "script", ["run_all.sh", "run_tests.sh", "scripts/setup_env.sh", "scripts/cluster.slurm", ".ci/run"]
)
def test_scripts_are_shell_that_every_bash_reads(script):
    path = ROOT / script
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert script.startswith("scripts") or os.access(path, os.X_OK)
    assert not re.search(r"\bmapfile\b|declare -A|\$\{\w+(,,|\^\^)", path.read_text())  # bash 4, not on macOS


# What git keeps


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("results/tiny/store/a.json", True),
        ("results/reference/tiny/tables/table_1.md", False),
        ("results/archive/tiny-full/seed-0.jsonl.xz", False),
        ("figures/smoke/figure_2.pdf", True),
        ("figures/reference/tiny/figure_2.png", False),
        (".venv/bin/python", True),
        ("notebooks/.ipynb_checkpoints/a.ipynb", True),
        ("qtale_lib/data/microworld/base/model.safetensors", False),
    ],
)
def test_only_published_results_are_kept(tmp_path, path, ignored):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert (
        subprocess.run(["git", "-C", tmp_path, "check-ignore", "--quiet", path]).returncode == 0
    ) == ignored


# Elsewhere: Binder and Codespaces, which have not been called


def test_binder_starts_tiny_in_its_own_environment_and_then_what_it_was_asked_for(checkout, tmp_path):
    shutil.copytree(ROOT / ".binder", checkout / ".binder")
    prefix = tmp_path / "conda"
    stand_in(prefix / "bin" / "python", checkout)
    variables = {"NB_PYTHON_PREFIX": str(prefix), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    conda = tmp_path / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text(f'#!/bin/sh\necho "conda $@" >> "{checkout}/calls.txt"\n')
    conda.chmod(0o755)
    assert run_all(checkout, script=".binder/postBuild", **variables).returncode == 0
    (update, _) = calls(checkout)
    assert update == f"conda env update --prefix {prefix} --file environment.yml"
    assert (ROOT / update.split()[-1]).is_file()

    done = run_all(checkout, "echo", "JupyterLab", script=".binder/start", **variables)
    assert done.stdout == "JupyterLab\n" and done.returncode == 0
    log, deadline = checkout / "results" / "run_all.log", time.monotonic() + 30
    while "CALLED" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "CALLED -m qtale_lib run IN" in log.read_text()
    assert not (checkout / ".venv").exists()


def test_codespaces_sets_up_what_is_there_and_starts_tiny(checkout):
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    python = (ROOT / ".binder" / "runtime.txt").read_text().strip()
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert container["image"].startswith("python:3.11-") and python == "python-3.11"
    assert "python=3.11" in conda
    outside = {name: v for name, v in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    for command in (container["postCreateCommand"], container["postAttachCommand"]):
        done = subprocess.run(
            command, shell=True, cwd=checkout, capture_output=True, text=True, check=True,
            env={**outside, "PYTHON": str(checkout.parent / "python")},
        )  # fmt: skip
    assert f"CALLED -m qtale_lib run IN {checkout}/.venv" in done.stdout and done.stderr == ""


def test_the_commit_hooks_are_well_formed():
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", config], check=True)
    hooks = {
        hook["id"]: hook for repo in yaml.safe_load(config.read_text())["repos"] for hook in repo["hooks"]
    }
    assert {"ruff-check", "ruff-format", "nbstripout", "check-added-large-files"} == set(hooks)
    assert re.match(hooks["nbstripout"]["files"], "notebooks/00_scoreboard.ipynb")
    assert not re.match(hooks["nbstripout"]["files"], "results/tiny/notebooks/00_scoreboard.ipynb")


def test_licence_and_citation_agree_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (qtale_lib.__version__, PROJECT["license"])
    paper = citation["references"][0]
    authors = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert authors == ["Kanghyun Noh", "Jinheon Choi", "Yulwha Kim"]
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
