"""Right programs are right however they are written, and values of every kind cross between tests and solution."""

import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward.code import CodeScorer
from megatron_rl.types import Prompt, Score
from tests.sandboxes import needs_language, needs_sandbox


def prompt(language, **metadata):
    return Prompt("p", (1,), "question", "answer", "code", {"language": language, **metadata})


def response(code):
    return f"I think:\n```\n{code}\n```\nThat is it."


@pytest.fixture(scope="module")
def scorer():
    return CodeScorer(RewardConfig())


HONEST = "def f(x): return x * x"
ROUGH = [  # right programs that a harness may misunderstand: (metadata beside mode and entry_point f, source)
    ({"context": "import math"}, "from __future__ import annotations\ndef f(x: Later): return x * x"),
    ({"context": "from __future__ import annotations"}, "def f(x: Later): return x * x"),
    ({"context": "def f(x):"}, "    return x * x"),
    ({"context": 'def f(x):\n    """Squares."""'}, "    return x * x"),
    ({"context": "import math"}, HONEST),
    ({"context": "def f(x):\n    pass\n"}, HONEST),
    ({"context": None}, HONEST),
    (
        {},
        "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
        "def f(x): return pickle.loads(pickle.dumps(A(x))).x ** 2",
    ),
    ({}, "import sys\nassert sys.modules[__name__].__file__\n" + HONEST),
    ({}, HONEST + "\nif __name__ == '__main__':\n    print(f(int(input())))"),
    (
        {},
        "class Solution:\n    def __init__(self): self.seen = []\n"
        "    def f(self, x): self.seen.append(x * x); return sum(self.seen)",
    ),
    ({"entry_point": "Solution().f"}, "class Solution:\n    def f(self, x): return x * x"),
    ({"entry_point": "Squares.f"}, "class Squares:\n    @staticmethod\n    def f(x): return x * x"),
    ({}, "f = lambda x: x * x"),
    ({}, "from operator import pow\nfrom functools import partial\nf = partial(lambda x: pow(x, 2))"),
    ({}, "def depth(n): return 0 if n == 0 else 1 + depth(n - 1)\ndef f(x): return x * x + depth(100_000) - 100_000"),
    (
        {},
        "from functools import cache\n@cache\ndef depth(n): return 0 if n == 0 else 1 + depth(n - 1)\n"
        "def f(x): return x * x + depth(20_000) - 20_000",
    ),
    ({}, "import sys\nprint('x' * 300_000, file=sys.stderr)\n" + HONEST),
    ({}, "import sys\nsys.stderr.write('bwrap: ')\n" + HONEST),
    (
        {},
        "import threading\ndef f(x):\n    found = []\n"
        "    threads = [threading.Thread(target=found.append, args=(x * x,)) "
        "for _ in range(20)]\n    for each in threads: each.start()\n    for each in threads: each.join()\n"
        "    return found[0]",
    ),
    ({"time_s": 1.9}, "import time\ndef f(x):\n    while time.process_time() < 1.1: pass\n    return x * x"),
]


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("mode", ["unit", "function"])
@pytest.mark.parametrize(("metadata", "code"), ROUGH)
def test_a_right_program_is_right_however_it_is_written(scorer, mode, metadata, code):
    tests = (
        "assert f(2) == 4\nassert f(3) == 9"
        if mode == "unit"
        else [{"args": [2], "expected": 4}, {"args": [3], "expected": 9}]
    )
    score = scorer.score(prompt("python", **{"entry_point": "f", **metadata}, mode=mode, tests=tests), response(code))
    assert score == Score(1.0, "correct")


