"""What `nasline bench` measures: from the words on the command line to engines, with what is known of them.

A word is `[RUNTIME:]PLACE`; the place is an engine folder, a file (`.onnx`, `.xml` or `.plan`), a checkpoint folder (by
torch) or `models:/NAME@ALIAS`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline_tasks.errors import ConfigurationError, DataError, UsageError
from pipeline_tasks.export import ENGINE_FILE, FLOAT_FILE, INT8_FILE

if TYPE_CHECKING:
    from model.engines import Engine, Runtime
    from model.preprocessing import Preprocessing
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

REGISTRY = "models:/"
METADATA_KEY = "nasline"
ROLES = {INT8_FILE: "int8", FLOAT_FILE: "float"}
"""Names of the gate's two engines by their files."""


@dataclass(frozen=True)
class Subject:
    """An engine to measure. recorded_map: the mAP50-95 that a gate wrote down for it, where one did."""

    name: str
    engine: Engine
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    recorded_map: float | None = None


def open_subjects(words: list[str], runtime: Runtime, threads: int, workspace: Workspace) -> list[Subject]:
    """Open every engine; `runtime` is for folders and files that may be run by several.

    Raises:
        UsageError: a word is given twice, or engines of the CPU and of a GPU are mixed.
        DataError: the registry has no such model, or a file says too little of itself.
        ConfigurationError: a runtime or its device is not there.
        ValueError: there is no engine at a place.
    """
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise UsageError(f"{twice[0]} is given twice; name each engine once")
    names = short_names(words)
    subjects = [_open(word, names[word], runtime, threads, workspace) for word in words]
    kinds = {subject.engine.name == "tensorrt" for subject in subjects}
    if len(kinds) > 1:
        raise UsageError("engines on a GPU (tensorrt) and on the CPU do not share a device; bench them apart")
    return subjects


def short_names(words: list[str]) -> dict[str, str]:
    """For each word the end of its path, from two parts on, that no other word ends in; the whole word if need be."""
    names = {}
    for word in words:
        parts = word.split("/")
        ends = ["/".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        others = [other for other in words if other != word]
        whole = [word] if word.startswith(REGISTRY) else ends
        names[word] = next((end for end in whole if not any(_ends_in(other, end) for other in others)), word)
    return names


def _ends_in(word: str, end: str) -> bool:
    return f"/{word}".endswith(f"/{end}")


def _open(word: str, name: str, runtime: Runtime, threads: int, workspace: Workspace) -> Subject:
    chosen, place = _split(word)
    path = _fetched(place, workspace) if place.startswith(REGISTRY) else Path(place)
    chosen = chosen or _own_runtime(path) or runtime
    try:
        if chosen == "torch":
            return _open_checkpoint(name, path, threads)
        return _open_engine(name, path, chosen, threads)
    except ImportError as error:
        raise ConfigurationError(f"{word}: {chosen} cannot be imported ({error}); install it") from None


def _split(word: str) -> tuple[Runtime | None, str]:
    """`onnxruntime:a/model.onnx` as its two parts; a place of that very name wins over the prefix."""
    from model.engines import Runtime

    prefix, colon, rest = word.partition(":")
    if not colon or word.startswith(REGISTRY) or Path(word).exists():
        return None, word
    for name in get_args(Runtime):
        if name == prefix:
            return name, rest
    known = ", ".join(get_args(Runtime))
    raise UsageError(f"{word}: {prefix!r} is no runtime; put one of {known} before the colon, or give a path")


def _fetched(uri: str, workspace: Workspace) -> Path:
    from pipeline_tasks.tracking.registry import fetch_model

    return fetch_model(workspace, uri) / "engine"


def _own_runtime(path: Path) -> Runtime | None:
    """The only runtime that reads what lies there."""
    from model.checkpoint import METADATA_FILE
    from model.engines import ONNX_FILE, OPENVINO_FILE, TENSORRT_FILE
    from model.quantization.storage import is_quantized

    if (path / METADATA_FILE).is_file() or is_quantized(path):
        return "torch"
    others = any((path / name).is_file() for name in (ONNX_FILE, OPENVINO_FILE))
    return "tensorrt" if path.suffix == ".plan" or ((path / TENSORRT_FILE).is_file() and not others) else None


def _open_checkpoint(name: str, folder: Path, threads: int) -> Subject:
    from model.checkpoint import load_checkpoint
    from model.engines.torch_engine import TorchEngine
    from model.quantization.storage import is_quantized, load_quantized

    quantized = is_quantized(folder)
    network, metadata = load_quantized(folder) if quantized else load_checkpoint(folder)
    engine = TorchEngine(network if quantized else network.fused_copy(), threads)
    return Subject(name, engine, metadata.class_names, metadata.preprocessing)


def _open_engine(name: str, path: Path, runtime: Runtime, threads: int) -> Subject:
    from model.engines import MissingRuntimeError, load_engine
    from model.preprocessing import Preprocessing

    try:
        engine = load_engine(path, runtime=runtime, threads=threads)
    except MissingRuntimeError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    told = _metadata(path)
    names, preprocessing = tuple(told["class_names"]), Preprocessing.from_json(told["preprocessing"])
    return Subject(name, engine, names, preprocessing, recorded_map(path))


def _metadata(path: Path) -> dict[str, Any]:
    """What the exported file, or `engine.json` beside a plan, says of class names and preprocessing."""
    file, described = _model_file(path), _folder(path) / ENGINE_FILE
    told: dict[str, Any] | None = None
    if file.suffix == ".onnx":
        told = _of_onnx(file)
    elif file.suffix == ".xml":
        told = _of_openvino(file)
    if not told and described.is_file():
        told = json.loads(described.read_text(encoding="utf-8"))
    if not told or not {"class_names", "preprocessing"} <= set(told):
        raise DataError(f"{path} does not tell its classes and preprocessing; give a file that `nasline export` wrote")
    return told


def _of_onnx(file: Path) -> dict[str, Any]:
    import onnx

    proto = onnx.load(file, load_external_data=False)
    text = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY, "{}")
    told: dict[str, Any] = json.loads(text)
    return told


