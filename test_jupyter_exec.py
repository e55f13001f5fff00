# SPDX-License-Identifier: MIT
"""Tests of jupyter_exec; sections mirror those of the module.

Rules of this file
* Real peers before fakes: a real ipykernel, jupyter_client's Session as judge of the wire format, markdown-it as
  judge of the fences. Scripted kernels, on real ZeroMQ sockets, only where no real one misbehaves on demand.
* Loopback and socket files only, port 0, every wait bounded, no sleep as synchronisation: `eventually` polls.
* One behaviour a test; speed is never asserted in seconds (see the benchmarks, `pytest -m bench`).
* No leaks: an autouse fixture compares processes, threads, sockets and directories before and after each test.
* No surprises: a record of level ERROR on the module's logger fails the test, unless `logs_error` expects it.
* Hermetic: the run has a temporary directory and a container label (RUN) of its own; tests pass in any order.
* `pytest` is to end within three minutes on two idle cores; what takes seconds is marked `slow` (`pytest -m slow`).
* The tests of other sections pass with the fork server on and, by JUPYTER_EXEC_LAUNCH=1, off.
* What the machine lacks is skipped with its reason, unless JUPYTER_EXEC_REQUIRE names it: then it fails.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import contextvars
import copy
import datetime
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import pty
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import nbformat
import pytest
import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection import base as jupyter_server_base
from markdown_it import MarkdownIt
from pytest import FixtureRequest, LogCaptureFixture, MonkeyPatch, TempPathFactory
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

import jupyter_exec
from jupyter_exec import (
    MAX_PARTS,
    V1_SUBPROTOCOL,
    AsyncJupyterCodeExecutor,
    CodeBlock,
    CodeResult,
    CommandJupyterServer,
    ConnectionClosed,
    DockerJupyterServer,
    ExecutionError,
    ExecutionResult,
    ExecutionTimeout,
    FileTransferError,
    JsonCodec,
    JupyterCodeExecutor,
    JupyterConnectionInfo,
    JupyterExecError,
    KernelConnection,
    KernelDied,
    KernelError,
    KernelSpecNotFound,
    KernelStartFailed,
    LocalJupyterServer,
    MarkdownCodeExtractor,
    Message,
    ProtocolError,
    RemoteJupyterServer,
    SandboxError,
    ServerError,
    SignatureError,
    V1Codec,
    VariableError,
    WebSocket,
)

settings.register_profile("here", deadline=None)
settings.load_profile("here")

HERE = Path(__file__).parent
MODULE = Path(jupyter_exec.__file__)
py_compile.compile(str(MODULE))  # where PYTHONDONTWRITEBYTECODE is set each host would compile it
TREE = ast.parse(MODULE.read_text(encoding="utf-8"))
# JUPYTER_EXEC_LAUNCH=1 runs the tests with the fork server off, but for those that are about it.
if os.environ.get("JUPYTER_EXEC_LAUNCH"):
    jupyter_exec.LAUNCH_DEFAULTS["preload"] = None

PATIENCE = 20.0  # seconds until a condition that must come counts as not coming
RUN = f"jupyter-exec-test-{os.urandom(4).hex()}"  # label, and part of the names, of all that this run makes in Docker


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition()` is true and return its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.005)
    return value


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a program that imports the module under test."""
    return os.environ | {"PYTHONPATH": str(MODULE.parent)} | changes


def run_python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that imports the module under test in a process of its own."""
    options.setdefault("env", environment())
    options.setdefault("timeout", 60)
    program = "import logging; logging.basicConfig(level=logging.ERROR)\n" + textwrap.dedent(program)
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert "ERROR:jupyter_exec:" not in result.stderr, result.stderr
    return result


@contextlib.contextmanager
def client_program(program: str, *arguments: str, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own that imports the module and has printed "ready"; it is killed at last."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    pipe, env = subprocess.PIPE, environment(**changes)
    with subprocess.Popen(command, stdout=pipe, text=True, env=env, start_new_session=True) as client:
        assert client.stdout and client.stdout.readline() == "ready\n"
        yield client
        client.kill()


def on_a_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """Make a test of a coroutine function."""

    @functools.wraps(test)
    def run_it(*arguments: Any, **options: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **options), PATIENCE))

    return run_it


def descendants(pid: int) -> set[int]:
    """Return the living descendants of a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = stat.read_text(errors="replace").rpartition(")")[2].split()  # a name may be any bytes
            if after_name[0] != "Z":
                parents[int(stat.parent.name)] = int(after_name[1])
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def marked_processes(marker: str) -> list[int]:
    """Return the pids of living processes with `marker` in their environment or command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture
def marker() -> Iterator[str]:
    """A word in the environment or command line of processes, none of which may be left at the end."""
    word = f"mark-{time.time_ns()}"
    yield word
    eventually(lambda: not marked_processes(word), "every process is gone")


def is_gone(pid: int) -> bool:
    return pid not in descendants(os.getpid())


def cases(names: str, *rows: Any, ids: Any = None) -> pytest.MarkDecorator:
    """Run a test once for each row of values for the arguments of these names."""
    return pytest.mark.parametrize(names, rows, ids=ids)


def resources() -> dict[str, Any]:
    """Return what a test may not leave behind."""
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by another thread, or the one that lists
            descriptors.append(os.readlink(f"/proc/self/fd/{fd}"))
    return {
        "processes": descendants(os.getpid()),
        "threads": {thread for thread in threading.enumerate() if not thread.name.startswith("Dummy")},
        "sockets": sum(link.startswith(("socket:", "anon_inode:", "pipe:")) for link in descriptors),
        "files": {path for pattern in ("jx-*", "jx-*/*") for path in Path(tempfile.gettempdir()).glob(pattern)},
    }


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: TempPathFactory) -> Iterator[None]:
    """Give the run a temporary directory of its own, and the signals of a program that was started in a terminal."""
    tmp_path_factory.getbasetemp()  # stays where it is, for a person to look at
    outside = tempfile.gettempdir()
    before = os.environ.get("TMPDIR")
    # Sockets want a short path: below a long one the module would use /tmp, where other programs have theirs.
    own = tempfile.mkdtemp(prefix="jxt-", dir=outside if len(outside) < 50 else "/tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup, and then so in every child
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    gc.collect()
    gc.freeze()  # what is imported by now need not be looked at after each test
    yield
    tempfile.tempdir = outside
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_errors_logged(request: FixtureRequest) -> Iterator[None]:
    """Fail on a record of level ERROR, of any thread; `logs_error(TEXT)` expects such records, all with that text."""
    marker = request.node.get_closest_marker("logs_error")
    records: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: records.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    jupyter_exec.logger.addHandler(handler)
    yield
    jupyter_exec.logger.removeHandler(handler)
    if marker:
        assert records, f"nothing was logged of {marker.args[0]!r}"
    assert [text for text in records if not marker or marker.args[0] not in text] == []


@pytest.fixture(autouse=True)
def no_leaks(request: FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("bench"):  # a rival's leaks are not ours
        yield
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        return
    before = resources()
    yield
    after: dict[str, Any] = {}

    def settled() -> bool:
        gc.collect()
        after.update(resources())
        fewer = after["sockets"] <= before["sockets"]
        return fewer and all(after[name] <= before[name] for name in ("processes", "threads", "files"))

    with contextlib.suppress(AssertionError):
        eventually(settled, "no leaks")
    leaks = {name: (before[name], after[name]) for name in after if not after[name] <= before[name]}
    assert not leaks


@pytest.fixture(scope="session")
def server() -> Iterator[LocalJupyterServer]:
    """A server that all tests share; each has its own kernel on it."""
    with LocalJupyterServer(cwd=tempfile.gettempdir()) as server:
        with JupyterCodeExecutor(server) as executor:  # the first use makes what all later ones share
            assert executor.execute("1").status == "ok"
        yield server


@pytest.fixture
def executor(server: LocalJupyterServer, tmp_path: Path) -> Iterator[JupyterCodeExecutor]:
    with JupyterCodeExecutor(server, output_dir=tmp_path) as executor:
        yield executor


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for socket files: the path of pytest's own is too long for them."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield Path(path)


def readme_blocks(section: str, language: str = "python") -> list[str]:
    """Return the blocks of a section of the README ("" is what comes first) in a language."""
    text = "\n## \n" + (HERE / "README.md").read_text(encoding="utf-8")
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


v4: Any = nbformat.v4  # whose functions have no types


def read_notebook(path: Path, as_version: int) -> Any:
    return nbformat.read(path, as_version=as_version)  # type: ignore[no-untyped-call]


def run(executor: JupyterCodeExecutor, *codes: str) -> CodeResult:
    return executor.execute_code_blocks([CodeBlock(code=code, language="python") for code in codes])


# ======================================================================================================
# 0. Header: shape of the file, vendoring
# ======================================================================================================


@functools.cache
def sections() -> dict[int, tuple[int, int, bool]]:
    """Return {number of section: (first line, last line, pure)}."""
    lines = MODULE.read_text(encoding="utf-8").splitlines()
    heads = [(i, re.fullmatch(r"# (\d+)\. \w.*?(\(pure\))?", line)) for i, line in enumerate(lines, 1)]
    found = [(i, int(match[1]), bool(match[2])) for i, match in heads if match and lines[i - 2].startswith("# ====")]
    ends = [start - 1 for start, _, _ in found[1:]] + [len(lines)]
    return {number: (start, end, pure) for (start, number, pure), end in zip(found, ends, strict=True)}


def section_of(line: int) -> int:
    return next((n for n, (start, end, _) in sections().items() if start <= line <= end), 0)


def test_sections_are_numbered_in_order() -> None:
    numbers = list(sections())
    assert numbers == sorted(numbers)
    assert {*range(1, 19)} == set(numbers)


def test_a_section_uses_only_names_of_sections_above_it() -> None:
    defined: dict[str, int] = {}
    for node in TREE.body:
        targets = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else getattr(node, "targets", [])
        for target in targets:
            defined[getattr(target, "name", getattr(target, "id", ""))] = section_of(node.lineno)
    for name in ast.walk(TREE):
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and name.id in defined:
            assert defined[name.id] <= section_of(name.lineno), f"line {name.lineno} uses {name.id} from below"


def test_pure_sections_know_no_socket_clock_process_or_file() -> None:
    impure = {"socket", "time", "subprocess", "os", "threading", "selectors", "tempfile", "open", "Path", "shutil"}
    impure |= {"uuid", "secrets", "datetime", "queue", "zmq", "sys", "logger"}
    pure = [(start, end) for start, end, is_pure in sections().values() if is_pure]
    assert len(pure) >= 4
    for node in ast.walk(TREE):
        if isinstance(node, ast.Name) and node.id in impure:
            assert not any(start <= node.lineno <= end for start, end in pure), f"line {node.lineno}: {node.id}"


def test_only_the_standard_library_is_imported_at_module_level_and_little_else_anywhere() -> None:
    def foreign(nodes: Iterable[ast.AST]) -> set[str]:
        names: set[str] = set()
        for node in nodes:
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        return {name.split(".")[0] for name in names} - sys.stdlib_module_names

    assert foreign(TREE.body) == set()
    assert foreign(ast.walk(TREE)) <= {
        "zmq",
        "docker",
        "mcp",  # for the command of that name
        "annotationlib",  # of Python 3.14
        "typing_extensions",  # for type checkers only, which know it
    }


@functools.cache
def missing_on_windows() -> dict[int, str]:
    """Return {line of the module: name that it uses there and Python on Windows does not have}, by typeshed."""
    command = [sys.executable, "-m", "mypy", "--platform", "win32", "jupyter_exec.py"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout
    found = re.findall(r"^jupyter_exec\.py:(\d+): error: (?:Module has no attribute \"(\w+)\")?", said, re.MULTILINE)
    return {int(line): name for line, name in found}


@pytest.mark.slow
def test_only_what_never_runs_on_windows_uses_names_that_are_missing_there() -> None:
    places = {(node.lineno, node.end_lineno or 0): node for node in TREE.body if hasattr(node, "name")}
    guarded = {"FdStream", "Tail", "Folder", "follow_shell"}
    assert set(missing_on_windows().values()) > {"fork", "killpg", "set_blocking"}
    for line, name in missing_on_windows().items():
        place: Any = next((node for (start, end), node in places.items() if start <= line <= end), None)
        assert name, f"line {line} is wrong on Windows"
        assert section_of(line) == 10 or (place and place.name in guarded), f"line {line} uses {name}"


def test_import_loads_neither_docker_nor_jupyter_client_nor_ssl() -> None:
    result = run_python(
        "import sys, jupyter_exec; print({'docker', 'jupyter_client', 'ssl', 'zmq'} & set(sys.modules))"
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_a_host_of_the_same_bytecode_gets_code_and_others_the_source(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    source = b"s%08d" % MODULE.stat().st_size + MODULE.read_bytes()
    for cached, expected in ((str(MODULE), b"c"), (str(tmp_path / "none.pyc"), b"s"), (None, b"s")):
        monkeypatch.setattr(jupyter_exec, "__cached__", cached)
        assert jupyter_exec.own_program(importlib.util.MAGIC_NUMBER.hex())[:1] == expected
        assert jupyter_exec.own_program("00") == source


@pytest.mark.slow
@cases("place", "code", "code.zip")
def test_two_vendored_copies_work_in_one_process_and_from_a_zip_file(tmp_path: Path, place: str) -> None:
    vendored = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pkg._vendor import jupyter_exec as one
        from pkg._vendor import other as two
        for module in (one, two):
            with module.LocalJupyterServer() as server, module.JupyterCodeExecutor(server) as executor:
                print(executor.execute_code_blocks([module.CodeBlock("40 + 2")]).output)
        assert one.CodeBlock is not two.CodeBlock
    """
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for name in ("pkg/__init__.py", "pkg/_vendor/__init__.py"):
            archive.writestr(name, "")
        for name in ("jupyter_exec.py", "other.py"):
            archive.write(MODULE, f"pkg/_vendor/{name}")
        archive.extractall(tmp_path / "code")
    result = run_python(vendored, str(tmp_path / place))
    assert (result.stdout, result.stderr) == ("42\n42\n", "")


BY_HAND = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("by_hand", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.LocalJupyterServer() as server, module.JupyterCodeExecutor(server) as executor:
        print(executor.execute_code_blocks([module.CodeBlock("40 + 2")]).output)
"""


@pytest.mark.slow
@cases("suffix", ".py", ".pyc")
def test_a_module_that_is_loaded_by_hand_or_without_source_works(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"by_hand{suffix}"
    shutil.copy(MODULE, path) if suffix == ".py" else py_compile.compile(str(MODULE), str(path))
    result = run_python(BY_HAND, str(path), cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("42\n", "")


STRICT = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2"}


@pytest.mark.slow
@cases(
    "changes",
    STRICT,
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HOME": None, "PATH": None},
    {"HOME": "/nonexistent", "PYTHONDEVMODE": "1", "PYTHONUNBUFFERED": "1"},
)
@cases("method", "fork", "spawn")
def test_a_worker_process_with_an_odd_environment(changes: dict[str, str | None], method: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(
        "import multiprocessing, sys, jupyter_exec\n"
        "def work():\n"
        "    with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:\n"
        "        cell = executor.execute('while True: pass', timeout=0.5)\n"
        "        print(cell.kernel_state, ascii(executor.execute('print(\"\\u00e9\")').text))\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context(sys.argv[1]).Process(target=work)\n"
        "    worker.start()\n"
        "    worker.join()\n"
    )
    command = [sys.executable, str(tmp_path / "worker.py"), method]
    kept = {name: value for name, value in (environment() | changes).items() if value is not None}
    result = subprocess.run(command, env=kept, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert (result.stdout, result.stderr) == ("intact '\\xe9\\n'\n", "")


def test_bytecode_that_the_host_cannot_read_is_not_sent(tmp_path: Path) -> None:
    py_compile.compile(str(MODULE), str(tmp_path / "by_hand.pyc"))
    program = BY_HAND.replace("    with", "    print(module.own_program('00'))\n    with")
    result = run_python(program, str(tmp_path / "by_hand.pyc"), cwd=tmp_path)
    assert "the source of by_hand is not here" in result.stderr
    assert "ship by_hand.py too" in result.stderr


@cases("where, name, value", (sys, "frozen", True), (jupyter_exec, "__compiled__", 1), (sys, "executable", ""))
def test_a_frozen_program_has_to_name_a_python(where: Any, name: str, value: Any, monkeypatch: Any) -> None:
    python = sys.executable
    monkeypatch.setattr(where, name, value, raising=False)
    with pytest.raises(ValueError, match="This program is frozen"):
        LocalJupyterServer()
    with LocalJupyterServer(python=python) as server:
        assert "python3" in server.kernelspecs()


def test_working_directory_cannot_shadow_the_standard_library(tmp_path: Path) -> None:
    for name in ("signal", "json", "selectors", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    with LocalJupyterServer(cwd=tmp_path) as server:
        assert "python3" in server.kernelspecs()


# ======================================================================================================
# 1. Errors
# ======================================================================================================


@cases(
    "error",
    JupyterExecError("a"),
    ProtocolError("a"),
    SignatureError("a"),
    ConnectionClosed("a"),
    ExecutionTimeout("a"),
    ExecutionError("NameError", "x", "trace"),
    KernelSpecNotFound("nope", ["python3"], ["/a"], "/bin/python3"),
    KernelSpecNotFound(name="nope"),
    KernelStartFailed(["python3"], "", 1, "boom"),
    KernelDied(cause="", exit_code=-11, stderr="tail"),
    SandboxError("no", "image", "container", "log"),
    ServerError("GET", "http://a/api", 403, "no"),
    FileTransferError("a.csv", "No such file or directory", "ENOENT"),
    VariableError("x", "it is no JSON here"),
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: JupyterExecError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_errors_are_the_builtin_ones_too_and_say_what_happened_and_what_to_do() -> None:
    for error, builtin in {ConnectionClosed: ConnectionError, ExecutionTimeout: TimeoutError}.items():
        assert issubclass(error, builtin)
    assert issubclass(KernelSpecNotFound, ValueError)
    assert str(KernelDied(exit_code=-11)) == "The kernel died (killed by signal 11, SIGSEGV); all variables are lost"
    assert "ended by itself with exit code 3" in str(KernelDied(exit_code=3))
    missing = KernelStartFailed(["/v/python", "-m", "ipykernel_launcher"], "", 1, "No module named ipykernel_launcher")
    assert "/v/python -m pip install ipykernel" in str(missing)


# ======================================================================================================
# 2. Messages
# ======================================================================================================

CONNECTION = {
    "ip": "127.0.0.1",
    "transport": "tcp",
    "shell_port": 1001,
    "iopub_port": 1002,
    "stdin_port": 1003,
    "control_port": 1004,
    "hb_port": 1005,
    "key": "secret-key",
    "signature_scheme": "hmac-sha256",
    "kernel_name": "python3",
}


def connection_json(**changes: Any) -> str:
    return json.dumps({key: value for key, value in (CONNECTION | changes).items() if value is not ...})


def test_connection_files_are_read_and_written_and_their_key_is_in_no_repr() -> None:
    connection = KernelConnection.from_json(connection_json())
    assert json.loads(connection.to_json()) == CONNECTION
    assert connection.address("iopub") == "tcp://127.0.0.1:1002"
    assert KernelConnection.from_json(connection_json(ip="::1")).address("shell") == "tcp://[::1]:1001"
    ipc = KernelConnection.from_json(connection_json(transport="ipc", ip="/tmp/k", shell_port=1))
    assert ipc.address("shell") == "ipc:///tmp/k-1"
    odd = KernelConnection.from_json(connection_json(shell_port="1001", jupyter_session="x.ipynb"))
    assert odd.shell_port == 1001
    assert "secret-key" not in repr(connection) + str(connection)


@cases(
    "text, says",
    ("", "not JSON"),
    ("[]", "not a JSON object"),
    ("[" * 100_000, "not JSON"),
    (connection_json(shell_port=...), "shell_port"),
    (connection_json(ip=...), "ip"),
    (connection_json(shell_port=70000), "shell_port"),
    (connection_json(shell_port=True), "shell_port"),
    (connection_json(iopub_port="٣"), "iopub_port"),
    (connection_json(iopub_port="9" * 5000), "iopub_port"),
    (connection_json(key=5), "key"),
    (connection_json(transport="pgm"), "transport"),
    (connection_json(signature_scheme="rot13"), "signature scheme"),
    (connection_json(signature_scheme="hmac-rot13"), "signature scheme"),
    (connection_json(signature_scheme="hmac-shake_128"), "signature scheme"),
)
def test_broken_connection_files_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        KernelConnection.from_json(text)


# ======================================================================================================
# 3. Codecs
# ======================================================================================================

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=5)
buffer_lists = st.lists(st.binary(max_size=50), max_size=3)
topic_lists = st.lists(st.binary(max_size=9).filter(lambda topic: topic != b"<IDS|MSG>"), max_size=2)
schemes = st.sampled_from(["hmac-sha256", "hmac-md5", "hmac-sha512"])


def message(content: dict[str, Any], metadata: dict[str, Any], buffers: list[bytes]) -> jupyter_exec.Message:
    header = {"msg_id": "m", "msg_type": "t", "session": "s", "username": "u", "date": "2026-01-01T00:00:00Z"}
    return jupyter_exec.Message("shell", header | {"version": "5.4"}, {}, metadata, content, buffers)


@given(json_objects, json_objects, buffer_lists, schemes, st.sampled_from(["", "key", "schlüssel"]))
def test_jupyter_client_reads_what_we_write(
    content: dict[str, Any], metadata: dict[str, Any], buffers: list[bytes], scheme: str, key: str
) -> None:
    judge = Session(key=key.encode(), signature_scheme=scheme)
    parts = jupyter_exec.ZmqCodec(key, scheme).encode(message(content, metadata, buffers))
    _, rest = judge.feed_identities(parts)
    read = judge.deserialize(rest)
    assert (read["content"], read["metadata"], read["msg_type"]) == (content, metadata, "t")
    assert [bytes(buffer) for buffer in read["buffers"]] == buffers


@given(json_objects, buffer_lists, schemes, st.sampled_from(["", "key"]), topic_lists)
def test_we_read_what_jupyter_client_writes(
    content: dict[str, Any], buffers: list[bytes], scheme: str, key: str, topics: list[bytes]
) -> None:
    judge = Session(key=key.encode(), signature_scheme=scheme)
    written = judge.serialize(judge.msg("status", content), ident=topics) + buffers
    read = decoded(jupyter_exec.ZmqCodec(key, scheme), "iopub", written)
    assert (read.content, read.msg_type, read.channel, read.buffers) == (content, "status", "iopub", buffers)


def decoded(codec: Any, *data: Any) -> jupyter_exec.Message:
    (message,) = codec.decode(*data)
    assert isinstance(message, jupyter_exec.Message)
    return message


def signed(*parts: bytes, key: str = "key") -> list[bytes]:
    return [b"<IDS|MSG>", jupyter_exec.ZmqCodec(key)._sign(parts), *parts]


def test_lone_surrogates_invalid_utf8_and_null_dicts_of_real_kernels_are_read() -> None:
    codec = jupyter_exec.ZmqCodec("key")
    assert decoded(codec, "shell", codec.encode(message({"code": "\ud83d"}, {}, []))).content == {"code": "\ud83d"}
    read = decoded(codec, "iopub", signed(b'{"msg_type":"stream"}', b"null", b"null", b'{"text":"\xed\xb3\xbf"}'))
    assert (read.parent_header, read.metadata, read.parent_id) == ({}, {}, "")
    assert read.content["text"].startswith("�")


@cases(
    "parts, says",
    ([], "delimiter"),
    ([b"x"] * 6, "delimiter"),
    ([b"<IDS|MSG>"], "five"),
    (signed(b"{}", b"{}", b"{}"), "five"),
    (signed(b"[]", b"{}", b"{}", b"{}"), "header is not a JSON object"),
    (signed(b"{}", b" " * 2**21, b"{}", b"{}"), "header of a message is larger"),
)
def test_malformed_messages_are_refused(parts: list[bytes], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decoded(jupyter_exec.ZmqCodec("key"), "iopub", parts)


def test_a_huge_message_is_refused_before_it_is_parsed(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_MESSAGE", 1000)
    with pytest.raises(ProtocolError, match="larger than 1000"):
        decoded(jupyter_exec.ZmqCodec("key"), "iopub", signed(b"{}", b"{}", b"{}", b" " * 1000))


def test_any_change_breaks_the_signature_and_does_not_get_the_genuine_message_refused() -> None:
    codec = jupyter_exec.ZmqCodec("key")
    genuine = codec.encode(message({"a": 1}, {}, []))
    for position in range(1, 6):
        forged = [*genuine[:position], genuine[position][:-1] + b" ", *genuine[position + 1 :]]
        with pytest.raises(SignatureError):
            decoded(codec, "shell", forged)
    assert decoded(codec, "shell", genuine).content == {"a": 1}


@cases("piece", 40, 41, 42, 43, 44, 45, 46, 47)
@given(st.text(alphabet=st.sampled_from('a"\\\n\u00e9\u20ac\U0001f600\ud83d\x01'), max_size=200), st.booleans())
def test_a_huge_stream_message_comes_in_pieces(piece: int, text: str, ascii_only: bool) -> None:
    content = json.dumps({"name": "stdout", "text": text}, ensure_ascii=ascii_only).encode("utf-8", "replace")
    with MonkeyPatch.context() as patch:
        patch.setattr(jupyter_exec, "STREAM_PIECE", piece)
        pieces = [json.loads(bytes(cut)) for cut in jupyter_exec.stream_pieces(content)]
    assert "".join(cut["text"] for cut in pieces) == json.loads(content)["text"]
    assert {cut["name"] for cut in pieces} <= {"stdout"}


@pytest.mark.timeout(20)
@cases("text", b"\x80" * 300_000, b"\\\\" * 8_000_000, b"\\ud83d" * 50_000, ids=["bytes", "escapes", "halves"])
def test_no_text_is_cut_for_ever(text: bytes) -> None:
    pieces = list(jupyter_exec.stream_pieces(b'{"name":"stdout","text":"%b"}' % text))
    read = "".join(json.loads(str(piece, "utf-8", "replace"))["text"] for piece in pieces)
    assert read == json.loads(b'"%b"' % text.replace(b"\x80", "\ufffd".encode()))


BOMB = b'{"data":{"application/json":[%b[]]},"metadata":{}}' % (b"[]," * 5_000_000)


@cases(
    "msg_type, content, lost",
    ("error", b"{", True),
    ("display_data", b'{"a":' * 100_000, True),
    ("comm_msg", BOMB, False),
    ("display_data", BOMB, True),
    ("error", b'"' + b"x" * 70_000_000 + b'"', True),
)
def test_what_is_too_large_is_not_parsed(msg_type: str, content: bytes, lost: bool) -> None:
    header = json.dumps({"msg_type": msg_type}).encode()
    read = decoded(jupyter_exec.ZmqCodec("key"), "iopub", signed(header, b"{}", b"{}", content))
    assert (read.content, read.lost) == ({}, lost)


def test_what_stands_in_a_string_makes_no_objects() -> None:
    page = json.dumps({"data": {"text/html": '<a href="x">[1, 2]</a>' * 1_000_000}, "metadata": {}}).encode()
    read = decoded(jupyter_exec.ZmqCodec("key"), "iopub", signed(b'{"msg_type":"display_data"}', b"{}", b"{}", page))
    assert not read.lost and len(page) < read.size < 3 * len(page)


@cases("text", '\\"' * 8_000_000, '"' + "," * 8_000_000, '",' * 8_000_000, '"\\' * 8_000_000, ids=["1", "2", "3", "4"])
def test_hostile_json_is_weighed_in_one_pass(text: str) -> None:
    assert jupyter_exec.json_weight(text) >= len(text)


@cases("limit", 0, 1, 5, 6)
def test_shortened_text_has_as_many_characters_as_allowed(limit: int) -> None:
    text = "0123456789"
    mark = jupyter_exec.gap_mark(10 - limit)
    assert jupyter_exec.shorten(text, limit).split(mark) == [text[: limit // 2], text[10 - (limit + 1) // 2 :]]


def test_integers_without_end_stay_text() -> None:
    assert jupyter_exec.json_object('{"a": %s, "b": 12}' % ("9" * 5000), "x") == {"a": "9" * 5000, "b": 12}


@given(st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=5), max_size=5), st.data())
def test_pipe_frames_survive_any_chunking(frames: list[list[bytes]], data: st.DataObject) -> None:
    stream = b"".join(jupyter_exec.PipeCodec.encode(parts) for parts in frames)
    read: list[list[bytes]] = []
    codec = jupyter_exec.PipeCodec()
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        read += codec.feed(stream[:size])
        stream = stream[size:]
    assert read == frames


@cases(
    "data, says",
    (b"Traceback (most recent call last):", "not a frame"),
    (b"JX\0\0\0\0", "missing or too long"),
    (b"JX\xff\xff\xff\xff", "over the limit"),
    (b"JX\0\0\0\x0a\0\0\0\1\0\0\0\x0bab", "do not fit"),
    (b"JX\0\0\0\x0e\0\0\0\2\0\0\0\x0e\0\0\0\x0dab", "do not fit"),
)
def test_a_corrupt_pipe_is_noticed(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        list(jupyter_exec.PipeCodec().feed(data))


# ======================================================================================================
# 4. WebSocket protocol, and the codecs of the WebSocket
#
# The judges are other people's code: the `websockets` package (its sans-io server, and its threaded server on a
# socket), tornado (what Jupyter servers run on), jupyter_server's own serialisers. Bytes are written by hand only
# where a judge refuses to produce them: violations.
# ======================================================================================================

judge: Any = jupyter_server_base  # untyped
MAX_MESSAGE = 2**20
SAMPLE_KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455, 1.3
OPENING = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}


def opened(mask: Callable[[], bytes] = lambda: b"mask", max_message: int = MAX_MESSAGE) -> WebSocket:
    return WebSocket(mask, max_message)


def frame(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    """Return a legal frame of a server, as `websockets` writes it."""
    return Frame(Opcode(opcode), data, fin).serialize(mask=False)


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size
    yield data[start:]


def read_by_judge(data: bytes) -> list[tuple[int, bytes]]:
    """Return (opcode, data) of a client's frames, as the server of `websockets` reads them."""
    server = ServerProtocol(state=State.OPEN, max_size=None)
    server.receive_data(data)
    if server.parser_exc:
        raise server.parser_exc
    return [(int(event.opcode), bytes(event.data)) for event in server.events_received() if isinstance(event, Frame)]


# Opening


@cases(
    "changes, subprotocol",
    ({}, None),
    ({"Upgrade": "WebSocket", "Connection": "keep-alive ,\tUPGRADE"}, None),
    ({"Sec-WebSocket-Protocol": V1_SUBPROTOCOL}, V1_SUBPROTOCOL),
    ({"Sec-WebSocket-Protocol": "", "Sec-WebSocket-Extensions": ""}, None),  # what Jupyter's page asks of servers
)
def test_an_opening_may_be_written_in_many_ways(changes: dict[str, str], subprotocol: str | None) -> None:
    assert jupyter_exec.check_opening(SAMPLE_KEY, (OPENING | changes).get) == subprotocol


@cases(
    "changes, sentence",
    ({"Upgrade": None}, "Upgrade"),
    ({"Upgrade": "h2c"}, "Upgrade"),
    ({"Connection": None}, "Connection"),
    ({"Connection": "keep-alive, Upgrades"}, "Connection"),
    ({"Sec-WebSocket-Accept": None}, "Sec-WebSocket-Accept"),
    ({"Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOO="}, "Sec-WebSocket-Accept"),
    ({"Sec-WebSocket-Extensions": "permessage-deflate"}, "extension"),
    ({"Sec-WebSocket-Protocol": "other"}, "subprotocol"),
    ({"Sec-WebSocket-Protocol": f"x, {V1_SUBPROTOCOL}"}, "subprotocol"),
)
def test_a_wrong_opening_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProtocolError, match=sentence):
        jupyter_exec.check_opening(SAMPLE_KEY, (OPENING | changes).get)


# Messages from the server

STORY = (
    frame(1, "h\u00e9llo \U0001f600".encode())
    + frame(1, b"")
    + frame(2, b"\xff\x00", fin=False)
    + frame(9, b"are you there?")
    + frame(0, b"", fin=False)
    + frame(10, b"unasked")
    + frame(0, b"\x01" * 200)
    + frame(1, "\U0001f600".encode()[:3], fin=False)
    + frame(9, b"and now?")
    + frame(0, "\U0001f600".encode()[3:])
    + frame(2, b"\x02" * 70)
    + frame(8, Close(1001, "going \u2192 away").serialize())
    + frame(1, b"after the end")
)


@given(st.lists(st.integers(0, 60)))
@example([])
@example([1] * len(STORY))
def test_a_story_in_any_pieces(sizes: list[int]) -> None:
    messages = ["h\u00e9llo \U0001f600", "", b"\xff\x00" + b"\x01" * 200, "\U0001f600", b"\x02" * 70]
    client = opened()
    assert [message for piece in cut(STORY, sizes) for message in client.receive(piece)] == messages
    # 5.5.3 allows to answer the last ping only.
    assert read_by_judge(client.data_to_send()) == [(Opcode.PONG, b"and now?"), (Opcode.CLOSE, b"\x03\xe9")]
    assert client.closed
    assert client.data_to_send() == client.close() == b""


messages = st.one_of(st.text(), st.binary(), st.sampled_from([125, 126, 65535, 65536, 65537]).map(bytes))


@given(st.lists(st.tuples(messages, st.lists(st.integers(0, 40), max_size=4))), st.lists(st.integers(1, 200)))
def test_whatever_a_server_sends_in_fragments_arrives(plan: list[Any], sizes: list[int]) -> None:
    server, client = ServerProtocol(state=State.OPEN), opened()
    for message, cuts in plan:
        pieces = list(cut(message.encode() if isinstance(message, str) else message, cuts)) or [b""]
        for number, piece in enumerate(pieces):
            send = server.send_text if isinstance(message, str) else server.send_binary
            (server.send_continuation if number else send)(piece, fin=number == len(pieces) - 1)
            server.send_ping(b"")
    data = b"".join(server.data_to_send())
    assert [got for piece in cut(data, sizes) for got in client.receive(piece)] == [message for message, _ in plan]


# Messages to the server


@given(messages, st.binary(min_size=4, max_size=4))
@example(os.urandom(10_000_000), b"\x01\x80\xfe\x00")
def test_whatever_is_sent_arrives(message: str | bytes, key: bytes) -> None:
    text = isinstance(message, str)
    expected = message.encode() if isinstance(message, str) else message
    assert read_by_judge(opened(lambda: key).send(message)) == [(Opcode.TEXT if text else Opcode.BINARY, expected)]


def test_the_masked_hello_of_the_rfc_and_a_fresh_mask_for_each_frame() -> None:
    assert opened(lambda: bytes.fromhex("37fa213d")).send("Hello") == bytes.fromhex("8185 37fa213d 7f9f4d5158")
    keys = [bytes([number]) * 4 for number in range(1, 6)]
    client = opened(iter(keys).__next__)
    assert list(client.receive(frame(9, b"ping"))) == []
    frames = [client.data_to_send(), client.send("x"), client.ping(), client.pong(), client.close()]
    assert [data[2:6] for data in frames] == keys
    assert [data[0] for data in frames] == [0x8A, 0x81, 0x89, 0x8A, 0x88]


# Violations

STARTED = frame(1, b"a", fin=False)


@cases(
    "data, code, sentence",
    (Frame(Opcode.TEXT, b"Hello").serialize(mask=True)[:2], 1002, "MUST NOT mask"),
    (b"\x81\x80", 1002, "MUST NOT mask"),
    *((bytes([first, 0]), 1002, "RSV1") for first in (0xC1, 0xA1, 0x91)),
    *((bytes([first, 5]), 1002, "unknown opcode") for first in (0x83, 0x87, 0x8B, 0x8F)),
    (b"\x09\x05", 1002, "fragmented"),
    (b"\x08\x02", 1002, "fragmented"),
    (b"\x89\x7e", 1002, "125 bytes"),
    (b"\x8a\x7f", 1002, "125 bytes"),
    (b"\x88\x7e", 1002, "125 bytes"),
    (b"\x80\x05", 1002, "interleaved"),
    (b"\x00\x05", 1002, "interleaved"),
    (STARTED + b"\x81\x05", 1002, "interleaved"),
    (STARTED + b"\x02\x05", 1002, "interleaved"),
    (frame(1, b"", fin=False) + b"\x81\x00", 1002, "interleaved"),
    (frame(1, b"x") + b"\x80\x00", 1002, "interleaved"),
    (STARTED + frame(0) + b"\x80\x00", 1002, "interleaved"),
    (b"\x82\x7e\x00\x7d", 1002, "minimal number"),
    (b"\x82\x7f" + struct.pack(">Q", 65535), 1002, "minimal number"),
    (b"\x82\x7f" + struct.pack(">Q", 5), 1002, "minimal number"),
    (b"\x82\x7f" + struct.pack(">Q", MAX_MESSAGE + 1), 1009, f"over {MAX_MESSAGE} bytes"),
    (b"\x82\x7f" + b"\xff" * 8, 1009, f"over {MAX_MESSAGE} bytes"),
    (STARTED + b"\x80\x7f" + struct.pack(">Q", MAX_MESSAGE), 1009, f"over {MAX_MESSAGE} bytes"),
    (frame(1, b"\xff"), 1007, "UTF-8"),
    (frame(1, b"\xed\xa0\x80"), 1007, "UTF-8"),
    (frame(1, "\u20ac".encode()[:2]), 1007, "UTF-8"),
    (STARTED + frame(0, b"\xff"), 1007, "UTF-8"),
    (frame(8, b"\x03"), 1002, "2-byte unsigned"),
    *(
        (frame(8, struct.pack(">H", code)), 1002, f"{code} is not")
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)
    ),
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
@cases("step", 1, 1000)
def test_a_violation_ends_the_connection(data: bytes, code: int, sentence: str, step: int) -> None:
    client = opened()
    with pytest.raises(ProtocolError, match=sentence):
        for piece in cut(frame(2, b"before") + data, itertools.repeat(step)):
            for message in client.receive(piece):
                assert message in (b"before", "x", "a")
    assert client.closed
    ((opcode, payload),) = read_by_judge(client.data_to_send())[-1:]
    assert (opcode, Close.parse(payload).code) == (Opcode.CLOSE, code)
    assert list(client.receive(frame(1, b"more"))) == []
    assert client.close() == client.data_to_send() == b""


@cases("code", 1000, 1001, 1002, 1003, 1007, 1008, 1011, 1012, 1013, 1014, 3000, 4999, None)
def test_a_close_frame_is_answered(code: int | None) -> None:
    client = opened()
    assert list(client.receive(frame(8, b"" if code is None else struct.pack(">H", code)))) == []
    assert read_by_judge(client.data_to_send()) == [(Opcode.CLOSE, struct.pack(">H", code or 1000))]


def test_a_message_of_the_greatest_size_is_taken_in_one_or_more_frames() -> None:
    client = opened(max_message=300)
    data = frame(2, bytes(300)) + frame(2, bytes(200), False) + frame(9, b"x" * 125) + frame(0, bytes(100), False)
    assert list(client.receive(data + frame(0) + frame(2, bytes(300)))) == [bytes(300)] * 3


def seconds_for(size: int, step: int, fragment: int) -> float:
    """Return the processor time of a message of `size` bytes, in frames of `fragment`, read by `step`."""
    pieces = list(cut(bytes(size), itertools.repeat(fragment, size // fragment - 1)))
    data = b"".join(frame(0 if n else 2, piece, n == len(pieces) - 1) for n, piece in enumerate(pieces))
    client = opened(max_message=size)
    started = time.process_time()
    received = [message for piece in cut(data, itertools.repeat(step)) for message in client.receive(piece)]
    elapsed = time.process_time() - started
    assert received == [bytes(size)]
    return elapsed


@pytest.mark.slow
@cases(
    "size, step, fragment",
    pytest.param(50_000, 1, 50_000, id="byte by byte"),
    pytest.param(8_000_000, 4096, 8_000_000, id="one great frame"),
    pytest.param(100_000, 65536, 2, id="many small frames"),
)
def test_the_cost_is_linear(size: int, step: int, fragment: int) -> None:
    # Eight times the work takes 8 times as long; it would take 64 times if bytes were moved again and again.
    small = min(seconds_for(size, step, fragment) for _ in range(3))
    great = min(seconds_for(8 * size, step, fragment if fragment < size else 8 * size) for _ in range(2))
    assert great < 30 * small + 0.05


# Real servers: websockets and tornado


class Driver:
    """The least that a program has to do around a WebSocket, opened by RestClient."""

    def __init__(self, port: int, target: str = "/", max_message: int = MAX_MESSAGE) -> None:
        rest = jupyter_exec.RestClient(JupyterConnectionInfo("127.0.0.1", False, port, "s3cret"))
        self.socket, self.subprotocol = rest.websocket(target, jupyter_exec.Deadline(PATIENCE))
        self.ws = opened(lambda: os.urandom(4), max_message)
        self.waiting: list[str | bytes] = []

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def next(self) -> str | bytes | None:
        """Return the next message, None at the end of the connection."""
        while not self.waiting and not self.ws.closed:
            data = self.socket.recv(65536)
            assert data, "the stream ended without a Close frame"
            try:
                self.waiting += self.ws.receive(data)
            finally:
                self.socket.sendall(self.ws.data_to_send())
        return self.waiting.pop(0) if self.waiting else None


@contextlib.contextmanager
def websockets_server(handler: Callable[[ServerConnection], None], **options: Any) -> Iterator[int]:
    with serve(handler, "127.0.0.1", 0, open_timeout=PATIENCE, close_timeout=PATIENCE, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_websockets_talks_with_us_and_frames_behind_the_answer_are_not_lost(monkeypatch: MonkeyPatch) -> None:
    codes, headers = [], []

    def handler(connection: ServerConnection) -> None:
        assert connection.request
        headers.append(connection.request.headers)
        connection.send(["in ", "three ", "fragments"])
        assert connection.ping(b"are you there?").wait(PATIENCE)
        for message in connection:
            connection.send(message)
        codes.append(connection.close_code)

    makefile = jupyter_exec.DeadlineReader.makefile

    def wait_for_frames(self: jupyter_exec.DeadlineReader, mode: str) -> Any:
        eventually(lambda: b"fragments" in self._socket.recv(10_000, socket.MSG_PEEK), "frames came with the answer")
        return makefile(self, mode)

    monkeypatch.setattr(jupyter_exec.DeadlineReader, "makefile", wait_for_frames)
    options: dict[str, Any] = {"subprotocols": [V1_SUBPROTOCOL], "max_size": None, "compression": None}
    with websockets_server(handler, **options) as port, Driver(port) as driver:
        assert driver.subprotocol == V1_SUBPROTOCOL
        assert headers[0]["Authorization"] == "token s3cret"
        assert driver.next() == "in three fragments"
        for message in ("h\u00e9llo", b"", os.urandom(MAX_MESSAGE)):
            driver.socket.sendall(driver.ws.send(message))
            assert driver.next() == message
        driver.socket.sendall(driver.ws.close())
        assert driver.socket.recv(100) == frame(8, b"\x03\xe8")
        assert driver.socket.recv(1) == b""
    assert codes == [1000]


def test_websockets_is_told_of_a_message_that_is_too_big() -> None:
    codes: list[int | None] = []

    def handler(connection: ServerConnection) -> None:
        connection.send(b"x" * 1001)
        with contextlib.suppress(Exception):
            connection.recv(PATIENCE)
        codes.append(connection.close_code)

    with websockets_server(handler) as port, Driver(port, max_message=1000) as driver:
        with pytest.raises(ProtocolError, match="over 1000 bytes"):
            driver.next()
        while driver.socket.recv(65536):  # closing with bytes unread would reset the connection, Close frame and all
            pass
    assert codes == [1009]


class TornadoEcho(tornado.websocket.WebSocketHandler):
    def on_message(self, message: str | bytes) -> None:
        if message == "close":
            self.close(1000, "as you wish")
        elif message == "vanish":
            self.close()
        else:
            self.ping(b"x")
            self.write_message(message, binary=isinstance(message, bytes))


@pytest.fixture(scope="module")
def tornado_port() -> Iterator[int]:
    """A tornado server, the one under every Jupyter server, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop, stop, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def main() -> None:
        redirect = ("/login", tornado.web.RedirectHandler, {"url": "/hub/login", "permanent": False})
        server = tornado.httpserver.HTTPServer(tornado.web.Application([("/ws", TornadoEcho), redirect]))
        listener.setblocking(False)
        server.add_socket(listener)
        started.set()
        await stop.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    yield listener.getsockname()[1]
    loop.call_soon_threadsafe(stop.set)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    loop.close()
    listener.close()


@cases("farewell", "close", "vanish")
def test_tornado_talks_with_us(tornado_port: int, farewell: str) -> None:
    with Driver(tornado_port, "/ws") as driver:
        assert driver.subprotocol is None
        for message in ("h\u00e9llo", os.urandom(200_000)):
            driver.socket.sendall(driver.ws.send(message))
            assert driver.next() == message
        driver.socket.sendall(driver.ws.send(farewell))
        assert driver.next() is None
        assert driver.socket.recv(1) == b""


@cases("target, status, says", ("/none", 404, "Not Found"), ("/login", 302, "redirects"))
def test_a_refusal_to_open_is_told(tornado_port: int, target: str, status: int, says: str) -> None:
    with pytest.raises(ServerError, match=says) as caught:
        Driver(tornado_port, target)
    assert caught.value.status == status


# Codecs

channels = st.sampled_from(["shell", "iopub", "stdin", "control"])
kernel_messages = st.builds(
    Message, channels, json_objects, json_objects, json_objects, json_objects, st.lists(st.binary(), max_size=4)
)


def as_dict(message: Message) -> dict[str, Any]:
    """The message in the form of jupyter_server."""
    names = ("channel", "header", "parent_header", "metadata", "content", "buffers")
    return {name: getattr(message, name) for name in names}


def any_message(**values: Any) -> Message:
    default = Message("iopub", {"msg_type": "stream", "msg_id": "1"}, {"msg_id": "0"}, {}, {"text": "x"}, [])
    return Message(**(as_dict(default) | values))


def pack(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@given(kernel_messages)
def test_json_goes_to_the_server_and_back(sent: Message) -> None:
    data, values = JsonCodec().encode(sent), as_dict(sent)
    assert isinstance(data, bytes) == bool(sent.buffers)
    assert (json.loads(data) if isinstance(data, str) else judge.deserialize_binary_message(data)) == values
    assert decoded(JsonCodec(), data) == sent
    assert decoded(JsonCodec(), judge.serialize_binary_message(values)) == sent
    sent.buffers.clear()
    assert decoded(JsonCodec(), json.dumps(values)) == sent


@given(kernel_messages)
def test_v1_goes_to_the_server_and_back(sent: Message) -> None:
    objects = [sent.header, sent.parent_header, sent.metadata, sent.content]
    data = V1Codec().encode(sent)
    channel, parts = judge.deserialize_msg_from_ws_v1(data)
    assert (channel, [json.loads(part) for part in parts[:4]], parts[4:]) == (sent.channel, objects, sent.buffers)
    assert decoded(V1Codec(), data) == sent
    theirs = judge.serialize_msg_to_ws_v1([*map(pack, objects), *sent.buffers], sent.channel)
    assert decoded(V1Codec(), theirs) == sent
    sent.buffers.clear()
    assert decoded(V1Codec(), judge.serialize_msg_to_ws_v1(as_dict(sent), sent.channel, pack=pack)) == sent


@cases("codec", JsonCodec(), V1Codec())
def test_a_lone_surrogate_survives(codec: JsonCodec | V1Codec) -> None:
    sent = any_message(content={"code": "print('\ud83d')"})
    assert decoded(codec, codec.encode(sent)) == sent


def test_null_stands_for_an_empty_object_and_raw_surrogates_do_not_lose_the_message() -> None:
    text = '{"channel":"iopub","header":{"msg_id":"1"},"parent_header":null,"metadata":null,"content":null}'
    expected = Message("iopub", {"msg_id": "1"}, {}, {}, {}, [])
    assert decoded(JsonCodec(), text) == expected
    assert decoded(V1Codec(), v1_of(b'{"msg_id":"1"}', b"null", b"null", b"null", channel="iopub")) == expected
    assert decoded(V1Codec(), v1_of(b"{}", b"{}", b"{}", b'{"text":"a\xffb"}')).content == {"text": "a\ufffdb"}


def json_of(**values: Any) -> str:
    return json.dumps(as_dict(any_message()) | values)


def v1_of(*parts: bytes, channel: str = "shell") -> bytes:
    return bytes(judge.serialize_msg_to_ws_v1(list(parts), channel))


WRONG_VALUES: list[dict[str, Any]] = [{"parent_header": []}, {"metadata": 0}, {"content": False}]
WRONG_VALUES += [{"header": None}, {"header": []}, {"header": "x"}]
WRONG_VALUES += [{"channel": None}, {"channel": "hb"}, {"channel": ["shell"]}, {"channel": {}}]


@cases("data", "", "[]", "null", "{", "[" * 100_000, "{}", *(json_of(**v) for v in WRONG_VALUES))
def test_malformed_json_is_refused(data: str) -> None:
    with pytest.raises(ProtocolError):
        decoded(JsonCodec(), data)


@cases(
    "data",
    "text",
    v1_of(b"{}", b"{}", b"{}"),
    v1_of(b"null", b"{}", b"{}", b"{}"),
    v1_of(b"[]", b"{}", b"{}", b"{}"),
    v1_of(b"{}", b"[]", b"{}", b"{}"),
    v1_of(b"{}", b"{}", b"", b"{}"),
    *(v1_of(b"{}", b"{}", b"{}", b"{}", channel=channel) for channel in ("hb", "", "sh\u00e9ll")),
    v1_of(b"{}", b"{}", b"{}", b"{}").replace(b"shell", b"she\xffl"),
    v1_of(b"{}", b"{}", b"{}", b"{}") + b"x",
    v1_of(b"{}", b"{}", b"{}", b"{}")[:-1],
)
def test_malformed_v1_is_refused(data: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        decoded(V1Codec(), data)


def test_what_is_huge_is_parsed_once_or_not_at_all(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "STREAM_PIECE", 100)
    parsed: list[str] = []
    json_object = jupyter_exec.json_object

    def counting(data: Any, what: str) -> Any:
        parsed.append(what)
        return json_object(data, what)

    monkeypatch.setattr(jupyter_exec, "json_object", counting)
    huge = any_message(content={"name": "stdout", "text": "x" * 1000}, metadata={"a": 1}, buffers=[b"b" * 1000])
    pieces = list(V1Codec().decode(V1Codec().encode(huge)))
    assert "".join(piece.content["text"] for piece in pieces) == "x" * 1000
    assert (parsed.count("metadata"), parsed.count("content"), len(pieces)) == (1, 10, 10)
    assert all(piece.buffers is pieces[0].buffers for piece in pieces)
    parsed.clear()
    for msg_type in ("comm_msg", ["unhashable"], None):
        huge.header = {"msg_type": msg_type}
        (skipped,) = V1Codec().decode(V1Codec().encode(huge))
        assert (skipped.content, skipped.buffers) == ({}, [])
    assert set(parsed) == {"header", "parent_header"}


CODECS: dict[str, Any] = {">I": JsonCodec(), "<Q": V1Codec()}
PLAIN: dict[str, bytes] = {
    word: codec.encode(any_message(buffers=[b"ab", b"", b"cd"])) for word, codec in CODECS.items()
}


@cases("word", ">I", "<Q")
def test_no_prefix_of_a_message_is_taken_for_one(word: str) -> None:
    codec, data = CODECS[word], PLAIN[word]
    size = struct.calcsize(word)
    count = struct.unpack_from(word, data)[0]
    # Only the JSON form has no end of its own: there, the last buffer ("cd") may be cut.
    end = len(data) - 2 if word == ">I" else len(data)
    assert end > size * (count + 1)
    for length in range(end):
        with pytest.raises(ProtocolError):
            decoded(codec, data[:length])


@cases("word", ">I", "<Q")
def test_hostile_tables_are_refused(word: str) -> None:
    codec, data = CODECS[word], PLAIN[word]
    size = struct.calcsize(word)
    count = struct.unpack_from(word, data)[0]
    largest = 2 ** (8 * size) - 1
    refused = 0
    for index in range(count + 1):
        (right,) = struct.unpack_from(word, data, size * index)
        before = struct.unpack_from(word, data, size * (index - 1))[0] if index > 1 else size * (count + 1)
        after = struct.unpack_from(word, data, size * (index + 1))[0] if index < count else len(data)
        offsets = {0, before - 1, after + 1, len(data) + 1, largest, largest // 2}
        for number in (offsets if index else {0, largest}) - {right}:
            with pytest.raises(ProtocolError):
                decoded(codec, data[: size * index] + struct.pack(word, number) + data[size * (index + 1) :])
            refused += 1
    assert refused > 5 * count


@cases("word", ">I", "<Q")
def test_the_number_of_parts_is_bounded(word: str) -> None:
    codec = CODECS[word]
    extra = {">I": 1, "<Q": 6}[word]  # the JSON; channel, four objects and the end
    most = any_message(buffers=[b""] * (MAX_PARTS - extra))
    assert decoded(codec, codec.encode(most)) == most
    most.buffers.append(b"")
    with pytest.raises(ProtocolError, match="too long"):
        decoded(codec, codec.encode(most))


@given(st.binary())
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for codec in (JsonCodec(), V1Codec()):
        with pytest.raises(ProtocolError):
            decoded(codec, data)
    with contextlib.suppress(ProtocolError):
        assert all(jupyter_exec.PipeCodec().feed(data))


byte_changes = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1)


@given(st.sampled_from([">I", "<Q"]), byte_changes)
def test_no_change_of_bytes_raises_anything_else(word: str, changes: list[tuple[int, int]]) -> None:
    codec, data = CODECS[word], bytearray(PLAIN[word])
    for position, value in changes:
        data[position % len(data)] = value
    with contextlib.suppress(ProtocolError):
        assert isinstance(decoded(codec, bytes(data)), Message)


@given(st.binary(), st.lists(st.integers(1, 9)))
def test_no_frames_raise_anything_else(data: bytes, sizes: list[int]) -> None:
    def outcome(pieces: Iterable[bytes]) -> tuple[list[str | bytes], str]:
        client, received = opened(), []
        try:
            for piece in pieces:
                for message in client.receive(piece):
                    received.append(message)
        except ProtocolError as error:
            return received, str(error)
        return received, ""

    assert outcome(cut(data, sizes)) == outcome([data])


# ======================================================================================================
# 5. Execution
# ======================================================================================================


def execution(*messages: tuple[str, str, dict[str, Any]]) -> jupyter_exec.Execution:
    made = jupyter_exec.Execution("m")
    for channel, msg_type, content in messages:
        made.feed(jupyter_exec.Message(channel, {"msg_type": msg_type}, {"msg_id": "m"}, {}, content, []))
    return made


REPLY = ("shell", "execute_reply", {"status": "ok", "execution_count": 3})
IDLE = ("iopub", "status", {"execution_state": "idle"})


def stream(text: str, name: str = "stdout") -> tuple[str, str, dict[str, Any]]:
    return "iopub", "stream", {"name": name, "text": text}


def display(
    data: dict[str, Any], display_id: str | None = None, msg_type: str = "display_data"
) -> tuple[str, str, Any]:
    return "iopub", msg_type, {"data": data, "metadata": {}, "transient": {"display_id": display_id}}


def test_done_is_reply_and_idle_in_either_order() -> None:
    busy = ("iopub", "status", {"execution_state": "busy"})
    for first, second in ((REPLY, IDLE), (IDLE, REPLY)):
        assert not execution(busy, first).done
        assert execution(busy, first, second).done
    assert not execution(("iopub", *REPLY[1:]), IDLE).done


CLEAR, CLEAR_LATER = (("iopub", "clear_output", {"wait": wait}) for wait in (False, True))
ONE, TWO = display({"text/plain": "1"}, "d"), display({"text/plain": "2"}, "d", "update_display_data")


@cases(
    "messages, outputs",
    ([stream("a"), stream("b\n"), stream("e\n", "stderr"), stream("c")], ["stdout ab\n", "stderr e\n", "stdout c"]),
    ([ONE, ONE, TWO], ["2", "2"]),
    ([stream("a"), CLEAR], []),
    ([stream("a"), CLEAR_LATER], ["stdout a"]),
    ([stream("a"), CLEAR_LATER, stream("b")], ["stdout b"]),
)
def test_what_is_left_of_outputs(messages: Any, outputs: list[str]) -> None:
    left = execution(*messages).result(0).outputs
    assert [f"{o['name']} {o['text']}" if "text" in o else o["data"]["text/plain"] for o in left] == outputs


@cases("content", {}, {"name": 5, "text": "x"}, {"name": "stdout", "text": None}, {"data": [], "metadata": None})
@cases("msg_type", "stream", "display_data", "execute_result", "error", "status", "comm_open", "?")
def test_malformed_content_does_no_harm(msg_type: str, content: dict[str, Any]) -> None:
    contents = (("iopub", msg_type, broken) for broken in (content, {"transient": None}))
    broken = execution(*contents, stream("ok"), REPLY, IDLE)
    assert broken.done
    assert "ok" in broken.result(0).text


@cases(
    "ids, lost",
    (["s_7_{}"], True),  # ipykernel's: session, pid, number
    (["{}"], False),
    (["s_{}"], False),
    (["s_7_{}x"], False),
    (["s_7_" + "9" * 5000], False),
    (["s_7_{}", "t_8_{}"], False),  # restarted in between
)
def test_a_gap_in_the_numbers_of_a_kernel_is_lost_output(ids: list[str], lost: bool) -> None:
    def feed(made: jupyter_exec.Execution, number: int, msg_id: str, state: str, parent: str = "m") -> None:
        header = {"msg_type": "status", "msg_id": msg_id.format(number)}
        made.feed(jupyter_exec.Message("iopub", header, {"msg_id": parent}, {}, {"execution_state": state}, []))

    made, whole, shared = (jupyter_exec.Execution("m") for _ in range(3))
    feed(made, 10, ids[0], "busy")
    feed(made, 100, ids[-1], "idle")
    assert made.outputs_lost == lost
    for number in range(10, 100):
        feed(whole, number, ids[0], "busy" if number < 99 else "idle")
        feed(shared, 10 + 3 * (number - 10), ids[0], "busy")  # two in three go to others
        feed(shared, 11 + 3 * (number - 10), ids[0], "idle", "other" if number < 99 else "m")
    assert not whole.outputs_lost
    assert not shared.outputs_lost


def test_beyond_the_budget_outputs_are_withheld_and_forgotten(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_KEPT", 1000)
    made = jupyter_exec.Execution("m")
    shows = [("display_data", "a", 900), ("display_data", "b", 200), ("update_display_data", "b", 50)]
    shows += [("update_display_data", "a", 950), ("update_display_data", "a", 2000)]
    for number, (msg_type, display_id, size) in enumerate(shows):
        _, _, content = display({"text/plain": str(number)}, display_id)
        made.feed(jupyter_exec.Message("iopub", {"msg_type": msg_type}, {"msg_id": "m"}, {}, content, [], size))
    outputs = made.result(0).outputs
    assert [output["data"]["text/plain"] for output in outputs] == ["3", "2"]  # b was shown by its update alone
    assert made.outputs_lost
    assert all("transient" not in output for output in outputs)


def test_the_number_of_outputs_is_bounded_and_the_last_text_is_there(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_OUTPUTS", 20)
    turns = [stream(f"{i} ", ("stdout", "stderr")[i % 2]) for i in range(100)]
    result = execution(display({"text/plain": "first"}), *turns, REPLY, IDLE).result(0)
    assert len(result.outputs) <= 22
    assert result.text.startswith("first\n0 1 2 ") and result.text.endswith("98 99 " + "\n" + result.note)
    assert result.truncated and result.note


@cases("msg_type", "stream", "display_data", "error", "execute_reply", "status", "update_display_data")
def test_no_nesting_of_what_a_kernel_sends_raises(msg_type: str) -> None:
    deep: Any = json.loads("[" * 900 + "]" * 900)
    names = "name text data metadata transient ename evalue traceback status payload execution_count execution_state"
    channel = "shell" if msg_type == "execute_reply" else "iopub"
    flat = dict.fromkeys(names.split(), deep)
    inner = {"transient": {"display_id": deep}, "data": {"text/plain": deep, "image/png": deep}}
    contents = [flat, {**inner, "payload": [{"source": deep}]}]
    made = execution(*((channel, msg_type, content) for content in contents), REPLY, IDLE)
    assert "[[" not in made.result(0).text
    odd = jupyter_exec.Message(channel, {"msg_type": deep, "msg_id": deep}, {"msg_id": deep}, {}, {}, [])
    assert (odd.msg_type, odd.msg_id, odd.parent_id) == ("", "", "")


def test_what_a_hook_got_never_changes() -> None:
    made = jupyter_exec.Execution("m")
    seen = []
    for text, msg_type in (("1", "display_data"), ("2", "update_display_data")):
        _, _, content = display({"text/plain": text}, "d")
        seen.append(made.feed(jupyter_exec.Message("iopub", {"msg_type": msg_type}, {"msg_id": "m"}, {}, content, [])))
    assert made.result(0).outputs[0]["data"] == {"text/plain": "2"}
    assert [output["data"]["text/plain"] for output in seen if output] == ["1", "2"]


@cases(
    "raw, clean, terminal",
    ("a\tb\n\x1b[1;31mred\x1b[0m", "a\tb\nred", "a\tb\n\x1b[1;31mred\x1b[0m"),
    ("\x1b\x1b[m]52;c;aGk=\x07", "]52;c;aGk=", "\x1b[m]52;c;aGk="),
    ("\x1b]52;c;aGk=\x07x\x1b]0;title\x1b\\y", "xy", "xy"),
    ("\x1bc\x1b(0\x1b7\x1b#8x", "x", "x"),
    ("\x9b2J\x9d52;c;aGk=\x9c\x90q\x9c\x85x", "x", "x"),
    ("\x1b[2J\x1b[?25l\x1b[Hx\x00\x7f\x0e", "x", "x"),
    ("10%\r20%\r\n", "10%20%\n", "10%\r20%\n"),
    ("\x1b]52;c;" * 50_000, "]52;c;" * 50_000, "]52;c;" * 50_000),
    ("\x9d52;c;" * 50_000, "52;c;" * 50_000, "52;c;" * 50_000),
    ("\x90q\x1b" * 50_000, "q" * 50_000, "q" * 50_000),
)
@pytest.mark.timeout(20)
def test_text_has_no_commands_for_a_terminal(raw: str, clean: str, terminal: str) -> None:
    assert jupyter_exec.clean_text(raw) == clean
    assert jupyter_exec.clean_text(raw, colours=True) == terminal


@given(st.text(alphabet="\x1b[]()0;?m\\\x07\x9b\x9c\x9da\n\r\b", max_size=40))
def test_no_command_is_left_whatever_surrounds_it(raw: str) -> None:
    left = jupyter_exec.clean_text(raw)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", left)
    assert jupyter_exec.clean_text(left) == left
    on_terminal = jupyter_exec.clean_text(raw, colours=True)
    assert not re.search(r"[\x1b\x07\x08\x9b-\x9d]", re.sub(r"\x1b\[[0-9;:]*m", "", on_terminal))


@pytest.mark.timeout(20)
@cases("text", "x" * 60_000 + "\b" * 60_000, "y" * 400_000 + "z\b\b" * 300_000, "z\r" * 10**6)
def test_backspaces_and_returns_take_time_only_once(text: str) -> None:
    assert len(streamed(text, range(0, len(text), 1000))) in (0, 100_000, 1)


def shows(text: str, **more: Any) -> dict[str, Any]:
    return {"output_type": "display_data", "data": {"text/plain": text} | more, "metadata": {}}


def printed(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


@cases(
    "outputs, note, text",
    ([printed("a\n")], "", "a\n"),
    ([printed("a"), printed("b")], "", "ab"),
    ([shows("377")], "", "377"),
    ([printed("a"), shows("1")], "", "a\n1"),
    ([printed("a\n"), shows("1")], "", "a\n1"),
    ([shows("1"), printed("a\n")], "", "1\na\n"),
    ([shows("1"), shows("2")], "", "1\n2"),
    ([printed("\x1b[31mred\x1b[0m")], "", "red"),
    ([printed("a")], "note", "a\nnote"),
    ([], "note", "note"),
    # Text beside a file is kept, unless it is a default repr.
    ([shows("   a\n0  1", **{"text/html": "<table>"})], "", "   a\n0  1\nsaved"),
    ([shows("<Figure size 640x480 with 1 Axes>", **{"image/png": ""})], "", "saved"),
    (
        [{"output_type": "display_data", "data": {"application/x-unheard-of": 1}}],
        "",
        "[an output that is not shown, of type application/x-unheard-of]",
    ),
    (
        [{"output_type": "error", "ename": "\x1bcE", "evalue": "\x1b]0;t\x07v", "traceback": ["\x1b[31mt\x9b2J"]}],
        "\x1bcnote",
        "E: v\nt\nnote",
    ),
)
def test_streams_are_verbatim_and_results_on_lines_of_their_own(outputs: Any, note: str, text: str) -> None:
    save = lambda data: "saved" if {"text/html", "image/png"} & set(data) else None  # noqa: E731
    assert jupyter_exec.render(outputs, note, save) == text


def test_results_raise_what_happened() -> None:
    error = ("iopub", "error", {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mt"]})
    failed = execution(error, ("shell", "execute_reply", {"status": "error"}), IDLE)
    with pytest.raises(ExecutionError, match="E: v\nt"):
        failed.result(0).raise_for_error()
    died = execution(stream("a"))
    died.death = jupyter_exec.KernelDied("", -9)
    with pytest.raises(KernelDied, match="SIGKILL"):
        died.result(0).raise_for_error()
    execution(REPLY, IDLE).result(0).raise_for_error()


def shown(*outputs: Any, note: str = "", status: str = "ok") -> ExecutionResult:
    """A result of such outputs: a string is a stream, bytes are a picture, a dict is a MIME bundle."""
    made: list[Any] = []
    for output in outputs:
        if isinstance(output, str):
            made.append({"output_type": "stream", "name": "stdout", "text": output})
            continue
        picture = {"image/png": base64.b64encode(output).decode()} if isinstance(output, bytes) else output
        made.append({"output_type": "display_data", "data": {"text/plain": "<Figure>"} | picture, "metadata": {}})
    return ExecutionResult(status, 0, "intact", note, made)


def told(parts: Iterable[Any]) -> list[Any]:
    return [part["text"] if part["type"] == "text" else base64.b64decode(part["data"]) for part in parts]


def test_parts_are_text_and_pictures_in_order() -> None:
    result = shown("a\n", b"one", "b\n", {"text/plain": "1"}, b"two", note="n")
    assert told(result.parts()) == ["a\n[a picture]", b"one", "b\n1\n[a picture]", b"two", "n"]
    assert [image.data for image in result.images] == [b"one", b"two"]
    assert shown().parts() == shown(" \n").parts() == []


def test_a_picture_of_the_default_budget_has_5_mb_in_base64() -> None:
    fits, large = bytes(15 * 2**18), bytes(15 * 2**18 + 1)
    (picture,) = [part for part in shown(fits, large).parts() if part["type"] == "image"]
    assert len(picture["data"]) == 5 * 2**20  # more is refused by the API of Anthropic


@cases(
    "budget, told_parts",
    ({"max_images": 1}, ["a[a picture]", b"12", "[a picture that is not shown: there are too many]z"]),
    ({"max_image_bytes": 2}, ["a[a picture]", b"12", "[a picture that is not shown: 3 bytes are too many]z"]),
    ({"max_images": 0}, ["a" + "[a picture that is not shown: there are too many]" * 2 + "z"]),
)
def test_a_picture_beyond_the_budget_is_named(budget: dict[str, int], told_parts: list[Any]) -> None:
    parts = told(shown("a", b"12", b"123", "z").parts(**budget))
    assert [part.replace("\n", "") if isinstance(part, str) else part for part in parts] == told_parts


@given(st.lists(st.one_of(st.text(max_size=30), st.binary(min_size=1, max_size=3)), max_size=8), st.integers(0, 60))
def test_parts_keep_to_their_characters(outputs: list[Any], limit: int) -> None:
    result = shown(*outputs)
    whole = "".join(part for part in told(result.parts(10**6)) if isinstance(part, str))
    cut = "".join(part for part in told(result.parts(limit)) if isinstance(part, str))
    missing = len(whole) - limit
    if missing <= 0:
        assert cut == whole
    else:
        assert cut == whole[: limit // 2] + jupyter_exec.gap_mark(missing) + whole[len(whole) - (limit - limit // 2) :]


@pytest.mark.slow
@cases(
    "form, place",
    ("anthropic", "anthropic.types.tool_result_block_param:Content"),
    ("openai", "openai.types.responses:ResponseFunctionCallOutputItemParam"),
    ("openai-chat", "openai.types.chat:ChatCompletionContentPartParam"),
    ("mcp", "mcp.types:ContentBlock"),
)
def test_messages_are_what_the_sdks_take(form: str, place: str) -> None:
    from pydantic import TypeAdapter

    module, name = place.split(":")
    adapter: Any = TypeAdapter(getattr(importlib.import_module(module), name))
    blocks = shown("a", b"picture", "z").to_messages(form, max_images=1)
    assert len(blocks) == 3
    for block in blocks:
        kept = adapter.dump_python(adapter.validate_python(block), exclude_unset=True, by_alias=True, warnings="error")
        assert json.loads(json.dumps(kept)) == block
    with pytest.raises(ValueError, match="form must be one of anthropic, openai, openai-chat, mcp"):
        shown("a").to_messages("claude")


def test_a_result_is_short_as_repr_and_safe_as_html() -> None:
    result = shown("<script>" * 100_000, b"picture", {"text/html": "<script>"})
    assert len(repr(result)) < 400
    bundle = result._repr_mimebundle_()
    assert bundle["text/plain"] == repr(result)
    assert "<script" not in bundle["text/html"]
    assert f'<img src="data:image/png;base64,{base64.b64encode(b"picture").decode()}">' in bundle["text/html"]


def test_text_for_language_models_is_preferred_and_files_need_no_directory() -> None:
    texts = {"text/llm+plain": "for models", "text/plain": "for people"}
    result = shown(texts, {"image/png": "!"}, {"text/html": "<b>"})
    assert result.text.startswith("for models")
    assert [(file.mime_type, file.suffix, file.data) for file in result.files] == [("text/html", ".html", b"<b>")]
    assert result.images == []


def test_files_of_a_result_are_saved_when_asked_for(tmp_path: Path) -> None:
    paths = shown(b"one", "text", {"text/html": "<b>"}, {"image/png": "!"}).save(tmp_path)
    assert [(Path(path).suffix, Path(path).read_bytes()) for path in paths] == [(".png", b"one"), (".html", b"<b>")]
    assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)
    with pytest.raises(ValueError, match="does not exist"):
        shown(b"one").save(tmp_path / "nowhere")


def test_a_code_result_has_status_and_note(executor: JupyterCodeExecutor) -> None:
    result = executor.execute_code_blocks("import os; os._exit(3)")
    assert (result.status, "ended by itself with code 3" in result.note or "code 3" in result.note) == ("died", True)
    result = executor.execute_code_blocks("1")
    assert (result.status, result.note, str(result)) == ("ok", "", "exit_code=0 output='1' output_files=[]")
    with pytest.raises(TypeError, match="execute_code_blocks takes code blocks"):
        executor.execute(CodeBlock("1"))  # type: ignore[arg-type]


# ======================================================================================================
# 6. Channels
# ======================================================================================================


@pytest.fixture
def loop() -> Iterator[jupyter_exec.Loop]:
    loop = jupyter_exec.Loop()
    loop.start("test loop")
    yield loop
    loop.stop()


def test_loop_runs_jobs_of_many_threads_in_order(loop: jupyter_exec.Loop) -> None:
    seen: list[tuple[int, int]] = []

    def post(number: int) -> None:
        for i in range(500):
            loop.post(functools.partial(seen.append, (number, i)))

    with ThreadPoolExecutor(4) as pool:
        pool.map(post, range(4))
    eventually(lambda: len(seen) == 2000, "all jobs ran")
    for number in range(4):
        assert [i for n, i in seen if n == number] == list(range(500))


@pytest.mark.logs_error("ZeroDivisionError")
def test_a_failing_job_costs_only_itself(loop: jupyter_exec.Loop) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    done = threading.Event()
    loop.post(fail)
    loop.post(done.set)
    assert done.wait(PATIENCE)


def test_loop_in_a_forked_child_says_so(loop: jupyter_exec.Loop, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(JupyterExecError, match="forked"):
        loop.post(lambda: None)
    monkeypatch.undo()


class PipeEnd:
    """A Pipe on one end of a socket pair; the test has the other."""

    def __init__(self, loop: jupyter_exec.Loop) -> None:
        self.socket, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.frames: list[list[bytes]] = []
        self.closed: list[str] = []
        codec = jupyter_exec.PipeCodec()
        self.pipe = jupyter_exec.Pipe(loop, theirs, codec.feed, self.frames.append, self.closed.append)


@pytest.fixture
def pipe_end(loop: jupyter_exec.Loop) -> Iterator[PipeEnd]:
    made: list[PipeEnd] = []
    loop.post(lambda: made.append(PipeEnd(loop)))
    eventually(lambda: made, "the pipe is there")
    yield made[0]
    loop.post(lambda: made[0].pipe.close("end of test"))
    eventually(lambda: made[0].closed, "the pipe is closed")
    made[0].socket.close()


def test_pipe_carries_more_than_the_kernel_buffers(loop: jupyter_exec.Loop, pipe_end: PipeEnd) -> None:
    parts = [b"address", os.urandom(5_000_000)]
    codec = jupyter_exec.PipeCodec()
    loop.post(lambda: pipe_end.pipe.send(codec.encode(parts)))
    loop.post(lambda: pipe_end.pipe.send(codec.encode([b"second"])))
    read: list[list[bytes]] = []
    pipe_end.socket.settimeout(PATIENCE)
    while len(read) < 2:
        read += codec.feed(pipe_end.socket.recv(65536))
    assert read == [parts, [b"second"]]


def test_lanes_take_turns_and_old_output_is_dropped(loop: jupyter_exec.Loop, monkeypatch: MonkeyPatch) -> None:
    sent: list[str] = []

    class Full:
        free = 1

        def fileno(self) -> int:
            return ends[1]

        def send(self, data: memoryview) -> int:
            if not self.free:
                raise BlockingIOError
            self.free -= 1
            sent.append(bytes(data).decode())
            return len(data)

        def close(self) -> None:
            pass

    ends = os.pipe()
    stream: Any = Full()
    done = threading.Event()

    def test() -> None:
        pipe = jupyter_exec.Pipe(loop, stream, iter, sent.append, lambda reason: None)
        for data, may_be_lost in {"a0": True, "a1": True, "a2": True, "a3": True, "a4": False, "b1": True}.items():
            pipe.send(data.encode(), data[0], may_be_lost)
        pipe.send(b"control")
        assert pipe.waiting == {"": 7, "a": 6, "b": 2}  # without a1, which is begun
        stream.free = 2
        pipe._write()
        assert not pipe.drop_old("a", b"loss")
        monkeypatch.setattr(jupyter_exec, "SLOW_LINK", 0.0)
        assert pipe.drop_old("a", b"loss")
        assert not pipe.drop_old("a", b"loss")
        stream.free = 9
        pipe._write()
        assert not pipe.waiting
        pipe.close("")
        done.set()

    loop.post(test)
    assert done.wait(PATIENCE)
    assert sent == ["a0", "a1", "control", "a2", "b1", "loss", "a4"]
    for end in ends:
        os.close(end)


def test_what_is_dropped_leaves_its_place_to_the_news_of_that(
    loop: jupyter_exec.Loop, monkeypatch: MonkeyPatch
) -> None:
    sent: list[bytes] = []
    near, far = socket.socketpair()
    monkeypatch.setattr(jupyter_exec, "SLOW_LINK", 0.0)
    ended = threading.Event()

    def test() -> None:
        near.setblocking(False)
        pipe = jupyter_exec.Pipe(loop, jupyter_exec.NetStream(near), iter, sent.append, lambda reason: ended.set())
        pipe.send(b"x" * 10**7, "a")
        pipe.send(b"<rest of a message>", "a")
        pipe.send(b"<output>", "a", True)
        assert pipe.drop_old("a", b"<loss>")

    loop.post(test)
    data = b""
    far.settimeout(PATIENCE)
    while not data.endswith(b"<loss>"):
        data += far.recv(2**20)
    assert data.strip(b"x") == b"<rest of a message><loss>"
    far.close()
    assert ended.wait(PATIENCE)


@cases(
    "header, lost",
    (b'{"msg_type": "stream", "username": "status-bot"}', True),
    (b'{"msg_type": "stream", "msg_id": "\\"msg_type\\": \\"error\\""}', True),
    (b'{"msg_type":"status"}', False),
    (b'{"msg_id": 1, "msg_type" : "error"}', False),
)
def test_what_may_be_lost_is_known_by_its_type(header: bytes, lost: bool) -> None:
    for pattern in (jupyter_exec._NOT_DROPPED, jupyter_exec._VITAL):
        assert jupyter_exec._names(pattern, signed(header, b"{}", b"{}", b"{}")) == (not lost)


@cases("garbage", b"Segmentation fault\n", b"JX\xff\xff\xff\xff")
def test_pipe_gives_up_on_garbage(pipe_end: PipeEnd, garbage: bytes) -> None:
    pipe_end.socket.sendall(jupyter_exec.PipeCodec.encode([b"good"]) + garbage)
    eventually(lambda: pipe_end.closed, "the pipe is closed")
    assert pipe_end.frames == [[b"good"]]


def test_pipe_gives_up_on_who_does_not_read(
    loop: jupyter_exec.Loop, pipe_end: PipeEnd, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 0.1)
    loop.post(lambda: pipe_end.pipe.send(bytes(5_000_000)))
    eventually(lambda: pipe_end.closed, "the pipe is closed")
    assert "nothing was read" in pipe_end.closed[0]


def raw_message(msg_type: str, size: int) -> tuple[str, list[bytes]]:
    return "iopub", [b"", b"<IDS|MSG>", b"", b'{"msg_type":"%b"}' % msg_type.encode(), b"{}", b"{}", bytes(size)]


@cases("msg_type", "stream", "display_data", "unheard_of")
def test_a_mailbox_takes_no_output_beyond_its_limit(monkeypatch: MonkeyPatch, msg_type: str) -> None:
    monkeypatch.setattr(jupyter_exec, "MAILBOX_LIMIT", 100_000)
    mailbox = jupyter_exec.Mailbox()
    for _ in range(100):
        mailbox.put(raw_message(msg_type, 10_000))
    mailbox.put(raw_message("status", 10))
    read = list(iter(lambda: mailbox.get(0), None))
    assert len(read) <= 12 and mailbox.dropped
    assert read[-1] == raw_message("status", 10)
    mailbox.put(raw_message(msg_type, 10))
    assert mailbox.get(0) is not None


def test_a_mailbox_holds_one_news_of_a_reconnection() -> None:
    mailbox, news = jupyter_exec.Mailbox(), jupyter_exec.Reconnected()
    for _ in range(2):
        for _ in range(100):
            mailbox.put(news)
        assert list(iter(lambda: mailbox.get(0), None)) == [news]


def test_a_kernel_that_sends_without_end_is_ended(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAILBOX_LIMIT", 100_000)
    ended: list[int] = []
    mailbox = jupyter_exec.Mailbox(lambda: ended.append(1))
    for _ in range(10_000):
        mailbox.put(raw_message("status", 10))
    read = list(iter(lambda: mailbox.get(0), None))
    assert len(read) < 250 and ended == [1]
    assert isinstance(read[-1], jupyter_exec.KernelDied) and "unread" in read[-1].sentence()


def test_connection_files_are_private_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    path.symlink_to(tmp_path / "elsewhere")
    jupyter_exec.write_private(str(path), connection_json())
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert jupyter_exec.read_connection_file(path).key == "secret-key"


@cases(
    "text, mode, says",
    (connection_json(), 0o644, r"kernel\.json .*chmod 600"),
    ("", 0o600, "not JSON"),
    ("{}", 0o600, "has no 'ip'"),
    ('{"ip": "127.0.0.1"}', 0o600, "port"),
    (None, 0, r"kernel\.json: No such file"),
)
def test_attaching_by_a_wrong_file_fails_clearly(tmp_path: Path, text: str | None, mode: int, says: str) -> None:
    path = tmp_path / "kernel.json"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ProtocolError, match=says):
        JupyterCodeExecutor(path)


# ======================================================================================================
# 7. Kernel client
# ======================================================================================================


class ScriptedKernel:
    """A kernel on real ZeroMQ sockets that answers each shell request by `script(kernel, request)`."""

    def __init__(self, script: Callable[[ScriptedKernel, dict[str, Any]], None]) -> None:
        self.session = Session(key=b"key")
        self._context = zmq.Context()
        self.sockets = {name: self._context.socket(kind) for name, kind in self.KINDS.items()}
        ports: Any = {
            f"{name}_port": bind.bind_to_random_port("tcp://127.0.0.1") for name, bind in self.sockets.items()
        }
        self.connection = KernelConnection(ip="127.0.0.1", key="key", **ports)
        self.requests: list[dict[str, Any]] = []
        self.identity: list[bytes] = []
        self.deaf = 0  # kernel_info_requests that it will not answer
        self._script = script
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    KINDS: ClassVar = {"shell": zmq.ROUTER, "iopub": zmq.PUB, "stdin": zmq.ROUTER, "control": zmq.ROUTER}

    def _serve(self) -> None:
        while not self._stopping.is_set():
            for name in ("shell", "control"):
                if self.sockets[name].poll(5):
                    self.identity, parts = self.session.feed_identities(self.sockets[name].recv_multipart())
                    request = self.session.deserialize(parts)
                    self.requests.append(request)
                    if self.deaf and request["msg_type"] == "kernel_info_request":
                        self.deaf -= 1
                        continue
                    self.publish("status", {"execution_state": "busy"}, request)
                    if request["msg_type"] == "kernel_info_request":
                        self.reply("kernel_info_reply", {"status": "ok"}, request)
                        self.publish("status", {"execution_state": "idle"}, request)
                    else:
                        self._script(self, request)

    def publish(self, msg_type: str, content: dict[str, Any], request: dict[str, Any]) -> None:
        self.session.send(self.sockets["iopub"], msg_type, content, parent=request["header"])

    def reply(self, msg_type: str, content: dict[str, Any], request: dict[str, Any]) -> None:
        self.session.send(self.sockets["shell"], msg_type, content, parent=request["header"], ident=self.identity)

    def finish(self, request: dict[str, Any]) -> None:
        self.reply("execute_reply", {"status": "ok", "execution_count": 1}, request)
        self.publish("status", {"execution_state": "idle"}, request)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._context.destroy(linger=0)


@contextlib.contextmanager
def scripted(
    script: Callable[[ScriptedKernel, dict[str, Any]], None], output_dir: Any = "."
) -> Iterator[JupyterCodeExecutor]:
    with contextlib.closing(ScriptedKernel(script)) as kernel:
        with JupyterCodeExecutor(kernel.connection, output_dir=output_dir) as executor:
            yield executor


def hostile(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    """Send what must be ignored, then something genuine."""
    for parts in (
        [b"x"],
        [b"<IDS|MSG>", b"bad", b"{}", b"{}", b"{}", b"{}"],
        signed(b"{}", b"{}", b"{}", b"[" * 100_000),
        signed(b'{"msg_type":"stream"}', b'{"msg_id":"foreign"}', b"{}", b'{"name":"stdout","text":"foreign"}'),
        signed(b'{"msg_type":7}', b"null", b"null", b"null"),
    ):
        kernel.sockets["iopub"].send_multipart(parts)
    kernel.publish("unheard_of", {"a": 1}, request)
    kernel.publish("stream", {"name": "stdout", "text": "genuine"}, request)
    kernel.finish(request)


def oversized(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    metadata, kernel.session.copy_threshold = {"x": "y" * jupyter_exec.MAX_HEADER}, 2**30
    parent, session = request["header"], kernel.session
    session.send(kernel.sockets["iopub"], "stream", {"name": "stdout", "text": "a"}, parent, metadata=metadata)
    kernel.finish(request)


def test_what_is_too_large_to_be_read_is_said_to_be_lost() -> None:
    with scripted(oversized) as executor:
        assert "output was lost" in executor.execute("1").note


def test_a_wrong_connection_to_attach_to_leaves_nothing() -> None:
    connection = KernelConnection("127.0.0.1", 1, 2, 3, 4, key="k", signature_scheme="hmac-nope")
    with pytest.raises(ProtocolError, match="Unknown signature scheme"):
        JupyterCodeExecutor(connection)


def test_hostile_messages_are_survived_and_reported(caplog: LogCaptureFixture) -> None:
    with scripted(hostile) as executor:
        assert run(executor, "1").output == "genuine"
        assert run(executor, "1").output == "genuine"
    assert "not signed with the kernel's key" in caplog.text


def without_idle(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    kernel.publish("stream", {"name": "stdout", "text": "all"}, request)
    kernel.reply("execute_reply", {"status": "ok"}, request)


def without_reply(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    kernel.publish("stream", {"name": "stdout", "text": "all"}, request)
    kernel.publish("status", {"execution_state": "idle"}, request)


def without_idle_and_deaf(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    kernel.deaf = 3
    without_idle(kernel, request)


@cases(
    "script, exit_code, note",
    (without_idle, 0, "Some of the output was lost on its way"),
    (without_idle_and_deaf, 0, "Some of the output was lost on its way"),  # it is asked again and again
    (without_reply, 1, "its reply was lost"),
)
def test_a_lost_idle_or_reply_ends_the_cell(script: Any, exit_code: int, note: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "FENCE_DELAY", 0.1)
    with scripted(script) as executor:
        result = executor.execute("1", timeout=PATIENCE)
    assert result.exit_code == exit_code
    assert result.text.startswith("all\n")
    assert note in result.note


def test_a_kernel_that_floods_between_cells_is_ended(
    executor: JupyterCodeExecutor, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "MAILBOX_LIMIT", 200_000)
    gate = tmp_path / "gate"
    wait = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    flood = "while True: k.session.send(k.iopub_socket, 'status', {'execution_state': 'busy'})"
    code = f"import os, threading, time\nk = get_ipython().kernel\ndef work():\n  {wait}\n  {flood}\n"
    executor.execute(code + "threading.Thread(target=work).start()")
    gate.touch()
    eventually(lambda: executor._kernel._mailbox.ended, "the kernel is given up")
    result = run(executor, "1")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "of its messages were unread" in result.output
    assert run(executor, "1").output == "1"


def test_a_slow_hook_neither_delays_nor_makes_a_timeout(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    mark, mailbox = tmp_path / "interrupted", executor._kernel._mailbox
    code = f"import time\nprint('go', flush=True)\ntry: time.sleep(60)\nfinally: open({str(mark)!r}, 'w').close()"
    result = executor.execute(code, timeout=0.5, on_output=lambda output: eventually(mark.exists, "the interrupt"))
    assert (result.status, result.kernel_state) == ("timeout", "intact")

    def slow(output: dict[str, Any]) -> None:
        end = time.monotonic() + 0.5
        eventually(lambda: mailbox.answered and time.monotonic() > end, "the reply, and the deadline")

    assert executor.execute("print('go')", timeout=0.3, on_output=slow).status == "ok"


def test_a_kernel_that_is_too_busy_to_attach_to_is_told(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec.AttachedKernelControl, "start_timeout", 0.3)
    with contextlib.closing(ScriptedKernel(lambda kernel, request: None)) as kernel:
        kernel.deaf = 1000
        with JupyterCodeExecutor(kernel.connection) as executor:
            said = run(executor, "1").output
    assert said == "The kernel cannot be attached to: no answer within 0.3 s; it may be busy with a cell."


def test_a_restart_that_nobody_told_ends_an_interrupted_cell() -> None:
    def restart(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        if request["msg_type"] == "execute_request":
            kernel.publish("stream", {"name": "stdout", "text": "go"}, request)
            kernel.session.session = "that of the next process"

    with scripted(restart) as executor:
        job = executor.submit("1", timeout=math.inf)
        eventually(lambda: job.output, "the cell runs")
        job.interrupt()
        result = job.wait(PATIENCE)
    assert (result.status, result.kernel_state) == ("died", "lost")
    assert "it was restarted in the meantime" in result.note


@cases("sessions", ("", "a", "", "b"), ("a", "", "a"))
def test_a_kernel_without_a_session_or_that_leaves_it_out_lives_on(sessions: tuple[str, ...]) -> None:
    def next_session(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        kernel.session.session = next(left)
        kernel.finish(request)

    left = iter(sessions[1:])
    with contextlib.closing(ScriptedKernel(next_session)) as kernel:
        kernel.session.session = sessions[0]
        with JupyterCodeExecutor(kernel.connection) as executor:
            assert {executor.execute("1").status for _ in sessions[1:]} == {"ok"}


@pytest.mark.slow
def test_a_hook_that_is_slow_time_and_again_costs_the_kernel_nothing(
    executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
    seen: list[Any] = []

    def slow(output: dict[str, Any]) -> None:
        seen.append(output)
        time.sleep(0.5)  # more than two times the grace

    executor.execute("x = 7")
    result = executor.execute("for i in range(5): display(i)", timeout=0.3, on_output=slow)
    assert (result.status, result.note, len(result.outputs)) == ("ok", "", 5)
    assert seen == result.outputs[: len(seen)] and "hooks of a cell are too slow" in caplog.text
    assert executor.execute("x").text == "7"


def raising(kind: type[BaseException]) -> None:
    raise kind


@cases("end", KeyboardInterrupt, SystemExit)
@cases("by_signal", True, False)
def test_a_cell_ended_by_a_signal_is_kept(
    executor: JupyterCodeExecutor, tmp_path: Path, end: type[BaseException], by_signal: bool
) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: raising(end))
    hook = functools.partial(os.kill, os.getpid(), signal.SIGUSR1) if by_signal else functools.partial(raising, end)
    try:
        with pytest.raises(end):
            executor.execute("print('so far', flush=True)\nwhile True: pass", on_output=lambda output: hook())
    finally:
        signal.signal(signal.SIGUSR1, before)
    executor.save_notebook(tmp_path / "n.ipynb")
    (cell,) = read_notebook(tmp_path / "n.ipynb", as_version=4).cells
    assert cell.outputs[0].text == "so far\n"
    assert "Interrupted" in cell.outputs[-1].text
    assert run(executor, "1").output == "1"


def test_what_a_kernel_had_sent_is_read_after_the_news_of_its_death() -> None:
    def dying(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        attached._kernel._mailbox.put(jupyter_exec.KernelDied(cause="killed"))
        kernel.publish("stream", {"name": "stdout", "text": "last words"}, request)

    with scripted(dying) as attached:
        result = attached.execute("1", timeout=PATIENCE)
    assert (result.status, result.text.splitlines()[0]) == ("died", "last words")


def test_an_interrupt_that_comes_late_hits_no_later_cell(executor: JupyterCodeExecutor) -> None:
    control = executor._kernel._control
    real_interrupt, gate = control.interrupt, threading.Event()
    late: list[threading.Thread] = []

    def interrupt(sent: Callable[[], None]) -> bool:
        late.append(threading.Thread(target=lambda: gate.wait(PATIENCE) and real_interrupt(sent)))
        late[0].start()
        return True

    control.interrupt = interrupt  # type: ignore[method-assign]
    executor.execute("import time; print('go', flush=True)", on_output=lambda output: executor.interrupt())
    threading.Timer(0.1, gate.set).start()
    assert executor.execute("time.sleep(0.3); 'whole'").text == "'whole'"
    late[0].join()


@cases(
    "msg_type, says",
    ("execute_input", "interrupted after 0.2 s; the kernel is still running the code"),
    ("status", "given up after 0.2 s; the kernel was not seen to begin with the code"),
)
def test_an_attached_kernel_that_does_not_end_a_cell_is_said_to_be_busy(
    msg_type: str, says: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
    with scripted(lambda kernel, request: kernel.publish(msg_type, {}, request)) as executor:
        result = executor.execute("1", timeout=0.2)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "busy")
    assert says in result.note


@pytest.mark.slow
@cases("by_signal", False, True)
def test_a_cell_of_another_client_does_not_cost_the_kernel(by_signal: bool, tmp_path: Path) -> None:
    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as owner:
        owner.execute("x = 1")
        with JupyterCodeExecutor(owner.connection_file or "") as guest:
            job = guest.submit(f"print('go', flush=True)\n{waiting_for(tmp_path / 'never')}")
            eventually(lambda: job.output, "the guest's cell runs")
            if by_signal:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                with pytest.raises(KeyboardInterrupt):
                    owner.execute("1")
            else:
                result = owner.execute("1", timeout=0.5)
                assert (result.status, result.kernel_state) == ("timeout", "intact")
            assert owner.execute("x").text == "1"
            assert job.wait(PATIENCE).error["ename"] == "KeyboardInterrupt"


def test_the_death_of_an_attached_kernel_is_noticed() -> None:
    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as owner:
        owner.execute("1")
        with JupyterCodeExecutor(owner.connection_file or "") as executor:
            result = run(executor, "import os; os._exit(1)")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "all variables are lost" in result.output


def test_an_interrupt_during_the_send_still_hits_the_cell(executor: JupyterCodeExecutor) -> None:
    executor.execute("import time")
    real_post = executor._kernel._post

    def post(message: jupyter_exec.Message) -> None:
        if message.msg_type == "execute_request":
            executor.interrupt()
        real_post(message)

    executor._kernel._post = post  # type: ignore[method-assign]
    result = executor.execute("time.sleep(30)", timeout=20)
    assert result.status == "interrupted"


class Stubborn:
    """A script of a kernel that ends its cell at the interrupt of that number; it notes when each of them came."""

    def __init__(self, obeys: int) -> None:
        self.times: list[float] = []
        self._obeys = obeys
        self._cell: dict[str, Any] = {}

    def __call__(self, kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        if request["msg_type"] == "execute_request":
            self._cell = request
            kernel.publish("stream", {"name": "stdout", "text": "go"}, request)
        else:
            self.times.append(time.monotonic())
            if len(self.times) == self._obeys:
                kernel.finish(self._cell)

    def await_interrupt(self, number: int) -> None:
        eventually(lambda: len(self.times) >= number, "an interrupt")


@cases("slow", False, True)
def test_a_lost_interrupt_is_sent_again_in_the_middle_of_the_grace(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 2.0)
    script = Stubborn(obeys=2)
    hook = (lambda output: script.await_interrupt(2)) if slow else None
    with scripted(script) as executor:
        result = executor.execute("1", timeout=0.2, on_output=hook)
    assert (result.status, result.kernel_state) == ("timeout", "intact")
    assert script.times[1] - script.times[0] > 0.4


def test_a_lost_interrupt_of_a_cell_without_a_timeout_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.4)
    script = Stubborn(obeys=2)
    with scripted(script) as executor:
        assert (
            executor.execute("1", timeout=None, on_output=lambda output: executor.interrupt()).status == "interrupted"
        )


def test_the_grace_may_begin_in_another_thread_while_this_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(cell: jupyter_exec.Cell) -> bool:
        if threading.current_thread() is threading.main_thread():
            script.await_interrupt(1)
            time.sleep(0.1)
        return real_look(cell)

    script = Stubborn(obeys=2)
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 2.0)
    with scripted(script) as executor:
        real_look = executor._kernel._has_answered
        executor._kernel._has_answered = look  # type: ignore[method-assign]
        result = executor.execute("1", timeout=0.2, on_output=print)
    assert (result.status, result.kernel_state) == ("timeout", "intact")


def test_coroutine_functions_are_no_hooks_of_the_sync_executor(executor: JupyterCodeExecutor) -> None:
    async def hook(*arguments: Any) -> Any: ...

    takers: list[Any] = [
        functools.partial(JupyterCodeExecutor, executor._server),
        functools.partial(executor.execute, "1"),
    ]
    for take, name in itertools.product(takers, ("on_output", "on_input")):
        with pytest.raises(ValueError, match="AsyncJupyterCodeExecutor takes coroutine functions"):
            take(**{name: hook})


def test_the_handler_of_a_signal_may_interrupt_at_any_point(executor: JupyterCodeExecutor) -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: executor.interrupt())
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.0005)
    try:
        result = executor.execute("while True: print('x' * 1000)", timeout=PATIENCE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert result.status == "interrupted"


def test_an_interrupt_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_REPEAT", 0.5)
    script = Stubborn(obeys=3)
    with scripted(script) as executor:
        job = executor.submit("1")
        eventually(lambda: job.output, "the cell runs")
        for number in (1, 2):
            job.interrupt()
            job.interrupt()  # the same
            script.await_interrupt(number)
            time.sleep(0.6)
        assert len(script.times) == 2
        job.interrupt()
        assert job.wait(PATIENCE).status == "interrupted"


@pytest.mark.slow
def test_code_that_cleans_up_is_not_disturbed_and_code_that_swallows_an_interrupt_gets_another(
    executor: JupyterCodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 3.0)
    clean = executor.execute("import time\ntry: time.sleep(60)\nfinally: time.sleep(0.8); print('clean')", timeout=0.5)
    assert (clean.status, clean.kernel_state) == ("timeout", "intact")
    assert clean.text.startswith("clean\n")
    again = executor.execute("try: time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(60)", timeout=0.5)
    assert (again.status, again.kernel_state) == ("timeout", "intact")
    assert run(executor, "1").output == "1"


def test_a_cell_that_has_answered_is_not_given_up_because_a_hook_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)

    def script(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        if request["msg_type"] == "execute_request":
            kernel.publish("stream", {"name": "stdout", "text": "go"}, request)
            cells.append(request)
        else:
            kernel.reply("execute_reply", {"status": "ok", "execution_count": 1}, cells[0])
            while kernel.sockets["shell"].poll(1000):  # the kernel_info_request that comes with an interrupt
                kernel.session.feed_identities(kernel.sockets["shell"].recv_multipart())
                kernel.reply("kernel_info_reply", {"status": "ok"}, request)
            kernel.publish("status", {"execution_state": "idle"}, cells[0])

    def slow(output: dict[str, Any]) -> None:
        eventually(lambda: executor._kernel._mailbox.answered, "the end")
        time.sleep(0.5)

    cells: list[dict[str, Any]] = []
    with scripted(script) as executor:
        result = executor.execute("1", timeout=0.2, on_output=slow)
    assert (result.status, result.kernel_state) == ("timeout", "intact")


# ======================================================================================================
# 8. Kernel host
# ======================================================================================================


@pytest.mark.slow
@cases(
    "changes",
    {},
    {"JUPYTER_PATH": "/a:/b"},
    {"JUPYTER_DATA_DIR": "/data"},
    {"XDG_DATA_HOME": "/xdg"},
    {"JUPYTER_PREFER_ENV_PATH": "1"},
    {"JUPYTER_PREFER_ENV_PATH": "0"},
    {"JUPYTER_PREFER_ENV_PATH": "no", "JUPYTER_PATH": "/a"},
    {"HOME": tempfile.gettempdir()},
    ids=str,
)
def test_kernelspec_directories_are_those_of_jupyter(changes: dict[str, str]) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTER")} | changes
    program = """
        import os, jupyter_exec
        from jupyter_client.kernelspec import KernelSpecManager
        judge = KernelSpecManager().kernel_dirs
        ours = jupyter_exec.kernel_dirs()
        assert [d for d in ours if d in judge] == [d for d in judge if d in ours] and set(judge) <= set(ours), (judge, ours)
    """
    result = run_python(program, env=environ | {"PYTHONPATH": str(MODULE.parent), "PYTHONWARNINGS": "ignore"})
    assert result.stderr == ""


@pytest.fixture
def kernels_dir(tmp_path: Path) -> Path:
    """A directory for kernelspecs, to be given as JUPYTER_PATH=tmp_path/jupyter."""
    path = tmp_path / "jupyter" / "kernels"
    path.mkdir(parents=True)
    return path


def add_spec(kernels: Path, name: str, argv: Any, **spec: Any) -> dict[str, str]:
    """Write a kernelspec; returns the environment in which it is found."""
    (kernels / name).mkdir()
    spec = {"argv": argv, "display_name": name, "language": "python", **spec}
    (kernels / name / "kernel.json").write_text(json.dumps(spec))
    return {"JUPYTER_PATH": str(kernels.parent)}


@contextlib.contextmanager
def kernel_of(kernels: Path, argv: list[str], name: str = "own", **spec: Any) -> Iterator[JupyterCodeExecutor]:
    """An executor of a kernel of a kernelspec of its own."""
    with LocalJupyterServer(env=add_spec(kernels, name, argv, **spec)) as server:
        with JupyterCodeExecutor(server, name) as executor:
            yield executor


IPYKERNEL = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def test_kernelspecs_are_found_as_jupyter_finds_them(kernels_dir: Path, monkeypatch: MonkeyPatch) -> None:
    for name, argv in {"Mine": IPYKERNEL, "python3": IPYKERNEL, "broken": "no list"}.items():
        add_spec(kernels_dir, name, argv)
    (kernels_dir / "not a kernel").mkdir()
    monkeypatch.setenv("JUPYTER_PATH", str(kernels_dir.parent))
    judge = KernelSpecManager().find_kernel_specs()
    with LocalJupyterServer() as server:
        ours = {name: spec["resource_dir"] for name, spec in server.kernelspecs().items()}
    assert ours == {name: path for name, path in judge.items() if name != "broken"}


def test_kernelspec_argv_env_and_name(kernels_dir: Path) -> None:
    argv = [*IPYKERNEL, "{resource_dir}|{prefix}|{unknown}"]
    env = add_spec(kernels_dir, "mine", argv, env={"A": "${B}-x", "C": "$$"})
    with LocalJupyterServer(env=env | {"B": "b"}) as server, JupyterCodeExecutor(server, "MINE") as executor:
        shown = run(executor, "import os, sys; print(os.environ['A'], os.environ['C'], sys.executable, sys.argv[-3])")
    assert shown.output == f"b-x $ {sys.executable} {kernels_dir}/mine|{sys.prefix}|{{unknown}}\n"


def test_interrupt_mode_message(kernels_dir: Path) -> None:
    with kernel_of(kernels_dir, IPYKERNEL, interrupt_mode="message") as executor:
        assert run(executor, "x = 1").exit_code == 0
        result = executor.execute("while True: pass", timeout=0.5)
        assert (result.status, result.kernel_state) == ("timeout", "intact")
        assert run(executor, "x").output == "1"


def test_kernels_are_lean_and_history_works_all_the_same(executor: JupyterCodeExecutor) -> None:
    run(executor, "a = 1", "a + 1")
    assert run(executor, "In[2], Out[2], _").output == "('a + 1', 2, 2)"
    assert run(executor, "%history").output.startswith("a = 1\na + 1\n")
    assert run(executor, "get_ipython().history_manager.enabled").output == "False"
    with LocalJupyterServer(ipython_defaults=True) as server, JupyterCodeExecutor(server) as other:
        assert run(other, "get_ipython().history_manager.enabled").output == "True"


@cases("is_taken", False, True)
def test_kernels_that_may_not_know_ipc_get_free_tcp_ports(kernels_dir: Path, tmp_path: Path, is_taken: bool) -> None:
    tcp_kernel = textwrap.dedent("""
        import pathlib, sys
        mark = pathlib.Path(sys.argv[2])
        if not mark.exists():
            mark.touch()
            sys.exit("zmq.error.ZMQError: Address already in use")
        from ipykernel import kernelapp
        kernelapp.launch_new_instance(["-f", sys.argv[1]])
    """)
    mark = tmp_path / "mark"
    if not is_taken:
        mark.touch()
    (tmp_path / "start.py").write_text(tcp_kernel)
    with kernel_of(kernels_dir, ["python", f"{tmp_path}/start.py", "{connection_file}", str(mark)]) as executor:
        assert json.loads(Path(executor.connection_file or "").read_text())["transport"] == "tcp"
        assert run(executor, "1 + 1").output == "2"
    assert mark.exists()


NO_LICENCE = ["python", "-c", "import sys; sys.exit(' '.join(['no', 'licence', 'found']))"]


def test_a_kernel_that_dies_at_start_is_reported_with_its_stderr(kernels_dir: Path) -> None:
    with kernel_of(kernels_dir, NO_LICENCE) as executor:
        result = run(executor, "1")
        assert (result.exit_code, result.kernel_state) == (1, "lost")
        assert "no licence found" in result.output
        assert "exit code 1" in result.output
        with pytest.raises(KernelStartFailed, match="no licence found"):
            executor.execute("1")
        job = executor.submit("1")
        with pytest.raises(KernelStartFailed):
            job.wait(PATIENCE)
        assert (job.done, job.status, job.output) == (True, "failed", "")
        with JupyterCodeExecutor(executor._server) as other:
            assert run(other, "1").output == "1"


@cases(
    "argv, metadata, says",
    (["/no/such/program"], {}, "No such file or directory: /no/such/program"),
    (["python"], {"kernel_provisioner": {"provisioner_name": "yarn"}}, "provisioner"),
)
def test_a_kernelspec_that_cannot_be_launched_is_told(kernels_dir: Path, argv: Any, metadata: Any, says: str) -> None:
    with pytest.raises(KernelStartFailed, match=says), kernel_of(kernels_dir, argv, metadata=metadata):
        pass


@pytest.mark.slow
def test_signals_that_the_program_has_blocked_reach_its_kernels() -> None:
    program = """
        import signal, jupyter_exec
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGCHLD, signal.SIGTERM})
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            print(executor.execute("while True: pass", timeout=0.3).kernel_state)
            print(executor.execute("import os; os._exit(3)", timeout=5).kernel_state)
    """
    assert run_python(program).stdout == "intact\nlost\n"


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: TempPathFactory) -> str:
    """A Python without ipykernel and pyzmq."""
    path = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    return str(path / "bin" / "python")


def test_a_python_that_lacks_a_package_says_what_to_install(bare_python: str, tmp_path: Path) -> None:
    with LocalJupyterServer(python=bare_python) as server:
        with pytest.raises(ValueError, match="Kernel python3 is not installed") as caught:
            JupyterCodeExecutor(server)
        assert f"{bare_python} -m pip install ipykernel" in str(caught.value)
    (tmp_path / "ipykernel.py").touch()
    with CommandJupyterServer([bare_python], env={"PYTHONPATH": str(tmp_path)}) as command:
        with pytest.raises(KernelStartFailed, match=f"pyzmq.*{bare_python} -m pip install pyzmq"):
            JupyterCodeExecutor(command)
    with LocalJupyterServer(python=bare_python, transport="gateway") as server:
        with pytest.raises(KernelStartFailed, match=f"{bare_python} -m pip install jupyter_kernel_gateway"):
            server.get_client()


def program_file(path: Path, text: str) -> str:
    """Write a program; returns its path."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@cases(
    "argv, says",
    (["/no/such/python"], "No such file or directory: /no/such/python"),
    (["true"], "no Python answered"),
    (["sh", "-c", "echo welcome; echo trouble >&2; exit 3"], "welcome.*exit code 3.*trouble"),
)
def test_a_command_that_is_no_python_is_reported(argv: list[str], says: str) -> None:
    with CommandJupyterServer(argv) as server, pytest.raises(KernelStartFailed) as caught:
        JupyterCodeExecutor(server)
    assert re.search(says, str(caught.value), re.DOTALL)


def test_of_the_stderr_of_a_command_only_the_end_is_kept(short_path: Path) -> None:
    chatty = textwrap.dedent("""
        import os, subprocess, sys, threading
        def chatter():
            while True:
                os.write(2, b"chatter " * 8000)
        threading.Thread(target=chatter, daemon=True).start()
        os.write(2, b"x" * 2**20)
        sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
    """)
    with CommandJupyterServer([sys.executable, "-c", chatty], env={"TMPDIR": str(short_path)}) as server:
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "print(len('x' * 10**6))").output == "1000000\n"
        assert server._process
        files = Path(f"/proc/{server._process.pid}/fd").iterdir()
        assert not [file for file in files if "deleted" in os.readlink(file)]
        link = server.link()
        server._process.kill()
        eventually(lambda: link.lost, "the end of the command")
        assert re.search("its stderr: [chater ]{1000,4200}$", link.lost or "")


def test_a_python_that_is_too_old_is_reported(tmp_path: Path) -> None:
    old = f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 8)\nexec(sys.argv[2])\n"
    with LocalJupyterServer(python=program_file(tmp_path / "python", old)) as server:
        with pytest.raises(KernelStartFailed, match=r"3\.8 is too old"):
            JupyterCodeExecutor(server)


def test_a_host_that_never_answers_is_asked_to_end(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    """srun takes its job out of the queue when it is terminated, and leaves it there when it is killed."""
    monkeypatch.setattr(jupyter_exec, "SHUTDOWN_GRACE", 0.5)
    text = f"#!/bin/sh\ntrap 'echo taken back >{tmp_path}/queue; exit 1' TERM\nwhile :; do sleep 0.05; done"
    with CommandJupyterServer([program_file(tmp_path / "srun", text), "python3"], start_timeout=0.3) as server:
        with pytest.raises(KernelStartFailed, match=r"no answer within 0\.3 s"):
            server.kernelspecs()
    assert (tmp_path / "queue").read_text() == "taken back\n"


@pytest.mark.slow
@cases("env, value", ({}, "1"), ({"SLURM_UNBUFFEREDIO": "0"}, "0"))
def test_what_has_no_newline_comes_through_srun_at_once(env: dict[str, str], value: str) -> None:
    with CommandJupyterServer(["env", sys.executable], env=env) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; os.environ['SLURM_UNBUFFEREDIO']").output == repr(value)


@cases(
    "option, error, says",
    ({"start_timeout": 0}, ValueError, "start_timeout must be a number of seconds, not 0"),
    ({"start_timeout": "x"}, TypeError, "start_timeout must be a number of seconds, not 'x'"),
    ({"start_timeout": None}, TypeError, "start_timeout must be a number of seconds, not None"),
    ({"env": {"PORT": 80}}, TypeError, "env must have strings"),
    ({"start_time": 1}, TypeError, "JupyterServer has no keyword 'start_time'"),
)
def test_a_wrong_option_of_the_launch_is_named(option: dict[str, Any], error: type[Exception], says: str) -> None:
    for make in (LocalJupyterServer, functools.partial(CommandJupyterServer, ["python3"])):
        with pytest.raises(error, match=says):
            make(**option)


def test_a_far_end_that_goes_on_talking_is_given_up_in_time() -> None:
    talks = "import os, time\nwhile True: os.write(1, b'.'); time.sleep(0.003)"
    started = time.monotonic()
    with CommandJupyterServer([sys.executable, "-c", talks], start_timeout=1) as server:
        with pytest.raises(KernelStartFailed, match="no answer within 1 s"):
            server.kernelspecs()
    assert time.monotonic() - started < 1 + 2 * jupyter_exec.SHUTDOWN_GRACE + 1


def test_a_process_that_cannot_be_looked_at_has_not_ended(monkeypatch: MonkeyPatch) -> None:
    name, left = jupyter_exec.process_name(os.getpid()), [2]
    real = jupyter_exec.stat_of

    def stat_of(pid: int | str) -> list[bytes]:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(24, "Too many open files")
        return real(pid)

    monkeypatch.setattr(jupyter_exec, "stat_of", stat_of)
    assert not jupyter_exec.has_ended(name) and left[0] < 0


def test_a_kernelspec_may_begin_with_a_dot(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "kernels/.dot").mkdir(parents=True)
    (tmp_path / "kernels/.dot/kernel.json").write_text('{"argv": ["x"]}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert ".dot" in jupyter_exec.find_kernelspecs(False)


@cases("port", -1, 65536, "x")
def test_a_wrong_port_is_named(port: Any) -> None:
    with pytest.raises(ValueError, match="port must be a number below 65536"):
        LocalJupyterServer(port=port)


@pytest.mark.slow
def test_a_stopped_host_is_given_up_and_replaced(monkeypatch: MonkeyPatch) -> None:
    before = descendants(os.getpid())
    with LocalJupyterServer() as server:
        server.kernelspecs()
        (host,) = descendants(os.getpid()) - before
        os.kill(host, signal.SIGSTOP)
        monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 0.3)
        monkeypatch.setattr(jupyter_exec, "SHUTDOWN_GRACE", 0.1)
        with pytest.raises(ConnectionClosed, match="did not answer 'kernelspecs'"):
            server.kernelspecs()
        monkeypatch.undo()
        assert "python3" in server.kernelspecs()


@cases("how", "direct", "relay")
@cases("code", "1", "import time; time.sleep(100)", "while True: print('x' * 1000)")
def test_nothing_outlives_a_killed_client(tmp_path: Path, marker: str, how: str, code: str) -> None:
    client = """
        import sys, time, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(env={"MARK": sys.argv[1]})
        if sys.argv[2] == "relay":
            server = jupyter_exec.CommandJupyterServer([sys.executable], env={"MARK": sys.argv[1]})
        executor = jupyter_exec.JupyterCodeExecutor(server)
        code = "import subprocess; a = subprocess.Popen(['sleep', '100']); b = subprocess.Popen(['sleep', '101'], start_new_session=True)"
        assert executor.execute(code).status == "ok"
        print("ready", flush=True)
        executor.execute(sys.argv[3], timeout=100)
    """
    with client_program(client, marker, how, code, TMPDIR=str(tmp_path)):
        assert len(marked_processes(f"MARK={marker}")) >= 4
    eventually(lambda: not list(tmp_path.iterdir()), "every file is gone")


@pytest.mark.slow
@cases("preload", "[]", "None")
def test_nothing_outlives_a_client_and_its_host_killed_at_once(tmp_path: Path, marker: str, preload: str) -> None:
    program = f"""
        import sys, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(preload={preload}, env={{"MARK": sys.argv[1]}})
        code = "import ctypes; print(1, flush=True); ctypes.PyDLL(None).sleep(100)"  # no thread of it runs
        jupyter_exec.JupyterCodeExecutor(server).execute(code, on_output=lambda output: print("ready", flush=True))
    """
    with client_program(program, marker, TMPDIR=str(tmp_path)) as client:
        client.send_signal(signal.SIGSTOP)  # it does not see what happens
        os.kill(min(marked_processes(f"MARK={marker}")), signal.SIGKILL)


# What some builds of Python lack, and some sandboxes; the far end's own Python only, not the kernel's.
POOR_PYTHON = """
import os, random, signal, socket, sys  # random needs register_at_fork
if "ipykernel_launcher" not in sys.orig_argv:
    for module in (os, signal, socket):
        for name in os.environ["LACKS"].split():
            if hasattr(module, name):
                delattr(module, name)
            if name == "ctypes":
                sys.modules["ctypes"] = None
            if name == "/proc":
                for function in ("listdir", "open", "stat"):
                    def without(path, *rest, real=getattr(os, function), **options):
                        if str(path).startswith("/proc"):
                            raise FileNotFoundError(2, "No such file or directory", path)
                        return real(path, *rest, **options)
                    setattr(os, function, without)
"""
LACKS = "pidfd_open memfd_create pthread_sigmask SOCK_SEQPACKET send_fds recv_fds TCP_QUICKACK ctypes /proc"


# The second fork runs no hooks of Python.
@pytest.mark.slow
@cases("fork", "os.fork()", "ctypes.PyDLL(None).fork()")
@cases("lacks", "", "register_at_fork", "pidfd_open register_at_fork")
def test_a_forked_child_of_the_client_keeps_no_kernels(lacks: str, fork: str, marker: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(POOR_PYTHON)
    program = """
        import ctypes, os, sys, time, warnings, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(env={"MARK": sys.argv[1]})
        executor = jupyter_exec.JupyterCodeExecutor(server)
        assert executor.execute("1").status == "ok"
        warnings.simplefilter("ignore")
        if eval(sys.argv[2]) == 0:
            os.close(1)
            time.sleep(30)
            os._exit(0)
        print("ready", flush=True)
        time.sleep(30)
    """
    changes = {"PYTHONPATH": f"{tmp_path}:{MODULE.parent}", "TMPDIR": str(tmp_path), "LACKS": lacks}
    with client_program(program, marker, fork, **changes) as client:
        client.kill()
        eventually(lambda: not marked_processes(f"MARK={marker}"), "every kernel is gone")
        os.killpg(client.pid, signal.SIGKILL)


@pytest.mark.slow
@cases("lacks, relay", ("pidfd_open memfd_create", False), (LACKS, True))
def test_a_python_that_lacks_much_has_kernels(lacks: str, relay: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(POOR_PYTHON)
    env = {"PYTHONPATH": str(tmp_path), "LACKS": lacks}
    options: dict[str, Any] = {"env": env, "preload": []}
    with CommandJupyterServer([sys.executable], **options) if relay else LocalJupyterServer(**options) as server:
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "x = 1", "x").output == "\n1"
            assert is_forked(executor) == (lacks != LACKS)
            assert executor.execute("while True: pass", timeout=0.3).kernel_state == "intact"
            assert "signal 9" in run(executor, "import os; os.kill(os.getpid(), 9)").output
            assert run(executor, "2").output == "2"
            executor.restart()
            assert run(executor, "3").output == "3"


LEAVERS = {
    "with exec": "import subprocess; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); p.pid",
    "without exec": """
import os, time, warnings
warnings.simplefilter('ignore')
r, w = os.pipe()
if not os.fork():
    os.setsid()
    os.write(w, str(os.getpid()).encode())
    time.sleep(1000)
    os._exit(0)
print(os.read(r, 9).decode())
""",
}


@cases("how", *LEAVERS)
def test_children_that_left_the_session_die_with_their_kernel(server: LocalJupyterServer, how: str) -> None:
    with JupyterCodeExecutor(server) as one, JupyterCodeExecutor(server) as two:
        first, second = int(run(one, LEAVERS[how]).output), int(run(two, LEAVERS[how]).output)
        assert not is_gone(first)
        one.stop()
        eventually(lambda: is_gone(first), "the child of the stopped kernel is gone")
        assert not is_gone(second)
    eventually(lambda: is_gone(second), "the other one too")


def facts(preload: list[str] | None) -> Any:
    # What a kernel is by, told by a cell: all of it is to be the same however the kernel came to be.
    facts = textwrap.dedent(r"""
        import atexit, gc, json, locale, logging, os, resource, signal, sys, threading, warnings
        import __main__
        private = ("JUPYTER_EXEC_KERNEL", "JPY_PARENT_PID", "_", "PYDEVD_USE_FRAME_EVAL")
        own = {"session": os.getsid(0) == os.getpid(), "group": os.getpgrp() == os.getpid(), "cwd": os.getcwd()}
        own |= {"path": sys.path, "env": {key: value for key, value in os.environ.items() if key not in private}}
        own |= {"argv": [sys.argv[0], sys.argv[1], *sys.argv[3:]], "flags": str(sys.flags), "umask": os.umask(0o22)}
        own |= {"signals": {s.name: str(signal.getsignal(s)) for s in signal.Signals}, "gc": gc.isenabled()}
        own |= {"threads": sorted({thread.name.split(" ")[0] for thread in threading.enumerate()}), "main": str(__main__.__dict__.get("__file__"))}
        own |= {"files": sorted({os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in "012"}), "locale": locale.getlocale()}
        own |= {"parent": open(f"/proc/{os.getppid()}/cmdline").read()[:60], "warnings": str(warnings.filters[:4])}
        own |= {"logging": str(logging.root.handlers), "dumpable": os.stat("/proc/self/environ").st_uid == os.getuid()}
        own |= {"oom": open("/proc/self/oom_score_adj").read(), "debugpy": sys.modules.get("debugpy", "absent")}
        own |= {"limits": [resource.getrlimit(name) for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)]}
        own |= {"mark": os.environ["JUPYTER_EXEC_KERNEL"] in open("/proc/self/environ").read(), "stack": len(__import__("inspect").stack()) > 1}
        print(json.dumps(own, default=str))
    """)
    server = LocalJupyterServer(preload=preload, cwd=tempfile.gettempdir())
    with server, JupyterCodeExecutor(server) as executor:
        return json.loads(run(executor, facts).output)


@pytest.mark.slow
def test_a_forked_kernel_is_like_a_launched_one() -> None:
    forked, launched = facts([]), facts(None)
    assert launched.pop("debugpy") != "absent"
    assert forked.pop("debugpy") == "absent"
    assert forked == launched


def is_forked(executor: JupyterCodeExecutor) -> bool:
    return "jupyter_exec: kernel" in run(executor, "open('/proc/self/cmdline').read()").output


@pytest.mark.slow
def test_kernels_are_forked_unless_told_otherwise(kernels_dir: Path) -> None:
    env = add_spec(kernels_dir, "own", IPYKERNEL, env={"PYTHONOPTIMIZE": "1"})
    with LocalJupyterServer(preload=[], env=env) as server:
        with JupyterCodeExecutor(server) as forked, JupyterCodeExecutor(server, "own") as own:
            assert is_forked(forked)
            assert not is_forked(own)
            assert run(own, "import sys; sys.flags.optimize").output == "1"
    with LocalJupyterServer(preload=None) as server, JupyterCodeExecutor(server) as launched:
        assert not is_forked(launched)
    wrong: Any
    for wrong in ("numpy", b"numpy", 5, [None], (name for name in ["numpy"])):
        with pytest.raises(ValueError, match="preload must be a list"):
            LocalJupyterServer(preload=wrong)


def test_forked_kernels_share_nothing_and_blas_works() -> None:
    own = textwrap.dedent("""
        import os, random, sys, uuid
        was_there = "numpy" in sys.modules
        import numpy
        a = numpy.random.rand(300, 300)
        inverse = numpy.linalg.inv(a) @ a
        print(was_there, bool(abs(inverse - numpy.eye(300)).max() < 1e-6))
        print(random.random(), numpy.random.random(), uuid.uuid4(), os.getpid(), id(a), os.environ.get("LEFT"))
        os.environ["LEFT"] = "behind"; os.chdir("/"); sys.path.append("/left"); numpy.left = random.left = 1
    """)
    with LocalJupyterServer(preload=["numpy"]) as server, contextlib.ExitStack() as stack:
        executors = [stack.enter_context(JupyterCodeExecutor(server)) for _ in range(3)]
        first, second = (run(executor, own).output.splitlines() for executor in executors[:2])
        assert first[0] == second[0] == "True True"
        assert first[1].split()[-1] == second[1].split()[-1] == "None"
        assert not set(first[1].split()[:4]) & set(second[1].split()[:4])
        left = "import os, sys, random, numpy; hasattr(random, 'left'), hasattr(numpy, 'left'), '/left' in sys.path, os.getcwd()"
        assert run(executors[2], left).output == str((False, False, False, os.getcwd()))


def test_debugpy_can_be_imported_in_a_lean_kernel() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import debugpy; debugpy.__name__").output == "'debugpy'"
        assert "debugger" not in executor._kernel.kernel_info["supported_features"]


@pytest.mark.slow
def test_a_forked_kernel_with_ipythons_defaults_can_be_debugged() -> None:
    with LocalJupyterServer(preload=[], ipython_defaults=True) as server, JupyterCodeExecutor(server) as executor:
        assert is_forked(executor)
        judge = BlockingKernelClient(connection_file=executor.connection_file)
        judge.load_connection_file()
        judge.start_channels()
        arguments = {"clientID": "judge", "adapterID": "", "pathFormat": "path"}
        content = {"type": "request", "seq": 1, "command": "initialize", "arguments": arguments}
        judge.control_channel.send(judge.session.msg("debug_request", content))
        reply = judge.control_channel.get_msg(timeout=PATIENCE)
        judge.stop_channels()
        assert reply["content"]["success"]


def fork_server_of(server: LocalJupyterServer) -> int:
    """Return the pid of the fork server; its kernels have the same command line but another mark."""
    assert server._process
    family = descendants(server._process.pid)
    (found,) = (pid for pid in family if "/fork-server" in Path(f"/proc/{pid}/environ").read_text())
    return found


def test_kernels_survive_their_fork_server_and_the_next_has_a_new_one() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as one:
        run(one, "x = 1")
        first = fork_server_of(server)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: is_gone(first), "the fork server is gone")
        assert run(one, "x").output == "1"
        with JupyterCodeExecutor(server) as two:
            assert is_forked(two)
            assert fork_server_of(server) != first
        assert run(one, "x").output == "1"


@pytest.mark.slow
@cases(
    "source, says",
    ("import nonesuch", "preload: preloaded cannot be imported. ModuleNotFoundError: No module named 'nonesuch'"),
    ("import os; os._exit(3)", "ended at its preload (it ended by itself with exit code 3)"),
    ("import os; os.kill(os.getpid(), 11)", "ended at its preload (killed by signal 11, SIGSEGV)"),
    ("import threading; threading.Thread(target=input, name='watcher').start()", "watcher"),
)
def test_a_preload_that_fails_is_reported(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "preloaded.py").write_text(source)
    with LocalJupyterServer(preload=["preloaded"], env={"PYTHONPATH": str(tmp_path)}) as server:
        executor = JupyterCodeExecutor(server)
        result = run(executor, "1")
        assert (result.exit_code, result.kernel_state) == (1, "lost")
        assert says in result.output
        (tmp_path / "preloaded.py").write_text("")
        assert run(executor, "1").output == "1"


@pytest.mark.slow
def test_preload_finds_modules_of_the_working_directory_and_pictures_come_inline(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 5")
    with LocalJupyterServer(preload=["mine", "matplotlib.pyplot"], cwd=tmp_path) as server:
        with JupyterCodeExecutor(server, output_dir=tmp_path) as executor:
            found = run(executor, "import sys; 'mine' in sys.modules, [p for p in sys.path if p[-1:] == '/']")
            assert found.output == "(True, [])"
            result = run(executor, "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()")
            assert [Path(path).suffix for path in result.output_files] == [".png"]


@pytest.mark.slow
@cases("preload", [], ["typing_extensions"])
def test_a_restarted_kernel_sees_what_was_installed(bare_python: str, bare_site: Path, preload: list[str]) -> None:
    old, new = (path / "typing_extensions.py" for path in (bare_site, Path(pytest.__file__).parents[1]))
    old.write_text(f"exec(open({str(new)!r}).read()); old = 1")
    with LocalJupyterServer(python=bare_python, preload=preload) as server, JupyterCodeExecutor(server) as executor:
        assert is_forked(executor)
        (bare_site / "fresh.py").write_text("")
        old.unlink()
        executor.restart()
        assert run(executor, "import fresh, typing_extensions; hasattr(typing_extensions, 'old')").output == "False"
        assert is_forked(executor)


def test_a_restarted_kernel_sees_an_edited_module_that_was_preloaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1")
    with LocalJupyterServer(preload=["mine"], cwd=tmp_path) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import mine; mine.x").output == "1"
        (tmp_path / "mine.py").write_text("x = 'edited'")
        executor.restart()
        assert run(executor, "import mine; mine.x").output == "'edited'"


def patch_host(monkeypatch: MonkeyPatch, old: str, new: str) -> None:
    """Have hosts run the module with a change in its source."""
    source = MODULE.read_bytes()
    assert source.count(old.encode()) == 1
    source = source.replace(old.encode(), new.encode())
    monkeypatch.setattr(jupyter_exec, "own_program", lambda magic: b"s%08d%s" % (len(source), source))


@pytest.mark.slow
def test_a_fork_server_that_hangs_is_replaced_by_a_launch(monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "FORK_TIMEOUT = 2.0", "FORK_TIMEOUT = 0.3")
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as one:
        run(one, "x = 1")
        eventually(lambda: fork_server_of(server), "a fork server")
        os.kill(fork_server_of(server), signal.SIGSTOP)
        with JupyterCodeExecutor(server) as two, JupyterCodeExecutor(server) as three:
            assert run(two, "1").output == run(three, "1").output == "1"
            assert not is_forked(two)
        with JupyterCodeExecutor(server) as four:
            assert is_forked(four)
        assert run(one, "x").output == "1"


@pytest.fixture
def bare_site(bare_python: str) -> Iterator[Path]:
    """The packages of the bare Python, which has all that a kernel needs by a .pth file."""
    program = "import site; print(site.getsitepackages()[0])"
    site = Path(subprocess.check_output([bare_python, "-c", program], text=True).strip())
    (site / "shared.pth").write_text(str(Path(pytest.__file__).parents[1]))
    yield site
    for path in site.glob("*.p*"):
        path.unlink()


def test_commands_of_a_cell_are_those_of_the_kernels_environment(bare_python: str, bare_site: Path) -> None:
    with LocalJupyterServer(python=bare_python) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "!command -v python").output.split() == [bare_python]


@pytest.mark.slow
@cases("preload", [], ["json"])
def test_a_python_that_cannot_fork_kernels_launches_them(kernels_dir: Path, preload: list[str]) -> None:
    wrapper = program_file(kernels_dir / "python3", f'#!/bin/sh\n{sys.executable} "$@"\n')
    env = add_spec(kernels_dir, "wrapped", [wrapper, *IPYKERNEL[1:]])
    with LocalJupyterServer(preload=preload, env=env) as server, JupyterCodeExecutor(server, "wrapped") as executor:
        assert not is_forked(executor)


def test_a_kernel_of_another_version_than_the_host_is_launched(monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "cache_tag == {tag!r}", "cache_tag == 'cpython-39'")
    with LocalJupyterServer(preload=["json"]) as server, JupyterCodeExecutor(server) as executor:
        assert not is_forked(executor)


@pytest.mark.slow
def test_kernels_ordered_from_a_dying_fork_server_start_all_the_same() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as first:
        for _ in range(4):
            run(first, "1")
            os.kill(fork_server_of(server), signal.SIGKILL)
            with JupyterCodeExecutor(server) as second, JupyterCodeExecutor(server) as third:
                assert run(second, "1").output == run(third, "1").output == "1"
        only_one_kernel(server)


def only_one_kernel(server: LocalJupyterServer) -> None:
    host = server._process
    assert host
    eventually(lambda: len(descendants(host.pid)) == 2, "only the fork server and one kernel")


def test_kernels_that_are_stopped_at_once_cost_no_fork_server() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as executor:
        run(executor, "1")
        first = fork_server_of(server)
        for _ in range(10):
            JupyterCodeExecutor(server).stop()
        with JupyterCodeExecutor(server) as other:
            assert run(other, "1").output == "1"
        assert fork_server_of(server) == first


def test_a_kernel_given_up_before_it_is_forked_leaves_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()")
    with LocalJupyterServer(preload=["slow"], env={"PYTHONPATH": str(tmp_path)}) as server:
        JupyterCodeExecutor(server).stop()
        executor = JupyterCodeExecutor(server)
        with open(tmp_path / "gate", "w"):
            pass
        assert run(executor, "1").output == "1"
        only_one_kernel(server)


# ======================================================================================================
# 9. Servers
# ======================================================================================================


def test_many_executors_on_one_server_from_many_threads(server: LocalJupyterServer) -> None:
    def work(number: int) -> str:
        with JupyterCodeExecutor(server) as executor:
            return run(executor, f"x = {number}", "print(x)").output

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(4))] == [f"\n{number}\n" for number in range(4)]


def test_a_server_works_without_with_and_starts_on_first_use() -> None:
    before = descendants(os.getpid())
    server = LocalJupyterServer()
    assert descendants(os.getpid()) == before
    executor = JupyterCodeExecutor(server)
    assert run(executor, "1").output == "1"
    server.stop()
    server.stop()
    result = run(executor, "1")
    assert result.exit_code != 0
    assert "the server was stopped" in result.output
    executor.stop()
    with pytest.raises(ConnectionClosed, match="stopped"):
        server.start_kernel()


def test_python_cwd_and_env(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("REMOVED", "1")
    monkeypatch.setenv("KEPT", "2")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with LocalJupyterServer(python=sys.executable, cwd=tmp_path, env={"REMOVED": None, "ADDED": "3"}) as server:
        with JupyterCodeExecutor(server) as executor:
            code = "import os; print(os.getcwd(), *(os.environ.get(n) for n in ('REMOVED', 'KEPT', 'ADDED', 'MPLBACKEND')))"
            assert run(executor, code).output.split()[:4] == [str(tmp_path), "None", "2", "3"]
            assert "Agg" not in run(executor, code).output
            assert Path(run(executor, "import sys; print(sys.executable)").output.strip()) == Path(sys.executable)


def test_given_python_means_python3_whatever_kernelspecs_say(kernels_dir: Path) -> None:
    env = add_spec(kernels_dir, "python3", ["/no/such/program"])
    with LocalJupyterServer(python=sys.executable, env=env) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "1").output == "1"
    with LocalJupyterServer(env=env) as server, pytest.raises(KernelStartFailed, match="/no/such/program"):
        JupyterCodeExecutor(server)


def test_a_missing_working_directory_or_token_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Working directory /no/such/directory does not exist"):
        LocalJupyterServer(cwd="/no/such/directory")
    with pytest.raises(ValueError, match="open the gateway to everybody"):
        LocalJupyterServer(token="")
    (tmp_path / "gone").mkdir()
    with LocalJupyterServer(cwd=tmp_path / "gone") as server:
        server.kernelspecs()
        (tmp_path / "gone").rmdir()
        with pytest.raises(KernelStartFailed, match="the working directory was removed"):
            server.start_kernel()


@cases("name", b"x" * 100, b"\xff")
@cases("relay", False, True)
def test_a_strange_tmpdir_does_not_break_socket_files(
    relay: bool, name: bytes, short_path: Path, monkeypatch: MonkeyPatch
) -> None:
    deep = short_path / os.fsdecode(name)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    env = {"TMPDIR": str(deep)}
    with CommandJupyterServer([sys.executable], env=env) if relay else LocalJupyterServer(env=env) as server:
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "1").output == "1"


@cases("relay", False, True)
def test_no_temporary_directory_is_a_clear_error(relay: bool, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import tempfile; tempfile.tempdir = '/no/such/directory'")
    server = CommandJupyterServer([sys.executable], env={"PYTHONPATH": str(tmp_path)})
    if not relay:
        monkeypatch.setattr(tempfile, "tempdir", "/no/such/directory")
        server = LocalJupyterServer()
    with server, pytest.raises((KernelStartFailed, ConnectionClosed), match="set TMPDIR to a short one that can"):
        server.kernelspecs()


def test_directories_of_killed_processes_are_removed(short_path: Path, monkeypatch: MonkeyPatch) -> None:
    program = """
        import os, jupyter_exec
        server = jupyter_exec.LocalJupyterServer()
        server.kernelspecs()
        for pid in (server._process.pid, os.getpid()):
            os.kill(pid, 9)
    """
    run_python(program, env=environment(TMPDIR=str(short_path)))
    (left,) = short_path.iterdir()
    pid, start, place = left.name.split("-")[1].split(".")
    others = [f"jx-{os.getpid()}.{start}-x", f"jx-{pid}.{start}.00000000-x", "jx-abc", f"xjx-{pid}.{start}.{place}-x"]
    others.append(f"jx-{jupyter_exec.process_name(os.getpid())}-x")
    for name in others:
        (short_path / name).mkdir()
    (short_path / f"jx-{pid}.{start}.{place}-link").symlink_to(short_path / "jx-abc")
    (short_path / "jx-abc" / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    with LocalJupyterServer() as server:
        server.kernelspecs()
        names = {path.name for path in short_path.iterdir()}
        assert left.name not in names
        assert names >= {*others, f"jx-{pid}.{start}.{place}-link", Path(server.directory).name}
        assert (short_path / "jx-abc" / "file").exists()


def test_a_process_that_nobody_has_collected_has_ended() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        name = jupyter_exec.process_name(process.pid)
        assert not jupyter_exec.has_ended(name)
        process.stdin and process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert jupyter_exec.has_ended(name)
    assert jupyter_exec.has_ended(name)


def test_a_process_may_have_any_name(short_path: Path, monkeypatch: MonkeyPatch) -> None:
    program = "open('/proc/self/comm', 'wb').write(b'\\xff'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        place = jupyter_exec.process_name(os.getpid()).rpartition(".")[2]
        (short_path / f"jx-{process.pid}.1.{place}-x").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(short_path))
        with LocalJupyterServer() as server:
            assert server.kernelspecs()
        process.stdin.close()
    assert not list(short_path.iterdir())


UNBLOCK = "import os, sys; os.set_blocking(0, False); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


@cases(
    "argv",
    [sys.executable, "-c", UNBLOCK],  # a stdin that does not block is waited for
    ["sh", "-c", 'echo "Welcome to the machine"; exec "$0" "$@"', sys.executable],
)
def test_a_command_may_become_a_python_in_odd_ways(argv: list[str]) -> None:
    with CommandJupyterServer(argv) as server:
        assert "python3" in server.kernelspecs()


@pytest.mark.slow
def test_a_kernel_reached_only_through_the_pipe(tmp_path: Path) -> None:
    with CommandJupyterServer([sys.executable]) as server, JupyterCodeExecutor(server, max_output=None) as executor:
        assert run(executor, "x = 6", "x * 7").output == "\n42"
        assert executor.connection_file is None
        assert len(run(executor, "print('x' * 20_000_000)").output) == 20_000_001
        result = executor.execute("while True: print('y' * 1000)", timeout=0.5)
        assert (result.status, result.kernel_state) == ("timeout", "intact")
        assert run(executor, "x").output == "6"
        died = run(executor, "import os, time; print('last words', flush=True); time.sleep(0.5); os._exit(3)")
        assert died.output.startswith("last words\n")
        assert run(executor, "'x' in dir()").output == "False"


def test_attach_to_a_kernel_of_ours_and_leave_it_running(executor: JupyterCodeExecutor) -> None:
    run(executor, "shared = 5")
    path = executor.connection_file
    assert path
    with JupyterCodeExecutor(path) as attached:
        assert run(attached, "shared + 1").output == "6"
        result = attached.execute("while True: pass", timeout=0.5)
        assert (result.status, result.kernel_state) == ("timeout", "intact")
        with pytest.raises(KernelError, match="not ours"):
            attached.restart()
    judge = """
        import sys
        from jupyter_client.blocking import BlockingKernelClient
        client = BlockingKernelClient(connection_file=sys.argv[1])
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=20)
        client.execute_interactive("print(shared)", timeout=20)
    """
    assert run_python(judge, path).stdout == "5\n"
    assert run(executor, "shared").output == "5"


@contextlib.contextmanager
def scripted_host(tmp_path: Path, script: str) -> Iterator[CommandJupyterServer]:
    """A host on a real pipe that greets properly and then does what `script` says."""
    greeting = textwrap.dedent("""
        import json, os, re, sys, types
        nonce = re.search("[0-9a-f]{32}", sys.argv[-1])[0]
        os.write(1, ("%s %d %d 00 1 1\\n" % (nonce, *sys.version_info[:2])).encode())  # no bytecode in common
        def read(size):
            data = b""
            while len(data) < size:
                more = os.read(0, size - len(data))
                if not more:
                    sys.exit()
                data += more
            return data
        assert read(1) == b"s"
        source = read(int(read(8))).decode()
        module = sys.modules["jupyter_exec_host"] = types.ModuleType("jupyter_exec_host")
        exec(source, module.__dict__)
        frame = module.PipeCodec.encode
    """)
    (tmp_path / "host.py").write_text(greeting + textwrap.dedent(script))
    with CommandJupyterServer([sys.executable, str(tmp_path / "host.py")]) as server:
        yield server


@cases(
    "script, says",
    ("os.write(1, b'Segmentation fault')", "something that is not a frame"),
    ("os.write(1, b'JX\\xff\\xff\\xff\\xff'); read(10**9)", "over the limit"),
    ("os.write(1, frame([b'', b'{'])); read(10**9)", "not JSON"),
    ("os.write(1, frame([b'', b'[]'])); read(10**9)", "not a JSON object"),
    ("sys.exit('last words')", "last words"),
)
def test_a_host_that_sends_garbage_is_given_up(tmp_path: Path, script: str, says: str) -> None:
    with scripted_host(tmp_path, script) as server, pytest.raises(ConnectionClosed, match=says):
        server.kernelspecs()


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**4000) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FIELDS = ["exit_code", "stderr", "memory_limit", "out_of_memory", "name", "available", "searched", "python", "argv"]


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from([*FIELDS, "reason", "preload_failed"]), ANY_JSON), ANY_JSON)
def test_whatever_a_host_reports_can_be_printed(data: dict[str, Any], other: Any) -> None:
    for name in ("KernelSpecNotFound", "KernelStartFailed", "ConnectionClosed", "JupyterExecError", other):
        for given_data in (data, other):
            error = jupyter_exec._host_error({"error": name, "data": given_data})
            assert isinstance(error, JupyterExecError)
            assert len(str(error).encode("utf-8")) < 10**6
    death = jupyter_exec._death_of(data)
    assert len(str(death).encode("utf-8")) < 10**5
    assert 0 <= death.status() <= 255


@cases(
    "answer",
    "b'5'",
    "b'9' * 10**5",
    "b'[' * 10**5 + b']' * 10**5",
    """b'{"connection": {}}'""",
    """b'{"connection": "{}"}'""",
    "json.dumps({'connection': json.dumps(elsewhere)}).encode()",
)
def test_a_host_with_strange_answers_is_given_up(answer: str, tmp_path: Path) -> None:
    strange_answers = textwrap.dedent("""
        codec = module.PipeCodec()
        while True:
            for parts in codec.feed(os.read(0, 65536) or sys.exit()):
                request = json.loads(parts[1])
                os.write(1, frame([b"", b'{"id": %d, "result": %s}' % (request["id"], ANSWER)]))
    """)
    elsewhere = f"elsewhere = {CONNECTION | {'ip': '127.0.0.2'}!r}\n"
    with scripted_host(tmp_path, elsewhere + strange_answers.replace("ANSWER", answer)) as server:
        server.relays = False
        with pytest.raises((ProtocolError, ConnectionClosed)):
            server.start_kernel()
        process = server._process
        assert process
        eventually(lambda: process.poll() is not None, "the host is gone")


@cases("greeting", "9" * 5000 + " 9 00", "3 11 zz", "-3 11 00")
def test_a_strange_greeting_is_none(greeting: str) -> None:
    program = f"import re, sys; print(re.search('[0-9a-f]{{32}}', sys.argv[-1])[0], {greeting!r})"
    with CommandJupyterServer([sys.executable, "-c", program]) as server:
        with pytest.raises(KernelStartFailed, match="no Python answered"):
            server.kernelspecs()


def test_a_host_that_lies_is_survived(tmp_path: Path) -> None:
    lying_host = textwrap.dedent(r"""
        def answer(request, **content):
            os.write(1, frame([b"", json.dumps({"id": request["id"]} | content).encode()]))
        codec = module.PipeCodec()
        for text in (b'"x":1', b'"id":null', b'"id":[]', b'"id":99999', b'"event":"exit","kernel":[]', b'"event":{}'):
            os.write(1, frame([b"", b"{" + text + b"}"]))
        os.write(1, frame([b"k1.1/nowhere", b"x"]))
        os.write(1, frame([b"\xff/shell", b"x"]))
        while True:
            for parts in codec.feed(os.read(0, 65536)):
                if parts[0]:
                    os.write(1, frame([parts[0].replace(b"shell", b"iopub"), *parts[1:]]))
                    os.write(1, frame([parts[0], b"<IDS|MSG>", b"bad signature", b"{}", b"{}", b"{}", b"{}"]))
                    continue
                request = json.loads(parts[1])
                if request["op"] == "start":
                    answer(request, result={"argv": [1, None], "connection_file": "/etc/passwd"})
                else:
                    answer(request, error="KernelStartFailed", data={"argv": 5, "reason": "lies", "stderr": {}})
    """)
    with scripted_host(tmp_path, lying_host) as server:
        with pytest.raises(KernelStartFailed, match="lies"):
            server.kernelspecs()
        client = server.start_kernel()
        client._control.start_timeout = 0.3
        with pytest.raises(KernelStartFailed, match="no answer within"):
            client.wait_ready()
        assert client.connection_file is None


# Docker


@pytest.fixture(scope="session")
def bundled_image() -> None:
    """There is an engine, and the bundled image on it."""
    answers = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    need("docker", answers)
    with docker_server() as server:
        server.kernelspecs()


@pytest.fixture
def engine(bundled_image: None) -> Iterator[Any]:
    """A client of the Docker engine."""
    import docker

    client = docker.from_env()
    yield client
    client.close()


def need(name: str, present: object) -> None:
    """Skip the test unless what it needs is there; fail if JUPYTER_EXEC_REQUIRE names it."""
    if not present:
        required = name in os.environ.get("JUPYTER_EXEC_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"needs {name}, which is not here")


def docker_server(**options: Any) -> DockerJupyterServer:
    if "custom_image_name" not in options:
        options.setdefault("base_image", os.environ.get("BASE_IMAGE"))
    labels = jupyter_exec._merged("labels", {RUN: ""}, options.get("labels", {}))
    return DockerJupyterServer(**{"network": "none", **options, "labels": labels})


@pytest.fixture
def containers(engine: Any) -> Iterator[Callable[[], list[Any]]]:
    """A function that lists the containers of this run; none may be left."""

    def ours() -> list[Any]:
        return list(engine.containers.list(all=True, filters={"label": RUN}, ignore_removed=True))

    yield ours
    eventually(lambda: ours() == [], "the containers are gone")


@pytest.fixture
def boxed(containers: Any, tmp_path: Path) -> Iterator[JupyterCodeExecutor]:
    with docker_server() as server, JupyterCodeExecutor(server, output_dir=tmp_path) as executor:
        yield executor


def test_the_dockerfile_is_the_bundled_one() -> None:
    assert (HERE / "Dockerfile").read_bytes() == DockerJupyterServer.DEFAULT_DOCKERFILE.encode()


def test_docker_kernels_share_one_hardened_container(boxed: JupyterCodeExecutor, containers: Any) -> None:
    hardened = textwrap.dedent(r"""
        import os, socket
        lines = open("/proc/self/status").read().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        print(os.getuid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"])
        print([name for _, name in socket.if_nameindex()], os.getcwd(), os.access(".", os.W_OK), os.environ["USER"])
        print(open("/proc/1/comm").read().strip(), [name for name in os.environ if "TOKEN" in name])
    """)
    assert run(boxed, hardened).output == "1000 0 0 1\n['lo'] /workspace True jupyter\npython3 []\n"
    with JupyterCodeExecutor(boxed._server) as second:
        run(boxed, "x = 1")
        assert run(second, "'x' in dir()").output == "False"
    (container,) = containers()
    config = container.attrs["HostConfig"]
    assert container.attrs["Config"]["StdinOnce"]
    assert (config["PidsLimit"], config["LogConfig"]["Type"], config["PortBindings"] or None) == (512, "none", None)
    assert container.attrs["Mounts"] == []
    assert boxed.connection_file is None


@pytest.mark.slow
@cases(
    "options, limits",
    ({}, (True, 2**30, 10**9, "none")),
    ({"read_only": False, "mem_limit": "256m", "cpu_quota": 50_000, "network": "bridge"}, (False, 2**28, 0, "bridge")),
)
def test_hardened_is_one_word_for_limits(containers: Any, options: dict[str, Any], limits: tuple[Any, ...]) -> None:
    # A directory to work in that is not in the image is writable all the same.
    with docker_server(**{"network": None, "hardened": True, "work_dir": "/else/where", **options}) as server:
        assert server.container_id is None
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "import os; os.getcwd(), open('file', 'w').write('x')").output == "('/else/where', 1)"
        (container,) = containers()
        assert container.id == server.container_id
        config = container.attrs["HostConfig"]
        assert (config["ReadonlyRootfs"], config["Memory"], config["NanoCpus"], config["NetworkMode"]) == limits
        assert config["MemorySwap"] == limits[1]


def test_processes_have_names_and_the_log_tells_of_their_life(containers: Any, caplog: LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jupyter_exec")
    with docker_server(preload=()) as server, JupyterCodeExecutor(server) as executor:
        run(executor, "secret = 1; print('output')")
        (container,) = containers()
        names = {process[-1] for process in container.top()["Processes"]}
        assert names == {f"jupyter_exec: {name}" for name in ("kernel host", "fork server", "kernel k1.1")}
        executor.execute("import time; time.sleep(60)", timeout=0.5)
        executor.restart()
        run(executor, "import os; os._exit(3)")
    life = f"Container {container.name} started: {container.id}", "Kernel host started: ", "Kernel ready after"
    ends = "Kernel died: it ended by itself with exit code 3", "Server stopped"
    for event in (*life, "Kernel interrupted", "Kernel restarted", *ends):
        assert event in caplog.text
    assert "secret" not in caplog.text and "output" not in caplog.text


def test_code_in_a_container_can_neither_stop_its_host_nor_reach_the_pipe(boxed: JupyterCodeExecutor) -> None:
    with JupyterCodeExecutor(boxed._server) as bystander:
        run(bystander, "y = 7")
        assert run(boxed, ATTACKS).output == "denied\n" * 3
        assert run(bystander, "y").output == "7"
    (path,) = run(boxed, "from IPython.display import HTML\nHTML('<b>')").output_files
    assert Path(path).read_text() == "<b>"


ATTACKS = """
import os, signal
for name in ("SIGSTOP", "SIGTERM", "SIGKILL", "SIGHUP", "SIGINT", "SIGUSR1", "SIGCHLD"):
    os.kill(1, getattr(signal, name))
for attack in (lambda: os.listdir("/proc/1/fd"), lambda: open("/proc/1/fd/4", "wb"), lambda: open("/proc/1/mem")):
    try:
        attack()
    except PermissionError:
        print("denied")
"""


def test_orphans_in_a_container_are_reaped(boxed: JupyterCodeExecutor) -> None:
    code = """
        import os, subprocess, time
        pid = int(subprocess.check_output("sleep 0.01 >/dev/null & echo $!", shell=True))
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
    """
    assert boxed.execute(textwrap.dedent(code), timeout=PATIENCE).status == "ok"


def test_an_entrypoint_that_stays_is_named(
    containers: Any, image: Callable[[str], str], caplog: LogCaptureFixture
) -> None:
    name = image('FROM BUNDLED\nENTRYPOINT ["sh", "-c", "\\"$@\\"; exit $?", "entry"]')
    with docker_server(custom_image_name=name) as server:
        server.kernelspecs()
    assert "does not `exec` its command" in caplog.text


def test_a_host_that_is_the_first_process_hears_a_stop_at_once(containers: Any) -> None:
    with docker_server() as server:
        server.kernelspecs()
        (container,) = containers()
        container.stop(timeout=600)  # what the engine would wait before it kills
        assert server._stream and server._stream.exit_code() == 137


def test_docker_timeout_and_death(boxed: JupyterCodeExecutor, monkeypatch: MonkeyPatch) -> None:
    run(boxed, "x = 5")
    assert boxed.execute("while True: print('y' * 1000)", timeout=0.5).kernel_state == "intact"
    assert boxed.execute("import subprocess; subprocess.run(['sleep', '60'])", timeout=0.5).kernel_state == "intact"
    assert run(boxed, "x").output == "5"
    result = run(boxed, "import os; os.kill(os.getpid(), 11)")
    assert (result.exit_code, result.kernel_state) == (139, "lost")
    assert run(boxed, "'x' in dir()").output == "False"
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
    place = "it was at line 3: list(map(sleep, [60])), in sleep (deaf.py:3)"
    assert boxed.execute(DEAF, timeout=0.5).note.endswith(f"all variables are lost; {place}")


@pytest.mark.slow
@cases("options", {}, {"read_only": True})
def test_a_user_whom_the_image_knows_by_name_may_write(image: Callable[[str], str], options: dict[str, Any]) -> None:
    own = image("FROM BUNDLED\nUSER root\nWORKDIR /\nRUN useradd --uid 4321 ann && rmdir /workspace\nUSER ann")
    with docker_server(custom_image_name=own, **options) as server, JupyterCodeExecutor(server) as executor:
        executor.upload(b"x", "file")
        assert (
            run(executor, "import os; os.getcwd(), open('file').read(), os.getuid()").output
            == "('/workspace', 'x', 4321)"
        )


@pytest.mark.slow
def test_out_of_memory_is_reported_with_the_limit(containers: Any) -> None:
    with docker_server(mem_limit="300m", memswap_limit="300m") as server, JupyterCodeExecutor(server) as executor:
        with JupyterCodeExecutor(server) as bystander:
            run(bystander, "y = 7")
            result = run(executor, "x = bytearray(10**9)")
            assert (result.exit_code, result.kernel_state) == (137, "lost")
            assert "out of memory (limit 300 MB" in result.output
            assert run(executor, "1").output == "1"
            assert run(bystander, "y").output == "7"
            # A child that was killed for it some time ago is not why the kernel dies.
            child = "import os, subprocess, sys, time\nsubprocess.run([sys.executable, '-c', 'x = bytearray(10**9)'])\n"
            result = run(bystander, f"{child}time.sleep(1.5); os.kill(os.getpid(), 9)")
            assert "killed by signal 9, SIGKILL" in result.output and "memory" not in result.output


@pytest.mark.slow
def test_a_container_killed_from_outside_is_reported_and_replaced(boxed: JupyterCodeExecutor, containers: Any) -> None:
    result = boxed.execute(FOR_EVER, on_output=lambda output: containers()[0].kill(), timeout=PATIENCE)
    assert (result.status, result.kernel_state) == ("died", "lost")
    assert "the container has ended (killed" in result.note
    assert run(boxed, "1").output == "1"


# Code may do that to the host, which runs as the same user: it can then open no more files.
STARVE_HOST = "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (5, 5))"


@cases("code", "1", STARVE_HOST)
def test_the_container_of_a_killed_client_is_gone(containers: Any, code: str) -> None:
    program = """
        import sys, time, jupyter_exec
        executor = jupyter_exec.JupyterCodeExecutor(jupyter_exec.DockerJupyterServer(base_image=sys.argv[1] or None, labels={sys.argv[2]: ""}))
        executor.execute(sys.argv[3])
        print("ready", flush=True)
        time.sleep(60)
    """
    with client_program(program, os.environ.get("BASE_IMAGE", ""), RUN, code):
        assert len(containers()) == 1
    # The fixture waits until it is gone.


def test_a_host_that_can_open_no_more_files_reports_the_end_of_a_kernel(boxed: JupyterCodeExecutor) -> None:
    result = boxed.execute(f"{STARVE_HOST}; import os; os.kill(os.getpid(), 9)", timeout=PATIENCE)
    assert (result.status, result.exit_code) == ("died", 137)


def test_a_container_that_is_to_stay_is_stopped_only_and_has_its_name_alone(engine: Any, containers: Any) -> None:
    with docker_server(auto_remove=False, container_name=f"{RUN}-stays") as server:
        server.kernelspecs()
        with docker_server(container_name=f"{RUN}-stays") as other, pytest.raises(SandboxError, match="already in use"):
            JupyterCodeExecutor(other)
        assert "python3" in server.kernelspecs()
    container = engine.containers.get(f"{RUN}-stays")
    assert container.status == "exited"
    container.remove()


@pytest.mark.slow
def test_a_killed_container_with_a_name_that_is_to_stay_is_replaced(containers: Any) -> None:
    with docker_server(auto_remove=False, container_name=f"{RUN}-replaced") as server:
        with JupyterCodeExecutor(server) as executor:
            executor.execute(FOR_EVER, on_output=lambda output: containers()[0].kill(), timeout=PATIENCE)
            assert run(executor, "6 * 7").output == "42"
    (container,) = containers()
    container.remove()


@pytest.mark.slow
def test_volumes_without_a_name_go_with_their_container(
    engine: Any, containers: Any, image: Callable[[str], str]
) -> None:
    def volumes() -> set[str]:
        return {volume.name for volume in engine.volumes.list()}

    before, name = volumes(), image("FROM BUNDLED\nVOLUME /data")
    with docker_server(custom_image_name=name, volumes=["/q"], work_dir="/not/there") as server:
        server.kernelspecs()
    eventually(lambda: volumes() <= before, "the volumes are gone")


@cases("error", KeyboardInterrupt, OSError("Read timed out."), ids=["Ctrl-C", "slow engine"])
@cases("work_dir", "/workspace", "/not/there")
def test_an_interrupted_creation_leaves_no_container(
    engine: Any, containers: Any, monkeypatch: MonkeyPatch, error: BaseException, work_dir: str
) -> None:
    from docker.models.containers import ContainerCollection

    with docker_server(work_dir=work_dir) as server, monkeypatch.context() as patch:
        made: list[str] = []

        def get(self: object, name: str) -> None:  # what is done after the engine has made the container
            made.append(name)
            raise error

        patch.setattr(ContainerCollection, "get", get)
        with pytest.raises((KeyboardInterrupt, SandboxError)):
            server.kernelspecs()
        with pytest.raises(Exception, match="No such container"):
            engine.api.inspect_container(made[0])


@pytest.mark.slow
def test_what_dead_processes_have_left_is_removed_at_the_next_start(engine: Any, containers: Any) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = jupyter_exec.process_name(process.pid)
        process.kill()
    forsakable, of_another = {"jupyter_exec.forsakable": "1"}, {"jupyter_exec.name": "from whose image this was made"}
    kept = []
    for has_run, more in ((False, {}), (True, forsakable), (True, {}), (True, forsakable | of_another)):
        name = f"jupyter-exec-{os.urandom(8).hex()}"
        labels = {RUN: "", "jupyter_exec.owner": owner, "jupyter_exec.name": name} | more
        container = engine.containers.create(docker_server()._image_name, ["true"], labels=labels, name=name)
        kept += [container] if has_run and more != forsakable else []
        if has_run:
            container.start()
            container.wait()
    with docker_server() as server:
        server.kernelspecs()
        # What was asked to stay, and has run, stays.
        assert {container.id for container in containers()} == {server.container_id, *(one.id for one in kept)}
    for container in kept:
        container.remove()


@pytest.mark.slow
def test_docker_environment_network_and_packages(engine: Any, containers: Any, caplog: LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jupyter_exec")
    packages = [
        "six; python_version >= '3' and platform_machine != '$(touch /tmp/pwned)`touch /tmp/pwned`\";*'",
        "idna>=3,!=4",
    ]
    with docker_server(packages=packages, docker_env={"GREETING": "hello"}, network="bridge") as server:
        with JupyterCodeExecutor(server) as executor:
            built = server._image_name
            code = "import os, idna, six, socket\nprint(os.environ['GREETING'], len(socket.if_nameindex()))"
            assert run(executor, code).output == "hello 2\n"
            assert run(executor, "print('pwned' in os.listdir('/tmp'))").output == "False\n"
    engine.images.remove(built)
    assert f"Building the image {built}" in caplog.text
    assert "Step 1/" in caplog.text


@pytest.mark.slow
def test_a_build_that_fails_says_the_cause_first(containers: Any) -> None:
    with docker_server(packages=["there-is-no-such-package"]) as server, pytest.raises(SandboxError) as caught:
        JupyterCodeExecutor(server)
    cause = "The image could not be built: Could not find a version that satisfies the req.*there-is-no-such-package"
    assert re.match(cause, str(caught.value))


def test_a_base_image_that_is_not_there_is_told_before_dockers_words(containers: Any) -> None:
    with docker_server(base_image="no-such.example.invalid/base:1") as server, pytest.raises(SandboxError) as caught:
        server.kernelspecs()
    says, _, rest = str(caught.value).partition("\n")
    assert says.startswith(
        "The base image no-such.example.invalid/base:1 is not on the engine and could not be pulled: "
    )
    assert "base_image=" in says and "no-such.example.invalid" in rest


def test_bind_dir_is_the_working_directory_with_the_owners_uid(containers: Any, tmp_path: Path) -> None:
    os.chown(tmp_path, 4321, 4321)
    os.chmod(tmp_path.parent, 0o755)
    mode = tmp_path.stat().st_mode
    with docker_server(bind_dir=tmp_path, work_dir="/data") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; open('made', 'w').close(); print(os.getcwd())").output == "/data\n"
    assert (tmp_path / "made").stat().st_uid == 4321
    assert tmp_path.stat().st_mode == mode


@pytest.mark.slow
@cases(
    "target, options",
    ("/workspace", {"hardened": True, "mounts": {"Type": "bind", "Source": "DIR", "Target": "/workspace"}}),
    ("/w", {"work_dir": "/w/", "mounts": [{"Type": "bind", "Source": "DIR", "Target": "/w"}]}),
    ("/workspace", {"hardened": True, "volumes": {"DIR": {"bind": "/workspace/", "mode": "rw"}}}),
    ("/tmp", {"hardened": True, "volumes": "DIR:/tmp"}),
    ("/w/below", {"hardened": True, "work_dir": "/w/below", "volumes": ["DIR:/w:rw"]}),
    ("/workspace", {"bind_dir": "DIR", "volumes": {"DIR": {"bind": "/data", "mode": "ro"}}}),
    ("/home/jupyter", {"hardened": True, "bind_dir": "DIR", "work_dir": "/home/jupyter"}),
    ("/tmp", {"hardened": True, "bind_dir": "DIR", "work_dir": "/tmp"}),
    ("/data", {"bind_dir": "DIR:with:colons", "work_dir": "/data"}),
    ids=str,
)
def test_what_is_written_into_a_mount_is_there_outside(
    containers: Any, tmp_path: Path, target: str, options: dict[str, Any]
) -> None:
    os.chmod(tmp_path.parent, 0o755)
    for name in ("dir", "dir/below", "dir:with:colons"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 1000, 1000)
    options = json.loads(json.dumps(options).replace("DIR", str(tmp_path / "dir")))
    with docker_server(**options) as server, JupyterCodeExecutor(server) as executor:
        run(executor, f"open('{target}/made', 'w').close()")
    assert len(list(tmp_path.glob("dir*/**/made"))) == 1


@pytest.mark.slow
@cases("options", {"work_dir": "/"}, {"custom_image_name": "FROM BUNDLED\nENV HOME=/"})
def test_the_root_is_no_place_for_a_file_system_in_memory(
    containers: Any, image: Callable[[str], str], options: dict[str, Any]
) -> None:
    options = {name: image(value) if "FROM" in value else value for name, value in options.items()}
    with docker_server(hardened=True, **options) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "open('/tmp/file', 'w').write('x')").output == "1"


@pytest.mark.slow
def test_code_is_not_root_in_a_bind_dir_of_root(containers: Any, tmp_path: Path) -> None:
    os.chmod(tmp_path.parent, 0o755)
    with docker_server(bind_dir=tmp_path) as server, pytest.raises(SandboxError, match="not writable for 1000:1000"):
        server.kernelspecs()
    for options, uid in (({}, 1000), ({"user": 0}, 0)):
        os.chown(tmp_path, uid, 0)
        os.chmod(tmp_path, 0o700)
        with docker_server(bind_dir=tmp_path, **options) as server, JupyterCodeExecutor(server) as executor:
            assert run(executor, "import os; open('made', 'w').close(); print(os.getuid())").output == f"{uid}\n"
        assert (tmp_path / "made").stat().st_uid == uid
        (tmp_path / "made").unlink()
        os.chown(tmp_path, 0, 1000)
        os.chmod(tmp_path, 0o770)


@cases(
    "owner, mode, user",
    ((4321, 4322), 0o700, "4321:4322"),
    ((4321, 0), 0o700, "4321:1000"),
    ((4321, 1000), 0o577, None),
    ((0, 0), 0o703, "1000:1000"),
    ((0, 1000), 0o730, "1000:1000"),
    ((0, 1000), 0o757, None),
    ((0, 0), 0o775, None),
)
def test_as_whom_code_runs_in_a_bind_dir(tmp_path: Path, owner: tuple[int, int], mode: int, user: str | None) -> None:
    os.chown(tmp_path, *owner)
    tmp_path.chmod(mode)
    if user:
        assert jupyter_exec._owner_of(str(tmp_path)) == user
    else:
        with pytest.raises(SandboxError, match="chown it to"):
            jupyter_exec._owner_of(str(tmp_path))
    tmp_path.chmod(0o700)


@cases("info, user", ({"SecurityOptions": ["name=rootless"]}, "0:0"), ({"Rootless": True}, "0:0"), ({}, "1007:1007"))
def test_root_of_a_rootless_engine_is_the_owner_of_a_bind_dir(info: Any, user: str, tmp_path: Path) -> None:
    os.chown(tmp_path, 1007, 1007)
    engine = types.SimpleNamespace(info=lambda: info)
    assert docker_server(bind_dir=tmp_path)._user(engine, {}) == user


@pytest.mark.slow
def test_docker_read_only_runs_pip_and_matplotlib(containers: Any, tmp_path: Path) -> None:
    with docker_server(packages=["matplotlib"], read_only=True, network="bridge") as server:
        with JupyterCodeExecutor(server, timeout=120, output_dir=tmp_path) as executor:
            assert "Read-only file system" in run(executor, "open('/opt/x', 'w')").output
            result = run(
                executor,
                "!python -m pip install -q --target /workspace/site markupsafe",
                "import sys; sys.path.insert(0, '/workspace/site'); import markupsafe._speedups as s; print(s.__file__)",
                "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
            )
            assert "/workspace/site/markupsafe/_speedups" in result.output
            assert len(result.output_files) == 1


class Proxy:
    """A proxy before what `connect()` reaches.

    It stops at the first request that has `stall_at` in it; it gives `refusal`, if there is one, to a new connection.
    """

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.stall_at = self.refusal = b""
        self.refused = 0
        self._connect = connect
        self.passes = threading.Event()
        self.passes.set()
        self._sockets = [listener]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._sockets[0].accept()[0]
                if self.refusal:
                    near.recv(2**16)
                    near.sendall(self.refusal)
                    near.close()
                    self.refused += 1
                    continue
                far = self._connect()
                self._sockets += [near, far]
                self._spawn(self._copy, near, far)
                self._spawn(self._copy, far, near)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if self.stall_at and self.stall_at in data:
                    self.passes.clear()
                self.passes.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def cut(self, first: int = 1) -> None:
        """End the connections that there are."""
        for sock in self._sockets[first:]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut(0)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def to_engine() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect("/var/run/docker.sock")
    return sock


@pytest.mark.slow
def test_docker_through_tcp(containers: Any, monkeypatch: MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:{1}".format(*listener.getsockname()))
    with contextlib.closing(Proxy(listener, to_engine)):
        with docker_server() as server, JupyterCodeExecutor(server, max_output=None) as executor:
            assert run(executor, "x = 1", "x").output == "\n1"
            assert len(run(executor, "print('x' * 5_000_000)").output) == 5_000_001


@pytest.fixture
def stalling(containers: Any, monkeypatch: MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    for name in ("ENGINE_TIMEOUT", "STOP_TIMEOUT"):
        monkeypatch.setattr(jupyter_exec, name, 0.5)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/engine.sock")
    listener.listen()
    with contextlib.closing(Proxy(listener, to_engine)) as stalling:
        yield stalling
        stalling.stall_at = b""
        stalling.passes.set()
        eventually(lambda: not containers(), "the containers are gone")


@pytest.mark.slow
@cases("request_", "/version", "/images/", "/wait", "/attach", "/start")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # docker-py leaves a socket to gc
def test_an_engine_that_stalls_at_the_start(stalling: Proxy, request_: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "WAIT_TIMEOUT", 1)
    stalling.stall_at = request_.encode()
    with docker_server() as server, pytest.raises(SandboxError, match="engine does not answer"):
        server.kernelspecs()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_stalls_under_a_cell(stalling: Proxy, monkeypatch: MonkeyPatch) -> None:
    with docker_server() as server, JupyterCodeExecutor(server) as executor:
        run(executor, "x = 1")
        stalling.passes.clear()
        for name in ("INTERRUPT_GRACE", "CONTROL_TIMEOUT", "SHUTDOWN_GRACE"):
            monkeypatch.setattr(jupyter_exec, name, 0.5)
        assert executor.execute("x", timeout=0.2).kernel_state == "lost"
        assert "engine does not answer" in run(executor, "1").output


@pytest.mark.slow
def test_a_docker_session_ends_silently(containers: Any) -> None:
    program = """
        import gc, sys, jupyter_exec
        with jupyter_exec.DockerJupyterServer(base_image=sys.argv[1] or None) as server:
            server.kernelspecs()
        gc.collect()
    """
    result = run_python(program, os.environ.get("BASE_IMAGE", ""))
    assert (result.returncode, result.stderr) == (0, "")  # Python 3.13 and newer complained of a closed file


def test_a_paused_container(containers: Any) -> None:
    with docker_server() as server, JupyterCodeExecutor(server) as executor:
        run(executor, "x = 1")
        (container,) = containers()
        container.pause()
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(run, executor, "x")
            container.unpause()
            assert result.result().output == "1"
        container.pause()
        server.stop()
        assert containers() == []


@pytest.fixture(scope="session")
def podman() -> Iterator[str]:
    """The address of Podman's Docker API, with the bundled image on it."""
    need("podman", shutil.which("podman") and os.getuid() == 0 and "BASE_IMAGE" in os.environ)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        config, address = Path(directory, "containers.conf"), f"unix://{directory}/podman.sock"
        config.write_text('[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n')
        environment = os.environ | {"CONTAINERS_CONF": str(config)}
        saved = subprocess.Popen(["docker", "save", os.environ["BASE_IMAGE"]], stdout=subprocess.PIPE)
        subprocess.run(["podman", "load", "--quiet"], stdin=saved.stdout, capture_output=True, check=True)
        assert saved.stdout and saved.wait() == 0
        saved.stdout.close()
        service = subprocess.Popen(["podman", "system", "service", "--time=0", address], env=environment)
        stack.callback(service.wait)
        stack.callback(service.terminate)
        eventually(Path(directory, "podman.sock").exists, "Podman listens")
        yield address


@pytest.fixture
def podman_server(podman: str, monkeypatch: MonkeyPatch) -> Callable[..., DockerJupyterServer]:
    monkeypatch.setenv("DOCKER_HOST", podman)
    return functools.partial(docker_server, base_image=f"localhost/{os.environ['BASE_IMAGE']}")


@pytest.mark.slow
def test_podman_by_its_docker_api(
    bundled_image: None, podman_server: Callable[..., DockerJupyterServer], caplog: LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jupyter_exec")
    places = "for path in ('x', '/tmp/x'): open(path, 'w').close()\n"
    with podman_server(read_only=True, work_dir="/else/where") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, places + "print(open('/proc/1/comm').read())").output == "python3\n\n"
        assert run(executor, ATTACKS).output == "denied\n" * 3
        server._container.kill()
        result = run(executor, "1")
        assert "the container has ended" in result.output
        assert "exit code 0" not in result.output
        assert run(executor, "1").output == "1"
    assert ("Building the image" in caplog.text) == ("STEP 1/" in caplog.text)


@pytest.mark.slow
def test_podman_by_command(bundled_image: None, podman_server: Callable[..., DockerJupyterServer]) -> None:
    with podman_server() as built:
        built.kernelspecs()
        name = built._image_name
    argv = readme_command("podman")
    argv[2:2] = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
    argv[argv.index("image")] = name
    with CommandJupyterServer(argv) as server:
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, ATTACKS, "6 * 7").output == "denied\n" * 3 + "\n42"


def readme_command(name: str) -> list[str]:
    """Return the first command of that name of the README's sandboxes."""
    found: list[list[str]] = []
    with MonkeyPatch.context() as patch:
        patch.setattr(jupyter_exec, "CommandJupyterServer", found.append)
        exec(readme_blocks("In other sandboxes")[0], {})
    return next(argv for argv in found if argv[0] == name)


@pytest.mark.slow
def test_bubblewrap(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    works = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    need("bwrap", shutil.which("bwrap") and subprocess.run(works).returncode == 0)
    monkeypatch.setenv("SECRET", "a key")
    program = f"""
        import os, socket, sys
        print([path for path in ({str(tmp_path)!r}, "/etc/passwd", "/home", "/root/.ssh") if os.path.exists(path)])
        print(os.environ.get("SECRET"), [name for _, name in socket.if_nameindex()])
        for path in (sys.prefix, "/usr"):
            try: open(path + "/new", "w")
            except OSError as error: print(type(error).__name__)
    """
    with CommandJupyterServer(readme_command("bwrap")) as server, JupyterCodeExecutor(server, timeout=5) as executor:
        result = executor.execute(textwrap.dedent(program))
        assert result.text == "[]\nNone ['lo']\n" + "OSError\n" * 2
        assert executor.execute_code_blocks(CodeBlock("x=6; echo $((x * 7)); exit 3", "bash")).output.startswith("42\n")
        assert executor.execute("while True: pass", timeout=1).kernel_state == "intact"
        assert executor.execute("import os; os.kill(os.getpid(), 9)").exit_code == 137
        executor.restart()
        assert run(executor, "6 * 7").output == "42"


@pytest.fixture
def slurm(short_path: Path, monkeypatch: MonkeyPatch) -> Iterator[None]:
    """A Slurm cluster of one node, which is this machine."""
    programs = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd", "srun")]
    need("slurm", os.getuid() == 0 and all(programs))
    host = socket.gethostname().partition(".")[0]
    config = short_path / "slurm.conf"
    config.write_text(
        f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={free_port()}
        SlurmdPort={free_port()}
        AuthType=auth/none
        CredType=cred/none
        SlurmUser=root
        StateSaveLocation={short_path}
        SlurmdSpoolDir={short_path}
        SlurmctldPidFile={short_path}/controller.pid
        SlurmdPidFile={short_path}/node.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4096
        PartitionName=main Nodes=ALL Default=YES
        """.replace("    ", "")
    )
    monkeypatch.setenv("SLURM_CONF", str(config))
    with contextlib.ExitStack() as stack:
        for program in programs[:2]:
            process = subprocess.Popen([str(program), "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        eventually(lambda: jobs("sinfo", "%t") == "idle", "a node of Slurm is idle")
        yield


def jobs(command: str, form: str) -> str:
    return subprocess.run([command, "-h", "-o", form], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_slurm(slurm: None) -> None:
    argv = [sys.executable if word.endswith("/python3") else word for word in readme_command("srun")]
    with CommandJupyterServer(argv) as server, JupyterCodeExecutor(server) as executor:
        assert executor.execute("import os; os.environ['SLURM_JOB_ID']").text == repr(jobs("squeue", "%i"))
        assert len(executor.execute("print('x' * 90_000)").text) == 90_001
        assert executor.execute("while True: pass", timeout=1).kernel_state == "intact"
        executor.restart()
        assert run(executor, "6 * 7").output == "42"
    eventually(lambda: jobs("squeue", "%i") == "", "the job has ended")


@pytest.mark.slow
def test_uv(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    directory = Path(os.environ.get("JUPYTER_EXEC_FRAMEWORKS", "/nowhere"), "uv", "bin")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{directory}")
    need("uv", shutil.which("uv"))
    other = "[project]\nname = 'other'\nversion = '1'\ndependencies = ['no-such-thing']\n"
    (tmp_path / "pyproject.toml").write_text(other)
    with CommandJupyterServer(readme_command("uv"), cwd=str(tmp_path), start_timeout=100) as server:
        with JupyterCodeExecutor(server) as executor:
            result = executor.execute("import sys, pandas; print(pandas.Series([40, 2]).sum()); print(sys.prefix)")
            assert result.text.startswith("42\n") and sys.prefix not in result.text


@pytest.fixture
def image(engine: Any) -> Iterator[Callable[[str], str]]:
    """A function that builds an image from a Dockerfile; BASE and BUNDLED stand for images in it."""
    tags: list[str] = []

    def build(dockerfile: str) -> str:
        tags.append(f"{RUN}:{len(tags)}")
        names = {"BASE": os.environ.get("BASE_IMAGE", "python:3.13-slim"), "BUNDLED": docker_server()._image_name}
        for name, value in names.items():
            dockerfile = dockerfile.replace(name, value)
        engine.images.build(fileobj=io.BytesIO(dockerfile.encode()), tag=tags[-1], rm=True, forcerm=True)
        return tags[-1]

    yield build
    for tag in tags:
        engine.images.remove(tag, force=True)


@pytest.mark.slow
def test_custom_image_with_a_noisy_entrypoint_of_root(containers: Any, image: Callable[[str], str]) -> None:
    entrypoint = r'ENTRYPOINT ["sh", "-c", "echo Welcome; echo noise >&2; exec \"$@\"", "entry"]'
    name = image(f'FROM BUNDLED\nUSER root\n{entrypoint}\nCMD ["never", "run"]\n')
    with docker_server(custom_image_name=name) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; print(os.getuid())").output == "1000\n"


OLD_PYTHON = r"""FROM BASE
RUN printf 'import sys; sys.version_info = (3, 8); exec(sys.argv[1])' >/old.py
ENTRYPOINT ["sh", "-c", "shift 2; exec /usr/bin/python3 /old.py \"$1\"", "x"]
"""


@pytest.mark.slow
@cases(
    "dockerfile, says",
    ("FROM scratch\nLABEL a=b", "python3"),
    ('FROM BASE\nENTRYPOINT ["sh", "-c", "echo trouble >&2; exit 3"]', "exit code 3.*trouble"),
    ("FROM BASE", "-m pip install ipykernel"),
    ("FROM BUNDLED\nRUN pip uninstall -qy comm", "No module named 'comm'"),
    (OLD_PYTHON, r"Python 3\.8 is too old"),
    ids=["no Python", "ends at once", "no ipykernel", "half an ipykernel", "old Python"],
)
def test_unfit_images_are_reported(containers: Any, image: Callable[[str], str], dockerfile: str, says: str) -> None:
    with docker_server(custom_image_name=image(dockerfile)) as server:
        with pytest.raises(JupyterExecError) as caught, JupyterCodeExecutor(server) as executor:
            executor.execute("1")
    assert re.search(says, str(caught.value), re.DOTALL)


@cases(
    "options, says",
    ({"custom_image_name": "no/such:image"}, "Custom image no/such:image does not exist"),
    ({"mem_limit": "1 apple"}, "1 apple"),
)
def test_what_the_engine_refuses_is_reported(containers: Any, options: dict[str, Any], says: str) -> None:
    with docker_server(**options) as server, pytest.raises(SandboxError, match=says):
        JupyterCodeExecutor(server)


@cases(
    "error, says",
    ("Read timed out. (read timeout=20)", "The Docker engine does not answer: try again, restart it"),
    ("[Errno 13] Permission denied", "No permission to use Docker: add yourself to the group docker"),
)
def test_docker_that_cannot_be_used_says_what_to_do(monkeypatch: MonkeyPatch, error: str, says: str) -> None:
    import docker

    timeouts: list[int] = []

    def fail(timeout: int, **address: Any) -> None:
        timeouts.append(timeout)
        raise docker.errors.DockerException(f"Error while fetching server API version: {error}")

    monkeypatch.setattr(docker, "DockerClient", fail)
    with pytest.raises(SandboxError, match=says):
        JupyterCodeExecutor(DockerJupyterServer())
    assert timeouts == [20]


@cases(
    "environment, engine",
    ({}, "tcp://127.0.0.1:7"),  # `docker context use near` was said
    ({"DOCKER_HOST": "unix:///other.sock"}, "unix:///other.sock"),
    ({"DOCKER_CONTEXT": "default"}, None),
    ({"DOCKER_CONTEXT": "far"}, "cannot attach to containers by ssh: forward the socket"),
    ({"DOCKER_HOST": "ssh://ann@box"}, "cannot attach to containers by ssh: forward the socket"),
    ({"DOCKER_CONTEXT": "none"}, r"context none cannot be used: 'docker context ls' shows what there is \(it is not"),
    ({"DOCKER_CONTEXT": "broken"}, "context broken cannot be used"),
)
def test_the_engine_is_the_docker_commands(
    environment: dict[str, str], engine: str | None, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"currentContext": "near"}')
    for name, host in [("near", "tcp://127.0.0.1:7"), ("far", "ssh://ann@box"), ("broken", '"')]:
        directory = tmp_path / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
        directory.mkdir(parents=True)
        meta = f'{{"Name": "{name}", "Metadata": {{}}, "Endpoints": {{"docker": {{"Host": "{host}"}}}}}}'
        (directory / "meta.json").write_text(meta)
    for variable in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (environment | {"DOCKER_CONFIG": str(tmp_path)}).items():
        monkeypatch.setenv(variable, value)
    if engine and "://" not in engine:
        with pytest.raises(SandboxError, match=engine):
            jupyter_exec.docker_client()
    else:
        assert jupyter_exec._engine_in_use().get("base_url") == engine


@cases(
    "host, says",
    ("unix:///no/such.sock", "Docker is not running: start it, or use LocalJupyterServer"),
    ("npipe:////./pipe/docker_engine", "named pipe of Windows is no socket"),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # docker-py leaves a socket to gc
def test_docker_not_running_says_what_to_do(monkeypatch: MonkeyPatch, host: str, says: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(SandboxError, match=says):
        JupyterCodeExecutor(DockerJupyterServer())


def test_hardened_limits_memory_whatever_is_left_unsaid() -> None:
    assert DockerJupyterServer(hardened=True, mem_limit=None)._docker_kwargs["mem_limit"] == "1g"


@cases(
    "options, says",
    ({"command": "x"}, "custom_image_name"),
    ({"name": "x"}, "container_name"),
    ({"log_config": {}}, "stdout of the container"),
    ({"network": "none", "network_mode": "host"}, "not both"),
    ({"custom_image_name": "x", "packages": ["six"]}, "bundled image"),
    ({"packages": "six"}, "list of strings"),
    ({"packages": ["six", "--index-url=http://evil"]}, "option of pip"),
    ({"packages": ["six\n-r /etc/passwd"]}, "option of pip"),
    ({"mem_limit": ""}, "mem_limit is empty"),
    ({"networking_config": {"n": {}}}, "nothing for the network 'bridge': name one by network="),
    ({"bind_dir": ""}, "bind_dir is empty"),
    ({"packages": (package for package in ["six", 1])}, "list of strings"),
    ({"mounts": ["x"]}, "mounts a list of docker.types.Mount"),
    ({"volumes": {"/x": "/y"}}, "volumes must be"),
    ({"token": " "}, "open the gateway to everybody"),
    ({"network": "none", "transport": "gateway"}, "cannot be reached without a network"),
)
def test_docker_keywords_that_do_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DockerJupyterServer(**options)


def test_docker_kwargs_are_merged_with_ours(containers: Any, tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1000)
    options: dict[str, Any] = {
        "labels": ["mine"],
        "security_opt": "label=disable",
        "environment": ("B=2",),
        "volumes": {f"{tmp_path}:/mine:ro"},
        "cap_drop": ("NET_RAW",),
        "tmpfs": ["/more:size=1m"],
        "pids_limit": 77,
        "nano_cpus": 10**9,
        "network_mode": None,
    }
    with docker_server(docker_env={"A": "1"}, bind_dir=tmp_path, **options) as server:
        server.kernelspecs()
        (container,) = containers()
        attrs = container.attrs
        assert attrs["Config"]["Labels"].items() >= {"mine": "", "jupyter_exec": jupyter_exec.__version__}.items()
        assert attrs["HostConfig"]["SecurityOpt"] == ["no-new-privileges", "label=disable"]
        assert attrs["HostConfig"]["CapDrop"] == ["ALL", "NET_RAW"]
        assert attrs["HostConfig"]["Tmpfs"] == {"/more": "size=1m"}
        assert {"A=1", "B=2"} <= set(attrs["Config"]["Env"])
        assert {mount["Destination"] for mount in attrs["Mounts"]} == {"/mine", "/workspace"}
        assert (attrs["HostConfig"]["PidsLimit"], attrs["HostConfig"]["NanoCpus"]) == (77, 10**9)


@cases(
    "name, ours, theirs, merged",
    ("cap_drop", ["ALL"], "NET_RAW", ["ALL", "NET_RAW"]),
    ("cap_drop", ["ALL"], [], ["ALL"]),
    ("environment", {"A": "1"}, ["B=2=3", "C", "A=4"], {"A": "4", "B": "2=3", "C": None}),
    ("volumes", None, {"/c": {}}, {"/c": {}}),
    ("mounts", [{"a": 1}], [{"b": 2}], [{"a": 1}, {"b": 2}]),
    ("tmpfs", None, ["/x", "/y:size=1m"], {"/x": None, "/y": "size=1m"}),
    ("pids_limit", 512, 77, 77),
    ("ulimits", None, [1], [1]),
)
def test_merging_of_docker_options(name: str, ours: Any, theirs: Any, merged: Any) -> None:
    assert jupyter_exec._merged(name, ours, theirs) == merged


@pytest.mark.slow
def test_a_network_gives_the_container_the_aliases_that_were_asked_for(engine: Any, containers: Any) -> None:
    import docker.types

    endpoint = docker.types.EndpointConfig(engine.api._version, aliases=["box"])
    network = engine.networks.create(f"{RUN}-network")
    try:
        with docker_server(network=network.name, networking_config={network.name: endpoint}) as server:
            server.kernelspecs()
            (container,) = containers()
            assert "box" in container.attrs["NetworkSettings"]["Networks"][network.name]["Aliases"]
    finally:
        network.remove()


def test_packages_may_be_any_iterable() -> None:
    packages = (package for package in ["six"])
    assert docker_server(packages=packages)._image_name == docker_server(packages=["six"])._image_name


def test_memory_may_be_without_a_limit(containers: Any) -> None:
    with docker_server(mem_limit=0) as server:
        server.kernelspecs()
        assert containers()[0].attrs["HostConfig"]["Memory"] == 0


@cases("name, meant", ("mem_limitt", "mem_limit"), ("package", "packages"), ("bind_dirr", "bind_dir"), ("xyzzy", ""))
def test_an_unknown_docker_keyword_is_named(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}'" + (f"; did you mean '{meant}'" if meant else "$")):
        docker_server(**{name: 1})


@cases(
    "warnings_of, options",
    (1, {"privileged": True}),
    (1, {"cap_add": ["SYS_ADMIN"]}),
    (1, {"security_opt": ["no-new-privileges:false"]}),
    (1, {"security_opt": ("seccomp=unconfined",)}),
    (1, {"network": "host"}),
    (1, {"network_mode": "container:other"}),
    (1, {"pid_mode": "host"}),
    (1, {"user": "00"}),
    (1, {"user": 0}),
    (1, {"pids_limit": -1}),
    (1, {"mem_limit": 0}),
    (1, {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}),
    (1, {"volumes": {"/": {"bind": "/host", "mode": "ro"}}}),
    (1, {"mounts": [{"Source": "/run/podman/podman.sock", "Target": "/x", "Type": "bind"}]}),
    (1, {"bind_dir": "/"}),
    (0, {"bind_dir": tempfile.gettempdir(), "user": "1000", "read_only": True, "pids_limit": 9, "cap_add": []}),
    (0, {"security_opt": ["label=type:x"], "volumes": [f"{HERE}:/x"], "ipc_mode": "private"}),
    ids=str,
)
def test_what_opens_the_sandbox_is_warned_of(warnings_of: int, options: dict[str, Any], caplog: Any) -> None:
    DockerJupyterServer(**options)
    assert [(record.name, record.levelname) for record in caplog.records] == [("jupyter_exec", "WARNING")] * warnings_of


@cases("user", "", "0", "00", "0000:0", "+0", "root", "root:x", "0:1000")
def test_users_of_an_image_that_are_root(user: str) -> None:
    server = DockerJupyterServer()
    assert server._user(None, {"User": user}) == "1000:1000"
    assert server._user(None, {"User": f"1{user}"}) == f"1{user}"


@pytest.mark.slow
def test_another_name_of_root_in_an_image_is_refused(containers: Any, image: Callable[[str], str]) -> None:
    name = image("FROM BUNDLED\nUSER root\nRUN echo toor:x:0:0::/root:/bin/sh >>/etc/passwd\nUSER toor\n")
    with docker_server(custom_image_name=name) as server:
        with pytest.raises(SandboxError, match="User toor of the image is root: give user="):
            server.kernelspecs()


@pytest.mark.slow
def test_proxies_stay_out_of_docker_without_a_network(
    containers: Any, monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"proxies": {"default": {"httpProxy": "http://me:secret@proxy"}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for network, there in (("none", False), ("bridge", True)):
        with docker_server(network=network) as server:
            server.kernelspecs()
            (container,) = containers()
            assert ("HTTP_PROXY=http://me:secret@proxy" in container.attrs["Config"]["Env"]) == there


# Servers


@dataclass
class Peer:
    """A real Jupyter server that the tests started."""

    info: JupyterConnectionInfo
    log: Path

    def client(self, **options: Any) -> RemoteJupyterServer:
        return RemoteJupyterServer(self.info, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


RESTARTER = "--KernelRestarter.time_to_dead=0.3"  # seconds between looks whether a kernel lives; usually 3
GATEWAY = [
    "kernelgateway",
    "--KernelGatewayApp.port_retries=0",
    "--JupyterWebsocketPersonality.list_kernels=true",
    RESTARTER,
]
SERVER = ["server", "--allow-root", "--no-browser", "--ServerApp.port_retries=0", RESTARTER]


@contextlib.contextmanager
def peer(tmp_path: Path, *options: str, python: str = sys.executable, **info: Any) -> Iterator[Peer]:
    """Run `python -m jupyter OPTIONS` with a token until it answers."""
    port, token, log = free_port(), info.pop("token", "s3cret-t0ken"), tmp_path / "peer.log"
    app = "ServerApp" if options[0] == "server" else "KernelGatewayApp"
    app = "EnterpriseGatewayApp" if options[0] == "enterprisegateway" else app
    command = [python, "-m", "jupyter", *options, f"--{app}.port={port}", f"--{app}.ip=127.0.0.1"]
    environment = os.environ | {"KG_AUTH_TOKEN": token, "JUPYTER_TOKEN": token, "EG_AUTH_TOKEN": token}
    environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path)
    connection = JupyterConnectionInfo("127.0.0.1", info.pop("use_https", False), port, token, **info)
    with log.open("wb") as file:
        options_: Any = {"stdout": file, "stderr": file, "env": environment, "cwd": tmp_path}
        process = subprocess.Popen(command, start_new_session=True, **options_)
        try:
            with RemoteJupyterServer(connection) as client:
                eventually(lambda: answers(client) or process.poll() is not None, "the server answers")
            assert process.poll() is None, log.read_text()
            yield Peer(connection, log)
        finally:
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(PATIENCE)


def answers(client: RemoteJupyterServer) -> bool:
    with contextlib.suppress(ConnectionClosed, ExecutionTimeout):
        return bool(client.kernelspecs())
    return False


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: TempPathFactory) -> Iterator[Peer]:
    need("server", installed("kernel_gateway"))
    with peer(tmp_path_factory.mktemp("gateway"), *GATEWAY) as started:
        yield started


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: TempPathFactory) -> Iterator[Peer]:
    need("server", installed("jupyter_server"))
    options = [*SERVER, "--ServerApp.base_url=/user/ann/"]
    with peer(tmp_path_factory.mktemp("server"), *options, base_url="/user/ann") as started:
        yield started


@pytest.fixture(scope="session")
def enterprise_gateway(tmp_path_factory: TempPathFactory) -> Iterator[Peer]:
    """Enterprise Gateway pins an older jupyter-server: it lives in an environment of its own."""
    python = os.environ.get("JUPYTER_EXEC_ENTERPRISE_PYTHON", "")
    need("enterprise", os.path.exists(python))
    with peer(tmp_path_factory.mktemp("enterprise"), "enterprisegateway", python=python) as started:
        yield started


@pytest.fixture(params=["gateway", "jupyter_server"])
def remote(request: FixtureRequest, gateway: Peer, jupyter_server: Peer) -> Peer:
    return {"gateway": gateway, "jupyter_server": jupyter_server}[request.param]


@pytest.fixture
def far(remote: Peer, tmp_path: Path) -> Iterator[JupyterCodeExecutor]:
    with JupyterCodeExecutor(remote.info, output_dir=tmp_path) as executor:
        yield executor


def test_remote_kernels_work_like_local_ones(far: JupyterCodeExecutor, tmp_path: Path) -> None:
    assert run(far, "x = 6", "x * 7").output == "\n42"
    failed = run(far, "print('before')\n1/0")
    assert failed.exit_code == 1
    assert failed.output.startswith("before\nZeroDivisionError")
    assert run(far, "from IPython.display import HTML\nHTML('<b>')").output_files[0].startswith(str(tmp_path))
    assert far.execute("while True: pass", timeout=0.5).kernel_state == "intact"
    assert run(far, "x").output == "6"
    assert far.connection_file is None


@pytest.mark.slow
def test_remote_restart_and_death(far: JupyterCodeExecutor) -> None:
    run(far, "x = 1")
    far.restart()
    assert run(far, "'x' in dir()").output == "False"
    result = run(far, "import os; os._exit(1)")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "its server found it dead" in result.output
    assert run(far, "1").output == "1"


def test_a_kernel_that_cannot_be_reached_is_deleted(remote: Peer, monkeypatch: MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise ServerError("GET", "", 403, "no WebSockets here")

    with remote.client() as server:
        with monkeypatch.context() as patch, pytest.raises(ServerError, match="no WebSockets here"):
            patch.setattr(jupyter_exec.RestClient, "websocket", refuse)
            JupyterCodeExecutor(server)
        assert (server.list_kernels(), server.controls) == ([], set())


def test_a_forked_child_deletes_no_kernel_of_its_parent(remote: Peer) -> None:
    program = """
        import os, sys, warnings, jupyter_exec
        warnings.simplefilter("ignore")  # newer Pythons warn of a fork with threads
        info = jupyter_exec.JupyterConnectionInfo("127.0.0.1", False, int(sys.argv[1]), *sys.argv[2:])
        with jupyter_exec.JupyterCodeExecutor(info) as executor:
            executor.execute("x = 5")
            if not os.fork():
                try:
                    executor.stop()
                finally:
                    os._exit(0)
            os.wait()
            print(executor.execute("x").text)
    """
    info = remote.info
    assert run_python(program, str(info.port), str(info.token), info.base_url).stdout == "5\n"


def test_a_forked_child_hears_so_while_its_parent_runs_a_cell() -> None:
    program = """
        import os, time, warnings, jupyter_exec
        warnings.simplefilter("ignore")  # newer Pythons warn of a fork with threads
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            job = executor.submit("import time; time.sleep(60)")
            while job.status != "running":
                time.sleep(0.01)
            if not os.fork():
                try:
                    print(executor.execute_code_blocks("1").output, flush=True)
                finally:
                    os._exit(0)
            os.wait()
            job.interrupt()
            print(job.wait().status)
    """
    child, parent = run_python(program).stdout.splitlines()
    assert "This process was forked" in child and parent == "interrupted"


def test_deadlines_are_tested_after_garbage_too() -> None:
    with scripted(lambda kernel, request: None) as executor:
        cell = jupyter_exec.Cell(jupyter_exec.Execution("id"), 1, jupyter_exec.Hooks())
        for parts in ([b"x"], [b"<IDS|MSG>", b"bad", b"{}", b"{}", b"{}", b"{}"]):
            assert len(list(executor._kernel._take(("iopub", parts), cell))) > 0


@cases(
    "lie",
    "kernel.session.session = 'another'",
    "kernel.session.send(kernel.iopub_socket, 'status', {'execution_state': 'dead'})",
)
def test_a_kernel_that_says_to_be_dead_is_killed_all_the_same(server: LocalJupyterServer, lie: str) -> None:
    stays = "import os, threading, time\nthreading.Thread(target=time.sleep, args=[1000]).start()\nprint(os.getpid())"
    with JupyterCodeExecutor(server) as executor:
        pid = int(executor.execute(stays).text)
        assert executor.execute(f"kernel = get_ipython().kernel; {lie}").status == "died"
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the kernel has ended")


def test_startup_code_can_be_interrupted(server: LocalJupyterServer, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    startup = f"open({str(begun)!r}, 'w')\n{FOR_EVER}"
    for is_job in (False, True):
        with JupyterCodeExecutor(server, startup=startup) as executor:
            job = executor.submit([CodeBlock("1")])
            eventually(begun.exists, "the startup code runs")
            job.interrupt() if is_job else executor.interrupt()
            result = job.wait(PATIENCE)
            assert (result.exit_code, result.status) == (130, "interrupted")
            begun.unlink()


@on_a_loop
async def test_a_hook_of_late_output_ends_with_the_time_of_the_cell(
    server: LocalJupyterServer, monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    late = f"print('late', flush=True); open({str(tmp_path / 'done')!r}, 'w')"
    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.execute(f"import threading\nthreading.Timer(0.2, lambda: exec({late!r})).start()")
        while not ((tmp_path / "done").exists() and executor._executor._kernel._mailbox.unread):  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        result = await executor.execute("6 * 7", timeout=1, on_output=lambda output: asyncio.sleep(1000))
        assert result.status in ("ok", "timeout")


@on_a_loop
async def test_a_call_that_waits_for_a_deaf_attached_kernel_can_be_cancelled(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    with contextlib.closing(ScriptedKernel(lambda kernel, request: None)) as kernel:
        kernel.deaf = 10**6
        executor = AsyncJupyterCodeExecutor(kernel.connection)
        task = asyncio.ensure_future(executor.execute("1"))
        while not kernel.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()
        await executor.stop()


def test_ctrl_c_before_a_cell_is_sent_costs_nothing(executor: JupyterCodeExecutor) -> None:
    def interrupt(cell: object) -> None:
        raise KeyboardInterrupt

    run(executor, "kept = 1")
    with pytest.raises(KeyboardInterrupt):
        executor._kernel.execute("1", PATIENCE, jupyter_exec.Hooks(on_start=interrupt))
    assert run(executor, "kept").output == "1"


def test_remote_kernels_are_deleted_and_attached_ones_are_not(remote: Peer) -> None:
    with remote.client() as owner:
        client = owner.start_kernel()
        client.wait_ready()
        client.execute("x = 5", PATIENCE)
        (model,) = owner.list_kernels()
        with remote.client(kernel_id=model["id"]) as guest, JupyterCodeExecutor(guest) as executor:
            assert run(executor, "x").output == "5"
            with pytest.raises(KernelError, match="not ours"):
                executor.restart()
        assert client.execute("x", PATIENCE).text == "5"
    with remote.client() as witness:
        assert witness.list_kernels() == []


@pytest.mark.slow
def test_a_remote_server_that_nobody_refers_to_deletes_its_kernels_and_ends(gateway: Peer) -> None:
    with gateway.client() as witness:
        before, threads = len(witness.list_kernels()), set(threading.enumerate())
        server: Any = gateway.client()
        executor: Any = JupyterCodeExecutor(server)
        assert run(executor, "1").output == "1"
        executor.stop()
        client: Any = server.start_kernel()
        client.wait_ready()
        del server, executor, client
        gc.collect()
        eventually(lambda: len(witness.list_kernels()) == before, "the kernel is deleted")
        eventually(lambda: set(threading.enumerate()) <= threads, "the thread has ended")


def test_remote_kernel_gets_its_environment_and_input(gateway: Peer) -> None:
    with gateway.client(env={"KERNEL_GREETING": "hello"}) as server:
        with JupyterCodeExecutor(server, on_input=lambda prompt, password: "blue") as executor:
            code = "import os; os.environ['KERNEL_GREETING'], input('colour? ')"
            assert run(executor, code).output.endswith("('hello', 'blue')")


def test_the_default_subprotocol_works_too(jupyter_server: Peer, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "V1_SUBPROTOCOL", "unknown.to.the.server")
    with JupyterCodeExecutor(jupyter_server.info) as executor:
        assert run(executor, "6 * 7").output == "42"
        assert isinstance(executor._kernel._channels, jupyter_exec.WebSocketChannels)
        assert isinstance(executor._kernel._channels._codec, jupyter_exec.JsonCodec)


def test_a_remote_server_keeps_nothing_of_a_kernel_that_has_ended(gateway: Peer) -> None:
    with RemoteJupyterServer(gateway.info) as server:
        with JupyterCodeExecutor(server) as executor:
            executor.restart()
            assert run(executor, "1").output == "1" and len(server.controls) == 1
        assert not server.controls


@pytest.fixture
def connections(tmp_path: Path, monkeypatch: MonkeyPatch) -> list[socket.socket]:
    """The connections that WebSockets were opened on; tmp_path/gate is there when the first was dropped."""
    opened: list[socket.socket] = []
    websocket = jupyter_exec.RestClient.websocket

    def counting(*arguments: Any) -> Any:
        if opened:  # nothing that comes from now on can have come over the first connection
            eventually(lambda: opened[0].fileno() == -1, "the first connection was dropped")
            (tmp_path / "gate").touch()
        result = websocket(*arguments)
        opened.append(result[0])
        return result

    monkeypatch.setattr(jupyter_exec.RestClient, "websocket", counting)
    return opened


def waiting_for(gate: Path, before: str = "") -> str:
    """Code that runs until a file is there."""
    return f"import os, time\n{before}\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"


def test_a_dropped_connection_is_made_anew(
    jupyter_server: Peer, tmp_path: Path, connections: list[socket.socket]
) -> None:
    with JupyterCodeExecutor(jupyter_server.info) as executor:
        run(executor, "n = 0")

        def cut(output: dict[str, Any]) -> None:
            if output.get("text") == "first\n":
                connections[0].shutdown(socket.SHUT_RDWR)

        code = waiting_for(tmp_path / "gate", "print('first', flush=True)") + "n += 1\n7"
        result = executor.execute(code, on_output=cut, timeout=PATIENCE)
        assert (result.status, result.kernel_state) == ("ok", "intact")
        assert result.text.startswith("first\n7")
        assert run(executor, "n").output == "1"
    assert len(connections) == 2


@pytest.fixture
def proxied(jupyter_server: Peer) -> Iterator[tuple[Proxy, JupyterConnectionInfo]]:
    """A proxy before a Jupyter server, and the way through it."""
    listener = socket.create_server(("127.0.0.1", 0))
    connect = functools.partial(socket.create_connection, ("127.0.0.1", jupyter_server.info.port))
    with contextlib.closing(Proxy(listener, connect)) as proxy:
        yield proxy, replace(jupyter_server.info, port=listener.getsockname()[1])


@pytest.mark.slow
@cases("status", "404 Not Found", "429 Too Many Requests", "503 Service Unavailable")
def test_a_proxy_that_refuses_for_a_moment_costs_no_kernel(proxied: Any, status: str, tmp_path: Path) -> None:
    proxy, info = proxied
    with JupyterCodeExecutor(info) as executor:
        run(executor, "x = 1")

        def cut(output: dict[str, Any]) -> None:
            if output.get("text") == "first\n":
                proxy.refusal = http(status, "<p>no way there</p>")
                proxy.cut()
                eventually(lambda: proxy.refused > 2, "it was refused")
                proxy.refusal = b""
                (tmp_path / "gate").touch()

        code = waiting_for(tmp_path / "gate", "print('first', flush=True)")
        result = executor.execute(code, on_output=cut, timeout=PATIENCE)
        assert (result.status, result.kernel_state) == ("ok", "intact")
        assert run(executor, "x").output == "1"


@pytest.mark.slow
@cases("stops_early", False, True)
def test_a_kernel_that_a_proxy_does_not_let_delete_is_deleted_later(
    proxied: Any, jupyter_server: Peer, stops_early: bool, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "RECONNECT_TIMEOUT", 0.5)
    proxy, info = proxied
    with jupyter_server.client() as witness:
        with RemoteJupyterServer(info) as server, JupyterCodeExecutor(server) as executor:
            run(executor, "x = 1")
            proxy.refusal = http("502 Bad Gateway", "<p>no way there</p>")
            proxy.cut()
            for _ in range(2):
                assert run(executor, "1").exit_code != 0
            if stops_early:
                executor.stop()
            proxy.refusal = b""
            if not stops_early:
                assert run(executor, "'x' in dir()").output == "False"
            assert len(witness.list_kernels()) == 1
        assert witness.list_kernels() == []


def test_the_time_to_start_counts_for_the_websocket_too(gateway: Peer, monkeypatch: MonkeyPatch) -> None:
    def note(self: Any, path: str, deadline: jupyter_exec.Deadline) -> Any:
        given.append(deadline.seconds)
        return websocket(self, path, deadline)

    given: list[float | None] = []
    websocket = jupyter_exec.RestClient.websocket
    monkeypatch.setattr(jupyter_exec.RestClient, "websocket", note)
    with gateway.client(start_timeout=123.0) as server, JupyterCodeExecutor(server):
        assert given == [123.0]


@pytest.mark.slow
def test_a_server_that_goes_away_in_mid_cell_is_reported(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    need("server", installed("kernel_gateway"))
    monkeypatch.setattr(jupyter_exec, "RECONNECT_TIMEOUT", 1.0)
    killed = threading.Event()
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(peer(tmp_path, *GATEWAY))
        executor = stack.enter_context(JupyterCodeExecutor(started.info))
        (pid,) = [pid for pid in descendants(os.getpid()) if f"port={started.info.port}" in command_line(pid)]
        kernels = descendants(pid)

        def kill(output: dict[str, Any]) -> None:
            if not killed.is_set():
                killed.set()
                os.kill(pid, signal.SIGKILL)

        result = executor.execute("print('go', flush=True)\nwhile True: pass", on_output=kill, timeout=60)
        assert (result.status, result.exit_code, result.kernel_state) == ("died", 137, "lost")
        assert "the connection to its server was lost" in result.note
        assert "Connection refused" in result.note
        assert run(executor, "1").exit_code != 0
        for kernel in kernels:  # its server cannot any more
            with contextlib.suppress(ProcessLookupError):
                os.kill(kernel, signal.SIGKILL)


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.mark.slow
@cases("code", "", "sleep(60)", "while True:\n try: sleep(1)\n except BaseException: pass")
@cases("method, path", ("DELETE", ""), ("POST", "/restart"))
def test_a_kernel_that_others_end_is_told_at_once(remote: Peer, method: str, path: str, code: str) -> None:
    with remote.client() as server, JupyterCodeExecutor(server) as executor:
        run(executor, "from time import sleep")
        (model,) = server.list_kernels()
        act = functools.partial(server.rest.request, method, f"/api/kernels/{model['id']}{path}", {})
        thread = threading.Thread(target=act)
        if not code:
            act()
        result = executor.execute(f"print('go', flush=True)\n{code}", on_output=lambda output: started(thread))
        if code:
            thread.join()
        assert (result.status, result.kernel_state) == ("died", "lost")
        assert "shut down or restarted by somebody else" in result.note
        assert run(executor, "'sleep' in dir()").output == "False"


@pytest.mark.slow
@cases("signals", (), (signal.SIGSTOP,), (signal.SIGKILL,))
def test_a_kernel_that_others_replace_between_two_cells_is_told_by_the_next(
    remote: Peer, signals: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    with remote.client() as server, JupyterCodeExecutor(server) as executor:
        pid = int(run(executor, "import os; os.getpid()").output)
        (model,) = server.list_kernels()
        for number in signals:  # a stopped kernel does not say that it shuts down
            os.kill(pid, number)
        if signal.SIGKILL not in signals:  # then the server starts it anew by itself
            server.rest.request("POST", f"/api/kernels/{model['id']}/restart", {}, timeout=PATIENCE)
        with remote.client(kernel_id=model["id"]) as guest:
            guest.start_kernel().wait_ready()
        result = run(executor, f"open({str(tmp_path / 'ran')!r}, 'w').close()")
        assert (result.exit_code, result.kernel_state) == (137, "lost")
        # Only a kernel that said nothing has to be asked, and that is by a cell.
        assert (tmp_path / "ran").exists() == (signal.SIGSTOP in signals)
        assert run(executor, "'os' in dir()").output == "False"


def started(thread: threading.Thread) -> None:
    if thread.ident is None:
        thread.start()


@pytest.mark.slow
def test_output_over_the_rate_limit_is_said_to_be_lost(gateway: Peer) -> None:
    with JupyterCodeExecutor(gateway.info) as executor:
        result = run(executor, "print('x' * 9_000_000)\nprint('end')")
        assert "Some of the output was lost" in result.output


def test_an_answer_over_the_servers_limit_ends_the_input(gateway: Peer, caplog: LogCaptureFixture) -> None:
    with JupyterCodeExecutor(gateway.info, on_input=lambda prompt, password: "#" * 11_000_000) as executor:
        result = executor.execute("x = input()", timeout=PATIENCE)
        assert result.error and result.error["ename"] == "EOFError"
        assert "What on_input returned is too long" in caplog.text


def test_code_over_the_servers_limit_is_not_sent(gateway: Peer) -> None:
    with JupyterCodeExecutor(gateway.info) as executor:
        result = run(executor, "x = 1", "#" * 11_000_000)
        assert (result.exit_code, result.kernel_state) == (1, "intact")
        assert "over the server's limit" in result.output
        assert run(executor, "x").output == "1"


@pytest.mark.slow
def test_a_cell_after_a_long_pause_works(tmp_path: Path) -> None:
    need("server", installed("jupyter_server"))
    options = ["--ServerApp.tornado_settings={'ws_ping_interval': 500, 'ws_ping_timeout': 1500}"]
    with peer(tmp_path, *SERVER, *options) as started, JupyterCodeExecutor(started.info) as executor:
        run(executor, "x = 5")
        channels: Any = executor._kernel._channels
        heard = channels._heard_at
        # The server pings each half a second, and cuts a client that has not answered for 1.5 seconds.
        eventually(lambda: channels._heard_at > heard + 4, "pings of four seconds were answered")
        assert run(executor, "x").output == "5"
        assert "ping timeout" not in started.log.read_text()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    path = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path / "key"), "-out", str(path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    return path / "cert", path / "key"


@pytest.mark.slow
def test_https_is_verified(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    need("server", installed("jupyter_server"))
    cert, key = certificate
    options = [f"--ServerApp.certfile={cert}", f"--ServerApp.keyfile={key}"]
    with peer(tmp_path, *SERVER, *options, use_https=True, ca_file=str(cert)) as started:
        with JupyterCodeExecutor(started.info, max_output=None) as executor:
            assert run(executor, "x = 6", "x * 7").output == "\n42"
            assert len(run(executor, "print('x' * 900_000)").output) == 900_001
            assert run(executor, f"len('{'y' * 8_000_000}')").output == "8000000"
        with pytest.raises(ConnectionClosed, match=r"certificate of .* is not trusted"):
            JupyterCodeExecutor(replace(started.info, ca_file=None))
        with JupyterCodeExecutor(replace(started.info, ca_file=None, verify=False)) as executor:
            assert run(executor, "1").output == "1"


@pytest.mark.slow
def test_a_client_certificate_is_presented(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    need("server", installed("jupyter_server"))
    cert, key = certificate
    options = [f"--ServerApp.certfile={cert}", f"--ServerApp.keyfile={key}", f"--ServerApp.client_ca={cert}"]
    info: dict[str, Any] = {"use_https": True, "ca_file": str(cert), "client_cert": (str(cert), str(key))}
    with peer(tmp_path, *SERVER, *options, **info) as started:
        with JupyterCodeExecutor(started.info) as executor:
            assert run(executor, "1").output == "1"
        with pytest.raises(ConnectionClosed):
            JupyterCodeExecutor(replace(started.info, client_cert=None))


@pytest.mark.slow
def test_enterprise_gateway(enterprise_gateway: Peer) -> None:
    with enterprise_gateway.client(env={"KERNEL_USERNAME": "ann"}) as server:
        with JupyterCodeExecutor(server, "python3") as executor:
            assert run(executor, "x = 6", "x * 7").output == "\n42"
            assert executor.execute("while True: pass", timeout=0.5).kernel_state == "intact"
            executor.restart()
            assert run(executor, "'x' in dir()").output == "False"


def test_enterprise_gateway_tells_why_it_refuses(enterprise_gateway: Peer) -> None:
    with enterprise_gateway.client(env={"KERNEL_USERNAME": "root"}) as server:
        with pytest.raises(ServerError, match="root") as caught:
            JupyterCodeExecutor(server)
    assert caught.value.status == 403


HUB_CONFIG = """
c.JupyterHub.bind_url = "https://127.0.0.1:{port}/"
c.JupyterHub.ssl_cert, c.JupyterHub.ssl_key = "{cert}", "{key}"  # the proxy's
c.JupyterHub.hub_port, c.ConfigurableHTTPProxy.api_url = {hub_port}, "http://127.0.0.1:{api_port}"
c.ConfigurableHTTPProxy.command = ["{home}/node_modules/.bin/configurable-http-proxy"]
c.JupyterHub.db_url = "sqlite:///:memory:"
c.JupyterHub.authenticator_class, c.Authenticator.allowed_users = "dummy", {{"ann"}}
c.JupyterHub.spawner_class = "simple"
c.Spawner.cmd, c.Spawner.args = ["{home}/bin/jupyterhub-singleuser"], ["--allow-root"]
c.JupyterHub.services = [dict(name="tests", api_token="{token}")]
c.JupyterHub.load_roles = [dict(name="tests", services=["tests"], scopes=["admin:servers", "tokens"])]
"""


@contextlib.contextmanager
def jupyterhub(tmp_path: Path, cert: Path, key: Path) -> Iterator[jupyter_exec.RestClient]:
    """Run a JupyterHub with its proxy; yields a client of its own interface, for its administrator."""
    home = os.environ.get("JUPYTER_EXEC_HUB", "")
    need("hub", os.path.exists(home))
    port, hub_port, api_port, token = free_port(), free_port(), free_port(), os.urandom(16).hex()
    config, log = tmp_path / "jupyterhub_config.py", tmp_path / "hub.log"
    config.write_text(HUB_CONFIG.format(**locals()))
    command = [f"{home}/bin/jupyterhub", "--config", str(config)]
    rest = jupyter_exec.RestClient(JupyterConnectionInfo("127.0.0.1", True, port, token, "/hub/api", ca_file=str(cert)))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, start_new_session=True)
    family: set[int] = set()

    def is_up() -> bool:
        family.update(descendants(process.pid))
        with contextlib.suppress(JupyterExecError):
            return bool(rest.request("GET", "/users/ann"))
        assert process.poll() is None, log.read_text()
        return False

    try:
        eventually(is_up, "the hub answers")
        yield rest
    finally:
        family |= descendants(process.pid)
        process.terminate()  # it ends its proxy and its servers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        for pid in {process.pid, *family} & {process.pid, *descendants(os.getpid())}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE)


@pytest.mark.slow
def test_a_jupyterhub_behind_its_proxy_with_tls(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    with jupyterhub(tmp_path, *certificate) as hub:
        server = "/users/ann/server"
        hub.request("POST", server, timeout=PATIENCE)
        eventually(lambda: hub.request("GET", "/users/ann")["servers"][""]["ready"], "the server runs")
        token = hub.request("POST", "/users/ann/tokens", {})["token"]
        info = replace(hub.info, token=token, base_url="/user/ann/")
        with pytest.raises(ServerError, match="token is missing or wrong"):
            JupyterCodeExecutor(replace(info, token="wrong"))
        with JupyterCodeExecutor(info) as executor:
            assert run(executor, "x = 6", "x * 7").output == "\n42"

            def cut(output: dict[str, Any]) -> None:
                channels: Any = executor._kernel._channels
                if output.get("text") == "first\n":
                    channels._socket.raw.shutdown(socket.SHUT_RDWR)

            code = "import time\nprint('first', flush=True)\ntime.sleep(1)\nprint('last')"
            result = executor.execute(code, timeout=PATIENCE, on_output=cut)
            assert (result.status, result.kernel_state) == ("ok", "intact")
            assert result.text.startswith("first\nlast\n")
            assert "connection was lost for a moment" in result.note
            stopping = threading.Thread(target=hub.request, args=("DELETE", server), kwargs={"timeout": PATIENCE})

            def stop(output: dict[str, Any]) -> None:
                stopping.start()

            result = executor.execute("print('go', flush=True)\nwhile True: pass", timeout=60, on_output=stop)
            stopping.join()
            assert (result.status, result.kernel_state) == ("died", "lost")
            for _ in range(2):
                assert "server behind this JupyterHub does not run" in run(executor, "1").output


@pytest.mark.slow
def test_any_object_with_connection_info_is_a_server(gateway: Peer) -> None:
    info = {name: getattr(gateway.info, name) for name in ("host", "use_https", "port", "token")}
    with JupyterCodeExecutor(types.SimpleNamespace(connection_info=types.SimpleNamespace(**info))) as executor:
        assert run(executor, "1").output == "1"


def test_wrong_token_unknown_kernel_and_forbidden_list_are_said(remote: Peer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="token is missing or wrong"):
        JupyterCodeExecutor(replace(remote.info, token="wrong"))
    with pytest.raises(ValueError, match="Kernel nope is not installed"):
        JupyterCodeExecutor(remote.info, "nope")
    with pytest.raises(ConnectionClosed, match="Cannot connect"):
        JupyterCodeExecutor(replace(remote.info, port=free_port()))


@pytest.mark.slow
def test_a_jupyter_server_without_a_token(tmp_path: Path) -> None:
    need("server", installed("jupyter_server"))
    with peer(tmp_path, *SERVER, "--IdentityProvider.token=", token="") as started:
        with JupyterCodeExecutor(started.info) as executor:
            assert run(executor, "6 * 7").output == "42"


@cases("names", {"ca_file": "/none/ca.pem"}, {"client_cert": ("/none/cert.pem", "/none/key.pem")}, ids=str)
def test_certificates_that_are_not_there_are_named(names: dict[str, Any]) -> None:
    with pytest.raises(JupyterExecError, match=r"certificates in /none/.*\.pem cannot be read: No such file"):
        JupyterCodeExecutor(JupyterConnectionInfo("127.0.0.1", True, 9, None, **names))


@pytest.mark.slow
def test_listing_kernels_may_be_forbidden(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    with peer(tmp_path, "kernelgateway") as started, started.client() as server:
        with pytest.raises(ServerError) as caught:
            server.list_kernels()
        assert caught.value.status == 403
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "1").output == "1"


@contextlib.contextmanager
def fake_server(answer: bytes, drip: Iterable[bytes] = ()) -> Iterator[JupyterConnectionInfo]:
    """A server that sends `answer` to each connection, then one piece of `drip` after the other, and waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stopping = threading.Event()

        def serve() -> None:
            listener.settimeout(0.05)
            clients = []
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    clients.append(listener.accept()[0])
                    clients[-1].settimeout(PATIENCE)
                    with contextlib.suppress(ConnectionError):
                        clients[-1].sendall(answer)
                        for piece in drip:
                            if stopping.wait(0.01):
                                break
                            clients[-1].sendall(piece)
            for client in clients:
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield JupyterConnectionInfo("127.0.0.1", False, listener.getsockname()[1], "s3cret-t0ken")
        stopping.set()
        thread.join()


def http(status: str, body: str, kind: str = "text/html", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more, "", body]
    return "\r\n".join(lines).encode()


@cases(
    "answer, says",
    (http("200 OK", "<html>Please log in</html>"), "no Jupyter server: it sends text/html"),
    (http("302 Found", "", "text/html", "Location: /hub/login"), "redirects elsewhere"),
    (http("500 Oops", '{"message": "it broke", "reason": null}', "application/json"), "500.*it broke"),
    (http("200 OK", "[1]", "application/json"), "no Jupyter server"),
    (http("200 OK", "[" * 100_000, "application/json"), "no Jupyter server"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "broke the connection"),
    (http("302 Found", "", "text/html", "Location: /hub/user/ann/api/kernelspecs"), "JupyterHub does not run"),
    (http("424 Failed Dependency", "{}"), "424 .* on a JupyterHub, start the server there"),
    (http("503 Service Unavailable", "<h1>Proxy</h1> error"), "start the server there. Proxy error"),
    (http("401 No", "Authorization: token s3cret-t0ken"), r"token is missing or wrong. Authorization: token \*\*\*"),
    (http("401 No", '{"message": "\\u00733cret-t0ken\\u001b[2J"}'), r"wrong. \*\*\* \[2J"),
    (http("401 No", "x" * 9_995 + "s3cret-t0ken"), "401"),
    (http("200 OK", "", "s3cret-t0ken"), "no Jupyter server"),
    (http("200 OK", "x", "s3cret-t0ken"), r"it sends \*\*\*"),
    (b"HTTP/1.1 s3cret-t0ken x\r\n\r\n", r"BadStatusLine: HTTP/1.1 \*\*\* x"),
    (http("200 OK", '{"kernelspecs": {"s3cret-t0ken": {"spec": {}}}}'), r"Available: \*\*\*"),
    (http("20000 OK", "{}"), "BadStatusLine"),
    (http(f"{'9' * 5000} OK", "{}"), "BadStatusLine"),
    (http("103 Early Hints", "{}"), "answered 103"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 200_000, "over the limit of 4194304 bytes|100 interim responses|No answer"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20, "more than 65536 bytes"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200, "more than 100 headers"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 12 + b"\r\n\r\n" + bytes(5_000_000), "over the limit"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n" + bytes(5_000_000), "over the limit"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "No answer"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + bytes(5_000_000), "broke the connection"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n" + bytes(5_000_000), "limit"),
    (b"", "No answer to GET .* within 0.5 s"),
)
def test_what_is_no_jupyter_server_is_told(answer: bytes, says: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec.RestClient.request, "__kwdefaults__", {"timeout": 0.5})
    with fake_server(answer) as info, pytest.raises(JupyterExecError) as caught:
        JupyterCodeExecutor(info)
    assert re.search(says, str(caught.value))
    assert not any("s3cret" in text for text in (str(caught.value), repr(vars(caught.value)), repr(caught.value)))
    assert str(caught.value).isprintable()


@contextlib.contextmanager
def scripted_server(*replies: bytes) -> Iterator[RemoteJupyterServer]:
    """A client each of whose connections has got the next of `replies`, and its end, when it is made."""
    left, far_ends = iter(replies), []

    def dial(self: Any, deadline: Any) -> socket.socket:
        near, far = socket.socketpair()
        far_ends.append(far)
        far.sendall(next(left, b""))
        far.shutdown(socket.SHUT_WR)
        return near

    with MonkeyPatch.context() as patch:
        patch.setattr(jupyter_exec.RestClient, "_dial", dial)
        with RemoteJupyterServer(JupyterConnectionInfo("x", False, 1, "s3cret-t0ken")) as server:
            yield server
    for far in far_ends:
        far.close()


SPECS = http("200 OK", '{"kernelspecs": {"python3": {"spec": {}}}}', "application/json", "Connection: close")
BAD_IDS: list[Any] = [5, None, ["x"], "", "..", "a/b", "\u00e9", "\u4e2d", "x\r\nX: y", "s3cret-t0ken", "s3cret-t0ken/"]
BAD_MODELS: list[Any] = [{}, [], 5, None, "x", *({"id": value} for value in BAD_IDS)]
BAD_KERNELSPECS: list[Any] = [None, 5, [], {"python3": 5}, {"python3": {}}, {"python3": {"spec": [1]}}]
BAD_KERNELSPECS += [{"python3\x1b": {"spec": {}}}]
BAD_SPECS: list[Any] = [{}, [], 5, None, *({"kernelspecs": value} for value in BAD_KERNELSPECS)]
BAD_LISTS: list[Any] = [5, "abc", {}, [1], None]


@cases(
    "replies, use",
    *(([SPECS, http("201 Created", json.dumps(model))], "start_kernel") for model in BAD_MODELS),
    *(([http("200 OK", json.dumps(specs))], "start_kernel") for specs in BAD_SPECS),
    *(([http("200 OK", json.dumps(models))], "list_kernels") for models in BAD_LISTS),
    *(
        ([SPECS, http("201 OK", '{"id": "x"}'), answer], "start_kernel")
        for answer in (
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nTransfer-Encoding: chunked\r\n\r\n",
            http("200 OK", "{}"),
            http("403 No", "s3cret-t0ken"),
        )
    ),
)
def test_answers_of_wrong_shapes_are_our_errors(replies: list[bytes], use: str) -> None:
    with scripted_server(*replies) as server, pytest.raises(JupyterExecError) as caught:
        getattr(server, use)()
    assert "s3cret" not in str(caught.value) + repr(vars(caught.value))
    assert str(caught.value).isprintable()


@cases("kernel, refusals", ("x", 2), (None, 1))  # restart, delete; or start
def test_a_hub_whose_server_was_stopped_is_told_at_the_next_start(kernel: str | None, refusals: int) -> None:
    # A Hub refuses the POST for another reason: only a GET tells.
    refused, moved = http("403 No", "xsrf"), http("302 Found", "", "x", "Location: /hub/user/ann/api/kernelspecs")
    with scripted_server(*[refused] * refusals, moved) as server:
        control = jupyter_exec.RemoteKernelControl(server, "python3", None)
        control._id = kernel
        with pytest.raises(ServerError, match="JupyterHub does not run") as caught:
            control.start(jupyter_exec.Mailbox())
    assert caught.value.method == "GET"


status_lines = st.binary(max_size=20) | st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 101 x", b"HTTP/1.0 302 x"])
headers_of = st.sampled_from([b"Content-Length: ", b"Transfer-Encoding: ", b"Location: ", b"Connection: ", b"", b" "])
header_values = st.binary(max_size=9) | st.sampled_from(
    [b"5", b"-1", b"chunked", b"/hub/user/", b"keep-alive", b"5, 5"]
)
header_lines = st.lists(st.tuples(headers_of, header_values).map(b"".join), max_size=4)
bodies = st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode())
replies_of_servers = st.tuples(status_lines, header_lines, bodies).map(
    lambda parts: b"\r\n".join((parts[0], *parts[1], b"", parts[2]))
)


@given(replies_of_servers, st.sampled_from(["kernelspecs", "list_kernels", "start_kernel", "channels"]))
def test_no_answer_raises_anything_else(reply: bytes, use: str) -> None:
    replies = [SPECS] * (use in ("start_kernel", "channels")) + [http("201 OK", '{"id": "x"}')] * (use == "channels")
    with scripted_server(*replies, reply) as server, contextlib.suppress(JupyterExecError):
        getattr(server, use if use != "channels" else "start_kernel")()


@pytest.mark.slow
def test_a_server_that_pings_and_does_not_read_costs_no_memory_and_is_dropped(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 1.0)
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def dial(deadline: Any) -> tuple[socket.socket, None]:
        pairs.append(socket.socketpair())
        pairs[-1][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return pairs[-1][0], None

    loop, mailbox = jupyter_exec.Loop(), jupyter_exec.Mailbox()
    loop.start("test")
    deadline = jupyter_exec.Deadline(PATIENCE)
    channels: Any = jupyter_exec.WebSocketChannels(loop, dial, mailbox, lambda: False, deadline)
    pairs[0][1].settimeout(PATIENCE)
    pairs[0][1].sendall(frame(9, b"x" * 125) * 100_000)  # 13 MB
    assert 0 < len(channels._pipe._unsent) + channels._pipe.waiting[""] < 1000
    eventually(lambda: len(pairs) == 2, "it was dropped, and called again")
    assert isinstance(mailbox.get(PATIENCE), jupyter_exec.Reconnected)
    pairs[1][1].sendall(frame(9, b"last"))
    assert read_by_judge(pairs[1][1].recv(100)) == [(Opcode.PONG, b"last")]
    channels.close()
    loop.stop()
    for near, far in pairs:
        near.close()
        far.close()


@cases("base_url", "user/ann", "/user/ann", "/user/ann/")
def test_slashes_around_a_base_url_do_not_matter(base_url: str) -> None:
    assert JupyterConnectionInfo("hub", True, base_url=base_url).url == "https://hub/user/ann"
    assert JupyterConnectionInfo("::1", False, 8888).url == "http://[::1]:8888"


@cases("host", "http://example.com", "example.com/path", "a b", "")
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="host must be a name or an address"):
        RemoteJupyterServer(JupyterConnectionInfo(host, True))


def test_the_token_is_nowhere_in_sight(
    gateway: Peer, caplog: LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    token = gateway.info.token or ""
    with JupyterCodeExecutor(gateway.info) as executor:
        run(executor, "1")
        texts = [repr(gateway.info), str(gateway.info), gateway.info.url, repr(executor), repr(vars(executor))]
        texts += [caplog.text, gateway.log.read_text(), *capfd.readouterr(), *map(command_line, [os.getpid()])]
    for text in texts:
        assert token not in text


@pytest.mark.slow
def test_a_local_gateway_serves_others_and_goes_with_its_server(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    log = tmp_path / "gateway.log"
    with LocalJupyterServer(token="my$token", log_file=log, cwd=tmp_path) as server:
        (tmp_path / "signal.py").write_text("raise SystemExit('shadowed')")
        client = RemoteJupyterServer(server.connection_info)
        with JupyterCodeExecutor(server, max_output=None) as executor, client as other:
            assert run(executor, "6 * 7").output == "42"
            assert len(other.list_kernels()) == 1
            assert (server.ip, server.token) == ("127.0.0.1", "my$token")
            assert server.get_client().list_kernels() == other.list_kernels()
            assert not any("my$token" in command_line(pid) for pid in descendants(os.getpid()))
            assert len(run(executor, "print('x' * 9_000_000)").output) == 9_000_001
    assert "Kernel started" in log.read_text()
    with pytest.raises(ConnectionClosed, match="stopped"):
        server.get_client()


@pytest.mark.slow
def test_a_local_gateway_dies_with_a_killed_client(marker: str) -> None:
    need("server", installed("kernel_gateway"))
    program = """
        import sys, time, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(transport="gateway", env={"MARK": sys.argv[1]})
        assert jupyter_exec.JupyterCodeExecutor(server).execute("1").status == "ok"
        print("ready", flush=True)
        time.sleep(60)
    """
    with client_program(program, marker):
        assert marked_processes(f"MARK={marker}")


@pytest.mark.slow
def test_a_gateway_whose_port_is_taken_is_reported(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        with LocalJupyterServer(port=port) as first:
            first.get_client()
            with LocalJupyterServer(port=port) as second, pytest.raises(JupyterExecError) as caught:
                second.get_client()
    assert "already in use" in str(caught.value) or "token is missing or wrong" in str(caught.value)


@pytest.mark.slow
def test_a_token_is_not_sent_to_a_faster_listener(monkeypatch: MonkeyPatch) -> None:
    need("server", installed("kernel_gateway"))
    port, call, thieves = free_port(), jupyter_exec.HostLink.call, []

    def steal(self: Any, op: str, **arguments: Any) -> Any:
        if op == "spawn":
            thieves.append(socket.create_server(("127.0.0.1", port)))
            thieves[0].setblocking(False)
        return call(self, op, **arguments)

    monkeypatch.setattr(jupyter_exec.HostLink, "call", steal)
    with LocalJupyterServer(port=port) as server, pytest.raises(KernelStartFailed, match=f"is port {port} .* in use"):
        server.get_client()
    with thieves[0], pytest.raises(BlockingIOError):
        thieves[0].accept()


@pytest.mark.slow
def test_on_windows_remote_servers_work_and_the_others_say_what_to_use(gateway: Peer, tmp_path: Path) -> None:
    # The module in a Python that lacks what Python on Windows lacks; the rest of the standard library is as it is here.
    on_windows = """
        import os, signal, socket, sys, types
        import jupyter_exec  # and with it all that it imports
        del sys.modules["jupyter_exec"]
        real = {"os": os, "signal": signal, "socket": socket}
        for name, module in real.items():
            sys.modules[name] = copy = types.ModuleType(name)
            vars(copy).update({key: value for key, value in vars(module).items() if key not in sys.argv[1].split()})
        sys.modules["os"].name, sys.modules["os"].supports_dir_fd = "nt", set()
        import jupyter_exec
        sys.modules.update(real)
        del os.environ["DOCKER_HOST"]
        from jupyter_exec import *

        servers = LocalJupyterServer, lambda: CommandJupyterServer(["ssh"]), lambda: DockerJupyterServer().kernelspecs()
        for make in servers:
            try:
                make()
            except JupyterExecError as error:
                print(error)
        info = JupyterConnectionInfo("127.0.0.1", False, int(sys.argv[2]), sys.argv[3])
        with RemoteJupyterServer(info) as server, JupyterCodeExecutor(server, output_dir=sys.argv[4]) as executor:
            picture = "from IPython.display import Image; Image(data=b'GIF89a', format='gif')"
            result = executor.execute_code_blocks([CodeBlock("print(6 * 7)"), CodeBlock(picture)])
            print(result.exit_code, result.output[:2], [os.stat(path).st_size for path in result.output_files])
            print(executor.execute("while True: pass", timeout=0.5).note)
            executor.save_notebook(sys.argv[4] + "/session.ipynb")
    """
    info, guarded = gateway.info, {"TCP_QUICKACK", "register_at_fork", "O_NOFOLLOW", "O_PATH"}
    lacks = " ".join({*missing_on_windows().values()} | guarded)
    result = run_python(
        on_windows,
        lacks,
        str(info.port),
        info.token or "",
        str(tmp_path),
        env=environment(DOCKER_HOST=""),
        cwd=tmp_path,
    )
    local, command, docker, *cells = result.stdout.splitlines()
    assert result.stderr == ""
    assert local.startswith("LocalJupyterServer does not work on Windows: use WSL, DockerJupyterServer")
    assert command.startswith("CommandJupyterServer does not work on Windows: use WSL")
    assert "reached over TCP" in docker
    timeout = "Timeout: interrupted after 0.5 s; variables are kept; it was at line 1: while True: pass"
    assert cells == ["0 42 [6]", timeout]
    assert (tmp_path / "session.ipynb").exists()


def test_a_direct_server_has_no_connection_info() -> None:
    for name in ("connection_info", "ip", "port", "token", "get_client"):
        with pytest.raises(AttributeError, match='transport="gateway"'):
            getattr(LocalJupyterServer(), name)()


@pytest.mark.slow
def test_a_docker_gateway_may_be_left_running(containers: Any) -> None:
    with docker_server(network=None, token="t0ken", stop_container=False, container_name=f"{RUN}-left") as server:
        with JupyterCodeExecutor(server) as executor, RemoteJupyterServer(server.connection_info) as other:
            assert run(executor, "6 * 7").output == "42"
            assert len(other.list_kernels()) == 1
        (container,) = containers()
        assert container.ports["8888/tcp"][0]["HostIp"] == "127.0.0.1"
        assert container.attrs["Config"]["User"] == "1000:1000"
        info = server.connection_info
    with JupyterCodeExecutor(info) as executor:
        assert run(executor, "1").output == "1"
    container.remove(force=True)


@pytest.mark.slow
@cases("kind", "local", "docker")
def test_a_gateway_that_has_ended_is_replaced(request: FixtureRequest, monkeypatch: MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(jupyter_exec, "RECONNECT_TIMEOUT", 1.0)
    if kind == "docker":
        ours = request.getfixturevalue("containers")
        server: Any = docker_server(network=None, transport="gateway", container_name=f"{RUN}-ends")
    else:
        need("server", installed("kernel_gateway"))
        server = LocalJupyterServer(transport="gateway")

    def end(output: Any) -> None:
        if kind == "docker":
            ours()[0].kill()
        else:
            server._link.call("kill", kernel="gateway")

    with server, JupyterCodeExecutor(server) as executor:
        assert executor.execute(FOR_EVER, on_output=end, timeout=PATIENCE).status == "died"
        assert run(executor, "6 * 7").output == "42"
        with JupyterCodeExecutor(server) as second:
            assert run(second, "6 * 7").output == "42"
        assert run(executor, "1").output == "1"


@pytest.mark.slow
def test_a_gateway_container_that_does_not_answer_in_time_is_reported(
    containers: Any, image: Callable[[str], str]
) -> None:
    name = image('FROM BUNDLED\nCMD ["sh", "-c", "echo asleep; exec sleep 1000"]')
    with docker_server(custom_image_name=name, network=None, transport="gateway", start_timeout=0.5) as server:
        with pytest.raises(SandboxError, match=r"does not answer on port 8888 within 0\.5 s") as caught:
            server.get_client()
    assert (caught.value.image, "asleep" in str(caught.value)) == (name, True)


def test_a_local_gateway_that_is_late_is_reported() -> None:
    need("server", installed("kernel_gateway"))
    with LocalJupyterServer(transport="gateway", start_timeout=0.2) as server:
        with pytest.raises(KernelStartFailed, match=r"within 0\.2 s"):
            server.get_client()


@pytest.mark.slow
def test_a_gateway_container_of_a_dead_process_is_removed_at_the_next_start(containers: Any) -> None:
    program = """
        import os, sys, jupyter_exec
        server = jupyter_exec.DockerJupyterServer(base_image=sys.argv[1] or None, labels={sys.argv[2]: ""}, transport="gateway")
        server.connection_info
        os.kill(os.getpid(), 9)
    """
    run_python(program, os.environ.get("BASE_IMAGE", ""), RUN)
    (forsaken,) = containers()
    with docker_server(network=None, transport="gateway") as server:
        server.get_client()
        assert [container.id for container in containers()] != [forsaken.id]
        assert len(containers()) == 1


@pytest.mark.slow
def test_a_forked_child_that_exits_leaves_the_gateway_of_its_parent(containers: Any) -> None:
    program = """
        import os, sys, jupyter_exec
        with jupyter_exec.DockerJupyterServer(base_image=sys.argv[1] or None, transport="gateway") as server:
            for leave in (sys.exit, server.stop):
                assert server.kernelspecs()
                if not os.fork():
                    leave()
                    sys.exit()
                os.wait()
                assert server.kernelspecs()
                server._container.reload()
    """
    result = run_python(program, os.environ.get("BASE_IMAGE", ""))
    assert result.returncode == 0, result.stderr


# Commands


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[list[str]]:
    """A real sshd on loopback; returns the ssh command that reaches it."""
    need("ssh", os.path.exists("/usr/sbin/sshd") and shutil.which("ssh"))
    port = free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "user.pub").rename(tmp_path / "authorized")
    settings = f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nStrictModes no\nUsePAM no\n"
    settings += f"AuthorizedKeysFile {tmp_path}/authorized\nPidFile {tmp_path}/pid\nPermitRootLogin yes\n"
    (tmp_path / "config").write_text(settings)
    Path("/run/sshd").mkdir(exist_ok=True)
    ssh = ["ssh", "-q", "-p", str(port), "-i", str(tmp_path / "user"), "-o", "StrictHostKeyChecking=no"]
    daemon_command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "config")]
    with subprocess.Popen(daemon_command, stderr=subprocess.PIPE) as daemon:
        assert daemon.stderr
        assert b"listening" in daemon.stderr.readline()
        yield [*ssh, "-o", f"UserKnownHostsFile={tmp_path}/known", "127.0.0.1"]
        daemon.terminate()


def test_a_request_without_an_end_waits_for_its_answer() -> None:
    answer = [bytes([byte]) for byte in http("200 OK", "[5]", "application/json")]
    with fake_server(b"", drip=answer) as info:
        assert jupyter_exec.RestClient(info).request("GET", "/api", timeout=float("inf")) == [5]


def test_a_server_that_drips_its_answer_is_given_up_in_time() -> None:
    with fake_server(b"HTTP/1.1 200 OK\r\nX: ", drip=itertools.repeat(b"x")) as info:
        with pytest.raises(ExecutionTimeout, match=r"No answer to GET .* within 0.5 s"):
            jupyter_exec.RestClient(info).request("GET", "/api", timeout=0.5)


@pytest.fixture
def slow_link(tmp_path: Path) -> Callable[[str], CommandJupyterServer]:
    """A function that makes a server behind a link of so many bytes a second."""
    slow_link = textwrap.dedent("""
        import os, subprocess, sys, threading, time
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        def copy(source, target, rate):
            while data := os.read(source, 65536):
                time.sleep(len(data) / rate)
                while data:
                    data = data[os.write(target, data):]
            os.close(target)
        threading.Thread(target=copy, args=(0, process.stdin.fileno(), 1e12), daemon=True).start()
        copy(process.stdout.fileno(), 1, float(os.environ["RATE"]))
    """)
    (tmp_path / "link.py").write_text(slow_link)
    argv = [sys.executable, str(tmp_path / "link.py"), sys.executable]
    return lambda rate: CommandJupyterServer(argv, env={"RATE": rate})


@pytest.mark.slow
def test_output_on_a_slow_link_keeps_no_kernel_from_starting(slow_link: Any, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 3.0)
    printing = threading.Event()
    with slow_link("5e6") as server, JupyterCodeExecutor(server) as one, ThreadPoolExecutor(1) as pool:
        code = "import sys\nfor _ in range(300_000): sys.stdout.write('x' * 99 + chr(10))"
        cell = pool.submit(one.execute, code, on_output=lambda output: printing.set())
        assert printing.wait(PATIENCE)
        with JupyterCodeExecutor(server) as two:
            assert not cell.done()
            assert run(two, "1").output == "1"
        assert cell.result().status == "ok"


@pytest.mark.slow
@cases("end", "", "os._exit(3)", "1 / 0")
def test_a_flood_over_a_slow_link_is_bounded_and_its_cell_ends_in_time(end: str, slow_link: Any) -> None:
    flood = "while True: print('x' * 1000)" if not end else "for _ in range(20_000): print('x' * 1000)"
    with slow_link("1e6") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "x = 5; import os").exit_code == 0
        started = time.monotonic()
        result = executor.execute(f"{flood}\n{end}", timeout=4)
        assert time.monotonic() - started < 4 + jupyter_exec.INTERRUPT_GRACE
        assert result.kernel_state == ("lost" if "exit" in end else "intact")
        assert "exit" in end or run(executor, "x").output == "5"


@pytest.mark.slow
def test_what_a_slow_link_loses_is_said(slow_link: Any, monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "RELAY_LIMIT = 64 * 2**20", "RELAY_LIMIT = 10**6")
    with slow_link("5e6") as server, JupyterCodeExecutor(server) as executor:
        result = executor.execute("for _ in range(100): print('x' * 10**5, flush=True)\n1 / 0")
        assert result.error and result.error["ename"] == "ZeroDivisionError"
        assert "lost" in result.note
        assert "lost" not in executor.execute("print('y' * 1000)").note


@pytest.mark.slow
@cases("hidden", "input", "getpass")
def test_an_interrupt_on_a_slow_link_costs_no_other_kernel(slow_link: Any, hidden: str) -> None:
    chatter = "while True: print('y' * 1000); time.sleep(0.02)"
    code = f"import getpass, threading, time\ndef chat():\n    {chatter}\nthreading.Thread(target=chat, daemon=True).start()\n"
    code += f"time.sleep(0.1)\n{'input' if hidden == 'input' else 'getpass.getpass'}('x' * 1_400_000)"
    with slow_link("2e5") as server, JupyterCodeExecutor(server) as one, JupyterCodeExecutor(server) as two:
        run(two, "kept = 1")
        one.execute(code, timeout=3, on_input=lambda prompt, password: "")
        assert run(two, "kept").output == "1"


@pytest.mark.slow
def test_a_message_over_all_limits_costs_no_other_kernel(monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "MAX_MESSAGE = 512 * 2**20", "MAX_MESSAGE = 4 * 2**20")
    code = "kernel = get_ipython().kernel\nbuffers = [b'x' * 2**21] * 2\n"
    code += "kernel.session.send(kernel.iopub_socket, 'comm_msg', {}, kernel.get_parent(), buffers=buffers)"
    with CommandJupyterServer([sys.executable]) as server:
        with JupyterCodeExecutor(server) as one, JupyterCodeExecutor(server) as two:
            run(two, "kept = 1")
            assert "lost" in one.execute(code).note
            assert run(two, "kept").output == "1"


@pytest.mark.slow
def test_a_flood_on_a_slow_link_costs_no_other_kernel_its_output(slow_link: Any, monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "RELAY_LIMIT = 64 * 2**20", "RELAY_LIMIT = 10**6")
    printing = threading.Event()
    with slow_link("5e6") as server, JupyterCodeExecutor(server) as one, JupyterCodeExecutor(server) as two:
        assert run(two, "1").output == "1"
        with ThreadPoolExecutor(1) as pool:
            code = "for _ in range(300): print('x' * 10**5, flush=True)"
            cell = pool.submit(one.execute, code, on_output=lambda output: printing.set())
            assert printing.wait(PATIENCE)
            for _ in range(3):
                result = two.execute("print('y')")
                assert (result.text, result.note) == ("y\n", "")
            assert "lost" in cell.result().note


def test_each_cell_that_loses_output_on_its_way_says_so(monkeypatch: MonkeyPatch) -> None:
    patch_host(monkeypatch, "RELAY_LIMIT = 64 * 2**20", "RELAY_LIMIT = -1")
    with CommandJupyterServer([sys.executable]) as server, JupyterCodeExecutor(server) as executor:
        for _ in range(2):
            assert "lost" in executor.execute("print('y' * 10**6)").note


@pytest.mark.slow
def test_kernels_through_ssh(sshd: list[str]) -> None:
    with CommandJupyterServer([*sshd, sys.executable]) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "x = 6", "x * 7").output == "\n42"
        assert executor.execute("while True: pass", timeout=0.5).kernel_state == "intact"
        assert run(executor, "'SSH_CONNECTION' in __import__('os').environ").output == "True"


def test_ssh_that_refuses_is_reported(sshd: list[str]) -> None:
    with CommandJupyterServer([*sshd, "/no/such/python3"]) as server:
        with pytest.raises(KernelStartFailed, match=r"(?s)^(?=.*/no/such/python3).*exit code 127"):
            JupyterCodeExecutor(server)


# ======================================================================================================
# 10. Code executor
# ======================================================================================================


def test_the_example_prints_exactly_this(executor: JupyterCodeExecutor) -> None:
    result = executor.execute_code_blocks([CodeBlock(language="python", code="print('Hello, World!')")])
    assert str(result) == "exit_code=0 output='Hello, World!\\n' output_files=[]"
    assert str(executor.execute_code_blocks([])) == "exit_code=0 output='' output_files=[]"
    assert executor.execute_code_blocks("6 * 7").output == "42"
    assert executor.execute_code_blocks(CodeBlock("6 * 7")).output == "42"
    with pytest.raises(TypeError, match="code_blocks must be"):
        executor.execute_code_blocks(["6 * 7"])


SHOW = "from IPython.display import display, update_display, Markdown\ndisplay('one', display_id='d')"


@cases("codes, output", (["x = 1", "x += 1"], "\n"),
        (["def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)", "fibonacci(14)"], "\n377"),
        (["import sys\nprint('o', flush=True)\nprint('e', file=sys.stderr, flush=True)\ndisplay('d')\n'r'"], "o\ne\n'd'\n'r'"),
        (["for i in range(5): print(f'\\r{i * 25}%', end='', flush=True); __import__('time').sleep(0.05)\nprint(' done')"], "100% done\n"),
        ([f"{SHOW}\nupdate_display('two', display_id='d')", "update_display('three', display_id='d')"], "'two'\n'three'"),
        (["print('\ud83d\ude00', ord('\ud83d') == 0xFFFD)", "1"], "😀 True\n\n1"))  # fmt: skip
def test_the_text_of_blocks(executor: JupyterCodeExecutor, codes: list[str], output: str) -> None:
    assert run(executor, *codes).output == output


def test_an_error_costs_only_the_failing_block(executor: JupyterCodeExecutor) -> None:
    result = run(executor, "a = 1\nprint('first')", "print('second')\nb = 1 / 0", "c = 3")
    assert result.exit_code == 1
    assert result.output.startswith("first\n\nsecond\nZeroDivisionError: division by zero\n")
    assert "\x1b" not in result.output
    assert run(executor, "a, 'b' in dir(), 'c' in dir()").output == "(1, False, False)"


def test_pictures_and_html_become_files_named_in_the_text(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    result = run(
        executor,
        f"from IPython.display import *\nimport base64\ndisplay(Image(base64.b64decode('{png}'), format='png'))",
        "print('before')\ndisplay(HTML('<b>ü</b>'))\nprint('after')",
        "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()",
    )
    picture, page, plot = result.output_files
    saved = [f"Image data saved to {picture}", f"before\nHTML data saved to {page}\nafter\n"]
    assert result.output == "\n".join([*saved, f"Image data saved to {plot}"])
    assert Path(picture).read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert Path(page).read_text(encoding="utf-8") == "<b>ü</b>"
    assert [Path(path).suffix for path in result.output_files] == [".png", ".html", ".png"]
    assert {Path(path).parent for path in result.output_files} == {tmp_path}


def test_a_vanished_output_directory_costs_only_the_file(server: LocalJupyterServer, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    with JupyterCodeExecutor(server, output_dir=output_dir) as executor:
        output_dir.rmdir()
        result = run(executor, "from IPython.display import *\ndisplay(HTML('<b>'))\nprint('after')")
    assert result.exit_code == 0
    assert "could not be saved" in result.output
    assert result.output.endswith("after\n")


@cases(
    "code",
    "while True: pass",
    "import time; time.sleep(60)",
    "import asyncio; await asyncio.sleep(60)",
    "import subprocess; subprocess.run(['sleep', '60'])",
    "!sleep 60",
    "while True: print('x')",
    *(
        pytest.param(code, marks=pytest.mark.slow)
        for code in (
            "import os\nif os.fork() == 0:\n    import time; time.sleep(60); os._exit(0)\nos.wait()",
            "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('caught')",
            "import subprocess; subprocess.run('sleep 60 & sleep 60', shell=True)",
            "import os; os.system('sleep 60')",  # which ignores SIGINT itself: the sleeping process must get it
            "import threading; threading.Event().wait()",
        )
    ),
)
def test_timeout_interrupts_and_keeps_the_variables(executor: JupyterCodeExecutor, code: str) -> None:
    run(executor, "x = 5")
    result = executor.execute("print('before', flush=True)\n" + code, timeout=0.5)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "intact")
    assert result.text.startswith("before\n")
    place = f"; it was at line 2: {code}" if code[0] != "!" else ""  # IPython keeps this interrupt to itself
    told = result.text.endswith(f"Timeout: interrupted after 0.5 s; variables are kept{place}")
    assert told or "\n" in code or "os.system" in code
    assert run(executor, "x").output == "5"


@cases("code, place", ("import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass", r"3: try: time\.sleep\(60\)"),
        # Told by faulthandler, though C code holds the GIL.
        ("import ctypes, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\nlibc = ctypes.PyDLL(None)\nwhile True:\n    libc.sleep(60)", r"5: libc\.sleep\(60\)"))  # fmt: skip
def test_code_that_ignores_interrupts_is_killed(
    executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch, code: str, place: str
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    run(executor, "x = 5")
    result = executor.execute(code, timeout=0.5)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "lost")
    said = f"the kernel was killed and restarted; all variables are lost; it was at line {place}$"
    assert re.search(said, result.note)
    assert run(executor, "'x' in dir()").output == "False"


@cases(
    "code, exit_code, says",
    ("os.kill(os.getpid(), 11)", 139, r"The kernel died \(.*SIGSEGV.*all variables are lost"),
    ("os.kill(os.getpid(), 9)", 137, r"The kernel died \(.*SIGKILL.*all variables are lost"),
    ("os._exit(3)", 1, r"The kernel died \(.*exit code 3.*all variables are lost"),
    ("os._exit(0)", 1, r"The kernel died \(.*exit code 0.*all variables are lost"),
    ("exit()", 0, "the session was ended by the code$"),
    ("exit(3)", 3, "the session was ended by the code"),
    ("quit(0)", 0, "the session was ended by the code"),
    ("exit(-1)", 255, "the session was ended by the code"),
    ("exit('no data')", 1, "the session was ended by the code: no data$"),
)
def test_death_is_told_and_the_next_kernel_fresh(
    executor: JupyterCodeExecutor, code: str, exit_code: int, says: str
) -> None:
    # ipykernel hands what it prints to a thread of its own: the death must not overtake that.
    before = "import os, time\nx = 5\nprint('before', flush=True)\ntime.sleep(0.5)\n"
    result = run(executor, before + code, "print('never')")
    assert (result.exit_code, result.kernel_state) == (exit_code, "lost")
    assert re.match(f"before\n{says}", result.output) and "never" not in result.output
    assert run(executor, "'x' in dir()").output == "False"


def test_a_traceback_of_an_earlier_cell_is_not_shown_again(executor: JupyterCodeExecutor) -> None:
    run(executor, "open('/no/such/file')")
    code = "import asyncio\nasync def fail(): 1 / 0\nasync with asyncio.TaskGroup() as group: group.create_task(fail())"
    result = executor.execute(code)
    assert result.error and result.error["ename"] in ("ExceptionGroup", "AttributeError")  # of Python 3.10
    assert "FileNotFoundError" not in result.text


@pytest.mark.slow
def test_a_cell_that_cleans_up_the_temporary_directory_costs_no_later_kernel(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server) as executor:
        assert executor.connection_file
        run(executor, f"import shutil; shutil.rmtree({os.path.dirname(executor.connection_file)!r})")
        executor.restart()
        assert run(executor, "6 * 7").output == "42"


def test_interrupt_from_another_thread(executor: JupyterCodeExecutor) -> None:
    executor.interrupt()  # while nothing runs it does nothing
    assert run(executor, "1").output == "1"
    thread = threading.Thread(target=executor.interrupt)
    code = "print('go', flush=True)\nwhile True: pass"
    result = executor.execute(code, on_output=lambda output: started(thread))
    assert (result.status, result.exit_code, result.kernel_state) == ("interrupted", 130, "intact")
    assert run(executor, "1").output == "1"


@cases("when", "_greet", "_settle")
def test_an_interrupt_before_the_cell_has_begun_is_heeded(
    executor: JupyterCodeExecutor, when: str, monkeypatch: MonkeyPatch
) -> None:
    if when == "_settle":
        run(executor, "1")
    kernel: Any = executor._kernel
    real = getattr(kernel, when)

    def interrupt_first(*arguments: Any) -> None:
        executor.interrupt()
        real(*arguments)

    monkeypatch.setattr(kernel, when, interrupt_first)
    result = executor.execute("while True: pass", timeout=3)
    assert (result.exit_code, result.kernel_state) == (130, "intact")
    monkeypatch.undo()
    assert run(executor, "1").output == "1"


@pytest.mark.slow
def test_a_storm_of_interrupts_hits_running_cells_only(executor: JupyterCodeExecutor) -> None:
    executor.execute("x = 0")
    over = threading.Event()

    def storm() -> None:
        while not over.wait(0.002):
            executor.interrupt()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(storm)
        statuses = [executor.execute("x += 1", timeout=PATIENCE).status for _ in range(25)]
        over.set()
    # A SIGINT between its own handlers, as a cell ends, ends ipykernel itself: seen once in some thousand cells.
    assert set(statuses) <= {"ok", "error", "interrupted", "died"}
    if "died" not in statuses:
        counted = int(executor.execute("x").text)
        assert statuses.count("ok") <= counted <= len(statuses)
    assert executor.execute("1").text == "1"


@cases("on_timeout", "interrupt", pytest.param("detach", marks=pytest.mark.slow))
def test_ctrl_c_interrupts_the_cell_and_goes_on(server: LocalJupyterServer, on_timeout: Any) -> None:
    with JupyterCodeExecutor(server, on_timeout=on_timeout) as executor:
        run(executor, "x = 5")
        with pytest.raises(KeyboardInterrupt):
            executor.execute(FOR_EVER, on_output=lambda output: signal.raise_signal(signal.SIGINT))
        assert run(executor, "x").output == "5"  # though the signal came in another thread when it may be detached


def test_on_input_answers_and_without_it_input_raises(executor: JupyterCodeExecutor) -> None:
    assert "StdinNotImplementedError" in run(executor, "input()").output
    asked = []

    def answer(prompt: str, password: bool) -> str:
        asked.append((prompt, password))
        return "blue"

    result = executor.execute("import getpass\nprint(input('colour? '), getpass.getpass('secret? '))", on_input=answer)
    assert result.outputs[-1]["text"].endswith("blue blue\n")
    assert asked == [("colour? ", False), ("secret? ", True)]


def test_a_failing_on_input_ends_the_input_not_the_session(executor: JupyterCodeExecutor, caplog: Any) -> None:
    async def coroutine(prompt: str, password: bool) -> str:
        return "text"

    hooks: list[Any] = [
        lambda *asked: coroutine(*asked),
        lambda *asked: b"bytes",
        lambda *asked: 5,
        lambda *asked: 1 // 0,
    ]
    for hook in hooks:
        caplog.clear()
        result = executor.execute("input()", on_input=hook, timeout=PATIENCE)
        assert result.error and result.error["ename"] == "EOFError"
        assert ("on_input must return a string" in caplog.text) == (hook is not hooks[-1])
    assert run(executor, "1").output == "1"


def test_a_hook_cannot_wait_for_its_own_cell(executor: JupyterCodeExecutor, caplog: LogCaptureFixture) -> None:
    waits: list[Any] = []
    executor = JupyterCodeExecutor(executor._server, on_output=lambda output: waits.append(executor.wait()))
    with executor:
        assert executor.submit("print(1)").wait().status == "ok"
    assert "cannot wait for the end of its own cell" in caplog.text and not waits


@cases("method", "restart", "stop")
def test_a_hook_may_end_its_kernel(executor: JupyterCodeExecutor, method: str) -> None:
    def hook(output: Any) -> None:
        getattr(executor, method)()

    result = executor.execute("print(1, flush=True)\nimport time; time.sleep(60)", timeout=PATIENCE, on_output=hook)
    assert (result.status, result.kernel_state) == ("died", "lost")
    assert "ended by a hook" in result.note
    assert method == "stop" or run(executor, "1").output == "1"


def test_outputs_come_at_once_and_a_failing_hook_stops_nothing(
    executor: JupyterCodeExecutor, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"

    def hook(output: dict[str, Any]) -> None:
        gate.touch()
        raise RuntimeError("a bug in the hook")

    code = f"import os, time\nprint('first', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n7"
    result = executor.execute(code, on_output=hook)
    assert (result.status, result.text) == ("ok", "first\n7")
    assert "a bug in the hook" in caplog.text


def test_a_stopped_executor_says_so(executor: JupyterCodeExecutor) -> None:
    executor.stop()
    executor.stop()
    acts: list[Callable[[], Any]] = [lambda: run(executor, "1"), lambda: executor.upload(b"", "x")]
    acts += [lambda: executor.set_variables(x=1), lambda: executor.list_files()]
    for act in acts:
        with pytest.raises(JupyterExecError, match="was stopped"):
            act()


@cases("arguments, says", *(({"timeout": wrong}, r"Timeout must be greater than or equal to 1\.") for wrong in (0.5, 0, -1, float("nan"))),
        ({"output_dir": "/no/such"}, r"Output directory .* does not exist\."),
        ({"kernel_name": "nope"}, r"Kernel .* is not installed\."),
        ({"jupyter_server": 5}, r"jupyter_server must be a JupyterConnectable or JupyterConnectionInfo\."),
        ({"kernel_name": None}, r"kernel_name must be a string, not None\."),
        ({"startup": 5}, r"startup must be a string, not 5\."),
        ({"functions": print}, "functions must be a list of functions, not "),
        *(({name: -1}, rf"{name} must be a whole number, 0 or more, not -1\.") for name in ("max_output", "max_tool_calls")),
        *(({"tool_timeout": wrong}, r"tool_timeout must be a number of seconds, not ") for wrong in (0, float("nan"))),
        *(({name: 5}, rf"{name} must be a function, not 5") for name in ("on_output", "on_input")),
        ({"tools": {5: len}}, r" cannot be a tool: it has no name"))  # fmt: skip
def test_wrong_arguments_are_value_errors(server: LocalJupyterServer, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        JupyterCodeExecutor(**({"jupyter_server": server} | arguments))


@cases("name, wrong", ("max_output", "x"), ("max_output", 1.5), ("max_tool_calls", None), ("tool_timeout", "x"))
def test_arguments_of_a_wrong_type_are_type_errors(server: LocalJupyterServer, name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a .*number"):
        JupyterCodeExecutor(server, **{name: wrong})  # type: ignore[arg-type]


def test_timeouts_may_be_infinite_and_are_numbers(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, timeout=float("inf")) as executor:
        wrong: Any
        for wrong in ("x", [], 0, -1, float("nan")):
            for call in (executor.execute, executor.submit):
                with pytest.raises((TypeError, ValueError), match="timeout must be a number of seconds, not "):
                    call("1", timeout=wrong)
        with pytest.raises(ValueError, match="on_output must be a function"):
            executor.execute("1", on_output=wrong)
        assert run(executor, "1").output == executor.execute("1", timeout=1e30).text == "1"


def test_execute_gives_nbformat_shaped_outputs(executor: JupyterCodeExecutor) -> None:
    assert json.loads(json.dumps(vars(executor)))["_kernel_name"] == "python3"
    result = executor.execute("print('a')\n5")
    assert result.outputs == [
        {"output_type": "stream", "name": "stdout", "text": "a\n"},
        {"output_type": "execute_result", "execution_count": 1, "data": {"text/plain": "5"}, "metadata": {}},
    ]
    assert (result.execution_count, result.error) == (1, None)
    failed = executor.execute("1/0")
    assert failed.error and (failed.error["ename"], failed.error["evalue"]) == ("ZeroDivisionError", "division by zero")


# Results for a model and for a person


def test_long_output_is_head_and_tail_with_one_mark_and_a_file(executor: JupyterCodeExecutor) -> None:
    result = run(executor, "for i in range(100_000): print(i)", "print('end')")
    (path,) = result.output_files
    whole = "".join(f"{i}\n" for i in range(100_000)) + "end\n"
    assert Path(path).read_text() == whole
    (mark,) = re.findall(r"\n\[(\d+) characters are missing here; the full text is in (.*)\]\n", result.output)
    head, tail = result.output.split(f"\n[{mark[0]} characters are missing here; the full text is in {path}]\n")
    assert mark[1] == path
    assert whole.startswith(head)
    assert (head + tail).replace("\n\nend", "\nend").endswith("99998\n99999\nend\n")
    assert len(head) + len(tail) == 100_000
    assert len(head) + int(mark[0]) + len(tail) == len(whole) + 1  # the newline between the blocks
    assert run(executor, "1").output_files == []


def test_a_single_cell_says_that_its_text_was_cut(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, output_dir=tmp_path, max_output=100) as executor:
        result = executor.execute("print('x' * 1000)")
        assert result.truncated and result.missing == 901
        assert "max_output" in result.note
        assert not executor.execute("print('x' * 50)").truncated
    with JupyterCodeExecutor(server, output_dir=tmp_path, max_output=None) as executor:
        whole = run(executor, "print('x' * 300_000)")
    assert (len(whole.output), whole.output_files) == (300_001, [])


@cases(
    "code",
    "print('[' + '9' * 5000 + ' characters are missing here]\\n' * 3)\nprint('x' * 200_000)",
    "print('\\n[5 characters are missing here]\\n')",
    "v = []\nfor i in range(900): v = [v]\nfrom IPython.display import JSON, display\ndisplay({'application/json': v}, raw=True)",
    ids=["forged mark", "forged mark in short text", "deep JSON"],
)
def test_a_call_never_raises_for_what_the_code_did(executor: JupyterCodeExecutor, tmp_path: Path, code: str) -> None:
    assert run(executor, code).exit_code == 0
    executor.save_notebook(tmp_path / "n.ipynb")
    assert all(path.stat().st_size < 300_000 for path in tmp_path.iterdir())


def test_a_full_temporary_disk_costs_the_notebook_not_the_result(
    executor: JupyterCodeExecutor, tmp_path: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", full)
        assert run(executor, "1").output == "1"
    assert "No space left" in caplog.text
    run(executor, "2")
    executor.save_notebook(tmp_path / "n.ipynb")
    cells = read_notebook(tmp_path / "n.ipynb", as_version=4).cells
    assert cells[0].source == "2" and "No space left" in cells[1].source


def test_the_files_of_a_call_are_bounded(executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_FILES", 3)
    result = run(executor, "from IPython.display import HTML, display\nfor i in range(5): display(HTML('<b>'))")
    assert len(result.output_files) == 3
    assert result.output.count("could not be saved: a call may write 3 files") == 2
    assert len(run(executor, "HTML('<b>')").output_files) == 1
    monkeypatch.setattr(jupyter_exec, "MAX_FILE_BYTES", 10)
    assert "a call may write" in run(executor, "HTML('<b>' * 10)").output


def test_planted_links_are_not_followed(server: LocalJupyterServer, tmp_path: Path) -> None:
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    victim.mkdir()
    (victim / "rc").write_text("mine")
    with JupyterCodeExecutor(server, output_dir=shared) as executor:
        run(executor, "1")
        (shared / "n.ipynb").symlink_to(victim / "rc")
        executor.save_notebook(shared / "n.ipynb")
        assert (victim / "rc").read_text() == "mine"
        assert read_notebook(shared / "n.ipynb", as_version=4).cells[0].source == "1"
        shared.rename(tmp_path / "moved")
        shared.symlink_to(victim)
        run(executor, "from IPython.display import HTML\nHTML('<b>')")
        executor.save_notebook(shared / "n.ipynb")
    assert [path.name for path in victim.iterdir()] == ["rc"]


SEND = """
    k, end = get_ipython().kernel, __import__("time").time() + 2
    def send(msg_type, plain, number=1, **more):
        content = {"data": {"text/plain": plain}, "metadata": {}, "transient": {"display_id": str(number)}} | more
        k.session.send(k.iopub_socket, msg_type, content, parent=k.get_parent())
    def during(step):
        number = 0
        while __import__("time").time() < end: step(number := number + 1)
"""
FLOODS = {
    "stdout and stderr in turns": "during(lambda n: send('stream', '', name=('stdout', 'stderr')[n % 2], text='x' * 50_000))",
    "JSON": "v = [[]] * 10_000; during(lambda n: send('display_data', '', data={'application/json': v}))",
    "metadata": "during(lambda n: send('display_data', '', metadata={'m': 'x' * 1_000_000}))",
    "a comm": "send('comm_msg', '', data=[[]] * 20_000_000)",
    "updates": "during(lambda n: send('update_display_data', 'x' * 1_000_000, n))",
    "errors": "during(lambda n: send('error', '', ename='E', evalue='x' * 1_000_000))",
    "displays": "during(lambda n: send('display_data', 'x' * 1_000_000, n))",
    "one display shown often": "during(lambda n: send(('display_data', 'update_display_data')[n % 2], 'x' * 10_000))",
    "lines": "for i in range(1_000_000): print('y' * 99)",
    "one line": "print('z' * 200_000_000)",
}


@pytest.mark.slow
@cases("what", *FLOODS)
def test_no_flood_grows_the_client_without_bound(what: str, tmp_path: Path) -> None:
    # Megabytes, and how much is in the file: of one line the message itself, which ZeroMQ hands over in one piece, and its copy.
    printed = {"lines": (60, 100_000_000), "one line": (500, 200_000_001)}
    program = """
        import resource, sys, jupyter_exec
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        with jupyter_exec.LocalJupyterServer() as server:
            executor = jupyter_exec.JupyterCodeExecutor(server, output_dir=sys.argv[1])
            executor.execute("1")
            before = peak()
            result = executor.execute_code_blocks([jupyter_exec.CodeBlock(sys.argv[2])])
            print(result.exit_code, peak() - before, len(result.output), *result.output_files)
    """
    said = run_python(program, str(tmp_path), textwrap.dedent(SEND) + FLOODS[what]).stdout
    exit_code, growth, length, *files = said.split()
    limit, size = printed.get(what, (300, None))
    assert exit_code == "0" or what == "one line"
    assert int(growth) < limit and int(length) < 101_000
    assert size is None or Path(files[0]).stat().st_size == size


@pytest.mark.slow
def test_a_thread_that_shows_things_while_no_cell_runs_is_bounded(tmp_path: Path) -> None:
    program = """
        import resource, sys, time, jupyter_exec
        server = jupyter_exec.LocalJupyterServer()
        executor = jupyter_exec.JupyterCodeExecutor(server, output_dir=sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        executor.execute(sys.argv[2] + "import threading; threading.Thread(target=during, args=(lambda n: send('display_data', 'x' * 100_000, n),)).start()")
        while not executor._kernel._mailbox.dropped: time.sleep(0.01)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, executor.execute("6 * 7").status)
        server.stop()
    """
    growth, status = run_python(program, str(tmp_path), textwrap.dedent(SEND)).stdout.split()
    assert int(growth) < 300 and status == "ok"


def streamed(text: str, cuts: Iterable[int]) -> str:
    """Return what is left of a text that came on stdout in pieces."""
    outputs = jupyter_exec.Outputs(None)
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        outputs.write("stdout", text[start:end])
    return "".join(output["text"] for output in outputs.so_far()[0])


@cases(
    "raw, left",
    ("\r10%\r20%\r30%\n", "30%\n"),
    ("a\r\nb\r\n", "a\nb\n"),
    ("abc\b\bX\n", "aX\n"),
    ("\b\bx", "x"),
    ("keep\r", "keep"),
    ("over\r\rwritten", "written"),
    ("ab\b\b\b\bc\n\b\bd", "c\nd"),
    ("1\n2\r3\n4", "1\n3\n4"),
    ("no\n", "no\n"),
)
def test_text_is_as_a_terminal_would_have_left_it(raw: str, left: str) -> None:
    assert streamed(raw, []) == jupyter_exec.without_erased(raw) == left


@given(st.text(alphabet="ab\n\r\b", max_size=60), st.data())
def test_a_terminals_text_does_not_depend_on_how_it_came_in_pieces(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert streamed(text, cuts) == jupyter_exec.without_erased(text)


STREAMS = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text(alphabet="ab\n", max_size=30)), max_size=20)


@given(STREAMS, st.integers(2, 40))
def test_head_and_tail_of_all_streams_are_kept(texts: list[tuple[str, str]], limit: int) -> None:
    outputs, whole = jupyter_exec.Outputs(limit), "".join(text for _, text in texts)
    for name, text in texts:
        outputs.write(name, text)
    kept, missing = outputs.so_far()
    left = "".join(output["text"] for output in kept)
    if len(whole) <= limit:
        assert (left, missing) == (whole, 0)
    else:
        head, tail = left.split(jupyter_exec.gap_mark(missing))
        assert whole.startswith(head) and whole.endswith(tail)
        assert len(head) + missing + len(tail) == len(whole)
        assert len(head) + len(tail) == limit


def test_page_and_load_texts_are_shown(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    assert "Docstring" in run(executor, "print?").output
    (tmp_path / "code.py").write_text("loaded = 1")
    assert "loaded = 1" in run(executor, f"%load {tmp_path}/code.py").output


@cases(
    "data, word, suffix, start",
    ({"image/png": base64.b64encode(b"\x89PNG").decode()}, "Image", ".png", b"\x89PNG"),
    ({"image/jpeg": base64.b64encode(b"\xff\xd8").decode()}, "Image", ".jpg", b"\xff\xd8"),
    ({"image/gif": base64.b64encode(b"GIF8").decode()}, "Image", ".gif", b"GIF8"),
    ({"image/webp": base64.b64encode(b"RIFF").decode()}, "Image", ".webp", b"RIFF"),
    ({"image/svg+xml": "<svg>ü</svg>"}, "Image", ".svg", "<svg>ü</svg>".encode()),
    ({"application/pdf": base64.b64encode(b"%PDF").decode()}, "PDF", ".pdf", b"%PDF"),
    ({"text/html": "<b>"}, "HTML", ".html", b"<b>"),
    ({"application/json": {"a": [1, "ü"]}}, "JSON", ".json", b'{"a"'),
    ({"application/json": 5}, "JSON", ".json", b"5"),
    ({"application/vnd.plotly.v1+json": {"data": []}, "text/html": "<div>"}, "HTML", ".html", b"<!DOCTYPE html>"),
    ({"application/vnd.vegalite.v5+json": {"mark": "bar"}, "text/html": "<div>"}, "JSON", ".json", b"{"),
    ({"application/geo+json": {"type": "Point"}}, "JSON", ".json", b"{"),
    ({"text/html": ["<b>", "x"]}, "HTML", ".html", b"<b>x"),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_mime_type_gets_its_file(tmp_path: Path, data: Any, word: str, suffix: str, start: bytes) -> None:
    files = jupyter_exec.CallFiles(jupyter_exec.Folder(tmp_path), None)
    sentence = files.save(data)
    (path,) = files.paths
    assert sentence == f"{word} data saved to {path}"
    assert Path(path).suffix == suffix
    assert Path(path).read_bytes().startswith(start)


def test_a_plotly_page_shows_the_figure_and_nothing_else_of_it(tmp_path: Path) -> None:
    files = jupyter_exec.CallFiles(jupyter_exec.Folder(tmp_path), None)
    figure = {"data": [{"y": [1]}], "layout": {"title": {"text": "</script><script>alert(1)</script>"}}, "evil": "x"}
    files.save({"application/vnd.plotly.v1+json": figure})
    page = Path(files.paths[0]).read_text()
    (shown,) = re.findall(r'Plotly.newPlot\("figure", (.*)\)</script>', page)
    assert page.count("<script") == 2 and json.loads(shown) == {name: figure[name] for name in ("data", "layout")}


@cases(
    "data",
    {"image/png": "!"},
    {"image/png": 5},
    {"text/html": {}},
    {"image/png": "a" * 5},
    {"application/pdf": True},
    {"application/vnd.plotly.v1+json": []},
)
def test_what_cannot_be_a_file_is_said(tmp_path: Path, data: Any) -> None:
    files = jupyter_exec.CallFiles(jupyter_exec.Folder(tmp_path), None)
    assert ("could not be saved" in (files.save(data) or "")) == (not files.paths)
    assert list(map(str, tmp_path.iterdir())) == files.paths


@cases(
    "data, text",
    ({"text/markdown": "**b**", "text/plain": "<IPython.core.display.Markdown object>"}, "**b**"),
    ({"text/latex": "$x$", "text/plain": "x"}, "x"),
    ({"text/latex": "$x$", "text/plain": "<IPython.core.display.Latex object>"}, "$x$"),
    ({"application/javascript": "alert()", "text/plain": "<IPython.core.display.Javascript object>"}, "<IPython"),
    ({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider(value=0)"}, "IntSlider(value=0)"),
)
def test_text_is_chosen_where_text_is_best(tmp_path: Path, data: Any, text: str) -> None:
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    assert jupyter_exec.render([output], "", lambda data: None).startswith(text)
    assert jupyter_exec.CallFiles(jupyter_exec.Folder(tmp_path), None).save(data) is None


@pytest.mark.slow
def test_real_libraries(executor: JupyterCodeExecutor) -> None:
    libraries = textwrap.dedent("""
        import matplotlib.pyplot as plt, pandas as pd, plotly.graph_objects as go
        from PIL import Image
        from IPython.display import display, SVG
        display(pd.DataFrame({"a": [1, 2]}))
        plt.plot([1, 3, 2]); plt.show()
        display(go.Figure(go.Bar(y=[1, 2])))
        display(Image.new("RGB", (8, 8), "red"))
        display(SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
    """)
    result = run(executor, libraries)
    assert [Path(path).suffix for path in result.output_files] == [".html", ".png", ".html", ".png", ".svg"]
    assert result.output.startswith("   a\n0  1\n1  2\nHTML data saved to ")
    assert "<Figure" not in result.output and "<PIL" not in result.output
    assert '"type": "bar"' in Path(result.output_files[2]).read_text()


def test_late_output_is_marked_and_not_in_the_next_cell(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    gate, done = tmp_path / "gate", tmp_path / "done"
    seen: list[Any] = []
    code = f"""
        import os, threading, time
        def work():
            while not os.path.exists({str(gate)!r}): time.sleep(0.01)
            print('late', flush=True)
            time.sleep(0.5)  # ipykernel sends from a thread of its own
            open({str(done)!r}, 'w').close()
        thread = threading.Thread(target=work); thread.start()
    """
    run(executor, textwrap.dedent(code))
    gate.touch()
    eventually(done.exists, "the thread has printed")
    result = executor.execute("thread.join(); print('own')", on_output=seen.append)
    assert result.text == "own\n"
    assert {"output_type": "stream", "name": "stdout", "text": "late\n", "late": True} in seen


@pytest.mark.slow
def test_a_notebook_of_the_session(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    run(executor, "x = 1\nprint('a')", "x + 1", "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    run(executor, "1 / 0")
    executor.execute("import time\ntime.sleep(60)", timeout=0.5)
    run(executor, "print?")
    path = tmp_path / "session.ipynb"
    executor.save_notebook(path)
    notebook = read_notebook(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4, 5, 6]
    assert notebook.cells[1].outputs[0].data["text/plain"] == "2"
    assert notebook.cells[2].outputs[0].data["image/png"].startswith("iVBOR")
    assert notebook.cells[3].outputs[0].ename == "ZeroDivisionError"
    assert notebook.cells[4].outputs[-1].text.endswith("variables are kept; it was at line 2: time.sleep(60)")
    assert notebook.metadata.language_info.name == "python"


def malformed(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    bundles = [{"image/png": "%%%"}, {"image/png": {"a": 1}}, {"text/plain": 5}, {"../../etc/passwd": "x"}, None, 7]
    bundles += [{"application/geojson": {}}, {"a/json": []}]  # no types of JSON to nbformat
    for bundle in [*bundles, {"application/json": nested(50)}, {"text/html": None, "text/plain": "fine"}]:
        kernel.publish("display_data", {"data": bundle, "metadata": None, "transient": None}, request)
    kernel.publish("stream", {"name": "stdout", "text": "end"}, request)
    kernel.finish(request)


def test_malformed_bundles_cost_only_themselves(tmp_path: Path) -> None:
    with scripted(malformed, tmp_path) as executor:
        result = run(executor, "1")
        executor.save_notebook(tmp_path / "n.ipynb")
    assert result.exit_code == 0
    assert result.output.endswith("fine\nend")
    assert "Image data could not be saved" in result.output
    assert all(Path(path).parent == tmp_path for path in result.output_files)
    nbformat.validate(read_notebook(tmp_path / "n.ipynb", as_version=4))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True)
    need("mount", mounted.returncode == 0)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_costs_only_the_file(server: LocalJupyterServer, small_disk: Path) -> None:
    with JupyterCodeExecutor(server, output_dir=small_disk) as executor:
        code = "from IPython.display import HTML\ndisplay(HTML('x' * 10**6))\nprint('y' * 10**6)\nprint('end')"
        result = run(executor, code)
    assert result.exit_code == 0
    assert "HTML data could not be saved: " in result.output
    assert "No space left" in result.output
    assert "the full text could not be saved: " in result.output
    assert result.output.endswith("end\n")


# Files and variables in and out


@contextlib.contextmanager
def server_of(request: FixtureRequest, kind: str, **options: Any) -> Iterator[Any]:
    """What an executor takes as server, of each kind; one of Docker has options."""
    if kind in ("server", "gateway", "jupyter_server"):
        shared = request.getfixturevalue(kind)
        yield shared.info if isinstance(shared, Peer) else shared
        return
    made: Any = CommandJupyterServer([sys.executable])
    if kind == "docker":
        request.getfixturevalue("containers")
        made = docker_server(**options)
    elif kind == "ssh":
        made = CommandJupyterServer([*request.getfixturevalue("sshd"), sys.executable])
    elif kind == "ipykernel 6":
        python = os.environ.get("JUPYTER_EXEC_ENTERPRISE_PYTHON", "")
        need("enterprise", os.path.exists(python))
        made = LocalJupyterServer(python=python)
    with made:
        yield made


@contextlib.contextmanager
def executor_at(request: FixtureRequest, kind: str) -> Iterator[JupyterCodeExecutor]:
    """An executor whose kernel is reached in that way, in an empty directory of its own."""
    path = request.getfixturevalue("tmp_path") / "place"
    path.mkdir()
    with contextlib.ExitStack() as stack:
        if kind in ("local", "attached"):
            server: Any = stack.enter_context(LocalJupyterServer(cwd=path))
        else:
            server = stack.enter_context(server_of(request, kind, read_only=True, work_dir="/data/here"))
        if kind == "attached":
            owner = stack.enter_context(JupyterCodeExecutor(server))
            assert owner.execute("1").status == "ok"
            server = owner.connection_file
        yield stack.enter_context(JupyterCodeExecutor(server))


SLOW_PLACES = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ssh", "jupyter_server")]
PLACES = ["local", "docker", "gateway", "attached", *SLOW_PLACES]
anywhere = pytest.mark.usefixtures("gateway", "jupyter_server", "bundled_image")  # before what looks for leaks
SHADOWS = "open = print = exec = eval = len = __import__ = json = base64 = os = globals = names = run = 5"


@anywhere
@cases("kind", *PLACES)
def test_files_come_and_go_anywhere(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    source, target, name = tmp_path / "in.bin", tmp_path / "out.bin", f"new {kind}"
    source.write_bytes(data)
    with executor_at(request, kind) as executor:
        run(executor, f"import os, shutil\nshutil.rmtree({name!r}, True)\nos.chdir('/')\n{SHADOWS}")
        odd = f"{name}/ä\n'\udc80.bin"
        assert executor.upload(source, odd) == odd
        executor.upload(b"", f"{name}/empty")
        executor.upload(io.BytesIO(b"1"), f"{name}/a/b")
        executor.download(odd, target)
        assert target.read_bytes() == data
        assert executor.download(odd) == data
        listed = executor.list_files(name)
        names = {"a": "directory", "empty": "file", odd[len(name) + 1 :]: "file"}
        assert [(f.name, f.kind) for f in listed] == [*names.items()]
        assert (listed[1].size, listed[2].size, listed[1].modified > 10**9) == (0, len(data), True)
        result = executor.execute(
            "import os, shutil; from builtins import *; os.chdir(get_ipython().starting_dir)\n"
            f"os.chdir({name!r}); open('own', 'w').close()\n"
            "same = len({(s.st_mode, s.st_uid, s.st_gid) for s in map(os.stat, ['own', 'empty', 'a/b'])}) == 1\n"
            f"os.chdir('..'); shutil.rmtree({name!r}); same"
        )
        assert result.text == "True", result.text


FILE_ERRORS: list[tuple[Callable[[JupyterCodeExecutor], Any], str]] = [
    (lambda far: far.download("no/such"), "No such file"),
    (lambda far: far.download("d"), "Is a directory"),
    (lambda far: far.download("d/f/x"), "Not a directory"),
    (lambda far: far.download("fifo"), "Is no regular file"),
    (lambda far: far.download("/dev/zero"), "Is no regular file"),
    (lambda far: far.download("a\0b"), "null (byte|character)"),
    (lambda far: far.download("d/f", max_bytes=2), "larger than max_bytes=2"),
    (lambda far: far.download("d/f", "/no/such/dir/x"), "There is no directory /no/such/dir"),
    (lambda far: far.download("d/f", "/tmp"), "Is a directory: name the file"),
    (lambda far: far.download("d/f", "/dev/null"), "Is no regular file"),
    (lambda far: far.upload(b"x", "d"), "Is a directory"),
    (lambda far: far.upload(b"x", "d/f/x/y"), "Not a directory"),
    (lambda far: far.upload(b"x", "/proc/x"), "No such file"),
    (lambda far: far.upload(b"x", ""), "Is a directory"),
    (lambda far: far.upload(b"x", "n" * 300), "name too long"),
    (lambda far: far.upload("/no/such"), "No such file"),
    (lambda far: far.upload("/no\0such", "x"), "null (byte|character)"),
    (lambda far: far.download("d/f", "/tmp/a\0b"), "null (byte|character)"),
    (lambda far: far.upload("/tmp"), "Is a directory"),
    (lambda far: far.list_files("d/f"), "Not a directory"),
    (lambda far: far.list_files("no"), "No such file"),
]


@cases("kind", "local", "attached")
def test_what_is_wrong_with_a_file_is_told(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    with executor_at(request, kind) as executor:
        (tmp_path / "place/d").mkdir()
        (tmp_path / "place/d/f").write_text("123")
        os.mkfifo(tmp_path / "place/fifo")
        for act, says in FILE_ERRORS:
            with pytest.raises(FileTransferError, match=says) as caught:
                act(executor)
            assert isinstance(caught.value, OSError)
        assert sorted(path.name for path in (tmp_path / "place").rglob("*")) == ["d", "f", "fifo"]


@pytest.mark.slow
def test_a_sandbox_refuses_what_its_user_may_not(request: FixtureRequest) -> None:
    with executor_at(request, "docker") as executor:
        for path, says in (("/etc/x", "Read-only|Permission denied"), ("/proc/1/environ", "Permission denied")):
            with pytest.raises(FileTransferError, match=says):
                executor.upload(b"x", path) if path == "/etc/x" else executor.download(path)
        with pytest.raises(FileTransferError, match="No space left"):
            executor.upload(zeros(600 * 2**20), "big")
        assert executor.list_files() == []


class Zeros(io.RawIOBase):
    """A binary file of so many zeros."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        got = min(size, self.left)
        self.left -= got
        return bytes(got)


zeros: Any = Zeros


@cases("kind", "local", "attached")
def test_a_full_disk_leaves_no_half_file(request: FixtureRequest, kind: str, small_disk: Path) -> None:
    with executor_at(request, kind) as executor:
        (small_disk / "old").write_text("old")
        with pytest.raises(FileTransferError, match="No space left") as caught:
            executor.upload(bytes(3_000_000), small_disk / "old")
        assert not caught.value.here
        executor.upload(bytes(3_000_000), "big")
        with pytest.raises(FileTransferError, match="No space left") as caught:
            executor.download("big", small_disk / "old")
        assert caught.value.here
        assert os.listdir(small_disk) == ["old"]
        assert (small_disk / "old").read_text() == "old"


@pytest.mark.slow
@cases("kind", "local", "docker", SLOW_PLACES[0])
def test_files_come_and_go_while_a_cell_runs(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    with executor_at(request, kind) as executor, ThreadPoolExecutor(1) as pool:
        code = f"import os\nopen('{kind}-begun', 'w').write('yes')\nwhile not os.path.exists('{kind}-go'): pass\n"
        code += f"os.remove('{kind}-go'), os.remove('{kind}-begun')\nprint('gone')"
        cell = pool.submit(run, executor, code)

        def begun() -> bool:
            with contextlib.suppress(FileTransferError):
                return executor.download(f"{kind}-begun") == b"yes"
            return False

        eventually(begun, "the cell runs, and its file comes")
        executor.upload(b"", f"{kind}-go")
        assert cell.result(PATIENCE).output == "gone\n"


def test_files_where_the_working_directory_was_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with LocalJupyterServer(cwd=tmp_path / "gone") as server, JupyterCodeExecutor(server) as executor:
        run(executor, "1")
        (tmp_path / "gone").rmdir()
        executor.upload(b"x", tmp_path / "file")
        with pytest.raises(FileTransferError, match="'file' at the kernel: No such file or directory"):
            executor.upload(b"x", "file")


def test_files_and_tools_of_a_kernel_that_speaks_no_python(kernels_dir: Path) -> None:
    (kernels_dir.parent / "other.py").write_text(
        "from ipykernel.ipkernel import IPythonKernel\n"
        "class Other(IPythonKernel):\n    language_info = {'name': 'R', 'file_extension': '.r'}\n"
    )
    env = add_spec(kernels_dir, "other", [*IPYKERNEL, "--IPKernelApp.kernel_class=other.Other"], language="R")
    env["PYTHONPATH"] = str(kernels_dir.parent)
    with LocalJupyterServer(env=env, cwd=kernels_dir) as server, JupyterCodeExecutor(server, "other") as executor:
        executor.upload(b"1", "in")
        assert executor.download("in") == b"1"
        assert executor.execute("1").status == "ok"
        with JupyterCodeExecutor(executor.connection_file or "") as attached:
            for act in (lambda: attached.upload(b"1", "in"), lambda: attached.get_variable("x")):
                with pytest.raises(JupyterExecError, match="The kernel runs R, and only Python kernels"):
                    act()
        with JupyterCodeExecutor(server, "other", tools=[add]) as equipped:
            with pytest.raises(
                JupyterExecError, match="runs R, and only Python kernels can have functions= and tools="
            ):
                equipped.execute("1")


@cases("kind", "local", "attached")
def test_a_link_is_read_through_and_replaced(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    with executor_at(request, kind) as executor:
        places = (tmp_path, tmp_path / "place")  # here and there
        for place in places:
            (place / "old").write_text("old")
            (place / "link").symlink_to("old")
        assert executor.download("link") == b"old"
        assert [(entry.name, entry.kind) for entry in executor.list_files()] == [("link", "link"), ("old", "file")]
        executor.upload(b"new", "link")
        executor.download("link", tmp_path / "link")
    for place in places:
        assert not (place / "link").is_symlink()
        assert [(place / name).read_text() for name in ("link", "old")] == ["new", "old"]


def test_a_source_is_called_by_its_own_name_there(request: FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b")
    with executor_at(request, "local") as executor:
        assert executor.upload(tmp_path / "table.csv") == "table.csv"
        file = io.BytesIO()
        executor.download("table.csv", file)
        assert file.getvalue() == b"a,b"
        source: Any
        for source in (5, b"no path", io.StringIO("text")):
            with pytest.raises(TypeError):
                executor.upload(source, None if source == b"no path" else "never")
        acts: list[Any] = [lambda: executor.download("no"), lambda: executor.upload(tmp_path / "no")]
        for act, path, here in zip(acts, ("no", str(tmp_path / "no")), (False, True), strict=True):
            with pytest.raises(FileTransferError) as caught:
                act()
            assert (caught.value.errno, caught.value.path, caught.value.here) == (2, path, here)
    assert os.listdir(tmp_path / "place") == ["table.csv"]


@pytest.mark.slow
@cases("kind", "local", "attached")
def test_progress_is_told(request: FixtureRequest, kind: str) -> None:
    calls: list[tuple[int, int | None]] = []
    with executor_at(request, kind) as executor:
        for size in (0, 1, 2**18 - 1, 2**18, 2**20, 5 * 2**18 + 1):
            data = os.urandom(size)
            for source in (data, io.BytesIO(data)):
                executor.upload(source, "f", on_progress=lambda *call: calls.append(call))
                assert calls[-1] == (size, size)
                calls.clear()
            assert executor.download("f", on_progress=lambda *call: calls.append(call)) == data
            assert calls[-1] == (size, size)
            assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_progress_hook_that_raises_ends_nothing(executor: JupyterCodeExecutor, tmp_path: Path, caplog: Any) -> None:
    executor.upload(b"x", tmp_path / "f", on_progress=lambda done, total: 1 // 0)
    assert "on_progress raised" in caplog.text
    assert (tmp_path / "f").read_bytes() == b"x"


def kill_host(executor: JupyterCodeExecutor) -> None:
    os.kill(executor._server._process.pid, signal.SIGKILL)
    eventually(lambda: executor._server._link.lost, "the loss is known")


def stop_elsewhere(executor: JupyterCodeExecutor) -> None:
    thread = threading.Thread(target=executor.stop)
    thread.start()
    eventually(lambda: executor._turns.closed, "the executor is being stopped")


INTERRUPTIONS: dict[str, tuple[Callable[[JupyterCodeExecutor], None], type[BaseException], str | None]] = {
    "Ctrl-C": (lambda executor: raising(KeyboardInterrupt), KeyboardInterrupt, None),
    "stop": (stop_elsewhere, FileTransferError, "was stopped"),
    "server": (lambda executor: executor._server.stop(), FileTransferError, "the server was stopped"),
    "host": (kill_host, FileTransferError, "The kernel host is gone"),
}


@cases("what", *list(INTERRUPTIONS))
def test_an_interrupted_transfer_leaves_no_half_file(what: str, tmp_path: Path) -> None:
    act, kind, says = INTERRUPTIONS[what]
    (tmp_path / "old").write_bytes(bytes(2_000_000))
    for direction in ("up", "down"):
        with LocalJupyterServer(cwd=tmp_path) as server, JupyterCodeExecutor(server) as executor:
            hook: Any = lambda done, total: act(executor)  # noqa: E731
            with pytest.raises(kind, match=says):
                if direction == "up":
                    executor.upload(zeros(10**8), "old", on_progress=hook)
                else:
                    executor.download("old", tmp_path / "old", on_progress=hook)
            if what != "host":  # which was killed, and is the only one to remove it; nobody else does before its end
                eventually(lambda: os.listdir(tmp_path) == ["old"], "the half file is gone")
        assert (tmp_path / "old").stat().st_size == 2_000_000


@pytest.mark.slow
@cases("what", "Ctrl-C", "stop", "kernel")
def test_an_interrupted_transfer_through_a_kernel_leaves_no_half_file(gateway: Peer, what: str, tmp_path: Path) -> None:
    act, kind, says = INTERRUPTIONS.get(what) or (kill_kernel, FileTransferError, "lost|dead")
    (tmp_path / "old").write_bytes(b"old")
    with JupyterCodeExecutor(gateway.info) as executor:
        with pytest.raises(kind, match=says):
            executor.upload(zeros(10**8), tmp_path / "old", on_progress=lambda done, total: act(executor))
        if what == "Ctrl-C":
            assert os.listdir(tmp_path) == ["old"]
            assert run(executor, "40 + 2").output == "42"
    assert (tmp_path / "old").read_bytes() == b"old"


def kill_kernel(executor: JupyterCodeExecutor) -> None:
    pid = executor._kernel.execute("import os; os.getpid()", PATIENCE).text
    os.kill(int(pid), signal.SIGKILL)


def test_a_client_that_is_killed_leaves_no_half_file(tmp_path: Path) -> None:
    program = f"""
        import io, os, signal
        from jupyter_exec import *
        class Source(io.RawIOBase):
            def read(self, size):
                if any(name.endswith(".part") for name in os.listdir({str(tmp_path)!r})):
                    os.kill(os.getpid(), signal.SIGKILL)
                return bytes(size)
        executor = JupyterCodeExecutor(LocalJupyterServer(cwd={str(tmp_path)!r}))
        executor.upload(Source(), "new")
    """
    assert run_python(program).returncode == -signal.SIGKILL
    eventually(lambda: os.listdir(tmp_path) == [], "the half file is gone")


@cases("change", "shorter", "another", "longer")
def test_a_file_that_changes_while_it_is_read(request: FixtureRequest, change: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 10_000_000)

    def alter(done: int, total: int | None) -> None:
        if change == "another" and done <= 2**18:
            (tmp_path / "g").write_bytes(b"y" * 10_000_000)
            (tmp_path / "g").replace(file)
        elif change == "shorter":
            os.truncate(file, 3_000_000)
        elif done <= 2**18:
            with file.open("ab") as more:
                more.write(b"y" * 1_000_000)

    with executor_at(request, "local") as executor:
        if change == "longer":
            assert executor.download(file, on_progress=alter) == b"x" * 10_000_000 + b"y" * 1_000_000
            return
        with pytest.raises(FileTransferError, match=f"it (was replaced by|became) {change}"):
            executor.download(file, tmp_path / "never", on_progress=alter)
        assert not (tmp_path / "never").exists()


GOOD = {"size": 3, "file": [1, 2]}


@cases(
    "answer",
    {},
    {"result": []},
    {"result": None, "bytes": b"abc"},
    {"result": GOOD | {"size": -1}, "bytes": b"abc"},
    {"result": GOOD | {"size": "3"}, "bytes": b"abc"},
    {"result": GOOD | {"size": 10**100}, "bytes": b"abc"},
    {"result": GOOD, "bytes": bytes(2**20)},
    {"result": GOOD, "bytes": b"ab"},
    {"result": {"error": ["x" * 10**6]}},
    {"result": {"error": "\x1b]0;title\x07\ud800" * 10**5, "code": 7}},
    {"error": {"a": 1}, "data": [[]]},
    {"error": "KernelStartFailed", "data": {"argv": 5}},
    {"error": "ConnectionClosed", "data": 5},
    *({"result": {"entries": entries}} for entries in (5, [5], [["n", 1, 2]], [["n", -1, 0, 0.0]], [[5, 1, 1, 1.0]])),
    {"result": {"entries": [["n", 1, 1, float("nan")]]}},
    {"result": {"entries": [["n", 1, 1, 1.0]] * 10_001}},
    ids=lambda answer: ascii(answer)[:60],
)
def test_no_answer_raises_anything_but_our_error(answer: Any) -> None:
    files = jupyter_exec.FarFiles(lambda order, data, then: then(dict(answer)), 2**18, 4, lambda: None)
    acts: list[Callable[[], Any]] = [lambda: list(files.read("p", 1000)), lambda: files.entries("p")]
    for act in acts:
        with pytest.raises(FileTransferError) as caught, jupyter_exec.transfer_errors("p"):
            act()
        assert len(str(caught.value)) < 10_000
        assert "\x1b" not in str(caught.value)


def test_a_host_that_is_silent_ends_the_transfer_not_the_host(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "TRANSFER_TIMEOUT", 0.3)
    files = jupyter_exec.FarFiles(lambda order, data, then: None, 2**18, 4, lambda: None)
    with pytest.raises(FileTransferError, match="nothing was heard"):
        files.write("p", [b"x"] * 10, lambda size: None)


def test_a_directory_of_too_many_entries_is_an_error(request: Any, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_LISTED", 2)
    with executor_at(request, "local") as executor:
        for name in "cab":
            executor.upload(b"", name)
        with pytest.raises(FileTransferError, match="more than 2 entries"):
            executor.list_files()


@pytest.mark.slow
def test_files_of_a_container_that_is_gone_are_missed(containers: Any) -> None:
    with docker_server() as server, JupyterCodeExecutor(server) as executor:
        executor.execute("1")
        executor.upload(b"x", "f")
        containers()[0].kill()
        with pytest.raises(FileTransferError, match="The kernel host is gone"):
            executor.download("f")
        assert run(executor, "1").kernel_state == "lost"
        run(executor, "1")
        assert [file for file in executor.list_files() if file.name == "f"] == []


def test_files_reach_a_new_host_after_the_loss_of_one(request: FixtureRequest) -> None:
    with executor_at(request, "local") as executor:
        kill_host(executor)
        executor.upload(b"x", "f")
        assert executor.download("f") == b"x"
        assert run(executor, "open('f').read()").output == "'x'"


@pytest.mark.slow
@anywhere
@cases("kind", "local", "docker", "gateway")
def test_200_megabytes_go_both_ways_in_little_memory(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(os.urandom(2**20) * 200)
    with executor_at(request, kind) as executor:
        far = str(tmp_path / "far") if kind == "gateway" else "far"
        executor.upload(b"x" * 2**21, far)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        executor.upload(source, far)
        executor.download(far, target)
        assert peak_memory() - before < 40
    assert source.read_bytes() == target.read_bytes()


@anywhere
@cases("kind", *PLACES)
def test_variables_come_and_go_anywhere(request: FixtureRequest, kind: str) -> None:
    values = [None, True, 0, -(10**400), 1.5, "", "ä\ud83d\ude00\udc80\0\n'\"", [], {}, [[1], {"a": [None]}], {"": ""}]
    with executor_at(request, kind) as executor:
        executor.execute(SHADOWS)
        executor.set_variables(values=values, ä=(1, (2,)), nan=float("nan"), inf=-float("inf"))
        assert executor.get_variable("values") == values
        assert executor.get_variable("ä") == [1, [2]]
        assert [str(executor.get_variable(name)) for name in ("nan", "inf")] == ["nan", "-inf"]
        executor.execute("class Array: tolist = lambda self: [1]\narray, data = {'a': Array()}, {b'x'}")
        assert [executor.get_variable(name) for name in ("array", "data")] == [{"a": [1]}, ["eA=="]]
        executor.set_variables(values={7})
        assert executor.get_variable("values") == [7]
        long = ["ä" * 1000, 12345] * 2000
        executor.set_variables(long=long, short=1)
        assert executor.get_variable("long") == long
        assert executor.execute("long[0][0], sum(long[1::2]), short").text == "('ä', 24690000, 1)"
        shows_strings = "lambda text, printer, cycle: printer.text('a string')"  # as `rich` does
        executor.execute(f"get_ipython().display_formatter.formatters['text/plain'].for_type(str, {shows_strings})")
        assert executor.get_variable("long") == long


@pytest.mark.slow
@anywhere
@cases("kind", "local", "gateway")
def test_transfers_leave_no_trace_in_the_kernel(request: FixtureRequest, kind: str, tmp_path: Path) -> None:
    look = "import sys; print([name for name in sorted(globals()) if name[:2] != '_i'], len(Out), _, __, ___)\n"
    look += "print(sorted(vars(sys)), In[-2])"
    with executor_at(request, kind) as executor:
        run(executor, "x = 5; y = 6", "41 + 1", "'a'", "'b'")
        executor.execute(look)
        before = executor.execute(look)
        with JupyterCodeExecutor(executor.connection_file or executor._server) as other:
            for one in (executor, other):
                one.upload(bytes(3_000_000), tmp_path / "f")
                one.download(tmp_path / "f")
                one.set_variables(x="a" * 3_000_000)
                one.get_variable("x")
                with pytest.raises(VariableError):
                    one.get_variable("nope")
        after = executor.execute(look)
        assert after.execution_count == (before.execution_count or 0) + 1
        assert after.text == before.text


def nested(depth: int) -> Any:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@cases(
    "values, says",
    ({"a": 1, "x": os}, "'x': it is no JSON here. TypeError: module is no JSON: send numbers, text, lists and dicts"),
    ({"1x": 1}, "'1x': it is no name"),
    ({"class": 1}, "'class': it is no name"),
    ({"x": nested(100_000)}, "RecursionError"),
    ids=["module", "digit", "keyword", "deep"],
)
def test_what_cannot_be_a_variable_is_told(executor: JupyterCodeExecutor, values: Any, says: str) -> None:
    with pytest.raises(VariableError, match=re.escape(says)):
        executor.set_variables(**values)
    assert executor.execute("'a' in dir()").text == "False"


HOSTILE_VALUES = {
    "nope": ("", "'nope': the kernel has none of that name"),
    "print": ("", "has none of that name"),
    "a.b": ("", "is no name of a variable"),
    "m": ("import os as m", "it is no JSON in the kernel. TypeError: module is no JSON: send numbers, text, lists"),
    "deep": ("deep = []\nfor _ in range(10**5): deep = [deep]", "RecursionError"),
    "big": ("big = 'x' * 10**6", "it is larger than max_bytes=1000000: 1000002 bytes"),
    "many": ("many = [[]] * 200_000", "too many parts"),
    "long": ("import sys; sys.set_int_max_str_digits(0); long = 10**5000", "what came is no JSON|Exceeds the limit"),
    "raising": ("class D(dict):\n    def items(self): raise SystemExit('out')\nraising = D(a=1)", "'raising'"),
    "odd": (
        "class E(Exception):\n    def __str__(self): raise ValueError('hi')\n"
        "class D(dict):\n    def items(self): raise E\nodd = D(a=1)",
        "The kernel did not do it. hi",
    ),
}


@cases("name", *list(HOSTILE_VALUES))
def test_what_cannot_be_had_from_a_kernel_is_told(executor: JupyterCodeExecutor, name: str) -> None:
    code, says = HOSTILE_VALUES[name]
    executor.execute(f"x = 1\n{code}")
    with pytest.raises(VariableError, match=says):
        executor.get_variable(name, max_bytes=10**6)
    assert executor.get_variable("x") == 1
    assert executor.execute("'_jupyter_exec' in vars(__import__('sys'))").text == "False"


def test_two_clients_of_one_kernel_set_long_values_at_once(executor: JupyterCodeExecutor) -> None:
    executor.execute("1")
    with JupyterCodeExecutor(executor.connection_file or "") as other, ThreadPoolExecutor(2) as pool:
        values = {"one": ["a" * 10**6] * 5, "two": ["b" * 10**6] * 5}
        set_by = zip((executor, other), values.items(), strict=True)
        for done in [pool.submit(one.set_variables, **{name: value}) for one, (name, value) in set_by]:
            done.result(PATIENCE)
        assert {name: other.get_variable(name) for name in values} == values
    assert executor.execute("'_jupyter_exec' in vars(__import__('sys'))").text == "False"


def test_what_a_thread_prints_during_a_transfer_is_heard(server: LocalJupyterServer, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    code = "import threading, os, time\ndef late():\n    while 'x' not in globals(): time.sleep(0.001)\n"
    code += f"    print('late')\n    open({str(tmp_path / 'f')!r}, 'w')\nthreading.Thread(target=late).start()"
    with JupyterCodeExecutor(server, on_output=heard.append) as executor:
        executor.execute(code)
        executor.set_variables(x=1)
        eventually((tmp_path / "f").exists, "it is printed")
        eventually(lambda: executor.get_variable("x") and heard, "it is heard")
    assert "".join(output["text"] for output in heard) == "late\n"


def test_a_value_that_takes_for_ever_is_told(executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "TRANSFER_TIMEOUT", 1.0)
    executor.execute("class D(dict):\n    def items(self):\n        while True: pass\nx, endless = 1, D(a=1)")
    with pytest.raises(VariableError, match="Timeout: interrupted after 1 s; variables are kept"):
        executor.get_variable("endless")
    assert executor.get_variable("x") == 1


def answering(value: Any) -> Callable[[ScriptedKernel, dict[str, Any]], None]:
    """The script of a kernel that gives this for an expression."""

    def script(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        kernel.reply("execute_reply", {"status": "ok", "user_expressions": {"value": value}}, request)
        kernel.publish("status", {"execution_state": "idle"}, request)

    return script


@cases(
    "value",
    None,
    [],
    {"status": "ok"},
    {"status": "ok", "data": {"text/plain": 5}},
    {"status": "ok", "data": {"text/plain": "e30="}},
    {"status": "ok", "data": {"text/plain": "e30 e30"}},
    {"status": "ok", "data": {"text/plain": "W10= "}},
    {"status": "ok", "data": {"text/plain": "e30= "}},
    {"status": "error", "evalue": ["\x1b[2J"]},
    {"status": "error", "evalue": "\x1b]0;\x07" * 1000},
    ids=lambda value: ascii(value)[:50],
)
def test_no_reply_raises_anything_but_our_errors(value: Any) -> None:
    with scripted(answering(value)) as executor:
        for act in (lambda: executor.get_variable("x"), lambda: executor.list_files(), lambda: executor.download("x")):
            with pytest.raises((VariableError, FileTransferError)) as caught:
                act()
            assert "\x1b" not in str(caught.value)


@cases("data", b"\xff", b"[", b"", b"[" * 10**4, ids=["bytes", "half", "nothing", "deep"])
def test_a_value_that_is_no_json_is_told(data: bytes) -> None:
    parts = [base64.b64encode(part).decode() for part in (json.dumps({"size": len(data)}).encode(), data)]
    value = {"status": "ok", "data": {"text/plain": " ".join(parts)}}
    with scripted(answering(value)) as executor, pytest.raises(VariableError, match="what came is no JSON"):
        executor.get_variable("x")


@on_a_loop
async def test_files_and_variables_for_asyncio(tmp_path: Path) -> None:
    async with AsyncJupyterCodeExecutor(LocalJupyterServer(cwd=tmp_path)) as executor:
        await executor.execute("1")
        waiting = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('gone')"
        cell = asyncio.ensure_future(executor.execute(waiting))
        assert await executor.upload(b"data", "in") == "in"
        assert await executor.download("in") == b"data"
        assert [entry.name for entry in await executor.list_files()] == ["in"]
        await executor.download("in", tmp_path / "out")
        assert not cell.done()
        await executor.upload(b"", "go")
        assert (await cell).text == "gone\n"
        await executor.set_variables(x=[1, 2])
        assert await executor.get_variable("x") == [1, 2]
        begun, troubles = asyncio.Event(), []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: troubles.append(context))
        tell: Any = lambda done, total: loop.call_soon_threadsafe(begun.set)  # noqa: E731
        endless = asyncio.ensure_future(executor.upload(zeros(10**12), "never", on_progress=tell))
        await asyncio.wait_for(begun.wait(), PATIENCE)
        await cancel(endless)
        await asyncio.to_thread(
            eventually, lambda: sorted(os.listdir(tmp_path)) == ["go", "in", "out"], "the half file is gone"
        )
        await executor.stop()
        executor._executor and executor._executor._server.stop()
        gc.collect()
        assert troubles == []  # an error that nobody waits for is none


# When things go wrong


# A module whose function is in C code that holds the GIL, and cannot be interrupted.
DEAF = """import ctypes, signal, types
def f():
    list(map(sleep, [60]))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
exec(compile("libc = ctypes.PyDLL(None)\\ndef sleep(n):\\n while True: libc.sleep(n)", "/lib/deaf.py", "exec"), globals())
f()
"""


@pytest.mark.slow
@cases("preload", None, pytest.param([], marks=pytest.mark.slow))
def test_a_kernel_that_was_killed_or_crashed_tells_where(preload: Any, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
    with LocalJupyterServer(preload=preload) as server, JupyterCodeExecutor(server) as executor:
        stuck = executor.execute(f"\n\n{DEAF}", timeout=0.3)
        assert re.search(r"; it was at line 5: list\(map\(sleep, \[60\]\)\), in sleep \(deaf\.py:3\)$", stuck.note)
        crash = executor.execute("import ctypes\ndef f():\n    ctypes.string_at(0)\nf()")
        assert re.search(r"Segmentation fault\n.* in string_at\n.*, line 3 in f\n.*, line 4 in <module>$", crash.note)


OWN_FRAME, OTHER_FRAME = (
    '  File "/tmp/ipykernel_1/2.py", line 2 in f\n',
    '  File "/lib/ipykernel/x.py", line 3 in run\n',
)
ABORTED = (
    "Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n" + OTHER_FRAME + "\nCurrent thread 0x2 (most"
)


@cases(
    "stderr, place",
    (f"{ABORTED}):\n{OWN_FRAME}{OTHER_FRAME}\nExtension modules: x", "; it was at line 2: b"),
    (f'{ABORTED}):\n  File "/x/re.py", line 7 in go\x1b[2J\n{OWN_FRAME}', "; it was at line 2: b, in go (re.py:7)"),
    (f"{ABORTED}):\n{OWN_FRAME * 3000}{OTHER_FRAME * 3000}", "; it was at line 2: b"),
    (f"{ABORTED}):\n{OWN_FRAME.replace('2 in', '9 in')}", ""),
    (f"{ABORTED}):\n{OWN_FRAME.replace('2 in', '9' * 5000 + ' in')}", ""),
    (f"{ABORTED}):\n{OTHER_FRAME}", ""),
    ("Fatal Python error: " * 3000, ""),
    ("", ""),
)
def test_what_a_kernel_writes_when_it_is_killed_is_not_trusted(stderr: str, place: str) -> None:
    short = jupyter_exec.without_machinery(stderr)
    assert len(short) <= 2 * jupyter_exec.STDERR_TAIL
    result = jupyter_exec.ExecutionResult("timeout", 124, "lost", "", [], death=KernelDied(stderr=short))
    assert jupyter_exec.place_of(result, "a\nb\nc") == place


@cases(
    "frames, place",
    (["Cell In[3], line 2, in f()\n      1 x\n----> 2 y"], "line 2: b"),
    (["Cell In[1], line 1, in f()", "Cell In[3], line 3", "Cell In[2], line 1"], "line 3: c"),
    (["Input In [3], in <cell line: 2>()\n----> 2 y"], "line 2: b"),
    (["<ipython-input-3-0123> in <module>\n----> 1 x"], "line 1: a"),
    (["/tmp/ipykernel_9/12.py in f()\n      1 x\n----> 3 y"], "line 3: c"),
    (["Cell In[3], line 9"], ""),
    (["Cell In[3], line " + "9" * 5000], ""),
    (["File /lib/x.py:3, in f"], ""),
)
def test_the_line_of_an_interrupted_cell_is_found_in_the_traceback(frames: list[str], place: str) -> None:
    error = {"output_type": "error", "ename": "KeyboardInterrupt", "evalue": "", "traceback": ["---", *frames, "end"]}
    result = jupyter_exec.ExecutionResult("timeout", 124, "intact", "", [error], 3)
    assert jupyter_exec.place_of(result, "a\nb\nc") == (f"; it was at {place}" if place else "")


def test_a_death_between_calls_is_told_and_the_code_not_run(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    pid = int(run(executor, "import os; os.getpid()").output)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid), "the kernel is gone")
    result = run(executor, f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "SIGKILL" in result.output and "all variables are lost" in result.output
    assert not (tmp_path / "ran").exists()
    assert run(executor, "1").output == "1"


# Jobs, and cells that go on without their call


@pytest.fixture(params=["server", "docker", "jupyter_server"])
def detaching(request: FixtureRequest, server: Any, jupyter_server: Peer, tmp_path: Path) -> Iterator[Any]:
    with server_of(request, request.param) as where:
        with JupyterCodeExecutor(where, output_dir=tmp_path, on_timeout="detach") as executor:
            yield executor


GO_ON = "import time\nprint('a', flush=True)\ntime.sleep(1.5)\nprint('b')\n6 * 7"
FOR_EVER = "import time\nprint('go', flush=True)\nwhile True: time.sleep(0.01)"


def test_a_detached_cell_goes_on_and_wait_has_all_of_it(detaching: JupyterCodeExecutor, tmp_path: Path) -> None:
    with pytest.raises(JupyterExecError, match="nothing to wait for"):
        detaching.wait()
    result = detaching.execute(GO_ON, timeout=0.5)
    assert (result.status, result.exit_code, result.kernel_state) == ("running", 124, "busy")
    assert result.text == f"a\n{jupyter_exec.STILL_RUNNING}"
    with pytest.raises(ExecutionTimeout):
        result.raise_for_error()
    for busy in (run(detaching, "1"), run(detaching, "2")):
        assert (busy.exit_code, busy.output, busy.kernel_state) == (1, jupyter_exec._BUSY, "busy")
    detaching.save_notebook(tmp_path / "n.ipynb")  # does not wait
    assert detaching.wait(0) is None
    whole = detaching.wait(PATIENCE)
    assert (whole.status, whole.exit_code, whole.kernel_state, whole.text) == ("ok", 0, "intact", "a\nb\n42")
    assert detaching.wait() is whole
    assert run(detaching, "1").output == "1"
    detaching.save_notebook(tmp_path / "n.ipynb")
    cells = read_notebook(tmp_path / "n.ipynb", as_version=4).cells
    assert [cell.source for cell in cells] == [GO_ON, "1"]
    assert cells[0].outputs[0].text == "a\nb\n"


@pytest.mark.slow
def test_a_detached_call_goes_on_with_its_next_blocks(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, timeout=1, output_dir=tmp_path, on_timeout="detach") as executor:
        picture = "from IPython.display import SVG; display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'))"
        result = run(executor, f"{picture}\n1", f"print('x', flush=True)\n{GO_ON}", "print('last')")
        assert (result.exit_code, result.kernel_state, len(result.output_files)) == (124, "busy", 1)
        assert result.output.endswith(f"1\nx\na\n{jupyter_exec.STILL_RUNNING}")
        whole = executor.wait(PATIENCE)
        assert (whole.exit_code, whole.output_files) == (0, result.output_files)
        assert whole.output.endswith("1\nx\na\nb\n42\nlast\n")


@cases(
    "end, status, says",
    ("interrupt", "interrupted", "Interrupted; variables are kept"),
    ("restart", "died", "The kernel was restarted while the code ran; all variables are lost"),
    ("stop", "died", "The executor was stopped while the code ran; all variables are lost"),
    ("SIGKILL", "died", "The kernel died (killed by signal 9, SIGKILL); all variables are lost"),
)
def test_a_detached_cell_can_be_ended(server: LocalJupyterServer, end: str, status: str, says: str) -> None:
    with JupyterCodeExecutor(server, on_timeout="detach") as executor:
        pid = int(run(executor, "x = 5\nimport os; os.getpid()").output)
        assert executor.execute(FOR_EVER, timeout=0.3).status == "running"
        os.kill(pid, signal.SIGKILL) if end == "SIGKILL" else getattr(executor, end)()
        result = executor.wait(PATIENCE)
        assert (result.status, result.note) == (status, says)
        assert result.text.startswith("go\n")
        if end != "stop":
            assert run(executor, "'x' in dir()").output == str(end == "interrupt")
            return
        with pytest.raises(JupyterExecError, match="was stopped"):
            run(executor, "1")


def test_a_slow_hook_does_not_keep_a_call_from_being_detached(server: LocalJupyterServer) -> None:
    free = threading.Event()
    hook: Any = lambda output: free.wait(PATIENCE)  # noqa: E731
    with JupyterCodeExecutor(server, on_timeout="detach") as executor:
        result = executor.execute(FOR_EVER, timeout=0.3, on_output=hook)
        assert (result.status, result.text) == ("running", f"go\n{jupyter_exec.STILL_RUNNING}")
        free.set()
        executor.interrupt()
        assert executor.wait(PATIENCE).status == "interrupted"


@cases("on_timeout", "interrupt", "detach")
def test_a_hook_cannot_run_another_cell(server: LocalJupyterServer, on_timeout: Any, caplog: Any) -> None:
    said: list[CodeResult] = []
    executor: JupyterCodeExecutor

    def hook(output: dict[str, Any]) -> None:
        said.append(run(executor, "2"))
        executor.execute("2")

    with JupyterCodeExecutor(server, on_timeout=on_timeout) as executor:
        result = executor.execute("print(1)", on_output=hook)
    assert (result.status, result.text, said[0].output) == ("ok", "1\n", jupyter_exec.HOOK_RUNS_CELL)
    assert "its hooks cannot run another one" in caplog.text


def test_jobs_run_in_order_and_tell_their_state(executor: JupyterCodeExecutor) -> None:
    first = executor.submit(f"x = [1]\n{FOR_EVER}")
    second, third = executor.submit([CodeBlock("x.append(2)"), CodeBlock("x"), CodeBlock("1/0")]), executor.submit("3")
    eventually(lambda: first.output == "go\n", "the first has begun")
    assert [job.status for job in (first, second, third)] == ["running", "waiting", "waiting"]
    assert (first.wait(0), first.done, second.output) == (None, False, "")
    third.interrupt()
    assert third.wait(PATIENCE).note == jupyter_exec._NOT_BEGUN
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(first.wait, PATIENCE) for _ in range(4)]
        first.interrupt()
        assert {call.result().status for call in waiting} == {"interrupted"}
    result = second.wait(PATIENCE)
    assert result.exit_code == 1
    assert result.output.startswith("\n[1, 2]\nZeroDivisionError: division by zero\n")
    assert [job.status for job in (first, second, third)] == ["interrupted", "done", "interrupted"]
    assert second.output == result.output and first.output == first.wait().text
    assert executor.submit("5").wait().text == executor.wait().text == run(executor, "5").output


@pytest.mark.slow
def test_a_job_may_wait_behind_a_detached_cell_and_has_the_executors_timeout(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, timeout=1, on_timeout="detach") as executor:
        run(executor, "import time\ntime.sleep(1.5)")
        assert executor.submit("5").wait(PATIENCE).text == "5"
    with JupyterCodeExecutor(server, timeout=1) as executor:
        job = executor.submit(FOR_EVER)
        assert (job.wait(PATIENCE).exit_code, job.status) == (124, "timeout")


def test_the_output_of_a_job_is_as_in_results_and_bounded(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, max_output=1000, output_dir=tmp_path) as executor:
        for code in ("'a\\rb\\x1b[2J'", "'x' * 9999"):
            job = executor.submit([CodeBlock(f"print({code}, flush=True)\n1"), CodeBlock(FOR_EVER)])
            eventually(lambda job=job: job.output.endswith("go\n"), "it is at its second block")  # type: ignore[misc]
            so_far = job.output
            job.interrupt()
            assert job.wait(PATIENCE).output[:500] == so_far[:500] if "9999" in code else so_far == "b\n1\ngo\n"
            assert len(so_far) < 1100


@cases("kind", "idle", "submitted", "detached", "attached")
def test_a_job_ends_with_a_collected_executor(
    server: LocalJupyterServer, executor: JupyterCodeExecutor, kind: str
) -> None:
    run(executor, "1")
    before = set(threading.enumerate())
    target: Any = executor.connection_file if kind == "attached" else server
    other: Any = JupyterCodeExecutor(target, on_timeout="detach")
    pid = int(run(other, "import os; os.getpid()").output)
    job: Any = None
    if kind != "idle":
        job = other.submit(FOR_EVER)
        eventually(lambda: job.output, "it has begun")
    if kind == "detached":
        job = None
    with pytest.warns(ResourceWarning, match="forgotten"):
        del other
        gc.collect()
    if job:
        assert job.wait(PATIENCE).status == "died"
    eventually(lambda: set(threading.enumerate()) <= before, "its threads have ended")
    if kind == "attached":
        executor._kernel._control.interrupt(lambda: None)
    else:
        eventually(lambda: is_gone(pid), "the kernel is gone")


@pytest.mark.slow
def test_a_detached_cell_survives_a_dropped_connection(
    jupyter_server: Peer, tmp_path: Path, connections: list[socket.socket]
) -> None:
    with JupyterCodeExecutor(jupyter_server.info, on_timeout="detach") as executor:
        code = waiting_for(tmp_path / "gate", "print('first', flush=True)")
        code += "for i in range(5): print(i, flush=True)\n7"
        assert executor.execute(code, timeout=0.5).status == "running"
        connections[0].shutdown(socket.SHUT_RDWR)
        result = executor.wait(PATIENCE)
        assert (result.status, result.kernel_state) == ("ok", "intact")
        assert result.text.startswith("first\n0\n1\n2\n3\n4\n7")
        assert run(executor, "7").output == "7"
    assert len(connections) == 2


def submit_endless(pool: ThreadPoolExecutor, executor: JupyterCodeExecutor) -> Any:
    """Run a cell without end in another thread; its future comes when it has begun."""
    going = threading.Event()
    cell = pool.submit(executor.execute, FOR_EVER, on_output=lambda output: going.set())
    assert going.wait(PATIENCE)
    return cell


@cases("what", "restart", "stop")
def test_restart_and_stop_end_the_running_cell_before_all_others(server: LocalJupyterServer, what: str) -> None:
    with JupyterCodeExecutor(server) as executor, ThreadPoolExecutor(5) as pool:
        run(executor, "x = 1")
        running = submit_endless(pool, executor)
        waiting = [pool.submit(run, executor, "'x' in dir()", "2") for _ in range(4)]
        eventually(lambda: len(executor._turns._queue) == 5, "four wait in line")
        getattr(executor, what)()
        ended = running.result(PATIENCE)
        assert (ended.status, ended.kernel_state) == ("died", "lost")
        done = "stopped" if what == "stop" else "restarted"
        assert re.fullmatch(rf"The \w+ was {done} while the code ran; all variables are lost", ended.note)
        for call in waiting:
            if what == "stop":
                with pytest.raises(JupyterExecError, match="The executor was stopped"):
                    call.result(PATIENCE)
            else:
                assert call.result(PATIENCE).output == f"False\n{jupyter_exec._FRESH}\n2"
        assert what == "stop" or run(executor, "1").output == "1"


@pytest.mark.slow
@cases("what", "restart", "stop")
@cases("during", "the start", "the prelude", "blocks", "set_variables")
def test_restart_and_stop_are_named_wherever_they_meet_a_call(
    server: LocalJupyterServer, what: str, during: str, monkeypatch: MonkeyPatch
) -> None:
    def take_away_first(*arguments: Any, real: Any, **options: Any) -> Any:
        if not evictor.ident:
            evictor.start()
            eventually(lambda: executor._kernel.ended, "the kernel is killed")
        return real(*arguments, **options)

    startup = "x = 1" if during == "the prelude" else ""
    with JupyterCodeExecutor(server, startup=startup) as executor:
        if during in ("blocks", "set_variables"):
            run(executor, "1")
        place: Any = executor if during == "blocks" else executor._kernel
        step = {"the start": "_greet", "blocks": "_make_ready"}.get(during, "execute")
        evictor = threading.Thread(target=getattr(executor, what))
        monkeypatch.setattr(place, step, functools.partial(take_away_first, real=getattr(place, step)))
        says = f"The {'executor was stopped' if what == 'stop' else 'kernel was restarted'} while the code ran"
        if during == "blocks":
            assert says in run(executor, "1", "2").output
        else:
            with pytest.raises((KernelError, VariableError), match=says):
                executor.set_variables(x=1) if during == "set_variables" else executor.submit("1").wait(PATIENCE)
        evictor.join(PATIENCE)
        assert what == "stop" or run(executor, "1").output == "1"


def test_stop_of_an_attached_executor_ends_its_cell_only(executor: JupyterCodeExecutor) -> None:
    run(executor, "x = 7")
    assert executor.connection_file
    with JupyterCodeExecutor(executor.connection_file) as attached, ThreadPoolExecutor(1) as pool:
        running = submit_endless(pool, attached)
        with pytest.raises(KernelError, match="not ours to restart"):
            attached.restart()
        assert not running.done()
        attached.stop()
        assert running.result(PATIENCE).status == "interrupted"
    assert run(executor, "x").output == "7"


def test_threads_with_a_stop_at_a_random_instant(server: LocalJupyterServer) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    randoms = random.Random(seed)
    for _ in range(3):
        executor = JupyterCodeExecutor(server)
        run(executor, "import time; ran = []")
        seconds = [randoms.choice([0, 0.001, 0.01]) for _ in range(32)]

        def cell(number: int, nap: float, executor: JupyterCodeExecutor = executor) -> str:
            try:
                return executor.execute(f"ran.append({number}); time.sleep({nap})").status
            except JupyterExecError as error:
                assert str(error) == jupyter_exec._STOPPED
                return "stopped"

        with ThreadPoolExecutor(33) as pool:
            cells = [pool.submit(cell, number, nap) for number, nap in enumerate(seconds)]
            time.sleep(randoms.random() * 0.2)
            stops = [pool.submit(executor.stop) for _ in range(2)]
            said = [call.result(PATIENCE) for call in cells]
            assert [stop.result(PATIENCE) for stop in stops] == [None, None]
        assert set(said) <= {"ok", "died", "stopped"} and said.count("died") <= 1
        assert executor._turns._queue == []


def test_cells_of_many_threads_run_in_the_order_of_the_calls(executor: JupyterCodeExecutor) -> None:
    run(executor, "import time; order = []")
    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=run, args=(executor, f"order.append({number}); time.sleep(0.02)")))
        threads[-1].start()
        eventually(lambda: len(executor._turns._queue) > 0 or not threads[-1].is_alive(), "the thread is in the queue")
    for thread in threads:
        thread.join()
    assert run(executor, "order").output == str(sorted(range(8)))


@pytest.mark.slow
def test_sixteen_kernels_at_work_on_one_server(server: LocalJupyterServer) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        executors = [stack.enter_context(JupyterCodeExecutor(server)) for _ in range(16)]
        outputs = pool.map(lambda n: [run(executors[n], f"print({n})").output for _ in range(5)], range(16))
        assert [*outputs] == [[f"{number}\n"] * 5 for number in range(16)]


def test_an_executor_in_a_forked_child_says_so_and_a_server_collected_there_lives_on() -> None:
    program = """
        import gc, os, sys, threading, warnings, jupyter_exec
        warnings.simplefilter("ignore")
        server, spare = jupyter_exec.LocalJupyterServer(), jupyter_exec.LocalJupyterServer()
        executor = jupyter_exec.JupyterCodeExecutor(server)
        executor.execute("x = 5")
        spare.kernelspecs()
        if os.fork() == 0:
            result = executor.execute_code_blocks([jupyter_exec.CodeBlock("1")])
            print(result.exit_code, "forked" in result.output, flush=True)
            kept = executor._kernel
            del spare, executor
            gc.collect()
            for thread in set(threading.enumerate()) - {threading.current_thread()}:
                thread.join()
            os._exit(0)
        os.wait()
        print(executor.execute("x").text, "python3" in spare.kernelspecs())
    """
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("1 True\n5 True\n", "")


ENDINGS_OF_PROGRAMS = ["sys.exit(3)", "1 / 0", "os.kill(os.getpid(), 15)"]


@cases(
    "server, ending",
    ("LocalJupyterServer()", "pass"),
    ("CommandJupyterServer([sys.executable])", "pass"),
    *(pytest.param("LocalJupyterServer()", ending, marks=pytest.mark.slow) for ending in ENDINGS_OF_PROGRAMS),
)
def test_forgotten_servers_end_silently_with_the_program(server: str, ending: str, marker: str, tmp_path: Path) -> None:
    program = f"""
        import os, sys, threading
        from jupyter_exec import *
        executor, go = JupyterCodeExecutor({server}), threading.Event()
        code = "print('go', flush=True)\\nwhile True: print('x' * 1000)"
        threading.Thread(target=executor.execute, args=(code,), kwargs={{"on_output": lambda output: go.set()}}, daemon=True).start()
        go.wait(20)
        {ending}
    """
    result = run_python(program, env=environment(TMPDIR=str(tmp_path), MARK=marker))
    assert (result.returncode == 0, result.stdout) == (ending == "pass", "")
    assert re.fullmatch(r"(Traceback.*\n(  .*\n)+ZeroDivisionError.*\n)?", result.stderr)
    eventually(lambda: not list(tmp_path.iterdir()), "every file is gone")


@pytest.mark.slow
@cases("kind", "local", "command", "gateway")
def test_a_server_that_nobody_refers_to_ends(kind: str) -> None:
    before = resources()
    server: Any = CommandJupyterServer([sys.executable]) if kind == "command" else LocalJupyterServer()
    if kind == "gateway":
        need("server", installed("kernel_gateway"))
        server = LocalJupyterServer(transport="gateway")
    executor: Any = JupyterCodeExecutor(server)
    del server
    gc.collect()
    assert run(executor, "1").output == "1"  # it holds its server
    executor.stop()
    assert resources()["processes"] > before["processes"]
    del executor
    gc.collect()
    names = ("processes", "threads", "files")
    eventually(lambda: all(resources()[name] <= before[name] for name in names), "nothing is left")


def test_a_forked_child_that_leaves_the_with_of_its_parent_ends_nothing(gateway: Peer) -> None:
    program = """
        import os, sys, warnings, jupyter_exec
        warnings.simplefilter("ignore")
        info = jupyter_exec.JupyterConnectionInfo("127.0.0.1", False, int(sys.argv[1]), sys.argv[2])
        for server in (jupyter_exec.RemoteJupyterServer(info), jupyter_exec.LocalJupyterServer()):
            with server:
                kernel = server.start_kernel()
                kernel.wait_ready()
                if os.fork() == 0:
                    sys.exit()
                os.wait()
                print(kernel.execute("6 * 7", 20).text, flush=True)
    """
    result = run_python(program, str(gateway.info.port), gateway.info.token or "")
    assert (result.stdout, result.stderr) == ("42\n42\n", "")


def test_a_killed_host_is_reported_and_replaced_and_what_its_kernels_had_started_is_ended(marker: str) -> None:
    with LocalJupyterServer(env={"MARK": marker}) as server, JupyterCodeExecutor(server) as executor:
        code = "import os, signal, subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        code += "os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)"
        result = run(executor, code)
        assert (result.exit_code, result.kernel_state) == (137, "lost")
        assert "SIGKILL" in result.output
        assert run(executor, "1").output == "1"
        assert not any("sleep\0" in command_line(pid) for pid in marked_processes(f"MARK={marker}"))


@pytest.mark.slow
def test_a_client_that_was_stopped_under_a_flood_still_ends_its_cell(tmp_path: Path) -> None:
    program = """
        import jupyter_exec
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            code = "print('go', flush=True)\\nshow = get_ipython().display_pub.publish\\n"
            code += "for i in range(10_000): show({'text/plain': 'x' * 500})\\n"
            code += "import os, time\\nwhile not os.path.exists('GATE'): time.sleep(0.5)"  # so that idle is not lost, too
            seen = []
            result = executor.execute(code, timeout=60, on_output=lambda output: seen or (print("ready", flush=True), seen.append(1)))
            print(result.status, (len(result.outputs) == 10_001) != ("lost" in result.note), executor.execute("7").text)
    """
    with client_program(program.replace("GATE", str(tmp_path / "gate"))) as client:
        assert client.stdout
        client.send_signal(signal.SIGSTOP)
        family = descendants(client.pid)
        busy = [-1.0]

        def still() -> bool:  # the kernel has nothing to do any more, or nobody to do it for
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in family]
            before, busy[0] = busy[0], sum(float(stat[11]) + float(stat[12]) for stat in stats)
            time.sleep(0.2)
            return busy[0] == before

        try:
            eventually(still, "the flood is over")
        finally:
            client.send_signal(signal.SIGCONT)
            (tmp_path / "gate").touch()
        assert client.stdout.readline() == "ok True 7\n"
        client.wait(PATIENCE)


@pytest.mark.slow
@cases(
    "code",
    "for i in range(50): input()",
    "import time; time.sleep(100)",
    "import asyncio; await asyncio.sleep(0.5)",
    "import os\nfor i in range(50):\n if not os.fork(): print(1, flush=True); os._exit(0)\n os.wait()",
    "print('x' * 3_000_000)",
)
def test_what_comes_beside_a_cell_is_no_lost_output(
    code: str, executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch
) -> None:
    noisy = textwrap.dedent("""
        import threading
        from comm import create_comm
        def chatter():
            while not enough.wait(0.01):
                display(1), print(2), create_comm(target_name="t").send({})
        enough = threading.Event()
        for _ in range(3): threading.Thread(target=chatter, daemon=True).start()
    """)
    seen: list[jupyter_exec.Execution] = []

    class Seen(jupyter_exec.Execution):
        def result(self, duration: float) -> jupyter_exec.ExecutionResult:
            seen.append(self)
            return super().result(duration)

    monkeypatch.setattr(jupyter_exec, "Execution", Seen)
    assert executor.connection_file
    with JupyterCodeExecutor(executor.connection_file) as other, ThreadPoolExecutor(1) as pool:
        assert executor.execute(noisy).status == "ok"
        asked = pool.submit(lambda: [other.execute("1", timeout=PATIENCE) for _ in range(30)])
        result = executor.execute(code, timeout=1 if "100" in code else PATIENCE, on_input=lambda *question: "1")
        assert result.kernel_state == "intact"
        asked.result(PATIENCE)
        executor.execute("enough.set()")
    assert len(seen) == 33
    assert [vars(made._tally) for made in seen if made.outputs_lost] == []


@pytest.mark.slow
def test_a_slow_hook_loses_nothing(executor: JupyterCodeExecutor) -> None:
    seen: list[Any] = []

    def slow(output: dict[str, Any]) -> None:
        if not seen:
            time.sleep(0.3)
        seen.append(output)

    executor.execute("for i in range(5000): display(i)", on_output=slow)
    assert len(seen) == 5000


def test_unread_output_is_bounded(executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAILBOX_LIMIT", 10_000_000)
    first = threading.Event()
    mailbox = executor._kernel._mailbox

    def slow(output: dict[str, Any]) -> None:
        if not first.is_set():
            first.set()
            eventually(lambda: mailbox.dropped, "output is dropped")

    code = "import time\nfor i in range(60): print('x' * 1_000_000, flush=True); time.sleep(0.005)\nprint('end', flush=True)"
    result = executor.execute(code, timeout=60, on_output=slow)
    assert (result.status, result.exit_code) == ("ok", 0)
    assert "Some of the output was lost" in result.note


@pytest.mark.slow
@cases("when", "before the start", "before a cell")
def test_a_limit_of_open_files_is_told_wherever_it_is_reached_and_overcome(when: str, tmp_path: Path) -> None:
    program = """
        import resource, sys, jupyter_exec
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        def limit(more):
            with open("/dev/null") as file:
                resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + more, hard))
        for more in (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24):
            server = jupyter_exec.LocalJupyterServer(start_timeout=5)
            if sys.argv[2] == "before a cell":
                executor = jupyter_exec.JupyterCodeExecutor(server, output_dir=sys.argv[1])
                executor.execute("1")
            limit(more)
            try:
                if sys.argv[2] != "before a cell":
                    executor = jupyter_exec.JupyterCodeExecutor(server, output_dir=sys.argv[1])
                results = [executor.execute_code_blocks(code) for code in ("from IPython.display import HTML; HTML('<b>')", "print('x' * 200_000)", "exit()", "1")]
                assert all(result.exit_code == 0 or result.output for result in results), results
            except (jupyter_exec.JupyterExecError, OSError) as error:
                assert str(error)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            server.stop()
            with jupyter_exec.LocalJupyterServer() as fresh, jupyter_exec.JupyterCodeExecutor(fresh) as other:
                assert other.execute("6 * 7").text == "42", more
        print("done")
    """
    assert run_python(program, str(tmp_path), when, timeout=110).stdout == "done\n"


@pytest.mark.slow
def test_two_hundred_kernels_leave_nothing(server: LocalJupyterServer) -> None:
    for number in range(200):
        with JupyterCodeExecutor(server) as executor:
            if number % 20 == 0:
                assert run(executor, "1").output == "1"
        if number == 20:
            before = resources()
    # The I/O thread closes the last kernel's sockets when `stop` has returned.
    eventually(lambda: resources()["sockets"] <= before["sockets"] + 2, "no more sockets than before")
    assert resources()["threads"] == before["threads"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_memory_is_flat_over_many_cells() -> None:
    program = """
        import gc, jupyter_exec
        def used():
            gc.collect()
            return int(open("/proc/self/statm").read().split()[1]) * 4
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            for number in range(20_000):
                executor.execute("1")
                if number == 2000:
                    before = used()
            print(used() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    grown = int(subprocess.run(command, capture_output=True, text=True, timeout=390, env=environment()).stdout)
    assert grown < 4000  # KB


IN_TIME = {(0, "intact"), (124, "intact")}  # or not
FAULTS: dict[str, tuple[str, set[tuple[int, str]]]] = {
    "fine": ("print('fine')", {(0, "intact")}),
    "raise": ("1 / 0", {(1, "intact")}),
    "timeout": ("while True: pass", {(124, "intact")}),
    "sleep": ("import time; time.sleep(60)", {(124, "intact")}),
    "await": ("import asyncio; await asyncio.sleep(60)", {(124, "intact")}),
    "flood": ("while True: print('x' * 1000)", {(124, "intact")}),
    "exit": ("exit()", {(0, "lost")}),
    "crash": ("import os; os.kill(os.getpid(), 11)", {(139, "lost")}),
    "kill": ("import os; os.kill(os.getpid(), 9)", {(137, "lost")}),
    "end": ("import os; os._exit(4)", {(1, "lost")}),
    "host": ("import os, time; os.kill(os.getppid(), 9); time.sleep(60)", {(137, "lost")}),
    "orphan": ("import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)", {(0, "intact")}),
    "big": ("print('y' * 3_000_000)", IN_TIME),
    "displays": ("for i in range(200): display(i)", IN_TIME),
    "turns": ("import sys\nfor i in range(50): print(i, flush=True); print(i, file=sys.stderr, flush=True)", IN_TIME),
    "bytes": ("print('\\udc80' * 200_000 + chr(92) * 500_000 + 'x\\b' * 50_000)", IN_TIME),
    "updates": ("h = display(0, display_id=True)\nfor i in range(200): h.update(i)", IN_TIME),
    "deep": ("v = []\nfor i in range(900): v = [v]\ndisplay({'application/json': v}, raw=True)", IN_TIME),
    "stopped": ("import os; os.kill(os.getpid(), 19)", {(124, "lost")}),
    "tool": ("print([add(i) for i in range(20)])", IN_TIME),
    "tools": (
        "from concurrent.futures import ThreadPoolExecutor as P\nwith P(8) as p: print(list(p.map(add, range(50))))",
        IN_TIME,
    ),
    "many tools": ("while True: await echo(5)", {(1, "intact"), (124, "intact")}),
    "slow tool": ("slow()", {(124, "intact")}),
    "left tool": ("import threading; threading.Thread(target=slow).start()", {(0, "intact")}),
    "killed tool": (
        "import threading, os\nthreading.Timer(0.1, os.kill, (os.getpid(), 9)).start(); slow()",
        {(137, "lost")},
    ),
}


def slow() -> None:
    while not jupyter_exec.tool_call_ended():
        threading.Event().wait(0.02)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_soak_of_random_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("JUPYTER_EXEC_SEED", time.time_ns() % 10**6))
    choose = random.Random(seed)
    end = time.monotonic() + 60
    counts = dict.fromkeys(FAULTS, 0)
    with LocalJupyterServer() as server:
        tools: list[Any] = [add, echo, slow]
        executors = [JupyterCodeExecutor(server, output_dir=tmp_path, timeout=1, tools=tools) for _ in range(3)]
        alive = [False] * 3  # whether the variable of each kernel is set
        while time.monotonic() < end:
            which, fault = choose.randrange(3), choose.choice(list(FAULTS))
            code, expected = FAULTS[fault]
            counts[fault] += 1
            what = f"seed {seed}, {counts}, {fault}"
            result = run(executors[which], "x = 5", code)
            if result.output.startswith("The kernel died (its host is gone"):  # by a fault in another kernel
                alive[which] = False
                continue
            assert (result.exit_code, result.kernel_state) in expected, f"{what}: {result}"
            assert ("variables are lost" in result.output) == (result.kernel_state == "lost" and fault != "exit"), what
            if fault == "host":
                alive = [False] * 3
                continue
            alive[which] = result.kernel_state == "intact"
            kept = run(executors[which], "'x' in dir()").output
            assert kept == str(alive[which]), f"{what}: {kept}"
        for executor in executors:
            executor.stop()
    print(f"soak: seed {seed}, {sum(counts.values())} cells, {counts}")


@pytest.mark.slow
@cases("kind", "direct", "relay")
def test_a_flood_of_small_messages_starves_nobody(kind: str) -> None:
    made = LocalJupyterServer() if kind == "direct" else CommandJupyterServer([sys.executable])
    with made as server, JupyterCodeExecutor(server) as executor, JupyterCodeExecutor(server) as bystander:
        run(bystander, "y = 7")
        results: list[Any] = []
        flood = threading.Thread(target=lambda: results.append(executor.execute("while True: display(1)", timeout=1)))
        flood.start()
        assert run(bystander, "y").output == "7"
        flood.join(PATIENCE)
        assert (results[0].status, results[0].kernel_state) == ("timeout", "intact")
        assert run(bystander, "y").output == "7"


def test_children_without_session_and_environment_die_with_the_server() -> None:
    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
        number = f"9{time.time_ns() % 10**8}"
        run(executor, f"import os; os.system('setsid env -i /bin/sleep {number} &')")
        eventually(lambda: marked_processes(f"/bin/sleep\0{number}"), "it sleeps")
    eventually(lambda: not marked_processes(f"/bin/sleep\0{number}"), "it is gone")


# Languages, pip, functions


def run_block(executor: JupyterCodeExecutor, code: str, language: str) -> CodeResult:
    return executor.execute_code_blocks([CodeBlock(code, language)])


PYTHONS: list[Any] = ["python", "py", "Python", "ipython", "python3", "python3.11", "", None]


@cases(
    "code, language, exit_code, output",
    *(("6 * 7", name, 0, "42") for name in PYTHONS),
    ("command -v python", "bash", 0, f"{Path(sys.executable).parent}/python\n"),
    ('!echo "hello world!"', "bash", 0, "hello world!\n"),  # AutoGen's: a bang in a block of bash is IPython's
    ("%time 1", "sh", 0, None),
    ("puts 1", "ruby", 1, "The kernel runs python or bash, not ruby: the block was not run."),
)
def test_languages_of_blocks(
    executor: JupyterCodeExecutor, code: str, language: Any, exit_code: int, output: str | None
) -> None:
    result = run_block(executor, code, language)
    assert result.exit_code == exit_code
    assert output is None or result.output == output


@pytest.mark.slow
def test_a_timeout_of_a_shell_is_its_status(
    server: LocalJupyterServer, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    with JupyterCodeExecutor(server, timeout=1, output_dir=tmp_path) as executor:
        result = run_block(executor, "echo a; sleep 30", "bash")
        assert (result.exit_code, result.kernel_state) == (124, "intact")
        assert "Timeout: interrupted after 1 s" in result.output
        monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
        result = run_block(executor, "trap '' INT; sleep 30; sleep 30", "bash")
        assert result.output.endswith("all variables are lost")  # and no line of our own program


@cases("language", "bash", "sh", "shell", "BASH")
def test_shell_blocks_run_in_a_shell_and_give_their_status(executor: JupyterCodeExecutor, language: str) -> None:
    result = run_block(executor, "for i in 1 2; do echo $i; done\necho 'it''s'\necho err >&2", language)
    assert (result.exit_code, result.output.split()) == (0, ["1", "2", "its", "err"])
    failed = run_block(executor, "echo before; exit 3", language)
    assert (failed.exit_code, failed.output, failed.kernel_state) == (3, "before\n", "intact")


@cases(
    "script, status, output",
    ("echo {1+1} '{{.State}}' $((1+1))", 0, "{1+1} {{.State}} 2\n"),
    ("cat <<'E'\n{a} $x `y` \\\npip install z\nE", 0, "{a} $x `y` \\\npip install z\n"),
    ("cat; read x; echo rest", 0, "rest\n"),
    ("set -e\nfalse\necho no", 1, ""),
    ("kill -9 $$", 137, ""),
    ("echo é \\", 0, "é \\\n"),
    ("printf '\\303'; sleep 0.2; printf '\\251'", 0, "é"),
    ("if true; then\r\n  echo a\r\nfi\r\n", 0, "a\n"),
    ("echo a\n\0echo b", 0, "a\nb\n"),
    ("", 0, ""),
    ("# nothing", 0, ""),
    (f"x='{'y' * 1_000_000}'; echo ${{#x}}", 0, "1000000\n"),
    ("exec >&- 2>&-; exit 5", 5, ""),
    ("for i in 1 2 3; do echo $i; echo $i >&2; done", 0, "112233"),
)
def test_a_script_reaches_the_shell_as_written(
    executor: JupyterCodeExecutor, script: str, status: int, output: str
) -> None:
    result = run_block(executor, script, "bash")
    assert (result.exit_code, result.kernel_state) == (status, "intact")
    both = "".join(sorted(result.output.split()))  # of stdout and stderr, in no order
    assert output == (both if output == "112233" else result.output)


@pytest.mark.slow
def test_a_script_runs_where_descriptors_are_closed_and_in_the_python_of_its_kernel(tmp_path: Path) -> None:
    (tmp_path / "python-of-its-own").symlink_to(sys.executable)
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with LocalJupyterServer(python=tmp_path / "python-of-its-own", env=env) as server:
        with JupyterCodeExecutor(server) as executor:
            run(executor, "import os; os.close(0); exec = None")
            for name in ("python", "python3"):
                result = run_block(executor, f"{name} -c 'import sys; print(sys.executable)'; exit 3", "sh")
                assert (result.exit_code, result.output) == (3, f"{tmp_path}/python-of-its-own\n")
            assert "pip" in run_block(executor, "pip --version", "bash").output
            (tmp_path / "pip").write_text("#!/bin/sh\necho activated")
            (tmp_path / "pip").chmod(0o755)
            activates = f"PATH={tmp_path / 'other'}:$PATH; mkdir {tmp_path / 'other'}; mv {tmp_path / 'pip'} {tmp_path / 'other'}"
            assert run_block(executor, f"{activates}; pip --version", "sh").output == "activated\n"


def test_a_script_leaves_nothing_in_the_kernel(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    names = "sorted(name for name in globals() if name[0] != '_'), __import__('subprocess').getoutput('ls -l /proc/$PPID/fd 2>/dev/null | grep -c pipe:')"
    run(executor, names)
    before = run(executor, names).output
    run_block(executor, "echo {a}; exit 3", "sh")
    run(executor, "import gc; gc.collect(); del gc")
    # What the script left in its pipes at its end is read by a thread, which then ends.
    eventually(lambda: run(executor, names).output == before, "the kernel is as it was")
    executor.save_notebook(tmp_path / "n.ipynb")
    notebook = read_notebook(tmp_path / "n.ipynb", as_version=4)
    nbformat.validate(notebook)
    cell = notebook.cells[2]
    assert cell.source == "%%sh\necho {a}; exit 3"
    assert [output.get("evalue") for output in cell.outputs] == [None, "Command 'sh' returned non-zero exit status 3."]


@pytest.mark.slow
def test_what_a_script_leaves_in_the_background(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, timeout=1, output_dir=tmp_path) as executor:
        gate = tmp_path / "gate"
        script = f"(until [ -e {gate} ]; do sleep 0.01; done; echo x; touch {gate}2) & echo $!"
        result = run_block(executor, script, "bash")
        assert result.exit_code == 0  # it goes on, and may go on printing
        gate.touch()
        eventually((tmp_path / "gate2").exists, "the child in the background has printed")
        result = run_block(executor, "sleep 60 & echo $!; wait", "bash")
        pid, said = result.output.split(maxsplit=1)
        assert (result.exit_code, result.kernel_state) == (124, "intact")
        assert said.startswith("Timeout: interrupted after 1 s")
        eventually(lambda: int(pid) not in descendants(os.getpid()), "an interrupt ends the children")


@pytest.mark.slow
def test_a_script_that_ignores_signals_is_ended_even_if_the_interrupt_is_repeated(
    executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_REPEAT", 0.2)
    script = "trap '' INT TERM; echo $$; while true; do sleep 0.1; done"
    job = executor.submit([CodeBlock(script, "bash")])
    pid = int(eventually(lambda: job.output.strip(), "the script runs"))
    while not job.wait(0.3):
        job.interrupt()
    eventually(lambda: pid not in descendants(os.getpid()), "the script's end")
    assert job.status == "interrupted"


def test_a_missing_shell_and_missing_source_files(executor: JupyterCodeExecutor, monkeypatch: MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(jupyter_exec, "functions_source", lambda *functions: raising(ValueError))
        assert run_block(executor, "echo {1}", "bash").output == "{1}\n"
    monkeypatch.setitem(jupyter_exec._SHELLS, "bash", "no-such-bash")
    result = run_block(executor, "echo 1", "bash")
    assert (result.exit_code, result.output) == (127, "There is no no-such-bash where the kernel runs.\n")


QUIET_PIP = """!"{__import__('sys').executable}" -m pip install -qq --disable-pip-version-check x"""


@cases(
    "code, cell",
    ("!pip install x", QUIET_PIP),
    ("if 1:\n  % pip3 install x\n1", f"if 1:\n  {QUIET_PIP}\n1"),
    ("!echo it's\n!pip install x", f"!echo it's\n{QUIET_PIP}"),
    ("# it's '''\n!pip install x", f"# it's '''\n{QUIET_PIP}"),
    ("s = 'a' \"b'\" + '''c'''\n!pip install x", f"s = 'a' \"b'\" + '''c'''\n{QUIET_PIP}"),
    ('s = """\n!pip install x\n"""', None),
    ("s = r'''\\'''\n!pip install x\n'''", None),
    ("s = 'a\\\n!pip install x'", None),
    ("%%writefile a.sh\n!pip install x", None),
    ("!pip list", None),
)
def test_only_lines_of_ipython_are_made_quiet(code: str, cell: str | None) -> None:
    expected = code if cell is None else cell
    assert jupyter_exec.cell_of(CodeBlock(code), "python3", "python") == (expected, expected)


def test_a_block_without_a_language_is_the_kernels_own() -> None:
    assert jupyter_exec.cell_of(CodeBlock("echo 1"), "bash", "bash") == ("echo 1", "echo 1")


def test_a_kernel_that_is_no_longer_installed_is_no_intact_kernel(kernels_dir: Path) -> None:
    with kernel_of(kernels_dir, IPYKERNEL, "vanishing") as executor:
        assert run(executor, "exit()").kernel_state == "lost"
        shutil.rmtree(kernels_dir / "vanishing")
        result = run(executor, "1")
        assert (result.exit_code, result.kernel_state) == (1, "lost")
        assert "Kernel vanishing is not installed" in result.output


@pytest.mark.slow
def test_pip_is_quiet_but_its_failures_are_not(executor: JupyterCodeExecutor) -> None:
    for line in ("!pip install pip", "%pip install pip", "! pip3 install pip"):
        result = run(executor, line)
        assert (result.exit_code, result.output) == (0, "")
    assert "ERROR: " in run(executor, "!pip install no-such-package-at-all-1234").output
    assert run_block(executor, "pip install pip", "bash").output == ""
    by_the_shell = (
        "import os; os.environ['REQUIREMENT'] = 'no-such-package-at-all-1234'\n!pip install $REQUIREMENT 2>&1"
    )
    assert "no-such-package-at-all-1234" in run(executor, f"{by_the_shell} | awk '{{print $0}}'").output


def add_two(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def test_functions_are_there_from_the_start_and_after_every_restart(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, functions=[add_two]) as executor:
        execute = executor._kernel.execute

        def interrupted(*arguments: Any, **options: Any) -> Any:
            executor._kernel.execute = execute  # type: ignore[method-assign]
            return execute("raise KeyboardInterrupt", 20)

        executor._kernel.execute = interrupted  # type: ignore[method-assign]
        assert "in the kernel: KeyboardInterrupt" in run(executor, "1").output
        assert run(executor, "add_two(3)").output == "5"
        executor.restart()
        assert run(executor, "add_two(4)").output == "6"
        assert executor.execute("1").execution_count == 2
        run(executor, "import os; os._exit(1)")
        assert run(executor, "add_two(5)").output == "7"
        assert "add_two(a: 'int', b: 'int' = 2) -> 'int': Add two numbers." in executor.system_message
        assert executor.system_message.startswith(jupyter_exec.CODE_WRITER_SYSTEM_MESSAGE)


def test_without_a_network_no_model_is_told_to_install_packages(server: LocalJupyterServer) -> None:
    jail = DockerJupyterServer(hardened=True)  # which is never started
    with JupyterCodeExecutor(server) as executor:
        assert "%pip install" in executor.system_message
        executor._server = jail
        texts = [executor.system_message, AsyncJupyterCodeExecutor(jail).system_message]
        executor._server = server
    assert ["There is no network" in text and "pip" not in text for text in texts] == [True, True]


def test_functions_that_cannot_be_sent_are_refused(server: LocalJupyterServer) -> None:
    free = 5
    for function in (lambda: 1, len, lambda: free):
        with pytest.raises(ValueError, match="plain function"):
            JupyterCodeExecutor(server, functions=[function])


# asyncio


@on_a_loop
async def test_async_executor_runs_blocks_on_a_loop(server: LocalJupyterServer, tmp_path: Path) -> None:
    async with AsyncJupyterCodeExecutor(server, output_dir=tmp_path) as executor:
        assert (await executor.execute_code_blocks([CodeBlock("x = 6"), CodeBlock("x * 7")])).output == "\n42"
        assert (await executor.execute("x")).text == "6"
        assert (await executor.run("echo hi", "bash")).output == "hi\n"
        await executor.restart()
        assert (await executor.run("'x' in dir()", "python", context=None)).output == "False"
        await executor.save_notebook(tmp_path / "n.ipynb")


@on_a_loop
async def test_cancelling_interrupts_the_cell_and_keeps_the_kernel(server: LocalJupyterServer) -> None:
    class Token:
        def link_future(self, future: Any) -> None:
            asyncio.get_running_loop().call_later(0.3, future.cancel)

    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.run("x = 5\nimport time")
        task: Any = asyncio.ensure_future(executor.run("time.sleep(60)"))
        await asyncio.sleep(0)
        await cancel(task)
        await cancel(await begin(executor))
        assert (await executor.run("x")).output == "5"
        with pytest.raises(asyncio.CancelledError):
            await executor.execute_code_blocks([CodeBlock("time.sleep(60)")], Token())
        assert (await executor.run("x")).output == "5"


@on_a_loop
async def test_cancelling_twice_or_in_the_queue_hits_no_other(server: LocalJupyterServer, tmp_path: Path) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.run("import time; ran = []")
        first = await begin(executor, waiting_for(tmp_path / "gate", "print('go', flush=True)") + "ran.append(1)")
        second = asyncio.ensure_future(executor.run("ran.append(2)"))
        await asyncio.sleep(0)
        await cancel(second)
        (tmp_path / "gate").touch()
        assert (await first).exit_code == 0
        third = await begin(executor)
        third.cancel()
        await asyncio.sleep(0)
        await cancel(third)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(executor.run("time.sleep(60)"), 0.2)
        assert (await executor.run("ran")).output == "[1]"


async def begin(executor: AsyncJupyterCodeExecutor, code: str = FOR_EVER) -> asyncio.Task[ExecutionResult]:
    """Start a cell that prints at once; returns its task when it has."""
    going = asyncio.Event()
    tell = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, going.set)
    task = asyncio.ensure_future(executor.execute(code, on_output=lambda output: tell()))
    await going.wait()
    return task


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@cases("what", "restart", "stop")
@on_a_loop
async def test_async_restart_and_stop_go_before_the_waiting_cells(server: LocalJupyterServer, what: str) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        running = await begin(executor)
        waiting = [asyncio.ensure_future(executor.run("2")) for _ in range(3)]
        await asyncio.sleep(0)
        await getattr(executor, what)()
        assert (await running).status == "died"
        said = await asyncio.gather(*waiting, return_exceptions=True)
        expected = f"2\n{jupyter_exec._FRESH}" if what == "restart" else jupyter_exec._STOPPED
        assert [getattr(result, "output", str(result)) for result in said] == [expected] * 3


@cases("begun", False, True)
@on_a_loop
async def test_a_stop_before_or_during_the_start_is_heeded(server: LocalJupyterServer, begun: bool) -> None:
    executor = AsyncJupyterCodeExecutor(server)
    call = asyncio.ensure_future(executor.execute("1"))
    if begun:
        await asyncio.sleep(0)
    else:
        call.cancel()
    await executor.stop()
    for act in (*[lambda: call] * begun, lambda: executor.execute("1"), executor.restart):
        with pytest.raises(JupyterExecError, match="was stopped"):
            await act()


@on_a_loop
async def test_a_stopped_async_executor_may_be_started_again(server: LocalJupyterServer) -> None:
    executor = AsyncJupyterCodeExecutor(server)
    for number in range(2):
        async with executor:
            await executor.start()  # it has been: this changes nothing
            await executor.execute(f"x{number} = 1")
            assert (await executor.execute("[n for n in dir() if n[0] == 'x']")).text == f"['x{number}']"
        with pytest.raises(JupyterExecError, match="was stopped"):
            await executor.execute("1")


@cases("turns", *range(6))
@on_a_loop
async def test_no_cancellation_is_lost_if_it_comes_with_what_is_waited_for(
    server: LocalJupyterServer, turns: int
) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        job = await executor.submit(FOR_EVER)
        waiting = asyncio.ensure_future(job.wait(PATIENCE))
        while not job._on_event:
            await asyncio.sleep(0)
        job._tell(threading.Event())  # as if it had been detached
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=0.2)
        job.interrupt()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@on_a_loop
async def test_an_async_executor_with_a_hook_is_collected_while_a_job_runs(server: LocalJupyterServer) -> None:
    executor: Any = AsyncJupyterCodeExecutor(server, on_output=print)
    job = await executor.submit(FOR_EVER)
    while not job.output:
        await asyncio.sleep(0.01)
    with pytest.warns(ResourceWarning, match="forgotten"):
        del executor
        gc.collect()
    assert (await job.wait()).status == "died"


async def cancel_at_random(server: LocalJupyterServer, times: int, randoms: random.Random) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.run("import time; ran = []")
        ended = []
        for number in range(times):
            task = asyncio.ensure_future(executor.run(f"ran.append({number}); time.sleep(0.02)"))
            neighbour = asyncio.ensure_future(executor.run(f"ran.append('n{number}')"))
            await asyncio.sleep(randoms.random() * 0.03)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert (await task).exit_code == 0
                ended.append(number)
            assert (await neighbour).output == ""
        ran = ast.literal_eval((await executor.execute("print(ran)")).text)
        assert len(ran) == len(set(ran))
        assert {*ended, *(f"n{number}" for number in range(times))} <= set(ran)


@pytest.mark.slow
@cases("times", 10, pytest.param(500, marks=pytest.mark.slow))
def test_cancelling_at_random_instants(server: LocalJupyterServer, times: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    asyncio.run(cancel_at_random(server, times, random.Random(seed)))


@on_a_loop
async def test_many_cells_do_not_block_the_event_loop(server: LocalJupyterServer, tmp_path: Path) -> None:
    code = waiting_for(tmp_path / "gate", "print('go', flush=True)")
    async with contextlib.AsyncExitStack() as stack:
        executors = [await stack.enter_async_context(AsyncJupyterCodeExecutor(server)) for _ in range(4)]
        cells = [await begin(executor, code) for executor in executors]  # it goes on turning while they run,
        (tmp_path / "gate").touch()  # or never gets here
        assert [(await cell).status for cell in cells] == ["ok"] * 4


async def longest_lag(work: Any) -> float:
    """Return for how many seconds at most the loop did not turn while `work` was awaited."""
    task, lags = asyncio.ensure_future(work), []
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        lags.append(time.monotonic() - before)
    await task
    return max(lags)


@pytest.mark.bench
@cases("where", "local", "docker")
def test_bench_lag_of_the_loop(benchmark: Any, where: str, request: FixtureRequest) -> None:
    if where == "docker":
        request.getfixturevalue("containers")

    async def work() -> None:
        async with LocalJupyterServer() if where == "local" else docker_server() as server:
            async with AsyncJupyterCodeExecutor(server, on_timeout="detach") as executor:
                await asyncio.gather(*(executor.execute("print(5)") for _ in range(20)))
                await executor.execute("import time; time.sleep(1)", timeout=0.5)
                assert (await executor.wait()).status == "ok"
                async for _ in executor.stream("for i in range(1000): print(i)"):
                    pass
                await executor.restart()

    benchmark.extra_info["longest lag in ms"] = asyncio.run(longest_lag(work())) * 1000
    benchmark.pedantic(lambda: None)


@on_a_loop
async def test_a_stream_gives_outputs_as_they_come_and_last_the_result(server: LocalJupyterServer) -> None:
    async with AsyncJupyterCodeExecutor(server, on_input=lambda prompt, password: "yes") as executor:
        seen = []
        async for output in executor.stream("print(input(), flush=True)\n" + FOR_EVER):
            seen.append(output if isinstance(output, dict) else output.status)
            if output in ({"output_type": "stream", "name": "stdout", "text": text} for text in ("go\n", "yes\ngo\n")):
                executor.interrupt()
        assert "".join(output.get("text", "") for output in seen[:-2]) == "yes\ngo\n"
        assert (seen[-2]["ename"], seen[-1]) == ("KeyboardInterrupt", "interrupted")
        flood = [output async for output in executor.stream("for i in range(2000): display(i)")]
        assert (len(flood), flood[-1].status) == (2001, "ok")


@pytest.mark.slow
@cases("same", False, True)
@on_a_loop
async def test_a_stream_is_whole_however_slow_its_reader(
    server: LocalJupyterServer, same: bool, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    seen = []
    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.execute("1")
        async for output in executor.stream("for i in range(200): display(i)", timeout=2):
            seen.append(output)
            await (executor.execute("1") if same else asyncio.sleep(0.02))  # the same waits until the cell has ended
    assert [output["data"]["text/plain"] for output in seen[:-1]] == [str(i) for i in range(200)]
    assert seen[-1].status == "ok"


@cases("code", FOR_EVER, "while True: display(1)")
@on_a_loop
async def test_leaving_a_stream_interrupts_the_cell(
    server: LocalJupyterServer, code: str, caplog: LogCaptureFixture
) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        await executor.execute("x = 5")
        async with contextlib.aclosing(executor.stream(code)) as outputs:
            async for _ in outputs:
                break
        async for _ in executor.stream(code):  # collected at once, and closed soon
            break
        assert (await executor.execute("x")).text == "5"
    assert not caplog.records


@on_a_loop
async def test_code_that_ignores_the_end_of_its_call_loses_its_kernel(
    server: LocalJupyterServer, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.5)
    code = "import time\nprint('go')\nwhile True:\n  try: time.sleep(60)\n  except KeyboardInterrupt: pass"
    async with AsyncJupyterCodeExecutor(server, timeout=PATIENCE) as executor:
        await executor.execute("x = 5")
        async with contextlib.aclosing(executor.stream(code)) as outputs:
            async for _ in outputs:
                break
        assert "ignored the interrupt: its kernel is killed" in caplog.text
        assert (await executor.execute("'x' in dir()")).text == "False"


@on_a_loop
async def test_a_stream_raises_what_keeps_the_cell_from_running(server: LocalJupyterServer) -> None:
    executor = AsyncJupyterCodeExecutor(server)
    async with executor:
        pass
    with pytest.raises(JupyterExecError, match="was stopped"):
        async for _ in executor.stream("1"):
            pass


@on_a_loop
async def test_coroutine_hooks_run_on_the_loop_of_the_call(
    server: LocalJupyterServer, caplog: LogCaptureFixture
) -> None:
    loops, never = [], asyncio.Event()
    executor: AsyncJupyterCodeExecutor

    async def on_output(output: dict[str, Any]) -> None:
        loops.append(asyncio.get_running_loop())
        if output.get("text") == "stuck\n":
            await never.wait()
        with pytest.raises(JupyterExecError, match="hooks cannot run another one"):
            await executor.execute("1")

    async def on_input(prompt: str, password: bool) -> str:
        return f"to {prompt}"

    async with AsyncJupyterCodeExecutor(server, on_output=on_output, on_input=on_input) as executor:
        result = await executor.execute("input('me')")
        assert result.text.endswith("'to me'")
        assert loops and set(loops) == {asyncio.get_running_loop()}
        task = asyncio.ensure_future(executor.execute("print('stuck', flush=True)\nimport time; time.sleep(60)"))
        while len(loops) < 2:
            await asyncio.sleep(0.01)
        await cancel(task)  # though the hook waits for ever
        assert (await executor.execute("5")).text == "5"


# Tools


@pytest.fixture(params=["server", "ipykernel 6", "command", "docker", "jupyter_server", "gateway"])
def place(request: FixtureRequest, server: Any, jupyter_server: Peer, gateway: Peer) -> Iterator[Any]:
    with server_of(request, request.param) as found:
        yield found


class Meeting:
    """Tools that return when as many calls as expected are there at the same time."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties, timeout=PATIENCE)
        self._count, self._full = parties, asyncio.Event()

    def meet(self, number: int) -> int:
        self._barrier.wait()
        return number

    async def ameet(self, number: int) -> int:
        self._count -= 1
        if not self._count:
            self._full.set()
        await self._full.wait()
        return number


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    They may be large."""
    return a + b


async def echo(value: Any, *, times: float = 1) -> Any:
    return [value] * int(times)


def names_of(result: Any) -> list[tuple[str, str]]:
    return [(call["name"], call["status"]) for call in result.calls]


def test_tools_work_everywhere(place: Any, tmp_path: Path) -> None:
    everywhere = textwrap.dedent("""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor
        print(add(1), add(1, b=1), await echo("é", times=2))
        with ThreadPoolExecutor(10) as pool:
            print(list(pool.map(meet, range(10))))
        for call in (fail, lambda: add("x"), add, forbidden):
            try: call()
            except (ArithmeticError, TypeError, ToolRefused) as error: print(type(error).__name__, error)
    """)

    approve = lambda name, arguments: "not today" if name == "forbidden" else True  # noqa: E731
    tools: list[Any] = [add, echo, Meeting(10).meet, named("fail", lambda: 1 / 0), named("forbidden", pytest.fail)]
    with JupyterCodeExecutor(place, tools=tools, approve=approve, output_dir=tmp_path) as executor:
        result = executor.execute(everywhere)
        assert result.text.splitlines() == [
            "3 2 ['é', 'é']",
            "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]",
            "ZeroDivisionError division by zero",
            'TypeError can only concatenate str (not "int") to str',
            "TypeError add() missing 1 required positional argument: 'a'",
            "ToolRefused not today",
        ]
        assert [status for _, status in names_of(result)] == ["ok"] * 13 + ["error"] * 2 + ["refused"]
        assert result.calls[1]["arguments"] == {"a": 1, "b": 1}
        assert "EOFError" in executor.execute("input()").text
        assert executor.execute("input('? ')", on_input=lambda prompt, password: prompt + "yes").text == "'? yes'"
        executor.restart()
        assert executor.execute("add(40)").text == "42"


def test_the_answer_of_a_tool_survives_a_dropped_connection(remote: Peer) -> None:
    def cut() -> str:
        channels: Any = distant._kernel._channels
        channels._loop.post(lambda: channels._pipe.close("cut by the test"))
        eventually(lambda: channels._pipe is None, "there is no connection")
        return "sent later"

    with JupyterCodeExecutor(remote.info, tools=[cut]) as distant:
        distant.execute("1")
        result = distant.execute("print(cut())", timeout=PATIENCE)
        assert (result.text.splitlines()[0], result.status, names_of(result)) == ("sent later", "ok", [("cut", "ok")])


@pytest.mark.slow
def test_a_thousand_calls_sixty_four_at_once(server: LocalJupyterServer) -> None:
    lock, full, now, most = threading.Lock(), threading.Barrier(64, timeout=PATIENCE), [0], [0]
    too_many = threading.Event()

    def count(number: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] > 64:
                too_many.set()
        full.wait()  # nobody goes on before 64 are here,
        if number < 64:
            too_many.wait(0.5)  # and at first there is time for more to come
        with lock:
            now[0] -= 1
        return number

    with JupyterCodeExecutor(server, tools=[count], max_tool_calls=1024) as executor:
        code = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(200) as pool:\n"
        result = executor.execute(f"{code}    print(sum(pool.map(count, range(1024))))")
        assert (result.text, len(result.calls), most) == ("523776\n", 1024, [64])


def test_a_call_is_sent_and_answered_while_another_one_waits(server: LocalJupyterServer) -> None:
    gate = threading.Event()

    def wait() -> bool:
        return gate.wait(PATIENCE)

    code = "import threading\nfirst = threading.Thread(target=lambda: print(f'{wait()}\\n', end=''))\nfirst.start()\n"
    code += "started()\nopen_gate()\nprint(input() + '\\n', end='')\nfirst.join()"
    tools = [wait, named("started", bool), named("open_gate", gate.set)]
    with JupyterCodeExecutor(server, tools=tools, on_input=lambda prompt, password: "typed") as executor:
        assert sorted(executor.execute(code).text.splitlines()) == ["True", "typed"]


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def tool(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    tool.__name__ = name
    return tool


def test_a_tool_looks_as_it_does_here(server: LocalJupyterServer) -> None:
    patience_object = object()

    def look(
        city: str, when: datetime.date | None = None, /, *rest: list[int], unit: object = patience_object
    ) -> "no text":  # type: ignore  # noqa: F722
        """Look out of "the window".

        Twice."""

    with JupyterCodeExecutor(server, tools=[look, echo]) as executor:
        shown = executor.execute("import inspect\nprint(inspect.signature(look))\nhelp(look)").text
        signature = "city: 'str', when: 'datetime.date | None' = None, /, *rest: 'list[int]', unit: 'object' = Ellipsis"
        assert f"({signature})" in shown
        assert re.search(r'    Look out of "the window"\.\n *\n    Twice\.\n', shown)
        kinds = executor.execute("inspect.iscoroutinefunction(echo), inspect.iscoroutinefunction(look)").text
        assert kinds == "(True, False)"
        wrong_calls = {"look()": "missing 1 req", "look(1, x=2)": "unexpected key", "await echo(1, 2)": "takes 1"}
        for wrong, says in wrong_calls.items():
            result = executor.execute(wrong)
            assert result.error and result.error["ename"] == "TypeError"
            assert says in result.error["evalue"] and result.calls == []
        executor.execute("look = echo = 5; del ToolError")
        assert executor.execute("look").text == "5"
        executor.restart()
        assert executor.execute("callable(look), issubclass(ToolRefused, ToolError)").text == "(True, True)"


@cases(
    "said, says",
    (True, "5"),
    ("it costs too much", "ToolRefused: it costs too much"),
    (False, "ToolRefused: The call of add was refused."),
    (None, "ToolRefused: The call of add was refused."),
    (1, "ToolRefused: The call of add was refused."),
    (OSError("no operator"), "ToolRefused: The call of add was refused: the hook that approves calls raised OSError."),
)
@cases("is_async", False, True)
def test_what_approve_may_say(server: LocalJupyterServer, said: Any, says: str, is_async: bool) -> None:
    asked = []

    def approve(name: str, arguments: Any) -> Any:
        asked.append((name, arguments))
        if isinstance(said, OSError):
            raise said
        return said

    async def approve_later(name: str, arguments: Any) -> Any:
        await asyncio.sleep(0)
        return approve(name, arguments)

    with JupyterCodeExecutor(server, tools=[add], approve=approve_later if is_async else approve) as executor:
        assert executor.execute("add(3)").text.startswith(says)
        assert executor.execute("1").text == "1"
        assert asked == [("add", {"a": 3})]


@pytest.mark.slow
def test_the_waiting_of_approve_is_not_the_cells_time(server: LocalJupyterServer) -> None:
    def approve(name: str, arguments: Any) -> bool:
        threading.Event().wait(0.8)
        return True

    with JupyterCodeExecutor(server, tools=[add], approve=approve) as executor:
        assert executor.execute("add(3)", timeout=0.4).text == "5"
        assert executor.execute("add(3)", timeout=0.4, on_output=print).text == "5"
        result = executor.execute("add(3)\nwhile True: pass", timeout=0.4)
        assert (result.status, names_of(result)) == ("timeout", [("add", "ok")])


def test_limits_of_tools(server: LocalJupyterServer, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_TOOL_JSON", 1000)
    told = threading.Event()

    def hang() -> None:
        while not jupyter_exec.tool_call_ended():
            threading.Event().wait(0.01)
        told.set()

    tools: list[Any] = [add, hang, named("much", lambda: "x" * 2000), named("strange", object)]
    with JupyterCodeExecutor(server, tools=tools, max_tool_calls=3, tool_timeout=0.3) as executor:
        for code, says in {
            "for i in range(5): print(add(i))": "2\n3\n4\nToolError: add(): this cell has made 3 tool calls, which is the limit.",
            "add('x' * 1000)": "ToolError: add(): the arguments are 1043 characters of JSON; 1000 is the limit.",
            "add(print)": "TypeError: add(): builtin_function_or_method is no JSON",
            "much()": "ToolError: The result of much is 2002 characters of JSON; 1000 is the limit.",
            "strange()": "ToolError: The result of strange cannot be sent: object is no JSON",
            "hang()": "TimeoutError: hang has taken more than 0.3 s",
        }.items():
            result = executor.execute(code)
            assert result.text.startswith(says), (code, result.text)
        assert names_of(result) == [("hang", "timeout")]
        assert told.wait(PATIENCE)
        assert executor.execute("add(1)").text == "3"


ENDINGS: dict[str, tuple[str, str]] = {
    "timeout": ("timeout", "intact"),
    "interrupt": ("interrupted", "intact"),
    "death": ("died", "lost"),
    "restart": ("died", "lost"),
    "stop": ("died", "lost"),
}


@cases("ending", *list(ENDINGS))
@cases("is_async", False, True)
def test_a_cell_ends_as_always_while_a_tool_runs(server: LocalJupyterServer, ending: str, is_async: bool) -> None:
    begun, told = threading.Event(), threading.Event()

    def hang(why: str) -> None:
        begun.set()
        while not jupyter_exec.tool_call_ended():
            threading.Event().wait(0.01)
        told.set()

    async def hang_async(why: str) -> None:
        begun.set()
        try:
            await asyncio.sleep(PATIENCE * 10)
        finally:
            told.set()

    hang_async.__name__ = "hang"
    die = "import threading, os; threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()\n" * (ending == "death")
    code = f"{die}for i in range(3): add(i // 2)\n{'await ' * is_async}hang('x' * 100)"
    tools: list[Any] = [add, hang_async if is_async else hang]
    with ThreadPoolExecutor(1) as pool, JupyterCodeExecutor(server, tools=tools) as executor:
        executor.execute("1")
        running = pool.submit(executor.execute, code, timeout=0.3 if ending == "timeout" else PATIENCE)
        assert begun.wait(PATIENCE)
        if ending in ("interrupt", "restart", "stop"):
            getattr(executor, ending)()
        result = running.result(PATIENCE)
        assert (result.status, result.kernel_state) == ENDINGS[ending]
        assert names_of(result) == [("add", "ok")] * 3 + [("hang", "unanswered")]
        told_of = "ok: add(a=0) (2 times), add(a=1); unanswered: hang(why='xxxxxxxxxxxx...xxxxxxxxxxxxx')"
        assert result.note.endswith(f"Tool calls of this cell: {told_of}")
        assert told.wait(PATIENCE)
        if ending != "stop":
            assert run(executor, "add(1)").output == "3"


def test_a_tool_may_interrupt_its_cell_and_not_run_another(server: LocalJupyterServer, tmp_path: Path) -> None:
    def cut() -> None:
        executor.interrupt()

    def nest(how: str) -> str:
        if how == "save":
            executor.save_notebook(tmp_path / "n.ipynb")
        return str(executor.execute("1").text if how == "cell" else run(executor, "1").output)

    def other() -> str:
        return second.execute("add(40)").text

    with contextlib.ExitStack() as stack:
        second = stack.enter_context(JupyterCodeExecutor(server, tools=[add]))
        executor = stack.enter_context(JupyterCodeExecutor(server, tools=[cut, nest, other]))
        result = executor.execute("cut()\nwhile True: pass")
        assert (result.status, result.kernel_state) == ("interrupted", "intact")
        for how in ("cell", "blocks", "save"):
            assert "busy with the cell that called this tool" in executor.execute(f"nest({how!r})").text
        assert executor.execute("other()").text == "'42'"


@cases(
    "forged, says, calls",
    ("'1:' + call", "3", 1),
    ("'1:' + call.replace('add', 'eval')", "ToolError There is no such tool.", 0),
    ("'1:' + call.replace('\"add\"', '[]')", "ToolError There is no such tool.", 0),
    ("'1:' + call.replace('[1]', '{}')", "ToolError There is no such tool.", 0),
    ("'1:' + call.replace('[1]', '[]')", "TypeError missing a required argument: 'a'", 0),
    ("'1:' + call.replace('{}', '{\"self\": 1}')", "TypeError got an unexpected keyword argument 'self'", 0),
    ("'1:' + '[' * 100_000", "ToolError The call of a tool is not JSON: RecursionError.", 0),
    ("'1:' + 'nonsense'", "ToolError The call of a tool is not JSON: JSONDecodeError.", 0),
    ("'1:' + call.replace('1', '\"' + 'x' * 5_000_000 + '\"')", "ToolError The arguments of this cell's", 0),
    ("*['1:' + call] * 2, first=1, end=2", "3", 2),  # an id twice
    ("*['%d:%s' % (i, call) for i in range(3000)]", "3", 10),
    ("*['7' * 50 + ':' + call] * 3000, end=0", "", 0),
    ("*[''] * 20, end=0", "", 0),
)
def test_forged_requests_cost_only_the_budget(server: LocalJupyterServer, forged: str, says: str, calls: int) -> None:
    forge = textwrap.dedent("""
        import threading
        from concurrent.futures import Future
        kernel = get_ipython().kernel
        caller = kernel._tool_caller
        class Endless(dict):
            __len__ = lambda self: 0
        caller._calls = Endless()
        def forge(*texts, first=0, end=1):
            futures = [kernel.raw_input(caller._tag + text) for text in texts]
            for future in futures[first:end]:
                try:
                    print(future.result(10))
                except Exception as error:
                    print(type(error).__name__, error)
    """)
    call = '{"name": "add", "args": [1], "kwargs": {}}'
    with JupyterCodeExecutor(server, tools=[add], max_tool_calls=10) as executor:
        executor.execute(f"call = {call!r}\n{forge}")
        result = executor.execute(f"forge({forged})", timeout=PATIENCE)
        assert result.status == "ok", result.text
        assert result.text.startswith(says)
        assert names_of(result) == [("add", "ok")] * calls
        assert executor.execute("add(1)").text == "3"


def test_a_prompt_with_the_tag_in_it_harms_nobody(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, tools=[add], on_input=lambda prompt, password: prompt[:4]) as executor:
        executor.execute("tag = get_ipython().kernel._tool_caller._tag")
        assert executor.execute("input('say ' + tag)").text == "'say '"
        assert executor.execute("input(tag + 'x')").status == "ok"
        assert executor.execute("add(1)").text == "3"


@dataclass
class Row:
    name: str
    size: float


@cases(
    "value, there",
    ({"a": [1, None, True, "é\udc80"]}, {"a": [1, None, True, "é\udc80"]}),
    ([Row("x", 1.5)], [{"name": "x", "size": 1.5}]),
    (types.SimpleNamespace(model_dump=lambda mode: {"mode": mode}), {"mode": "json"}),  # as of Pydantic
    (b"\0\xff", "AP8="),
    ((datetime.date(2026, 1, 2), datetime.time(3, 4)), ["2026-01-02", "03:04:00"]),
    ({3}, [3]),
    (float("inf"), float("inf")),
    (memoryview(b"a"), "YQ=="),
)
def test_values(server: LocalJupyterServer, value: Any, there: Any) -> None:
    with JupyterCodeExecutor(server, tools=[named("get", lambda: value)]) as executor:
        assert executor.execute(f"inf = float('inf')\nget() == {there!r} or get()").text == "True"


def test_values_of_the_kernel(server: LocalJupyterServer) -> None:
    put_values = textwrap.dedent("""
        import dataclasses, datetime, numpy
        inf = float("inf")
        @dataclasses.dataclass
        class Row:
            name: str
        put([Row("x"), datetime.date(2026, 1, 2), b"a", {3}, numpy.arange(2), numpy.float32(0.5), numpy.int64(3), inf, "\\udc80"])
    """)
    values: list[Any] = []
    with JupyterCodeExecutor(server, tools=[named("put", values.extend)]) as executor:
        assert executor.execute(put_values).status == "ok"
    assert values == [{"name": "x"}, "2026-01-02", "YQ==", [3], [0, 1], 0.5, 3, float("inf"), "\udc80"]


@cases(
    "error, name, message",
    (KeyError("x"), "KeyError", "'x'"),
    (ValueError("bad", 3), "ValueError", "('bad', 3)"),
    (FileNotFoundError(2, "none", "f"), "FileNotFoundError", "[Errno 2] none: 'f'"),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "ToolError", "UnicodeDecodeError: 'utf-8' codec can't"),
    (type("OwnError", (Exception,), {})("own"), "ToolError", "OwnError: own"),
    (jupyter_exec.ToolRefused("never"), "ToolRefused", "never"),
    (SystemExit(3), "ToolError", "SystemExit: 3"),
    (KeyboardInterrupt("enough"), "KeyboardInterrupt", "enough"),
    (StopIteration(), "StopIteration", ""),
)
def test_exceptions_of_tools(server: LocalJupyterServer, error: BaseException, name: str, message: str) -> None:
    def fail() -> None:
        raise error

    with JupyterCodeExecutor(server, tools=[fail]) as executor:
        result = executor.execute("fail()")
        assert result.error and (result.error["ename"], result.error["evalue"][: len(message)]) == (name, message)
        assert str(HERE) not in result.text
        assert sys.version_info < (3, 11) or "Raised by the tool fail" in result.text
        assert result.calls[0]["status"] == ("refused" if name == "ToolRefused" else "error")


@cases(
    "code, ename",
    ("end()", "KeyboardInterrupt"),
    ("await async_end()", "CancelledError"),
    ("await asyncio.gather(async_end())", "CancelledError"),
    ("await asyncio.gather(asyncio.to_thread(end))", "CancelledError"),
    ("async def task(): end()\nawait asyncio.gather(task())", "CancelledError"),
)
def test_a_keyboard_interrupt_of_a_tool_ends_its_cell_and_nothing_else(
    server: LocalJupyterServer, code: str, ename: str
) -> None:
    def end() -> None:
        raise KeyboardInterrupt

    async def async_end() -> None:
        raise KeyboardInterrupt

    with JupyterCodeExecutor(server, tools=[end, async_end]) as executor:
        result = executor.execute(f"import asyncio; x = 1\ntry:\n{textwrap.indent(code, ' ')}\nexcept Exception: pass")
        assert result.error and (result.error["ename"], result.kernel_state) == (ename, "intact")
        assert executor.execute("x").text == "1"


@cases("end", KeyboardInterrupt, SystemExit)
@on_a_loop
async def test_a_coroutine_tool_cannot_end_the_program(server: LocalJupyterServer, end: type[BaseException]) -> None:
    async def tool() -> None:
        raise end("enough")

    async with AsyncJupyterCodeExecutor(server, tools=[tool]) as executor:
        result = await executor.execute("await tool()")
    assert result.error and result.error["ename"] == ("CancelledError" if end is KeyboardInterrupt else "ToolError")


def test_a_result_that_the_kernel_cannot_read_is_an_error_there(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, tools=[named("big", lambda: 10**1000)]) as executor:
        result = executor.execute("import sys; sys.set_int_max_str_digits(640)\nbig() % 7", timeout=PATIENCE)
        assert result.error and result.error["ename"] == "ToolError"
        assert "the result cannot be read: Exceeds the limit" in result.error["evalue"]


def test_calls_that_outlive_their_cell_fail_at_once(server: LocalJupyterServer, tmp_path: Path) -> None:
    late = textwrap.dedent("""
        import threading, time
        caller, said = get_ipython().kernel._tool_caller, []
        def late(tool, ended):
            while ended and caller._last is not None: time.sleep(0.001)
            try: said.append(tool())
            except ToolError as error: said.append(str(error))
            if len(said) == 2: open(path, "x").write("|".join(sorted(said)))
        for arguments in ((hang, False), (add, True)):
            threading.Thread(target=late, args=arguments).start()
        while not caller._calls: time.sleep(0.001)
    """)
    gate = threading.Event()
    with JupyterCodeExecutor(server, tools=[named("add", int), named("hang", gate.wait)]) as executor:
        result = executor.execute(f"path = {str(tmp_path / 'said')!r}\n{late}")
        assert names_of(result) == [("hang", "unanswered")]
        path = tmp_path / "said"
        said = eventually(lambda: path.exists() and path.read_text(), "both calls have failed")
        gate.set()
        assert said.startswith("The cell has ended: nobody answers any more.|add() was called while no cell of its pr")


def test_a_child_process_of_the_kernel_cannot_call(server: LocalJupyterServer) -> None:
    code = """
import os
reading, writing = os.pipe()
if not os.fork():
    try: add(1)
    except ToolError as error: os.write(writing, str(error).encode())
    finally: os._exit(0)
print(os.read(reading, 1000).decode(), add(1))
"""
    with JupyterCodeExecutor(server, tools=[add]) as executor:
        assert "Only the kernel's own process can call tools" in (text := executor.execute(code).text)
        assert " 3\n" in text  # newer Pythons warn of the fork after it


def test_tools_of_an_attached_executor(executor: JupyterCodeExecutor) -> None:
    run(executor, "x = 5")
    path = executor.connection_file or ""
    for number in (1, 2):
        with JupyterCodeExecutor(path, tools=[named("here", lambda number=number: number)]) as attached:
            assert run(attached, "x, here()").output == f"(5, {number})"
            result = executor.execute("here()")
            assert result.error and "no cell of its program" in result.error["evalue"]


@cases(
    "tools, says",
    ([lambda: 1], "has no name"),
    ([functools.partial(add, 1)], "has no name"),
    ([add, add], "two tools of the name add"),
    ([named("class", add)], "has no name"),
    ([named("ToolError", add)], "two tools"),
    ([5], "has no name"),
    ([dict.fromkeys], None),
    ([type], "cannot be a tool"),
    ({"no name": len}, "cannot be a tool"),
    ({"double": lambda x: 2 * x}, None),
)
def test_what_is_no_tool_is_refused(server: LocalJupyterServer, tools: Any, says: str | None) -> None:
    if says:
        with pytest.raises(ValueError, match=says):
            JupyterCodeExecutor(server, tools=tools)
        return
    with JupyterCodeExecutor(server, tools=tools) as executor:
        assert isinstance(tools, list) or executor.execute("double(21)").text == "42"


@cases("size", 10, 100, 5000)
def test_a_model_is_told_of_fifty_tools_in_few_words(server: LocalJupyterServer, size: int) -> None:
    def tool(query: str, limit: int = 10) -> list[dict[str, str]]:
        return [{query: str(limit)}]

    tool.__doc__ = "First line of it.\nSecond line.\n\n" + "More about it. " * (size // 15)
    tools = [types.FunctionType(tool.__code__, {}, f"tool_{i}", (10,)) for i in range(50)]
    for function in tools:
        function.__doc__, function.__annotations__ = tool.__doc__, tool.__annotations__
    with JupyterCodeExecutor(server, tools=tools) as executor:
        text = executor.system_message
        assert len(text) <= 8000
        assert "def tool_49(query: str, limit: int = 10) -> list[dict[str, str]]:" in text
        assert "First line of it." in text
    with JupyterCodeExecutor(server, tools=[add, echo]) as executor:
        stubs = executor.system_message.partition("tells more.\n\n")[2]
        assert stubs == (
            'def add(a: int, b: int = 2) -> int:\n    """Add two numbers.\n\n    They may be large."""\n'
            "async def echo(value: Any, *, times: float = 1) -> Any: ..."
        )


MCP_SERVER = """
from mcp.server import MCPServer
server = MCPServer("sums")
@server.tool()
def add(a: int, b: int = 5) -> int:
    "Add two numbers."
    return a + b
@server.tool()
def fail(why: str) -> str:
    raise ValueError(why)
server.run("stdio")
"""
MCP_CELL = """
print(await add(a=1, b=2), await add(a=1))
try: await fail(why="no reason")
except RuntimeError as error: print(error)
try: await add(b=1)
except RuntimeError as error: print("Field required" in str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "shown"),
    [
        (0, None, "[{'tides': ['High tides', 'Tides'], 'wind': ['Wind']}] [('search', 'ok'), ('search', 'ok'), ('final_answer', 'error')]"),
        (1, MCP_CELL, "{'result': 3} {'result': 6}\nError executing tool fail\nTrue\n"),
    ],
)  # fmt: skip
def test_the_readme_on_tools(number: int, code: str | None, shown: str, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(MCP_SERVER)
    program = readme_blocks("Host tools")[number].replace('"await add(a=1, b=2)"', repr(code))
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == (shown + "\n", 0), done.stderr


@on_a_loop
async def test_coroutine_tools_run_on_the_callers_loop(server: LocalJupyterServer) -> None:
    here = asyncio.get_running_loop()
    meeting, alone = Meeting(10), Meeting(2)
    running: list[AsyncJupyterCodeExecutor] = []
    asked = []

    async def wait() -> int:
        return await alone.ameet(1)

    async def where() -> bool:
        return asyncio.get_running_loop() is here

    async def nest() -> None:
        await running[0].execute("1")

    async def approve(name: str, arguments: Any) -> bool:
        asked.append(name)
        return asyncio.get_running_loop() is here

    tools: list[Any] = [where, nest, meeting.ameet, wait]
    async with AsyncJupyterCodeExecutor(server, tools=tools, approve=approve) as executor:
        running.append(executor)
        assert (await executor.execute("await where()")).text == "True"
        code = "import asyncio\nawait asyncio.gather(*[ameet(i) for i in range(10)])"
        assert (await executor.execute(code)).text == str(list(range(10)))
        assert "busy with the cell that called this tool" in (await executor.execute("await nest()")).text
        assert len(asked) == 12
        task = asyncio.ensure_future(executor.execute("await wait()"))
        await asyncio.sleep(0.1)
        await cancel(task)
        assert (await executor.execute("await where()")).text == "True"


@on_a_loop
async def test_tools_and_hooks_stay_on_their_loop_when_another_uses_the_executor(server: LocalJupyterServer) -> None:
    here, loops = asyncio.get_running_loop(), []
    executor: AsyncJupyterCodeExecutor

    async def note(*arguments: Any) -> bool:
        loops.append(asyncio.get_running_loop())
        return True

    async def use_elsewhere() -> None:
        await asyncio.to_thread(asyncio.run, executor.start())

    executor = AsyncJupyterCodeExecutor(server, on_output=note, tools=[note, use_elsewhere], approve=note)
    async with executor:
        result = await executor.execute("await use_elsewhere()\nprint(await note())")
    assert (result.text, loops) == ("True\n", [here] * 4)


CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")


@on_a_loop
async def test_tools_and_hooks_see_the_context_of_the_call(server: LocalJupyterServer) -> None:
    seen = []

    async def hook(output: Any) -> None:
        seen.append(CALLER.get())

    async def ask() -> str:
        return CALLER.get()

    def ask_plainly() -> str:
        return CALLER.get()

    async with AsyncJupyterCodeExecutor(server, tools=[ask, ask_plainly], on_output=hook) as executor:
        CALLER.set("ann")
        result = await executor.execute("print(await ask(), ask_plainly())")
    assert (result.text, seen) == ("ann ann\n", ["ann"])


@on_a_loop
async def test_a_tool_that_comes_back_through_another_executor_gets_an_error(server: LocalJupyterServer) -> None:
    async def there() -> str:
        return (await second.execute("await back()")).text

    async def back() -> str:
        return (await first.execute("1")).text

    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncJupyterCodeExecutor(server, tools=[there]))
        second = await stack.enter_async_context(AsyncJupyterCodeExecutor(server, tools=[back]))
        assert "busy with the cell that called this tool" in (await first.execute("print(await there())")).text


@pytest.mark.slow
def test_a_hook_whose_loop_is_gone_ends_nothing(server: LocalJupyterServer, caplog: LogCaptureFixture) -> None:
    async def hook(output: dict[str, Any]) -> None:
        await asyncio.sleep(60 if output.get("text") == "a\n" else 0)

    async def main() -> AsyncJupyterCodeExecutor:
        executor = AsyncJupyterCodeExecutor(server, on_output=hook, on_timeout="detach")
        assert (await executor.execute(GO_ON, timeout=0.3)).status == "running"
        return executor

    async def end(executor: AsyncJupyterCodeExecutor) -> None:
        assert (await executor.wait()).text == "a\nb\n42"
        await executor.stop()

    executor = asyncio.run(main())
    asyncio.run(asyncio.wait_for(end(executor), PATIENCE))
    assert "on_output raised" in caplog.text


@pytest.mark.slow
@on_a_loop
async def test_the_async_executor_has_jobs_and_all_the_rest(server: LocalJupyterServer, tmp_path: Path) -> None:
    executor = AsyncJupyterCodeExecutor(server, "python3", 1, tmp_path, functions=[add_two], on_timeout="detach")
    assert "add_two" in executor.system_message and executor.connection_file is None
    first, second = await asyncio.gather(executor.execute("x = 1; x"), executor.execute("x += 1; x"))
    assert (first.text, second.text) == ("1", "2")  # in the order of the calls, before the start too
    assert os.path.exists(executor.connection_file or "")
    assert (await executor.run(FOR_EVER)).kernel_state == "busy"
    assert (await executor.execute("1")).kernel_state == "busy"
    assert await executor.wait(0.01) is None
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(executor.wait(), 0.01)
    executor.interrupt()
    assert (await executor.wait()).exit_code == 130
    job = await executor.submit([CodeBlock("add_two(1)")])
    assert (await job.wait()).output == job.output == "3"
    assert (job.done, job.status) == (True, "done")
    await executor.stop()
    await executor.stop()


def test_the_async_executor_has_the_methods_and_arguments_of_the_other() -> None:
    missing = {name for name in dir(JupyterCodeExecutor) if name[0] != "_"} - set(dir(AsyncJupyterCodeExecutor))
    missing -= {"CODE_WRITER_SYSTEM_MESSAGE", "UserCapability"}
    assert missing == {"code_extractor", "user_capability", "execute_block"}
    for name in ("__init__", "execute", "submit", "wait", "save_notebook", "restart", "stop", "interrupt"):
        both = (getattr(kind, name) for kind in (JupyterCodeExecutor, AsyncJupyterCodeExecutor))
        theirs, here = ([*inspect.signature(method).parameters] for method in both)
        assert theirs == here[: len(theirs)], name


@pytest.mark.slow
@cases("hook", None, lambda output: None)
def test_an_output_that_is_nested_deep_can_be_detached(server: LocalJupyterServer, hook: Any) -> None:
    nested = f"d = 1\nfor _ in range(600): d = [d]\ndisplay({{'application/json': d}}, raw=True)\n{FOR_EVER}"
    with JupyterCodeExecutor(server, on_timeout="detach", on_output=hook) as executor:
        assert executor.execute(nested, timeout=1).status == "running"
        executor.interrupt()
        result = executor.wait()
        kinds = [output["output_type"] for output in result.outputs]
        assert (result.status, kinds) == ("interrupted", ["display_data", "stream", "error"])


IGNORES = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"


@pytest.mark.slow
@on_a_loop
async def test_a_cancelled_call_is_not_detached(server: LocalJupyterServer, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.5)

    async with AsyncJupyterCodeExecutor(server, on_timeout="detach") as executor:
        await executor.execute("1")
        task = asyncio.ensure_future(executor.execute(IGNORES, timeout=1))
        await asyncio.sleep(0)
        await cancel(task)


@pytest.mark.slow
def test_an_approval_that_never_comes_keeps_no_call(server: LocalJupyterServer, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.5)
    asked, never = threading.Event(), threading.Event()

    def approve(name: str, arguments: Any) -> bool:
        asked.set()
        return never.wait(PATIENCE)

    async def main() -> None:
        async with AsyncJupyterCodeExecutor(server, tools=[add_two], approve=approve) as executor:
            code = f"import threading\nthreading.Thread(target=add_two, args=(1,), daemon=True).start()\n{IGNORES}"
            task = asyncio.ensure_future(executor.execute(code, timeout=1))
            while not asked.is_set():
                await asyncio.sleep(0.01)
            await cancel(task)

    try:
        asyncio.run(asyncio.wait_for(main(), PATIENCE))
    finally:
        never.set()


@cases("method", "set_variables", "get_variable", "restart", "save_notebook", "stop", "execute")
@on_a_loop
async def test_a_hook_that_wants_the_kernel_gets_an_error(server: LocalJupyterServer, method: str) -> None:
    said: list[str] = []
    arguments = ("x",) if method in ("get_variable", "save_notebook", "execute") else ()

    async def hook(output: Any) -> None:
        try:
            await getattr(executor, method)(*arguments)
        except JupyterExecError as error:
            said.append(str(error))

    async with AsyncJupyterCodeExecutor(server, on_output=hook) as executor:
        assert (await executor.execute("print(1)")).status == "ok"
    assert said == [jupyter_exec.HOOK_RUNS_CELL]


@cases("waits", "job", "executor")
@on_a_loop
async def test_a_coroutine_hook_cannot_wait_for_its_own_job(server: LocalJupyterServer, waits: str) -> None:
    said: list[str] = []

    async def hook(output: Any) -> None:
        with pytest.raises(JupyterExecError, match="cannot wait for the end of its own cell"):
            await (executor if waits == "executor" else job).wait()
        said.append(waits)

    async with AsyncJupyterCodeExecutor(server, on_output=hook) as executor:
        job = await executor.submit("print(1)")
        assert (await job.wait()).status == "ok"
    assert said == [waits]


@on_a_loop
async def test_what_a_hook_leaves_to_others_may_use_the_executor_later(server: LocalJupyterServer) -> None:
    later: list[asyncio.Task[Any]] = []

    async def when_it_has_ended() -> str:
        await ended.wait()
        return (await executor.execute("6 * 7")).text

    async def hook(output: Any) -> None:
        later.append(asyncio.ensure_future(when_it_has_ended()))

    ended = asyncio.Event()
    async with AsyncJupyterCodeExecutor(server, on_output=hook) as executor:
        await executor.execute("print(1)")
        ended.set()
        assert await later[0] == "42"


@on_a_loop
async def test_cancelling_who_waits_for_its_turn_leaves_the_running_hook_alone(server: LocalJupyterServer) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def on_input(prompt: str, password: bool) -> str:
        asked.set()
        await answered.wait()
        return "Ann"

    async with AsyncJupyterCodeExecutor(server) as executor:
        running = asyncio.ensure_future(executor.execute("input()", on_input=on_input))
        await asked.wait()
        waiting = asyncio.ensure_future(executor.execute("2"))
        while len(executor._executor._turns._queue) < 2:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        await cancel(waiting)
        answered.set()
        assert (await running).text.endswith("'Ann'")


@cases("end", "stop", "restart", "the timeout", "the end of the code")
@on_a_loop
async def test_a_hook_that_waits_for_ever_is_ended_with_its_cell(
    server: LocalJupyterServer, end: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.5)
    asked, never = asyncio.Event(), asyncio.Event()

    async def wait(*arguments: Any) -> str:
        asked.set()
        await never.wait()
        return ""

    async with AsyncJupyterCodeExecutor(server, on_input=wait, on_output=wait) as executor:
        code = "print(1)" if "code" in end else "input()"
        running = asyncio.ensure_future(executor.execute(code, timeout=1 if "the" in end else PATIENCE))
        await asked.wait()
        if "the" not in end:
            await getattr(executor, end)()
        result = await running
        assert result.status == {"the timeout": "timeout", "the end of the code": "ok"}.get(end, "died")


@on_a_loop
async def test_a_cancelled_call_that_waits_for_its_turn_leaves_the_queue(server: LocalJupyterServer) -> None:
    async with AsyncJupyterCodeExecutor(server) as executor:
        job = await executor.submit("while True: pass", timeout=float("inf"))
        task = asyncio.ensure_future(executor.get_variable("x"))
        queue: Any = executor._executor._turns._queue  # type: ignore[union-attr]
        while len(queue) < 2:
            await asyncio.sleep(0.01)
        await cancel(task)
        while len(queue) > 1:
            await asyncio.sleep(0.01)
        job.interrupt()
        await job.wait()


@on_a_loop
async def test_a_tool_that_is_called_after_a_hook_is_none(server: LocalJupyterServer) -> None:
    heard = asyncio.Event()
    executor: AsyncJupyterCodeExecutor

    async def hook(output: Any) -> None:
        heard.set()

    async def restart() -> None:
        await heard.wait()
        await executor.restart()

    async with AsyncJupyterCodeExecutor(server, on_output=hook, tools=[restart]) as executor:
        result = await executor.execute("print(1, flush=True)\nawait restart()")
    assert (result.status, result.note.split(";")[0]) == ("died", "The kernel was restarted while the code ran")


@pytest.mark.slow
def test_a_program_ends_although_a_start_goes_on() -> None:
    program = """
        import asyncio, sys
        from jupyter_exec import AsyncJupyterCodeExecutor, CommandJupyterServer
        silent = CommandJupyterServer([sys.executable, "-c", "import time; time.sleep(600)"])
        try:
            asyncio.run(asyncio.wait_for(AsyncJupyterCodeExecutor(silent).start(), 0.5))
        except asyncio.TimeoutError:
            print("given up")
    """
    result = run_python(program, timeout=PATIENCE)
    assert (result.stdout, result.stderr, result.returncode) == ("given up\n", "", 0)


def test_a_thread_may_use_asyncio_when_the_main_thread_has_ended() -> None:
    program = """
        import asyncio, threading
        from jupyter_exec import AsyncJupyterCodeExecutor, LocalJupyterServer

        async def work():
            threading.main_thread().join()
            async with LocalJupyterServer() as server, AsyncJupyterCodeExecutor(server) as executor:
                print((await executor.execute("6 * 7")).text)

        threading.Thread(target=asyncio.run, args=(work(),)).start()
    """
    result = run_python(program)
    assert (result.stdout, result.stderr, result.returncode) == ("42\n", "", 0)


@on_a_loop
async def test_servers_are_left_without_blocking_the_loop() -> None:
    async with LocalJupyterServer() as server, AsyncJupyterCodeExecutor(server) as executor:
        assert (await executor.execute("1")).text == "1"
    with pytest.raises(ConnectionClosed):
        server.kernelspecs()


@pytest.mark.slow
def test_the_readmes_cells_that_take_long(tmp_path: Path) -> None:
    (code,) = readme_blocks("Cells that take long")
    result = run_python(code, cwd=tmp_path)
    said = result.stdout.splitlines()
    assert result.stderr == ""
    shown = [comment.strip() for comment in re.findall(r"# (exit_code.*)", code)]
    assert [said[0], said[3]] == shown
    assert [said[1], said[2], *said[4:]] == ["busy", "None", "0", "1", "2", " done 0", "1", "2", ""]


@pytest.mark.slow
def test_the_readmes_web_service_streams_and_interrupts_on_disconnect(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(*readme_blocks("A web service"))
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(MODULE.parent)}
    command = [sys.executable, "-m", "uvicorn", "--port", str(port), "app:app"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    log_text = (tmp_path / "log").read_text
    try:
        eventually(lambda: "Application startup complete" in log_text() or process.poll() is not None, "it listens")
        assert process.poll() is None, log_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:

            def post(code: str) -> Any:
                return client.stream("POST", "/run", json={"code": code})

            with post(f"x = 5\n{FOR_EVER}") as response:  # left as soon as the first line is there, long before its end
                assert json.loads(next(response.iter_lines()))["text"] == "go\n"
            with post("print(x)\nx + 1") as response:
                lines = [json.loads(line) for line in response.iter_lines()]
            assert [line.get("text") for line in lines] == ["5\n", None, None]
            assert lines[1]["data"] == {"text/plain": "6"} and lines[2] == {"status": "ok"}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    assert "Traceback" not in log_text(), log_text()


def test_copies_of_an_executor_are_itself_and_restart_gives_a_fresh_kernel(executor: JupyterCodeExecutor) -> None:
    assert copy.copy(executor) is copy.deepcopy(executor) is executor
    other = AsyncJupyterCodeExecutor("")
    assert copy.copy(other) is copy.deepcopy(other) is other
    run(executor, "x = 1")
    path = executor.connection_file
    executor.restart()
    assert run(executor, "'x' in dir()").output == "False"
    assert executor.connection_file == path


# Frameworks: each in an environment of its own, which JUPYTER_EXEC_FRAMEWORKS holds


def run_framework(name: str, program: str, tmp_path: Path) -> str:
    """Run a program with the framework of that name and return what it printed last."""
    python = Path(os.environ.get("JUPYTER_EXEC_FRAMEWORKS", "/nowhere")) / name / "bin" / "python"
    need(name, python.exists())
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "AUTOGEN_USE_DOCKER": "0"}
    script = tmp_path / "program.py"  # for frameworks that look for the source of functions
    script.write_text(textwrap.dedent(program))
    command = [str(python), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.rstrip("\n").rpartition("\n")[2]


CLASSIC = """
    import asyncio, json, os, tempfile
    import autogen
    from autogen import ConversableAgent, GroupChat, GroupChatManager
    from autogen.coding.base import CodeExecutor, CodeExtractor
    from autogen.coding import CodeBlock
    import jupyter_exec
    from jupyter_exec import JupyterCodeExecutor, LocalJupyterServer

    DEFINE = "def fibonacci(n):\\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"
    FIBONACCI = f"Here:\\n```python\\n{DEFINE}\\n```\\nand then\\n```python\\nfibonacci(14)\\n```"

    def writer(name="writer"):
        agent = ConversableAgent(name, llm_config=False, human_input_mode="NEVER")
        agent.register_reply([autogen.Agent, None], lambda *a, **k: (True, FIBONACCI))
        return agent

    def runner(executor, name="runner"):
        config = {"executor": executor, "last_n_messages": "auto"}
        return ConversableAgent(name, llm_config=False, human_input_mode="NEVER", code_execution_config=config)

    with LocalJupyterServer() as server, tempfile.TemporaryDirectory() as directory:
        executor = JupyterCodeExecutor(server, output_dir=directory)
        assert isinstance(executor, CodeExecutor) and isinstance(JupyterCodeExecutor, CodeExecutor)
        autogen.runtime_logging.start(config={"dbname": os.path.join(directory, "log.db")})
        agent = runner(executor)
        assert agent.code_executor is executor
        expected = "exitcode: 0 (execution succeeded)\\nCode output: \\n377"
        agent.initiate_chat(writer(), message="calculate the 14th Fibonacci number", max_turns=2)
        autogen.runtime_logging.stop()
        assert [m["content"] for m in agent.chat_messages[list(agent.chat_messages)[0]]][-2] == expected

        async def chat():
            other = runner(JupyterCodeExecutor(server, output_dir=directory))
            await other.a_initiate_chat(writer(), message="calculate", max_turns=2)
            return other.chat_messages[list(other.chat_messages)[0]][-2]["content"]

        assert asyncio.run(chat()) == expected

        group = GroupChat([writer(), runner(executor)], messages=[], max_round=3, speaker_selection_method="round_robin")
        manager = GroupChatManager(group, llm_config=False)
        ConversableAgent("user", llm_config=False, human_input_mode="NEVER").initiate_chat(manager, message="go", max_turns=1)
        assert group.messages[-1]["content"] == expected, group.messages

        result = executor.execute_code_blocks([CodeBlock(code="x = 1", language="python"), CodeBlock(code="x", language="python")])
        assert (result.exit_code, result.output) == (0, "\\n1")
        executor.restart()
    print("all is well")
"""


@pytest.mark.slow
@cases("line", "autogen-classic", "autogen-0.2")
def test_autogen_and_ag2_classic(line: str, tmp_path: Path) -> None:
    assert run_framework(line, CLASSIC, tmp_path) == "all is well"


@pytest.mark.slow
def test_autogen_agentchat(tmp_path: Path) -> None:
    program = """
        import asyncio, warnings
        from autogen_agentchat.agents import CodeExecutorAgent
        from autogen_agentchat.messages import TextMessage
        from autogen_core import CancellationToken
        from autogen_ext.tools.code_execution import PythonCodeExecutionTool
        from jupyter_exec import AsyncJupyterCodeExecutor, LocalJupyterServer

        async def main():
            warnings.simplefilter("ignore")
            with LocalJupyterServer() as server:
                async with AsyncJupyterCodeExecutor(server) as executor:
                    agent = CodeExecutorAgent("runner", code_executor=executor)
                    for code, output in (("x = 20\\nprint('set')", "set"), ("print(x + 1)", "21")):
                        message = TextMessage(content=f"```python\\n{code}\\n```", source="user")
                        response = await agent.on_messages([message], CancellationToken())
                        assert response.chat_message.content.strip() == output, response.chat_message.content
                    tool = PythonCodeExecutionTool(executor)
                    result = await tool.run_json({"code": "x + 2"}, CancellationToken())
                    assert (result.success, result.output) == (True, "22"), result
                    token = CancellationToken()
                    task = asyncio.ensure_future(tool.run_json({"code": "import time; time.sleep(60)"}, token))
                    await asyncio.sleep(0.5)
                    token.cancel()
                    try:
                        await task
                        raise SystemExit("not cancelled")
                    except asyncio.CancelledError:
                        pass
                    assert (await executor.run("x")).output == "20"
            print("all is well")

        asyncio.run(main())
    """
    assert run_framework("autogen-0.7", program, tmp_path) == "all is well"


@pytest.mark.slow
def test_autogen_agentchat_with_a_model(tmp_path: Path) -> None:
    program = """
        import asyncio, warnings
        import autogen_core.code_executor as theirs
        from autogen_agentchat.agents import CodeExecutorAgent
        from autogen_ext.models.replay import ReplayChatCompletionClient
        from jupyter_exec import AsyncJupyterCodeExecutor, CodeResult, LocalJupyterServer

        async def main():
            warnings.simplefilter("ignore")
            with LocalJupyterServer() as server:
                async with AsyncJupyterCodeExecutor(server) as executor:
                    model = ReplayChatCompletionClient(["```python\\nprint(6 * 7)\\n```", "It is 42."])
                    agent = CodeExecutorAgent("runner", code_executor=executor, model_client=model)
                    messages = [message async for message in agent.run_stream(task="What is 6 times 7?")]
            [event] = [message for message in messages if getattr(message, "type", "") == "CodeExecutionEvent"]
            assert isinstance(event.result, theirs.CodeResult) and isinstance(event.result, CodeResult)
            assert event.model_dump()["result"] == {"exit_code": 0, "output": "42\\n"}, event
            assert messages[-1].messages[-1].content == "It is 42."
            print("all is well")

        asyncio.run(main())
    """
    assert run_framework("autogen-0.7", program, tmp_path) == "all is well"


@pytest.mark.slow
def test_autogen_agentchat_with_the_wrong_executor(tmp_path: Path) -> None:
    program = """
        import asyncio, warnings
        from autogen_agentchat.agents import CodeExecutorAgent
        from jupyter_exec import JupyterCodeExecutor, LocalJupyterServer

        warnings.simplefilter("ignore")
        with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
            try:
                asyncio.run(CodeExecutorAgent("runner", code_executor=executor).run(task="```python\\n1\\n```"))
            except TypeError as error:
                print(error)
    """
    assert "give it an AsyncJupyterCodeExecutor instead" in run_framework("autogen-0.7", program, tmp_path)


@pytest.mark.slow
def test_ag2_one(tmp_path: Path) -> None:
    program = """
        import asyncio
        from ag2.tools import SandboxCodeTool
        from ag2.tools.code import CodeEnvironment
        from jupyter_exec import AsyncJupyterCodeExecutor, LocalJupyterServer

        async def main():
            with LocalJupyterServer() as server:
                async with AsyncJupyterCodeExecutor(server) as executor:
                    assert isinstance(executor, CodeEnvironment)
                    tool = SandboxCodeTool(executor)
                    assert (await executor.run("x = 6", "python")).exit_code == 0
                    assert (await executor.run("print(x * 7)", "python", context=None)).output == "42\\n"
            print("all is well")

        asyncio.run(main())
    """
    assert run_framework("ag2-1", program, tmp_path) == "all is well"


# The README's recipes, one for each comment with a name: as they stand, each with a model that says what is in `CELLS`, and "done" at last.

RECIPE = """
import asyncio, json, os, warnings
warnings.simplefilter("ignore")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
PLOT = {"image/png": PNG, "text/plain": "a plot"}
CELLS = [f"from IPython.display import display; x = 6; display({PLOT}, raw=True)", "print(x * 7)", "1 / 0"]
QUESTION = "What is six times seven?"
seen = []  # what the model got, turn by turn
"""
RECIPES = {
    "smolagents": (
        """
        from smolagents import ChatMessage, Model, tool

        CODE = ["x = 6; print(where())", "print('before'); 1 / 0", "final_answer(x * 7)", "final_answer([x, n])"]

        @tool
        def where() -> int:
            "Return the process that this is."
            return os.getpid()

        class Scripted(Model):
            def generate(self, messages, **options):
                seen.append(str(messages))
                return ChatMessage(role="assistant", content=f"<code>{CODE[len(seen) - 1]}</code>")

        model = Scripted()
        """,
        """
        agent.tools["where"] = where
        assert agent.run("What is six times seven?") == 42
        assert str(os.getpid()) in seen[1] and "before" in seen[2] and "ZeroDivisionError" in seen[2], seen
        assert agent.run("And now?", reset=False, additional_args={"n": 5}) == [6, 5]
        """,
    ),
    "DSPy": (
        """
        import dspy
        from dspy.utils import DummyLM

        CODE = ["words = text.split(); print(llm_query('Hello?'))", "1 / 0", "m = dspy.Predict('q -> a')", "SUBMIT(len(words))"]
        CODE[2] = "class M(dspy.Module):\\n    def __init__(self):\\n        self.p = dspy.Predict('q -> a')\\nprint(M().p(q='?').a)"
        steps = [{"reasoning": "", "code": code} for code in CODE]
        model = DummyLM([steps[0], {"response": "of a model"}, steps[1], steps[2], {"a": "of a sub-agent"}, steps[3]])
        """,
        """
        question, text = "How many words?", "to be or not to be " * 1000
        assert dspy.RLM("text, question -> answer: int")(text=text, question=question).answer == 6000
        script = [{"reasoning": "", "generated_code": "SUBMIT({'answer': 6 * 7})"}, {"reasoning": "", "answer": "42"}]
        with dspy.context(lm=DummyLM(script)):
            assert dspy.ProgramOfThought("question -> answer: int")(question="?").answer == 42

        def where() -> int:
            "Return the process that this is."
            return os.getpid()

        with dspy.context(lm=DummyLM([{"reasoning": "", "code": "import json; SUBMIT(answer=where())"}])):
            result = dspy.RLM("question -> answer: int", tools=[where])(question="?")
        assert result.answer == os.getpid()
        model = DummyLM([*steps[:1], {"response": "of a model"}, *steps[1:3], {"a": "of a sub-agent"}, steps[3]])
        with dspy.context(lm=model):
            trajectory = dspy.RLM("text -> answer: int")(text="a b").trajectory
        outputs = [step["output"] for step in trajectory]
        assert "of a model" in outputs[0] and "ZeroDivisionError" in outputs[1] and "of a sub-agent" in outputs[2], outputs
        """,
    ),
    "Pydantic AI": (
        """
        from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
        from pydantic_ai.models.function import FunctionModel

        def answer(messages, info):
            seen.append(messages[-1].parts)
            if len(seen) > len(CELLS):
                return ModelResponse([TextPart("done")])
            return ModelResponse([ToolCallPart("run_python", {"code": CELLS[len(seen) - 1]})])

        model = FunctionModel(answer)
        """,
        """
        assert agent.run_sync(QUESTION).output == "done"
        text, picture = seen[1][0].content
        assert "a plot" in text and (picture.data, picture.media_type) == (b64decode(PNG), "image/png")
        assert seen[2][0].content == ["42\\n"] and "ZeroDivisionError" in seen[3][0].content[0], seen
        """,
    ),
    "OpenAI Agents SDK": (
        """
        from agents import Model, ModelResponse, Runner, Usage, set_tracing_disabled
        from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

        set_tracing_disabled(True)

        class Scripted(Model):
            async def get_response(self, system_instructions, input, *args, **options):
                seen.append(input)
                text = ResponseOutputText(annotations=[], text="done", type="output_text")
                said = ResponseOutputMessage(id="1", content=[text], role="assistant", status="completed", type="message")
                if len(seen) <= len(CELLS):
                    code = json.dumps({"code": CELLS[len(seen) - 1]})
                    said = ResponseFunctionToolCall(arguments=code, call_id=str(len(seen)), name="run_python", type="function_call")
                return ModelResponse(output=[said], usage=Usage(), response_id=None)

            def stream_response(self, *args, **options):
                raise NotImplementedError

        model = Scripted()
        """,
        """
        assert Runner.run_sync(agent, QUESTION).final_output == "done"
        outputs = [item["output"] for item in seen[-1] if item.get("type") == "function_call_output"]
        assert outputs[0][1] == {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}, outputs
        assert outputs[1] == [{"type": "input_text", "text": "42\\n"}] and "ZeroDivisionError" in outputs[2][0]["text"]
        """,
    ),
    "Microsoft Agent Framework": (
        """
        from agent_framework import BaseChatClient, ChatResponse, Content, FunctionInvocationLayer, Message

        class Scripted(FunctionInvocationLayer, BaseChatClient):
            async def _inner_get_response(self, *, messages, stream=False, options=None, **others):
                seen.append([item for message in messages for item in message.contents])
                said = Content.from_text("done")
                if len(seen) <= len(CELLS):
                    said = Content.from_function_call(str(len(seen)), "run_python", arguments={"code": CELLS[len(seen) - 1]})
                return ChatResponse(messages=[Message("assistant", [said])])

        model = Scripted()
        """,
        """
        assert str(asyncio.run(agent.run(QUESTION))) == "done"
        results = [item.items for item in seen[-1] if item.type == "function_result"]
        assert results[0][1].uri == f"data:image/png;base64,{PNG}", results
        assert results[1][0].text == "42\\n" and "ZeroDivisionError" in results[2][0].text
        """,
    ),
    "LangChain": (
        """
        from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
        from langchain_core.messages import AIMessage

        class Scripted(GenericFakeChatModel):
            def bind_tools(self, tools, **options):
                return self

        def call(number, name, **arguments):
            return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": str(number)}])

        calls = [call(number, "run_python", code=code) for number, code in enumerate(CELLS)]
        model = Scripted(messages=iter([*calls, AIMessage("done")]))
        """,
        """
        messages = asyncio.run(agent.ainvoke({"messages": [("user", QUESTION)]}))["messages"]
        assert messages[-1].content == "done"
        results = [message.content for message in messages if message.type == "tool"]
        assert results[0][1] == {"type": "image", "base64": PNG, "mime_type": "image/png"}, results
        assert results[1] == [{"type": "text", "text": "42\\n"}] and "ZeroDivisionError" in results[2][0]["text"]
        """,
    ),
    "deepagents": (
        """
        from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
        from langchain_core.messages import AIMessage

        class Scripted(GenericFakeChatModel):
            def bind_tools(self, tools, **options):
                return self

        def call(number, name, **arguments):
            return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": str(number)}])

        FILE = os.path.abspath("it's new/answer.txt")
        model = Scripted(messages=iter([
            call(1, "write_file", file_path=FILE, content="6 * 7"),
            call(2, "edit_file", file_path=FILE, old_string="6 * 7", new_string="42"),
            call(3, "read_file", file_path=FILE),
            call(4, "execute", command="python -c 'print(6 * 7)'; exit 3"),
            AIMessage("done"),
        ]))
        """,
        """
        messages = agent.invoke({"messages": [("user", QUESTION)]})["messages"]
        assert messages[-1].content == "done", messages
        results = [message.text for message in messages if message.type == "tool"]
        assert open(FILE).read() == "42" and "42" in results[2] and "42" in results[3] and "3" in results[3], results
        backend = KernelSandbox()
        data = bytes(range(256)) * 2000
        assert [one.error for one in backend.upload_files([("a b/c", data), ("/proc/no", b"")])][0] is None
        assert backend.upload_files([("/proc/no", b"")])[0].error
        found, missing = backend.download_files(["a b/c", "missing"])
        assert found.content == data and missing.content is None and "No such file" in missing.error
        """,
    ),
    "Google ADK": (
        """
        from google.adk.models.base_llm import BaseLlm
        from google.adk.models.llm_response import LlmResponse
        from google.adk.runners import InMemoryRunner
        from google.genai import types

        class Scripted(BaseLlm):
            async def generate_content_async(self, llm_request, stream=False):
                seen.append(str(llm_request.contents[-1].parts[-1].text))
                text = f"```python\\n{CELLS[len(seen) - 1]}\\n```" if len(seen) <= len(CELLS) else "done"
                yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text=text)]))

        model = Scripted(model="scripted")
        """,
        """
        async def main():
            runner = InMemoryRunner(agent)
            events = await runner.run_debug(QUESTION, quiet=True)
            where = {"app_name": runner.app_name, "user_id": "debug_user_id", "session_id": "debug_session_id"}
            return events, await runner.artifact_service.load_artifact(filename="cell-1-0.png", **where)

        events, picture = asyncio.run(main())
        assert events[-1].content.parts[0].text == "done"
        assert (picture.inline_data.data, picture.inline_data.mime_type) == (b64decode(PNG), "image/png")
        assert "cell-1-0.png" in seen[1] and "42" in seen[2] and "ZeroDivisionError" in seen[3], seen
        assert len(executors) == 1
        """,
    ),
    "LlamaIndex": (
        """
        from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

        class Scripted(CustomLLM):
            @property
            def metadata(self):
                return LLMMetadata()

            def complete(self, prompt, **options):
                seen.append(prompt)
                text = f"<execute>{CELLS[len(seen) - 1]}</execute>" if len(seen) <= len(CELLS) else "done"
                return CompletionResponse(text=text, delta=text)

            def stream_complete(self, prompt, **options):
                yield self.complete(prompt)

        model = Scripted()
        """,
        """
        async def main():
            return await agent.run(QUESTION)

        assert str(asyncio.run(main())) == "done"
        assert "a plot" in seen[1] and "42" in seen[2] and "ZeroDivisionError" in seen[3], seen
        """,
    ),
}


@pytest.mark.slow
@cases("name", *RECIPES)
def test_recipes_of_the_readme(name: str, tmp_path: Path) -> None:
    model, check = map(textwrap.dedent, RECIPES[name])
    parts = re.split(rf"(?m)^# (?={'|'.join(RECIPES)})", "".join(readme_blocks("In other frameworks")))
    (recipe,) = (part for part in parts[1:] if part.startswith(name))
    assert len(recipe.splitlines()) <= 45
    program = "\n".join([RECIPE, model, parts[0], "# " + recipe, check, "server.stop()", "print('all is well')"])
    assert run_framework("agents", program, tmp_path) == "all is well"


def extract(message: Any) -> list[tuple[str, str]]:
    return [(block.language, block.code) for block in MarkdownCodeExtractor().extract_code_blocks(message)]


@cases(
    "text, blocks",
    ("```python\nprint(1)\n```", [("python", "print(1)")]),
    ("```c++\nint x;\n```\nprose\n```python\n1\n```", [("c++", "int x;"), ("python", "1")]),
    ("```python {.line}\n1\n```", [("python", "1")]),
    ("```{.python .line}\n1\n```", [("python", "1")]),
    ("```python3.11\n1\n```", [("python3.11", "1")]),
    ("~~~py\n1\n~~~", [("py", "1")]),
    ("````markdown\n```python\n1\n```\n````", [("markdown", "```python\n1\n```")]),
    ("```python\n1", [("python", "1")]),
    ("```python\n```\ntext\n```python\n2\n```", [("python", ""), ("python", "2")]),
    ("   ```python\n   if 1:\n       2\n   ```", [("python", "if 1:\n    2")]),
    ("1. Do:\n\n   ```python\n   1\n   ```\n2. Then", [("python", "1")]),
    ("- ```python\n  1\n  ```", [("python", "1")]),
    ("1.  Load\n    - csv\n\n    ```python\n    1\n    ```", [("python", "1")]),
    ("- a\n  - b\n    - c\n\n  ```python\n  1\n  ```\n\n```python\n2\n```", [("python", "1"), ("python", "2")]),
    ("<!--\n```python\n1\n```\n-->\n```python\n2\n```", [("python", "2")]),
    ("<!-- one line -->\n```python\n1\n```", [("python", "1")]),
    ("text <!--\n```python\n1\n```", [("python", "1")]),
    ("```python\r\n1\r\n2\r\n```\r\n", [("python", "1\n2")]),
    ("```\nx y\n```", [("", "x y")]),
    ("```\nprint('hello')\n```", [("python", "print('hello')")]),
    ("```\npip install x\n```", [("sh", "pip install x")]),
    ("```\npython3 a.py\n```", [("sh", "python3 a.py")]),
    ("```\nusing System;\nnamespace A\n{\n}\n```", [("", "using System;\nnamespace A\n{\n}")]),
    ("``` python\r\ndef f():\r\n   return 1\r\n```\r\n", [("python", "def f():\n   return 1")]),
    (f"```\n{'(' * 1000}\n```", [("", "(" * 1000)]),
    ("``` not`code\n", []),
    ("no code", []),
    ("", []),
)
def test_fences(text: str, blocks: list[tuple[str, str]]) -> None:
    assert extract(text) == blocks


fence_lines = st.sampled_from(
    [
        "```",
        "```python",
        "````",
        "~~~",
        "~~~~ sh",
        "x = 1",
        "",
        "   ```",
        "    ```",
        "  y",
        "``` a`b",
        "text",
        "```  ",
        "\t```",
    ]
)


@settings(max_examples=500)
@given(st.lists(fence_lines, max_size=10))
def test_fences_are_found_as_commonmark_finds_them(lines: list[str]) -> None:
    text = "\n".join(lines)
    tokens = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    judge = [((*token.info.split(), "")[0], token.content.rstrip("\n")) for token in tokens]
    found = [(language, code.rstrip("\n")) for language, code in extract(text)]
    assert [code for _, code in found] == [code for _, code in judge]
    assert all(
        language in (named, *([] if named else ["python"]))
        for (language, _), (named, _) in zip(found, judge, strict=True)
    )


def test_message_parts() -> None:
    assert extract(None) == []
    parts = [
        {"type": "text", "text": "```python\n1\n```"},
        {"type": "image_url"},
        {"type": "apply_patch_call", "operation": {}},
        {"type": "text", "text": "```\n2\n```"},
    ]
    assert extract(parts) == [("python", "1"), ("python", "2")]
    with pytest.raises(ValueError, match="unknown type smell"):
        extract([{"type": "smell"}])


# ======================================================================================================
# 11. Command line
# ======================================================================================================


def cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("cwd", tempfile.gettempdir())
    command = [sys.executable, str(MODULE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_what_follows_an_open_line_begins_a_new_one_in_its_own_stream() -> None:
    result = cli("run", "-c", "import sys; print('open', end='', file=sys.stderr, flush=True); 42")
    assert (result.stdout, result.stderr) == ("42\n", "open\n")


def test_run_keeps_long_output_for_json() -> None:
    (block,) = json.loads(cli("run", "--json", "-c", "print('x' * 150_000)").stdout)["blocks"]
    assert block["output"] == "x" * 150_000 + "\n"


def test_run_code_prints_as_the_code_does() -> None:
    result = cli("run", "-c", "import sys; print('out'); print('err', file=sys.stderr); 42")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n42\n", "err\n", 0)


@cases(
    "arguments, options, shown",
    (["-"], {"input": "print('stdin')"}, "stdin\n"),
    (["-c", "import os; print(os.getcwd())", "--cwd", "/usr"], {}, "/usr\n"),
    (["-c", "print('é')"], {"env": os.environ | {"PYTHONIOENCODING": "ascii"}}, "\\xe9\n"),
)
def test_run_from_stdin_in_a_directory_and_on_a_poor_terminal(arguments: Any, options: Any, shown: str) -> None:
    assert cli("run", *arguments, **options).stdout == shown


def test_run_markdown_with_a_plot(tmp_path: Path) -> None:
    text = "# A\n```python\nx = 20\n```\n```text\nnot code\n```\n```python\nprint(x + 1)\n```\n```bash\necho $((1 + 2))\n```\n"
    text += "```python\nimport matplotlib.pyplot as plt\nplt.plot([1, x])\nplt.show()\n```\n"
    (tmp_path / "a.md").write_text(text)
    result = cli("run", str(tmp_path / "a.md"), "--output-dir", str(tmp_path))
    (picture,) = tmp_path.glob("*.png")
    assert picture.name == "a-4-1.png"
    assert (result.stdout, result.returncode) == (f"21\n3\nImage data saved to {picture}\n", 0)
    assert result.stderr == f"jupyter-exec: {tmp_path}/a.md:6: skipped a block of text\n"


def notebook_file(path: Path, *cells: Any, **metadata: Any) -> Path:
    """Write a notebook of nbformat cells; of a plain string as code."""
    made = [v4.new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    path.write_text(json.dumps(v4.new_notebook(cells=made, metadata=metadata)))
    return path


@pytest.mark.slow
def test_a_notebook_stays_a_notebook(tmp_path: Path) -> None:
    picture = {"a.png": {"image/png": "AAAA"}}
    cells = [
        v4.new_markdown_cell("![](attachment:a.png)", attachments=picture),
        v4.new_raw_cell("raw"),
        v4.new_code_cell("x = 1\nx + 1", metadata={"tags": ["mine"]}),
        v4.new_code_cell("1/0", metadata={"tags": ["raises-exception"]}),
        v4.new_code_cell("print('skipped')", metadata={"tags": ["skip-execution"]}),
        v4.new_code_cell("print(x)"),
    ]
    source = notebook_file(tmp_path / "a.ipynb", *cells, mine={"kept": 1})
    shutil.copy(source, tmp_path / "theirs.ipynb")
    result = cli("run", "a.ipynb", "--notebook", "b.ipynb", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "2\n1\n")
    subprocess.run([sys.executable, "-m", "jupyter", "execute", "--inplace", "theirs.ipynb"], cwd=tmp_path, check=True)
    ours, theirs = (read_notebook(tmp_path / name, as_version=4) for name in ("b.ipynb", "theirs.ipynb"))
    nbformat.validate(ours)
    assert ours.metadata["mine"] == {"kept": 1}
    for cell, other in zip(ours.cells, theirs.cells, strict=True):
        assert cell.metadata.pop("execution", None) is not None or "execution" not in other.metadata
        other.metadata.pop("execution", None)
        for output in [*cell.get("outputs", []), *other.get("outputs", [])]:
            output.pop("traceback", None)
        assert cell == other


def test_a_notebook_is_saved_after_each_cell(tmp_path: Path) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out.ipynb"
    notebook_file(tmp_path / "a.ipynb", "6 * 7", waiting_for(gate))
    with subprocess.Popen([sys.executable, str(MODULE), "run", tmp_path / "a.ipynb", "--notebook", out]) as process:
        eventually(out.exists, "the first cell is saved")
        first, second = read_notebook(out, as_version=4).cells
        gate.touch()
        assert process.wait(PATIENCE) == 0
    assert (first.outputs[0].data["text/plain"], first.execution_count, second.execution_count) == ("42", 1, None)


@pytest.mark.slow
def test_parameters_are_set_as_papermill_does(tmp_path: Path) -> None:
    digit = "\u0661"  # of Arabic
    values = dict(zip("abcdefghi", ["1", "-2.5", "True", "None", "it's", "1e3", "nan", "[1]", digit], strict=True))
    defaults = v4.new_code_cell("a = b = 0", metadata={"tags": ["parameters"]})
    spec = {"name": "python3", "display_name": "Python", "language": "python"}
    notebook_file(tmp_path / "a.ipynb", "before = 1", defaults, "[a, b, c, d, e, f, g, h, i]", kernelspec=spec)
    options = [word for name, value in values.items() for word in ("-p", name, value)]
    ran = cli("run", "a.ipynb", "--notebook", "ours.ipynb", *options, cwd=tmp_path)
    papermill = [sys.executable, "-m", "papermill", "a.ipynb", "theirs.ipynb", "--kernel", "python3", *options]
    subprocess.run(papermill, cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = (read_notebook(tmp_path / name, as_version=4) for name in ("ours.ipynb", "theirs.ipynb"))
    assert [cell.metadata.get("tags", []) for cell in ours.cells] == [[], ["parameters"], ["injected-parameters"], []]
    assert ran.stdout.strip() == theirs.cells[-1].outputs[0].data["text/plain"]
    once_more = cli("run", "ours.ipynb", "--notebook", "ours.ipynb", "-p", "a", "5", "-p", "b", "6", cwd=tmp_path)
    assert once_more.returncode == 1
    again = read_notebook(tmp_path / "ours.ipynb", as_version=4)
    assert [cell.source for cell in again.cells[2:]] == ["# Parameters\na = 5\nb = 6", "[a, b, c, d, e, f, g, h, i]"]
    for name in ("a b", "class"):
        assert "cannot be the name of a variable" in cli("run", "a.ipynb", "-p", name, "1", cwd=tmp_path).stderr


def test_parameters_keep_a_notebook_of_an_older_minor_version_valid(tmp_path: Path) -> None:
    notebook = json.loads(json.dumps(v4.new_notebook(cells=[v4.new_code_cell("a")])))
    del notebook["cells"][0]["id"]  # which came with 4.5
    (tmp_path / "old.ipynb").write_text(json.dumps(notebook | {"nbformat_minor": 4}))
    assert cli("run", "old.ipynb", "-p", "a", "7", "--notebook", "new.ipynb", cwd=tmp_path).stdout == "7\n"
    new = json.loads((tmp_path / "new.ipynb").read_text())
    nbformat.validate(new)
    assert (new["nbformat_minor"], len(new["cells"])) == (4, 2)


EXITS = {"": (0, ""), "0": (0, ""), "None": (0, ""), "3": (3, ""), "-1": (255, ""), "'a message'": (1, "a message\n")}
EXITS |= {"False": (0, ""), "True": (1, "")}


@pytest.mark.slow
@cases("value", *EXITS)
def test_a_script_ends_with_the_status_that_python_would_give(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"import sys\nprint('out')\nsys.exit({value})")
    python = subprocess.run([sys.executable, "a.py"], cwd=tmp_path, capture_output=True, text=True)
    ran = cli("run", "a.py", cwd=tmp_path)
    assert (ran.returncode, ran.stderr, ran.stdout) == (python.returncode, python.stderr, "out\n")
    assert (python.returncode, python.stderr) == EXITS[value]


LATIN = "# coding: latin-1\nprint('\xe9')"
SCRIPTS: dict[str, bytes] = {
    "exit() ends it at once": b"exit('no data'); print('never')",
    "quit() too": b"quit(4); print('never')",
    "a thread goes on": b"import threading, time\nthreading.Timer(0.5, print, ['late']).start()",
    "a pool goes on": b"from concurrent.futures import *\npool = ThreadPoolExecutor()\n_ = pool.submit(lambda: print('in a pool'))",
    "a daemon does not": b"import threading, time\nthreading.Thread(target=time.sleep, args=[1e6], daemon=True).start()",
    "nothing of its is touched meanwhile": b"import threading\nend = 'kept'\nthreading.Timer(0.5, lambda: print(end)).start()"
    b"\nfrom concurrent.futures import *\n_ = ThreadPoolExecutor()",
    "its coding line": LATIN.encode("latin-1"),
    "a BOM": b"\xef\xbb\xbfprint('bom')",
}


@pytest.mark.slow
@cases("script, by_stdin", *[(script, by_stdin) for script in SCRIPTS.values() for by_stdin in (False, True)])
def test_a_script_runs_as_in_python(script: bytes, by_stdin: bool, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(script)

    def run(*command: str) -> tuple[int, bytes, bytes]:
        with open(tmp_path / "a.py", "rb") as stdin:
            name = "-" if by_stdin else "a.py"
            done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, stdin=stdin, timeout=60)
        return done.returncode, done.stdout, done.stderr

    assert run(sys.executable, str(MODULE), "run") == run(sys.executable)


@pytest.mark.slow
def test_sys_exit_ends_a_run_of_cells(tmp_path: Path) -> None:
    code = "import sys; sys.exit(0)\n# %%\nprint('never')\n# %%\n2"
    ran = cli("run", "-c", code)
    says = "jupyter-exec: code:1: the code has ended the run here; not run: 2 cells\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", says)
    answer = json.loads(cli("run", "-c", "import sys; sys.exit('bad')", "--json").stdout)
    block = answer["blocks"][0]
    assert (answer["exit_code"], block["status"], block["exit_code"], block["output"]) == (1, "exited", 1, "bad")
    tagged = v4.new_code_cell("raise SystemExit(4)", metadata={"tags": ["raises-exception"]})
    notebook_file(tmp_path / "a.ipynb", tagged, "'after'")
    ran = cli("run", "a.ipynb", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "'after'\n")


@pytest.mark.slow
@cases("source, warned", ("year = 1", ["yaer"]), ("a, yaer = 1, 2", ["year"]), (None, []))
def test_a_parameter_that_the_notebook_does_not_set_is_warned_of(
    source: str | None, warned: list[str], tmp_path: Path
) -> None:
    tagged = [v4.new_code_cell(source, metadata={"tags": ["parameters"]})] if source else []
    notebook_file(tmp_path / "a.ipynb", *tagged, "1")
    result = cli("run", "a.ipynb", "-p", "year", "2026", "-p", "yaer", "2026", cwd=tmp_path)
    assert (
        re.findall(r"-p (\w+): the cell of a.ipynb that is tagged parameters does not set it", result.stderr) == warned
    )
    assert result.returncode == 0


@pytest.mark.slow
@cases(
    "name, text, status",
    ("data.csv", "6,7", 2),
    ("page.html", "print(42)", 2),
    ("plain", "two words", 2),
    ("plain", "print(42)", 0),
    ("job.txt", "#!/usr/bin/env python3\nprint(42)", 0),
    ("a.b.py", "print(42)", 0),
)
def test_only_what_is_code_is_run(name: str, text: str, status: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    result = cli("run", name, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (status, "" if status else "42\n")
    says = f"jupyter-exec: {name} is no code that can be run: .py, .md and .ipynb files are, and what begins with #! "
    assert result.stderr.startswith(says if status else "")


@cases("arguments", [], ["--rows", "1", "it's"], ["--", "-"])
def test_a_script_finds_what_python_gives_it(arguments: list[str], tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import beside
        print(sys.argv, Path(__file__).name, Path(sys.path[0]).name, __name__, beside.x)
    """)
    (tmp_path / "beside.py").write_text("x = 1")
    (tmp_path / "a.py").write_text(script)
    expected = subprocess.check_output([sys.executable, tmp_path / "a.py", *arguments], text=True)
    assert cli("run", str(tmp_path / "a.py"), "--", *arguments).stdout == expected


def test_percent_signs_begin_cells_and_an_error_names_file_and_line(tmp_path: Path) -> None:
    percent = textwrap.dedent("""\
        print("first")
        # %% [markdown]
        # prose
        # %% [raw]
        # as it is
        # %% tags=["parameters"]
        x = 1
        def f():
            return 1 / 0
        # %%
        f()
        # %% last
        print(x)
    """)
    (tmp_path / "a.py").write_text(percent)
    result = cli("run", "a.py", "--keep-going", "-p", "x", "7", "--notebook", "a.ipynb", cwd=tmp_path)
    assert (result.stdout, result.returncode) == ("first\n7\n", 1)
    assert "jupyter-exec: a.py:9: ZeroDivisionError: division by zero\n" in result.stderr
    notebook = read_notebook(tmp_path / "a.ipynb", as_version=4)
    nbformat.validate(notebook)
    begun = [(cell.cell_type, cell.source[:5]) for cell in notebook.cells]
    kinds = [("code", "print"), ("markdown", "prose"), ("raw", "as it")]
    assert begun == [*kinds, *(("code", source) for source in ("x = 1", "# Par", "f()", "print"))]


@cases(
    "name, text, place",
    ("a.md", "# t\n\n```python\nx = 1\n1/0\n```\n", "a.md:5"),
    ("a.py", "\nprint(\n", "a.py:2"),
    ("A.PY", "print(", "A.PY:1"),
    ("a.ipynb", "", "a.ipynb, cell 2, line 1"),
)
def test_an_error_names_its_place(name: str, text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    if name == "a.ipynb":
        notebook_file(tmp_path / name, "x = 1", "1/0")
    assert f"jupyter-exec: {place}: " in cli("run", name, cwd=tmp_path).stderr


@pytest.mark.slow
@cases("name, text, shown, option, then, said", ("a.md", "```\n42\n```\n```python\n6 * 7\n```\n", "42\n", "--unlabelled", "42\n42\n", "a.md:2: skipped a block that names no language"),
        ("a.py", "import pandas\ndisplay(pandas.DataFrame({'a': [1]}))", "   a\n0  1\n", "--html", "   a\n0  1\nHTML data saved to {}/a-1-1.html\n", ""))  # fmt: skip
def test_unlabelled_blocks_and_html(
    name: str, text: str, shown: str, option: str, then: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    result = cli("run", name, cwd=tmp_path)
    assert (result.stdout, result.returncode) == (shown, 0)
    assert said in result.stderr
    assert cli("run", name, option, cwd=tmp_path).stdout == then.format(tmp_path)


def on_a_terminal(*arguments: str, types: str = "") -> tuple[str, int]:
    """Run the command line on a terminal of its own, and type; returns what is seen, and the exit status."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(MODULE), *arguments])
    os.write(terminal, types.encode())
    seen = b""
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as stream:  # EIO: its end
        while data := stream.read(4096):
            seen += data
    return seen.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_a_terminal_answers_input_and_shows_tracebacks_in_colours() -> None:
    seen, status = on_a_terminal("run", "-c", "print(input('name? ') * 2)\n1/0", types="ab\n")
    assert (status, "abab" in seen, "name? " in seen) == (1, True, True)
    assert "\x1b[31mZeroDivisionError\x1b[39m" in seen.replace("\x1b[0;31m", "\x1b[31m").replace("\x1b[0m", "\x1b[39m")


@pytest.mark.slow
def test_input_is_read_from_what_is_piped_in() -> None:
    done = cli("run", "-c", "print(input('name? ') * 2)", input="ab\n")
    assert (done.stdout, done.returncode) == ("name? abab\n", 0)
    assert "EOFError" in cli("run", "-c", "input()", stdin=subprocess.DEVNULL).stderr


@pytest.mark.slow
def test_what_the_command_line_says_of_ends(tmp_path: Path) -> None:
    tagged = v4.new_code_cell("1/0", metadata={"tags": ["raises-exception"]})
    notebook_file(tmp_path / "a.ipynb", v4.new_markdown_cell("# A"), tagged, "2/0")
    ran = cli("run", "a.ipynb", "-p", "x", "1", cwd=tmp_path)
    assert [line for line in ran.stderr.splitlines() if ": a.ipynb, cell" in line] == [
        "jupyter-exec: a.ipynb, cell 3, line 1: ZeroDivisionError: division by zero"
    ]
    cells = json.loads(cli("run", "a.ipynb", "--json", cwd=tmp_path).stdout)["blocks"]
    assert [(cell["status"], cell["place"][-14:], cell["error"]["ename"], cell["language"]) for cell in cells] == [
        ("expected", "cell 2, line 1", "ZeroDivisionError", "python"),
        ("error", "cell 3, line 1", "ZeroDivisionError", "python"),
    ]
    (tmp_path / "a.md").write_text("# A\n```python\nx = 1\nx = (\n```\n```sh\n%cd .\n```\n```sh\nexit 7\n```\n")
    ran = cli("run", "a.md", "--keep-going", "--notebook", "b.ipynb", cwd=tmp_path)
    assert ran.stderr.splitlines()[-1] == "jupyter-exec: a.md:10: the script ended with exit status 7"
    assert "CalledProcessError" not in ran.stderr and "jupyter-exec: a.md:4: " in ran.stderr
    notebook = read_notebook(tmp_path / "b.ipynb", as_version=4)
    assert [cell.source for cell in notebook.cells[1:]] == ["%cd .", "%%sh\nexit 7"]
    assert notebook.metadata.language_info.file_extension == ".py"
    ran = cli("run", "-c", "\nimport time\ntime.sleep(60)", "--timeout", "1")
    says = "jupyter-exec: code:3: Timeout: interrupted after 1 s; it was at: time.sleep(60)"
    assert ran.stderr.splitlines()[-1] == says
    assert "stand behind --" in cli("run", "a.py", "--rows", "5").stderr


@pytest.mark.slow
def test_put_never_takes_the_place_of_a_file_here(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("in.csv", "data/in.csv"):
        (tmp_path / name).write_text(name)
    refused = cli("run", "-c", "1", "--put", "data/in.csv", cwd=tmp_path)
    assert (refused.returncode, (tmp_path / "in.csv").read_text()) == (2, "in.csv")
    assert "--put data/in.csv would take the place of" in refused.stderr
    same = cli("run", "-c", "print(open('in.csv').read())", "--put", "in.csv", cwd=tmp_path)
    assert (same.stdout, same.returncode) == ("in.csv\n", 0)


def test_run_json_tells_of_a_kernel_that_cannot_start(kernels_dir: Path) -> None:
    env = environment(**add_spec(kernels_dir, "bad", NO_LICENCE))
    result = cli("run", "-c", "1", "--json", "--kernel", "bad", env=env)
    said = json.loads(result.stdout)
    assert (said["exit_code"], said["kernel_state"], result.returncode) == (2, "lost", 2)
    assert "no licence found" in said["blocks"][0]["output"]


def test_run_json(tmp_path: Path) -> None:
    picture = "from IPython.display import Image; Image(b'\\x89PNG', format='png')"
    result = cli("run", "-c", f"{picture}\n# %%\nprint('a')\n1/0\n# %%\n2", "--json", cwd=tmp_path)
    parsed = json.loads(result.stdout)
    assert (result.returncode, parsed["exit_code"], parsed["kernel_state"]) == (1, 1, "intact")
    first, second = parsed["blocks"]
    assert (first["status"], first["output_files"]) == ("ok", [str(tmp_path / "code-1-1.png")])
    assert (second["status"], second["source"]) == ("error", "print('a')\n1/0")
    assert second["output"].startswith("a\nZeroDivisionError") and second["duration"] > 0


@cases(
    "arguments, says",
    (["run", "/no/such.py"], "No such file or directory: /no/such.py"),
    (["run", "-c", "1", "--kernel", "nope"], "Kernel nope is not installed"),
    (["run", "-c", "1", "--output-dir", "/no/such"], "Output directory /no/such does not exist"),
    (["run", "-c", "1", "--timeout", "0"], "Timeout must be greater than or equal to 1. It is in seconds"),
    (["run", "-c", "1", "--python", "/no/such/python"], "/no/such/python"),
)
def test_trouble_is_a_clear_line_without_traceback(arguments: list[str], says: str) -> None:
    result = cli(*arguments)
    assert (result.stdout, result.returncode) == ("", 2)
    assert says in result.stderr
    assert result.stderr.startswith("jupyter-exec: ")
    assert "Traceback" not in result.stderr


def test_python_without_ipykernel_is_a_clear_line(bare_python: str) -> None:
    result = cli("run", "-c", "1", "--python", bare_python)
    assert result.returncode == 2
    assert f"{bare_python} -m pip install ipykernel" in result.stderr


def test_kernels_lists_names_and_places() -> None:
    assert re.search(r"^python3\t.*\t/.*$", cli("kernels").stdout, re.MULTILINE)


@cases(
    "code, options, status",
    ("1/0", [], 1),
    ("import time; time.sleep(60)", [], 124),
    ("import os; os.kill(os.getpid(), 11)", [], 139),
    ("exit()", [], 0),
    ("1/0\n# %%\nexit(0)", ["--json", "--keep-going"], 1),
    ("1", ["--json", "--get", "no.txt"], 2),
    ("1", ["--json", "--put", "no.txt"], 2),
    ("import os; os._exit(3)", ["--json"], 1),
)
def test_exit_status_is_the_results_and_jsons(code: str, options: list[str], status: int, tmp_path: Path) -> None:
    result = cli("run", "-c", code, "--timeout", "1", *options, cwd=tmp_path)
    assert result.returncode == status
    assert not options or json.loads(result.stdout)["exit_code"] == status


@cases(
    "name, content, options, says",
    ("a.py", b"'\xe9'", [], "a.py cannot be decoded: .*Say its encoding"),
    ("a.py", b"# coding: rot13\n1", [], "a.py cannot be decoded"),
    ("a.py", b"1", ["--notebook", "a.py"], "--notebook a.py would take the place of the code"),
    ("a.py", b"1", ["--notebook", "fifo"], "fifo: Is no regular file|Is no regular file: .*fifo"),
    ("a.py", b"1", ["--put", "a.py", "--put", "./a.py"], "--put must name files, each with another last part"),
    ("-", b"", [], "There is no stdin to read the code from"),
)
def test_what_cannot_be_run_or_written_is_told(
    name: str, content: bytes, options: list[str], says: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.py").write_bytes(content)
    words = [sys.executable, str(MODULE), "run", name, *options]
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *words]
    ran = subprocess.run(closed, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert re.search(says, ran.stderr)
    assert (tmp_path / "a.py").read_bytes() == content and (tmp_path / "fifo").is_fifo()


def test_a_file_that_is_replaced_keeps_its_mode_and_a_device_its_place(tmp_path: Path) -> None:
    (tmp_path / "private").touch(0o600)
    folder = jupyter_exec.Folder(tmp_path)
    with folder.replace("private") as file:
        file.write(b"new")
    assert ((tmp_path / "private").read_bytes(), (tmp_path / "private").stat().st_mode & 0o777) == (b"new", 0o600)
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError, match=r"name the file: '.*directory'"), folder.replace("directory"):
        pass
    null = os.stat("/dev/null")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", lambda *args, **options: pytest.fail("it replaces a device"))
        with jupyter_exec.Folder("/dev").replace("null", devices=True) as file:
            file.write(b"lost")
        with pytest.raises(OSError, match="Is no regular file"), jupyter_exec.Folder("/dev").replace("null"):
            pass
    assert os.stat("/dev/null") == null


@contextlib.contextmanager
def running_cli(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command line in a process of its own, whose code has printed "go"."""
    command = [sys.executable, str(MODULE), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "go\n"
        yield process


def test_output_appears_as_it_is_printed(tmp_path: Path) -> None:
    with running_cli("run", "-c", waiting_for(tmp_path / "gate", "print('go', flush=True)")) as process:
        (tmp_path / "gate").touch()
        assert process.wait(PATIENCE) == 0


SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP)]


@cases("number", signal.SIGINT, *SLOW_SIGNALS)
def test_signals_end_with_their_status_leave_nothing_and_keep_the_cell(number: int, tmp_path: Path) -> None:
    with running_cli("run", "-c", FOR_EVER, "--notebook", str(tmp_path / "n.ipynb")) as process:
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
    (cell,) = read_notebook(tmp_path / "n.ipynb", as_version=4).cells
    assert (cell.source, cell.outputs[0].text) == (FOR_EVER, "go\n")


@pytest.mark.slow
def test_a_thread_that_a_script_leaves_has_the_timeout_of_a_cell() -> None:
    result = cli(
        "run", "--timeout", "1", "-c", "import threading; threading.Thread(target=threading.Event().wait).start()"
    )
    assert result.returncode in (124, 137) and "while threads of the script went on: Timeout" in result.stderr


def test_the_message_of_an_exit_in_a_notebook_is_shown(tmp_path: Path) -> None:
    notebook_file(tmp_path / "a.ipynb", "exit('no data')")
    result = cli("run", "a.ipynb", cwd=tmp_path)
    assert (result.returncode, "no data" in result.stderr) == (1, True)


@pytest.mark.slow
def test_what_code_prints_after_ctrl_c_is_shown(tmp_path: Path) -> None:
    waits = f"time.sleep(1)\n open({str(tmp_path / 'begun')!r}, 'w')\n while True: time.sleep(0.01)"
    code = f"import time\ntry:\n print('go', flush=True)\n {waits}\nexcept KeyboardInterrupt: print('cleaned up')"
    with running_cli("run", "-c", code) as process:
        eventually((tmp_path / "begun").exists, "nothing is being printed any more")
        process.send_signal(signal.SIGINT)
        assert "cleaned up\n" in process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130


@pytest.mark.slow
def test_json_tells_of_the_signal_that_ended_the_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'begun')!r}, 'w'); {FOR_EVER}"
    command = [sys.executable, str(MODULE), "run", "--json", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        eventually((tmp_path / "begun").exists, "the code runs")
        process.send_signal(signal.SIGTERM)
        answer = json.loads(process.communicate()[0])
        assert answer["exit_code"] == process.returncode == 143
        assert [block["status"] for block in answer["blocks"]] == ["interrupted"]


@pytest.mark.slow
def test_run_in_docker(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os, six; print(os.getuid(), len(os.listdir('/sys/class/net')))")
    base = ["--base-image", os.environ["BASE_IMAGE"]] if "BASE_IMAGE" in os.environ else []
    result = cli("run", str(tmp_path / "a.py"), "--docker", "--network", "none", "--package", "six", *base)
    assert result.stdout == "1000 1\n"
    engine.images.remove(docker_server(packages=["six"])._image_name)


def test_run_takes_files_there_and_brings_files_back(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(name)
    code = "import os; os.mkdir('d'); open('d/sum.txt', 'w').write(open('a.csv').read() + open('b.csv').read()); 1 / 0"
    (tmp_path / "a.py").write_text(code)
    files = [
        "--output-dir",
        "../out",
        "--get",
        "d/sum.txt",
        "--get",
        "no.txt",
        "--put",
        "../a.csv",
        "--put",
        "../b.csv",
    ]
    result = cli("run", *files, "../a.py", "--cwd", ".", cwd=tmp_path / "far")
    assert (result.returncode, os.listdir(tmp_path / "out")) == (1, ["sum.txt"])
    assert (tmp_path / "out/sum.txt").read_text() == "a.csvb.csv"
    assert result.stderr.endswith("jupyter-exec: The file 'no.txt' at the kernel: No such file or directory\n")


@cases(
    "options, says",
    (["--get", "no.txt"], "The file 'no.txt' at the kernel: No such file"),
    (["--get", "no.txt", "--json"], "The file 'no.txt' at the kernel: No such file"),
    (["--put", "no.txt"], "The file 'no.txt' here: No such file"),
    (["--get", "a/.."], "--get must name files"),
    (["--get", "a/x", "--get", "b/x"], "--get must name files"),
)
def test_run_says_which_file_it_could_not_take(options: list[str], says: str, tmp_path: Path) -> None:
    result = cli("run", "-c", "1", *options, cwd=tmp_path)
    assert (result.returncode, result.stderr.startswith(f"jupyter-exec: {says}")) == (2, True), result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_run_on_a_server(gateway: Peer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{gateway.info.token}\n")
    url = gateway.info.url
    environment = os.environ | {"JUPYTER_TOKEN": gateway.info.token or ""}
    assert cli("run", "-c", "print(6 * 7)", "--server", url, env=environment).stdout == "42\n"
    assert cli("run", "-c", "print(6 * 7)", "--server", url, "--token-file", str(tmp_path / "token")).stdout == "42\n"
    assert "python3" in cli("kernels", "--server", url, env=environment).stdout
    assert "token is missing or wrong" in cli("run", "-c", "1", "--server", url).stderr
    assert "SECRET" not in cli("run", "-c", "1", "--server", "localhost:8888/?token=SECRET").stderr
    printed = f"{url}/lab?token={gateway.info.token}"  # as Jupyter does at its start
    assert cli("run", "-c", "print(6 * 7)", "--server", printed).stdout == "42\n"


@cases("option", ["--network", "none"], ["--package", "six"], ["--token-file", "x"], ["--hardened"])
def test_options_of_another_mode_are_refused(option: list[str]) -> None:
    assert f"{option[0]} works only with --" in cli("run", "-c", "1", *option).stderr
    assert "works only for local kernels" in cli("run", "-c", "1", "--cwd", "x", "--docker").stderr


@pytest.mark.slow
@cases("arguments", ["run", "-c", "print(1)"], ["run", "-c", "1", "--json"], ["kernels"])
def test_a_full_disk_behind_stdout_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(MODULE), *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.stderr, result.returncode) == ("jupyter-exec: No space left on device\n", 2)


NASTY = "\x1b]52;c;QQ==\x07\x1b[2J\x1bc\x1b(0\x9b31m\x1b\x1b[m]52;c;QQ==\x07\x0e"


def test_nothing_but_text_and_colours_reaches_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        jupyter_exec.print_clean(stream, f"10%\r20%\r\n\ta\x1b[31mb{NASTY}é")
    assert re.sub("\x1b\\[[0-9;]*m", "", terminal.getvalue()).isprintable() is False
    for stream, allowed in ((terminal, "\n\t\r\x1b"), (file, "\n\t")):
        said = stream.getvalue()
        assert not [char for char in said if not char.isprintable() and char not in allowed]
        assert not re.search("\x1b(?!\\[[0-9;]*m)", said)
    assert "\ta\x1b[31mb" in terminal.getvalue() and "10%\r20%\n" in terminal.getvalue()
    assert file.getvalue().startswith("10%\n20%\n\tab")


def test_escapes_of_code_and_documents_are_not_printed(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"```x{NASTY}\n1\n```\n```python\nprint({NASTY!r}, 'end')\n1/0\n```\n")
    result = cli("run", str(tmp_path / "a.md"))
    assert "end\n" in result.stdout and "skipped a block of x" in result.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.stdout + result.stderr)


def test_the_prompt_of_code_is_no_command_for_the_terminal(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "_ask", lambda prompt, password: prompt)
    printer = jupyter_exec.LivePrinter(1)
    assert printer.ask("\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[1mname? ", False) == "\x1b[1mname? "
    printer.close()


@pytest.mark.slow
def test_a_link_in_place_of_the_output_directory_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code = "import os; open('x.txt', 'w'); os.rename('out', 'old'); os.mkdir('victim'); os.symlink('victim', 'out')"
    options = ["--output-dir", "out", "--notebook", "out/n.ipynb", "--get", "x.txt"]
    assert cli("run", "-c", code, *options, cwd=tmp_path).returncode == 0
    assert (os.listdir(tmp_path / "victim"), sorted(os.listdir(tmp_path / "old"))) == ([], ["n.ipynb", "x.txt"])


def test_updates_save_no_files_and_others_only_so_many(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_FILES", 3)
    printer = jupyter_exec.LivePrinter(1)
    printer.begin(jupyter_exec.CellFiles(jupyter_exec.Folder(tmp_path), "a-1", html=False))
    data = {"data": {"text/html": "<b>"}, "metadata": {}}
    for _ in range(5):
        printer({"output_type": "update_display_data", **data})
    assert list(tmp_path.iterdir()) == []
    for _ in range(5):
        printer({"output_type": "display_data", **data})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1-1.html", "a-1-2.html", "a-1-3.html"]


def test_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "jupyter_exec", "run", "-c", "print(__name__)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=MODULE.parent)
    assert (result.stdout, result.stderr) == ("__main__\n", "")


MCP_PROGRAM = (
    "import sys, jupyter_exec; jupyter_exec.MCP_PATIENCE = float(sys.argv.pop(1)); sys.exit(jupyter_exec.main())"
)


def mcp_run(main: Callable[[Any], Any], *options: str, patience: float = PATIENCE, mode: str = "auto") -> str:
    """Run `main(call)` beside a `jupyter-exec mcp`; `await call(tool, **arguments)` returns its result. Returns stderr."""
    from mcp import Client
    from mcp.client.stdio import StdioServerParameters, stdio_client

    arguments = ["-W", "error", "-c", MCP_PROGRAM, str(patience), "mcp", *options]
    environment = {"PYTHONPATH": str(MODULE.parent), "TMPDIR": tempfile.gettempdir()}
    where: Any = {"env": environment, "cwd": tempfile.gettempdir()}
    parameters = StdioServerParameters(command=sys.executable, args=arguments, **where)

    async def serve(errors: Any) -> None:
        async with Client(stdio_client(parameters, errors), mode=mode) as client:
            await main(lambda tool, **arguments: client.call_tool(tool, arguments))

    with tempfile.TemporaryFile("w+") as errors:
        asyncio.run(asyncio.wait_for(serve(errors), 60))
        errors.seek(0)
        return errors.read()


def mcp_text(result: Any) -> str:
    assert result.structured_content is None
    return "".join(f"<{block.mime_type}>" if block.type == "image" else block.text for block in result.content)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
MCP_CALLS: list[tuple[str, dict[str, Any], bool, str]] = [
    ("run_code", {"code": "x = 20\nprint('out')\nx + 1"}, False, "out\n21"),
    ("run_code", {"code": "x = 30"}, False, "The code has ended well, without output."),
    ("run_code", {"code": "1/0"}, False, r"ZeroDivisionError: division by zero\n.*line 1.*"),
    ("run_code", {"code": "echo a; exit 3", "language": "bash"}, False, "a\nexit status 3"),
    ("run_code", {"code": "1", "language": "cobol"}, False, "The kernel runs python or bash, not cobol: .*"),
    ("run_code", {"code": "print('y' * 10**6)"}, False, rf"y{{9000}}\n\[{10**6 + 1 - 18_000} characters are missing here\]\ny{{8999}}\n"),
    ("run_code", {"code": "while True: pass", "timeout": 1}, False, "KeyboardInterrupt.*Timeout: interrupted after 1 s; .*"),
    ("run_code", {"code": f"from IPython.display import Image; Image(__import__('base64').b64decode({PNG!r}))"}, False, r"\[a picture\]<image/png>"),
    ("run_code", {}, True, ".*code.*Field required.*"),
    ("wait", {}, False, r"\[a picture\]<image/png>"),
    ("wait", {"session": "other"}, True, "No code was run in session 'other', or not since its restart."),
    ("interrupt", {}, False, r"\[a picture\]<image/png>"),
    ("write_file", {"path": "mcp/a.json", "content": '{"a": 1}\r\n'}, False, "10 bytes were written to mcp/a.json."),
    ("read_file", {"path": "mcp/a.json"}, False, '{"a": 1}\r\n'),
    ("write_file", {"path": "mcp/b", "content": "/wAB", "is_base64": True}, False, "3 bytes were written to mcp/b."),
    ("read_file", {"path": "mcp/b"}, False, "No text: 3 bytes, in base64:\n/wAB"),
    ("write_file", {"path": "mcp/c.txt", "content": PNG, "is_base64": True}, False, "70 bytes were written to mcp/c.txt."),
    ("read_file", {"path": "mcp/c.txt"}, False, r"\[a picture\]<image/png>"),
    ("write_file", {"path": "mcp/c", "content": "%", "is_base64": True}, True, ".*base64.*"),
    ("list_files", {"path": "mcp"}, False, r" +10  .* a.json\n +3  .*  b\n +70 .*  c.txt"),
    ("list_files", {"path": "mcp/none"}, True, "The file 'mcp/none' at the kernel: No such file or directory"),
    ("run_code", {"code": "import shutil; shutil.rmtree('mcp'); __import__('os').kill(__import__('os').getpid(), 9)"}, False, "The kernel died .*all variables are lost"),
    ("run_code", {"code": "print('x' in vars())"}, False, "False\n"),
    ("restart", {}, False, "Session 'default' has a fresh kernel; all its variables are lost."),
    ("wait", {}, True, "No code was run in session 'default', or not since its restart."),
    ("sing", {}, True, "Unknown tool: sing"),
]  # fmt: skip


@pytest.mark.slow
@cases("mode", "auto", "legacy")
def test_mcp_tools_answer(mode: str) -> None:
    async def main(call: Any) -> None:
        for tool, arguments, is_error, expected in MCP_CALLS:
            result = await call(tool, **arguments)
            assert re.fullmatch(expected, mcp_text(result), re.DOTALL), (tool, arguments, mcp_text(result)[-2000:])
            assert result.is_error is is_error, (tool, arguments)

    assert mcp_run(main, mode=mode) == ""


@pytest.mark.slow
def test_mcp_sessions_run_at_once_and_their_calls_in_order(tmp_path: Path) -> None:
    wait = "import os, time\nopen({!r}, 'w')\nwhile not os.path.exists({!r}): time.sleep(0.01)\nx = {}"
    here, there = str(tmp_path / "here"), str(tmp_path / "there")

    async def main(call: Any) -> None:
        calls = [call("run_code", code=wait.format(here, there, 1)), call("run_code", code="print(x)\nx = 5")]
        calls += [call("run_code", code=wait.format(there, here, 2), session="b"), call("run_code", code="x")]
        texts = [mcp_text(result) for result in await asyncio.gather(*calls)]
        assert texts[1:] == ["1\n", texts[0], "5"]
        assert mcp_text(await call("run_code", code="x", session="b")) == "2"

    assert mcp_run(main, "--cwd", str(tmp_path)) == ""


@pytest.mark.slow
def test_mcp_calls_that_come_at_once_run_in_their_order() -> None:
    async def main(call: Any) -> None:
        await call("run_code", code="L = []")
        code = "L.append({}); __import__('time').sleep(0.01)"
        await asyncio.gather(*(call("run_code", code=code.format(number)) for number in range(40)))
        assert mcp_text(await call("run_code", code="L == sorted(L), len(L)")) == "(True, 40)"

    assert mcp_run(main) == ""


@pytest.mark.slow
def test_mcp_a_cancelled_call_loses_nothing_of_earlier_code(tmp_path: Path) -> None:
    waits = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.01)\n"
    gate, begun = str(tmp_path / "gate"), str(tmp_path / "begun")

    async def main(call: Any) -> None:
        assert "still running" in mcp_text(await call("run_code", code=f"{waits.format(gate)}print('precious')"))
        request = asyncio.ensure_future(call("run_code", code=f"open({begun!r}, 'w')\nwhile True: pass"))
        Path(gate).touch()
        while not os.path.exists(begun):
            await asyncio.sleep(0.01)
        await cancel(request)
        assert "precious" in mcp_text(await call("wait", seconds=PATIENCE))

    assert mcp_run(main, "--cwd", str(tmp_path), patience=1) == ""


@pytest.mark.slow
def test_mcp_waits_for_the_code_that_runs_after_a_queued_call_was_cancelled(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def main(call: Any) -> None:
        assert "still running" in mcp_text(await call("run_code", code=waiting_for(gate, "print('first')")))
        request = asyncio.ensure_future(call("run_code", code="print('never')"))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(request), 0.2)
        await cancel(request)
        gate.touch()
        while "still running" in (text := mcp_text(await call("wait"))):
            pass
        assert text == "first\n"

    assert mcp_run(main, patience=1) == ""


@pytest.mark.slow
def test_mcp_says_in_a_line_that_nobody_can_be_served(tmp_path: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, str(MODULE), "mcp"]
    result = subprocess.run(closed, capture_output=True, text=True, timeout=60)
    says = "jupyter-exec: There is no stdin, over which a client would speak.\n"
    assert (result.stderr, result.returncode) == (says, 2)
    with mcp_process(waiting_for(tmp_path / "gate"), stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        (tmp_path / "gate").touch()
        process.stdin.write(b"{}\n" * 10)  # answered by errors
        process.stdin.close()
        said = process.stderr.read().decode()
        assert process.wait(PATIENCE) in (0, 2)
        assert "Traceback" not in said and said.count("\n") <= 1


@pytest.mark.slow
def test_mcp_code_that_takes_long_is_waited_for(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    code = f"import os, time\nprint('begun')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nprint('ended')"

    async def main(call: Any) -> None:
        async def ended(tool: str, **arguments: Any) -> str:  # under load it takes more than one patience
            while "Not done" in (text := mcp_text(await call(tool, **arguments))):
                pass
            while text.startswith("The code is still running"):
                text = mcp_text(await call("wait"))
            return text

        assert await ended("run_code", code="1") == "1"
        for result in (await call("run_code", code=code), await call("wait"), await call("wait", seconds=0)):
            assert re.fullmatch("The code is still running: .* so far:\nbegun\n", mcp_text(result))
        busy = await call("run_code", code="open('never', 'w')")
        assert busy.is_error and "still runs earlier code, so this code was not run" in mcp_text(busy)
        gate.touch()
        assert await ended("wait") == "begun\nended\n"
        gate.unlink()
        assert "still running" in mcp_text(await call("run_code", code=code))
        gate.touch()
        answer = await call("run_code", code="6 * 7")  # nothing of the earlier code gets lost
        said = "The earlier code of this session has ended:", "begun\nended\n", "The code of this call:", "42"
        assert [part.text for part in answer.content] == [*said]
        gate.unlink()
        assert "still running" in mcp_text(await call("run_code", code=code))
        gate.touch()
        assert "timeout must be" in mcp_text(await call("run_code", code="1", timeout=0))
        assert "begun\nended\n" in [part.text for part in (await call("run_code", code="1")).content]
        assert "still running" in mcp_text(await call("run_code", code="while True: pass"))
        assert re.fullmatch("KeyboardInterrupt.*\nInterrupted; variables are kept", await ended("interrupt"), re.DOTALL)
        assert "still running" in mcp_text(await call("run_code", code="while True: pass"))
        assert "fresh kernel" in await ended("restart")
        assert not (tmp_path / "never").exists()

    assert mcp_run(main, "--cwd", str(tmp_path), patience=1) == ""


@pytest.mark.slow
@cases("mode", "auto", pytest.param("legacy", marks=pytest.mark.slow))
def test_mcp_a_cancelled_request_interrupts_its_code(mode: str, tmp_path: Path) -> None:
    code = "import time\nx = 1\ntry:\n    open('begun', 'w')\n    time.sleep(1000)\nfinally: x = 2"

    async def main(call: Any) -> None:
        request = asyncio.ensure_future(call("run_code", code=code))
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.01)
        await cancel(request)
        assert mcp_text(await call("run_code", code="x")) == "2"
        assert mcp_text(await call("run_code", code="x", session="b")).startswith("NameError")

    assert mcp_run(main, "--cwd", str(tmp_path), mode=mode) == ""


def mcp_process(code: str, *options: str, patience: float = PATIENCE, **popen: Any) -> subprocess.Popen[bytes]:
    """Start a `jupyter-exec mcp` that was told to run code, without the official client: that would end it by force."""
    client = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    messages: list[dict[str, Any]] = [
        {"id": 0, "method": "initialize", "params": client},
        {"method": "notifications/initialized"},
        {"id": 1, "method": "tools/call", "params": {"name": "run_code", "arguments": {"code": code}}},
    ]
    command = [sys.executable, "-c", MCP_PROGRAM, str(patience), "mcp", *options]
    popen["env"] = environment() | popen.pop("env", {})
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **popen)
    assert process.stdin
    process.stdin.write(b"".join(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n" for message in messages))
    process.stdin.flush()
    return process


@cases("way", "the end of stdin", "SIGTERM")
def test_mcp_leaves_nothing(way: str, tmp_path: Path) -> None:
    marker = os.urandom(8).hex()
    child = "import subprocess\nsubprocess.Popen(['sleep', '1000'])\nopen('begun', 'w')\nwhile True: pass"
    with mcp_process(child, cwd=tmp_path, env={"MARKER": marker}) as process:
        assert process.stdin and process.stdout
        eventually((tmp_path / "begun").exists, "the code runs")
        assert len(marked_processes(marker)) >= 3
        if way == "SIGTERM":
            process.terminate()
        else:
            process.stdin.close()
        assert process.wait(PATIENCE) == (143 if way == "SIGTERM" else 0)
        assert all(json.loads(line)["jsonrpc"] == "2.0" for line in process.stdout)
    eventually(lambda: marked_processes(marker) == [], "all processes are gone")


@pytest.mark.slow
def test_mcp_ends_while_a_kernel_is_being_started(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec cat >/dev/null")
    python.chmod(0o755)
    with mcp_process("1", "--python", str(python), patience=0.5) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        assert b"Not done within 0.5 s: the kernel is still being started" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(PATIENCE) == 1
    os.rmdir(jupyter_exec.make_directory())  # this removes what an abrupt end has left


@pytest.mark.slow
def test_mcp_makes_only_so_many_kernels(tmp_path: Path) -> None:
    async def main(call: Any) -> None:
        results = await asyncio.gather(*(call("run_code", code="1", session=str(i)) for i in range(17)))
        assert [mcp_text(result) for result in results[:16]] == ["1"] * 16
        assert results[16].is_error and "16 sessions, and can be no more" in mcp_text(results[16])

    assert mcp_run(main) == ""


@pytest.mark.slow
def test_mcp_in_docker_without_a_network(engine: Any) -> None:
    names = []

    async def main(call: Any) -> None:
        result = await call("run_code", code="import socket; print(socket.if_nameindex(), socket.gethostname())")
        *shown, name = mcp_text(result).split()
        assert shown == ["[(1,", "'lo')]"]
        names.append(name)
        assert engine.containers.get(name).status == "running"
        assert not (await call("write_file", path="a.txt", content="a")).is_error
        assert mcp_text(await call("run_code", code="cat a.txt; pwd", language="bash")) == "a/workspace\n"

    options = ["--docker", "--network", "none", "--base-image", os.environ.get("BASE_IMAGE", "python:3.13-slim")]
    errors = mcp_run(main, *options)
    assert "Traceback" not in errors
    eventually(lambda: not engine.containers.list(all=True, filters={"id": names[0]}), "the container is gone")


@pytest.mark.slow
def test_mcp_tells_of_trouble() -> None:
    absent = "import sys; sys.modules['mcp'] = None; import jupyter_exec; sys.exit(jupyter_exec.main(['mcp']))"
    result = run_python(absent)
    says = "jupyter-exec: This needs the MCP SDK, which is not here: pip install 'mcp>=2'.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", says)
    result = cli("mcp", "--network", "none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "jupyter-exec: --network works only with --docker.\n"


@pytest.mark.slow
def test_mcp_says_why_there_is_no_kernel() -> None:
    async def main(call: Any) -> None:
        for _ in range(2):
            result = await call("run_code", code="1")
            assert result.is_error and "no-such-python" in mcp_text(result)

    mcp_run(main, "--python", "/no-such-python")


# The README's other Python blocks, each in a directory of its own; the environment of the test stands for the reader's.
IN_THIS_ENVIRONMENT = """
import jupyter_exec
jupyter_exec.DockerJupyterServer.__init__.__kwdefaults__["base_image"] = BASE
"""
README_BLOCKS = [
    ("Run code", "exit_code=0 output='Hello, World!\\n' output_files=[]\n"),
    ("In Docker, files in and out", "b'4.0,6.0'\n['x', 'y'] ['in.csv']\n"),
    ("On a Jupyter server", "42\n"),
]


@cases("section, shown", *README_BLOCKS)
def test_the_readmes_blocks(section: str, shown: str, tmp_path: Path, gateway: Peer, request: FixtureRequest) -> None:
    (program,) = readme_blocks(section)
    if section == "In Docker, files in and out":
        request.getfixturevalue("engine")
    if section == "On a Jupyter server":
        program = re.sub("(?m)^info = .*", f"info = JupyterConnectionInfo(**{vars(gateway.info)!r})", program)
        program += "print(executor.execute('6 * 7').text)\nexecutor.stop()\n"
    prelude = IN_THIS_ENVIRONMENT.replace("BASE", repr(os.environ.get("BASE_IMAGE")))
    result = run_python(prelude + program, cwd=tmp_path)
    assert (result.stdout, result.stderr) == (shown, "")


@pytest.mark.slow
@cases("line", "autogen-classic", "autogen-0.2")
def test_the_readmes_agent(line: str, tmp_path: Path) -> None:
    (program,) = readme_blocks("In AutoGen, AG2 and asyncio")
    model = "llm_config=False, human_input_mode='NEVER', default_auto_reply='```python\\n6 * 7\\n```'"
    says = "    print('Code output: 42' in str(list(writer.chat_messages.values())[0]).replace('\\\\n', ''))\n"
    program = program.replace('llm_config={"model": "…"}', model) + says
    assert run_framework(line, program, tmp_path) == "True"


def test_the_readmes_transcript(tmp_path: Path) -> None:
    transcript = next(block for block in readme_blocks("", "") if block.startswith("$"))
    command, *shown = transcript.replace("/home/ann", str(tmp_path)).splitlines()
    place = int(shown[-1].split(":")[2])  # the line of the file
    plot = "# %%\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n"
    program = f"x = 0\n{plot}# %%\n"
    (tmp_path / "report.py").write_text(program + "\n" * (place - program.count("\n") - 1) + "1 / x\n")
    result = cli(*command.split()[2:], cwd=tmp_path)
    said = (result.stdout + result.stderr).splitlines()
    assert (result.returncode, [*said[:2], "...", said[-1]]) == (1, shown)


def test_the_readmes_command_lines_are_understood() -> None:
    (shell,), (config,) = readme_blocks("Command line", "sh"), readme_blocks("MCP server", "json")
    lines = [shlex.split(line.partition("  #")[0].partition(" -- ")[0])[1:] for line in shell.splitlines()]
    lines += [server["args"] for server in json.loads(config)["mcpServers"].values()]
    assert [jupyter_exec._parser().parse_args(line).command for line in lines] == ["run"] * 6 + ["kernels", "mcp"]


@pytest.mark.slow
def test_the_readmes_settings_of_linters(tmp_path: Path) -> None:
    (tmp_path / "yourpkg").mkdir()
    shutil.copy(MODULE, tmp_path / "yourpkg")
    (tmp_path / "yourpkg/__init__.py").write_text("import os, sys\n")
    (tmp_path / "a.py").write_text("import yourpkg.jupyter_exec as vendored\n\nvendored.LocalJupyterServer(1.5)\n")
    (tmp_path / "pyproject.toml").write_text(*readme_blocks("Vendoring", "toml"))

    def lines(*command: str) -> list[str]:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path)
        return re.findall(r"(?m)^(?: *--> )?([\w/]+\.py):\d", done.stdout)

    assert lines("mypy", "--strict", "a.py") == ["a.py"]
    assert set(lines("ruff", "check", "--select", "ALL")) == {"a.py", "yourpkg/__init__.py"}


def test_the_readme_is_short_and_each_of_its_python_blocks_is_run() -> None:
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450 and max(map(len, lines)) <= 120
    sections = {
        name: len(readme_blocks(name)) for name in ["", *(line[3:] for line in lines if line.startswith("## "))]
    }
    here = {name: 1 for name, _ in README_BLOCKS}
    elsewhere = {"Cells that take long": 1, "Host tools": 2, "In other sandboxes": 1, "A web service": 1}
    elsewhere |= {"In AutoGen, AG2 and asyncio": 1, "In other frameworks": 1}
    assert {name: count for name, count in sections.items() if count} == here | elsewhere


# ======================================================================================================
# Tools
# ======================================================================================================


@cases("command", ["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"], ids=" ".join)
def test_linters_are_content(command: list[str]) -> None:
    files = ["jupyter_exec.py", "test_jupyter_exec.py"]
    result = subprocess.run([sys.executable, "-m", *command, *files], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stdout + result.stderr


# ======================================================================================================
# Benchmarks: `pytest -m bench`; each group beside its rivals in one run, to be read as ratios
# ======================================================================================================


@pytest.fixture
def rivals(request: FixtureRequest) -> Callable[..., Any]:
    """A function that makes an executor with a running kernel by its name."""
    stack = contextlib.ExitStack()
    request.addfinalizer(stack.close)
    servers: dict[str, Callable[[], Any]] = {
        "local": LocalJupyterServer,
        "launched": lambda: LocalJupyterServer(preload=None),
        "relay": lambda: CommandJupyterServer([sys.executable]),
        "docker": docker_server,
        "docker gateway": lambda: docker_server(network=None, transport="gateway"),
        "local gateway": lambda: LocalJupyterServer(transport="gateway"),
    }

    def make(name: str, **options: Any) -> Any:
        if name == "jupyter_client":
            theirs = TheirKernel()
            stack.callback(theirs.stop)
            return theirs
        executor = stack.enter_context(JupyterCodeExecutor(stack.enter_context(servers[name]()), **options))
        assert executor.execute("1").status == "ok"
        return executor

    return make


class TheirKernel:
    """A kernel in the way of jupyter_client, with the verbs of our executor."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self._manager, self.client = start_new_kernel()
        self.execute("1")

    def execute(self, code: str) -> None:
        self.client.execute_interactive(code, output_hook=lambda message: None)

    def restart(self) -> None:
        self._manager.restart_kernel()
        self.client.wait_for_ready()

    def stop(self) -> None:
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def launch(server: Any) -> Any:
    """Start a kernel, on no server in the way of jupyter_client, and get a first answer."""
    if server is None:
        return TheirKernel()
    executor = JupyterCodeExecutor(server)
    assert executor.execute("1").status == "ok"
    return executor


WAYS = ["local", "relay", "docker", "local gateway", "docker gateway"]


@pytest.mark.bench
@pytest.mark.benchmark(group="a cell of `1`")
@cases("way", *WAYS, "jupyter_client", "raw")
def test_bench_cell(benchmark: Any, way: str, rivals: Callable[[str], Any]) -> None:
    executor = rivals("jupyter_client" if way == "raw" else way)
    cell = raw_cell(executor.client) if way == "raw" else lambda: executor.execute("1")
    benchmark.pedantic(cell, rounds=200, warmup_rounds=20)


def raw_cell(client: Any) -> Callable[[], None]:
    """A loop of bare pyzmq over the client's sockets, as lean as can be."""
    shell, iopub = client.shell_channel.socket, client.iopub_channel.socket
    poller = zmq.Poller()
    poller.register(shell, zmq.POLLIN)
    poller.register(iopub, zmq.POLLIN)

    def cell() -> None:
        content = jupyter_exec.execute_content("1", silent=False, store_history=True, asks=False, expression=None)
        sent = client.session.send(shell, "execute_request", content)["header"]["msg_id"]
        replied = idle = False
        while not (replied and idle):
            for sock, _ in poller.poll():
                parts = sock.recv_multipart()
                start = parts.index(b"<IDS|MSG>")
                if json.loads(parts[start + 3]).get("msg_id") == sent:
                    replied = replied or sock is shell
                    idle = idle or b'"idle"' in parts[start + 5]

    return cell


@pytest.mark.bench
@pytest.mark.benchmark(group="100 cells of `1`, or 100 calls of a tool that does nothing")
@cases("what", "cells", "calls", "calls in 8 threads")
@cases("way", *WAYS[:3])
def test_bench_tools(benchmark: Any, way: str, what: str, rivals: Callable[..., JupyterCodeExecutor]) -> None:
    executor = rivals(way, tools=[named("nothing", bool)])
    code = "for _ in range(100): nothing()"
    if what == "calls in 8 threads":
        executor.execute("from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(8)")
        code = "sum(pool.map(lambda _: nothing(), range(100)))"
    cells = ["1"] * 100 if what == "cells" else [code]
    benchmark.pedantic(lambda: [executor.execute(cell) for cell in cells], rounds=5, warmup_rounds=1)


@pytest.mark.bench
@pytest.mark.benchmark(group="100 MB of stdout")
@cases("way", *WAYS[:3])
def test_bench_output(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    executor = rivals(way)
    benchmark.pedantic(lambda: executor.execute("print('x' * 100_000_000)"), rounds=3)


@pytest.mark.bench
@pytest.mark.benchmark(group="first result")
@cases("way", *WAYS, "jupyter_client")
def test_bench_first_result(
    benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor], engine: Any
) -> None:
    def ours() -> None:
        rivals(way)._server.stop()

    benchmark.pedantic(ours if way in WAYS else lambda: TheirKernel().stop(), rounds=3)


reported_time = [0.0]  # what child processes report of themselves, without the start of their Python


@pytest.mark.bench
@pytest.mark.benchmark(group="import", timer=lambda: reported_time[0])
@cases("module", "jupyter_exec", "zmq", "jupyter_client")
def test_bench_import(benchmark: Any, module: str, tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path)
    program = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def import_it() -> None:
        child = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True)
        reported_time[0] += float(child.stdout)

    benchmark.pedantic(import_it, rounds=20, warmup_rounds=1)


KERNEL_WAYS = ["local", "launched", "docker", "jupyter_client"]


@pytest.mark.bench
@pytest.mark.benchmark(group="a further kernel")
@cases("way", *KERNEL_WAYS)
def test_bench_further_kernel(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    server = None if way == "jupyter_client" else rivals(way)._server
    started: list[Any] = []
    benchmark.pedantic(lambda: started.append(launch(server)), rounds=5)
    for kernel in started:
        kernel.stop()


@pytest.mark.bench
@pytest.mark.benchmark(group="restart")
@cases("way", *KERNEL_WAYS)
def test_bench_restart(benchmark: Any, way: str, rivals: Callable[[str], Any]) -> None:
    executor = rivals(way)
    benchmark.pedantic(lambda: (executor.restart(), executor.execute("1")), rounds=5)


@pytest.mark.bench
@pytest.mark.benchmark(group="8 kernels at once")
@cases("way", *KERNEL_WAYS)
def test_bench_eight_kernels(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    server = None if way == "jupyter_client" else rivals(way)._server
    started: list[Any] = []
    with ThreadPoolExecutor(8) as pool:

        def start_eight() -> None:
            started.extend(pool.map(launch, [server] * 8))

        benchmark.pedantic(start_eight, rounds=2)
        list(pool.map(lambda kernel: kernel.stop(), started))


@pytest.mark.bench
@pytest.mark.benchmark(group="100 MB of stdout, in lines")
@cases("way", "local", "docker", "jupyter_client")
def test_bench_lines(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    lines = "import sys\nfor _ in range(10**6): sys.stdout.write('x' * 99 + chr(10))"
    executor = rivals(way)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    benchmark.pedantic(lambda: executor.execute(lines), rounds=3)
    print(f"\n{way}: 100 MB of lines let the client grow by {peak_memory() - before:.0f} MB")


def peak_memory() -> float:
    """Return the largest resident set of this process since it was last cleared, in MB."""
    (peak,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(peak) / 1024


@pytest.mark.bench
@pytest.mark.benchmark(group="20 cells in each of many kernels")
@cases("count", 5, 50)
def test_bench_many_kernels(benchmark: Any, count: int, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    server = rivals("local")._server
    start = time.perf_counter()
    executors = [JupyterCodeExecutor(server) for _ in range(count)]
    pids = [int(run(executor, "__import__('os').getpid()").output) for executor in executors]
    took = time.perf_counter() - start
    sums = [re.search(r"Pss:\s*(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in pids]
    pss = sum(int(found[1]) for found in sums if found) / 1024 / count
    with ThreadPoolExecutor(count) as pool:

        def cells() -> list[bool]:
            return list(pool.map(lambda executor: all(run(executor, "1").output == "1" for _ in range(20)), executors))

        assert all(benchmark.pedantic(cells, rounds=3))
        list(pool.map(JupyterCodeExecutor.stop, executors))
    rate = 20 * count / benchmark.stats.stats.median
    print(f"\n{count} kernels: {took / count * 1000:.0f} ms and {pss:.1f} MB PSS each, {rate:.0f} cells/s over all")


def feed_many(count: int, *messages: tuple[str, str, dict[str, Any]]) -> None:
    """What the client does with `count` messages, from its outputs to its text."""
    made = execution(*itertools.islice(itertools.cycle(messages), count), REPLY, IDLE)
    assert made.result(0).text


LINEAR = {
    "lines": [stream("a line\n")],
    "one line": [stream("x" * 100)],
    "backspaces": [stream("xyz"), stream("\b\b")],
    "progress bar": [stream("\r10%")],
    "escapes": [stream("\x1b[31m\x1b]0;")],
    "turns": [stream("a"), stream("b", "stderr")],
    "displays": [display({"text/plain": "x"})],
    "updates": [display({"text/plain": "x"}, "d"), display({"text/plain": "y"}, "d", "update_display_data")],
    "errors": [("iopub", "error", {"ename": "E", "evalue": "v", "traceback": []})],
}


@pytest.mark.bench
@cases("kind", *LINEAR)
def test_bench_ten_times_the_output_takes_about_ten_times_as_long(benchmark: Any, kind: str) -> None:
    few = min(timeit.repeat(lambda: feed_many(4000, *LINEAR[kind]), number=1, repeat=3))
    benchmark.pedantic(feed_many, (40_000, *LINEAR[kind]), rounds=3)
    benchmark.extra_info["times as long"] = round(benchmark.stats.stats.min / few, 1)
