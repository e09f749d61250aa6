"""Walk JSON values of any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(value: Any, separator: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested objects with its path, such as "bf16.enabled" with the separator "."."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, below in value.items():
        yield from leaves(below, separator, f"{path}{separator}{key}" if path else str(key))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value with each part that is neither an object nor a list changed; tuples become lists."""
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return change(value)
