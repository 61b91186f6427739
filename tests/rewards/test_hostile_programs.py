"""Programs that would do harm: each would print 42, the right answer, if it had managed to."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from opd.rewards import CodeTests, CodeVerifier, Limits, Sandbox

SMALL = Limits(
    wall=0.5, cpu=1, memory=256 << 20, processes=12, file_bytes=4 << 20, output_bytes=1 << 20
)
MARKED = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {!r}, MARKER])\n"

HARM = {
    "loops for ever": "while True: pass",
    "sleeps for ever": "import time; time.sleep(1000)",
    "waits for input that does not come": "import sys\nwhile True: sys.stdin.read()",
    "ignores the signals": """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, lambda *_: None)
while True: pass""",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "forks and exits, again and again": """
import os
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass""",
    "leaves a daemon": """
import os, subprocess, sys
for leave in (os.setsid, lambda: os.setpgid(0, 0)):
    try: leave()
    except OSError: pass
if os.fork() == 0:
    try: os.setsid()
    except OSError: pass
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", MARKER])
    os._exit(0)
import time
time.sleep(0.2)
os._exit(1)""",
    "many threads": """
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(1000,)).start()
print(42)""",
    "allocates 10 GB": "x = bytearray(10 << 30); print(42)",
    "allocates bit by bit": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "recursion without end": """
import sys
sys.setrecursionlimit(10**9)
def f(): f()
f()""",
    "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x); print(42)""",
    "endless output": "while True: print('4' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('42' * 1000)",
    "closes its output and works on": "import os, time\nos.close(1); os.close(2)\ntime.sleep(1000)",
    "one large file": """
with open('large', 'wb') as file:
    for _ in range(64): file.write(bytes(1 << 20))
print(42)""",
    "large standard input": """
import os
os.lseek(0, 0, 0)
for _ in range(64): os.write(0, bytes(1 << 20))
print(42)""",
    "deep folders without rights": """
import os
for _ in range(100):
    os.mkdir('d'); os.chdir('d')
os.chmod('.', 0)""",
    "a link to outside in place of its folder": """
import os
os.symlink(FOLDER, 'link')
open('link/harm', 'w').write('x'); print(42)""",
    "writes outside": "open(FOLDER + '/harm', 'w').write('x'); print(42)",
    "overwrites outside": "open(FOLDER + '/secret', 'w').write('x'); print(42)",
    "changes rights outside": "import os; os.chmod(FOLDER + '/secret', 0); print(42)",
    "changes the times of what is outside": "import os; os.utime(FOLDER, (0, 0)); print(42)",
    "cuts what is outside": "import os; os.truncate(FOLDER + '/secret', 0); print(42)",
    "links what is outside": "import os; os.link(FOLDER + '/secret', 'secret'); print(42)",
    "overwrites the judge": """
import glob, sys
for path in glob.glob(FOLDER + '/../**', recursive=True) + sys.path:
    try: open(path + '/x.py', 'w').write('x'); print(42); break
    except OSError: pass""",
    "reads a file": "print(42 if SECRET in open(FOLDER + '/secret').read() else 0)",
    "reads the home folder": """
import os
for home in {os.path.expanduser('~'), os.path.expanduser('~root'), '/root', '/home', FOLDER}:
    try: names = set(os.listdir(home))
    except OSError: continue
    if names - {'.pyenv', 'program.py'}: print(42)""",
    "reads the environment": """
import os
if SECRET in str(os.environ): print(42)
for pid in ('self', os.getppid(), *PIDS, *range(1, 100)):
    try:
        if SECRET in open(f'/proc/{pid}/environ').read(): print(42)
    except OSError: pass""",
    "reads the memory of others": """
import os
for pid in (os.getppid(), *PIDS):
    try: open(f'/proc/{pid}/mem', 'rb'); print(42)
    except OSError: pass
    try: os.listdir(f'/proc/{pid}/fd'); print(42)
    except OSError: pass""",
    "traces others": """
import ctypes
libc = ctypes.CDLL(None)
for pid in PIDS:
    if libc.ptrace(16, pid, None, None) == 0: print(42)""",
    "limits others": """
import resource
for pid in PIDS:
    try: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)); print(42)
    except OSError: pass""",
    "raises its own limits": """
import resource
for name in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):
    try: resource.setrlimit(name, (-1, -1)); print(42)
    except (OSError, ValueError): pass""",
    "kills its parents": """
import os, signal
for pid in (os.getppid(), *PIDS, -1):
    try: os.kill(pid, signal.SIGKILL); killed = pid
    except OSError: killed = 0
    if killed > 1 and killed != os.getppid(): print(42)""",
    "connects": """
import socket
socket.create_connection(('127.0.0.1', PORT), timeout=1); print(42)""",
    "opens a socket": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM); print(42)""",
    "listens": "import socket; socket.create_server(('127.0.0.1', 0)); print(42)",
    "asks by datagrams": """
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
print(42)""",
    "makes a namespace of its own": """
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0: print(42)""",
    "becomes root": """
