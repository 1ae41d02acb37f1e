"""Selective quantization: which layers to leave in float, so that accuracy is kept and the least time is given up.

Layers are ranked by their effect on confident predictions (``sensitivity``) per time that INT8 saves on them. If the
errors of layers simply added up, the best choice for any accuracy would be a beginning of that ranking; so the search
is a bisection along it, each step of which measures accuracy with all its layers together. Neither errors nor
times quite add up: the layers of the choice found are ranked again by what each does to errors and time beside the
others, and a second bisection gives back to INT8 what is not needed after all. Every figure of the answer was measured
on the choice as a whole, and the number of such measurements is bounded.

The time that may be given up is capped, first by the times of single layers. One that was measured too long on a busy
machine would shut out the layer that matters most; so where nothing under that cap is accurate enough, the search goes
along all layers, and what it finds counts if its time as a whole keeps within the cap (``affordable``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.quantization.sensitivity import LayerSensitivity

PREDICTED_SPEEDUP = 2.0
"""INT8 over float throughput where no engine was profiled: the ratio of the peaks of a T4's tensor cores (130 TOPS in
INT8, 65 TFLOPS in FP16)."""
SMALLEST_SAVING = 1e-3
"""Share of all saving below which a layer's is taken for this: it is not measured more finely."""
TOLD_APART = 0.1
"""Share of a time by which two must differ to count as different: on a busy machine equal engines differ by 5 %."""
FURTHER_POINTS = 2  # on the frontier, where PTQ is good enough and nothing had to be searched


@dataclass(frozen=True)
class LayerCosts:
    """What each layer takes in INT8 and in float, and what takes time besides.

    source: "profiled", in milliseconds on the CPU at hand, or "predicted" from multiply-adds, in shares of the float
    network's time.
    """

    int8: Mapping[str, float]
    floating: Mapping[str, float]
    other: float
    source: Literal["profiled", "predicted"]

    @classmethod
    def predicted(cls, multiply_add_shares: Mapping[str, float]) -> LayerCosts:
        """A device-free estimate: time follows the multiply-adds, and INT8 is ``PREDICTED_SPEEDUP`` times as fast."""
        int8 = {name: share / PREDICTED_SPEEDUP for name, share in multiply_add_shares.items()}
        return cls(int8, dict(multiply_add_shares), 0.0, "predicted")

    def saved(self, name: str) -> float:
        """What INT8 saves on a layer; never negative."""
        return max(0.0, self.floating[name] - self.int8[name])

    def total(self, float_layers: Collection[str]) -> float:
        """Time of the network with these layers in float, as far as the times of layers add up."""
        layers = (self.floating[name] if name in float_layers else self.int8[name] for name in self.int8)
        return sum(layers) + self.other


@dataclass(frozen=True)
class Point:
    """A choice of float layers, beside those that are in float anyway, and its accuracy: both measured as a whole."""

    float_layers: frozenset[str]
    accuracy: float


@dataclass(frozen=True)
class Selection:
    """Every choice that was measured, in that order, and the accuracy that was wanted."""

    points: tuple[Point, ...]
    wanted: float

    @property
    def met(self) -> bool:
        """Whether any choice is accurate enough."""
        return any(point.accuracy >= self.wanted for point in self.points)

    def keeping(self, allowed: Sequence[bool]) -> Selection:
        """The same with the allowed choices only."""
        points = zip(self.points, allowed, strict=True)
        return Selection(tuple(point for point, is_allowed in points if is_allowed), self.wanted)

    def chosen(self, times: Sequence[float]) -> Point:
        """The fastest choice that is accurate enough, given the time of each; where none is, the most accurate.

        Times within ``TOLD_APART`` of the fastest count as equal; of these the choice with the fewest layers in float.
        """
        pairs = list(zip(self.points, times, strict=True))
        enough = [pair for pair in pairs if pair[0].accuracy >= self.wanted]
        if not enough:
            return min(pairs, key=lambda pair: (-pair[0].accuracy, pair[1]))[0]
        limit = (1 + TOLD_APART) * min(time for _, time in enough)
        return min((point for point, time in enough if time <= limit), key=lambda point: len(point.float_layers))


