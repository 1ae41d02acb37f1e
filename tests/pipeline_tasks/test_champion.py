"""Candidate against champion on made-up detections: which images count, which classes, and who is carried along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.data.image_set import ImageSet
from model.detections import Detections
from pipeline_tasks import champion, gate
from pipeline_tasks.champion import BEST_OF_LINE, Comparison, carry_best_of_line, compare, of_images
from pipeline_tasks.params import resolve
from pipeline_tasks.seen_images import HeldOutImages, SeenImages
from pipeline_tasks.tracking.registry import ITSELF

IMAGES = 24
CLASSES = ("cat", "dog", "eel")
SET = ImageSet.from_arrays(
    CLASSES, [f"t/{i}" for i in range(IMAGES)], [(100, 100)] * IMAGES, np.repeat(np.arange(IMAGES), 2),
    [(10.0 + 30 * (i % 2), 10, 20, 20) for i in range(2 * IMAGES)], [i % 2 for i in range(2 * IMAGES)],
)  # fmt: skip
"""A cat and a dog in every image, and no eel."""
HELD_OUT = HeldOutImages(
    tuple(f"{i}.jpg" for i in range(IMAGES)), tuple(f"c{i}" for i in range(IMAGES)),
    tuple(0xFFFF << 2 * i for i in range(IMAGES)),
)  # fmt: skip


def seen(*contents: str, hashes: Sequence[int] = ()) -> SeenImages:
    return SeenImages(frozenset(contents), np.array(hashes, np.uint64), True)


def found(first_image: int = 0, labels: Sequence[int] = (0, 1)) -> Detections:
    """Everything right from one image on, nothing before; `labels` are what cat and dog are called."""
    truth = SET.all_boxes().select(SET.all_boxes().image_index >= first_image)
    scores = np.ones(len(truth.labels), np.float32)
    return Detections(
        truth.image_index, truth.boxes_xyxy.astype(np.float32), scores, np.array(labels, np.int64)[truth.labels]
    )


def write_bundle(folder: Path, class_names: Sequence[str], known: SeenImages | None = None, **lineage: Any) -> Path:
    (folder / "engine").mkdir(parents=True)
    (folder / "engine/engine.json").write_text(json.dumps({"class_names": list(class_names)}))
    (folder / "engine/model.onnx").write_bytes(b"onnx")
    (folder / "lineage.json").write_text(json.dumps({**(known or seen()).to_json(), **lineage}))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The champion, which has seen the first image."""
    return write_bundle(tmp_path / "champion", CLASSES, seen("c0"))


@pytest.fixture
def detected(monkeypatch: pytest.MonkeyPatch) -> dict[str, Detections]:
    """What the engine of a bundle finds, by the bundle's name; a test fills it."""
    by_name: dict[str, Detections] = {}

    def detect(_: Any, folder: str, images: ImageSet, __: Any) -> Detections:
        rows = np.array([int(images.path(i).removeprefix("t/")) for i in range(len(images))], np.int64)
        return of_images(by_name[folder], rows)

    monkeypatch.setattr(gate, "build_engine", lambda file, folder, given: file.parent.parent.name)
    monkeypatch.setattr(gate, "detect_with", detect)
    monkeypatch.setattr(gate, "read_preprocessing", lambda folder: None)
    return by_name


def context(bundle: Path, **options: Any) -> Any:
    given = resolve(None, {f"gate.{name}": value for name, value in options.items()})
    run = {"champion": {"name": "yolo", "version": "7"}}
    return SimpleNamespace(parameters=given, champion=bundle, run=run, state=bundle.parent / "state")


def compared(bundle: Path, candidate: Detections, own: SeenImages | None = None, **options: Any) -> Comparison:
    both = compare(context(bundle, **options), candidate, SET, HELD_OUT, own or seen())
    assert both is not None
    return both.champion


def test_images_that_either_has_seen_are_left_out_and_named(bundle: Path, detected: dict[str, Detections]) -> None:
    detected["champion"] = found()
    result = compared(bundle, found(first_image=20), seen(hashes=[0xFFFF << 46 ^ 0b1111]))
    assert [(one.image, one.seen_by, one.bits) for one in result.excluded] == [
        ("0.jpg", "yolo v7", None), ("22.jpg", "the candidate", 8), ("23.jpg", "the candidate", 4)
    ]  # fmt: skip
    assert (result.images, result.hashed) == (21, True)
    assert result.champion_map50_95 == pytest.approx(1.0) and result.candidate_map50_95 == pytest.approx(0.1, abs=0.02)
    assert result.share_of_resamples_worse == 1.0
    assert result.interval_points and result.interval_points[1] < -60
    told = json.loads(json.dumps(result.to_json()))
    assert told["excluded_images"] == 3 and told["excluded"][0]["image"] == "0.jpg"
    assert [one.image for one in compared(bundle, found(), near_duplicate_bits=0).excluded] == ["0.jpg"]


