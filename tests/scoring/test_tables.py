"""Tables of values that were damaged, or made by somebody else."""

from __future__ import annotations

import pytest

from shape_moe.errors import DataError
from shape_moe.scoring.scores import read_scores

HEAD = "Layer,Expert_ID,Total_Activations,Shapley_Value\n"


@pytest.mark.parametrize(
    ("layer", "expert"),
    [
        ("0", "2000000000"),
        ("0", "99999999999999999999999"),
        ("0", "inf"),
        ("0", "nan"),
        ("0", "-1"),
        ("0", "0.5"),
        ("inf", "1"),
        ("0.5", "1"),
        ("-3", "1"),
        ("99999999999999999999999", "1"),
    ],
)
def test_numbers_of_layers_and_experts_are_numbers_that_there_can_be(tmp_path, layer, expert) -> None:
    file = tmp_path / "values.csv"
    file.write_text(f"{HEAD}0,0,5,0.5\n{layer},{expert},5,0.5\n")
    with pytest.raises(DataError, match=r"values\.csv"):
        read_scores(file)
