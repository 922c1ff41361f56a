"""How a program of each language is compiled and run; the command lines are of the sandbox's world."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.reward.sandbox import Limits, Outcome
from megatron_rl.reward.sandbox.box import Bubblewrap
from megatron_rl.reward.sandbox.unsafe import Unsafe

__all__ = ["ALIASES", "LANGUAGES", "Box", "Language", "Program", "build", "java_class"]

Box = Bubblewrap | Unsafe
PROGRAM_BYTES = 64 << 20
PYTHON = ("/usr/bin/python3", "-I")
# a small machine with one collector thread and the quick compiler starts in a third of the time
JAVA_FLAGS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto")
JAVA_OVERHEAD_MB = 192  # of a Java machine beside its heap
COMPILER_MB = 1024
ALIASES = {"python": ("python", "python3", "py"), "cpp": ("cpp", "c++", "cc", "cxx"), "java": ("java",)}


@dataclass(frozen=True)
class Language:
    """compile: source file names -> the shell line that writes the program to standard output; None: not compiled.

    run: the command line, given the limits; program: the name under which the compiled program is placed.
    """

    needs: str
    compile: Callable[[list[str]], str] | None
    run: Callable[[Limits], list[str]]
    program: str
    address_space: bool = True


def _tool(name: str) -> str:
    """Where a tool really lies: /usr/bin has links through /etc, which the sandbox does not have."""
    path = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    return str(Path(path).resolve()) if path else f"/usr/bin/{name}"


def _compile_cpp(sources: list[str]) -> str:
    return f"g++ -O1 -std=c++17 -pipe -fmax-errors=3 -o /tmp/program {' '.join(sources)} && cat /tmp/program"


def _compile_java(sources: list[str]) -> str:
    flags = " ".join(f"-J{flag}" for flag in (*JAVA_FLAGS, "-Xmx512m"))
    return (f"{_tool('javac')} {flags} -proc:none -nowarn -Xmaxerrs 3 -d /tmp/out {' '.join(sources)} "
            "&& tar -cC /tmp/out .")


def _run_java(limits: Limits) -> list[str]:
    heap = max(32, limits.memory_mb - JAVA_OVERHEAD_MB)
    line = f"tar -xC /tmp/ -f /box/program.tar && exec {_tool('java')} -ea -Xmx{heap}m -Xss32m {' '.join(JAVA_FLAGS)}"
    return ["/bin/sh", "-c", f'{line} -cp /tmp/ "$0"']


LANGUAGES = {
    "python": Language("/usr/bin/python3", None, lambda _: [*PYTHON, "/box/main.py"], "main.py"),
    "cpp": Language("g++", _compile_cpp, lambda _: ["/box/program"], "program"),
    "java": Language("javac", _compile_java, _run_java, "program.tar", address_space=False),
}


@dataclass(frozen=True)
class Program:
    """Something that can be run many times, each time in a fresh sandbox."""

    box: Box
    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    limits: Limits

    def __call__(self, stdin: bytes, output_bytes: int) -> Outcome:
        outcome = self.box.run(self.argv, self.files, stdin=stdin,
                               limits=replace(self.limits, output_bytes=output_bytes))
        if outcome.status == "runtime_error" and _is_syntax_error(outcome):
            return replace(outcome, status="compile_error")
        return outcome


def build(box: Box, language: str, sources: Mapping[str, str], limits: Limits, *, compile_s: int,
          main_class: str = "") -> Program | Outcome:
    """The program, compiled in a sandbox of its own; the Outcome of the compiler where it fails.

    sources: file name -> text; Python has one, main.py.
    """
    kind = LANGUAGES[language]
    files = {name: text.encode(errors="replace") for name, text in sources.items()}
    limits = replace(limits, address_space=kind.address_space)
    if kind.compile is not None:
        compiling = replace(limits, cpu_s=compile_s, wall_s=None, memory_mb=COMPILER_MB, output_bytes=PROGRAM_BYTES)
        line = kind.compile([f"/box/{name}" for name in files])
        outcome = box.run(["/bin/sh", "-c", line], files, limits=compiling)
        if outcome.status != "ok":
            return replace(outcome, status="compile_error") if outcome.status == "runtime_error" else outcome
        files = {kind.program: outcome.stdout}
    return Program(box, (*kind.run(limits), *([main_class] if language == "java" else [])), files, limits)


def java_class(source: str) -> str:
    """The class that a Java program starts in, which is also the name its file must have: the public one, or the one
    nearest above `main`."""
    public = re.search(r"\bpublic\s+(?:final\s+|abstract\s+)*(?:class|record|enum|interface)\s+(\w+)", source)
    if public:
        return public[1]
    before = source[:source.find(" main(")] if " main(" in source else source
    classes = re.findall(r"\bclass\s+(\w+)", before)
    return classes[-1] if classes else "Main"


def _is_syntax_error(outcome: Outcome) -> bool:
    """Python says so without a traceback when it is the program itself that it cannot read."""
    text = outcome.stderr.decode(errors="replace")
    return not text.startswith("Traceback") and bool(re.search(r"^(Syntax|Indentation|Tab)Error: ", text, re.MULTILINE))
