"""How long a large annotation file takes to read, and how much memory: our tables against pycocotools.

The file is generated: records as Objects365 has them (no segmentations), a share of its 1.74 million images and 25.4
million boxes. Each contestant reads it in a process of its own; the peak is that of the process above what it had
after its imports.

    python -m benchmarks.annotation_reading --share 0.1 [--rounds 3] [--file FILE.json]
    python -m benchmarks.annotation_reading --share 1 --only ours
    python -m benchmarks.annotation_reading --table

The contestants take turns; of the rounds the shortest times count. pycocotools needs some 20 GB for the whole file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import Rows

IMAGES, BOXES = 1_742_292, 25_407_598
CLASSES = 365
CONTESTANTS = ("ours", "pycocotools")
WRITTEN_AT_ONCE = 20_000


def generate(file: Path, share: float) -> tuple[int, int]:
    """Write the file; images and boxes in it."""
    generator = np.random.default_rng(0)
    images, boxes = round(IMAGES * share), round(BOXES * share)
    with file.open("w") as out:
        out.write('{"images": [')
        for first in range(0, images, WRITTEN_AT_ONCE):
            rows = range(first, min(first + WRITTEN_AT_ONCE, images))
            out.write((", " if first else "") + ", ".join(map(_image, rows)))
        out.write('], "annotations": [')
        for first in range(0, boxes, WRITTEN_AT_ONCE):
            count = min(WRITTEN_AT_ONCE, boxes - first)
            places = (generator.random((count, 4)) * [1000, 700, 200, 60]).round(10).tolist()
            owners, kinds = generator.integers(1, images + 1, count), generator.integers(1, CLASSES + 1, count)
            records = map(_annotation, range(first + 1, first + count + 1), owners.tolist(), kinds.tolist(), places)
            out.write((", " if first else "") + ", ".join(records))
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        out.write(f'], "categories": {json.dumps(categories)}, "info": {{}}, "licenses": []}}')
    return images, boxes


def _image(row: int) -> str:
    name = f"images/v1/patch{row // 40_000}/objects365_v1_{row:08d}.jpg"
    return f'{{"height": 768, "id": {row + 1}, "license": 5, "width": 1280, "file_name": "{name}", "url": ""}}'


def _annotation(identifier: int, image: int, category: int, box: list[float]) -> str:
    return (
        f'{{"id": {identifier}, "iscrowd": 0, "isfake": 0, "area": {box[2] * box[3]!r}, "isreflected": 0, '
        f'"bbox": {box!r}, "image_id": {image}, "category_id": {category}}}'
    )


def read(contestant: str, file: Path) -> dict[str, float]:
    """Read the file in this process; seconds, and megabytes above what the imports took."""
    if contestant == "ours":
        import pandas  # noqa: F401 (pyarrow loads it when it first makes an array)

        from pipeline_tasks.data.coco import assemble
        from pipeline_tasks.data.coco_files import read_file
    else:
        from pycocotools.coco import COCO
    before, began, worked = _peak_mb(), time.perf_counter(), time.process_time()
    if contestant == "ours":
        found = read_file(file.parent, file.name, "train", ("images", "annotations", "categories"))
        classes = {name: int(identifier) for identifier, name in found.categories.items()}
        raw = assemble([found], (), classes, "data", (), "data", "")
        boxes = len(raw.boxes)
    else:
        with open(os.devnull, "w") as quiet:
            sys.stdout, output = quiet, sys.stdout
            coco = COCO(str(file))
            sys.stdout = output
        boxes = len(coco.anns)
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(time.process_time() - worked, 2),
        "peak_mb": round(_peak_mb() - before),
        "boxes": boxes,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(file: Path, contestants: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """The shortest times and the smallest peak of each contestant, who take turns."""
    found: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            command = [sys.executable, __file__, "--contestant", contestant, "--file", str(file)]
            told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[contestant].append(json.loads(told))
    return {who: {key: min(one[key] for one in turns) for key in turns[0]} for who, turns in found.items()}


def table() -> str:
    """The rows as a Markdown table."""
    lines = ["| reader | share | file | wall | processor | peak |", "|---|---|---|---|---|---|"]
    for row in Rows("annotation_reading").all():
        configuration, figures = row["configuration"], row["figures"]
        lines.append(
            f"| {configuration['reader']} | {configuration['share']:g} | {figures['file_mb']:,} MB | "
            f"{figures['seconds']:.1f} s | {figures['processor_seconds']:.1f} s | {figures['peak_mb']:,} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Generate, let each contestant read, store and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.1, help="of Objects365's size (default 0.1)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each reads it (default 1)")
    parser.add_argument("--only", choices=CONTESTANTS, help="leave out the other one")
    parser.add_argument("--file", type=Path, help="the generated file of that share, where it is kept")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        print(json.dumps(read(given.contestant, given.file)))
    elif given.table:
        print(table())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            file = given.file or Path(scratch, "zhiyuan_objv2_train.json")
            if given.file is None:
                generate(file, given.share)
            _store(file, given.share, measure(file, (given.only,) if given.only else CONTESTANTS, given.rounds))


def _store(file: Path, share: float, found: dict[str, dict[str, float]]) -> None:
    rows, megabytes = Rows("annotation_reading"), round(file.stat().st_size / 1e6)
    for contestant, measured in found.items():
        assert measured["boxes"] == round(BOXES * share)
        figures = {"images": round(IMAGES * share), "file_mb": megabytes, **measured}
        rows.add({"reader": contestant, "share": share}, figures)
        print(
            f"{contestant:12} {megabytes} MB file  {measured['seconds']:7.2f} s, of the processor "
            f"{measured['processor_seconds']:7.2f} s  peak {measured['peak_mb']:6.0f} MB"
        )


if __name__ == "__main__":
    main()
