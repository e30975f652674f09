"""Recipes: strict, versioned TOML that lists passes and their configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import RecipeError
from onnxcomp.registry import load_pass, unknown
from onnxcomp.rewrite import Pass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
AUTO = "auto"
"""In place of a recipe: the built-in one for the kind of model."""
_MAX_BYTES = 1 << 20
_KEYS = ("version", "summary", "target", "passes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A list of configured passes.

    Attributes:
        name: File stem or built-in name.
        passes: The passes, in order.
        target: Target that the recipe is made for, or None for any.
        summary: One line on what it does.
        source: The TOML text, kept for the report.
    """

    name: str
    passes: tuple[Pass, ...]
    target: str | None = None
    summary: str = ""
    source: str = ""


def load_recipe(name: str) -> Recipe:
    """Loads a recipe from a file, or a built-in one by name.

    Raises:
        RecipeError: If it does not exist or is not valid; the message names the place, e.g. `passes[2]`.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise RecipeError(f"{path}: a recipe of more than {_MAX_BYTES} bytes is refused")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RecipeError(f"there is no recipe file {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}") from error
        return parse_recipe(text, name=path.stem, where=str(path))
    folder = resources.files("onnxcomp") / "recipes"
    if name not in builtin_recipes():
        raise RecipeError(unknown("recipe", name, [AUTO, *builtin_recipes()]) + " or give the path of a .toml file")
    return parse_recipe((folder / f"{name}.toml").read_text(encoding="utf-8"), name=name, where=name)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("onnxcomp") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def parse_recipe(text: str, *, name: str = "recipe", where: str = "recipe") -> Recipe:
    """Parses and validates the text of a recipe.

    Args:
        text: TOML.
        name: Name of the recipe.
        where: What an error message calls it.

    Raises:
        RecipeError: If it is not valid.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{where} is not valid TOML: {error}") from error
    for key in table:
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}; a recipe has {list(_KEYS)}")
    version = table.get("version")
    if version != VERSION or isinstance(version, bool):
        raise RecipeError(f"{where}: version is {version!r}; this onnxcomp reads 'version = {VERSION}'")
    for key in ("summary", "target"):
        if not isinstance(table.get(key, ""), str):
            raise RecipeError(f"{where}: {key} has to be a string")
    steps = table.get("passes")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise RecipeError(f"{where}: it needs a list of tables [[passes]]")
    return Recipe(
        name=name,
        passes=tuple(_parse_pass(step, f"{where}: passes[{i}]") for i, step in enumerate(steps)),
        target=table.get("target"),
        summary=table.get("summary", ""),
        source=text,
    )


def _parse_pass(table: Mapping[str, Any], where: str) -> Pass:
    config = dict(table)
    name = config.pop("pass", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where}: it needs a key 'pass' with the name of a pass")
    try:
        kind = load_pass(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    try:
        # As JSON, since strict validation of Python objects takes no table for a dataclass and no list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(config, default=str))
    except ValidationError as error:
        raise RecipeError("\n".join(_complaint(where, name, kind, e) for e in error.errors())) from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _complaint(where: str, name: str, kind: type[Pass], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner: Any = kind
        for part in location[:-1]:
            name, owner = part, {f.name: f.default for f in fields(owner)}.get(part)
        allowed = sorted(f.name for f in fields(owner)) if is_dataclass(owner) else []
        path = ".".join([where, *location[:-1]])
        return f"{path}: unknown key {location[-1]!r}; {name} has {allowed}"
    return f"{'.'.join([where, *location])}: {error['msg']} (got {error['input']!r})"