NODES = """
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
def chain(values):
    head = None
    for value in reversed(values): head = Node(value, head)
    return head
def values(head):
    found = []
    while head: found.append(head.value); head = head.next
    return found
"""
CROSSINGS = [  # values between tests and solution: (tests, solution, context)
    ("x = [3, 1, 2]\nassert f(x) is None and x == [1, 2, 3]", "def f(x): x.sort()", ""),
    (
        "x = [[1, 2], [3, 4]]\nrow = x[0]\nf(x)\nassert x == [[1, 3], [2, 4]] and row == [1, 3]",
        "def f(x): x[0][1], x[1][0] = x[1][0], x[0][1]",
        "",
    ),
    (
        "x, y, z = {}, set(), bytearray()\nf(x, y, items=z)\nassert x == {1: (2,)} and y == {3} and z == b'4'",
        "def f(x, y, items): x[1] = (2,); y.add(3); items.extend(b'4')",
        "",
    ),
    ("assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0", "def f(n):\n    for i in range(n): yield i", ""),
    (
        "import itertools\nassert list(itertools.islice(f(), 3)) == [0, 1, 2]",
        "import itertools\ndef f(): return itertools.count()",
        "",
    ),
    ("assert f(3) == range(3) and list(f(3)) == [0, 1, 2]", "f = range", ""),
    ("assert f(3)(4) == 7", "def f(x): return lambda y: x + y", ""),
    ("assert f(lambda x: x + 1, [1, 2]) == [2, 3]", "def f(each, items): return list(map(each, items))", ""),
    ("assert f(['bb', 'a'], key=len) == ['a', 'bb']", "def f(items, key): return sorted(items, key=key)", ""),
    ("got = []\nf(got.append)\nassert got == [1, 2]", "def f(each): each(1); each(2)", ""),
    ("assert f(iter([1, 2, 3])) == 6", "def f(items): return sum(items)", ""),
    (
        "def bad(x): raise KeyError(x)\nassert f(bad) == 'caught'",
        "def f(g):\n    try: g(1)\n    except KeyError: return 'caught'",
        "",
    ),
    (
        "p = f(1, 2)\nassert p.x == 1 and p.length() == 3 and str(p) == 'P' and p == f(1, 2) and p != f(2, 1)",
        "class P:\n    def __init__(self, x, y): self.x, self.y = x, y\n    def length(self): return self.x + self.y\n"
        "    def __str__(self): return 'P'\ndef f(x, y): return P(x, y)",
        "",
    ),
    (
        "c = f(1)\nc.put(1, 1)\nc.put(2, 2)\nassert c.get(1) == -1 and c.get(2) == 2",
        "class f:\n    def __init__(self, size): self.kept = {}\n"
        "    def put(self, key, value): self.kept = {key: value}\n"
        "    def get(self, key): return self.kept.get(key, -1)",
        "",
    ),
    ("assert Solution().f(2) == 4 and f(3) == 9", "class Solution:\n    def f(self, x): return x * x", ""),
    ("assert helper(2) == 4 and f(2) == 4", "def helper(x): return x * x\nf = helper", ""),
    (
        "assert values(f(chain(list(range(5000))))) == list(range(5000))[::-1]",
        "def f(head):\n    last = None\n    while head: head.next, last, head = last, head, head.next\n    return last",
        NODES,
    ),
    ("head = chain([1, 2])\nf(head)\nassert values(head) == [1]", "def f(head): head.next = None", NODES),
    (
        "assert f(Color.RED) is Color.BLUE",
        "def f(color): return Color.BLUE",
        "from enum import Enum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\n",
    ),
    (
        "assert f(Pair(1, 2)) == Pair(2, 1) and f(Pair(1, 2)).left == 2",
        "def f(pair): return Pair(pair.right, pair.left)",
        "from typing import NamedTuple\nclass Pair(NamedTuple):\n    left: int\n    right: int\n",
    ),
    (
        "assert f(Pair(1, 2)) == Pair(2, 1)",
        "def f(pair): return Pair(pair.right, pair.left)",
        "from dataclasses import dataclass\n@dataclass(frozen=True, slots=True)\nclass Pair:\n    left: int\n"
        "    right: int\n",
    ),
    (
        "try: f(-1)\nexcept Negative as error: assert str(error) == 'no'\nelse: assert False",
        "def f(x): raise Negative('no')",
        "class Negative(ValueError): pass\n",
    ),
    (
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "assert f() == (Fraction(1, 2), Decimal('0.1'), 2j, b'x', "
        "10 ** 5000, {1, 2})",
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "def f(): return Fraction(1, 2), Decimal('0.1'), 2j, b'x', 10 ** 5000, {2, 1}",
        "",
    ),
    ("import asyncio\nassert asyncio.run(f(2)) == 4", "async def f(x): return x * x", ""),
    ("assert type(f(2)) is int and f('x') is str", "def f(x): return str if x == 'x' else x", ""),
    (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), 4)\n"
        "if __name__ == '__main__': unittest.main()",
        HONEST,
        "",
    ),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), 4)", HONEST, ""),
    ("from solution import f\ndef test_it(): assert f(2) == 4", HONEST, ""),
]


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize(("tests", "code", "context"), CROSSINGS)
def test_values_of_every_kind_cross_between_tests_and_solution(scorer, tests, code, context):
    task = {"mode": "unit", "entry_point": "f", "tests": tests, "context": context}
    assert scorer.score(prompt("python", **task), response(code)) == Score(1.0, "correct")
    wrong = scorer.score(prompt("python", **task), response("def f(*x, **y): return 'wrong'\nclass Solution: f = f"))
    assert wrong.value == 0 and wrong.status in ("wrong", "runtime_error")


