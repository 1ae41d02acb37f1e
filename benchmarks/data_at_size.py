"""Data at the size of Objects365: validation without decoding, opening, loader processes, decoding, near duplicates.

    python -m benchmarks.data_at_size run [--share 1.0] [--file FILE.json] [--again] [MEASURE ...]
    python -m benchmarks.data_at_size table

The annotation file is that of annotation_reading.py. Its pictures do not exist; that they do is taken for granted. The
decoding check reads real photographs (NASLINE_SHARED), shrunk to 640 pixels. Processor seconds are those of all threads
of the process; the peak is that of its resident memory, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.annotation_reading import generate
from benchmarks.photo_sets import shared_data
from benchmarks.rows import Rows

LOADERS = 8
HASHES = 100_000
PHOTOGRAPHS, SIDE, ROUNDS = 400, 640, 5
MEASURES = ("validate", "open", "decode", "near_duplicates")


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._began, self._worked = time.perf_counter(), time.process_time()

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Both, rounded to a hundredth."""
        return {
            f"{prefix}seconds": round(time.perf_counter() - self._began, 2),
            f"{prefix}processor_seconds": round(time.process_time() - self._worked, 2),
        }


def validate(file: Path, tables: Path) -> dict[str, float]:
    """Read the file, validate it without decoding and publish its tables below `tables`, in this process."""
    from pipeline_tasks.data.coco import assemble
    from pipeline_tasks.data.coco_files import read_file
    from pipeline_tasks.validation import datasets
    from pipeline_tasks.validation.limits import ValidationLimits

    clock = Clock()
    found = read_file(file.parent, file.name, "train", ("images", "annotations", "categories"))
    classes = {name: int(identifier) for identifier, name in found.categories.items()}
    raw = assemble([found], (), classes, "target", ("train",), "data", "")
    figures = {**clock.figures("read_"), "read_peak_mb": _peak_mb()}
    clock = Clock()
    with mock.patch.object(datasets, "look_for_images", _all_present):
        examined = datasets.examine({"target": raw}, {"target": file.parent}, ValidationLimits(), tables, decode=False)
    assert not examined.broken, examined.broken
    published = examined.published["target"]
    counts = {"images": len(published.images), "boxes": len(published.boxes)}
    return {**counts, **figures, **clock.figures(), "peak_mb": _peak_mb()}


def _all_present(folder: Path, paths: Any) -> Any:
    """What `look_for_images` would find if the generated file's pictures existed."""
    import pyarrow as pa

    from pipeline_tasks.validation.images import FILES_SCHEMA

    columns = {field.name: pa.nulls(len(paths), field.type) for field in FILES_SCHEMA}
    return pa.table({**columns, "file_present": pa.repeat(pa.scalar(True), len(paths))}, schema=FILES_SCHEMA)


def open_tables(tables: Path) -> dict[str, float]:
    """Open the published tables as a training does, then let 8 forked processes go through all boxes at once."""
    from model.data.tables import read_dataset

    clock = Clock()
    image_set = read_dataset(tables / "target").split("train")
    figures = {**clock.figures(), "peak_mb": _peak_mb()}
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(LOADERS), context.Queue()
    loaders = [context.Process(target=_loader, args=(image_set, barrier, answers)) for _ in range(LOADERS)]
    for loader in loaders:
        loader.start()
    found = [answers.get() for _ in loaders]
    for loader in loaders:
        loader.join()
    assert len({total for total, _ in found}) == 1
    memory = {key: sum(one[key] for _, one in found) for key in ("Pss", "Rss", "Private_Dirty")}
    return {**figures, **{f"loaders_{key.lower()}_mb": round(value / 1024) for key, value in memory.items()}}


def _loader(image_set: Any, barrier: Barrier, answers: Any) -> None:
    """Look at every box and every hundredth image; then, while all others still live, at the own memory."""
    columns = image_set._columns
    arrays = (columns.boxes_xywh, columns.labels, columns.scores, columns.is_crowd, columns.area, columns.first_box)
    total = sum(float(array[start : start + 1_000_000].sum()) for array in arrays for start in _starts(array))
    for index in range(0, len(image_set), 100):
        image_set.targets(index), image_set.path(index)
    barrier.wait()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    memory = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    barrier.wait()
    answers.put((total, memory))


def _starts(array: Any) -> range:
    return range(0, len(array), 1_000_000)


def decode(photographs: int = PHOTOGRAPHS, rounds: int = ROUNDS) -> dict[str, float]:
    """Images per processor second that the validation inspects with one thread, the best of the rounds."""
    import cv2

    from pipeline_tasks.validation.images import inspect_images

    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        names = _shrunk_photographs(Path(scratch), photographs)
        best = 0.0
        for _ in range(rounds):
            clock = Clock()
            found = inspect_images(Path(scratch), names, threads=1)
            best = max(best, len(names) / clock.figures()["processor_seconds"])
        assert all(found["decodable"].to_pylist())
        kilobytes = sum(Path(scratch, name).stat().st_size for name in names) / len(names) / 1e3
    return {"images": len(names), "images_per_processor_second": round(best, 1), "kilobytes": round(kilobytes)}


