"""Runs one program in confinement, watches it, and ends all that it started: a small process.

`Sandbox` starts it and sends the job over a socket; what the process that asks has in memory never
comes here. Three roles, in two processes or three:

- the launcher enters new namespaces, or none, and gives them the file system that the job names;
- the warden waits for the program, for the end of its time, or for a word over the socket, whose
  end (the one that asks has died) is such a word too. Then it kills all that is left;
- the program gives up every privilege, takes its limits upon itself, and becomes another Python.

Nothing but system calls, and marshal for the job, because thousands of programs are run: ctypes
costs 3 ms, and json, socket, signal and typing would cost 15 ms more.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False  # typing itself takes 10 ms to import
if TYPE_CHECKING:
    from typing import Any, NoReturn

SIGKILL = 9
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 22, 38, 47
PASSING = (2, 1)  # CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE: a folder of another user is no obstacle
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x1000, 0x4000, 1 << 18, 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, AT_RECURSIVE = 1, 2, 4, 0x8000
PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41  # the C library has no function for it
MOUNT_SETATTR, LANDLOCK = 442, 444  # system calls since 424 have one number everywhere
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
INSIDE = 1000  # the user's number in a user namespace
ROOT = "/proc"  # where the new root is built: always there, and no program's files lie beneath it
EPERM, ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Raise the OSError of a C call that has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: Any) -> None:
    """Set something of this process; raises OSError."""
    long = ctypes.c_ulong
    check(_libc.prctl(option, long(value), long(0), long(0), long(0)), f"prctl {option}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, a file or a folder; raises OSError."""
    arguments = [text.encode() for text in (source, target, kind)]
    check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


# ------------------------------------------------------------------------- the launcher: namespaces


def enter_namespaces() -> None:
    """Leave the host's mounts, processes, network and IPC."""
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:  # the program will be another user: root's processes have no number
        check(_libc.unshare(flags), "unshare")
        return
    check(_libc.unshare(flags | NEW_USER), "unshare")
    write_file("/proc/self/setgroups", b"deny")
    write_file("/proc/self/uid_map", f"{INSIDE} {uid} 1".encode())
    write_file("/proc/self/gid_map", f"{INSIDE} {gid} 1".encode())


def build_root(job: dict[str, Any]) -> None:
    """Make a root of our own: the readable paths, five devices, and empty folders with a size."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    size = f"size={job['file_bytes']},nr_inodes=65536,mode=755"
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in job["readable"]:
        if os.path.islink(path) and os.path.dirname(path) == "/":  # /lib -> usr/lib
            os.symlink(os.readlink(path), ROOT + path)
        else:
            bind(path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for path in DEVICES:
        bind(path, ATTR_NOSUID)
    for path in ("/tmp", "/dev/shm", job["folder"]):
        os.makedirs(ROOT + path, exist_ok=True)
        os.chmod(ROOT + path, 0o1777)
    os.chdir(ROOT)
    check(_libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    check(_libc.umount2(b".", MNT_DETACH), "umount")  # the host's root lay beneath ours


def bind(path: str, attributes: int) -> None:
    """Show a file or folder of the host under its own name, with mount attributes."""
    target = ROOT + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write_file(target, b"")
    mount(path, target, "", MS_BIND | MS_REC)
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(
        MOUNT_SETATTR, -1, target.encode(), AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted))
    )
    check(result, f"mount_setattr {target}")


def write_file(path: str, content: bytes) -> None:
    """Write a new file, or one of /proc, in full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    write_all(descriptor, content)
    os.close(descriptor)


# ---------------------------------------------------------------- the warden: waits, ends, reports


def guard(job: dict[str, Any], control: int) -> dict[str, Any]:
    """Run the program, and return what became of it when nothing of it is left."""
    if job["uid"] is not None:
        os.chown(job["folder"], job["uid"], job["uid"])
    for name, content in job["files"].items():
        write_file(os.path.join(job["folder"], name), content)
    words = os.memfd_create("stdin")
    write_all(words, job["input"])
    os.lseek(words, 0, os.SEEK_SET)
    started = time.monotonic()
    pid, problem = start(job, words)
    if problem:
        os.waitpid(pid, 0)
        return {"failed": problem}
    os.write(control, job["started"])
    ended = wait(pid, control, job["wall"])
    end_all(job, pid)
    _, status, usage = os.wait4(pid, 0)
    return {
        "ended": ended,
        "returncode": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "cpu": usage.ru_utime + usage.ru_stime,
    }


