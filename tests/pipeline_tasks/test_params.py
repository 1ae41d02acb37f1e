"""Parameters: the schema is the only home of names, limits and defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.keys import key_fields
from pipeline_tasks.parameter_file import parameter_file
from pipeline_tasks.params import Parameters, form_fields, of_run, resolve
from pipeline_tasks.steps import STEP_NAMES


def test_sections_are_the_steps_in_order() -> None:
    assert tuple(Parameters().to_json()) == STEP_NAMES


def test_shipped_parameter_file_is_what_the_schema_says(repository: Path) -> None:
    assert (repository / "params.yaml").read_text(encoding="utf-8") == parameter_file()
    assert resolve(repository / "params.yaml", {}) == Parameters()


def test_demo_parameter_file_is_valid(repository: Path) -> None:
    resolve(repository / "params.demo.yaml", {})


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("distill: {epochs: 7, batch_size: 4}\n")
    parameters = resolve(path, {"distill.epochs": 9, "quantize.training.epochs": 2})
    assert (parameters.distill.epochs, parameters.distill.batch_size) == (9, 4)
    assert parameters.quantize.training.epochs == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distill.epoch": 3}, ["distill.epoch", "did you mean distill.epochs"]),
        ({"gate.maximum_latency_ms": -1}, ["gate.maximum_latency_ms", "greater than 0", "-1"]),
        ({"pretrain.budget_minutes": -5}, ["pretrain.budget_minutes", "greater than 0", "-5"]),
        ({"start.image_size": 100}, ["start.image_size", "multiple of 32", "100"]),
        ({"start.student_variant": "xl"}, ["start.student_variant", "'pico'", '"xl"']),
        ({"nonsense.epochs": 3}, ["nonsense is no known parameter"]),
        (
            {"gate.require_image_licence": []},
            ["option: gate.require_image_licence must name", "got []; null accepts all"],
        ),
        ({"gate.require_weights_licence": ["MIT", " "]}, ["gate.require_weights_licence must name", "['MIT', ' ']"]),
        ({"gate.runtime": "onnxruntime"}, ["option: gate.runtime must be openvino: ONNX Runtime computes", "in float"]),
    ],
)
def test_wrong_values_are_named_with_their_remedy(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ParameterError) as caught:
        resolve(None, options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_an_older_release_froze_is_refused_in_one_sentence() -> None:
    frozen = {"run": "old", "parameters": {"gate": {"runtime": "onnxruntime"}}}
    with pytest.raises(
        ParameterError, match=r"^run\.json of run old: gate\.runtime must be openvino: ONNX Runtime.*; start another"
    ):
        of_run(frozen)
    assert of_run({"run": "new", "parameters": Parameters().to_json()}) == Parameters()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.yaml does not exist"):
        resolve(tmp_path / "missing.yaml", {})
    broken = tmp_path / "broken.yaml"
    broken.write_text("distill: [1,\n")
    with pytest.raises(DataError, match=r"broken\.yaml is not valid YAML.*line 2"):
        resolve(broken, {})
    broken.write_text("- 1\n")
    with pytest.raises(DataError, match="one section per step, found list"):
        resolve(broken, {})


def test_every_field_says_what_it_means_and_has_a_type() -> None:
    for field in form_fields():
        assert len(field.schema["description"]) > 15, field.key
        assert "type" in field.schema or "enum" in field.schema, field.key
        assert "default" in field.schema, field.key


def test_form_defaults_are_the_schema_defaults() -> None:
    options = {field.key: field.schema["default"] for field in form_fields()}
    assert resolve(None, options) == Parameters()


def test_main_fields_stand_open_in_the_form() -> None:
    opened = {field.key for field in form_fields() if field.section is None}
    assert {"start.dataset", "start.student_variant", "start.image_size", "distill.epochs"} <= opened
    assert len(opened) < 15


def test_place_and_speed_are_no_part_of_a_key() -> None:
    fields = key_fields(Parameters().start)
    assert "image_size" in fields and "seed" in fields
    assert not {"dataset", "device", "threads", "loader_workers", "cache_megabytes", "model_name"} & set(fields)
    assert "checkpoint_every_steps" not in key_fields(Parameters().quantize)["training"]


def test_parameter_file_is_yaml_with_the_defaults() -> None:
    assert yaml.safe_load(parameter_file()) == Parameters().to_json()
