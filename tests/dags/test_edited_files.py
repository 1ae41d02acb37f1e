"""Files that were edited between the steps, by the typed commands: neither the gate nor `register` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import known_engines
import pytest
from known_engines import Known
from typed_chain import Terminal, errors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DIGITS = list("0123456789")


@contextmanager
def edited(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    yield
    file.write_bytes(before)


def registered(terminal: Terminal) -> list[Path]:
    return list(terminal.workspace.glob("steps/register/*/registration.json"))


def ready(terminal: Terminal, run: str, *options: str, engine: Known, mark: int) -> None:
    """A run that has come as far as the gate, with this engine."""
    terminal.nasline("start", "--run", run, "--params", "params.yaml", "--start.dataset", str(terminal.data / "target"),
                     "--export.nms_sweeps", str(mark), *options)  # fmt: skip
    terminal.nasline("validate_data", "--run", run)
    if mark == 1:
        known_engines.publish_before_export(terminal, run)
    known_engines.publish_export(terminal, run, engine, mark)
    terminal.nasline("export", "--run", run)


def test_what_was_edited_is_neither_judged_nor_registered(tmp_path: Path, small_digits: Path) -> None:
    terminal = Terminal(tmp_path / "edited", small_digits)
    ready(terminal, "good", engine=Known(DIGITS), mark=1)
    engine = terminal.published("good", "export") / "engine"
    with edited(engine / "model.float.onnx", (engine / "model.onnx").read_bytes()):
        (sentence,) = errors(terminal.nasline("gate", "--run", "good", code=65))
        assert "engine/model.float.onnx was changed after it was published" in sentence
    terminal.nasline("gate", "--run", "good")
    content = bytearray((engine / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    with edited(engine / "model.onnx", bytes(content)):
        (sentence,) = errors(terminal.nasline("register", "--run", "good", code=65))
        assert f"{engine}/model.onnx was changed" in sentence and f"remove the folder {engine.parent}" in sentence
    assert not registered(terminal)

    ready(terminal, "bad", "--gate.minimum_map", "0.9", engine=Known(DIGITS[:1]), mark=2)
    terminal.nasline("gate", "--run", "bad", code=99)
    gate = terminal.published("bad", "gate")
    verdict = json.loads((gate / "verdict.json").read_text())
    passed = {**verdict, "passed": True, "rules": [{**rule, "passed": True} for rule in verdict["rules"]]}
    with edited(gate / "verdict.json", json.dumps(passed).encode()):
        for step in ("gate", "register"):
            (sentence,) = errors(terminal.nasline(step, "--run", "bad", code=65))
            assert f"{gate}/verdict.json was changed" in sentence and "run the step gate again" in sentence
    assert not registered(terminal)
    terminal.nasline("register", "--run", "bad", code=99)
    (told,) = registered(terminal)
    assert json.loads(told.read_text())["registered"] is False
