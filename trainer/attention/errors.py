"""What the attention seam raises when two methods want the same thing."""

from __future__ import annotations


class TakenError(ValueError):
    """What a method wants to edit has an owner already, found out before the edit.

    merges: whether what the owner did can become part of the weights and is then out of the way.
    """

    def __init__(self, thing: str, aspect: str, owner: str, merges: bool = False) -> None:
        super().__init__(f"{aspect} of {thing} belongs to methods.{owner}")
        self.thing, self.aspect, self.owner, self.merges = thing, aspect, owner, merges
