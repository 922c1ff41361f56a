"""The two ends between tests and solution, each in a sandbox of its own. Values cross as data.

What is no plain value crosses in one of three ways:
  an object whose class both sides define: by its attributes; the receiver makes an object of its own class
  an object that only the solution's side knows: the tests get a Borrowed, which asks for attributes, items and calls
  a function or iterator of the tests, as an argument: the solution gets a Borrowed, to be called or advanced only
Equality and arithmetic are never asked for: a solution that is handed the right answer could agree with it.
"""

import asyncio
import builtins
import enum
import inspect
import json
import sys
from collections.abc import Iterator

import load
import wire

PROTOCOL_ERRORS = (ValueError, TypeError, ArithmeticError, KeyError, IndexError, AttributeError, RecursionError)
NO_EXCEPTIONS_OF_A_SOLUTION = (AssertionError, StopIteration, StopAsyncIteration)  # Python, or the tests, hear them


class SolutionRaised(Exception):
    pass


class Peer:
    """One end.

    names: the module whose classes cross by their attributes.
    perform(operation, operands): does what the other end asks.
    gone(why): called when the other end has ended, or sends what it must not; does not return.
    shared: the tests' end only: the names that the solution may know. Objects and exceptions of no other class are made
        for it, nothing of `names` is handed out, and only functions and iterators that it was given are its to use.
    """

    def __init__(self, incoming, outgoing, names, perform, gone, shared=None):
        self.names, self.shared, self.calls = names, shared, 0
        self._incoming, self._outgoing, self._perform, self._gone = incoming, outgoing, perform, gone
        self._lent, self._numbers = [], {}

    def has_lent(self, value):
        return id(value) in self._numbers  # what is lent stays alive, so no other object has its id

    def ask(self, operation, *operands):
        """What the other end answers; meanwhile it may ask, too."""
        self._send("ask", [operation, list(operands)])
        while True:
            kind, content = self._receive()
            if kind == "ask":
                self._answer(content)
            elif kind == "raise":
                raise self._exception(*content)
            else:
                return content

    def answer_all(self):
        while True:
            self._answer(self._receive()[1])

    def call(self, operation, *operands):
        """As ask, for calls: a function that returns nothing may have changed its arguments."""
        self.calls += 1
        value, after = self.ask(operation, *operands)
        if value is None and after is not None:
            become(list(operands[-2:]), after)
        return value

    def _answer(self, content):
        try:
            operation, operands = content
            line = self._encoded("ok", self._perform(operation, operands))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 -- the other end's code asked for it, whatever it is
            simple = all(type(each) in (str, int, float, bool, type(None)) for each in error.args)
            line = self._encoded("raise", [[kind.__name__ for kind in type(error).__mro__],
                                           list(error.args) if simple else [str(error)[:500]]])
        self._write(line)

    def _exception(self, kinds, arguments):
        """An exception of the first kind that is known here too."""
        for name in kinds:
            known = self._known_class(name) or getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                if issubclass(known, NO_EXCEPTIONS_OF_A_SOLUTION):
                    break
                try:
                    return known(*arguments)
                except TypeError:  # it wants other arguments
                    continue
        return SolutionRaised(f"{kinds[0]}: {arguments}"[:500])

    def _send(self, kind, content):
        self._write(self._encoded(kind, content))

    def _write(self, line):
        try:
            self._outgoing.write(line + "\n")
        except BrokenPipeError:
            self._gone("it has ended")

    def _encoded(self, kind, content):
        objects, numbers, waiting = [], {}, []

        def other(value, last):
            if isinstance(value, Borrowed):
                return value._reference
            if isinstance(value, enum.Enum) and self._is_ours(type(value)):
                return {"enum": [type(value).__name__, value.name]}
            if isinstance(value, tuple) and hasattr(value, "_fields") and self._is_ours(type(value)):
                return {"named": [type(value).__name__, [wire.plain(item, other) for item in value]]}
            if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
                return {"type": value.__name__}
            if self._is_ours(type(value)) and type(value).__new__ is object.__new__:
                if self.shared is not None:
                    self.shared.add(type(value).__name__)
                if id(value) not in numbers:
                    numbers[id(value)] = len(waiting)
                    waiting.append(value)
                return {"object": numbers[id(value)]}
            return self._lend(value) if last else None

        data = wire.plain(content, other)
        for value in waiting:  # grows meanwhile: no recursion along a list of nodes
            state = [[name, wire.plain(item, other)] for name, item in attributes(value).items()]
            objects.append([type(value).__name__, state, self._number(value) if self.shared is None else None])
        return json.dumps([kind, data, objects])

    def _receive(self):
        """(kind, content) of the next message."""
        line = self._incoming.readline()
        if not line.endswith("\n"):
            self._gone("it has ended")
        try:
            kind, data, objects = json.loads(line)
            made = []
            for name, _, number in objects:
                known = self._known_class(name)
                if known is not None and known.__new__ is object.__new__:
                    made.append(object.__new__(known))
                else:
                    made.append(Borrowed(self, {"yours": int(number)}))
            for value, (_, state, _) in zip(made, objects, strict=True):
                if not isinstance(value, Borrowed):
                    for name, item in state:
                        _set(value, name, wire.value_of(item, lambda tag, of: self._tagged(tag, of, made, lent=False)))
            return kind, wire.value_of(data, lambda tag, of: self._tagged(tag, of, made, lent=True))
        except PROTOCOL_ERRORS as error:
            self._gone(f"it sent no message: {error}")

    def _tagged(self, tag, content, made, *, lent):
        if tag == "object":
            return made[content]
        if tag in ("enum", "named"):
            known = self._known_class(content[0])
            if tag == "enum":
                return enum.EnumMeta.__getitem__(known, content[1])
            return tuple.__new__(known, wire.value_of(content[1], lambda *of: self._tagged(*of, made, lent=lent)))
        if tag == "type":
            known = getattr(builtins, content)
            if isinstance(known, type):
                return known
        if tag == "yours":
            return self._lent[content]
        if tag == "global" and self.shared is None:
            return self.names[content]
        if tag == "mine" and lent:  # an attribute of our own class's object is data
            number, kind = content
            borrowed = {"iterator": BorrowedIterator}.get(kind, Borrowed)(self, {"yours": int(number)})
            return _awaited(borrowed) if kind == "coroutine" else borrowed
        raise ValueError(f"no such tag: {tag}")

    def _known_class(self, name):
        """Our own class of that name that the other end may know, or None."""
        known = self.names.get(name)
        fits = isinstance(known, type) and self._is_ours(known) and (self.shared is None or name in self.shared)
        return known if fits else None

    def _is_ours(self, kind):
        return kind.__module__ == self.names["__name__"] and self.names.get(kind.__name__) is kind

    def _lend(self, value):
        iterator = isinstance(value, Iterator)
        if self.shared is not None and not iterator and not callable(value):
            raise TypeError(f"an argument of type {type(value).__name__} cannot be handed to the solution")
        kind = "coroutine" if inspect.iscoroutine(value) else "iterator" if iterator else "object"
        return {"mine": [self._number(value), kind]}

    def _number(self, value):
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._lent)
            self._lent.append(value)
        return self._numbers[id(value)]


