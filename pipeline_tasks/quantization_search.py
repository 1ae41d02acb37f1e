"""The choice of float layers as `quantize` makes it: what each layer costs and harms, which choices are measured."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import open_images, prepare_torch
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import onnx
    import torch

    from model.checkpoint import CheckpointMetadata
    from model.data.image_set import ImageSet
    from model.data.tables import Dataset
    from model.quantization.selection import LayerCosts, Selection
    from model.quantization.sensitivity import LayerSensitivity
    from model.yolo_nas import YoloNAS

log = logging.getLogger(__name__)

CALIBRATION_BATCH = 16
SENSITIVITY_BATCH = 4
"""Images of a batch whose convolution outputs are all kept: 0.6 GB for S at 640 pixels."""
UNITS = {"profiled": "ms", "predicted": "share of the float network's time"}


@dataclass(frozen=True)
class Subject:
    """What is quantized, on which images, and how a quantized form is judged."""

    context: StepContext
    folded: YoloNAS
    dataset: Dataset
    metadata: CheckpointMetadata
    calibration: ImageSet
    held_aside: ImageSet
    measure: Callable[[torch.nn.Module], float]
    """mAP50-95 on the validation split."""

    def batches(self, images: ImageSet, size: int) -> Iterator[torch.Tensor]:
        """Pictures in [0, 1]; of several processes this one's share, every n-th of the batches one would make."""
        import numpy as np
        import torch

        from model import processes
        from model.data.loader import evaluation_batches

        device = prepare_torch(self.context.parameters.start)
        batch_of_row = np.arange(len(images)) // size
        own = images.subset(np.flatnonzero(batch_of_row % processes.count() == processes.rank()))
        for batch, _, _ in evaluation_batches(own, open_images(self.context), self.metadata.preprocessing, size):
            yield torch.from_numpy(batch).to(device).float() / 255


@dataclass(frozen=True)
class Choice:
    """The outcome of a search, in plain values, so that a resumed step goes on with the same one.

    added: layer -> reason, beside the layers that are in float anyway. time: of the network, summed over its layers;
    time_before: the same before any was added. frontier, layers: the rows of frontier.json and sensitivity.json.
    """

    added: dict[str, str]
    map50_95: float
    met: bool
    time: float
    time_before: float
    frontier: list[dict[str, Any]]
    layers: list[dict[str, Any]]


def choose_layers(subject: Subject, network: YoloNAS, weights: str, float_map: float, int8_map: float) -> Choice:
    """Search the fastest choice of float layers that keeps within `quantize.map_budget`, beside those in float now.

    weights: "ptq" or "qat", where the weights come from. Processes measure sensitivity together; the first one
    decides. What it decided is kept in the step's state.
    """
    from model import processes
    from model.quantization.sensitivity import layer_sensitivity

    path = subject.context.state / f"selection-{weights}.json"
    known = processes.made_by_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    if known is not None:
        return Choice(**known)
    sensitivities = layer_sensitivity(network, subject.batches(subject.held_aside, SENSITIVITY_BATCH))
    decide = partial(_decide, subject, network, weights, sensitivities, float_map, int8_map)
    choice = processes.made_by_first(decide)
    if processes.rank() == 0:
        write_json(path, asdict(choice))
        subject.context.save_state()
    return choice


def _decide(
    subject: Subject,
    network: YoloNAS,
    weights: str,
    sensitivities: Sequence[LayerSensitivity],
    float_map: float,
    int8_map: float,
) -> Choice:
    from model import processes
    from model.quantization.quantize import float_layers
    from model.quantization.selection import affordable

    with processes.alone(), _Forms(subject, network) as forms:
        costs = forms.costs()
        selection = _search(subject, network, forms, costs, sensitivities, float_map, int8_map)
        measured = forms.measured([point.float_layers for point in selection.points])
    predicted = [sum(costs.floating.values()) + costs.other]
    predicted += [costs.total(point.float_layers) for point in selection.points]
    times = [time["cpu"] for time in measured] if measured else predicted
    most, anyway = subject.context.parameters.quantize.maximum_float_share, float_layers(network)
    allowed = affordable(selection.points, costs, anyway, most, times if measured else [])
    usable = selection.keeping(allowed)
    chosen = usable.chosen([time for time, is_allowed in zip(times[1:], allowed, strict=True) if is_allowed])
    rows = _frontier_rows(weights, float_map, selection, predicted, measured, UNITS[costs.source])
    return Choice(
        added=_reasons(chosen.float_layers, sensitivities, costs),
        map50_95=chosen.accuracy,
        met=usable.met,
        time=times[1 + selection.points.index(chosen)],
        time_before=times[1],
        frontier=rows,
        layers=_layer_rows(network, weights, sensitivities, costs, subject.metadata.preprocessing.input_size),
    )


