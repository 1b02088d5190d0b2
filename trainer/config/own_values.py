"""What a recipe says for some backbones alone: its table `families` for every backbone of a family,
above it its table `backbones` for one backbone by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.backbones.families import family_names
from trainer.common.suggest import nearest
from trainer.config.lineage import backbone_names
from trainer.config.run_length import laid_over
from trainer.config.schema import KEYS, RecipeError
from trainer.config.unknown_keys import refuse_unknown

TABLES = ("families", "backbones")


def with_own_values(
    tree: Mapping[str, Any], name: str, family_of: Callable[[], str]
) -> dict[str, Any]:
    """A recipe's tree under the values it has for the family and the name of a backbone, both of
    which its tables say.

    family_of: asked for the family where the recipe has a table of families.
    """
    tree = dict(tree)
    families, backbones = (tree.pop(table, None) or {} for table in TABLES)
    _check_table(families, "families", known=family_names(), what="family")
    _check_table(backbones, "backbones", known=backbone_names(), what="backbone")
    own = _values(families, family_of()) if families else {}
    below = laid_over(tree, _of_methods_in(tree, own))
    return laid_over(below, _values(backbones, name))


def _of_methods_in(tree: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a family without those of methods that the recipe lacks or has removed: what it
    says of `lora` is for every recipe with a LoRA, and brings none to the others."""
    methods = own.get("methods")
    if not isinstance(methods, Mapping):
        return dict(own)
    there = {name for name, value in (tree.get("methods") or {}).items() if value is not None}
    return {**own, "methods": {name: methods[name] for name in methods if name in there}}


def _values(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of a table for one name, over those of the one it gives as its `base`."""
    values = dict(table.get(name) or {})
    return laid_over(table.get(values.pop("base", None)) or {}, values)


def _check_table(tree: Any, table: str, *, known: Sequence[str], what: str) -> None:
    """Raises RecipeError where a table does not map known names to keys of a recipe."""
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{table} is {tree!r}; it maps {what} names to values for each")
    for name, values in tree.items():
        if name not in known and not (what == "backbone" and "/" in name):  # a folder has a slash
            raise RecipeError(f"{table}.{name}: no such {what}{nearest(name, known)}")
        if not isinstance(values, Mapping):
            raise RecipeError(f"{table}.{name} is {values!r}; it takes {', '.join(KEYS[2:])}")
        refuse_unknown(values, ("base", *KEYS[2:]), f"{table}.{name}")
        free = [key for key, own in tree.items() if isinstance(own, Mapping) and "base" not in own]
        if "base" in values and values["base"] not in free:
            raise RecipeError(
                f"{table}.{name}.base is {values['base']!r}; it takes another of this table that "
                f"has no base itself: {', '.join(free) or 'there is none'}"
            )
