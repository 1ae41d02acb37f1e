"""The rules as Great Expectations suites: run them, keep the statistics and the Data Docs pages.

The only module that imports great_expectations, and only inside its functions: the import takes seconds and,
after Airflow's, prints hundreds of lines unless its logger is set before.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.validation.columns import ROWS_PER_PART
from pipeline_tasks.validation.rules import Rule

EXAMPLES = 10


@dataclass(frozen=True)
class Suite:
    """One table of one role with the rules its rows are judged by."""

    name: str  # for example "target_images"
    table: pa.Table
    rules: tuple[Rule, ...]
    bad_rows: Mapping[str, int]  # by rule name; Great Expectations must find as many
    allowed_fractions: Mapping[str, float]  # by rule name
    needs_rows: bool = True


def run_suites(suites: list[Suite], docs: Path) -> dict[str, dict[str, Any]]:
    """Validate each suite and write Great Expectations' HTML pages below `docs`.

    Returns, by suite name, `success`, `statistics` and the number of unexpected rows by rule. An expectation is
    fulfilled when no larger share of the judged rows breaks it than allowed.
    """
    with _quiet_context(docs) as context:
        return {suite.name: _run(context, suite) for suite in suites}


@contextmanager
def _quiet_context(docs: Path) -> Iterator[Any]:
    """An ephemeral context without analytics, progress bars, log lines and left-over temporary folders."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    logger = logging.getLogger("great_expectations")
    level, temporary_folder = logger.level, tempfile.tempdir
    logger.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="nasline-gx-") as scratch:
        tempfile.tempdir = scratch
        try:
            gx, base = _great_expectations()
            context = gx.get_context(mode="ephemeral")
            context.variables.progress_bars = base.ProgressBarsConfig(globally=False)
            context.delete_data_docs_site("local_site")
            context.add_data_docs_site(site_name="nasline", site_config=_site(docs))
            yield context
            context.build_data_docs(site_names=["nasline"])
        finally:
            tempfile.tempdir = temporary_folder
            logger.setLevel(level)


def _great_expectations() -> tuple[Any, Any]:
    """The package and its module of configuration types, which resets its own logger when imported."""
    import great_expectations
    from great_expectations.data_context.types import base

    logging.getLogger(base.__name__).setLevel(logging.WARNING)
    return great_expectations, base


def _site(docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }


def _run(context: Any, suite: Suite) -> dict[str, Any]:
    import pandas as pd

    gx, _ = _great_expectations()
    expectations = [_expectation(gx.expectations, rule, suite.allowed_fractions[rule.name]) for rule in suite.rules]
    if suite.needs_rows:
        expectations.insert(0, gx.expectations.ExpectTableRowCountToBeBetween(min_value=1))
    frame = pa.table({_column(rule): _judged(rule, suite.table[rule.column]) for rule in suite.rules})
    source = context.data_sources.add_pandas(suite.name)
    batch = source.add_dataframe_asset(suite.name).add_batch_definition_whole_dataframe("all")
    expectation_suite = context.suites.add(gx.ExpectationSuite(name=suite.name, expectations=expectations))
    definition = gx.ValidationDefinition(name=suite.name, data=batch, suite=expectation_suite)
    checkpoint = gx.Checkpoint(
        name=suite.name,
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES},
        actions=[],
    )
    result = context.checkpoints.add(checkpoint).run(
        batch_parameters={"dataframe": frame.to_pandas(types_mapper=lambda kind: _pandas_type(pd, kind))},
        run_id=gx.RunIdentifier(run_name="validate_data"),
    )
    (validation,) = result.run_results.values()
    summary = _summary(suite, validation.to_json_dict())
    context.data_sources.delete(suite.name)  # it would keep the rows as long as the process lives
    if len(suite.table) > ROWS_PER_PART:
        gc.collect()  # what it leaves in reference cycles: 35 bytes a row
    return summary


def _expectation(gxe: Any, rule: Rule, allowed_fraction: float) -> Any:
    shared: dict[str, Any] = {
        "column": _column(rule),
        "mostly": 1 - allowed_fraction,
        "severity": "critical" if rule.severity == "error" else "warning",
        "meta": {"rule": rule.name, "notes": f"{rule.name}: {rule.meaning}."},
    }
    if rule.check == "is_null":
        return gxe.ExpectColumnValuesToBeNull(**shared)
    if rule.check == "is_unique":
        return gxe.ExpectColumnValuesToBeUnique(**shared)
    if rule.check == "is_true":
        return gxe.ExpectColumnValuesToBeInSet(value_set=[True], **shared)
    if rule.check == "at_most":
        return gxe.ExpectColumnValuesToBeBetween(max_value=rule.bound, **shared)
    return gxe.ExpectColumnValuesToBeBetween(min_value=rule.bound, strict_min=True, **shared)


def _judged(rule: Rule, values: pa.ChunkedArray) -> pa.ChunkedArray:
    return values.cast(pa.float64()) if rule.check in ("at_most", "above") else _shown(values)


def _pandas_type(pandas: Any, kind: pa.DataType) -> Any:
    """NumPy's floating point numbers: of any others Great Expectations compares one after the other with a bound."""
    return None if pa.types.is_float64(kind) else pandas.ArrowDtype(kind)


def _shown(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of foreign files without markup and without what cannot be seen: the pages show some as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not pa.types.is_string(values.type):
        return values
    return pc.replace_substring_regex(values, r"[<>&\p{C}\p{Zl}\p{Zp}]", "\N{REPLACEMENT CHARACTER}")


def _column(rule: Rule) -> str:
    """What the pages call the column: the rule and the quantity it judges."""
    return f"{rule.name}: {rule.column}"


def _summary(suite: Suite, validation: dict[str, Any]) -> dict[str, Any]:
    unexpected: dict[str, int] = {}
    for result in validation["results"]:
        failure = result["exception_info"].get("exception_message")
        name = result["expectation_config"]["meta"].get("rule")
        if failure:
            raise RuntimeError(f"Great Expectations could not judge {suite.name}.{name}: {failure}")
        if name is not None:
            unexpected[name] = result["result"]["unexpected_count"]
            masked = suite.bad_rows[name]
            assert masked == unexpected[name], f"{suite.name}.{name}: {masked} masked, {unexpected[name]} unexpected"
    return {
        "success": validation["success"],
        "statistics": validation["statistics"],
        "unexpected_rows": unexpected,
    }
