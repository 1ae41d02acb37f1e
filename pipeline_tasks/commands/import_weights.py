"""`nasline import-weights`: a checkpoint of the reference (super-gradients) becomes one of ours."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.output_place import require_place
from pipeline_tasks.text_table import some

if TYPE_CHECKING:
    from torch import Tensor

    from model.checkpoint import CheckpointMetadata
    from model.reference_file import ChannelOrder, ReferenceFile, Section
    from model.reference_weights import Mismatch

log = logging.getLogger(__name__)

VARIANTS = ("n", "s", "m", "l")
UNKNOWN = "unknown"


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Turn a super-gradients checkpoint (.pth) of YOLO-NAS into a checkpoint folder."
    command = commands.add_parser("import-weights", help=text, description=text, allow_abbrev=False)
    command.add_argument("file", type=Path, metavar="FILE.pth")
    command.add_argument("--variant", choices=VARIANTS, required=True, help="size of the network in the file")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    command.add_argument(
        "--class-names", metavar="FILE|A,B,...", help="a name a line, or names with commas between (default: the "
        "file's own; with 80 classes COCO's)",
    )  # fmt: skip
    command.add_argument(
        "--state", choices=("ema_net", "net"), help="which network of the file (default: ema_net where there is one)"
    )
    command.add_argument(
        "--channel-order", choices=("rgb", "bgr"), help="of the training pictures (default: the file's, or rgb)"
    )
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    given = arguments
    import_weights(given.file, given.variant, given.out, given.class_names, given.state, given.channel_order)
    return 0


def import_weights(
    file: Path,
    variant: str,
    out: Path,
    class_names: str | None = None,
    section: Section | None = None,
    channel_order: ChannelOrder | None = None,
) -> CheckpointMetadata:
    """Write the checkpoint folder `out`, whole or not at all, marked with the licence of the published weights.

    Raises:
        DataError: a tensor is missing, unexpected, misshapen, of another type or not finite (every one is logged), or
            the class names do not fit.
        ParameterError: `out` exists or is no possible place, or the class names are not told.
        ValueError: the file is damaged, or holds more than weights.
    """
    from model.checkpoint import save_checkpoint
    from model.reference_file import read_reference_file
    from model.reference_weights import network_of

    require_place("--out", out)
    if out.exists():
        raise ParameterError(f"--out {out} exists; give a folder that does not exist yet")
    found = read_reference_file(file, section)
    _require_fit(file, found.state, variant)
    order = channel_order or found.channel_order or "rgb"
    network = network_of(found.state, variant, order)
    metadata = _metadata(file, variant, _class_names(file, found, network.num_classes, class_names), found)
    save_checkpoint(out, network, metadata)
    log.info(
        "%s of %s is in %s: YOLO-NAS %s, %d classes%s; licence of the weights: %s", found.section, file, out, variant,
        network.num_classes, ", first kernels turned from BGR to RGB" if order == "bgr" else "",
        metadata.lineage["weights"][0],
    )  # fmt: skip
    return metadata


def _require_fit(file: Path, state: dict[str, Tensor], variant: str) -> None:
    """Tell every fault in a line of its own, then refuse."""
    from model.reference_weights import compare, fitting_variants

    mismatch = compare(state, variant)
    if not mismatch:
        return
    for line in mismatch.lines():
        log.warning("%s", line)
    if mismatch.fits_in_shape:
        raise DataError(_fault_of_values(file, mismatch, variant))
    others = fitting_variants(state)
    remedy = f"it fits --variant {others[0]}" if others else "it fits no variant; give a YOLO-NAS detection checkpoint"
    counts = f"{mismatch.counts()} tensors (listed above)"
    raise DataError(f"{file} does not hold the weights of a YOLO-NAS {variant}: {counts}; {remedy}")


def _fault_of_values(file: Path, mismatch: Mismatch, variant: str) -> str:
    """The right network in another arithmetic, or after a training that broke."""
    if mismatch.other_type:
        kinds = sorted({entry.split()[2].rstrip(",") for entry in mismatch.other_type})
        weights_alone = all(entry.endswith("float32") for entry in mismatch.other_type)
        remedy = (
            "save its weights as float32"
            if weights_alone
            else "save each tensor in the type that is needed (listed above)"
        )
        return f"{file} holds a YOLO-NAS {variant} in {', '.join(kinds)}; {remedy}"
    tensors = some(mismatch.not_finite, most=3)
    return f"{file} holds non-finite weights in {tensors}; give a checkpoint from before they became so"


def _class_names(file: Path, found: ReferenceFile, count: int, given: str | None) -> tuple[str, ...]:
    from model.coco_classes import COCO_CLASS_NAMES

    names = _read_names(given) if given is not None else found.class_names
    if names is None and count == len(COCO_CLASS_NAMES):
        log.info("%s names no classes; its 80 are taken for COCO's", file.name)
        names = COCO_CLASS_NAMES
    if names is None:
        raise ParameterError(f"{file} has {count} classes and does not name them; give --class-names")
    if len(names) != count:
        source = "--class-names gives" if given is not None else "it names"
        raise DataError(f"{file} has {count} classes, but {source} {len(names)}; give --class-names for all")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        source = "--class-names" if given is not None else str(file)
        raise DataError(f"{source} names {some(repeated)} more than once; give --class-names with different names")
    return names


def _read_names(given: str) -> tuple[str, ...]:
    """Names from a text file, one a line, or from the option itself."""
    path = Path(given)
    try:
        parts = path.read_text(encoding="utf-8").splitlines() if _is_file(path) else given.split(",")
    except UnicodeDecodeError:
        raise DataError(f"--class-names {given} is no text; give a text file with a name a line") from None
    if any("\0" in name for name in parts):
        raise DataError(f"--class-names {given} is no text; give a text file with a name a line")
    return tuple(name.strip() for name in parts if name.strip())


def _is_file(path: Path) -> bool:
    """False for what is too long for a file's name: a list of names, then."""
    try:
        return path.is_file()
    except OSError:
        return False


def _metadata(file: Path, variant: str, class_names: tuple[str, ...], found: ReferenceFile) -> CheckpointMetadata:
    """Nothing is known of the pictures behind the weights, not even how many, and unknown is not permissive."""
    from model.checkpoint import CheckpointMetadata
    from model.reference_weights import LICENCE

    digest = digests.of_file(file)
    lineage = {"weights": [LICENCE], "annotations": [UNKNOWN], "images": {f"{file.name} {digest[:8]}": {UNKNOWN: 0}}}
    return CheckpointMetadata(
        variant=variant,
        class_names=class_names,
        preprocessing=found.preprocessing,
        step=0,
        parents={"reference_file": digest},
        lineage=lineage,
    )
