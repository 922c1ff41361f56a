"""The system calls that a sandboxed program may not make, as a classic BPF program (seccomp(2)), x86-64.

A deny list of some 80 numbers needs no library: libseccomp and its bindings are not on every cluster, and the trainer
runs on x86-64 only. The list holds the calls that reach rarely used parts of the kernel, other processes' memory,
namespaces, sockets, and memory that no resource limit counts. The namespaces already confine most of it; this is the
second wall.
"""

from __future__ import annotations

import errno
import functools
import struct

__all__ = ["DENIED", "deny_filter"]

DENIED = {
    # other processes, their memory and descriptors
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438,
    "process_madvise": 440,
    # name spaces, mounts, roots
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300,
    # sockets of every family; socketpair stays, event loops are made of it
    "socket": 41,
    # memory that RLIMIT_AS does not count once it is unmapped
    "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    # the kernel's own machinery
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "add_key": 248, "request_key": 249, "keyctl": 250, "kexec_load": 246,
    "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "lookup_dcookie": 212,
    "nfsservctl": 180, "syslog": 103, "acct": 163, "quotactl": 179, "quotactl_fd": 443, "swapon": 167, "swapoff": 168,
    "reboot": 169, "iopl": 172, "ioperm": 173, "modify_ldt": 154, "personality": 135, "vhangup": 153,
    "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "sethostname": 170,
    "setdomainname": 171, "migrate_pages": 256, "move_pages": 279, "mbind": 237, "set_mempolicy": 238,
}
CLONE, CLONE3, IOCTL = 56, 435, 16
# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWTIME, linux/sched.h
NAMESPACE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into the terminal of whoever started us
AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


@functools.cache
def deny_filter() -> bytes:
    """The program for `bwrap --seccomp FD`: denied calls fail with EPERM, foreign architectures die."""
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    absent = (RETURN, 0, 0, ERRNO | errno.ENOSYS)
    code = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32_BIT), absent,
        # its flags lie in memory, which a filter cannot read; the C library then falls back to clone
        (EQUAL, 0, 1, CLONE3), absent,
    ]
    for number in DENIED.values():
        code += [(EQUAL, 0, 1, number), refuse]
    code += [(EQUAL, 0, 3, CLONE), (LOAD, 0, 0, ARGUMENT_0), (ANY_BIT, 0, 1, NAMESPACE_FLAGS), refuse]
    code += [(LOAD, 0, 0, NUMBER), (EQUAL, 0, 5, IOCTL), (LOAD, 0, 0, ARGUMENT_1)]
    for request in TERMINAL_INPUT:
        code += [(EQUAL, 0, 1, request), refuse]
    code += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
