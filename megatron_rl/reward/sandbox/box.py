"""bubblewrap: runs a program in namespaces of its own, with limits, without a network and without the host's files.

We tried one by one what each part prevents (tests/megatron_rl/reward/attacks.py). Four points are easily missed:

- bwrap's root and /dev are writable, unlimited memory until they are remounted read-only.
- The first process inside is bwrap's own. It has no seccomp filter, and the program can write to its memory until
  /proc/1 is covered.
- --clearenv leaves the parent's environment in it, so bwrap itself starts with an empty one.
- Nested user namespaces are open without --disable-userns.
"""

from __future__ import annotations

import fcntl
import functools
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.reward.sandbox.limits import Limits, Outcome
from megatron_rl.reward.sandbox.seccomp import deny_filter
from megatron_rl.reward.sandbox.slots import leased_uid
from megatron_rl.reward.sandbox.watch import kill, watch

__all__ = ["Bubblewrap", "Running"]

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1"}
SHM_BYTES = 8 << 20
END_S = 10.0
NEW_SESSION = "/usr/bin/setsid"
"""For the program alone: bwrap's --new-session takes its own first process along, out of the group that is killed."""
GET_IT = ("install bubblewrap 0.8 or later (apt-get install bubblewrap) and allow unprivileged user namespaces "
          "(in a container: --security-opt seccomp=unconfined, or run where they are allowed). To run generated code "
          "without any isolation, with your rights and your files, say so: reward.sandbox=unsafe")


@dataclass
class Running:
    """A started sandbox. outcome() waits for its end; kill() ends it.

    report: a descriptor with what bwrap itself says about the run (--json-status-fd); None without bwrap.
    """

    process: subprocess.Popen[bytes]
    ended: int
    limits: Limits
    report: int | None = None
    killed: bool = False

    def outcome(self, beside: Running | None = None) -> Outcome:
        """RuntimeError if the sandbox failed, not the program. beside: a sandbox that it works with."""
        outcome = watch(self.process, self.ended, self.limits, None if beside is None else beside.process.pid)
        ended_itself = outcome.status in ("runtime_error", "memory_limit") and self.process.returncode > 0
        if ended_itself and not self.killed and not self._program_ran():
            raise RuntimeError(f"the sandbox failed: {outcome.message}")
        return outcome

    def kill(self) -> None:
        self.killed = True
        kill(self.process, self.ended)

    def _program_ran(self) -> bool:
        """Whether the program ran.

        bwrap only reports an exit code if it started the program, which cannot reach this pipe.
        """
        if self.report is None:
            return True
        return bool(select.select([self.report], [], [], 0.0)[0]) and b'"exit-code"' in os.read(self.report, 4096)


@dataclass(frozen=True)
class Bubblewrap:
    """Runs command lines in a sandbox; `files` appear read-only under /box, /tmp is writable and ends with the run."""

    command: str = "bwrap"
    folder: str = field(default="/box", init=False)

    def check(self) -> None:
        """RuntimeError that says what to do if the sandbox cannot run."""
        failure = _failure(self.command)
        if failure:
            raise RuntimeError(f"the sandbox of code rewards cannot run here: {failure}; {GET_IT}")

    def run(self, argv: Sequence[str], files: Mapping[str, bytes], *, stdin: bytes = b"", limits: Limits) -> Outcome:
        with self.start(argv, files, stdin=stdin, limits=limits) as running:
            return running.outcome()

    @contextmanager
    def start(self, argv: Sequence[str], files: Mapping[str, bytes], *, stdin: bytes | int, limits: Limits,
              stdout: int = subprocess.PIPE) -> Iterator[Running]:
        """A running sandbox; nothing of it is left after the block. stdin, stdout: bytes, or a descriptor."""
        with ExitStack() as stack:
            uid = stack.enter_context(leased_uid())
            ended, sandbox_end = os.pipe()
            stack.callback(os.close, ended)
            report, report_end = os.pipe()
            stack.callback(os.close, report)
            with ExitStack() as handed_over:
                handed_over.callback(os.close, sandbox_end)
                handed_over.callback(os.close, report_end)
                given = handed_over.enter_context(_sealed(stdin)) if isinstance(stdin, bytes) else stdin
                seccomp = handed_over.enter_context(_sealed(deny_filter()))
                data = {name: handed_over.enter_context(_sealed(content)) for name, content in files.items()}
                line = [*_as_user(uid), self.command, *_walls(limits), *_placed(data), "--seccomp", str(seccomp),
                        "--sync-fd", str(sandbox_end), "--json-status-fd", str(report_end), "--chdir", "/tmp",
                        "--", NEW_SESSION, *limits.commands(), *argv]
                process = subprocess.Popen(
                    line, env=ENVIRONMENT, cwd="/", stdin=given, stdout=stdout, stderr=subprocess.PIPE, bufsize=0,
                    pass_fds=(seccomp, sandbox_end, report_end, *data.values()), start_new_session=True)
            stack.callback(_end, process, ended)
            with suppress(OSError):  # the first to go when the machine itself runs out of memory
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            yield Running(process, ended, limits, report)


