"""Runs tests.py in a sandbox of its own, against a solution in another sandbox.

Standard output leads to the solution's standard input and the reverse (peer.py). No line of the solution runs in this
process, so it cannot end it, patch it, or print the verdict. The exit code is the verdict.
"""

import builtins
import os
import re
import sys
import types

FAILED, RAISED, GONE, UNUSED = 3, 4, 5, 6  # an assertion; the solution raised; it has ended; no test called it


def main(entry_point):
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    import peer as ends

    sys.set_int_max_str_digits(0)
    sys.argv = ["tests.py"]  # unittest.main() reads it
    answers, requests = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    names = vars(module)
    peer = ends.Peer(answers, requests, names, lambda *asked: perform(peer, *asked),
                     lambda why: leave(GONE, why), shared=set())

    def candidate(*positional, **named):
        return peer.call("candidate", positional, named)

    *owner, name = re.findall(r"\w+", entry_point)
    candidate.__name__ = name
    given = {each: ends.Borrowed(peer, {"global": each}) for each in {*owner, "Solution"}} | {name: candidate}
    solution = sys.modules["solution"] = types.ModuleType("solution")
    solution.__getattr__ = lambda each: given.get(each) or ends.Borrowed(peer, {"global": each})
    for part in ("context.py", "tests.py"):
        with open(os.path.join(folder, part), encoding="utf-8") as file:
            source = file.read()
        try:
            code = compile(source, part, "exec", dont_inherit=True)
        except SyntaxError:
            if part == "tests.py":
                raise
            continue  # a context that only the solution completes has no helpers for the tests
        if part == "tests.py":
            names.update({each: ends.Borrowed(peer, {"global": each}) for each in used(code)
                          if each not in names and not hasattr(builtins, each)})
        names.update(given)
        before = dict(names)
        try:
            exec(code, names)
        except SystemExit as end:  # unittest.main(), for one
            if end.code:
                leave(FAILED, "the tests ended with a failure")
        if part == "context.py":
            peer.shared.update(names)
    made = {each: value for each, value in names.items() if value is not before.get(each)}
    if "check" in made:
        made["check"](candidate)
    elif not peer.calls:
        run_functions(made)
    if not peer.calls:
        leave(UNUSED, f"no test calls {entry_point}")


def run_functions(made):
    """The functions test_*, and unittest's classes, of tests that leave it to a runner to call them."""
    for name, value in made.items():
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
        elif isinstance(value, type) and "unittest" in sys.modules and issubclass(
                value, sys.modules["unittest"].TestCase):
            result = sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(value).run(
                sys.modules["unittest"].TestResult())
            if not result.wasSuccessful():
                raise AssertionError(str((result.failures + result.errors)[:1])[-300:])


def perform(peer, operation, operands):
    """What the solution may ask for: calls of functions that the tests handed to it, items of iterators."""
    target, *arguments = operands
    if not peer.has_lent(target):
        raise TypeError("the tests did not hand that out")
    try:
        if operation == "call":
            return target(*arguments[0], **arguments[1]), None
        if operation == "next":
            return next(([item] for item in target), [])
    except AssertionError as error:
        leave(FAILED, f"assertion failed {error}")  # the solution must not catch it
    raise TypeError(f"the tests do not hand out {operation}")


def used(code):
    """The names that a code object and those in it look up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= used(constant)
    return found


def leave(code, message=""):
    print(message, file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except AssertionError as error:
        leave(FAILED, f"assertion failed {error}")
    except BaseException as error:  # noqa: BLE001 -- what the solution raised, or tests that fit it nowhere
        leave(RAISED, f"{type(error).__name__}: {error}")
    leave(0)
