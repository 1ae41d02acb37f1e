"""Building TensorRT plans: on the target, strongly typed, checked, kept for the next time.

TensorRT 11 has neither calibration nor precision flags: the types of the file are the types of the engine, and 10 is
told to do the same. So the canonical file is given its float16 form first (``model.onnx_half``).

A plan holds for the GPU, driver and version that built it, so those and the digest of the ONNX file are the key under
which it is kept. An engine in which a quantized convolution does not run in INT8 is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.engines import INPUT_NAME, TENSORRT_FILE
from model.engines.detector_file import load_detector
from model.engines.gpu_facts import GpuFacts, current_gpu
from model.engines.tensorrt_engine import BUILD_FILE, TensorRTEngine, load_tensorrt
from model.engines.tensorrt_inspector import read_execution, require_int8
from model.onnx_file import fix_batch, fixed_batch
from model.onnx_half import HalfReport, convert_to_half
from model.onnx_structure import check_graph

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

RECIPE = 1
"""Raised when what this module asks of TensorRT changes, so that older plans are not taken for it."""
INFORMATION_FILE = "layers.json"


@dataclass(frozen=True)
class TensorRTBuildReport:
    """What was built, for what, and how it runs; ``build.json``."""

    runtime: str
    runtime_version: str
    source_sha256: str
    gpu: str
    compute_capability: str | None
    multiprocessors: int | None
    driver: str | None
    largest_batch: int
    recipe: int
    precision: str
    int8_convolutions: int
    float_convolutions: int
    float32_layers: dict[str, str]
    subnormal_constants: int
    build_seconds: float
    plan_sha256: str


def build_tensorrt(
    onnx_path: Path, out_directory: Path, *, largest_batch: int = 1, cache: Path | None = None
) -> TensorRTBuildReport:
    """Write ``model.plan`` for the GPU at hand, ``build.json`` and the inspector's ``layers.json``; give the report.

    cache: where plans are kept, by default ``plan_cache()``; a plan for the same key is copied from there.
    Raises MissingRuntimeError without a GPU or the packages, ValueError for a file that TensorRT refuses or runs in
    float where it should be INT8.
    """
    kept = build_cached(onnx_path, largest_batch=largest_batch, cache=cache).parent
    out_directory.mkdir(parents=True, exist_ok=True)
    for file in (TENSORRT_FILE, BUILD_FILE, INFORMATION_FILE):
        shutil.copyfile(kept / file, out_directory / file)
    return _read_report(kept)


def build_cached(onnx_path: Path, *, largest_batch: int = 1, cache: Path | None = None) -> Path:
    """The plan of a file for this GPU in the cache, built now unless it is there; errors as ``build_tensorrt``."""
    version = load_tensorrt().__version__
    facts = current_gpu()
    digest = _digest(onnx_path)
    folder = (cache or plan_cache()) / plan_key(digest, version, facts.name, facts.driver, largest_batch)
    if _is_whole(folder):
        log.info("%s: the plan for %s was built before", onnx_path.name, facts.name)
        return folder / TENSORRT_FILE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        partial = Path(scratch, "plan")
        partial.mkdir()
        report = _build(onnx_path, partial, largest_batch, facts)
        (partial / BUILD_FILE).write_text(json.dumps(asdict(report), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not _is_whole(folder):  # another process may have built the same meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    log.info("%s: built for %s in %.0f s, %s", onnx_path.name, facts.name, report.build_seconds, report.precision)
    return folder / TENSORRT_FILE


def plan_cache() -> Path:
    """``nasline/plans`` in the user's cache folder (XDG_CACHE_HOME, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nasline", "plans")


def plan_key(source_sha256: str, version: str, gpu: str, driver: str | None, largest_batch: int) -> str:
    """Name of a plan: another value for any of these is another plan."""
    content = json.dumps([source_sha256, version, gpu, driver, largest_batch, RECIPE])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def prepare(proto: onnx.ModelProto, largest_batch: int = 1) -> tuple[onnx.ModelProto, HalfReport]:
    """The float16 form; a free batch size is fixed when the largest is one, since fixed shapes make a faster engine."""
    fixed = fix_batch(proto, 1) if largest_batch == 1 and fixed_batch(proto) is None else proto
    return convert_to_half(fixed)


