"""JSON Schemas inside other schemas."""

from __future__ import annotations

from typing import Any


def moved(schema: Any, pointer: str) -> Any:
    """The schema with its references to itself as they are where ``pointer`` is its place."""
    if isinstance(schema, list):
        return [moved(item, pointer) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: pointer + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else moved(value, pointer)
        for key, value in schema.items()
    }