def _shrunk_photographs(folder: Path, count: int) -> list[str]:
    """Copies of real photographs whose longer side has 640 pixels, as JPEG of quality 90."""
    from PIL import Image

    files = [file for one in ("pretrain_general", "unlabeled_general") for file in _jpegs(shared_data() / one)]
    chosen = files[:: max(1, len(files) // count)][:count]
    for number, file in enumerate(chosen):
        with Image.open(file) as image:
            scale = SIDE / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image.convert("RGB").resize(size).save(folder / f"{number}.jpg", quality=90)
    return [f"{number}.jpg" for number in range(len(chosen))]


def _jpegs(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))


def near_duplicates(count: int = HASHES) -> dict[str, float]:
    """Search so many hashes for pairs, by both searches of the product; a hundredth are near another one."""
    import pyarrow as pa

    from pipeline_tasks.data.leaks import Fingerprints, alike
    from pipeline_tasks.validation.twins import similar_pictures

    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, count, np.uint64)
    planted = generator.choice(count, (2, count // 100), replace=False)
    flipped = np.bitwise_or.reduce(np.uint64(1) << generator.integers(0, 64, (8, count // 100), np.uint64), axis=0)
    hashes[planted[1]] = hashes[planted[0]] ^ flipped
    clock = Clock()
    partner, _ = similar_pictures(pa.table({"perceptual_hash": hashes}), 8, count)
    figures = clock.figures("validation_")
    clock = Clock()
    groups = alike(Fingerprints([None] * count, hashes.tolist()))
    figures |= clock.figures("split_")
    found = int((groups[planted[0]] == groups[planted[1]]).sum())
    assert found == count // 100 <= int((partner >= 0).sum())  # of random hashes too, one or two pairs are near
    return {"hashes": count, "pairs": found, **figures}


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(measures: Sequence[str], share: float, given: Path | None, again: bool) -> None:
    """Measure what has no row yet, each in a process of its own."""
    rows = Rows("data_at_size")
    wanted = [_configuration(measure, share) for measure in MEASURES if measure in measures]
    missing = wanted if again else rows.missing(wanted)
    with tempfile.TemporaryDirectory() as scratch:
        tables = Path(scratch, "tables")
        names = [configuration["measure"] for configuration in missing]
        file = given or Path(scratch, "zhiyuan_objv2_train.json")
        if ("validate" in names or "open" in names) and given is None:
            generate(file, share)
        if "open" in names and "validate" not in names:
            _measured("validate", file, tables)
        for configuration in missing:
            figures = _measured(configuration["measure"], file, tables)
            rows.add(configuration, figures)
            print(configuration, figures, flush=True)


def _configuration(measure: str, share: float) -> dict[str, Any]:
    return {"measure": measure, **({"share": share} if measure in ("validate", "open") else {})}


def _measured(measure: str, file: Path, tables: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "measure", measure, "--file", str(file), "--tables", str(tables)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(told.splitlines()[-1]))


def table() -> str:
    """The rows as a Markdown table."""
    lines = ["| measure | share | figures |", "|---|---|---|"]
    for row in Rows("data_at_size").all():
        configuration, figures = row["configuration"], row["figures"]
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in figures.items())
        lines.append(f"| {configuration['measure'].replace('_', ' ')} | {configuration.get('share', '')} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure what is missing")
    runs.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)} (default all)")
    runs.add_argument("--share", type=float, default=1.0, help="of Objects365's size (default %(default)s)")
    runs.add_argument("--file", type=Path, help="the generated file of that share, where it is kept")
    runs.add_argument("--again", action="store_true", help="measure what has a row too")
    single = commands.add_parser("measure", help="one measure in this process, as JSON")
    single.add_argument("measure", choices=MEASURES)
    single.add_argument("--file", type=Path)
    single.add_argument("--tables", type=Path)
    commands.add_parser("table", help="print the table")
    given = parser.parse_args()
    if given.command == "run":
        if unknown := set(given.measures) - set(MEASURES):
            parser.error(f"unknown measure {min(unknown)}; measures are {', '.join(MEASURES)}")
        run(given.measures or MEASURES, given.share, given.file, given.again)
    elif given.command == "table":
        print(table())
    else:
        measures: dict[str, Callable[[], dict[str, float]]] = {
            "validate": lambda: validate(given.file, given.tables),
            "open": lambda: open_tables(given.tables),
            "decode": decode,
            "near_duplicates": near_duplicates,
        }
        print(json.dumps(measures[given.measure]()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
