"""The commands that the pages about data tell the reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline_tasks.__main__ import _parser


@pytest.mark.parametrize("page", ["data.md", "objects365.md"])
def test_every_command_of_the_page_exists(repository: Path, page: str) -> None:
    text = (repository / "docs" / page).read_text(encoding="utf-8")
    lines = re.findall(r"^    (?:\$ )?nasline (.*?)(?: &&.*)?(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(lines) >= 3
    parser = _parser()
    for line in lines:
        words = shlex.split(line.split(" [")[0])
        assert callable(parser.parse_args(words).command_function), line
