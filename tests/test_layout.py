"""The rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"benchmarks", "callbacks", "configs", "drift", "tests"}
LINKS = {"drift/callbacks": "../callbacks", "drift/configs": "../configs"}
MAX_LINES = 300


@cache
def files() -> list[Path]:
    """Every file that git tracks or would track, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("needs a git checkout: " + listing.stderr.strip())
    return sorted({Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()})


def modules(*folders: str) -> list[Path]:
    found = [path for path in files() if path.suffix == ".py" and (not folders or path.parts[0] in folders)]
    assert found, f"no Python file found under {folders or ROOT}"
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement names: `from a import b` gives a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rank_words(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and words of everything that speaks of ranks or of one kind of device."""
    for node in ast.walk(module):
        names = imported(node)
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            if name in ("torch.distributed", "torch.cuda") or (
                imported(node) and (within(name, "torch.distributed") or within(name, "torch.cuda"))
            ):
                yield node.lineno, name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield node.lineno, ".cuda()"
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.match(r"cuda(:|$)", node.value)
        ):
            yield node.lineno, repr(node.value)


def test_top_level_holds_only_the_rooms():
    folders = {path.parts[0] for path in files() if len(path.parts) > 1}
    assert {name for name in folders if not name.startswith(".")} == FOLDERS


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_callbacks_and_configs_are_links_into_the_package(link: str, target: str):
    assert (ROOT / link).is_symlink(), f"{link} must be a symbolic link to {target}"
    assert str((ROOT / link).readlink()) == target
    assert Path(link) in files()


def test_nobody_imports_callbacks_by_its_bare_name():
    guilty = [
        f"{path}:{node.lineno}"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(within(name, "callbacks") for name in imported(node))
    ]
    assert not guilty, "import drift.callbacks instead: the bare name makes two classes of one"


def test_every_module_says_what_it_is():
    assert not [str(path) for path in modules("drift", "callbacks") if not ast.get_docstring(tree(path))]


def test_no_file_is_too_long_to_be_one_room():
    lengths = {
        str(path): len((ROOT / path).read_text().splitlines()) for path in modules("drift", "callbacks")
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_test_folders_mirror_the_package():
    rooms = {path.parent.relative_to("drift") for path in modules("drift")}
    rooms |= {path.parent for path in modules("callbacks")}
    tests = {path.parent.relative_to("tests") for path in modules("tests")}
    assert {str(room) for room in tests - rooms if room.parts[0] != "golden"} == set()


def test_import_drift_is_light():
    code = "import sys, drift; print({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_model_folder_runs_its_own_code():
    calls = [
        f"{path}:{node.value.lineno}"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    settings = [
        str(path)
        for path in files()
        if path.suffix in (".yaml", ".yml") and "trust_remote_code" in (ROOT / path).read_text()
    ]
    assert not calls + settings


def test_only_distributed_knows_ranks_and_devices():
    guilty = [
        f"{path}:{line}: {words}"
        for path in modules("drift", "callbacks")
        if path != Path("drift/distributed.py")
        for line, words in rank_words(tree(path))
    ]
    assert not guilty, "ask drift.distributed instead"


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "rank = torch.distributed.get_rank()",
        "torch.cuda.synchronize()",
        "x = x.cuda()",
        "device = 'cuda'",
        "device = f'cuda:{rank}'",
    ],
)
def test_rank_words_are_found(code: str):
    assert list(rank_words(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["from drift import distributed", "'''Runs on cuda, too.'''", "import torch"]
)
def test_other_words_are_left_alone(code: str):
    assert not list(rank_words(ast.parse(code)))
