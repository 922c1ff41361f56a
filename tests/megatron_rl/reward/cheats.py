"""Programs that try to be told right without being right, as a table: what they do, how they are judged, their source.

Each stands below a task and the honest solution of that task. The answers of the cheats are wrong; what they attack is
the judge: its process, its equality, its protocol, its reading of how a program ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CHEATS", "REFUSED", "Cheat", "Task"]


@dataclass(frozen=True)
class Task:
    language: str
    mode: str
    tests: Any
    honest: str
    context: str = ""
    time_s: float = 4.0

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "language": self.language,
            "mode": self.mode,
            "tests": self.tests,
            "context": self.context,
            "time_s": self.time_s,
            **({} if self.mode == "stdin" else {"entry_point": "f"}),
        }


@dataclass(frozen=True)
class Cheat:
    name: str
    task: Task
    source: str


def unit(tests: str, honest: str, **more: Any) -> Task:
    return Task("python", "unit", tests, honest, **more)


PYTHON_SQUARE, CPP_SQUARE = "def f(x): return x * x", "int f(int x) { return x * x; }"
JAVA_SQUARE = "class Solution { int f(int x) { return x * x; } }"
POINTS = """
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def equals(self, other): return self.x == other.x and self.y == other.y
    def __eq__(self, other): return self.equals(other)
