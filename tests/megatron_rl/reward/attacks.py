"""Hostile programs, as a table. One that gets anywhere prints ESCAPED; one that was stopped by an error prints held.

@FILE@, @PORT@, @PID@, @SECRET@ stand for things of the host that they are after: a readable file, a listening port, a
process, a value in the environment of the process that starts the sandbox.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTACKS", "Attack"]

STOPPED = ("timeout", "memory_limit", "output_limit", "runtime_error")


@dataclass(frozen=True)
class Attack:
    """status: what the run may end with; `ok` means that it must say `held` too."""

    name: str
    source: str
    status: tuple[str, ...] = ("ok",)
    language: str = "python"


PYTHON_START = '''
import ctypes, errno, fcntl, os, resource, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def escaped(*why): print("ESCAPED", *why, flush=True)
def held(): print("held", flush=True)
def denied(number, *arguments, errors=(errno.EPERM,)):
    """Makes a system call that must fail."""
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result != -1 or ctypes.get_errno() not in errors: escaped("system call", number, result, ctypes.get_errno())
def refused(function, *arguments):
    """Calls something that must raise OSError or ValueError."""
    try: result = function(*arguments)
    except (OSError, ValueError): return
    escaped(function, arguments, result)
def spawn():
    try: return os.fork()
    except OSError: return -1
'''


def python(name: str, source: str, *status: str) -> Attack:
    return Attack(name, PYTHON_START + source, status or ("ok",))


def cpp(name: str, source: str, *status: str) -> Attack:
    return Attack(name, "#include <cstdio>\n#include <unistd.h>\n" + source, status or ("ok",), "cpp")


def java(name: str, body: str, *status: str) -> Attack:
    source = f"public class Main {{ public static void main(String[] a) throws Exception {{ {body} }} }}"
    return Attack(name, source, status or ("ok",), "java")


ATTACKS = (
    # processes
    python("fork bomb", "while True: os.fork()", *STOPPED),
    python("fork bomb that waits for room", "while True: spawn()", *STOPPED),
    cpp("fork bomb in C++", "int main() { for (;;) fork(); }", *STOPPED),
    java("fork bomb of shells", "for (;;) try { Runtime.getRuntime().exec(new String[]{\"/bin/sh\", \"-c\", "
         "\"$0 & $0\"}); } catch (Exception e) { }", *STOPPED),
    python("zombies that nobody waits for", """
made = 0
for _ in range(10000):
    pid = spawn()
    if pid == 0: os._exit(0)
    made += pid > 0
escaped(made) if made > 64 else held()"""),
    python("threads", """
import threading
made = 0
try:
    for _ in range(10000):
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); made += 1
except RuntimeError: pass
escaped(made) if made > 64 else held()
sys.stdout.flush(); os._exit(0)"""),
    java("threads in Java",
         "for (;;) new Thread(() -> { try { Thread.sleep(9999); } catch (Exception e) { } }).start();",
         *STOPPED),
    # memory
    python("memory in one process", "x = []\nwhile True: x.append(bytearray(b'x' * (1 << 20)))", "memory_limit"),
    python("memory in many processes", """
for _ in range(30):
    if spawn() == 0:
        x = bytearray(b'x' * (100 << 20)); time.sleep(60)
time.sleep(60)""", "memory_limit"),
    cpp("memory in C++", "#include <cstring>\nint main() { for (;;) memset(new char[1 << 24], 1, 1 << 24); }",
        "memory_limit"),
    java("memory in Java", "var x = new java.util.ArrayList<long[]>(); for (;;) x.add(new long[1 << 20]);",
         "memory_limit"),
    java("memory beside Java's heap", "var x = new java.util.ArrayList<Object>(); for (;;) { "
         "var b = java.nio.ByteBuffer.allocateDirect(1 << 24); "
         "for (int i = 0; i < (1 << 24); i += 4096) b.put(i, (byte) 1); x.add(b); }", "memory_limit", "runtime_error"),
    python("memory that outlives its mapping", """
denied(29, 0, 1 << 26, 0o1600)              # shmget
denied(319, b"x", 0)                         # memfd_create
denied(447, 0)                               # memfd_secret
denied(68, 0, 0o1600)                        # msgget
held()"""),
    python("huge integers", "x = 9 ** 9 ** 9", *STOPPED),
    # files, which are memory
    python("a full /tmp", """
