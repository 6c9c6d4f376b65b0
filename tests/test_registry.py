"""Registries of named parts: order, collisions, entry points."""

from __future__ import annotations

import pytest

from shape_moe import registry
from shape_moe.errors import UsageError
from shape_moe.registry import Registry


class Point:
    """An entry point."""

    def __init__(self, name: str, load) -> None:
        self.name, self.value, self.load = name, f"{name}_package:part", load


def first() -> None: ...


def second() -> None: ...


@pytest.fixture
def points(monkeypatch):
    """Give a group entry points."""
    groups: dict[str, list[Point]] = {}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, []))
    return groups


def test_parts_are_found_by_name(points) -> None:
    parts: Registry[int] = Registry("part", "group", ())
    parts.add("b", 2, second)
    parts.add("a", 1, first)
    assert list(parts.all().items()) == [("b", 2), ("a", 1)]
    assert parts.get("a") == 1
    with pytest.raises(UsageError, match="There is no part 'c'; there are a, b"):
        parts.get("c")


def test_two_functions_of_one_name_are_refused_by_both_their_names(points) -> None:
    parts: Registry[int] = Registry("part", "group", ())
    parts.add("a", 1, first)
    parts.add("a", 1, first)
    with pytest.raises(UsageError, match=r"Two parts are called 'a': .*\.first and .*\.second"):
        parts.add("a", 2, second)
    assert parts.get("a") == 1


def test_entry_points_of_the_own_group_add_parts_once(points) -> None:
    parts: Registry[int] = Registry("part", "group", ())
    loads = []

    def load() -> None:
        loads.append(1)
        parts.add("theirs", 7, first)

    points["group"] = [Point("theirs", load)]
    points["other"] = [Point("alien", lambda: pytest.fail("another group"))]
    assert parts.get("theirs") == parts.all()["theirs"] == 7
    assert loads == [1]


def test_an_entry_point_that_takes_a_name_is_refused(points) -> None:
    parts: Registry[int] = Registry("part", "group", ())
    parts.add("a", 1, first)
    points["group"] = [Point("a", lambda: parts.add("a", 2, second))]
    with pytest.raises(UsageError, match="Two parts are called 'a'"):
        parts.all()


def test_broken_packages_do_not_take_the_others_down(points, caplog) -> None:
    parts: Registry[int] = Registry("part", "group", ())

    def broken() -> None:
        raise ImportError("No module named 'missing'")

    points["group"] = [Point("broken", broken), Point("whole", lambda: parts.add("whole", 1, first))]
    assert parts.all() == {"whole": 1}
    assert "Part broken of broken_package:part cannot be loaded: No module named 'missing'" in caplog.text
