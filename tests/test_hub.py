"""Bases on the hub: fetched once at the pinned revision; each obstacle is one sentence; no token shows."""

from __future__ import annotations

import errno
import re

import pytest
import torch
from fake_hub import BUSY, FORBIDDEN, GATED, NO_REVISION, SECRET, UNKNOWN, UNREACHED, Hub
from small_run import llama, profile, save_base

from qtale_lib import hub
from qtale_lib.adaptive import RouterConfig, add_routers, load_routed, save_routed
from qtale_lib.base import base_at_hand, base_directory, find_base, load_base
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.trainer import add_lora

PINNED = "0" * 39 + "1"


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    place = tmp_path_factory.mktemp("remote")
    save_base(place / "owner" / "small")
    return place


@pytest.fixture
def online(tmp_path, monkeypatch, remote) -> Hub:
    return Hub(tmp_path / "cache", remote).install(monkeypatch)


def of_hub(**changes):
    return profile("owner/small", revision=PINNED, **changes)


def test_a_base_is_fetched_at_its_revision_and_then_at_hand(online):
    assert base_at_hand(of_hub()) is None
    directory = base_directory(of_hub())
    assert (directory / "model.safetensors").is_file()
    assert base_at_hand(of_hub()) == directory
    assert online.fetched == [("model", "owner/small", PINNED)]
    assert base_at_hand(profile("owner/small", revision="another")) is None


def test_its_config_alone_does_not_put_it_at_hand(online):
    assert hub.config_file("owner/small", PINNED).is_file()
    assert base_at_hand(of_hub()) is None


def test_a_folder_or_a_name_in_models_dir_goes_before_the_hub(online, monkeypatch, remote):
    monkeypatch.setenv("QTALE_MODELS_DIR", str(remote))
    assert find_base("owner/small", PINNED) == remote / "owner" / "small"
    monkeypatch.setenv("QTALE_MODELS_DIR", str(remote / "owner"))
    assert find_base("owner/small", PINNED) == remote / "owner" / "small"
    assert find_base(str(remote / "owner" / "small")) == remote / "owner" / "small"
    assert online.fetched == []


def test_a_trained_run_finds_its_base_at_the_revision_that_it_was_trained_on(online, tmp_path):
    model, _ = load_base(of_hub())
    adapted = add_lora(add_routers(model, RouterConfig(hidden=4)), of_hub().lora).eval()
    save_routed(adapted, tmp_path / "run", base="owner/small", revision=PINNED)
    again = load_routed(tmp_path / "run")
    assert {revision for *_, revision in online.fetched} == {PINNED}
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, again(ids).logits)


LICENCE = "accept its licence at https://huggingface.co/owner/small"
LOGIN = "set HF_TOKEN or call `hf auth login`."
FULL_DISK = OSError(errno.ENOSPC, f"No space left, {SECRET}")


@pytest.mark.parametrize(
    ("answer", "token", "offline", "said"),
    [
        (GATED, None, False, ("is gated, and there is no token", LICENCE, LOGIN)),
        (GATED, SECRET, False, ("is gated, and the token in use has no access", LICENCE)),
        (FORBIDDEN, SECRET, False, ("is gated, and the token in use has no access", LICENCE)),
        (UNKNOWN, None, False, ("nor a model that the hub shows without a token; correct `base`", LOGIN)),
        (UNKNOWN, SECRET, False, ("nor a model that the hub shows to the token in use",)),
        (NO_REVISION, None, False, (f'has no revision "{PINNED}" on the hub; correct `revision`.',)),
        (UNREACHED, None, False, ("the hub cannot be reached; connect, call", "give `base` the path")),
        (ConnectionError(SECRET), None, False, ("the hub cannot be reached; connect, call",)),
        (UNREACHED, None, True, ("HF_HUB_OFFLINE forbids to fetch it; unset that", f"--revision {PINNED}")),
        (BUSY, None, False, ("could not be fetched from the hub (HTTP status 503); try again later",)),
        (ValueError(SECRET), None, False, ("could not be fetched from the hub (ValueError)",)),
        (FULL_DISK, None, False, ("does not fit on the disk of", "set HF_HOME.")),
    ],
)
def test_each_obstacle_is_a_sentence_of_its_own(tmp_path, monkeypatch, answer, token, offline, said):
    Hub(tmp_path, answer, token).install(monkeypatch, offline)
    for ask in (hub.snapshot, hub.config_file):
        with pytest.raises(UserError) as refused:
            ask("owner/small", PINNED)
        sentence = str(refused.value)
        assert sentence.startswith('Base model "owner/small" ') and all(part in sentence for part in said)
        assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
        assert SECRET not in sentence
        assert refused.value.__suppress_context__  # nor in a traceback


def test_without_network_the_real_client_says_so_too():
    with pytest.raises(UserError, match="not in the hub's cache, and HF_HUB_OFFLINE forbids"):
        hub.snapshot("owner/not-there", PINNED)


HUB_PROFILES = ("smollm2-135m", "llama3.2-1b", "llama3.2-3b", "llama2-7b", "llama3.1-8b")


@pytest.mark.parametrize("name", HUB_PROFILES)
def test_shipped_bases_are_pinned_to_a_whole_commit(name):
    shipped = load_profile(name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", shipped.base) and re.fullmatch(r"[0-9a-f]{40}", shipped.revision)


def test_a_random_llama_in_a_folder_is_a_base(tmp_path):
    llama().save_pretrained(tmp_path)
    assert find_base(str(tmp_path)) == tmp_path
