from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data import content_digest
from pipeline_tasks.data.content_digest import default_cache
from pipeline_tasks.data.versioning import add, dataset_digest, dvc_revision
from pipeline_tasks.errors import DataError, TemporaryError, UsageError


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def move_into(project: Path, folder: Any) -> Path:
    target = project / "data" / "set"
    target.parent.mkdir()
    shutil.move(folder.path, target)
    return target


def test_digest_is_the_one_of_dvc_before_and_after_adding(
    project: Path, coco_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = move_into(project, coco_folder)
    (data / "images/ä ö").mkdir()
    (data / "images/ä ö/Ü.txt").write_bytes(b"line\r\n")  # DVC 3 digests bytes, it converts no line ends
    (data / "images.txt").write_text("sorted by the whole path: images.txt comes before images/")
    before = dataset_digest(data)
    added = add(Path("data/set"))
    pointer = (project / "data/set.dvc").read_text()
    assert f"md5: {before}" in pointer
    assert added.digest == before == dataset_digest(data)
    assert (added.files, added.dvc_file) == (17, project / "data/set.dvc")
    assert len(before) == 36  # the longest digest that MLflow accepts
    printed = capsys.readouterr().out
    assert before in printed and "git add data/set.dvc data/.gitignore" in printed and "dvc push" in printed


def test_digest_follows_content_and_not_place_or_time(coco_folder: Any, tmp_path: Path) -> None:
    digest = dataset_digest(coco_folder.path)
    copy = tmp_path / "elsewhere"
    shutil.copytree(coco_folder.path, copy)
    os.utime(copy / "images/train_0.jpg", (1, 1))
    assert dataset_digest(copy) == digest
    (copy / "images/train_0.jpg").rename(copy / "images/train_x.jpg")
    assert dataset_digest(copy) != digest


def test_unchanged_files_are_not_read_again(coco_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in coco_folder.path.rglob("*") if path.is_file()]
    for path in files:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = dataset_digest(coco_folder.path)
    assert default_cache().is_file()
    read: list[str] = []
    digest_file = content_digest._file_md5
    monkeypatch.setattr(content_digest, "_file_md5", lambda state: read.append(state[0]) or digest_file(state))
    assert dataset_digest(coco_folder.path) == first and read == []
    changed = coco_folder.image("val")
    changed.write_bytes(changed.read_bytes()[:-1])
    assert dataset_digest(coco_folder.path) != first and read == [str(changed)]


def test_file_changed_a_moment_ago_is_not_remembered(coco_folder: Any) -> None:
    picture = coco_folder.image("val")
    first = dataset_digest(coco_folder.path)
    status = picture.stat()
    picture.write_bytes(bytes(reversed(picture.read_bytes())))  # same size
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert dataset_digest(coco_folder.path) != first


def test_broken_cache_costs_time_but_no_digest(coco_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    digest = dataset_digest(coco_folder.path)
    default_cache().parent.mkdir(parents=True, exist_ok=True)
    default_cache().write_bytes(b"no database" * 100)
    assert dataset_digest(coco_folder.path) == digest
    assert "every file is digested again" in caplog.text


def test_ignored_files_do_not_count_as_with_dvc(project: Path, coco_folder: Any) -> None:
    data = move_into(project, coco_folder)
    clean = dataset_digest(data)
    (data / "images/Thumbs.db").write_text("litter")
    assert dataset_digest(data) != clean
    (project / ".dvcignore").write_text("# litter\nThumbs.db\n")
    shutil.rmtree(project / ".dvc/tmp", ignore_errors=True)
    assert dataset_digest(data) == clean
    assert not (project / ".dvc/tmp").exists(), "nothing is written into a project that may be read-only"
    assert clean == add(data).digest


def test_revision_is_the_commit_or_dirty(project: Path, coco_folder: Any) -> None:
    data = move_into(project, coco_folder)
    assert dvc_revision(data) is None
    add(data)
    assert dvc_revision(data) is None  # no commit yet
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    assert dvc_revision(data) == git("rev-parse", "HEAD") + "+dirty"  # set.dvc is not in it
    git("add", "data/set.dvc", "data/.gitignore")
    git("commit", "--quiet", "-m", "data")
    assert dvc_revision(data) == dvc_revision(Path("data/set/images")) == git("rev-parse", "HEAD")
    (data / "images/new.jpg").write_bytes(b"new")
    assert dvc_revision(data) == git("rev-parse", "HEAD") + "+dirty"


def test_folder_outside_is_copied_in_with_to(project: Path, coco_folder: Any) -> None:
    with pytest.raises(
        UsageError, match=r"outside of a DVC project; copy it in with `nasline data add .* --to data/tar"
    ):
        add(coco_folder.path)
    for path in (coco_folder.path, coco_folder.path / "images"):
        path.chmod(0o555)  # a read-only original must not make a read-only copy
    added = add(coco_folder.path, to=Path("data/copy"))
    assert added.digest == dataset_digest(coco_folder.path) == dataset_digest(project / "data/copy")
    assert (project / "data/copy.dvc").is_file() and os.access(project / "data/copy/images", os.W_OK)
    assert add(coco_folder.path, to=Path("data/copy")).digest == added.digest  # once more: nothing to do
    (project / "data/copy/images/more.jpg").write_bytes(b"more")
    with pytest.raises(DataError, match="exists with other content"):
        add(coco_folder.path, to=Path("data/copy"))
    for path in (coco_folder.path / "images", coco_folder.path):
        path.chmod(0o755)


def no_images(project: Path, data: Path) -> Path:
    shutil.rmtree(data / "images")
    return data


def no_folder(project: Path, data: Path) -> Path:
    return data / "nothing"


def tracked_by_git(project: Path, data: Path) -> Path:
    git("add", "--force", str(data))
    return data


def linked_images(project: Path, data: Path) -> Path:
    (data / "images").rename(project / "pictures")
    (data / "images").symlink_to(project / "pictures")
    return data


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_images, "holds no pictures"),
        (no_folder, "is not a folder"),
        (tracked_by_git, "DVC cannot work with .*already tracked by SCM"),
        (linked_images, "images is a link to .*pictures, outside of the dataset"),
    ],
)
def test_what_dvc_cannot_track_is_refused_with_one_sentence(
    project: Path, coco_folder: Any, damage: Callable[[Path, Path], Path], sentence: str
) -> None:
    data = damage(project, move_into(project, coco_folder))
    with pytest.raises(DataError, match=sentence) as refusal:
        add(data)
    assert "\n" not in str(refusal.value)
    assert not (project / "data/set.dvc").exists()


