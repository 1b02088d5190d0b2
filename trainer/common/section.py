"""The base class of every record that a recipe fills."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
)
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A validator over the whole section begins its message with the field, as in `steps=3 ...`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others of this record, each with what it needs."""
        return {}


def keys_of(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a record by the keys that a user gives: a field whose key is a word of Python's
    own, as `from`, has it as its alias."""
    return {field.alias or name: field for name, field in record.model_fields.items()}