COMPILED = [  # right programs in C++ and Java: (language, args, expected, source)
    ("cpp", [[3, 1]], [1, 3], "void f(vector<int>& x) { sort(x.begin(), x.end()); }"),
    (
        "cpp",
        [2],
        4,
        '#define int long long\nint calls, text, answers, print;\nint f(int x) { printf("noise\\n"); '
        "std::cout << 1; return x * x; }\nint32_t main() { return 3; }",
    ),
    (
        "cpp",
        [200_000],
        200_000,
        "class Solution { public: int f(int x) { volatile char room[500]; room[0] = 1; "
        "return x == 0 ? 0 : room[0] + f(x - 1); } };",
    ),
    ("cpp", [2], 4.0, "double f(int x) { return x * x; }"),
    ("cpp", [2], 4, "auto f(const int& x) { return long(x * x); }"),
    ("cpp", [2], [2, "a"], 'tuple<int, string> f(int x) { return {x, "a"}; }'),
    (
        "cpp",
        [2],
        4,
        "int f(int x) { int n = 0; vector<thread> all; for (int i = 0; i < 8; i++) all.emplace_back([] {}); "
        "for (auto& each : all) each.join(); return x * x + n; }",
    ),
    (
        "java",
        [[3, 1]],
        [1, 3],
        "import java.util.*;\nclass Solution { void f(int[] x) { Arrays.sort(x); } }\nclass Node { }",
    ),
    ("java", [2], 4, "package mine;\nimport java.util.*;\nclass Solution { int f(int x) { return x * x; } }"),
    (
        "java",
        [2],
        4,
        "class Helper { int f(String x) { return 0; } }\n"
        "public class Squares { static int f(int x) { return x * x; } }",
    ),
    (
        "java",
        [2],
        4,
        "class Arrays { } class List { } class Calls { } class Solution { int f(int x) { return x * x; } }",
    ),
    ("java", [50_000], 50_000, "class Solution { int f(int x) { return x == 0 ? 0 : 1 + f(x - 1); } }"),
]


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize(
    ("language", "args", "expected", "code"), [pytest.param(*case, marks=needs_language(case[0])) for case in COMPILED]
)
def test_right_functions_in_cpp_and_java_are_right(scorer, language, args, expected, code):
    context = {"cpp": "#include <vector>\nusing namespace std;", "java": "class Other { int value; }"}[language]
    task = {"mode": "function", "entry_point": "f", "context": context}
    right = scorer.score(prompt(language, **task, tests=[{"args": args, "expected": expected}]), response(code))
    assert right == Score(1.0, "correct")
    wrong = scorer.score(prompt(language, **task, tests=[{"args": args, "expected": [expected]}]), response(code))
    assert wrong.status == "wrong"


@needs_sandbox
def test_tests_that_judge_nothing_are_an_error_of_the_row(scorer):
    for tests in ("pass", "assert True", "def check(candidate): pass", "raise SystemExit(0)"):
        score = scorer.score(prompt("python", mode="unit", entry_point="f", tests=tests), response(HONEST))
        assert score.status == "error" and "no test calls f" in score.detail, tests
