"""A person moves the champion: what is refused, what is written down, and that doing it twice does it once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from tracked_runs import ACCEPTED, REJECTED, Registry

from pipeline_tasks.commands import champion
from pipeline_tasks.errors import ConfigurationError, DataError, TemporaryError, UnavailableError, UsageError
from pipeline_tasks.promotion import carry_out, plan_promotion, plan_rollback
from pipeline_tasks.tracking import champions, mirror, registered
from pipeline_tasks.tracking.champions import ChampionMovedError, Compared, move_champion
from pipeline_tasks.tracking.client import connect, one_line
from pipeline_tasks.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, tracking_store: str, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace of its own, beside the tests' registry."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store)
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def registry(workspace: Workspace, tmp_path: Path, request: pytest.FixtureRequest) -> Registry:
    """A model of its own with three accepted versions and no champion."""
    registry = Registry(connect(workspace), tmp_path / "registered", request.node.name[:80])
    for _ in range(3):
        registry.add()
    return registry


def promote(workspace: Workspace, registry: Registry, version: str, because: str = "better", by: str = "ada") -> None:
    carry_out(workspace, plan_promotion(workspace, registry.name, version), by, because)


def rollback(workspace: Workspace, registry: Registry, to: str | None = None, because: str = "worse") -> None:
    carry_out(workspace, plan_rollback(workspace, registry.name, to), "ada", because)


def printed(workspace: Workspace, name: str) -> str:
    """What `nasline champion NAME` prints."""
    model = registered.model(workspace, name)
    assert model.champion is not None
    return "\n".join(champion.lines(model, registered.version(workspace, name, model.champion)))


def test_a_promotion_writes_down_who_when_why_and_the_version_before(workspace: Workspace, registry: Registry) -> None:
    promote(workspace, registry, "1", "first")
    promote(workspace, registry, "2", "sees small cells; 'better'", by="bob")
    assert registry.champion == "2"
    first, second = registry.log()
    assert (first["version"], first["before"], first["by"]) == ("1", None, "ada")
    assert (second["version"], second["before"], second["kind"]) == ("2", "1", "promote")
    tags = registry.client.get_model_version(registry.name, "2").tags
    assert tags["nasline.champion.because"] == "sees small cells; 'better'"
    assert (tags["nasline.champion.by"], tags["nasline.champion.before"]) == ("bob", "1")
    assert tags["nasline.champion.since"] == second["at"]
    said = printed(workspace, registry.name)
    assert "v2, champion since 20" in said and "(promote, by bob): sees small cells; 'better'" in said
    assert "promote by ada: first" in said
    assert f"verdict             {ACCEPTED}" in said
    assert "p99 2.00 ms; int8, openvino 2026.4.1, 64 px, batch 1, 2 threads, 20 runs on Some CPU" in said
    assert "79 CC BY 4.0, 3 unknown (target 1234abcd)" in said


def test_promoting_twice_moves_once(workspace: Workspace, registry: Registry) -> None:
    promote(workspace, registry, "1")
    promote(workspace, registry, "1", "again")
    assert len(registry.log()) == 1


def test_what_the_gate_refused_or_another_hand_registered_is_no_champion(
    workspace: Workspace, registry: Registry
) -> None:
    rejected, foreign = registry.add(passed=False), registry.add(ours=False)
    registry.client.set_model_version_tag(registry.name, rejected, "nasline.verdict", ACCEPTED)  # edited: no help
    with pytest.raises(DataError) as refused:
        promote(workspace, registry, rejected)
    assert str(refused.value).endswith(f"v{rejected} did not pass the gate ({REJECTED}); it cannot be champion")
    with pytest.raises(DataError, match=f"v{foreign} was not made by nasline"):
        promote(workspace, registry, foreign)
    assert registry.champion is None and registry.log() == []


def test_a_version_whose_files_are_gone_is_no_champion(workspace: Workspace, registry: Registry) -> None:
    (registry.folder / f"{registry.name}-2" / "artifacts" / "bundle" / "gate" / "verdict.json").unlink()
    with pytest.raises(DataError, match=r"v2 lacks gate/verdict\.json in the artifact store; choose another version"):
        promote(workspace, registry, "2")


def test_wrong_names_are_told_in_a_sentence(workspace: Workspace, registry: Registry) -> None:
    for wrong in ("9", "1; rm"):
        with pytest.raises(DataError, match=f"has no version '{wrong}'; it has 1, 2, 3"):
            promote(workspace, registry, wrong)
    with pytest.raises(DataError, match=f"model 'nobody' is not in the registry at .*{registry.name}"):
        plan_promotion(workspace, "nobody", "1")
    with pytest.raises(UsageError, match="--reason is empty"):
        promote(workspace, registry, "1", " ")
    with pytest.raises(UsageError, match=f"has no champion to roll back; use `nasline promote {registry.name} VERS"):
        rollback(workspace, registry)


def test_a_rollback_goes_to_the_champion_before_and_again_nowhere(
    workspace: Workspace, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    for version in registry.versions:
        promote(workspace, registry, version)
    rollback(workspace, registry)
    assert registry.champion == "2"
    rollback(workspace, registry)
    assert "was rolled back from v3 already; to go further back name the version with --to" in caplog.text
    assert registry.champion == "2" and len(registry.log()) == 4
    rollback(workspace, registry, to="1")
    promote(workspace, registry, "3")
    rollback(workspace, registry)
    assert registry.champion == "1"


def test_a_rollback_from_the_first_champion_or_to_a_stranger_is_refused(
    workspace: Workspace, registry: Registry
) -> None:
    promote(workspace, registry, "1")
    with pytest.raises(UsageError, match="v1 is the first champion; there is none before it"):
        rollback(workspace, registry)
    with pytest.raises(DataError, match=f"v2 never was champion, only v1; use `nasline promote {registry.name} 2`"):
        rollback(workspace, registry, to="2")


def test_an_alias_moved_by_another_hand_is_said_and_no_guess_is_made(workspace: Workspace, registry: Registry) -> None:
    registry.client.set_registered_model_alias(registry.name, "champion", "3")
    assert "moved without nasline" in printed(workspace, registry.name)
    with pytest.raises(UsageError, match=r"nobody wrote down which version .* name it with --to VERSION"):
        rollback(workspace, registry)
    rollback(workspace, registry, to="1")
    assert registry.champion == "1" and registry.log()[-1]["before"] == "3"


def test_a_move_that_broke_off_is_made_by_the_same_call(
    workspace: Workspace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        promote(workspace, registry, version)

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    broken = connect(workspace)
    monkeypatch.setattr(broken, "set_registered_model_alias", power_cut)
    with pytest.raises(KeyboardInterrupt):
        move_champion(broken, workspace, registry.name, "1", "rollback", "ada", "x")
    assert registry.champion == "2"
    rollback(workspace, registry)
    assert registry.champion == "1"


def test_a_rollback_behind_a_promotion_that_broke_off_does_not_bring_the_bad_version_back(
    workspace: Workspace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        promote(workspace, registry, version)
    rollback(workspace, registry)
    broken = connect(workspace)
    monkeypatch.setattr(broken, "set_registered_model_alias", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        move_champion(broken, workspace, registry.name, "3", "promote", "ada", "x")
    assert "v1, champion; a move to v3 broke off at 20" in printed(workspace, registry.name)
    rollback(workspace, registry)
    assert registry.champion == "1"


def test_of_two_moves_at_once_the_second_knows_of_the_first(workspace: Workspace, registry: Registry) -> None:
    promote(workspace, registry, "1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda version: promote(workspace, registry, version), ("2", "3")))
    _, first, second = registry.log()
    assert (first["before"], second["before"]) == ("1", first["version"])
    assert registry.champion == second["version"]


def test_two_rollbacks_planned_at_once_make_one(
    workspace: Workspace, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    for version in registry.versions:
        promote(workspace, registry, version)
    plans = [plan_rollback(workspace, registry.name) for _ in range(2)]
    with caplog.at_level("INFO"):
        for plan in plans:
            carry_out(workspace, plan, "ada", "worse")
    assert registry.champion == "2" and len(registry.log()) == 4
    assert f"nothing to do: {registry.name} v2 is champion already" in caplog.text


def test_a_clock_that_is_behind_keeps_the_order(
    workspace: Workspace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        promote(workspace, registry, version)
    behind = Mock(wraps=champions.datetime)
    behind.now.return_value = datetime(2020, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(champions, "datetime", behind)
    rollback(workspace, registry)
    assert [move["version"] for move in registry.log()] == ["1", "2", "1"]


def test_a_reason_is_one_line_that_a_terminal_may_show_and_mlflow_keeps(
    workspace: Workspace, registry: Registry
) -> None:
    promote(workspace, registry, "1", 'two\nlines \x1b[2J\x00" | `$(date)`' + '"\x01' * 5000, by="ada\n" * 500)
    (move,) = registry.log()
    assert move["because"].startswith('two lines [2J " | `$(date)`"') and move["because"].isprintable()
    tags = registry.client.get_registered_model(registry.name).tags
    assert all(len(value) < 5000 for value in tags.values())


def test_a_number_is_read_as_the_registry_writes_it(workspace: Workspace, registry: Registry) -> None:
    promote(workspace, registry, "01")
    promote(workspace, registry, "1")
    assert registry.champion == "1" and len(registry.log()) == 1
    with pytest.raises(DataError, match="has no version '²'"):
        promote(workspace, registry, "²")


def test_tags_and_models_of_other_hands_do_not_stop_the_commands(
    workspace: Workspace, registry: Registry, nasline: Callable[..., str]
) -> None:
    promote(workspace, registry, "1")
    registry.client.set_registered_model_tag(registry.name, "nasline.champion.note", "ours!")
    rollback(workspace, registry, to="1")
    other = Registry(registry.client, registry.folder, f"{registry.name}-other")
    registry.client.set_registered_model_alias(other.name, "champion", other.add(ours=False))
    said = nasline("champion", code=0)
    assert f"{registry.name} v1, champion since 20" in said
    assert f"{other.name} is left out: {other.name} v1 was not made by nasline" in said
    assert "was not made by nasline" in nasline("champion", other.name, code=65)


def test_an_artifact_store_that_is_away_is_no_missing_file(
    workspace: Workspace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = MlflowException("HTTPConnectionPool(host='store', port=40404): Max retries exceeded")
    monkeypatch.setattr(mlflow.artifacts, "load_dict", Mock(side_effect=away))
    with pytest.raises(UnavailableError, match="port=40404"):
        promote(workspace, registry, "1")


def test_a_password_in_the_servers_address_is_told_nowhere(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cr:t@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UnavailableError) as refused:
        plan_promotion(workspace, "cells", "1")
    assert "s3cr" not in str(refused.value) and "registry at http://127.0.0.1:9 does" in str(refused.value)
    assert mirror.address(workspace, "1", "2") == "http://127.0.0.1:9/#/experiments/1/runs/2"
    assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == "true"
    assert one_line(ValueError("postgresql://u:p@ss@db/x is\naway")) == "postgresql://db/x is away"


@pytest.mark.parametrize("address", ["htp://u:s3cr@x", "mssql+nodriver://u:s3cr@127.0.0.1:9/db"])
def test_an_address_that_mlflow_cannot_use_is_told(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises((ConfigurationError, UnavailableError)) as refused:
        plan_promotion(workspace, "cells", "1")
    assert "MLFLOW_TRACKING_URI" in str(refused.value) and "s3cr" not in str(refused.value)


def test_a_database_that_is_damaged_is_told(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.db").write_text("not a database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/damaged.db")
    with pytest.raises(UnavailableError, match="file is not a database"):
        plan_promotion(workspace, "cells", "1")


def test_a_registry_that_is_away_is_told(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UnavailableError, match=r"the model registry at http://127\.0\.0\.1:9 does not answer"):
        plan_promotion(workspace, "cells", "1")


def test_an_empty_registry_is_told(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(DataError, match="is empty; `nasline register` puts the first version there"):
        plan_rollback(workspace, "cells")
    with pytest.raises(DataError, match="has no champion yet; `nasline register` makes the first"):
        champion.only_model(workspace)
    assert not (tmp_path / "none.db").exists()


def test_the_commands(nasline: Callable[..., str], workspace: Workspace, registry: Registry) -> None:
    nasline("promote", registry.name, 1, "--reason=-x", "--by", "bob", code=0)
    said = nasline("promote", registry.name, 2, "--reason", "x", "--dry-run", code=0)
    assert f"promote {registry.name} v2 ({ACCEPTED}); the champion is {registry.name} v1" in said
    assert '"before": "1", "kind": "promote"' in said
    assert "--reason is empty" in nasline("promote", registry.name, 2, "--reason", " ", "--dry-run", code=2)
    assert "v1 is the first champion" in nasline("rollback", registry.name, "--reason", "x", code=2)
    assert [(move["version"], move["because"], move["by"]) for move in registry.log()] == [("1", "-x", "bob")]


def gated(workspace: Workspace, registry: Registry, version: str, compared: str | None) -> champions.Move | None:
    """What `register` does with an accepted version."""
    client = connect(workspace)
    against = Compared(compared)
    return move_champion(client, workspace, registry.name, version, "register", "nasline", ACCEPTED, against)


def test_a_gate_that_compared_with_another_champion_moves_nothing(workspace: Workspace, registry: Registry) -> None:
    assert gated(workspace, registry, "1", None) is not None
    with pytest.raises(ChampionMovedError, match=r"compared with no champion, and there is one by now \(it is v1"):
        gated(workspace, registry, "2", None)
    promote(workspace, registry, "3")
    with pytest.raises(ChampionMovedError, match=f"v1, .* no longer .it is v3.*promote {registry.name} 2"):
        gated(workspace, registry, "2", "1")
    assert registry.champion == "3" and len(registry.log()) == 2
    assert gated(workspace, registry, "3", "1") is None, "it is champion already: the same call again"
    assert gated(workspace, registry, "2", "3") is not None
    assert registry.champion == "2"


def test_a_decision_about_another_champion_moves_nothing(
    nasline: Callable[..., str], workspace: Workspace, registry: Registry
) -> None:
    def ask(command: str, *words: object, code: int = 65) -> str:
        return nasline(command, *words, "--reason", "x", code=code)

    ask("promote", registry.name, 1, "--instead-of", "none", code=0)
    too_late = f"the champion of {registry.name} is v1, but v2 was to be the first; nothing was moved"
    assert too_late in ask("promote", registry.name, 2, "--instead-of", "none")
    ask("promote", registry.name, 2, "--instead-of", "01", code=0)
    assert "is v2, but v3 was to replace v1" in ask("promote", registry.name, 3, "--instead-of", 1)
    assert "is v2, but v3 was to replace v1" in ask("promote", registry.name, 3, "--instead-of", 1, "--dry-run")
    assert "is v2, but v1 was to replace v3" in ask("rollback", registry.name, "--instead-of", 3)
    assert "champion already" in ask("promote", registry.name, 2, "--instead-of", 1, code=0), "done by an earlier try"
    assert registry.champion == "2" and len(registry.log()) == 2
    plan = plan_promotion(workspace, registry.name, "3")
    promote(workspace, registry, "1")
    with pytest.raises(ChampionMovedError, match=f"is v1, but v3 was to replace v2.*nasline champion {registry.name}"):
        carry_out(workspace, plan, "ada", "better", instead_of="2")


def test_of_two_workspaces_the_one_whose_alias_is_moved_under_its_hands_stops(
    workspace: Workspace, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = connect(workspace)
    tag = slow.set_model_version_tag

    def tag_while_another_moves(*arguments: str) -> None:
        monkeypatch.setattr(slow, "set_model_version_tag", tag)
        promote(Workspace(tmp_path / "another"), registry, "2")
        tag(*arguments)

    monkeypatch.setattr(slow, "set_model_version_tag", tag_while_another_moves)
    with pytest.raises(TemporaryError, match="another workspace moved the champion"):
        move_champion(slow, workspace, registry.name, "1", "register", "nasline", ACCEPTED, Compared(None))
    assert registry.champion == "2"
