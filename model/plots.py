"""Pictures of a training and of a detector's accuracy, each readable on one screen.  matplotlib is loaded lazily."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.average_precision import RECALL_POINTS
from model.calibration import Calibration, Reliability
from model.data.image_set import ImageSet, OpenImage
from model.data.images import write_image
from model.drawing import class_colour, draw_boxes
from model.error_kinds import KINDS, MEANINGS, ErrorKinds
from model.evaluation import DetectionMetrics, Detections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 10  # more classes than these: the extremes in colour, the others grey
MOST_ROWS = 20  # of a confusion matrix; the classes with fewest confusions are summed up
MOST_BARS = 15  # classes in a plot with a bar or a row for each
MOST_LEGEND = 60  # classes
MOST_TAGS = 8  # boxes in a picture that carry their class name; the legend serves crowded ones
TILE_PIXELS = 260
POSITION_COLUMNS = ("epoch", "step", "learning_rate")


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses, mean average precision, AP per class and learning rate over epochs.

    ``history`` holds one row an epoch with ``epoch``, ``learning_rate``, losses, and, in evaluated epochs, the names
    of ``DetectionMetrics.scalars``.  Raises ``ValueError`` for an empty history.
    """
    if not history:
        raise ValueError("no epoch has been recorded yet, so there are no curves to draw")
    names = list(dict.fromkeys(name for row in history for name in row))
    metrics = [name for name in names if name.startswith(("map", "recall", "ap/"))]
    losses = [name for name in names if name not in metrics and name not in POSITION_COLUMNS]
    per_class = [name for name in metrics if name.startswith("ap/")]
    panels: list[tuple[str, list[str]]] = [
        ("Loss", losses),
        ("Validation, all classes", [name for name in ("map50", "map75", "map50_95") if name in metrics]),
        ("Validation, AP50-95 per class", _extremes(history, per_class)),
        ("Learning rate", [name for name in ("learning_rate",) if name in names]),
    ]
    figure = _figure(12, 7)
    for axes, (title, shown) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _draw_history(axes, history, title, shown)
    _save(figure, path)


