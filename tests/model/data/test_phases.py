"""Two sets one after the other: the right images in the right steps, each pass complete, and exact resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from model.data.phases import PhasedLoader


@dataclass
class Source:
    """Batches that are only their own names: which source, which pass, which place."""

    name: str
    batches_per_epoch: int
    opened: list[str] = field(default_factory=list)

    def __call__(self) -> Source:
        self.opened.append(self.name)
        return self

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[tuple[str, int, int]]:
        for batch in range(start_batch, self.batches_per_epoch):
            yield (self.name if mosaic_enabled else self.name.upper(), epoch, batch)


def _loader(share: float = 0.5, first: int = 3, rest: int = 2, per_epoch: int = 5) -> tuple[PhasedLoader, list[str]]:
    opened: list[str] = []
    sources = (Source("p", first, opened), Source("l", rest, opened))
    return PhasedLoader(sources, per_epoch, share), opened


def _all(loader: PhasedLoader, epochs: int) -> list[tuple[str, int, int]]:
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def test_first_source_then_second_each_pass_complete():
    """4 epochs of 5 steps, half of them: 10 steps on passes of 3, then 10 on passes of 2."""
    loader, opened = _loader()
    loader.plan(4)
    batches = _all(loader, 4)
    assert batches[:10] == [("p", place // 3, place % 3) for place in range(10)]
    assert batches[10:] == [("l", place // 2, place % 2) for place in range(10)]
    assert opened == ["p", "l"]


@pytest.mark.parametrize(("share", "first"), [(0.1, 2), (0.5, 8), (0.77, 12), (0.99, 14), (0.01, 1)])
def test_share_counts_steps_and_may_end_inside_an_epoch(share, first):
    loader, _ = _loader(share)
    loader.plan(3)
    counts = Counter(name for name, _, _ in _all(loader, 3))
    assert (counts["p"], counts["l"]) == (first, 15 - first)


def test_of_a_single_batch_the_second_part_gets_it():
    loader, _ = _loader(per_epoch=1)
    loader.plan(1)
    assert [name for name, _, _ in _all(loader, 1)] == ["l"]


def test_length_cut_short_by_a_budget_moves_the_switch():
    """2.4 epochs of 5 steps are 12: six on each."""
    loader, _ = _loader()
    loader.plan(2.4)
    assert [name for name, _, _ in _all(loader, 3)][:12] == ["p"] * 6 + ["l"] * 6


def test_until_the_length_is_known_all_is_the_first_part():
    loader, opened = _loader()
    assert {name for name, _, _ in _all(loader, 3)} == {"p"}
    assert opened == ["p"]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_any_place_can_be_resumed(share):
    loader, _ = _loader(share)
    loader.plan(4)
    whole = [list(loader.epoch(epoch)) for epoch in range(4)]
    for epoch in range(4):
        for start in range(6):
            resumed, opened = _loader(share)
            resumed.plan(4)
            assert list(resumed.epoch(epoch, start)) == whole[epoch][start:]
            assert len(opened) == len({name for name, _, _ in whole[epoch][start:]})  # no source is opened in vain


def test_an_epoch_left_early_harms_nothing():
    loader, _ = _loader()
    loader.plan(2)
    whole = _all(loader, 2)
    broken_off = loader.epoch(0)
    next(broken_off)
    assert list(loader.epoch(0, 1)) + list(loader.epoch(1)) == whole[1:]


def test_closing_mosaic_reaches_the_source():
    loader, _ = _loader()
    loader.plan(1)
    assert "".join(name for name, _, _ in loader.epoch(0, mosaic_enabled=False)) == "PPLLL"  # 2.5 rounds to even


@pytest.mark.parametrize("share", [0.0, 1.0, float(np.nan)])
def test_a_share_that_leaves_a_part_empty_is_refused(share):
    with pytest.raises(ValueError, match="first_share must be between 0 and 1"):
        _loader(share)
