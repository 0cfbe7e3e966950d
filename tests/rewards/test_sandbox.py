import os
import site
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from drift.contract import ConfigError
from drift.rewards.inside.values import encode
from drift.rewards.sandbox import Sandbox


def run(
    code: str, stdin: bytes = b"", seconds: float = 3.0, **settings: object
) -> tuple[bytes | None, int | None]:
    """What a program prints, and its exit status."""
    with Sandbox(**settings).start("program", stdin, encode((code, seconds)), 5) as process:
        process.require_greeting()
        return process.read(seconds + 2.0, 100_000), process.wait(1.0)


def says(code: str) -> str:
    printed, status = run(code)
    assert printed is not None
    assert status == 0
    return printed.decode().strip()


@pytest.mark.parametrize("kind", ["bwrap", "rlimits"])
def test_a_program_reads_and_prints(request: pytest.FixtureRequest, kind: str):
    if kind == "bwrap":
        request.getfixturevalue("bwrap")
    assert run("print(input()[::-1])", b"abc\n", kind=kind) == (b"cba\n", 0)
    assert run("import sys\nsys.exit(3)", kind=kind) == (b"", 3)
    assert run("1 / 0", kind=kind) == (b"", 1)
    assert run("print('a' * 200_000)", kind=kind)[0] is None
    assert run("open('here', 'w').write('1')\nprint(open('here').read())", kind=kind) == (b"1\n", 0)


@pytest.mark.parametrize("kind", ["bwrap", "rlimits"])
def test_limits(request: pytest.FixtureRequest, kind: str):
    if kind == "bwrap":
        request.getfixturevalue("bwrap")
    start = time.monotonic()
    assert run("while True: pass", seconds=0.2, kind=kind)[1] == 1
    assert run("import time\ntime.sleep(60)", seconds=0.2, kind=kind)[1] == 1
    assert run("import signal\nsignal.setitimer(0, 0)\nwhile True: pass", seconds=0.2, kind=kind)[1] is None
    assert time.monotonic() - start < 8
    assert run("bytearray(1 << 30)", kind=kind)[1] == 1
    assert run("bytearray(1 << 27)", kind=kind)[1] == 0
    assert run("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", kind=kind)[1] != 0
    assert run("import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))", kind=kind)[0] == b"(5, 5)\n"


def test_nothing_can_be_started(bwrap: None):
    assert says("import os\ntry: os.fork()\nexcept PermissionError: print('no')") == "no"
    assert (
        says("import subprocess\ntry: subprocess.run(['true'])\nexcept PermissionError: print('no')") == "no"
    )
    bomb = """
import threading, time
threading.stack_size(1 << {})
n = 0
try:
    while n < 5000:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        n += 1
except (RuntimeError, MemoryError):
    pass
print(n)
"""
    assert says(bomb.format(15)) == "0"
    assert 0 < int(says(bomb.format(20))) < 512  # a megabyte each
    joined = "import threading\nt = threading.Thread(target=print, args=('yes',))\nt.start()\nt.join()"
    assert says(joined) == "yes"


def test_there_is_no_network(bwrap: None):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        connect = f"import socket\ntry: socket.create_connection({address}, 1)\nexcept OSError as e: print(e)"
        assert "not permitted" in says(connect)


def test_files_are_out_of_reach(bwrap: None, tmp_path: Path):
    (tmp_path / "secret").write_text("tests")
    places = [str(tmp_path / "secret"), __file__, "/etc/passwd", "/proc/1/mem", str(Path.home() / ".cache")]
    assert says(f"import os\nprint([p for p in {places} if os.path.exists(p)])") == "[]"
    packages = [*site.getsitepackages([sys.base_prefix]), "/usr/lib/python3/dist-packages"]
    assert any(map(os.path.exists, packages))
    look = f"import os\nprint([os.listdir(p) for p in {packages} if os.path.exists(p)])"
    assert set(says(look)) <= set("[], ")
    folders = ["/", "/usr", "/usr/bin", "/drift", "/drift/inside", "/dev", "/dev/shm", "/etc", "/tmp"]
    write = """
for folder in {}:
    try:
        open(folder + '/x', 'w').close()
        print(folder)
    except OSError:
        pass
"""
    assert says(write.format(folders)) == "/tmp"
    fill = """
n = 0
try:
    while n < 99:
        with open(f'/tmp/{n}', 'wb') as file:
            file.write(bytes(1 << 20))
        n += 1
except OSError:
    print(n)
"""
    assert says(fill) == "16"


def test_environment_and_descriptors_are_bare(bwrap: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    known = {"PATH", "LANG", "HOME", "TMPDIR", "PWD", "PYTHONHASHSEED"}
    assert set(says("import os\nprint(*os.environ)").split()) <= known
    opened = "import os\nfor fd in range(64):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass"
    assert says(opened).split() == ["0", "1", "2"]
    assert says("import os\nprint(os.getuid(), os.getpid(), os.getppid())") == "65534 1 0"
    assert says("print({'a', 'b', 'c', 'd'})") == says("print({'a', 'b', 'c', 'd'})")


def test_others_cannot_be_killed(bwrap: None):
    code = "import os\nfor pid in {}:\n    try: os.kill(pid, 9)\n    except OSError: print('no')"
    assert says(code.format([os.getpid(), os.getppid()])) == "no\nno"


def test_closing_ends_a_process_and_collects_it(bwrap: None):
    code = "import signal\nsignal.setitimer(0, 0)\nwhile True: pass"
    process = Sandbox().start("program", b"", encode((code, 9.0)), 30)
    pid = process._process.pid
    process.require_greeting()
    assert process.read(0.3, 10) == b""
    process.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_sandbox_that_cannot_be_made_is_an_error(bwrap: None, monkeypatch: pytest.MonkeyPatch):
    sandbox = Sandbox()
    monkeypatch.setattr("drift.rewards.sandbox._bwrap", lambda: ("bwrap", "--no-such-option"))
    process = sandbox.start("program", b"", encode(("", 1.0)), 5)
    with pytest.raises(RuntimeError, match="could not make a sandbox"):
        process.close()
    with pytest.raises(ConfigError, match=r"does not work here \(bwrap: Unknown option --no-such-option"):
        Sandbox()


def test_a_sandbox_that_lets_processes_start_is_refused(bwrap: None, monkeypatch: pytest.MonkeyPatch):
    allow = b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    monkeypatch.setattr("drift.rewards.sandbox.filter_program", lambda machine: allow)
    with pytest.raises(ConfigError, match="lets processes start"):
        Sandbox()


def test_other_machines_are_refused(bwrap: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match=r"not 'riscv64'.*rlimits"):
        Sandbox()


def test_many_threads_start_sandboxes(bwrap: None):
    sandbox, found = Sandbox(), []

    def one(number: int) -> None:
        with sandbox.start("program", b"", encode((f"print({number})", 5.0)), 5) as process:
            process.require_greeting()
            found.append(int(process.read(20.0, 100) or b"-1"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(12))
