"""Settings that people write in TOML: one way of reading them, and one way of saying what is wrong with them."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from canopy.errors import CanopyError, RecipeError

M = TypeVar("M", bound=BaseModel)


def read_settings(path: Path, model: type[M], *, what: str, error: type[CanopyError] = RecipeError) -> M:
    """Read a TOML file as `model`.

    Args:
        path: The file.
        model: A pydantic model; one that forbids unknown keys.
        what: What the file is, with its article, for messages: "a training recipe".
        error: What to raise.

    Raises:
        CanopyError: `error`: missing or no TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist; give the path of {what} (TOML)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as reason:
        raise error(f"{path} is no TOML file ({' '.join(str(reason).split())}); correct it") from reason
    try:
        return model.model_validate(table)
    except ValidationError as reason:
        raise error(f"{path}: {first_problem(reason, model)}") from reason


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong, in one line: the dotted key as the file has it, the value, the limit or the nearest valid key."""
    # A misspelt key is missing under its right name and unknown under its wrong one: the wrong one is what has to change.
    problem = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    names, tables = _descend(model, problem["loc"])
    key = ".".join(names) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            valid = sorted({name for table in tables for name in table.model_fields})
            return f"unknown key {key!r}; {nearest(names[-1], valid)}"
        case "missing":
            return f"key {key!r} is missing; add it"
        case "union_tag_not_found":
            return f"key '{key}.{_discriminator(problem)}' is missing; add it"
        case "union_tag_invalid":
            valid = [tag.strip(" '\"") for tag in problem["ctx"]["expected_tags"].split(",")]
            given = str(problem["ctx"]["tag"])
            return f"{key}.{_discriminator(problem)}: {given!r} is not known; {nearest(given, valid)}"
    text = problem["msg"].removeprefix("Value error, ")
    # A check of a whole table names what it is about itself; printing the table again would hide it.
    return f"{key}: {text}" if isinstance(problem["input"], dict) else f"{key}: {text}, not {problem['input']!r:.80}"


def nearest(name: str, valid: Sequence[str]) -> str:
    """A remedy for a name that is not valid: the nearest one that is, or all of them where none is near."""
    if near := difflib.get_close_matches(name, valid, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return f"valid are {', '.join(sorted(valid))}"


def _discriminator(problem: Any) -> str:
    return str(problem["ctx"]["discriminator"]).strip("'")


def _descend(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys along pydantic's location as the file has them, and the tables in which the last of them stands.

    Where a table may be of several kinds pydantic puts the kind into the location, which readers of a file do not know.
    """
    names: list[str] = []
    tables: list[type[BaseModel]] = [model]
    here = tables
    for part in location:
        if isinstance(part, int):
            names.append(str(part))
            continue
        if tagged := [table for table in tables if len(tables) > 1 and part in _tags(table)]:
            here = tables = tagged
            continue
        names.append(part)
        here = tables
        inner = [t for table in tables if part in table.model_fields for t in _tables(table.model_fields[part].annotation)]
        tables = inner or tables
    return names, here


def _tags(table: type[BaseModel]) -> set[str]:
    """The words that tell this kind of table from its alternatives: fields that may hold one literal only."""
    annotations = [field.annotation for field in table.model_fields.values()]
    return {str(get_args(a)[0]) for a in annotations if get_origin(a) is Literal and len(get_args(a)) == 1}


def _tables(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments: Iterable[Any] = (a for a in get_args(annotation) if a is not NoneType)
    return [table for argument in arguments for table in _tables(argument)]
