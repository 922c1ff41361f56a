"""Code rewards: languages, modes, statuses, and programs that try to be told right without being right."""

import tempfile
from dataclasses import replace

import pytest

from megatron_rl.config.reward import CodeConfig
from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.benchmarks import PYTHON_IMPORTS
from megatron_rl.reward import RewardPool, Routes
from megatron_rl.reward.code import CodeScorer
from megatron_rl.reward.judges import solution_code
from megatron_rl.reward.languages import java_classes
from megatron_rl.types import Prompt
from tests.sandboxes import needs_language, needs_sandbox

SUMS = {"mode": "stdin", "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]}
CALLS = {"mode": "function", "entry_point": "f",
         "tests": [{"args": [[1, 2, 3], "a\"\\ \u00e9\n"], "expected": [6, "a\"\\ \u00e9\n"]}]}
SQUARES = {"mode": "unit", "entry_point": "f",
           "tests": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"}
ASSERTS = {"mode": "unit", "entry_point": "f", "tests": "assert f(2) == 4\nassert f(3) == 9"}
CPP_SUM = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
JAVA_SUM = ("import java.util.*;\npublic class Sum { public static void main(String[] a) { Scanner s = new "
            "Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }")


def prompt(language, **metadata):
    return Prompt("p", (1,), "question", "answer", "code", {"language": language, **metadata})


def response(code, tag=""):
    return f"I think:\n```{tag}\n{code}\n```\nThat is it."


@pytest.fixture(scope="module")
def scorer():
    return CodeScorer(RewardConfig())


FAST = [
    ("correct", "python", SUMS, "print(sum(map(int, input().split())))"),
    ("wrong", "python", SUMS, "print(3)"),
    ("compile_error", "python", SUMS, "print(3"),
    ("runtime_error", "python", SUMS, "print(3); raise KeyError"),
    ("memory_limit", "python", SUMS, "x = bytearray(2 << 30)"),
    ("output_limit", "python", SUMS, "while True: print('x' * 9999)"),
    ("correct", "python", CALLS, "def f(x, s):\n    print('noise')\n    return sum(x), s"),
    ("wrong", "python", CALLS, "def f(x, s): return sum(x)"),
    ("correct", "python", SQUARES, "def f(x): return x * x"),
    ("wrong", "python", SQUARES, "def f(x): return x + x"),
]
SLOW = [
    ("timeout", "python", SUMS | {"time_s": 1}, "while True: pass"),
    ("correct", "python", ASSERTS, "def f(x): return x * x"),
    ("correct", "python", SQUARES | {"context": PYTHON_IMPORTS},
     "class Solution:\n    def f(self, x: Optional[int]) -> List[int]: return math.prod(islice(repeat(x), 2))"),
    ("correct", "python", SQUARES, "class Solution:\n    def f(self, x): return x * x"),
    ("correct", "python", SQUARES | {"context": "import math\ndef f(x):\n"}, "    return int(math.pow(x, 2))"),
    ("runtime_error", "python", CALLS, "def f(x, s): return x.y"),
    ("correct", "python", CALLS, "async def f(x, s): return sum(x), s"),
    ("runtime_error", "python", CALLS, "def g(x, s): return 1"),
    ("compile_error", "python", CALLS, "def f(x, s) return 1"),
    ("runtime_error", "python", SQUARES, "def f(x): raise ValueError('no')"),
    ("compile_error", "python", SQUARES, "def f(x"),
    ("timeout", "python", SQUARES | {"time_s": 1}, "def f(x):\n    while True: pass"),
    ("memory_limit", "python", SQUARES, "def f(x): raise MemoryError(bytearray(2 << 30))"),
    # C++ and Java
    ("correct", "cpp", SUMS, CPP_SUM),
    ("wrong", "cpp", SUMS, CPP_SUM.replace("a + b", "a - b")),
    ("compile_error", "cpp", SUMS, CPP_SUM[:-1]),
    ("memory_limit", "cpp", SUMS, "#include <vector>\nint main() { std::vector<char> x(2000000000, 1); }"),
    ("runtime_error", "cpp", SUMS, "int main() { return *(volatile int*)8; }"),
    ("correct", "cpp", CALLS, "#include <vector>\n#include <string>\nusing namespace std;\n"
     "pair<int, string> f(vector<int>& x, const string& s) { return {x[0] + x[1] + x[2], s}; }"),
    ("correct", "java", SUMS, JAVA_SUM),
    ("wrong", "java", SUMS, JAVA_SUM.replace("() +", "() -")),
    ("compile_error", "java", SUMS, JAVA_SUM[:-1]),
    ("memory_limit", "java", SUMS, "class A { public static void main(String[] a) { long[] x = new long[1 << 28]; } }"),
    ("correct", "java", CALLS, "import java.util.*;\nclass Solution { public List<Object> f(int[] x, String s) { "
                               "System.out.println(s); return List.of(x[0] + x[1] + x[2], s); } }"),
]
CASES = [pytest.param(*case, id=f"{case[1]}-{case[2]['mode']}-{case[0]}-{number}",
                      marks=[needs_sandbox, needs_language(case[1]), *([pytest.mark.slow] if case in SLOW else [])])
         for number, case in enumerate(FAST + SLOW)]


@pytest.mark.parametrize(("status", "language", "task", "code"), CASES)
def test_a_program_gets_its_status_and_1_only_if_all_tests_pass(scorer, status, language, task, code):
    score = scorer.score(prompt(language, **task), response(code))
    assert (score.status, score.value) == (status, float(status == "correct")), score


def test_a_process_that_a_program_left_behind_is_no_error_of_the_scorer(monkeypatch, tmp_path):
    """It writes into the folder that is removed. A sandbox would have ended it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    daemon = """import os, time
print(sum(map(int, input().split())), flush=True)
if os.fork() == 0:
    os.setsid()
    os.close(1)
    os.close(2)
    os.mkdir("left")
    end = time.monotonic() + 2
    while time.monotonic() < end:
        for i in range(10):
            open(f"left/{i}", "w").close()
    os._exit(0)
while not os.path.exists("left/9"): time.sleep(0.01)
"""
    unsafe = CodeScorer(RewardConfig(sandbox="unsafe"))
    assert unsafe.score(prompt("python", **SUMS), response(daemon)).status == "correct"


@pytest.mark.slow
@pytest.mark.parametrize(("status", "language", "task", "code"), [case for case in FAST if case[0] != "output_limit"])
def test_unsafe_gives_the_same_verdicts(status, language, task, code):
    unsafe = CodeScorer(RewardConfig(sandbox="unsafe"))
    assert unsafe.score(prompt(language, **task), response(code)).status == status


@needs_sandbox
def test_the_pool_judges_programs_and_remembers_them():
    with RewardPool(RewardConfig(routes={"code": "code"}, workers=1)) as pool:
        right = "print(sum(map(int, input().split())))"
        items = [(prompt("python", **SUMS), response(code)) for code in ("print(3)", right, "print(3)")]
        assert [score.status for score in pool.score_many(items)] == ["wrong", "correct", "wrong"]
        assert pool.jobs_sent == 2


def test_without_bubblewrap_it_refuses_and_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    from megatron_rl.reward.sandbox import box
    box._failure.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"reward.routes.code=code: the sandbox .*bwrap is not installed.*apt-get "
                                             r"install bubblewrap.*reward.sandbox=unsafe"):
            Routes({"code": "code"})
        Routes({"code": "code"}, RewardConfig(sandbox="unsafe"))
    finally:
        box._failure.cache_clear()


def test_a_sandbox_that_fails_is_refused_like_one_that_is_not_there():
    from megatron_rl.reward.sandbox import Bubblewrap
    with pytest.raises(RuntimeError, match="cannot run here: false fails"):
        Bubblewrap("false").check()


@pytest.mark.parametrize(("metadata", "message"), [
    ({"mode": "stdin"}, "language=None"), ({"language": "rust", "mode": "stdin"}, "python | cpp | java"),
    ({"language": "cpp"}, "mode=None"), ({"language": "cpp", "mode": "stdin"}, "tests of mode=stdin"),
    ({"language": "cpp", "mode": "stdin", "tests": [{"input": "1"}]}, "input and output"),
    ({"language": "python", "mode": "unit", "tests": "assert True"}, "needs entry_point"),
    ({"language": "python", "mode": "unit", "tests": "assert f(", "entry_point": "f"}, "its tests are no Python"),
    ({"language": "python", "mode": "unit", "tests": "f()", "entry_point": "f(x)"}, "is none of f, Class.f"),
    ({"language": "python", "mode": "unit", "tests": "f()", "entry_point": 3}, "entry_point must be text"),
    ({"language": "python", **SUMS, "context": ["import math"]}, "context must be text"),
    ({"language": "python", **SUMS, "time_s": "long"}, "time_s='long' must be a number"),
    ({"language": "python", **SUMS, "time_s": 0}, "time_s=0"),
    ({"language": "python", **SUMS, "memory_mb": True}, "memory_mb=True"),
    ({"language": "python", **SUMS, "tolerance": -1}, "tolerance=-1"),
    ({"language": "python", **SUMS, "time_s": float("inf")}, "inf"),
    ({"language": "python", **SUMS, "time_s": 10 ** 400}, "time_s=1000"),
    ({"language": ["python"], **SUMS}, "language="),
    ({"language": "python", "mode": "stdin", "tests": [{"input": "1", "output": " \n"}] * 2}, "expects anything"),
    ({"language": "python", "mode": "function", "entry_point": "f", "tests": [{"args": [1], "expected": None}]},
     "no test expects anything"),
    ({"language": "cpp", "mode": "stdin", "tests": [{"input": "1", "output": ["2"]}]}, "test 1: output must be text"),
    ({"language": "cpp", "mode": "function", "entry_point": "f", "tests": [
        {"args": [1], "expected": 1}, {"args": [None], "expected": 1}]}, "test 2: an argument of type NoneType"),
    ({"language": "java", "mode": "function", "entry_point": "f", "tests": [{"args": 1, "expected": 1}]},
     "test 1: args must be a list"),
    ({"language": "python", "mode": "function", "entry_point": "f", "tests": [{"args": [object()], "expected": 1}]},
     "test 1: a value of type")])
def test_a_problem_without_what_judging_needs_names_it(metadata, message):
    scorer = CodeScorer(RewardConfig(sandbox="unsafe"))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        scorer.prepare(Prompt("p", (1,), "q", "a", "code", metadata), response("x"))
    with pytest.raises(ValueError, match=f"prompt p: .*{message}".replace("|", r"\|")):
        scorer.check(Prompt("p", (1,), "q", "a", "code", metadata))


@pytest.mark.parametrize("columns", [{"language": "Python3"}, {"language": "PY"},
{"language": "python", "time_s": None, "context": None},
                                     {"language": "python", "time_s": 1.5, "memory_mb": 256.0, "tolerance": 0}])
def test_rows_as_the_world_has_them_are_fine(columns):
    scorer = CodeScorer(RewardConfig(sandbox="unsafe"))
    scorer.check(prompt(**SUMS | columns))
    job = scorer.prepare(prompt(**SUMS | columns), response("x"))
    assert job.args[1].language == "python" and job.args[1].time_s == (columns.get("time_s") or 4.0)


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("```python\na\n```\n```py\nb\n```", "python", "b\n"),
        ("```\na\n```", "cpp", "a\n"),
        ("```java\na\n```", "cpp", None),
        ("```c++\na\n```\n```text\nout\n```", "cpp", "a\n"),
        ("```python\nopen", "python", None),
        ("print(1)", "python", None),
        ("- so:\n  ```python title=x\n  a\n  ```", "python", "a\n"),
        ("```python\na\n```\nIt prints\n```\n4\n```", "python", "a\n"),
        ("```\na\n```\n```\nb\n```", "python", "b\n"),
        ("```Python\na\n```", "python", "a\n"),
        ("``` {.python}\na\n```", "python", "a\n"),
        ("```python:x.py\na\n```", "python", "a\n"),
        ("~~~python\na\n```\n~~~", "python", "a\n```\n"),
        ("````python\n```\n````", "python", "```\n"),
        ("```python\na\n```python\nb\n```", "python", "a\n```python\nb\n"),
        ("1. x\n\n   ```py\n   a\n     b\n   ```", "python", "a\n  b\n"),
        ("> ```py\n> a\n> ```", "python", "a\n"),
        ("    ```py\n    a\n    ```", "python", None),
        ("```py\r\na\r\n```", "python", "a\n"),
        ("```py\n\ta = '\x0c'\n```", "python", "\ta = '\x0c'\n"),
        ("x ```py\na\n```", "python", None),
        ("```py `x`\na\n```", "python", None),
    ],
)
def test_the_last_closed_block_of_the_language_counts(text, language, code):
    assert solution_code(text, language, in_thinking=False) == code


@pytest.mark.parametrize(
    ("text", "without", "within"),
    [
        ("<think>\n```py\na\n```\n</think>\n```py\nb\n```", "b\n", "b\n"),
        ("<think>```\n```py\na\n```\n</think> done", None, "a\n"),
        ("\n```py\na\n```\n</think>\nDone.", None, "a\n"),
        ("<think>\n```py\na\n```", None, "a\n"),
        ("```py\nprint('<think>')\n```", "print('<think>')\n", "print('<think>')\n"),
    ],
)
def test_blocks_of_the_thinking_count_only_if_the_key_says_so(text, without, within):
    assert solution_code(text, "python", in_thinking=False) == without
    assert solution_code(text.replace("<think>```\n", "<think>\n"), "python", in_thinking=True) == within


def test_the_key_for_blocks_of_the_thinking_reaches_the_judge():
    block, asked = "```py\nprint(sum(map(int, input().split())))\n```\n", prompt("python", **SUMS)
    for judge_thinking, status in ((False, "no_answer"), (True, "correct")):
        config = RewardConfig(sandbox="unsafe", code=CodeConfig(judge_thinking=judge_thinking))
        assert CodeScorer(config).score(asked, f"{block}</think>").status == status
        opened = replace(asked, text=f"{asked.text}<think>\n")  # by the chat template; the response never closes it
        assert CodeScorer(config).score(opened, block).status == status


@pytest.mark.parametrize(
    ("source", "file", "start"),
    [
        ("public class A { }", "A.java", "A"),
        ("class B {} public final class C {}", "C.java", "C"),
        ("record R() {}", "R.java", "R"),
        ("class A {} class B { public static void main(String[] a) {} } class C {}", "B.java", "B"),
        (
            'class A { static class In { } /* class X { */ static void main (String[] a) { String s = "class Y {"; } }',
            "A.java",
            "A",
        ),
        ("public class A { } class B { static void main(String[] a) { } }", "A.java", "B"),
        ("", "Main.java", "Main"),
    ],
)
def test_the_class_that_java_starts_in(source, file, start):
    classes = java_classes(source)
    assert (classes.file, classes.start) == (file, start)