def _search(
    subject: Subject,
    network: YoloNAS,
    forms: _Forms,
    costs: LayerCosts,
    sensitivities: Sequence[LayerSensitivity],
    float_map: float,
    int8_map: float,
) -> Selection:
    from model.quantization.quantize import float_layers, float_too
    from model.quantization.selection import Search, rank_layers

    given, anyway = subject.context.parameters.quantize, float_layers(network)

    def accuracy(choice: frozenset[str]) -> float:
        with float_too(network, choice):
            value = subject.measure(network)
        log.info("validation mAP50-95: %d more layers in float, %.4f", len(choice), value)
        return value

    def rank_again(choice: frozenset[str]) -> list[str]:
        beside = _sensitivity_beside(subject, network, choice)
        return rank_layers(beside, forms.costs_beside(costs, choice), anyway, most=1.0)

    ranking = rank_layers(sensitivities, costs, anyway, given.maximum_float_share)
    further = rank_layers(sensitivities, costs, anyway, most=1.0) if costs.source == "profiled" else []
    wanted, known = float_map - given.map_budget / 100, {frozenset[str](): int8_map}
    return Search(accuracy, wanted, given.selection_evaluations, rank_again, known).run(ranking, further)


def _sensitivity_beside(subject: Subject, network: YoloNAS, choice: frozenset[str]) -> list[LayerSensitivity]:
    """What each layer of a choice would add to the error if it alone went back to INT8."""
    from model.quantization.quantize import float_layers, quantized_layers
    from model.quantization.sensitivity import LayerSensitivity, quantization_errors

    anyway, names = float_layers(network), [name for name in quantized_layers(network) if name in choice]
    int8 = [name for name in quantized_layers(network) if name not in anyway and name not in choice]
    choices = [int8, *([*int8, name] for name in names)]
    base, *errors = quantization_errors(network, subject.batches(subject.held_aside, SENSITIVITY_BATCH), choices)
    return [LayerSensitivity(name, error - base) for name, error in zip(names, errors, strict=True)]


