"""The trigger form of a DAG, made from the parameter schema; nothing about a parameter is written here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow.sdk import Param

from pipeline_tasks import params

REPOSITORY = Path(__file__).resolve().parent.parent


def parameter_file() -> Path | None:
    """`NASLINE_PARAMS`, else the checkout's params.yaml; None where there is none."""
    path = Path(os.environ.get("NASLINE_PARAMS", REPOSITORY / "params.yaml"))
    return path if path.exists() or "NASLINE_PARAMS" in os.environ else None


def trigger_form(without: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> dict[str, Param]:
    """A form field for each parameter whose name begins with one of `only` and with none of `without`.

    A field shows the value that holds when it is left alone: the parameter file's, else the default. The main
    ones stand open, the others in one collapsed section per step.
    """
    values = params.resolve(parameter_file(), {}).to_json()
    fields = sorted(params.form_fields(), key=lambda field: field.section is not None)
    shown = [field for field in fields if field.key.startswith(only) and not field.key.startswith(without)]
    return {field.key: _form_param(field, value_of(values, field.key)) for field in shown}


def _form_param(field: params.FormField, value: Any) -> Param:
    schema = {key: entry for key, entry in field.schema.items() if key not in ("default", "description")}
    if field.section is not None:
        schema["section"] = field.section
    return Param(value, description=field.schema.get("description"), **schema)


def value_of(sections: Mapping[str, Any], key: str) -> Any:
    """The value of `section.field`, which may be a list or a table itself."""
    value: Any = sections
    for part in key.split("."):
        value = value[part]
    return value
