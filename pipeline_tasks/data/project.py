"""`nasline init`: a project of one's own, for those who install Nasline and do not fork it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from pipeline_tasks.data.versioning import dvc_errors, dvc_remote
from pipeline_tasks.errors import ConfigurationError, DataError, UsageError
from pipeline_tasks.parameter_file import parameter_file

DVC_SETTINGS = {"analytics": False, "check_update": False, "autostage": False}


def init(folder: Path, remote: str | None = None) -> list[str]:
    """Make `folder` a Git repository and a DVC project with params.yaml, dvc.yaml and .gitignore.

    What is there already stays as it is, so a killed `init` is finished by another one, and an existing repository can
    be used. Returns what was made.

    Raises:
        UsageError: `folder` is a file, lies inside of another DVC project, or has another remote already.
        ConfigurationError: Git or DVC is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder, which need not exist")
    outer = next((above for above in folder.resolve().parents if (above / ".dvc").is_dir()), None)
    if outer is not None:
        raise UsageError(f"{folder} lies inside of the DVC project {outer}; choose a folder outside of it")
    if remote is not None:
        _check_remote(folder, remote)
    folder.mkdir(parents=True, exist_ok=True)
    templates = files("pipeline_tasks") / "templates"
    parts: dict[str, Callable[[Path], None]] = {
        ".git": lambda path: _git_init(path.parent) if not _in_git(path.parent) else None,
        ".dvc/config": lambda path: _dvc_init(path.parent.parent),
        "params.yaml": lambda path: _write(path, parameter_file()),
        "dvc.yaml": lambda path: _write(path, (templates / "dvc.yaml").read_text(encoding="utf-8")),
        ".gitignore": lambda path: _write(path, (templates / "gitignore").read_text(encoding="utf-8")),
        "data/.gitignore": lambda path: _write(
            path, "# the sets themselves are DVC's: data/NAME.dvc names their content\n"
        ),
    }
    made = []
    for name, make in parts.items():
        if not (folder / name).exists():
            make(folder / name)
            made += [name] if (folder / name).exists() else []
    if remote is not None and _default_remote(folder) is None:
        _set_remote(folder, remote)
        made.append("the remote")
    return made


def _check_remote(folder: Path, remote: str) -> None:
    """Before anything is made: an address that DVC takes, and no other than the project has."""
    if not remote or (remote.startswith("s3:") and not re.match(r"s3://[^/]", remote)) or not _known_to_dvc(remote):
        raise UsageError(f"--remote {remote!r} must be a folder or s3://BUCKET/PREFIX")
    present = _default_remote(folder)
    if present is not None and present != (remote if "://" in remote else os.path.abspath(remote)):
        raise UsageError(
            f"{folder} has the remote {dvc_remote(folder / 'data')} already; leave out --remote, or change it with "
            "`dvc remote modify`"
        )


def _known_to_dvc(address: str) -> bool:
    with dvc_errors(Path(address)):
        from dvc.config import Config, ConfigError

        try:
            Config.validate({"remote": {"storage": {"url": address}}})
        except ConfigError:
            return False
    return True


def _default_remote(folder: Path) -> str | None:
    """The address of the remote that an existing project pushes to."""
    if not (folder / ".dvc" / "config").is_file():
        return None
    with dvc_errors(folder):
        from dvc.config import Config

        config = Config(str(folder.resolve() / ".dvc"))
        address = config["remote"].get(config["core"].get("remote"), {}).get("url")
    return None if address is None else str(address)


def _set_remote(folder: Path, remote: str) -> None:
    with dvc_errors(folder):
        from dvc.repo import Repo

        with Repo(str(folder)) as repo, repo.config.edit() as config:
            config["remote"]["storage"] = {"url": remote}
            config["core"]["remote"] = "storage"


def _write(path: Path, text: str) -> None:
    """In one piece: a killed command leaves no half file that the next one would keep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.incoming")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _in_git(folder: Path) -> bool:
    return any((above / ".git").exists() for above in (folder.resolve(), *folder.resolve().parents))


def _git_init(folder: Path) -> None:
    try:
        subprocess.run(["git", "init", "--quiet", str(folder)], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigurationError("Git is not installed; install it, DVC keeps versions with it") from None
    except subprocess.CalledProcessError as error:
        raise DataError(f"Git cannot make a repository of {folder}: {error.stderr.strip()}") from None


def _dvc_init(folder: Path) -> None:
    """`force` takes over what a killed `dvc init` left; it is called only where there is no configuration."""
    with dvc_errors(folder):
        from dvc.repo import Repo

        subdirectory = not (folder / ".git").exists()
        with Repo.init(str(folder), force=True, subdir=subdirectory) as repo, repo.config.edit() as config:
            config["core"].update(DVC_SETTINGS)