def start(job: dict[str, Any], words: int) -> tuple[int, str]:
    """Fork the program; its process number, and why it could not be run."""
    reading, writing = os.pipe()  # both ends are closed by exec
    pid = os.fork()
    if pid == 0:
        try:
            become_program(job, words)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:4096])
        os._exit(127)
    os.close(writing)
    problem = os.read(reading, 4096).decode(errors="replace")
    os.close(reading)
    return pid, problem


def wait(pid: int, control: int, seconds: float) -> str:
    """Wait for the program's exit, the end of its time, or a word of the one that asks."""
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(control, select.POLLIN)
    ready = {number for number, _ in poll.poll(seconds * 1000)}
    os.close(descriptor)
    if descriptor in ready:
        return "exit"
    return "stopped" if control in ready else "time"


def end_all(job: dict[str, Any], pid: int) -> None:
    """Kill all that the program has started: its namespace, or the group it could not leave."""
    try:
        if job["namespaces"]:
            os.kill(-1, SIGKILL)  # of the first process of a namespace: all others in it
        else:
            os.killpg(pid, SIGKILL)
    except ProcessLookupError:
        pass


# ------------------------------------------------------------- the program: limits, then exec


def become_program(job: dict[str, Any], words: int) -> NoReturn:
    """Give up what this process may do, and run the program."""
    os.setsid()
    os.chdir(job["folder"])
    os.dup2(words, 0)
    if job["channel"] is not None:
        os.dup2(job["channel"], 3)
    for name, value in job["rlimits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(number, (value, value))
    if job["uid"] is not None:
        prctl(PR_SET_KEEPCAPS, job["passes"])
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    keep_capabilities(PASSING if job["passes"] else ())
    scoped = False
    if job["landlock"]:
        scoped = landlock(job["readable"], job["folder"], job["landlock"])
    deny_system_calls(shared=not job["private"], signals=job["private"] or scoped)
    os.execve(job["executable"], job["arguments"], job["environment"])


def keep_capabilities(wanted: tuple[int, ...]) -> None:
    """Keep the first capability that there is of those wanted, and no other, also after exec."""
    header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    check(_libc.capget(header, sets), "capget")
    permitted = struct.unpack("6I", sets.raw)[1]
    kept = next((number for number in wanted if permitted >> number & 1), None)
    bits = 0 if kept is None else 1 << kept
    check(_libc.capset(header, struct.pack("6I", bits, bits, bits, 0, 0, 0)), "capset")
    if kept is not None:
        long = ctypes.c_ulong
        check(_libc.prctl(PR_CAP_AMBIENT, long(2), long(kept), long(0), long(0)), "ambient")


def landlock(readable: list[str], folder: str, abi: int) -> bool:
    """Restrict the file system with Landlock; whether signals stay inside as well (ABI 6)."""
    reading, files_only = 0b1101, 0b101 | 1 << 1 | (1 << 14 if abi >= 3 else 0)
    everything = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1
    network, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("QQQ", everything, network, scope)
    ruleset = check(_libc.syscall(LANDLOCK, attributes, ctypes.c_size_t(size), 0), "landlock")
    allowed = [(path, reading) for path in readable]
    allowed += [(path, 0b110) for path in DEVICES] + [(folder, everything)]
    for path, rights in allowed:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= files_only
        rule = struct.pack("=Qi", rights, descriptor)
        check(_libc.syscall(LANDLOCK + 1, ruleset, 1, rule, 0), f"landlock {path}")
        os.close(descriptor)
    check(_libc.syscall(LANDLOCK + 2, ruleset, 0), "landlock")
    os.close(ruleset)
    return scope != 0


# System calls that no program needs and that reach other processes, the network, or the kernel's
# less trodden paths: name -> (number on x86_64, on aarch64).
DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),  # memory that no limit counts
    **{f"since Linux 5.1: {n}": (n, n) for n in (424, 425, 426, 427, 428, 429, 430, 431, 432)},
    **{f"since Linux 5.2: {n}": (n, n) for n in (433, 434, 438, 440, 442, 447, 448)},
}
# Where files and processes are the host's: the group by which a program is ended, and what Landlock
# leaves open of files that belong to the same user (None: there is no such call on aarch64).
SHARED = {
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "since Linux 6.13: setxattrat": (463, 463),
    "since Linux 6.13: removexattrat": (466, 466),
    "since Linux 6.17: file_setattr": (469, 469),
}
SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
CLONE, CLONE3, SOCKETPAIR, PRLIMIT, TGKILL = (
    (56, 220),
    (435, 435),
    (53, 199),
    (302, 261),
    (234, 131),
)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def deny_system_calls(*, shared: bool, signals: bool) -> None:
    """Install the seccomp filter.

    Args:
        shared: Files and processes are the host's.
        signals: It may send signals, because they reach nothing of the host.
    """
    load, equal, at_least, has_bits, mask, end = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, refuse, missing = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS
    kill = 0x80000000
    if os.uname().machine not in MACHINES:
        return  # Sandbox.confinement says so
    column, architecture = MACHINES[os.uname().machine]
    rules = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        rules += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # the x32 system calls
    denied = DENIED | (SHARED if shared else {}) | ({} if signals else SIGNALS)
    for numbers in denied.values():
        number = numbers[column]
        if number is not None:
            rules += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    rules += [(equal, 0, 1, CLONE3[column]), (end, 0, 0, missing)]  # the library then takes clone

    def when(call: tuple[int, int], argument: int, *test: tuple[int, int, int, int]) -> None:
        # After the test comes the refusal, and one instruction further the permission.
        rules.append((equal, 0, len(test) + 3, call[column]))
        rules.append((load, 0, 0, 16 + 8 * argument))
        rules.extend(test)
        rules.extend([(end, 0, 0, refuse), (end, 0, 0, allow)])

    new_namespaces = 0x7E020000
    when(CLONE, 0, (has_bits, 0, 1, new_namespaces))
    when(SOCKETPAIR, 1, (mask, 0, 0, 0xF), (equal, 1, 0, 1))  # streams only: nothing can be sent to
    when(PRLIMIT, 0, (equal, 1, 0, 0))  # its own limits
    if not signals:
        when(TGKILL, 0, (equal, 1, 0, os.getpid()))  # abort()
    rules.append((end, 0, 0, allow))
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    program = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    buffer = ctypes.create_string_buffer(head, len(head))
    long = ctypes.c_ulong
    address = long(ctypes.addressof(buffer))
    check(_libc.prctl(PR_SET_SECCOMP, long(2), address, long(0), long(0)), "seccomp")


