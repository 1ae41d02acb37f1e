"""What a registered version says of its origin, and what MLflow's model takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tracked_runs import LINEAGE

from pipeline_tasks import lineage_tags
from pipeline_tasks.tracking import engine_model, model_signature


def test_licences_of_weights_annotations_and_images_stay_apart() -> None:
    datasets = {"target": {"digest": "abc.dir"}, "pretrain": None}
    assert lineage_tags.tags({"lineage": LINEAGE}, datasets) == {
        "nasline.dataset.target": "abc.dir",
        "nasline.licence.weights": "random initialisation",
        "nasline.licence.annotations": "CC0-1.0",
        "nasline.licence.images": "79 CC BY 4.0, 3 unknown (target 1234abcd)",
    }
    assert set(lineage_tags.licences({}).values()) == {"not told"}


def test_a_picture_in_a_request_is_decoded_and_a_file_name_is_left() -> None:
    (example,) = model_signature.input_example()
    picture = engine_model._picture(example)
    assert picture.shape == (32, 32, 3) and np.unique(picture).tolist() == [114]
    assert engine_model._picture("street.jpg") == "street.jpg"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("data:image/png,abc", "must begin with data:image/...;base64, got 'data:image/png'"),
        ("data:image/png;base64,???", "is no base64"),
        ("data:image/png;base64,AAAA", "image in the request cannot be decoded"),
    ],
)
def test_a_broken_picture_is_told(given: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        engine_model._picture(given)
    assert sentence in str(refused.value)


def test_the_signature_has_the_engines_own_thresholds(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text(json.dumps({"score_threshold": 0.3, "iou_threshold": 0.65}))
    signature = model_signature.signature(tmp_path)
    params = {param.name: param.default for param in signature.params}
    assert params == {"score_threshold": 0.3, "iou_threshold": 0.65, "max_detections": 300}
    assert [column.name for column in signature.outputs] == ["image", "width", "height", "detections"]
