"""What every section of the parameters is made of; nothing heavier than pydantic is imported."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def parameter(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    main: bool = False,
    in_key: bool = True,
    **limits: Any,
) -> Any:
    """A field of a section.

    `main` puts it in the open part of the trigger form. `in_key=False` marks what cannot change a step's result
    (how fast or where it is computed), so that changing it does not make finished work be done again.
    """
    extra: dict[str, Any] = {"unit": unit, "main": main, "in_key": in_key}
    description = f"{meaning} [{unit}]" if unit else meaning
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
