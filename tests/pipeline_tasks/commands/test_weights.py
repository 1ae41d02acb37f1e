"""`nasline import-weights` and `export-weights`: what lands on disk, what the gate sees of it, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import model
from model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from model.preprocessing import Preprocessing
from model.reference_file import read_reference_file
from model.reference_weights import LICENCE, reference_state
from pipeline_tasks.commands import import_weights as command
from pipeline_tasks.commands.export_weights import export_weights
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.gate_parameters import GateParameters
from pipeline_tasks.gate_rules import _licences

Nasline = Callable[..., str]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """N with two classes in the reference's names."""
    torch.manual_seed(0)
    return reference_state(model.build("n", 2))


@pytest.fixture
def file(state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save({"net": state, "epoch": 7}, tmp_path / "reference.pth")
    return tmp_path / "reference.pth"


def import_weights(
    file: Path, names: str | None = "cat, dog", variant: str = "n", out: str = "imported"
) -> CheckpointMetadata:
    return command.import_weights(file, variant, file.parent / out, names)


def beside(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


def test_there_and_back(nasline: Nasline, file: Path, state: dict[str, Tensor]) -> None:
    (file.parent / "names.txt").write_text("cat\ndog\n\n")
    options = ("--variant", "n", "--out", "imported", "--class-names", "names.txt")
    told = nasline("import-weights", file, *options, code=0)
    assert "net of" in told and LICENCE in told
    _, metadata = load_checkpoint(file.parent / "imported")
    assert (metadata.variant, metadata.class_names, metadata.step) == ("n", ("cat", "dog"), 0)
    assert (metadata.preprocessing.input_size, metadata.preprocessing.margin) == (640, 4)
    assert list(metadata.parents) == ["reference_file"]
    check_lineage(metadata.lineage)
    nasline("export-weights", "imported", "--out", "back.pth", code=0)
    back = read_reference_file(file.parent / "back.pth")
    assert back.class_names == ("cat", "dog")
    assert set(back.state) == set(state)
    assert all(torch.equal(back.state[key], state[key]) for key in state)
    import_weights(file.parent / "back.pth", None, out="again")
    first, second = (file.parent / name / "model.safetensors" for name in ("imported", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert beside(file) == ["again", "back.pth", "imported", "names.txt", "reference.pth"]


def check_lineage(lineage: dict[str, Any]) -> None:
    """The gate sees a licence that has to be accepted by name, and pictures of which nothing is known."""
    assert lineage["weights"] == [LICENCE] and "non-commercial" in LICENCE
    assert lineage["annotations"] == ["unknown"]
    assert [set(counts) for counts in lineage["images"].values()] == [{"unknown"}]
    assert not licence_accepted(lineage, "random initialisation")
    assert licence_accepted(lineage, LICENCE)


def licence_accepted(lineage: dict[str, Any], licence: str) -> bool:
    found: Any = SimpleNamespace(licences={"weights": set(lineage["weights"])})
    (rule,) = _licences(found, GateParameters(require_weights_licence=[licence]))
    return bool(rule.passed)


def test_a_refusal_is_one_sentence_and_leaves_nothing(nasline: Nasline, file: Path) -> None:
    sentence = nasline("import-weights", file, "--variant", "s", "--out", "imported", code=65)
    assert "does not hold the weights of a YOLO-NAS s" in sentence and "it fits --variant n" in sentence
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "reference.pth" in nasline("import-weights", file, "--variant", "n", "--out", "imported", code=65)
    nasline("import-weights", file, "--variant", "pico", "--out", "imported", code=2)
    assert beside(file) == ["reference.pth"]


def test_eighty_classes_are_cocos(tmp_path: Path) -> None:
    torch.save(reference_state(model.build("n", 80)), tmp_path / "coco.pth")
    assert import_weights(tmp_path / "coco.pth", None).class_names[:2] == ("person", "bicycle")


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (None, ParameterError, "has 2 classes and does not name them; give --class-names"),
        ("a,b,c", DataError, "has 2 classes, but --class-names gives 3;"),
        ("a,a", DataError, "^--class-names names a more than once; give --class-names with different names$"),
    ],
)
def test_class_names_that_do_not_fit(names: str, kind: type[Exception], message: str, file: Path) -> None:
    with pytest.raises(kind, match=message):
        import_weights(file, names)
    assert beside(file) == ["reference.pth"]


def test_repeated_names_in_the_file_are_told_with_the_remedy(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({"net": state, "processing_params": {"class_names": ["a", "a"]}}, file)
    with pytest.raises(DataError, match=r"reference\.pth names a more than once; give --class-names with different"):
        import_weights(file, None)
    assert beside(file) == ["reference.pth"]
    assert import_weights(file).class_names == ("cat", "dog")


def test_every_faulty_tensor_is_listed(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(command.log, "warning", lambda _, line: lines.append(line))
    faulty = {key: value for key, value in state.items() if not key.endswith("alpha")}
    torch.save({"net": {**faulty, "heads.extra": torch.ones(1)}}, tmp_path / "faulty.pth")
    with pytest.raises(DataError, match=r"YOLO-NAS n: 19 missing, 1 unexpected tensors .* it fits no variant"):
        import_weights(tmp_path / "faulty.pth")
    assert len(lines) == 20
    assert "missing: backbone.stage1.blocks.bottlenecks.0.alpha" in lines
    assert "unexpected: heads.extra" in lines
    assert beside(tmp_path / "faulty.pth") == ["faulty.pth"]


def test_half_precision_is_told_with_its_remedy(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "half.pth"
    halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"net": halved}, file)
    with pytest.raises(DataError, match=r"holds a YOLO-NAS n in float16; save its weights as float32$"):
        import_weights(file)
    with pytest.raises(DataError, match=r"does not hold the weights of a YOLO-NAS s: .*; it fits --variant n$"):
        import_weights(file, variant="s")
    torch.save({"net": {key: value.half() for key, value in state.items()}}, file)
    with pytest.raises(DataError, match=r"in float16; save each tensor in the type that is needed \(listed above\)$"):
        import_weights(file)
    assert beside(file) == ["half.pth"]


def test_weights_that_are_no_numbers_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "broken.pth"
    stem = "backbone.stem.conv.branch_3x3.conv.weight"
    torch.save({"net": {**state, stem: torch.full_like(state[stem], torch.nan)}}, file)
    with pytest.raises(DataError, match=rf"broken\.pth holds non-finite weights in {stem}; give a checkpoint from"):
        import_weights(file)


def test_long_lists_of_names_are_no_file_and_binary_files_are_no_names(nasline: Nasline, file: Path) -> None:
    names = ",".join(f"a class with a long name, number {number}".replace(",", "") for number in range(20))
    assert len(names) > 255
    options = ("import-weights", file, "--variant", "n", "--out", "imported", "--class-names")
    assert "has 2 classes, but --class-names gives 20;" in nasline(*options, names, code=65)
    nasline(*options[:5], "long", "--class-names", f"{'a' * 300},b", code=0)
    for content in (b"\x89PNG\xff\xfe", b"cat\0\ndog\n"):
        (file.parent / "names.bin").write_bytes(content)
        assert "--class-names names.bin is no text; give a text file" in nasline(*options, "names.bin", code=65)
    assert not (file.parent / "imported").exists()


@pytest.mark.parametrize("out", ["reference.pth/x", "reference.pth/x/y.pth", "a" * 300])
def test_an_impossible_place_is_refused_first(nasline: Nasline, file: Path, out: str) -> None:
    reason = "File name too long" if len(out) > 255 else "reference.pth is no folder"
    for words in (("import-weights", file, "--variant", "n"), ("export-weights", file.parent / "nowhere")):
        sentence = nasline(*words, "--out", out, code=65)
        assert f"--out {out[:100]} is no possible place" in sentence and reason in sentence
    assert beside(file) == ["reference.pth"]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("dangling", "dangling is a link to nothing"),
        ("dangling/x", "dangling is a link to nothing"),
        ("loop/x", "loop is a link to nothing"),
        ("/proc/x/y", "/proc does not take it (No such file or directory)"),
        (f"new/{'a' * 300}", "does not take it (File name too long)"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_refused_first(
    nasline: Nasline, file: Path, out: str, reason: str
) -> None:
    (file.parent / "dangling").symlink_to("/nonexistent/disk")
    (file.parent / "loop").symlink_to("loop")
    for words in (("import-weights", file, "--variant", "n"), ("export-weights", file.parent / "nowhere")):
        sentence = nasline(*words, "--out", out, code=65)
        assert f"--out {out[:100]} is no possible place: " in sentence and f"{reason}; give another one" in sentence
    assert beside(file) == ["dangling", "loop", "reference.pth"]


@pytest.mark.parametrize("out", ["new/deep/imported", "there/imported", "~nobody/imported"])
def test_a_place_is_tried_without_a_trace(file: Path, out: str) -> None:
    (file.parent / "there").mkdir()
    import_weights(file, out=out)
    names = {"reference.pth", "there", out, *(str(parent) for parent in Path(out).parents if parent.name)}
    found = {str(path.relative_to(file.parent)) for path in file.parent.rglob("*")}
    assert found == {*names, f"{out}/checkpoint.json", f"{out}/model.safetensors"}


def test_a_place_that_fails_in_the_end_is_told_too(nasline: Nasline, file: Path) -> None:
    """The name is short enough, that of the folder which is renamed to it is not."""
    long = "a" * 250
    options = ("--variant", "n", "--class-names", "cat,dog", "--out", long)
    sentence = nasline("import-weights", file, *options, code=65)
    assert f"--out {long} is no possible place: " in sentence and "(File name too long); give another one" in sentence
    assert beside(file) == ["reference.pth"]


def test_broken_files_leave_nothing(file: Path) -> None:
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is no checkpoint file or is damaged"):
        import_weights(file)
    torch.save({"net": {"a": torch.ones(1)}, "code": Path("/")}, file)
    with pytest.raises(ValueError, match="holds pathlib"):
        import_weights(file)
    file.unlink()
    with pytest.raises(ValueError, match="is no file"):
        import_weights(file)
    assert beside(file) == []


def test_nothing_is_overwritten(file: Path) -> None:
    (file.parent / "imported").mkdir()
    with pytest.raises(ParameterError, match="imported exists; give a folder that does not exist yet"):
        import_weights(file)
    with pytest.raises(ParameterError, match=r"reference.pth exists; give a file that does not exist yet"):
        export_weights(file.parent / "imported", file)


def test_what_the_reference_cannot_hold_is_not_exported(file: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.json cannot be read"):
        export_weights(file.parent / "nowhere", file.parent / "x.pth")
    metadata = CheckpointMetadata("n", ("cat", "dog"), Preprocessing(640), 0)
    save_checkpoint(file.parent / "folded", model.build("n", 2).eval().fuse(), metadata)
    with pytest.raises(ValueError, match="has no training form"):
        export_weights(file.parent / "folded", file.parent / "x.pth")
    assert not (file.parent / "x.pth").exists()
