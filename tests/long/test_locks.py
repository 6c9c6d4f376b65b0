"""Four processes that all want one output, for longer: none of them is ever inside together with another."""

from __future__ import annotations

import pytest

from support.lock_stress import stress

pytestmark = pytest.mark.long


@pytest.mark.parametrize("run", [1, 2])
def test_nobody_is_found_inside(tmp_path, run) -> None:
    met = stress(tmp_path / "out", 4, 15)
    assert met["entries"] >= 10
    assert set(met) <= {"entries", "refused"}, met
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