def test_classes_meet_by_name(tmp_path: Path, detected: dict[str, Detections]) -> None:
    other = write_bundle(tmp_path / "other", ("dog", "cow", "cat"))
    detected["other"] = found(labels=(2, 0))  # the same boxes, by its own numbers
    result = compared(other, found())
    assert (result.shared_classes, result.removed_classes) == (("cat", "dog"), ("cow",))
    assert result.champion_map50_95 == result.candidate_map50_95 == pytest.approx(1.0)
    assert result.added_classes == {"eel": None}  # the test split has no box of it


def test_images_without_a_box_show_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that finds nothing would pass: a seventh of the resamples holds neither of the two pictures."""
    boxes = [(10.0, 10.0, 20.0, 20.0)] * 2
    sparse = ImageSet.from_arrays(("cat",), HELD_OUT.paths, [(100, 100)] * IMAGES, [3, 7], boxes, [0, 0])
    truth = sparse.all_boxes()
    everything = Detections(
        truth.image_index, truth.boxes_xyxy.astype(np.float32), np.ones(2, np.float32), truth.labels
    )
    monkeypatch.setattr(champion, "_champion_detections", lambda *_: everything)
    given = context(write_bundle(tmp_path / "champion", ("cat",)))
    both = compare(given, everything.select(np.zeros(2, bool)), sparse, HELD_OUT, seen())
    assert both and both.champion.difference_points == -100.0
    assert (both.champion.images, both.champion.images_with_boxes) == (IMAGES, 2)
    assert [
        (rule.parameter, rule.measured) for rule in champion.rules(both, given.parameters.gate) if not rule.passed
    ] == [("minimum_comparison_images", 2)]
    assert both.champion.how().startswith("24 clean test images, 2 with boxes, 0 excluded")


def test_an_added_class_is_measured_where_the_candidate_has_not_learned(
    tmp_path: Path, detected: dict[str, Detections]
) -> None:
    detected["other"] = found()
    other = write_bundle(tmp_path / "other", ("cat", "eel"), seen(*(f"c{i}" for i in range(20))))
    result = compared(other, found(first_image=12), seen(*(f"c{i}" for i in range(12, 18))))
    assert result.images == 4  # the other engine has seen twenty
    assert result.added_classes == {"dog": pytest.approx(6 / 18, abs=0.02)}


def test_nothing_clean_or_nothing_in_common_gives_no_numbers(tmp_path: Path, detected: dict[str, Detections]) -> None:
    stranger = write_bundle(tmp_path / "stranger", ("cow",))
    result = compared(stranger, found())
    assert (result.shared_classes, result.difference_points, result.images) == ((), None, IMAGES)
    saw_all = write_bundle(tmp_path / "saw_all", CLASSES, seen(*(f"c{i}" for i in range(IMAGES))))
    result = compared(saw_all, found())
    assert (result.images, result.difference_points, result.interval_points) == (0, None, None)
    eels_only = write_bundle(tmp_path / "eels_only", ("eel",))
    result = compared(eels_only, found())
    assert (result.shared_classes, result.images, result.difference_points) == (("eel",), IMAGES, None)


def test_a_champion_without_hashes_is_compared_by_content_and_says_so(
    tmp_path: Path, detected: dict[str, Detections]
) -> None:
    old = write_bundle(tmp_path / "old", CLASSES)
    (old / "lineage.json").write_text(json.dumps({"seen_images": ["c3"]}))
    detected["old"] = found()
    result = compared(old, found())
    assert ([one.image for one in result.excluded], result.hashed) == (["3.jpg"], False)
    assert "copies were looked for by content only" in result.how()


def test_checkpoints_whose_images_nobody_knows_are_named(tmp_path: Path, detected: dict[str, Detections]) -> None:
    detected["old"] = found()
    old = write_bundle(tmp_path / "old", CLASSES, replace(seen(), unknown=("initial checkpoint a (01234567)",)))
    result = compared(old, found(), replace(seen(), unknown=("extra teacher b (89abcdef)",)))
    names = ("initial checkpoint a (01234567) of yolo v7", "extra teacher b (89abcdef) of the candidate")
    assert result.images_unknown_of == names
    assert result.how().endswith(f"; images seen by {names[0]}, {names[1]} are unknown")
    assert json.loads(json.dumps(result.to_json()))["images_unknown_of"] == list(names)
    known = compared(write_bundle(tmp_path / "known/old", CLASSES), found())
    assert "unknown" not in known.how()


def test_without_champion_or_margin_nothing_is_compared(bundle: Path) -> None:
    assert compare(context(bundle, champion_margin=None), found(), SET, HELD_OUT, seen()) is None
    alone = context(bundle)
    alone.champion = None
    assert compare(alone, found(), SET, HELD_OUT, seen()) is None


def test_the_best_of_the_line_is_measured_beside_the_champion(bundle: Path, detected: dict[str, Detections]) -> None:
    write_bundle(bundle / BEST_OF_LINE, CLASSES, seen("c1", "c2"), version="yolo v3")
    detected["champion"], detected[BEST_OF_LINE] = found(first_image=6), found()
    both = compare(context(bundle), found(first_image=6), SET, HELD_OUT, seen())
    assert both and both.best_of_line
    assert both.champion.difference_points == 0.0
    assert both.best_of_line.champion == "yolo v3, the best ancestor of yolo v7"
    assert [one.image for one in both.best_of_line.excluded] == ["1.jpg", "2.jpg"]
    assert both.best_of_line.difference_points and both.best_of_line.difference_points < -15


@pytest.mark.parametrize(
    ("champions_best", "to_champion", "to_best", "carried"),
    [
        (None, 0.5, None, ITSELF),  # better than the champion, which was the best
        (None, 0.0, None, ITSELF),
        (None, -0.3, None, "yolo v7"),
        (None, None, None, "yolo v7"),  # nothing was measured
        ("yolo v3", 0.5, -0.2, "yolo v3"),  # better than the champion, but not than the best
        ("yolo v3", 0.5, 0.2, ITSELF),
        ("yolo v3", 0.5, None, "yolo v3"),
    ],
)
def test_who_is_the_one_to_beat_next(
    bundle: Path, champions_best: str | None, to_champion: float | None, to_best: float | None, carried: str
) -> None:
    if champions_best:
        write_bundle(bundle / BEST_OF_LINE, ("best",), seen("old"), version=champions_best)
    verdict = {
        "champion_comparison": measured(to_champion, images=10),
        "best_of_line_comparison": measured(to_best, images=10),
    }
    registered = bundle.parent / "registered"
    registered.mkdir()
    assert carry_best_of_line(context(bundle), verdict, registered) == carried
    assert (registered / BEST_OF_LINE).is_dir() == (carried != ITSELF)
    if carried != ITSELF:
        assert json.loads((registered / BEST_OF_LINE / "lineage.json").read_text())["version"] == carried
        kept = json.loads((registered / BEST_OF_LINE / "engine/engine.json").read_text())["class_names"]
        assert kept == (["best"] if champions_best else list(CLASSES))


def measured(points: float | None, images: int) -> dict[str, Any] | None:
    """What the verdict holds of a comparison; nothing where the gate made none."""
    return None if points is None else {"difference_points": points, "images_with_boxes": images}


def test_an_ancestor_is_not_surpassed_on_a_handful_of_images(bundle: Path) -> None:
    write_bundle(bundle / BEST_OF_LINE, ("best",), seen("old"), version="yolo v3")
    verdict = {"champion_comparison": measured(0.5, images=10), "best_of_line_comparison": measured(9.0, images=9)}
    assert carry_best_of_line(context(bundle), verdict, bundle.parent / "registered") == "yolo v3"


def test_the_first_of_a_line_is_its_best(tmp_path: Path) -> None:
    alone = context(tmp_path / "none")
    alone.champion = None
    assert carry_best_of_line(alone, {}, tmp_path) == ITSELF
    assert champion.BEST_OF_LINE not in [path.name for path in tmp_path.iterdir()]


def test_chosen_images_bring_their_detections() -> None:
    made = Detections(
        np.array([0, 0, 2, 1]), np.arange(16, dtype=np.float32).reshape(4, 4),
        np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32), np.array([0, 1, 2, 3]),
    )  # fmt: skip
    picked = of_images(made, np.array([2, 0, 0]))
    assert picked.image_index.tolist() == [0, 1, 1, 2, 2]
    assert picked.labels.tolist() == [2, 0, 1, 0, 1]
    assert of_images(made, np.array([], dtype=np.int64)).labels.tolist() == []