total = 0
try:
    for i in range(100):
        with open(f"/tmp/{i}", "wb") as f: total += f.write(bytes(8 << 20))
except OSError: pass
escaped(total) if total > 65 << 20 else held()"""),
    python("a full /dev/shm", """
total = 0
try:
    for i in range(100):
        with open(f"/dev/shm/{i}", "wb") as f: total += f.write(bytes(4 << 20))
except OSError: pass
escaped(total) if total > 9 << 20 else held()"""),
    python("a full root", """
for folder in ("/", "/dev", "/box", "/usr", "/usr/bin", "/usr/local", "/proc", "/var", "/etc", "/home", "/root"):
    refused(open, os.path.join(folder, "x"), "w")
refused(os.mkdir, "/x")
held()"""),
    python("a file beyond all limits", """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open("/tmp/x", "wb") as f: refused(f.truncate, 1 << 40)
held()"""),
    python("a million empty files", "i = 0\nwhile True:\n    i += 1\n    os.mknod(f'/tmp/{i}')", "memory_limit"),
    python("folders without end", "while True:\n    os.mkdir('x'); os.chdir('x')", "memory_limit", "runtime_error"),
    # output
    python("standard output without end", "while True: os.write(1, b'x' * 65536)", "output_limit"),
    python("standard error without end", "while True: os.write(2, b'x' * 65536)", "output_limit", "timeout"),
    python("output of a child that stays", """
if os.fork() == 0:
    os.setsid()
    while True: os.write(1, b'x' * 65536)
time.sleep(60)""", "output_limit"),
    java("output in Java", "for (;;) System.out.println(\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\");", "output_limit"),
    # network
    python("a port of the host", """
import socket
refused(socket.create_connection, ("127.0.0.1", @PORT@), 1)
held()"""),
    python("sockets of every family", """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK, 38):
    refused(socket.socket, family, socket.SOCK_STREAM)
for family in (socket.AF_NETLINK, socket.AF_PACKET): refused(socket.socket, family, socket.SOCK_RAW)
held()"""),
    java("a port of the host from Java", "try { new java.net.Socket(\"127.0.0.1\", @PORT@); "
         "System.out.println(\"ESCAPED\"); } catch (java.io.IOException e) { System.out.println(\"held\"); }"),
    # files and environment of the host
    python("files of the host", """
for path in ("@FILE@", "/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/run", "/sys", "/opt"):
    if os.path.exists(path): escaped(path)
held()"""),
    cpp("files of the host from C++",
        '#include <fstream>\nint main() { puts(std::ifstream("@FILE@") ? "ESCAPED" : "held"); }'),
    java("files of the host from Java",
         "System.out.println(new java.io.File(\"@FILE@\").exists() ? \"ESCAPED\" : \"held\");"),
    python("by a symbolic link", """
os.symlink("@FILE@", "/tmp/link")
refused(open, "/tmp/link")
for root in ("/proc/1/root", "/proc/self/root", "/proc/self/cwd/../../..", "/tmp/../../../..", "/proc/1/cwd"):
    refused(open, root + "@FILE@")
held()"""),
    python("by a hard link", """
refused(os.link, "/usr/bin/true", "/tmp/true")
refused(os.chmod, "/usr/bin/true", 0o6777)
refused(os.chown, "/usr/bin", 0, 0)
held()"""),
    python("by a descriptor left open", """
left = [fd for fd in range(3, 1024) if os.path.exists(f"/proc/self/fd/{fd}")]
escaped(left) if left else held()"""),
    python("by a file handle", """
handle = ctypes.create_string_buffer(136)
ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
denied(303, -100, b"/usr", handle, ctypes.byref(ctypes.c_int()), 0)
denied(304, 3, handle, 0)
held()"""),
    python("the environment", """
text = "".join(f"{name}={value}" for name, value in os.environ.items()).encode()
for pid in filter(str.isdigit, os.listdir("/proc")):
    try: text += open(f"/proc/{pid}/environ", "rb").read()
    except OSError: pass
escaped(text) if b"@SECRET@" in text or b"PYTEST" in text else held()"""),
    python("its own input and program", """
