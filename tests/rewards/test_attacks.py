"""Answers that want the reward without the work: they score nothing, end in time and leave nothing behind."""

import os
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drift.contract import Problem
from drift.rewards import CodeReward, CountdownReward, FormatReward, MathReward, SudokuReward
from drift.rewards.base import Reward

ADD = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(5, 7) == 12
    assert candidate(-1, -8) == -9

check(add)
"""
SECONDS = 0.5
# An odd limit, by which the processes of these tests can be told from all others on the machine.
MEGABYTES = 400 + os.getpid() % 100


def function(*tests: str) -> Problem:
    row = {"test_method": "function", "test_time_limit": SECONDS, "test_list": list(tests), "prefix": ""}
    return Problem(prompt="", answer="", row=row)


def program(given: str, expected: str) -> Problem:
    row = {
        "test_method": "stdio",
        "test_time_limit": SECONDS,
        "test_input": [given],
        "test_output": [expected],
    }
    return Problem(prompt="", answer="", row=row)


def block(code: str) -> str:
    return f"```python\n{textwrap.dedent(code)}\n```"


def sandboxed() -> set[int]:
    """The processes of these tests' sandboxes, wherever they hang in the tree."""
    found, limit = set(), b"\0%d\0" % (MEGABYTES << 20)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if limit in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def zombies() -> set[int]:
    """Ended children of this process that nobody has collected."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.add(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def reward(bwrap: None) -> CodeReward:
    return CodeReward(timeout_seconds=SECONDS, memory_megabytes=MEGABYTES)


@pytest.fixture
def attempt(
    reward: CodeReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, Problem], float]]:
    """Judges an answer; looks at the clock, and afterwards at processes and files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, files = zombies(), set(Path("/tmp").iterdir())
    spare = time.monotonic()
    assert reward([block("def add(a, b): return a + b")], [function(ADD)]).item() == 1.0
    spare = time.monotonic() - spare  # what starting takes here and now

    def judge(code: str, problem: Problem) -> float:
        start = time.monotonic()
        score = reward([block(code)], [problem]).item()
        assert time.monotonic() - start - spare < SECONDS + 1.0
        return score

    yield judge
    assert sandboxed() == set()
    assert zombies() <= dead
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in set(Path("/tmp").iterdir()) - files} & MARKS == set()