def test_links_are_followed_on_demand_and_only_into_a_copy(project: Path, coco_folder: Any) -> None:
    data = linked_images(project, move_into(project, coco_folder))
    with pytest.raises(DataError, match="images is a link to a folder, which DVC does not follow"):
        add(data, allow_links=True)
    add(data, to=project / "data/copy", allow_links=True)
    assert (project / "data/copy/images/val_0.jpg").is_file()
    assert not list((project / "data/copy").rglob("*.dvc")) and not (project / "data/copy/images").is_symlink()


def test_busy_project_is_a_temporary_error(project: Path, coco_folder: Any) -> None:
    from dvc.repo import Repo

    data = move_into(project, coco_folder)
    with Repo() as repo, repo.lock, pytest.raises(TemporaryError, match="another DVC command"):
        add(data)


def test_digest_of_a_missing_folder_tells_how_to_pull(project: Path, coco_folder: Any) -> None:
    data = move_into(project, coco_folder)
    add(data)
    shutil.rmtree(data)
    with pytest.raises(DataError, match=r"run `dvc pull .*set.dvc`"):
        dataset_digest(data)


def test_no_dvc_project_no_revision(coco_folder: Any) -> None:
    assert dvc_revision(coco_folder.path) is None


def test_digest_of_a_real_set_equals_that_of_dvc(project: Path, shared: Path) -> None:
    added = add(shared / "data/bccd", to=Path("data/bccd"))
    assert added.digest == dataset_digest(shared / "data/bccd")
