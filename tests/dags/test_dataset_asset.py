"""What `nasline data add` announces to is the asset that the retraining follows."""

from __future__ import annotations

from pipeline_chain import DATASET

from pipeline_tasks.announcement import ASSET


def test_the_announced_asset_is_that_of_the_dags() -> None:
    assert DATASET.name == ASSET
