"""In a sandbox of its own: runs tests.py against a solution that sits in another sandbox.

Standard output leads to the solution's standard input and the reverse (serve.py). No line of the solution runs in
this process, so it cannot end it, patch it, or print the verdict. The exit code is the verdict.
"""

import builtins
import os
import sys

FAILED, RAISED, GONE = 3, 4, 5  # an assertion; the solution raised; the solution has ended


class SolutionRaised(Exception):
    pass


def main(entry_point):
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    import wire

    sys.set_int_max_str_digits(0)
    answers, requests = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def candidate(*positional, **named):
        try:
            requests.write(wire.encode([list(positional), named]) + "\n")
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            leave(GONE)
        try:
            answer = wire.decode(line)
        except (ValueError, TypeError, RecursionError):
            leave(GONE)
        if "ok" in answer:
            return answer["ok"]
        name, message = answer["error"]
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, Exception) and known is not AssertionError:
            raise known(message)
        raise SolutionRaised(f"{name}: {message}")

    names = {"__name__": "tests"}
    for part in ("context.py", "tests.py"):
        with open(os.path.join(folder, part), encoding="utf-8") as file:
            source = file.read()
        names[entry_point] = candidate
        try:
            code = compile(source, part, "exec")
        except SyntaxError:
            if part == "tests.py":
                raise
            continue  # a context that only the solution completes has no helpers for the tests
        exec(code, names)
        names[entry_point] = candidate
    if "check" in names:
        names["check"](candidate)


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
