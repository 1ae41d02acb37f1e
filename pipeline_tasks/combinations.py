"""Parameters that are right each for itself and impossible together: found at `start`, before days of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pipeline_tasks.errors import ParameterError

if TYPE_CHECKING:
    from model.yolo_nas import YoloNAS
    from pipeline_tasks.params import Parameters, Variant
    from pipeline_tasks.training_parameters import TrainingParameters

PROCESSES = "start.processes"
ADAPTERS = "feature_adapters."
"""Layers beside the student that `distill` throws away."""


class _Training(NamedTuple):
    """One training of a run: its section, the settings, and the field of `start` that names its network."""

    section: str
    given: TrainingParameters
    variant_field: str


def require_possible(parameters: Parameters) -> None:
    """Refuse what a later step of this run would refuse, and nothing that only a step that trains nothing would read.

    torch is imported where layers are to be frozen, and takes seconds then.

    Raises:
        ParameterError: one sentence with every such combination.
    """
    trainings = list(_trainings(parameters))
    faults = [
        *_mirrored_images(parameters),
        *_empty_shares(parameters, trainings, PROCESSES, parameters.start.processes),
        *_single_values(parameters, trainings),
    ]
    of_layers = {
        training.section: fault
        for training in trainings
        if training.given.freeze and (fault := _layer_fault(parameters, training))
    }
    if faults := [*faults, *of_layers.values()]:
        raise ParameterError("; ".join(faults))


def require_images_for(count: int, parameters: Parameters, step: str, source: str = PROCESSES) -> None:
    """The same for the processes of one step, whose number a command may choose (`source` names who did).

    Raises:
        ParameterError: a batch has fewer images.
    """
    trainings = [training for training in _trainings(parameters) if training.section.split(".")[0] == step]
    for fault in _empty_shares(parameters, trainings, source, count):
        raise ParameterError(fault)


def _trainings(parameters: Parameters) -> Iterator[_Training]:
    """Those that the run may come to."""
    shared, trains_teacher = parameters.start, parameters.teach.source == "train"
    if shared.pretrain_dataset and not shared.from_champion:
        yield _Training("pretrain", parameters.pretrain, "student_variant")
        if trains_teacher:
            yield _Training("pretrain", parameters.pretrain, "teacher_variant")
    if trains_teacher:
        yield _Training("teach", parameters.teach, "teacher_variant")
    yield _Training("distill", parameters.distill, "student_variant")
    if parameters.quantize.qat != "never":
        yield _Training("quantize.training", parameters.quantize.training, "student_variant")


def _mirrored_images(parameters: Parameters) -> Iterator[str]:
    mode = parameters.pseudo_label.flip_consistency
    if parameters.start.unlabeled_dataset and mode != "none" and not parameters.teach.flip:
        yield (
            f"pseudo_label.flip_consistency is {mode!r}, but with teach.flip 0 the teacher knows no mirrored images; "
            "set it to none, or teach.flip above 0"
        )


def _empty_shares(parameters: Parameters, trainings: list[_Training], source: str, count: int) -> Iterator[str]:
    """A batch is divided among the processes; on GPUs its size may still be tried out."""
    on_gpus = parameters.start.device.startswith("cuda")
    small = {
        f"{section}.batch_size {given.batch_size}": None
        for section, given, _ in trainings
        if given.batch_size < count and not (given.auto_batch_size and on_gpus)
    }
    if small:
        yield (
            f"{source} is {count}, but some of them would get no image of a batch of {', '.join(small)}; "
            f"give batches at least {count} images, or start fewer processes"
        )


def _single_values(parameters: Parameters, trainings: list[_Training]) -> Iterator[str]:
    """At 32 pixels the last map is one pixel: of one image, nothing that a batch norm could take a spread of.

    The quantized network has no batch norms.
    """
    from model.data.sampling import SIZE_STEP, input_sizes

    shared = parameters.start
    for section, given, _ in trainings:
        grows = given.auto_batch_size and shared.device.startswith("cuda")
        if given.batch_size // shared.processes > 1 or grows or section == "quantize.training":
            continue
        if input_sizes(shared.image_size, given.multi_scale)[0] <= SIZE_STEP:
            yield (
                f"{section}.batch_size {given.batch_size} leaves a process one image, too little for batch norm "
                f"at {SIZE_STEP} pixels (start.image_size {shared.image_size}, {section}.multi_scale "
                f"{given.multi_scale:g}); raise batch_size or the image size, or lower multi_scale"
            )


def _layer_fault(parameters: Parameters, training: _Training) -> str:
    """What is wrong with a section's `freeze`; empty for nothing."""
    from model.freezing import matching_layers

    section, given, field = training
    network = _network(parameters, training)
    described = f"YOLO-NAS {getattr(parameters.start, field)} of start.{field}"
    try:
        names = [name for pattern in given.freeze for name in matching_layers(network, pattern)]
    except ValueError as error:  # begins with the field's name
        return f"{section}.{error} ({described})"
    frozen = {f"{name}.{inner}" for name in names for inner, _ in network.get_submodule(name).named_parameters()}
    own = {name for name, _ in network.named_parameters() if not name.startswith(ADAPTERS)}
    return "" if own - frozen else f"{section}.freeze {given.freeze} leaves no layer to train ({described}); name fewer"


def _network(parameters: Parameters, training: _Training) -> YoloNAS:
    """The network in the form in which the section trains it, without memory for its weights."""
    import torch

    import model
    from pipeline_tasks.distillation_task import add_feature_adapters

    variant: Variant = getattr(parameters.start, training.variant_field)
    with torch.device("meta"):
        network = model.build(variant, 1)
        if training.section == "distill" and parameters.distill.feature_weight:
            add_feature_adapters(network, model.build(parameters.start.teacher_variant, 1))
        if training.section == "quantize.training":
            _make_quantized(network, parameters)
    return network


def _make_quantized(network: YoloNAS, parameters: Parameters) -> None:
    from model.quantization.merged_upsampling import merge_upsampling
    from model.quantization.quantize import attach_quantizers

    network.eval().fuse()
    if parameters.quantize.merge_upsampling:
        merge_upsampling(network)
    attach_quantizers(network)
