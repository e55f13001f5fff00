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
import copy
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
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
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

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
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

import jupyter_exec
from jupyter_exec import (
    MAX_HEAD,
    MAX_PARTS,
    V1_SUBPROTOCOL,
    AsyncJupyterCodeExecutor,
    Closed,
    CodeBlock,
    CodeResult,
    CommandJupyterServer,
    ConnectionClosed,
    DockerJupyterServer,
    Event,
    ExecutionError,
    ExecutionTimeout,
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
    Opened,
    Ponged,
    ProtocolError,
    Received,
    Rejected,
    RemoteJupyterServer,
    SandboxError,
    ServerError,
    SignatureError,
    V1Codec,
    WebSocket,
)

settings.register_profile("here", deadline=None)
settings.load_profile("here")

HERE = Path(__file__).parent
MODULE = Path(jupyter_exec.__file__)
TREE = ast.parse(MODULE.read_text(encoding="utf-8"))
# JUPYTER_EXEC_LAUNCH=1 runs the tests with the fork server off, but for those that are about it.
for server_class in (CommandJupyterServer, LocalJupyterServer, DockerJupyterServer):
    if os.environ.get("JUPYTER_EXEC_LAUNCH"):
        server_class.__init__.__kwdefaults__["preload"] = None  # type: ignore[index]

