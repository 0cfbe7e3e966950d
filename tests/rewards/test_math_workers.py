import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from drift.contract import ConfigError
from drift.rewards.math_workers import JudgePool, JudgeProcess

# A stand-in judge: it obeys its answers instead of judging them.
OBEDIENT = """
    import json, os, sys, time
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question["answer"] == "crash":
            os._exit(1)
        if question["answer"] == "hang":
            time.sleep(60)
        if question["answer"] == "slow":
            time.sleep(0.3)
        if question["answer"] == "in pieces":
            print('{"equ', end="", flush=True)
            time.sleep(0.1)
            print('al": ', end="", flush=True)
        else:
            print('{"equal": ', end="")
        print("true}" if question["gold"] == "yes" else "false}", flush=True)
"""


def command(folder: Path, program: str) -> list[str]:
    script = folder / "judge.py"
    script.write_text(textwrap.dedent(program))
    return [sys.executable, str(script)]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # a zombie has ended, though nobody has collected it
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def pid_of(worker: JudgeProcess) -> int:
    assert worker._process is not None
    return worker._process.pid


def test_answers_come_back_in_order(tmp_path: Path):
    pool = JudgePool(2, 5.0, command(tmp_path, OBEDIENT))
    golds = ["yes", "no", "no", "yes", "yes"] * 10
    assert pool.judge([[(gold, "")] for gold in golds]) == [gold == "yes" for gold in golds]
    assert pool.judge([]) == []
    pool.close()


def test_a_judge_that_hangs_or_crashes_is_replaced(tmp_path: Path):
    worker = JudgeProcess(1.0, command(tmp_path, OBEDIENT))
    for trouble in ("hang", "crash"):
        assert worker.ask([("yes", "")])
        before = pid_of(worker)
        started = time.monotonic()
        assert not worker.ask([("yes", trouble)])
        assert time.monotonic() - started < 10  # "hang" sleeps for 60 s
        assert not is_running(before)
        assert worker.ask([("yes", "")])
    worker.kill()


def test_the_parts_of_an_answer_must_all_be_equal_and_share_its_time(tmp_path: Path):
    worker = JudgeProcess(0.8, command(tmp_path, OBEDIENT))
    assert worker.ask([("yes", ""), ("yes", "slow")])
    assert not worker.ask([("yes", ""), ("no", ""), ("yes", "")])
    started = time.monotonic()
    assert not worker.ask([("yes", "slow")] * 9)  # 0.3 s each
    assert time.monotonic() - started < 2
    assert worker.ask([("yes", "")])
    worker.kill()


def test_a_judge_that_died_between_two_questions_costs_no_answer(tmp_path: Path):
    worker = JudgeProcess(5.0, command(tmp_path, OBEDIENT))
    assert worker.ask([("yes", "")])
    os.kill(pid_of(worker), signal.SIGKILL)
    worker._process.wait()
    assert worker.ask([("yes", "")])
    worker.kill()


def test_a_reply_in_pieces_is_put_together(tmp_path: Path):
    worker = JudgeProcess(5.0, command(tmp_path, OBEDIENT))
    assert worker.ask([("yes", "in pieces")])
    worker.kill()


def test_a_worn_judge_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("drift.rewards.math_workers._MAX_QUESTIONS", 2)
    worker = JudgeProcess(5.0, command(tmp_path, OBEDIENT))
    pids = [(worker.ask([("yes", "")]), pid_of(worker))[1] for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    worker.kill()


def test_the_memory_of_a_judge_is_limited():
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux tells the limits of another process")
    worker = JudgeProcess(5.0)
    assert worker.ask([("5", "4+1")])
    assert resource.prlimit(pid_of(worker), resource.RLIMIT_AS) == (2 * 1024**3, 2 * 1024**3)
    worker.kill()


def test_starting_does_not_count_against_the_limit(tmp_path: Path):
    slow_start = "import time; time.sleep(1.0)" + textwrap.dedent(OBEDIENT)
    worker = JudgeProcess(0.5, command(tmp_path, slow_start))
    assert worker.ask([("yes", "")])
    worker.kill()


def test_judges_start_when_needed_and_work_side_by_side(tmp_path: Path):
    pool = JudgePool(3, 5.0, command(tmp_path, OBEDIENT))
    assert [worker._process for worker in pool._workers] == [None] * 3
    for _ in range(4):
        assert pool.judge([[("yes", "")]]) == [True]
    assert sum(worker._process is not None for worker in pool._workers) == 1
    pool.judge([[("yes", "slow")]] * 3)
    assert sum(worker._process is not None for worker in pool._workers) == 3
    started = time.monotonic()
    pool.judge([[("yes", "slow")]] * 3)
    assert time.monotonic() - started < 0.8  # 0.3 s each: 0.9 s one after another
    pool.close()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("""print('{"error": "No module named math_verify"}')""", "No module named math_verify"),
        ("import a_module_that_is_not_there", "it said nothing"),
    ],
)
def test_a_judge_that_cannot_start_is_an_error(tmp_path: Path, program: str, reason: str):
    pool = JudgePool(2, 5.0, command(tmp_path, program))
    with pytest.raises(ConfigError, match=f"cannot start: {reason}.*pip install math-verify"):
        pool.judge([[("yes", "")], [("yes", "")]])


def test_close_and_collection_end_the_judges(tmp_path: Path):
    pool = JudgePool(1, 5.0, command(tmp_path, OBEDIENT))
    pool.judge([[("yes", "")]])
    first = pid_of(pool._workers[0])
    pool.close()
    assert not is_running(first)
    pool.judge([[("yes", "")]])
    second = pid_of(pool._workers[0])
    del pool
    gc.collect()
    assert not is_running(second)


def test_a_forked_child_has_a_judge_of_its_own(tmp_path: Path):
    worker = JudgeProcess(5.0, command(tmp_path, OBEDIENT))
    worker.ask([("yes", "")])
    before = pid_of(worker)
    child = os.fork()
    if not child:
        answer = worker.ask([("yes", "")])
        own = pid_of(worker) != before
        worker.kill()
        os._exit(0 if answer and own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_running(before)
    assert worker.ask([("yes", "")])
    assert pid_of(worker) == before
    worker.kill()


@pytest.mark.parametrize(
    ("how", "last_words"),
    [("killed", "os.kill(os.getpid(), 9)"), ("leaves", "sys.exit(0)"), ("raises", "1 / 0")],
)
def test_judges_end_with_their_parent(how: str, last_words: str):
    program = textwrap.dedent(f"""
        import os, sys
        from drift.rewards.math_workers import JudgePool
        pool = JudgePool(1, 5.0)
        assert pool.judge([[("5", "4+1")]]) == [True]
        print(pool._workers[0]._process.pid, flush=True)
        {last_words}
    """)
    root = Path(__file__).parents[2]
    parent = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert ends(int(parent.stdout), seconds=10), how
