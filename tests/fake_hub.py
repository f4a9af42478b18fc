"""A Hugging Face hub in a folder, in place of its client's functions: no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

SECRET = "hf_NotToBeShownAnywhere"


def refused(kind: type[Exception], status: int) -> Exception:
    """What the client raises on such an answer."""
    response = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="https://x"))
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error with token {SECRET}")
    error.response = response
    return error


GATED = refused(errors.GatedRepoError, 403)
UNKNOWN = refused(errors.RepositoryNotFoundError, 401)
NO_REVISION = refused(errors.RevisionNotFoundError, 404)
BUSY = refused(errors.HfHubHTTPError, 503)
FORBIDDEN = refused(errors.HfHubHTTPError, 403)
UNREACHED = errors.LocalEntryNotFoundError(f"cannot find it, {SECRET}")


class Hub:
    """remote: folder with what the hub has under owner/name, or the exception that it answers with.

    fetched: what was asked for over the network: ("model" or "config.json", name, revision).
    """

    def __init__(self, cache: Path, remote: Path | Exception, token: str | None = None) -> None:
        self.cache, self.remote, self.token = cache, remote, token
        self.fetched: list[tuple[str, str, str | None]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch, offline: bool = False) -> Hub:
        """Put it in the client's place."""
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: self.token)
        monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: offline)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(self.cache))
        return self

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False) -> str:
        """As the client's: offline, whatever of it is in the cache."""
        place = self._place(name, revision)
        if local_files_only:
            if not place.is_dir():
                raise UNREACHED
            return str(place)
        self.fetched.append(("model", name, revision))
        shutil.copytree(self._answer(name), place, dirs_exist_ok=True)
        return str(place)

    def hf_hub_download(self, name, filename, revision=None) -> str:
        """As the client's: one file into the cache."""
        self.fetched.append((filename, name, revision))
        place = self._place(name, revision)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._answer(name) / filename, place)
        return str(place / filename)

    def _place(self, name: str, revision: str | None) -> Path:
        return self.cache / name.replace("/", "--") / (revision or "main")

    def _answer(self, name: str) -> Path:
        if isinstance(self.remote, Exception):
            raise self.remote
        return self.remote / name
