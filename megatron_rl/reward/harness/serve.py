"""In the solution's sandbox: calls a function of solution.py with the arguments on each line of standard input.

Arguments: [[positional...], {named...}]. Answers: a line each, {"ok": value} or {"error": [type, message]}, both as
wire.encode. What the solution itself prints or reads goes nowhere.
"""

import os
import sys

NOT_PYTHON = 65  # exit code; os.EX_DATAERR


def main(entry_point):
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import wire

    sys.set_int_max_str_digits(0)
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    function = load(entry_point)
    for line in requests:
        positional, named = wire.decode(line)
        try:
            answer = wire.encode({"ok": function(*positional, **named)})
        except MemoryError:
            raise  # a limit was met: the end of the program, not an answer
        except Exception as error:  # noqa: BLE001 -- the solution's, whatever it is
            answer = wire.encode({"error": [type(error).__name__, str(error)[:200]]})
        answers.write(answer + "\n")


def load(entry_point):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "solution.py")
    with open(path, encoding="utf-8") as file:
        source = file.read()
    try:
        code = compile(source, "solution.py", "exec")
    except (SyntaxError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(NOT_PYTHON)
    names = {"__name__": "solution"}
    exec(code, names)
    if entry_point not in names and "Solution" in names:
        return getattr(names["Solution"](), entry_point)
    return names[entry_point]


if __name__ == "__main__":
    main(sys.argv[1])