def rank_layers(
    sensitivities: Iterable[LayerSensitivity], costs: LayerCosts, excluded: Collection[str], most: float
) -> list[str]:
    """Layers that may be left in float, in falling order of error per time given up.

    excluded: layers in float anyway. most: the share, in [0, 1], of what INT8 saves on all other layers that may be
    given up; layers that no longer fit are passed over. Layers without an error are left out. Equal ratios keep the
    order given. Raises ValueError when the cost of a layer is not known.
    """
    if not 0.0 <= most <= 1.0:
        raise ValueError(f"quantize.maximum_float_share must be from 0 to 1, got {most:g}")
    candidates = [layer for layer in sensitivities if layer.name not in excluded and layer.error > 0.0]
    unknown = [layer.name for layer in candidates if layer.name not in costs.int8 or layer.name not in costs.floating]
    if unknown:
        raise ValueError(f"no cost is known for {len(unknown)} layers, such as {unknown[0]}")
    total = sum(costs.saved(name) for name in costs.int8 if name not in excluded)
    least = SMALLEST_SAVING * total
    candidates.sort(key=lambda layer: layer.error / max(costs.saved(layer.name), least, 1e-12), reverse=True)
    ranking, given_up = [], 0.0
    for layer in candidates:
        if given_up + costs.saved(layer.name) <= most * total:
            given_up += costs.saved(layer.name)
            ranking.append(layer.name)
    return ranking


def affordable(
    points: Iterable[Point], costs: LayerCosts, excluded: Collection[str], most: float, times: Sequence[float]
) -> list[bool]:
    """Whether each choice gives up no more than the share ``most`` of what INT8 saves.

    By the sum of its layers, or by what was measured as a whole: ``times`` are those of the float network and of the
    points, the first of which has no layers; empty where nothing was measured. excluded: layers in float anyway.
    """
    budget = most * sum(costs.saved(name) for name in costs.int8 if name not in excluded)
    found = []
    for index, point in enumerate(points):
        within = sum(costs.saved(name) for name in point.float_layers) <= budget * (1 + 1e-9)
        if times and not within:
            floating, int8 = times[:2]
            within = times[1 + index] <= int8 + most * (floating - int8)
        found.append(within)
    return found


@dataclass
class Search:
    """Looks for the fastest choice of float layers that is accurate enough.

    accuracy: measures a choice, higher is better. wanted: the least accuracy. evaluations: how many choices may be
    measured, the empty one included. rank_again: the layers of a choice, those first that matter most beside the rest
    of it.
    """

    accuracy: Callable[[frozenset[str]], float]
    wanted: float
    evaluations: int
    rank_again: Callable[[frozenset[str]], Sequence[str]]
    points: dict[frozenset[str], float] = field(default_factory=dict)

    def run(self, ranking: Sequence[str], further: Sequence[str] = ()) -> Selection:
        """Search along the ranking and, where even all of it is not accurate enough, along a further one.

        Raises ValueError when not even one choice may be measured.
        """
        if self.evaluations < 1:
            raise ValueError(f"quantize.selection_evaluations must be at least 1 to search, got {self.evaluations}")
        self._measure(())
        if self._met(()):
            self._draw(ranking, FURTHER_POINTS)
        else:
            enough = next((layers for layers in (ranking, further) if self._suffices(layers)), None)
            if enough is not None:
                self._narrow(enough)
            else:
                self._draw(ranking, FURTHER_POINTS)
        points = tuple(Point(choice, accuracy) for choice, accuracy in self.points.items())
        return Selection(points, self.wanted)

    def _suffices(self, ranking: Sequence[str]) -> bool:
        if not ranking or not self._can_measure():
            return False
        self._measure(ranking)
        return self._met(ranking)

    def _narrow(self, ranking: Sequence[str]) -> None:
        found = self._bisect(ranking)
        if len(found) > 1 and self._can_measure():
            self._bisect(self.rank_again(frozenset(found)))

    def _bisect(self, ranking: Sequence[str]) -> Sequence[str]:
        """Shortest beginning of the ranking that was found good enough; the whole is known to be, nothing is not."""
        too_few, enough = 0, len(ranking)
        while enough - too_few > 1 and self._can_measure():
            middle = (too_few + enough) // 2
            self._measure(ranking[:middle])
            if self._met(ranking[:middle]):
                enough = middle
            else:
                too_few = middle
        return ranking[:enough]

    def _draw(self, ranking: Sequence[str], points: int) -> None:
        """Measure a few choices more, only to show what accuracy costs."""
        for index in range(points, 0, -1):
            if self._can_measure():
                self._measure(ranking[: len(ranking) * index // points])

    def _can_measure(self) -> bool:
        return len(self.points) < self.evaluations

    def _measure(self, layers: Iterable[str]) -> None:
        choice = frozenset(layers)
        if choice not in self.points:
            self.points[choice] = self.accuracy(choice)

    def _met(self, layers: Iterable[str]) -> bool:
        return self.points[frozenset(layers)] >= self.wanted
