"""`nasline data`: sets of images and boxes, from a folder of anything to a validated, versioned, split set."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from pipeline_tasks.commands import data_announce, data_validate
from pipeline_tasks.errors import UsageError

log = logging.getLogger(__name__)

PICTURES = 60
NEAR_BITS = 8
"""model.data.near_duplicates.NEAR_BITS, which a parser need not load OpenCV for; a test compares them."""


def add_to(commands: Any) -> None:
    """Add the group of commands to the parser's subcommands."""
    text = "Datasets: version, list, show, compare, split, merge and export them."
    group = commands.add_parser("data", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    for add in (_add_add, _add_list, _add_show, _add_diff, _add_split, _add_merge, _add_export, _add_gc):
        add(group)
    data_validate.add_to(group)
    data_announce.add_to(group)


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", metavar="NAME", help="format of the folder; without it, it is recognised")


def _add_add(group: Any) -> None:
    command = group.add_parser("add", help="Version a dataset folder with DVC and print its digest.")
    command.add_argument("path", type=Path, metavar="PATH")
    command.add_argument("--to", type=Path, metavar="DIR", help="copy a folder from outside the repository to here")
    text = "follow links that lead out of the folder; a copy (--to) holds what they point to"
    command.add_argument("--allow-links", action="store_true", help=text)
    text = "the pictures stay in this bucket, in place of the folder images/; they are cached while they are used"
    command.add_argument("--images", metavar="s3://BUCKET/PREFIX", help=text)
    command.add_argument("--no-announce", action="store_true", help="do not tell Airflow of the new version")
    _add_format(command)
    command.set_defaults(command_function=_add)


def _add(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.announcement import announce_added
    from pipeline_tasks.data.versioning import add

    added = add(arguments.path, arguments.to, arguments.format, arguments.allow_links, arguments.images)
    if not arguments.no_announce:
        announce_added(added.path)
    return 0


def _add_list(group: Any) -> None:
    command = group.add_parser("list", help="List the sets of this DVC project, with what is in them.")
    command.add_argument("where", type=Path, nargs="?", default=Path(), metavar="DIR", help="a folder of the project")
    command.set_defaults(command_function=_list)


def _list(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.listing import list_sets, text

    print(text(list_sets(arguments.where)))
    return 0


def _add_show(group: Any) -> None:
    command = group.add_parser("show", help="Write a page with pictures and their boxes, counts and histograms.")
    command.add_argument("set", metavar="PATH", help="folder of a set, or FOLDER@REVISION")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    command.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help=f"at most (default {PICTURES})")
    _add_format(command)
    command.set_defaults(command_function=_show)


def _show(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.page.document import write_page
    from pipeline_tasks.data.sets import open_set
    from pipeline_tasks.data.versioning import require_new

    if arguments.pictures < 0:
        raise UsageError(f"--pictures {arguments.pictures} must not be negative")
    require_new(arguments.out)
    with open_set(arguments.set, arguments.format) as opened:
        print(f"open {write_page(opened, arguments.out, arguments.pictures)}")
    return 0


def _add_diff(group: Any) -> None:
    text = "Compare two versions of a set: images, boxes, classes."
    command = group.add_parser("diff", help=text, description=text + " A version is a folder or FOLDER@REVISION.")
    command.add_argument("before", metavar="A")
    command.add_argument("after", metavar="B")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the whole comparison here")
    _add_format(command)
    command.set_defaults(command_function=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.comparison import compare, text, to_json
    from pipeline_tasks.data.sets import open_set
    from pipeline_tasks.workspace import write_json

    if arguments.json and (arguments.json.is_dir() or arguments.json.parent.is_file()):
        raise UsageError(f"--json {arguments.json} is no place for a file; give the name of a file in a folder")
    with open_set(arguments.before, arguments.format) as before, open_set(arguments.after, arguments.format) as after:
        found = compare(before, after)
    if arguments.json:
        write_json(arguments.json, to_json(found))
    print(text(found))
    return 0


def _add_split(group: Any) -> None:
    text = "Divide a set into train, val and test, so that no picture is in two of them."
    command = group.add_parser("split", help=text, description=text)
    command.add_argument("set", metavar="PATH", help="folder of a set, or FOLDER@REVISION")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="DIR", help="folder to write (COCO layout), which must not exist")
    where.add_argument(
        "--check", action="store_true", help="write nothing: report leaks between the splits as they are"
    )
    command.add_argument(
        "--by", default="hash", choices=("hash", "group", "stratified"), help="default: hash of the name"
    )
    command.add_argument(
        "--shares", default="0.8,0.1,0.1", metavar="A,B,C", help="train, val, test (default %(default)s)"
    )
    text = (
        "what stays together: folder, sequence (names that differ in their last number), or a pattern: '(film[0-9]+)'"
    )
    command.add_argument("--group", metavar="KEY", help=text)
    text = f"pictures that look alike to N of 64 bits stay together (default {NEAR_BITS}); -1: only equal files"
    command.add_argument("--near-bits", type=int, default=NEAR_BITS, metavar="N", help=text)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives another division")
    _add_format(command)
    command.set_defaults(command_function=_split)


def _split(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.bucket_images import shared_list
    from pipeline_tasks.data import leaks, splitting
    from pipeline_tasks.data.sets import open_set
    from pipeline_tasks.data.versioning import require_new
    from pipeline_tasks.data.writers import write_folder

    near_bits = None if arguments.near_bits < 0 else arguments.near_bits
    rule = splitting.SplitRule(arguments.by, _shares(arguments.shares), arguments.group, near_bits, arguments.seed)
    with open_set(arguments.set, arguments.format) as opened:
        if arguments.check:
            print(leaks.text(splitting.leaks_of(opened, near_bits)))
            return 0
        require_new(arguments.to)
        division = splitting.divide(opened, rule)
        listed_in = shared_list([opened.folder])
        written = write_folder(division.raw, opened.folder, arguments.to, listed_in=listed_in)
    print(splitting.text(division, arguments.to))
    _tell_lost(written.lost)
    return 0


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--shares {text!r} must be three numbers: train,val,test such as 0.8,0.1,0.1") from None
    return train, val, test


def _tell_lost(lost: Any) -> None:
    for entry in lost:
        log.warning("%s", entry)


def _add_merge(group: Any) -> None:
    text = "Join sets to one, their classes by name."
    command = group.add_parser("merge", help=text, description=text)
    command.add_argument("sets", nargs="+", metavar="PATH", help="folders of sets, or FOLDER@REVISION")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    text = "where the sets' classes differ: those of all (union), those all have (common), or those of the first"
    command.add_argument("--classes", default="same", choices=("same", "union", "common", "first"), help=text)
    command.add_argument("--map", type=Path, metavar="FILE", help="YAML, `old name: new name`; null drops a class")
    command.set_defaults(command_function=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from pipeline_tasks.bucket_images import shared_list
    from pipeline_tasks.data import merging
    from pipeline_tasks.data.sets import open_set
    from pipeline_tasks.data.versioning import require_new
    from pipeline_tasks.data.writers import write_folder

    require_new(arguments.to)
    class_map = merging.read_class_map(arguments.map) if arguments.map else None
    with ExitStack() as stack:
        sets = [stack.enter_context(open_set(one)) for one in arguments.sets]
        listed_in = shared_list([one.folder for one in sets])
        merged = merging.merge(sets, arguments.classes, class_map)
        written = write_folder(merged.raw, merged.folders, arguments.to, listed_in=listed_in)
    print(merging.text(merged, arguments.to))
    _tell_lost(written.lost)
    return 0


def _add_export(group: Any) -> None:
    text = "Write a set in another format; what the format cannot hold is listed."
    command = group.add_parser("export", help=text, description=text)
    command.add_argument("set", metavar="PATH", help="folder of a set, or FOLDER@REVISION")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    command.add_argument("--format", required=True, metavar="NAME", help="to write: coco, yolo, voc or objects365")
    command.add_argument("--from", dest="given_format", metavar="NAME", help="of PATH; without it, it is recognised")
    command.set_defaults(command_function=_export)


def _export(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.sets import open_set
    from pipeline_tasks.data.versioning import require_new
    from pipeline_tasks.data.writers import WRITABLE, write_folder

    if arguments.format not in WRITABLE:
        raise UsageError(f"--format {arguments.format} cannot be written; choose one of {', '.join(WRITABLE)}")
    require_new(arguments.to)
    with open_set(arguments.set, arguments.given_format) as opened:
        written = write_folder(opened.raw, opened.folder, arguments.to, arguments.format)
    print(f"{written.folder}: {written.images} images, {written.boxes} boxes as {written.format}")
    _tell_lost(written.lost)
    return 0


def _add_gc(group: Any) -> None:
    text = "Find what killed commands and forgotten versions left: half-added sets, orphans in cache and remote."
    command = group.add_parser("gc", help=text, description=text)
    command.add_argument("where", type=Path, nargs="?", default=Path(), metavar="DIR", help="a folder of the project")
    command.add_argument("--remote", metavar="NAME", help="look at this DVC remote too")
    text = "keep the sets that runs of this workspace began with (may be given again)"
    default = os.environ.get("NASLINE_WORKSPACE", ".nasline")
    command.add_argument("--workspace", action="append", metavar="DIR", help=f"{text}; default {default}")
    command.add_argument("--delete", action="store_true", help="remove what was found")
    command.set_defaults(command_function=_gc, default_workspace=default)


def _gc(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.garbage import collect, project_of, text

    for given in arguments.workspace or ():
        if "://" not in given and not Path(given).is_dir():
            raise UsageError(f"--workspace {given} is not a folder; the sets of its runs could not be kept")
    usual = arguments.default_workspace  # of the current folder and, where that is not the project's, of the project
    workspaces = arguments.workspace or dict.fromkeys([usual, _below(project_of(arguments.where), usual)])
    found = collect(arguments.where, workspaces, arguments.remote, arguments.delete)
    print(text(found, arguments.delete))
    return 0


def _below(project: Path, workspace: str) -> str:
    return workspace if "://" in workspace else str(project / workspace)