PATIENCE = 20.0  # seconds until a condition that must come counts as not coming
RUN = f"jupyter-exec-test-{os.urandom(4).hex()}"  # label, and part of the names, of all that this run makes in Docker


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition()` is true and return its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.005)
    return value


def run_python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that imports the module under test in a process of its own."""
    options.setdefault("env", os.environ | {"PYTHONPATH": str(MODULE.parent)})
    program = "import logging; logging.basicConfig(level=logging.ERROR)\n" + textwrap.dedent(program)
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert "ERROR:jupyter_exec:" not in result.stderr, result.stderr
    return result


def descendants(pid: int) -> set[int]:
    """Return the living descendants of a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = stat.read_text().rpartition(")")[2].split()
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
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
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
def no_errors_logged(request: pytest.FixtureRequest) -> Iterator[None]:
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
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
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
    assert {1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12} <= set(numbers)


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


def test_only_the_standard_library_is_imported_at_module_level() -> None:
    imported = set()
    for node in TREE.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_only_zmq_and_docker_are_imported_anywhere() -> None:
    names = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names <= {"zmq", "docker"}


def test_import_loads_neither_docker_nor_jupyter_client_nor_ssl() -> None:
    program = (
        "import sys, jupyter_exec; print(*(m for m in ('docker', 'jupyter_client', 'ssl', 'zmq') if m in sys.modules))"
    )
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("\n", "")


VENDORED = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from pkg._vendor import jupyter_exec as one
    from pkg._vendor import other as two
    for module in (one, two):
        with module.LocalJupyterServer() as server, module.JupyterCodeExecutor(server) as executor:
            print(executor.execute_code_blocks([module.CodeBlock("40 + 2")]).output)
    assert one.CodeBlock is not two.CodeBlock
"""


def test_a_host_of_the_same_bytecode_gets_code_and_any_other_the_source() -> None:
    code, source = (jupyter_exec.own_program(magic) for magic in (importlib.util.MAGIC_NUMBER.hex(), "00"))
    assert code[:1] == b"c"
    assert source == b"s%08d" % MODULE.stat().st_size + MODULE.read_bytes()


def test_two_vendored_copies_work_in_one_process(tmp_path: Path) -> None:
    package = tmp_path / "pkg" / "_vendor"
    package.mkdir(parents=True)
    for name in ("jupyter_exec.py", "other.py"):
        shutil.copy(MODULE, package / name)
    result = run_python(VENDORED, str(tmp_path))
    assert (result.stdout, result.stderr) == ("42\n42\n", "")


def test_works_from_a_zip_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for name in ("pkg/__init__.py", "pkg/_vendor/__init__.py"):
            archive.writestr(name, "")
        for name in ("jupyter_exec.py", "other.py"):
            archive.write(MODULE, f"pkg/_vendor/{name}")
    result = run_python(VENDORED, str(tmp_path / "code.zip"))
    assert (result.stdout, result.stderr) == ("42\n42\n", "")


def test_working_directory_cannot_shadow_the_standard_library(tmp_path: Path) -> None:
    for name in ("signal", "json", "selectors", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    with LocalJupyterServer(cwd=tmp_path) as server:
        assert "python3" in server.kernelspecs()


# ======================================================================================================
# 1. Errors
# ======================================================================================================

ERRORS = [
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
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: JupyterExecError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConnectionClosed("a"), ConnectionError),
        (ExecutionTimeout("a"), TimeoutError),
        (KernelSpecNotFound(), ValueError),
    ],
)
def test_errors_are_the_builtin_ones_too(error: Exception, builtin: type) -> None:
    assert isinstance(error, builtin)


def test_error_sentences_say_what_happened_and_what_to_do() -> None:
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


def test_connection_file_round_trip() -> None:
    connection = KernelConnection.from_json(connection_json())
    assert json.loads(connection.to_json()) == CONNECTION


def test_connection_addresses() -> None:
    assert KernelConnection.from_json(connection_json()).address("iopub") == "tcp://127.0.0.1:1002"
    assert KernelConnection.from_json(connection_json(ip="::1")).address("shell") == "tcp://[::1]:1001"
    ipc = KernelConnection.from_json(connection_json(transport="ipc", ip="/tmp/k", shell_port=1))
    assert ipc.address("shell") == "ipc:///tmp/k-1"


def test_connection_ports_may_be_strings_and_unknown_keys_are_ignored() -> None:
    connection = KernelConnection.from_json(connection_json(shell_port="1001", jupyter_session="x.ipynb"))
    assert connection.shell_port == 1001


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        (connection_json(shell_port=...), "shell_port"),
        (connection_json(ip=...), "ip"),
        (connection_json(shell_port=70000), "shell_port"),
        (connection_json(shell_port=True), "shell_port"),
        (connection_json(iopub_port="٣"), "iopub_port"),
        (connection_json(key=5), "key"),
        (connection_json(transport="pgm"), "transport"),
        (connection_json(signature_scheme="rot13"), "signature scheme"),
        (connection_json(signature_scheme="hmac-rot13"), "signature scheme"),
        (connection_json(signature_scheme="hmac-shake_128"), "signature scheme"),
    ],
)
def test_broken_connection_files_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        KernelConnection.from_json(text)


def test_the_key_is_in_no_repr() -> None:
    connection = KernelConnection.from_json(connection_json())
    assert "secret-key" not in repr(connection) + str(connection)


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
    made = jupyter_exec.new_message("shell", "t", content, session="s", msg_id="m", date="2026-01-01T00:00:00Z")
    made.metadata, made.buffers = metadata, buffers
    return made


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


def test_lone_surrogates_survive_the_way_to_the_kernel() -> None:
    codec = jupyter_exec.ZmqCodec("key")
    assert decoded(codec, "shell", codec.encode(message({"code": "\ud83d"}, {}, []))).content == {"code": "\ud83d"}


def signed(*parts: bytes, key: str = "key") -> list[bytes]:
    return [b"<IDS|MSG>", jupyter_exec.ZmqCodec(key)._sign(parts), *parts]


def test_invalid_utf8_and_null_dicts_of_real_kernels_are_read() -> None:
    parts = signed(b'{"msg_type":"stream"}', b"null", b"null", b'{"text":"\xed\xb3\xbf"}')
    read = decoded(jupyter_exec.ZmqCodec("key"), "iopub", parts)
    assert (read.parent_header, read.metadata, read.parent_id) == ({}, {}, "")
    assert read.content["text"].startswith("�")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "delimiter"),
        ([b"x"] * 6, "delimiter"),
        ([b"<IDS|MSG>"], "five"),
        (signed(b"{}", b"{}", b"{}"), "five"),
        (signed(b"[]", b"{}", b"{}", b"{}"), "header is not a JSON object"),
        (signed(b"{}", b"{}", b"{}", b"{"), "content is not JSON"),
        (signed(b"{}", b"{}", b"{}", b'{"a":' * 100_000), "content is not JSON"),
        (signed(b"{}", b"{}", b"{}", b'{"a":' + b"9" * 10_000 + b"}"), "content is not JSON"),
    ],
)
def test_malformed_messages_are_refused(parts: list[bytes], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decoded(jupyter_exec.ZmqCodec("key"), "iopub", parts)


def test_a_huge_message_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "MAX_MESSAGE", 1000)
    with pytest.raises(ProtocolError, match="larger than 1000"):
        decoded(jupyter_exec.ZmqCodec("key"), "iopub", signed(b"{}", b"{}", b"{}", b" " * 1000))


@pytest.mark.parametrize("position", range(1, 6))
def test_any_change_breaks_the_signature(position: int) -> None:
    parts = jupyter_exec.ZmqCodec("key").encode(message({}, {}, []))
    parts[position] = parts[position][:-1] + b" "
    with pytest.raises(SignatureError):
        decoded(jupyter_exec.ZmqCodec("key"), "shell", parts)


def test_a_forged_copy_does_not_get_the_genuine_message_refused() -> None:
    codec = jupyter_exec.ZmqCodec("key")
    genuine = codec.encode(message({"a": 1}, {}, []))
    forged = [*genuine[:5], b'{"a":2}']
    with pytest.raises(SignatureError):
        decoded(codec, "shell", forged)
    assert decoded(codec, "shell", genuine).content == {"a": 1}


@pytest.mark.parametrize("piece", [40, 41, 42, 43, 44, 45, 46, 47])
@given(st.text(alphabet=st.sampled_from('a"\\\n\u00e9\u20ac\U0001f600\ud83d\x01'), max_size=200), st.booleans())
def test_a_huge_stream_message_comes_in_pieces(piece: int, text: str, ascii_only: bool) -> None:
    content = json.dumps({"name": "stdout", "text": text}, ensure_ascii=ascii_only).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jupyter_exec, "STREAM_PIECE", piece)
        pieces = [json.loads(bytes(cut)) for cut in jupyter_exec.stream_pieces(content)]
    assert "".join(cut["text"] for cut in pieces) == json.loads(content)["text"]
    assert {cut["name"] for cut in pieces} <= {"stdout"}


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


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"Traceback (most recent call last):", "not a frame"),
        (b"JX\0\0\0\0\0\0", "not a frame"),
        (b"JX\0\1\xff\xff\xff\xff", "over the limit"),
        (b"JX\0\1\0\0\0\2\0\0\0\1ab", "do not add up"),
        (b"JX\0\2\0\0\0\2\0\0\0\2\0\0\0\1ab", "do not add up"),
    ],
)
def test_a_corrupt_pipe_is_noticed(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        list(jupyter_exec.PipeCodec().feed(data))


@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_pipe_codec(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        for parts in jupyter_exec.PipeCodec(limit=1000).feed(data):
            assert parts


# ======================================================================================================
# 4. WebSocket protocol, and the codecs of the WebSocket
#
# The judges are other people's code: the `websockets` package (its sans-io server, and its threaded server on a
# socket), tornado (what Jupyter servers run on), jupyter_server's own serialisers. Bytes are written by hand only
# where a judge refuses to produce them: violations.
# ======================================================================================================

judge: Any = jupyter_server_base  # untyped
TIMEOUT = PATIENCE
MAX_MESSAGE = 2**20
SAMPLE_NONCE = b"the sample nonce"  # of RFC 6455, 1.3


# Helpers


def make(**options: Any) -> WebSocket:
    """Make a client whose masks are a reproducible sequence."""
    source = random.Random(1)
    values: dict[str, Any] = {
        "host": "127.0.0.1:8888",
        "target": "/api/kernels/1/channels?session_id=2",
        "headers": {"Authorization": "token s3cret"},
        "subprotocols": [V1_SUBPROTOCOL],
        "nonce": SAMPLE_NONCE,
        "mask": lambda: source.randbytes(4),
        "max_message": MAX_MESSAGE,
    }
    return WebSocket(**(values | options))


def answer(*lines: str, status: str = "101 Switching Protocols", **headers: str | None) -> bytes:
    """Return a correct answer to SAMPLE_NONCE, with headers replaced, added, or taken out by None."""
    values: dict[str, str | None] = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",  # as given in RFC 6455, 1.3
    }
    values |= {name.replace("_", "-"): value for name, value in headers.items()}
    fields = [f"{name}: {value}" for name, value in values.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, *lines, "", ""]).encode("latin-1")


def opened(**options: Any) -> WebSocket:
    client = make(**options)
    assert client.receive(answer()) == [Opened(None)]
    return client


def frame(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    """Return a legal frame of a server, as `websockets` writes it."""
    return Frame(Opcode(opcode), data, fin).serialize(mask=False)


def frame_of(event: object) -> Frame:
    assert isinstance(event, Frame)
    return event


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size
    yield data[start:]


class Pair:
    """A client and a `websockets` server, connected in memory."""

    def __init__(self, **options: Any) -> None:
        self.client = make(nonce=os.urandom(16), mask=lambda: os.urandom(4), **options)
        subprotocols: list[Any] = list(self.client.subprotocols)
        self.server = ServerProtocol(subprotocols=subprotocols or None, max_size=None)
        (request,) = self.to_server(self.client.handshake())
        assert isinstance(request, Request)
        self.request = request
        self.server.send_response(self.server.accept(request))
        self.opening = self.to_client()

    def to_server(self, data: bytes) -> list[Any]:
        self.server.receive_data(data)
        if self.server.parser_exc:
            raise self.server.parser_exc
        return self.server.events_received()

    def to_client(self, sizes: Iterable[int] = ()) -> list[Event]:
        """Deliver what the server has to say, in pieces of `sizes`, and the client's answers to it."""
        data = b"".join(self.server.data_to_send())
        events = [event for piece in cut(data, sizes) for event in self.client.receive(piece)]
        self.answers = self.to_server(self.client.data_to_send())
        return events


# Opening handshake


def test_a_server_accepts_the_request_and_the_client_its_answer() -> None:
    pair = Pair()
    assert pair.opening == [Opened(V1_SUBPROTOCOL)]
    assert pair.request.path == "/api/kernels/1/channels?session_id=2"
    assert pair.request.headers["Host"] == "127.0.0.1:8888"
    assert pair.request.headers["Authorization"] == "token s3cret"
    assert pair.request.headers["Sec-WebSocket-Protocol"] == V1_SUBPROTOCOL


def test_the_key_is_the_nonce_of_the_rfc() -> None:
    assert b"\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" in make().handshake()


def test_no_subprotocol_is_offered_when_there_is_none() -> None:
    pair = Pair(subprotocols=[])
    assert "Sec-WebSocket-Protocol" not in pair.request.headers
    assert pair.opening == [Opened(None)]


@pytest.mark.parametrize(
    "options",
    [
        {"target": "/a\r\nX: s3cret"},
        {"target": "/a\nX: s3cret"},
        {"target": "/s3cret b"},
        {"target": ""},
        {"target": "/s3cret\u00e9"},
        {"host": "h\r\nX: s3cret"},
        {"headers": {"Authorization": "token s3cret\r\nX: y"}},
        {"headers": {"Authorization": "token s3cret\n"}},
        {"headers": {"Authorization": "token s3cret\r"}},
        {"headers": {"Authorization": "token s3cret\0"}},
        {"headers": {"Authorization": "token s3cret\u20ac"}},
        {"headers": {"X: s3cret\r\nY": "z"}},
        {"headers": {"": "s3cret"}},
        {"subprotocols": ["a\r\nX: s3cret"]},
    ],
)
def test_a_request_refuses_line_breaks_and_keeps_secrets(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="HTTP forbids") as caught:
        make(**options).handshake()
    assert "s3cret" not in repr(caught.value)


def test_the_token_is_in_no_repr() -> None:
    assert "s3cret" not in repr(make())


@pytest.mark.parametrize(
    ("reply", "subprotocol"),
    [
        (answer(Upgrade="WebSocket", Connection="keep-alive ,\tUPGRADE"), None),
        (answer(Sec_WebSocket_Protocol=V1_SUBPROTOCOL), V1_SUBPROTOCOL),
        (answer(Sec_WebSocket_Protocol=""), None),  # what Jupyter's page asks of servers
        (answer(Sec_WebSocket_Extensions=""), None),
        (answer("sec-websocket-accept:", Server="TornadoServer/6.5", X_Empty=""), None),
        (answer(status="101"), None),
        (answer(status="101 "), None),
    ],
)
def test_an_answer_may_be_written_in_many_ways(reply: bytes, subprotocol: str | None) -> None:
    assert make().receive(reply) == [Opened(subprotocol)]


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (answer(Upgrade=None), "Upgrade"),
        (answer(Upgrade="h2c"), "Upgrade"),
        (answer(Connection=None), "Connection"),
        (answer(Connection="keep-alive, Upgrades"), "Connection"),
        (answer(Sec_WebSocket_Accept=None), "Sec-WebSocket-Accept"),
        (answer(Sec_WebSocket_Accept="s3pPLMBiTxaQ9kYGzzhZRbK+xOO="), "Sec-WebSocket-Accept"),
        (answer("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "Sec-WebSocket-Accept"),
        (answer(Sec_WebSocket_Extensions="permessage-deflate"), "extension"),
        (answer(Sec_WebSocket_Protocol="other"), "subprotocol"),
        (answer(f"Sec-WebSocket-Protocol: {V1_SUBPROTOCOL}", Sec_WebSocket_Protocol="x"), "subprotocol"),
        (answer("no colon"), "valid HTTP"),
        (answer(" folded: line"), "valid HTTP"),
        (answer("space : before"), "valid HTTP"),
        (answer("X: control\x07"), "valid HTTP"),
        (answer("X: bare\rreturn"), "valid HTTP"),
        (answer(status="99 x"), "valid HTTP"),
        (answer(status="1010 x"), "valid HTTP"),
        (answer().replace(b"HTTP/1.1", b"HTTP/1.2"), "valid HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "valid HTTP"),
        (b"H2", "valid HTTP"),
    ],
)
def test_a_wrong_answer_fails_the_connection(reply: bytes, sentence: str) -> None:
    client = make()
    with pytest.raises(ProtocolError, match=sentence):
        client.receive(reply)
    assert client.data_to_send() == b""  # there is no WebSocket yet on which to send a Close frame
    with pytest.raises(ProtocolError, match=sentence):
        client.receive(answer())


def padded(size: int) -> bytes:
    filler = size - len(answer("X-Filler: "))
    return answer("X-Filler: " + "x" * filler)


@pytest.mark.parametrize("step", [1, 1000, 2 * MAX_HEAD])
def test_a_head_of_the_greatest_size_is_accepted(step: int) -> None:
    client = make()
    reply = padded(MAX_HEAD)
    assert len(reply) == MAX_HEAD
    pieces = cut(reply, itertools.repeat(step))
    assert [event for piece in pieces for event in client.receive(piece)] == [Opened(None)]


@pytest.mark.parametrize("step", [1, 1000, 2 * MAX_HEAD])
def test_a_greater_head_is_refused(step: int) -> None:
    client = make()
    with pytest.raises(ProtocolError, match=str(MAX_HEAD)):
        for piece in cut(padded(MAX_HEAD + 1), itertools.repeat(step)):
            client.receive(piece)


def test_a_head_without_end_is_refused() -> None:
    client = make()
    reply = answer()[:-2] + b"X: "
    assert client.receive(reply + b"x" * (MAX_HEAD - 1 - len(reply))) == []
    with pytest.raises(ProtocolError, match="65536 bytes"):
        client.receive(b"x")


def test_frames_may_come_with_the_answer() -> None:
    assert make().receive(answer() + frame(1, b"hi")) == [Opened(None), Received("hi")]


def test_nothing_is_sent_before_the_answer() -> None:
    client = make()
    with pytest.raises(ConnectionClosed):
        client.send("x")
    assert client.close() == b""


# Refusals

REFUSED = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 11\r\nWWW-Authenticate: a\r\nwww-authenticate: b\r\n\r\n"


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_401_comes_with_its_body(step: int) -> None:
    client = make()
    data = REFUSED.encode() + b"Bad token.\n" + b"no part of it"
    events = [event for piece in cut(data, itertools.repeat(step)) for event in client.receive(piece)]
    headers = {"content-length": "11", "www-authenticate": "a, b"}
    assert events == [Rejected(401, "Unauthorized", headers, b"Bad token.\n")]
    assert client.receive_eof() == []


def test_a_refusal_waits_for_its_body() -> None:
    client = make()
    assert client.receive(REFUSED.encode() + b"Bad token.") == []
    (event,) = client.receive(b"\n")
    assert isinstance(event, Rejected)


def test_the_end_of_the_stream_cuts_a_body_short() -> None:
    client = make()
    client.receive(REFUSED.encode() + b"Bad")
    (event,) = client.receive_eof()
    assert isinstance(event, Rejected) and event.body == b"Bad"
    assert client.receive_eof() == []


def test_a_redirect_is_a_refusal_with_its_location() -> None:
    (event,) = make().receive(b"HTTP/1.1 302 Found\r\nLocation: /hub/login\r\nContent-Length: 0\r\n\r\n")
    assert event == Rejected(302, "Found", {"location": "/hub/login", "content-length": "0"}, b"")


def test_a_page_without_length_ends_with_the_stream() -> None:
    client = make()
    assert client.receive(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>") == []
    assert client.receive(b"</html>") == []
    assert client.receive_eof() == [Rejected(200, "OK", {"content-type": "text/html"}, b"<html></html>")]


def test_a_chunked_page_ends_with_its_last_chunk() -> None:
    client = make()
    assert client.receive(b"HTTP/1.1 503\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n0\r\n") == []
    (event,) = client.receive(b"\r\n")
    assert event == Rejected(503, "", {"transfer-encoding": "chunked"}, b"4\r\nbusy\r\n0\r\n\r\n")


@pytest.mark.parametrize("length", ["", "Content-Length: 200000\r\n", f"Content-Length: {'9' * 5000}\r\n"])
def test_a_long_body_is_cut(length: str) -> None:
    client = make()
    assert client.receive(f"HTTP/1.1 500 Oops\r\n{length}\r\n".encode()) == []
    assert client.receive(b"x" * (MAX_HEAD - 1)) == []
    (event,) = client.receive(b"yz")
    assert isinstance(event, Rejected) and event.body == b"x" * (MAX_HEAD - 1) + b"y"


@pytest.mark.parametrize("received", [b"", b"HTTP/1.1 101 Switching"])
def test_a_stream_that_ends_before_the_answer_is_a_loss(received: bytes) -> None:
    client = make()
    client.receive(received)
    assert client.receive_eof() == [Closed(1006, "")]


# Messages from the server

STORY = (
    answer(Sec_WebSocket_Protocol=V1_SUBPROTOCOL)
    + frame(1, "h\u00e9llo \U0001f600".encode())
    + frame(1, b"")
    + frame(2, b"\xff\x00", fin=False)
    + frame(9, b"are you there?")
    + frame(0, b"", fin=False)
    + frame(10, b"unasked")
    + frame(0, b"\x01" * 200)
    + frame(1, "\U0001f600".encode()[:3], fin=False)
    + frame(0, "\U0001f600".encode()[3:])
    + frame(2, b"\x02" * 70)
    + frame(8, Close(1001, "going \u2192 away").serialize())
)
EVENTS = [
    Opened(V1_SUBPROTOCOL),
    Received("h\u00e9llo \U0001f600"),
    Received(""),
    Ponged(b"unasked"),
    Received(b"\xff\x00" + b"\x01" * 200),
    Received("\U0001f600"),
    Received(b"\x02" * 70),
    Closed(1001, "going \u2192 away"),
]


def tell(pieces: Iterable[bytes]) -> tuple[list[Event], bytes]:
    client = make()
    events = [event for piece in pieces for event in client.receive(piece)]
    return events, client.data_to_send()


def test_the_story_in_one_piece() -> None:
    events, answers = tell([STORY])
    assert events == EVENTS
    server = ServerProtocol(state=State.OPEN)
    server.receive_data(answers)
    pong, close = map(frame_of, server.events_received())
    assert (pong.opcode, pong.data) == (Opcode.PONG, b"are you there?")
    assert (close.opcode, close.data) == (Opcode.CLOSE, struct.pack(">H", 1001))


def test_the_story_split_at_every_position() -> None:
    whole = tell([STORY])
    for position in range(len(STORY) + 1):
        assert tell([STORY[:position], STORY[position:]]) == whole


def test_the_story_byte_by_byte() -> None:
    assert tell(cut(STORY, itertools.repeat(1))) == tell([STORY])


@given(st.lists(st.integers(0, 60)))
def test_the_story_in_any_pieces(sizes: list[int]) -> None:
    assert tell(cut(STORY, sizes)) == tell([STORY])


messages = st.one_of(st.text(), st.binary(), st.sampled_from([125, 126, 65535, 65536, 65537]).map(bytes))


@given(st.lists(st.tuples(messages, st.lists(st.integers(0, 40), max_size=4))), st.lists(st.integers(1, 200)))
def test_whatever_a_server_sends_in_fragments_arrives(plan: list[Any], sizes: list[int]) -> None:
    pair = Pair()
    pings = 0
    for message, cuts in plan:
        text = isinstance(message, str)
        pieces = list(cut(message.encode() if text else message, cuts)) or [b""]
        last = len(pieces) - 1
        for number, piece in enumerate(pieces):
            if number:
                pair.server.send_continuation(piece, fin=number == last)
            elif text:
                pair.server.send_text(piece, fin=number == last)
            else:
                pair.server.send_binary(piece, fin=number == last)
            pair.server.send_ping(b"%d" % pings)
            pings += 1
    assert pair.to_client(sizes) == [Received(message) for message, _ in plan]
    assert [(pong.opcode, pong.data) for pong in pair.answers] == [
        (Opcode.PONG, b"%d" % number) for number in range(pings)
    ]


# Messages to the server


@given(messages)
@example("")
@example("\U0001f600 h\u00e9")
def test_whatever_is_sent_arrives(message: str | bytes) -> None:
    pair = Pair()
    (received,) = pair.to_server(pair.client.send(message))
    assert received.fin
    assert received.opcode == (Opcode.TEXT if isinstance(message, str) else Opcode.BINARY)
    assert bytes(received.data) == (message.encode() if isinstance(message, str) else message)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 10_000_000])
def test_a_frame_is_what_the_judge_writes(size: int) -> None:
    data, key = os.urandom(size), b"\x01\x80\xfe\x00"
    written = opened(mask=lambda: key).send(data)
    expected = Frame(Opcode.BINARY, data).serialize(mask=False)
    head = len(expected) - size
    assert written[0] == expected[0]
    assert written[1] == expected[1] | 0x80
    assert written[2:head] == expected[2:head]
    assert written[head : head + 4] == key
    assert written[head + 4 :] == bytes(map(int.__xor__, data, itertools.cycle(key)))


def test_the_masked_hello_of_the_rfc() -> None:
    client = opened(mask=lambda: bytes.fromhex("37fa213d"))
    assert client.send("Hello") == bytes.fromhex("8185 37fa213d 7f9f4d5158")


def test_every_frame_asks_for_a_fresh_mask() -> None:
    keys = [bytes([number]) * 4 for number in range(1, 6)]
    left = iter(keys)
    client = opened(mask=lambda: next(left))
    client.receive(frame(9, b"ping"))
    frames = [client.data_to_send(), client.send("x"), client.ping(b"y"), client.pong(b"z"), client.close()]
    assert [data[2:6] for data in frames] == keys


def test_a_ping_comes_back() -> None:
    pair = Pair()
    (ping,) = pair.to_server(pair.client.ping(b"x" * 125))
    assert ping.opcode == Opcode.PING
    assert pair.to_client() == [Ponged(b"x" * 125)]


def test_an_unsolicited_pong_is_taken() -> None:
    pair = Pair()
    (pong,) = pair.to_server(pair.client.pong())
    assert (pong.opcode, pong.data) == (Opcode.PONG, b"")


@pytest.mark.parametrize("method", ["ping", "pong"])
def test_a_control_frame_has_room_for_125_bytes(method: str) -> None:
    with pytest.raises(ValueError, match="125"):
        getattr(opened(), method)(b"x" * 126)


def test_answers_are_returned_once() -> None:
    client = opened()
    client.receive(frame(9))
    assert client.data_to_send()[:2] == b"\x8a\x80"
    assert client.data_to_send() == b""


# Violations

STARTED = frame(1, b"a", fin=False)
MASKED = Frame(Opcode.TEXT, b"Hello").serialize(mask=True)


@pytest.mark.parametrize(
    ("data", "code", "sentence"),
    [
        pytest.param(MASKED[:2], 1002, "MUST NOT mask", id="masked"),
        pytest.param(b"\x81\x80", 1002, "MUST NOT mask", id="masked, empty"),
        pytest.param(b"\xc1\x00", 1002, "RSV1", id="rsv1"),
        pytest.param(b"\xa1\x00", 1002, "RSV1", id="rsv2"),
        pytest.param(b"\x91\x00", 1002, "RSV1", id="rsv3"),
        pytest.param(b"\x83\x05", 1002, "unknown opcode", id="opcode 3"),
        pytest.param(b"\x87\x05", 1002, "unknown opcode", id="opcode 7"),
        pytest.param(b"\x8b\x05", 1002, "unknown opcode", id="opcode 11"),
        pytest.param(b"\x8f\x05", 1002, "unknown opcode", id="opcode 15"),
        pytest.param(b"\x09\x05", 1002, "fragmented", id="ping in fragments"),
        pytest.param(b"\x08\x02", 1002, "fragmented", id="close in fragments"),
        pytest.param(b"\x89\x7e", 1002, "125 bytes", id="ping over 125"),
        pytest.param(b"\x8a\x7f", 1002, "125 bytes", id="pong over 125"),
        pytest.param(b"\x88\x7e", 1002, "125 bytes", id="close over 125"),
        pytest.param(b"\x80\x05", 1002, "interleaved", id="continuation of nothing"),
        pytest.param(b"\x00\x05", 1002, "interleaved", id="continuation of nothing, not final"),
        pytest.param(STARTED + b"\x81\x05", 1002, "interleaved", id="text within a message"),
        pytest.param(STARTED + b"\x02\x05", 1002, "interleaved", id="binary within a message"),
        pytest.param(frame(1, b"", fin=False) + b"\x81\x00", 1002, "interleaved", id="within an empty start"),
        pytest.param(frame(1, b"x") + b"\x80\x00", 1002, "interleaved", id="continuation of a whole"),
        pytest.param(STARTED + frame(0) + b"\x80\x00", 1002, "interleaved", id="continuation of an end"),
        pytest.param(b"\x82\x7e\x00\x7d", 1002, "minimal number", id="125 in 16 bits"),
        pytest.param(b"\x82\x7f" + struct.pack(">Q", 65535), 1002, "minimal number", id="65535 in 64 bits"),
        pytest.param(b"\x82\x7f" + struct.pack(">Q", 5), 1002, "minimal number", id="5 in 64 bits"),
        pytest.param(b"\x82\x7f" + struct.pack(">Q", MAX_MESSAGE + 1), 1009, str(MAX_MESSAGE), id="too big"),
        pytest.param(b"\x82\x7f" + b"\xff" * 8, 1009, str(MAX_MESSAGE), id="highest bit"),
        pytest.param(frame(1, b"\xff"), 1007, "UTF-8", id="text, bad byte"),
        pytest.param(frame(1, b"\xed\xa0\x80"), 1007, "UTF-8", id="text, surrogate"),
        pytest.param(frame(1, "\u20ac".encode()[:2]), 1007, "UTF-8", id="text, cut"),
        pytest.param(STARTED + frame(0, b"\xff"), 1007, "UTF-8", id="text in fragments"),
        pytest.param(frame(8, b"\x03\xe8\xff"), 1007, "UTF-8", id="close reason"),
        pytest.param(frame(8, b"\x03"), 1002, "2-byte unsigned", id="close with one byte"),
        *(
            pytest.param(frame(8, struct.pack(">H", code)), 1002, f"{code} is not", id=f"close with {code}")
            for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)
        ),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_a_violation_fails_the_connection(data: bytes, code: int, sentence: str, step: int) -> None:
    pair = Pair()
    with pytest.raises(ProtocolError, match=sentence) as caught:
        for piece in [*cut(data, itertools.repeat(step)), b""]:  # events before it come first
            pair.client.receive(piece)
    assert str(caught.value).startswith("The WebSocket failed. RFC 6455, ")
    (close,) = pair.to_server(pair.client.data_to_send())
    assert Close.parse(close.data).code == code
    with pytest.raises(ProtocolError, match=sentence):
        pair.client.receive(frame(1, b"more"))
    with pytest.raises(ProtocolError, match=sentence):
        pair.client.receive_eof()
    with pytest.raises(ConnectionClosed):
        pair.client.send("x")
    assert pair.client.data_to_send() == b""


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1011, 1012, 1013, 1014, 3000, 4999])
def test_registered_close_codes_are_taken(code: int) -> None:
    assert opened().receive(frame(8, struct.pack(">H", code))) == [Closed(code, "")]


def test_events_before_a_violation_are_not_lost() -> None:
    client = opened()
    assert client.receive(frame(1, b"good") + b"\xc1\x00") == [Received("good")]
    with pytest.raises(ProtocolError, match="RSV1"):
        client.receive(b"")


def test_a_violation_after_our_close_frame_sends_no_second_one() -> None:
    client = opened()
    client.close()
    with pytest.raises(ProtocolError, match="RSV1"):
        client.receive(b"\xc1\x00")
    assert client.data_to_send() == b""


# Sizes


def test_a_message_of_the_greatest_size_is_taken() -> None:
    assert opened(max_message=300).receive(frame(2, bytes(300))) == [Received(bytes(300))]


def test_a_greater_message_is_refused_before_it_comes() -> None:
    with pytest.raises(ProtocolError, match="over 300 bytes"):
        opened(max_message=300).receive(frame(2, bytes(301))[:4])


def test_fragments_count_together() -> None:
    client = opened(max_message=300)
    assert client.receive(frame(2, bytes(200), fin=False) + frame(0, bytes(100), fin=False)) == []
    assert client.receive(frame(9, b"x" * 125)) == []  # control frames do not count
    assert client.receive(frame(0)) == [Received(bytes(300))]
    assert client.receive(frame(2, bytes(300))) == [Received(bytes(300))]  # the count starts anew
    assert client.receive(frame(2, bytes(200), fin=False)) == []
    with pytest.raises(ProtocolError, match="over 300 bytes"):
        client.receive(frame(0, bytes(101))[:2])


def test_bytes_after_the_end_are_not_kept() -> None:
    client = opened()
    client.receive(frame(8))
    tracemalloc.start()
    try:
        for _ in range(100):
            client.receive(bytes(100_000))
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def seconds_for(size: int, step: int, fragment: int) -> float:
    """Return the processor time of a message of `size` bytes, in frames of `fragment`, read by `step`."""
    pieces = list(cut(bytes(size), itertools.repeat(fragment, size // fragment - 1)))
    data = b"".join(frame(0 if n else 2, piece, n == len(pieces) - 1) for n, piece in enumerate(pieces))
    client = opened(max_message=size)
    started = time.process_time()
    events = [event for piece in cut(data, itertools.repeat(step)) for event in client.receive(piece)]
    elapsed = time.process_time() - started
    assert events == [Received(bytes(size))]
    return elapsed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "step", "fragment"),
    [
        pytest.param(50_000, 1, 50_000, id="byte by byte"),
        pytest.param(8_000_000, 4096, 8_000_000, id="one great frame"),
        pytest.param(100_000, 65536, 2, id="many small frames"),
    ],
)
def test_the_cost_is_linear(size: int, step: int, fragment: int) -> None:
    # Eight times the work takes 8 times as long; it would take 64 times if bytes were moved again and again.
    small = min(seconds_for(size, step, fragment) for _ in range(3))
    great = min(seconds_for(8 * size, step, fragment if fragment < size else 8 * size) for _ in range(2))
    assert great < 30 * small + 0.05


# Closing handshake


def test_the_server_closes() -> None:
    pair = Pair()
    pair.server.send_close(1001, "bye")
    assert pair.to_client() == [Closed(1001, "bye")]
    assert pair.server.close_rcvd == Close(1001, "")
    with pytest.raises(ConnectionClosed):
        pair.client.send("x")
    assert pair.client.close() == b""
    assert pair.client.receive_eof() == []


def test_the_client_closes() -> None:
    pair = Pair()
    pair.to_server(pair.client.close(1000, "d\u00e9j\u00e0 vu"))
    assert pair.server.close_rcvd == Close(1000, "d\u00e9j\u00e0 vu")
    with pytest.raises(ConnectionClosed):
        pair.client.send("x")
    with pytest.raises(ConnectionClosed):
        pair.client.ping()
    assert pair.to_client() == [Closed(1000, "d\u00e9j\u00e0 vu")]
    assert pair.client.data_to_send() == b""


def test_both_close_at_once() -> None:
    pair = Pair()
    pair.server.send_close(1012, "restart")
    sent = pair.client.close(1000)
    assert pair.to_client() == [Closed(1012, "restart")]
    assert pair.answers == []
    (close,) = pair.to_server(sent)
    assert Close.parse(close.data).code == 1000


def test_messages_may_come_until_the_server_closes() -> None:
    pair = Pair()
    pair.server.send_text(b"last words")
    pair.server.send_ping(b"!")
    sent = pair.client.close()
    assert pair.to_client() == [Received("last words")]
    assert [pong.data for pong in pair.answers] == [b"!"]
    pair.to_server(sent)
    assert pair.to_client() == [Closed(1000, "")]


def test_a_close_frame_without_code_is_echoed_so() -> None:
    pair = Pair()
    pair.server.send_close()
    assert pair.to_client() == [Closed(1005, "")]
    assert [(close.opcode, close.data) for close in pair.answers] == [(Opcode.CLOSE, b"")]


def test_a_second_close_says_nothing() -> None:
    client = opened()
    assert client.close() != b""
    assert client.close() == b""


def test_nothing_counts_after_a_close_frame() -> None:
    client = opened()
    assert client.receive(frame(8) + frame(9) + frame(1, b"\xff") + b"\xff\xff") == [Closed(1005, "")]
    assert client.data_to_send()[:1] == b"\x88"
    assert client.receive(frame(1, b"late")) == []
    assert client.data_to_send() == b""


@pytest.mark.parametrize("closing", [False, True])
def test_a_stream_that_ends_without_close_frame_is_a_loss(closing: bool) -> None:
    client = opened()
    if closing:
        client.close()
    client.receive(frame(1, b"cut short")[:-1])
    assert client.receive_eof() == [Closed(1006, "")]
    assert client.receive_eof() == []
    with pytest.raises(ConnectionClosed):
        client.send("x")


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2000, 5000, 65536])
def test_codes_that_are_not_for_sending_are_refused(code: int) -> None:
    client = opened()
    with pytest.raises(ValueError, match=str(code)):
        client.close(code)
    assert client.send("still open")


def test_a_reason_has_room_for_123_bytes() -> None:
    client = opened()
    with pytest.raises(ValueError, match="125"):
        client.close(1000, "\u00e9" * 62)
    assert len(client.close(1000, "\u00e9" * 61 + "e")) == 6 + 125


# Real sockets: websockets and tornado


class Driver:
    """The least that a program has to do around a WebSocket."""

    def __init__(self, port: int, target: str = "/", **options: Any) -> None:
        self.ws = make(nonce=os.urandom(16), mask=lambda: os.urandom(4), target=target, **options)
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.waiting: list[Event] = []
        self.socket.sendall(self.ws.handshake())

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def next(self) -> Event:
        while not self.waiting:
            data = self.socket.recv(65536)
            self.waiting += self.ws.receive(data) if data else self.ws.receive_eof()
            self.socket.sendall(self.ws.data_to_send())
            assert data or self.waiting, "the stream ended"
        return self.waiting.pop(0)


@contextlib.contextmanager
def websockets_server(handler: Callable[[ServerConnection], None], **options: Any) -> Iterator[int]:
    with serve(handler, "127.0.0.1", 0, open_timeout=TIMEOUT, close_timeout=TIMEOUT, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(TIMEOUT)
            assert not thread.is_alive()


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


def test_a_real_server_echoes_and_closes() -> None:
    options = {"subprotocols": [V1_SUBPROTOCOL], "max_size": None}
    with websockets_server(echo, **options) as port, Driver(port) as driver:
        assert driver.next() == Opened(V1_SUBPROTOCOL)
        for message in ("h\u00e9llo", b"", os.urandom(MAX_MESSAGE)):
            driver.write(driver.ws.send(message))
            assert driver.next() == Received(message)
        driver.write(driver.ws.ping(b"ping"))
        assert driver.next() == Ponged(b"ping")
        driver.write(driver.ws.close(1000, "done"))
        assert driver.next() == Closed(1000, "done")
        assert driver.socket.recv(1) == b""


def test_a_real_server_pings_and_closes_first() -> None:
    def handler(connection: ServerConnection) -> None:
        assert connection.ping(b"are you there?").wait(TIMEOUT)
        connection.send(["in ", "three ", "fragments"])
        connection.close(1001, "going away")

    with websockets_server(handler) as port, Driver(port) as driver:
        assert [driver.next() for _ in range(3)] == [
            Opened(None),
            Received("in three fragments"),
            Closed(1001, "going away"),
        ]
        assert driver.socket.recv(1) == b""


def test_a_real_server_is_told_of_a_message_that_is_too_big() -> None:
    codes: list[int | None] = []

    def handler(connection: ServerConnection) -> None:
        connection.send(b"x" * 1001)
        with contextlib.suppress(Exception):
            connection.recv(TIMEOUT)
        codes.append(connection.close_code)

    with websockets_server(handler) as port, Driver(port, max_message=1000) as driver:
        assert driver.next() == Opened(None)
        with pytest.raises(ProtocolError, match="over 1000 bytes"):
            driver.next()
        driver.write(driver.ws.data_to_send())
        while driver.socket.recv(65536):  # closing with bytes unread would reset the connection, Close frame and all
            pass
    assert codes == [1009]


def test_a_real_server_refuses() -> None:
    def refuse(connection: ServerConnection, request: Request) -> Any:
        return connection.respond(HTTPStatus.UNAUTHORIZED, "Bad token.\n")

    with websockets_server(echo, process_request=refuse) as port, Driver(port) as driver:
        event = driver.next()
    assert isinstance(event, Rejected)
    assert (event.status, event.reason, event.body) == (401, "Unauthorized", b"Bad token.\n")


class TornadoEcho(tornado.websocket.WebSocketHandler):
    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return V1_SUBPROTOCOL if V1_SUBPROTOCOL in subprotocols else None

    def on_message(self, message: str | bytes) -> None:
        if message == "close":
            self.close(1000, "as you wish")
        elif message == "vanish":
            self.close()
        else:
            self.ping(b"x")
            self.write_message(message, binary=isinstance(message, bytes))


class TornadoForbidden(tornado.web.RequestHandler):
    def get(self) -> None:
        raise tornado.web.HTTPError(403)


@pytest.fixture(scope="module")
def tornado_port() -> Iterator[int]:
    """A tornado server, the one under every Jupyter server, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def main() -> None:
        routes = [("/ws", TornadoEcho), ("/forbidden", TornadoForbidden)]
        redirect = ("/login", tornado.web.RedirectHandler, {"url": "/hub/login", "permanent": False})
        server = tornado.httpserver.HTTPServer(tornado.web.Application([*routes, redirect]))
        listener.setblocking(False)
        server.add_socket(listener)
        started.set()
        await stop.wait()
        server.stop()
        await server.close_all_connections()

    async def begin() -> asyncio.Event:
        return asyncio.Event()

    stop = loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(TIMEOUT)
    yield listener.getsockname()[1]
    loop.call_soon_threadsafe(stop.set)
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    loop.close()
    listener.close()


@pytest.mark.parametrize(("offered", "chosen"), [([V1_SUBPROTOCOL], V1_SUBPROTOCOL), (["other"], None), ([], None)])
def test_tornado_echoes_and_closes(tornado_port: int, offered: list[str], chosen: str | None) -> None:
    with Driver(tornado_port, "/ws", subprotocols=offered) as driver:
        assert driver.next() == Opened(chosen)
        for message in ("h\u00e9llo", os.urandom(200_000)):
            driver.write(driver.ws.send(message))
            assert driver.next() == Received(message)
        driver.write(driver.ws.send("close"))
        assert driver.next() == Closed(1000, "as you wish")
        assert driver.socket.recv(1) == b""


def test_tornado_closes_without_a_code(tornado_port: int) -> None:
    with Driver(tornado_port, "/ws") as driver:
        driver.next()
        driver.write(driver.ws.send("vanish"))
        assert driver.next() == Closed(1005, "")


@pytest.mark.parametrize(
    ("target", "status", "location"), [("/forbidden", 403, None), ("/none", 404, None), ("/login", 302, "/hub/login")]
)
def test_tornado_refuses_on_a_connection_that_it_keeps(
    tornado_port: int, target: str, status: int, location: str | None
) -> None:
    with Driver(tornado_port, target) as driver:
        event = driver.next()
        assert isinstance(event, Rejected)
        assert (event.status, event.headers.get("location")) == (status, location)
        assert len(event.body) == int(event.headers["content-length"])


# Codecs

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
ws_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ws_objects = st.dictionaries(st.text(), ws_values, max_size=3)
channels = st.sampled_from(["shell", "iopub", "stdin", "control"])
buffers = st.lists(st.binary(), max_size=4)
kernel_messages = st.builds(Message, channels, ws_objects, ws_objects, ws_objects, ws_objects, buffers)


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
def test_json_round_trip(sent: Message) -> None:
    data = JsonCodec().encode(sent)
    assert isinstance(data, bytes) == bool(sent.buffers)
    assert decoded(JsonCodec(), data) == sent


@given(kernel_messages)
def test_v1_round_trip(sent: Message) -> None:
    assert decoded(V1Codec(), V1Codec().encode(sent)) == sent


@given(kernel_messages)
def test_the_server_understands_json(sent: Message) -> None:
    data = JsonCodec().encode(sent)
    received = json.loads(data) if isinstance(data, str) else judge.deserialize_binary_message(data)
    assert received == as_dict(sent)


@given(kernel_messages)
def test_json_of_the_server_is_understood(sent: Message) -> None:
    values = as_dict(sent)
    assert decoded(JsonCodec(), judge.serialize_binary_message(values)) == sent
    sent.buffers.clear()
    assert decoded(JsonCodec(), json.dumps(values)) == sent


@given(kernel_messages)
def test_the_server_understands_v1(sent: Message) -> None:
    channel, parts = judge.deserialize_msg_from_ws_v1(V1Codec().encode(sent))
    assert channel == sent.channel
    assert [json.loads(part) for part in parts[:4]] == [sent.header, sent.parent_header, sent.metadata, sent.content]
    assert parts[4:] == sent.buffers


@given(kernel_messages)
def test_v1_of_the_server_is_understood(sent: Message) -> None:
    parts = [pack(part) for part in (sent.header, sent.parent_header, sent.metadata, sent.content)]
    data = judge.serialize_msg_to_ws_v1([*parts, *sent.buffers], sent.channel)
    assert decoded(V1Codec(), data) == sent
    sent.buffers.clear()
    assert decoded(V1Codec(), judge.serialize_msg_to_ws_v1(as_dict(sent), sent.channel, pack=pack)) == sent


@pytest.mark.parametrize("codec", [JsonCodec(), V1Codec()])
def test_a_lone_surrogate_survives(codec: JsonCodec | V1Codec) -> None:
    sent = any_message(content={"code": "print('\ud83d')"})
    assert decoded(codec, codec.encode(sent)) == sent


def test_null_stands_for_an_empty_object() -> None:
    text = '{"channel":"iopub","header":{"msg_id":"1"},"parent_header":null,"metadata":null,"content":null}'
    expected = Message("iopub", {"msg_id": "1"}, {}, {}, {}, [])
    assert decoded(JsonCodec(), text) == expected
    parts = [b'{"msg_id":"1"}', b"null", b"null", b"null"]
    assert decoded(V1Codec(), judge.serialize_msg_to_ws_v1(parts, "iopub")) == expected


def test_raw_surrogates_of_a_kernel_do_not_lose_the_message() -> None:
    parts = [b"{}", b"{}", b"{}", b'{"text":"a\xffb"}']
    assert decoded(V1Codec(), judge.serialize_msg_to_ws_v1(parts, "iopub")).content == {"text": "a\ufffdb"}


def json_of(**values: Any) -> str:
    return json.dumps(as_dict(any_message()) | values)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        json_of(header=None),
        json_of(header=[]),
        json_of(header="x"),
        json_of(parent_header=[]),
        json_of(metadata=0),
        json_of(content=False),
        json_of(channel=None),
        json_of(channel="hb"),
        json_of(channel=["shell"]),
        json_of(channel={}),
        "{}",
    ],
)
def test_malformed_json_is_refused(data: str) -> None:
    with pytest.raises(ProtocolError):
        decoded(JsonCodec(), data)


def v1_of(*parts: bytes, channel: str = "shell") -> bytes:
    return bytes(judge.serialize_msg_to_ws_v1(list(parts), channel))


@pytest.mark.parametrize(
    "data",
    [
        "text",
        v1_of(b"{}", b"{}", b"{}"),
        v1_of(b"null", b"{}", b"{}", b"{}"),
        v1_of(b"[]", b"{}", b"{}", b"{}"),
        v1_of(b"{}", b"[]", b"{}", b"{}"),
        v1_of(b"{}", b"{}", b"", b"{}"),
        v1_of(b"{}", b"{}", b"{}", b"{"),
        v1_of(b"{}", b"{}", b"{}", b"{}", channel="hb"),
        v1_of(b"{}", b"{}", b"{}", b"{}", channel=""),
        v1_of(b"{}", b"{}", b"{}", b"{}", channel="sh\u00e9ll"),
        v1_of(b"{}", b"{}", b"{}", b"{}").replace(b"shell", b"she\xffl"),
        v1_of(b"{}", b"{}", b"{}", b"{}") + b"x",
        v1_of(b"{}", b"{}", b"{}", b"{}")[:-1],
    ],
)
def test_malformed_v1_is_refused(data: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        decoded(V1Codec(), data)


CODECS: dict[str, Any] = {">I": JsonCodec(), "<Q": V1Codec()}
PLAIN: dict[str, bytes] = {
    word: codec.encode(any_message(buffers=[b"ab", b"", b"cd"])) for word, codec in CODECS.items()
}


@pytest.mark.parametrize("word", [">I", "<Q"])
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


@pytest.mark.parametrize("word", [">I", "<Q"])
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


@pytest.mark.parametrize("word", [">I", "<Q"])
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
    def outcome(pieces: Iterable[bytes]) -> tuple[list[Event], str]:
        client, events = opened(), []
        try:
            for piece in pieces:
                events += client.receive(piece)
            events += client.receive_eof()
        except ProtocolError as error:
            return events, str(error)
        return events, ""

    assert outcome(cut(data, sizes)) == outcome([data])


def test_the_accept_key_of_this_file_is_right() -> None:
    # The constant in answer() is the RFC's; this ties it to the nonce that the tests use.
    key = base64.b64encode(SAMPLE_NONCE) + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    assert base64.b64encode(hashlib.sha1(key).digest()) in answer()


# ======================================================================================================
# 5. Execution
# ======================================================================================================


def execution(*messages: tuple[str, str, dict[str, Any]]) -> jupyter_exec.Execution:
    made = jupyter_exec.Execution("m", {})
    for channel, msg_type, content in messages:
        made.feed(jupyter_exec.Message(channel, {"msg_type": msg_type}, {"msg_id": "m"}, {}, content, []))
    return made


REPLY = ("shell", "execute_reply", {"status": "ok", "execution_count": 3})
IDLE = ("iopub", "status", {"execution_state": "idle"})
BUSY = ("iopub", "status", {"execution_state": "busy"})


def stream(text: str, name: str = "stdout") -> tuple[str, str, dict[str, Any]]:
    return "iopub", "stream", {"name": name, "text": text}


def display(
    data: dict[str, Any], display_id: str | None = None, msg_type: str = "display_data"
) -> tuple[str, str, Any]:
    return "iopub", msg_type, {"data": data, "metadata": {}, "transient": {"display_id": display_id}}


@pytest.mark.parametrize("order", [(REPLY, IDLE), (IDLE, REPLY)])
def test_done_is_reply_and_idle_in_either_order(order: tuple[Any, Any]) -> None:
    first, second = order
    assert not execution(BUSY, first).done
    assert execution(BUSY, first, second).done


def test_reply_on_the_wrong_channel_does_not_end_a_cell() -> None:
    assert not execution(("iopub", *REPLY[1:]), IDLE).done


def test_stream_chunks_of_one_kind_are_joined_and_kinds_kept_in_order() -> None:
    outputs = execution(stream("a"), stream("b\n"), stream("e\n", "stderr"), stream("c")).result(0).outputs
    assert [(output["name"], output["text"]) for output in outputs] == [
        ("stdout", "ab\n"),
        ("stderr", "e\n"),
        ("stdout", "c"),
    ]


def test_update_display_data_changes_every_display_of_that_id() -> None:
    updated = execution(display({"text/plain": "1"}, "d"), display({"text/plain": "2"}, "d", "update_display_data"))
    assert [output["data"] for output in updated.outputs] == [{"text/plain": "2"}]


def test_clear_output_clears_at_once_or_at_the_next_output() -> None:
    now, wait = ("iopub", "clear_output", {"wait": False}), ("iopub", "clear_output", {"wait": True})
    assert execution(stream("a"), now).outputs == []
    assert [output["text"] for output in execution(stream("a"), wait).result(0).outputs] == ["a"]
    assert [output["text"] for output in execution(stream("a"), wait, stream("b")).result(0).outputs] == ["b"]


@pytest.mark.parametrize(
    "content", [{}, {"name": 5, "text": "x"}, {"name": "stdout", "text": None}, {"data": [], "metadata": None}]
)
@pytest.mark.parametrize("msg_type", ["stream", "display_data", "execute_result", "error", "status", "comm_open", "?"])
def test_malformed_content_does_no_harm(msg_type: str, content: dict[str, Any]) -> None:
    broken = execution(
        ("iopub", msg_type, content), ("iopub", msg_type, {"transient": None}), stream("ok"), REPLY, IDLE
    )
    assert broken.done
    assert "ok" in broken.result(0).text


def no_file(data: dict[str, Any]) -> None:
    return None


def plain(text: str) -> dict[str, Any]:
    return {"output_type": "execute_result", "data": {"text/plain": text}, "metadata": {}}


def printed(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


@pytest.mark.parametrize(
    ("outputs", "note", "text"),
    [
        ([printed("a\n")], "", "a\n"),
        ([printed("a"), printed("b")], "", "ab"),
        ([plain("377")], "", "377"),
        ([printed("a"), plain("1")], "", "a\n1"),
        ([printed("a\n"), plain("1")], "", "a\n1"),
        ([plain("1"), printed("a\n")], "", "1\na\n"),
        ([plain("1"), plain("2")], "", "1\n2"),
        ([printed("\x1b[31mred\x1b[0m")], "", "red"),
        ([printed("a")], "note", "a\nnote"),
        ([], "note", "note"),
    ],
)
def test_streams_are_verbatim_and_results_on_lines_of_their_own(outputs: Any, note: str, text: str) -> None:
    assert jupyter_exec.render(outputs, note, no_file) == text


def test_plain_text_beside_a_file_is_kept_unless_it_is_a_default_repr() -> None:
    table = {"output_type": "display_data", "data": {"text/html": "<table>", "text/plain": "   a\n0  1"}}
    figure = {
        "output_type": "display_data",
        "data": {"image/png": "", "text/plain": "<Figure size 640x480 with 1 Axes>"},
    }
    assert jupyter_exec.render([table], "", lambda data: "saved") == "   a\n0  1\nsaved"
    assert jupyter_exec.render([figure], "", lambda data: "saved") == "saved"


def test_results_raise_what_happened() -> None:
    failed = execution(("iopub", "error", {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mt"]}), IDLE)
    with pytest.raises(ExecutionError, match="E: v\nt"):
        failed.result(0).raise_for_error()
    died = execution(stream("a"))
    died.death = jupyter_exec.KernelExit(-9)
    with pytest.raises(KernelDied, match="SIGKILL"):
        died.result(0).raise_for_error()
    execution(REPLY, IDLE).result(0).raise_for_error()


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

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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


def test_loop_in_a_forked_child_says_so(loop: jupyter_exec.Loop, monkeypatch: pytest.MonkeyPatch) -> None:
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
        self.pipe = jupyter_exec.Pipe(loop, theirs, self.frames.append, self.closed.append)


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
    loop.post(lambda: pipe_end.pipe.send(parts))
    loop.post(lambda: pipe_end.pipe.send([b"second"]))
    read: list[list[bytes]] = []
    codec = jupyter_exec.PipeCodec()
    pipe_end.socket.settimeout(PATIENCE)
    while len(read) < 2:
        read += codec.feed(pipe_end.socket.recv(65536))
    assert read == [parts, [b"second"]]


@pytest.mark.parametrize("garbage", [b"Segmentation fault\n", b"JX\0\1\xff\xff\xff\xff"])
def test_pipe_gives_up_on_garbage(pipe_end: PipeEnd, garbage: bytes) -> None:
    pipe_end.socket.sendall(jupyter_exec.PipeCodec.encode([b"good"]) + garbage)
    eventually(lambda: pipe_end.closed, "the pipe is closed")
    assert pipe_end.frames == [[b"good"]]


def test_pipe_gives_up_on_a_reader_that_does_not_read(
    loop: jupyter_exec.Loop, pipe_end: PipeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 0.1)
    loop.post(lambda: pipe_end.pipe.send([bytes(5_000_000)]))
    eventually(lambda: pipe_end.closed, "the pipe is closed")
    assert "nothing was read" in pipe_end.closed[0]


def test_connection_files_are_private_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    path.symlink_to(tmp_path / "elsewhere")
    jupyter_exec.write_private(str(path), connection_json())
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert jupyter_exec.read_connection_file(path).key == "secret-key"


def test_connection_file_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    path.write_text(connection_json())
    path.chmod(0o644)
    with pytest.raises(ProtocolError, match=f"{path} .*chmod 600"):
        JupyterCodeExecutor(path)


@pytest.mark.parametrize("text", ["", "{}", '{"ip": "127.0.0.1"}'])
def test_attaching_by_a_broken_file_fails_clearly(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kernel.json"
    jupyter_exec.write_private(str(path), text)
    with pytest.raises(ProtocolError):
        JupyterCodeExecutor(path)
    with pytest.raises(ProtocolError, match=r"nowhere\.json: No such file"):
        JupyterCodeExecutor(tmp_path / "nowhere.json")


# ======================================================================================================
# 7. Kernel client
# ======================================================================================================


class ScriptedKernel:
    """A kernel on real ZeroMQ sockets that answers each shell request by `script(kernel, request)`."""

    def __init__(self, script: Callable[[ScriptedKernel, dict[str, Any]], None]) -> None:
        self.session = Session(key=b"key")
        self._context = zmq.Context()
        self.sockets = {name: self._context.socket(kind) for name, kind in self.KINDS.items()}
        ports: dict[str, Any] = {
            f"{name}_port": sock.bind_to_random_port("tcp://127.0.0.1") for name, sock in self.sockets.items()
        }
        self.connection = KernelConnection(ip="127.0.0.1", key="key", **ports)
        self.requests: list[dict[str, Any]] = []
        self.identity: list[bytes] = []
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
def scripted(script: Callable[[ScriptedKernel, dict[str, Any]], None]) -> Iterator[JupyterCodeExecutor]:
    kernel = ScriptedKernel(script)
    try:
        with JupyterCodeExecutor(kernel.connection) as executor:
            yield executor
    finally:
        kernel.close()


def test_a_kernel_without_iopub_welcome_gets_ready() -> None:
    with scripted(lambda kernel, request: kernel.finish(request)) as executor:
        assert executor.execute("1").status == "ok"


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


def test_hostile_messages_are_survived_and_reported(caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize(
    ("script", "exit_code", "note"),
    [(without_idle, 0, "Some of the output was lost on its way"), (without_reply, 1, "its reply was lost")],
)
def test_a_lost_idle_or_reply_ends_the_cell_all_the_same(
    script: Any, exit_code: int, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "FENCE_DELAY", 0.1)
    with scripted(script) as executor:
        result = executor.execute("1", timeout=PATIENCE)
    assert result.exit_code == exit_code
    assert result.text.startswith("all\n")
    assert note in result.note


def test_what_a_kernel_had_sent_is_read_after_the_news_of_its_death() -> None:
    def dying(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
        mailboxes[0].put(jupyter_exec.KernelExit(cause="killed"))
        kernel.publish("stream", {"name": "stdout", "text": "last words"}, request)

    mailboxes: list[Any] = []
    with scripted(dying) as executor:
        mailboxes.append(executor._kernel._mailbox)
        result = executor.execute("1", timeout=PATIENCE)
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


def test_an_attached_kernel_that_ignores_the_interrupt_is_said_to_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.2)
    with scripted(lambda kernel, request: None) as executor:
        result = executor.execute("1", timeout=0.2)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "busy")
    assert "the kernel is still running the code" in result.note


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


# ======================================================================================================
# 8. Kernel host
# ======================================================================================================

ENVIRONMENTS: list[dict[str, str | None]] = [
    {},
    {"JUPYTER_PATH": "/a:/b"},
    {"JUPYTER_DATA_DIR": "/data"},
    {"XDG_DATA_HOME": "/xdg"},
    {"JUPYTER_PREFER_ENV_PATH": "1"},
    {"JUPYTER_PREFER_ENV_PATH": "0"},
    {"JUPYTER_PREFER_ENV_PATH": "no", "JUPYTER_PATH": "/a"},
    {"HOME": tempfile.gettempdir()},
]


@pytest.mark.parametrize("changes", ENVIRONMENTS, ids=str)
def test_kernelspec_directories_are_those_of_jupyter(changes: dict[str, str]) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTER")} | changes
    program = """
        import os, jupyter_exec
        from jupyter_client.kernelspec import KernelSpecManager
        judge = KernelSpecManager().kernel_dirs
        ours = jupyter_exec.kernel_dirs(os.environ)
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


def add_spec(kernels: Path, name: str, **spec: Any) -> None:
    (kernels / name).mkdir()
    (kernels / name / "kernel.json").write_text(json.dumps(spec))


IPYKERNEL = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def test_kernelspecs_are_found_as_jupyter_finds_them(kernels_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_spec(kernels_dir, "Mine", argv=IPYKERNEL, display_name="Mine", language="python")
    add_spec(kernels_dir, "python3", argv=IPYKERNEL, display_name="Own Python", language="python")
    add_spec(kernels_dir, "broken", argv="no list")
    (kernels_dir / "not a kernel").mkdir()
    monkeypatch.setenv("JUPYTER_PATH", str(kernels_dir.parent))
    judge = KernelSpecManager().find_kernel_specs()
    with LocalJupyterServer() as server:
        ours = {name: spec["resource_dir"] for name, spec in server.kernelspecs().items()}
    assert ours == {name: path for name, path in judge.items() if name != "broken"}


def test_kernelspec_argv_env_and_name(kernels_dir: Path) -> None:
    argv = [
        "python",
        "-c",
        "import sys; sys.argv[1:] = sys.argv[3:]; from ipykernel_launcher import app",
        "{resource_dir}",
        "{x}",
    ]
    argv = [*IPYKERNEL, "{resource_dir}|{prefix}|{unknown}"]
    add_spec(kernels_dir, "mine", argv=argv, display_name="m", language="python", env={"A": "${B}-x", "C": "$$"})
    environment = {"JUPYTER_PATH": str(kernels_dir.parent), "B": "b"}
    with LocalJupyterServer(env=environment) as server, JupyterCodeExecutor(server, "MINE") as executor:
        assert run(executor, "import os, sys; print(os.environ['A'], os.environ['C'], sys.executable)").output == (
            f"b-x $ {sys.executable}\n"
        )
        assert run(executor, "print(sys.argv[-3])").output == f"{kernels_dir}/mine|{sys.prefix}|{{unknown}}\n"


def test_interrupt_mode_message(kernels_dir: Path) -> None:
    add_spec(kernels_dir, "m", argv=IPYKERNEL, display_name="m", language="python", interrupt_mode="message")
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with JupyterCodeExecutor(server, "m") as executor:
            assert run(executor, "x = 1").exit_code == 0
            result = executor.execute("while True: pass", timeout=0.5)
            assert (result.status, result.kernel_state) == ("timeout", "intact")
            assert run(executor, "x").output == "1"


def test_kernels_are_lean_and_history_works_all_the_same(executor: JupyterCodeExecutor) -> None:
    run(executor, "a = 1", "a + 1")
    assert run(executor, "In[2], Out[2], _").output == "('a + 1', 2, 2)"
    assert run(executor, "%history").output.startswith("a = 1\na + 1\n")
    assert run(executor, "get_ipython().history_manager.enabled").output == "False"


def test_ipythons_defaults_are_a_keyword_away() -> None:
    with LocalJupyterServer(ipython_defaults=True) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "get_ipython().history_manager.enabled").output == "True"


TCP_KERNEL = ["python", "{resource_dir}/start.py", "{connection_file}"]


def test_kernels_that_may_not_know_ipc_get_tcp_ports(kernels_dir: Path) -> None:
    add_spec(kernels_dir, "tcp", argv=TCP_KERNEL, display_name="t", language="python")
    start = "import sys; from ipykernel import kernelapp; kernelapp.launch_new_instance(['-f', sys.argv[1]])"
    (kernels_dir / "tcp" / "start.py").write_text(start)
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with JupyterCodeExecutor(server, "tcp") as executor:
            assert json.loads(Path(executor.connection_file or "").read_text())["transport"] == "tcp"
            assert run(executor, "1 + 1").output == "2"


def test_a_tcp_kernel_whose_port_was_taken_is_launched_again(kernels_dir: Path, tmp_path: Path) -> None:
    add_spec(kernels_dir, "tcp", argv=TCP_KERNEL, display_name="t", language="python")
    (kernels_dir / "tcp" / "start.py").write_text(f"""
import pathlib, sys
mark = pathlib.Path({str(tmp_path / "mark")!r})
if not mark.exists():
    mark.touch()
    sys.exit("zmq.error.ZMQError: Address already in use")
from ipykernel import kernelapp
kernelapp.launch_new_instance(["-f", sys.argv[1]])
""")
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with JupyterCodeExecutor(server, "tcp") as executor:
            assert run(executor, "1 + 1").output == "2"


def test_a_kernel_that_dies_at_start_is_reported_with_its_stderr(kernels_dir: Path) -> None:
    argv = ["python", "-c", "import sys; sys.exit(' '.join(['no', 'licence', 'found']))"]
    add_spec(kernels_dir, "bad", argv=argv, display_name="b", language="python")
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        executor = JupyterCodeExecutor(server, "bad")
        result = run(executor, "1")
        assert (result.exit_code, result.kernel_state) == (1, "lost")
        assert "no licence found" in result.output
        assert "exit code 1" in result.output
        with pytest.raises(KernelStartFailed, match="no licence found"):
            executor.execute("1")
        with JupyterCodeExecutor(server) as other:
            assert run(other, "1").output == "1"


def test_a_kernelspec_with_a_missing_program_is_reported(kernels_dir: Path) -> None:
    add_spec(kernels_dir, "gone", argv=["/no/such/program"], display_name="g", language="python")
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with pytest.raises(KernelStartFailed, match="No such file or directory: /no/such/program"):
            JupyterCodeExecutor(server, "gone")


def test_a_kernelspec_that_wants_a_provisioner_is_refused(kernels_dir: Path) -> None:
    metadata = {"kernel_provisioner": {"provisioner_name": "yarn"}}
    add_spec(kernels_dir, "yarn", argv=["python"], display_name="y", language="python", metadata=metadata)
    with LocalJupyterServer(env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with pytest.raises(KernelStartFailed, match="provisioner"):
            JupyterCodeExecutor(server, "yarn")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without ipykernel and pyzmq."""
    path = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    return str(path / "bin" / "python")


def test_a_python_without_ipykernel_says_what_to_install(bare_python: str, tmp_path: Path) -> None:
    with LocalJupyterServer(python=bare_python) as server:
        with pytest.raises(ValueError, match="Kernel python3 is not installed") as caught:
            JupyterCodeExecutor(server)
        assert f"{bare_python} -m pip install ipykernel" in str(caught.value)


def test_a_host_without_pyzmq_says_what_to_install(bare_python: str, tmp_path: Path) -> None:
    (tmp_path / "ipykernel.py").touch()
    with CommandJupyterServer([bare_python], env={"PYTHONPATH": str(tmp_path)}) as server:
        with pytest.raises(KernelStartFailed, match=f"pyzmq.*{bare_python} -m pip install pyzmq"):
            JupyterCodeExecutor(server)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/no/such/python"], "No such file or directory: /no/such/python"),
        (["true"], "no Python answered"),
        (["sh", "-c", "echo welcome; echo trouble >&2; exit 3"], "welcome.*exit code 3.*trouble"),
    ],
)
def test_a_command_that_is_no_python_is_reported(argv: list[str], says: str) -> None:
    with CommandJupyterServer(argv) as server, pytest.raises(KernelStartFailed) as caught:
        JupyterCodeExecutor(server)
    assert re.search(says, str(caught.value), re.DOTALL)


def test_a_python_that_is_too_old_is_reported(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 8)\nexec(sys.argv[2])\n")
    fake.chmod(0o755)
    with LocalJupyterServer(python=fake) as server, pytest.raises(KernelStartFailed, match=r"3\.8 is too old"):
        JupyterCodeExecutor(server)


def test_noise_before_the_greeting_does_not_confuse() -> None:
    with CommandJupyterServer(["sh", "-c", 'echo "Welcome to the machine"; exec "$0" "$@"', sys.executable]) as server:
        assert "python3" in server.kernelspecs()


def test_a_host_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "START_TIMEOUT", 0.3)
    monkeypatch.setattr(jupyter_exec, "SHUTDOWN_GRACE", 0.1)
    with (
        CommandJupyterServer(["sh", "-c", "exec sleep 30"]) as server,
        pytest.raises(KernelStartFailed, match=r"no answer within 0\.3 s"),
    ):
        server.kernelspecs()


def test_a_stopped_host_is_given_up_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
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


CLIENT = """
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


@pytest.mark.parametrize("how", ["direct", "relay"])
@pytest.mark.parametrize("code", ["1", "import time; time.sleep(100)", "while True: print('x' * 1000)"])
def test_nothing_outlives_a_killed_client(tmp_path: Path, how: str, code: str) -> None:
    marker = f"mark-{time.time_ns()}"
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), marker, how, code]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        assert len(marked_processes(f"MARK={marker}")) >= 4
        client.kill()
    eventually(lambda: not marked_processes(f"MARK={marker}"), "every process is gone")
    eventually(lambda: not list(tmp_path.iterdir()), "every file is gone")


@pytest.mark.parametrize("preload", ["[]", "None"])
def test_nothing_outlives_a_client_and_a_host_that_are_killed_at_once(tmp_path: Path, preload: str) -> None:
    marker = f"mark-{time.time_ns()}"
    program = f"""
        import sys, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(preload={preload}, env={{"MARK": sys.argv[1]}})
        code = "import ctypes; print(1, flush=True); ctypes.PyDLL(None).sleep(100)"  # no thread of it runs
        jupyter_exec.JupyterCodeExecutor(server).execute(code, on_output=lambda output: print("ready", flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), marker]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(signal.SIGSTOP)  # it does not see what happens
        os.kill(min(marked_processes(f"MARK={marker}")), signal.SIGKILL)
        client.kill()
    eventually(lambda: not marked_processes(f"MARK={marker}"), "every process is gone")


@pytest.mark.parametrize("fork", ["os.fork()", "ctypes.PyDLL(None).fork()"])  # the second runs no hooks of Python
def test_a_forked_child_of_the_client_does_not_keep_the_kernels(tmp_path: Path, fork: str) -> None:
    marker = f"mark-{time.time_ns()}"
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
    command = [sys.executable, "-c", textwrap.dedent(program), marker, fork]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        client.kill()
        eventually(lambda: not marked_processes(f"MARK={marker}"), "every kernel is gone")
        os.killpg(client.pid, signal.SIGKILL)


def test_children_that_left_the_session_die_with_their_kernel(server: LocalJupyterServer, tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); p.pid"
    with JupyterCodeExecutor(server) as one, JupyterCodeExecutor(server) as two:
        first, second = int(run(one, code).output), int(run(two, code).output)
        one.stop()
        eventually(lambda: first not in descendants(os.getpid()), "the child of the stopped kernel is gone")
        assert second in descendants(os.getpid())
    eventually(lambda: second not in descendants(os.getpid()), "the other one too")


# What a kernel is by, told by a cell: all of it is to be the same however the kernel came to be.
FACTS = r"""
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
"""


def facts(preload: list[str] | None) -> Any:
    with (
        LocalJupyterServer(preload=preload, cwd=tempfile.gettempdir()) as server,
        JupyterCodeExecutor(server) as executor,
    ):
        return json.loads(run(executor, FACTS).output)


def test_a_forked_kernel_is_like_a_launched_one() -> None:
    forked, launched = facts([]), facts(None)
    assert launched.pop("debugpy") != "absent"
    assert forked.pop("debugpy") == "absent"
    assert forked == launched


def is_forked(executor: JupyterCodeExecutor) -> bool:
    return "ipykernel-fork-server" in run(executor, "open('/proc/self/cmdline').read()").output


def test_kernels_are_forked_unless_told_otherwise(kernels_dir: Path) -> None:
    add_spec(kernels_dir, "own", argv=IPYKERNEL, display_name="o", language="python", env={"PYTHONOPTIMIZE": "1"})
    with LocalJupyterServer(preload=[], env={"JUPYTER_PATH": str(kernels_dir.parent)}) as server:
        with JupyterCodeExecutor(server) as forked, JupyterCodeExecutor(server, "own") as own:
            assert is_forked(forked)
            assert not is_forked(own)
            assert run(own, "import sys; sys.flags.optimize").output == "1"
    with LocalJupyterServer(preload=None) as server, JupyterCodeExecutor(server) as launched:
        assert not is_forked(launched)
    for wrong in ("numpy", b"numpy", 5, [None], (name for name in ["numpy"])):
        with pytest.raises(ValueError, match="preload must be a list"):
            LocalJupyterServer(preload=wrong)  # type: ignore[arg-type]


OWN = """
import os, random, sys, uuid
was_there = "numpy" in sys.modules
import numpy
a = numpy.random.rand(300, 300)
inverse = numpy.linalg.inv(a) @ a
print(was_there, bool(abs(inverse - numpy.eye(300)).max() < 1e-6))
print(random.random(), numpy.random.random(), uuid.uuid4(), os.getpid(), id(a), os.environ.get("LEFT"))
os.environ["LEFT"] = "behind"; os.chdir("/"); sys.path.append("/left"); numpy.left = random.left = 1
"""


def test_forked_kernels_share_nothing_and_blas_works() -> None:
    with LocalJupyterServer(preload=["numpy"]) as server, contextlib.ExitStack() as stack:
        executors = [stack.enter_context(JupyterCodeExecutor(server)) for _ in range(3)]
        first, second = (run(executor, OWN).output.splitlines() for executor in executors[:2])
        assert first[0] == second[0] == "True True"
        assert first[1].split()[-1] == second[1].split()[-1] == "None"
        assert not set(first[1].split()[:4]) & set(second[1].split()[:4])
        left = "import os, sys, random, numpy; hasattr(random, 'left'), hasattr(numpy, 'left'), '/left' in sys.path, os.getcwd()"
        assert run(executors[2], left).output == str((False, False, False, os.getcwd()))


def test_debugpy_can_be_imported_in_a_lean_kernel() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import debugpy; debugpy.__name__").output == "'debugpy'"
        assert "debugger" not in executor._kernel.kernel_info["supported_features"]


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
    assert server._process
    (found,) = (pid for pid in descendants(server._process.pid) if is_fork_server(pid))
    return found


def is_fork_server(pid: int) -> bool:
    """Whether this is a fork server; its kernels have the same command line but another mark."""
    return "/fork-server" in Path(f"/proc/{pid}/environ").read_text()


def test_kernels_survive_their_fork_server_and_the_next_has_a_new_one() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as one:
        run(one, "x = 1")
        first = fork_server_of(server)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: first not in descendants(os.getpid()), "the fork server is gone")
        assert run(one, "x").output == "1"
        with JupyterCodeExecutor(server) as two:
            assert is_forked(two)
            assert fork_server_of(server) != first
        assert run(one, "x").output == "1"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nonesuch", "preload: preloaded cannot be imported. ModuleNotFoundError: No module named 'nonesuch'"),
        ("import os; os._exit(3)", "ended at its preload (it ended by itself with exit code 3)"),
        ("import os; os.kill(os.getpid(), 11)", "ended at its preload (killed by signal 11, SIGSEGV)"),
        ("import threading; threading.Thread(target=input, name='watcher').start()", "watcher"),
    ],
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


def test_preload_finds_modules_of_the_working_directory_and_pictures_come_inline(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 5")
    with LocalJupyterServer(preload=["mine", "matplotlib.pyplot"], cwd=tmp_path) as server:
        with JupyterCodeExecutor(server, output_dir=tmp_path) as executor:
            assert (
                run(executor, "import sys; 'mine' in sys.modules, [p for p in sys.path if p[-1:] == '/']").output
                == "(True, [])"
            )
            result = run(executor, "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()")
            assert [Path(path).suffix for path in result.output_files] == [".png"]


@pytest.mark.parametrize("preload", [[], ["typing_extensions"]])
def test_a_restarted_kernel_sees_what_was_installed(bare_python: str, tmp_path: Path, preload: list[str]) -> None:
    # The environment has all that a kernel needs by a .pth file, and a package that "an install" makes newer.
    site = Path(run_bare(bare_python, "import site; print(site.getsitepackages()[0])"))
    shared = Path(pytest.__file__).parents[1]
    (site / "shared.pth").write_text(str(shared))
    (site / "typing_extensions.py").write_text(f"exec(open({str(shared / 'typing_extensions.py')!r}).read()); new = 1")
    try:
        with LocalJupyterServer(python=bare_python, preload=preload) as server, JupyterCodeExecutor(server) as executor:
            assert is_forked(executor)
            (site / "fresh.py").write_text("")
            (site / "typing_extensions.py").unlink()
            executor.restart()
            assert run(executor, "import fresh, typing_extensions; hasattr(typing_extensions, 'new')").output == "False"
            assert is_forked(executor)
    finally:
        for path in site.glob("*.p*"):
            path.unlink()


def test_a_restarted_kernel_sees_an_edited_module_that_was_preloaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1")
    with LocalJupyterServer(preload=["mine"], cwd=tmp_path) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import mine; mine.x").output == "1"
        (tmp_path / "mine.py").write_text("x = 'edited'")
        executor.restart()
        assert run(executor, "import mine; mine.x").output == "'edited'"


def test_a_fork_server_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as one:
        run(one, "x = 1")
        os.kill(fork_server_of(server), signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(jupyter_exec, "START_TIMEOUT", jupyter_exec.FORK_TIMEOUT + 0.5)
            with JupyterCodeExecutor(server) as two:
                assert "no answer within 2.5 s" in run(two, "1").output
        with JupyterCodeExecutor(server) as three:
            assert run(three, "1").output == "1"
        assert run(one, "x").output == "1"


def test_commands_of_a_cell_are_those_of_the_kernels_environment(bare_python: str) -> None:
    site = Path(run_bare(bare_python, "import site; print(site.getsitepackages()[0])"))
    (site / "shared.pth").write_text(str(Path(pytest.__file__).parents[1]))
    try:
        with LocalJupyterServer(python=bare_python) as server, JupyterCodeExecutor(server) as executor:
            assert run(executor, "!command -v python").output.split() == [bare_python]
    finally:
        (site / "shared.pth").unlink()


def run_bare(python: str, program: str) -> str:
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_python_that_cannot_fork_kernels_launches_them(tmp_path: Path) -> None:
    wrapper = tmp_path / "python3"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    spec = tmp_path / "kernels" / "wrapped"
    spec.mkdir(parents=True)
    argv = [str(wrapper), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "w", "language": "python"}))
    with LocalJupyterServer(preload=[], env={"JUPYTER_PATH": str(tmp_path)}) as server:
        with JupyterCodeExecutor(server, "wrapped") as executor:
            assert not is_forked(executor)


def test_kernels_ordered_from_a_dying_fork_server_start_all_the_same() -> None:
    with LocalJupyterServer(preload=[]) as server, JupyterCodeExecutor(server) as first:
        for _ in range(4):
            run(first, "1")
            os.kill(fork_server_of(server), signal.SIGKILL)
            with JupyterCodeExecutor(server) as second, JupyterCodeExecutor(server) as third:
                assert run(second, "1").output == run(third, "1").output == "1"
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
        host = server._process
        assert host
        eventually(lambda: len(descendants(host.pid)) == 2, "only the fork server and one kernel")


def test_what_left_the_session_without_exec_dies_with_its_kernel(executor: JupyterCodeExecutor) -> None:
    code = "import os, time, warnings\nwarnings.simplefilter('ignore')\nr, w = os.pipe()\nif not os.fork():\n    os.setsid()\n"
    code += "    os.write(w, str(os.getpid()).encode())\n    time.sleep(1000)\n    os._exit(0)\nprint(os.read(r, 9).decode())"
    child = int(run(executor, code).output)
    assert child in descendants(os.getpid())
    executor.stop()
    eventually(lambda: child not in descendants(os.getpid()), "the forked child is gone")


# ======================================================================================================
# 9. Servers
# ======================================================================================================


def test_many_executors_on_one_server_from_many_threads(server: LocalJupyterServer) -> None:
    outputs: dict[int, str] = {}

    def work(number: int) -> None:
        with JupyterCodeExecutor(server) as executor:
            run(executor, f"x = {number}")
            outputs[number] = run(executor, "print(x)").output

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: f"{number}\n" for number in range(4)}


def test_a_server_works_without_with_and_starts_on_first_use() -> None:
    before = descendants(os.getpid())
    server = LocalJupyterServer()
    assert descendants(os.getpid()) == before
    executor = JupyterCodeExecutor(server)
    assert run(executor, "1").output == "1"
    server.stop()
    server.stop()
    with pytest.raises(ConnectionClosed, match="stopped"):
        server.start_kernel()


def test_stopping_the_server_is_told_in_the_result() -> None:
    server = LocalJupyterServer()
    executor = JupyterCodeExecutor(server)
    run(executor, "1")
    server.stop()
    result = run(executor, "1")
    assert result.exit_code != 0
    assert "the server was stopped" in result.output
    executor.stop()


def test_python_cwd_and_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    add_spec(kernels_dir, "python3", argv=["/no/such/program"], display_name="p", language="python")
    environment = {"JUPYTER_PATH": str(kernels_dir.parent)}
    with LocalJupyterServer(python=sys.executable, env=environment) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "1").output == "1"
    with LocalJupyterServer(env=environment) as server, pytest.raises(KernelStartFailed, match="/no/such/program"):
        JupyterCodeExecutor(server)


def test_a_missing_working_directory_is_refused() -> None:
    with pytest.raises(ValueError, match="Working directory /no/such/directory does not exist"):
        LocalJupyterServer(cwd="/no/such/directory")


def test_a_long_tmpdir_does_not_break_socket_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "1").output == "1"


def test_a_kernel_reached_only_through_the_pipe(tmp_path: Path) -> None:
    with CommandJupyterServer([sys.executable]) as server, JupyterCodeExecutor(server, max_output=None) as executor:
        assert run(executor, "x = 6", "x * 7").output == "\n42"
        assert executor.connection_file is None
        assert len(run(executor, "print('x' * 20_000_000)").output) == 20_000_001
        result = executor.execute("while True: print('y' * 1000)", timeout=0.5)
        assert (result.status, result.kernel_state) == ("timeout", "intact")
        assert run(executor, "x").output == "6"
        assert run(
            executor, "import os, time; print('last words', flush=True); time.sleep(0.5); os._exit(3)"
        ).output.startswith("last words\n")
        assert run(executor, "'x' in dir()").output == "False"


def test_a_killed_host_is_reported_and_replaced() -> None:
    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
        result = run(executor, "import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)")
        assert (result.exit_code, result.kernel_state) == (137, "lost")
        assert "SIGKILL" in result.output
        assert run(executor, "1").output == "1"


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
    assert run(executor, "shared").output == "5"


def test_jupyter_client_attaches_by_our_connection_file(executor: JupyterCodeExecutor) -> None:
    run(executor, "shared = 5")
    program = """
        import sys
        from jupyter_client.blocking import BlockingKernelClient
        client = BlockingKernelClient(connection_file=sys.argv[1])
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=20)
        client.execute_interactive("print(shared)", timeout=20)
    """
    assert run_python(program, executor.connection_file or "").stdout == "5\n"


GREETING = """
import json, os, re, sys, types
nonce = re.search("[0-9a-f]{32}", sys.argv[-1])[0]
os.write(1, ("%s %d %d 00\\n" % (nonce, *sys.version_info[:2])).encode())  # no bytecode in common
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
"""


@contextlib.contextmanager
def scripted_host(tmp_path: Path, script: str) -> Iterator[CommandJupyterServer]:
    """A host on a real pipe that greets properly and then does what `script` says."""
    (tmp_path / "host.py").write_text(GREETING + textwrap.dedent(script))
    with CommandJupyterServer([sys.executable, str(tmp_path / "host.py")]) as server:
        yield server


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("os.write(1, b'Segmentation fault')", "something that is not a frame"),
        ("os.write(1, b'JX\\0\\1\\xff\\xff\\xff\\xff'); read(10**9)", "over the limit"),
        ("os.write(1, frame([b'', b'{'])); read(10**9)", "not JSON"),
        ("os.write(1, frame([b'', b'[]'])); read(10**9)", "not a JSON object"),
        ("sys.exit('last words')", "last words"),
    ],
)
def test_a_host_that_sends_garbage_is_given_up(tmp_path: Path, script: str, says: str) -> None:
    with scripted_host(tmp_path, script) as server, pytest.raises(ConnectionClosed, match=says):
        server.kernelspecs()


LYING_HOST = r"""
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
"""


def test_a_host_that_lies_is_survived(tmp_path: Path) -> None:
    with scripted_host(tmp_path, LYING_HOST) as server:
        with pytest.raises(KernelStartFailed, match="lies"):
            server.kernelspecs()
        client = server.start_kernel()
        with pytest.raises(KernelStartFailed, match="no answer within"):
            client.wait_ready(jupyter_exec.Deadline(0.3))
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
    return DockerJupyterServer(**{"network": "none", **options, "labels": {RUN: ""} | options.get("labels", {})})


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


HARDENED = r"""
import os, socket
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
print(os.getuid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"])
print([name for _, name in socket.if_nameindex()], os.getcwd(), os.access(".", os.W_OK), os.environ["USER"])
print(open("/proc/1/comm").read().strip(), [name for name in os.environ if "TOKEN" in name])
"""


def test_docker_kernels_share_one_hardened_container(boxed: JupyterCodeExecutor, containers: Any) -> None:
    assert run(boxed, HARDENED).output == "1000 0 0 1\n['lo'] /workspace True jupyter\ndocker-init []\n"
    with JupyterCodeExecutor(boxed._server) as second:
        run(boxed, "x = 1")
        assert run(second, "'x' in dir()").output == "False"
    (container,) = containers()
    config = container.attrs["HostConfig"]
    assert container.attrs["Config"]["StdinOnce"]
    assert (config["PidsLimit"], config["LogConfig"]["Type"], config["PortBindings"] or None) == (512, "none", None)
    assert container.attrs["Mounts"] == []
    assert boxed.connection_file is None


def test_docker_pictures_come_out_of_the_box(boxed: JupyterCodeExecutor) -> None:
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    code = f"from IPython.display import Image\nimport base64\nImage(base64.b64decode('{png}'), format='png')"
    (path,) = run(boxed, code).output_files
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_code_in_a_container_cannot_reach_the_pipe_of_its_host(boxed: JupyterCodeExecutor) -> None:
    assert "PermissionError" in run(boxed, "import os; os.listdir(f'/proc/{os.getppid()}/fd')").output


def test_docker_timeout_and_death(boxed: JupyterCodeExecutor) -> None:
    run(boxed, "x = 5")
    assert boxed.execute("while True: print('y' * 1000)", timeout=0.5).kernel_state == "intact"
    assert boxed.execute("import subprocess; subprocess.run(['sleep', '60'])", timeout=0.5).kernel_state == "intact"
    assert run(boxed, "x").output == "5"
    result = run(boxed, "import os; os.kill(os.getpid(), 11)")
    assert (result.exit_code, result.kernel_state) == (139, "lost")
    assert run(boxed, "'x' in dir()").output == "False"


def test_out_of_memory_is_reported_with_the_limit(containers: Any) -> None:
    with docker_server(mem_limit="300m", memswap_limit="300m") as server, JupyterCodeExecutor(server) as executor:
        with JupyterCodeExecutor(server) as bystander:
            run(bystander, "y = 7")
            result = run(executor, "x = bytearray(10**9)")
            assert (result.exit_code, result.kernel_state) == (137, "lost")
            assert "out of memory (limit 300 MB)" in result.output
            assert run(executor, "1").output == "1"
            assert run(bystander, "y").output == "7"


def test_a_container_killed_from_outside_is_reported_and_replaced(boxed: JupyterCodeExecutor, containers: Any) -> None:
    result = boxed.execute(
        "print('go', flush=True)\nwhile True: pass", on_output=lambda output: containers()[0].kill(), timeout=PATIENCE
    )
    assert (result.status, result.kernel_state) == ("died", "lost")
    assert "the container has ended (killed" in result.note
    assert run(boxed, "1").output == "1"


def test_the_container_of_a_killed_client_is_gone(containers: Any) -> None:
    program = """
        import sys, time, jupyter_exec
        executor = jupyter_exec.JupyterCodeExecutor(jupyter_exec.DockerJupyterServer(base_image=sys.argv[1] or None, labels={sys.argv[2]: ""}))
        assert executor.execute("1").status == "ok"
        print("ready", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), os.environ.get("BASE_IMAGE", ""), RUN]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        assert len(containers()) == 1
        client.kill()
    eventually(lambda: not containers(), "the container is gone")


def test_a_container_that_is_to_stay_is_stopped_only(engine: Any, containers: Any) -> None:
    with docker_server(auto_remove=False, container_name=f"{RUN}-stays") as server:
        server.kernelspecs()
    container = engine.containers.get(f"{RUN}-stays")
    assert container.status == "exited"
    container.remove()


def test_docker_name_taken(containers: Any) -> None:
    with docker_server(container_name=f"{RUN}-name") as server:
        server.kernelspecs()
        with docker_server(container_name=f"{RUN}-name") as other:
            with pytest.raises(SandboxError, match="already in use"):
                JupyterCodeExecutor(other)
        assert "python3" in server.kernelspecs()


@pytest.mark.slow
def test_docker_environment_network_and_packages(
    engine: Any, containers: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with docker_server(packages=["six"], docker_env={"GREETING": "hello"}, network="bridge") as server:
        with JupyterCodeExecutor(server) as executor:
            built = server._image_name
            code = "import os, six, socket\nprint(os.environ['GREETING'], len(socket.if_nameindex()))"
            assert run(executor, code).output == "hello 2\n"
    engine.images.remove(built)
    progress = capfd.readouterr().err
    assert f"building the image {built}" in progress
    assert "Step 1/" in progress


def test_bind_dir_is_the_working_directory_with_the_owners_uid(containers: Any, tmp_path: Path) -> None:
    os.chown(tmp_path, 4321, 4321)
    os.chmod(tmp_path.parent, 0o755)
    mode = tmp_path.stat().st_mode
    with docker_server(bind_dir=tmp_path, work_dir="/data") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; open('made', 'w').close(); print(os.getcwd())").output == "/data\n"
    assert (tmp_path / "made").stat().st_uid == 4321
    assert tmp_path.stat().st_mode == mode


def test_docker_work_dir_that_is_not_in_the_image_is_writable(containers: Any) -> None:
    with docker_server(work_dir="/elsewhere/deep") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; open('made', 'w').close(); print(os.getcwd())").output == "/elsewhere/deep\n"


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


def test_docker_through_tcp(containers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.settimeout(1)
        need("docker", probe.connect_ex(("127.0.0.1", 2375)) == 0)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:2375")
    with docker_server() as server, JupyterCodeExecutor(server, max_output=None) as executor:
        assert run(executor, "x = 1", "x").output == "\n1"
        assert len(run(executor, "print('x' * 5_000_000)").output) == 5_000_001


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


def test_custom_image_with_a_noisy_entrypoint_of_root(containers: Any, image: Callable[[str], str]) -> None:
    entrypoint = r'ENTRYPOINT ["sh", "-c", "echo Welcome; echo noise >&2; exec \"$@\"", "entry"]'
    name = image(f'FROM BUNDLED\nUSER root\n{entrypoint}\nCMD ["never", "run"]\n')
    with docker_server(custom_image_name=name) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; print(os.getuid())").output == "1000\n"


OLD_PYTHON = r"""FROM BASE
RUN printf 'import sys; sys.version_info = (3, 8); exec(sys.argv[1])' >/old.py
ENTRYPOINT ["sh", "-c", "shift 2; exec /usr/bin/python3 /old.py \"$1\"", "x"]
"""


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("FROM scratch\nLABEL a=b", "python3"),
        ('FROM BASE\nENTRYPOINT ["sh", "-c", "echo trouble >&2; exit 3"]', "exit code 3.*trouble"),
        ("FROM BASE", "-m pip install ipykernel"),
        (OLD_PYTHON, r"Python 3\.8 is too old"),
    ],
    ids=["no Python", "ends at once", "no ipykernel", "old Python"],
)
def test_unfit_images_are_reported(containers: Any, image: Callable[[str], str], dockerfile: str, says: str) -> None:
    with docker_server(custom_image_name=image(dockerfile)) as server:
        with pytest.raises(JupyterExecError) as caught:
            JupyterCodeExecutor(server)
    assert re.search(says, str(caught.value), re.DOTALL)


def test_missing_custom_image_is_reported(containers: Any) -> None:
    with docker_server(custom_image_name="no/such:image") as server, pytest.raises(SandboxError) as caught:
        JupyterCodeExecutor(server)
    assert "Custom image no/such:image does not exist" in str(caught.value)


@pytest.mark.slow
def test_a_failing_build_is_reported_with_its_end(containers: Any) -> None:
    with docker_server(packages=["no-such-package-at-all-1234"]) as server, pytest.raises(SandboxError) as caught:
        JupyterCodeExecutor(server)
    assert "could not be built" in str(caught.value)
    assert "no-such-package-at-all-1234" in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # docker-py leaves a socket to gc
def test_docker_not_running_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(SandboxError, match="Docker is not running: start it, or use LocalJupyterServer"):
        JupyterCodeExecutor(DockerJupyterServer())


def test_no_permission_for_docker_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import docker

    def refuse(**options: Any) -> None:
        raise docker.errors.DockerException("Error while fetching server API version: [Errno 13] Permission denied")

    monkeypatch.setattr(docker, "from_env", refuse)
    with pytest.raises(SandboxError, match="No permission to use Docker: add yourself to the group docker"):
        JupyterCodeExecutor(DockerJupyterServer())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"command": "x"}, "custom_image_name"),
        ({"name": "x"}, "container_name"),
        ({"log_config": {}}, "stdout of the container"),
        ({"network": "none", "network_mode": "host"}, "not both"),
        ({"custom_image_name": "x", "packages": ["six"]}, "bundled image"),
        ({"packages": "six"}, "list of strings"),
    ],
)
def test_docker_keywords_that_do_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DockerJupyterServer(**options)


def test_docker_kwargs_are_merged_with_ours(containers: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "labels": {"mine": "1"},
        "security_opt": ["label=disable"],
        "environment": ["B=2"],
        "volumes": [f"{tmp_path}:/mine:ro"],
        "pids_limit": 77,
        "nano_cpus": 10**9,
    }
    with docker_server(docker_env={"A": "1"}, bind_dir=tmp_path, **options) as server:
        server.kernelspecs()
        (container,) = containers()
        attrs = container.attrs
        assert attrs["Config"]["Labels"].items() >= {"mine": "1", "jupyter_exec": jupyter_exec.__version__}.items()
        assert attrs["HostConfig"]["SecurityOpt"] == ["no-new-privileges", "label=disable"]
        assert {"A=1", "B=2"} <= set(attrs["Config"]["Env"])
        assert {mount["Destination"] for mount in attrs["Mounts"]} == {"/mine", "/workspace"}
        assert (attrs["HostConfig"]["PidsLimit"], attrs["HostConfig"]["NanoCpus"]) == (77, 10**9)


def test_an_unknown_docker_keyword_is_named(containers: Any) -> None:
    with docker_server(memory_limit="1g") as server, pytest.raises(TypeError, match="memory_limit"):
        JupyterCodeExecutor(server)


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
    port, token, log = free_port(), "s3cret-t0ken", tmp_path / "peer.log"
    app = "ServerApp" if options[0] == "server" else "KernelGatewayApp"
    app = "EnterpriseGatewayApp" if options[0] == "enterprisegateway" else app
    command = [python, "-m", "jupyter", *options, f"--{app}.port={port}", f"--{app}.ip=127.0.0.1"]
    environment = os.environ | {"KG_AUTH_TOKEN": token, "JUPYTER_TOKEN": token, "EG_AUTH_TOKEN": token}
    environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path)
    connection = JupyterConnectionInfo("127.0.0.1", info.pop("use_https", False), port, token, **info)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=tmp_path, start_new_session=True
        )
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
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    need("server", installed("kernel_gateway"))
    with peer(tmp_path_factory.mktemp("gateway"), *GATEWAY) as started:
        yield started


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    need("server", installed("jupyter_server"))
    with peer(
        tmp_path_factory.mktemp("server"), *SERVER, "--ServerApp.base_url=/user/ann/", base_url="/user/ann"
    ) as started:
        yield started


@pytest.fixture(scope="session")
def enterprise_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """Enterprise Gateway pins an older jupyter-server: it lives in an environment of its own."""
    python = os.environ.get("JUPYTER_EXEC_ENTERPRISE_PYTHON", "")
    need("enterprise", os.path.exists(python))
    with peer(tmp_path_factory.mktemp("enterprise"), "enterprisegateway", python=python) as started:
        yield started


@pytest.fixture(params=["gateway", "jupyter_server"])
def remote(request: pytest.FixtureRequest, gateway: Peer, jupyter_server: Peer) -> Peer:
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


def test_remote_restart_and_death(far: JupyterCodeExecutor) -> None:
    run(far, "x = 1")
    far.restart()
    assert run(far, "'x' in dir()").output == "False"
    result = run(far, "import os; os._exit(1)")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "its server found it dead" in result.output
    assert run(far, "1").output == "1"


def test_remote_kernels_are_deleted_and_attached_ones_are_not(remote: Peer) -> None:
    with remote.client() as owner:
        client = owner.start_kernel()
        client.wait_ready(jupyter_exec.Deadline(PATIENCE))
        client.execute("x = 5", PATIENCE)
        (model,) = owner.list_kernels()
        with remote.client(kernel_id=model["id"]) as guest, JupyterCodeExecutor(guest) as executor:
            assert run(executor, "x").output == "5"
            with pytest.raises(KernelError, match="not ours"):
                executor.restart()
        assert client.execute("x", PATIENCE).text == "5"
    with remote.client() as witness:
        assert witness.list_kernels() == []


def test_remote_kernel_gets_its_environment(gateway: Peer) -> None:
    with gateway.client(env={"KERNEL_GREETING": "hello"}) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "import os; os.environ['KERNEL_GREETING']").output == "'hello'"


def test_remote_input(gateway: Peer) -> None:
    with JupyterCodeExecutor(gateway.info, on_input=lambda prompt, password: "blue") as executor:
        assert run(executor, "input('colour? ')").output.endswith("'blue'")


def test_the_default_subprotocol_works_too(jupyter_server: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "V1_SUBPROTOCOL", "unknown.to.the.server")
    with JupyterCodeExecutor(jupyter_server.info) as executor:
        assert run(executor, "6 * 7").output == "42"
        assert isinstance(executor._kernel._channels, jupyter_exec.WebSocketChannels)
        assert isinstance(executor._kernel._channels._codec, jupyter_exec.JsonCodec)


def test_a_dropped_connection_is_made_anew_and_the_rest_replayed(jupyter_server: Peer, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    code = f"import os, time\nprint('first', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nn += 1\n7"
    with JupyterCodeExecutor(jupyter_server.info) as executor:
        run(executor, "n = 0")

        def cut(output: dict[str, Any]) -> None:
            if output.get("text") == "first\n":
                channels: Any = executor._kernel._channels
                channels._loop.post(lambda: channels._socket.shutdown(socket.SHUT_RDWR))
                gate.touch()

        result = executor.execute(code, on_output=cut, timeout=PATIENCE)
        assert (result.status, result.kernel_state) == ("ok", "intact")
        assert result.text.startswith("first\n7")
        assert run(executor, "n").output == "1"


def test_a_server_that_goes_away_in_mid_cell_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_deleted_kernel_is_reported(remote: Peer) -> None:
    with remote.client() as server, JupyterCodeExecutor(server, timeout=1) as executor:
        (model,) = server.list_kernels()
        delete = threading.Thread(target=lambda: server.rest.request("DELETE", f"/api/kernels/{model['id']}"))
        # The server interrupts what it deletes: this is not to be the end of the cell.
        code = "import time\nprint('go', flush=True)\nwhile True:\n    try: time.sleep(1)\n    except KeyboardInterrupt: pass"
        result = executor.execute(code, on_output=lambda output: started(delete))
        delete.join()
        assert result.kernel_state == "lost"
        assert result.exit_code != 0
        assert run(executor, "1").output == "1"


def started(thread: threading.Thread) -> None:
    if thread.ident is None:
        thread.start()


def test_output_over_the_rate_limit_is_said_to_be_lost(gateway: Peer) -> None:
    with JupyterCodeExecutor(gateway.info) as executor:
        result = run(executor, "print('x' * 9_000_000)\nprint('end')")
        assert "Some of the output was lost" in result.output


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
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    path = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path / "key"), "-out", str(path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    return path / "cert", path / "key"


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


def test_enterprise_gateway(enterprise_gateway: Peer) -> None:
    with enterprise_gateway.client(env={"KERNEL_USERNAME": "ann"}) as server:
        with JupyterCodeExecutor(server, "python3") as executor:
            assert run(executor, "x = 6", "x * 7").output == "\n42"
            assert executor.execute("while True: pass", timeout=0.5).kernel_state == "intact"
            executor.restart()
            assert run(executor, "'x' in dir()").output == "False"


def test_enterprise_gateway_tells_why_it_refuses(enterprise_gateway: Peer) -> None:
    with enterprise_gateway.client(env={"KERNEL_USERNAME": "root"}) as server, pytest.raises(ServerError) as caught:
        JupyterCodeExecutor(server)
    assert caught.value.status == 403
    assert "root" in str(caught.value)


def test_any_object_with_connection_info_is_a_server(gateway: Peer) -> None:
    class Theirs:
        host, use_https, port, token = "127.0.0.1", False, gateway.info.port, gateway.info.token

    class Connectable:
        connection_info = Theirs()

    with JupyterCodeExecutor(Connectable()) as executor:
        assert run(executor, "1").output == "1"


def test_wrong_token_unknown_kernel_and_forbidden_list_are_said(remote: Peer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="token is missing or wrong"):
        JupyterCodeExecutor(replace(remote.info, token="wrong"))
    with pytest.raises(ValueError, match="Kernel nope is not installed"):
        JupyterCodeExecutor(remote.info, "nope")
    with pytest.raises(ConnectionClosed, match="Cannot connect"):
        JupyterCodeExecutor(replace(remote.info, port=free_port()))


def test_listing_kernels_may_be_forbidden(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    with peer(tmp_path, "kernelgateway") as started, started.client() as server:
        with pytest.raises(ServerError) as caught:
            server.list_kernels()
        assert caught.value.status == 403
        with JupyterCodeExecutor(server) as executor:
            assert run(executor, "1").output == "1"


@contextlib.contextmanager
def fake_server(answer: bytes) -> Iterator[JupyterConnectionInfo]:
    """A server that sends `answer` to each connection and then waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stopping = threading.Event()

        def serve() -> None:
            listener.settimeout(0.05)
            clients = []
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    clients.append(listener.accept()[0])
                    clients[-1].sendall(answer)
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


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http("200 OK", "<html>Please log in</html>"), "no Jupyter server: it sends text/html"),
        (http("302 Found", "", "text/html", "Location: /hub/login"), "redirects elsewhere"),
        (http("500 Oops", '{"message": "it broke", "reason": null}', "application/json"), "500.*it broke"),
        (http("200 OK", "[1]", "application/json"), "no Jupyter server"),
        (http("200 OK", "[" * 100_000, "application/json"), "no Jupyter server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "Jupyter server|broke|No answer"),
        (b"", "No answer to GET .* within 0.5 s"),
    ],
)
def test_what_is_no_jupyter_server_is_told(answer: bytes, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec.RestClient.request, "__kwdefaults__", {"timeout": 0.5})
    with fake_server(answer) as info, pytest.raises(JupyterExecError) as caught:
        JupyterCodeExecutor(info)
    assert re.search(says, str(caught.value))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("host", ["http://example.com", "example.com/path", "a b", ""])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="host must be a name or an address"):
        RemoteJupyterServer(JupyterConnectionInfo(host, True))


def test_the_token_is_in_no_repr_url_log_or_command_line(
    gateway: Peer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    token = gateway.info.token or ""
    with JupyterCodeExecutor(gateway.info) as executor:
        run(executor, "1")
        texts = [repr(gateway.info), str(gateway.info), gateway.info.url, repr(executor), repr(vars(executor))]
        texts += [caplog.text, gateway.log.read_text(), *capfd.readouterr(), *map(command_line, [os.getpid()])]
    for text in texts:
        assert token not in text


def test_a_local_gateway_serves_others_and_goes_with_its_server(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    log = tmp_path / "gateway.log"
    with LocalJupyterServer(token="my$token", log_file=log, cwd=tmp_path) as server:
        (tmp_path / "signal.py").write_text("raise SystemExit('shadowed')")
        client = RemoteJupyterServer(server.connection_info)
        with JupyterCodeExecutor(server, max_output=None) as executor, client as other:
            assert run(executor, "6 * 7").output == "42"
            assert len(other.list_kernels()) == 1
            assert (server.ip, server.token, server.get_client().list_kernels()) == (
                "127.0.0.1",
                "my$token",
                other.list_kernels(),
            )
            assert not any("my$token" in command_line(pid) for pid in descendants(os.getpid()))
            assert len(run(executor, "print('x' * 9_000_000)").output) == 9_000_001
    assert "Kernel started" in log.read_text()
    with pytest.raises(ConnectionClosed, match="stopped"):
        server.get_client()


def test_a_local_gateway_dies_with_a_killed_client(tmp_path: Path) -> None:
    need("server", installed("kernel_gateway"))
    marker = f"mark-{time.time_ns()}"
    program = """
        import sys, time, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(transport="gateway", env={"MARK": sys.argv[1]})
        assert jupyter_exec.JupyterCodeExecutor(server).execute("1").status == "ok"
        print("ready", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), marker]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        client.kill()
    eventually(lambda: not marked_processes(f"MARK={marker}"), "every process is gone")


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


def test_a_python_without_kernel_gateway_says_what_to_install(bare_python: str) -> None:
    with (
        LocalJupyterServer(python=bare_python, transport="gateway") as server,
        pytest.raises(KernelStartFailed) as caught,
    ):
        server.get_client()
    assert f"{bare_python} -m pip install jupyter_kernel_gateway" in str(caught.value)


def test_a_direct_server_has_no_connection_info() -> None:
    for name in ("connection_info", "ip", "port", "token", "get_client"):
        with pytest.raises(AttributeError, match='transport="gateway"'):
            getattr(LocalJupyterServer(), name)()


@pytest.mark.slow
def test_a_docker_gateway(containers: Any) -> None:
    with docker_server(network=None, token="t0ken") as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "6 * 7").output == "42"
        with RemoteJupyterServer(server.connection_info) as other:
            assert len(other.list_kernels()) == 1
        (container,) = containers()
        assert container.ports["8888/tcp"][0]["HostIp"] == "127.0.0.1"
        assert container.attrs["Config"]["User"] == "1000:1000"


@pytest.mark.slow
def test_a_docker_gateway_may_be_left_running(engine: Any, containers: Any) -> None:
    with docker_server(network=None, stop_container=False, container_name=f"{RUN}-left") as server:
        info = server.connection_info
    with JupyterCodeExecutor(info) as executor:
        assert run(executor, "1").output == "1"
    engine.containers.get(f"{RUN}-left").remove(force=True)


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


def test_a_gateway_without_network_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be reached without a network"):
        DockerJupyterServer(network="none", transport="gateway")


# Commands


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[list[str]]:
    """A real sshd on loopback; returns the ssh command that reaches it."""
    need("ssh", os.path.exists("/usr/sbin/sshd") and shutil.which("ssh"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def test_a_server_that_drips_its_answer_is_given_up_in_time() -> None:
    def drip(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not ended.wait(0.02):
                connection.sendall(b"x")

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        rest = jupyter_exec.RestClient(JupyterConnectionInfo("127.0.0.1", False, listener.getsockname()[1]))
        with pytest.raises(ExecutionTimeout, match=r"No answer to GET .* within 0.5 s"):
            rest.request("GET", "/api", timeout=0.5)
        ended.set()
        thread.join()


SLOW_LINK = """
import os, subprocess, sys, threading, time
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def copy(source, target, rate):
    while data := os.read(source, 65536):
        time.sleep(len(data) / rate)
        while data:
            data = data[os.write(target, data):]
    os.close(target)
threading.Thread(target=copy, args=(0, process.stdin.fileno(), 1e12), daemon=True).start()
copy(process.stdout.fileno(), 1, 5e6)
"""


@pytest.mark.slow
def test_output_on_a_slow_link_keeps_no_other_kernel_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "CONTROL_TIMEOUT", 3.0)
    (tmp_path / "link.py").write_text(SLOW_LINK)
    printing = threading.Event()
    with CommandJupyterServer([sys.executable, str(tmp_path / "link.py"), sys.executable]) as server:
        with JupyterCodeExecutor(server) as one, ThreadPoolExecutor(1) as pool:
            code = "import sys\nfor _ in range(300_000): sys.stdout.write('x' * 99 + chr(10))"
            cell = pool.submit(one.execute, code, on_output=lambda output: printing.set())
            assert printing.wait(PATIENCE)
            with JupyterCodeExecutor(server) as two:
                assert not cell.done()
                assert run(two, "1").output == "1"
            assert cell.result().status == "ok"


def test_kernels_through_ssh(sshd: list[str]) -> None:
    with CommandJupyterServer([*sshd, sys.executable]) as server, JupyterCodeExecutor(server) as executor:
        assert run(executor, "x = 6", "x * 7").output == "\n42"
        assert executor.execute("while True: pass", timeout=0.5).kernel_state == "intact"
        assert run(executor, "'SSH_CONNECTION' in __import__('os').environ").output == "True"


def test_ssh_that_refuses_is_reported(sshd: list[str]) -> None:
    with CommandJupyterServer([*sshd, "/no/such/python3"]) as server, pytest.raises(KernelStartFailed) as caught:
        JupyterCodeExecutor(server)
    assert "/no/such/python3" in str(caught.value)
    assert "exit code 127" in str(caught.value)


# ======================================================================================================
# 10. Code executor
# ======================================================================================================


def test_the_example_prints_exactly_this(executor: JupyterCodeExecutor) -> None:
    result = executor.execute_code_blocks([CodeBlock(language="python", code="print('Hello, World!')")])
    assert str(result) == "exit_code=0 output='Hello, World!\\n' output_files=[]"


def test_variables_live_from_block_to_block_and_call_to_call(executor: JupyterCodeExecutor) -> None:
    assert run(executor, "x = 1", "x += 1").output == "\n"
    assert run(executor, "x").output == "2"


def test_autogens_documented_result_of_two_blocks(executor: JupyterCodeExecutor) -> None:
    define = "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"
    assert run(executor, define, "fibonacci(14)").output == "\n377"


def test_an_error_costs_only_the_failing_block(executor: JupyterCodeExecutor) -> None:
    result = run(executor, "a = 1\nprint('first')", "print('second')\nb = 1 / 0", "c = 3")
    assert result.exit_code == 1
    assert result.output.startswith("first\n\nsecond\nZeroDivisionError: division by zero\n")
    assert "\x1b" not in result.output
    assert run(executor, "a, 'b' in dir(), 'c' in dir()").output == "(1, False, False)"


def test_stdout_stderr_result_and_display_in_order(executor: JupyterCodeExecutor) -> None:
    code = "import sys\nprint('o', flush=True)\nprint('e', file=sys.stderr, flush=True)\ndisplay('d')\n'r'"
    assert run(executor, code).output == "o\ne\n'd'\n'r'"


def test_pictures_and_html_become_files_named_in_the_text(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    result = run(
        executor,
        f"from IPython.display import *\nimport base64\ndisplay(Image(base64.b64decode('{png}'), format='png'))",
        "print('before')\ndisplay(HTML('<b>ü</b>'))\nprint('after')",
    )
    picture, page = result.output_files
    assert result.output == f"Image data saved to {picture}\nbefore\nHTML data saved to {page}\nafter\n"
    assert Path(picture).read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert Path(page).read_text(encoding="utf-8") == "<b>ü</b>"
    assert Path(picture).suffix == ".png"
    assert {Path(picture).parent, Path(page).parent} == {tmp_path}


def test_a_matplotlib_plot_becomes_a_png(executor: JupyterCodeExecutor) -> None:
    result = run(executor, "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()")
    (picture,) = result.output_files
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert result.output == f"Image data saved to {picture}"


def test_a_vanished_output_directory_costs_only_the_file(server: LocalJupyterServer, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    with JupyterCodeExecutor(server, output_dir=output_dir) as executor:
        output_dir.rmdir()
        result = run(executor, "from IPython.display import *\ndisplay(HTML('<b>'))\nprint('after')")
    assert result.exit_code == 0
    assert "could not be saved" in result.output
    assert result.output.endswith("after\n")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import asyncio; await asyncio.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "!sleep 60",
        "while True: print('x')",
    ],
)
def test_timeout_interrupts_and_keeps_the_variables(executor: JupyterCodeExecutor, code: str) -> None:
    run(executor, "x = 5")
    result = executor.execute("print('before', flush=True)\n" + code, timeout=0.5)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "intact")
    assert result.text.startswith("before\n")
    assert result.text.endswith("Timeout: interrupted after 0.5 s; variables are kept")
    assert run(executor, "x").output == "5"


def test_code_that_ignores_the_interrupt_is_killed(
    executor: JupyterCodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    run(executor, "x = 5")
    code = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
    result = executor.execute(code, timeout=0.5)
    assert (result.status, result.exit_code, result.kernel_state) == ("timeout", 124, "lost")
    assert "the kernel was killed and restarted; all variables are lost" in result.note
    assert run(executor, "'x' in dir()").output == "False"


@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", 139, "SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", 137, "SIGKILL"),
        ("import os; os._exit(3)", 1, "exit code 3"),
        ("import os; os._exit(0)", 1, "exit code 0"),
    ],
)
def test_death_is_reported_and_the_next_call_has_a_fresh_kernel(
    executor: JupyterCodeExecutor, code: str, exit_code: int, says: str
) -> None:
    # ipykernel hands what it prints to a thread of its own: the death must not overtake that.
    result = run(executor, "import time\nx = 5\nprint('before', flush=True)\ntime.sleep(0.5)\n" + code)
    assert (result.exit_code, result.kernel_state) == (exit_code, "lost")
    assert result.output.startswith("before\nThe kernel died (")
    assert says in result.output
    assert "all variables are lost" in result.output
    assert run(executor, "'x' in dir()").output == "False"


def test_exit_ends_the_session_well(executor: JupyterCodeExecutor) -> None:
    result = run(executor, "x = 1\nprint('bye')\nexit()", "print('never')")
    assert (result.exit_code, result.kernel_state) == (0, "lost")
    assert result.output == "bye\nthe session was ended by the code"
    assert run(executor, "'x' in dir()").output == "False"


def test_interrupt_from_another_thread(executor: JupyterCodeExecutor) -> None:
    seen = threading.Event()

    def interrupt_it() -> None:
        seen.wait(PATIENCE)
        executor.interrupt()

    threading.Thread(target=interrupt_it).start()
    result = executor.execute("print('go', flush=True)\nwhile True: pass", on_output=lambda output: seen.set())
    assert (result.status, result.exit_code, result.kernel_state) == ("interrupted", 130, "intact")
    assert run(executor, "1").output == "1"


def test_interrupt_while_nothing_runs_does_nothing(executor: JupyterCodeExecutor) -> None:
    executor.interrupt()
    assert run(executor, "1").output == "1"


def test_ctrl_c_interrupts_the_cell_and_goes_on() -> None:
    program = """
        import sys, os, signal, jupyter_exec
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            try:
                executor.execute("x = 5; print('go', flush=True)\\nwhile True: pass",
                                 on_output=lambda output: os.kill(os.getpid(), signal.SIGINT))
            except KeyboardInterrupt:
                print("interrupted", executor.execute("x").text)
    """
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("interrupted 5\n", "")


def test_input_raises_in_the_cell_instead_of_hanging(executor: JupyterCodeExecutor) -> None:
    assert "StdinNotImplementedError" in run(executor, "input()").output


def test_on_input_answers(executor: JupyterCodeExecutor) -> None:
    asked = []

    def answer(prompt: str, password: bool) -> str:
        asked.append((prompt, password))
        return "blue"

    result = executor.execute("import getpass\nprint(input('colour? '), getpass.getpass('secret? '))", on_input=answer)
    assert result.outputs[-1]["text"].endswith("blue blue\n")
    assert asked == [("colour? ", False), ("secret? ", True)]


@pytest.mark.logs_error("a bug in the hook")
def test_outputs_come_while_the_cell_runs_and_a_failing_hook_stops_nothing(
    executor: JupyterCodeExecutor, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def hook(output: dict[str, Any]) -> None:
        gate.touch()
        raise RuntimeError("a bug in the hook")

    code = f"import os, time\nprint('first', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n7"
    result = executor.execute(code, on_output=hook)
    assert (result.status, result.text) == ("ok", "first\n7")


def test_restart_gives_a_fresh_kernel(executor: JupyterCodeExecutor) -> None:
    run(executor, "x = 1")
    path = executor.connection_file
    executor.restart()
    assert run(executor, "'x' in dir()").output == "False"
    assert executor.connection_file == path


def test_a_stopped_executor_says_so(executor: JupyterCodeExecutor) -> None:
    executor.stop()
    executor.stop()
    with pytest.raises(JupyterExecError, match="was stopped"):
        run(executor, "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"timeout": 0.5}, r"Timeout must be greater than or equal to 1\."),
        ({"output_dir": "/no/such"}, r"Output directory .* does not exist\."),
        ({"kernel_name": "nope"}, r"Kernel .* is not installed\."),
        ({"jupyter_server": 5}, r"jupyter_server must be a JupyterConnectable or JupyterConnectionInfo\."),
    ],
)
def test_wrong_arguments_are_autogens_value_errors(
    server: LocalJupyterServer, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        JupyterCodeExecutor(**({"jupyter_server": server} | arguments))


def test_vars_of_an_executor_are_json(executor: JupyterCodeExecutor) -> None:
    assert json.loads(json.dumps(vars(executor)))["_kernel_name"] == "python3"


def test_execute_gives_nbformat_shaped_outputs(executor: JupyterCodeExecutor) -> None:
    result = executor.execute("print('a')\n5")
    assert result.outputs == [
        {"output_type": "stream", "name": "stdout", "text": "a\n"},
        {"output_type": "execute_result", "execution_count": 1, "data": {"text/plain": "5"}, "metadata": {}},
    ]
    assert (result.execution_count, result.error) == (1, None)
    failed = executor.execute("1/0")
    assert failed.error
    assert (failed.error["ename"], failed.error["evalue"]) == ("ZeroDivisionError", "division by zero")


def test_surrogates_in_code_reach_the_kernel_as_characters(executor: JupyterCodeExecutor) -> None:
    assert run(executor, "print('\ud83d\ude00', ord('\ud83d') == 0xFFFD)").output == "😀 True\n"
    assert run(executor, "1").output == "1"


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


def test_max_output_none_is_no_limit(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, output_dir=tmp_path, max_output=None) as executor:
        result = run(executor, "print('x' * 300_000)")
    assert (len(result.output), result.output_files) == (300_001, [])


@pytest.mark.slow
def test_memory_stays_bounded_however_much_is_printed(tmp_path: Path) -> None:
    program = """
        import resource, sys, jupyter_exec
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        with jupyter_exec.LocalJupyterServer() as server:
            executor = jupyter_exec.JupyterCodeExecutor(server, output_dir=sys.argv[1])
            block = jupyter_exec.CodeBlock
            executor.execute_code_blocks([block("print(1)")])
            before = peak()
            result = executor.execute_code_blocks([block("for i in range(1_000_000): print('y' * 99)")])
            print(peak() - before, len(result.output), result.output_files[0])
            result = executor.execute_code_blocks([block("print('z' * 200_000_000)")])
            print(peak() - before, len(result.output), result.output_files[0])
            executor.stop()
    """
    lines, one = (line.split() for line in run_python(program, str(tmp_path)).stdout.splitlines())
    assert int(lines[0]) < 60
    assert int(one[0]) < 500  # the message itself, which ZeroMQ hands over in one piece, and its copy
    assert int(lines[1]) < 101_000 and int(one[1]) < 101_000
    assert Path(lines[2]).stat().st_size == 100_000_000
    assert Path(one[2]).stat().st_size == 200_000_001


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        ("\r10%\r20%\r30%\n", "30%\n"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("abc\b\bX\n", "aX\n"),
        ("\b\bx", "x"),
        ("keep\r", "keep\r"),
        ("1\n2\r3\n4", "1\n3\n4"),
        ("no\n", "no\n"),
    ],
)
def test_text_is_as_a_terminal_would_have_left_it(raw: str, left: str) -> None:
    assert jupyter_exec.collapse(raw) == left


@given(st.lists(st.text(alphabet="ab\n", max_size=30), max_size=20), st.integers(2, 40))
def test_a_tape_keeps_head_and_tail(texts: list[str], limit: int) -> None:
    tape, whole = jupyter_exec.Tape(limit), "".join(texts)
    for text in texts:
        tape.add(text)
    left = str(tape)
    if len(whole) <= limit:
        assert left == whole
    else:
        (gap,) = re.findall(r"\n\[(\d+) characters are missing here\]\n", left)
        head, tail = left.split(f"\n[{gap} characters are missing here]\n")
        assert whole.startswith(head) and whole.endswith(tail)
        assert len(head) + int(gap) + len(tail) == len(whole)
        assert len(head) + len(tail) <= limit


def test_a_progress_bar_leaves_its_last_state(executor: JupyterCodeExecutor) -> None:
    code = (
        "import time\nfor i in range(5): print(f'\\r{i * 25}%', end='', flush=True); time.sleep(0.05)\nprint(' done')"
    )
    assert run(executor, code).output == "100% done\n"


def test_page_and_load_texts_are_shown(executor: JupyterCodeExecutor, tmp_path: Path) -> None:
    assert "Docstring" in run(executor, "print?").output
    (tmp_path / "code.py").write_text("loaded = 1")
    assert "loaded = 1" in run(executor, f"%load {tmp_path}/code.py").output


def test_updates_of_displays(executor: JupyterCodeExecutor) -> None:
    show = "from IPython.display import display, update_display, Markdown\ndisplay('one', display_id='d')"
    assert run(executor, show + "\nupdate_display('two', display_id='d')").output == "'two'"
    assert run(executor, "update_display('three', display_id='d')").output == "'three'"


@pytest.mark.parametrize(
    ("data", "word", "suffix", "start"),
    [
        ({"image/png": base64.b64encode(b"\x89PNG").decode()}, "Image", ".png", b"\x89PNG"),
        ({"image/jpeg": base64.b64encode(b"\xff\xd8").decode()}, "Image", ".jpg", b"\xff\xd8"),
        ({"image/gif": base64.b64encode(b"GIF8").decode()}, "Image", ".gif", b"GIF8"),
        ({"image/webp": base64.b64encode(b"RIFF").decode()}, "Image", ".webp", b"RIFF"),
        ({"image/svg+xml": "<svg>ü</svg>"}, "Image", ".svg", "<svg>ü</svg>".encode()),
        ({"application/pdf": base64.b64encode(b"%PDF").decode()}, "PDF", ".pdf", b"%PDF"),
        ({"text/html": "<b>"}, "HTML", ".html", b"<b>"),
        ({"application/json": {"a": [1, "ü"]}}, "JSON", ".json", b'{\n "a"'),
        ({"application/json": 5}, "JSON", ".json", b"5"),
        ({"application/vnd.plotly.v1+json": {"data": []}, "text/html": "<div>"}, "JSON", ".json", b"{"),
        ({"application/vnd.vegalite.v5+json": {"mark": "bar"}, "text/html": "<div>"}, "JSON", ".json", b"{"),
        ({"application/geo+json": {"type": "Point"}}, "JSON", ".json", b"{"),
        ({"text/html": ["<b>", "x"]}, "HTML", ".html", b"<b>x"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_mime_type_gets_its_file(tmp_path: Path, data: Any, word: str, suffix: str, start: bytes) -> None:
    saved = jupyter_exec.save_bundle(data, tmp_path)
    assert saved is not None
    sentence, path = saved
    assert sentence == f"{word} data saved to {path}"
    assert Path(path).suffix == suffix
    assert Path(path).read_bytes().startswith(start)


@pytest.mark.parametrize(
    "data", [{"image/png": "!"}, {"image/png": 5}, {"text/html": {}}, {"image/png": "a" * 5}, {"application/pdf": True}]
)
def test_what_cannot_be_a_file_is_said(tmp_path: Path, data: Any) -> None:
    saved = jupyter_exec.save_bundle(data, tmp_path)
    assert saved is not None
    assert ("could not be saved" in saved[0]) == (saved[1] == "")
    assert len(list(tmp_path.iterdir())) == (1 if saved[1] else 0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"text/markdown": "**b**", "text/plain": "<IPython.core.display.Markdown object>"}, "**b**"),
        ({"text/latex": "$x$", "text/plain": "x"}, "x"),
        ({"text/latex": "$x$", "text/plain": "<IPython.core.display.Latex object>"}, "$x$"),
        ({"application/javascript": "alert()", "text/plain": "<IPython.core.display.Javascript object>"}, "<IPython"),
        ({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider(value=0)"}, "IntSlider(value=0)"),
    ],
)
def test_text_is_chosen_where_text_is_best(tmp_path: Path, data: Any, text: str) -> None:
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    assert jupyter_exec.render([output], "", lambda data: None).startswith(text)
    assert jupyter_exec.save_bundle(data, tmp_path) is None


LIBRARIES = """
import matplotlib.pyplot as plt, pandas as pd, plotly.graph_objects as go
from PIL import Image
from IPython.display import display, SVG
display(pd.DataFrame({"a": [1, 2]}))
plt.plot([1, 3, 2]); plt.show()
display(go.Figure(go.Bar(y=[1, 2])))
display(Image.new("RGB", (8, 8), "red"))
display(SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
"""


def test_real_libraries(executor: JupyterCodeExecutor) -> None:
    result = run(executor, LIBRARIES)
    assert [Path(path).suffix for path in result.output_files] == [".html", ".png", ".json", ".png", ".svg"]
    assert result.output.startswith("   a\n0  1\n1  2\nHTML data saved to ")
    assert "<Figure" not in result.output and "<PIL" not in result.output
    assert json.loads(Path(result.output_files[2]).read_text())["data"][0]["type"] == "bar"


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
    assert notebook.cells[4].outputs[-1].text == "Timeout: interrupted after 0.5 s; variables are kept"
    assert notebook.metadata.language_info.name == "python"


def malformed(kernel: ScriptedKernel, request: dict[str, Any]) -> None:
    deep: Any = []
    for _ in range(50):
        deep = [deep]
    bundles = [{"image/png": "%%%"}, {"image/png": {"a": 1}}, {"text/plain": 5}, {"../../etc/passwd": "x"}, None, 7]
    for bundle in [*bundles, {"application/json": deep}, {"text/html": None, "text/plain": "fine"}]:
        kernel.publish("display_data", {"data": bundle, "metadata": None, "transient": None}, request)
    kernel.publish("stream", {"name": "stdout", "text": "end"}, request)
    kernel.finish(request)


def test_malformed_bundles_cost_only_themselves(tmp_path: Path) -> None:
    kernel = ScriptedKernel(malformed)
    try:
        with JupyterCodeExecutor(kernel.connection, output_dir=tmp_path) as executor:
            result = run(executor, "1")
            executor.save_notebook(tmp_path / "n.ipynb")
    finally:
        kernel.close()
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
        result = run(
            executor, "from IPython.display import HTML\ndisplay(HTML('x' * 10**6))\nprint('y' * 10**6)\nprint('end')"
        )
    assert result.exit_code == 0
    assert "HTML data could not be saved: " in result.output
    assert "No space left" in result.output
    assert "the full text could not be saved: " in result.output
    assert result.output.endswith("end\n")


# When things go wrong


@pytest.mark.parametrize(
    "code",
    [
        "import os\nif os.fork() == 0:\n    import time; time.sleep(60); os._exit(0)\nos.wait()",
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('caught')",
        "import subprocess; subprocess.run('sleep 60 & sleep 60', shell=True)",
        "import os; os.system('sleep 60')",  # which ignores SIGINT itself: the sleeping process must get it
        "import threading; threading.Event().wait()",
    ],
)
def test_more_cells_that_can_be_interrupted(executor: JupyterCodeExecutor, code: str) -> None:
    run(executor, "x = 5")
    result = executor.execute(code, timeout=0.5)
    assert (result.status, result.kernel_state) == ("timeout", "intact")
    assert run(executor, "x").output == "5"


def test_c_code_that_never_returns_is_killed(executor: JupyterCodeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_exec, "INTERRUPT_GRACE", 0.3)
    code = "import ctypes\nlibc = ctypes.PyDLL(None)\nprint('in', flush=True)\nwhile True:\n    libc.sleep(60)"
    mask = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
    result = executor.execute(mask + code, timeout=0.5)
    assert (result.status, result.kernel_state) == ("timeout", "lost")
    assert "the kernel was killed and restarted" in result.note
    assert run(executor, "1").output == "1"


def test_a_kernel_that_dies_between_calls_is_told_and_the_code_not_run(
    executor: JupyterCodeExecutor, tmp_path: Path
) -> None:
    pid = int(run(executor, "import os; os.getpid()").output)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in descendants(os.getpid()), "the kernel is gone")
    result = run(executor, f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (result.exit_code, result.kernel_state) == (137, "lost")
    assert "SIGKILL" in result.output and "all variables are lost" in result.output
    assert not (tmp_path / "ran").exists()
    assert run(executor, "1").output == "1"


@pytest.mark.parametrize("what", ["restart", "stop"])
def test_restart_and_stop_while_a_cell_runs_in_another_thread(server: LocalJupyterServer, what: str) -> None:
    with JupyterCodeExecutor(server) as executor:
        going = threading.Event()
        results: list[Any] = []
        code = "print('go', flush=True)\nwhile True: pass"
        cell = threading.Thread(
            target=lambda: results.append(executor.execute(code, on_output=lambda output: going.set()))
        )
        cell.start()
        assert going.wait(PATIENCE)
        getattr(executor, what)()
        cell.join(PATIENCE)
        assert (results[0].status, results[0].kernel_state) == ("died", "lost")
        if what == "restart":
            assert run(executor, "1").output == "1"


def test_cells_of_many_threads_run_in_the_order_of_the_calls(executor: JupyterCodeExecutor) -> None:
    run(executor, "import time; order = []")
    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=run, args=(executor, f"order.append({number}); time.sleep(0.02)")))
        threads[-1].start()
        eventually(lambda: len(executor._lock._queue) > 0 or not threads[-1].is_alive(), "the thread is in the queue")
    for thread in threads:
        thread.join()
    assert run(executor, "order").output == str(sorted(range(8)))


def test_sixteen_kernels_at_work_on_one_server(server: LocalJupyterServer) -> None:
    with contextlib.ExitStack() as stack:
        executors = [stack.enter_context(JupyterCodeExecutor(server)) for _ in range(16)]
        outputs = {}

        def work(number: int) -> None:
            outputs[number] = [run(executors[number], f"print({number})").output for _ in range(5)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outputs == {number: [f"{number}\n"] * 5 for number in range(16)}


def test_an_executor_in_a_forked_child_says_so() -> None:
    program = """
        import os, sys, warnings, jupyter_exec
        warnings.simplefilter("ignore")
        server = jupyter_exec.LocalJupyterServer()
        executor = jupyter_exec.JupyterCodeExecutor(server)
        executor.execute("x = 5")
        if os.fork() == 0:
            result = executor.execute_code_blocks([jupyter_exec.CodeBlock("1")])
            print(result.exit_code, "forked" in result.output, flush=True)
            os._exit(0)
        os.wait()
        print(executor.execute("x").text)
    """
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("1 True\n5\n", "")


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "1 / 0", "os.kill(os.getpid(), 15)"])
def test_forgotten_servers_end_silently_with_the_program(ending: str, tmp_path: Path) -> None:
    marker = f"mark-{time.time_ns()}"
    program = f"""
        import os, sys, threading, jupyter_exec
        server = jupyter_exec.LocalJupyterServer(env={{"MARK": sys.argv[1]}})
        executor = jupyter_exec.JupyterCodeExecutor(server)
        executor.execute("1")
        threading.Thread(target=executor.execute, args=("while True: pass",), daemon=True).start()
        {ending}
    """
    result = run_python(program, marker, env=os.environ | {"PYTHONPATH": str(MODULE.parent), "TMPDIR": str(tmp_path)})
    noise = [
        line
        for line in result.stderr.splitlines()
        if "ZeroDivision" not in line and not line.startswith(("Trace", "  "))
    ]
    assert noise == []
    eventually(lambda: not marked_processes(f"MARK={marker}"), "every process is gone")
    eventually(lambda: not list(tmp_path.iterdir()), "every file is gone")


def test_a_forgotten_executor_is_ended_with_a_warning(server: LocalJupyterServer) -> None:
    executor: JupyterCodeExecutor | None = JupyterCodeExecutor(server)
    assert executor
    pid = int(run(executor, "import os; os.getpid()").output)
    with pytest.warns(ResourceWarning, match="forgotten"):
        del executor
        gc.collect()
    eventually(lambda: pid not in descendants(os.getpid()), "the kernel is gone")


def test_what_kernels_of_a_killed_host_had_started_is_ended(tmp_path: Path) -> None:
    marker = f"mark-{time.time_ns()}"
    with LocalJupyterServer(env={"MARK": marker}) as server, JupyterCodeExecutor(server) as executor:
        code = "import os, signal, subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        code += "os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)"
        assert run(executor, code).kernel_state == "lost"
        assert run(executor, "1").output == "1"
        assert not any("sleep\0" in command_line(pid) for pid in marked_processes(f"MARK={marker}"))


@pytest.mark.slow
def test_a_client_that_was_stopped_under_a_flood_still_ends_its_cell(tmp_path: Path) -> None:
    program = """
        import jupyter_exec
        with jupyter_exec.LocalJupyterServer() as server, jupyter_exec.JupyterCodeExecutor(server) as executor:
            code = "print('go', flush=True)\\nfor i in range(30_000): display(i)"
            seen = []
            result = executor.execute(code, timeout=60, on_output=lambda o: print("go", flush=True) if not seen.append(1) and len(seen) == 1 else None)
            print(result.status, len(result.outputs) == 30_001 or "lost" in result.note, executor.execute("7").text)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as client:
        assert client.stdout
        assert client.stdout.readline() == "go\n"
        client.send_signal(signal.SIGSTOP)
        kernel = max(descendants(client.pid))
        busy = [-1.0]

        def still() -> bool:  # the kernel has nothing to do any more, or nobody to do it for
            before, busy[0] = busy[0], sum(map(float, Path(f"/proc/{kernel}/stat").read_text().split()[13:15]))
            time.sleep(0.2)
            return busy[0] == before

        eventually(still, "the flood is over")
        client.send_signal(signal.SIGCONT)
        status, truth, after = client.stdout.readline().split()
    assert (status, truth, after) == ("ok", "True", "7")


def test_a_slow_hook_loses_nothing(executor: JupyterCodeExecutor) -> None:
    seen: list[Any] = []

    def slow(output: dict[str, Any]) -> None:
        if not seen:
            time.sleep(0.3)
        seen.append(output)

    executor.execute("for i in range(5000): display(i)", on_output=slow)
    assert len(seen) == 5000


def test_unread_output_is_bounded(executor: JupyterCodeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
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
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent)}
    grown = int(subprocess.run(command, capture_output=True, text=True, timeout=390, env=environment).stdout)
    assert grown < 4000  # KB


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
    "big": ("print('y' * 3_000_000)", {(0, "intact")}),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_soak_of_random_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("JUPYTER_EXEC_SEED", time.time_ns() % 10**6))
    choose = random.Random(seed)
    end = time.monotonic() + 60
    counts = dict.fromkeys(FAULTS, 0)
    with LocalJupyterServer() as server:
        executors = [JupyterCodeExecutor(server, output_dir=tmp_path, timeout=1) for _ in range(3)]
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


@pytest.mark.parametrize("kind", ["direct", "relay"])
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
        sleepers = eventually(
            lambda: [pid for pid in descendants(os.getpid()) if number in command_line(pid)], "it sleeps"
        )
    eventually(lambda: not any(number in command_line(pid) for pid in sleepers), "it is gone")


@pytest.mark.logs_error("its hooks cannot run another one")
def test_a_hook_cannot_run_another_cell(executor: JupyterCodeExecutor) -> None:
    inner: list[Any] = []
    hook = lambda output: inner.append(executor.execute("print('inner')"))  # noqa: E731
    result = executor.execute("print('outer')", on_output=hook)
    assert (result.status, result.text) == ("ok", "outer\n")


@pytest.mark.logs_error("no operator")
def test_a_failing_on_input_ends_the_input_not_the_session(executor: JupyterCodeExecutor) -> None:
    def broken(prompt: str, password: bool) -> str:
        raise RuntimeError("no operator")

    assert "EOFError" in executor.execute("input()", on_input=broken, timeout=PATIENCE).text
    assert run(executor, "1").output == "1"


@pytest.mark.parametrize("timeout", [float("nan"), 0, -1])
def test_timeouts_that_are_none(server: LocalJupyterServer, timeout: float) -> None:
    with pytest.raises(ValueError, match="Timeout must be greater"):
        JupyterCodeExecutor(server, timeout=timeout)


def test_an_infinite_timeout_is_no_limit(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, timeout=float("inf")) as executor:
        assert run(executor, "1").output == "1"


# Languages, pip, functions


def run_block(executor: JupyterCodeExecutor, code: str, language: str) -> CodeResult:
    return executor.execute_code_blocks([CodeBlock(code, language)])


@pytest.mark.parametrize("language", ["python", "py", "Python", "ipython", "python3", "python3.11", "", None])
def test_names_of_python(executor: JupyterCodeExecutor, language: Any) -> None:
    assert run_block(executor, "6 * 7", language).output == "42"


def test_a_shell_block_that_exceeds_its_time_says_so_in_its_status(server: LocalJupyterServer, tmp_path: Path) -> None:
    with JupyterCodeExecutor(server, timeout=1, output_dir=tmp_path) as executor:
        result = run_block(executor, "echo a; sleep 30", "bash")
        assert (result.exit_code, result.kernel_state) == (124, "intact")
        assert "Timeout: interrupted after 1 s" in result.output


@pytest.mark.parametrize(("code", "status"), [("exit(3)", 3), ("quit(0)", 0), ("exit(-1)", 255)])
def test_exit_with_a_status_ends_the_session_with_it(executor: JupyterCodeExecutor, code: str, status: int) -> None:
    result = run(executor, f"x = 1\n{code}", "print('never')")
    assert (result.exit_code, result.kernel_state) == (status, "lost")
    assert run(executor, "'x' in dir()").output == "False"


@pytest.mark.parametrize("timeout", ["x", []])
def test_a_timeout_that_is_none_costs_nothing(executor: JupyterCodeExecutor, timeout: Any) -> None:
    with pytest.raises(TypeError):
        executor.execute("1", timeout=timeout)
    assert executor.execute("1", timeout=1e30).status == "ok"


@pytest.mark.parametrize("language", ["bash", "sh", "shell", "BASH"])
def test_shell_blocks_run_in_a_shell_and_give_their_status(executor: JupyterCodeExecutor, language: str) -> None:
    result = run_block(executor, "for i in 1 2; do echo $i; done\necho 'it''s'\necho err >&2", language)
    assert (result.exit_code, result.output.split()) == (0, ["1", "2", "its", "err"])
    failed = run_block(executor, "echo before; exit 3", language)
    assert (failed.exit_code, failed.output, failed.kernel_state) == (3, "before\n", "intact")


def test_shell_blocks_use_the_kernels_python(executor: JupyterCodeExecutor) -> None:
    found = run_block(executor, "command -v python", "bash").output.strip()
    assert Path(found).parent == Path(sys.executable).parent


def test_autogens_bang_in_a_bash_block_goes_to_ipython(executor: JupyterCodeExecutor) -> None:
    assert run_block(executor, '!echo "hello world!"', "bash").output.strip() == "hello world!"
    assert run_block(executor, "%time 1", "sh").exit_code == 0


def test_a_language_that_the_kernel_does_not_speak_is_refused(executor: JupyterCodeExecutor) -> None:
    result = run_block(executor, "puts 1", "ruby")
    assert (result.exit_code, result.output) == (1, "The kernel runs python or bash, not ruby: the block was not run.")


@pytest.mark.slow
def test_pip_is_quiet_but_its_failures_are_not(executor: JupyterCodeExecutor) -> None:
    for line in ("!pip install pip", "%pip install pip", "! pip3 install pip"):
        result = run(executor, line)
        assert (result.exit_code, result.output) == (0, "")
    assert "ERROR: " in run(executor, "!pip install no-such-package-at-all-1234").output
    assert run_block(executor, "pip install pip", "bash").output == ""


def add_two(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def test_functions_are_there_from_the_start_and_after_every_restart(server: LocalJupyterServer) -> None:
    with JupyterCodeExecutor(server, functions=[add_two]) as executor:
        assert run(executor, "add_two(3)").output == "5"
        assert executor.execute("1").execution_count == 2
        executor.restart()
        assert run(executor, "add_two(4)").output == "6"
        run(executor, "import os; os._exit(1)")
        assert run(executor, "add_two(5)").output == "7"
        assert "add_two(a: 'int', b: 'int' = 2) -> 'int': Add two numbers." in executor.system_message
        assert executor.system_message.startswith(jupyter_exec.CODE_WRITER_SYSTEM_MESSAGE)


def test_functions_that_cannot_be_sent_are_refused(server: LocalJupyterServer) -> None:
    free = 5
    for function in (lambda: 1, len, lambda: free):
        with pytest.raises(ValueError, match="plain function"):
            JupyterCodeExecutor(server, functions=[function])


def test_an_empty_list_of_blocks_is_fine(executor: JupyterCodeExecutor) -> None:
    assert str(executor.execute_code_blocks([])) == "exit_code=0 output='' output_files=[]"


# asyncio


def test_async_executor_runs_blocks_on_a_loop(server: LocalJupyterServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncJupyterCodeExecutor(server, output_dir=tmp_path) as executor:
            assert (await executor.execute_code_blocks([CodeBlock("x = 6"), CodeBlock("x * 7")])).output == "\n42"
            assert (await executor.execute("x")).text == "6"
            assert (await executor.run("echo hi", "bash")).output == "hi\n"
            await executor.restart()
            assert (await executor.run("'x' in dir()", "python", context=None)).output == "False"
            await executor.save_notebook(tmp_path / "n.ipynb")

    asyncio.run(main())


def test_cancelling_interrupts_the_cell_and_keeps_the_kernel(server: LocalJupyterServer) -> None:
    async def main() -> None:
        async with AsyncJupyterCodeExecutor(server) as executor:
            await executor.run("x = 5\nimport time")
            for delay in (0.0, 0.3):
                task = asyncio.ensure_future(executor.run("time.sleep(60)"))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (await executor.run("x")).output == "5"

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_cancellation_token_interrupts_too(server: LocalJupyterServer) -> None:
    class Token:
        def link_future(self, future: Any) -> None:
            asyncio.get_running_loop().call_later(0.3, future.cancel)

    async def main() -> None:
        async with AsyncJupyterCodeExecutor(server) as executor:
            with pytest.raises(asyncio.CancelledError):
                await executor.execute_code_blocks([CodeBlock("x = 5\nimport time; time.sleep(60)")], Token())
            assert (await executor.run("x")).output == "5"

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_many_cells_do_not_block_the_event_loop(server: LocalJupyterServer) -> None:
    async def main() -> list[float]:
        async with contextlib.AsyncExitStack() as stack:
            executors = [await stack.enter_async_context(AsyncJupyterCodeExecutor(server)) for _ in range(4)]
            await asyncio.gather(*(executor.run("import time") for executor in executors))
            cells = asyncio.gather(*(executor.run("time.sleep(0.5)") for executor in executors))
            lags = []
            while not cells.done():
                before = time.monotonic()
                await asyncio.sleep(0)
                lags.append(time.monotonic() - before)
                await asyncio.sleep(0.01)
            await cells
            return lags

    lags = asyncio.run(main())
    assert len(lags) > 20  # the loop went on turning for half a second
    assert sorted(lags)[len(lags) // 2] < 0.02


def test_copies_of_an_executor_are_itself(executor: JupyterCodeExecutor) -> None:
    assert copy.copy(executor) is copy.deepcopy(executor) is executor
    other = AsyncJupyterCodeExecutor(None)
    assert copy.copy(other) is copy.deepcopy(other) is other


# Frameworks: each in an environment of its own, which JUPYTER_EXEC_FRAMEWORKS holds


def run_framework(name: str, program: str, tmp_path: Path) -> str:
    """Run a program with the framework of that name and return what it printed last."""
    python = Path(os.environ.get("JUPYTER_EXEC_FRAMEWORKS", "/nowhere")) / name / "bin" / "python"
    need(name, python.exists())
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "AUTOGEN_USE_DOCKER": "0"}
    command = [str(python), "-c", textwrap.dedent(program)]
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


@pytest.mark.parametrize("line", ["autogen-classic", "autogen-0.2"])
def test_autogen_and_ag2_classic(line: str, tmp_path: Path) -> None:
    assert run_framework(line, CLASSIC, tmp_path) == "all is well"


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


def extract(message: Any) -> list[tuple[str, str]]:
    return [(block.language, block.code) for block in MarkdownCodeExtractor().extract_code_blocks(message)]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
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
        ("```python\r\n1\r\n2\r\n```\r\n", [("python", "1\n2")]),
        ("```\nx\n```", [("", "x")]),
        ("``` not`code\n", []),
        ("no code", []),
        ("", []),
    ],
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
    judge = [
        (token.info.split()[0] if token.info.split() else "", token.content.removesuffix("\n")) for token in tokens
    ]
    assert [(language, code.rstrip("\n")) for language, code in extract(text)] == [
        (language, code.rstrip("\n")) for language, code in judge
    ]


def test_message_parts() -> None:
    assert extract(None) == []
    parts = [
        {"type": "text", "text": "```python\n1\n```"},
        {"type": "image_url"},
        {"type": "text", "text": "```\n2\n```"},
    ]
    assert extract(parts) == [("python", "1"), ("", "2")]
    with pytest.raises(ValueError, match="unknown type smell"):
        extract([{"type": "smell"}])


# ======================================================================================================
# 11. Command line
# ======================================================================================================


def cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("cwd", tempfile.gettempdir())
    return subprocess.run(
        [sys.executable, str(MODULE), *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_run_code_prints_as_the_code_does() -> None:
    result = cli("run", "-c", "import sys; print('out'); print('err', file=sys.stderr); 42")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n42\n", "err\n", 0)


def test_run_stdin_and_python_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print('file')")
    assert cli("run", str(tmp_path / "a.py")).stdout == "file\n"
    assert cli("run", "-", input="print('stdin')").stdout == "stdin\n"


def test_run_markdown_with_a_plot(tmp_path: Path) -> None:
    text = "# A\n```python\nx = 20\n```\n```text\nnot code\n```\n```python\nprint(x + 1)\n```\n```bash\necho $((1 + 2))\n```\n"
    text += "```python\nimport matplotlib.pyplot as plt\nplt.plot([1, x])\nplt.show()\n```\n"
    (tmp_path / "a.md").write_text(text)
    result = cli("run", str(tmp_path / "a.md"), "--output-dir", str(tmp_path))
    (picture,) = tmp_path.glob("*.png")
    assert (result.stdout, result.returncode) == (f"21\n3\nImage data saved to {picture}\n", 0)
    assert result.stderr == "jupyter-exec: skipped a block of text\n"


def test_run_notebook(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": "# title"},
        {"cell_type": "code", "source": ["x = 1\n", "y = 2"]},
        {"cell_type": "code", "source": "x + y"},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert cli("run", str(tmp_path / "a.ipynb")).stdout == "3\n"


def test_run_json_tells_of_a_kernel_that_cannot_start(kernels_dir: Path) -> None:
    argv = ["python", "-c", "import sys; sys.exit(' '.join(['no', 'licence', 'found']))"]
    add_spec(kernels_dir, "bad", argv=argv, display_name="b", language="python")
    result = cli(
        "run", "-c", "1", "--json", "--kernel", "bad", env=os.environ | {"JUPYTER_PATH": str(kernels_dir.parent)}
    )
    said = json.loads(result.stdout)
    assert (said["exit_code"], said["kernel_state"], result.returncode) == (1, "lost", 1)
    assert "no licence found" in said["output"]


def test_run_json(tmp_path: Path) -> None:
    result = cli("run", "-c", "print('a')\n1/0", "--json")
    parsed = json.loads(result.stdout)
    assert (result.returncode, parsed["exit_code"], parsed["kernel_state"]) == (1, 1, "intact")
    assert parsed["output"].startswith("a\nZeroDivisionError")


@pytest.mark.parametrize(
    ("code", "status"),
    [("1/0", 1), ("import time; time.sleep(60)", 124), ("import os; os.kill(os.getpid(), 11)", 139), ("exit()", 0)],
)
def test_exit_status_is_that_of_the_result(code: str, status: int) -> None:
    assert cli("run", "-c", code, "--timeout", "1").returncode == status


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "/no/such.py"], "No such file or directory: /no/such.py"),
        (["run", "-c", "1", "--kernel", "nope"], "Kernel nope is not installed"),
        (["run", "-c", "1", "--output-dir", "/no/such"], "Output directory /no/such does not exist"),
        (["run", "-c", "1", "--timeout", "0"], "Timeout must be"),
        (["run", "-c", "1", "--python", "/no/such/python"], "/no/such/python"),
    ],
)
def test_trouble_is_a_clear_line_without_traceback(arguments: list[str], says: str) -> None:
    result = cli(*arguments)
    assert (result.stdout, result.returncode) == ("", 1)
    assert says in result.stderr
    assert result.stderr.startswith("jupyter-exec: ")
    assert "Traceback" not in result.stderr


def test_python_without_ipykernel_is_a_clear_line(bare_python: str) -> None:
    result = cli("run", "-c", "1", "--python", bare_python)
    assert result.returncode == 1
    assert f"{bare_python} -m pip install ipykernel" in result.stderr


def test_kernels_lists_names_and_places() -> None:
    assert re.search(r"^python3\t.*\t/.*$", cli("kernels").stdout, re.MULTILINE)


def test_output_appears_as_it_is_printed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    code = f"import os, time\nprint('first', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    command = [sys.executable, str(MODULE), "run", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "first\n"
        gate.touch()
        assert process.wait(PATIENCE) == 0


def test_ctrl_c_ends_with_130_and_leaves_nothing() -> None:
    code = "print('go', flush=True)\nwhile True: pass"
    with subprocess.Popen(
        [sys.executable, str(MODULE), "run", "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


@pytest.mark.slow
def test_run_in_docker(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os, six; print(os.getuid(), len(os.listdir('/sys/class/net')))")
    base = ["--base-image", os.environ["BASE_IMAGE"]] if "BASE_IMAGE" in os.environ else []
    result = cli("run", str(tmp_path / "a.py"), "--docker", "--network", "none", "--package", "six", *base)
    assert result.stdout == "1000 1\n"
    engine.images.remove(docker_server(packages=["six"])._image_name)


def test_run_on_a_server(gateway: Peer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{gateway.info.token}\n")
    url = gateway.info.url
    environment = os.environ | {"JUPYTER_TOKEN": gateway.info.token or ""}
    assert cli("run", "-c", "print(6 * 7)", "--server", url, env=environment).stdout == "42\n"
    assert cli("run", "-c", "print(6 * 7)", "--server", url, "--token-file", str(tmp_path / "token")).stdout == "42\n"
    assert "python3" in cli("kernels", "--server", url, env=environment).stdout
    assert "token is missing or wrong" in cli("run", "-c", "1", "--server", url).stderr
    assert "SECRET" not in cli("run", "-c", "1", "--server", "localhost:8888/?token=SECRET").stderr


@pytest.mark.parametrize("option", [["--network", "none"], ["--package", "six"], ["--token-file", "x"]])
def test_options_of_another_mode_are_refused(option: list[str]) -> None:
    assert "is of use with" in cli("run", "-c", "1", *option).stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_with_their_status_and_leave_nothing(number: int, status: int, tmp_path: Path) -> None:
    code = "print('go', flush=True)\nwhile True: pass"
    command = [sys.executable, str(MODULE), "run", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "go\n"
        process.send_signal(number)
        assert process.wait(PATIENCE) == status


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    result = cli("run", "-c", "print('é')\nprint('after')", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.stdout == "\\xe9\nafter\n"


def test_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "jupyter_exec", "run", "-c", "print(__name__)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=MODULE.parent)
    assert (result.stdout, result.stderr) == ("__main__\n", "")


# ======================================================================================================
# Tools
# ======================================================================================================


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"]], ids=" ".join
)
def test_linters_are_content(command: list[str]) -> None:
    files = ["jupyter_exec.py", "test_jupyter_exec.py"]
    result = subprocess.run([sys.executable, "-m", *command, *files], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stdout + result.stderr


# ======================================================================================================
# Benchmarks: `pytest -m bench`; each group beside its rivals in one run, to be read as ratios
# ======================================================================================================


@pytest.fixture
def rivals(request: pytest.FixtureRequest) -> Callable[[str], JupyterCodeExecutor]:
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

    def make(name: str) -> JupyterCodeExecutor:
        executor = stack.enter_context(JupyterCodeExecutor(stack.enter_context(servers[name]())))
        assert executor.execute("1").status == "ok"
        return executor

    return make


def launch_theirs() -> Any:
    """Start a kernel and get a first answer in the way of jupyter_client; returns its manager and client."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    client.execute_interactive("1", output_hook=lambda message: None)
    return manager, client


def launch_ours(server: Any) -> JupyterCodeExecutor:
    executor = JupyterCodeExecutor(server)
    assert executor.execute("1").status == "ok"
    return executor


def end(kernel: Any) -> None:
    """End what launch_theirs or launch_ours has started."""
    if isinstance(kernel, JupyterCodeExecutor):
        kernel.stop()
    else:
        manager, client = kernel
        client.stop_channels()
        manager.shutdown_kernel(now=True)


WAYS = ["local", "relay", "docker", "local gateway", "docker gateway"]


@pytest.mark.bench
@pytest.mark.benchmark(group="a cell of `1`")
@pytest.mark.parametrize("way", [*WAYS, "jupyter_client", "raw"])
def test_bench_cell(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    if way in WAYS:
        executor = rivals(way)
        benchmark.pedantic(lambda: executor.execute("1"), rounds=200, warmup_rounds=20)
        return
    manager, client = launch_theirs()
    cell = raw_cell(client) if way == "raw" else lambda: client.execute_interactive("1", output_hook=lambda m: None)
    benchmark.pedantic(cell, rounds=200, warmup_rounds=20)
    end((manager, client))


def raw_cell(client: Any) -> Callable[[], None]:
    """A loop of bare pyzmq over the client's sockets, as lean as can be."""
    shell, iopub = client.shell_channel.socket, client.iopub_channel.socket
    poller = zmq.Poller()
    poller.register(shell, zmq.POLLIN)
    poller.register(iopub, zmq.POLLIN)

    def cell() -> None:
        sent = client.session.send(shell, "execute_request", jupyter_exec.execute_content("1"))["header"]["msg_id"]
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
@pytest.mark.benchmark(group="100 MB of stdout")
@pytest.mark.parametrize("way", WAYS[:3])
def test_bench_output(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    executor = rivals(way)
    benchmark.pedantic(lambda: executor.execute("print('x' * 100_000_000)"), rounds=3)


@pytest.mark.bench
@pytest.mark.benchmark(group="first result")
@pytest.mark.parametrize("way", [*WAYS, "jupyter_client"])
def test_bench_first_result(
    benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor], engine: Any
) -> None:
    def ours() -> None:
        rivals(way)._server.stop()

    benchmark.pedantic(ours if way in WAYS else lambda: end(launch_theirs()), rounds=3)


class ReportedTime:
    """A clock that goes on by what child processes report of themselves, without the start of their Python."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


reported_time = ReportedTime()


@pytest.mark.bench
@pytest.mark.benchmark(group="import", timer=reported_time)
@pytest.mark.parametrize("module", ["jupyter_exec", "zmq", "jupyter_client"])
def test_bench_import(benchmark: Any, module: str, tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path)
    program = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def import_it() -> None:
        child = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True)
        reported_time.now += float(child.stdout)

    benchmark.pedantic(import_it, rounds=20, warmup_rounds=1)


KERNEL_WAYS = ["local", "launched", "docker", "jupyter_client"]


@pytest.mark.bench
@pytest.mark.benchmark(group="a further kernel")
@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_bench_further_kernel(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    server = None if way == "jupyter_client" else rivals(way)._server
    started: list[Any] = []
    benchmark.pedantic(lambda: started.append(launch_ours(server) if server else launch_theirs()), rounds=5)
    for kernel in started:
        end(kernel)


@pytest.mark.bench
@pytest.mark.benchmark(group="restart")
@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_bench_restart(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    if way == "jupyter_client":
        manager, client = launch_theirs()

        def restart_theirs() -> None:
            manager.restart_kernel()
            client.wait_for_ready()
            client.execute_interactive("1", output_hook=lambda message: None)

        benchmark.pedantic(restart_theirs, rounds=5)
        end((manager, client))
        return
    executor = rivals(way)

    def restart() -> None:
        executor.restart()
        executor.execute("1")

    benchmark.pedantic(restart, rounds=5)


@pytest.mark.bench
@pytest.mark.benchmark(group="8 kernels at once")
@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_bench_eight_kernels(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    server = None if way == "jupyter_client" else rivals(way)._server
    started: list[Any] = []
    with ThreadPoolExecutor(8) as pool:

        def start_eight() -> None:
            started.extend(pool.map(lambda _: launch_ours(server) if server else launch_theirs(), range(8)))

        benchmark.pedantic(start_eight, rounds=2)
        list(pool.map(end, started))


LINES = "import sys\nfor _ in range(10**6): sys.stdout.write('x' * 99 + chr(10))"


@pytest.mark.bench
@pytest.mark.benchmark(group="100 MB of stdout, in lines")
@pytest.mark.parametrize("way", ["local", "docker", "jupyter_client"])
def test_bench_lines(benchmark: Any, way: str, rivals: Callable[[str], JupyterCodeExecutor]) -> None:
    if way == "jupyter_client":
        manager, client = launch_theirs()
        benchmark.pedantic(lambda: client.execute_interactive(LINES, output_hook=lambda message: None), rounds=3)
        end((manager, client))
        return
    executor = rivals(way)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    benchmark.pedantic(lambda: executor.execute(LINES), rounds=3)
    print(f"\n{way}: 100 MB of lines let the client grow by {peak_memory() - before:.0f} MB")


def peak_memory() -> float:
    """Return the largest resident set of this process since it was last cleared, in MB."""
    (peak,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(peak) / 1024


@pytest.mark.bench
@pytest.mark.benchmark(group="20 cells in each of many kernels")
@pytest.mark.parametrize("count", [5, 50])
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
        list(pool.map(end, executors))
    rate = 20 * count / benchmark.stats.stats.median
    print(f"\n{count} kernels: {took / count * 1000:.0f} ms and {pss:.1f} MB PSS each, {rate:.0f} cells/s over all")
