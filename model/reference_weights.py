"""Weights of the reference implementation (super-gradients) in our networks, and ours in the reference's names.

Every tensor is compared with the network by name, shape and type before one is used.  ``model.reference_file`` reads
and writes the files.  The names differ only where a QARepVGG block of the reference carries an idle kernel that its
training form never reads (`rbr_reparam`): it is left out on the way in and filled with zeros on the way out, so that a
strict load succeeds there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model import build
from model.yolo_nas import YoloNAS

VARIANTS = ("n", "s", "m", "l")
"""Variants the reference can hold; for `n` it has the blocks but no published detector."""

LICENCE = "YOLO-NAS License (Deci), non-commercial"
"""Licence of the published weights, as it stands in the lineage of what descends from them."""

RENAME_TABLE: dict[str, str] = {
    # Nasline -> reference, segment by segment of a state-dict key; numbers stay as they are.
    # Backbone
    "backbone": "backbone",
    "stem": "stem",
    "stage1": "stage1",
    "stage2": "stage2",
    "stage3": "stage3",
    "stage4": "stage4",
    "context_module": "context_module",
    # Neck
    "neck": "neck",
    "neck1": "neck1",
    "neck2": "neck2",
    "neck3": "neck3",
    "neck4": "neck4",
    "reduce_skip1": "reduce_skip1",
    "reduce_skip2": "reduce_skip2",
    "reduce_after_concat": "reduce_after_concat",
    "upsample": "upsample",
    "downsample": "downsample",
    # Heads
    "heads": "heads",
    "head1": "head1",
    "head2": "head2",
    "head3": "head3",
    "cls_convs": "cls_convs",
    "reg_convs": "reg_convs",
    "cls_pred": "cls_pred",
    "reg_pred": "reg_pred",
    "seq": "seq",
    # CSP layer and bottleneck
    "blocks": "blocks",
    "bottlenecks": "bottlenecks",
    "conv1": "conv1",
    "conv2": "conv2",
    "conv3": "conv3",
    "cv1": "cv1",
    "cv2": "cv2",
    "alpha": "alpha",
    # Convolution, norm, QARepVGG block
    "branch_3x3": "branch_3x3",
    "branch_1x1": "branch_1x1",
    "post_bn": "post_bn",
    "conv": "conv",
    "bn": "bn",
    "weight": "weight",
    "bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}

LEFT_OUT = re.compile(
    r".*\.rbr_reparam\.(weight|bias)"  # idle until the reference fuses the block
    r"|.*\.id_tensor"  # the identity branch as a kernel
    r"|heads\.(proj_conv|anchor_points|stride_tensor)"  # constants of the box decoding
)
"""Entries of the reference for which the training form has no use."""

COLOUR_KERNELS = ("backbone.stem.conv.branch_3x3.conv.weight", "backbone.stem.conv.branch_1x1.weight")
"""Our names of the kernels that read the picture's channels, axis 1."""

CLASS_PREDICTION = re.compile(r"heads\.head[123]\.cls_pred\.(weight|bias)")


class Mismatch(NamedTuple):
    """How a state dict differs from what a variant needs; keys are the reference's."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]  # with both shapes and types
    other_type: list[str]  # the right shape; with both types
    not_finite: list[str]

    def __bool__(self) -> bool:
        return any(self)

    @property
    def fits_in_shape(self) -> bool:
        """Whether it is this network, whatever its values are."""
        return not (self.missing or self.unexpected or self.misshapen)

    def lines(self) -> list[str]:
        """Every fault in a line of its own."""
        return [f"{kind.replace('_', ' ')}: {entry}" for kind, found in self._asdict().items() for entry in found]

    def counts(self) -> str:
        """``3 missing, 1 misshapen``."""
        return ", ".join(f"{len(found)} {kind.replace('_', ' ')}" for kind, found in self._asdict().items() if found)


def reference_key(key: str) -> str:
    """The reference's name of an entry of our state dict."""
    return ".".join(part if part.isdigit() else RENAME_TABLE[part] for part in key.split("."))


def compare(state: Mapping[str, Tensor], variant: str) -> Mismatch:
    """Compare a state dict in the reference's names with the training form of a variant, entry by entry.

    The class count is taken from the first class prediction.  Takes a quarter of a second: the variant is built without
    memory for its weights.
    """
    with torch.device("meta"):
        needed = build(variant, class_count(state) or 1).state_dict()
    expected = {reference_key(key): value for key, value in needed.items()}
    shared = {key: value for key, value in state.items() if key in expected}
    return Mismatch(
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected and not LEFT_OUT.fullmatch(key)],
        misshapen=[
            f"{key} is {_kind(value)}, needed is {_kind(expected[key])}"
            for key, value in shared.items()
            if value.shape != expected[key].shape
        ],
        other_type=[
            f"{key} is {_type(value)}, needed is {_type(expected[key])}"
            for key, value in shared.items()
            if value.shape == expected[key].shape and value.dtype != expected[key].dtype
        ],
        not_finite=[key for key, value in shared.items() if not bool(torch.isfinite(value).all())],
    )


def class_count(state: Mapping[str, Tensor]) -> int:
    """Number of classes in a state dict of the reference; 0 without any class prediction."""
    rows = (value.shape[0] for key, value in state.items() if CLASS_PREDICTION.fullmatch(key) and value.ndim)
    return next(rows, 0)


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} {_type(value)}"


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def fitting_variants(state: Mapping[str, Tensor]) -> list[str]:
    """The variants that have these tensors, whatever their values are."""
    return [variant for variant in VARIANTS if compare(state, variant).fits_in_shape]


def network_of(state: Mapping[str, Tensor], variant: str, channel_order: Literal["rgb", "bgr"] = "rgb") -> YoloNAS:
    """The network with these weights, training form, evaluation mode, CPU; bit for bit the given values.

    Our networks see RGB.  Of a network that was trained on BGR pictures the two kernels that read the picture are
    turned round, which gives the same outputs for the same picture.

    Raises ValueError when an entry is missing, unexpected, misshapen, of another type or not finite; ``compare`` lists
    them all.
    """
    mismatch = compare(state, variant)
    if mismatch:
        raise ValueError(f"these are not the weights of a YOLO-NAS {variant}: {mismatch.counts()} tensors")
    network = build(variant, class_count(state)).eval()
    ours = {key: state[reference_key(key)] for key in network.state_dict()}
    if channel_order == "bgr":
        ours |= {key: ours[key].flip(1) for key in COLOUR_KERNELS}
    network.load_state_dict(ours)
    return network


def reference_state(network: YoloNAS) -> dict[str, Tensor]:
    """The network's state dict in the reference's names, idle kernels included; the tensors are not copied.

    Raises ValueError for a folded network and for a variant that the reference does not have.
    """
    variant = network.architecture.variant
    if variant not in VARIANTS:
        raise ValueError(f"the reference has no variant {variant}; it has {', '.join(VARIANTS)}")
    if network.fused:
        raise ValueError("a folded network has no training form; give the checkpoint that was trained")
    ours = network.state_dict()
    state = {reference_key(key): value.detach() for key, value in ours.items()}
    for key, kernel in ours.items():
        if key.endswith("branch_3x3.conv.weight"):
            block = reference_key(key.removesuffix(".branch_3x3.conv.weight"))
            state[f"{block}.rbr_reparam.weight"] = torch.zeros_like(kernel)
            state[f"{block}.rbr_reparam.bias"] = torch.zeros(len(kernel), dtype=kernel.dtype)
    return state