refused(os.open, "/box/main.py", os.O_WRONLY)
refused(os.unlink, "/box/main.py")
for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
    try: refused(os.write, os.open("/proc/self/fd/0", flags), b"x" * 4096)
    except OSError: pass
held()"""),
    # other processes
    python("signals to the host", """
for pid in (@PID@, os.getppid() if os.getppid() > 1 else 2 ** 22):
    refused(os.kill, pid, signal.SIGKILL)
os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGSTOP)  # the sandbox's own first process, which takes none from inside
held()"""),
    python("signals to all", "if os.fork() == 0: time.sleep(99)\nos.kill(-1, signal.SIGKILL)\nheld()"),
    python("/proc of the host", """
pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
escaped(pids) if len(pids) > 4 or @PID@ in pids and @PID@ > 10 else held()"""),
    python("the memory of the first process", """
refused(open, "/proc/1/mem", "r+b")  # it runs without a seccomp filter
refused(open, "/proc/1/task/1/mem", "r+b")
denied(310, 1, None, 0, None, 0, 0)
denied(311, 1, None, 0, None, 0, 0)
held()"""),
    python("ptrace", "denied(101, 0, 0, 0, 0)\ndenied(101, 16, 1, 0, 0)\ndenied(101, 0x4206, 1, 0, 0)\nheld()"),
    python("descriptors of others", """
pidfd = libc.syscall(434, 1, 0)
denied(438, pidfd, 0, 0)
denied(312, 1, os.getpid(), 0, 0, 0)
held()"""),
    # name spaces, mounts, privileges
    python("a user name space", """
for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x04000000, 0x08000000, 0x02000000, 0x80):
    denied(272, flag)
held()"""),
    python("a user name space by clone", """
for flag in (0x10000000, 0x00020000, 0x40000000): denied(56, flag | signal.SIGCHLD, 0, 0, 0, 0)
denied(435, ctypes.create_string_buffer((0x10000000).to_bytes(8, "little") + bytes(80)), 88, errors=(errno.ENOSYS,))
held()"""),
    python("name spaces of others", """
refused(os.listdir, "/proc/1/ns")
for name in os.listdir("/proc/self/ns"): denied(308, os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0)
held()"""),
    python("mounts", """
denied(165, b"none", b"/tmp", b"tmpfs", 0, None)
denied(165, b"/usr", b"/usr", None, 0x20 | 4096, None)
denied(166, b"/usr", 2)
denied(155, b"/tmp", b"/tmp")
denied(430, b"tmpfs", 0)
denied(428, -100, b"/", 1)
denied(429, -100, b"/", -100, b"/tmp", 0)
denied(442, -100, b"/", 0, None, 0)
held()"""),
    python("a root inside the root", "refused(os.chroot, '/tmp')\ndenied(161, b'/tmp')\nheld()"),
    python("the superuser", """
for call in (os.setuid, os.setgid, os.seteuid): refused(call, 0)
refused(os.setgroups, [0])
status = open("/proc/self/status").read()
for field in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if f"{field}:\\t0000000000000000" not in status: escaped(field)
if "NoNewPrivs:\\t1" not in status or "Seccomp:\\t2" not in status: escaped("privileges")
held()"""),
    python("programs that run as root", """
import subprocess
for command in (["su", "-c", "id -u"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["unshare", "-r", "id", "-u"],
                ["sudo", "-n", "id"], ["newgrp", "root"],
                ["bwrap", "--ro-bind", "/", "/", "--unshare-user", "id", "-u"]):
    try: done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
    except OSError: continue
    if done.returncode == 0: escaped(command, done.stdout)
held()"""),
    python("devices", """
refused(os.mknod, "/tmp/disk", 0o60666, os.makedev(254, 0))
refused(os.mknod, "/tmp/memory", 0o20666, os.makedev(1, 1))
for name in ("mem", "kmsg", "vda", "sda", "fuse", "kvm", "nvidia0", "loop-control", "net/tun"):
    if os.path.exists("/dev/" + name): escaped(name)
held()"""),
    python("settings of the kernel", """
for name in ("sys/kernel/hostname", "sys/kernel/core_pattern", "sys/vm/overcommit_memory", "sysrq-trigger",
             "sys/user/max_user_namespaces", "1/oom_score_adj"):
    refused(open, "/proc/" + name, "w")
refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))
refused(os.setpriority, os.PRIO_PROCESS, 0, -10)
held()"""),
    python("its own limits", """