class Borrowed:
    """Something that the other end keeps."""

    def __init__(self, peer, reference):
        self._peer, self._reference = peer, reference

    def __call__(self, *positional, **named):
        return self._peer.call("call", self, positional, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __getitem__(self, key):
        return self._peer.ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._peer.ask("setitem", self, key, value)

    def __iter__(self):
        return iter(self._peer.ask("iter", self))

    def __len__(self):
        return self._peer.ask("len", self)

    def __bool__(self):
        return self._peer.ask("bool", self)

    def __str__(self):
        return self._peer.ask("str", self)

    def __repr__(self):
        return self._peer.ask("repr", self)

    def __eq__(self, other):
        """Two objects of the solution's are equal if they are of one class and hold equal data."""
        return isinstance(other, Borrowed) and self._peer.ask("data", self) == self._peer.ask("data", other)

    def __hash__(self):
        return hash(Borrowed)


class BorrowedIterator(Borrowed):
    def __iter__(self):
        return self

    def __next__(self):
        found = self._peer.ask("next", self)
        if not found:
            raise StopIteration
        return found[0]


async def _awaited(borrowed):
    return borrowed._peer.ask("await", borrowed)


def attributes(value):
    """The attributes of an object, in __dict__ or in slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        found |= {name: getattr(value, name) for name in ([slots] if isinstance(slots, str) else slots)
                  if hasattr(value, name) and name not in ("__dict__", "__weakref__")}
    return found


def _set(value, name, item):
    """An attribute that came from the other end; it must not take a method's place."""
    known = inspect.getattr_static(type(value), name, None)
    if name.startswith("__") or callable(known) or isinstance(known, (property, classmethod, staticmethod)):
        raise ValueError(f"{name} is no attribute for data")
    object.__setattr__(value, name, item)


def become(old, new):
    """Makes `old` what `new` is, in place as far as it can be; returns it, or else `new`."""
    if type(old) is not type(new) or isinstance(old, Borrowed):
        return new
    if isinstance(old, (list, tuple)):
        items = [become(*pair) for pair in zip(old, new)] + list(new[len(old):])  # noqa: B905 -- lengths may differ
        if isinstance(old, list):
            old[:] = items
        return old
    if isinstance(old, dict):
        items = {key: become(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif hasattr(old, "extend") and hasattr(old, "clear"):  # deque
        old.clear()
        old.extend(new)
    elif attributes(new):
        for name, item in attributes(new).items():
            object.__setattr__(old, name, item)
    else:
        return new
    return old


def serve(incoming, outgoing, module, entry_point):
    """The solution's end: does whatever the tests ask."""
    function = load.entry(module, entry_point)

    def call(target, positional, named):
        value = target(*positional, **named)
        return value, [positional, named] if value is None and (positional or named) else None

    operations = {
        "call": call, "candidate": lambda *arguments: call(function, *arguments),
        "getattr": getattr, "getitem": lambda of, key: of[key], "setitem": lambda of, *item: of.__setitem__(*item),
        "iter": iter, "next": lambda items: next(([item] for item in items), []), "await": asyncio.run,
        "len": len, "bool": bool, "str": str, "repr": repr,
        "data": lambda of: [type(of).__name__, attributes(of)],
    }
    Peer(incoming, outgoing, vars(module), lambda name, operands: operations[name](*operands), sys.exit).answer_all()
