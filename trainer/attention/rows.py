"""Which rows of a batch belong together: ordered groups, each with a branch and a text role.

A sampler or a loss calls the denoiser once for several groups of rows. A group's branch says whose
latents its rows are: `target` is what is generated or trained on, `source` what an edit starts
from. Its text role says which text they see: `cond` the prompt, `uncond` the empty or negative one,
`given` that one too, and beside it the conditions other than text that `cond` has and `uncond` has
not.

    rows = Rows.of(("target/uncond", "target/cond"), count=2)
    output = denoiser(rows.join({"target": x_t}), ...)    # x_t (2, c, h, w), the input (4, c, h, w)
    cond = rows.split(output)["target/cond"]              # (2, c, h, w)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TARGET_BRANCH, SOURCE_BRANCH = "target", "source"
BRANCHES = (TARGET_BRANCH, SOURCE_BRANCH)
TEXTS = ("cond", "uncond", "given")


@dataclass(frozen=True)
class Group:
    """`count` adjacent rows of a batch, of one branch and one text role."""

    branch: str
    text: str
    count: int

    @property
    def name(self) -> str:
        return f"{self.branch}/{self.text}"


@dataclass(frozen=True)
class Rows:
    """The groups of one call of the denoiser, in the order of their rows."""

    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], count: int) -> Rows:
        """Groups of `count` rows each, by names such as `target/cond`.

        Raises:
            ValueError: an unknown branch or text role, or a group named twice.
        """
        for name in names:
            branch, _, text = name.partition("/")
            if branch not in BRANCHES or text not in TEXTS:
                raise ValueError(
                    f"{name!r} names no group of rows; give <branch>/<text>, with a branch of "
                    f"{', '.join(BRANCHES)} and a text of {', '.join(TEXTS)}"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"a group of rows is named twice in {', '.join(names)}")
        parts = (name.split("/") for name in names)
        return cls(tuple(Group(branch, text, count) for branch, text in parts))

    def of_clips(self, frames: int) -> Rows:
        """The same groups where a clip of so many rows, its frames, is one row."""
        return Rows(tuple(replace(group, count=group.count // frames) for group in self.groups))

    @property
    def slices(self) -> dict[str, slice]:
        """Name of each group to its rows."""
        found, start = {}, 0
        for group in self.groups:
            found[group.name] = slice(start, start + group.count)
            start += group.count
        return found

    def find(self, role: str) -> slice:
        """The rows of a group, by its name or by a branch or text role that it alone has.

        Raises:
            ValueError: no group, or more than one, has the role.
        """
        slices = self.slices
        if role in slices:
            return slices[role]
        found = [group.name for group in self.groups if role in (group.branch, group.text)]
        if len(found) > 1:
            raise ValueError(
                f"the rows of {role!r} are those of several groups; ask for one of "
                f"{', '.join(found)}"
            )
        if not found:
            known = ", ".join(slices) or "none"
            raise ValueError(f"no batch rows have the role {role!r}; groups of this call: {known}")
        return slices[found[0]]

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One tensor of all rows, in order, from one for each group's name or branch."""
        own = [
            parts[group.name] if group.name in parts else parts[group.branch]
            for group in self.groups
        ]
        return own[0] if len(own) == 1 else torch.cat(own)

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """The rows of each group, by its name."""
        return {name: joined[rows] for name, rows in self.slices.items()}
