"""Exported files as a whole: a fixed batch size, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_detector import CLASS_NAMES, INPUT_SIZE, ExportedDetector

from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.engines.openvino_engine import OpenVINOEngine
from model.export import export_onnx
from model.onnx_file import fix_batch, fixed_batch, load_onnx, write_onnx
from model.onnx_structure import check_structure
from model.preprocessing import Preprocessing


def test_a_fixed_file_computes_what_the_free_one_does(detector: ExportedDetector, tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    write_onnx(fix_batch(load_onnx(detector.int8_onnx), 4), path)
    shape = [axis.dim_value for axis in onnx.load(path).graph.output[0].type.tensor_type.shape.dim]
    assert shape == [4, 189, 4]
    assert check_structure(path) == check_structure(detector.int8_onnx)
    images = detector.images[:6]  # the second batch of four is filled
    for engine in (OnnxRuntimeEngine, OpenVINOEngine):
        load = engine if engine is OnnxRuntimeEngine else engine.from_file  # type: ignore[attr-defined]
        for ours, theirs in zip(load(path, 1).run(images), load(detector.int8_onnx, 1).run(images), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=1e-3)  # sums in another order


def test_fixed_batch(detector: ExportedDetector) -> None:
    free = load_onnx(detector.int8_onnx)
    assert fixed_batch(free) is None and fixed_batch(fix_batch(free, 2)) == 2
    assert fixed_batch(free) is None  # the given graph stays as it is
    assert fixed_batch(fix_batch(fix_batch(free, 2), 2)) == 2
    with pytest.raises(ValueError, match="batches of 2 only, it cannot be fixed to 3"):
        fix_batch(fix_batch(free, 2), 3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fix_batch(free, 0)


@pytest.mark.slow
def test_export_with_a_fixed_batch(detector: ExportedDetector, tmp_path: Path) -> None:
    preprocessing = Preprocessing(INPUT_SIZE)
    export_onnx(detector.quantized, tmp_path / "x.onnx", preprocessing=preprocessing, class_names=CLASS_NAMES, batch=2)
    write_onnx(fix_batch(load_onnx(detector.int8_onnx), 2), tmp_path / "y.onnx")
    assert (tmp_path / "x.onnx").read_bytes() == (tmp_path / "y.onnx").read_bytes()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ValueError, match=r"empty\.onnx \(0 bytes\) holds no graph; export or copy it again"):
        load_onnx(tmp_path / "empty.onnx")
    with pytest.raises(ValueError, match=r"no file .*none\.onnx; `nasline export` writes it"):
        load_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(ValueError, match=r"text\.onnx is not a readable ONNX file"):
        load_onnx(tmp_path / "text.onnx")
