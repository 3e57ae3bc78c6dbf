"""Taking a state dict of the optimizer apart: its structure is checked in steps that grow with its length."""

from __future__ import annotations

import pytest
import torch

from admm_nxm.checkpoint import split


class Key:
    """A parameter's key that counts comparisons."""

    compared = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Key.compared += 1
        return isinstance(other, Key) and self.number == other.number


def test_keys_are_looked_up_and_not_searched_for() -> None:
    count = 300
    state_dict = {
        "state": {Key(n): {"step": torch.tensor(1.0), "admm_consensus": torch.zeros(2)} for n in range(count)},
        "param_groups": [{"params": [Key(n) for n in range(count)]}],
    }
    Key.compared = 0
    inner, own, stepped = split(state_dict)
    assert Key.compared <= 10 * count
    assert list(own) == list(stepped) == list(range(count))
    assert all(list(entry) == ["step"] for entry in inner["state"].values())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([0, 1, 0], "its groups name a parameter twice"),
        ([0, 1, 1.0], "its groups name a parameter twice"),
        ([0, [1]], "a parameter in its groups is neither a number nor a name"),
    ],
)
def test_damaged_keys_are_refused(params: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=f"no whole state dict of an optimizer: {message}; save the checkpoint again"):
        split({"state": {}, "param_groups": [{"params": params}]})