class _Forms:
    """The engine's forms of a quantized network, to be timed on this machine where it is the gate's target."""

    def __init__(self, subject: Subject, network: YoloNAS) -> None:
        self._subject, self._network = subject, network
        self._profiled = subject.context.parameters.gate.target == "cpu"
        self._graph: onnx.ModelProto | None = None

    def __enter__(self) -> _Forms:
        if self._profiled:
            self._graph = self._export()
        return self

    def __exit__(self, *_: object) -> None:
        self._graph = None

    def costs(self) -> LayerCosts:
        """Profiled on this CPU, or predicted from multiply-adds."""
        from model.quantization.selection import LayerCosts
        from model.quantization.sensitivity import multiply_add_shares

        size = self._subject.metadata.preprocessing.input_size
        if self._graph is None:
            return LayerCosts.predicted(multiply_add_shares(self._network, size))
        from model.engines.layer_profile import profile_layers

        forms = {"int8": self._graph, "float": self._float_form()}
        found = profile_layers(forms, self._image(), **self._settings())
        log.info("profiled on this CPU: %.2f ms in float, %.2f ms in INT8", found["float"].total, found["int8"].total)
        return LayerCosts(found["int8"].layers, found["float"].layers, found["int8"].other, "profiled")

    def costs_beside(self, costs: LayerCosts, choice: Collection[str]) -> LayerCosts:
        """The same, with what the layers of a choice take when exactly they are in float, where that is profiled."""
        if self._graph is None:
            return costs
        from model.engines.layer_profile import profile_layers
        from model.onnx_float_layers import leave_in_float

        found = profile_layers({"mixed": leave_in_float(self._graph, choice)}, self._image(), **self._settings())
        beside = {name: found["mixed"].layers[name] for name in choice}
        return replace(costs, floating={**costs.floating, **beside})

    def measured(self, choices: Sequence[Collection[str]]) -> list[dict[str, float]]:
        """Shortest wall and processor time in ms of the float network and of each choice; empty where not profiled."""
        if self._graph is None:
            return []
        from model.engines.layer_profile import time_forms
        from model.onnx_float_layers import leave_in_float

        forms = {"float": self._float_form()}
        forms |= {str(index): leave_in_float(self._graph, choice) for index, choice in enumerate(choices)}
        found = time_forms(forms, self._image(), **self._settings())
        return [{"wall": float(times.wall_ms.min()), "cpu": float(times.cpu_ms.min())} for times in found.values()]

    def _float_form(self) -> onnx.ModelProto:
        from model.onnx_float_layers import leave_in_float
        from model.onnx_structure import convolutions

        assert self._graph is not None
        return leave_in_float(self._graph, convolutions(self._graph))

    def _export(self) -> onnx.ModelProto:
        from model.export import export_onnx
        from model.onnx_file import load_onnx

        metadata = self._subject.metadata
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(self._network, path, preprocessing=metadata.preprocessing, class_names=metadata.class_names)
            return load_onnx(path)

    def _image(self) -> Any:
        import numpy as np

        size = self._subject.metadata.preprocessing.input_size
        return np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)

    def _settings(self) -> dict[str, int]:
        parameters = self._subject.context.parameters
        return {"threads": parameters.gate.latency_threads, "rounds": parameters.quantize.profile_rounds}


def _reasons(chosen: Collection[str], sensitivities: Sequence[LayerSensitivity], costs: LayerCosts) -> dict[str, str]:
    mean = sum(layer.error for layer in sensitivities) / len(sensitivities)
    unit = "ms here" if costs.source == "profiled" else "of the float network's time (predicted from multiply-adds)"
    return {
        layer.name: f"sensitive: alone in INT8 it changes confident predictions by {layer.error:.4f} "
        f"({layer.error / mean:.1f} times the mean layer); INT8 would save {costs.saved(layer.name):.4f} {unit}"
        for layer in sensitivities
        if layer.name in chosen
    }


def _frontier_rows(
    weights: str,
    float_map: float,
    selection: Selection,
    predicted: Sequence[float],
    measured: Sequence[Mapping[str, float]],
    unit: str,
) -> list[dict[str, Any]]:
    """A row for the float network, then one for each choice."""
    choices: list[tuple[str, list[str], float]] = [("float", [], float_map)]
    choices += [(weights, sorted(point.float_layers), point.accuracy) for point in selection.points]
    rows = []
    for index, (name, added, accuracy) in enumerate(choices):
        times = measured[index] if measured else {}
        rows.append(
            {
                "weights": name,
                "added": added,
                "map50_95": accuracy,
                "lost_points": 100 * (float_map - accuracy),
                "predicted": predicted[index],
                "measured_wall": times.get("wall"),
                "measured_cpu": times.get("cpu"),
                "unit": unit,
                "published": False,
            }
        )
    return rows


def _layer_rows(
    network: YoloNAS, weights: str, sensitivities: Sequence[LayerSensitivity], costs: LayerCosts, input_size: int
) -> list[dict[str, Any]]:
    from model.quantization.quantize import float_layers
    from model.quantization.sensitivity import multiply_add_shares

    shares = multiply_add_shares(network, input_size)
    anyway = float_layers(network)
    return [
        {
            "weights": weights,
            "layer": layer.name,
            "error": layer.error,
            "int8_time": None if layer.name in anyway else costs.int8[layer.name],
            "float_time": costs.floating[layer.name],
            "unit": UNITS[costs.source],
            "multiply_add_share": shares[layer.name],
        }
        for layer in sensitivities
    ]
