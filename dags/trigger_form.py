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


def trigger_form(without: tuple[str, ...] = ()) -> dict[str, Param]:
    """A form field for each parameter whose name does not begin with one of `without`.

    A field shows the value that holds when it is left alone: the parameter file's, else the default. The main
    ones stand open, the others in one collapsed section per step.
    """
    values = flat_values(params.resolve(parameter_file(), {}).to_json())
    fields = sorted(params.form_fields(), key=lambda field: field.section is not None)
    return {field.key: _form_param(field, values[field.key]) for field in fields if not field.key.startswith(without)}


def _form_param(field: params.FormField, value: Any) -> Param:
    schema = {key: entry for key, entry in field.schema.items() if key not in ("default", "description")}
    if field.section is not None:
        schema["section"] = field.section
    return Param(value, description=field.schema.get("description"), **schema)


def flat_values(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        if isinstance(value, dict):
            flat.update(flat_values(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