# ------------------------------------------------------------------------------ messages, and main


def write_all(descriptor: int, content: bytes) -> None:
    """Write in full, however many calls it takes."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def read_exactly(descriptor: int, count: int) -> bytes:
    """Read so many bytes; raises EOFError."""
    parts: list[bytes] = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main() -> NoReturn:
    """Read the job (its length in eight bytes, and marshal's bytes), run it, report (marshal's)."""
    control = int(sys.argv[1])
    os.set_inheritable(control, False)
    os.umask(0o022)
    job = marshal.loads(read_exactly(control, struct.unpack("Q", read_exactly(control, 8))[0]))
    try:
        if os.path.exists("/proc/self/oom_score_adj"):
            write_file("/proc/self/oom_score_adj", b"1000")  # the first to go without memory
        if job["namespaces"]:
            enter_namespaces()
            build_root(job)
        prctl(PR_SET_DUMPABLE, 0)  # the program must not look in here
        if job["namespaces"]:
            child = os.fork()  # the first process of the new process namespace
            if child:
                os.close(control)
                os.waitpid(child, 0)
                os._exit(0)
            prctl(PR_SET_PDEATHSIG, SIGKILL)
        report = guard(job, control)
    except Exception as error:
        report = {"failed": f"{type(error).__name__}: {error}"}
    write_all(control, marshal.dumps(report))
    os._exit(0)
