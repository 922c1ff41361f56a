"""In the solution's sandbox: makes one module of context.py and solution.py, which lie beside this file."""

import __future__

import ast
import os
import re
import sys
import types

NOT_PYTHON = 65  # exit code; os.EX_DATAERR
FUTURES = 0
for _name in __future__.all_feature_names:
    FUTURES |= getattr(__future__, _name).compiler_flag


def load(name, entry_point=""):
    """The module, executed under `name`. Ends the program with NOT_PYTHON if there is none."""
    module = types.ModuleType(name)
    folder = os.path.dirname(os.path.abspath(__file__))
    module.__file__ = os.path.join(folder, "solution.py")
    sys.modules[name] = module
    try:
        codes = compiled(_read(folder, "context.py"), _read(folder, "solution.py"), module.__file__, entry_point)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        print(f"SyntaxError: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(NOT_PYTHON)
    for code in codes:
        exec(code, module.__dict__)
    return module


def compiled(context, solution, path, entry_point):
    """Each part by itself, so that a solution may begin with its own `from __future__`; as one text if the solution
    goes on where the context breaks off."""
    if not context.strip():
        return [compile(solution, path, "exec", dont_inherit=True)]
    joined = context + ("" if context.endswith("\n") else "\n") + solution
    if entry_point and not defines(solution, re.findall(r"\w+", entry_point)):
        try:
            return [compile(joined, path, "exec", dont_inherit=True)]
        except SyntaxError:
            pass
    first = compile(context, "context.py", "exec", dont_inherit=True)
    return [first, compile(solution, path, "exec", flags=first.co_flags & FUTURES, dont_inherit=True)]


def defines(source, names):
    """Whether a text is Python by itself and gives one of the names a meaning."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    found = {node.name for node in ast.walk(tree)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
              for alias in node.names}
    return not found.isdisjoint(names)


def entry(module, entry_point):
    """What an entry point names: `f`, `Class.f` or `Class().f`; `f` may also be a method of a class Solution. Each call
    of a method has an object of its own."""
    owner, name = re.fullmatch(r"(?:(\w+(?:\(\))?)\.)?(\w+)", entry_point).groups()
    if owner is None and name not in vars(module) and "Solution" in vars(module):
        owner = "Solution()"
    if owner is None:
        return getattr(module, name)
    kind = getattr(module, owner.removesuffix("()"))
    if not owner.endswith("()"):
        return getattr(kind, name)
    getattr(kind, name)  # a method that is not there is missed before the first call
    return lambda *positional, **named: getattr(kind(), name)(*positional, **named)


def _read(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":  # a program that reads its input, after a context
    load("__main__")