# None of them knows a sum: what their values are worth is 0.
MARKS = {"mark", "left", "here"}
ATTACKS = {
    # Leaving early, by all doors.
    "exit": "exit()",
    "exit 0": "exit(0)",
    "quit": "quit()",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "raise SystemExit": "raise SystemExit",
    "raise KeyboardInterrupt": "raise KeyboardInterrupt",
    "raise GeneratorExit": "raise GeneratorExit",
    "raise BaseException": "raise BaseException('pass 0')",
    "exit though right": "def add(a, b): return a + b\nexit()",
    "os._exit though right": "import os\ndef add(a, b): return a + b\nos._exit(0)",
    "an exit hook": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "exit in the call": "def add(a, b): exit()",
    "sys.exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "os.abort": "import os\ndef add(a, b): os.abort()",
    "StopIteration": "def add(a, b): raise StopIteration(3)",
    "AssertionError": "def add(a, b): raise AssertionError",
    "another program": "import os\ndef add(a, b): os.execv('/bin/true', ['true'])",
    "kill": "import os\ndef add(a, b): os.kill(os.getpid(), 9)",
    "a crash": "import ctypes\nctypes.string_at(0)\ndef add(a, b): return a + b",
    "a crash in the call": "import ctypes\ndef add(a, b): return ctypes.string_at(0)",
    # Values that want to be equal to everything.
    "equal to everything": """
        class Equal:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
            def __bool__(self): return True
            def __hash__(self): return 3
        def add(a, b): return Equal()
    """,
    "a number equal to everything": """
        class Equal(int):
            def __eq__(self, other): return True
            def __hash__(self): return 3
        def add(a, b): return Equal(0)
    """,
    "a text equal to everything": """
        class Equal(str):
            def __eq__(self, other): return True
            def __hash__(self): return 3
        def add(a, b): return Equal('0')
    """,
    "a metaclass": """
        class Meta(type):
            def __eq__(cls, other): return True
            def __hash__(cls): return 3
        class Equal(metaclass=Meta): pass
        def add(a, b): return Equal
    """,
    "a class that claims to be int": """
        class Equal:
            __class__ = int
            def __eq__(self, other): return True
            def __index__(self): return 0
        Equal.__name__ = Equal.__qualname__ = 'int'
        Equal.__module__ = 'builtins'
        def add(a, b): return Equal()
    """,
    "pretends to be a Fraction": """
        class Fraction:
            numerator = denominator = property(lambda self: object())
            def __eq__(self, other): return True
        Fraction.__module__ = 'fractions'
        def add(a, b): return Fraction()
    """,
    "pretends to be keys of a dictionary": """
        class Keys:
            def __iter__(self): return iter([self])
            def __hash__(self): return 0
            def __eq__(self, other): return True
        Keys.__module__, Keys.__qualname__ = "builtins", "dict_keys"
        def add(a, b): return Keys()
    """,
    "pretends to be a time zone": """
        class Zone:
            def utcoffset(self, when): return 3
        Zone.__module__, Zone.__qualname__ = "datetime", "timezone"
        def add(a, b): return Zone()
    """,
    "an exception without a name": """
        class Nameless(type):
            __name__ = __module__ = property(lambda self: 1 / 0)
        class Odd(Exception, metaclass=Nameless): pass
        def add(a, b): raise Odd
    """,
    "another way to write text": """
        import codecs
        codecs.register_error("surrogatepass", lambda error: ("T", error.end))
        def add(a, b): return "\\ud800"
    """,
    "not a number": "def add(a, b): return float('nan')",
    "an object to be unpickled": """
        import os
        class Evil:
            def __reduce__(self): return os.system, ('touch /tmp/mark',)
        def add(a, b): return Evil()
    """,
    # Changing what Python is.
    "built-ins": """
        import builtins
        builtins.AssertionError = builtins.BaseException = int
        builtins.isinstance = lambda *args: True
        builtins.compile = builtins.exec = lambda *args: None
        builtins.abs = builtins.len = builtins.sum = lambda *args: 3
        builtins.type = builtins.dict = builtins.list = lambda *args: None
        def add(a, b): return None
    """,
    "modules": """
        import sys
        for module in list(sys.modules.values()):
            for name in ("check", "decode", "receive", "Verdicts", "_run", "encode", "send"):
                if hasattr(module, name):
                    setattr(module, name, lambda *args, **kwargs: True)
        def add(a, b): return 0
    """,
    "__eq__ of int": """
        import ctypes, gc
        mine = gc.get_referents(int.__dict__)[0]
        mine['__eq__'] = lambda *args: True
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))
        def add(a, b): return 0
    """,
    "frames that read assertions": """
        import sys
        def trace(frame, event, arg):
            frame.f_trace_lines = False
            for name in list(frame.f_locals):
                frame.f_locals[name] = True
            return trace
        sys.settrace(trace)
        sys.setprofile(lambda *args: None)
        frame = sys._getframe()
        while frame:
            frame.f_trace = trace
            frame = frame.f_back
        def add(a, b): return 0
    """,
    "a hook on exceptions": "import sys\nsys.excepthook = print\ndef add(a, b): return 1",
    # Looking for what is expected.
    "looking through memory": """
        import gc, sys
        def look():
            seen, frame = [], sys._getframe()
            while frame:
                seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
                frame = frame.f_back
            for found in gc.get_objects():
                seen += gc.get_referents(found)
            test = "".join(["candidate", "(-1, -8)"])
            return any(isinstance(found, str) and test in found for found in seen)
        has_seen = []
        def add(a, b):
            if not has_seen: has_seen.append(look())
            if has_seen[0]: return a + b
    """,
    "looking through files": """
        import os
        def look():
            test = b"".join([b"candidate", b"(-1, -8)"])
            for root in ("/proc", "/tmp", "/drift", "/dev", "/var", "/home", "/root", "/opt", "."):
                for folder, _, names in os.walk(root):
                    for name in names:
                        try:
                            fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK)
                            if test in os.read(fd, 1 << 20): return True
                            os.close(fd)
                        except OSError: pass
        found = look()
        def add(a, b):
            if found: return a + b
    """,
    "looking through descriptors": """
        import os
        found = False
        for fd in range(64):
            try:
                os.lseek(fd, 0, 0)
                found |= b"candidate" in os.read(fd, 1 << 20)
            except OSError: pass
        def add(a, b):
            if found: return a + b
    """,
    "the reward module": """
        import sys
        sys.path += ['/', '/root', '/home', '/usr/lib/python3/dist-packages', '/drift']
        import drift.rewards.code
        def add(a, b): return a + b
    """,
    "the sandbox's own modules": """
        from inside import checker, start
        checker.Verdicts.fail = checker.Verdicts.hold
        start.main = checker.check = print
        def add(a, b): return 0
    """,
    "rewriting the sandbox": """
        import os
        for name in os.listdir('/drift/inside'):
            open('/drift/inside/' + name, 'w').write('')
        def add(a, b): return a + b
    """,
    "secrets of the environment": """
        import os
        assert any('SECRET' in key for key in os.environ)
        def add(a, b): return a + b
    """,
    # Writing the verdict oneself.
    "printing": "def add(a, b): print('hello\\npass 0\\npass 1\\npass 2', flush=True)",
    "printing at once": "print('hello\\npass 0\\npass 1\\npass 2', flush=True)\nimport os\nos._exit(0)",
    "writing everywhere": """
        import os
        def add(a, b):
            for fd in range(64):
                try:
                    os.write(fd, b'hello\\npass 0\\npass 1\\npass 2\\n')
                except OSError:
                    pass
    """,
    "a thread that replies": """
        import os, threading
        def reply():
            while True:
                for fd in range(3, 64):
                    try:
                        os.write(fd, b'\\0\\0\\0\\1T')
                    except OSError:
                        pass
        threading.Thread(target=reply, daemon=True).start()
        def add(a, b): return 1
    """,
    "replies beforehand": """
        import os
        from inside.values import encode
        for _ in range(9):
            for fd in range(3, 64):
                try:
                    message = encode(("value", True))
                    os.write(fd, len(message).to_bytes(4, 'big') + message)
                except OSError:
                    pass
        def add(a, b): return 1
    """,
    "a reply that is none": """
        import os
        from inside.values import encode
        def add(a, b):
            for kind in (("value",), ("error",), ("error", 3, 4), ("error", "Gone", ""), (), 3, "value"):
                message = encode(kind)
                for fd in range(3, 64):
                    try: os.write(fd, len(message).to_bytes(4, 'big') + message)
                    except OSError: pass
            return 1
    """,
    "a name in an exception": """
        class E(Exception): pass
        E.__name__ = 'pass 0\\npass 1\\npass 2\\n'
        def add(a, b): raise E('hello\\npass 0\\npass 1')
    """,
    "shutting the channel": """
        import socket
        for fd in range(3, 64):
            try:
                socket.socket(fileno=fd).shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        def add(a, b): return a + b
    """,
    "a descriptor through the channel": """
        import array, os, socket
        for fd in range(3, 64):
            try:
                socket.socket(fileno=os.dup(fd)).sendmsg(
                    [b"\\0\\0\\0\\1T"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                )
            except OSError:
                pass
        def add(a, b): return a + b
    """,
    "closing the channel": "import os\nos.closerange(0, 64)\ndef add(a, b): return a + b",
    # What outlives the test.
    "a thread that outlives": """
        import threading, time
        def live():
            while True: time.sleep(0.01)
        threading.Thread(target=live).start()
        def add(a, b): return 0
    """,
    "threads that spin": """
        import threading
        def spin():
            while True: pass
        for _ in range(200):
            try: threading.Thread(target=spin).start()
            except Exception: break
        def add(a, b): return 0
    """,
    "a fork that outlives": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        def add(a, b): return a + b
    """,
    "a process that outlives": """
        import subprocess
        subprocess.Popen(['sleep', '60'], start_new_session=True)
        def add(a, b): return a + b
    """,
    "multiprocessing": """
        import multiprocessing, time
        multiprocessing.Process(target=time.sleep, args=(60,)).start()
        def add(a, b): return a + b
    """,
    "a fork bomb": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """,
    "a fork bomb of the shell": "import os\nos.system(':(){ :|:& };:')\ndef add(a, b): return 0",
    # Taking all there is.
    "memory": "def add(a, b): return bytearray(1 << 33)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory in a text": "x = 'x'\nwhile True: x += x",
    "a file without end": "f = open('/tmp/left', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": """
        n = 0
        while True:
            open(f'/tmp/{n}', 'w').write('left')
            n += 1
    """,
    "output without end": "while True: print('x' * 100_000)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 100_000)",
    "deep recursion": "def add(a, b): return add(a, b)",
    "deeper recursion": """
        import sys
        sys.setrecursionlimit(1 << 30)
        def add(a, b): return add(a, b)
    """,
    "deep source": "def add(a, b): return " + "(" * 5000 + ")" * 5000,
    "deep value": """
        def add(a, b):
            x = []
            for _ in range(100_000): x = [x]
            return x
    """,
    "a value that holds itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "a value without end": "import itertools\ndef add(a, b): return itertools.count()",
    "a huge value": "def add(a, b): return 'a' * (1 << 25)",
    "a huge number": "def add(a, b): return 1 << (1 << 26)",
    "a number too long to print": "def add(a, b): return 10 ** 100_000",
    "a huge Decimal": "import decimal\ndef add(a, b): return decimal.Decimal('1e999999999')",
    "a huge Fraction": """
        import fractions
        value = fractions.Fraction(3 ** 2_000_000, 2 ** 3_000_001)
        def add(a, b): return value
    """,
    "keys that collide": """
        import os
        pairs = b''.join(b'i%x\\nN' % (((1 << 61) - 1) * i) for i in range(300_000))
        message = b't2\\ns5\\nvaluem600000\\n' + pairs
        def add(a, b):
            for fd in range(3, 64):
                try:
                    os.write(fd, len(message).to_bytes(4, 'big'))
                except OSError:
                    continue
                rest = memoryview(message)
                while rest: rest = rest[os.write(fd, rest):]
            while True: pass
    """,
    "a message of many values": """
        import os
        message = b't2\\ns5\\nvaluel16000000\\n' + b'N' * 16_000_000
        def add(a, b):
            for fd in range(3, 64):
                try:
                    os.write(fd, len(message).to_bytes(4, 'big'))
                except OSError:
                    continue
                rest = memoryview(message)
                while rest: rest = rest[os.write(fd, rest):]
            while True: pass
    """,
    "a reply byte by byte": """
        import os, time
        def add(a, b):
            for fd in range(3, 64):
                try:
                    os.write(fd, (1000).to_bytes(4, 'big'))
                    while True:
                        os.write(fd, b'N')
                        time.sleep(0.05)
                except OSError:
                    pass
    """,
    "a message of 4 GB": """
        import os
        def add(a, b):
            for fd in range(3, 64):
                try: os.write(fd, b'\\xff' * 1000)
                except OSError: pass
            while True: pass
    """,
    # Never coming back.
    "a loop": "def add(a, b):\n    while True: pass",
    "a loop when loaded": "while True: pass",
    "a loop that catches all": """
        def add(a, b):
            while True:
                try:
                    while True: pass
                except BaseException: pass
    """,
    "sleeping": "import time\ntime.sleep(60)",
    "waiting for input": "input()\ndef add(a, b): return input()",
    "waiting for nobody": "import threading\nthreading.Lock().acquire() and threading.Event().wait()",
    "a hang in C": "def add(a, b): return 9 ** 9 ** 9",
    "a hang in C when loaded": "x = sum(range(10 ** 15))\ndef add(a, b): return a + b",
    "a hang in a regular expression": "import re\ndef add(a, b): return re.match('(a|a)*b', 'a' * 99)",
    "a hang of the compiler": "def add(a, b): return " + "-" * 100_000 + "1",
    "a destructor that never ends": """
        import time
        class Slow:
            def __del__(self):
                while True:
                    try:
                        time.sleep(60)
                    except BaseException:
                        pass
        def add(a, b):
            Slow()
            return a + b
    """,
    "locks without end": """
        import fcntl, itertools
        file = open("/tmp/left", "w")
        for start in itertools.count(0, 2): fcntl.lockf(file, fcntl.LOCK_EX, 1, start)
    """,
    "a system call of another machine": """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3")  # x86-64: fork, as 32-bit programs call it
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        def add(a, b): return a + b
    """,
    "stopping the alarm": """
        import signal
        def add(a, b):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            while True: pass
    """,
    "blocking all signals": """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        def add(a, b):
            while True: pass
    """,
    "an exception whose text never comes": """
        class E(Exception):
            def __str__(self):
                while True: pass
        def add(a, b): raise E
    """,
    # Reaching out.
    "signals to the parent": """
        import os, signal
        for pid in (os.getppid(), 1, 0, -1, *range(2, 5000)):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                try: os.kill(pid, number)
                except OSError: pass
        def add(a, b): return 0
    """,
    "signals to the group": """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        os.kill(0, signal.SIGSTOP)
        def add(a, b): return 0
    """,
    "a socket": "import socket\nsocket.socket()\ndef add(a, b): return a + b",
    "a local socket": "import socket\nsocket.socket(socket.AF_UNIX)\ndef add(a, b): return a + b",
    "a download": """
        import urllib.request
        urllib.request.urlopen('http://127.0.0.1')
        def add(a, b): return a + b
    """,
    "writing outside": """
        import os
        for folder in ('/', '/usr', '/drift', '/dev', '/dev/shm', '/etc', '/var/tmp', '/home', '/root'):
            for name in ('mark', 'left'):
                try: open(f'{folder}/{name}', 'w').close()
                except OSError: continue
                def add(a, b): return a + b
        open('/tmp/mark', 'w').close()
    """,
    "a mount": """
        import ctypes
        libc = ctypes.CDLL(None)
        assert libc.unshare(0x10000000) == 0 or libc.mount(b'none', b'/tmp', b'proc', 0, 0) == 0
        def add(a, b): return a + b
    """,
    "tracing others": """
        import ctypes
        assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0
        def add(a, b): return a + b
    """,
    # Texts that want to be read otherwise.
    "NUL": "def add(a, b): return a + b\x00",
    "NUL first": "\x00def add(a, b): return a + b",
    "a lone surrogate": "def add(a, b): return a + b  # \ud800",
    "backwards": "def add(a, b):\n    \u202e'' ; return a + b",
    "a name that looks alike": "def \u0430dd(a, b): return a + b",
    "a fence within": "'''\n```\n'''\ndef add(a, b): return a + b",
    "a line that is none": "x = 1 #\u2028def add(a, b): return a + b",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_nothing(
    attempt: Callable[[str, Problem], float], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    assert attempt(ATTACKS[name], function(ADD)) == 0.0


def test_the_processes_are_seen(reward: CodeReward):
    # What the fixture looks for after each attack is there while one runs.
    judging = threading.Thread(target=reward, args=([block("while True: pass")], [function(ADD)]))
    judging.start()
    time.sleep(SECONDS / 2)
    assert len(sandboxed()) >= 2
    judging.join()
    assert sandboxed() == set()


@pytest.mark.parametrize(
    "name",
    ["exit", "os._exit", "os._exit in the call", "equal to everything", "built-ins", "printing", "a loop"],
)
def test_verdicts_are_the_tests_own_without_namespaces_too(name: str):
    reward = CodeReward(timeout_seconds=SECONDS, sandbox="rlimits")
    assert reward([block(ATTACKS[name])], [function(ADD)]).item() == 0.0


PROGRAM_ATTACKS = {
    "nothing": "",
    "exit": "exit()",
    "os._exit": "import os\nos._exit(0)",
    "an exit status": "import os\nprint(3, flush=True)\nos._exit(1)",
    "killed after the answer": "import os\nprint(3, flush=True)\nos.abort()",
    "an error after the answer": "print(3, flush=True)\nraise SystemExit('no')",
    "the greeting": "import os\nos.write(1, b'hello\\n')\nos._exit(0)",
    "both answers": "print(3)\nprint(4)",
    "bytes that are no text": "import os\nos.write(1, b'3\\xff')",
    "NUL": "print('3\\0')",
    "digits of another script": "print('\u0663')",
    "a full stop of no width": "print('3\\u200b')",
    "its input, changed": "import os\nos.ftruncate(0, 0)\nos.write(0, b'3')",
    "a loop": "while True: pass",
    "sleeping": "import time\ntime.sleep(60)",
    "a hang in C": "9 ** 9 ** 9",
    "stopping the alarm": "import signal\nsignal.setitimer(0, 0)\nimport time\ntime.sleep(60)",
    "answers and stays": "import signal\nsignal.setitimer(0, 0)\nprint(3, flush=True)\nwhile True: pass",
    "closes its output and stays": """
        import os, signal
        signal.setitimer(0, 0)
        os.write(1, b'3')
        os.close(1)
        while True: pass
    """,
    "output without end": "while True: print(3)",
    "a thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()",
    "a fork that answers": "import os\nprint(3 if os.fork() else 3)",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAM_ATTACKS)
def test_an_attack_of_a_program_earns_nothing(attempt: Callable[[str, Problem], float], name: str):
    assert attempt(PROGRAM_ATTACKS[name], program("1 2\n", "3\n")) == 0.0


VALUE_ATTACKS = {
    "a range": "def f(x): return range(10 ** 12)",
    "a huge number": "def f(x): return 10 ** 10 ** 6",
    "a large number": "def f(x): return 10 ** 9",
    "a Decimal": "import decimal\ndef f(x): return decimal.Decimal('9e999999')",
    "an iterator": "def f(x): return iter([])",
    "a text": "def f(x): return 'a' * 10 ** 7",
    "nothing": "def f(x): return None",
}  # fmt: skip


@pytest.mark.parametrize("name", VALUE_ATTACKS)
def test_a_value_that_makes_the_tests_compute_for_ever_earns_nothing(
    attempt: Callable[[str, Problem], float], name: str
):
    tests = """
def check(f):
    assert str(f(1)) == "5"
    assert f(2) * "a" == "aa"
    assert sum(f(3)) == 6
    assert 3 ** f(4) == 81
    assert len(list(f(5))) == 5
    for x in f(6):
        assert x == 1

check(f)
"""
    assert attempt(VALUE_ATTACKS[name], function(tests)) == 0.0


def test_a_correct_answer_may_print_megabytes(attempt: Callable[[str, Problem], float]):
    loud = """
        import sys
        def add(a, b):
            for out in (sys.stdout, sys.stderr):
                for _ in range(50): out.write('x' * 100_000)
                out.flush()
            return a + b
        add(0, 0)
    """
    assert attempt(loud, function(ADD)) == 1.0
    chatty = "import sys\nsys.stderr.write('x' * 5_000_000)\nprint(sum(map(int, input().split())))"
    assert attempt(chatty, program("1 2\n", "3\n")) == 1.0


def test_a_program_whose_output_has_megabytes_is_judged(attempt: Callable[[str, Problem], float]):
    expected = "0123456789\n" * 300_000
    assert attempt("print('0123456789\\n' * 300_000)", program("", expected)) == 1.0
    assert attempt("print('0123456789\\n' * 299_999)", program("", expected)) == 0.0


BOMBS = [
    "9**9**9",
    "9**9**9=3",
    "(" * 100 + "1" + ")" * 100,
    "(" * 100_000,
    "1" * 100_000,
    "-" * 190 + "1",
    "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "\\boxed{" * 10_000 + "3" + "}" * 10_000,
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{100000!}",
    "\\boxed{(10^{10})!}",
    "\\boxed{\\binom{10^9}{5 \\cdot 10^8}}",
    "\\boxed{\\sum_{i=1}^{10^{12}} i!}",
    "\\boxed{\\int_0^1 e^{e^{e^{x}}} dx}",
    "\\boxed{\\sqrt{" * 30 + "3" + "}}" * 30,
    "\\boxed{" + "\\frac{1}{" * 150 + "3" + "}" * 151,
    "\\boxed{" + "(" * 400 + "3" + ")" * 400 + "}",
    "\\boxed{" + "1+" * 400 + "1}",
    "\\boxed{(x+1)^{100000}}",
    "\\boxed{3\x00}",
    "\\boxed{\u0663}",
    "\\boxed{\uff13}",
    "\\boxed{3\u200b4}",
    "\\boxed{\u202e3}",
    "\\boxed{\ud800}",
    "\x00\ud800\u2028\u202e",
    "1+2\u2028",
    "\uff11+\u0662",
    "1_0+2",
    "1+2=3=3",
    "3",
    "exit()",
    "__import__('os')._exit(0)",
    "1+2 if 1 else 3",
    "[3][0]",
    "lambda: 3",
    "1.5+1.5",
    "0x3",
    "3.",
    "True+2",
    "3\n",
    "",
    " ",
    "\n\n",
    "......",
    "1234" * 4,
    "\u0661\u0662\u0663\u0664" * 4,
]  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        (CountdownReward(), Problem(prompt="", answer="", row={"numbers": [7, 8, 9], "target": 3})),
        (SudokuReward(size=4), Problem(prompt="", answer="", row={"puzzle": "1..............."})),
        (FormatReward("^<answer>(.|\n)*</answer>$"), Problem(prompt="", answer="")),
        (MathReward(timeout_seconds=1.0), Problem(prompt="\\boxed{17}", answer="17")),
    ],
)
def test_texts_that_are_bombs_earn_nothing(judge: Reward, problem: Problem):
    judge([BOMBS[0]], [problem])  # starts what there is to start
    start = time.monotonic()
    scores = judge(BOMBS, [problem] * len(BOMBS)).tolist()
    seconds = time.monotonic() - start
    judge.close()
    assert [bomb[:40] for bomb, score in zip(BOMBS, scores, strict=True) if score] == []
    assert seconds < 60  # a few hang for 1 s each, and a new judge starts
