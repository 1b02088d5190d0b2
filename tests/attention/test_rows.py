"""Groups of batch rows: found by name or by what one alone has, joined and split in order."""

from __future__ import annotations

import pytest
import torch

from trainer.attention.rows import Group, Rows

EDIT = Rows.of(("source/cond", "target/uncond", "target/cond"), 2)


def test_groups_stand_in_order() -> None:
    assert EDIT.slices == {
        "source/cond": slice(0, 2),
        "target/uncond": slice(2, 4),
        "target/cond": slice(4, 6),
    }
    assert Rows((Group("target", "cond", 3), Group("source", "cond", 1))).slices == {
        "target/cond": slice(0, 3),
        "source/cond": slice(3, 4),
    }


def test_a_role_that_one_group_alone_has_is_enough() -> None:
    assert EDIT.find("target/cond") == slice(4, 6)
    assert EDIT.find("source") == slice(0, 2)
    assert EDIT.find("uncond") == slice(2, 4)


@pytest.mark.parametrize(
    ("role", "groups"), [("cond", "source/cond, target/cond"), ("target", "target/uncond, targe")]
)
def test_a_role_of_several_groups_is_refused(role: str, groups: str) -> None:
    with pytest.raises(ValueError, match=f"{role!r} are those of several groups; .* {groups}"):
        EDIT.find(role)


def test_an_unknown_role_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"the role 'source'; groups of this call: target/cond$"):
        Rows.of(("target/cond",), 1).find("source")
    with pytest.raises(ValueError, match="groups of this call: none"):
        Rows().find("cond")


@pytest.mark.parametrize("name", ["cond", "target", "target/negative", "other/cond", "cond/target"])
def test_a_group_of_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' names no group of rows"):
        Rows.of((name,), 1)


def test_a_group_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="named twice in target/cond, target/cond"):
        Rows.of(("target/cond", "target/cond"), 1)


def test_parts_are_joined_by_branch_or_by_group_and_split_again() -> None:
    source, target, other = (torch.full((2, 3), float(value)) for value in range(3))
    joined = EDIT.join({"source": source, "target": target})
    assert joined[:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    joined = EDIT.join({"source": source, "target": target, "target/cond": other})
    assert joined[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    parts = EDIT.split(joined)
    assert list(parts) == ["source/cond", "target/uncond", "target/cond"]
    assert torch.equal(parts["target/cond"], other) and torch.equal(parts["source/cond"], source)