def _extremes(history: Sequence[Mapping[str, Any]], names: list[str]) -> list[str]:
    """All classes, or the best and the worst ones of the last evaluation where they are many."""
    if len(names) <= MOST_LINES:
        return names
    last = next(row for row in reversed(history) if any(name in row for name in names))
    ranked = sorted(names, key=lambda name: -float(last.get(name, 0.0)))
    return ranked[: MOST_LINES // 2] + ranked[-MOST_LINES // 2 :]


def _draw_history(axes: Axes, history: Sequence[Mapping[str, Any]], title: str, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in names:
        rows = [row for row in history if _is_number(row.get(name))]
        epochs, values = [row["epoch"] for row in rows], [float(row[name]) for row in rows]
        label = f"{name.removeprefix('ap/')}  {values[-1]:.3g}" if values else name
        axes.plot(epochs, values, marker="o" if len(values) < 30 else "", markersize=3, label=label)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylim(0, 1 if title.startswith("Validation") else 1.08 * max(axes.dataLim.ymax, 1e-12))
    if len(names) > MOST_LINES // 2:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif names:
        axes.legend(fontsize=8, loc="best", framealpha=0.7)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
    axes.grid(alpha=0.3)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def precision_recall(metrics: DetectionMetrics, path: Path) -> None:
    """Precision over recall at IoU 0.5 for each class, and their mean."""
    figure = _figure(9, 6.5)
    axes = figure.subplots()
    ranked = sorted(metrics.per_class_ap50, key=lambda name: -metrics.per_class_ap50[name])
    many = len(ranked) > MOST_LINES
    coloured = {*ranked[: MOST_LINES // 2], *ranked[-MOST_LINES // 2 :]} if many else set(ranked)
    for name in ranked:
        label = f"{name}  AP50 {metrics.per_class_ap50[name]:.3f}" if name in coloured else None
        style: dict[str, Any] = {} if name in coloured else {"color": "lightgrey", "linewidth": 0.8, "zorder": 1}
        axes.plot(RECALL_POINTS, metrics.curves[name].precision, label=label, **style)
    if ranked:
        mean = np.mean([metrics.curves[name].precision for name in ranked], axis=0)
        axes.plot(RECALL_POINTS, mean, "k--", linewidth=2.5, label=f"mean of {len(ranked)}  mAP50 {metrics.map50:.3f}")
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    note = f", {MOST_LINES // 2} best and worst named" if many else ""
    axes.set_title(f"Precision and recall at IoU 0.5, {metrics.image_count} images{note}")
    axes.grid(alpha=0.3)
    _save(figure, path)


def confusion_matrix(metrics: DetectionMetrics, path: Path) -> None:
    """Counts at IoU 0.5, shaded by their share of the true class; background means missed or invented boxes."""
    names, counts = _most_confused([*metrics.confusion.class_names, "background"], np.array(metrics.confusion.counts))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    shares[-1] = 0.0  # invented boxes have no true class to be a share of
    side = float(np.clip(3.5 + 0.45 * len(names), 5.5, 9))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        ink = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xlabel="detected", ylabel="true")
    axes.set_title(f"Boxes at IoU 0.5, score at least {metrics.confusion.score_threshold:g}")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _save(figure, path)


def _most_confused(names: list[str], counts: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """The matrix itself, or with all but the most confused classes summed to one where there are many."""
    if len(names) <= MOST_ROWS + 2:
        return names, counts
    classes = counts[:-1, :-1]
    confused = classes.sum(axis=0) + classes.sum(axis=1) - 2 * np.diag(classes)
    missed_or_invented = counts[:-1, -1] + counts[-1, :-1]
    chosen = np.sort(np.lexsort((-missed_or_invented, -confused))[:MOST_ROWS])
    others = np.setdiff1d(np.arange(len(classes)), chosen)
    groups = [[index] for index in chosen] + [others.tolist(), [len(classes)]]
    summed = np.array([[counts[np.ix_(row, column)].sum() for column in groups] for row in groups])
    return [*(names[index] for index in chosen), f"{len(others)} other classes", names[-1]], summed


def calibration(result: Calibration, path: Path) -> None:
    """Precision over score, how many detections lie behind each point, and each class's calibration error."""
    figure = _figure(12, 6)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    upper, lower = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_reliability(upper, result.overall, result.score_threshold)
    edges = np.linspace(0, 1, len(result.overall.detections) + 1)
    lower.bar(edges[:-1], result.overall.detections, np.diff(edges), align="edge", color="tab:blue", edgecolor="white")
    lower.set(xlabel="score", ylabel="detections", xlim=(0, 1), ylim=(0.8, None))
    lower.set_yscale("log")
    lower.axvspan(0, result.score_threshold, color="grey", alpha=0.2)
    _draw_class_errors(right.subplots(), result)
    _save(figure, path)


def _draw_reliability(axes: Axes, overall: Reliability, score_threshold: float) -> None:
    """Bars of precision with their 95 % interval, beside the diagonal of a detector that is as sure as it is right."""
    count, precision = np.array(overall.detections), np.array(overall.precision)
    edges, there = np.linspace(0, 1, len(count) + 1), count > 0
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = _wilson(precision[there], count[there])
    axes.bar(centres[there], precision[there], 1 / len(count), color="tab:blue", edgecolor="white", label="precision")
    axes.errorbar(
        centres[there], precision[there], [precision[there] - low, high - precision[there]],
        fmt="none", ecolor="black", elinewidth=0.8, capsize=2, label="95 % interval",
    )  # fmt: skip
    localized = np.array(overall.localized_precision)
    axes.plot(centres[there], localized[there], "o", color="tab:orange", markersize=4, label="precision x IoU")
    axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="score = precision")
    axes.axvspan(0, score_threshold, color="grey", alpha=0.2, label="below the threshold")
    axes.set(ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    title = f"Scores from {score_threshold:g} on: D-ECE {_three(overall.d_ece)}; bars below the line: too sure"
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def _wilson(share: NDArray[np.float64], count: NDArray[np.int64]) -> tuple[Any, Any]:
    """Ends of the 95 % score interval of a binomial share (Wilson 1927)."""
    z = 1.96
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


def _draw_class_errors(axes: Axes, result: Calibration) -> None:
    """The classes that add most to the whole error; one with few detections adds little, however wrong they are."""
    bins = len(result.overall.detections)
    first = round(result.score_threshold * bins)
    counts = {name: sum(entry.detections[first:]) for name, entry in result.per_class.items()}
    known = {name: entry for name, entry in result.per_class.items() if counts[name]}
    shown = sorted(known, key=lambda name: -known[name].d_ece * counts[name])[:MOST_BARS]
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, [known[name].d_ece for name in shown], 0.4, color="tab:blue", label="D-ECE (precision)")
    axes.barh(
        rows + 0.2, [known[name].la_ece for name in shown], 0.4, color="tab:orange", label="LaECE (precision x IoU)"
    )
    axes.set_yticks(rows, [f"{name} ({counts[name]})" for name in shown], fontsize=9)
    axes.set(xlabel="calibration error", xlim=(0, None), ylim=(max(len(shown), 3) - 0.4, -1.4))
    many = f"{len(shown)} of {len(known)} classes" if len(known) > len(shown) else "Classes"
    axes.set_title(f"{many} (detections); mean LaECE {_three(result.la_ece)}", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", ncols=2)


def _three(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3f}"


def error_kinds(result: ErrorKinds, path: Path) -> None:
    """What each kind of error costs, how many there are, and which classes it costs most."""
    figure = _figure(14, 5.5)
    gains, counts, classes = figure.subplots(1, 3, width_ratios=(1, 0.7, 1.3))
    labels = [f"{kind}\n{MEANINGS[kind]}" for kind in KINDS]
    _draw_bars(gains, labels, [100 * result.gains[kind] for kind in KINDS], "{:.1f}", "tab:blue")
    gains.set_xlabel("mAP50 points gained if these were right")
    gains.set_title(f"Cost: mAP50 is {100 * result.map50:.1f}" if not math.isnan(result.map50) else "Cost", fontsize=11)
    _draw_bars(counts, [""] * len(KINDS), [result.counts[kind] for kind in KINDS], "{:d}", "tab:grey")
    counts.set_xlabel("number of errors")
    counts.set_title(f"Score at least {result.score_threshold:g}, {result.box_count} boxes", fontsize=11)
    _draw_class_gains(classes, result)
    _save(figure, path)


def _draw_bars(axes: Axes, labels: list[str], values: Sequence[float], form: str, colour: str) -> None:
    bars = axes.barh(range(len(values)), np.nan_to_num(values), color=colour)
    axes.bar_label(
        bars, [form.format(value) if math.isfinite(value) else "" for value in values], padding=3, fontsize=9
    )
    axes.set_yticks(range(len(values)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)


def _draw_class_gains(axes: Axes, result: ErrorKinds) -> None:
    """A row for each class, the costliest first."""
    names = sorted(result.gains_per_class, key=lambda name: -sum(result.gains_per_class[name].values()))[:MOST_BARS]
    values = 100 * np.array([[result.gains_per_class[name][kind] for kind in KINDS] for name in names])
    many = (
        f" ({len(names)} costliest of {len(result.gains_per_class)})" if len(result.gains_per_class) > MOST_BARS else ""
    )
    axes.set_title(f"AP50 points gained by class{many}", fontsize=11)
    if not names:
        axes.set_axis_off()
        return
    axes.imshow(values, cmap="Blues", vmin=0, vmax=max(1.0, values.max()), aspect="auto")
    for row, column in np.argwhere(np.abs(values) >= 0.05):
        ink = "white" if values[row, column] > 0.55 * values.max() else "black"
        axes.text(column, row, f"{values[row, column]:.1f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(KINDS)), KINDS, rotation=30, ha="right", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)


def predictions_beside_ground_truth(
    image_set: ImageSet,
    detections: Detections,
    open_image: OpenImage,
    path: Path,
    count: int = 12,
    *,
    score_threshold: float = 0.25,
) -> None:
    """Pairs of pictures, labels left, detections right, spread evenly over the set.

    Only detections of at least ``score_threshold`` are drawn.  Raises ``ValueError`` for an empty set.
    """
    if not len(image_set) or count < 1:
        raise ValueError(f"cannot draw {count} of {len(image_set)} images; at least one is needed")
    confident = detections.select(detections.scores >= score_threshold)
    indices = np.unique(np.linspace(0, len(image_set) - 1, min(count, len(image_set))).round().astype(int))
    pairs = [_pair(image_set, int(index), confident, open_image, score_threshold) for index in indices]
    columns = max(1, round(math.sqrt(len(pairs) / 1.2)))
    rows = [_row(pairs[start : start + columns], columns) for start in range(0, len(pairs), columns)]
    there = confident.labels[np.isin(confident.image_index, indices)]
    shown = np.union1d(there, image_set.subset(indices).all_boxes().labels)[:MOST_LEGEND]
    write_image(path, np.concatenate([*rows, _legend(image_set.class_names, shown.tolist(), rows[0].shape[1])]))


def _pair(
    image_set: ImageSet, index: int, detections: Detections, open_image: OpenImage, score_threshold: float
) -> NDArray[np.uint8]:
    name, image, truth = image_set.path(index), open_image(image_set.path(index)), image_set.boxes(index)
    scale = TILE_PIXELS / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    found, names = detections.of_image(index), image_set.class_names
    few = max(len(found), len(truth)) <= MOST_TAGS
    labelled = draw_boxes(small, truth.boxes_xyxy * scale, truth.labels, names, tags=few)
    detected = draw_boxes(small, found.boxes_xyxy * scale, found.labels, names, found.scores, tags=few)
    left = _tile(labelled, f"{len(truth)} labels  {Path(name).name}")
    return np.concatenate([left, _tile(detected, f"{len(found)} detections, score >= {score_threshold:g}")], axis=1)


def _tile(picture: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """The picture below a caption, centred on white, as wide as every tile."""
    height, width = picture.shape[:2]
    tile = np.full((height + 28, TILE_PIXELS + 6, 3), 255, np.uint8)
    left = (TILE_PIXELS - width) // 2 + 3
    tile[20 : 20 + height, left : left + width] = picture
    _write(tile, caption if len(caption) <= 40 else caption[:37] + "...", 4, 14)
    return tile


def _row(pairs: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Pairs side by side, filled up with white to the tallest and to the full number of columns."""
    height = max(pair.shape[0] for pair in pairs)
    row = np.full((height, columns * pairs[0].shape[1], 3), 255, np.uint8)
    for position, pair in enumerate(pairs):
        left = position * pair.shape[1]
        row[: pair.shape[0], left : left + pair.shape[1]] = pair
    return row


def _legend(class_names: Sequence[str], labels: list[int], width: int) -> NDArray[np.uint8]:
    """The colours of these classes, in as many lines as they need."""
    cell = 20 + max([8 * len(class_names[label]) for label in labels], default=0)
    per_line = max(1, width // cell)
    legend = np.full((8 + 20 * (-(-len(labels) // per_line)), width, 3), 255, np.uint8)
    for position, label in enumerate(labels):
        left, top = 4 + position % per_line * cell, 4 + position // per_line * 20
        cv2.rectangle(legend, (left, top), (left + 12, top + 12), class_colour(label), cv2.FILLED)
        _write(legend, class_names[label], left + 17, top + 11)
    return legend


def _write(canvas: NDArray[np.uint8], text: str, left: int, baseline: int) -> None:
    cv2.putText(canvas, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    """Through the Agg canvas, whatever backend the user has set, and without a date, so that equal plots are equal
    files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, metadata={"Software": None})
