"""The base class of every record that a recipe fills."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
)


class Section(BaseModel):
    """A validator over the whole section begins its message with the field, as in `steps=3 ...`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others of this record, each with what it needs."""
        return {}
