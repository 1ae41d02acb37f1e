"""By what pictures of sets are known to be equal, without fetching those that stay in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline_tasks import bucket_images
from pipeline_tasks.data.content_digest import file_digests


def picture_digests(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """A digest of each of these pictures of a set that is there, by path: equal digests mean equal bytes.

    It is the MD5 of the file, or the ETag of an object. That mostly is the MD5 too, but not of objects that were
    written in parts or encrypted by a key service: such a picture differs from an equal file.
    """
    bucket = bucket_images.of_folder(folder)
    if bucket is not None:
        return bucket.etags(paths)
    return file_digests(folder, [path for path in paths if (folder / path).is_file()])
