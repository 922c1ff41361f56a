"""Runs in the solution's sandbox and calls a function of solution.py for somebody outside.

`serve.py calls f`: each line of standard input holds [[positional...], {named...}]. Each answer is one line, {"ok":
value} or {"error": [type, message]}, as wire.encode writes it. A function that returns nothing is judged by what it did
to its first argument, which the answer then brings too: {"ok": null, "first": value}.
`serve.py unit f`: answers what the tests in another sandbox ask (peer.py).
What the solution itself prints or reads goes nowhere.
"""

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Iterator

RECURSION = 1_000_000  # the memory limit ends a recursion before that
THREAD_STACK_BYTES = 8 << 20  # the first thread's is far larger, and would be every thread's default


def main(mode, entry_point):
    import load
    import wire

    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(RECURSION)
    threading.stack_size(THREAD_STACK_BYTES)
    incoming, outgoing = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    module = load.load("solution", entry_point)
    if mode == "unit":
        import peer

        return peer.serve(incoming, outgoing, module, entry_point)
    function = load.entry(module, entry_point)
    for line in incoming:
        positional, named = wire.decode(line)
        try:
            answer = wire.encode(called(function, positional, named))
        except MemoryError:
            raise  # a limit was met: the end of the program, not an answer
        except Exception as error:  # noqa: BLE001 -- the solution's, whatever it is
            answer = wire.encode({"error": [type(error).__name__, str(error)[:200]]})
        outgoing.write(answer + "\n")


def called(function, positional, named):
    value = function(*positional, **named)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    if isinstance(value, (Iterator, range)):
        value = list(value)
    return {"ok": None, "first": positional[0]} if value is None and positional else {"ok": value}


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main(*sys.argv[1:])
