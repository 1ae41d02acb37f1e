"""params.yaml as text: every parameter with its default, meaning, unit and limits, made from the schema."""

from __future__ import annotations

import json
from typing import Any

from pipeline_tasks.params import FormField, form_fields

LIMITS = {
    "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "multipleOf": "multiple of",
}  # fmt: skip
COMMENT_COLUMN = 46


def parameter_file() -> str:
    """The shipped params.yaml."""
    lines = ["# Parameters of a run; every step has its section. Made by `nasline params`: what is left out has the"]
    lines.append("# value below. Override one for one run: nasline start --distill.epochs 20")
    open_sections: list[str] = []
    for field in form_fields():
        *sections, name = field.key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[depth : depth + 1] != [section]:
                open_sections = [*open_sections[:depth], section]
                lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        lines.append(_line(field, name, len(sections)))
    return "\n".join(lines) + "\n"


def _line(field: FormField, name: str, depth: int) -> str:
    entry = f"{'  ' * depth}{name}: {_value(field.schema.get('default'))}"
    return f"{entry:<{COMMENT_COLUMN}}  # {field.schema['description']}{_limits(field.schema)}"


def _value(default: Any) -> str:
    """JSON, which is YAML too, but for small numbers: YAML 1.1 reads 2e-05 as text and 2.0e-05 as a number."""
    text = json.dumps(default, ensure_ascii=False)
    return text.replace("e", ".0e", 1) if isinstance(default, float) and "e" in text and "." not in text else text


def _limits(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f" ({' | '.join(schema['enum'])})"
    limits = [f"{sign} {schema[name]}" for name, sign in LIMITS.items() if name in schema]
    return f" ({', '.join(limits)})" if limits else ""
