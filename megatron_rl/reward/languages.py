"""How a program of each language is compiled and run. The command lines are valid inside the sandbox."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rl.reward.sandbox import Limits, Outcome
from megatron_rl.reward.sandbox.box import Bubblewrap
from megatron_rl.reward.sandbox.unsafe import Unsafe

__all__ = ["ALIASES", "LANGUAGES", "Box", "Language", "Program", "build", "java_classes", "java_source"]

Box = Bubblewrap | Unsafe
PROGRAM_BYTES = 64 << 20
PYTHON = ("/usr/bin/python3", "-I")
# a small machine with one collector thread and the quick compiler starts in a third of the time
JAVA_FLAGS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto")
JAVA_OVERHEAD_MB = 192  # of a Java machine beside its heap
JAVA_STACK_MB = 256
COMPILER_MB = 1024
SMALL_STACKS = """#include <pthread.h>
__attribute__((constructor)) static void small_stacks() {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 8 << 20);
    pthread_setattr_default_np(&attributes);
}
"""
"""The first thread of a C++ program may recurse through all of its memory; the others would reserve as much each."""
ALIASES = {"python": ("python", "python3", "py", "py3"), "cpp": ("cpp", "c++", "cc", "cxx", "c++17", "cpp17"),
           "java": ("java",)}


@dataclass(frozen=True)
class Language:
    """One language.

    - compile: source file names -> the shell line that writes the program to standard output; None: not compiled.
    - run: the command line, given the limits.
    - program: the name under which the compiled program is placed.
    - beside: further files for the compiler.
    - deep: whether the first thread's stack may take all of the memory.
    """

    needs: str
    compile: Callable[[list[str]], str] | None
    run: Callable[[Limits], list[str]]
    program: str
    address_space: bool = True
    beside: Mapping[str, str] = field(default_factory=dict)
    deep: bool = False


def _tool(name: str) -> str:
    """Where a tool really lies: /usr/bin has links through /etc, which the sandbox does not have."""
    path = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    return str(Path(path).resolve()) if path else f"/usr/bin/{name}"


def _compile_cpp(sources: list[str]) -> str:
    return (f"g++ -O1 -std=c++17 -pipe -pthread -fmax-errors=3 -o /tmp/program {' '.join(sources)} /box/stacks.cpp "
            "&& cat /tmp/program")


def _compile_java(sources: list[str]) -> str:
    flags = " ".join(f"-J{flag}" for flag in (*JAVA_FLAGS, "-Xmx512m"))
    return (f"{_tool('javac')} {flags} -proc:none -nowarn -Xmaxerrs 3 -d /tmp/out {' '.join(sources)} "
            "&& tar -cC /tmp/out .")


def _run_java(limits: Limits) -> list[str]:
    heap = max(32, limits.memory_mb - JAVA_OVERHEAD_MB)
    flags = f"-ea -Xmx{heap}m -Xss{JAVA_STACK_MB}m {' '.join(JAVA_FLAGS)}"
    line = f"tar -xC /tmp/ -f /box/program.tar && exec {_tool('java')} {flags}"
    return ["/bin/sh", "-c", f'{line} -cp /tmp/ "$0"']


LANGUAGES = {
    "python": Language("/usr/bin/python3", None, lambda _: [*PYTHON, "/box/main.py"], "main.py"),
    "cpp": Language("g++", _compile_cpp, lambda _: ["/box/program"], "program",
                    beside={"stacks.cpp": SMALL_STACKS}, deep=True),
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
    """The program, compiled in a sandbox of its own; the compiler's Outcome if it fails.

    sources: file name -> text; Python has one, main.py.
    """
    kind = LANGUAGES[language]
    files = {name: text.encode(errors="replace") for name, text in sources.items()}
    limits = replace(limits, address_space=kind.address_space,
                     stack_mb=limits.memory_mb if kind.deep else limits.stack_mb)
    if kind.compile is not None:
        compiling = replace(limits, cpu_s=compile_s, wall_s=None, memory_mb=COMPILER_MB, output_bytes=PROGRAM_BYTES)
        line = kind.compile([f"/box/{name}" for name in files])
        files |= {name: text.encode() for name, text in kind.beside.items()}
        outcome = box.run(["/bin/sh", "-c", line], files, limits=compiling)
        if outcome.status != "ok":
            return replace(outcome, status="compile_error") if outcome.status == "runtime_error" else outcome
        files = {kind.program: outcome.stdout}
    return Program(box, (*kind.run(limits), *([main_class] if language == "java" else [])), files, limits)


@dataclass(frozen=True)
class JavaClasses:
    """The top-level classes of a Java source: what its file must be called, and which class it starts in."""

    names: tuple[str, ...]
    public: str | None
    main: str | None
    owners: Mapping[str, list[str]]
    """Method name -> the classes that have it."""

    def owner(self, method: str) -> str:
        """The class that holds a method of that name: Solution, the public one, or the first that has it."""
        has_it = self.owners.get(method, ())
        likely = [name for name in ("Solution", self.public) if name in (has_it or self.names)]
        return [*likely, *has_it, self.start][0]

    @property
    def file(self) -> str:
        return f"{self.public or self.start}.java"

    @property
    def start(self) -> str:
        return self.main or self.public or (self.names[-1] if self.names else "Main")


_JAVA_ASIDE = re.compile(r'//[^\n]*|/\*(?:.*?\*/|.*)|"""(?:.*?"""|.*)|"(?:\\.|[^"\\\n])*+"|'
                         r"'(?:\\.|[^'\\\n])*+'", re.DOTALL)
_JAVA_PART = re.compile(r"[{}]|\b(?:(public)\s+)?(?:(?:final|abstract|sealed|strictfp)\s+)*"
                        r"(?:class|record|enum|interface)\s+(\w+)|\b(\w+)\s*\(")


def java_classes(source: str) -> JavaClasses:
    depth, names, public, owners = 0, [], None, {}
    for part in _JAVA_PART.finditer(_JAVA_ASIDE.sub(" ", source)):
        is_public, name, method = part.groups()
        if name is None and method is None:
            depth = max(0, depth + (1 if part[0] == "{" else -1))
        elif name is not None and depth == 0:
            names.append(name)
            public = name if is_public else public
        elif method is not None and depth == 1 and names:
            has_it = owners.setdefault(method, [])
            has_it += [names[-1]] if has_it[-1:] != [names[-1]] else []
    return JavaClasses(tuple(names), public, next(iter(owners.get("main", ())), None), owners)


def java_source(context: str, code: str) -> str:
    """One Java file made of both: every import comes first, and package lines are left out."""
    whole = f"{context}\n{code}" if context else code
    imports = re.compile(r"^[ \t]*import\s+(?:static\s+)?[\w.]+(?:\.\*)?[ \t]*;", re.MULTILINE)
    whole = re.sub(r"^[ \t]*package\s+[\w.]+[ \t]*;", "", whole, flags=re.MULTILINE)
    if not context:
        return whole
    first = "".join(dict.fromkeys(f"{line.strip()} " for line in imports.findall(whole)))
    return first + imports.sub("", whole)


def _is_syntax_error(outcome: Outcome) -> bool:
    """Whether Python could not read the program itself; it then reports no traceback."""
    text = outcome.stderr.decode(errors="replace")
    return not text.startswith("Traceback") and bool(re.search(r"^(Syntax|Indentation|Tab)Error: ", text, re.MULTILINE))
