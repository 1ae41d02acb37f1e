"""Reference checkpoints: exact round trips, every fault named, damaged and dangerous files refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import model
from model.coco_classes import COCO_CLASS_NAMES
from model.preprocessing import Preprocessing
from model.reference_file import read_reference_file, write_reference_file
from model.reference_weights import (
    RENAME_TABLE,
    VARIANTS,
    compare,
    fitting_variants,
    network_of,
    reference_key,
    reference_state,
)

IDLE = ".rbr_reparam."


@pytest.fixture(scope="module")
def states(golden) -> dict[str, dict[str, Tensor]]:
    """State dicts of N and S in the reference's own names, idle kernels included."""
    listings = {variant: golden.json(f"{name}_keys")["keys"] for variant, name in (("n", "n_det"), ("s", "s"))}
    filled = {
        variant: golden.fill_module.fill({key: tuple(shape) for key, shape in keys})
        for variant, keys in listings.items()
    }
    return {
        variant: {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
        for variant, arrays in filled.items()
    }


def _save(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("variant", ["n", "s"])
def test_round_trip_is_equal_to_the_bit(states, variant, tmp_path):
    state = states[variant]
    path = _save(tmp_path / "reference.pth", {"ema_net": {f"module.{key}": value for key, value in state.items()}})
    back = reference_state(network_of(read_reference_file(path).state, variant))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    assert all(torch.equal(back[key], value) for key, value in state.items() if IDLE not in key)
    assert all(not value.any() for key, value in back.items() if IDLE in key)
    write_reference_file(tmp_path / "back.pth", back, COCO_CLASS_NAMES)
    again = read_reference_file(tmp_path / "back.pth")
    assert (again.section, again.class_names) == ("ema_net", COCO_CLASS_NAMES)
    assert list(again.state) == list(back) and all(torch.equal(again.state[key], back[key]) for key in back)
    stored = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(stored) == {"net", "ema_net", "processing_params"} and set(stored["net"]) == set(back)


def test_imported_s_is_the_network_of_the_golden_vectors(states, small_network):
    imported = network_of(states["s"], "s")
    assert not imported.training
    expected = small_network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in imported.state_dict().items())


def test_the_average_comes_first_then_the_network_then_a_bare_state_dict(tmp_path):
    network, average = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}

    def read(content: object, section=None) -> tuple[str, float]:
        found = read_reference_file(_save(tmp_path / "file.pth", content), section)
        assert list(found.state) == ["a.weight"]
        return found.section, found.state["a.weight"][0].item()

    assert read({"net": network, "ema_net": average, "epoch": 3}) == ("ema_net", 1.0)
    assert read({"net": network, "ema_net": average}, "net") == ("net", 0.0)
    assert read({"net": network, "ema_net": None, "acc": 0.5}) == ("net", 0.0)
    assert read(average) == ("state dict", 1.0)
    assert read({f"module.{key}": value for key, value in average.items()}) == ("state dict", 1.0)
    assert read({"net": {f"_orig_mod.module.{key}": value for key, value in network.items()}}) == ("net", 0.0)
    with pytest.raises(ValueError, match=r"has no ema_net; it holds net, epoch"):
        read({"net": network, "epoch": 3}, "ema_net")


def test_every_fault_is_listed_and_the_network_refused(states):
    state = {key: value.clone() for key, value in states["n"].items()}
    for key in ("backbone.stem.conv.branch_3x3.conv.weight", "neck.neck1.blocks.bottlenecks.0.alpha"):
        del state[key]
    state["heads.head1.extra"] = torch.ones(1)
    state["heads.head2.cls_pred.bias"] = torch.ones(79)
    state["heads.head3.reg_pred.bias"] = state["heads.head3.reg_pred.bias"].half()
    state["heads.head3.reg_pred.weight"][0, 0] = torch.nan
    state["heads.proj_conv"] = torch.arange(17.0)  # a constant of the reference's decoding
    mismatch = compare(state, "n")
    assert sorted(mismatch.lines()) == [
        "misshapen: heads.head2.cls_pred.bias is (79,) float32, needed is (80,) float32",
        "missing: backbone.stem.conv.branch_3x3.conv.weight",
        "missing: neck.neck1.blocks.bottlenecks.0.alpha",
        "not finite: heads.head3.reg_pred.weight",
        "other type: heads.head3.reg_pred.bias is float16, needed is float32",
        "unexpected: heads.head1.extra",
    ]
    assert mismatch.counts() == "2 missing, 1 unexpected, 1 misshapen, 1 other type, 1 not finite"
    with pytest.raises(ValueError, match="not the weights of a YOLO-NAS n: 2 missing, 1 unexpected"):
        network_of(state, "n")


def test_the_fitting_variant_is_found(states):
    assert compare(states["n"], "s")
    assert fitting_variants(states["n"]) == ["n"]
    assert fitting_variants({key: value.half() for key, value in states["n"].items()}) == ["n"], "whatever its values"
    assert len(compare({}, "n").missing) == len(states["n"]) - sum(IDLE in key for key in states["n"])


