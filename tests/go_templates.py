"""Go's text/template, as much of it as our templates use, and nothing else: an unknown word is an error.

What is supported: text, `{{-` and `-}}`, `range` over a field with or without index and element, `if`,
`else if`, `else`, `end`, variables declared and assigned, fields, `$.Field`, parentheses, strings, integers,
and the functions eq, ne, not, len, slice, index and printf with %s.
"""

import json
import re
from typing import Any

ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
TOKEN = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|\d+|:=|=|,|\(|\)|\$?\.\w+|\$\w*|\w+|\S)""", re.DOTALL)


def render(source: str, messages: list[dict[str, str]]) -> str:
    """What the template writes of `.Messages`, each with `.Role` and `.Content`."""
    nodes, rest = parse(pieces(source), 0, top=True)
    assert rest == len(pieces(source))
    listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    root = {"Messages": listed}
    out: list[str] = []
    execute(nodes, root, {"$": root}, out)
    return "".join(out)


def pieces(source: str) -> list[tuple[str, Any]]:
    """Text and actions in order, trimmed where the marks say so."""
    found: list[tuple[str, Any]] = []
    position, trim = 0, False
    for match in ACTION.finditer(source):
        text = source[position : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        found.append(("text", text.rstrip(" \t\r\n") if match[1] else text))
        found.append(("action", TOKEN.findall(match[2].strip())))
        position, trim = match.end(), bool(match[3])
    text = source[position:]
    found.append(("text", text.lstrip(" \t\r\n") if trim else text))
    assert "{{" not in "".join(text for kind, text in found if kind == "text")
    return found


def parse(found: list[tuple[str, Any]], at: int, top: bool = False) -> tuple[list[Any], int]:
    """Nodes up to an `else` or `end` that belongs to who asks."""
    nodes: list[Any] = []
    while at < len(found):
        kind, value = found[at]
        if kind == "action" and value[0] in ("else", "end"):
            assert not top
            return nodes, at
        if kind == "action" and value[0] in ("if", "range"):
            node, at = block(found, at, value)
            nodes.append(node)
        else:
            nodes.append((kind, value))
            at += 1
    assert top, "an `end` is missing"
    return nodes, at


def block(found: list[tuple[str, Any]], at: int, value: list[str]) -> tuple[Any, int]:
    inside, at = parse(found, at + 1)
    otherwise: list[Any] = []
    end = found[at][1]
    if end[:2] == ["else", "if"]:
        node, at = block(found, at, end[1:])
        return (value[0], value[1:], inside, [node]), at
    if end == ["else"]:
        otherwise, at = parse(found, at + 1)
    assert found[at][1] == ["end"]
    return (value[0], value[1:], inside, otherwise), at + 1


def execute(nodes: list[Any], dot: Any, names: dict[str, Any], out: list[str]) -> None:
    declared: list[str] = []
    for kind, value, *branches in nodes:
        if kind == "text":
            out.append(value)
        elif kind == "if":
            execute(branches[0 if truth(pipeline(value, dot, names)) else 1], dot, names, out)
        elif kind == "range":
            loop(value, branches, dot, names, out)
        elif len(value) > 1 and value[1] in (":=", "="):
            assert (value[0] in names) is (value[1] == "="), value
            names[value[0]] = pipeline(value[2:], dot, names)
            declared += [value[0]] if value[1] == ":=" else []
        else:
            found = pipeline(value, dot, names)
            assert isinstance(found, (str, int)), value
            out.append(str(found))
    for name in declared:  # they are known to the end of their block
        del names[name]


def loop(
    value: list[str], branches: list[Any], dot: Any, names: dict[str, Any], out: list[str]
) -> None:
    named: list[str] = []
    if ":=" in value:
        named, value = [value[0], value[2]], value[4:]
    for number, element in enumerate(pipeline(value, dot, names)):
        names.update(zip(named, (number, element), strict=False))
        execute(branches[0], element, names, out)
    for name in named:
        names.pop(name, None)


def pipeline(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    """One command: an operand, or a function and its operands."""
    operands: list[Any] = []
    at = 0
    while at < len(words):
        word = words[at]
        if word == "(":
            depth, end = 1, at
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(words[end], 0)
            found = pipeline(words[at + 1 : end], dot, names)
            at = end + 1
            if at < len(words) and re.fullmatch(r"\.\w+", words[at]):
                found, at = found[words[at][1:]], at + 1
            operands.append(found)
            continue
        operands.append(operand(word, dot, names))
        at += 1
    first, rest = operands[0], operands[1:]
    if callable(first):
        return first(*rest)
    assert not rest, words
    return first


def operand(word: str, dot: Any, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.isdecimal():
        return int(word)
    if word in ("true", "false"):
        return word == "true"
    if re.fullmatch(r"\$?\.\w+", word):
        return (names["$"] if word[0] == "$" else dot)[word.rpartition(".")[2]]
    return names[word] if word.startswith("$") else FUNCTIONS[word]


def truth(value: Any) -> bool:
    return bool(value)


def printf(form: str, *values: str) -> str:
    assert form.count("%") == form.count("%s") == len(values)
    return form % values


FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "not": lambda a: not a, "len": len,
    "slice": lambda a, start: a[start:], "index": lambda a, n: a[n], "printf": printf,
}  # fmt: skip