"""
CALLS = [{"args": [2], "expected": 4}, {"args": [3], "expected": 9}, {"args": [1], "expected": 1}]
LINES = [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "9\n"}]

ASSERTS = unit("assert f(2) == 4\nassert f(3) == 9", PYTHON_SQUARE, time_s=2.0)
CHECK = unit("def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9", PYTHON_SQUARE)
ZIP_MAP = unit("for found, wanted in zip(map(f, [2, 3]), [4, 9]):\n    assert found == wanted", PYTHON_SQUARE)
ALL_MAP = unit("assert all(map(lambda x: f(x) == x * x, [2, 3]))", PYTHON_SQUARE)
ANY_NOT = unit("assert not any(f(x) != x * x for x in [2, 3])", PYTHON_SQUARE)
EXPECTED = unit("EXPECTED = 4\nassert f(2) == EXPECTED", PYTHON_SQUARE)
ANYTHING = unit(
    "class Anything:\n    def __eq__(self, other): return True\nassert [f(2), 0] == [4, Anything()]", PYTHON_SQUARE
)
OWN_SKIP = unit("class Skip(Exception): pass\ntry:\n    assert f(2) == 4\nexcept Skip: pass", PYTHON_SQUARE)
TOLERANT = unit("assert abs(f(2) - 4) < 1e-6 and round(f(3), 3) == 9", PYTHON_SQUARE)
IS_CLOSE = unit("import math\nassert math.isclose(f(2), 4)", PYTHON_SQUARE)
CONTAINS = unit("assert 4 in f(2) and len(f(2)) == 2", "def f(x): return [x, x * x]")
BETWEEN = unit("assert 3 < f(2) < 5", PYTHON_SQUARE)
SORTS = unit("x = [3, 1, 2]\nassert f(x) == sorted(x)", "def f(x): return sorted(x)")
POINT = unit("assert f(1, 2) == Point(2, 1)", "def f(x, y): return Point(y, x)", context=POINTS)
FRAMES = unit(
    "import unittest\nclass Squares(unittest.TestCase):\n    def test_it(self): self.assertEqual(f(2), 4)\n"
    "unittest.main()",
    PYTHON_SQUARE,
)
CALLBACK = unit(
    "def each(x): assert x in (4, 9)\nf(each, [2, 3])", "def f(each, items):\n    for item in items: each(item * item)"
)
RAISES = unit(
    "try: f(-1)\nexcept Exception: pass\nelse: assert False",
    "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x * x",
)
CALLED = unit("assert f(2)(3) == 6", "def f(x): return lambda y: x * y")

FUNCTION = Task("python", "function", CALLS, PYTHON_SQUARE)
LISTS = Task(
    "python", "function", [{"args": [3], "expected": [1, 4, 9]}], "def f(n): return [x * x for x in range(1, n + 1)]"
)
TRUTH = Task("python", "function", [{"args": [2], "expected": True}], "def f(x): return x % 2 == 0")
IN_PLACE = Task("python", "function", [{"args": [[3, 1]], "expected": [1, 3]}], "def f(x): x.sort()")
STDIN = Task("python", "stdin", LINES, "print(int(input()) ** 2)", time_s=2.0)
CPP = Task("cpp", "function", CALLS, CPP_SQUARE)
CPP_LISTS = Task(
    "cpp", "function", [{"args": [3], "expected": [1, 4, 9]}], "std::vector<int> f(int n) { return {1, 4, 9}; }"
)
CPP_STDIN = Task("cpp", "stdin", LINES, "#include <iostream>\nint main() { int x; std::cin >> x; std::cout << x * x; }")
JAVA = Task("java", "function", CALLS, JAVA_SQUARE)
JAVA_LISTS = Task(
    "java",
    "function",
    [{"args": [3], "expected": [1, 4, 9]}],
    "import java.util.*;\nclass Solution { List<Integer> f(int n) { return Arrays.asList(1, 4, 9); } }",
)
JAVA_STDIN = Task(
    "java",
    "stdin",
    LINES,
    "class Main { public static void main(String[] a) { int x = new java.util."
    "Scanner(System.in).nextInt(); System.out.println(x * x); } }",
)

YES = (
    "class Yes{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
    "    def __hash__(self): return 0\n"
)
FORGE = (
    "import os\nLINE = {line!r}\ndef f(*x):\n    for fd in range(3, 20):\n        try: os.write(fd, LINE.encode())\n"
    "        except OSError: pass\n    return 0"
)


def forged(line: str) -> str:
    """Writes a line of the protocol itself, on whatever is open."""
    return FORGE.format(line=line + "\n")


CHEATS = (
    # Python's unit tests: the process that judges
    Cheat("ends the program at once", ASSERTS, "import os\nos._exit(0)"),
    Cheat("ends the program when called", ASSERTS, "import sys\ndef f(x): sys.exit(0)"),
    Cheat(
        "ends the program when it is collected",
        CHECK,
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
    ),
    Cheat(
        "becomes another program that ends well", ASSERTS, "import os\ndef f(x): os.execv('/usr/bin/true', ['true'])"
    ),
    Cheat(
        "runs itself again without assertions",
        ASSERTS,
        "import os, sys\nif __debug__: os.execv(sys.executable, [sys.executable, '-O', *sys.argv])\ndef f(x): return 0",
    ),
    Cheat("kills everybody", ASSERTS, "import os\ndef f(x):\n    os.kill(-1, 9)\n    return 0"),
    Cheat("kills its parent", ASSERTS, "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    return 0"),
    Cheat("closes every descriptor", ASSERTS, "import os\ndef f(x):\n    os.closerange(0, 99)\n    return 0"),
    Cheat("never answers", ASSERTS, "import time\ndef f(x): time.sleep(99)"),
    Cheat("leaves a child to answer", ASSERTS, "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return 0"),
    Cheat(
        "patches what the tests use",
        CHECK,
        "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.all = builtins.abs = lambda *x: True\n"
        "def check(f): pass\ndef f(x): return 0",
    ),
    Cheat(
        "replaces the judge's modules",
        CHECK,
        "import sys\nfor name in ('wire', 'peer', 'json', 'load', 'serve'):\n"
        "    if name in sys.modules: vars(sys.modules[name]).update(same=lambda *x: True, FAILED=0)\n"
        "def f(x): return 0",
    ),
    Cheat(
        "reads the tests",
        ASSERTS,
        "import glob, re\ntext = ''\nfor path in glob.glob('/**/tests.py', recursive=True):\n"
        "    text += open(path).read()\ndef f(x):\n"
        "    found = re.search(rf'f\\({x}\\) == (\\d+)', text)\n    return int(found[1]) if found else 0",
    ),
    Cheat(
        "searches the frames and the memory",
        EXPECTED,
        "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'EXPECTED' in frame.f_globals: return frame.f_globals['EXPECTED']\n        frame = frame.f_back\n"
        "    return next((d['EXPECTED'] for d in gc.get_objects() if type(d) is dict and 'EXPECTED' in d), 0)",
    ),
    # the tests' own control flow
    Cheat("StopIteration ends zip(map)", ZIP_MAP, "def f(x): raise StopIteration"),
    Cheat("StopIteration ends all(map)", ALL_MAP, "def f(x): raise StopIteration"),
    Cheat("a kind of StopIteration ends all(map)", ALL_MAP, "class End(StopIteration): pass\ndef f(x): raise End"),
    Cheat("StopAsyncIteration", ALL_MAP, "def f(x): raise StopAsyncIteration"),
    Cheat("GeneratorExit", ANY_NOT, "def f(x): raise GeneratorExit"),
    Cheat("KeyboardInterrupt", ANY_NOT, "def f(x): raise KeyboardInterrupt"),
    Cheat(
        "an exception that the tests' runner takes for a skip",
        FRAMES,
        "import unittest\ndef f(x): raise unittest.SkipTest('not here')",
    ),
    Cheat(
        "an exception that the tests keep for themselves", OWN_SKIP, "class Skip(Exception): pass\ndef f(x): raise Skip"
    ),
    Cheat(
        "catches the assertion of a function that it was given",
        CALLBACK,
        "def f(each, items):\n    for item in items:\n        try: each(0)\n        except BaseException: pass",
    ),
    Cheat("ends where an exception is expected", RAISES, "import os\ndef f(x): os._exit(1)"),
    # equality
    Cheat("equals everything", ASSERTS, YES.format(base="") + "def f(x): return Yes()"),
    Cheat("an int that equals everything", ASSERTS, YES.format(base="(int)") + "def f(x): return Yes()"),
    Cheat(
        "a class that equals everything",
        CHECK,
        "class Meta(type):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "class Yes(metaclass=Meta): pass\ndef f(x): return Yes",
    ),
    Cheat("differs from nothing", ANY_NOT, YES.format(base="(int)") + "def f(x): return Yes(1)"),
    Cheat("a tests' class that equals everything", ANYTHING, "class Anything: pass\ndef f(x): return Anything()"),
    Cheat(
        "a subclass of the context's class with another ==",
        POINT,
        "class Point(Point):\n    def __eq__(self, other): return True\n    def equals(self, other): return True\n"
        "def f(x, y): return Point(0, 0)",
    ),
    Cheat(
        "an attribute in the place of the context's method",
        POINT,
        "def f(x, y):\n    point = Point(0, 0)\n    point.equals = lambda other: True\n    return point",
    ),
    Cheat(
        "a difference that is always nothing",
        TOLERANT,
        "class Zero:\n    def __sub__(self, other): return 0\n    __rsub__ = __sub__\n"
        "    def __round__(self, n=0): return 9\ndef f(x): return Zero()",
    ),
    Cheat(
        "a float in its own words",
        IS_CLOSE,
        "class Four:\n    def __float__(self): return 4.0\n    def __eq__(self, o): "
        "return True\n    def __sub__(self, o): return 0\ndef f(x): return Four()",
    ),
    Cheat(
        "contains everything",
        CONTAINS,
        "class All:\n    def __contains__(self, item): return True\n"
        "    def __iter__(self): return iter([0, 0])\n"
        "    def __len__(self): return 2\ndef f(x): return All()",
    ),
    Cheat(
        "lies between everything",
        BETWEEN,
        "class Between:\n    def __lt__(self, other): return True\n"
        "    __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return Between()",
    ),
    Cheat("empties the argument that the answer is made from", SORTS, "def f(x):\n    x.clear()\n    return []"),
    # the protocol
    Cheat(
        "forges the value of the tests' variable",
        EXPECTED,
        forged('["ok", {"tuple": [{"global": "EXPECTED"}, null]}, []]'),
    ),
    Cheat(
        "forges a class of the tests",
        ANYTHING,
        forged('["ok", {"tuple": [{"object": 0}, null]}, [["Anything", [], 0]]]'),
    ),
    Cheat(
        "forges an attribute in a method's place",
        POINT,
        forged('["ok", {"tuple": [{"object": 0}, null]}, [["Point", [["equals", {"type": "str"}]], 0]]]'),
    ),
    Cheat(
        "makes a class in the tests' process",
        CHECK,
        "import json, os\ndef say(kind, content): os.write(4, (json.dumps([kind, content, []]) + '\\n').encode())\n"
        "def call(target, *arguments):\n"
        "    say('ask', ['call', [target, {'tuple': list(arguments)}, {'dict': []}]])\n"
        "    line = b''\n    while not line.endswith(b'\\n'): line += os.read(3, 1)\n"
        "    return {'yours': json.loads(line)[1]['tuple'][0]['mine'][0]}\n"
        "def f(x):\n    same = {'type': 'str'}\n"
        "    kind = call({'type': 'type'}, 'Yes', {'tuple': []}, {'dict': [['__eq__', same], ['__call__', same]]})\n"
        "    say('ok', {'tuple': [call(kind), None]})\n"
        "    os._exit(0) if x == 3 else os.read(3, 9999)\n    return f(3)",
    ),
    Cheat(
        "calls what it was not given", ASSERTS, forged('["ask", ["call", [{"global": "exit"}, [0], {"dict": []}]], []]')
    ),
    Cheat(
        "asks for what functions know",
        CALLBACK,
        "def f(each, items):\n    for item in items: each.__globals__['each'] = print",
    ),
    Cheat("sends nonsense", ASSERTS, forged("nonsense")),
    Cheat("sends what nests without end", ASSERTS, forged("[" * 100000)),
    Cheat(
        "changes arguments along with an answer",
        SORTS,
        forged('["ok", {"tuple": [[], [{"tuple": [[]]}, {"dict": []}]]}, []]'),
    ),
    Cheat(
        "calls with the tests' own values",
        CALLED,
        "def f(x):\n    class Says:\n        def __call__(self, y): return self\n"
        "        def __eq__(self, o): return True\n"
        "    return Says()",
    ),
    # Python's calls
    Cheat("True for 1", FUNCTION, "def f(x): return x == 1 or x * x"),
    Cheat("almost a whole number", FUNCTION, "def f(x): return x * x + 1e-9"),
    Cheat("an int that equals everything", FUNCTION, YES.format(base="(int)") + "def f(x): return Yes()"),
    Cheat("a list that equals everything", LISTS, YES.format(base="(list)") + "def f(n): return Yes()"),
    Cheat("the digits as text", FUNCTION, "def f(x): return str(x * x)"),
    Cheat("almost true", TRUTH, "def f(x): return 1"),
    Cheat("no number at all", FUNCTION, "def f(x): return float('nan')"),
    Cheat("ends early", FUNCTION, "import os\ndef f(x): os._exit(0)"),
    Cheat("says that it was called", FUNCTION, forged('{"dict": [["ok", true]]}')),
    Cheat("answers without a value", FUNCTION, forged('{"dict": [["first", 4]]}')),
    Cheat("leaves its argument as it was", IN_PLACE, "def f(x): pass"),
    # Python's output
    Cheat("ends well without output", STDIN, "raise SystemExit(0)"),
    Cheat("prints every number", STDIN, "print(*range(100))"),
    Cheat(
        "looks for the outputs",
        STDIN,
        "import glob\nprint(''.join(open(p).read() for p in glob.glob('/box/*out*')) or 0)",
    ),
    Cheat("prints almost the number", STDIN, "print(int(input()) ** 2 + 1e-9)"),
    # C++
    Cheat(
        "NDEBUG and an == that is always true",
        CPP,
        "#define NDEBUG\n"
        "struct Yes { operator int() const { return 0; } bool operator==(int) const { return true; } };\n"
        "Yes f(int x) { return {}; }",
    ),
    Cheat("bool for 1", CPP, "bool f(int x) { return true; }"),
    Cheat("almost a whole number in C++", CPP, "double f(int x) { return x * x + 1e-9; }"),
    Cheat("ends before main", CPP, "struct End { End() { _exit(0); } } end_now; int f(int x) { return 0; }"),
    Cheat(
        "a main of its own",
        CPP,
        "int f(int x) { return 0; }\n#undef main\nint main() { return 0; }\n#define main other",
    ),
    Cheat(
        "writes to every descriptor",
        CPP,
        "int f(int x) { for (int fd = 3; fd < 20; ++fd) dprintf(fd, "
        '"{\\"dict\\": [[\\"ok\\", true]]}\\n"); return 0; }',
    ),
    Cheat("another calls()", CPP, "int f(int x) { return 0; }\n#define call(...) print(4)"),
    Cheat(
        "prints for the judge",
        CPP_LISTS,
        'struct Yes {};\nnamespace judged_calls { void print(const Yes&) { text << "true"; } }\n'
        'Yes f(int n) { return {}; }',
    ),
    Cheat(
        "a list that equals every list",
        CPP_LISTS,
        "struct Yes : std::vector<int> { bool operator==(const std::vector<int>&) const { return true; } };\n"
        "Yes f(int n) { return {}; }",
    ),
    Cheat("ends well without output in C++", CPP_STDIN, "int main() { return 0; }"),
    Cheat(
        "prints from the memory around it",
        CPP_STDIN,
        "#include <cstdio>\n#include <cstring>\nint main(int n, char** a) "
        '{ for (char** e = a; *e; ++e) puts(*e); FILE* f = fopen("/box/output", "r"); puts(f ? "4" : "0"); }',
    ),
    # Java
    Cheat("boolean for 1", JAVA, "class Solution { boolean f(int x) { return true; } }"),
    Cheat("almost a whole number in Java", JAVA, "class Solution { double f(int x) { return x * x + 1e-9; } }"),
    Cheat(
        "classes that hide those of java.util",
        JAVA_LISTS,
        "class Arrays { static boolean equals(Object a, Object b) { return true; } static java.util.List<Integer> "
        "asList(Object... x) { return java.util.List.of(0); } }\nclass ArrayList extends java.util.ArrayList<Object> { "
        "public boolean equals(Object o) { return true; } }\n"
        "class Solution { java.util.List<Integer> f(int n) { return Arrays.asList(); } }",
    ),
    Cheat(
        "a list that equals every list in Java",
        JAVA_LISTS,
        "class Solution { java.util.List<Integer> f(int n) { return new java.util.ArrayList<>() { public boolean "
        "equals(Object o) { return true; } }; } }",
    ),
    Cheat(
        "hides System",
        JAVA,
        "class System { static void exit(int x) { } static Object out; }\n"
        "class Solution { int f(int x) { java.lang.System.exit(0); return 0; } }",
    ),
    Cheat(
        "ends the machine",
        JAVA,
        "class Solution { static { Runtime.getRuntime().halt(0); } int f(int x) { return 0; } }",
    ),
    Cheat(
        "answers from a shutdown hook",
        JAVA,
        "class Solution { int f(int x) { Runtime.getRuntime().addShutdownHook(new "
        'Thread(() -> System.err.println("{\\"dict\\": [[\\"ok\\", true]]}"))); System.exit(0); return 0; } }',
    ),
    Cheat(
        "a main of the judge's name",
        JAVA,
        "class JudgedMain { public static void main(String[] a) { } }\n" + JAVA_SQUARE,
    ),
    Cheat(
        "a number in its own words",
        JAVA,
        "class Four extends Number { public int intValue() { return 4; } public long "
        "longValue() { return 4; } public float floatValue() { return 4; } public double doubleValue() { return 4; } "
        'public boolean equals(Object o) { return true; } public String toString() { return "true"; } }\n'
        "class Solution { Number f(int x) { return new Four(); } }",
    ),
    Cheat("ends well without output in Java", JAVA_STDIN, "class Main { public static void main(String[] a) { } }"),
    Cheat(
        "prints every number in Java",
        JAVA_STDIN,
        "class Main { public static void main(String[] a) { for (int i = 0; i < 100; i++) System.out.println(i); } }",
    ),
)

# What cannot be made safe is refused before anything runs: (sandbox, metadata).
UNIT = {"mode": "unit", "entry_point": "f", "tests": "assert f(2) == 4"}
REFUSED = (
    ("bubblewrap", UNIT | {"language": "cpp"}),
    ("bubblewrap", UNIT | {"language": "java"}),
    ("unsafe", UNIT | {"language": "cpp"}),
    ("unsafe", UNIT | {"language": "java"}),
    ("remote", UNIT | {"language": "cpp"}),
    ("remote", UNIT | {"language": "java"}),
    ("remote", UNIT | {"language": "python"}),
    ("remote", {"language": "java", "mode": "function", "entry_point": "f", "tests": CALLS}),
)