def _of_openvino(file: Path) -> dict[str, Any]:
    import openvino

    try:
        text = openvino.Core().read_model(file).get_rt_info([METADATA_KEY, "metadata"]).astype(str)
    except RuntimeError:  # another's file
        return {}
    told: dict[str, Any] = json.loads(text)
    return told


def recorded_map(path: Path) -> float | None:
    """mAP50-95 that the gate measured for this very file: in a registered bundle, or in the gate's own output."""
    from model.engines import OPENVINO_FILE

    file = _model_file(path).resolve()
    if file.name == OPENVINO_FILE and len(file.parents) > 2:  # GATE/target/int8/model.xml
        return _of_record(file.parents[2], file.parent.name)
    role, gate = ROLES.get(file.name), file.parent.parent / "gate"  # BUNDLE/engine/model.onnx, BUNDLE/gate
    if role is None or not _was_built_from(gate / "target" / role, file):
        return None
    return _of_record(gate, role)


def _was_built_from(built: Path, file: Path) -> bool:
    from pipeline_tasks.digests import of_file

    report = built / "build.json"
    if not report.is_file():
        return False
    source: str = json.loads(report.read_text(encoding="utf-8")).get("source_sha256", "")
    return source == of_file(file)


def _of_record(gate: Path, role: str) -> float | None:
    record = gate / "accuracy.json"
    if not record.is_file():
        return None
    value: float | None = json.loads(record.read_text(encoding="utf-8")).get(role, {}).get("map50_95")
    return value


def _model_file(path: Path) -> Path:
    """The file that stands for a folder: the one a runtime takes first."""
    from model.engines import ONNX_FILE, OPENVINO_FILE, TENSORRT_FILE

    names = (OPENVINO_FILE, ONNX_FILE, TENSORRT_FILE)
    return next((path / name for name in names if (path / name).is_file()), path)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