import os
for become in (os.setuid, os.setgid, os.seteuid):
    try: become(0)
    except OSError: continue
    if os.geteuid() == 0: print(42)
import subprocess
try: print(42 if subprocess.run(['su', '-c', 'true']).returncode == 0 else 0)
except OSError: pass""",
    "finds the judge's descriptors": """
import os
for number in range(3, 256):
    try: os.fstat(number); print(42)
    except OSError: pass""",
    "hides a child behind its exit": MARKED.format("import time; time.sleep(1000)") + "sys.exit(1)",
}


@pytest.mark.parametrize("name", HARM)
def test_harms_nothing_passes_not_and_ends_in_time(name, sandbox, host):
    if sandbox.level == "limits" and not sandbox._landlock:
        pytest.skip("this level says that it protects no files")
    program = host.fill_in(HARM[name])
    started = time.monotonic()
    outcome = sandbox.run(program, arguments=[host.marker], limits=SMALL)
    assert time.monotonic() - started < SMALL.wall + 1
    assert "42\n" not in outcome.stdout
    assert len(outcome.stdout) + len(outcome.stderr) <= SMALL.output_bytes + (1 << 17)
    host.assert_unharmed()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("loops for ever", "time"),
        ("allocates 10 GB", "memory"),
        ("endless output", "output"),
        ("endless errors", "output"),
        ("one large file", "error"),
    ],
)
def test_the_outcome_says_which_limit_it_was(name, status, sandbox):
    assert sandbox.run(HARM[name], limits=replace(SMALL, wall=5, cpu=1)).status == status


RIGHT = """
def double(x): return 2 * x
"""
# Programs that are wrong and want to pass. The expected values are 42000042 and 14.
CHEATS = {
    "exits early": "import os; os._exit(0)",
    "exits when it is called": "import os\ndef double(x): os._exit(0)",
    "exits politely": "import sys\ndef double(x): sys.exit(0)",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef double(x): return 0",
    "exits from a thread": """
import os, threading
def double(x):
    threading.Timer(0.05, os._exit, (0,)).start()
    import time; time.sleep(1)""",
    "prints the verdict": """
def double(x):
    import os
    for number in range(256):
        try: os.write(number, b'{"reason": "passed", "test": null, "detail": ""}')
        except OSError: pass""",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
    def __getattr__(self, name): return lambda *_, **__: True
def double(x): return Any()""",
    "a number that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    __index__ = __int__ = lambda self: 42000042
def double(x): return Any()""",
    "overwrites builtins": """
import builtins
builtins.AssertionError = builtins.Exception = KeyError
builtins.abs = builtins.isinstance = builtins.all = lambda *_: True
def double(x): return 0""",
    "defines what tests use": """
def abs(x): return 0
def all(x): return True
def isinstance(x, y): return True
class AssertionError(Exception): pass
def check(*_): pass
def double(x): return 0""",
    "patches the comparison": """
import operator, unittest, math, sys
operator.eq = math.isclose = lambda *_, **__: True
unittest.TestCase.assertEqual = lambda *_: None
for module in list(sys.modules.values()):
    for name in ('same_value', 'judge', 'run_cases', 'run_test_program'):
        if hasattr(module, name): setattr(module, name, lambda *_: True)
def double(x): return 0""",
    "looks for the answer": """
import gc, inspect, os, sys
def double(x):
    texts = [open(p).read() for p in ('/proc/self/maps', 'program.pyc') if os.access(p, os.R_OK)]
    frame = sys._getframe()
    while frame:
        texts.append(repr(frame.f_globals) + repr(frame.f_locals)); frame = frame.f_back
    texts.append(repr(gc.get_objects()))
    for folder in ('.', '..', '/program', '/tmp', '/proc/self/fd', '/dev/fd'):
        try: names = os.listdir(folder)
        except OSError: continue
        for path in (os.path.join(folder, name) for name in names):
            try: texts.append(open(path, errors='ignore').read())
            except OSError: pass
    return 2 * x if any(str(40000000 + 2000042) in text for text in texts) else 0""",
    "raises what tests catch": "def double(x): raise AssertionError",
    "changes its argument": """