def test_rename_table_names_every_entry_of_every_variant_once():
    assert len(set(RENAME_TABLE.values())) == len(RENAME_TABLE)
    for variant in VARIANTS:
        with torch.device("meta"):
            keys = list(model.build(variant, 3).state_dict())
        assert len({reference_key(key) for key in keys}) == len(keys)


def test_a_network_for_bgr_pictures_is_turned_to_rgb(states):
    state = states["n"]
    picture = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        (expected, _), _ = network_of(state, "n").double()(picture.flip(1))
        (actual, _), _ = network_of(state, "n", "bgr").double()(picture)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # float64, sums of three channels reordered


def _processing(*steps: object) -> dict[str, object]:
    composed = {"ComposeProcessing": {"processings": list(steps)}}
    return {"net": {"a": torch.ones(1)}, "processing_params": {"class_names": ["x", "y"], "image_processor": composed}}


RESIZE = {"DetectionLongestMaxSizeRescale": {"output_shape": (416, 416)}}
SCALE = {"StandardizeImage": {"max_value": 255.0}}
PAD = {"DetectionCenterPadding": {"output_shape": (448, 448), "pad_value": 114}}


@pytest.mark.parametrize(
    ("steps", "order", "preprocessing"),
    [
        ([RESIZE, PAD], "rgb", Preprocessing(448, margin=32)),
        (["ReverseImageChannels", RESIZE, SCALE, PAD], "bgr", Preprocessing(448, margin=32)),
        ([{"ReverseImageChannels": {}}, RESIZE, "ReverseImageChannels", PAD], "rgb", Preprocessing(448, margin=32)),
        ([RESIZE], "rgb", Preprocessing(640, margin=4)),
        ([], None, Preprocessing(640, margin=4)),
    ],
)
def test_what_the_file_tells_of_its_pictures(steps, order, preprocessing, tmp_path):
    found = read_reference_file(_save(tmp_path / "file.pth", _processing(*steps)))
    assert found.class_names == ("x", "y")
    assert (found.channel_order, found.preprocessing) == (order, preprocessing)


def test_class_names_are_cocos_in_order(shared):
    folder = shared / "data/pretrain_general/annotations"
    categories = json.loads((folder / "instances_val.json").read_text())["categories"]
    assert [entry["name"] for entry in sorted(categories, key=lambda entry: entry["id"])] == list(COCO_CLASS_NAMES)


class _Code:
    """What a pickle can do: run a command where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run_and_named(tmp_path):
    path = _save(tmp_path / "file.pth", {"net": {"a": torch.ones(1)}, "extra": _Code(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"file.pth holds posix.mkdir, which is more than weights, and was not opened"):
        read_reference_file(path)
    path = _save(tmp_path / "file.pth", {"net": {"a": torch.ones(1)}, "acc": np.float64(0.5)})
    with pytest.raises(ValueError, match=r"holds numpy\S+scalar, which is more than weights"):
        read_reference_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused_wherever_they_end(zipped, tmp_path):
    path = _save(tmp_path / "file.pth", {"net": {"a": torch.ones(300)}}, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        # cut inside a name, an old file without an archive seems to hold something of that shorter name
        with pytest.raises(ValueError, match=r"file.pth .*(copy or download it again|more than weights)"):
            read_reference_file(path)


def test_one_flipped_bit_in_a_weight_is_noticed(tmp_path):
    """torch.load itself compares no checksums."""
    path = _save(tmp_path / "file.pth", {"net": {"a": torch.full((300,), 7.0)}})
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((2,), 7.0).numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["net"]["a"][0] != 7.0
    with pytest.raises(ValueError, match=r"file.pth is damaged at \S+/data/0; copy or download it again"):
        read_reference_file(path)


def test_flipped_bytes_anywhere_raise_nothing_but_the_sentence(tmp_path):
    path = _save(tmp_path / "file.pth", {"net": {"a": torch.ones(20)}}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            read_reference_file(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list instead of a dictionary"),
        ({}, "has no ema_net, net or bare state dict; it holds nothing"),
        ({"model": {"a": torch.ones(1)}}, "it holds model"),
        ({"net": {"a": 3.0}}, "entry 'a' of net is a float, not a tensor"),
        ({"net": {4: torch.ones(1)}}, "net has the key 4, which is no name"),
    ],
)
def test_other_content_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_reference_file(_save(tmp_path / "file.pth", content))


def test_no_file_and_text_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    for name, message in [("nowhere.pth", "is no file"), (".", "is no file"), ("text.pth", "is no checkpoint file")]:
        with pytest.raises(ValueError, match=message):
            read_reference_file(tmp_path / name)


def test_only_what_the_reference_has_is_written():
    with pytest.raises(ValueError, match="the reference has no variant pico"):
        reference_state(model.build("pico", 2))
    with pytest.raises(ValueError, match="a folded network has no training form"):
        reference_state(model.build("n", 2).eval().fuse())