for name in ("RLIMIT_NPROC", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"):
    soft, hard = resource.getrlimit(getattr(resource, name))
    refused(resource.setrlimit, getattr(resource, name), (hard + 1, hard + 1))
held()"""),
    python("the kernel's machinery", """
for number in (321, 298, 323, 425, 426, 427, 248, 249, 250, 246, 320, 313, 176, 103, 163, 443, 167, 169, 172, 173, 154,
               135, 153, 164, 227, 159, 305, 170, 171, 256, 279, 237, 238, 300, 64, 240, 440):
    denied(number, 0, 0, 0, 0, 0)
held()"""),
    python("the other system call tables", "denied(0x40000000 + 39, errors=(errno.ENOSYS,))\nheld()"),
    cpp("32-bit system calls", 'int main() { int r; asm volatile("int $0x80" : "=a"(r) : "a"(20)); puts("ESCAPED"); }',
        "runtime_error"),
    python("typing into the terminal", """
for request in (0x5412, 0x541C): denied(16, 0, request, b"x")
refused(open, "/dev/tty", "w")
held()"""),
    # ends that do not come
    python("a daemon that outlives", """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for signum in (1, 2, 3, 15): signal.signal(signum, signal.SIG_IGN)
        for fd in (0, 1, 2): os.close(fd)
        os.execv("/usr/bin/sleep", ["sleep", "98765"])
    os._exit(0)
time.sleep(0.1)
held()"""),
    python("an exit handler that hangs", "import atexit\natexit.register(time.sleep, 99)", "timeout"),
    python("sleep", "time.sleep(99)", "timeout"),
    python("a loop that hears no signal", """
for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(signum, signal.SIG_IGN)
while True: pass""", "timeout"),
    python("a program that stops itself", "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(99)", "timeout"),
    python("silence", "os.close(0); os.close(1); os.close(2)\ntime.sleep(99)", "timeout"),
    java("a Java that does not end",
         "Runtime.getRuntime().addShutdownHook(new Thread(() -> { for (;;); })); System.exit(0);", "timeout"),
    # compilers
    cpp("templates without end", "template <int N> struct A { A<N + 1> a; A<N + 2> b; }; A<0> a; int main() { }",
        "compile_error", "timeout", "memory_limit"),
    cpp("a constant that takes for ever", """constexpr unsigned long f(unsigned long n) { unsigned long s = 0;
for (unsigned long i = 0; i < n; ++i) s += i * s; return s; }
constexpr unsigned long g(int d) { return d ? g(d - 1) + g(d - 1) + f(200000) : f(200000); }
constexpr auto x = g(40); int main() { }""", "compile_error", "timeout", "memory_limit"),
    cpp("a program of four gigabytes", "char big[1ul << 32] = {1}; int main() { return big[0]; }",
        "compile_error", "timeout", "memory_limit", "output_limit"),
    cpp("macros that explode", "".join(f"#define A{i + 1} A{i} A{i} A{i} A{i} A{i} A{i} A{i} A{i}\n" for i in range(12))
        + "#define A0 x\nint main() { A12 }", "compile_error", "timeout", "memory_limit"),
    cpp("a header without end", '#include "/dev/zero"\nint main() { }', "compile_error", "timeout", "memory_limit",
        "output_limit"),
    cpp("a header of the host",
        '#if __has_include("@FILE@")\nconst char* s = "ESCAPED";\n#else\nconst char* s = "held";\n'
        '#endif\nint main() { puts(s); }'),
    cpp("a file of the host in the program", 'asm(".incbin \\"@FILE@\\""); int main() { puts("ESCAPED"); }',
        "compile_error"),
    Attack("Python that nests too deeply", "x = " + "(" * 100000 + ")" * 100000, ("compile_error",)),
    Attack("Python constants that fold", "x = " + "((1 << 99999999) | 1) ** " * 3 + "9", STOPPED),
    Attack("Java constants that double", "class Main { static final String A0 = \"xxxxxxxxxxxxxxxx\""
           + "".join(f", A{i + 1} = A{i} + A{i}" for i in range(34))
           + "; public static void main(String[] a) { System.out.println(A34); } }",
           ("compile_error", "timeout", "memory_limit"), "java"),
)