def build_plan(
    tensorrt: Any, model: bytes, *, profile_batch: int | None = None, configure: Callable[[Any], None] | None = None
) -> bytes:
    """Let TensorRT (or its sibling for RTX, whose module has the same interface) build a plan of an ONNX file's bytes.

    profile_batch: the largest batch of a file that takes any; None for a fixed one. configure: called with the
    builder's configuration, for what only one of the two has.
    Raises ValueError with TensorRT's own words for a file that it does not parse or cannot build.
    """
    sayings: list[str] = []
    logger = _collecting_logger(tensorrt, sayings)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(_strongly_typed(tensorrt))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ValueError(f"TensorRT does not take the file: {'; '.join(errors or sayings)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if profile_batch is not None:
        _add_profile(builder, network, config, profile_batch)
    if configure is not None:
        configure(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT cannot build the network: {'; '.join(sayings) or 'it does not say why'}")
    return bytes(plan)


def _build(onnx_path: Path, folder: Path, largest_batch: int, facts: GpuFacts) -> TensorRTBuildReport:
    tensorrt, start = load_tensorrt(), time.monotonic()
    proto, half = prepare(load_detector(onnx_path), largest_batch)
    structure, fixed = check_graph(proto), fixed_batch(proto)
    profile_batch = largest_batch if fixed is None else None
    plan = build_plan(tensorrt, proto.SerializeToString(), profile_batch=profile_batch)
    engine = TensorRTEngine(plan, precision="")
    information = engine.information()
    engine.close()
    execution = read_execution(information, (*structure.quantized, *structure.floating))
    require_int8(execution, structure.quantized)
    (folder / TENSORRT_FILE).write_bytes(plan)
    (folder / INFORMATION_FILE).write_text(information, encoding="utf-8")
    return TensorRTBuildReport(
        runtime=TensorRTEngine.name,
        runtime_version=tensorrt.__version__,
        source_sha256=_digest(onnx_path),
        gpu=facts.name,
        compute_capability=facts.compute_capability,
        multiprocessors=facts.multiprocessors,
        driver=facts.driver,
        largest_batch=fixed or largest_batch,
        recipe=RECIPE,
        precision=execution.precision,
        int8_convolutions=len(execution.int8),
        float_convolutions=len(structure.quantized) + len(structure.floating) - len(execution.int8),
        float32_layers=half.float_layers,
        subnormal_constants=half.subnormal_constants,
        build_seconds=time.monotonic() - start,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )


def _strongly_typed(tensorrt: Any) -> int:
    """Creation flags of a network that runs in the types of its file: asked for in 10, always so in 11."""
    flag = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(builder: Any, network: Any, config: Any, largest_batch: int) -> None:
    """Batches from one to the largest, for which the kernels are chosen."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        assert tensor.name == INPUT_NAME, tensor.name
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *rest), (largest_batch, *rest), (largest_batch, *rest))
    config.add_optimization_profile(profile)


def _collecting_logger(tensorrt: Any, sayings: list[str]) -> Any:
    """A logger that keeps errors for the message of the exception and passes warnings on."""

    class Collector(tensorrt.ILogger):  # type: ignore[misc]  # the base class is known only when TensorRT is there
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                sayings.append(message)
            elif severity == tensorrt.ILogger.Severity.WARNING:
                log.debug("TensorRT: %s", message)

    return Collector()


def _is_whole(folder: Path) -> bool:
    """Whether a plan is there as it was written; a damaged one is built again."""
    if not (folder / BUILD_FILE).is_file():
        return False
    try:
        if _digest(folder / TENSORRT_FILE) == _read_report(folder).plan_sha256:
            return True
    except (ValueError, TypeError):  # no JSON, or other fields than this release writes
        pass
    log.warning("the plan in %s is damaged and will be built again", folder)
    return False


def _read_report(folder: Path) -> TensorRTBuildReport:
    return TensorRTBuildReport(**json.loads((folder / BUILD_FILE).read_text(encoding="utf-8")))


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()
