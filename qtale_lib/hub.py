"""Models from the Hugging Face hub: what is in its cache, what is fetched, and what stands in the way.

The token is the client's own business: it is never shown, and no message of the client's is passed on.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from qtale_lib.errors import MachineError, UserError

LOADED_FILES = ("*.safetensors", "*.json", "tokenizer.model")
CURE = "or give `base` the path of a copy"


def snapshot(name: str, revision: str | None = None) -> Path:
    """Folder of a model at a revision in the hub's cache, fetched if it is not there.

    Raises:
        UserError: one sentence on why it cannot be had: gated, unknown, offline, not to be reached, no space.
    """
    with _refusing(name, revision) as client:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=list(LOADED_FILES)))


def cached(name: str, revision: str | None = None) -> Path | None:
    """Folder of what the hub's cache has of a model; None if it has nothing."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(LOADED_FILES), local_files_only=True
        )
    except Exception:
        return None
    return Path(found)


def config_file(name: str, revision: str | None = None) -> Path:
    """A model's config.json alone, which shows that the rest can be had; UserError as `snapshot` has it."""
    with _refusing(name, revision) as client:
        return Path(client.hf_hub_download(name, "config.json", revision=revision))


def has_token() -> bool:
    """Whether the hub's client has a token to show."""
    from huggingface_hub import get_token

    return bool(get_token())


def cache_folder() -> Path:
    """Where the hub's client keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the hub's client has been told to fetch nothing."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


@contextlib.contextmanager
def _refusing(name: str, revision: str | None) -> Iterator[ModuleType]:
    """The hub's client, silent; what it raises becomes a UserError."""
    import huggingface_hub

    with silent():
        try:
            yield huggingface_hub
        except Exception as error:  # of many kinds, of several packages
            raise _refusal(name, revision, error) from None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Meanwhile, the hub's client says nothing of what it tries again."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _refusal(name: str, revision: str | None, error: Exception) -> UserError:
    from huggingface_hub import errors

    model = f'Base model "{name}"'
    at = f"{name}{f' --revision {revision}' if revision else ''}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(_gated(model, name))
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f'{model} has no revision "{revision}" on the hub; correct `revision`.')
    if isinstance(error, errors.HFValidationError | errors.RepositoryNotFoundError) or _status(error) == 401:
        return UserError(
            f"{model} is neither a folder, nor in QTALE_MODELS_DIR, nor a model that the hub shows "
            f"{'to the token in use' if has_token() else 'without a token'}; correct `base`, or if it is "
            "private, set HF_TOKEN or call `hf auth login`."
        )
    if _status(error) == 403:
        return UserError(_gated(model, name))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return MachineError(
            f"{model} does not fit on the disk of {cache_folder()}; free some, or set HF_HOME."
        )
    if is_offline():
        return MachineError(
            f"{model} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, call "
            f"`hf download {at}` where there is a network, {CURE}."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or _is_network(error):
        return MachineError(
            f"{model} is not whole in the hub's cache, and the hub cannot be reached; connect, call "
            f"`hf download {at}` where there is a network, {CURE}."
        )
    reason = f"HTTP status {_status(error)}" if _status(error) else type(error).__name__
    return MachineError(f"{model} could not be fetched from the hub ({reason}); try again later, {CURE}.")


def _gated(model: str, name: str) -> str:
    place = f"https://huggingface.co/{name}"
    if has_token():
        return (
            f"{model} is gated, and the token in use has no access; accept its licence at {place} as the "
            "token's owner."
        )
    return (
        f"{model} is gated, and there is no token; accept its licence at {place}, then set HF_TOKEN or call "
        "`hf auth login`."
    )


def _status(error: Exception) -> int | None:
    """Status of the hub's answer, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: Exception) -> bool:
    """Whether the hub's HTTP package failed before there was an answer; which package it is changes."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "RequestException", "TimeoutException"})
