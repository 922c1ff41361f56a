"""Sources that call one function with given arguments and print each value as a line of JSON.

Python calls through harness/serve.py. For C++ and Java a main program is written: arguments become literals, the
function's own parameter types decide what they are converted to.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from megatron_rl.reward.harness import wire
from megatron_rl.reward.languages import java_class

__all__ = ["call_sources", "harness_source", "read_values"]


def harness_source(name: str) -> str:
    """A file of reward/harness."""
    return (resources.files("megatron_rl.reward.harness") / name).read_text(encoding="utf-8")


def call_sources(language: str, context: str, code: str, entry_point: str,
                 calls: list[list[Any]]) -> tuple[dict[str, str], bytes]:
    """(file name -> source, standard input) of the program that makes the calls.

    Python's `code` already holds the context. ValueError for an argument that C++ or Java has no literal for.
    """
    if language == "python":
        requests = "".join(wire.encode([list(arguments), {}]) + "\n" for arguments in calls)
        return {"solution.py": code, **_files("serve.py", "wire.py")}, requests.encode()
    solution = f"{context}\n{code}"
    if language == "cpp":
        return {"main.cpp": _cpp(solution, entry_point, calls)}, b""
    name = java_class(solution)
    lines = "".join(f'        Calls.call({name}.class, "{entry_point}"'
                    f'{"".join(f", {_java_literal(value)}" for value in arguments)});\n' for arguments in calls)
    main = f"public class Harness {{\n    public static void main(String[] a) throws Throwable {{\n{lines}    }}\n}}\n"
    return {f"{name}.java": solution, "Harness.java": main, **_files("Calls.java")}, b""


def read_values(stdout: bytes) -> list[dict[str, Any]]:
    """{"ok": value} or {"error": ...} of each call that was answered; stops at the first line that is neither."""
    values = []
    for line in stdout.decode(errors="replace").splitlines():
        try:
            answer = wire.decode(line)
        except (ValueError, TypeError, RecursionError):
            return values
        if not isinstance(answer, dict) or not answer.keys() & {"ok", "error"}:
            return values
        values.append(answer)
    return values


def _files(*names: str) -> dict[str, str]:
    return {name: harness_source(name) for name in names}


def _cpp(solution: str, entry_point: str, calls: list[list[Any]]) -> str:
    """The function is a free one, or a member of a class Solution."""
    member = "class Solution" in solution or "struct Solution" in solution
    target = f"&Solution::{entry_point}" if member else entry_point
    lines = "".join(f"    calls::call({target}{''.join(f', {_cpp_literal(value)}' for value in arguments)});\n"
                    for arguments in calls)
    return f"#include <bits/stdc++.h>\n{solution}\n{harness_source('calls.hpp')}\nint main() {{\n{lines}}}\n"


def _cpp_literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "{" + ", ".join(map(_cpp_literal, value)) + "}"
    if isinstance(value, str):
        return f"std::string({_quoted(value)}, {len(value.encode())})"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2 ** 31:
        return f"{value}LL"
    return _scalar(value)


def _java_literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"Calls.list({', '.join(map(_java_literal, value))})"
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
    """A C++ string literal; all but letters, digits and blanks in octal, whose three digits end by themselves."""
    plain = frozenset(b" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode()) + '"'

