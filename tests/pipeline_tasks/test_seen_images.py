"""What an engine has seen, and the test images that are left out because of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, write_dataset
from pipeline_tasks.params import resolve
from pipeline_tasks.seen_images import (
    HeldOutImages,
    SeenImages,
    exclusions,
    read_held_out,
    seen_by_bundle,
    seen_by_run,
)

FAR = 0xFFFF_0000_FFFF_0000


def seen(contents: str = "", hashes: tuple[int, ...] = (), hashed: bool = True) -> SeenImages:
    return SeenImages(frozenset(contents.split()), np.array(hashes, np.uint64), hashed)


def write_set(folder: Path, rows: list[tuple[str, str, int | None]]) -> Path:
    """Images given by split, digest and hash."""
    images = [
        {
            "image_id": i, "original_id": str(i), "root": 0, "path": f"images/{digest}.jpg", "width": 8, "height": 8,
            "split": split, "sha256": digest, "perceptual_hash": value, "licence": None,
        }
        for i, (split, digest, value) in enumerate(rows)
    ]  # fmt: skip
    tables = pa.Table.from_pylist(images, schema=IMAGES_SCHEMA), pa.Table.from_pylist([], schema=BOXES_SCHEMA)
    metadata = DatasetMetadata("set", ("cat",), (1,), ("set",), "made up", {}, {"annotations": "MIT", "images": {}}, "")
    write_dataset(folder, *tables, metadata)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> SimpleNamespace:
    """A run with a target set of four images, a pretraining set of one, and nothing unlabelled."""
    target = write_set(
        tmp_path / "target", [("train", "a", 1), ("test", "t0", FAR), ("val", "b", 2), ("test", "t1", 2**64 - 1)]
    )
    pretrain = write_set(tmp_path / "pretrain", [("train", "c", 2**63)])
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled/absent.json").write_text("{}")
    inputs = {"target": target, "pretrain": pretrain, "unlabeled": tmp_path / "unlabeled"}
    return SimpleNamespace(inputs=inputs, parameters=resolve(None, {}), champion=None, run={})


def test_a_run_has_seen_all_but_its_test_split(context: Any) -> None:
    found = seen_by_run(context)
    assert (found.contents, found.hashes.tolist(), found.hashed) == ({"a", "b", "c"}, [1, 2, 2**63], True)
    held_out = read_held_out(context.inputs["target"])
    assert held_out == HeldOutImages(("images/t0.jpg", "images/t1.jpg"), ("t0", "t1"), (FAR, 2**64 - 1))


@pytest.mark.parametrize("option", ["start.from_champion", "teach.source"])
def test_what_starts_from_the_champion_has_seen_what_that_one_has(context: Any, tmp_path: Path, option: str) -> None:
    champion = tmp_path / "champion"
    champion.mkdir()
    (champion / "lineage.json").write_text(json.dumps(seen("old", (77,)).to_json()))
    context.champion = champion
    assert "old" not in seen_by_run(context).contents
    value: object = True if option == "start.from_champion" else "champion"
    context.parameters = resolve(None, {option: value})
    found = seen_by_run(context)
    assert "old" in found.contents and 77 in found.hashes.tolist()


def test_an_image_without_a_hash_makes_the_hashes_incomplete(context: Any, tmp_path: Path) -> None:
    context.inputs["pretrain"] = write_set(tmp_path / "unhashed", [("train", "c", None)])
    found = seen_by_run(context)
    assert (found.contents, found.hashes.tolist(), found.hashed) == ({"a", "b", "c"}, [1, 2], False)


BEGUN_FROM = {"path": "/elsewhere/yolo_nas_s", "digest": "0123456789", "variant": "s"}
BEGUN, TAUGHT = "initial checkpoint yolo_nas_s (01234567)", "extra teacher one (abcdef01)"


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, (BEGUN, TAUGHT)),  # the teacher alone begins from it, and the student learns from the teacher
        ({"start.student_variant": "s", "start.teacher_variant": "m"}, (BEGUN, TAUGHT)),
        ({"start.teacher_variant": "m"}, (TAUGHT,)),
        ({"teach.source": "champion"}, (TAUGHT,)),  # nothing is trained from the initial checkpoint
    ],
)
def test_what_foreign_checkpoints_have_seen_is_unknown_and_said(
    context: Any, options: dict[str, object], unknown: tuple[str, ...]
) -> None:
    assert seen_by_run(context).unknown == ()
    context.parameters = resolve(None, {"start.student_variant": "n", "start.teacher_variant": "s", **options})
    context.run = {
        "parameters": context.parameters.to_json(),
        "initial_checkpoint": BEGUN_FROM,
        "pinned_files": {"teach": {"extra_teachers_1": {"path": "/elsewhere/one", "digest": "abcdef0123"}}},
    }
    assert seen_by_run(context).unknown == unknown


def test_what_is_unknown_of_the_champion_is_unknown_of_what_descends_from_it(context: Any, tmp_path: Path) -> None:
    content = {**seen("old").to_json(), "initial_checkpoint": "0123456789", "extra_teachers": ["abcdef0123"]}
    (tmp_path / "lineage.json").write_text(json.dumps(content))
    assert seen_by_bundle(tmp_path).unknown == ()
    del content["images_unknown_of"]  # an older release wrote it
    (tmp_path / "lineage.json").write_text(json.dumps(content))
    assert seen_by_bundle(tmp_path).unknown == ("initial checkpoint 01234567", "extra teacher abcdef01")
    context.champion, context.parameters = tmp_path, resolve(None, {"start.from_champion": True})
    assert seen_by_run(context).unknown == ("initial checkpoint 01234567", "extra teacher abcdef01")


def test_lineage_and_back(tmp_path: Path) -> None:
    known = replace(seen("a b", (0, 2**64 - 1)), unknown=(BEGUN,))
    (tmp_path / "lineage.json").write_text(json.dumps(known.to_json()))
    found = seen_by_bundle(tmp_path)
    assert (found.contents, found.hashes.tolist(), found.hashed) == (known.contents, known.hashes.tolist(), True)
    assert found.unknown == (BEGUN,)


@pytest.mark.parametrize(
    "lineage",
    [
        {"seen_images": ["a"]},  # of a release that knew no hashes
        {"seen_images": ["a"], "perceptual_hash_kind": "another way", "seen_perceptual_hashes": ["00"]},
        {"seen_images": ["a"], "perceptual_hash_kind": None, "seen_perceptual_hashes": ["00"]},  # not of every image
    ],
)
def test_hashes_of_another_kind_are_not_compared(tmp_path: Path, lineage: dict[str, Any]) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    found = seen_by_bundle(tmp_path)
    assert (found.contents, len(found.hashes), found.hashed) == ({"a"}, 0, False)


def test_images_are_left_out_by_content_and_by_nearness_and_named() -> None:
    images = HeldOutImages(("p0", "p1", "p2", "p3", "p4"), ("a", "b", "c", None, "e"), (5, 0b111, FAR, FAR, None))
    known = {"v1": seen("a x"), "the candidate": seen("a", (0,))}
    found = exclusions(images, known, near_bits=3)
    assert [asdict(one) for one in found.values()] == [
        {"image": "p0", "seen_by": "v1", "recognised_by": "content", "bits": None},
        {"image": "p1", "seen_by": "the candidate", "recognised_by": "perceptual hash", "bits": 3},
    ]
    assert list(found) == [0, 1]
    assert list(exclusions(images, known, near_bits=2)) == [0]
    assert list(exclusions(images, {"none": seen()}, near_bits=16)) == []
