"""The search for float layers: ranking, bisection, what interacting layers do to it, its bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from model.quantization.selection import LayerCosts, Point, Search, Selection, affordable, rank_layers
from model.quantization.sensitivity import LayerSensitivity

NAMES = [f"layer{index}" for index in range(16)]
COSTS = LayerCosts(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 2.0), 5.0, "profiled")


def sensitivities(**errors: float) -> list[LayerSensitivity]:
    return [LayerSensitivity(name, error) for name, error in errors.items()]


def search(lost: Mapping[str, float], budget: float, evaluations: int = 100) -> tuple[Selection, list[frozenset[str]]]:
    """Search along NAMES where each layer in INT8 loses so much accuracy, and the losses add up."""
    measured = []

    def accuracy(choice: frozenset[str]) -> float:
        measured.append(choice)
        return 1.0 - sum(value for name, value in lost.items() if name not in choice)

    def rank_again(choice: Iterable[str]) -> list[str]:
        return sorted(choice, key=lambda name: -lost.get(name, 0.0))

    return Search(accuracy, 1.0 - budget, evaluations, rank_again).run(NAMES), measured


def chosen(selection: Selection) -> frozenset[str]:
    return selection.chosen([COSTS.total(point.float_layers) for point in selection.points]).float_layers


def test_ranking_is_by_error_per_time_saved_within_the_share() -> None:
    costs = LayerCosts(
        {"cheap": 1.0, "dear": 2.0, "harmless": 1.0}, {"cheap": 2.0, "dear": 10.0, "harmless": 2.0}, 0, "profiled"
    )
    found = sensitivities(cheap=0.3, dear=0.6, harmless=0.0)
    assert rank_layers(found, costs, (), 1.0) == ["cheap", "dear"]
    assert rank_layers(found, costs, (), 0.5) == ["cheap"]  # all would give up 10, dear alone gives up 8
    assert rank_layers(found, costs, ("cheap",), 1.0) == ["dear"]
    assert rank_layers(found, costs, (), 0.0) == []


def test_layers_that_save_nothing_are_free_and_come_first() -> None:
    costs = LayerCosts({"free": 2.0, "saving": 1.0}, {"free": 1.5, "saving": 2.0}, 0, "profiled")
    assert rank_layers(sensitivities(saving=0.2, free=0.1), costs, (), 0.0) == ["free"]
    assert rank_layers(sensitivities(saving=0.2, free=0.1), costs, (), 1.0) == ["free", "saving"]


def test_ranking_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="maximum_float_share"):
        rank_layers([], COSTS, (), 1.5)
    with pytest.raises(ValueError, match="unknown"):
        rank_layers(sensitivities(unknown=0.1), COSTS, (), 1.0)


def test_predicted_costs_follow_the_multiply_adds() -> None:
    costs = LayerCosts.predicted({"a": 0.75, "b": 0.25})
    assert costs.source == "predicted"
    assert (costs.total(()), costs.total(["a"]), costs.total(["a", "b"])) == (0.5, 0.875, 1.0)
    assert costs.saved("a") == 0.375


def test_nothing_stays_in_float_where_ptq_is_good_enough() -> None:
    selection, measured = search({}, 0.01)
    assert selection.met and chosen(selection) == frozenset()
    assert len(measured) == 3, "two further points for the picture"


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 15, 16])
def test_the_shortest_beginning_that_is_good_enough_is_found(needed: int) -> None:
    selection, measured = search(dict.fromkeys(NAMES[:needed], 0.01), 0.005)
    assert selection.met and chosen(selection) == frozenset(NAMES[:needed])
    assert len(measured) == len(set(measured)) <= 2 + 4 + 4 + 1, "no choice is measured twice"


def test_what_turns_out_unneeded_goes_back_to_int8() -> None:
    """The ranking has the one harmful layer behind seven that do no harm beside it."""
    selection, _ = search({NAMES[7]: 0.02}, 0.01)
    assert chosen(selection) == frozenset({NAMES[7]})


def test_a_budget_that_cannot_be_met_is_said_so() -> None:
    selection, measured = search({"elsewhere": 0.5, **dict.fromkeys(NAMES, 0.01)}, 0.01)
    assert not selection.met
    assert chosen(selection) == frozenset(NAMES), "the most accurate"
    assert len(measured) == 3


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5])
def test_measurements_are_bounded_and_the_choice_is_always_a_measured_one(evaluations: int) -> None:
    selection, measured = search(dict.fromkeys(NAMES[:5], 0.01), 0.005, evaluations)
    assert len(measured) == len(selection.points) <= evaluations
    assert chosen(selection) in measured
    assert selection.met == (evaluations > 1)


def test_a_choice_measured_before_is_not_measured_again() -> None:
    known = {frozenset[str](): 0.5}
    selection = Search(lambda _: 1.0, 0.9, 2, sorted, known).run(NAMES[:1])
    assert [point.accuracy for point in selection.points] == [0.5, 1.0]
    with pytest.raises(ValueError, match="selection_evaluations"):
        Search(lambda _: 1.0, 0.9, 0, sorted).run(NAMES)


def test_the_choice_is_by_the_times_given() -> None:
    points = tuple(Point(frozenset(names), accuracy) for names, accuracy in (("", 0.8), ("ab", 0.95), ("abc", 0.9)))
    assert Selection(points, 0.9).chosen([1.0, 3.0, 2.0]) == points[2]
    assert Selection(points, 0.9).chosen([1.0, 2.04, 2.0]) == points[1], "hardly slower, with fewer layers in float"
    assert Selection(points, 0.99).chosen([1.0, 3.0, 2.0]) == points[1], "none is accurate enough"
    assert not Selection(points, 0.99).met


def test_a_layer_that_was_timed_too_long_is_found_all_the_same() -> None:
    """Its time shuts it out of the ranking; along all layers it is found, and its time as a whole is within the cap."""
    hostile = NAMES[3]
    costs = LayerCosts(COSTS.int8, {**COSTS.floating, hostile: 9.0}, 5.0, "profiled")
    found = sensitivities(**{name: 5.0 if name == hostile else 0.01 for name in NAMES})
    ranking, further = (rank_layers(found, costs, (), most) for most in (0.15, 1.0))
    assert hostile not in ranking and hostile == further[0]
    search = Search(lambda choice: 0.9 if hostile in choice else 0.5, 0.85, 10, sorted)
    selection = search.run(ranking, further)
    assert any(point.float_layers == {hostile} for point in selection.points) and len(selection.points) <= 10
    times = [37.0, *(21.0 + len(point.float_layers) for point in selection.points)]
    allowed = affordable(selection.points, costs, (), 0.15, times)
    usable = selection.keeping(allowed)
    own_times = [time for time, is_allowed in zip(times[1:], allowed, strict=True) if is_allowed]
    assert usable.met and usable.chosen(own_times).float_layers == {hostile}


def test_a_choice_that_really_takes_too_long_is_not_allowed() -> None:
    costs = LayerCosts(COSTS.int8, {**COSTS.floating, NAMES[3]: 9.0}, 5.0, "profiled")
    points = [Point(frozenset(NAMES[first:last]), 1.0) for first, last in ((0, 0), (0, 2), (3, 4))]
    assert affordable(points, costs, (), 0.15, [44.0, 21.0, 29.0, 29.0]) == [True, True, False], "3.45 of 23 may go"
    assert affordable(points, costs, (), 0.15, [44.0, 21.0, 29.0, 24.4]) == [True, True, True]
    assert affordable(points, costs, (), 0.15, []) == [True, True, False], "nothing was measured as a whole"
