"""Source code that calls one function with given arguments and prints each value as a line of JSON.

Python calls go through harness/serve.py. For C++ and Java a main program is written. Arguments become literals, and the
function's own parameter types decide what they are converted to.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

from megatron_rl.reward.harness import wire
from megatron_rl.reward.languages import java_classes, java_source

__all__ = ["JAVA_MAIN", "call_sources", "harness_source", "literal", "read_values", "split_entry_point"]

ENTRY_POINT = re.compile(r"(?:([A-Za-z_]\w*)(?:\(\))?\.)?([A-Za-z_]\w*)")
JAVA_MAIN = "JudgedMain"


def harness_source(name: str) -> str:
    """A file of reward/harness."""
    return (resources.files("megatron_rl.reward.harness") / name).read_text(encoding="utf-8")


def call_sources(language: str, context: str, code: str, entry_point: str,
                 calls: list[list[Any]]) -> tuple[dict[str, str], bytes]:
    """(file name -> source, standard input) of the program that makes the calls.

    ValueError for an argument that C++ or Java has no literal for.
    """
    if language == "python":
        requests = "".join(wire.encode([list(arguments), {}]) + "\n" for arguments in calls)
        sources = {"solution.py": code, "context.py": context, **_files("serve.py", "load.py", "wire.py")}
        return sources, requests.encode()
    if language == "cpp":
        return {"main.cpp": _cpp(f"{context}\n{code}", entry_point, calls)}, b""
    solution = java_source(context, code)
    classes = java_classes(solution)
    owner, name = split_entry_point(entry_point)
    if owner is None:
        owner = classes.owner(name)
    lines = "".join(f'        JudgedCalls.call({owner}.class, "{name}"'
                    f'{"".join(f", {literal(language, value)}" for value in arguments)});\n' for arguments in calls)
    main = (f"public class {JAVA_MAIN} {{\n    public static void main(String[] a) throws Throwable {{\n"
            f"{lines}    }}\n}}\n")
    return {classes.file: solution, f"{JAVA_MAIN}.java": main, **_files("JudgedCalls.java")}, b""


def split_entry_point(entry_point: str) -> tuple[str | None, str]:
    """(class or None, name) of `f`, `Class.f` or `Class().f`. ValueError for anything else."""
    parts = ENTRY_POINT.fullmatch(entry_point)
    if parts is None:
        raise ValueError(f"entry_point {entry_point!r} is none of f, Class.f and Class().f")
    return parts[1], parts[2]


def read_values(stdout: bytes) -> list[dict[str, Any]]:
    """{"ok": value} or {"error": ...} for each answered call. It stops at the first line that is neither."""
    values = []
    for line in stdout.decode(errors="replace").splitlines():
        try:
            answer = wire.decode(line)
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            return values
        if not isinstance(answer, dict) or not answer.keys() & {"ok", "error"}:
            return values
        values.append(answer)
    return values


def _files(*names: str) -> dict[str, str]:
    return {name: harness_source(name) for name in names}


def _cpp(solution: str, entry_point: str, calls: list[list[Any]]) -> str:
    """The function is a free one, or a member of a class Solution."""
    owner, name = split_entry_point(entry_point)
    if owner is None and re.search(r"^\s*(?:class|struct)\s+Solution\b", solution, re.MULTILINE):
        owner = "Solution"
    target = f"&{owner}::{name}" if owner else name
    lines = "".join(f"    judged_calls::call({target}{''.join(f', {_cpp_literal(value)}' for value in arguments)});\n"
                    for arguments in calls)
    # a main of the solution's own is not called; `signed` lives through `#define int long long`
    return (f"{harness_source('calls.hpp')}\n#define main main_of_the_solution\n{solution}\n#undef main\n"
            f"signed main() {{\n{lines}    _exit(0);\n}}\n")


def _cpp_literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "{" + ", ".join(map(_cpp_literal, value)) + "}"
    if isinstance(value, str):
        return f"std::string({_quoted(value)}, {len(value.encode())})"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2 ** 31:
        return f"{value}LL"
    return _scalar(value)


def literal(language: str, value: Any) -> str:
    """ValueError for a value that C++ or Java has no literal for."""
    return _cpp_literal(value) if language == "cpp" else _java_literal(value)


def _java_literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"JudgedCalls.list({', '.join(map(_java_literal, value))})"
    if isinstance(value, str):
        return json.dumps(value)  # its escapes are Java's too
    return f"{value}L" if isinstance(value, int) and not isinstance(value, bool) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    raise ValueError(f"an argument of type {type(value).__name__} has no literal in C++ or Java: {value!r}"[:200])


def _quoted(text: str) -> str:
    """A C++ string literal.

    Everything but letters, digits and blanks is octal, whose three digits end by themselves.
    """
    plain = frozenset(b" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode()) + '"'