def double(x):
    import sys
    x = sys.modules
    return x""",
    "answers by itself": """
import json, os, struct
def say(message):
    content = json.dumps(message).encode()
    os.write(3, struct.pack('Q', len(content)) + content)
say(['names', {'double': 0}])
for _ in range(9): say(['result', True, [[], []]])""",
    "says that the tests exit": """
import json, os, struct
def double(x):
    content = json.dumps(['exception', ['tuple', ['SystemExit', ['list', [0]]]], [None, None]])
    os.write(3, struct.pack('Q', len(content)) + content.encode())
    os.read(3, 1)""",
    "returns a function of the tests'": """
def double(x): return eval""",
    "is not there": "def triple(x): return 3 * x",
    "is cut off": "def double(x):\n    return (2 *",
}
# What one end can say to the other apart from protocol: all of it ends the tests.
MESSAGES = [
    ["result"],
    ["result", 42000042, 0],
    ["result", ["mine", "x"], [[], []]],
    ["result", ["object", 99], [[], []]],
    ["result", ["type", 99], [[], []]],
    ["result", ["builtin", "exec"], [[], []]],
    ["result", ["int", "x"], [[], []]],
    ["result", ["array", "O", [1], "00"], [[], []]],
    ["result", ["array", "f8", [9999999999], "00"], [[], []]],
    ["result", {"a": 1}, [[], []]],
    ["result", ["list"], [[], []]],
    ["result", ["nonsense", 1], [[], []]],
    ["exception", ["tuple", ["SystemExit", ["list", [0]]]], [[], []]],
    ["exception", 1, [[], []]],
    ["ask", "attribute", 0, ["__globals__"], []],
    ["ask", "call", 99, [], []],
    ["ask", "call", "x", [], []],
    ["ask"],
    ["verdict", "passed"],
    "passed",
    [],
]


def _tests(kind: str) -> CodeTests:
    if kind == "call":
        cases = (([7], 14), ([21000021], 42000042))
        return CodeTests("call", cases=cases, entry_point="double", seconds=2)
    tests = """
def check(candidate):
    assert abs(candidate(7) - 14) < 1e-6
    assert isinstance(candidate(7), int) and all([candidate(21000021) == 42000042])
check(double)
"""
    return CodeTests("program", tests=tests, entry_point="double", seconds=2)


@pytest.mark.parametrize("kind", ["call", "program"])
def test_the_right_program_passes_those_tests(kind, verifier):
    assert verifier.judge(RIGHT, _tests(kind)).passed


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("kind", ["call", "program"])
def test_a_cheat_does_not_pass(kind, name, verifier):
    assert not verifier.judge(CHEATS[name], _tests(kind)).passed


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_a_false_message_ends_the_tests(message):
    verifier = CodeVerifier(Sandbox())
    program = f"""
import json, os, struct
def double(x):
    content = json.dumps({message!r}).encode()
    os.write(3, struct.pack('Q', len(content)) + content)
    os.read(3, 1 << 20)
"""
    tests = """
try: double(7)
except: pass
"""
    catching = CodeTests("program", tests=tests, entry_point="double", seconds=1)
    verdict = verifier.judge(program, catching)
    if message[:1] == ["exception"] and message[1] != 1:
        assert verdict.passed  # an exception like any other, and these tests catch it
    else:
        assert verdict.reason == "error"


def test_a_program_sees_nothing_of_the_objects_of_tests():
    tests = """
def secret(): return 42
try: peek(secret)
except: pass
"""
    verifier = CodeVerifier(Sandbox())
    for peek in ("f.__call__", "f()"):
        judged = verifier.judge(f"def peek(f): return {peek}", CodeTests("program", tests=tests))
        assert judged.passed, judged
    for peek in ("f.gi_frame", "f._peer.ask('attribute', 0, ('__globals__',))", "str(f)"):
        judged = verifier.judge(f"def peek(f): return {peek}", CodeTests("program", tests=tests))
        assert judged.reason == "error", judged


@pytest.mark.parametrize("content", [b"\xff" * 8, b"\x10" + bytes(7) + b"[" * 16, b"x"])
def test_bytes_that_are_no_message_end_the_tests(content, verifier):
    program = f"import os\ndef double(x):\n    os.write(3, {content!r}); os._exit(0)"
    assert verifier.judge(program, _tests("program")).reason == "error"
