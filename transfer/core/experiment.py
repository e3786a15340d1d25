"""An experiment read from one YAML file: all problems at once, unknown keys answered with the nearest known one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from transfer.core.config import PRESETS, Experiment, ModelSection
from transfer.core.errors import TransferError


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the section that ``location`` points into."""
    for step in location:
        field = model.model_fields.get(str(step))
        if field is None:
            return [] if model is not Experiment else list(model.model_fields)
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        section = next((k for k in kinds if issubclass(k, BaseModel) and k is not ModelSection), None)
        if section:
            model = section
        else:
            return list(ModelSection.model_fields)
    return list(model.model_fields)


def _problems(error: ValidationError) -> str:
    lines = []
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(
            i is not item and i["loc"][: len(item["loc"])] == item["loc"] for i in items
        ):
            continue  # its broken members were not counted, and are told
        where = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(Experiment, item["loc"][:-1]), 1, 0.5)
            lines.append(f"unknown key `{where}`" + (f" (did you mean `{near[0]}`?)" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"`{where}` is missing")
        else:
            lines.append(f"`{where}`: {_said(item)}")
    return "; ".join(lines)


_KINDS = {
    "model_type": "a section of keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text",
}
"""What the configuration library calls otherwise."""


def _said(item: Any) -> str:
    """The library's message in a user's words."""
    limits = item.get("ctx", {})
    if item["type"] == "too_short":
        return f"give at least {limits['min_length']}, it has {limits['actual_length']}"
    if item["type"] == "string_pattern_mismatch":
        return f"{item['input']!r} is not of the form {limits['pattern']}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in _KINDS:
        message = f"Input should be {_KINDS[item['type']]}"
    wanted = message.removeprefix("Input ")
    return message if wanted == message else f"{wanted}, got {item['input']!r}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where and what; of something left open, where it began as well."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {str(error).splitlines()[0]}"
    place, opened = error.problem_mark, error.context_mark
    begun = f", in what begins at line {opened.line + 1}, column {opened.column + 1}" if opened else ""
    return f" at line {place.line + 1}, column {place.column + 1}: {error.problem}{begun}"


def load_experiment(path: Path | str, settings: list[str] | None = None) -> Experiment:
    """Read an experiment from a YAML file or by preset name.

    Args:
        path: A YAML file, or the name of a preset such as ``demo``.
        settings: Overrides such as ``align.reg=0.02``.

    Raises:
        TransferError: When the file is missing, is not YAML, or does not validate; all problems at once.
    """
    file = Path(path)
    if len(file.name) > 200:
        raise TransferError(f"No experiment file can have a name of {len(file.name)} characters.")
    if not file.is_file() and (PRESETS / f"{path}.yaml").is_file():
        file = PRESETS / f"{path}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise TransferError(f"No experiment file {path}.", f"Give a YAML file or a preset ({known}).")
    try:
        data = yaml.safe_load(file.read_text("utf8"))
    except yaml.YAMLError as error:
        raise TransferError(f"{path} is not valid YAML{_yaml_problem(error)}.") from None
    except UnicodeDecodeError:
        raise TransferError(f"{path} is not UTF-8 text.") from None
    if not isinstance(data, dict):
        raise TransferError(f"{path} must hold keys and values at its top level.")
    for setting in settings or []:
        key, eq, value = setting.partition("=")
        if not eq:
            raise TransferError(f"--set {setting!r} is not of the form key=value.")
        node = data
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise TransferError(f"--set {key}: {parent} is not a section.")
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise TransferError(f"--set {setting!r}: {value!r} is not valid YAML.", "Quote it.") from None
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise TransferError(f"{path}: {_problems(error)}.") from None