def _end(process: subprocess.Popen[bytes], ended: int) -> None:
    """Kills what is left and waits for the end of its first process (the pipe closes); the kernel ends the others."""
    kill(process, ended)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    if not select.select([ended], [], [], END_S)[0]:
        raise RuntimeError(f"a sandbox lives on after its end (it was started as process {process.pid})")


def _as_user(uid: int | None) -> list[str]:
    """Changes the user by a command: subprocess's own `user` forks, which copies the page tables of a large worker."""
    return [] if uid is None else ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


@functools.cache
def _system() -> tuple[str, ...]:
    """The programs of the host, read-only: /usr, the links into it, and the settings that a Java machine reads."""
    links = [word for name in ("lib", "lib64", "bin", "sbin") if Path(f"/{name}").is_symlink()
             for word in ("--symlink", os.readlink(f"/{name}"), f"/{name}")]
    java = [word for folder in sorted(Path("/etc").glob("java-*")) for word in ("--ro-bind", str(folder), str(folder))]
    return ("--ro-bind", "/usr", "/usr", *links, *java)


def _walls(limits: Limits) -> list[str]:
    return ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--cap-drop", "ALL",
            "--uid", "65534", "--gid", "65534", "--hostname", "box", *_system(), "--proc", "/proc", "--dev", "/dev",
            *_memory("/proc/1", 4096), *_memory("/dev/shm", SHM_BYTES), *_memory("/tmp", limits.files_mb << 20)]


def _memory(path: str, size_bytes: int) -> tuple[str, ...]:
    return "--size", str(size_bytes), "--tmpfs", path


def _placed(data: Mapping[str, int]) -> list[str]:
    files = [word for name, descriptor in data.items()
             for word in ("--perms", "0555", "--file", str(descriptor), f"/box/{name}")]
    return ["--dir", "/box", *files, *(word for path in ("/proc/1", "/dev", "/") for word in ("--remount-ro", path))]


@contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A descriptor to read `content` from. Nobody can write to it, not even the sandbox."""
    descriptor = os.memfd_create("box", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
                    | fcntl.F_SEAL_SEAL)
        yield descriptor
    finally:
        os.close(descriptor)


@functools.cache
def _failure(command: str) -> str:
    """Why a sandbox cannot be made with `command`; empty if one was made. Tried once."""
    if shutil.which(command) is None:
        return f"{command} is not installed"
    try:
        outcome = Bubblewrap(command).run(["/usr/bin/true"], {}, limits=Limits(cpu_s=5, wall_s=20.0))
    except (RuntimeError, OSError) as error:
        return f"{command} fails ({error})"
    return "" if outcome.status == "ok" else f"{command} fails ({outcome.status} {outcome.message})"
