"""Distances between datasets, on worked examples and on samples of known distributions."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.data import mapped_tables, tables
from model.data.tables import box_batches, write_dataset
from pipeline_tasks import register
from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.dataset_statistics import (
    BINS_PER_OCTAVE,
    BOX_COLUMNS,
    DatasetStatistics,
    class_distance,
    from_json,
    median_side,
    size_distance,
    statistics_of,
)
from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation.datasets import judge_set
from pipeline_tasks.validation.published import publishable


def statistics(images: int = 100, box_sides: dict[int, int] | None = None, **classes: int) -> DatasetStatistics:
    return DatasetStatistics(images, classes, box_sides or {}, {})


def test_class_distance_is_the_share_of_boxes_that_change_class() -> None:
    before, after = statistics(cat=50, dog=50), statistics(images=400, cat=80, dog=10, hen=10)
    found = class_distance(before, after)
    assert found.value == pytest.approx(0.4)  # dogs go from 50 to 10 of 100
    pooled = np.array([0.65, 0.3, 0.05])
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / 100 + 1 / 400))
    assert found.by_chance == pytest.approx(float((deviation * math.sqrt(2 / math.pi)).sum() / 2))
    assert class_distance(before, statistics(cat=7, dog=7)).value == 0


def test_size_distance_is_the_population_stability_index() -> None:
    before, after = {0: 60, 4: 40}, {0: 20, 4: 80}
    p, q = (60.5 / 101, 40.5 / 101), (20.5 / 101, 80.5 / 101)
    expected = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = size_distance(before, after, (statistics(100), statistics(50)))
    assert found.value == pytest.approx(expected) and found.by_chance == pytest.approx(1 / 100 + 1 / 50)
    other = size_distance({8: 100}, {3: 100}, (statistics(), statistics()))  # all of one size, then all of another
    assert other.value > 5
    assert size_distance({}, {3: 1}, (statistics(), statistics())).value == 0


@pytest.mark.parametrize("images", [60, 600])
def test_samples_of_one_distribution_are_near_chance_and_others_are_not(images: int) -> None:
    generator = np.random.default_rng(0)

    def sample(shift: float = 0.0) -> DatasetStatistics:
        """One box a picture, so that boxes are draws as the formulas take them."""
        shares = np.array([0.6 - shift, 0.3, 0.1 + shift])
        classes = dict(zip("abc", generator.multinomial(images, shares).tolist(), strict=True))
        bins = np.floor(generator.normal(-12 + 12 * shift, 3, images)).astype(int)
        values, counts = np.unique(bins, return_counts=True)
        return statistics(images, dict(zip(values.tolist(), counts.tolist(), strict=True)), **classes)

    equal = [(sample(), sample()) for _ in range(200)]
    distances = [class_distance(*pair) for pair in equal]
    assert np.mean([d.value for d in distances]) == pytest.approx(np.mean([d.by_chance for d in distances]), rel=0.1)
    sizes = [size_distance(a.box_sides, b.box_sides, (a, b)) for a, b in equal]
    assert np.mean([d.value for d in sizes]) == pytest.approx(np.mean([d.by_chance for d in sizes]), rel=0.25)
    assert np.mean([d.beyond(0.1) for d in distances]) < 0.1 and np.mean([d.beyond(0.25) for d in sizes]) < 0.1
    shifted = [(sample(), sample(0.4)) for _ in range(100)]
    assert np.mean([class_distance(*pair).beyond(0.1) for pair in shifted]) > 0.9
    assert np.mean([size_distance(a.box_sides, b.box_sides, (a, b)).beyond(0.25) for a, b in shifted]) > 0.9


def test_statistics_are_of_training_boxes_without_crowds() -> None:
    images = pa.table(
        {"image_id": [0, 2, 5], "split": ["train", "test", "train"], "width": [64, 64, 128], "height": [64, 64, 32]}
    )
    boxes = pa.table(
        {
            "image_id": [0, 2, 5, 5],
            "category": [1, 1, 0, 1],
            "w": [16.0, 9.0, 32.0, 8.0],
            "h": [16.0, 9.0, 32.0, 8.0],
            "iscrowd": [False, False, False, True],
        }
    )
    found = statistics_of(images, boxes.to_batches(), ("cat", "dog", "hen"))
    assert found.class_boxes == {"cat": 1, "dog": 1, "hen": 0} and found.images == 2
    assert found.box_sides == {-8: 1, -4: 1}  # a quarter and a half of 64 pixels
    assert found.image_sides == {24: 2} and median_side(found.image_sides) == pytest.approx(64 * 2**0.125)
    assert from_json(found.to_json()) == found
    assert from_json(None) is None and from_json({**found.to_json(), "schema_version": 9}) is None


def test_batches_of_any_length_give_the_statistics_of_the_whole_table() -> None:
    generator = np.random.default_rng(0)
    ids = np.sort(generator.permutation(400)[:300])
    splits = generator.choice(["train", "val", "test"], 300, p=[0.7, 0.2, 0.1])
    sides = generator.integers(32, 2000, (2, 300))
    images = pa.table({"image_id": ids, "split": splits, "width": sides[0], "height": sides[1]})
    rows = generator.integers(0, 300, 5000)  # in no order
    w, h = generator.lognormal(3, 1, (2, 5000))
    category, crowd = generator.integers(0, 4, 5000), generator.random(5000) < 0.1
    boxes = pa.table({"image_id": ids[rows], "category": category, "w": w, "h": h, "iscrowd": crowd})
    counted = (splits[rows] == "train") & ~crowd
    shares = np.sqrt(w * h / (sides[0] * sides[1])[rows])[counted]
    bins, counts = np.unique(np.floor(np.log2(shares) * BINS_PER_OCTAVE).astype(int), return_counts=True)
    for length in (1, 7, 999, 5000):
        found = statistics_of(images, boxes.to_batches(max_chunksize=length), tuple("abcd"))
        assert list(found.class_boxes.values()) == np.bincount(category[counted], minlength=4).tolist()
        assert list(found.box_sides.items()) == list(zip(bins.tolist(), counts.tolist(), strict=True))
    assert statistics_of(images, [], tuple("abcd")).box_sides == {}
    assert statistics_of(images.slice(0, 0), boxes.to_batches(), tuple("abcd")).class_boxes["a"] == 0


def test_register_never_holds_the_whole_table_of_boxes(
    coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_tables, "FROM_BOXES", 1)
    monkeypatch.setattr(mapped_tables, "ROWS_PER_BATCH", 4)
    raw = read_folder(coco_folder.path, "target", ("train", "val", "test"))
    published = publishable(judge_set("target", raw, coco_folder.path, ValidationLimits()))
    write_dataset(tmp_path / "set", published.images, published.boxes, published.metadata)
    batches = [batch.num_rows for batch in box_batches(tmp_path / "set", BOX_COLUMNS)]
    assert max(batches) == 4 and sum(batches) == len(published.boxes)
    whole = statistics_of(published.images, published.boxes.to_batches(), published.metadata.class_names).to_json()
    read = tables._read_table
    monkeypatch.setattr(tables, "_read_table", lambda path, schema: pytest.fail(f"{path} was read whole"))
    assert register._statistics(tmp_path / "set") == whole
    monkeypatch.setattr(tables, "_read_table", read)
    shutil.rmtree(tmp_path / "set/mapped")
    assert register._statistics(tmp_path / "set") == whole
    (tmp_path / "set/boxes.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"boxes\.parquet cannot be read as Parquet"):
        list(box_batches(tmp_path / "set", BOX_COLUMNS))


def test_halves_of_a_real_set_do_not_drift(shared: Path) -> None:
    folder = shared / "data" / "bccd"
    published = publishable(judge_set("target", read_folder(folder, "target"), folder, ValidationLimits()))
    names, train = published.metadata.class_names, published.images
    order = np.random.default_rng(1).permutation(len(train))

    def part(rows: Any) -> DatasetStatistics:
        return statistics_of(train.take(rows), published.boxes.to_batches(), names)

    one, two = part(order[::2]), part(order[1::2])
    assert not class_distance(one, two).beyond(0.1)
    for before, after in ((one.box_sides, two.box_sides), (one.image_sides, two.image_sides)):
        assert not size_distance(before, after, (one, two)).beyond(0.25)
