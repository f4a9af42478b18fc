"""Profile files: strict YAML, the `extends` chain, places on disk, one sentence for what is wrong."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qtale_lib.errors import UserError

SHIPPED = Path(__file__).parent / "profiles"
DEFAULT_PARENT = "tiny"
NOT_A_NAME = "reference"  # results/reference is where published runs lie
EMBEDDED = "microworld"
OVERRIDE = "command line or call"

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and takes 1e-3 for a number, which YAML 1.1 does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        twice = [key for key, _ in node.value if names.count(key.value) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"the key {twice[-1].value} stands there twice", problem_mark=twice[-1].start_mark
            )
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass
class Settings:
    """Settings merged layer upon layer, and for each key which file (or other source) set it.

    Any two are equal: profiles are so by what they say, wherever it stands.
    """

    values: dict[str, Any] = field(default_factory=dict, compare=False)
    sources: dict[Keys, Path | str] = field(default_factory=dict, compare=False)

    def add(self, changes: dict[str, Any], source: Path | str) -> None:
        self.values = self._merged(self.values, changes, source, ())

    def _merged(self, old: dict, changes: dict, source: Path | str, path: Keys) -> dict:
        merged = dict(old)
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                merged[key] = self._merged(old[key], value, source, (*path, key))
            else:
                merged[key] = value
                self.sources[(*path, key)] = source
        return merged

    def source(self, keys: Keys) -> Path | str | None:
        """What set the value at `keys`, or the mapping around it."""
        ends = range(len(keys), 0, -1)
        return next((self.sources[keys[:end]] for end in ends if keys[:end] in self.sources), None)


def read_profile(
    model: type[Model], name_or_path: str | Path, overrides: dict[str, Any]
) -> tuple[Model, Settings]:
    """The validated profile, and where it stands: its chain from the root down, then $QTALE_DATA_DIR, then
    the overrides.
    """
    path = _locate(name_or_path)
    settings = Settings()
    for layer, content in reversed(list(_chain(path))):
        settings.add(content, layer)
    if data_dir := os.environ.get("QTALE_DATA_DIR"):
        settings.add({"data_dir": data_dir}, "QTALE_DATA_DIR")
    settings.add(overrides, OVERRIDE)
    _refuse_taken_name(settings, path)
    _settle_places(settings)
    try:
        return model.model_validate(settings.values), settings
    except ValidationError as error:
        raise UserError(_sentence(model, settings, path, error)) from None


def sets(name_or_path: str | Path, key: str) -> bool:
    """Whether a profile's file, or one that it extends, sets a key; UserError as read_profile."""
    return any(key in content for _, content in _chain(_locate(name_or_path)))


def _locate(name: str | Path, folder: Path = Path()) -> Path:
    """The file of a shipped profile's name, or of a path that ends in .yaml or .yml, seen from `folder`."""
    if str(name).endswith((".yaml", ".yml")):
        with contextlib.suppress(OSError, RuntimeError):  # too long a name, ~ of an unknown user
            if (path := folder / Path(name).expanduser()).is_file():
                return path
        raise UserError(f"{folder / name} is not there; give the path of a profile's YAML file that exists.")
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if name not in shipped:
        raise UserError(
            f"{name} is no profile's name{_did_you_mean(str(name), shipped)}; "
            f"there are {', '.join(shipped)}, and your own by its path, which ends in .yaml."
        )
    return SHIPPED / f"{name}.yaml"


def _chain(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The profile's file and those that it extends, up to the root, with name and parent filled in."""
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        content = _read(path)
        parent = content.get("extends", None if _is_shipped(path) else DEFAULT_PARENT)
        yield path, {"name": _name_from(path), **content, "extends": parent}
        if parent is None:
            return
        child, path = path, _parent(path, parent)
        if path.resolve() in seen:
            raise UserError(
                f"{child}: extends (= {parent}) leads in a circle back to {path}; "
                "it must be a profile that does not extend this one."
            )


def _parent(child: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise UserError(
            f"{child}: extends (= {shown(name)}) must be a profile's name, a path ending in .yaml, or null."
        )
    try:
        return _locate(name, child.parent)
    except UserError as error:
        raise UserError(f"{child}: extends (= {name}) cannot be followed: {error}") from None


def _is_shipped(path: Path) -> bool:
    return path.resolve().parent == SHIPPED.resolve()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}, line {line}: not readable as YAML ({error.problem}); write `key: value` on each line."
        ) from None
    except (
        Exception
    ) as error:  # of every kind: an explicit tag, such as !!int, converts whatever it stands at
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); a profile is a YAML file in UTF-8."
        ) from None
    if not isinstance(content, dict | None):
        raise UserError(f"{path} (= {shown(content)}) must be a mapping: `key: value` on each line.")
    return content or {}


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-") or "profile"


