"""One Pascal VOC annotation file as plain values with line numbers; entities are refused, whatever they expand to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from pipeline_tasks.errors import DataError

LARGEST_FILE_BYTES = 64 << 20
DEEPEST_ELEMENT = 32
_OF_IMAGE = ("annotation/filename", "annotation/size/width", "annotation/size/height")
_OF_OBJECT = (
    "name", "difficult", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax",
)  # fmt: skip


@dataclass
class VocObject:
    """One <object>: the text of its elements by path, None where there is none."""

    line: int
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class VocAnnotation:
    """One file: the text of the elements above the objects, and the objects."""

    values: dict[str, str] = field(default_factory=dict)
    objects: list[VocObject] = field(default_factory=list)


def read_voc_xml(file: Path) -> VocAnnotation:
    """Parse a file; `DataError` names line and column (not the file) of what is no VOC annotation."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    if len(content) > LARGEST_FILE_BYTES:
        raise DataError(f"has {len(content)} bytes, which is too large for the annotations of one picture")
    return _Parser().parse(content)


class _Parser:
    def __init__(self) -> None:
        self._found = VocAnnotation()
        self._path: list[str] = []
        self._text: list[str] = []
        self._expat = parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._text.append
        parser.EntityDeclHandler = self._refuse_entity
        parser.ExternalEntityRefHandler = self._refuse_reference

    def parse(self, content: bytes) -> VocAnnotation:
        try:
            self._expat.Parse(content, True)
        except expat.ExpatError as error:
            where = f"line {error.lineno}, column {error.offset + 1}"
            raise DataError(f"is broken XML at {where}: {expat.ErrorString(error.code)}") from error
        except (ValueError, LookupError) as error:  # an encoding that expat does not know
            raise DataError(f"is broken XML: {error}") from error
        return self._found

    def _start(self, name: str, _: dict[str, str]) -> None:
        if not self._path and name != "annotation":
            self._refuse(f"begins with <{name:.40}> in place of <annotation>; this is no Pascal VOC file")
        if len(self._path) == DEEPEST_ELEMENT:
            self._refuse(f"nests elements more than {DEEPEST_ELEMENT} deep; this is no Pascal VOC file")
        self._path.append(name)
        if self._path == ["annotation", "object"]:
            self._found.objects.append(VocObject(self._expat.CurrentLineNumber))
        self._text.clear()

    def _end(self, _: str) -> None:
        path, text = "/".join(self._path), "".join(self._text).strip()
        prefix = "annotation/object/"
        if path in _OF_IMAGE:
            self._found.values.setdefault(path.removeprefix("annotation/"), text)
        elif path.startswith(prefix) and path.removeprefix(prefix) in _OF_OBJECT:
            self._found.objects[-1].values.setdefault(path.removeprefix(prefix), text)
        self._path.pop()
        self._text.clear()

    def _refuse_entity(self, name: str, *_: object) -> NoReturn:
        self._refuse(f"declares the entity {name!r:.40}; entities are not accepted, write the text itself")

    def _refuse_reference(self, *_: object) -> NoReturn:
        self._refuse("refers to another file; external entities are not accepted")

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{reason} (line {self._expat.CurrentLineNumber})")
