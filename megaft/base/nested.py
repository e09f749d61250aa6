"""Walk JSON values of any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(value: Any, separator: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every leaf of nested dicts, such as "bf16.enabled" with the separator "."."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, child in value.items():
        yield from leaves(child, separator, f"{path}{separator}{key}" if path else str(key))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value with `change` applied to every leaf of its dicts and lists; tuples become lists."""
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return change(value)
