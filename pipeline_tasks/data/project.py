"""`nasline init`: a project of one's own, for those who install Nasline and do not fork it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from pipeline_tasks.data.versioning import dvc_errors
from pipeline_tasks.errors import ConfigurationError, DataError, UsageError
from pipeline_tasks.parameter_file import parameter_file

DVC_SETTINGS = {"analytics": False, "check_update": False, "autostage": False}


def init(folder: Path, remote: str | None = None) -> list[str]:
    """Make `folder` a Git repository and a DVC project with params.yaml, dvc.yaml and .gitignore.

    What is there already stays as it is, so a killed `init` is finished by another one, and an existing repository can
    be used. Returns what was made.

    Raises:
        UsageError: `folder` is a file, or lies inside of another DVC project.
        ConfigurationError: Git or DVC is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder, which need not exist")
    outer = next((above for above in folder.resolve().parents if (above / ".dvc").is_dir()), None)
    if outer is not None:
        raise UsageError(f"{folder} lies inside of the DVC project {outer}; choose a folder outside of it")
    folder.mkdir(parents=True, exist_ok=True)
    templates = files("pipeline_tasks") / "templates"
    parts: dict[str, Callable[[Path], None]] = {
        ".git": lambda path: _git_init(path.parent) if not _in_git(path.parent) else None,
        ".dvc/config": lambda path: _dvc_init(path.parent.parent, remote),
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
    return made


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


def _dvc_init(folder: Path, remote: str | None) -> None:
    """`force` takes over what a killed `dvc init` left; it is called only where there is no configuration."""
    with dvc_errors(folder):
        from dvc.repo import Repo

        subdirectory = not (folder / ".git").exists()
        with Repo.init(str(folder), force=True, subdir=subdirectory) as repo, repo.config.edit() as config:
            config["core"].update(DVC_SETTINGS)
            if remote is not None:
                config["remote"]["storage"] = {"url": remote}
                config["core"]["remote"] = "storage"
