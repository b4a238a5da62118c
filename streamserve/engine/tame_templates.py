"""Which chat templates take no longer than their input is long."""

from __future__ import annotations

from jinja2 import nodes

MAX_LOOPS = 3  # one inside of the other: messages, parts or calls, and arguments

_WILD = (nodes.Mul, nodes.Pow)
"""A short input becomes a long one."""


def is_tame(tree: nodes.Template) -> bool:
    """Whether the template only loops over what it is given, a few loops deep, and never recurs.

    Most are: they loop over messages. Of the others it is not known how long they take.
    """
    if any(tree.find_all(_WILD)) or any(loop.recursive for loop in tree.find_all(nodes.For)):
        return False
    called = [call.node for call in tree.find_all(nodes.Call)]
    names = {node.name for node in called if isinstance(node, nodes.Name)}
    if "range" in names or _has_nested_macros(tree):
        return False
    return _depth(tree) <= MAX_LOOPS


def _has_nested_macros(tree: nodes.Template) -> bool:
    """Whether a macro names any macro: it may call itself."""
    macros = list(tree.find_all(nodes.Macro))
    names = {macro.name for macro in macros}
    return any(name.name in names for macro in macros for name in macro.find_all(nodes.Name))


def _depth(node: nodes.Node) -> int:
    inside = max((_depth(child) for child in node.iter_child_nodes()), default=0)
    return inside + isinstance(node, nodes.For)
