"""Flags of a settings class, by field."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints


def flags_of(config: type, field_prefix: str = "", flag_prefix: str = "") -> dict[str, str]:
    """Return every flag, without dashes, by the path of its field (checkpoint.async by checkpoint.in_background)."""
    hints, kinds = get_type_hints(config, include_extras=True), get_type_hints(config)
    flags = {}
    for field in fields(config):
        path, flag = field_prefix + field.name, flag_prefix + _name_of(field.name, hints[field.name])
        if is_dataclass(kinds[field.name]):
            flags |= flags_of(kinds[field.name], f"{path}.", f"{flag}.")
        else:
            flags[path] = flag
    return flags


def _name_of(field: str, hint: Any) -> str:
    """Return the last part of a field's flag: the name that tyro.conf.arg gives it, or the field's own."""
    named = (getattr(extra, "name", None) for extra in get_args(hint)[1:])
    return next((name for name in named if isinstance(name, str)), field.replace("_", "-"))