def _refuse_taken_name(settings: Settings, path: Path) -> None:
    """A user's profile must not write into the folder of a shipped one, or of the published runs."""
    name = settings.values["name"]
    taken = [NOT_A_NAME] if _is_shipped(path) else [NOT_A_NAME, *(p.stem for p in SHIPPED.glob("*.yaml"))]
    if name in taken:
        raise UserError(
            f"{path}: name (= {name}) must be none of {', '.join(sorted(taken))}, whose results it would mix "
            "with; rename the file, or set name in it."
        )


def _settle_places(settings: Settings) -> None:
    """Make `base` and `data_dir` absolute where they are folders; refuse paths that lead nowhere."""
    base, data_dir = settings.values.get("base"), settings.values.get("data_dir")
    if isinstance(base, str) and base != EMBEDDED:
        source = settings.source(("base",))
        found = _folder(base, source)
        if found is None and base.startswith((".", "/", "~")):
            raise UserError(
                f"{source}: base (= {base}) must be {EMBEDDED}, an existing folder, a name in "
                "QTALE_MODELS_DIR, or a hub id."
            )
        settings.values["base"] = str(found or base)
    if isinstance(data_dir, str | Path):
        source = settings.source(("data_dir",))
        found = _folder(data_dir, source)
        if found is None:
            raise UserError(
                f"{source}: data_dir (= {data_dir}) must be the path of an existing folder, or null."
            )
        settings.values["data_dir"] = found


def _folder(place: str | Path, source: Path | str | None) -> Path | None:
    near = [source.parent] if isinstance(source, Path) else []
    try:
        candidates = [folder / Path(place).expanduser() for folder in [*near, Path()]]
        return next((path.resolve() for path in candidates if path.is_dir()), None)
    except (OSError, RuntimeError):  # too long a name, no right to look, ~ of an unknown user
        return None


def _sentence(model: type[BaseModel], settings: Settings, path: Path, error: ValidationError) -> str:
    """What is wrong with the first value refused: file, key, value, what is allowed."""
    first = error.errors(include_url=False)[0]
    keys, value = _walk(model, settings.values, first["loc"])
    parents, name = keys[:-1], ".".join(keys)
    if first["type"] == "missing" and first["loc"] == keys:
        complaint = f"{name} is missing; it must be {_allowed(model, keys, first['msg'])}"
    elif first["type"] == "extra_forbidden":
        allowed = ", ".join(_section(model, parents).model_fields)
        hint = _did_you_mean_key(model, keys)
        complaint = f"{name} (= {shown(value)}) is no key of a profile{hint}; allowed there are {allowed}"
    else:
        allowed = _allowed(model, keys, first["msg"])
        hint = _did_you_mean(value, re.findall(r"\w+", allowed)) if isinstance(value, str) else ""
        complaint = f"{name} (= {shown(value)}) must be {allowed}{hint}"
    return f"{settings.source(keys) or path}: {complaint}."


def _walk(model: type[BaseModel] | None, values: Any, location: Keys) -> tuple[tuple[str, ...], Any]:
    """The dotted key of a refused value, and the value, or the one entry of a list that was refused.

    A location goes on below a setting, by names that are no keys, where it can be of several types.
    """
    keys: list[str] = []
    for step in location:
        if model and isinstance(step, str) and isinstance(values, dict):
            keys.append(step)
            values = values.get(step)
            model = _inner(model.model_fields[step]) if step in model.model_fields else None
        elif isinstance(values, list | tuple) and isinstance(step, int) and step < len(values):
            values = values[step]
    return tuple(keys), values


def _section(model: type[BaseModel], keys: tuple[str, ...]) -> type[BaseModel]:
    if not keys:
        return model
    return _section(_inner(model.model_fields[keys[0]]), keys[1:])


def _inner(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or that each of its list is; None for a field of another kind."""
    kind = next(iter(get_args(info.annotation)), info.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _allowed(model: type[BaseModel], keys: tuple[str, ...], message: str) -> str:
    info = _section(model, keys[:-1]).model_fields[keys[-1]]
    if _is_section(info):
        return f"a mapping with the keys {', '.join(info.annotation.model_fields)}"
    return info.description or message.removeprefix("Input should be ")


def _did_you_mean_key(model: type[BaseModel], keys: tuple[str, ...]) -> str:
    """Hint at a key spelt alike beside it, or at the same key in another section."""
    beside = list(_section(model, keys[:-1]).model_fields)
    elsewhere = [key for key in _dotted(model) if key.split(".")[-1] == keys[-1]]
    return f" (did you mean {elsewhere[0]})" if elsewhere else _did_you_mean(keys[-1], beside)


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        if _is_section(info):
            yield from _dotted(info.annotation, f"{prefix}{name}.")


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _did_you_mean(value: str, options: list[str]) -> str:
    near = [] if value in options else difflib.get_close_matches(value.lower(), options, n=1)
    return f" (did you mean {near[0]})" if near else ""


def shown(value: Any) -> str:
    """The value as YAML would have it, shortened; of one that aliases make huge, only the start."""
    text = ""
    try:
        for piece in json.JSONEncoder(default=str, ensure_ascii=False).iterencode(value):
            text += piece
            if len(text) > 80:
                break
    except (TypeError, ValueError, RecursionError):  # keys that are no text, a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
