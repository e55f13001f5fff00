# SPDX-License-Identifier: MIT - jupyter_exec - stateful code execution in Jupyter kernels, in one file
"""Run code in stateful Jupyter kernels: one file, without jupyter_client.

Variables live from block to block, an error costs only the failing block, and images come back as files::

    from jupyter_exec import CodeBlock, JupyterCodeExecutor, LocalJupyterServer

    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
        print(executor.execute_code_blocks([CodeBlock("print('Hello, World!')")]))
    # exit_code=0 output='Hello, World!\\n' output_files=[]

The module speaks the kernel wire protocol itself. It needs ``pyzmq``; a kernel needs ``ipykernel`` in *its*
Python. To vendor it, copy this file: it may be imported under any name, and shares no state with other copies.

Contents (a section uses names of the sections above it only; "pure" = no socket, clock, process or file)

    1  Errors         pure   one tree; data in attributes, the sentence in ``str()``
    2  Messages       pure   Message, KernelConnection
    3  Codecs         pure   ZmqCodec (multipart + HMAC), PipeCodec (the host's pipe), JsonCodec and V1Codec
    4  WebSocket      pure   the client's side of RFC 6455
    5  Text           pure   what a terminal would show; MIME types to files
    6  Files                 Folder, CallFiles: what is written on this machine
    7  Execution      pure   state machine of one cell; its outputs within one budget; results
    8  I/O thread            Deadline, Loop, Pipe, Mailbox, ZeroMQ
    9  Kernel client         one cell at a time: replies, outputs, deadline, interrupt, death
    10 Kernel host           kernelspecs, launch, watch, relay, files; runs at the other end of a pipe
    11 Jupyter servers       JupyterConnectionInfo, RemoteJupyterServer: REST and WebSockets
    12 Hosted servers        the link to a kernel host, CommandJupyterServer, LocalJupyterServer
    13 Docker                DockerJupyterServer
    14 Host tools            functions of this program that code in a kernel calls
    15 Files and variables   of a kernel, in and out
    16 Code executor         code blocks, jobs, JupyterCodeExecutor and its async face
    17 Command line          ``jupyter-exec run``, ``jupyter-exec kernels``, ``jupyter-exec mcp``
    18 License

Where the kernels live: a server object starts a Python process, sends it this very module over stdin, and
the process becomes the *kernel host* that starts, watches and kills kernels. When your program ends, however it
ends, the pipe closes, and the host takes every kernel with it.

Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

from __future__ import annotations

import ast
import atexit
import base64
import bisect
import builtins
import codecs
import contextlib
import contextvars
import copy
import errno
import functools
import inspect
import io
import itertools
import json
import keyword
import logging
import math
import os
import queue
import re
import reprlib
import selectors
import signal
import socket
import stat
import string
import struct
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, TextIO, TypedDict, TypeVar, cast, overload

if TYPE_CHECKING:  # at run time, modules that are slow to import are imported where they are used
    import argparse
    import asyncio
    import hmac
    import ssl
    import subprocess
    import tempfile
    from concurrent.futures import Future
    from typing import Concatenate

    from typing_extensions import Unpack  # type checkers know it, installed or not

__version__ = "0.1.0"

__all__ = ["CODE_WRITER_SYSTEM_MESSAGE", "AsyncJob", "AsyncJupyterCodeExecutor", "CodeBlock", "CodeResult"]
__all__ += ["CommandJupyterServer", "ConnectionClosed", "DockerJupyterServer", "ExecutionError", "ExecutionResult"]
__all__ += ["ExecutionTimeout", "FarFile", "FileTransferError", "IPythonCodeResult", "InputHook", "Job"]
__all__ += ["JupyterCodeExecutor", "JupyterConnectionInfo", "JupyterExecError", "JupyterServer", "KernelClient"]
__all__ += ["KernelConnection", "KernelDied", "KernelError", "KernelSpecNotFound", "KernelStartFailed"]
__all__ += ["LocalJupyterServer", "MarkdownCodeExtractor", "OutputFile", "OutputHook", "ProtocolError"]
__all__ += ["RemoteJupyterServer", "SandboxError", "ServerError", "SignatureError", "ToolError", "ToolRefused"]
__all__ += ["VariableError", "tool_call_ended"]

MAX_MESSAGE = 512 * 2**20  # bytes of one message, whoever sends it; a kernel's 200 MB print is legal
START_TIMEOUT = 60.0  # seconds for a kernel's first answer; before that, as many for its host or container to start
CONTROL_TIMEOUT = 10.0  # seconds for the host to answer a control request; it answers in milliseconds
INTERRUPT_GRACE = 5.0  # seconds that an interrupted cell has to end before its kernel is killed
INTERRUPT_REPEAT = 1.0  # seconds after an interrupt in which another of the same cell has no effect
FORK_TIMEOUT = 2.0  # seconds for a fork server that is at work to fork a kernel; it takes milliseconds
FENCE_DELAY = 1.0  # seconds after one of execute_reply and idle has come, before the other counts as overdue
SHUTDOWN_GRACE = 2.0  # seconds that a kernel has to end by itself after shutdown_request
DEATH_DRAIN = 0.02  # seconds of silence after a kernel's death before its output counts as complete
PING_INTERVAL = 20.0  # seconds between pings; proxies cut a silent WebSocket after 60
RECONNECT_TIMEOUT = 15.0  # seconds of trying until a lost connection counts as lost for good
# In order: nobody could answer a question; clients want to list kernels; a rate limit would drop output.
GATEWAY_OPTIONS = [
    "--JupyterApp.answer_yes=true",
    "--JupyterWebsocketPersonality.list_kernels=true",
    "--ZMQChannelsWebsocketConnection.limit_rate=False",
]
# Once it listens, the gateway writes its port to a file that only we can write: no other process gets our token.
# -m would put the working directory on sys.path, where an agent's signal.py shadows the library.
GATEWAY_PROGRAM = """
import os, sys
sys.path[:] = filter(None, sys.path)
from kernel_gateway.gatewayapp import KernelGatewayApp as App
def start(app, start=App.start):
    with open(os.environ.pop("JUPYTER_EXEC_PORT_FILE"), "x") as file:
        print(next(iter(app.http_server._sockets.values())).getsockname()[1], file=file)
    start(app)
App.start = start
App.launch_instance()
"""
MAX_WEBSOCKET_MESSAGE = 10 * 2**20  # bytes; tornado, below every Jupyter server, resets the connection beyond
ENGINE_TIMEOUT = 20  # seconds for the Docker engine to answer at all, on a machine under load
WAIT_TIMEOUT = 30  # seconds for the Docker engine to do something, such as start a container
STOP_TIMEOUT = 10  # seconds for the Docker engine to end a container: stop() should not take long
BUILD_TIMEOUT = 1800  # seconds without a word from the engine while it builds an image
NORMAL_USER = "1000:1000"  # the user that code runs as in a container, where it would otherwise be root
MAX_ANSWER = 4 * 2**20  # bytes of an HTTP answer, head included; hostile JSON takes thirty times as much when parsed
LARGE_PART = 2**16  # bytes; a larger part of a message is not copied, but read in ZeroMQ's own memory
STREAM_PIECE = 2**17  # bytes of a stream message that are parsed at a time
MAX_JSON = 64 * 2**20  # bytes of a message that is no stream; its Python objects may take four times as much
MAX_HEADER = 2**20  # bytes of each of header, parent_header and metadata
MAILBOX_LIMIT = 64 * 2**20  # unread bytes of a kernel: beyond this its output is dropped, at twice this it is killed
RELAY_LIMIT = 64 * 2**20  # bytes that wait at the host for a slow link, beyond which output is dropped
RELAY_PIECE = 2**18  # bytes of such output that go at a time, so that other things get their turn
SLOW_LINK = 1.0  # seconds; an interrupt drops output that has waited there for longer, so that the cell ends in time
MAX_OUTPUT = 100_000  # characters of text that one call returns; of code blocks the whole goes to a file
MAX_SPILL = 256 * 2**20  # characters of such a file
MAX_OUTPUTS = 50_000  # outputs of one cell that are kept
MAX_KEPT = 128 * 2**20  # bytes of a cell's outputs other than streams that are kept
MAX_LINE = 2**20  # characters of an open line; a longer one counts as ended, unless half of it was erased
MAX_FILES = 500  # files of one call
MAX_FILE_BYTES = 2**30  # bytes of all files of one call; also of a session's journal
HOOK_RUNS_CELL = "A cell is running: its hooks cannot run another one."
STILL_RUNNING = "the code is still running; wait() returns the rest"
MAX_IMAGE = 15 * 2**18  # bytes of a picture for a model: 5 MB in base64, more is refused by Anthropic's API
MAX_DOWNLOAD = 2**28  # bytes of a file that is brought here, unless a call says otherwise
MAX_LISTED = 10_000  # entries of a directory that is listed
CELL_PIECE = 2**18  # bytes that one silent cell carries: of variables, and of files if the kernel has no host
TRANSFER_TIMEOUT = 30.0  # seconds without an answer after which a transfer is given up
TRANSFER_CHECK = 0.2  # seconds between two checks whether the transfer is still wanted
TRUNCATED = "Of the text only head and tail were kept; max_output says how much"
STDERR_TAIL = 4096  # bytes of a kernel's stderr that are kept to explain its death
RAW_STDERR_TAIL = 2**16  # bytes of a stderr that are kept until `without_machinery` shortens the stack in it
MAX_TOOL_JSON = 4 * 2**20  # characters of JSON of a tool call's arguments, or of its result
MAX_TOOLS_AT_ONCE = 64  # tool calls of one cell that run at the same time; the others wait
PAUSE_POLL = 0.2  # seconds between two checks whether a stopped clock goes on again

Json = dict[str, Any]
AnyPath = str | os.PathLike[str]
logger = logging.getLogger("jupyter_exec")
logger.addHandler(logging.NullHandler())
build_logger = logger.getChild("build")  # building an image takes minutes; the command line shows these messages

if __name__ not in sys.modules:  # loaded by hand; dataclasses and pickle look their module up by its name
    _by_hand: Any = type("module", (), {})()
    _by_hand.__dict__ = globals()
    sys.modules[__name__] = _by_hand


# ======================================================================================================
# 1. Errors (pure)
#
# Each keeps its data as attributes; every field has a default, so that pickle can rebuild it.
# ======================================================================================================


class JupyterExecError(Exception):
    """Base of all errors of this module."""


class ProtocolError(JupyterExecError):
    """The peer, or a connection file, broke the protocol."""


class SignatureError(ProtocolError):
    """A message is not signed with the kernel's key."""


class ConnectionClosed(JupyterExecError, ConnectionError):
    """The kernel's host, or the server object, is gone."""


class ExecutionTimeout(JupyterExecError, TimeoutError):
    """A deadline passed."""


@dataclass(eq=False)
class ExecutionError(JupyterExecError):
    """The code of a cell raised; `traceback` is text without ANSI codes."""

    ename: str = ""
    evalue: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.ename}: {self.evalue}\n{self.traceback}"


class KernelError(JupyterExecError):
    """Something is wrong with one kernel."""


@dataclass(eq=False)
class KernelSpecNotFound(KernelError, ValueError):
    """There is no kernelspec of that name; lists the kernels that exist and the places that were searched."""

    name: str = ""
    available: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    python: str = ""

    def __str__(self) -> str:
        hint = f"Available: {', '.join(self.available) or 'none'}."
        if self.name in ("python", "python3"):
            hint = f"Install it with: {self.python or 'python3'} -m pip install ipykernel. {hint}"
        elif self.available:
            hint += " Another one of these may do (kernel_name=, --kernel)."
        return f"Kernel {self.name} is not installed. {hint} Searched: {', '.join(self.searched)}"


@dataclass(eq=False)
class KernelStartFailed(KernelError):
    """A kernel, or the host that was to run it, did not start; `argv` is the command, [] if there is none."""

    argv: list[str] = field(default_factory=list)
    reason: str = ""
    exit_code: int | None = None  # negative: killed by that signal
    stderr: str = ""
    attached: bool | None = None  # True: somebody else had started it

    def __str__(self) -> str:
        failed = "cannot be attached to" if self.attached else "could not be started"
        lines = [f"The kernel {failed}: {self.reason or describe_exit(self.exit_code)}."]
        if self.argv:
            lines.append(f"Command: {' '.join(word.partition(chr(10))[0] for word in self.argv)}")
        if self.stderr:
            lines.append(self.stderr.rstrip())
        if self.argv and "No module named" in self.stderr and "ipykernel" in self.stderr:
            lines.append(f"Install it with: {self.argv[0]} -m pip install ipykernel")
        return "\n".join(lines)


@dataclass(eq=False)
class KernelDied(KernelError):
    """A kernel whose process ended while it was in use; all its variables are lost."""

    cause: str = ""
    exit_code: int | None = None  # negative: killed by that signal; None: unknown
    stderr: str = ""
    retryable: bool = False  # another start may succeed

    def __str__(self) -> str:
        tail = f"\n{self.stderr.rstrip()}" if self.stderr.strip() else ""
        return f"The kernel died ({self.sentence()}); all variables are lost{tail}"

    def sentence(self) -> str:
        """Return the cause as a part of a sentence."""
        return self.cause or describe_exit(self.exit_code)

    def status(self) -> int:
        """Return an exit status for this death: 128 + N for signal N, 137 if the cause is unknown, else 1."""
        if self.exit_code is None:
            return 137
        return 128 - self.exit_code if self.exit_code < 0 else 1


@dataclass(eq=False)
class FileTransferError(JupyterExecError, OSError):
    """A file that could not be brought to where a kernel runs, or from there; `path` is the one at fault."""

    path: str = ""
    reason: str = ""
    code: str = ""  # the name of an errno, such as ENOENT; "" if it was none
    here: bool = False  # `path` is one of this machine

    @property
    def errno(self) -> int | None:  # type: ignore[override]
        return getattr(errno, self.code, None)

    def __str__(self) -> str:
        return f"The file {self.path!r} {'here' if self.here else 'at the kernel'}: {self.reason}"


@dataclass(eq=False)
class VariableError(JupyterExecError, ValueError):
    """A variable that could not be set in a kernel, or had from it."""

    name: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"The variable {self.name!r}: {self.reason}"


@dataclass(eq=False)
class ServerError(JupyterExecError):
    """A Jupyter server refuses a request, or gives an answer that no Jupyter server would give."""

    method: str = ""
    url: str = ""  # without a token
    status: int = 0
    body: str = ""  # the end of it, or what it says

    def __str__(self) -> str:
        says = {401: " The token is missing or wrong.", 403: " The token is missing or wrong, or this is not allowed."}
        says[404] = " Is base_url right?" if "/api/kernelspecs" in self.url else ""
        says[424] = says[503] = " Nothing runs behind it now; on a JupyterHub, start the server there."
        where = f"{self.method} {self.url}".strip()
        return f"The Jupyter server answered {self.status} to {where}.{says.get(self.status, '')} {self.body}".rstrip()


@dataclass(eq=False)
class SandboxError(JupyterExecError):
    """A container could not be started, or the Docker engine cannot be used."""

    reason: str = ""
    image: str = ""
    container: str = ""
    logs: str = ""

    def __str__(self) -> str:
        names = [f"{what} {name}" for what, name in (("image", self.image), ("container", self.container)) if name]
        where = f" ({', '.join(names)})" if names else ""
        return f"{self.reason}{where}\n{self.logs.strip()}".rstrip("\n")


class ToolError(JupyterExecError):
    """A tool failed, or could not be called. Raised in the kernel, as a plain Exception; tools may raise it, too."""


class ToolRefused(ToolError):
    """The program does not allow this call of a tool; the message is its reason. Raised like ToolError."""


def describe_os_error(error: OSError) -> str:
    """Return what an OSError says, without its number."""
    return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror or error)


def describe_exit(exit_code: int | None) -> str:
    """Return how a process ended; `exit_code` is negative for a signal, None if it is unknown."""
    if exit_code is None:
        return "cause unknown"
    if exit_code >= 0:
        return f"it ended by itself with exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"


def check_seconds(**options: Any) -> None:
    """Raise TypeError or ValueError unless options are numbers of seconds, math.inf included."""
    for name, value in options.items():
        is_number = isinstance(value, int | float)
        if not (is_number and value > 0):
            raise (ValueError if is_number else TypeError)(f"{name} must be a number of seconds, not {value!r}.")


def check_counts(**options: Any) -> None:
    """Raise TypeError or ValueError unless options are whole numbers."""
    for name, value in options.items():
        is_number = isinstance(value, int)
        if not (is_number and value >= 0):
            raise (ValueError if is_number else TypeError)(f"{name} must be a whole number, 0 or more, not {value!r}.")


# ======================================================================================================
# 2. Messages (pure)
# ======================================================================================================


def text_of(value: object) -> str:
    """Return `value` as text if it is a string or a number, else "": `str` of a deeply nested list would raise."""
    return str(value) if isinstance(value, str | int | float) else ""


def part_of(value: Any, *names: str) -> Any:
    """Follow `names` into nested JSON that others sent; return what is there, None if a name is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


@dataclass(slots=True)
class Message:
    """One message of the Jupyter protocol, without identities and signature.

    Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html#general-message-format
    """

    channel: str  # "shell", "iopub", "stdin" or "control"
    header: Json
    parent_header: Json
    metadata: Json
    content: Json
    buffers: list[bytes]
    size: int = field(default=0, compare=False)  # about how many bytes it takes in memory
    lost: bool = False  # its content was too large or not JSON, and is now {}

    @property
    def msg_type(self) -> str:
        return text_of(self.header.get("msg_type"))

    @property
    def msg_id(self) -> str:
        return text_of(self.header.get("msg_id"))

    @property
    def parent_id(self) -> str:
        return text_of(self.parent_header.get("msg_id"))

    def dumped(self) -> list[bytes]:
        """Return header, parent_header, metadata and content as JSON."""
        return list(map(dump_json, (self.header, self.parent_header, self.metadata, self.content)))


def execute_content(code: str, *, silent: bool, store_history: bool, asks: bool, expression: str | None) -> Json:
    """Return the content of an execute_request; `asks`: input() works. The value of `expression` comes with the reply.

    Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html#execute
    """
    # ipykernel never answers to code with surrogates: a pair becomes its character, a single one U+FFFD.
    code = code.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return {
        "code": code,
        "silent": silent,
        "store_history": store_history,
        "user_expressions": {} if expression is None else {"value": expression},
        "allow_stdin": asks,
        "stop_on_error": False,  # with True, a kernel under load has aborted the next cell
    }


@dataclass(frozen=True)
class KernelConnection:
    """A connection file as a value: where a kernel listens, and the key that signs its messages.

    With transport "ipc", `ip` is the prefix of the socket files and the ports are their numbers.

    Spec: https://jupyter-client.readthedocs.io/en/stable/kernels.html#connection-files
    """

    ip: str
    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int = 0
    transport: str = "tcp"
    key: str = field(default="", repr=False)
    signature_scheme: str = "hmac-sha256"
    kernel_name: str = ""

    @classmethod
    def from_json(cls, text: str | bytes) -> KernelConnection:
        """Parse the text of a connection file. Raises: ProtocolError, which names the wrong field."""
        data = json_object(text, "connection file")
        given = [f.name for f in fields(cls) if data.get(f.name) is not None]
        for name in ("ip", "shell_port", "iopub_port", "stdin_port", "control_port"):
            if name not in given:
                raise ProtocolError(f"The connection file has no {name!r}.")
        connection = cls(**{name: _checked(name, data[name]) for name in given})
        if connection.transport not in ("tcp", "ipc"):
            raise ProtocolError(f"The connection file's transport {connection.transport!r} is neither tcp nor ipc.")
        new_signer(connection.key, connection.signature_scheme)  # raises for an unknown scheme
        return connection

    def to_json(self) -> str:
        """Return the text of a connection file."""
        return json.dumps(asdict(self), indent=2)

    def address(self, channel: str) -> str:
        """Return the ZeroMQ endpoint of `channel`."""
        port = getattr(self, f"{channel}_port")
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{port}"
        return f"tcp://[{self.ip}]:{port}" if ":" in self.ip else f"tcp://{self.ip}:{port}"


def _checked(name: str, value: Any) -> Any:
    is_port = name.endswith("_port")
    # JEP 106 allows ports as strings; xeus writes them so.
    if is_port and isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value):
        value = int(value)
    if is_port and (type(value) is not int or not 0 <= value <= 65535):
        raise ProtocolError(f"The connection file's {name!r} is not a port number.")
    if not is_port and not isinstance(value, str):
        raise ProtocolError(f"The connection file's {name!r} is not a string.")
    return value


def new_signer(key: str, signature_scheme: str) -> hmac.HMAC | None:
    """Return an HMAC to copy for each message, None if none is signed. Raises: ProtocolError for an unknown scheme."""
    import hmac

    kind, _, digest = signature_scheme.partition("-")
    try:
        if kind != "hmac":
            raise ValueError
        signer = hmac.new(key.encode("utf-8"), digestmod=digest)
        signer.hexdigest()
    except (ValueError, TypeError):
        raise ProtocolError(f"Unknown signature scheme {signature_scheme!r}.") from None
    # "If you want to disable authentication, [the key] should be an empty string."
    return signer if key else None


def json_object(data: str | bytes | memoryview, what: str) -> Json:
    """Parse a JSON object from a peer. Raises: ProtocolError, which calls it `what`."""
    if len(data) > MAX_JSON or (len(data) > LARGE_PART and json_weight(data) > 4 * MAX_JSON):
        raise ProtocolError(f"The {what} is too large: {len(data)} bytes or characters.")
    try:
        # ipykernel sends lone surrogates as raw bytes: "replace" keeps the rest of such a message.
        text = data if isinstance(data, str) else str(data, "utf-8", "replace")
        # Thousands of digits take long to parse, and cannot be printed: they stay text.
        value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 400 else digits)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"The {what} is not JSON: {error.__class__.__name__}.") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"The {what} is not a JSON object.")
    return value


_JSON_STRING = re.compile('"[^"]*"?')  # for text whose escapes were removed


def json_weight(text: str | bytes | memoryview) -> int:
    """Return about how many bytes JSON takes as Python objects: 60 MB of empty lists become 1.5 GB."""
    characters = text if isinstance(text, str) else str(text, "latin-1")
    objects = sum(map(characters.count, '[{,"'))
    strings = (characters.count('"') - characters.count('\\"')) // 2
    if objects > 2**18 and strings < 2**20:  # they may be text in strings, as in an HTML page: count again without
        rest, strings = _JSON_STRING.subn("", characters.replace("\\\\", "").replace('\\"', ""))
        objects = strings + sum(map(rest.count, "[{,"))
    return len(text) + 64 * objects


def _object_or_null(data: bytes | memoryview, what: str) -> Json:
    # Deviation: xeus kernels send null for an empty parent_header, metadata or transient.
    return {} if data in (b"{}", b"null") else json_object(data, what)


def dump_json(value: object) -> bytes:
    """Encode as ASCII: lone surrogates in code survive as escapes."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


# ======================================================================================================
# 3. Codecs (pure)
# ======================================================================================================

DELIMITER = b"<IDS|MSG>"


class ZmqCodec:
    """Message <-> the parts of one ZeroMQ multipart message, signed with the kernel's key.

    It keeps no record of signatures: so a forged copy cannot make it refuse the genuine message. Raises: ProtocolError
    for an unknown signature scheme.

    Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html#the-wire-protocol
    """

    def __init__(self, key: str, signature_scheme: str = "hmac-sha256") -> None:
        self._signer = new_signer(key, signature_scheme)

    def _sign(self, parts: Iterable[bytes]) -> bytes:
        if self._signer is None:
            return b""
        signer = self._signer.copy()
        for part in parts:
            signer.update(part)
        return signer.hexdigest().encode("ascii")

    def encode(self, message: Message) -> list[bytes]:
        """Return [DELIMITER, signature, header, parent_header, metadata, content, *buffers]."""
        signed = message.dumped()
        return [DELIMITER, self._sign(signed), *signed, *message.buffers]

    def decode(self, channel: str, parts: Sequence[bytes]) -> Iterator[Message]:
        """Verify and parse `parts`; identities and the topic, if any, stand before the delimiter.

        Yields one message; a huge one of type stream comes in pieces. Raises: SignatureError, ProtocolError.
        """
        from hmac import compare_digest

        try:
            start = parts.index(DELIMITER) + 1
        except ValueError:
            raise SignatureError("A message has no delimiter.") from None
        if len(parts) - start < 5:
            raise SignatureError("A message has fewer than five parts.")
        if sum(map(len, parts)) > MAX_MESSAGE:
            raise ProtocolError(f"A message is larger than {MAX_MESSAGE} bytes.")
        signature, header, parent_header, metadata, content = parts[start : start + 5]
        # "The signature is computed over the *serialized* parts exactly as sent; buffers are not signed."
        if not compare_digest(signature, self._sign((header, parent_header, metadata, content))):
            raise SignatureError("A message is not signed with the kernel's key.")
        yield from messages_of(channel, parts[start + 1 :])


# The types whose content is used; of a large message of another type only the headers are parsed.
_CONTENTS = {"stream", "execute_result", "display_data", "update_display_data", "error", "input_request"}
_CONTENTS |= {"execute_reply", "kernel_info_reply"}
# At the end of JSON text: a half of a surrogate pair, an escape that is not complete, or both; or a torn character.
_TORN = re.compile(
    rb"(?<!\\)(?:\\\\)*((?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?"
    rb"|[\xc0-\xff]|[\xe0-\xff][\x80-\xbf]|[\xf0-\xff][\x80-\xbf]{2})\Z"
)
_STREAM_START = re.compile(rb'\{\s*"name"\s*:\s*"std(?:out|err)"\s*,\s*"text"\s*:\s*"')


def messages_of(channel: str, parts: Sequence[bytes]) -> Iterator[Message]:
    """Parse [header, parent_header, metadata, content, *buffers]; a huge stream in pieces. Raises: ProtocolError."""
    if max(map(len, parts[:3])) > MAX_HEADER:
        raise ProtocolError(f"The header of a message is larger than {MAX_HEADER} bytes.")
    header, parent_header = json_object(parts[0], "header"), _object_or_null(parts[1], "parent_header")
    is_read = text_of(header.get("msg_type")) in _CONTENTS
    if len(parts[3]) > STREAM_PIECE and not is_read:
        parts = [*parts[:2], b"{}", b"{}"]
    metadata, content, buffers = _object_or_null(parts[2], "metadata"), parts[3], list(map(bytes, parts[4:]))
    size, is_stream = sum(map(len, parts)) + 1000, header.get("msg_type") == "stream"
    if is_read and not is_stream and len(content) <= MAX_JSON:  # a stream is limited by its characters, in Outputs
        size += json_weight(content)
    for piece in stream_pieces(content) if is_stream else [content]:
        message = Message(channel, header, parent_header, metadata, {}, buffers, size)
        try:
            message.content = _object_or_null(piece, "content")
        except ProtocolError:  # it is too large, or nested too deeply
            message.lost = True
        yield message


def stream_pieces(content: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Cut the JSON of a stream into several of STREAM_PIECE bytes: a print of 200 MB is never parsed as a whole."""
    start = _STREAM_START.match(content[:100])
    if not start or len(content) <= STREAM_PIECE or content[-2:] != b'"}':
        yield content
        return
    head, position, end = bytes(content[: start.end()]), start.end(), len(content) - 2
    while position < end:
        piece = bytes(content[position : min(position + STREAM_PIECE, end)])
        if position + len(piece) < end:
            torn = _TORN.search(piece, len(piece[:-12].rstrip(b"\\")))  # a torn pair of escapes has up to 11 bytes
            piece = piece[: torn.start(1) if torn else None] or bytes(content[position:end])
        yield b"".join((head, piece, b'"}'))
        position += len(piece)


class PipeCodec:
    """Lists of byte strings <-> the byte stream between a server object and its kernel host.

    A frame is b"JX", its length (u32), a table like that of V1Codec, and the parts; integers are big-endian. The first
    part is an address: b"" for control (JSON and bytes follow), b"KERNEL/CHANNEL" for a relayed message (the parts of
    the ZeroMQ message follow, signed end to end), b"+KERNEL" for a piece of the frame of a large message.
    """

    _HEAD = struct.Struct(">2sI")

    def __init__(self) -> None:
        self._buffer = bytearray()

    @classmethod
    def encode(cls, parts: Sequence[bytes]) -> bytes:
        """Return the frame of `parts`. Raises: ProtocolError for more than MAX_PARTS or MAX_MESSAGE."""
        length = 4 * (len(parts) + 1) + sum(map(len, parts))
        if len(parts) > MAX_PARTS or length > MAX_MESSAGE:
            raise ProtocolError(f"A message has {len(parts)} parts and {length} bytes.")
        return _join_parts(">I", parts, cls._HEAD.pack(b"JX", length))

    def feed(self, data: bytes) -> Iterator[list[bytes]]:
        """Take received bytes; yield the parts of each complete frame. Raises: ProtocolError; close then."""
        self._buffer += data
        while len(self._buffer) >= self._HEAD.size:
            magic, length = self._HEAD.unpack_from(self._buffer)
            if magic != b"JX":
                raise ProtocolError("The pipe carries something that is not a frame.")
            if length > MAX_MESSAGE:
                raise ProtocolError(f"A frame of {length} bytes is over the limit of {MAX_MESSAGE}.")
            end = self._HEAD.size + length
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view, view[self._HEAD.size : end] as body:
                parts = _cut_parts(">I", body)
            del self._buffer[:end]
            yield parts


CHANNELS = ("shell", "iopub", "stdin", "control")
V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
MAX_PARTS = 65535  # of one message: more than the buffers of any widget, few enough to allocate


class JsonCodec:
    """Message <-> WebSocket message without a subprotocol: JSON text, or binary if there are buffers.

    The binary form is a table (big-endian u32), the JSON, the buffers.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/websocket-protocols.html
    """

    _OBJECTS = ("header", "parent_header", "metadata", "content")

    def encode(self, message: Message) -> str | bytes:
        text = dump_json({name: getattr(message, name) for name in ("channel", *self._OBJECTS)} | {"buffers": []})
        return _join_parts(">I", [text, *message.buffers]) if message.buffers else text.decode("ascii")

    def decode(self, data: str | bytes) -> Iterator[Message]:
        """Parse what the server sent. Raises: ProtocolError."""
        parts: list[Any] = [data] if isinstance(data, str) else _cut_parts(">I", data)
        body = json_object(parts[0], "message")
        # Deviation: xeus kernels send null for an empty object.
        objects = [body.get("header"), *({} if body.get(name) is None else body[name] for name in self._OBJECTS[1:])]
        if not all(isinstance(value, dict) for value in objects):
            raise ProtocolError("A part of a message is not a JSON object.")
        size = json_weight(parts[0]) + sum(map(len, parts[1:]))
        header, parent_header, metadata, content = objects
        yield Message(_channel(body.get("channel")), header, parent_header, metadata, content, parts[1:], size)


class V1Codec:
    """Message <-> binary WebSocket message of the subprotocol V1_SUBPROTOCOL.

    The message is a table (little-endian u64), channel, header, parent_header, metadata, content, the buffers.
    """

    def encode(self, message: Message) -> bytes:
        return _join_parts("<Q", [message.channel.encode(), *message.dumped(), *message.buffers, b""])

    def decode(self, data: str | bytes) -> Iterator[Message]:
        """Parse what the server sent; a huge message of type stream comes in pieces. Raises: ProtocolError."""
        parts = [] if isinstance(data, str) else _cut_parts("<Q", data)
        # "offset_n is the number of bytes in the message": nothing is left after it.
        if len(parts) < 6 or parts.pop():
            raise ProtocolError("A message has fewer than five parts, or bytes after the last one.")
        yield from messages_of(_channel(parts[0].decode("utf-8", "replace")), parts[1:])


def _join_parts(word: str, parts: Sequence[bytes], head: bytes = b"") -> bytes:
    # The table is the number of parts, then the offset of each from the table's start, all in one format.
    offsets = itertools.accumulate(map(len, parts[:-1]), initial=struct.calcsize(word) * (len(parts) + 1))
    return b"".join((head, struct.pack(f"{word[0]}{len(parts) + 1}{word[1]}", len(parts), *offsets), *parts))


def _cut_parts(word: str, data: bytes | memoryview) -> list[bytes]:
    size = struct.calcsize(word)
    count = struct.unpack_from(word, data)[0] if len(data) >= size else 0
    if not 1 <= count <= MAX_PARTS or len(data) < size * (count + 1):
        raise ProtocolError("A message's table of offsets is missing or too long.")
    # A hostile offset points back, into the table or behind the end.
    bounds = [size * (count + 1), *struct.unpack_from(f"{word[0]}{count}{word[1]}", data, size), len(data)]
    if bounds != sorted(bounds):
        raise ProtocolError("A message's offsets do not fit its length.")
    return [bytes(data[start:end]) for start, end in itertools.pairwise(bounds[1:])]


def _channel(name: object) -> str:
    if name not in CHANNELS:
        raise ProtocolError("A message names no channel of a kernel.")
    return str(name)


# ======================================================================================================
# 4. WebSocket protocol (pure)
#
# The client's side: check the server's answer, then turn bytes into messages and messages into bytes.
#
# Spec: https://www.rfc-editor.org/rfc/rfc6455; the lines that obey or enforce one of its sentences quote it with
# its section. A sentence that is enforced is the text of the ProtocolError.
# ======================================================================================================

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


def check_opening(key: str, header: Callable[[str], str | None]) -> str | None:
    """Check an answer with status 101; return the subprotocol, None for Jupyter's default. Raises: ProtocolError.

    `key` is the Sec-WebSocket-Key of the request; `header(name)` returns a header of the answer.
    """
    import hashlib

    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    digest = hashlib.sha1(key.encode("ascii") + guid, usedforsecurity=False).digest()
    answered = header("Sec-WebSocket-Accept") == base64.b64encode(digest).decode("ascii")
    extended = bool(header("Sec-WebSocket-Extensions"))
    tokens = [token.strip() for token in (header("Connection") or "").lower().split(",")]
    # Jupyter: if no subprotocol is selected, "the Jupyter Server must reply with an empty string".
    subprotocol = header("Sec-WebSocket-Protocol") or None
    rules = {
        "4.2.2: an |Upgrade| header field with value websocket": (header("Upgrade") or "").lower() == "websocket",
        "4.2.2: a |Connection| header field with value Upgrade": "upgrade" in tokens,
        "4.2.2: a |Sec-WebSocket-Accept| header field that answers the key": answered,
        '9: "A server MUST NOT respond with any extension not requested by the client."': not extended,
        '4.1: "a subprotocol not requested by the client"': subprotocol in (None, V1_SUBPROTOCOL),
    }
    for rule, kept in rules.items():
        if not kept:
            raise ProtocolError(f"The WebSocket was not opened. RFC 6455, {rule}")
    return subprotocol


class WebSocket:
    """An open connection: iterate over `receive(data)`, then send `data_to_send()`."""

    def __init__(self, mask: Callable[[], bytes], max_message: int) -> None:
        """`mask()` returns 4 random bytes; `max_message` limits the bytes of one message from the server."""
        self._mask, self._max_message = mask, max_message
        self.closed = False  # by either side, or for a violation
        self._buffer = bytearray()  # received, not parsed yet
        self._ping: bytes | None = None  # payload of the server's latest Ping, if not answered yet
        self._farewell = b""  # a Close frame to send, as an answer or after a violation
        self._opcode = 0  # of a message that is coming in fragments; 0: none is
        self._message = bytearray()  # the fragments that have come

    def receive(self, data: bytes) -> Iterator[str | bytes]:
        """Take received bytes; yield the messages that they complete. Raises: ProtocolError; close then."""
        self._buffer += data
        while not self.closed and (frame := self._next_frame()):
            yield from self._handle(*frame)

    def data_to_send(self) -> bytes:
        """Return the Pong and Close frames that are due, once."""
        # 5.5.3: "the endpoint MAY elect to send a Pong frame for only the most recently processed Ping frame."
        pong = b"" if self._ping is None else self._frame(PONG, self._ping)
        answers, self._ping, self._farewell = pong + self._farewell, None, b""
        return answers

    def send(self, data: str | bytes) -> bytes:
        return self._frame(TEXT, data.encode()) if isinstance(data, str) else self._frame(BINARY, data)

    def ping(self) -> bytes:
        return self._frame(PING, b"")

    def pong(self) -> bytes:
        """Return a Pong frame that answers no Ping."""
        return self._frame(PONG, b"")

    def close(self, code: int = 1000) -> bytes:
        """Return a Close frame, b"" if one was sent or received already: 5.5.1 allows no second one."""
        frame = b"" if self.closed else self._frame(CLOSE, code.to_bytes(2, "big"))
        self.closed = True
        return frame

    def _must(self, kept: object, rule: str, code: int = 1002) -> None:
        if not kept:
            # 7.1.7: "the endpoint SHOULD send a Close frame with an appropriate status code"
            self._farewell = self.close(code)
            raise ProtocolError(f"The WebSocket failed. RFC 6455, {rule}")

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        # Each rule is checked as soon as the bytes for it are there.
        if len(self._buffer) < 2:
            return None
        first, length = self._buffer[:2]
        final, opcode, control = first >= 0x80, first & 0x0F, first & 0x08
        self._must(not first & 0x70, '5.2: "RSV1, RSV2, RSV3 [...] MUST be 0"')
        self._must(opcode in (0, TEXT, BINARY, CLOSE, PING, PONG), f'5.2: "an unknown opcode", {opcode}')
        self._must(length < 0x80, '5.1: "A server MUST NOT mask any frames that it sends to the client."')
        small = not control or (final and length <= 125)
        self._must(small, '5.5: "a payload length of 125 bytes or less and MUST NOT be fragmented."')
        in_order = control or bool(opcode) != bool(self._opcode)
        self._must(in_order, '5.4: "The fragments of one message MUST NOT be interleaved [...]"')
        start = 2 + {126: 2, 127: 8}.get(length, 0)
        if len(self._buffer) < start:
            return None
        length = int.from_bytes(self._buffer[2:start], "big") if start > 2 else length
        shortest = length >= {2: 0, 4: 126, 10: 2**16}[start]
        self._must(shortest, '5.2: "the minimal number of bytes MUST be used to encode the length"')
        fits = control or len(self._message) + length <= self._max_message
        self._must(fits, f'7.4.1: "a message that is too big", over {self._max_message} bytes', 1009)
        if len(self._buffer) < start + length:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[start : start + length])
        del self._buffer[: start + length]
        return final, opcode, payload

    def _handle(self, final: bool, opcode: int, payload: bytes) -> Iterator[str | bytes]:
        if opcode == PING:
            # 5.5.2: "Upon receipt of a Ping frame, an endpoint MUST send a Pong frame in response"
            self._ping = payload
        elif opcode == CLOSE:
            self._must(len(payload) != 1, '5.5.1: "the first two bytes [...] MUST be a 2-byte unsigned integer"')
            code = int.from_bytes(payload[:2], "big") if payload else 1000
            # 7.4.1 and its registry, without 1004 and those that "MUST NOT be set [...] in a Close control frame"
            known = 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
            self._must(known, f"7.4: {code} is not a status code to close with")
            # 5.5.1: "the endpoint MUST send a Close frame in response", and "typically echos the status code"
            self._farewell = self.close(code)
        elif opcode != PONG:
            # 5.4: "all fragments of a message are of the same type, as set by the first fragment's opcode"
            self._opcode = self._opcode or opcode
            if self._message or not final:
                self._message += payload
            if final:
                data, binary = bytes(self._message) or payload, self._opcode == BINARY
                self._opcode, self._message = 0, bytearray()
                yield data if binary else self._text(data)

    def _text(self, data: bytes) -> str:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-8")
        self._must(False, '8.1: "the byte stream is not, in fact, a valid UTF-8 stream"', 1007)
        return ""

    def _frame(self, opcode: int, payload: bytes) -> bytes:
        length = len(payload)
        # 5.2: "the minimal number of bytes MUST be used to encode the length"; 0x80: final, masked
        longer = b"" if length < 126 else length.to_bytes(2 if length < 2**16 else 8, "big")
        head = bytes((0x80 | opcode, 0x80 | {0: length, 2: 126, 8: 127}[len(longer)])) + longer
        # 5.3: "the client MUST pick a fresh masking key"
        key = self._mask()
        # As two big integers: octet by octet, 10 MB would take a second.
        keys = int.from_bytes((key * (length // 4 + 1))[:length], "little")
        masked = (int.from_bytes(payload, "little") ^ keys).to_bytes(length, "little")
        return b"".join((head, key, masked))


# ======================================================================================================
# 5. Text (pure)
# ======================================================================================================

# What a terminal takes for a command: CSI (colours, cursor), strings with an end (titles, clipboard), two characters
# (character sets, reset), the C1 forms of these, any other control character. One pass removes them all.
_CONTROLS = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]{0,8}[0-Z\\^-~]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m|\r")
_DEFAULT_REPR = re.compile(r"<[^\n]*>\Z")  # <Figure size 640x480 with 1 Axes>, <IPython.core.display.HTML object>


def clean_text(text: str, colours: bool = False) -> str:
    """Remove what a terminal would take for a command; newlines and tabs stay.

    With `colours`, for output to a terminal, colours and carriage returns stay too.
    """
    text = text.replace("\r\n", "\n")
    return _CONTROLS.sub(lambda found: found[0] if colours and _COLOUR.fullmatch(found[0]) else "", text)


def without_erased(text: str) -> str:
    """Return `text` without what its carriage returns and backspaces would erase on a terminal."""
    if "\r" not in text and "\b" not in text:
        return text
    lines = []
    for line in text.split("\n"):
        line = line.rstrip("\r").rpartition("\r")[2]
        if "\b" in line:
            left, erased = [], 0  # from the end: so each piece is cut once
            for piece in reversed(re.findall(r"\x08+|[^\x08]+", line)):
                if piece[0] == "\b":
                    erased += len(piece)
                else:
                    left.append(piece[: max(0, len(piece) - erased)])
                    erased = max(0, erased - len(piece))
            line = "".join(reversed(left))
        lines.append(line)
    return "\n".join(lines)


def gap_mark(missing: int, where: str = "") -> str:
    """Return the mark for `missing` characters in a text; `where` says where to find them."""
    return f"\n[{missing} characters are missing here{'; ' * bool(where)}{where}]\n"


def shorten(text: str, limit: int | None, gaps: Sequence[int] = (), where: str = "") -> str:
    """Return head and tail of `text`, `limit` characters in all, with one mark between that says `where` the rest is.

    `gaps`: the text has marks already; for each of them, how many characters are missing there.
    """
    if limit is None or len(text) <= limit:
        for missing in gaps:
            text = text.replace(gap_mark(missing), gap_mark(missing, where), 1)
        return text
    missing = len(text) - limit + sum(gap - len(gap_mark(gap)) for gap in gaps)
    return f"{text[: limit // 2]}{gap_mark(missing, where)}{text[len(text) - (limit - limit // 2) :]}"


def _shorten_all(texts: list[str], limit: int) -> list[str]:
    """Shorten texts that follow each other, as if they were one, to a head and a tail of `limit` characters."""
    total = sum(map(len, texts))
    if total <= limit:
        return texts
    head, tail, at = limit // 2, total - (limit - limit // 2), 0
    shortened = []
    for text in texts:
        gap = gap_mark(total - limit) if at <= head < at + len(text) else ""
        shortened.append(text[: max(0, head - at)] + gap + text[max(0, tail - at) :])
        at += len(text)
    return shortened


def _as_text(content: Any) -> bytes:
    if isinstance(content, list):  # a notebook's way to write a string
        content = "".join(map(str, content))
    if not isinstance(content, str):
        raise ValueError("it is no string")
    return content.encode("utf-8", "replace")


def _as_binary(content: Any) -> bytes:
    data = base64.b64decode(_as_text(content))
    if not data:
        raise ValueError("it is empty")
    return data


def _as_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")  # indented, it may be 100 times as long


def _as_plotly_page(figure: Any) -> bytes:
    """Return a small page that shows a figure; the browser fetches the library."""
    if not isinstance(figure, dict):
        raise ValueError("it is no object")
    known = {name: figure[name] for name in ("data", "layout", "config", "frames") if name in figure}
    text = json.dumps(known).replace("<", "\\u003c")  # or it could end the script
    page = '<!DOCTYPE html><meta charset="utf-8"><title>Plotly</title><div id="figure"></div>'
    page += '<script src="https://cdn.plot.ly/plotly-3.0.1.min.js"></script>'
    return f'{page}<script>Plotly.newPlot("figure", {text})</script>\n'.encode()


# What goes to a file, best first: MIME type -> (word for AutoGen's sentence, suffix, function that makes the file's
# bytes of what a kernel sent; it raises ValueError if it cannot).
FILE_TYPES: dict[str, tuple[str, str, Callable[[Any], bytes]]] = {
    "image/png": ("Image", ".png", _as_binary),
    "image/jpeg": ("Image", ".jpg", _as_binary),
    "image/gif": ("Image", ".gif", _as_binary),
    "image/webp": ("Image", ".webp", _as_binary),
    "image/svg+xml": ("Image", ".svg", _as_text),
    "application/pdf": ("PDF", ".pdf", _as_binary),
    "application/vnd.plotly.v1+json": ("HTML", ".html", _as_plotly_page),
    "application/geo+json": ("JSON", ".json", _as_json),
    "application/vnd.vega+json": ("JSON", ".json", _as_json),  # and vegalite, of all versions
    "text/html": ("HTML", ".html", _as_text),
    "application/json": ("JSON", ".json", _as_json),
}
_VEGA = re.compile(r"application/vnd\.vega(lite)?\.v\d+(\.\d+)*\+json")


def best_file(data: Json) -> tuple[str, Any]:
    """Return (MIME type, content) of the representation that belongs in a file, ("", None) if there is none."""
    data = {_VEGA.sub("application/vnd.vega+json", mime): content for mime, content in data.items()}
    return next(((mime, data[mime]) for mime in FILE_TYPES if data.get(mime) is not None), ("", None))


@dataclass(frozen=True)
class OutputFile:
    """A representation of an output that belongs in a file, such as a picture."""

    mime_type: str
    suffix: str
    data: bytes = field(repr=False)


def _output_file(output: Json) -> OutputFile | None:
    mime, content = best_file(output.get("data") or {})
    with contextlib.suppress(ValueError, RecursionError):  # it cannot be such a file
        return OutputFile(mime, FILE_TYPES[mime][1], FILE_TYPES[mime][2](content)) if mime else None
    return None


def render(outputs: Iterable[Json], note: str = "", save: Callable[[Json], str | None] | None = None) -> str:
    """Return outputs as the text of one block: streams as they were printed, everything else on lines of its own.

    `save(data)` may save the best representation of a MIME bundle to a file; it returns a line that says so, or None.
    """
    pieces: list[str] = []
    line_open = False  # the last piece is no stream: what follows begins a new line
    for output in outputs:
        is_stream = output["output_type"] == "stream"
        piece = clean_text(output["text"]) if is_stream else "\n".join(map(clean_text, _lines(output, save)))
        if not piece:
            continue
        if pieces and not pieces[-1].endswith("\n") and (line_open or not is_stream):
            pieces.append("\n")
        pieces.append(piece)
        line_open = not is_stream
    if note:
        pieces += ["\n"] * bool(pieces and not pieces[-1].endswith("\n")) + [clean_text(note)]
    return "".join(pieces)


def _lines(output: Json, save: Callable[[Json], str | None] | None) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"{output['ename']}: {output['evalue']}"
        yield from output["traceback"]
        return
    data = output["data"]
    saved = save(data) if save else None
    # Show text/plain, unless it is only an object's default repr and there is something better.
    texts = [data.get(mime) for mime in ("text/plain", "text/markdown", "text/latex")]
    texts[0] = data.get("text/llm+plain") or texts[0]
    plain, *others = [text if isinstance(text, str) else "" for text in texts]
    if not plain or _DEFAULT_REPR.match(plain):
        plain = "" if saved else next(filter(None, others), plain)
    if not plain and not saved and data:
        plain = f"[an output that is not shown, of type {', '.join(map(str, data))[:500]}]"
    yield from filter(None, (plain, saved))


# ======================================================================================================
# 6. Files
# ======================================================================================================


_DEVICES = (Path("/dev"), Path("/dev/fd"))


def random_name(suffix: str) -> str:
    """Return a file name that nobody can foresee."""
    return f"{os.urandom(16).hex()}{suffix}"


class Folder:
    """A directory that is held open: files go into it even if something else has taken its path (not on Windows).

    Code in a sandbox may share it, and plant links. Raises: ValueError if it does not exist; OSError in each method.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise ValueError(f"Output directory {path} does not exist.")
        self._at: int | None = None
        self.close: Callable[[], object] = bool
        if os.open in os.supports_dir_fd:  # not on Windows
            self._at = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
            self.close = weakref.finalize(self, os.close, self._at)

    def _name(self, name: str) -> str:
        return str(self.path / name) if self._at is None else name

    def create(self, name: str) -> IO[bytes]:
        """Make a new file. Raises: OSError if there is a file or a link of that name."""
        return open(self._name(name), "xb", opener=functools.partial(os.open, mode=0o666, dir_fd=self._at))

    def save(self, files: Iterable[OutputFile]) -> list[str]:
        """Write files under new names; return their paths."""
        paths = []
        for file in files:
            name = random_name(file.suffix)
            with self.replace(name) as target:
                target.write(file.data)
            paths.append(str(self.path / name))
        return paths

    @contextlib.contextmanager
    def replace(self, name: str, devices: bool = False) -> Iterator[IO[bytes]]:
        """Give a file to write to, which takes the place of `name`, a file or a link, once it is complete.

        What is in /dev is no file that can be replaced; with `devices` it is written to.
        """
        if devices and self.path in _DEVICES:
            with open(self.path / name, "wb") as file:
                yield file
            return
        new, mode = random_name(".part"), self._mode(name)
        try:
            with self.create(new) as file:
                if mode is not None and hasattr(os, "fchmod"):  # what only its owner may read stays so
                    os.fchmod(file.fileno(), mode & 0o777)
                yield file
            os.replace(self._name(new), self._name(name), src_dir_fd=self._at, dst_dir_fd=self._at)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(self._name(new), dir_fd=self._at)
            if isinstance(error, OSError) and error.filename == self._name(new):
                error.filename = str(self.path / name)
            raise

    def _mode(self, name: str) -> int | None:
        """Return the mode of a file that is to be replaced, None if none is there. Raises: OSError if it is no file."""
        try:
            mode = os.stat(self._name(name), dir_fd=self._at).st_mode
        except FileNotFoundError:
            return None
        if self.path in _DEVICES or not stat.S_ISREG(mode):
            is_directory = stat.S_ISDIR(mode)
            says = "Is a directory: name the file" if is_directory else "Is no regular file"
            raise OSError(errno.EISDIR if is_directory else errno.EINVAL, says, str(self.path / name))
        return mode


class CallFiles:
    """What one call writes: its pictures and other files, and its whole text if that is too long to be returned."""

    def __init__(self, folder: Folder, limit: int | None) -> None:
        """`limit`: characters of text that are kept in memory, None for all."""
        self._folder, self._limit = folder, limit
        self.paths: list[str] = []
        self._room = MAX_FILE_BYTES
        self._text: list[str] = []  # not written yet
        self._size = 0  # characters of all text
        self._file: IO[bytes] | None = None
        self._trouble = ""

    def new_name(self, suffix: str) -> str:
        return random_name(suffix)

    def save(self, data: Json) -> str | None:
        """Write the best representation of a MIME bundle that belongs in a file, under a new name.

        Returns the line that names the file, or says what went wrong; None if text is the best there is.
        """
        mime, content = best_file(data)
        if not mime:
            return None
        word, suffix, encode = FILE_TYPES[mime]
        path = self._folder.path / self.new_name(suffix)
        try:
            if len(self.paths) >= MAX_FILES:
                raise ValueError(f"a call may write {MAX_FILES} files")
            written = encode(content)
            if len(written) > self._room:
                raise ValueError(f"a call may write {MAX_FILE_BYTES // 2**20} MB")
            with self._folder.replace(path.name) as file:
                file.write(written)
        except (OSError, ValueError, RecursionError) as error:
            return f"{word} data could not be saved: {error}"
        self._room -= len(written)
        self.paths.append(str(path))
        return f"{word} data saved to {path}"

    def record(self, output: Json) -> None:
        """Take the text of an output as it comes; an OutputHook."""
        if self._limit is None or output["output_type"] in ("clear_output", "update_display_data"):
            return
        if output["output_type"] == "stream":
            text = clean_text(output["text"].replace("\r\n", "\n").replace("\r", "\n"))
        else:
            text = render([output]) + "\n"
        before, self._size = self._size, self._size + len(text)
        if before >= MAX_SPILL or self._trouble:
            return
        self._text.append(text[: MAX_SPILL - before])
        if self._size <= self._limit:
            return
        try:
            self._file = self._file or self._folder.create(random_name(".txt"))
            self._file.write("".join(self._text).encode("utf-8", "replace"))
            self._file.flush()
        except OSError as error:
            self._trouble = str(error)
        self._text.clear()

    def close(self) -> str:
        """Close the text file; return where the whole text is, for the mark in the shortened text."""
        if self._file:
            self.paths.append(str(self._folder.path / self._file.name))
            with contextlib.suppress(OSError):
                self._file.close()
        if self._trouble:
            return f"the full text could not be saved: {self._trouble}"
        beyond = f" (its first {MAX_SPILL} characters)" if self._size > MAX_SPILL else ""
        return f"the full text is in {self.paths[-1]}{beyond}" if self._file else ""


# ======================================================================================================
# 7. Execution (pure)
# ======================================================================================================


class Outputs:
    """What a cell has shown, within a budget: head and tail of its streams, other outputs while there is room."""

    def __init__(self, limit: int | None) -> None:
        """`limit` is how many characters of streams are kept, None for all."""
        limit = 2**64 if limit is None else limit
        self._head_room, self._tail_room = limit // 2, limit - limit // 2
        self.clear()
        self.withheld = False  # an output was dropped

    def clear(self) -> None:
        self._head: deque[Json] = deque()  # everything up to the end of the streams' head
        self._middle: deque[Json] = deque()  # between head and tail: outputs that are no streams
        self._tail: deque[Json] = deque()
        self._head_size = self._tail_size = 0  # characters of streams
        self._line, self._name = io.StringIO(), ""  # the open line as it came, and of which stream it is
        self._displays: dict[str, tuple[Json, int]] = {}  # display_id -> what it shows, and its size
        self._room = MAX_KEPT
        self.missing = 0  # characters between head and tail

    def write(self, name: str, text: str) -> None:
        if name != self._name:
            self._end_line()
            self._name = name
        if end := text.rfind("\n") + 1:
            self._line.write(text[:end])
            self._end_line()
        self._line.write(text[end:])
        if self._line.tell() > MAX_LINE:
            text, self._line = self._line.getvalue(), io.StringIO()
            left = without_erased(text)
            if len(left) > MAX_LINE // 2:  # too little of it was erased
                self._put(left)
            else:
                self._line.write(left + "\r" * text.endswith("\r"))

    def _end_line(self) -> None:
        self._put(without_erased(self._line.getvalue()))
        self._line = io.StringIO()

    def _is_head_full(self) -> bool:
        return self._head_size >= self._head_room or len(self._head) >= MAX_OUTPUTS // 2

    def _put(self, text: str) -> None:
        if not self._is_head_full():
            part = text[: self._head_room - self._head_size]
            _append_text(self._head, self._name, part)
            self._head_size, text = self._head_size + len(part), text[len(part) :]
        _append_text(self._tail, self._name, text)
        self._tail_size += len(text)
        while self._tail:
            size = len(self._tail[0].get("text", ""))
            if self._tail_size - size < self._tail_room and len(self._tail) <= MAX_OUTPUTS // 2:
                break
            output = self._tail.popleft()
            self._tail_size -= size
            self.missing += size
            self._middle += [output] * ("text" not in output)

    def add(self, output: Json, size: int, display_id: str = "") -> None:
        """Keep an output that is no stream, of `size` bytes, if there is room."""
        self._end_line()
        if size > self._room or len(self._head) + len(self._middle) + len(self._tail) >= MAX_OUTPUTS:
            self.withheld = True
            return
        self._room -= size
        (self._tail if self._is_head_full() else self._head).append(output)
        if display_id:
            output["transient"] = {"display_id": display_id}
            self._displays[display_id] = _bundle(output), size

    def update(self, display_id: str, content: Json, size: int) -> bool:
        """Change every display of that id; return False if there is none."""
        if shown := self._displays.get(display_id):
            room = self._room + shown[1] - size
            if room < 0:
                self.withheld = True
            else:
                self._room, self._displays[display_id] = room, (_bundle(content), size)
        return shown is not None

    def so_far(self) -> tuple[list[Json], int]:
        """Return the outputs in nbformat's shape, and how many characters are missing between head and tail."""
        kept = copy.copy(self)  # since more may come; not a deep copy: what outputs show may be nested deeply
        parts = self._head, self._middle, self._tail
        kept._head, kept._middle, kept._tail = (deque(map(dict, part)) for part in parts)
        kept._put(without_erased(self._line.getvalue()))
        if (excess := kept._tail_size - kept._tail_room) > 0:  # less than the first text has: `_put` saw to that
            kept._tail[0]["text"] = kept._tail[0]["text"][excess:]
            kept.missing += excess
        name = kept._head[-1].get("name", "stdout") if kept._head else "stdout"
        gap = [{"output_type": "stream", "name": name, "text": gap_mark(kept.missing)}] if kept.missing else []
        found: list[Json] = []
        everything = [*kept._head, *gap, *kept._middle, *kept._tail]
        for name, outputs in itertools.groupby(everything, lambda output: output.get("name")):
            if name is not None:
                text = "".join(output["text"] for output in outputs)
                found.append({"output_type": "stream", "name": name, "text": text})
                continue
            for output in outputs:
                shown = output.pop("transient", None)
                found.append(output | self._displays[shown["display_id"]][0] if shown else output)
        return found, kept.missing


def _append_text(outputs: deque[Json], name: str, text: str) -> None:
    # Long text is joined once, at the end.
    if outputs and outputs[-1].get("name") == name and len(outputs[-1]["text"]) < 4096:
        outputs[-1]["text"] += text
    elif text:
        outputs.append({"output_type": "stream", "name": name, "text": text})


_MODEL_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")  # that language models take
# How a picture is written: (MIME type, base64) -> content block.
_BLOCKS: dict[str, Callable[[str, str], Json]] = {
    # https://docs.claude.com/en/api/messages, content of a message or of a tool_result
    "anthropic": lambda mime, data: {"type": "image", "source": {"type": "base64", "media_type": mime, "data": data}},
    # https://platform.openai.com/docs/api-reference/responses, input or output of a function call
    "openai": lambda mime, data: {"type": "input_image", "image_url": f"data:{mime};base64,{data}", "detail": "auto"},
    # https://platform.openai.com/docs/api-reference/chat, content of a message of the user
    "openai-chat": lambda mime, data: {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{data}"}},
    # https://modelcontextprotocol.io/specification, content of a tool's result
    "mcp": lambda mime, data: {"type": "image", "data": data, "mimeType": mime},
}


@dataclass(repr=False)
class ExecutionResult:
    """What one cell did.

    `status` is "ok", "error", "timeout", "running" (its time is over; the executor's `wait` has the rest),
    "interrupted", "died" or "exited"; `kernel_state` is "intact", "lost" (all variables are gone) or "busy"; `note`
    explains both in words, and is empty when all is well. `outputs` are dicts in the shape of nbformat 4 (stream,
    execute_result, display_data, error); `missing` is how many characters of streams are not in them, since there
    were more than `max_output`.
    `calls` are the tool calls, in order: dicts of name, arguments (a dict), seconds, and status: "ok", "error",
    "refused", "timeout", "unanswered" (it was running when the cell ended) or "not run".
    """

    status: str
    exit_code: int
    kernel_state: str
    note: str
    outputs: list[Json]
    execution_count: int | None = None
    duration: float = 0.0  # seconds
    death: KernelDied | None = None
    missing: int = 0
    calls: list[Json] = field(default_factory=list)
    value: Any = field(default=None, repr=False)  # what the reply says of the expression that was sent with the code

    @property
    def truncated(self) -> bool:
        """Whether a part of the streams was left out; a mark in their text says where."""
        return self.missing > 0

    @property
    def error(self) -> Json | None:
        """The error output (ename, evalue, traceback), if the code raised."""
        return next((output for output in self.outputs if output["output_type"] == "error"), None)

    @property
    def text(self) -> str:
        """Everything as plain text; rich outputs by their text/plain."""
        return render(self.outputs, self.note)

    def __repr__(self) -> str:
        text, count = self.text, len(self.images)
        shown = f"{text[:200]!r}{'...' if len(text) > 200 else ''}"
        return f"ExecutionResult(status={self.status!r}, exit_code={self.exit_code}, text={shown}, images={count})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Json:
        """Let a notebook show this as it would show the cell: text and pictures, but no HTML that the code has made."""
        import html

        shown = [
            f"<pre>{html.escape(part['text'])}</pre>"
            if part["type"] == "text"
            else f'<img src="data:{part["mime_type"]};base64,{part["data"]}">'
            for part in self.parts()
        ]
        return {"text/plain": repr(self), "text/html": "\n".join(shown)}

    @property
    def files(self) -> list[OutputFile]:
        """The best representation of each output that belongs in a file; see also `save`."""
        return [file for output in self.outputs if (file := _output_file(output))]

    @property
    def images(self) -> list[OutputFile]:
        """Those of `files` that are pictures."""
        return [file for file in self.files if file.mime_type.startswith("image/")]

    def parts(self, max_chars: int = 20_000, max_images: int = 4, max_image_bytes: int = MAX_IMAGE) -> list[Json]:
        """Return what a language model should see, in order, within a budget: text, and pictures in base64.

        Each is {"type": "text", "text": ...} or {"type": "image", "mime_type": ..., "data": ...}. Of longer text head
        and tail are kept; of a picture over the limits (bytes before base64) the text says that it is not shown.
        """
        texts: list[str] = []  # before, between and behind the images
        images: list[OutputFile] = []
        group: list[Json] = []  # outputs since the last image
        labels: dict[int, str] = {}

        def label(data: Json) -> str | None:
            return labels.get(id(data))

        for output in self.outputs:
            group.append(output)
            image = _output_file(output)
            if not image or not image.mime_type.startswith("image/"):
                continue
            why_not = "" if len(images) < max_images else "there are too many"
            if len(image.data) > max_image_bytes:
                why_not = f"{len(image.data)} bytes are too many"
            if image.mime_type not in _MODEL_IMAGES:
                why_not = f"its type is {image.mime_type}"
            labels[id(output["data"])] = f"[a picture that is not shown: {why_not}]" if why_not else "[a picture]"
            if not why_not:
                images.append(image)
                texts.append(render(group, "", label))
                group = []
        texts.append(render(group, self.note, label))
        texts = [text if text.strip() else "" for text in texts]  # Anthropic's API refuses a block of white space
        parts: list[Json] = []
        for text, image in itertools.zip_longest(_shorten_all(texts, max_chars), images):
            if text:
                parts.append({"type": "text", "text": text})
            if image:
                data = base64.b64encode(image.data).decode("ascii")
                parts.append({"type": "image", "mime_type": image.mime_type, "data": data})
        return parts

    def to_messages(self, form: str, **budget: int) -> list[Json]:
        """Return `parts(**budget)` as blocks for "anthropic", "openai", "openai-chat" or "mcp". Raises: ValueError."""
        if form not in _BLOCKS:
            raise ValueError(f"form must be one of {', '.join(_BLOCKS)}, not {form!r}.")
        text_type = "input_text" if form == "openai" else "text"
        return [
            {"type": text_type, "text": part["text"]}
            if part["type"] == "text"
            else _BLOCKS[form](part["mime_type"], part["data"])
            for part in self.parts(**budget)
        ]

    def save(self, directory: AnyPath) -> list[str]:
        """Write `files` under new names; return their paths. Raises: OSError; ValueError if there is no directory."""
        return Folder(directory).save(self.files)

    def raise_for_error(self) -> None:
        """Raise ExecutionError, ExecutionTimeout, KernelDied or JupyterExecError unless the cell ended well."""
        if self.status in ("timeout", "running"):
            raise ExecutionTimeout(self.note)
        if self.death and self.status == "died":
            raise self.death
        if self.status == "error" and self.error:
            traceback = clean_text("\n".join(self.error["traceback"]))
            raise ExecutionError(self.error["ename"], self.error["evalue"], traceback)
        if self.status != "ok":
            raise JupyterExecError(self.note or "The cell did not end well.")


_NUMBERED = re.compile("(.+_[0-9]{1,18}_)([0-9]{1,18})")  # an id of ipykernel's: session, pid, number


class Tally:
    """Counts what a kernel sends during a cell, on all channels, if it numbers its messages as ipykernel does.

    Messages that ZeroMQ drops at the kernel, since this program was stopped or too slow, leave a gap in the numbers.
    Answers to other clients leave one, too; but each is followed by an idle status, which comes to all clients.
    """

    def __init__(self) -> None:
        self._prefix = ""  # of the ids
        self._first = self._latest = self._came = 0

    def has_gap(self, message: Message, own: bool) -> bool:
        """Count a message; returns whether it is the cell's idle status and many before it are missing."""
        numbered = _NUMBERED.fullmatch(message.msg_id)
        prefix, number = (numbered[1], int(numbered[2])) if numbered else ("", 0)
        if not self._prefix and own and message.channel == "iopub":
            self._prefix, self._first = prefix, number
        if prefix != self._prefix or number == self._latest:  # a huge message comes in pieces
            return False
        self._latest = number
        idle = message.content.get("execution_state") == "idle"
        self._came += 1 + idle
        # A few may be missing for other reasons: a thread is just sending them, or they answer other clients.
        return own and idle and number - self._first > self._came + 20


class Execution:
    """State machine of one execute_request: messages in, outputs and an outcome out.

    It is done when both the reply and the idle status have come; they travel on different channels, so either may be
    first. One of them may get lost (a high-water mark, an interrupt at a bad moment). Then a later request whose id is
    in `fences` is answered first, which shows that the lost one will not come any more.
    """

    def __init__(self, msg_id: str, limit: int | None = None, silent: bool = False) -> None:
        """`limit`: characters of streams that are kept, None for all; `silent`: the kernel sends no execute_input."""
        self.msg_id = msg_id
        self._silent = silent
        self._outputs = Outputs(limit)
        self.execution_count: int | None = None
        self.timed_out: float | None = None  # seconds, once the deadline has passed
        self.started = False  # the kernel has begun to run it
        self.interrupted = False  # an interrupt was asked for
        self.killed = False  # we killed the kernel, since the interrupt did not help
        self.death: KernelDied | None = None
        self.fences: set[str] = set()
        self.reconnected = False  # both reply and idle may be lost
        self.withheld = False  # output was dropped before it came here
        self._reply: Json | None = None
        self._idle = False
        self._passed: set[str] = set()  # channels on which a fence was answered
        self._clear_next = False
        self._tally = Tally()

    @property
    def half_done(self) -> bool:
        """Whether just one of reply and idle has come."""
        return self._idle != (self._reply is not None)

    @property
    def done(self) -> bool:
        if self.half_done:
            return ("shell" if self._idle else "iopub") in self._passed or self.death is not None
        return self._idle or self.death is not None or (self.reconnected and len(self._passed) == 2)

    @property
    def outputs_lost(self) -> bool:
        """Whether outputs may be missing: some were dropped, or the idle status that follows them is missing."""
        return self.withheld or self._outputs.withheld or (self._reply is not None and not self._idle)

    def feed(self, message: Message) -> Json | None:
        """Take a message from the kernel; return the output to show now, if any. The caller may change it."""
        if message.parent_id in self.fences and message.content.get("execution_state") != "busy":
            self._passed.add(message.channel)
        own = message.parent_id == self.msg_id
        self.withheld = self._tally.has_gap(message, own) or self.withheld or (own and message.lost)
        if not own:
            return None
        self.started |= message.channel == "iopub" and (self._silent or message.msg_type != "status")
        content, size = message.content, message.size
        match message.channel, message.msg_type:
            case "shell", "execute_reply":
                return self._on_reply(content, size)
            case "iopub", "status":
                self._idle = self._idle or content.get("execution_state") == "idle"
            case "iopub", "execute_input":
                self._count(content)
            case "iopub", "stream":
                return self._on_stream(content)
            case "iopub", "execute_result":
                self._count(content)
                output = {"output_type": "execute_result", "execution_count": self.execution_count}
                return self._show(output | _bundle(content), size, _display_id(content))
            case "iopub", "display_data":
                return self._display(content, size)
            case "iopub", "update_display_data":
                # "... update any and all of the displays that have the given display_id"
                if not self._outputs.update(_display_id(content), content, size):
                    self._display(content, size)  # it belongs to an earlier cell
                return {"output_type": "update_display_data"} | _bundle(content)
            case "iopub", "error":
                return self._show(_error(content), size)
            case "iopub", "clear_output":
                # "wait: Wait to clear the output until new output is available."
                self._clear_next = True
                if not content.get("wait"):
                    self._clear_if_due()
                return {"output_type": "clear_output", "wait": bool(content.get("wait"))}
        return None  # "Clients should ignore messages that they do not understand."

    def _on_reply(self, content: Json, size: int) -> Json | None:
        self._reply = content
        self._count(content)
        # The payload is deprecated, but `print?` and %load answer nowhere else.
        shown = None
        for entry in self._payload:
            text = entry.get("text") if entry.get("source") == "set_next_input" else None
            data = {"text/plain": text} if isinstance(text, str) else entry.get("data")
            if entry.get("source") in ("page", "set_next_input") and isinstance(data, dict):
                shown, size = self._display({"data": data}, size), 0
        return shown

    @property
    def _payload(self) -> list[Json]:
        payload = part_of(self._reply, "payload")
        return [entry for entry in payload if isinstance(entry, dict)] if isinstance(payload, list) else []

    def _count(self, content: Json) -> None:
        if isinstance(content.get("execution_count"), int):
            self.execution_count = content["execution_count"]

    def _on_stream(self, content: Json) -> Json | None:
        name, text = content.get("name"), content.get("text")
        if name not in ("stdout", "stderr") or not isinstance(text, str):
            return None
        # So a Jupyter server says that it limits the rate of output: it drops some, while the cell goes on.
        self.withheld = self.withheld or (name == "stderr" and bool(re.search(r"IOPub \w+ rate exceeded", text)))
        self._clear_if_due()
        self._outputs.write(name, text)
        return {"output_type": "stream", "name": name, "text": text}

    def _display(self, content: Json, size: int) -> Json:
        return self._show({"output_type": "display_data"} | _bundle(content), size, _display_id(content))

    def _show(self, output: Json, size: int, display_id: str = "") -> Json:
        self._clear_if_due()
        self._outputs.add(dict(output), size, display_id)
        return output

    def _clear_if_due(self) -> None:
        if self._clear_next:
            self._outputs.clear()
            self._clear_next = False

    @property
    def ended_session(self) -> bool:
        """Whether the code called exit() or quit(), with or without an exit status."""
        return any(keep is not True for keep in self._exits)

    @property
    def _exits(self) -> list[Any]:
        # Deviation: IPython reads exit(3) as exit(keep_kernel=3), everybody else as an exit status, or exit("message").
        return [entry.get("keepkernel") for entry in self._payload if entry.get("source") == "ask_exit"]

    def result(self, duration: float) -> ExecutionResult:
        """Return the result so far; `duration` is in seconds."""
        outputs, missing = self._outputs.so_far()
        outcome = self._outcome(missing)
        if outcome[0] == "error" and self._reply and not any(output["output_type"] == "error" for output in outputs):
            # The error came with the reply only, or there was no room for it.
            error = _error({"ename": "Aborted", "evalue": "the kernel did not run it"} | self._reply)
            last_line = "".join(error["traceback"][-1:])
            if error["ename"] not in last_line:  # it is an earlier cell's: ipykernel mixes them up
                error["traceback"] = []
            outputs.append(error)
        value = part_of(self._reply, "user_expressions", "value")
        return ExecutionResult(*outcome, outputs, self.execution_count, duration, self.death, missing, value=value)

    def _outcome(self, missing: int) -> tuple[str, int, str, str]:
        if self.timed_out is not None:
            return self._timeout_outcome(f"{self.timed_out:g} s")
        if self.death:
            return "died", self.death.status(), "lost", clean_text(str(self.death))
        if self.interrupted:
            if self.done:
                return "interrupted", 130, "intact", "Interrupted; variables are kept"
            return "interrupted", 130, "busy", f"Interrupted, but the kernel {self._busy}"
        if self.ended_session:
            messages = [keep for keep in self._exits if isinstance(keep, str)]
            message = ": ".join(["", *(text[:STDERR_TAIL] for text in messages if text)])
            status = next((keep % 256 for keep in self._exits if type(keep) is int), int(messages != []))
            return "exited", status, "lost", f"the session was ended by the code{message}"
        if self._reply and self._reply.get("status") == "ok":
            return "ok", 0, "intact", self._loss_note(missing)
        if self._reply:
            return "error", 1, "intact", self._loss_note(missing)
        if not self.done:
            return "running", 124, "busy", STILL_RUNNING
        if self.reconnected and not self.started:
            return "error", 1, "intact", "The connection was lost; nobody knows whether the code ran"
        return "error", 1, "intact", "The kernel gave up the code, or its reply was lost"

    def _loss_note(self, missing: int) -> str:
        if self.outputs_lost:
            return "Some of the output was lost on its way, or left out since there was too much of it"
        if self.reconnected:
            return "The connection was lost for a moment; some of the output may be missing"
        return TRUNCATED if missing else ""

    def _timeout_outcome(self, seconds: str) -> tuple[str, int, str, str]:
        if self.death:
            sentence = f"Timeout: the code ignored the interrupt after {seconds}; the kernel was killed and restarted"
            if not self.killed:
                sentence = f"Timeout: interrupted after {seconds}; the kernel died ({self.death.sentence()})"
            return "timeout", 124, "lost", f"{sentence}; all variables are lost"
        if self.done:
            return "timeout", 124, "intact", f"Timeout: interrupted after {seconds}; variables are kept"
        ended = "interrupted" if self.started else "given up"
        return "timeout", 124, "busy", f"Timeout: {ended} after {seconds}; the kernel {self._busy}"

    @property
    def _busy(self) -> str:
        if self.started:
            return "is still running the code"
        return "was not seen to begin with the code: it may be busy with that of another client, and run this later"


def _display_id(content: Json) -> str:
    return text_of(part_of(content, "transient", "display_id"))  # "transient" is null or absent in some kernels


def _error(content: Json) -> Json:
    traceback = content.get("traceback")
    lines = [line for line in traceback if isinstance(line, str)] if isinstance(traceback, list) else []
    names = {name: text_of(content.get(name)) for name in ("ename", "evalue")}
    return {"output_type": "error", **names, "traceback": lines}


def _bundle(content: Json) -> Json:
    data, metadata = content.get("data"), content.get("metadata")
    return {"data": data if isinstance(data, dict) else {}, "metadata": metadata if isinstance(metadata, dict) else {}}


# ======================================================================================================
# 8. I/O thread
# ======================================================================================================


class Deadline:
    """A point in time, made once per public call and passed down. With None for `seconds` it never comes."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + (math.inf if seconds is None or seconds >= threading.TIMEOUT_MAX else seconds)

    @property
    def remaining(self) -> float | None:
        """Return the seconds that are left, None if there is no end."""
        left = self._at - time.monotonic()
        return max(0.0, left) if left < threading.TIMEOUT_MAX else None

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._at

    def extend(self, seconds: float) -> None:
        self._at += seconds

    def limit(self, sock: socket.socket) -> None:
        """Let the next call of a blocking socket take no longer than what is left."""
        left = self.remaining
        sock.settimeout(left if left is None else max(left, 1e-6))  # 0 would make it non-blocking

    def within(self, seconds: float) -> float:
        """Return the seconds that are left, at most `seconds`."""
        return max(0.0, min(seconds, self._at - time.monotonic()))


class Loop:
    """One thread that waits until sockets are ready and calls back. Other threads may use only `post` and `stop`.

    The client runs it in a daemon thread, the kernel host in its main thread. It needs no zmq: a ZeroMQ socket is
    watched by its ZMQ_FD, which tells of each change only once, so that the callback must read the socket empty.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._jobs: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, Callable[[], None]]] = []  # in order
        self._waker, self.alarm = socket.socketpair()  # `alarm` may serve signal.set_wakeup_fd
        self._waker.setblocking(False)
        self.alarm.setblocking(False)
        self._running = True
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.watch(self._waker.fileno(), self._on_wake)

    def post(self, job: Callable[[], None]) -> None:
        """Call `job()` in the loop's thread, after the jobs that were posted before."""
        if self.is_inherited:
            raise JupyterExecError("This process was forked from the one with the server: make a new server here.")
        self._jobs.append(job)
        with contextlib.suppress(OSError):  # full: the loop wakes up anyway; closed: the loop has ended
            self.alarm.send(b"\0")

    def later(self, seconds: float, job: Callable[[], None]) -> None:
        bisect.insort(self._timers, (time.monotonic() + seconds, job), key=lambda timer: timer[0])

    def watch(self, descriptor: int, callback: Callable[[], object] | None, event: int = selectors.EVENT_READ) -> None:
        """Call `callback()` whenever `event` is possible: to read, or to write; None ends the watch for that event."""
        key = self._selector.get_map().get(descriptor)
        callbacks = key.data if key else {}
        callbacks.pop(event, None)
        if callback:
            callbacks[event] = callback
        if key and callbacks:
            self._selector.modify(descriptor, sum(callbacks), callbacks)
        elif key:
            self._selector.unregister(descriptor)
        elif callbacks:
            self._selector.register(descriptor, event, callbacks)

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child of the process with the loop."""
        return os.getpid() != self._pid

    @property
    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return self._thread is threading.current_thread()

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the jobs that were posted; wait for its thread, unless this is it."""
        self.post(functools.partial(setattr, self, "_running", False))
        if self._thread and not self.is_here:
            self._thread.join(CONTROL_TIMEOUT)

    def run(self) -> None:
        """Call back until `stop`; an exception in a callback is logged and ends only that callback."""
        while self._running:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                for event, callback in list(key.data.items()):
                    if events & event and key.data.get(event):  # an earlier callback may have ended the watch
                        self._call(callback)
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._call(self._timers.pop(0)[1])
        while self._jobs:  # other threads may wait for these
            self._call(self._jobs.popleft())
        self._selector.close()
        self._waker.close()
        self.alarm.close()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._waker.recv(4096)
        for _ in range(len(self._jobs)):
            self._call(self._jobs.popleft())

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("A callback of the I/O thread failed")


class Stream(Protocol):
    """A non-blocking byte stream; the signatures are those of socket.socket."""

    def recv(self, size: int, /) -> bytes: ...
    def send(self, data: memoryview, /) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class FdStream:
    """A Stream over two descriptors that are no sockets, such as stdin and stdout of a process."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def recv(self, size: int, /) -> bytes:
        return os.read(self._read_fd, size)

    def send(self, data: memoryview, /) -> int:
        return os.write(self._write_fd, data)

    def fileno(self) -> int:
        return self._read_fd

    def write_fileno(self) -> int:
        return self._write_fd

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)


class NetStream:
    """A connected socket as a Stream, with TLS or without."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self._is_tcp = getattr(sock, "family", None) in (socket.AF_INET, socket.AF_INET6)  # Docker over ssh has none
        if self._is_tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, size: int, /) -> bytes:
        with _tls_as_plain():
            data = self.raw.recv(size)
            while getattr(self.raw, "pending", int)():  # decrypted already: the descriptor shows nothing
                data += self.raw.recv(size)
        if self._is_tcp and hasattr(socket, "TCP_QUICKACK"):
            # A delayed acknowledgement costs 40 ms if the other end uses Nagle's algorithm, as Jupyter servers and
            # Docker engines do. Each read resets the option.
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def send(self, data: memoryview, /) -> int:
        with _tls_as_plain():
            return self.raw.send(data)

    def fileno(self) -> int:
        return self.raw.fileno()

    def settimeout(self, seconds: float, /) -> None:
        self.raw.settimeout(seconds)

    def close(self) -> None:
        self.raw.close()


@contextlib.contextmanager
def _tls_as_plain() -> Iterator[None]:
    """Raise BlockingIOError for a TLS socket that has to wait, as for any other, without importing ssl."""
    try:
        yield
    except OSError as error:
        if type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError"):
            raise BlockingIOError from None
        raise


_inherited: weakref.WeakSet[Stream | Tail] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close a forked child's copies of the pipes: else a pipe would stay open after the end of the parent."""
    null = os.open(os.devnull, os.O_RDWR)
    for end in list(_inherited):
        with contextlib.suppress(OSError):  # the descriptor only: the socket object may be gevent's
            os.dup2(null, end.fileno(), inheritable=False)
    os.close(null)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_inherited)


class Tail:
    """Reads a pipe, such as the stderr of a process, and keeps the last `limit` bytes of it."""

    def __init__(self, limit: int = STDERR_TAIL) -> None:
        self._limit = limit
        self._descriptor, self.writer = os.pipe()  # whoever gives `writer` to a process closes it
        os.set_blocking(self._descriptor, False)
        self._data = bytearray()
        self._loop: Loop | None = None
        _inherited.add(self)

    def fileno(self) -> int:
        return self._descriptor

    def __str__(self) -> str:
        return self._data.decode("utf-8", "replace").strip()

    def watch(self, loop: Loop) -> None:
        """Read in the loop from now on."""
        self._loop = loop
        loop.watch(self._descriptor, self.read)

    def read(self) -> bool:
        """Read what is there; return False at the end."""
        try:
            data = os.read(self._descriptor, 2**16)
        except BlockingIOError:
            return True
        self._data += data
        del self._data[: -self._limit]
        if not data and self._loop:
            self._loop.watch(self._descriptor, None)
        return bool(data)

    def drain(self) -> None:
        """Read all that a pipe can hold, after the end of the process that wrote it."""
        for _ in range(16):
            if self._descriptor < 0 or not self.read():
                break

    def close(self) -> None:
        self.drain()
        if self._loop:
            self._loop.watch(self._descriptor, None)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._loop = -1, None


class Pipe:
    """One end of a connection, such as that of a server object and its kernel host. For the loop's thread.

    `feed(data)` cuts what was received into items; `on_item` gets each. `on_closed(reason)` is called once: by `close`,
    or when the other end is gone or takes nothing for CONTROL_TIMEOUT, or `feed` raises an OSError or ProtocolError.

    What is sent waits in lanes, which take turns: so a flood in one delays no other. The lane "" always goes first.
    """

    def __init__(
        self,
        loop: Loop,
        stream: Stream,
        feed: Callable[[bytes], Iterable[Any]],
        on_item: Callable[[Any], None],
        on_closed: Callable[[str], None],
    ) -> None:
        self._loop, self._stream = loop, stream
        self._feed, self._on_item, self._on_closed = feed, on_item, on_closed
        self._closed = False
        self.waits_for_ever = False  # True for a host: its client may be stopped in a debugger
        self._unsent = memoryview(b"")
        self._lanes: dict[str, deque[tuple[bytes, bool, float]]] = {}  # data, whether it may be dropped, since when
        self.waiting: Counter[str] = Counter()  # bytes in each lane
        self._sent_at = 0.0
        self._check_is_due = False
        self._write_descriptor: int = getattr(stream, "write_fileno", stream.fileno)()
        _inherited.add(stream)
        loop.watch(stream.fileno(), self.read)

    def read(self) -> None:
        try:
            data = self._stream.recv(2**18)
            for item in self._feed(data):
                self._on_item(item)
            if not data:
                self.close("the pipe was closed")
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self.close(str(error))

    @property
    def busy(self) -> bool:
        return bool(self._unsent or self._lanes)

    def send(self, data: bytes, lane: str = "", may_be_lost: bool = False) -> None:
        if self._closed:
            return
        now, busy = time.monotonic(), self.busy
        self._lanes.setdefault(lane, deque()).append((data, may_be_lost, now))
        self.waiting[lane] += len(data)
        if not busy:
            self._sent_at = now
            self._write()

    def _write(self) -> None:
        try:
            while self.busy:
                self._unsent = self._unsent or self._next()
                sent = self._stream.send(self._unsent)
                self._sent_at = time.monotonic()
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            self._loop.watch(self._write_descriptor, self._write, selectors.EVENT_WRITE)
            if not self._check_is_due and not self.waits_for_ever:
                self._check_is_due = True
                self._loop.later(CONTROL_TIMEOUT, self._check_progress)
        except OSError as error:
            self.close(f"writing failed: {error.strerror}")
        else:
            self._loop.watch(self._write_descriptor, None, selectors.EVENT_WRITE)

    def _next(self) -> memoryview:
        lane = "" if "" in self._lanes else next(iter(self._lanes))
        queued = self._lanes.pop(lane)
        data = queued.popleft()[0]
        self.waiting[lane] -= len(data)
        if queued:
            self._lanes[lane] = queued  # behind the others
        else:
            del self.waiting[lane]
        return memoryview(data)

    def drop_old(self, lane: str, instead: bytes) -> bool:
        """Drop what may be lost of a lane that waited for SLOW_LINK, and send `instead`; return whether it did so."""
        queued, now = self._lanes.get(lane), time.monotonic()
        kept = [entry for entry in queued or () if not entry[1]]
        if not queued or now - queued[0][2] < SLOW_LINK or len(kept) == len(queued):
            return False
        # `instead` takes the place of the first that is dropped: maybe the rest of a message that was sent in part.
        at = next(place for place, entry in enumerate(queued) if entry[1])
        self._lanes[lane] = deque([*kept[:at], (instead, False, now), *kept[at:]])
        self.waiting[lane] += len(instead) - sum(len(data) for data, may_be_lost, _ in queued if may_be_lost)
        return True

    def _check_progress(self) -> None:
        idle = time.monotonic() - self._sent_at
        self._check_is_due = self.busy and idle < CONTROL_TIMEOUT
        if self._check_is_due:
            self._loop.later(CONTROL_TIMEOUT - idle, self._check_progress)
        elif self.busy:
            self.close(f"nothing was read for {CONTROL_TIMEOUT:g} s")

    def close(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self._unsent = memoryview(b"")
            self._lanes.clear()
            self._loop.watch(self._stream.fileno(), None)
            self._loop.watch(self._write_descriptor, None, selectors.EVENT_WRITE)
            self._stream.close()
            self._on_closed(reason)


Deliver = Callable[[str, list[bytes]], None]  # channel and parts
RawMessage = tuple[str, Sequence[Any]]  # channel and parts, or "WebSocket" and [message]: as they came, not parsed


class Reconnected:
    """A lost connection was made again; messages may be missing."""


MailItem = RawMessage | KernelDied | Reconnected


class Mailbox:
    """What came from one kernel, in order: the I/O thread puts raw messages in, the caller's thread takes them out.

    Beyond MAILBOX_LIMIT unread bytes output is dropped. At twice as much `on_flood()` is called once, in the I/O
    thread, to kill the kernel.
    """

    def __init__(self, on_flood: Callable[[], None] | None = None) -> None:
        # Each with its size, and whether it is an execute_reply.
        self._queue: queue.SimpleQueue[tuple[MailItem, int, bool]] = queue.SimpleQueue()
        self._on_flood = on_flood
        self._put_bytes = self._got_bytes = 0  # each is written by one thread only
        self._put_replies = self._got_replies = 0
        self.dropped = False  # output was dropped, since nobody read it
        self.ended = False  # the kernel's death is in it
        self._tells_of_reconnect = False  # a Reconnected is in it: another one would say nothing new

    @property
    def unread(self) -> int:
        """How many items are in it."""
        return self._queue.qsize()

    @property
    def answered(self) -> bool:
        """Whether it has an unread execute_reply."""
        return self._put_replies > self._got_replies

    def put(self, item: MailItem) -> None:
        if isinstance(item, Reconnected):
            if self._tells_of_reconnect:
                return
            self._tells_of_reconnect = True
        channel, parts = item if isinstance(item, tuple) else ("", ())
        size, unread = 1000 + 64 * len(parts) + sum(map(len, parts)), self._put_bytes - self._got_bytes
        if channel and unread > MAILBOX_LIMIT:
            if self.ended or size >= LARGE_PART or not _names(_VITAL, parts):
                self.dropped = True
                return
            if unread > 2 * MAILBOX_LIMIT:
                item = KernelDied(cause=f"it was killed: {unread // 2**20} MB of its messages were unread")
                if self._on_flood:
                    self._on_flood()
        self.ended = self.ended or isinstance(item, KernelDied)
        is_reply = channel in ("shell", "WebSocket") and _names(_REPLY, parts)
        self._put_bytes += size
        self._put_replies += is_reply
        self._queue.put((item, size, is_reply))

    def get(self, timeout: float | None) -> MailItem | None:
        """Return the next item, or None after `timeout` seconds."""
        may_wait = timeout is None or timeout > 0  # Deviation: told to wait for 0 s, Python 3.10 may wait for ever
        try:
            item, size, is_reply = self._queue.get(may_wait, timeout)
        except queue.Empty:
            return None
        self._got_bytes += size
        self._got_replies += is_reply
        if isinstance(item, Reconnected):
            self._tells_of_reconnect = False
        return item


def _type_among(names: bytes) -> re.Pattern[bytes]:
    """Return a pattern that finds a message type in JSON, but not in a string there, where quotes are escaped."""
    return re.compile(rb'"msg_type"\s*:\s*"(?:%b)"' % names)


_REPLY = _type_among(b"execute_reply")
_VITAL = _type_among(rb"\w+_reply|status|error|input_request|execute_result")  # ends a cell, or says how it ended


def _names(pattern: re.Pattern[bytes], parts: Sequence[Any]) -> bool:
    """Whether the start of a message, where its type stands, fits a pattern."""
    return any(pattern.search(part[:4000].encode() if isinstance(part, str) else part[:4000]) for part in parts[:5])


class Channels(Protocol):
    """A way to exchange messages with one kernel. Usable from any thread."""

    def send(self, message: Message) -> None: ...
    def decode(self, raw: RawMessage) -> Iterator[Message]: ...
    def close(self) -> None: ...


# Sends an order of `far_step`, with bytes of a file; `then(answer)` is called once, in any thread.
AskFar = Callable[[Json, bytes, Callable[[Json], None]], None]


class KernelControl(Protocol):
    """What can be done to a kernel besides sending it messages; servers implement `start` and what else they can."""

    owned: bool = True  # False: attached to, not to be killed or restarted
    supervised: bool = False  # a server restarts it when it ends by itself: only `kill` ends it
    argv: Sequence[str] = ()  # of the kernel's process, empty if unknown
    connection_file: str | None = None  # on this machine
    start_timeout: float = START_TIMEOUT  # seconds for the kernel to be ready

    def start(self, mailbox: Mailbox) -> Channels:
        """Start or restart the kernel and connect; `mailbox` gets all that comes from it, its death too."""

    def interrupt(self, sent: Callable[[], None]) -> bool:
        """Interrupt the running cell, and call `sent()`, in any thread, when the signal was sent.

        Return False, and do nothing, if the kernel wants an interrupt_request instead.
        """
        return False

    def kill(self, dump: bool = False) -> None:
        """Kill the kernel, if it is ours; its mailbox is told. With `dump` it first writes its stack, if it can."""
        return

    def abandon(self) -> None:
        """Give up the host that did not answer to `kill`; the next start makes a new one."""
        return

    def files(self) -> AskFar | None:
        """Return a function that reaches the files where the kernel runs; None if only cells can."""
        return None

    def close(self) -> None:
        """Free what `start` made."""
        return


def read_connection_file(path: AnyPath) -> KernelConnection:
    """Read a connection file. Raises: ProtocolError if it is broken, or if others than its owner may read it."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(2**16)
    except OSError as error:
        raise ProtocolError(f"Cannot read the connection file {os.fspath(path)}: {error.strerror}.") from None
    if os.name != "nt" and mode & 0o077:
        raise ProtocolError(f"The connection file {os.fspath(path)} holds a key and is open to others: chmod 600 it.")
    return KernelConnection.from_json(data)


def write_private(path: str, text: str) -> None:
    """Write a file that only its owner may read, in place of a file or link of that name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def new_context() -> Any:
    """Return a ZeroMQ context. Raises: JupyterExecError without pyzmq."""
    try:
        import zmq
    except ImportError:
        raise JupyterExecError("The package pyzmq is not installed: pip install pyzmq") from None
    return zmq.Context()


def read_messages(sock: Any, deliver: Callable[[list[Any]], None], limit: float = math.inf) -> bool:
    """Read all messages from a ZeroMQ socket, but at most `limit`; return whether there may be more."""
    import zmq

    with contextlib.suppress(zmq.Again):
        for count in itertools.count():
            if sock.closed:
                return False
            if count >= limit:
                return True
            frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            deliver([frame.bytes if len(frame) < LARGE_PART else frame.buffer for frame in frames])
    return False


class KernelSockets:
    """The ZeroMQ sockets of one kernel; `deliver(channel, parts)` gets what arrives. For the loop's thread.

    It reads in batches, so that a flood from one kernel delays no other.
    """

    def __init__(self, loop: Loop, deliver: Deliver) -> None:
        self._loop, self._deliver = loop, deliver
        self.by_channel: dict[str, Any] = {}
        self._queued: set[str] = set()  # channels whose next batch was posted to the loop

    def open(self, context: Any, connection: KernelConnection, identity: bytes) -> None:
        """Connect shell, iopub, stdin and control. Raises: zmq.ZMQError."""
        import zmq

        kinds = {"shell": zmq.DEALER, "iopub": zmq.SUB, "stdin": zmq.DEALER, "control": zmq.DEALER}
        try:
            for channel, kind in kinds.items():
                self.by_channel[channel] = sock = context.socket(kind)
                sock.linger = 0
                sock.reconnect_ivl = 5  # ms; the default of 100 would be added to each start of a kernel
                sock.maxmsgsize = MAX_MESSAGE
                if channel == "iopub":
                    # Beyond the default high-water mark of 1000 messages, output and the final idle would get lost.
                    sock.rcvhwm = 0
                    # Subscribe before connecting, or the welcome is missed; our own topic gets one in any case.
                    sock.subscribe(b"")
                    sock.subscribe(identity)
                else:
                    # "stdin: ... the client's identity must be the same as that of its shell socket."
                    sock.identity = identity
                sock.connect(connection.address(channel))
                self._loop.watch(sock.fd, functools.partial(self._read, channel))
        except zmq.ZMQError:  # too many open files
            self.close()
            raise

    def send(self, channel: str, parts: Sequence[bytes]) -> None:
        """Send a message, unless the sockets are closed or there is no such channel."""
        import zmq

        if sock := self.by_channel.get(channel):
            with contextlib.suppress(zmq.Again):  # a kernel that takes nothing: its death or the deadline tells
                sock.send_multipart(parts, zmq.NOBLOCK)
            self._read(channel)  # sending may reset the descriptor, which tells of a change only once

    def _read(self, channel: str) -> None:
        if channel not in self._queued:
            self._read_batch(channel)

    def _read_batch(self, channel: str) -> None:
        self._queued.discard(channel)
        sock = self.by_channel.get(channel)
        if sock and read_messages(sock, functools.partial(self._deliver, channel), 100):  # others have their turn
            self._queued.add(channel)
            self._loop.post(functools.partial(self._read_batch, channel))

    def drain(self) -> None:
        """Read all that is there, after the end of the kernel."""
        for channel, sock in self.by_channel.items():
            read_messages(sock, functools.partial(self._deliver, channel))

    def close(self) -> None:
        for sock in self.by_channel.values():
            self._loop.watch(sock.fd, None)
            sock.close()
        self.by_channel = {}


class SignedChannels:
    """Channels that sign messages and give them to `relay(channel, parts)`, such as the pipe of the kernel's host."""

    def __init__(self, relay: Deliver, key: str, signature_scheme: str = "hmac-sha256") -> None:
        self._relay, self._codec = relay, ZmqCodec(key, signature_scheme)

    def send(self, message: Message) -> None:
        self._relay(message.channel, self._codec.encode(message))

    def decode(self, raw: RawMessage) -> Iterator[Message]:
        return self._codec.decode(*raw)

    def close(self) -> None:
        pass  # the pipe serves other kernels, too


class ZmqChannels(SignedChannels):
    """The channels of a kernel that is reached over ZeroMQ from here; the loop's thread owns the sockets."""

    def __init__(
        self, loop: Loop, context: Any, connection: KernelConnection, mailbox: Mailbox, *, watch: bool = False
    ) -> None:
        """With `watch`, a lost connection is reported as the death of the kernel: nobody else reports it."""
        self._loop, self._mailbox = loop, mailbox
        sockets = self._sockets = KernelSockets(loop, lambda *raw: mailbox.put(raw))
        super().__init__(
            lambda *raw: loop.post(functools.partial(sockets.send, *raw)), connection.key, connection.signature_scheme
        )
        self._monitor: Any = None  # a socket that tells of a lost connection
        loop.post(functools.partial(self._open, context, connection, watch))

    def _open(self, context: Any, connection: KernelConnection, watch: bool) -> None:
        import zmq

        try:
            self._sockets.open(context, connection, os.urandom(16).hex().encode())
            if watch:
                self._monitor = self._sockets.by_channel["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)
                self._loop.watch(self._monitor.fd, self._on_disconnected)
                self._on_disconnected()
        except zmq.ZMQError as error:
            self._mailbox.put(KernelDied(cause=f"its sockets cannot be opened here: {error.strerror}"))

    def _on_disconnected(self) -> None:
        death = KernelDied(cause="its connection was closed")
        read_messages(self._monitor, lambda event: self._mailbox.put(death))

    def close(self) -> None:
        self._loop.post(self._close)

    def _close(self) -> None:
        if self._monitor and self._sockets.by_channel:
            self._loop.watch(self._monitor.fd, None)
            self._sockets.by_channel["shell"].disable_monitor()
        self._sockets.close()


# ======================================================================================================
# 9. Kernel client
# ======================================================================================================

OutputHook = Callable[[Json], None]
InputHook = Callable[[str, bool], str]
ResultHook = Callable[[ExecutionResult], None]
Pause = Callable[[], contextlib.AbstractContextManager[None]]
RequestHook = Callable[..., bool]  # (prompt, reply, pause) -> whether it takes the request


@dataclass(eq=False)
class Hooks:
    """What a caller wants to hear of a cell while it runs. An error in on_output or on_input costs only a warning.

    `record` gets every output before `on_output` does, and is quick. `on_timeout(so_far)`, with the result so far,
    is called instead of an interrupt when the time is over: the cell goes on. `on_result` gets the result even if
    Ctrl-C ends the call. `on_start` gets the Cell before it runs.
    """

    on_output: OutputHook | None = None
    on_input: InputHook | None = None
    record: OutputHook | None = None
    on_request: RequestHook | None = None
    on_timeout: ResultHook | None = None
    on_result: ResultHook | None = None
    on_start: Callable[[Cell], None] | None = None
    muted: bool = False  # on_output and on_input are not called any more: they took too long, or the call is ending

    def show(self, output: Json) -> None:
        if self.record:
            self.record(output)
        if self.on_output and not self.muted:
            try:
                self.on_output(output)
            except Exception:
                logger.warning("on_output raised; the cell goes on", exc_info=True)
            except BaseException:  # Ctrl-C came while it was at work: it may be what hangs
                self.muted = True
                raise

    def answer(self, content: Json) -> str:
        """Return the answer to an input_request; "\x04" is the end of input: the cell gets EOFError."""
        if self.on_input and not self.muted:
            try:
                answer = self.on_input(text_of(content.get("prompt")), bool(content.get("password")))
                if isinstance(answer, str):
                    return answer
                if answer is not None:
                    getattr(answer, "close", int)()  # a coroutine that nobody will await
                    logger.warning("on_input must return a string, not %s; the cell gets EOFError", type(answer))
            except EOFError:
                pass
            except Exception:
                logger.warning("on_input raised; the cell gets EOFError", exc_info=True)
        return "\x04"


class Cell:
    """A cell that runs: the state of its execution, its hooks, its deadlines."""

    def __init__(self, execution: Execution, seconds: float | None, hooks: Hooks) -> None:
        self.execution, self.hooks = execution, hooks
        self.started = time.monotonic()
        self.result: ExecutionResult | None = None  # once it has ended
        self.sent = False  # the kernel may have got its request
        self.reading_deadline: Deadline | None = None  # for slow hooks to take the rest, if the cell ended in time
        self.begun = math.inf  # when the kernel was seen to run it
        self.signalled = -math.inf  # when the kernel was last sent an interrupt for it
        self.fence_deadline: Deadline | None = None  # for the missing one of reply and idle
        self.timed_out = False  # its time is over: it was interrupted, or detached and goes on
        self.lock = threading.RLock()  # for all that; re-entrant, as a signal handler may run in the thread that has it
        self.abandoned = threading.Event()  # nobody reads for it any more
        self._pauses = 0  # how many threads keep the clock stopped,
        self._paused_at = 0.0  # and since when
        self.deadline = Deadline(seconds)  # of its time; once that is over, of its INTERRUPT_GRACE

    @property
    def _paused(self) -> bool:
        return self._pauses > 0 and not self.execution.interrupted

    @property
    def wait(self) -> float | None:
        """How long to wait for a message, in seconds."""
        return PAUSE_POLL if self._paused else (self.fence_deadline or self.deadline).remaining

    @property
    def due(self) -> bool:
        """Whether the time of the cell, or that of its grace, is over."""
        with self.lock:
            return not self._paused and self.deadline.expired

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock of the cell while the block runs, in any thread."""
        with self.lock:
            self._paused_at = self._paused_at if self._pauses else time.monotonic()
            self._pauses += 1
        try:
            yield
        finally:
            with self.lock:
                self._pauses -= 1
                if not self._pauses and not self.execution.interrupted:
                    self.deadline.extend(time.monotonic() - self._paused_at)

    def feed(self, message: Message) -> Json | None:
        with self.lock:
            shown = self.execution.feed(message)
            self.begun = min(self.begun, time.monotonic()) if self.execution.started else math.inf
            return shown

    def so_far(self) -> ExecutionResult:
        """Return the result, or what there is of it by now; from any thread."""
        with self.lock:
            return self.result or self.execution.result(time.monotonic() - self.started)

    def finish(self) -> ExecutionResult:
        self.result = result = self.so_far()
        if self.hooks.on_result:
            self.hooks.on_result(result)
        return result


_OWN_FRAME = re.compile(r"(?:Cell |Input )?In ?\[(\d+)\]|<ipython-input-(\d+)-|[/\\]ipykernel_\d+[/\\]\d+\.py")
_LINE = re.compile(r"\], line (\d+)|^-+> ?(\d+)", re.MULTILINE)
_DUMPED_FRAME = re.compile(r'^  File "([^"\n]*)", line (\d{1,9}) in (.{1,200})$', re.MULTILINE)


def place_of(result: ExecutionResult, code: str) -> str:
    """Return "; it was at line N: ..." for a cell that was ended, if its traceback or its kernel's stderr tells."""
    where = ""
    if result.death:
        frames = _DUMPED_FRAME.findall(result.death.stderr)
        own = [frame for frame in frames if _OWN_FRAME.search(frame[0])]
        lines = [int(line) for path, line, _ in own if path == own[-1][0]]  # the outermost frame is the cell's own
        called = frames[: frames.index(own[0])][:3] if own else []
        where = "".join(f", in {name} ({os.path.basename(path)}:{line})" for path, line, name in called)
    else:
        lines = _traced_lines(result)[::-1]
    # IPython does not count the empty lines at the start.
    start = code[: len(code) - len(code.lstrip())].count("\n")
    texts = code.splitlines()[start:]
    if not lines or not 0 < lines[0] <= len(texts):
        return ""
    return clean_text(f"; it was at line {start + lines[0]}: {texts[lines[0] - 1].strip()[:200]}{where}")


def _traced_lines(result: ExecutionResult) -> list[int]:
    """Return the numbers of the cell's own lines in the traceback of its error, outermost first."""
    found = []
    error = result.error or {"ename": "", "traceback": []}
    for frame in error["traceback"][:1000] if error["ename"] in ("KeyboardInterrupt", "CancelledError") else ():
        head, _, body = clean_text(frame[:20_000]).partition("\n")
        own, line = _OWN_FRAME.search(head), _LINE.search(head) or _LINE.search(body)
        if own and line and (own[1] or own[2] or str(result.execution_count)) == str(result.execution_count):
            found.append(int((line[1] or line[2])[:9]))
    return found


class KernelClient:
    """Runs cells on one kernel, one at a time, in the caller's thread.

    Not for two cells at once (the executor has the lock); `interrupt` may be called from any thread.
    """

    def __init__(self, control: KernelControl) -> None:
        """Raises: what `start` raises."""
        self._control = control
        self._channels: Channels | None = None
        self._serial, self._pid = itertools.count(1), os.getpid()
        self._running: Cell | None = None
        self.start()

    @property
    def connection_file(self) -> str | None:
        """Path of the kernel's connection file on this machine, None if it is not here."""
        return self._control.connection_file

    @property
    def language(self) -> str:
        """The name of the language that the kernel speaks, as it said; "" before it is ready."""
        return text_of(part_of(self.kernel_info, "language_info", "name"))

    def files(self) -> AskFar | None:
        """Return a function that reaches the files where the kernel runs; None if only cells can."""
        return self._control.files()

    @property
    def alive(self) -> bool:
        """Whether there is a kernel that can run a cell, as far as known now."""
        return self._channels is not None and self._death is None and not self._ended

    @property
    def owned(self) -> bool:
        """Whether the kernel is ours to kill and restart."""
        return self._control.owned

    @property
    def ended(self) -> bool:
        """Whether the kernel has ended, even if nobody has been told yet."""
        return self._death is not None or self._mailbox.ended

    def start(self) -> None:
        """Ask for the kernel, or for a fresh one in its place, without waiting until it is ready."""
        self.close()
        self._mailbox = self._new_mailbox()
        self._session = os.urandom(16).hex()
        self._nudges: set[str] = set()  # requests; once all are answered, no interrupt can hit a later cell
        self._death: KernelDied | None = None
        self._ended = False  # the code has called exit(): the process is about to end
        self.ready = False
        self.kernel_info: Json = {}
        self._kernel_session = ""  # by which its replies tell one process of the kernel from the next
        self._channels = self._control.start(self._mailbox)

    def wait_ready(self) -> None:
        """Wait until the kernel answers on shell and is heard on iopub.

        Raises: KernelStartFailed.
        """
        deadline, began = Deadline(self._control.start_timeout), time.monotonic()
        attempts = 3 if self._control.owned else 1  # ports may be taken between choosing and binding them
        while not self.ready:
            attempts -= 1
            try:
                self._greet(deadline)
            except KernelStartFailed:
                # Its port was taken in the meantime, or its host or fork server is no more: nothing is lost.
                death = self._death
                if not attempts or not death or not (death.retryable or "Address already in use" in death.stderr):
                    self.give_up("it did not start")
                    raise
                self.start()
        logger.info("Kernel ready after %.2f s", time.monotonic() - began)

    def _greet(self, deadline: Deadline) -> None:
        # Ready = shell answers and iopub is proven live: the kernel welcomes the subscription to our unique topic
        # (JEP 65). Older kernels do not; but they publish the status of a request, which is repeated for that.
        heard, argv, attached = False, list(self._control.argv), not self._control.owned
        self._send("shell", "kernel_info_request", {})
        while not (self.kernel_info and heard):
            item = self._mailbox.get(deadline.within(0.2))  # a kernel without iopub_welcome is asked again
            if isinstance(item, KernelDied):
                self._death = item
                raise KernelStartFailed(argv, item.cause, item.exit_code, item.stderr, attached)
            if deadline.expired:
                reason = f"no answer within {deadline.seconds:g} s{'; it may be busy with a cell' * attached}"
                raise KernelStartFailed(argv, reason, attached=attached)
            if item is None or isinstance(item, Reconnected):
                self._send("shell", "kernel_info_request", {})
            else:
                for message in self._decode(item):
                    heard = heard or message.channel == "iopub"
                    if message.msg_type == "kernel_info_reply":
                        self.kernel_info = message.content
                        self._kernel_session = text_of(message.header.get("session"))
        self.ready = True

    def execute(
        self,
        code: str,
        timeout: float | None,
        hooks: Hooks | None = None,
        *,
        silent: bool = False,
        store_history: bool = True,
        expression: str | None = None,
        max_output: int | None = None,
    ) -> ExecutionResult:
        """Run one cell and return what it did; `timeout` is the wall clock in seconds, None for no limit.

        `max_output` is how many characters of its streams are kept, None for all.

        Raises: KernelStartFailed, KernelDied or ConnectionClosed if there is no kernel to run it.
        """
        if self._running and os.getpid() == self._pid:  # in a forked child, sending raises the error
            raise JupyterExecError(HOOK_RUNS_CELL)
        hooks = hooks or Hooks()
        asks = bool(hooks.on_input or hooks.on_request)
        hooks.muted = not (hooks.on_output or hooks.on_input)  # or their slowness would be blamed for a slow reading
        content = execute_content(code, silent=silent, store_history=store_history, asks=asks, expression=expression)
        request = self._message("shell", "execute_request", content)
        cell = Cell(Execution(request.msg_id, max_output, silent), timeout, hooks)
        self._running, is_sending = cell, False
        # A hook may take longer than the cell has: the interrupt is then sent from a thread of its own.
        has_timer = (hooks.on_output or hooks.on_input) and cell.deadline.remaining is not None
        try:
            self._settle(cell)
            if hooks.on_start:
                hooks.on_start(cell)
            with contextlib.suppress(RuntimeError):  # there are too many threads
                if has_timer:
                    threading.Thread(target=self._interrupt_in_time, args=(cell,), daemon=True).start()
            if not cell.execution.death:
                is_sending = True
                self._post(request)
            cell.sent = True
            self._run(cell)
        except JupyterExecError:
            raise
        except BaseException:  # Ctrl-C, or a signal handler that raises
            if is_sending:
                self._end_early(cell)
            raise
        finally:
            self._running, self._ended = None, cell.execution.ended_session
            with cell.lock:  # nobody interrupts it from now on; if somebody just has, the next cell waits for that
                cell.abandoned.set()
        return cell.finish()

    def _end_early(self, cell: Cell) -> None:
        """Interrupt a cell whose caller wants to leave, and wait for its end, or that of its grace."""
        cell.timed_out = cell.sent  # as if its time were over, so that another client's cell does not delay the end
        if not cell.sent:  # it may have been, all the same: the kernel's answer to a request after it tells
            cell.execution.reconnected = True
            self._fence(cell.execution)
        self._interrupt_cell(cell, INTERRUPT_GRACE / 2)
        cell.sent = cell.timed_out = True
        cell.deadline = Deadline(INTERRUPT_GRACE)
        cell.hooks.on_input = cell.hooks.on_timeout = None
        self._run(cell)
        cell.finish()

    def _interrupt_in_time(self, cell: Cell) -> None:
        while not (cell.timed_out or cell.abandoned.wait(cell.deadline.remaining or PAUSE_POLL)):
            self._time_out(cell)

    def _run(self, cell: Cell) -> None:
        """Read messages until the cell is done; as deadlines pass, climb the ladder: first interrupt, then kill."""
        while not cell.execution.done:
            for _ in self._take(self._mailbox.get(cell.wait), cell):
                if not self._climb(cell):
                    return

    def _climb(self, cell: Cell) -> bool:
        """Do what is due by now; returns whether to go on."""
        execution, in_grace = cell.execution, cell.timed_out  # before `due`: another thread may begin the grace
        if execution.done:
            return True
        if not execution.half_done:
            cell.fence_deadline = None
        elif not cell.fence_deadline or cell.fence_deadline.expired:
            if cell.fence_deadline:
                self._fence(execution)
            cell.fence_deadline = Deadline(FENCE_DELAY)
        if self._death:  # somebody has stopped the kernel in the meantime, and taken the news from the mailbox
            execution.death = self._death
        elif not cell.due:
            pass
        elif self._has_answered(cell):  # a slow hook kept this thread from seeing it
            if self._reading_is_over(cell) and not cell.hooks.muted:
                logger.warning("The hooks of a cell are too slow: it has ended, and the rest is in its result only")
                cell.reading_deadline = Deadline(INTERRUPT_GRACE)  # first this: a timer looks at both
                cell.hooks.muted = True
        elif not in_grace:
            self._time_out(cell)
        elif not self._control.owned:
            return False
        else:
            self._kill(cell)
        return True

    @property
    def hurries(self) -> bool:
        """Whether the hook at work should wait for nothing more: the time of its cell is over, which does not run."""
        cell = self._running
        return bool(cell and cell.due and (cell.timed_out or not cell.sent or self._has_answered(cell)))

    @property
    def hook_is_late(self) -> bool:
        """Whether the hook at work has had the time of its cell, and INTERRUPT_GRACE more."""
        cell = self._running
        return bool(cell and self.hurries and (cell.timed_out or self._reading_is_over(cell)))

    def _reading_is_over(self, cell: Cell) -> bool:
        """Whether a cell that has answered, and whose time is over, has been read for INTERRUPT_GRACE since."""
        cell.reading_deadline = cell.reading_deadline or Deadline(INTERRUPT_GRACE)
        return cell.reading_deadline.expired

    def _has_answered(self, cell: Cell) -> bool:
        """Whether the reply or idle of the cell has come, read or not.

        A kernel may forge that. So it is not believed any more if hooks do not delay the reading, and it takes long.
        """
        # One of them alone counts for FENCE_DELAY: the other may be stuck behind a flood, which the interrupt ends.
        halved = cell.execution.half_done and (cell.timed_out or not cell.execution.fences)
        answered = self._mailbox.answered or halved
        return answered and not (cell.hooks.muted and cell.reading_deadline and cell.reading_deadline.expired)

    def _time_out(self, cell: Cell) -> None:
        """Interrupt a cell whose time is over, or let go of it; in the caller's thread or that of a timer."""
        if cell.execution.done or self._has_answered(cell) or not cell.due:  # it ended in time, or its clock is stopped
            return
        detach = None if cell.execution.interrupted else cell.hooks.on_timeout
        with cell.lock:
            if cell.timed_out:  # the other thread was faster
                return
            cell.timed_out = True
            if not detach:
                cell.execution.interrupted, cell.execution.timed_out = True, cell.deadline.seconds
            cell.deadline = Deadline(None if detach else INTERRUPT_GRACE)
        if detach:
            detach(cell.so_far())
        else:
            self._interrupt_cell(cell, INTERRUPT_GRACE / 2)

    def _take(self, item: MailItem | None, cell: Cell) -> Iterator[None]:
        """Take an item from the mailbox, in pieces: yields after each, and once if there is nothing."""
        execution = cell.execution
        if isinstance(item, KernelDied):
            self._drain(cell)
            self._death = execution.death = item
            logger.info("Kernel died: %s", clean_text(item.sentence()))
        elif isinstance(item, Reconnected):
            if cell.sent:
                execution.reconnected = True
                self._fence(execution)
        elif item:
            execution.withheld, self._mailbox.dropped = execution.withheld or self._mailbox.dropped, False
            for message in self._decode(item):
                self._feed(message, cell)
                yield
        yield  # once more: deadlines have to be tested after an item without a valid message, too

    def _feed(self, message: Message, cell: Cell) -> None:
        execution = cell.execution
        if death := self._reported_death(message):
            self._mailbox.put(death)
            return  # what a kernel that was started anew says of the cell would end it as if all were well
        output = cell.feed(message) or self._late_output(message, execution)
        if message.msg_type == "input_request" and message.parent_id == execution.msg_id:
            prompt = text_of(message.content.get("prompt"))
            if not (cell.hooks.on_request and cell.hooks.on_request(prompt, self._reply, pause=cell.pause)):
                self._answer(cell.hooks.answer(message.content))
        elif output:
            cell.hooks.show(output)
        if execution.interrupted and execution.started and cell.signalled < cell.begun:
            self._interrupt_cell(cell, 0)

    def _reported_death(self, message: Message) -> KernelDied | None:
        """Return the kernel's death if a message tells of it: its own, its Jupyter server's, or its successor's."""
        if message.msg_type == "shutdown_reply" and message.channel == "iopub":
            return KernelDied(cause="it was shut down or restarted by somebody else")
        state = message.content.get("execution_state")
        if message.msg_type == "status" and state in ("restarting", "dead") and not message.parent_id:
            return KernelDied(cause="its server found it dead" + (" and restarted it" if state == "restarting" else ""))
        # "If a kernel is restarted, the kernel session id should be regenerated." Other channels may carry messages of
        # its server; and some kernels have no id, or send ours back.
        session = text_of(message.header.get("session"))
        if message.channel == "shell" and session and self._kernel_session not in ("", session):
            return KernelDied(cause="it was restarted in the meantime")
        return None

    def _late_output(self, message: Message, execution: Execution) -> Json | None:
        """Return what a thread of an earlier cell of ours has printed, marked as "late"."""
        if message.parent_id == execution.msg_id or message.parent_header.get("session") != self._session:
            return None
        output = Execution(message.parent_id).feed(message) if message.channel == "iopub" else None
        return output and output | {"late": True}

    def _drain(self, cell: Cell) -> None:
        """Take what a dead kernel had sent: it may arrive after the news of its death."""
        deadline = Deadline(FENCE_DELAY)
        while (item := self._mailbox.get(DEATH_DRAIN)) is not None:
            if not isinstance(item, KernelDied):
                for _ in self._take(item, cell):
                    if deadline.expired:
                        return

    def _kill(self, cell: Cell) -> None:
        """Kill a kernel that ignores the interrupt and start it anew; its variables are lost."""
        execution = cell.execution
        execution.killed = cell.hooks.muted = True
        logger.info("Kernel killed, since its code ignores the interrupt")
        self._control.kill(dump=True)
        deadline = Deadline(SHUTDOWN_GRACE)
        while not execution.death:
            for _ in self._take(self._mailbox.get(deadline.remaining), cell):
                if deadline.expired and not execution.death:
                    self._control.abandon()
                    self._death = execution.death = self._death or KernelDied(cause="it was killed")
        death = execution.death
        # A Jupyter server takes long, and so may a host that was silent just now: then the next call starts the kernel.
        quick = not self._control.supervised and not deadline.expired
        try:
            if quick and self._channels:  # nobody has shut it down meanwhile
                self.start()
        except JupyterExecError:
            self._death = death  # the next call tries again and reports

    def interrupt(self, cell: Cell | None = None) -> None:
        """Interrupt the running cell, from any thread; without effect if no cell runs, or another one than `cell`."""
        running = self._running
        if running and cell in (None, running):
            self._interrupt_cell(running, INTERRUPT_REPEAT)

    def _interrupt_cell(self, cell: Cell, age: float) -> None:
        """Interrupt a cell, unless that was done in the last `age` seconds; later once more, if it did not help."""
        # ipykernel notices a SIGINT in `await` only when its event loop wakes up (ipykernel#881): a
        # kernel_info_request on shell wakes it. Its answer also tells that the signal can hit no later cell.
        nudge = self._message("shell", "kernel_info_request", {})
        with cell.lock:
            cell.execution.interrupted, now, is_first = True, time.monotonic(), cell.signalled < cell.begun
            # A kernel ignores the signal until it has begun with the cell; when it has, the reading thread comes here.
            # Until then it may run another client's cell. Once our time is over that is interrupted, if the kernel is
            # ours: it would be killed otherwise, since the cell does not end.
            is_wanted = cell.execution.started or (cell.timed_out and self._control.owned)
            if not is_wanted or now - cell.signalled < age or cell.abandoned.is_set():
                return
            cell.signalled = now
            self._nudges.add(nudge.msg_id)
        logger.info("Kernel interrupted")
        channels = self._channels
        if channels and not self._control.interrupt(functools.partial(channels.send, nudge)):
            # "interrupt_mode: ... message: the client sends an interrupt_request on the control channel"
            channels.send(self._message("control", "interrupt_request", {}))
            channels.send(nudge)
        if is_first:
            is_young = now - cell.begun < INTERRUPT_REPEAT
            with contextlib.suppress(RuntimeError):  # there are too many threads
                threading.Thread(target=self._interrupt_again, args=(cell, is_young), daemon=True).start()

    def _interrupt_again(self, cell: Cell, is_young: bool) -> None:
        """Interrupt a cell once more: ipykernel loses a signal that comes after it took the cell and before it runs it.

        A cell that had run for some time, and will not be killed, is left alone: it may be cleaning up.
        """
        is_over = cell.abandoned.wait(INTERRUPT_GRACE / 2) or self._has_answered(cell)
        if not is_over and (is_young or cell.timed_out):
            self._interrupt_cell(cell, INTERRUPT_GRACE / 2)

    def _fence(self, execution: Execution) -> None:
        """Ask something that the kernel will answer after all that belongs to the cell."""
        fence = self._message("shell", "kernel_info_request", {})
        execution.fences.add(fence.msg_id)
        self._post(fence)

    def _settle(self, cell: Cell) -> None:
        """Wait until no earlier interrupt can hit this cell; see whether the kernel has died since the last cell.

        All that has come by now is read: a message in it may tell of the death.
        """
        deadline, unread = Deadline(INTERRUPT_GRACE), self._mailbox.unread
        if self._mailbox.dropped:
            logger.warning("Output that came between two cells was dropped: there was too much of it")
            self._mailbox.dropped = False
        while (unread > 0 or self._nudges or self._mailbox.ended) and not cell.execution.death:
            unread -= 1
            for _ in self._take(self._mailbox.get(deadline.remaining), cell):
                if deadline.expired:
                    self._nudges.clear()
                    return

    def _new_mailbox(self) -> Mailbox:
        this = weakref.ref(self)  # the I/O thread must not keep a client that nobody else refers to

        def end_flood() -> None:
            if client := this():
                threading.Thread(target=client.abort, daemon=True).start()  # it may ask a server, which takes time

        return Mailbox(end_flood)

    def shutdown(self) -> None:
        """End the kernel: ask it, and after SHUTDOWN_GRACE kill it. Only disconnects from one that is not ours."""
        if self._control.owned:
            if self._channels and self.ready and not self._death and not self._control.supervised:
                # Deviation: asked on control, where it belongs, ipykernel 7 often hangs at its end (its control thread
                # writes to an iopub thread that has gone).
                is_ipykernel = self.kernel_info.get("implementation") == "ipython"
                self._send("shell" if is_ipykernel else "control", "shutdown_request", {"restart": False})
                self._wait_exit(SHUTDOWN_GRACE)
            self._control.kill()  # also if it says to be dead
            self._wait_exit(SHUTDOWN_GRACE)
        self.close()

    def abort(self) -> None:
        """Kill the kernel, from any thread, so that a running cell ends; without effect on one that is not ours."""
        if self._control.owned:
            self._control.kill()

    def give_up(self, why: str) -> None:
        """Kill the kernel, if it is ours, and disconnect."""
        self.abort()
        self.close()
        self._mailbox.put(KernelDied(cause=why))

    def _wait_exit(self, seconds: float) -> None:
        deadline = Deadline(seconds)
        while not self._death and not deadline.expired:
            item = self._mailbox.get(deadline.remaining)
            if isinstance(item, KernelDied):
                self._death = item

    def restart(self) -> None:
        """Replace the kernel by a fresh one. Raises: KernelError if it was attached to."""
        if not self._control.owned:
            raise KernelError("This kernel was attached to, it is not ours to restart.")
        if not self._control.supervised:  # a server does this by itself
            self.shutdown()
        self.start()
        logger.info("Kernel restarted")

    def close(self) -> None:
        """Disconnect."""
        channels, self._channels = self._channels, None
        if channels:
            if self._running:  # a hook of the cell has called this, by restart or stop of the executor
                execution = self._running.execution
                execution.death = execution.death or KernelDied(cause="it was ended by a hook of the cell")
            channels.close()
            self._control.close()

    def _message(self, channel: str, msg_type: str, content: Json) -> Message:
        msg_id = f"{self._session}_{next(self._serial)}"
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": self._session, "username": "jupyter_exec"}
        header["version"] = "5.4"  # of the messaging spec; without it most kernels take the message for version 4
        # Some kernels (Deno, evcxr) insist on a date with a time zone.
        header["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Message(channel, header, {}, {}, content, [])

    def _answer(self, value: str) -> None:
        """Give a cell what it asked for with input()."""
        try:
            self._reply(value)
        except ProtocolError as error:
            logger.warning("What on_input returned is too long, the cell gets EOFError: %s", error)
            self._reply("\x04")

    def _reply(self, value: str) -> None:
        self._send("stdin", "input_reply", {"value": value})

    def _send(self, channel: str, msg_type: str, content: Json) -> None:
        self._post(self._message(channel, msg_type, content))

    def _post(self, message: Message) -> None:
        if self._channels is None:
            raise ConnectionClosed("The kernel's connection is closed.")
        self._channels.send(message)

    def _decode(self, item: RawMessage) -> Iterator[Message]:
        """Yield the message of an item, unless it must not be trusted; a huge one comes in pieces."""
        try:
            for message in self._channels.decode(item) if self._channels else ():
                if message.channel == "shell":
                    self._nudges.discard(message.parent_id)
                yield message
        except ProtocolError as error:
            logger.warning("Ignored a message on %s: %s", item[0], error)
            if self._running and not isinstance(error, SignatureError):
                self._running.execution.withheld = True


class AttachedKernelControl(KernelControl):
    """A kernel that somebody else started; it is never killed or restarted from here."""

    owned = False

    def __init__(self, target: KernelConnection | AnyPath) -> None:
        """`target` is its connection file, or the contents of one. Raises: ProtocolError for a broken file."""
        if not isinstance(target, KernelConnection):
            self.connection_file = os.path.abspath(target)
            target = read_connection_file(self.connection_file)
        self._connection = target
        self._loop: Loop | None = None
        self._context: Any = None

    def start(self, mailbox: Mailbox) -> Channels:
        self.close()
        self._context, self._loop = new_context(), Loop()
        self._loop.start("jupyter_exec I/O")
        try:
            return ZmqChannels(self._loop, self._context, self._connection, mailbox, watch=True)
        except BaseException:  # an unknown signature scheme
            self.close()
            raise

    def close(self) -> None:
        if self._loop:
            self._loop.post(functools.partial(self._context.destroy, 0))
            self._loop.stop()
            self._loop = None


# ======================================================================================================
# 10. Kernel host
#
# Runs at the other end of a pipe, in a process that was started with BOOTSTRAP and got this module over its stdin, on
# Linux and macOS. Only the relay needs more than the standard library. It has one thread with one Loop.
#
# A control request is a JSON object {"id", "op", ...}; its answer is {"id", "result"} or {"id", "error", "data"}.
# {"event": "exit", ...} tells of a kernel's death; {"event": "loss", ...} of dropped output, which may be the rest of
# a large message.
# ======================================================================================================

# Runs on any Python 3. First it removes the working directory, which `-c` has put on sys.path: an agent's signal.py
# there would shadow the standard library. The program ("c": bytecode, if it is the same for both Pythons; "s": source)
# is read without a buffer, which would swallow the frames behind it. The caller replaces NONCE and MAIN; the other side
# of this is `greet_host`.
BOOTSTRAP = """\
import sys; sys.path[:] = [p for p in sys.path if p]
import importlib.util, marshal, os, select
def read(n):
    data = b""
    while len(data) < n:
        try:
            more = os.read(0, n - len(data))
        except BlockingIOError:
            select.select([0], [], [])
            continue
        if not more: sys.exit(0)
        data += more
    return data
magic = "".join("%02x" % byte for byte in importlib.util.MAGIC_NUMBER)
who = (os.getpid(), getattr(os, "getuid", os.getpid)())
os.write(1, ("NONCE %d %d %s %d %d\\n" % (sys.version_info[:2] + (magic,) + who)).encode())
module = {"__name__": "jupyter_exec_host"}
kind, size = read(1), read(8)
program = read(int(size))
code = marshal.loads(program) if kind == b"c" else compile(program, "<jupyter_exec>", "exec")
exec(code, module)
program = marshal.dumps(code)
module["MAIN"](b"c%08d" % len(program) + program)
"""

# Modules that ipykernel imports when a kernel starts.
FORKED_MODULES = ["IPython.core.completerlib", "IPython.core.debugger", "IPython.core.oinspect", "encodings.idna"]
FORKED_MODULES += ["IPython.extensions.storemagic", "faulthandler", "ipykernel.debugger", "ipykernel.kernelapp"]
FORKED_MODULES += ["tornado.platform.asyncio", "tornado.queues"]
# `-m ipykernel_launcher`, but at a crash the stack goes to the real stderr: ipykernel will redirect 2 to itself.
LAUNCHER = """\
import sys
path = sys.path
sys.path = [place for place in path if place]
import faulthandler, os, runpy
faulthandler.enable(os.dup(2))
sys.path = path
runpy.run_module("ipykernel_launcher", None, "__main__", True)
"""
CANNOT_FORK = 75  # exit status of a fork server whose Python cannot fork kernels for this host
_PYTHON = re.compile(r"python[0-9.]*\Z")
# A kernel for a program needs no history database and no pause after each cell. In, Out and %history work without.
LEAN_OPTIONS = ["--HistoryManager.enabled=False", "--IPythonKernel._execute_sleep=0"]
_NOT_DROPPED = _type_among(b"status|error|iopub_welcome|shutdown_reply")  # on iopub; small ones are never dropped
_MARKER = "JUPYTER_EXEC_KERNEL"  # environment variable that marks a kernel and its children
_OOM_KILLS = ("memory.events", "memory.oom_control", "oom_kill ")  # where a control group counts them
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # linux/prctl.h


def kernel_dirs() -> list[str]:
    """Return the directories that may have kernelspecs, best first, by Jupyter's rules for this Python.

    Source: https://docs.jupyter.org/en/latest/use/jupyter-directories.html#data-files
    """
    import sysconfig

    data_home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    on_mac = os.path.expanduser("~/Library/Jupyter") if sys.platform == "darwin" else ""
    user = [os.environ.get("JUPYTER_DATA_DIR") or on_mac or os.path.join(data_home, "jupyter")]
    if site_user := sysconfig.get_path("data", f"{os.name}_user"):
        user.append(os.path.join(site_user, "share", "jupyter"))
    env = [os.path.join(sys.prefix, "share", "jupyter")]
    extra = [path for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if path]
    order = env + user if _prefers_env() else user + env
    bases = [*extra, *order, "/usr/local/share/jupyter", "/usr/share/jupyter", os.path.expanduser("~/.ipython")]
    return list(dict.fromkeys(os.path.join(base, "kernels") for base in bases))


def _prefers_env() -> bool:
    """Whether the environment's directories come before the user's, as in a virtual environment that the user owns."""
    if "JUPYTER_PREFER_ENV_PATH" in os.environ:
        return os.environ["JUPYTER_PREFER_ENV_PATH"].lower() not in ("", "0", "n", "no", "false", "off")
    conda, name = os.environ.get("CONDA_PREFIX", ""), os.environ.get("CONDA_DEFAULT_ENV", "base")
    in_conda = conda != "" and name != "base" and sys.prefix.startswith(conda)
    return (sys.prefix != sys.base_prefix or in_conda) and os.stat(sys.prefix).st_uid == os.getuid()


def find_kernelspecs(own_python3: bool) -> dict[str, Json]:
    """Return {kernel name: content of its kernel.json, with "resource_dir" added}.

    With `own_python3`, "python3" always means this interpreter, otherwise only if no directory has it. Either way this
    interpreter needs ipykernel for that.

    Spec: https://jupyter-client.readthedocs.io/en/stable/kernels.html#kernel-specs
    """
    import importlib.util

    specs: dict[str, Json] = {}
    found: list[Path] = []
    for directory in kernel_dirs():
        with contextlib.suppress(OSError):
            found += sorted(Path(directory).glob("*/kernel.json"))
    for path in found:
        with contextlib.suppress(OSError, ProtocolError):
            spec = json_object(path.read_bytes(), "kernelspec")
            argv, name = spec.get("argv"), path.parent.name
            is_command = isinstance(argv, list) and argv and all(isinstance(arg, str) for arg in argv)
            if is_command and re.fullmatch(r"[A-Za-z0-9._-]+", name):
                specs.setdefault(name.lower(), spec | {"resource_dir": str(path.parent)})
    if own_python3 or "python3" not in specs:
        specs.pop("python3", None)
        if importlib.util.find_spec("ipykernel"):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            names = {"display_name": "Python 3", "language": "python"}
            specs["python3"] = {"argv": argv, "resource_dir": sys.prefix, **names}
    return specs


def kernel_among(wanted: str, names: Iterable[str]) -> str | None:
    """Return which of the kernels `names` is `wanted`: case does not matter, "python" may mean python3."""
    installed = {name.lower(): name for name in names}
    return installed.get("python3" if wanted == "python" and "python" not in installed else wanted.lower())


def command_of(spec: Json, connection_file: str) -> list[str]:
    """Fill in a kernelspec's argv: {connection_file}, {resource_dir}, {prefix}; "python" is this interpreter."""
    values = {"connection_file": connection_file, "resource_dir": spec["resource_dir"], "prefix": sys.prefix}
    argv = [re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), arg) for arg in spec["argv"]]
    if argv[0] in ("python", "python3", f"python3.{sys.version_info.minor}"):
        argv[0] = sys.executable
    return [os.path.expanduser(arg) for arg in argv]


def _is_ipykernel(argv: list[str]) -> bool:
    return bool(_PYTHON.search(argv[0])) and any("ipykernel" in arg for arg in argv)


def _is_forkable(argv: list[str], spec: Json) -> bool:
    """Whether a fork server can make this kernel; not if its kernelspec sets `env`: that needs a new process."""
    is_launcher = _is_ipykernel(argv) and argv[1:3] == ["-m", "ipykernel_launcher"]
    can_order = hasattr(socket, "SOCK_SEQPACKET") and hasattr(socket, "send_fds")  # not in every Python
    return sys.platform == "linux" and can_order and is_launcher and not spec.get("env")


def _mark(name: str) -> str:
    """Return the value of _MARKER for a process; all have one length, so that one can overwrite another."""
    return f"{os.getpid()}/{name:_<24}"


def make_directory() -> str:
    """Make a private directory for connection files and sockets. Raises: KernelStartFailed with what to do."""
    import tempfile

    try:
        # A long TMPDIR is not used: the path of a socket file may have 107 bytes (103 on macOS).
        base = tempfile.gettempdir()
        base = base if len(os.fsencode(base)) < 60 and base.isprintable() else "/tmp"  # else it is no UTF-8
        _remove_forgotten(base)
        return tempfile.mkdtemp(prefix=f"jx-{process_name(os.getpid())}-", dir=base)
    except OSError as error:
        reason = (
            f"no temporary directory can be written to, set TMPDIR to a short one that can ({error.strerror or error})"
        )
        raise KernelStartFailed([], reason) from None


def _remove_forgotten(base: str) -> None:
    """Remove the directories of processes that were killed together with their host."""
    import shutil

    with contextlib.suppress(OSError):
        for name in os.listdir(base):
            found = re.fullmatch(r"jx-([0-9a-f.]+)-\w+", name)
            path = os.path.join(base, name)
            if found and has_ended(found[1]) and os.lstat(path).st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)


def stat_of(pid: int | str) -> list[bytes]:
    """Return the fields of a process's /proc/PID/stat after its name, which may hold anything (Linux).

    Field N of proc(5) is item N - 3 of the list. Raises: OSError if there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2].split()


def process_name(pid: int) -> str:
    """Return a name that no other process gets: pid, start time, machine and container; "" if they are unknown."""
    import zlib

    with contextlib.suppress(OSError, IndexError):
        start = stat_of(pid)[19]
        place = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"  # containers may share a directory
        return f"{pid}.{int(start):x}.{zlib.crc32(place.encode('utf-8')):08x}"
    return ""


def has_ended(name: str) -> bool:
    """Whether the process of that `process_name` has surely ended; False for another machine or container."""
    found = re.fullmatch(r"(\d{1,9})\.[0-9a-f]+(\.[0-9a-f]{8})", name)
    if not found or not process_name(os.getpid()).endswith(found[2]):
        return False
    try:
        os.kill(int(found[1]), 0)
        is_zombie = stat_of(found[1])[0] == b"Z"  # its parent has not looked yet
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return is_zombie or process_name(int(found[1])) not in ("", name)  # the pid is another process's by now


# The far side of file transfers. It runs in the kernel host or, if there is none, in the kernel that got this source.
# The caller may name any path: it is opened with the rights of the code that runs there. Reading follows a link, and
# writing puts the new file in its place.


def far_step(order: Json, start: str) -> Json:
    """Take one step of a transfer: {"step", "path"} and what the step needs; a relative path begins at `start`.

    Returns what the step gives, or {"error": sentence, "code": name of an errno}.
    """
    steps = {"read": far_read, "write": far_write, "finish": far_finish, "drop": far_finish, "list": far_list}
    try:
        return steps[order["step"]](os.path.join(start, order["path"]), order)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        code = errno.errorcode.get(getattr(error, "errno", None) or 0, "")
        return {"error": getattr(error, "strerror", None) or str(error), "code": code}


def far_open(path: str, flags: int) -> IO[bytes]:
    """Open a regular file, and never wait for a pipe's other end, a lease or a terminal."""
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        is_directory = stat.S_ISDIR(mode)
        raise OSError(*((errno.EISDIR, "Is a directory") if is_directory else (errno.EINVAL, "Is no regular file")))
    return open(descriptor, "wb" if flags & os.O_WRONLY else "rb")


def far_read(path: str, order: Json) -> Json:
    with far_open(path, os.O_RDONLY) as file:
        status = os.fstat(file.fileno())
        file.seek(order["offset"])
        return {"size": status.st_size, "file": [status.st_dev, status.st_ino], "bytes": file.read(order["size"])}


def far_write(path: str, order: Json) -> Json:
    """Write a piece into a new file beside `path`; directories above it are made."""
    directory, is_first = os.path.dirname(path), order["offset"] == 0
    if is_first:
        if os.path.isdir(path):
            raise OSError(errno.EISDIR, "Is a directory")
        with contextlib.suppress(FileExistsError):  # it is no directory: opening the file will say so
            os.makedirs(directory, exist_ok=True)
    flags = os.O_CREAT | os.O_EXCL if is_first else getattr(os, "O_NOFOLLOW", 0)
    with far_open(os.path.join(directory, order["part"]), os.O_WRONLY | flags) as file:
        file.seek(order["offset"])
        file.write(order["bytes"])
    return {}


def far_finish(path: str, order: Json) -> Json:
    """Let the new file take the place of `path`, or remove it."""
    part = os.path.join(os.path.dirname(path), order["part"])
    os.replace(part, path) if order["step"] == "finish" else os.unlink(part)
    return {}


def far_list(path: str, order: Json) -> Json:
    entries: list[Any] = []
    with os.scandir(path) as found:
        for entry in found:
            if len(entries) >= order["limit"]:
                raise OSError(errno.E2BIG, f"The directory has more than {order['limit']} entries")
            with contextlib.suppress(FileNotFoundError):  # it has just gone
                status = entry.stat(follow_symlinks=False)
                entries.append([entry.name, status.st_mode, status.st_size, status.st_mtime])
    return {"entries": entries}


@dataclass(eq=False)
class ChildProcess:
    """A process that the host has started: a kernel, a fork server or a gateway."""

    name: str  # of this process; of a fork server, its interpreter
    slot: str  # of the kernel, which keeps it when it is restarted
    argv: list[str]
    env: dict[str, str]
    pid: int = 0  # 0: not forked yet
    stderr: Tail | None = None
    preload: list[str] | None = None  # modules of this fork server, or of the one for this kernel; None: launched
    lean: bool = False
    exit_code: int | None = None
    files: Sequence[str] = ()  # to be removed at its end
    loss_told: bool = False  # the client knows that output is being dropped
    drops_output: bool = False  # its output is dropped while the link is busy
    sockets: KernelSockets | None = None  # of a relayed kernel
    channel: socket.socket | None = None  # of a fork server, for its orders
    forked: bool = False  # a fork server that has forked a kernel


class KernelHost:
    """Serves control requests, watches kernels and relays their messages until the pipe closes."""

    def __init__(self, loop: Loop, stream: Stream, directory: str, program: bytes) -> None:
        self._loop = loop
        self._directory = directory
        self._program = program  # this module, as it was received
        self._kernels: dict[str, ChildProcess] = {}
        self._unfinished_files: set[str] = set()  # paths of files that are still being written
        self._serial = itertools.count()
        self._unforkable: set[str] = set()  # interpreters that cannot have a fork server
        self.adopts = False  # True: it becomes the parent of orphans, without which no kernel can be forked
        self._context: Any = None
        # How many processes of our control group were killed for memory: the last two counts, the older one first.
        self._oom_kills: deque[int] = deque([_cgroup_value(*_OOM_KILLS)] * 2, 2)
        self._pipe = Pipe(loop, stream, PipeCodec().feed, self._on_parts, self._on_closed)
        self._pipe.waits_for_ever = True

    def _on_closed(self, reason: str) -> None:
        with contextlib.ExitStack() as last:  # whatever fails of the rest: code can forbid the host to open files
            last.callback(self._loop.stop)
            last.callback(signal.set_wakeup_fd, -1)  # before the loop closes that descriptor
            for kernel in self._kernels.values():
                self._end(kernel)
            for part in self._unfinished_files:
                with contextlib.suppress(OSError):
                    os.unlink(part)
            for _ in range(10):  # what left its kernel's session and environment is now a child of this process (Linux)
                with contextlib.suppress(OSError):
                    _kill_all(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    def close(self) -> None:
        """End every kernel and the host."""
        self._pipe.close("the host ends")

    def _on_parts(self, parts: list[bytes]) -> None:
        if parts[0] == b"":
            self._on_request(json_object(parts[1], "control request") | {"bytes": b"".join(parts[2:])})
            return
        name, _, channel = parts[0].decode("ascii", "replace").partition("/")
        kernel = self._kernels.get(name)
        if kernel and kernel.sockets:
            kernel.sockets.send(channel, parts[1:])

    def _on_request(self, request: Json) -> None:
        lane, data = "", b""
        try:
            result = getattr(self, f"_do_{request['op']}")(request)
            if request["op"] == "file":  # takes turns with the kernels' output, all else goes before
                lane, data = "file", (result or {}).pop("bytes", b"")
            answer = {"id": request["id"], "result": result}
        except KernelError as error:
            answer = {"id": request["id"], "error": error.__class__.__name__, "data": vars(error)}
        except Exception as error:  # a bug, or a strange environment: tell the client
            answer = {"id": request["id"], "error": "JupyterExecError", "data": f"{error.__class__.__name__}: {error}"}
        self._pipe.send(PipeCodec.encode([b"", dump_json(answer), data]), lane)

    def _do_kernelspecs(self, request: Json) -> Json:
        return find_kernelspecs(request["own_python3"])

    def _do_start(self, request: Json) -> Json:
        """Start a kernel in a slot; kill the kernel that had the slot, and overwrite its connection file."""
        spec = self._spec(request)
        if not os.path.isdir(self._directory):  # a cell has cleaned up /tmp
            os.mkdir(self._directory, 0o700)
        try:
            os.getcwd()
            if request["relay"]:
                self._context = self._context or new_context()
        except OSError:
            advice = "the working directory was removed: make a server in another"
            raise KernelStartFailed(spec["argv"], advice) from None
        except JupyterExecError:
            advice = f"pyzmq is not installed there; run {sys.executable} -m pip install pyzmq ipykernel"
            raise KernelStartFailed([sys.executable], advice) from None
        for old in [kernel for kernel in self._kernels.values() if kernel.slot == request["slot"]]:
            self._end(self._kernels.pop(old.name))
        path = os.path.join(self._directory, f"kernel-{request['slot']}.json")
        argv = command_of(spec, path)
        lean = not request["launch"]["ipython_defaults"]
        argv += LEAN_OPTIONS if lean and _is_ipykernel(argv) else []
        connection = self._connection(request, argv)
        write_private(path, connection.to_json())
        kernel = self._new_kernel(request["kernel"], request["slot"], argv, spec)
        if self.adopts and _is_forkable(argv, spec):
            kernel.preload, kernel.lean = request["launch"]["preload"], lean
        self._begin(kernel)
        is_ipc = connection.transport == "ipc"
        kernel.files = [path, *(f"{connection.ip}-{port}" for port in range(1, 6) if is_ipc)]
        if request["relay"]:
            kernel.sockets = KernelSockets(self._loop, functools.partial(self._relay, kernel))
            kernel.sockets.open(self._context, connection, os.urandom(16).hex().encode())
        mode = str(spec.get("interrupt_mode", "signal"))
        return {"argv": argv, "connection": connection.to_json(), "interrupt_mode": mode}

    def _spec(self, request: Json) -> Json:
        specs = find_kernelspecs(request["own_python3"])
        if not (wanted := kernel_among(request["kernel_name"].lower(), specs)):
            raise KernelSpecNotFound(request["kernel_name"], sorted(specs), kernel_dirs(), sys.executable)
        provisioner = part_of(specs[wanted], "metadata", "kernel_provisioner", "provisioner_name")
        if provisioner not in (None, "local-provisioner"):
            reason = "its kernelspec asks for a kernel provisioner, and there is none here"
            raise KernelStartFailed(specs[wanted]["argv"], reason)
        return specs[wanted]

    def _connection(self, request: Json, argv: list[str]) -> KernelConnection:
        """Choose where the kernel listens: socket files if it is known to support them, or else ports."""
        ports, ip, transport = [1, 2, 3, 4, 5], os.path.join(self._directory, request["slot"]), "ipc"
        if not _is_ipykernel(argv):
            listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]  # all at once: else two are the same
            ports, ip, transport = [listener.getsockname()[1] for listener in listeners], "127.0.0.1", "tcp"
            for listener in listeners:
                listener.close()
        names = [f"{channel}_port" for channel in ("shell", "iopub", "stdin", "control", "hb")]
        addresses: Json = {"ip": ip, "transport": transport, **dict(zip(names, ports, strict=True))}
        return KernelConnection(**addresses, key=request["key"], kernel_name=request["kernel_name"])

    def _new_kernel(self, name: str, slot: str, argv: list[str], spec: Json) -> ChildProcess:
        env = dict(os.environ, JPY_PARENT_PID=str(os.getpid())) | {_MARKER: _mark(name)}
        env.pop("PYTHONEXECUTABLE", None)  # macOS: it would give the kernel another interpreter
        extra: Json = spec["env"] if isinstance(spec.get("env"), dict) else {}
        env |= {key: string.Template(str(value)).safe_substitute(os.environ) for key, value in extra.items()}
        if not os.access(os.path.expanduser("~"), os.W_OK):  # a container's user may have none, and IPython needs it
            env["HOME"] = os.path.join(self._directory, "home")
            os.makedirs(env["HOME"], exist_ok=True)
        env.setdefault("USER", "jupyter")
        if _is_ipykernel(argv) and os.path.exists(os.path.join(os.path.dirname(argv[0]), os.pardir, "pyvenv.cfg")):
            # As in an activated environment: `!pip` and `!python` are those of the kernel.
            env["PATH"] = os.pathsep.join((os.path.dirname(argv[0]), env.get("PATH", os.defpath)))
        return ChildProcess(name, slot, argv, env)

    def _begin(self, kernel: ChildProcess) -> None:
        """Fork the kernel if possible, else launch it."""
        if kernel.preload is None or kernel.argv[0] in self._unforkable:
            self._launch(kernel)
        else:
            self._fork(kernel)

    def _launch(self, kernel: ChildProcess, stdin: Any = None, pass_fds: Sequence[int] = ()) -> None:
        """Start a kernel, or another program, as a new process."""
        import subprocess

        # No pipe for stdout: nobody would read it, and 64 KB from a subprocess would stop the kernel.
        stderr = Tail(RAW_STDERR_TAIL)
        options: Json = {"stdin": stdin or subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr.writer}
        if sys.platform == "linux":
            # If this host is killed, its kernels are too. preexec_fn is safe here: the host has one thread.
            options["preexec_fn"] = functools.partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        argv, env = kernel.argv, kernel.env
        argv = [argv[0], "-c", LAUNCHER, *argv[3:]] if argv[1:3] == ["-m", "ipykernel_launcher"] else argv
        try:
            process = subprocess.Popen(argv, env=env, start_new_session=True, pass_fds=pass_fds, **options)
        except OSError as error:
            stderr.close()
            raise KernelStartFailed(argv, describe_os_error(error)) from None
        finally:
            os.close(stderr.writer)
        with contextlib.suppress(OSError):  # if memory runs out, the kernel is killed, not the host, which reports it
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        kernel.pid, process.returncode = process.pid, 0  # `reap` collects it
        self._watch(kernel, stderr)

    def _fork(self, kernel: ChildProcess) -> None:
        """Order a kernel from the fork server of its interpreter; its pid comes with the answer."""
        server = self._kernels.get(kernel.argv[0]) or self._start_fork_server(kernel)
        stderr = Tail(RAW_STDERR_TAIL)
        order = {"kernel": kernel.name, "mark": _mark(kernel.name), "argv": kernel.argv[3:]}
        assert server.channel
        with contextlib.suppress(OSError):  # it has ended: _end_fork_server starts the kernel in another way
            socket.send_fds(server.channel, [dump_json(order)], [stderr.writer])
        os.close(stderr.writer)
        self._watch(kernel, stderr)
        self._loop.later(FORK_TIMEOUT, functools.partial(self._check_order, server, kernel))

    def _start_fork_server(self, kernel: ChildProcess) -> ChildProcess:
        import tempfile

        python, bootstrap = kernel.argv[0], BOOTSTRAP.replace("NONCE", "-").replace("MAIN", "fork_server_main")
        # A Python of another version cannot read this module's bytecode.
        tag = sys.implementation.cache_tag
        check = f"import sys; sys.implementation.cache_tag == {tag!r} or sys.exit({CANNOT_FORK})"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The program is a file without a name, so that no kernel can replace it.
        with theirs, tempfile.TemporaryFile(dir=self._directory, buffering=0) as program:
            program.write(self._program)
            program.seek(0)
            options = json.dumps([theirs.fileno(), kernel.lean, kernel.preload])
            argv = [python, "-c", f"{check}\n{bootstrap}", options]
            env = kernel.env | {_MARKER: _mark(f"fork-server-{next(self._serial)}")}
            server = ChildProcess(python, python, argv, env)
            self._launch(server, program, [theirs.fileno()])
        ours.setblocking(False)
        server.channel, server.preload = ours, kernel.preload
        self._loop.watch(ours.fileno(), functools.partial(self._read_pids, server))
        return server

    def _check_order(self, server: ChildProcess, kernel: ChildProcess) -> None:
        """Kill a fork server that has forked before but is late with this kernel; launch the kernels that it owes."""
        self._read_pids(server)
        owed = self._owed(server)
        if self._kernels.get(server.name) is not server or kernel not in owed:
            return
        if not server.forked:  # it is still at its preload, which may take long
            self._loop.later(FORK_TIMEOUT, functools.partial(self._check_order, server, kernel))
            return
        for kernel in owed:
            kernel.preload = None
        _kill_all([server.pid])

    def _owed(self, server: ChildProcess) -> list[ChildProcess]:
        """Return the kernels that a fork server was ordered to fork and has not."""
        return [kernel for kernel in self._kernels.values() if not kernel.pid and kernel.argv[0] == server.name]

    def _read_pids(self, server: ChildProcess) -> None:
        while server.channel:
            try:
                answer = server.channel.recv(4096)
            except ConnectionResetError:  # it ended with unread orders; its answers can still be read
                continue
            except BlockingIOError:
                return
            if not answer:
                self._loop.watch(server.channel.fileno(), None)
                return
            forked = json_object(answer, "answer of a fork server")
            server.forked = True
            if kernel := self._kernels.get(forked["kernel"]):
                kernel.pid = forked["pid"]
            else:  # it was given up in the meantime
                _kill_all([forked["pid"]])

    def _watch(self, kernel: ChildProcess, stderr: Tail) -> None:
        self._kernels[kernel.name], kernel.stderr = kernel, stderr
        stderr.watch(self._loop)

    def _relay(self, kernel: ChildProcess, channel: str, parts: list[bytes]) -> None:
        parts = [f"{kernel.name}/{channel}".encode("ascii"), *parts]
        waiting, size = self._pipe.waiting, sum(map(len, parts))
        is_large = size > RELAY_PIECE
        must_wait = bool(waiting) or is_large
        is_full = waiting[kernel.name] > RELAY_LIMIT / (len(waiting) or 1)  # a flood from one costs no other its output
        may_be_lost = must_wait and channel == "iopub" and (size > LARGE_PART or not _names(_NOT_DROPPED, parts))
        kernel.drops_output = kernel.drops_output and channel != "shell"
        is_too_large = size > MAX_MESSAGE - 2**20 or len(parts) > MAX_PARTS  # the client would take it for garbage
        if is_too_large or (may_be_lost and (is_full or kernel.drops_output)):
            if not kernel.loss_told:
                self._pipe.send(PipeCodec.encode(_loss(kernel.name)), kernel.name)
            kernel.loss_told = True
            return
        kernel.loss_told = kernel.loss_told and channel != "iopub"  # a later loss, as in the next cell, is told again
        data = PipeCodec.encode(parts)
        if not is_large:
            self._pipe.send(data, kernel.name, may_be_lost)
            return
        for start in range(0, len(data), RELAY_PIECE):
            piece = [f"+{kernel.name}".encode("ascii"), data[start : start + RELAY_PIECE]]
            self._pipe.send(PipeCodec.encode(piece), kernel.name, may_be_lost)

    def _drop_waiting_output(self, name: str) -> None:
        """Drop output that waits for a slow link, so that the end of the cell gets through."""
        dropped = self._pipe.drop_old(name, PipeCodec.encode(_loss(name)))
        if dropped and (kernel := self._kernels.get(name)):
            kernel.drops_output = kernel.loss_told = True  # until the cell's reply

    def _do_spawn(self, request: Json) -> None:
        """Run and watch a program that is no kernel: a gateway."""
        kernel = self._new_kernel(request["kernel"], request["kernel"], request["argv"], {})
        kernel.env |= request["env"]
        self._launch(kernel)

    def _do_interrupt(self, request: Json) -> None:
        self._drop_waiting_output(request["kernel"])
        kernel = self._kernels.get(request["kernel"])
        if kernel and kernel.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(kernel.pid, signal.SIGINT)  # the whole group: a cell's foreground subprocess is to stop too

    def _do_kill(self, request: Json) -> None:
        self._drop_waiting_output(request["kernel"])
        if kernel := self._kernels.get(request["kernel"]):
            if not kernel.pid:
                self._report_exit(kernel)
            elif request.get("dump") and _is_ipykernel(kernel.argv):
                _abort(kernel.pid)
                # In 0.2 s it has written its stack.
                self._loop.later(0.2, functools.partial(self._do_kill, request | {"dump": False}))
            else:  # Popen.kill would collect the exit, which then nobody reports
                _kill_all([kernel.pid])

    def check_parent_and_memory(self, parent: int) -> None:
        """End if the parent has ended: a forked child of it may keep the pipe open. Count the kills for memory."""
        if os.getppid() != parent:
            self.close()
        self._oom_kills.append(_cgroup_value(*_OOM_KILLS))
        self._loop.later(0.5, functools.partial(self.check_parent_and_memory, parent))

    def reap(self) -> None:
        """Collect the processes that have ended: kernels, and adopted children of them."""
        for server in self._kernels.values():  # the pid of a forked kernel must be known before its end
            self._read_pids(server)
        with contextlib.suppress(ChildProcessError):  # there are no more children
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for kernel in self._kernels.values():
                    if kernel.pid == ended[0]:
                        kernel.exit_code = os.waitstatus_to_exitcode(ended[1])
                        # What the kernel wrote last may still be on its way through ZeroMQ.
                        delay = DEATH_DRAIN if kernel.sockets else 0
                        self._loop.later(delay, functools.partial(self._report_exit, kernel))

    def _report_exit(self, kernel: ChildProcess, preload_failed: bool = False) -> None:
        if kernel.name in self._kernels:
            if kernel.sockets:
                kernel.sockets.drain()
            self._end(self._kernels.pop(kernel.name))
            if kernel.channel:
                self._end_fork_server(kernel, kernel.channel)
                return
            event: Json = {"event": "exit", "kernel": kernel.name, "exit_code": kernel.exit_code}
            event |= {"preload_failed": preload_failed, "stderr": without_machinery(str(kernel.stderr or ""))}
            event["out_of_memory"] = _cgroup_value(*_OOM_KILLS) > self._oom_kills[0]
            event["memory_limit"] = _cgroup_value("memory.max", "memory.limit_in_bytes")
            self._pipe.send(PipeCodec.encode([b"", dump_json(event)]), kernel.name)

    def _end_fork_server(self, server: ChildProcess, channel: socket.socket) -> None:
        """Start the kernels that a fork server still owes, unless its preload failed. Those that it forked live on."""
        self._read_pids(server)
        self._loop.watch(channel.fileno(), None)
        channel.close()
        if not server.forked and (server.exit_code == CANNOT_FORK or not server.preload):
            self._unforkable.add(server.name)
        preload_failed = not server.forked and server.name not in self._unforkable
        for kernel in self._owed(server):
            if kernel.stderr:
                kernel.stderr.close()
            if preload_failed:
                kernel.exit_code, kernel.stderr = server.exit_code, server.stderr
            else:
                with contextlib.suppress(KernelStartFailed):
                    self._begin(kernel)
                    continue
            self._report_exit(kernel, preload_failed)

    def _do_file(self, request: Json) -> Json:
        part = os.path.join(os.path.dirname(request["path"]), request.get("part", ""))
        answer = far_step(request, os.curdir)
        if request["step"] == "write":
            self._unfinished_files.add(part)
        elif request["step"] == "drop" or "error" not in answer:
            self._unfinished_files.discard(part)
        return answer

    def _end(self, kernel: ChildProcess) -> None:
        """Kill what is left of a kernel, and free what belongs to it."""
        if kernel.pid:  # and its session, and what left the session but has its mark
            family = {kernel.pid, *_family(kernel.pid, f"\0{_MARKER}={kernel.env[_MARKER]}\0".encode())}
            # A kernel that was forked a moment ago still has its fork server's session and mark, but lives on.
            _kill_all(family - {other.pid for other in self._kernels.values()})
            if not kernel.channel:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(kernel.pid, signal.SIGKILL)
        if kernel.stderr:
            kernel.stderr.close()
        if kernel.sockets:
            kernel.sockets.close()
        for path in kernel.files:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _loss(kernel: str) -> list[bytes]:
    return [b"", dump_json({"event": "loss", "kernel": kernel})]


def _cgroup_value(v2_name: str, v1_name: str, key: str = "") -> int:
    """Return a number of our memory control group (Linux), from the line that starts with `key`; 0 if there is none."""
    places = [("/sys/fs/cgroup", v2_name), ("/sys/fs/cgroup/memory", v1_name)]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                root, name = places[-2:][number != "0"]
                places.insert(0, (root + path, name))
    for directory, name in places:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(directory, name).read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[-1])
    return 0


def _kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _abort(pid: int) -> None:
    """End a Python, whatever it is doing: its faulthandler writes the stack to stderr. It leaves no core file."""
    import resource

    with contextlib.suppress(OSError, ValueError, AttributeError):  # not on macOS
        hard = resource.prlimit(pid, resource.RLIMIT_CORE)[1]
        # With a limit of 1, Linux neither pipes a core to a program nor writes a file of that size.
        resource.prlimit(pid, resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGABRT)


def without_machinery(stderr: str) -> str:
    """Shorten the stack that Python wrote when it died to the frames of the cell and of what it had called."""
    before, mark, dump = stderr.rpartition("Fatal Python error: ")
    for thread in reversed(dump.split("\n\n") if mark else []):  # the main thread is the last
        frames = [line for line in thread.splitlines() if line.startswith("  File ")]
        if own := [frame for frame in frames if _OWN_FRAME.search(frame)]:
            called = frames[: frames.index(own[0])]
            reason = dump.partition("\n")[0]
            return "\n".join([before[-STDERR_TAIL // 2 :] + mark + reason, *called[:5], *own[:5], *own[5:][-1:]])
    return stderr[-STDERR_TAIL:]


def _family(session: int, marker: bytes) -> Iterator[int]:
    """Yield the pids of processes in that session, or with `marker` in their environment (Linux)."""
    entries = []
    with contextlib.suppress(OSError):  # no more files can be opened, or this is no Linux
        entries = os.listdir("/proc")
    for entry in entries:
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/environ", "rb") as environ:
                if marker in b"\0%b\0" % environ.read() or int(stat_of(entry)[3]) == session:
                    yield int(entry)


@functools.cache
def _libc() -> Any:
    """Return the C library, None if Python cannot call it: it has no ctypes, or is linked statically."""
    try:
        import ctypes

        return ctypes.CDLL(None)
    except (ImportError, OSError):
        return None


def _prctl(option: int, value: int) -> bool:
    """Set an attribute of this process; return whether that was possible."""
    return bool(_libc()) and _libc().prctl(option, value, 0, 0, 0) == 0


def show_as(title: str) -> None:
    """Have `ps` and `docker top` show these words for this process, and not the program it was given (Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5): fields 48 and 49, arg_start and arg_end, are the "address above which program command-line arguments
        # (argv) are placed", and below.
        start, end = map(int, stat_of("self")[45:47])
        if _libc() and 0 < start < end:
            import ctypes

            ctypes.memmove(start, title.encode().ljust(end - start, b"\0")[: end - start], end - start)


def fork_server_main(program: bytes) -> None:
    """Import ipykernel and the preloaded modules, then fork a kernel for each order: a datagram with its stderr.

    This process has no thread, no ZeroMQ socket and no secret: every kernel would have a copy. The parent of a kernel
    is not this process but the host, which adopts the children of processes that end.
    """
    import gc

    host, (descriptor, lean, preload) = os.getppid(), json.loads(sys.argv[1])
    show_as("jupyter_exec: fork server")
    if host != int(os.environ["JPY_PARENT_PID"]):  # this Python was started through another process
        sys.exit(CANNOT_FORK)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    _prctl(_PR_SET_DUMPABLE, 0)  # so that no kernel can write into this memory, and so into the next kernel
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    places = _preload(lean, preload)
    known, forked = _changes(places), False
    if threading.active_count() > 1:
        sys.exit(f"The preload starts threads, which a fork would lose; use preload=None: {threading.enumerate()}")
    gc.collect()
    getattr(gc, "freeze", int)()
    while channel.recv(1, socket.MSG_PEEK):
        if forked and _changes(places) != known:
            sys.exit("Packages were installed, or a preloaded file edited.")  # a new fork server will see that
        data, (errors,), _, _ = socket.recv_fds(channel, 2**18, 1)
        order = json.loads(data)
        if middle := _fork_twice(channel, order["kernel"]):
            channel.close()
            _become_kernel(host, middle, errors, order)
            return
        os.close(errors)
        forked = True


def _preload(lean: bool, names: list[str]) -> list[str]:
    """Import ipykernel and these modules; return the files and directories that tell of changes to modules."""
    import importlib
    import site

    modules: dict[str, Any] = sys.modules
    places = [*site.getsitepackages(), site.getusersitepackages()]
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel does later
    if lean:
        modules["debugpy"] = None  # not imported: it takes a fifth of a kernel's start; cells still can
    for name in FORKED_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if lean:
        del modules["debugpy"]
    own = os.path.join(os.getcwd(), "")
    sys.path.append(own)
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:
            sys.exit(f"preload: {name} cannot be imported. {type(error).__name__}: {error}")
    sys.path.remove(own)
    return places + [getattr(modules.get(name), "__file__", None) or "" for name in names]


def _changes(places: list[str]) -> list[int]:
    return [os.stat(place).st_mtime_ns if os.path.exists(place) else 0 for place in places]


def _fork_twice(channel: socket.socket, name: str) -> int:
    """Fork a child that forks a kernel and reports its pid; return 0 here, in the kernel the pid of that child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads of preloaded libraries, which have to handle a fork themselves
        middle = os.fork()
    if middle:
        if os.waitpid(middle, 0)[1]:
            sys.exit("No kernel could be forked: the limit of processes or memory is reached.")
        return 0
    middle, pid = os.getpid(), -1
    try:
        pid = os.fork()
        if pid:
            channel.send(dump_json({"kernel": name, "pid": pid}))
    finally:
        if pid:
            os._exit(pid < 0)
    return middle


def _become_kernel(host: int, middle: int, errors: int, order: Json) -> None:
    """Turn this process, which was just forked, into what a launched kernel is, and run it."""
    import ctypes
    import faulthandler
    import importlib.util

    while os.getppid() == middle:  # wait until the host is the parent
        time.sleep(0.0005)
    os.setsid()
    os.dup2(errors, 2)
    os.close(errors)
    faulthandler.enable(os.dup(2))  # as in LAUNCHER
    _prctl(_PR_SET_DUMPABLE, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Write the mark where /proc shows it, so that what the kernel forks without exec has it too.
    _libc().getenv.restype = ctypes.c_void_p
    ctypes.memmove(_libc().getenv(_MARKER.encode()), order["mark"].encode(), len(order["mark"]))
    os.environ[_MARKER] = order["mark"]
    show_as(f"jupyter_exec: kernel {order['kernel']}")
    modules: dict[str, Any] = sys.modules
    for name in {"numpy.random", "torch.random"} & modules.keys():
        modules[name].seed()
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    launcher = importlib.util.find_spec("ipykernel_launcher")
    sys.argv = [str(launcher and launcher.origin), *order["argv"]]
    del modules[__name__]
    app: Any = importlib.import_module("ipykernel.kernelapp")  # raises what the preload passed over
    app.IPKernelApp.launch_instance(parent_handle=host)


def host_main(program: bytes) -> None:
    """Run a kernel host on stdin and stdout until the pipe closes, the parent ends or SIGTERM comes."""
    import shutil

    loop = Loop()
    # No kernel inherits the pipe, and no print gets into a frame.
    stream = FdStream(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    try:
        directory = sys.argv[1] if len(sys.argv) > 1 else make_directory()
    except KernelStartFailed as error:
        sys.exit(str(error))
    host = KernelHost(loop, stream, directory, program)
    signal.signal(signal.SIGINT, lambda *_: None)  # SIG_IGN would be inherited by the kernels
    if os.getpid() != 1:  # a cell must not be able to end a container's first process
        signal.signal(signal.SIGTERM, lambda *_: loop.post(host.close))
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.set_wakeup_fd(loop.alarm.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: loop.post(host.reap))
    if hasattr(signal, "pthread_sigmask"):  # kernels would inherit what signals the program blocks
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        # Adopt the daemons that kernels start, and forked kernels, to reap them.
        host.adopts = _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_DUMPABLE, 0)  # code in a kernel can neither trace this process nor open its descriptors
    host.check_parent_and_memory(os.getppid())
    show_as("jupyter_exec: kernel host")
    loop.run()
    shutil.rmtree(directory, ignore_errors=True)


# ======================================================================================================
# 11. Jupyter servers
# ======================================================================================================


@dataclass
class JupyterConnectionInfo:
    """Where a Jupyter server is: {scheme}://{host}:{port}{base_url}; the token is never part of a URL.

    `base_url` is "/user/NAME/" on a JupyterHub. `ca_file` (PEM) and `client_cert` (certificate and key file) are for
    https, whose certificates are always verified unless `verify` is False.
    """

    host: str
    use_https: bool
    port: int | None = None
    token: str | None = field(default=None, repr=False)
    base_url: str = "/"
    ca_file: str | None = None
    client_cert: tuple[str, str] | None = None
    verify: bool = True

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' * self.use_https}://{self.authority}{self.path}"

    @property
    def path(self) -> str:
        """base_url with a slash at its start and none at its end; "" for "/"."""
        return f"/{self.base_url.strip('/')}".rstrip("/")


class DeadlineReader(io.RawIOBase):
    """What http.client reads an answer from: a socket with one deadline and one limit for the whole, however slow.

    `ahead` is how many bytes may be read at once, and so beyond the end of the answer.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline, ahead: int) -> None:
        self._socket, self._deadline, self._ahead = sock, deadline, ahead
        self._left = MAX_ANSWER

    def makefile(self, mode: str) -> IO[bytes]:
        return io.BufferedReader(self, self._ahead)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._deadline.expired:
            raise TimeoutError
        if not self._left:
            raise ValueError(f"its answer is over the limit of {MAX_ANSWER} bytes")
        self._deadline.limit(self._socket)
        size = self._socket.recv_into(buffer[: self._left])
        self._left -= size
        return size


class RestClient:
    """The REST interface of a Jupyter server, and its WebSockets: JSON, each request on a connection of its own.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/rest-api.html
    """

    def __init__(self, info: JupyterConnectionInfo) -> None:
        if not re.fullmatch(r"[\w.:-]+", info.host, re.ASCII):
            raise ValueError(f"host must be a name or an address, without scheme and path, not {info.host!r}.")
        self.info = info
        if not re.fullmatch(r"[!-~]*", (info.token or "") + info.base_url):
            raise ValueError("The token or base_url has characters that HTTP forbids.")  # and neither is shown
        # "Authorization: token X" is the one form that all servers accept (a kernel gateway no other).
        # Without one, a Jupyter server wants any word twice, as a page of its own would send it.
        no_token = {"Cookie": "_xsrf=x", "X-XSRFToken": "x"}
        self._headers = {"Authorization": f"token {info.token}"} if info.token else no_token

    def shown(self, text: object) -> str:
        """Return what a server says as it may be shown: short, printable, without the token that some echo."""
        return "".join(char if char.isprintable() else " " for char in self._redacted(str(text))[:500])

    def _redacted(self, text: str) -> str:
        return text.replace(self.info.token, "***") if self.info.token else text

    def request(self, method: str, path: str, body: object = None, *, timeout: float = CONTROL_TIMEOUT) -> Any:
        """Return the JSON that the server answers. Raises: ServerError, ConnectionClosed, ExecutionTimeout."""
        deadline, payload = Deadline(timeout), b"" if body is None else dump_json(body)
        headers: Json = {"Accept": "application/json", "Connection": "close"}
        headers |= {"Content-Type": "application/json", "Content-Length": len(payload)}
        with self._dial(deadline) as sock:
            response, data = self._ask(sock, deadline, method, path, headers, payload)
        if 200 <= response.status < 300:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data) if data else None
        raise self._refusal(method, path, response, data)

    def websocket(self, path: str, deadline: Deadline) -> tuple[socket.socket, str | None]:
        """Open a WebSocket; return its socket and the subprotocol. Raises: like `request`; ProtocolError."""
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers |= {"Sec-WebSocket-Key": key, "Sec-WebSocket-Protocol": V1_SUBPROTOCOL}
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self._dial(deadline))
            response, data = self._ask(sock, deadline, "GET", path, headers)
            if response.status != 101:
                raise self._refusal("GET", path.partition("?")[0], response, data)
            subprotocol = check_opening(key, response.getheader)
            stack.pop_all()
        return sock, subprotocol

    def has_lost(self, kernel_id: str | None) -> bool:
        """Whether the server says that it does not have a kernel any more."""
        try:
            self.request("GET", f"/api/kernels/{kernel_id}")
        except JupyterExecError as error:
            return is_unknown(error, kernel_id)
        return False

    def _dial(self, deadline: Deadline) -> socket.socket:
        """Connect, with TLS if that is wanted. Raises: ConnectionClosed, ExecutionTimeout."""
        info = self.info
        try:
            tls = self._tls if info.use_https else None
            address = info.host, info.port or (443 if tls else 80)
            sock = socket.create_connection(address, deadline.within(CONTROL_TIMEOUT))
            return tls.wrap_socket(sock, server_hostname=info.host) if tls else sock
        except TimeoutError:
            raise ExecutionTimeout(f"No answer from {info.url} in time.") from None
        except (OSError, ValueError, OverflowError) as error:  # the last two: host or port is impossible
            if verdict := getattr(error, "verify_message", ""):
                says = f"The certificate of {info.url} is not trusted: {verdict}. Give ca_file."
            else:
                says = f"Cannot connect to {info.url}: {getattr(error, 'strerror', 0) or error}."
            raise ConnectionClosed(says) from None

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        import ssl

        files = [self.info.ca_file, *(self.info.client_cert or ())]
        try:
            context = ssl.create_default_context(cafile=self.info.ca_file)
            if self.info.client_cert:
                context.load_cert_chain(*self.info.client_cert)
        except OSError as error:  # which names no file
            names = ", ".join(os.fspath(file) for file in files if file)
            raise JupyterExecError(f"The certificates in {names} cannot be read: {error.strerror}.") from None
        if not self.info.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def _ask(
        self, sock: socket.socket, deadline: Deadline, method: str, path: str, headers: Json, payload: bytes = b""
    ) -> tuple[Any, bytes]:
        """Send a request; return the head of the answer, an http.client.HTTPResponse, and its body."""
        import http.client

        headers = {"Host": self.info.authority, **headers, **self._headers}
        lines = [f"{method} {self.info.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        # Byte by byte for a WebSocket: what follows the answer belongs to its frames.
        source: Any = DeadlineReader(sock, deadline, 1 if "Upgrade" in headers else 8192)
        try:
            deadline.limit(sock)
            sock.sendall("\r\n".join((*lines, "", "")).encode("ascii") + payload)
            # Closed here: the garbage collector might close its reader first.
            with contextlib.closing(http.client.HTTPResponse(source, method=method)) as response:
                response.begin()
                body = response.read(MAX_ANSWER)  # without a limit it makes room for what the answer claims to have
                if response.length:
                    raise EOFError("its answer is cut short")
        except TimeoutError:
            what = f"{method} {self.info.url}{path.partition('?')[0]}"
            raise ExecutionTimeout(f"No answer to {what} within {deadline.seconds:g} s.") from None
        except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
            # What is no Jupyter server may say anything; http.client lets some of its own ValueErrors through.
            why = f"{type(error).__name__}: {self.shown(error)}"
            raise ConnectionClosed(f"{self.info.url} broke the connection: {why}.") from None
        return response, body

    def _refusal(self, method: str, path: str, response: Any, data: bytes) -> ServerError:
        """Return the error for an answer that is not what was asked for."""
        says = f"This is no Jupyter server: it sends {self.shown(response.getheader('Content-Type', 'no type'))}."
        if response.status >= 400:
            says = self.shown(_explanation(self._redacted(data.decode("utf-8", "replace"))))
        elif response.status >= 300 and "/hub/user/" in response.getheader("Location", ""):
            # JupyterHub takes over the addresses of a server that does not run.
            says = "The server behind this JupyterHub does not run: start it there."
        elif response.status >= 300:
            says = "It redirects elsewhere, which is not followed with a token: check token, base_url, use_https."
        return ServerError(method, self.info.url + self.shown(path), response.status, says)


def _explanation(text: str) -> str:
    """Return what a server's error answer says: JSON's message or reason, or else the text of a page."""
    with contextlib.suppress(ProtocolError):
        answer = json_object(text, "answer")
        return " ".join(answer[name] for name in ("message", "reason") if isinstance(answer.get(name), str))
    return " ".join(re.sub(r"(?s)<(style|script|head)\b.*?</\1>|<[^<>]*>", " ", text[:10_000]).split())


def is_unknown(error: JupyterExecError, kernel_id: str | None) -> bool:
    """Whether a Jupyter server has answered that it does not have a kernel."""
    # All of them say it so. A 404 alone may come from a proxy that has no way to the server just now.
    return isinstance(error, ServerError) and f"Kernel does not exist: {kernel_id}" in error.body


Dial = Callable[[Deadline], "tuple[socket.socket, str | None]"]


class WebSocketChannels:
    """The channels of a kernel behind a Jupyter server; the loop's thread owns the socket.

    A lost connection is made again, as the same session: the server repeats what it has kept, and what waits here is
    sent then. Nothing is sent twice. `dial(deadline)` opens a WebSocket and returns its socket and subprotocol.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/websocket-protocols.html
    """

    def __init__(
        self, loop: Loop, dial: Dial, mailbox: Mailbox, is_gone: Callable[[], bool], deadline: Deadline
    ) -> None:
        """Connect within `deadline`; `is_gone()` asks the server whether it has lost the kernel.

        Raises: ServerError, ConnectionClosed, ExecutionTimeout.
        """
        self._loop, self._dial, self._mailbox, self._is_gone = loop, dial, mailbox, is_gone
        self._backlog: list[str | bytes] = []  # to send when there is a connection again
        self._pipe: Pipe | None = None  # None while there is no connection
        self._closed = False
        self._connect(deadline)
        loop.post(self._take_over)
        loop.post(functools.partial(loop.later, PING_INTERVAL, self._ping))

    def _connect(self, deadline: Deadline) -> None:
        sock, subprotocol = self._dial(deadline)
        sock.settimeout(0)
        self._socket, self._websocket = NetStream(sock), WebSocket(functools.partial(os.urandom, 4), MAX_MESSAGE)
        self._codec: V1Codec | JsonCodec = V1Codec() if subprotocol else JsonCodec()

    def _take_over(self) -> None:
        if self._closed:
            self._socket.close()
            return
        self._heard_at = time.monotonic()
        pipe = self._pipe = Pipe(self._loop, self._socket, self._receive, self._on_message, self._on_closed)
        backlog, self._backlog = self._backlog, []
        for data in backlog:
            self._send(data)
        pipe.read()  # TLS may have decrypted frames already, so the descriptor does not tell of them

    def _receive(self, data: bytes) -> Iterator[str | bytes]:
        self._heard_at = time.monotonic()
        try:
            yield from self._websocket.receive(data)
        finally:
            self._answer()
        if not data or self._websocket.closed:
            raise ConnectionError("the server closed the connection")

    def _on_message(self, message: str | bytes) -> None:
        self._mailbox.put(("WebSocket", [message]))

    def _answer(self) -> None:
        # A server that pings and does not read must not fill the pipe: it gets an answer when it has read.
        if self._pipe and not self._pipe.busy:
            answers = self._websocket.data_to_send()
            if not answers and not self._websocket.closed and not hasattr(socket, "TCP_QUICKACK"):
                answers = self._websocket.pong()  # it carries the acknowledgement, which would be delayed
            if answers:
                self._pipe.send(answers)

    def _ping(self) -> None:
        """Keep proxies from closing the connection, and notice when it is dead."""
        if self._closed:
            return
        if self._pipe and time.monotonic() - self._heard_at > 3 * PING_INTERVAL:
            self._pipe.close("the server is silent")
        self._answer()
        if self._pipe and not self._pipe.busy:
            self._pipe.send(self._websocket.ping())
        self._loop.later(PING_INTERVAL, self._ping)

    def _on_closed(self, reason: str) -> None:
        self._pipe = None
        if not self._closed:
            # In a thread of its own, so that other kernels of the server need not wait.
            threading.Thread(target=self._dial_again, args=(reason,), daemon=True).start()

    def _dial_again(self, reason: str) -> None:
        deadline = Deadline(RECONNECT_TIMEOUT)
        while not self._closed:
            time.sleep(0.2)  # a server that accepts and closes is not asked without pause
            try:
                self._connect(Deadline(min(CONTROL_TIMEOUT, RECONNECT_TIMEOUT)))
                self._loop.post(functools.partial(self._mailbox.put, Reconnected()))
                self._loop.post(self._take_over)
                if self._closed:  # the loop may have ended before the job
                    self._socket.close()
                return
            except (JupyterExecError, OSError) as error:
                # A proxy that has lost the way to the server refuses for a while, too.
                if deadline.expired or (isinstance(error, ServerError) and self._is_gone()):
                    cause = f"the connection to its server was lost: {reason}; {error}"
                    self._loop.post(functools.partial(self._mailbox.put, KernelDied(cause=cause)))
                    return

    def send(self, message: Message) -> None:
        data = self._codec.encode(message)
        if len(data) > MAX_WEBSOCKET_MESSAGE:
            raise ProtocolError(f"{len(data)} bytes are over the server's limit of {MAX_WEBSOCKET_MESSAGE} a message.")
        self._loop.post(functools.partial(self._send, data))

    def _send(self, data: str | bytes) -> None:
        if self._pipe:
            self._pipe.send(self._websocket.send(data))
        else:
            self._backlog.append(data)

    def decode(self, raw: RawMessage) -> Iterator[Message]:
        return self._codec.decode(raw[1][0])

    def close(self) -> None:
        self._loop.post(self._close)

    def _close(self) -> None:
        self._closed = True
        if self._pipe:
            with contextlib.suppress(OSError):
                self._socket.send(memoryview(self._websocket.close()))
            self._pipe.close("it was closed here")


class RemoteKernelControl(KernelControl):
    """A kernel on a Jupyter server, which starts it anew when it ends by itself."""

    supervised = True

    def __init__(self, server: RemoteJupyterServer, kernel_name: str, kernel_id: str | None) -> None:
        self._server, self._kernel_name, self._id = server, kernel_name, kernel_id
        self.start_timeout = server.start_timeout
        self.owned = kernel_id is None
        self._mailbox, self._pid = Mailbox(), os.getpid()
        self._channels: Channels | None = None

    def start(self, mailbox: Mailbox) -> Channels:
        if (current := self._server.current()) is not self._server:  # the kernel went with the last one
            self._server, self._id = current, None
        rest, loop = self._server.rest, self._server.loop
        self._server.controls.add(self)
        try:
            if self.owned:
                self._renew()
        except ServerError:
            # If the server is gone, a JupyterHub in its place blames the token, but tells this request the truth.
            rest.request("GET", "/api/kernelspecs")
            raise
        self._mailbox = mailbox
        dial = functools.partial(rest.websocket, f"{self._path}/channels?session_id={os.urandom(16).hex()}")
        # It must not refer to this object, and so to the server: that ends when nobody else does.
        is_gone = functools.partial(rest.has_lost, self._id)
        self._channels = WebSocketChannels(loop, dial, mailbox, is_gone, Deadline(self.start_timeout))
        return self._channels

    def _renew(self) -> None:
        """Start the kernel, or restart it if there is one."""
        request = functools.partial(self._server.rest.request, "POST", timeout=self.start_timeout)
        if self._id:
            try:
                request(f"{self._path}/restart", {})
            except ServerError:  # the kernel is gone, or the server is just restarting it by itself
                self.kill()
                if self._id:  # nor can it be deleted: another one beside it would leave it there for ever
                    raise
        if not self._id:
            model = request("/api/kernels", {"name": self._kernel_name, "env": self._server.env})
            self._id = text_of(part_of(model, "id"))

    @property
    def _path(self) -> str:
        if not re.fullmatch(r"\w[\w.-]*", self._id or "", re.ASCII):
            raise ProtocolError(f"The id of a kernel cannot be {self._server.rest.shown(self._id)!r}.")
        return f"/api/kernels/{self._id}"

    def interrupt(self, sent: Callable[[], None]) -> bool:
        # In a thread of its own: a slow server takes seconds, and the caller may be an event loop.
        threading.Thread(target=self._interrupt, args=(sent,), daemon=True).start()
        return True

    def _interrupt(self, sent: Callable[[], None]) -> None:
        try:
            self._server.rest.request("POST", f"{self._path}/interrupt", {}, timeout=INTERRUPT_GRACE / 2)
        except JupyterExecError as error:
            if is_unknown(error, self._id):
                self._mailbox.put(KernelDied(cause="it is no longer on the server"))
            else:
                logger.warning("The interrupt was not delivered: %s", error)
        sent()

    def kill(self, dump: bool = False) -> None:
        if self._id and os.getpid() == self._pid:  # not in a forked child that has left a `with` of its parent
            try:
                self._server.rest.request("DELETE", self._path, timeout=INTERRUPT_GRACE)
                self._id = None
            except JupyterExecError as error:
                if is_unknown(error, self._id):
                    self._id = None
            cause = "its server does not answer" if self._id else "it was deleted on the server"
            self._mailbox.put(KernelDied(cause=cause))

    def close(self) -> None:
        if not (self.owned and self._id):  # else the server deletes it at its end
            self._server.controls.discard(self)
        if self._channels:
            self._channels.close()


_T = TypeVar("_T")


class JupyterServer(Protocol):
    """What an executor wants of a server."""

    def start_kernel(self, kernel_name: str) -> KernelClient:
        """Ask for a kernel and return its client without waiting. Raises: KernelSpecNotFound, JupyterExecError."""

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict}. Raises: JupyterExecError."""

    def stop(self) -> None:
        """End all its kernels. May be called more than once."""

    def __enter__(self: _T) -> _T: ...
    def __exit__(self, *exc_info: object) -> None: ...


class NotCopied:
    """A copy of such an object is the object itself: frameworks copy their tools, and with them what must stay one."""

    def __copy__(self: _T) -> _T:
        return self

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:
        return self


class Stoppable(NotCopied):
    """What servers and executors have in common: used until `stop`, or until a `with` is left."""

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def __aenter__(self: _T) -> _T:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await in_thread(self.stop)


async def result_of(future: asyncio.Future[_T]) -> _T:
    """Return the result of a future. If this wait is cancelled, the future goes on, and its error is not logged."""
    import asyncio

    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    await asyncio.wait([future])
    return future.result()


async def in_thread(function: Callable[[], _T]) -> _T:
    """Call a function in a thread of its own, so that the loop is free. If this is cancelled, the function goes on.

    The end of the program does not wait for it, as it would for a thread of concurrent.futures.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_T] = loop.create_future()

    def tell(*how_it_ended: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(*how_it_ended)

    def run() -> None:
        try:
            tell(ended.set_result, function())
        except BaseException as error:
            tell(ended.set_exception, error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="jupyter_exec", daemon=True).start()
    return await result_of(ended)


class Server(Stoppable):
    """A server with an I/O thread. It ends when it is stopped, or when nobody refers to it any more."""

    _loop: Loop | None = None  # once there is something to end
    _stopped = False

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def _check_usable(self) -> None:
        if self._stopped:
            raise ConnectionClosed("The server was stopped: make a new one.")

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # This may be called at any point of any thread, with any lock held: so the I/O thread ends the server. That
        # thread does not refer to it; but the job that is posted here does, and keeps it until its end.
        if self._loop and not self._loop.is_inherited and not is_finalizing():
            self._loop.post(self.stop)

    def stop(self) -> None:
        """End what was started here, all kernels included. May be called more than once."""
        with self._lock:
            self._stopped = True
            loop, self._loop = self._loop, None
        if loop and not loop.is_inherited:  # else a forked child has left the `with` of its parent
            self._end()
            loop.stop()

    def _end(self) -> None:
        raise NotImplementedError


class RemoteJupyterServer(Server):
    """Kernels on a Jupyter server, kernel gateway or enterprise gateway that is there already.

    `env` is given to each kernel (an enterprise gateway wants KERNEL_USERNAME in it). With `kernel_id`, `start_kernel`
    attaches to that running kernel, which is then neither restarted nor deleted. `start_timeout` is how many seconds
    the start of a kernel may take.
    """

    def __init__(
        self,
        connection_info: JupyterConnectionInfo,
        *,
        env: Mapping[str, str] | None = None,
        kernel_id: str | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        super().__init__()
        check_seconds(start_timeout=start_timeout)
        self.start_timeout = start_timeout
        self.connection_info = connection_info
        self.rest = RestClient(connection_info)
        self.env = dict(env or {})
        self._kernel_id = kernel_id
        self.controls: set[RemoteKernelControl] = set()  # of the kernels that are in use, or still there

    @property
    def loop(self) -> Loop:
        with self._lock:
            self._check_usable()
            if self._loop is None:
                self._loop = Loop()
                self._loop.start("jupyter_exec I/O")
            return self._loop

    def current(self) -> RemoteJupyterServer:
        """Return the server for the next start of a kernel: another one if this has ended, and was replaced."""
        return self

    def start_kernel(self, kernel_name: str = "python3") -> KernelClient:
        """Ask for a kernel and return its client without waiting: see KernelClient.wait_ready.

        Raises: KernelSpecNotFound, ServerError, ConnectionClosed, ExecutionTimeout.
        """
        if self._kernel_id is None:
            specs = self.kernelspecs()
            if not (found := kernel_among(kernel_name, specs)):
                names = list(map(self.rest.shown, sorted(specs)))
                raise KernelSpecNotFound(kernel_name, names, [self.connection_info.url])
            kernel_name = found
        control = RemoteKernelControl(self, kernel_name, self._kernel_id)
        try:
            return KernelClient(control)
        except BaseException:
            if control.owned:
                control.kill()
            control.close()
            raise

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict}."""
        models = part_of(self.rest.request("GET", "/api/kernelspecs"), "kernelspecs")
        if not isinstance(models, dict):
            raise self._not_jupyter_error("/api/kernelspecs")
        specs = {name: part_of(model, "spec") for name, model in models.items()}
        return {name: spec for name, spec in specs.items() if isinstance(spec, dict) and name.isprintable()}

    def list_kernels(self) -> list[Json]:
        """Return the models of the server's running kernels (a gateway may forbid it: ServerError 403)."""
        models = self.rest.request("GET", "/api/kernels")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise self._not_jupyter_error("/api/kernels")
        return models

    def _not_jupyter_error(self, path: str) -> ServerError:
        return ServerError("GET", self.connection_info.url + path, 200, "This is no Jupyter server.")

    def _end(self) -> None:
        for control in list(self.controls):
            if control.owned:
                control.kill()
            control.close()


# ======================================================================================================
# 12. Hosted servers
# ======================================================================================================


class FarEnd(NetStream):
    """stdin and stdout of a process over there that was started to become a kernel host."""

    errors: Tail | None = None  # its stderr, if that is a pipe of its own: it has to be read, or the process stops

    def describe_end(self) -> str:
        """Return what is known of the end of the process, once this is closed; "" if nothing is."""
        raise NotImplementedError


class HostLink:
    """The client's end of the pipe to one kernel host: requests with answers, events, relayed messages."""

    def __init__(self, far_end: FarEnd, context: Any) -> None:
        """`context`: of ZeroMQ, for sockets of the loop, or None."""
        self.loop, self.context = Loop(), context
        self.mailboxes: dict[str, Mailbox] = {}  # of each kernel process, by its name
        self.lost: str | None = None  # why the host is gone
        self._partial: dict[str, PipeCodec] = {}  # by kernel, a large message of which pieces have come
        self._far_end = far_end
        self._closing = False
        self._serial = itertools.count(1)
        self._answers: dict[int, Callable[[Json], None]] = {}
        self._pipe = Pipe(self.loop, far_end, PipeCodec().feed, self._on_parts, self._on_closed)
        if far_end.errors:
            far_end.errors.watch(self.loop)
        self.loop.start("jupyter_exec I/O")

    def call(self, op: str, **parameters: Any) -> Any:
        """Ask the host and return its result.

        Raises: what the host reports; ConnectionClosed if it is gone, or is given up since it does not answer.
        """
        answers: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self.ask(op, answers.put, **parameters)
        try:
            answer = answers.get(timeout=CONTROL_TIMEOUT)
        except queue.Empty:
            self.close(f"the kernel host did not answer {op!r} in time")
            answer = {"error": "ConnectionClosed", "data": self.lost}
        if "error" in answer:
            raise _host_error(answer)
        return answer.get("result")

    def ask(self, op: str, then: Callable[[Json], None], data: bytes = b"", **parameters: object) -> None:
        """Send a request and bytes; `then(answer)` is called in the loop's thread, or at once if the host is gone."""
        if self.lost is not None:
            then({"error": "ConnectionClosed", "data": self.lost})
            return
        number = next(self._serial)
        frame = PipeCodec.encode([b"", dump_json({"id": number, "op": op} | parameters), data])
        self.loop.post(functools.partial(self._ask, number, then, frame, "file" * (op == "file")))

    def _ask(self, number: int, then: Callable[[Json], None], frame: bytes, lane: str) -> None:
        self._answers[number] = then
        self._pipe.send(frame, lane)
        if self.lost is not None:
            self._fail_answers()

    def relay(self, kernel: str, channel: str, parts: list[bytes]) -> None:
        frame = PipeCodec.encode([f"{kernel}/{channel}".encode("ascii"), *parts])
        self.loop.post(functools.partial(self._pipe.send, frame))

    def _on_parts(self, parts: list[bytes]) -> None:
        # Whatever stands here may come from hostile code at the other end.
        if parts[0].startswith(b"+"):
            kernel = parts[0][1:].decode("ascii", "replace")
            if kernel in self.mailboxes:
                for whole in self._partial.setdefault(kernel, PipeCodec()).feed(b"".join(parts[1:])):
                    self._on_relayed(whole)
            return
        if parts[0]:
            self._on_relayed(parts)
            return
        message = json_object(b"".join(parts[1:2]), "control message") | {"bytes": b"".join(parts[2:])}
        kernel, event = text_of(message.get("kernel")), message.get("event")
        if event in ("loss", "exit"):
            self._partial.pop(kernel, None)
        if event == "loss" and kernel in self.mailboxes:
            self.mailboxes[kernel].dropped = True
        elif event == "exit":
            if mailbox := self.mailboxes.pop(kernel, None):
                mailbox.put(_death_of(message))
        elif isinstance(message.get("id"), int) and (then := self._answers.pop(message["id"], None)):
            self.loop.post(functools.partial(then, message))  # posted: an error in it must not close the pipe

    def _on_relayed(self, parts: list[bytes]) -> None:
        kernel, _, channel = parts[0].decode("ascii", "replace").partition("/")
        if (mailbox := self.mailboxes.get(kernel)) and channel in CHANNELS:
            mailbox.put((channel, parts[1:]))

    def _on_closed(self, reason: str) -> None:
        end = "" if self._closing else self._far_end.describe_end()
        self.lost = f"{reason}; {end}" if end else reason
        if self._far_end.errors:
            self._far_end.errors.close()
        self._fail_answers()
        for mailbox in list(self.mailboxes.values()):
            gone = KernelDied(cause=f"its host is gone: {self.lost}", retryable=True)
            mailbox.put(KernelDied(cause=reason) if self._closing else gone)
        self.mailboxes.clear()

    def _fail_answers(self) -> None:
        answers, self._answers = self._answers, {}
        for then in answers.values():
            self.loop.post(functools.partial(then, {"error": "ConnectionClosed", "data": self.lost}))

    def close(self, reason: str = "the server was stopped") -> None:
        """Close the pipe, which ends the host and its kernels; end the loop and its sockets."""
        self._closing = True
        hang_up = functools.partial(self._pipe.close, reason)
        if self.loop.is_here:
            hang_up()
        else:
            self.loop.post(hang_up)
        if self.context:
            self.loop.post(functools.partial(self.context.destroy, 0))
        self.loop.stop()


def host_text(value: object) -> str:
    """Return the end of a text from a host, without lone surrogates; "" for what is no text."""
    return value[-STDERR_TAIL:].encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def host_texts(value: object) -> list[str]:
    return list(map(host_text, value[:1000])) if isinstance(value, list) else []


def _death_of(event: Json) -> KernelDied:
    code = event.get("exit_code")
    code = code if type(code) is int and -64 <= code < 2**32 else None
    limit, cause = event.get("memory_limit"), ""
    if event.get("out_of_memory") and code == -9:
        cause = "out of memory"
        if isinstance(limit, int) and 0 < limit < 2**50:  # cgroup v1 says "unlimited" by a huge number
            cause += f" (limit {limit // 2**20} MB, in which what is written to memory counts)"
    elif event.get("preload_failed"):
        cause = f"the fork server ended at its preload ({describe_exit(code)})"
    return KernelDied(cause, code, host_text(event.get("stderr")))


def _host_error(answer: Json) -> JupyterExecError:
    """Rebuild an error of the host from {"error": class name, "data": attributes or sentence}."""
    data = answer.get("data")
    for kind in (KernelSpecNotFound, KernelStartFailed):
        if kind.__name__ == answer["error"] and isinstance(data, dict):
            error = kind()
            for key, default in vars(error).items():
                if default is not None:
                    setattr(error, key, (host_texts if isinstance(default, list) else host_text)(data.get(key)))
            return error
    if answer["error"] == "ConnectionClosed":
        return ConnectionClosed(f"The kernel host is gone: {host_text(data)}.")
    return JupyterExecError(f"The kernel host reports: {host_text(data)}")


def own_program(magic: str) -> bytes:
    """Return this module for a host whose bytecode has that magic number, wherever it was imported from.

    Raises: JupyterExecError if there is only bytecode here, which that host cannot read.
    """
    import importlib.machinery
    import importlib.util
    import marshal

    loader: Any = globals().get("__loader__")
    name = getattr(globals().get("__spec__"), "name", __name__)

    def code() -> bytes:
        return marshal.dumps(loader.get_code(name)) if magic == importlib.util.MAGIC_NUMBER.hex() else b""

    ways: list[tuple[bytes, Callable[[], bytes]]] = [
        (b"s", lambda: loader.get_source(name).encode("utf-8")),  # a zip has it too
        (b"s", lambda: Path(re.sub(r"\.pyc\Z", ".py", __file__)).read_bytes()),
        (b"c", code),  # a program without sources: only .pyc, or frozen
    ]
    cached = globals().get("__cached__") or ""
    if type(loader) is importlib.machinery.SourceFileLoader and os.path.exists(cached):
        # Bytecode first, if it is cached: to compile the source would stop all threads for half a second. But only that
        # of the usual loader: one that rewrites code may make it import what the host does not have.
        ways.insert(0, (b"c", code))
    for kind, way in ways:
        with contextlib.suppress(ImportError, OSError, AttributeError, NameError):
            if program := way():
                return b"%s%08d%s" % (kind, len(program), program)
    raise JupyterExecError(
        f"the source of {name} is not here, and its bytecode is none for that Python. Use one of version "
        f"{sys.version_info[0]}.{sys.version_info[1]}, or ship {name.rpartition('.')[2]}.py too (PyInstaller: "
        "--add-data, or module_collection_mode 'py')"
    )


def _in_time(far_end: FarEnd, call: Callable[[], _T], deadline: Deadline) -> _T:
    """Repeat `call()`, which waits for a moment, until it works; read the stderr too, or the command may get stuck."""
    while not deadline.expired:
        if far_end.errors:
            far_end.errors.read()
        with contextlib.suppress(TimeoutError, BlockingIOError):
            return call()
    raise TimeoutError


def greet_host(far_end: FarEnd, nonce: str, deadline: Deadline) -> tuple[int, int]:
    """Wait for the host's greeting, among whatever else is printed there, and send this module.

    Returns (pid, user id) of the host, as they are over there.

    Raises: ConnectionClosed, ExecutionTimeout, JupyterExecError if its Python is too old.
    """
    seen = b""
    pattern = rb"%s (\d{1,4}) (\d{1,4}) ([0-9a-f]{1,64}) (\d{1,10}) (\d{1,10})\n" % nonce.encode("ascii")
    far_end.settimeout(0.02)
    try:
        while not (found := re.search(pattern, seen)):
            data = _in_time(far_end, lambda: far_end.recv(4096), deadline)
            if not data or len(seen) > 2**20:
                raise ConnectionClosed(f"no Python answered{_quote(seen)}")
            seen += data
        version = int(found[1]), int(found[2])
        if version < (3, 10):
            raise JupyterExecError("its Python {}.{} is too old, 3.10 or newer is needed".format(*version))
        unsent = memoryview(own_program(found[3].decode()))
        while unsent:
            unsent = unsent[_in_time(far_end, functools.partial(far_end.send, unsent), deadline) :]
        far_end.settimeout(0)
    except TimeoutError:
        raise ExecutionTimeout(f"no answer within {deadline.seconds:g} s{_quote(seen)}") from None
    except OSError as error:
        raise error if isinstance(error, ConnectionClosed) else ConnectionClosed("it ended at once") from None
    return int(found[4]), int(found[5])


def _quote(seen: bytes) -> str:
    return f"; it printed: {seen[-500:].decode('utf-8', 'replace').strip()}" if seen.strip() else ""


class HostedKernelControl(KernelControl):
    """A kernel that a server's host runs."""

    owned = True

    def __init__(self, server: HostServer, kernel_name: str) -> None:
        self._server = server
        self.start_timeout = server.launch["start_timeout"]
        self._kernel_name = kernel_name
        self._slot = f"k{next(server.serial)}"
        self._key = os.urandom(32).hex()
        self._starts = itertools.count(1)

    def start(self, mailbox: Mailbox) -> Channels:
        link = self._link = self._server.link()
        self._name = f"{self._slot}.{next(self._starts)}"  # of the process
        link.mailboxes[self._name] = mailbox
        try:
            order: Json = {"kernel": self._name, "slot": self._slot, "key": self._key, "relay": self._server.relays}
            order |= {"kernel_name": self._kernel_name, "own_python3": self._server.own_python3}
            order["launch"] = self._server.launch
            return self._reach(link, mailbox, link.call("start", **order))
        except JupyterExecError as error:
            link.mailboxes.pop(self._name, None)
            if isinstance(error, ProtocolError):
                link.close("it breaks the protocol")  # which also ends the kernel: nobody can reach it
            raise

    def _reach(self, link: HostLink, mailbox: Mailbox, result: Any) -> Channels:
        if not isinstance(result, dict):
            raise ProtocolError("The kernel host gives a strange answer.")
        self.argv = host_texts(result.get("argv"))
        self._by_message = result.get("interrupt_mode") == "message"
        if self._server.relays:
            return SignedChannels(functools.partial(link.relay, self._name), self._key)
        self.connection_file = os.path.join(self._server.directory, f"kernel-{self._slot}.json")
        connection = KernelConnection.from_json(host_text(result.get("connection")))
        places = [("tcp", "127.0.0.1"), ("ipc", os.path.join(self._server.directory, self._slot))]
        if (connection.transport, connection.ip) not in places or connection.key != self._key:
            raise ProtocolError("The kernel host names a connection that is not the kernel's.")
        return ZmqChannels(link.loop, link.context, connection, mailbox)

    def interrupt(self, sent: Callable[[], None]) -> bool:
        if not self._by_message:
            self._link.ask("interrupt", lambda answer: sent(), kernel=self._name)
        return not self._by_message

    def kill(self, dump: bool = False) -> None:
        self._kill_unanswered = True
        self._link.ask("kill", lambda answer: setattr(self, "_kill_unanswered", False), kernel=self._name, dump=dump)

    def abandon(self) -> None:
        # If the host has answered, the news of the kernel's end is on its way, perhaps behind output on a slow link.
        if self._kill_unanswered:
            self._link.close("the kernel host did not answer 'kill' in time")

    def files(self) -> AskFar:
        ask = ((self._server.files_end_with_host and self._link) or self._server.link()).ask
        return lambda order, data, then: ask("file", then, data, **order)


class LaunchOptions(TypedDict, total=False):
    """How kernels are launched: keywords of LocalJupyterServer, CommandJupyterServer and DockerJupyterServer alike.

    On Linux an ipykernel is forked, in a fifth of the time, from a process that has imported ipykernel and the modules
    that `preload` names; preload=None launches each kernel as a process of its own. `ipython_defaults` gives kernels
    back what they are started without: the history database, the debugger and a pause after each cell.
    `start_timeout` is how many seconds the start of a kernel host may take, and then that of each kernel.
    """

    preload: Sequence[str] | None
    ipython_defaults: bool
    start_timeout: float


LAUNCH_DEFAULTS: Json = {"preload": (), "ipython_defaults": False, "start_timeout": START_TIMEOUT}


class HostServer(Server):
    """What servers whose kernels are run by a kernel host have in common. Starts on first use.

    A subclass defines `_open` and `_start_error`, and `_disconnect` and `_check_host` if there is something to do.
    `_disconnect(failed=True)` is called even if `_open` itself has failed.
    """

    class GenerateToken:
        """Stands for a token that is made up; AutoGen's default."""

    relays = True  # messages through the pipe, not straight over ZeroMQ
    files_end_with_host = False  # True: the files go with their host, so no new host is started to look for them
    own_python3 = False  # "python3" means the host's interpreter, whatever kernelspecs say
    directory = ""  # of the connection files, if they are on this machine
    _link: HostLink | None = None
    _gateway: GatewayClient | None = None

    def __init__(self, transport: str, launch: Mapping[str, Any]) -> None:
        if transport not in ("direct", "gateway"):
            raise ValueError(f'transport must be "direct" or "gateway", not {transport!r}.')
        for name in launch.keys() - LAUNCH_DEFAULTS.keys():
            raise TypeError(f"{type(self).__name__} has no keyword {name!r}.")
        super().__init__()
        self.launch = LAUNCH_DEFAULTS | dict(launch)
        self.serial = itertools.count(1)
        self.transport = transport
        check_seconds(start_timeout=self.launch["start_timeout"])
        preload = self.launch["preload"]
        listed = isinstance(preload, Sequence) and not isinstance(preload, str)
        if preload is not None and not (listed and all(isinstance(name, str) for name in preload)):
            raise ValueError(f"preload must be a list of module names, or None, not {preload!r}.")

    def _open(self, program: str) -> FarEnd:
        """Start a Python somewhere that runs `program`. Raises: KernelStartFailed, SandboxError."""
        raise NotImplementedError

    def _start_error(self, reason: str) -> JupyterExecError:
        """Return the error that says why there is no kernel host."""
        raise NotImplementedError

    def _connect(self) -> HostLink:
        """Start a kernel host and greet it within `start_timeout`. Raises: KernelStartFailed, SandboxError."""
        nonce, began = os.urandom(16).hex(), time.monotonic()
        with contextlib.ExitStack() as undo:
            undo.callback(self._disconnect, failed=True)
            far_end = self._open(BOOTSTRAP.replace("NONCE", nonce).replace("MAIN", "host_main"))
            undo.callback(far_end.close)
            if far_end.errors:
                undo.callback(far_end.errors.close)
            try:
                who = greet_host(far_end, nonce, Deadline(self.launch["start_timeout"]))
            except JupyterExecError as error:
                far_end.close()
                end = far_end.describe_end() if isinstance(error, ConnectionClosed) else ""
                raise self._start_error(f"{error}: {end}" if end else str(error)) from None
            self._check_host(*who)
            link = HostLink(far_end, None if self.relays else new_context())
            undo.pop_all()
        logger.info("Kernel host started: process %d, user %d, in %.2f s", *who, time.monotonic() - began)
        return link

    def _check_host(self, pid: int, uid: int) -> None:
        """Say what is wrong with a host's process and user, as they are over there. Raises: SandboxError."""
        return

    def link(self) -> HostLink:
        """Return the link to the host, which is started if there is none or the last one is gone."""
        with self._lock:
            self._check_usable()
            if self._link is None or self._link.lost is not None:
                if self._link:
                    self._link.close()
                    self._disconnect()
                self._link = self._connect()
                self._loop = self._link.loop
            return self._link

    def start_kernel(self, kernel_name: str = "python3") -> KernelClient:
        """Ask for a kernel and return its client without waiting: see KernelClient.wait_ready.

        Raises: KernelSpecNotFound, KernelStartFailed, ConnectionClosed.
        """
        if self.transport == "gateway":
            return self.get_client().start_kernel(kernel_name)
        return KernelClient(HostedKernelControl(self, kernel_name))

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict, with "resource_dir"}."""
        if self.transport == "gateway":
            return self.get_client().kernelspecs()
        result = self.link().call("kernelspecs", own_python3=self.own_python3)
        specs = result if isinstance(result, dict) else {}
        return {host_text(name): spec for name, spec in specs.items() if isinstance(spec, dict)}

    def get_client(self) -> RemoteJupyterServer:
        """Return the client of the kernel gateway, which is started on first use.

        Raises: AttributeError unless the transport is "gateway"; KernelStartFailed, SandboxError.
        """
        if self.transport != "gateway":
            raise AttributeError('There is no server to connect to by the direct way: ask for transport="gateway".')
        with self._lock:
            self._check_usable()
            if self._gateway and self._gateway_has_ended():
                self._gateway.stop()
                self._gateway = None
            if self._gateway is None:
                self._gateway = GatewayClient(self, self._start_gateway())
                self._loop = self._gateway.loop
            return self._gateway

    def _gateway_has_ended(self) -> bool:
        return self._link is not None and "gateway" not in self._link.mailboxes

    def _start_gateway(self) -> JupyterConnectionInfo:
        raise JupyterExecError(f'{type(self).__name__} has no gateway: use transport="direct".')

    @property
    def connection_info(self) -> JupyterConnectionInfo:
        """Where the gateway is, for any client of Jupyter servers; AttributeError on a direct server."""
        return self.get_client().connection_info

    @property
    def ip(self) -> str:
        return self.connection_info.host

    @property
    def port(self) -> int:
        return self.connection_info.port or 0

    @property
    def token(self) -> str:
        return self.connection_info.token or ""

    def _end(self) -> None:
        if self._gateway:
            self._gateway.stop()
        if self._link:
            self._link.close()
        self._link = self._gateway = None
        self._disconnect()
        logger.info("Server stopped")

    def _disconnect(self, failed: bool = False) -> None:
        """Wait for the end of what `_open` started."""


class GatewayClient(RemoteJupyterServer):
    """The client of a gateway that its owner starts, anew if it has ended."""

    def __init__(self, owner: HostServer, info: JupyterConnectionInfo) -> None:
        super().__init__(info, start_timeout=owner.launch["start_timeout"])
        self._owner = weakref.ref(owner)  # which ends when nobody else refers to it

    def current(self) -> RemoteJupyterServer:
        owner = self._owner()
        return owner.get_client() if owner else self


def chosen_token(token: str | HostServer.GenerateToken | None) -> str:
    """Return the token, or a new one. Raises: ValueError for the empty one, which lets everybody in."""
    if isinstance(token, str) and not token.strip():
        raise ValueError("An empty token would open the gateway to everybody: leave it out, one is made up.")
    return token if isinstance(token, str) else os.urandom(32).hex()


NOT_ON_WINDOWS = (
    "use WSL, DockerJupyterServer with an engine that is reached over TCP (DOCKER_HOST=tcp://...), or a remote Jupyter "
    "server by JupyterConnectionInfo"
)


class ProcessStream(FarEnd):
    """stdin and stdout of a process that it starts, in a session of its own, so that no Ctrl-C reaches it."""

    def __init__(self, argv: list[str], **options: Any) -> None:
        """Raises: OSError."""
        import subprocess

        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.errors: Tail = Tail()
        options |= {"stdin": theirs, "stdout": theirs, "stderr": self.errors.writer}
        try:
            self.process = subprocess.Popen(argv, start_new_session=True, **options)
        except BaseException:
            ours.close()
            self.errors.close()
            raise
        finally:
            theirs.close()
            os.close(self.errors.writer)

    def describe_end(self) -> str:
        import subprocess

        with contextlib.suppress(subprocess.TimeoutExpired):
            end = describe_exit(self.process.wait(0.2))
            self.errors.drain()
            return f"{end}; its stderr: {self.errors}" if str(self.errors) else end
        return ""


class CommandJupyterServer(HostServer):
    """Kernels at the other end of any command that gives a Python on stdin and stdout.

    `argv` is that command up to the interpreter: ["ssh", "box", "python3"], ["kubectl", "exec", "-i", "pod", "--",
    "python3"], ["podman", "exec", "-i", "name", "python3"]. Its Python needs ipykernel. `remote_shell` says whether
    the interpreter's arguments pass through a shell over there; None means that they do if the command is ssh. `env`
    and `cwd` are those of the command itself, `launch` the keywords of LaunchOptions.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        remote_shell: bool | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: AnyPath | None = None,
        transport: str = "direct",
        **launch: Unpack[LaunchOptions],
    ) -> None:
        if os.name == "nt":  # pipes of Windows cannot be waited for together with sockets
            raise JupyterExecError(f"{type(self).__name__} does not work on Windows: {NOT_ON_WINDOWS}.")
        super().__init__(transport, launch)
        if isinstance(argv, str) or not argv:
            raise ValueError("argv must be a list of strings: the command and its arguments.")
        if cwd is not None and not os.path.isdir(cwd):
            raise ValueError(f"Working directory {cwd} does not exist.")
        self._argv = list(argv)
        self._quoted = Path(argv[0]).stem == "ssh" if remote_shell is None else remote_shell
        self._cwd = cwd
        # srun would hold back what has no newline, such as our frames. MPLBACKEND is for this process: in a kernel it
        # would make inline pictures vanish.
        merged = {"SLURM_UNBUFFEREDIO": "1", **os.environ, "MPLBACKEND": None, **(env or {})}
        self._env = {name: value for name, value in merged.items() if value is not None}
        if not all(isinstance(text, str) for pair in self._env.items() for text in pair):
            raise TypeError("env must have strings as names, and as values strings or None.")
        self._process: subprocess.Popen[Any] | None = None  # the command

    def _open(self, program: str) -> FarEnd:
        import shlex

        argv = [*self._argv, "-c", shlex.quote(program) if self._quoted else program]
        argv += [self.directory] if self.directory else []
        try:
            far_end = ProcessStream(argv, env=self._env, cwd=self._cwd)
        except OSError as error:
            raise self._start_error(describe_os_error(error)) from None
        self._process = far_end.process
        if not self.relays:
            with contextlib.suppress(ImportError):  # needed soon; meanwhile the other Python starts
                import zmq  # noqa: F401
        return far_end

    def _start_error(self, reason: str) -> JupyterExecError:
        return KernelStartFailed(self._argv, reason)

    def _disconnect(self, failed: bool = False) -> None:
        import subprocess

        if process := self._process:
            # Asked to end, and not killed, srun takes back a job that waits in the queue.
            for end in (process.terminate, process.kill):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SHUTDOWN_GRACE)
                    break
                end()
            process.wait()
            self._process = None


class LocalJupyterServer(CommandJupyterServer):
    """Kernels on this machine, in `python` (default: this interpreter), with `cwd` and `env` of their own.

    `env` is merged over the environment of this process; None as a value removes a name. With `python`, the
    kernel name "python3" means that interpreter. `transport="gateway"`, which giving `ip`, `port` or `token` implies,
    starts a Jupyter Kernel Gateway that other clients can use too (see `connection_info`), with a log in `log_file`.
    `launch` are the keywords of LaunchOptions.
    """

    relays = False

    def __init__(
        self,
        ip: str | None = None,
        port: int | None = None,
        token: str | HostServer.GenerateToken | None = None,
        log_file: AnyPath | None = None,
        log_level: str = "INFO",
        log_max_bytes: int = 2**20,
        log_backup_count: int = 3,
        *,
        python: AnyPath | None = None,
        cwd: AnyPath | None = None,
        env: Mapping[str, str | None] | None = None,
        transport: str | None = None,
        **launch: Unpack[LaunchOptions],
    ) -> None:
        implied = "direct" if ip is None and port is None and token is None else "gateway"
        if port is not None and port not in range(2**16):
            raise ValueError(f"port must be a number below {2**16}, not {port!r}.")
        compiled = globals().get("__compiled__")  # by Nuitka
        frozen = getattr(sys, "frozen", False) or getattr(compiled, "standalone", compiled)
        if not python and (frozen or not sys.executable):
            reason = "This program is frozen, it is no Python"
            raise ValueError(f"{reason}: give python=, the path of one that has ipykernel.")
        argv = [os.fspath(python or sys.executable)]
        super().__init__(argv, env=env, cwd=cwd, transport=transport or implied, **launch)
        self.own_python3 = python is not None
        self._address = ip or "127.0.0.1", port or 0
        self._token = chosen_token(token)
        self._gateway_options = [f"--KernelGatewayApp.ip={self._address[0]}", f"--KernelGatewayApp.port={port or 0}"]
        self._gateway_options += ["--KernelGatewayApp.port_retries=0", *GATEWAY_OPTIONS]
        if log_file is not None:
            handler = {"class": "logging.handlers.RotatingFileHandler", "level": log_level, "maxBytes": log_max_bytes}
            handler |= {"backupCount": log_backup_count, "filename": os.path.abspath(log_file)}
            log = {"handlers": {"file": handler}, "loggers": {"KernelGatewayApp": {"handlers": ["file"]}}}
            self._gateway_options.append(f"--JupyterApp.logging_config={json.dumps(log)}")

    def _start_gateway(self) -> JupyterConnectionInfo:
        ip, port = self._address
        argv = [*self._argv, "-c", GATEWAY_PROGRAM, *self._gateway_options]
        link, mailbox = self.link(), Mailbox()
        link.mailboxes["gateway"] = mailbox
        port_file = Path(self.directory, os.urandom(8).hex())
        env = {"KG_AUTH_TOKEN": self._token, "JUPYTER_EXEC_PORT_FILE": str(port_file)}
        link.call("spawn", kernel="gateway", argv=argv, env=env)
        deadline = Deadline(self.launch["start_timeout"])
        while not (port_file.exists() and port_file.read_text().endswith("\n")):
            if isinstance(end := mailbox.get(0.05), KernelDied):
                advice = f"; is port {port} of {ip} in use?" if port else ""
                if "No module" in end.stderr:
                    advice = f"; run {self._argv[0]} -m pip install jupyter_kernel_gateway"
                raise KernelStartFailed(argv[:1], f"the gateway has ended ({end.sentence()}){advice}", None, end.stderr)
            if deadline.expired:
                raise KernelStartFailed(argv[:1], f"the gateway does not listen within {deadline.seconds:g} s")
        return JupyterConnectionInfo(ip, False, int(port_file.read_text()), self._token)  # it listens, and answers soon

    def _open(self, program: str) -> FarEnd:
        self.directory = make_directory()
        return super()._open(program)

    def _disconnect(self, failed: bool = False) -> None:
        import shutil

        if self._process:  # a host that was killed could not end what its kernels had started
            _kill_all(_family(-1, f"\0{_MARKER}={self._process.pid}/".encode()))
        super()._disconnect()
        if self.directory:
            with contextlib.suppress(OSError):  # an empty one goes even where no more files can be opened
                os.rmdir(self.directory)
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = ""


# ======================================================================================================
# 13. Docker
# ======================================================================================================


class DockerStream(FarEnd):
    """The attached streams of a container, and its end: its stdout is the pipe, its stderr the log.

    Spec: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """

    _HEAD = struct.Struct(">BxxxI")

    def __init__(self, attached: Any) -> None:
        super().__init__(getattr(attached, "_sock", attached))
        self._attached = attached  # the SDK's wrapper: it closes the socket when it is collected
        self._buffer = bytearray()
        self._stderr = bytearray()
        self.ended: Any = None  # the engine's answer to "wait", which comes when the container has ended
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def recv(self, size: int, /) -> bytes:
        data, stdout = super().recv(size), bytearray()
        self._buffer += data
        while len(self._buffer) >= self._HEAD.size:
            # "STREAM_TYPE can be: 0: stdin (is written on stdout), 1: stdout, 2: stderr"
            kind, length = self._HEAD.unpack_from(self._buffer)
            if kind > 2:
                raise ProtocolError("The attached container sends something that is no stream frame.")
            end = self._HEAD.size + length
            if len(self._buffer) < end:
                break
            payload = self._buffer[self._HEAD.size : end]
            del self._buffer[:end]
            if kind == 2:
                self._stderr = (self._stderr + payload)[-STDERR_TAIL:]
            else:
                stdout += payload
        if data and not stdout:
            raise BlockingIOError
        return bytes(stdout)

    @property
    def log(self) -> str:
        """The end of the stderr."""
        return self._stderr.decode("utf-8", "replace").strip()

    def exit_code(self) -> int | None:
        """Wait, a while, for the end of the container, and for its removal if that is due."""
        with self._lock:  # the I/O thread asks when the pipe closes, stop() at the same time
            if self.ended is not None:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError), self.ended as answer:
                    self._exit_code = int(answer.json()["StatusCode"])
                self.ended = None
            return self._exit_code

    def describe_end(self) -> str:
        code = self.exit_code()
        cause = " (killed, perhaps because memory ran out)" if code == 137 else f" (exit code {code})"
        # Podman always says 0; and no host ends with that.
        end = "" if code is None else f"the container has ended{cause if code else ''}"
        return f"{end}; its log: {self.log}" if self.log else end

    def forget_end(self) -> None:
        """Wait no more."""
        with self._lock:
            if self.ended is not None:
                self.ended.close()
            self.ended = None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)  # the response of the SDK holds the descriptor, too
        if response := getattr(self._attached, "_response", None):
            response.close()  # or its finalizer complains of the closed file
        self._attached.close()
        super().close()


class DockerJupyterServer(HostServer):
    """Kernels in one container, reached through its attached stdin and stdout: no port, no mount, no token.

    The container runs as a normal user without capabilities, with `network` "bridge" or "none". The bundled image
    is built on first use from DEFAULT_DOCKERFILE, on `base_image`, with `packages` (requirements of pip) in it;
    `custom_image_name` is any image with a python3 that has ipykernel. `bind_dir`, a directory on the engine's
    host, is mounted at `work_dir`; code runs as its owner, but not as root, unless `user` says so. `docker_kwargs` are
    those of docker-py's containers.create: mappings and lists are merged with ours, anything else replaces ours; the
    logger warns of those that open the sandbox. `hardened` stands for network="none", read_only=True, 1 GB of memory
    and one processor, as far as nothing else is said. The keywords of LaunchOptions may be given too.

    The container is called `container_name`, or else jupyter-exec-XXXX; `container_id` is its id. Its label
    "jupyter_exec" is the version of this module, "jupyter_exec.owner" says which process it belongs to.

    Raises: ValueError for keywords that do not go together, TypeError for unknown ones. A kernel's start raises
    SandboxError.
    """

    files_end_with_host = True
    DEFAULT_DOCKERFILE: ClassVar[str] = """\
# The image of jupyter_exec.DockerJupyterServer. Target "kernel": Python with ipykernel, enough for the direct way.
ARG BASE_IMAGE=python:3.13-slim
FROM ${BASE_IMAGE} AS kernel
# Requirements of pip, one a line.
ARG PACKAGES=""
ENV VIRTUAL_ENV=/opt/venv \\
    PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    HOME=/home/jupyter \\
    PIP_NO_CACHE_DIR=1 \\
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Any user may install into the environment and write at home: with bind_dir the user is the directory's owner.
RUN python3 -m venv /opt/venv \\
 && printf '%s\\n' "${PACKAGES}" | pip install ipykernel -r /dev/stdin \\
 && mkdir -p /home/jupyter /workspace \\
 && (getent passwd 1000 || useradd --uid 1000 --home-dir /home/jupyter jupyter) \\
 && chown 1000 /workspace \\
 && chmod -R a+rwX /opt/venv /home/jupyter /workspace
USER 1000:1000
WORKDIR /workspace

# Target "gateway": a Jupyter Kernel Gateway on port 8888 that wants the token in TOKEN.
FROM kernel AS gateway
RUN pip install jupyter_kernel_gateway
ENV TOKEN=UNSET
EXPOSE 8888
CMD ["sh", "-c", "KG_AUTH_TOKEN=$TOKEN exec jupyter-kernelgateway --KernelGatewayApp.ip=0.0.0.0 \\
 --KernelGatewayApp.port=8888 --JupyterApp.answer_yes=true --JupyterWebsocketPersonality.list_kernels=true \\
 --ZMQChannelsWebsocketConnection.limit_rate=False"]
"""

    _client: Any = None  # of the engine, while there is a container
    _container: Any = None
    _last_id = ""  # of the container before this one
    _stream: DockerStream | None = None

    def __init__(
        self,
        *,
        custom_image_name: str | None = None,
        container_name: str | None = None,
        auto_remove: bool = True,
        stop_container: bool = True,
        docker_env: Mapping[str, str] | None = None,
        token: str | HostServer.GenerateToken | None = None,
        base_image: str | None = None,
        packages: Sequence[str] = (),
        network: str | None = None,
        bind_dir: AnyPath | None = None,
        work_dir: str = "/workspace",
        transport: str | None = None,
        hardened: bool = False,
        **docker_kwargs: Any,
    ) -> None:
        launch = {name: docker_kwargs.pop(name) for name in LAUNCH_DEFAULTS.keys() & docker_kwargs.keys()}
        implied = "direct" if token is None and stop_container else "gateway"
        super().__init__(transport or implied, launch)
        _check_keywords(docker_kwargs)
        limits = {"read_only": True, "mem_limit": "1g", "nano_cpus": 10**9} if hardened else {}
        if docker_kwargs.keys() & {"cpu_period", "cpu_quota"}:  # say the same in another way, and not both are allowed
            limits.pop("nano_cpus", None)
        given = limits | {name: value for name, value in docker_kwargs.items() if value is not None}
        if given.get("mem_limit") == "":  # docker-py takes it for 0
            raise ValueError("mem_limit is empty: say how much memory the container may have, such as 512m.")
        self._docker_kwargs = {name: _listed(name, value) for name, value in given.items()}
        _targets(self._docker_kwargs)  # raises for what is no mount
        self.network = self._network(network, hardened)
        if custom_image_name and (packages or base_image):
            raise ValueError("packages and base_image are for the bundled image, not for custom_image_name.")
        self._target = "gateway" if self.transport == "gateway" else "kernel"  # of the Dockerfile
        self._token = chosen_token(token)
        self._custom_image, self._base_image, self._packages = custom_image_name, base_image, _requirements(packages)
        self._container_name, self._stop_container, self._auto_remove = container_name, stop_container, auto_remove
        self._env = dict(docker_env or {})
        if bind_dir is not None and not os.fspath(bind_dir):
            raise ValueError("bind_dir is empty: name a directory, such as os.getcwd().")
        self._bind_dir = None if bind_dir is None else os.path.abspath(bind_dir)
        self._work_dir = work_dir
        for opening in _openings(self._docker_kwargs | {"network_mode": self.network}, self._bind_dir):
            logger.warning("The sandbox of Docker is opened: %s", opening)

    def _network(self, network: str | None, hardened: bool) -> str:
        """Return the name of the network. Raises: ValueError for options that do not go together."""
        if network is not None and "network_mode" in self._docker_kwargs:
            raise ValueError("Give network or network_mode, not both.")
        network = network or self._docker_kwargs.get("network_mode") or ("none" if hardened else "bridge")
        if network not in self._docker_kwargs.get("networking_config", [network]):
            raise ValueError(f"networking_config has nothing for the network {network!r}: name one by network=.")
        if self.transport == "gateway" and network == "none":
            raise ValueError('A gateway cannot be reached without a network: use transport="direct".')
        return network

    @property
    def container_id(self) -> str | None:
        """The id of the container, for `docker` commands; None while there is none."""
        return self._container.id if self._container else None

    def _open(self, program: str) -> FarEnd:
        client = self._new_client()
        with _engine_errors(self._image_name):
            self._container = self._create(client, ["python3", "-c", program])
            stream = self._attach(client)
            self._container.start()
        logger.info("Container %s started: %s", self._container.name, self._container.id)
        return stream

    def _start_error(self, reason: str) -> JupyterExecError:
        log = self._stream.log if self._stream and self._stream.log not in reason else ""
        return SandboxError(f"No kernel host answered: {reason}", self._image_name, self._container.name, log)

    def _check_host(self, pid: int, uid: int) -> None:
        user = self._container.attrs["Config"]["User"]
        if uid == 0 and "user" not in self._docker_kwargs and not _is_root(user):
            raise SandboxError(f"User {user} of the image is root: give user=, such as {NORMAL_USER}", self._image_name)
        if pid != 1:
            what = "its entrypoint does not `exec` its command, or init or pid_mode was given"
            risk = "Code can stop the host, write into its pipe, and live on after this program"
            logger.warning(
                "The kernel host is not the first process of container %s: %s. %s.", self._container.name, what, risk
            )

    def _start_gateway(self) -> JupyterConnectionInfo:
        """Run the image's own command, with the port published on the loopback address of the engine only."""
        self._disconnect()  # the last one, if it has ended
        client = self._new_client()
        try:
            with _engine_errors(self._image_name):
                self._container = self._create(client, None)
                if self._stop_container:
                    weakref.finalize(self, _remove_quietly, self._container, os.getpid())  # at the program's end, too
                self._container.start()
                self._container.reload()
                port = (self._container.ports.get("8888/tcp") or [{}])[0].get("HostPort", 0)
            info = JupyterConnectionInfo("127.0.0.1", False, int(port), self._token)
            rest, deadline = RestClient(info), Deadline(self.launch["start_timeout"])
            while True:
                try:
                    rest.request("GET", "/api/kernelspecs", timeout=deadline.within(CONTROL_TIMEOUT))
                    return info
                except (ConnectionClosed, ExecutionTimeout):
                    self._check_gateway(deadline)
        except BaseException:
            self._disconnect(failed=True)
            raise

    def _gateway_has_ended(self) -> bool:
        with contextlib.suppress(SandboxError), _engine_errors():
            return not self._client.api.containers(filters={"id": self._container.id})  # of those that run
        return False  # the engine does not say

    def _check_gateway(self, deadline: Deadline) -> None:
        time.sleep(0.05)
        with _engine_errors(self._image_name):
            self._container.reload()
            runs = self._container.status in ("created", "running")
            if runs and not deadline.expired:
                return
            logs = self._container.logs(tail=20).decode("utf-8", "replace")
        late = f"The gateway in the container does not answer on port 8888 within {deadline.seconds:g} s"
        reason = late if runs else "The container has ended before its gateway answered"
        raise SandboxError(reason, self._image_name, "", logs)

    def _new_client(self) -> Any:
        client = docker_client()
        here = client.api.base_url.startswith("http+docker://")  # a socket of this machine
        if here and self._bind_dir and not os.path.isdir(self._bind_dir):
            client.close()
            raise SandboxError(f"bind_dir {self._bind_dir} is no directory")  # the engine would make it, owned by root
        self._client = client
        return client

    @property
    def _image_name(self) -> str:
        if self._custom_image:
            return self._custom_image
        content = json.dumps([self.DEFAULT_DOCKERFILE, self._base_image, self._packages, self._target])
        import hashlib

        return f"jupyter-exec:{hashlib.sha256(content.encode('utf-8')).hexdigest()[:12]}"

    def _image(self, client: Any) -> Any:
        """Return the image. The bundled one is built if it is not there; a custom one is never pulled."""
        import docker.errors

        try:
            return client.images.get(self._image_name)
        except docker.errors.ImageNotFound:
            if self._custom_image:
                reason = f"Custom image {self._custom_image} does not exist on the engine: build or pull it first"
                raise SandboxError(reason) from None
        self._build(client)
        return client.images.get(self._image_name)

    def _build(self, client: Any) -> None:
        import docker.errors

        arguments = {"PACKAGES": "\n".join(self._packages)}
        if self._base_image:
            arguments["BASE_IMAGE"] = self._base_image
        build_logger.info("Building the image %s, once; this takes a minute", self._image_name)
        dockerfile = io.BytesIO(self.DEFAULT_DOCKERFILE.encode("utf-8"))
        options: Json = {"tag": self._image_name, "target": self._target, "buildargs": arguments, "decode": True}
        steps = client.api.build(fileobj=dockerfile, rm=True, forcerm=True, timeout=BUILD_TIMEOUT, **options)
        tail: deque[str] = deque(maxlen=20)
        cause, failed = "", False
        for step in steps:  # all of them: the engine's answer has to be read to its end
            text = clean_text(str(step.get("stream") or step.get("status") or step.get("error") or "")).strip()
            tail.extend([text] * bool(text))
            if text[:5].upper() == "STEP ":  # Podman shouts
                build_logger.info("%s", text[:100])
            if said := re.search(r"(?mi)^(?:error|e|fatal): *(.*)", text):  # of pip or apt: the first names the cause
                cause = cause or said[1]
            if "error" in step:
                cause, failed = cause or text, True
        if failed:
            reason = f"The image could not be built: {cause[:500]}"
            try:
                client.images.get(base := self._base_image or "python:3.13-slim")
            except docker.errors.NotFound:
                advice = "pull or load it, or name by base_image= (--base-image) a Python image that is there"
                reason = f"The base image {base} is not on the engine and could not be pulled: {advice}"
            raise SandboxError(reason, self._image_name, "", "\n".join(tail))

    def _create(self, client: Any, command: list[str] | None) -> Any:
        _remove_orphans(client)
        if self._container_name and self._stop_container and self._last_id:  # it has ended, and has the name still
            with contextlib.suppress(Exception):
                client.api.remove_container(self._last_id, v=True, force=True)
        image = self._image(client)
        options = self._options(client, image, command)
        if command is None:
            options["environment"]["TOKEN"] = self._token
        self._add_tmpfs(client, image, options)
        return _create_container(client, image, options)

    def _add_tmpfs(self, client: Any, image: Any, options: Json) -> None:
        """Have memory mounted where code would have no place to write to, but not in what the user mounts."""
        config, taken = image.attrs.get("Config") or {}, _targets(options)
        home = dict(entry.partition("=")[::2] for entry in config.get("Env") or []).get("HOME", "")
        places = [
            str(path)
            for path in map(PurePosixPath, ("/tmp", home, self._work_dir))
            if path.name and taken.isdisjoint([path, *path.parents])  # "/" has no name, and cannot be one
        ]
        if not options.get("read_only"):
            work_dir = str(PurePosixPath(self._work_dir))
            needs = "command" in options and work_dir in places and config.get("WorkingDir") != self._work_dir
            # What is not in the image the engine would make, owned by root.
            places = [work_dir] if needs and not _in_image(client, image, work_dir) else []
        if places:
            own = dict.fromkeys(places, _tmpfs(client, image, options["user"]))
            options["tmpfs"] = own | options.get("tmpfs", {})

    def _options(self, client: Any, image: Any, command: list[str] | None) -> Json:
        """Return the arguments of containers.create: ours, merged with those of the user; no command: for a gateway."""
        config = image.attrs.get("Config") or {}
        options: Json = {
            "name": self._container_name or f"jupyter-exec-{os.urandom(8).hex()}",
            "network_mode": self.network,
            "use_config_proxy": self.network != "none",  # Docker's configured proxies: their URLs may hold passwords
            "environment": dict(self._env),
            "labels": {"jupyter_exec": __version__},
            "user": self._docker_kwargs["user"] if "user" in self._docker_kwargs else self._user(client, config),
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "pids_limit": 512,  # processes and threads; a fork bomb ends there
            # The kernel host is to be PID 1: code can neither stop it nor open its pipe, which an init would have open,
            # too. PID 1 does not hear SIGTERM either: with that as stop_signal, `docker stop` would wait.
            "init": command is None,
        }
        if command is None:
            options["ports"] = {"8888/tcp": ("127.0.0.1", None)}
            options["labels"] |= {"jupyter_exec.forsakable": "1"} if self._stop_container else {}
        else:
            options |= {"command": command, "stop_signal": "SIGKILL", "auto_remove": self._auto_remove}
            options["stdin_open"] = True  # and not "detach": the engine then closes stdin when we have gone
            options["log_config"] = {"type": "none"}  # the stdout is our relay, not to be written to the engine's disk
        if command or self._bind_dir:
            options["working_dir"] = self._work_dir
        # Of the engine's memory at most a half, unless told otherwise; and no swap beside the limit.
        limit = self._docker_kwargs.get("mem_limit")
        options["mem_limit"] = client.info()["MemTotal"] // 2 if limit is None else limit
        options["memswap_limit"] = options["mem_limit"]
        if self._bind_dir:
            options["mounts"] = [{"Type": "bind", "Source": self._bind_dir, "Target": self._work_dir}]
        for name, value in self._docker_kwargs.items():
            options[name] = _merged(name, options.get(name), value)
        if "networking_config" in options:  # docker-py reads it only together with `network`
            options["network"] = options.pop("network_mode")
        return options

    def _user(self, client: Any, config: Json) -> str:
        """Return the user to run as: the image's, or with bind_dir its owner; root only if the engine is rootless."""
        own = str(config.get("User") or "")
        info = client.info() if self._bind_dir else {}
        if self._bind_dir and info.get("OperatingSystem") != "Docker Desktop":
            # Docker says it among the security options, Podman in a field of its own.
            if info.get("Rootless") or any("rootless" in option for option in info.get("SecurityOptions") or ()):
                return "0:0"  # outside, that is the caller
            with contextlib.suppress(OSError):  # on another host: nothing to see from here
                return _owner_of(self._bind_dir)
        return NORMAL_USER if _is_root(own) else own

    def _attach(self, client: Any) -> DockerStream:
        """Attach to the container, and ask to hear of its end: both before it starts, later may be too late."""
        url = client.api._url("/containers/{0}", self._container.id)
        post = functools.partial(client.api._post, stream=True, timeout=STOP_TIMEOUT)
        # Like attach_socket(), which would wait for ever if the engine did not answer.
        streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        answer = post(f"{url}/attach", params=streams, headers={"Connection": "Upgrade", "Upgrade": "tcp"})
        self._stream = stream = DockerStream(client.api._get_raw_response_socket(answer))
        stream.ended = post(f"{url}/wait", params={"condition": "removed" if self._auto_remove else "next-exit"})
        return stream

    def _disconnect(self, failed: bool = False) -> None:
        """End the container by force: it may be paused, and its host stopped, or slow. Remove it if it has `failed`."""
        if not self._client:
            return
        container, stream, self._container, self._stream = self._container, self._stream, None, None
        self._last_id = container.id if container else ""
        self._client.api.timeout = STOP_TIMEOUT
        try:
            if container and (self._stop_container or failed):
                container.remove(v=True, force=True) if self._auto_remove or failed else container.kill()
        except Exception as error:  # whatever it is: the container is gone, or the engine is
            if stream and "already in progress" in str(error):
                stream.exit_code()
        if stream:
            stream.close()
            stream.forget_end()
        self._client.close()


def _create_container(client: Any, image: Any, options: Json) -> Any:
    """Create a container that `_remove_orphans` knows. Nothing stays of one whose creation is interrupted."""
    import docker.errors

    # With its name, since an image that is made of a container hands its labels on.
    own = {"jupyter_exec.owner": process_name(os.getpid()), "jupyter_exec.name": options["name"]}
    options["labels"] = own | options.get("labels", {})
    try:
        return client.containers.create(image.id, **options)
    except docker.errors.APIError:  # the name may be that of another container
        raise
    except BaseException:  # a Ctrl-C, or a slow engine: it may be there all the same
        client.api.timeout = STOP_TIMEOUT
        with contextlib.suppress(Exception):
            _remove_orphans(client, options["name"])
        raise


def _in_image(client: Any, image: Any, path: str) -> bytes:
    """Return the start of a file or directory of an image as a tar archive, b"" if there is no such thing."""
    import docker.errors

    options = {"name": f"jupyter-exec-{os.urandom(8).hex()}", "command": ["never", "started"]}
    probe = _create_container(client, image, options)
    try:
        pieces = probe.get_archive(path)[0]
        with contextlib.closing(pieces):
            return bytes(next(pieces, b""))
    except docker.errors.NotFound:
        return b""
    finally:
        probe.remove(v=True)


def _remove_quietly(container: Any, owner: int) -> None:
    with contextlib.suppress(Exception):  # it is gone already, or the engine is
        if os.getpid() == owner:  # finalizers run in forked children too
            container.remove(v=True, force=True)


def _remove_orphans(client: Any, name: str = "") -> None:
    """Remove what processes of this machine that are gone have left, and the container of that name if it never ran.

    Those are containers that were never started, and gateways, which nothing tells that their owner is gone.
    """
    for found in client.api.containers(all=True, filters={"label": "jupyter_exec.owner"}):
        labels, never_ran = found["Labels"], found["State"] == "created"
        owner, own_name = labels["jupyter_exec.owner"], labels.get("jupyter_exec.name", "")
        is_orphan = (never_ran or "jupyter_exec.forsakable" in labels) and has_ended(owner)
        is_wanted = never_ran and name == own_name and owner == process_name(os.getpid())
        if f"/{own_name}" in found["Names"] and (is_orphan or is_wanted):
            with contextlib.suppress(Exception):  # it has gone in the meantime
                client.api.remove_container(found["Id"], v=True, force=True)


def docker_client() -> Any:
    """Return a client of the engine that the environment names. Raises: SandboxError with what to do."""
    try:
        import docker
    except ImportError:
        raise SandboxError("The package docker is not installed: pip install docker") from None
    if (os.environ.get("DOCKER_HOST") or "npipe:" * (os.name == "nt")).startswith("npipe:"):
        raise SandboxError(f"Docker's named pipe of Windows is no socket, so it cannot be used here: {NOT_ON_WINDOWS}")
    with _engine_errors():
        client = docker.DockerClient(**_engine_in_use(), timeout=ENGINE_TIMEOUT)
        client.api.timeout = WAIT_TIMEOUT
        return client


def _engine_in_use() -> dict[str, Any]:
    """Return where the docker command would connect to: DOCKER_HOST, or else the context in use."""
    import docker

    name = os.environ.get("DOCKER_CONTEXT")
    address: dict[str, Any] = docker.utils.kwargs_from_env()
    if not address.get("base_url") and name != "default":
        try:
            context = docker.ContextAPI.get_context(name)
            if not context:
                raise LookupError("it is not found")
            if context.name != "default":
                address = {"base_url": context.Host, "tls": context.TLSConfig or False}
        except Exception as error:  # of any type, for a file that is missing or broken
            what = f"The Docker context {name}" if name else "The current Docker context"
            raise SandboxError(f"{what} cannot be used: 'docker context ls' shows what there is ({error})") from None
    if str(address.get("base_url")).startswith("ssh:"):
        raise SandboxError(
            "The SDK cannot attach to containers by ssh: forward the socket, as in 'ssh -nNT -L "
            "/tmp/docker.sock:/var/run/docker.sock HOST', and set DOCKER_HOST=unix:///tmp/docker.sock"
        )
    return address


@contextlib.contextmanager
def _engine_errors(image: str = "") -> Iterator[None]:
    """Translate the errors of docker-py; those of requests below it are OSErrors."""
    import docker.errors

    try:
        yield
    except docker.errors.APIError as error:
        raise SandboxError(f"The Docker engine refuses: {error.explanation or error}", image) from None
    except (docker.errors.DockerException, OSError, TypeError, ValueError) as error:  # the last two: a keyword's value
        if "Permission denied" in str(error):
            reason = "No permission to use Docker: add yourself to the group docker, or use LocalJupyterServer"
        elif "timed out" in str(error):
            reason = f"The Docker engine does not answer: try again, restart it, or use LocalJupyterServer ({error})"
        elif isinstance(error, OSError) or "Error while fetching server" in str(error):
            reason = f"Docker is not running: start it, or use LocalJupyterServer ({error})"
        else:
            reason = f"Docker refuses: {error}"
        raise SandboxError(reason, image) from None


def _tmpfs(client: Any, image: Any, user: object) -> str:
    """Return the options of a temporary file system for a user of an image."""
    options = "exec,size=512m,mode=1777"  # Docker's default is noexec, with which compiled wheels cannot be imported
    if any("Podman" in part.get("Name", "") for part in client.version().get("Components") or ()):
        return options  # it refuses an owner, and keeps the mode; Docker takes that of a directory in the image
    uid, _, gid = str(user).partition(":")
    if not uid.isdigit():  # a name: the mount needs numbers
        known = _in_image(client, image, "/etc/passwd").decode("utf-8", "replace")
        found = re.search(rf"(?m)^{re.escape(uid)}:[^:\n]*:(\d+):(\d+):", known)
        uid, gid = (found[1], gid if gid.isdigit() else found[2]) if found else ("", "")
    return f"{options},uid={uid},gid={gid if gid.isdigit() else uid}" if uid else options


def _listed(name: str, value: Any) -> Any:
    """Return an option's collection as a list, and so a mount that is not in one, but a mapping as it is."""
    kinds: Any = {"mounts": (str, Mapping), "tmpfs": str, "volumes": str}
    if isinstance(value, kinds.get(name, ())):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def _merged(name: str, ours: Any, theirs: Any) -> Any:
    """Return our value of an option merged with the user's, whatever kind of collection that is."""
    if isinstance(theirs, str) and isinstance(ours, dict | list):
        theirs = [theirs]
    if isinstance(theirs, list) and (separator := _SEPARATORS.get(name)):
        pairs = [entry.partition(separator) for entry in theirs]
        theirs = {key: value if found else None for key, found, value in pairs}
    if isinstance(theirs, Mapping):
        return (ours or {}) | dict(theirs)
    return ours + theirs if isinstance(ours, list) else theirs


def _targets(options: Mapping[str, Any]) -> set[PurePosixPath]:
    """Return where options of containers.create mount something. Raises: ValueError if that cannot be told."""
    volumes: Any = options.get("volumes", [])
    try:
        if isinstance(volumes, Mapping):
            places = [volume["bind"] for volume in volumes.values()]
        else:
            places = [(volume.split(":") * 2)[1] for volume in volumes]  # "SOURCE:TARGET:MODE", or only a target
        places += [mount["Target"] for mount in options.get("mounts", [])]
        return {PurePosixPath(place) for place in [*places, *options.get("tmpfs", ())]}
    except (AttributeError, KeyError, TypeError):
        form = '{SOURCE: {"bind": TARGET, "mode": "rw"}} or ["SOURCE:TARGET:rw"]'
        raise ValueError(f"volumes must be {form}, mounts a list of docker.types.Mount.") from None


# Where docker-py takes entries instead of a mapping -> what stands between name and value.
_SEPARATORS = {"environment": "=", "labels": "=", "tmpfs": ":"}


def _is_root(user: str) -> bool:
    return bool(re.fullmatch(r"\s*(root|[+-]?0+|)\s*", user.partition(":")[0]))


def _owner_of(bind_dir: str) -> str:
    """Return the user that code may run as in a directory: its owner, but not root, who could leave setuid files.

    Raises: SandboxError if it could not write there.
    """
    found = os.stat(bind_dir)
    user = f"{found.st_uid}:{found.st_gid or 1000}" if found.st_uid else NORMAL_USER
    shift = 6 if found.st_uid else 3 if found.st_gid == 1000 else 0
    if found.st_mode >> shift & 3 != 3:  # write, and enter
        advice = f"chown it to {user}, or say by user= as whom to run ('0:0' is root)"
        raise SandboxError(f"bind_dir {bind_dir} is not writable for {user}, as whom code would run: {advice}")
    return user


def _requirements(packages: Sequence[str]) -> list[str]:
    """Return requirements of pip, each as one line. Raises: ValueError."""
    packages = packages if isinstance(packages, str) else list(packages)
    if isinstance(packages, str) or not all(isinstance(package, str) for package in packages):
        raise ValueError("packages must be a list of strings.")
    for package in packages:
        if any(word.startswith("-") for word in package.split()):
            raise ValueError(f"packages are requirements of pip; {package!r} has an option of pip.")
    return sorted(" ".join(package.split()) for package in packages)


# What the transport needs for itself -> what to use instead.
_RESERVED = dict.fromkeys(["detach", "stdin_open", "stream", "tty"], "nothing")
_RESERVED |= {"command": "custom_image_name", "image": "custom_image_name", "name": "container_name"}
_RESERVED |= {"log_config": "nothing, the stdout of the container is the transport", "remove": "auto_remove"}


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Raise ValueError for what the transport needs, TypeError for what docker-py, if it is installed, would refuse."""
    for name in sorted(_RESERVED.keys() & given.keys()):
        raise ValueError(f"{name!r} is not for docker_kwargs; use {_RESERVED[name]}.")
    if not given:
        return
    try:
        from docker.models.containers import RUN_CREATE_KWARGS, RUN_HOST_CONFIG_KWARGS
    except ImportError:
        return
    known = [*RUN_CREATE_KWARGS, *RUN_HOST_CONFIG_KWARGS, "networking_config", "ports", "volumes", *LAUNCH_DEFAULTS]
    known += DockerJupyterServer.__init__.__kwdefaults__ or ()
    for name in sorted(given.keys() - set(known)):
        import difflib

        meant = "".join(f"; did you mean {close!r}?" for close in difflib.get_close_matches(name, known, 1))
        raise TypeError(f"Neither DockerJupyterServer nor docker-py has a keyword {name!r}{meant}")


def _openings(options: Mapping[str, Any], bind_dir: str | None) -> Iterator[str]:
    """Say which options let code out of the container, or give it more rights than a normal user has."""
    for name in ("privileged", "cap_add", "devices", "device_cgroup_rules", "volumes_from"):
        if options.get(name):
            yield f"{name}={options[name]!r} gives code rights over the machine or over other containers"
    for name in ("network_mode", "pid_mode", "ipc_mode", "userns_mode", "uts_mode", "cgroupns"):
        if str(options.get(name)).partition(":")[0] in ("host", "container"):
            yield f"{name}={options[name]!r} shares what is the machine's, or another container's"
    for entry in _merged("security_opt", [], options.get("security_opt", [])):
        if re.search(r"no-new-privileges[:=]false|unconfined|disable", str(entry)):
            yield f"security_opt {entry!r} takes away a restriction"
    if _is_root(str(options.get("user", "-"))):
        yield f"user={options['user']!r} is root, who can leave setuid files in what is mounted"
    if options.get("pids_limit") in (0, -1):
        yield "pids_limit does not limit: a fork bomb reaches the machine"
    if options.get("mem_limit") in (0, "0"):
        yield "mem_limit does not limit: code may take all memory of the machine"
    volumes = _merged("volumes", [], options.get("volumes", []))
    sources = [str(volume).partition(":")[0] for volume in volumes] + [bind_dir or "-"]
    sources += [str(mount.get("Source")) for mount in options.get("mounts", [])]
    for source in sources:
        if source.endswith(".sock") or source.rstrip("/") in ("", "/run", "/var/run"):
            yield f"with {source} mounted, code may become master of the machine"


# ======================================================================================================
# 14. Host tools: functions of this program that code in a kernel calls
# ======================================================================================================


def is_name(text: str) -> bool:
    """Whether Python takes a text for the name of a variable."""
    return text.isidentifier() and not keyword.iskeyword(text)


def functions_source(functions: Iterable[Callable[..., Any]], *imports: str) -> str:
    """Return a program that defines plain functions in a kernel, after the imports (statements) that they need.

    Raises: ValueError for a function that is not plain.
    """
    program = ["from __future__ import annotations", *imports]
    for function in functions:
        try:
            program.append(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError):
            program.append("")
        if not program[-1].startswith(("def ", "async def ")) or function.__closure__:
            raise ValueError(f"{function!r} cannot be sent to a kernel: it must be a plain function without closure.")
    return "\n".join(program)


AnyTools = Iterable[Callable[..., Any]] | Mapping[str, Callable[..., Any]]
ApproveHook = Callable[[str, Json], Any]
# The tool calls that the running code is part of, the innermost last.
_TOOL_CALLS: contextvars.ContextVar[tuple[ToolCall, ...]] = contextvars.ContextVar("tool calls", default=())


def tool_call_ended() -> bool:
    """Whether the tool call in which this is asked is waited for no longer: its cell has ended, or its time is over.

    A tool that takes long should ask now and then, and give up. A coroutine is cancelled instead.
    """
    return any(call.ended for call in _TOOL_CALLS.get())


def to_json(value: Any) -> Any:
    """Return JSON for what json.dumps does not know; in this program, and in a kernel that this source is sent to."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if hasattr(value, "isoformat"):  # a date or a time
        return value.isoformat()
    if isinstance(value, (set, frozenset)):
        return list(value)
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON: send numbers, text, lists and dicts")


class ToolCaller:
    """The kernel's end of the tools: its source is sent there, and it does not run here.

    A call is an input_request, its result the input_reply. ipykernel waits for one of them at a time, and not in a
    thread-safe way. So here one thread has the stdin socket to itself, and gives each request its answer, those of
    input() too.
    """

    def __init__(self, kernel: Any, tag: str, max_calls: int, max_size: int) -> None:
        self._kernel, self._tag, self._max_calls, self._max_size = kernel, tag, max_calls, max_size
        self._client = kernel.get_parent("shell")["header"]["session"]
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._serial = itertools.count()
        self._last: int | None = None  # number of the last call that the cell may make; None: no cell is running
        self._outbox: deque[tuple[str | None, Any, tuple[Any, ...]]] = deque()  # number, future, request
        self._calls: dict[str, Any] = {}  # futures of what was sent, by number
        self._inputs: deque[Any] = deque()  # those of input(), in order
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._ended = False
        self._replaced = kernel.do_execute, kernel._input_request
        kernel.do_execute, kernel._input_request = self._do_execute, self._request
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # ipykernel closes the socket later than that

    def close(self) -> None:
        self._ended = True
        self._wake_up()
        self._thread.join()
        self._kernel.do_execute, self._kernel._input_request = self._replaced

    async def _do_execute(self, *args: Any, **options: Any) -> Any:
        self._last = next(self._serial) + self._max_calls
        self._task = asyncio.current_task()
        try:
            return await self._replaced[0](*args, **options)
        finally:
            with self._lock:
                self._last = None
                left = [*self._calls.values(), *self._inputs, *(future for _, future, _ in self._outbox)]
                for waiting in (self._calls, self._inputs, self._outbox):
                    waiting.clear()
            for future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(ToolError("The cell has ended: nobody answers any more."))

    def stub(self, shape: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
        """Return what stands for a tool; calling `shape` checks the arguments."""

        @functools.wraps(shape)
        def stub(*args: Any, **kwargs: Any) -> Any:
            shape(*args, **kwargs)
            error = (future := self._call(shape.__name__, args, kwargs)).exception()
            if error:
                raise self._raisable(error)
            return future.result()

        @functools.wraps(shape)
        async def async_stub(*args: Any, **kwargs: Any) -> Any:
            shape(*args, **kwargs)
            try:
                return await asyncio.wrap_future(self._call(shape.__name__, args, kwargs))
            except KeyboardInterrupt as error:
                raise self._raisable(error) from None

        return async_stub if is_async else stub

    def _raisable(self, error: BaseException) -> BaseException:
        """Return an error as the calling code can have it: a KeyboardInterrupt in a task would end the kernel."""
        is_cell = threading.current_thread() is threading.main_thread()
        with contextlib.suppress(RuntimeError):  # no event loop is running here
            is_cell = is_cell and asyncio.current_task() is self._task
        return asyncio.CancelledError(*error.args) if isinstance(error, KeyboardInterrupt) and not is_cell else error

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        """Send a call; returns its future."""
        try:
            text = json.dumps({"name": name, "args": args, "kwargs": kwargs}, default=to_json)
        except (ValueError, TypeError, RecursionError) as error:
            raise TypeError(f"{name}(): {error}") from None
        if len(text) > self._max_size:
            much = f"{len(text)} characters of JSON; {self._max_size} is the limit"
            raise ToolError(f"{name}(): the arguments are {much}.")
        last = self._last
        if last is None or self._kernel.get_parent("shell")["header"]["session"] != self._client:
            raise ToolError(f"{name}() was called while no cell of its program was running.")
        if (number := next(self._serial)) > last:
            raise ToolError(f"{name}(): this cell has made {self._max_calls} tool calls, which is the limit.")
        return self._kernel.raw_input(f"{self._tag}{number}:{text}")

    def _request(self, prompt: str, ident: Any, parent: Any, password: bool = False) -> Any:
        """Stand in for the kernel's `_input_request`: return what a person types, or the future of a call."""
        if os.getpid() != self._pid:
            raise ToolError("Only the kernel's own process can call tools and ask for input: use threads.")
        future: Future[Any] = Future()
        number = prompt[len(self._tag) :].partition(":")[0] if prompt.startswith(self._tag) else None
        if number is None:
            sys.stderr.flush()
            sys.stdout.flush()
        with self._lock:
            if self._last is None and number is not None:
                raise ToolError("The cell has ended.")
            self._outbox.append((number, future, ({"prompt": prompt, "password": password}, parent, ident)))
        self._wake_up()
        return future.result() if number is None else future

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # there is enough to wake it
            self._wake.send(b"x")

    def _serve(self) -> None:
        import zmq

        poller, sock = zmq.Poller(), self._kernel.stdin_socket
        poller.register(sock, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while not self._ended:
            poller.poll()
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            for work in (self._receive, self._send):
                try:
                    work(sock)
                except Exception:  # a broken message must not stop the others
                    self._kernel.log.warning("A request or an answer on stdin was lost", exc_info=True)

    def _send(self, sock: Any) -> None:
        with self._lock:
            while self._outbox and len(self._calls) < 256:  # ZeroMQ drops what waits beyond 1000
                number, future, (content, parent, ident) = self._outbox.popleft()
                if number is None:
                    self._inputs.append(future)
                else:
                    self._calls[number] = future
                self._kernel.session.send(sock, "input_request", content, parent, ident=ident)

    def _receive(self, sock: Any) -> None:
        while reply := self._kernel.session.recv(sock)[1]:
            value = reply["content"].get("value", "")
            with self._lock:
                if value.startswith(self._tag):
                    number, _, text = value[len(self._tag) :].partition(":")
                    future = self._calls.pop(number, None)
                    try:
                        answer = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        answer = {"error": "ToolError", "message": f"the result cannot be read: {error}", "tool": ""}
                else:
                    future, answer = self._inputs.popleft() if self._inputs else None, {"value": value}
                    if value == "\x04":
                        answer = {"error": "EOFError", "message": "", "tool": ""}
            if future and future.set_running_or_notify_cancel():
                if "error" in answer:
                    future.set_exception(self._error_of(**answer))
                else:
                    future.set_result(answer["value"])

    def _error_of(self, error: str, message: str, tool: str) -> BaseException:
        kinds: dict[str, Any] = {**vars(builtins), "ToolError": ToolError, "ToolRefused": ToolRefused}
        try:
            raised: BaseException = kinds[error](*[message] * bool(message))
        except (KeyError, TypeError):  # this Python has no such error, or it wants several arguments
            raised = ToolError(f"{error}: {message}")
        if tool and hasattr(raised, "add_note"):
            raised.add_note(f"Raised by the tool {tool}, in the program that runs this kernel.")
        return raised


def define_tools(shell: Any, tag: str, max_calls: int, max_size: int, heads: dict[str, tuple[str, str | None]]) -> None:
    """Define the tools in the kernel to which this source is sent; `heads` are first lines and docstrings."""
    kernel = shell.kernel
    if old := getattr(kernel, "_tool_caller", None):  # of another program, in a kernel that was attached to
        old.close()
    kernel._tool_caller = caller = ToolCaller(kernel, tag, max_calls, max_size)
    for name, (head, documentation) in heads.items():
        scope: Any = {"__name__": "__main__"}
        exec(f"from __future__ import annotations\n{head.removeprefix('async ')} {documentation!r}", scope)
        shell.user_ns[name] = caller.stub(scope[name], head.startswith("async "))
    shell.user_ns.update(ToolError=ToolError, ToolRefused=ToolRefused)


class Verbatim(str):
    """Source text that stands in an inspect.Signature as it is, without quotes."""

    __repr__ = str.__str__


def tool_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return a signature whose text is valid wherever it is sent: `(city: str, days: int = 3) -> list[str]`."""
    options: Json = {}
    if sys.version_info >= (3, 14):
        import annotationlib  # annotations may name what is not there at run time

        options = {"annotation_format": annotationlib.Format.STRING}

    def checked(value: Any, check: Callable[[str], object], text: str, otherwise: str) -> Any:
        if value is inspect.Signature.empty:
            return value
        try:
            check(text)
        except Exception:
            text = otherwise
        return Verbatim(text)

    def annotation(value: Any) -> Any:
        text = value if isinstance(value, str) else inspect.formatannotation(value, function.__module__)
        return checked(value, lambda text: compile(text, "", "eval", dont_inherit=True), text, repr(text))

    signature = inspect.signature(function, **options)
    parameters = [
        parameter.replace(
            annotation=annotation(parameter.annotation),
            default=checked(parameter.default, ast.literal_eval, repr(parameter.default), "..."),
        )
        for parameter in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters, return_annotation=annotation(signature.return_annotation))


class Tools:
    """The functions of this program that the code of one executor may call, and the limits of such calls."""

    def __init__(self, functions: AnyTools, approve: ApproveHook | None, max_calls: int, timeout: float | None) -> None:
        """Raises: ValueError for what cannot be a tool."""
        if approve is not None and not callable(approve):
            raise ValueError("approve must be a function of name and arguments.")
        check_counts(max_tool_calls=max_calls)
        if timeout is not None:
            check_seconds(tool_timeout=timeout)
        if not isinstance(functions, Iterable):
            raise ValueError("tools must be a list of functions, or a dict of them by name.")
        self.functions: dict[str, tuple[Callable[..., Any], inspect.Signature]] = {}
        self.approve, self.max_calls, self.timeout = approve, max_calls, timeout
        # Where coroutines run, those of the executor's hooks, too: the loop of the call whose turn it is, or if that
        # has ended, of the latest call. None: each coroutine in an event loop of its own.
        self.loop: Any = None
        self.tag = ""  # how the prompt of an input_request begins that is a tool call
        self._heads: dict[str, tuple[str, str | None]] = {}
        named: Any = isinstance(functions, Mapping) and functions.items()
        for name, function in named or ((getattr(function, "__name__", ""), function) for function in functions):
            if not isinstance(name, str) or not is_name(name):
                raise ValueError(f"{function!r} cannot be a tool: it has no name, as `def` would give it.")
            if name in {"ToolError", "ToolRefused", *self.functions}:
                raise ValueError(f"There are two tools of the name {name}.")
            try:
                self.functions[name] = function, tool_signature(function)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name} cannot be a tool: {error}.") from None
            head = "async " * inspect.iscoroutinefunction(function) + f"def {name}{self.functions[name][1]}:"
            self._heads[name] = head, inspect.getdoc(function)

    def prelude(self) -> str:
        """Return a cell that defines the tools in a kernel that has just started."""
        self.tag = f"jupyter_exec {os.urandom(8).hex()} "
        try:  # one by one: for a class the whole file would be parsed
            methods = [inspect.getsource(method) for method in vars(ToolCaller).values() if inspect.isfunction(method)]
        except OSError:
            reason = "This program is frozen, without the source that the kernel would need"
            raise ValueError(f"{reason} for tools.") from None
        program = functions_source(
            (to_json, define_tools),
            "import asyncio, atexit, base64, builtins, contextlib, functools",
            "import itertools, json, os, socket, sys, threading",
            "from collections import deque",
            "from concurrent.futures import Future",
            "from dataclasses import fields, is_dataclass",
            f"class ToolError(Exception): {ToolError.__doc__!r}",
            f"class ToolRefused(ToolError): {ToolRefused.__doc__!r}",
            "class ToolCaller:",
            *methods,
        )
        program += f"define_tools(get_ipython(), {self.tag!r}, {self.max_calls}, {MAX_TOOL_JSON}, {self._heads!r})"
        scope = "{'__name__': 'tools', 'get_ipython': get_ipython}"
        return f"exec(compile({program!r}, '<tools>', 'exec', dont_inherit=True), {scope})"

    def describe(self, limit: int) -> str:
        """Return stubs of the tools for a model, with as much of their docstrings as `limit` characters allow."""
        for cut in (r".*", r".*?(?=\n\n|\Z)", r".{0,80}?(?=\n|\Z)", ""):
            stubs = []
            for head, documentation in self._heads.values():
                kept = re.match(f"(?s:{cut})", documentation or "")
                shown = textwrap.indent(f'"""{kept[0]}"""', "    ") if kept and kept[0] else ""
                stubs.append(head + ("\n" + shown if shown else " ..."))
            if len(text := "\n".join(stubs)) <= limit:
                return text
        return ", ".join(self._heads)[: max(0, limit)]

    def check_outside(self) -> None:
        """Raise JupyterExecError in a tool whose own cell keeps the kernel busy."""
        if any(call.tools is self and not call.ended for call in _TOOL_CALLS.get()):
            raise JupyterExecError("The kernel is busy with the cell that called this tool: use another executor.")


class ToolCall:
    """One call of a tool, from its request to its answer."""

    def __init__(self, tools: Tools, name: str, bound: Any, answer: Callable[[str], None]) -> None:
        """`answer` takes what `run` or `tool_failure` returns."""
        self.tools, self.name, self.bound, self.answer = tools, name, bound, answer
        self.status, self.started, self.seconds = "not run", 0.0, 0.0
        self.ended = False  # it is answered, or nobody waits any more
        self.cancel: Callable[[], object] = bool  # ends its coroutine, if there is one

    def result(self, value: Any) -> Any:
        """Return a value, or await it if it is awaitable: in the event loop of `tools`, or in a new one."""
        import asyncio

        if not inspect.isawaitable(value):
            return value

        async def wait() -> tuple[Any, BaseException | None]:
            if not loop:
                task, own_loop = asyncio.current_task(), asyncio.get_running_loop()
                self.cancel = lambda: task and own_loop.call_soon_threadsafe(task.cancel)
                if self.ended:
                    self.cancel()
            try:
                return await value, None
            except (KeyboardInterrupt, SystemExit) as error:  # these would end the loop, and with it the program
                return None, error

        if loop := self.tools.loop:
            future = asyncio.run_coroutine_threadsafe(wait(), loop)
            self.cancel = future.cancel
            if self.ended:
                future.cancel()
            given, error = future.result()
        else:
            given, error = asyncio.run(wait())
        if error:
            raise error
        return given

    def check_approved(self) -> None:
        """Raises: ToolRefused."""
        said: Any = True
        try:
            if self.tools.approve:
                said = self.result(self.tools.approve(self.name, dict(self.bound.arguments)))
        except Exception as error:
            logger.warning("approve raised; the call of %s is refused", self.name, exc_info=True)
            said = f"The call of {self.name} was refused: the hook that approves calls raised {type(error).__name__}."
        if said is not True:
            raise ToolRefused((isinstance(said, str) and said) or f"The call of {self.name} was refused.")

    def run(self) -> str:
        """Return the result as JSON: {"value": result}."""
        value = self.result(self.tools.functions[self.name][0](*self.bound.args, **self.bound.kwargs))
        try:
            text = json.dumps(value, default=to_json)
        except (ValueError, TypeError, RecursionError) as error:
            raise ToolError(f"The result of {self.name} cannot be sent: {error}") from None
        if len(text) > MAX_TOOL_JSON:
            much = f"{len(text)} characters of JSON; {MAX_TOOL_JSON} is the limit"
            raise ToolError(f"The result of {self.name} is {much}.")
        return f'{{"value": {text}}}'


def tool_failure(error: BaseException, tool: str) -> str:
    """Return what the kernel is told of an exception: a built-in one keeps its type, its text is bounded."""
    kind, name, message = type(error), type(error).__name__, ""
    with contextlib.suppress(Exception):  # whatever its __str__ does
        message = str(error.args[0] if len(error.args) == 1 else error)
    known = getattr(builtins, name, None) is kind and issubclass(kind, (Exception, KeyboardInterrupt))
    if not known and kind not in (ToolError, ToolRefused):
        name, message = "ToolError", f"{name}: {message}"
    return json.dumps({"error": name, "message": message[:LARGE_PART], "tool": tool})


class CellTools:
    """The tool calls of one cell. Each has a thread; what comes after the cell's end is dropped."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_TOOLS_AT_ONCE)
        self._calls: list[ToolCall] = []
        self._requests = self._weight = 0  # how many came, and bytes of them as objects

    def start_call(self, prompt: str, reply: Callable[[str], None], pause: Pause) -> bool:
        """If an input_request is a tool call, start that and return True. In the reading thread."""
        tag = self._tools.tag
        number, _, text = prompt[len(tag) :].partition(":")
        if not prompt.startswith(tag):
            return False
        self._requests += 1
        if self._requests > self._tools.max_calls or len(number) > 20:
            return True  # forged, since our program in the kernel counts, too: no answer

        def answer(content: str) -> None:
            try:
                reply(f"{tag}{number}:{content}")
            except JupyterExecError:
                logger.debug("The answer to a tool call came too late", exc_info=True)

        try:
            call = self._bind(text, answer)
            self._calls.append(call)
            run = functools.partial(contextvars.copy_context().run, self._serve, call, pause)
            threading.Thread(target=run, name="jupyter_exec tool", daemon=True).start()
        except TypeError as error:
            answer(tool_failure(error, ""))
        except (JupyterExecError, RuntimeError) as error:  # or there are too many threads
            answer(tool_failure(ToolError(str(error)), ""))
        return True

    def _bind(self, text: str, answer: Callable[[str], None]) -> ToolCall:
        self._weight += json_weight(text[: MAX_TOOL_JSON + 1])
        if len(text) > MAX_TOOL_JSON or self._weight > MAX_JSON:
            raise ToolError("The arguments of this cell's tool calls are too large.")
        request = json_object(text, "call of a tool")
        name, args, kwargs = text_of(request.get("name")), request.get("args"), request.get("kwargs")
        if not (name in self._tools.functions and isinstance(args, list) and isinstance(kwargs, dict)):
            raise ToolError("There is no such tool.")
        return ToolCall(self._tools, name, self._tools.functions[name][1].bind(*args, **kwargs), answer)

    def _serve(self, call: ToolCall, pause: Pause) -> None:
        _TOOL_CALLS.set((*_TOOL_CALLS.get(), call))
        timeout, timer = self._tools.timeout, None
        try:
            with self._slots:
                if call.ended:
                    return
                with pause():
                    call.check_approved()
                with self._lock:
                    if call.ended:
                        return
                    call.status, call.started = "unanswered", time.monotonic()
                if timeout is not None and timeout < threading.TIMEOUT_MAX:
                    late = TimeoutError(f"{call.name} has taken more than {timeout:g} s")
                    timer = threading.Timer(timeout, self._end, (call, "timeout", tool_failure(late, call.name)))
                    timer.daemon = True
                    timer.start()
                self._end(call, "ok", call.run())
        except BaseException as error:
            self._end(call, "refused" if isinstance(error, ToolRefused) else "error", tool_failure(error, call.name))
        finally:
            if timer:
                timer.cancel()

    def _end(self, call: ToolCall, status: str | None, content: str) -> None:
        """End a call and send its answer; without a status, send none, since nobody waits for it."""
        with self._lock:
            if call.ended:
                return
            call.ended, call.status = True, status or call.status
            call.seconds = time.monotonic() - call.started if call.started else 0.0
        if status:
            call.answer(content)
        if status in (None, "timeout"):
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                call.cancel()

    def close(self) -> list[Json]:
        """Drop what is not answered yet, and return the `calls` of the cell's result."""
        for call in self._calls:
            self._end(call, None, "")
        return [
            {"name": call.name, "arguments": dict(call.bound.arguments), "status": call.status, "seconds": call.seconds}
            for call in self._calls
        ]


def calls_note(calls: Sequence[Json]) -> str:
    """Return a sentence about the tool calls of a cell, so that nobody makes them twice."""
    counts: dict[str, Counter[str]] = {}  # status -> how often each call was made
    for call in calls:
        arguments = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in call["arguments"].items())
        counts.setdefault(call["status"], Counter())[f"{call['name']}({arguments})"] += 1
    parts = []
    for status, same in counts.items():
        shown = [text + f" ({count} times)" * (count > 1) for text, count in same.items()]
        parts.append(f"{status}: {', '.join(shown[:20])}" + f" and {len(shown) - 20} more" * (len(shown) > 20))
    return f"Tool calls of this cell: {'; '.join(parts)}" if parts else ""


# ======================================================================================================
# 15. Files and variables of a kernel
# ======================================================================================================


@dataclass(frozen=True)
class FarFile:
    """An entry of a directory where a kernel runs. Code there may choose any name: never use it here as a path."""

    name: str
    size: int  # bytes
    modified: float  # seconds since 1970
    kind: str  # "file", "directory", "link" or "other"


Progress = Callable[[int, "int | None"], object]
_STRANGE = "The other side gives a strange answer."
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


def kernel_step(order: Json, data: str, names: Json) -> Any:
    """Take a step in a kernel, to which this source is sent; returns JSON and bytes, both in base64.

    That is the text/plain of an object: a user's way to show strings does not matter.
    """
    order["bytes"] = base64.b64decode(data)
    start = sys.modules["IPython"].get_ipython().starting_dir
    answer = variable_step(order, names) if order["step"] in ("set", "get") else far_step(order, start)
    more = answer.pop("bytes", b"")
    text = " ".join(base64.b64encode(part).decode() for part in (json.dumps(answer).encode(), more))
    return type("Answer", (), {"_repr_mimebundle_": lambda *_, **__: {"text/plain": text}})()


def variable_step(order: Json, names: Json) -> Json:
    """Take a piece of {name: value} in JSON ("set"), or give one of a value ("get"); keep the rest for the next."""
    kept = vars(sys).setdefault("_jupyter_exec", {})
    key, offset, size, name = order["key"], order["offset"], order["size"], order["path"]
    text: Any = kept.pop(key, None)
    try:
        if order["step"] == "set":
            text = text if offset else bytearray()
            text += order["bytes"]
            if len(text) < size:
                kept[key] = text
            else:
                names.update(json.loads(text.decode("utf-8", "surrogatepass")))
            return {}
        if not offset:
            if name not in names:
                return {"error": "the kernel has none of that name"}
            text = json.dumps(names[name], ensure_ascii=False, default=to_json).encode("utf-8", "surrogatepass")
        if offset + size <= len(text) <= order["limit"]:
            kept[key] = text
        return {"size": len(text), "bytes": text[offset : offset + size]}
    except Exception as error:
        return {"error": f"it is no JSON in the kernel. {type(error).__name__}: {error}"}
    finally:
        kept or vars(sys).pop("_jupyter_exec", None)


@functools.cache  # it is read from the file
def _kernel_program() -> str:
    steps: list[Callable[..., Any]] = [kernel_step, variable_step, to_json]
    steps += [far_step, far_open, far_read, far_write, far_finish, far_list]
    modules = "import base64, contextlib, errno, json, os, stat, sys"
    try:
        return functions_source(steps, modules, "from dataclasses import fields, is_dataclass")
    except ValueError:
        raise JupyterExecError("This program is frozen, without the source that the kernel would need.") from None


def check_python(kernel: KernelClient, what: str) -> None:
    """Raise JupyterExecError for a kernel that says to be of another language."""
    if kernel.language.lower() not in ("", "python"):
        raise JupyterExecError(f"The kernel runs {kernel.language}, and only Python kernels can {what}.")


def ask_kernel(kernel: KernelClient, order: Json, data: bytes, on_output: OutputHook | None) -> Json:
    """Take a step in an idle Python kernel, by an expression that leaves no trace there; returns {"result", "bytes"}.

    `on_output` hears what threads of earlier cells print meanwhile.

    Raises: JupyterExecError.
    """
    check_python(kernel, "do this")
    program = _kernel_program()
    arguments = f"{order!r}, {base64.b64encode(data).decode()!r}, names"
    # The user may have given any name to something else: so this uses none.
    builtins = "().__reduce_ex__(2)[0].__globals__['__builtins__']"
    run = f"(lambda built, own, names: built['exec']({program!r}, own) or own['kernel_step']({arguments}))"
    expression = f"{run}({builtins}, {{'__builtins__': {builtins}}}, (lambda: 0).__globals__)"
    hooks = Hooks(on_output)
    result = kernel.execute("", TRANSFER_TIMEOUT, hooks, silent=True, store_history=False, expression=expression)
    if result.status != "ok":
        raise KernelError(result.note or "The kernel did not answer.")
    text = text_of(part_of(result.value, "data", "text/plain"))
    found = re.fullmatch(r"([A-Za-z0-9+/=]*) ([A-Za-z0-9+/=]*)", text)
    if not found:
        says = clean_text(text_of(part_of(result.value, "evalue")))
        raise JupyterExecError(f"The kernel did not do it. {says[:STDERR_TAIL]}")
    try:
        head, data = (base64.b64decode(part, validate=True) for part in found.groups())
    except ValueError:
        raise ProtocolError(_STRANGE) from None
    return {"result": json_object(head, "answer of the kernel"), "bytes": data}


class FarFiles:
    """The files where a kernel runs, or its variables; `far_step` or `kernel_step` is the other side.

    `ask` sends an order, `check()` raises if a transfer is no longer wanted. Raises: FileTransferError in each method.
    """

    def __init__(self, ask: AskFar, piece: int, window: int, check: Callable[[], None]) -> None:
        self._ask, self._check = ask, check
        self.piece, self._window = piece, window  # bytes of a piece; how many pieces may be on their way

    def _send(self, step: str, path: str, data: bytes = b"", **parameters: object) -> queue.SimpleQueue[Json]:
        self._check()
        answers: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._ask({"step": step, "path": path, **parameters}, data, answers.put)
        return answers

    def _wait_for(self, path: str, answers: queue.SimpleQueue[Json]) -> Json:
        """Wait for the answer to an order."""
        deadline = Deadline(TRANSFER_TIMEOUT)
        while not deadline.expired:
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=deadline.within(TRANSFER_CHECK))
                if "error" in answer:
                    raise _host_error(answer)
                result = answer.get("result")
                if not isinstance(result, dict):
                    raise ProtocolError(_STRANGE)
                if "error" in result:
                    code = host_text(result.get("code"))
                    raise FileTransferError(path, clean_text(host_text(result["error"])), code)
                return result | {"bytes": answer.get("bytes", b"")}
            self._check()
        raise FileTransferError(path, f"nothing was heard for {TRANSFER_TIMEOUT:g} s")

    def step(self, step: str, path: str, data: bytes = b"", **parameters: object) -> Json:
        return self._wait_for(path, self._send(step, path, data, **parameters))

    def write(self, path: str, pieces: Iterable[bytes], done: Callable[[int], None]) -> None:
        """Make a file of pieces; it appears when it is complete. `done(size)`: so many bytes have arrived."""
        part = f".{random_name('.part')}"
        waiting: deque[tuple[queue.SimpleQueue[Json], int]] = deque()

        def settle(count: int) -> None:
            while len(waiting) > count:
                answers, end = waiting.popleft()
                self._wait_for(path, answers)
                done(end)

        try:
            end = 0
            for piece in pieces:
                begin, end = end, end + len(piece)
                waiting.append((self._send("write", path, piece, part=part, offset=begin), end))
                settle(self._window - 1)
            settle(0)
            self.step("finish", path, part=part)
        except BaseException:
            self._check = lambda: None
            with contextlib.suppress(JupyterExecError):  # if nobody is there, there is nothing to remove
                self._send("drop", path, part=part)
            raise

    def read(
        self, path: str, max_bytes: int, step: str = "read", **parameters: Any
    ) -> Iterator[tuple[bytes, int, int]]:
        """Yield a file in pieces, each with its end and the size of the whole as known then."""
        waiting: deque[queue.SimpleQueue[Json]] = deque()
        asked = got = size = 0
        identity, is_end = None, False
        while not is_end:
            while not waiting or (len(waiting) < self._window and asked < size):
                waiting.append(self._send(step, path, offset=asked, size=self.piece, limit=max_bytes, **parameters))
                asked += self.piece
            answer = self._wait_for(path, waiting.popleft())
            piece, now, identity = answer["bytes"], answer.get("size"), identity or answer.get("file")
            if not isinstance(now, int) or now < 0 or len(piece) > self.piece:
                raise ProtocolError(_STRANGE)
            if answer.get("file") != identity:
                raise FileTransferError(path, "it was replaced by another while it was read")
            got, is_end = got + len(piece), len(piece) < self.piece
            size = max(size, now, got)
            if size > max_bytes:
                raise FileTransferError(path, f"it is larger than max_bytes={max_bytes}: {size} bytes", "EFBIG")
            if is_end and size > got:
                raise FileTransferError(path, "it became shorter while it was read")
            yield piece, got, size

    def entries(self, path: str) -> list[FarFile]:
        entries = self.step("list", path, limit=MAX_LISTED).get("entries")
        if not isinstance(entries, list) or len(entries) > MAX_LISTED:
            raise ProtocolError(_STRANGE)
        return sorted(map(_far_file, entries), key=lambda entry: entry.name)


def _far_file(entry: Any) -> FarFile:
    if not isinstance(entry, list) or list(map(type, entry)) != [str, int, int, float]:
        raise ProtocolError(_STRANGE)
    name, mode, size, modified = entry
    if not (0 <= mode < 2**32 and 0 <= size < 2**64 and abs(modified) < 2**64):
        raise ProtocolError(_STRANGE)
    return FarFile(name, size, modified, _KINDS.get(stat.S_IFMT(mode), "other"))


@contextlib.contextmanager
def transfer_errors(far: str, here: Any = "") -> Iterator[None]:
    """Turn all errors that a transfer may meet into FileTransferError."""
    try:
        yield
    except FileTransferError:
        raise
    except JupyterExecError as error:
        raise FileTransferError(far, str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path, a file that is closed
        number, says = getattr(error, "errno", None), getattr(error, "strerror", None)
        path, code = str(here or "as given"), errno.errorcode.get(number or 0, "")
        raise FileTransferError(path, says or str(error), code, True) from error


def file_pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield a binary file in pieces, at least one. Raises: TypeError for a file of text."""
    is_first = True
    while (piece := file.read(size)) or is_first:
        if not isinstance(piece, bytes):
            raise TypeError("source must be a path, bytes or a binary file that waits for its data.")
        yield piece
        is_first = False


def source_file(source: Any) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open what is to be uploaded. Raises: TypeError, OSError."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return contextlib.nullcontext(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path, bytes or a binary file, not {type(source).__name__}.")
    return open(source, "rb")


def size_of(file: IO[bytes]) -> int | None:
    """Return how many bytes a file has left, None if it cannot tell."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        at = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(at)
        return end - at
    return None


@contextlib.contextmanager
def target_file(target: AnyPath) -> Iterator[IO[bytes]]:
    """Give a file to write to, which takes the place of `target` once it is complete. Raises: OSError."""
    path = Path(target).absolute()
    if not path.parent.is_dir():
        raise OSError(errno.ENOENT, f"There is no directory {path.parent}")
    with contextlib.closing(Folder(path.parent)) as folder, folder.replace(path.name) as file:
        yield file


def write_all(file: Any, data: bytes) -> None:
    """Write to a file, a raw one included."""
    view = memoryview(data)
    while view:
        written = file.write(view)
        view = view[len(view) if written is None else written :]


def tell_progress(hook: Progress | None, total: int | None, done: int) -> None:
    """Tell a hook how far a transfer is."""
    try:
        if hook:
            hook(done, total)
    except Exception:
        logger.warning("on_progress raised; the transfer goes on", exc_info=True)


# ======================================================================================================
# 16. Code executor
# ======================================================================================================


@dataclass
class CodeBlock:
    """A piece of code and the language that its fence named; "" is the kernel's own."""

    code: str
    language: str = ""


@dataclass
class CodeResult:
    """What a list of code blocks did, in AutoGen's shape.

    `output` is the text of the blocks joined with newlines, `output_files` absolute paths; `kernel_state` says
    whether the variables survived: "intact", "lost", or "busy" (the code still runs). `status` and `note` are those of
    the last block that ran: see ExecutionResult.
    """

    exit_code: int
    output: str
    output_files: list[str] = field(default_factory=list)
    kernel_state: str = "intact"
    status: str = "ok"
    note: str = ""

    def __str__(self) -> str:
        return f"exit_code={self.exit_code} output={self.output!r} output_files={self.output_files!r}"


IPythonCodeResult = CodeResult

_FENCE = re.compile(r" *(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)")
_LIST_ITEM = re.compile(r" *(?:[-+*]|\d{1,9}[.)]) {1,4}(?=\S)")
_LANGUAGE = re.compile(r"[{.\s]*([^\s,{}]*)")  # also Pandoc's {.python .numberLines}


class MarkdownCodeExtractor:
    """Finds the fenced code blocks of a message."""

    def extract_code_blocks(self, message: str | Sequence[Mapping[str, Any]] | None) -> list[CodeBlock]:
        """Return the blocks in order; `message` is text, a list of message parts, or None.

        The language is the first word of the info string. Without one it is guessed, as AutoGen does: "sh" for what
        begins with pip or python, "python" for what compiles, else "".

        Raises: ValueError for a part of unknown type.

        Spec: https://spec.commonmark.org/0.31.2/#fenced-code-blocks
        """
        return [block for text in _message_texts(message) for _, _, block in fenced_blocks(text)]


_OTHER_PARTS: tuple[str, ...] = ("image_url", "input_image", "image", "function", "tool_call", "tool_calls")
_OTHER_PARTS += ("apply_patch_call", "shell_call")


def _message_texts(message: str | Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    if message is None or isinstance(message, str):
        yield message or ""
        return
    for part in message:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text"):
            yield str(part.get("text") or "")
        elif kind not in _OTHER_PARTS:
            raise ValueError(f"Wrong content format: unknown type {kind} within the content")


def fenced_blocks(text: str) -> Iterator[tuple[int, str, CodeBlock]]:
    """Yield (number of the line at which the code begins, info string, block) of each fenced block of a text."""
    lines = enumerate(re.split(r"\r\n|\n|\r", text), 1)
    offsets, in_comment = [0], False  # the columns at which the contents of the list items around begin
    for number, line in lines:
        line, start = line.expandtabs(4), 0
        indent = len(line) - len(line.lstrip(" "))
        while line.strip() and indent < offsets[-1]:
            offsets.pop()
        if in_comment or (line.startswith("<!--", indent) and indent - offsets[-1] <= 3):
            in_comment = "-->" not in line
            continue
        while item := _LIST_ITEM.match(line, start):
            start = item.end()
            offsets.append(start)
        line = " " * start + line[start:]
        indent, offset = max(indent, start), offsets[-1]
        opening = _FENCE.fullmatch(line)
        # "... preceded by up to three spaces of indentation"
        if opening and indent - offset <= 3:
            code = "\n".join(_fenced_lines(lines, opening["fence"], indent, offset))
            language = _LANGUAGE.findall(opening["info"])[0] or _guessed_language(code)
            yield number + 1, opening["info"], CodeBlock(code, language)


def _guessed_language(code: str) -> str:
    if code.startswith(("python ", "python3 ", "pip")):
        return "sh"
    try:
        compile(code, "<block>", "exec", dont_inherit=True)
    except Exception:  # by hostile text also MemoryError, RecursionError
        return ""
    return "python"


def _fenced_lines(lines: Iterator[tuple[int, str]], fence: str, indent: int, offset: int) -> Iterator[str]:
    # "... until a closing code fence of the same type as the code block began with ..., and with at least as
    # many backticks or tildes"; "If the end of the containing block (or document) is reached ..., the code
    # block contains all of the lines after the opening code fence until the end"
    closing = re.compile(rf" {{0,{offset + 3}}}{fence[0]}{{{len(fence)},}}[ \t]*")
    for _, line in lines:
        if closing.fullmatch(line):
            return
        # "If the leading code fence is preceded by N spaces of indentation, then up to N spaces of indentation
        # are removed from each line of the content"
        yield _dedent(line, indent)


def _dedent(line: str, columns: int) -> str:
    """Remove up to `columns` columns of white space; of a tab that reaches farther, the rest stays as spaces."""
    column = position = 0
    while column < columns and line[position : position + 1] in (" ", "\t"):
        column += 4 - column % 4 if line[position] == "\t" else 1
        position += 1
    return " " * (column - columns) + line[position:]


class Journal:
    """The cells of a session, kept on disk for `save_notebook`: one line of JSON each."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0
        self._trouble = ""  # why cells are missing
        self._lock = threading.Lock()

    def add(self, code: str, result: ExecutionResult) -> None:
        """Keep a cell. If that fails, as on a full disk, the notebook lacks the cell, but its result is not lost."""
        try:
            cell = notebook_cell(code) | {"execution_count": result.execution_count}
            line = dump_json(cell | {"outputs": notebook_outputs(result.outputs, result.note)}) + b"\n"
            if self._size + len(line) > MAX_FILE_BYTES:
                outputs = notebook_outputs([], "The outputs of this cell were not kept: too large")
                line = dump_json(cell | {"outputs": outputs}) + b"\n"
            with self._lock:
                if self._file is None:
                    import tempfile

                    self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the executor
                    weakref.finalize(self, self._file.close)
                self._file.seek(self._size)
                self._file.write(line)
                self._file.flush()
                self._size += len(line)
        except (OSError, ValueError, RecursionError) as error:
            self._trouble = str(error)
            logger.warning("A cell is not kept for the notebook: %s", error)

    def write(self, file: IO[bytes], metadata: Json) -> None:
        """Write a notebook. Spec: https://nbformat.readthedocs.io/en/latest/format_description.html"""
        head = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata}
        file.write(dump_json(head)[:-1] + b',"cells":[\n')
        left, comma = self._size, b""
        with self._lock:
            if self._file:
                self._file.seek(0)
                while left > 0:
                    line = self._file.readline()
                    file.write(comma + line)
                    left, comma = left - len(line), b","
        if self._trouble:
            source = f"Cells are missing here, since they could not be kept: {self._trouble}"
            cell = {"cell_type": "markdown", "id": "missing", "metadata": {}, "source": source}
            file.write(comma + dump_json(cell))
        file.write(b"]}\n")


def notebook_cell(source: str, kind: str = "code", metadata: Json | None = None) -> Json:
    """Return a cell of nbformat 4.5 that has not run."""
    cell: Json = {"cell_type": kind, "id": os.urandom(4).hex(), "metadata": metadata or {}, "source": source}
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


_JSON_TYPE = re.compile(r"application/(.*\+)?json")  # as nbformat's schema has it


def notebook_outputs(outputs: Iterable[Json], note: str) -> list[Json]:
    """Return the outputs of a cell as nbformat allows them, with the note about it as the last."""
    shown = [dict(output) for output in outputs]
    for output in filter(lambda output: "data" in output, shown):
        output["data"] = {  # a MIME value is a string unless the type is JSON
            mime: value if isinstance(value, str) or _JSON_TYPE.fullmatch(mime) else json.dumps(value)
            for mime, value in output["data"].items()
        }
    return [*shown, *[{"output_type": "stream", "name": "stderr", "text": note}] * bool(note)]


_PYTHON_NAMES = re.compile(r"i?py(thon)?[\d.]*")
_SHELLS = {"bash": "bash", "shell": "bash", "sh": "sh"}
_QUIET = "-qq --disable-pip-version-check"  # errors stay visible
# A line of IPython that runs pip. What may only look like one is matched too, and left: strings, comments, shell lines.
_PIP_LINE = re.compile(
    r"""(?xms)
    ^(?P<indent>[ \t]*)[!%][ \t]*pip3?[ \t]+install\b
    | ^[ \t]*(?:!|%\w)[^\n]*
    | (?P<quotes>\'{3}|"{3})(?:\\.|.)*?(?:(?P=quotes)|\Z)
    | \'(?:\\.|[^\'\\\n])*
    | "(?:\\.|[^"\\\n])*"?
    | \#[^\n]*
    """
)
_STOPPED = "The executor was stopped: make a new one."
_BUSY = "The kernel is busy: an earlier cell is still running, so this code was not run; wait() waits for that cell"
_NOT_BEGUN = "Interrupted before it began: the code was not run"
_FRESH = "The kernel was restarted while this call waited: it is fresh, all earlier variables are lost"
_TEXT_CELL = re.compile(r"\s*%%(?!time|capture)")  # %%writefile, %%html, ...: what follows is no Python


def _silence_pip(code: str) -> str:
    if "pip" not in code or _TEXT_CELL.match(code):
        return code
    install = f"""!"{{__import__('sys').executable}}" -m pip install {_QUIET}"""

    def silenced(line: re.Match[str]) -> str:
        if line["indent"] is None:
            return line[0]
        # If IPython cannot expand a `$` of the shell's, it leaves the whole line as it is, with our braces.
        has_dollar = "$" in code[line.end() :].partition("\n")[0]
        return line["indent"] + (f"%pip install {_QUIET}" if has_dollar else install)

    return _PIP_LINE.sub(silenced, code)


def run_shell(shell: str, script: str, pip_options: str) -> None:
    """Run a script in the kernel, to which this source is sent: IPython's %%bash as it should be.

    Raises: CalledProcessError with the exit status, without a traceback.
    """
    import shlex

    command, python, directory = "", shlex.quote(sys.executable), os.path.dirname(sys.executable)
    path = directory + os.pathsep + os.environ.get("PATH", os.defpath)
    for name in ("python", "python3", "pip", "pip3"):
        is_pip, is_there = "pip" in name, os.path.exists(os.path.join(directory, name))
        own = f'command {name} "$@"'
        if not is_there:  # that of another Python would be found; but one that the script has activated is meant
            own = f'if [ "$PATH" = {shlex.quote(path)} ]; then {python}{" -m pip" * is_pip} "$@"; else {own}; fi'
        quiet = f'[ "${{1-}}" != install ] || set -- "$@" {pip_options}; ' * is_pip
        if is_pip or not is_there:
            command += f"{name}() {{ {quiet}{own}; }}; "
    command += '. "$0"'
    with tempfile.TemporaryFile() as file:  # an argument has 128 KB at most; from stdin, commands would read the script
        file.write(script.encode("utf-8", "replace"))
        file.seek(0)
        # Of four one is none of 0 to 2, which may be free here: in the script they are its own streams.
        held = [os.dup(file.fileno()) for _ in range(4)]
        try:
            process = subprocess.Popen(
                [shell, "-c", command, f"/dev/fd/{max(held)}"],
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[max(held)],
                start_new_session=True,
            )
            status = follow_shell(process)
        except FileNotFoundError:
            print(f"There is no {shell} where the kernel runs.", file=sys.stderr)
            status = 127
        finally:
            for descriptor in held:
                os.close(descriptor)
    if status:
        error = subprocess.CalledProcessError(status, shell)
        vars(error)["_render_traceback_"] = list  # IPython asks for it
        raise error


def follow_shell(process: subprocess.Popen[bytes]) -> int:
    """Show both streams as they come, and return the exit status when the script ends; sent with `run_shell`.

    An interrupt ends all that the script has started. What it has left in the background goes on, with its output.
    """
    selector = selectors.DefaultSelector()
    for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        selector.register(pipe or 0, selectors.EVENT_READ, (decoder, stream, pipe))

    def show(seconds: float, in_background: bool = False) -> None:
        end, last = time.monotonic() + seconds, False
        while selector.get_map() and not last:
            # What the script wrote before its end is in the pipe, and one read takes all that a pipe holds.
            last = not in_background and (process.poll() is not None or time.monotonic() > end)
            for key, _ in selector.select(0 if last else 0.05):
                decoder, stream, pipe = key.data
                data = os.read(key.fd, 65536)
                stream.write(decoder.decode(data, not data))
                stream.flush()
                if not data:
                    selector.unregister(pipe)
                    pipe.close()

    try:
        show(float("inf"))
        process.wait()
    except KeyboardInterrupt:
        # A second interrupt would end this loop, and so save a script that ignores the first.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            show(0.5)
        signal.signal(signal.SIGINT, handler)
    if selector.get_map():
        threading.Thread(target=show, args=(0, True), daemon=True).start()
    else:
        selector.close()
    status = process.poll()
    return 130 if status is None else status if status >= 0 else 128 - status


def shell_of(code: str, language: str) -> str:
    """Return the shell that runs a block; "" if it is no shell script: code that begins with ! or % is IPython's."""
    return "" if code.lstrip()[:1] in ("!", "%") else _SHELLS.get(language, "")


def cell_of(block: Any, kernel_name: str, kernel_language: str) -> tuple[str, str]:
    """Return the cell that runs a code block in a kernel of that name and language, and the cell for a notebook.

    The two differ only for a shell script.

    Raises: ValueError for a language that the kernel does not speak.
    """
    code, language = str(block.code), str(block.language or "").strip().lower()
    kernel_language = kernel_language or "python"  # a kernel that does not say
    speaks_python = kernel_language.lower() == "python"
    if speaks_python and (shell := shell_of(code, language)):
        script = code.replace("\r\n", "\n")
        shown = f"%%{shell}\n{script}"
        modules = "codecs, contextlib, os, selectors, signal, subprocess, sys, tempfile, threading, time"
        try:
            program = functions_source((follow_shell, run_shell), f"import {modules}")
        except ValueError:  # a frozen program without source files: IPython's own way, with its flaws
            return shown, shown
        program += f"run_shell({shell!r}, {script!r}, {_QUIET!r})"
        return f"__import__('builtins').exec({program!r}, {{}})", shown
    own = {"", kernel_language.lower(), kernel_name.lower(), *(_SHELLS if speaks_python else ())}
    if language in own or (speaks_python and _PYTHON_NAMES.fullmatch(language)):
        cell = _silence_pip(code) if speaks_python else code
        return cell, cell
    others = " or bash" if speaks_python else ""
    raise ValueError(f"The kernel runs {kernel_language}{others}, not {block.language}: the block was not run.")


INSTALL = "Install packages with `%pip install NAME`."
CODE_WRITER_SYSTEM_MESSAGE = f"""\
You can run Python code in a Jupyter kernel by writing it in a fenced code block that starts with ```python.
The kernel keeps its state: variables, imports and functions of earlier blocks are there in later ones, so write small
blocks, one step at a time, and never repeat what has already run. After an error only the failing block has to be
corrected and run again. The value of a block's last expression is shown, and so is what it prints.
Plots and other pictures come back as paths of files: call plt.show(). {INSTALL}
Shell commands go into a block that starts with ```sh. The code cannot ask for input.
If the reply says that all variables are lost, the kernel is fresh: run again what you need.
"""
TOOLS_MESSAGE = """\
These functions are there, too. They run outside of the kernel: arguments and results are JSON. Await those with
`async def`; many calls at once are faster (asyncio.gather, or threads). `help(NAME)` tells more.

"""


def system_message_for(functions: Sequence[Callable[..., Any]], tools: Tools, server: Any) -> str:
    """Return CODE_WRITER_SYSTEM_MESSAGE with the signatures and docstrings of functions and tools."""
    text = CODE_WRITER_SYSTEM_MESSAGE
    if isinstance(server, DockerJupyterServer) and server.network == "none":
        text = text.replace(INSTALL, "There is no network: use the packages that are installed.")
    lines = [
        f"    {function.__name__}{inspect.signature(function)}: {inspect.getdoc(function) or ''}".rstrip(" :")
        for function in functions
    ]
    text = "\n".join([text + "These functions are defined already:" * bool(lines), *lines])
    if not tools.functions:
        return text
    text = f"{text.rstrip()}\n{TOOLS_MESSAGE}"
    return text + tools.describe(8000 - len(text))


class _UserCapability:
    """AutoGen 0.2.13 to 0.2.18: tells an agent how to write code for the executor."""

    def __init__(self, message: str) -> None:
        self._message = message

    def add_to_agent(self, agent: Any) -> None:
        agent.update_system_message(agent.system_message + self._message)


class NotRun(JupyterExecError):
    """A call gave up its turn before its code was run; `result` says why."""

    def __init__(self, result: ExecutionResult) -> None:
        super().__init__(result.note)
        self.result = result


# In a thread that makes an awaited call: `is_unwanted()` is True if that was cancelled.
_AWAITED_CALL = threading.local()


def _is_unwanted() -> bool:
    return getattr(_AWAITED_CALL, "is_unwanted", bool)()


class Turns:
    """A re-entrant lock that threads get in the order in which they ask; one that evicts the holder is next."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check()` raises in a thread that must not wait, since the holder waits for it."""
        self._check = check
        self._changed, self._pid = threading.Condition(), os.getpid()
        # Of the tasks of a coroutine hook: true while the cells' thread waits for that.
        self.in_hook: contextvars.ContextVar[Sequence[bool]] = contextvars.ContextVar("in_hook", default=())
        self._queue: list[object] = []  # jobs, and an object for each other call; it is the turn of the first one
        self._thread = 0  # id of the holder: the thread that has the lock; 0: none has
        self._evictions = self._evictions_before = 0  # how many calls that evict came, by now and before this turn
        self.overtaken = False  # whether such a call went before the holder while that waited
        self.interrupted = False  # whether the holder is to begin no more cells
        self.closed = False  # nobody gets the lock any more, except to evict

    @contextlib.contextmanager
    def turn(self, evict: Callable[[], None] | None = None, job: Job | None = None) -> Iterator[None]:
        """Wait until it is the caller's turn. With `evict` that is the next; it is called until the holder leaves.

        Raises: JupyterExecError if the lock is closed; NotRun if the holder was detached, or `job` was interrupted.
        What goes wrong with the kernel while it is taken from the holder becomes a KernelError that says so.
        """
        if self.mine or os.getpid() != self._pid:  # in a forked child no holder leaves; sending says what is wrong
            yield
            return
        place = job or object()
        since = job.since if job else self.come(place, evict is not None)
        try:
            while evict and self._queue[0] is not place:
                evict()
                with self._changed:
                    self._changed.wait_for(lambda: self._queue[0] is place, 0.2)  # seconds to the next attempt
            with self._changed:
                while self._queue[0] is not place or (self.closed and not evict):
                    self._check_patience(job)
                    self._changed.wait()
                self.overtaken, self._thread = since != self._evictions, threading.get_ident()
                self._evictions_before, self.interrupted = self._evictions, False
            try:
                yield
            except (KernelError, ConnectionClosed) as error:
                if not self.eviction:
                    raise
                raise KernelError(self.eviction) from error
        finally:
            if self.mine:
                self._thread = 0
            self.leave(place)

    @property
    def mine(self) -> bool:
        """Whether the calling thread is the holder."""
        return self._thread == threading.get_ident()

    @property
    def eviction(self) -> str:
        """What takes the kernel from the holder; "" if nothing does."""
        if self._evictions == self._evictions_before:
            return ""
        what = "executor was stopped" if self.closed else "kernel was restarted"
        return f"The {what} while the code ran; all variables are lost"

    def come(self, place: object, evicts: bool = False) -> int:
        """Join the queue: `place` is a job, or any object for another call. Return how many evictions there were."""
        if not evicts:
            self._check()
        with self._changed:
            self._evictions += evicts
            self._queue.insert(1 if evicts else len(self._queue), place)
            return self._evictions

    def is_of(self, place: object) -> bool:
        """Whether it is the turn of a job."""
        return self._queue[:1] == [place]

    def leave(self, place: object) -> None:
        with self._changed:
            self._queue.remove(place)
            self._changed.notify_all()

    def wake(self) -> None:
        """Have each waiting thread check whether it is still to wait."""
        with self._changed:
            self._changed.notify_all()

    def _check_patience(self, job: Job | None) -> None:
        """Raise if the calling thread is to wait no longer."""
        first = self._queue[0]
        if self.closed or _is_unwanted():
            raise JupyterExecError(_STOPPED)
        if job and job.interrupted:
            raise NotRun(_not_begun())
        if isinstance(first, Job) and first.detached and not (job and job.patient):
            raise NotRun(ExecutionResult("error", 1, "busy", _BUSY, []))


def _not_begun() -> ExecutionResult:
    return ExecutionResult("interrupted", 130, "intact", _NOT_BEGUN, [])


def _text_so_far(result: ExecutionResult | None) -> str:
    return render(result.outputs, result.note * (result.status != "running")) if result else ""


def check_hooks(**hooks: object) -> None:
    """Raise ValueError unless hooks are plain functions, or None."""
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise ValueError(f"{name} must be a function, not {hook!r}.")
        if inspect.iscoroutinefunction(hook):
            raise ValueError("Hooks must be plain functions; AsyncJupyterCodeExecutor takes coroutine functions, too.")


class CellCall:
    """A call that runs one cell or, if `language` is given, one code block. It saves no pictures.

    If `timeout` or a hook (see Hooks) is None, the executor's own is used.
    """

    def __init__(self, code: str, timeout: float | None = None, *, language: str | None = None, **hooks: Any) -> None:
        if not isinstance(code, str):
            raise TypeError("code must be a string; execute_code_blocks takes code blocks.")
        if timeout is not None:
            check_seconds(timeout=timeout)
        check_hooks(**hooks)
        self._code, self._timeout, self._language = code, timeout, language
        self._hooks = {name: hook for name, hook in hooks.items() if hook}

    def run(self, executor: JupyterCodeExecutor, job: Job | None) -> ExecutionResult:
        if self._language is not None:
            block = CodeBlock(self._code, self._language)
            return executor._run_block(block, self._timeout, job, **self._hooks)
        executor._make_ready()
        return executor._run_cell(self._code, self._code, self._timeout, job, **self._hooks)

    def so_far(self, result: ExecutionResult) -> ExecutionResult:
        """Return what the call has done by now; `result` is that of its running cell, or says why it was not run."""
        return result

    def text(self, result: ExecutionResult | None) -> str:
        """Return the text so far; `result` is that of its latest cell."""
        return _text_so_far(result)


class BlocksCall:
    """A call that runs code blocks, up to the first that fails, and makes their results one."""

    def __init__(self, code_blocks: Any, folder: Folder, limit: int | None, timeout: float | None = None) -> None:
        if isinstance(code_blocks, str) or hasattr(code_blocks, "code"):
            code_blocks = [CodeBlock(code_blocks) if isinstance(code_blocks, str) else code_blocks]
        self._blocks = list(code_blocks) if isinstance(code_blocks, Iterable) else [None]
        if not all(hasattr(block, "code") and hasattr(block, "language") for block in self._blocks):
            raise TypeError("code_blocks must be a list of objects with the attributes code and language.")
        if timeout is not None:
            check_seconds(timeout=timeout)
        self._folder, self._limit, self._timeout = folder, limit, timeout
        self._files = CallFiles(folder, limit)
        nothing = ExecutionResult("ok", 0, "intact", "", [])
        self._ended: tuple[list[str], ExecutionResult] = [], nothing  # texts of the blocks, and the last's result
        self._gaps: list[int] = []

    def run(self, executor: JupyterCodeExecutor, job: Job | None) -> CodeResult:
        for block in self._blocks:
            result = executor._run_block(block, self._timeout, job, record=self._files.record)
            self._add(result)
            if result.status != "ok":
                break
        return self._total(self._files.close())

    def _add(self, result: ExecutionResult) -> None:
        note = "" if result.note == TRUNCATED else result.note  # the mark says more
        text = render(result.outputs, note, self._files.save)
        self._gaps += [result.missing] * result.truncated
        self._ended = [*self._ended[0], text], result  # in one step: another thread may be reading it

    def _total(self, where: str) -> CodeResult:
        texts, last = self._ended
        text = shorten("\n".join(texts), self._limit, self._gaps, where)
        return CodeResult(last.exit_code, text, self._files.paths, last.kernel_state, last.status, last.note)

    def so_far(self, result: ExecutionResult) -> CodeResult:
        copied = BlocksCall([], self._folder, self._limit)
        copied._ended, copied._gaps, copied._files.paths = self._ended, self._gaps[:], self._files.paths[:]
        copied._add(result)
        return copied._total("")

    def text(self, result: ExecutionResult | None) -> str:
        texts, last = self._ended
        return "\n".join([*texts, *[_text_so_far(result)] * (result is not last)])


class Job:
    """Code that runs in a thread of its own: what `submit` of an executor returns. It ends with its executor.

    `wait(seconds)` returns the result of the call once it has ended, else None.
    """

    def __init__(
        self, executor: JupyterCodeExecutor, call: CellCall | BlocksCall, *, patient: bool = False, loop: Any = None
    ) -> None:
        """`patient`: it waits for its turn even while the cell of a detached job runs. `loop` is the caller's."""
        self.patient, self.interrupted, self._loop = patient, False, loop
        self._call, self._limit = call, executor._max_output
        self._kernel, self._turns = executor._kernel, executor._turns
        self._cell: Cell | None = None  # the latest
        self.partial_result: Any = None  # the result so far, when its time was over
        self._result: Any = None
        self._error: BaseException | None = None
        self.answered, self.ended = threading.Event(), threading.Event()  # `answered`: ended or detached
        self._on_event: list[Callable[[], object]] = []
        self.since = self._turns.come(self)
        # In the context of the caller: hooks and tools see its variables, and which tool or hook it is itself.
        run = functools.partial(contextvars.copy_context().run, self._run, executor._worker())
        thread = threading.Thread(target=run, name="jupyter_exec job", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there are too many
            self._turns.leave(self)
            raise
        except BaseException:  # Ctrl-C: it may run already
            self.interrupt()
            raise

    def __repr__(self) -> str:
        return f"Job(status={self.status!r})"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.ended.is_set()

    @property
    def has_begun(self) -> bool:
        """Whether a cell of it was run."""
        return self._cell is not None

    @property
    def detached(self) -> bool:
        """Whether its time was over before it had ended."""
        return self.partial_result is not None

    @property
    def status(self) -> str:
        """One of "waiting" (for its turn or the kernel), "running", "done", "failed" (there was no kernel for it),
        and as in a result "interrupted", "timeout", "died", "exited".
        """
        if not self.done:
            return "running" if self._cell else "waiting"
        status = "failed" if self._error else self._result.status
        return {"ok": "done", "error": "done"}.get(status, status)

    @property
    def output(self) -> str:
        """The text so far, as it will stand in the result; head and tail of what is over `max_output` characters."""
        cell, result = self._cell, self._result
        if isinstance(result, CodeResult):
            return result.output
        return shorten(self._call.text(result or (cell.so_far() if cell else None)), self._limit)

    def wait(self, seconds: float | None = None) -> Any:
        """Return the result (of a string an ExecutionResult, of blocks a CodeResult), None if it takes longer.

        May be called from many threads, and again and again. Raises: as `execute` of the executor.
        """
        self._check_outside()
        if not self.ended.wait(Deadline(seconds).remaining):
            return None
        if self._error:
            raise self._error
        return self._result

    def _check_outside(self) -> None:
        """Raise JupyterExecError in a hook of its cell, which would wait for itself."""
        in_hook = self._turns.mine or self._turns.in_hook.get()
        if in_hook and self._turns.is_of(self) and not self.done:
            raise JupyterExecError("A hook cannot wait for the end of its own cell.")

    async def awaited(self, seconds: float | None) -> Any:
        """Like `wait`, in an event loop; leaving it does not end the job."""
        self._check_outside()
        await self.until(self.ended.is_set, seconds)
        return Job.wait(self, 0)

    def interrupt(self) -> None:
        """Interrupt it, from any thread; if it is not its turn yet, it will not run."""
        self.interrupted = True
        self._turns.wake()
        if self._cell or self._turns.is_of(self):  # or it waits for functions and startup code
            self._kernel.interrupt(self._cell)

    def begin(self, cell: Cell) -> None:
        self._cell = cell
        if self.interrupted:
            self._kernel.interrupt(cell)

    def detach(self, so_far: ExecutionResult) -> None:
        """Give the result so far to the call that waits for it: the time of the job is over."""
        answer = self._call.so_far(so_far)
        if not self.answered.is_set():
            self.partial_result = answer
            self._turns.wake()
            self._tell(self.answered)

    def _run(self, executor: JupyterCodeExecutor) -> None:
        try:
            with self._turns.turn(job=self):
                if self._loop and self._loop.is_running():
                    executor._tools.loop = self._loop
                self._result = self._call.run(executor, self)
        except NotRun as error:
            self._result = self._call.so_far(error.result)
        except BaseException as error:
            self._error = error
        del executor
        self._tell(self.ended)
        self._tell(self.answered)

    def _tell(self, event: threading.Event) -> None:
        event.set()
        for listener in list(self._on_event):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                listener()

    async def until(self, is_so: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait in an event loop until `is_so()`, but no longer than `seconds`."""
        import asyncio

        loop, changed, deadline = asyncio.get_running_loop(), asyncio.Event(), Deadline(seconds)
        listener = functools.partial(loop.call_soon_threadsafe, changed.set)
        self._on_event.append(listener)
        try:
            while not (is_so() or deadline.expired):
                changed.clear()
                waiting = asyncio.ensure_future(changed.wait())
                try:  # not wait_for, which loses a cancellation that comes with the event (before Python 3.12)
                    await asyncio.wait([waiting], timeout=deadline.remaining)
                finally:
                    waiting.cancel()
        finally:
            self._on_event.remove(listener)


_AnyJob = TypeVar("_AnyJob", bound=Job)


class ConnectionInfo(Protocol):
    """Where a Jupyter server is, in AutoGen's words."""

    host: str
    use_https: bool
    port: int | None
    token: str | None


class JupyterConnectable(Protocol):
    """AutoGen's servers, and any other object that says where a Jupyter server is."""

    @property
    def connection_info(self) -> ConnectionInfo: ...


AnyServer = JupyterServer | JupyterConnectable | ConnectionInfo | KernelConnection | AnyPath


def _end_forgotten(kernel: KernelClient, owner: int) -> None:
    if os.getpid() == owner and kernel.alive and not kernel.ended:  # in a forked child it is the parent's
        # Not in this thread: the garbage collector may have stopped it in the middle of anything.
        why = "nobody refers to its executor any more"
        threading.Thread(target=kernel.give_up, args=(why,), daemon=True).start()
        warnings.warn("A JupyterCodeExecutor was forgotten, not stopped; its kernel is ended.", ResourceWarning, 2)


class JupyterCodeExecutor(Stoppable):
    """Runs code blocks in a Jupyter kernel of its own, whose variables live from block to block and call to call.

    `jupyter_server` is a server object of this module, a JupyterConnectionInfo or an object that has one, or the
    path of a connection file (or a KernelConnection) to attach to a running kernel. `timeout` is the wall clock of
    one block in seconds; pictures and other files are written to `output_dir`. `on_output(output)` gets every output
    as it comes, in the shape of nbformat; what a thread prints after its cell has ended is marked "late".
    `on_input(prompt, password)` answers input() and getpass(); without it they raise in the cell. Of longer text
    than `max_output` characters a call returns head and tail (for code blocks, with the name of a file that has the
    whole); None is no limit. `functions` (plain ones, with their source at hand) are defined in the kernel whenever it
    is fresh, and `startup` is code that runs there then; its output is not shown.
    With `on_timeout` "detach" a call whose time is over returns what there is so far, with exit code 124 and kernel
    state "busy", and the code goes on: `wait` returns the complete result, other calls say that the kernel is busy.

    `tools` are functions of this program, plain or `async def`, that the code in the kernel calls by their names, or by
    the keys of a dict, in every transport and without a network. Arguments and results are JSON (dataclasses, pydantic
    models, bytes as base64, dates and sets, too) of at most MAX_TOOL_JSON. Calls run in threads, MAX_TOOLS_AT_ONCE at a
    time. `approve(name, arguments)` returns True for a call that may run, or the reason why it may not; the cell's time
    stands still meanwhile. A cell may make `max_tool_calls`; one that takes more than `tool_timeout` seconds raises
    TimeoutError in the kernel. A call is part of the cell that runs when it is made; if none does, it fails.

    It may be called from any thread: cells run one after another. `stop`, or leaving a `with`, ends the kernel.
    An error in a hook ends nothing: it is only a warning of the logger `jupyter_exec`, so listen to that.

    Raises: ValueError for a wrong argument, or a kernel that is not installed; KernelStartFailed.
    """

    # Plain values live in __dict__ and all else in slots, so that vars(executor) can be written as JSON:
    # AutoGen's runtime logging does that.
    UserCapability = _UserCapability
    CODE_WRITER_SYSTEM_MESSAGE = CODE_WRITER_SYSTEM_MESSAGE

    __slots__: tuple[str, ...] = "_folder", "_functions", "_hooks", "_job", "_journal", "_kernel", "_output_dir"
    __slots__ += "_own_server", "_server", "_tools", "_turns"

    def __init__(
        self,
        jupyter_server: AnyServer,
        kernel_name: str = "python3",
        timeout: float = 60,
        output_dir: AnyPath = ".",
        *,
        functions: Sequence[Callable[..., Any]] = (),
        startup: str = "",
        max_output: int | None = MAX_OUTPUT,
        on_output: OutputHook | None = None,
        on_input: InputHook | None = None,
        on_timeout: str = "interrupt",
        tools: AnyTools = (),
        approve: ApproveHook | None = None,
        max_tool_calls: int = 256,
        tool_timeout: float | None = None,
    ) -> None:
        if not (isinstance(timeout, int | float) and timeout >= 1):
            raise ValueError("Timeout must be greater than or equal to 1. It is in seconds; math.inf is no limit.")
        if on_timeout not in ("interrupt", "detach"):
            raise ValueError(f'on_timeout must be "interrupt" or "detach", not {on_timeout!r}.')
        for name, value in {"kernel_name": kernel_name, "startup": startup}.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string, not {value!r}.")
        if not isinstance(functions, Iterable):
            raise ValueError(f"functions must be a list of functions, not {functions!r}.")
        if max_output is not None:
            check_counts(max_output=max_output)
        check_hooks(on_output=on_output, on_input=on_input)
        self._output_dir = Path(output_dir)
        self._folder = Folder(self._output_dir)
        self._kernel_name, self._max_output = kernel_name, max_output
        self._timeout, self._on_timeout = timeout, on_timeout
        self._functions, self._startup = tuple(functions), startup
        self._tools = tools if isinstance(tools, Tools) else Tools(tools, approve, max_tool_calls, tool_timeout)
        self._prelude()  # raises for a function that cannot be sent
        self._journal = Journal()
        self._hooks: Json = {"on_output": on_output, "on_input": on_input}
        self._turns = Turns(self._tools.check_outside)
        self._server: Any = jupyter_server
        self._own_server: RemoteJupyterServer | None = None  # made here, for a JupyterConnectionInfo
        self._job: Job | None = None  # the last that was submitted or detached
        self._kernel = self._new_kernel()
        weakref.finalize(self, _end_forgotten, self._kernel, os.getpid()).atexit = False

    def _new_kernel(self) -> KernelClient:
        server = self._server
        if isinstance(server, str) and "://" in server:
            raise ValueError(f"For the server at {server.partition('?')[0]} give a JupyterConnectionInfo.")
        if isinstance(server, type):
            raise ValueError(f"jupyter_server must be an object: {server.__name__}(), not the class.")
        if isinstance(server, (str, os.PathLike, KernelConnection)):
            return KernelClient(AttachedKernelControl(server))
        if not hasattr(server, "start_kernel"):
            # Ours, or AutoGen's: an object of four attributes, or one that has such an object.
            info = getattr(server, "connection_info", server)
            if not (hasattr(info, "host") and hasattr(info, "use_https")):
                raise ValueError("jupyter_server must be a JupyterConnectable or JupyterConnectionInfo.")
            if not isinstance(info, JupyterConnectionInfo):
                info = JupyterConnectionInfo(info.host, info.use_https, info.port, info.token)
            server = self._own_server = RemoteJupyterServer(info)
        try:
            client: KernelClient = server.start_kernel(self._kernel_name)
        except BaseException:
            if self._own_server:
                self._own_server.stop()
            raise
        return client

    @property
    def code_extractor(self) -> MarkdownCodeExtractor:
        """The extractor that AutoGen uses to find the code blocks of a message."""
        return MarkdownCodeExtractor()

    @property
    def system_message(self) -> str:
        """CODE_WRITER_SYSTEM_MESSAGE with the signatures and docstrings of the installed functions and tools."""
        return system_message_for(self._functions, self._tools, self._server)

    @property
    def user_capability(self) -> _UserCapability:
        return _UserCapability(self.system_message)

    def _prelude(self) -> str:
        program = []
        if self._functions:
            source = functions_source(self._functions)
            program.append(f"exec(compile({source!r}, '<functions>', 'exec', dont_inherit=True), globals())")
        if self._tools.functions:
            program.append(self._tools.prelude())
        return "\n".join([*program, *([self._startup] if self._startup else [])])

    @property
    def connection_file(self) -> str | None:
        """Path of the kernel's connection file, for `jupyter console --existing`; None if it is not on this machine."""
        return self._kernel.connection_file

    def execute_code_blocks(self, code_blocks: Any, cancellation_token: None = None) -> CodeResult:
        """Run blocks (objects with `code` and `language`) in order, up to the first that fails; or one, or a string.

        Never raises for what the code or the kernel did: `exit_code` and `output` tell (0 ended well, 1 raised,
        124 timeout, 130 interrupted, 128 + N killed by signal N, N exit status of a shell script).

        Raises: JupyterExecError after `stop`, also if that came while the call waited for its turn; TypeError for
        something that is no code block, or for a token, which says that autogen-agentchat is going to await the result.
        """
        if cancellation_token is not None:
            raise TypeError("autogen-agentchat awaits its code executor: give it an AsyncJupyterCodeExecutor instead.")
        result: CodeResult = self._answer(BlocksCall(code_blocks, self._folder, self._max_output))
        return result

    def execute_block(self, block: Any, *, on_result: ResultHook | None = None) -> ExecutionResult:
        """Run one code block in its language. Like `execute`, but never raises for what the kernel did.

        `on_result` gets the result of a block that was run even if Ctrl-C ends this call.

        Raises: JupyterExecError after `stop`.
        """
        result: ExecutionResult = self._answer(CellCall(block.code, language=block.language or "", on_result=on_result))
        return result

    def execute(
        self,
        code: str,
        *,
        timeout: float | None = None,
        on_output: OutputHook | None = None,
        on_input: InputHook | None = None,
    ) -> ExecutionResult:
        """Run one cell and return its outputs; `timeout` and the hooks default to the executor's own.

        Raises: KernelError if no kernel could be had, ConnectionClosed if the server is gone.
        """
        result: ExecutionResult = self._answer(CellCall(code, timeout, on_output=on_output, on_input=on_input))
        return result

    def submit(self, code: Any, *, timeout: float | None = None) -> Job:
        """Start a cell (a string) or code blocks, and return a Job at once.

        Jobs and other calls run one after another, in the order in which they came. `timeout` as in `execute`
        (math.inf is no limit). Keep the executor: a job ends with it.

        Raises: TypeError for something that is no code.
        """
        return self._submit(Job, code, timeout)

    def _submit(self, kind: type[_AnyJob], code: Any, timeout: float | None, loop: Any = None) -> _AnyJob:
        is_cell = isinstance(code, str)
        call = CellCall(code, timeout) if is_cell else BlocksCall(code, self._folder, self._max_output, timeout)
        self._job = job = kind(self, call, patient=True, loop=loop)
        return job

    def wait(self, seconds: float | None = None) -> Any:
        """Return the complete result of the last call that was detached or submitted, None if it takes longer.

        Raises: JupyterExecError if there is none; else as that call.
        """
        return self._last_job().wait(seconds)

    def _last_job(self) -> Job:
        if self._job is None:
            raise JupyterExecError("There is nothing to wait for: no call was detached or submitted.")
        return self._job

    def _answer(self, call: CellCall | BlocksCall) -> Any:
        """Make a call and return its result; one that may be detached runs in a thread of its own."""
        if self._on_timeout == "interrupt" or self._turns.mine:
            try:
                with self._turns.turn():
                    return call.run(self, None)
            except NotRun as error:
                return call.so_far(error.result)
        job = Job(self, call)
        try:
            while not job.answered.wait(1.0):  # short: a wait does not notice a signal that another thread got
                pass
        except BaseException:  # Ctrl-C, or a signal handler that raises
            job.interrupt()
            job.answered.wait(INTERRUPT_GRACE)
            raise
        return self._answer_of(job)

    def _answer_of(self, job: Job) -> Any:
        """Return the result of a job, or what there was when it was detached. Raises: as `wait`."""
        if not job.detached:
            return job.wait()
        self._job = job
        return job.partial_result

    def _worker(self) -> JupyterCodeExecutor:
        """Return the same executor for a job's thread, which must not keep this object from being collected."""
        worker = object.__new__(type(self))
        worker.__dict__ = self.__dict__
        for name in JupyterCodeExecutor.__slots__:
            setattr(worker, name, getattr(self, name))
        return worker

    def _run_block(
        self, block: Any, timeout: float | None = None, job: Job | None = None, **hooks: Any
    ) -> ExecutionResult:
        try:
            self._make_ready()
            cell, shown = cell_of(block, self._kernel_name, self._kernel.language)
            result = self._run_cell(cell, shown, timeout, job, **hooks)
        except NotRun as error:
            return error.result
        except (JupyterExecError, ValueError) as error:
            if self._kernel.alive and self._kernel.ready:  # it was not run: too large, or of another language
                return ExecutionResult("error", 1, "intact", str(error), [])
            return ExecutionResult("died", 1, "lost", self._turns.eviction or str(error), [])
        raised = result.error if cell != shown else None
        if raised and (status := re.search(r" exit status (\d{1,3})\.\Z", raised["evalue"])):
            result.outputs.remove(raised)
            if result.status == "error":
                result.exit_code = int(status[1])
        return result

    def _run_cell(self, code: str, shown: str, timeout: float | None, job: Job | None, **hooks: Any) -> ExecutionResult:
        """Run a cell, which stands in the notebook as `shown`; `hooks` are those of Hooks."""
        if self._turns.interrupted or (job and job.interrupted):
            return _not_begun()

        def begin(cell: Cell) -> None:
            if job:
                job.begin(cell)
            if self._turns.interrupted:  # just now
                self._kernel.interrupt(cell)

        calls, on_result = CellTools(self._tools), hooks.get("on_result")

        def keep(result: ExecutionResult) -> None:
            result.calls = calls.close()
            if result.status == "died":
                result.note = self._turns.eviction or result.note
            if result.status == "timeout" and code == shown:  # no shell script
                result.note += place_of(result, code)
            called = calls_note(result.calls) if result.status != "ok" else ""
            result.note = "\n".join(filter(None, (_FRESH * self._turns.overtaken, result.note, called)))
            self._turns.overtaken = False
            self._journal.add(shown, result)
            if on_result:
                on_result(result)

        hooks = {**self._hooks, **hooks, "on_result": keep, "on_start": begin}
        hooks["on_request"] = calls.start_call if self._tools.functions else None
        hooks["on_timeout"] = job.detach if job and self._on_timeout == "detach" else None
        seconds = self._timeout if timeout is None else timeout
        try:
            return self._kernel.execute(code, seconds, Hooks(**hooks), max_output=self._max_output)
        finally:
            calls.close()

    def _make_ready(self) -> None:
        """Make sure that a kernel answers and has our functions, starting one if needed."""
        if not self._kernel.alive:
            self._kernel.start()
        if not self._kernel.ready:
            self._kernel.wait_ready()
            if prelude := self._prelude():
                self._kernel.ready = False  # until it has run, whatever ends this
                if self._functions or self._tools.functions:
                    check_python(self._kernel, "have functions= and tools=")
                result = self._kernel.execute(prelude, START_TIMEOUT, silent=True, store_history=False)
                if result.status == "interrupted":
                    raise NotRun(_not_begun())
                if result.status != "ok":
                    what = "Functions or tools could not be defined, or the startup code failed, in the kernel"
                    raise KernelError(f"{what}: {result.text}")
                self._kernel.ready = True

    @contextlib.contextmanager
    def _far_files(self, through_kernel: bool = False) -> Iterator[FarFiles]:
        """Give access to the files where the kernel runs; if only cells can reach them, hold the turn meanwhile."""
        self._check_usable()
        if not through_kernel and (ask := self._kernel.files()):
            yield FarFiles(ask, 2**18, 4, self._check_usable)  # so that other things get their turn
            return

        def ask_by_cell(order: Json, data: bytes, then: Callable[[Json], None]) -> None:
            then(ask_kernel(self._kernel, order, data, self._hooks["on_output"]))

        with self._turns.turn():
            self._make_ready()
            yield FarFiles(ask_by_cell, CELL_PIECE, 1, self._check_usable)

    def upload(
        self, source: AnyPath | bytes | IO[bytes], path: AnyPath | None = None, *, on_progress: Progress | None = None
    ) -> str:
        """Bring a file (by path), bytes or the rest of an open binary file to where the kernel runs; return its path.

        A relative `path` begins in the kernel's first directory; None stands for the name of the source. Directories
        above it are made; a file or link of that name is replaced at the end. `on_progress(done, total)` gets bytes;
        an unknown total is None. A running cell does not matter, unless the kernel is on a Jupyter server or attached:
        then the file goes through the kernel, which has to be one of Python, between cells.

        Raises: FileTransferError; TypeError for a source of a wrong type, or one without a name if `path` is None.
        """
        here = source if isinstance(source, str | os.PathLike) else None
        if path is None and here is None:
            raise TypeError("path is needed: bytes and files have no name of their own.")
        name = os.path.basename(os.path.abspath(here or "")) if path is None else os.fspath(path)
        with transfer_errors(name, here), source_file(source) as file, self._far_files() as files:
            tell = functools.partial(tell_progress, on_progress, size_of(file))
            files.write(name, file_pieces(file, files.piece), tell)
        return name

    @overload
    def download(self, path: AnyPath, *, max_bytes: int = ..., on_progress: Progress | None = ...) -> bytes: ...

    @overload
    def download(
        self, path: AnyPath, target: AnyPath | IO[bytes], *, max_bytes: int = ..., on_progress: Progress | None = ...
    ) -> None: ...

    def download(
        self, path: Any, target: Any = None, *, max_bytes: int = MAX_DOWNLOAD, on_progress: Progress | None = None
    ) -> bytes | None:
        """Return a file from where the kernel runs as bytes, or write it to `target`: a path, or a binary file.

        A target path gets the whole file or stays as it was; a link there is replaced. A link where the kernel runs is
        followed. As to `path`, `on_progress` and running cells see `upload`.

        Raises: FileTransferError, also for a file of more than `max_bytes`.
        """
        path, here = os.fspath(path), target if isinstance(target, str | os.PathLike) else None
        memory = io.BytesIO()
        with transfer_errors(path, here), contextlib.ExitStack() as stack:
            files = stack.enter_context(self._far_files())
            file = stack.enter_context(target_file(here)) if here else memory if target is None else target
            for piece, done, total in files.read(path, max_bytes):
                write_all(file, piece)
                tell_progress(on_progress, total, done)
        return memory.getvalue() if target is None else None

    def list_files(self, path: AnyPath = ".") -> list[FarFile]:
        """Return what is in a directory where the kernel runs, by name; links are not followed.

        As to `path` and running cells see `upload`. Raises: FileTransferError, also for more than MAX_LISTED entries.
        """
        path = os.fspath(path)
        with transfer_errors(path), self._far_files() as files:
            return files.entries(path)

    def set_variables(self, /, **values: Any) -> None:
        """Set variables in the kernel, all or none, to values that can be written as JSON.

        Tuples, sets and arrays arrive as lists, dataclasses as dicts, bytes in base64. NaN and the infinities are
        allowed, as Python's JSON has them. Python kernels only, between cells.

        Raises: VariableError.
        """
        texts = []
        for name, value in values.items():
            if not is_name(name):
                raise VariableError(name, "it is no name of a variable")
            try:
                texts.append(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=False, default=to_json)}")
            except (TypeError, ValueError, RecursionError) as error:
                raise VariableError(name, f"it is no JSON here. {type(error).__name__}: {error}") from None
        data = f"{{{','.join(texts)}}}".encode("utf-8", "surrogatepass")
        with self._variables(", ".join(values)) as (files, key):
            for offset in range(0, len(data), CELL_PIECE):
                files.step("set", "", data[offset : offset + CELL_PIECE], key=key, offset=offset, size=len(data))

    def get_variable(self, name: str, *, max_bytes: int = MAX_JSON) -> Any:
        """Return the value of a variable of the kernel, if it can be written as JSON: see `set_variables`.

        `max_bytes` limits the JSON. Python kernels only, between cells.

        Raises: VariableError.
        """
        if not is_name(name):
            raise VariableError(name, "it is no name of a variable")
        with self._variables(name) as (files, key):
            data = b"".join(piece for piece, _, _ in files.read(name, max_bytes, "get", key=key))
        try:
            text = data.decode("utf-8", "surrogatepass")
            if len(text) > LARGE_PART and json_weight(text) > 4 * max(max_bytes, LARGE_PART):
                raise ValueError("it has too many parts for its max_bytes")
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise VariableError(name, f"what came is no JSON. {error}") from None

    @contextlib.contextmanager
    def _variables(self, name: str) -> Iterator[tuple[FarFiles, str]]:
        """Give the way to the kernel's variables, and a key for their JSON while it is under way."""
        try:
            with self._far_files(through_kernel=True) as files:
                yield files, f"{os.getpid()} {id(self)}"  # always the same: what an interrupted call left is replaced
        except FileTransferError as error:
            raise VariableError(name, error.reason) from None
        except NotRun:
            raise VariableError(name, "the kernel is still running earlier code") from None
        except JupyterExecError as error:
            raise VariableError(name, str(error)) from error

    @property
    def _notebook_metadata(self) -> Json:
        """The metadata of a notebook that was run here: kernelspec and, once the kernel is ready, language_info."""
        spec = {"name": self._kernel_name, "display_name": self._kernel_name, "language": self._kernel.language}
        info = self._kernel.kernel_info.get("language_info")
        return {"kernelspec": spec} | ({"language_info": info} if self._kernel.language else {})

    def save_notebook(self, path: AnyPath) -> None:
        """Write the session so far as a notebook: each cell with its outputs, failed and timed-out ones too.

        It waits for cells that have begun or wait for their turn, but not for one that was detached.

        Raises: OSError; ValueError if the directory does not exist.
        """
        with contextlib.suppress(JupyterExecError), self._turns.turn():
            pass
        metadata = self._notebook_metadata
        path = Path(path).absolute()
        folder = self._folder if path.parent == self._folder.path else Folder(path.parent)
        with folder.replace(path.name, devices=True) as file:
            self._journal.write(file, metadata)

    def _check_usable(self) -> None:
        if self._turns.closed or _is_unwanted():
            raise JupyterExecError(_STOPPED)

    def interrupt(self) -> None:
        """Interrupt the call whose turn it is, from any thread; its variables are kept.

        If its kernel is still being started, or if it is between two blocks, it runs no more code.
        """
        self._turns.interrupted = True
        self._kernel.interrupt()

    def restart(self) -> None:
        """Replace the kernel by a fresh one; all variables are lost.

        It ends the running cell and goes before the calls that wait for their turn: their results say so.

        Raises: KernelError if it cannot be started, or is not ours (attached by a connection file).
        """
        if not self._kernel.owned:
            self._kernel.restart()  # raises, at once
        with self._turns.turn(self._kernel.abort):
            self._check_usable()
            self._kernel.restart()

    def stop(self) -> None:
        """End the kernel (or disconnect from one that was attached to). May be called more than once.

        It ends the running cell; calls that wait for their turn raise JupyterExecError at once.
        """
        self._turns.closed = True
        self._turns.wake()
        grace = Deadline(INTERRUPT_GRACE)

        def evict() -> None:
            if self._kernel.owned:
                self._kernel.abort()
            elif grace.expired:
                self._kernel.give_up("its executor was stopped")
            else:
                self._kernel.interrupt()

        with self._turns.turn(evict):
            self._kernel.shutdown()
            if self._own_server:
                self._own_server.stop()


AsyncHook = Callable[..., Any]  # an OutputHook or InputHook, or a coroutine function of the same arguments
_P = ParamSpec("_P")


def _awaited(
    method: Callable[Concatenate[JupyterCodeExecutor, _P], _T], beside_cells: bool = False
) -> Callable[Concatenate[AsyncJupyterCodeExecutor, _P], Coroutine[Any, Any, _T]]:
    """Return a method of JupyterCodeExecutor as one that is awaited; cancelling ends a transfer.

    `beside_cells`: a hook may use it, too, if the files need no cell.
    """

    @functools.wraps(method)
    async def awaited(self: AsyncJupyterCodeExecutor, /, *args: _P.args, **options: _P.kwargs) -> _T:
        executor, unwanted = await self._started(), threading.Event()
        if not (beside_cells and executor._kernel.files()):
            self._check_outside()

        def call() -> _T:
            _AWAITED_CALL.is_unwanted = unwanted.is_set
            return method(executor, *args, **options)

        try:
            return await in_thread(call)
        finally:
            unwanted.set()
            executor._turns.wake()

    return awaited


@functools.cache
def _autogen_result_class(theirs: type) -> type[CodeResult]:
    """Return CodeResult as a subclass of autogen_core's, which its messages insist on."""
    return type("CodeResult", (CodeResult, theirs), {})


class AsyncJob(Job):
    """A Job whose `wait` is awaited."""

    async def wait(self, seconds: float | None = None) -> Any:
        """Like Job.wait; leaving it does not end the job."""
        return await self.awaited(seconds)


class AsyncJupyterCodeExecutor(NotCopied):
    """JupyterCodeExecutor for asyncio: the same arguments, everything awaitable, nothing blocks the loop.

    Cancelling the awaiting task (or autogen's `cancellation_token`) interrupts its cell, or ends its transfer;
    variables are kept. Hooks may be coroutine functions: they and tools run on the loop of the call (of the latest, if
    that has ended), and the cell's outputs wait for hooks; `on_progress` is called in a thread. It serves as a code
    executor of autogen-agentchat 0.4 and newer, and as a CodeEnvironment of AG2 1.x.
    """

    supported_languages = ("python", "bash", "sh", "shell")

    def __init__(
        self,
        jupyter_server: AnyServer,
        kernel_name: str = "python3",
        timeout: float = 60,
        output_dir: AnyPath = ".",
        *,
        functions: Sequence[Callable[..., Any]] = (),
        startup: str = "",
        max_output: int | None = MAX_OUTPUT,
        on_output: AsyncHook | None = None,
        on_input: AsyncHook | None = None,
        on_timeout: str = "interrupt",
        tools: AnyTools = (),
        approve: ApproveHook | None = None,
        max_tool_calls: int = 256,
        tool_timeout: float | None = None,
    ) -> None:
        self._tools = Tools(tools, approve, max_tool_calls, tool_timeout)
        self._new_executor = functools.partial(
            JupyterCodeExecutor,
            jupyter_server,
            kernel_name,
            timeout,
            output_dir,
            functions=functions,
            startup=startup,
            max_output=max_output,
            on_output=self._hook(on_output),
            on_input=self._hook(on_input),
            on_timeout=on_timeout,
            tools=cast("Any", self._tools),
        )
        self._functions = functions
        self._executor: JupyterCodeExecutor | None = None
        self._starting: Any = None  # a task
        self._guard = threading.Lock()  # of _executor, and
        self._stopped = False
        self._pending: Any = None  # the future of a coroutine that a hook has the cells' thread wait for,
        self._cancelled_hook: Any = None  # and the last one that was cancelled here: its hook then gives None

    @property
    def system_message(self) -> str:
        """Like JupyterCodeExecutor.system_message."""
        return system_message_for(self._functions, self._tools, self._new_executor.args[0])

    @property
    def connection_file(self) -> str | None:
        """Like JupyterCodeExecutor.connection_file; None before the start, too."""
        return self._executor.connection_file if self._executor else None

    async def start(self) -> None:
        """Ask for the kernel; after `stop` for a new one. Raises what JupyterCodeExecutor raises."""
        if self._stopped:
            await in_thread(functools.partial(self._create_once, after_stop=True))
        await self._started()

    def _check_outside(self) -> None:
        """Raise JupyterExecError in a hook: its cell has the kernel, and waits for it."""
        if self._executor and self._executor._turns.in_hook.get():
            raise JupyterExecError(HOOK_RUNS_CELL)

    async def _started(self) -> JupyterCodeExecutor:
        import asyncio

        loop = asyncio.get_running_loop()
        if not (self._tools.loop and self._tools.loop.is_running()):  # that of the cell that runs has ended
            self._tools.loop = loop
        while not self._executor:
            if not self._starting or self._starting.done() or self._starting.get_loop() is not loop:
                self._starting = asyncio.ensure_future(in_thread(self._create_once))
            await result_of(self._starting)
        return self._executor

    def _create_once(self, after_stop: bool = False) -> None:
        with self._guard:
            if self._stopped and not after_stop:
                raise JupyterExecError(_STOPPED)
            if self._stopped or not self._executor:
                self._executor = self._new_executor()
            self._stopped = False

    async def _answer(self, call: CellCall | BlocksCall) -> Any:
        """Make a call and return its result. If this is cancelled, interrupt the call and wait for its end."""
        import asyncio

        self._check_outside()
        executor = await self._started()
        job = Job(executor, call, loop=asyncio.get_running_loop())
        try:
            await job.until(job.answered.is_set)
        except asyncio.CancelledError:
            job.interrupt()
            deadline = Deadline(INTERRUPT_GRACE)
            while not (job.done or job.detached):
                if (unwanted := self._pending) and executor._turns.is_of(job):
                    self._cancelled_hook = unwanted
                    unwanted.cancel()
                if deadline.expired:  # nobody waits for this code any more, and it has the kernel
                    deadline = Deadline(None)
                    self._give_up(executor, job)
                with contextlib.suppress(asyncio.CancelledError):  # again: the wait goes on all the same
                    await job.until(job.ended.is_set, 0.05)
            raise
        return executor._answer_of(job)

    def _give_up(self, executor: JupyterCodeExecutor, job: Job) -> None:
        """End a call that nobody waits for, and that goes on in spite of the interrupt."""
        if job._cell and not executor._kernel.owned:
            job.detach(job._cell.so_far())
            return
        what = "ignored the interrupt" if job._cell else "has no kernel yet"
        kernel = executor._kernel
        fate = "killed" if kernel.owned else "left"
        logger.warning("The code of a call that was cancelled %s: its kernel is %s", what, fate)
        end = kernel.abort if kernel.owned else functools.partial(kernel.give_up, "the call was cancelled")
        threading.Thread(target=end, daemon=True).start()

    def _hook(self, hook: AsyncHook | None) -> AsyncHook | None:
        """Wrap a hook for the cells' thread: if it returns a coroutine, that runs on a loop, and the thread waits."""
        call = weakref.WeakMethod(self._call_hook)  # a job must not keep this object from being collected

        def run(*arguments: Any) -> Any:
            method = call()
            return method(hook, *arguments) if method and hook else None

        return run if callable(hook) else hook

    def _call_hook(self, hook: AsyncHook, *arguments: Any) -> Any:
        import asyncio

        in_hook = cast("JupyterCodeExecutor", self._executor)._turns.in_hook
        inside = [True]  # seen by the tasks of its coroutine, too; emptied when it ends
        token = in_hook.set(inside)
        try:
            answer = hook(*arguments)
            return self._wait_for_hook(answer, self._tools.loop) if asyncio.iscoroutine(answer) else answer
        finally:
            inside.clear()
            in_hook.reset(token)

    def _wait_for_hook(self, answer: Coroutine[Any, Any, Any], loop: Any) -> Any:
        import asyncio
        from concurrent.futures import CancelledError, wait

        executor = cast("JupyterCodeExecutor", self._executor)
        try:
            self._pending = future = asyncio.run_coroutine_threadsafe(answer, loop)
            while not wait([future], 0.2).done:
                if loop.is_closed():
                    break
                if executor._turns.eviction or executor._kernel.hook_is_late:
                    self._cancelled_hook = future
                    future.cancel()
            return future.result(0)
        except CancelledError:
            if future is not self._cancelled_hook:
                raise
            return None
        finally:
            self._pending = None
            if loop.is_closed():
                answer.close()

    async def execute_code_blocks(self, code_blocks: Any, cancellation_token: Any = None) -> CodeResult:
        """Like JupyterCodeExecutor.execute_code_blocks; the result is autogen's CodeResult, too, if that is loaded.

        Raises: CancelledError.
        """
        import asyncio

        task = asyncio.ensure_future(self._blocks(code_blocks))
        if cancellation_token is not None:
            cancellation_token.link_future(task)
        result = await task
        theirs = getattr(sys.modules.get("autogen_core.code_executor"), "CodeResult", None)
        return _autogen_result_class(theirs)(**vars(result)) if theirs else result

    async def _blocks(self, code_blocks: Any) -> CodeResult:
        executor = await self._started()
        result: CodeResult = await self._answer(BlocksCall(code_blocks, executor._folder, executor._max_output))
        return result

    async def execute(
        self,
        code: str,
        *,
        timeout: float | None = None,
        on_output: AsyncHook | None = None,
        on_input: AsyncHook | None = None,
    ) -> ExecutionResult:
        """Like JupyterCodeExecutor.execute."""
        call = CellCall(code, timeout, on_output=self._hook(on_output), on_input=self._hook(on_input))
        result: ExecutionResult = await self._answer(call)
        return result

    async def stream(
        self, code: str, *, timeout: float | None = None, on_input: AsyncHook | None = None
    ) -> AsyncGenerator[Any, None]:
        """Run one cell; yield its outputs as they come (see `on_output`), and last its ExecutionResult.

        Leaving the iteration interrupts the cell; `contextlib.aclosing` makes certain that this is at once. The cell
        waits for a slow reader until its time is over; a reader that runs cells meanwhile needs another executor.
        """
        import asyncio

        loop, left = asyncio.get_running_loop(), False
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        room = threading.Semaphore(100)  # of the queue: if there is none, the cell waits for the reader

        def show(output: Any) -> None:  # in the cells' thread
            if left:
                return
            executor = cast("JupyterCodeExecutor", self._executor)
            loop.call_soon_threadsafe(outputs.put_nowait, output)
            while not (left or executor._kernel.hurries or executor._turns.eviction or room.acquire(timeout=0.2)):
                pass

        async def run() -> None:
            try:
                outputs.put_nowait(await self.execute(code, timeout=timeout, on_output=show, on_input=on_input))
            except Exception as error:
                outputs.put_nowait(error)

        running = asyncio.ensure_future(run())
        try:
            output: Any = None
            while not isinstance(output, ExecutionResult):
                output = await outputs.get()
                room.release()
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            left = True
            room.release()
            running.cancel()
            await asyncio.wait([running])

    async def run(self, code: str, language: str = "python", *, context: Any = None) -> CodeResult:
        """Run one block: the CodeEnvironment of AG2 1.x."""
        return await self._blocks([CodeBlock(code, language)])

    async def submit(self, code: Any, *, timeout: float | None = None) -> AsyncJob:
        """Like JupyterCodeExecutor.submit."""
        import asyncio

        return (await self._started())._submit(AsyncJob, code, timeout, asyncio.get_running_loop())

    async def wait(self, seconds: float | None = None) -> Any:
        """Like JupyterCodeExecutor.wait."""
        return await (await self._started())._last_job().awaited(seconds)

    upload = _awaited(JupyterCodeExecutor.upload, beside_cells=True)
    list_files = _awaited(JupyterCodeExecutor.list_files, beside_cells=True)
    set_variables = _awaited(JupyterCodeExecutor.set_variables)
    get_variable = _awaited(JupyterCodeExecutor.get_variable)
    save_notebook = _awaited(JupyterCodeExecutor.save_notebook)

    @overload
    async def download(self, path: AnyPath, *, max_bytes: int = ..., on_progress: Progress | None = ...) -> bytes: ...

    @overload
    async def download(
        self, path: AnyPath, target: AnyPath | IO[bytes], *, max_bytes: int = ..., on_progress: Progress | None = ...
    ) -> None: ...

    @functools.wraps(JupyterCodeExecutor.download)
    async def download(self, *args: Any, **options: Any) -> Any:
        return await _awaited(JupyterCodeExecutor.download, beside_cells=True)(self, *args, **options)

    async def restart(self) -> None:
        """Like JupyterCodeExecutor.restart."""
        self._check_outside()
        await (in_thread(self._executor.restart) if self._executor else self._started())

    def interrupt(self) -> None:
        """Like JupyterCodeExecutor.interrupt."""
        if self._executor:
            self._executor.interrupt()

    async def stop(self) -> None:
        """End the kernel, or keep a start from making one. May be called more than once."""
        self._check_outside()
        await in_thread(self._end)

    def _end(self) -> None:
        with self._guard:
            self._stopped = True
            if self._executor:
                self._executor.stop()

    async def __aenter__(self) -> AsyncJupyterCodeExecutor:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()


# ======================================================================================================
# 17. Command line
# ======================================================================================================


@dataclass(eq=False)
class Step:
    """A cell of a document. `cell` has the shape of nbformat, and gets the outputs."""

    cell: Json
    language: str = ""
    line: int = 0  # where the source begins in the file; 0 in a notebook
    number: int = 0  # among the cells of the notebook; 0 for a cell of a text file, or made by -p
    count: int | None = None  # IPython's number for it, once it has run here

    def shown(self, speaks_python: bool) -> Json:
        """Return the cell as it stands in a notebook of a kernel."""
        shell = shell_of(self.cell["source"], self.language.lower()) if speaks_python else ""
        return self.cell | ({"source": f"%%{shell}\n{self.cell['source']}"} if shell else {})

    def has_tag(self, tag: str) -> bool:
        """Whether the cell's metadata have one of Jupyter's tags, such as "raises-exception"."""
        tags = self.cell["metadata"].get("tags")
        return isinstance(tags, list) and tag in tags

    def record(self, result: ExecutionResult) -> None:
        """Write what the cell did into it; it has just ended."""
        now = time.time()
        times = {"iopub.status.busy": now - result.duration, "shell.execute_reply": now}
        self.cell["metadata"]["execution"] = {
            name: f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at % 1 * 10**6):06}Z"
            for name, at in times.items()
        }
        self.count = result.execution_count
        note = result.note if result.status != "interrupted" else ""  # the KeyboardInterrupt says enough
        self.cell |= {"outputs": notebook_outputs(result.outputs, note), "execution_count": self.count}


class Document:
    """What `run` was given, a notebook or not, as a notebook. It gets the outputs of each cell that has run."""

    def __init__(self, name: str, body: Json) -> None:
        """`name` is for people, `body` a notebook without cells."""
        self.name, self._body = name, {"nbformat": 4, "nbformat_minor": 5, "metadata": {}} | body
        self.steps: list[Step] = []
        self.is_script = False  # of one language, and run as `python FILE` would run it
        self.kernel_name = text_of(part_of(body, "metadata", "kernelspec", "name"))  # "" if it names none

    def new_step(
        self, source: str, tags: Sequence[str] = (), kind: str = "code", language: str = "", line: int = 0
    ) -> Step:
        cell = notebook_cell(source, kind, {"tags": list(tags)} if tags else {})
        if self._body["nbformat_minor"] in range(5):  # "id" came with 4.5, and nothing unknown is allowed before
            del cell["id"]
        return Step(cell, language, line)

    def add_parameters(self, pairs: Iterable[Sequence[str]]) -> None:
        """Set variables as papermill does: by a cell after the one that is tagged "parameters", or at the top.

        Raises: ValueError for a name that no variable can have.
        """
        self.steps = [step for step in self.steps if not step.has_tag("injected-parameters")]
        at = next((i for i, step in enumerate(self.steps, 1) if step.has_tag("parameters")), 0)
        if not at:
            say(f"no cell of {self.name} is tagged parameters: -p is set at the top")
        lines = ["# Parameters"]
        for name, value in pairs:
            if not is_name(name):
                raise ValueError(f"-p {name}: this cannot be the name of a variable")
            if at and not re.search(rf"\b{name}\b.*=", self.steps[at - 1].cell["source"]):
                says = f"the cell of {self.name} that is tagged parameters does not set it"
                say(f"-p {name}: {says}")
            lines.append(f"{name} = {_literal(value)}")
        self.steps.insert(at, self.new_step("\n".join(lines), ["injected-parameters"]))

    def save(self, folder: Folder, name: str, metadata: Json) -> None:
        """Write the notebook, with the kernel's metadata where it has none. Raises: OSError."""
        own = self._body["metadata"]
        body = self._body | {"metadata": metadata | own if isinstance(own, dict) else metadata}
        speaks_python = text_of(part_of(metadata, "kernelspec", "language")).lower() in ("", "python")
        cells = [step.shown(speaks_python) for step in self.steps]
        text = json.dumps(body | {"cells": cells}, indent=1, ensure_ascii=False)
        with folder.replace(name, devices=True) as file:
            file.write(text.encode("utf-8", "replace") + b"\n")

    def place(self, step: Step, result: ExecutionResult) -> str:
        """Say where the traceback of a step's cell ends, as an editor finds it, or where the cell begins."""
        line = 1
        text = clean_text("\n".join(map(text_of, result.error["traceback"]))) if result.error else ""
        for count, number in re.findall(r"(?m)^ *(?:Cell|Input) In ?\[(\d{1,9})\],.*?line:? ?(\d{1,9})", text):
            for other in self.steps:
                if other.count == int(count):
                    step, line = other, int(number)
        source = step.cell["source"]
        line += source[: len(source) - len(source.lstrip())].count("\n")  # IPython takes empty first lines away
        if noted := re.search(r"it was at line (\d{1,9}): ", result.note):
            line = int(noted[1])
        if step.line:
            return f"{self.name}:{step.line + line - 1}"
        return f"{self.name}, {f'cell {step.number}' if step.number else '-p'}, line {line}"


def _literal(text: str) -> str:
    """Return the Python literal that papermill would make of a parameter's text."""
    if text in ("True", "False", "None"):
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return repr(value) if value - value == 0 else f"float('{value}')"
    return repr(text)


def read_document(source: str, unlabelled: bool = False, is_script: bool = False) -> Document:
    """Return the document in a .py, .md or .ipynb file, or on stdin for "-".

    In Python `# %%` begins a cell. Of a .md file, the fenced blocks that name a language are run; with `unlabelled`,
    all. Any other file is a script if its text looks like Python, or if the caller says so by `is_script`.

    Raises: OSError; ProtocolError for a broken notebook; ValueError for a file that is no code.
    """
    if source == "-":
        if sys.stdin is None:
            raise ValueError("There is no stdin to read the code from.")
        source, data, suffix = "<stdin>", sys.stdin.buffer.read(), "" if is_script else ".py"
    else:
        data, suffix = Path(source).read_bytes(), Path(source).suffix.lower()
    text = data.decode("utf-8-sig", "replace")
    if suffix == ".ipynb":
        return _notebook(source, json_object(text, f"notebook {source}"))
    if suffix not in (".md", ".markdown"):
        if not (is_script or suffix == ".py" or _is_python(source, text)):
            what = ".py, .md and .ipynb files are, and what begins with #! and names python"
            raise ValueError(f"{source} is no code that can be run: {what}. For another language give --kernel.")
        return _script(source, text if is_script and suffix != ".py" else _source_text(source, data))
    document = Document(source, {})
    for line, info, block in fenced_blocks(text):
        if info.strip() or unlabelled:
            document.steps.append(document.new_step(block.code, language=block.language, line=line))
        else:
            says = "skipped a block that names no language (--unlabelled runs it)"
            say(f"{source}:{line}: {says}")
    return document


def _source_text(source: str, data: bytes) -> str:
    """Decode Python as Python does, by its BOM or its "coding" line. Raises: ValueError."""
    import importlib.util

    try:
        return importlib.util.decode_source(data)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"{source} cannot be decoded: {error}. Say its encoding in the first line.") from None


def _is_python(source: str, text: str) -> bool:
    if Path(source).suffix or text.startswith("#!"):
        return bool(re.match("#!.*python", text))
    with contextlib.suppress(SyntaxError, ValueError):
        compile(text, source, "exec")
        return True
    return False


def _script(name: str, text: str) -> Document:
    document = Document(name, {})
    document.is_script = True
    lines = text.replace("\r\n", "\n").split("\n")
    markers = [i for i, line in enumerate(lines) if re.match(r"# ?%%(?!%)", line)]
    for start, end in itertools.pairwise([0, *markers, len(lines)]):
        title = lines[start] if start in markers else ""
        code = "\n".join(lines[start + bool(title) : end])
        tags = re.findall(r"[\"']([^\"']+)[\"']", "".join(re.findall(r"tags *= *\[([^\[\]]*)\]", title)))
        if found := re.search(r"\[(markdown|md|raw)\]", title):
            kind = "raw" if found[1] == "raw" else "markdown"
            document.steps.append(document.new_step(re.sub(r"(?m)^# ?", "", code), tags, kind))
        elif code.strip():
            document.steps.append(document.new_step(code, tags, line=start + bool(title) + 1))
    return document


def _notebook(name: str, body: Json) -> Document:
    cells = body.get("cells")
    if not (isinstance(cells, list) and all(isinstance(cell, dict) for cell in cells)):
        advice = "; its format is old: jupyter nbconvert --to notebook makes it a new one" * ("worksheets" in body)
        raise ProtocolError(f"{name} is no notebook with cells{advice}.")
    document = Document(name, body)
    for number, cell in enumerate(cells, 1):
        source, metadata = cell.get("source"), cell.get("metadata")
        source = "".join(map(str, source)) if isinstance(source, list) else text_of(source)
        metadata = metadata if isinstance(metadata, dict) else {}
        document.steps.append(Step(cell | {"source": source, "metadata": metadata}, number=number))
    return document


def print_clean(stream: TextIO, text: str, end: str = "\n") -> None:
    """Print text from anybody: colours and carriage returns pass, to a terminal only; no other control characters do.

    Raises: OSError.
    """
    on_terminal = stream.isatty()
    lines = (text + end).replace("\r\n", "\n").split("\r")
    stream.write(("\r" if on_terminal else "\n").join(clean_text(line, on_terminal) for line in lines))
    stream.flush()


def say(text: object) -> None:
    """Tell the user something, on stderr. Raises: OSError."""
    print_clean(sys.stderr, f"jupyter-exec: {text}")


class CellFiles(CallFiles):
    """Saves what one cell shows, under names that say where it comes from: report-3-1.png."""

    def __init__(self, folder: Folder, stem: str, html: bool) -> None:
        super().__init__(folder, None)
        self._stem, self._html = stem, html

    def new_name(self, suffix: str) -> str:
        return f"{self._stem}-{len(self.paths) + 1}{suffix}"

    def save(self, data: Json) -> str | None:
        """Like CallFiles.save; but if the output can be read as text, like a table, HTML is saved only if asked for."""
        plain = text_of(data.get("text/plain"))
        is_readable = bool(plain) and not _DEFAULT_REPR.match(plain)
        return super().save({mime: data[mime] for mime in data if mime != "text/html" or self._html or not is_readable})


def exit_of(output: Json | None) -> tuple[int, str] | None:
    """Return (exit status, message) of the error of a cell that called sys.exit(), as Python gives them; else None."""
    if not output or output.get("ename") != "SystemExit":
        return None
    says = str({"": 0, "None": 0, "False": 0, "True": 1}.get(output["evalue"], output["evalue"]))
    return (int(says) % 256, "") if re.fullmatch(r"-?\d{1,18}", says) else (1, says)


class LivePrinter:
    """Prints outputs as they come: streams as they are, everything else on lines of its own.

    Where stderr is a terminal, a line there tells how far the run is, and goes away before anything is printed.
    """

    def __init__(self, count: int) -> None:
        """`count`: cells that will run."""
        self._count = count
        self._number = 0  # of the cell that runs
        self._files: CellFiles | None = None
        self._open_stream: TextIO | None = None  # where a line was begun and not ended
        self._lock = threading.Lock()
        self._asks = False  # a person is typing an answer to input()
        self._ended = threading.Event()
        self.trouble: OSError | None = None  # why nothing more can be printed
        self.status = 0  # of the command
        if sys.stderr.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._ended.wait(1):
            with self._lock:
                if self._number and not (self._open_stream or self._asks):
                    seconds = time.monotonic() - self._started
                    sys.stderr.write(f"\r\x1b[Kcell {self._number} of {self._count}, {seconds:.0f} s\r")
                    sys.stderr.flush()

    def begin(self, files: CellFiles) -> None:
        self._started, self._files = time.monotonic(), files
        self._number += 1

    def end(self, step: Step, result: ExecutionResult, place: str) -> None:
        if result.status not in ("ok", "exited", "expected"):
            failed = result.note or f"the script ended with exit status {result.exit_code}"
            if error := result.error if not result.note else None:
                # What IPython says of a syntax error names a file of its own.
                failed = f"{error['ename']}: " + re.sub(r" \(\d+\.py, line \d+\)\Z", "", error["evalue"])
            # `place` says which line it was; and the variables that were kept end with the run.
            failed = re.sub(r"; variables are kept|(?<=it was at) line \d+", "", failed)
            self._line(f"jupyter-exec: {place}: {failed}", sys.stderr)
        elif result.note and (result.status == "ok" or (result.exit_code and result.kernel_state == "lost")):
            self._line(f"jupyter-exec: {result.note}", sys.stderr)

    def ask(self, prompt: str, password: bool) -> str:
        """Answer input() in the code, at a terminal or from our stdin; no progress is shown meanwhile."""
        with self._lock:
            self._asks = True
        try:
            return _ask(clean_text(prompt, True), password)
        finally:
            self._asks, self._open_stream = False, None

    def close(self, *trouble: object) -> None:
        self._ended.set()
        self._write(sys.stderr, "")

    def __call__(self, output: Json) -> None:
        kind = output["output_type"]
        if kind == "stream":
            self._write(sys.stdout if output["name"] == "stdout" else sys.stderr, output["text"])
        elif (exited := exit_of(output)) is not None:
            self._line(exited[1], sys.stderr)
        elif kind == "error":
            if output["traceback"] and sys.stderr.isatty():  # in colours
                self._line("\n".join(output["traceback"]), sys.stderr)
            elif output["traceback"] or output["ename"] != "CalledProcessError":  # `end` tells of that
                self._line(render([output]), sys.stderr)
        elif "data" in output:
            save = self._files.save if self._files and kind != "update_display_data" else None
            self._line(render([output], "", save), sys.stdout)

    def _line(self, text: str, stream: TextIO) -> None:
        if text:
            if self._open_stream:
                self._write(self._open_stream, "\n")
            self._write(stream, text + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            if sys.stderr.isatty() and not self._open_stream:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            try:
                print_clean(stream, text, "")
            except OSError as error:  # nobody reads any more, or the disk is full: as good as Ctrl-C
                self.trouble = error
                raise KeyboardInterrupt from None
            if text:
                self._open_stream = None if text.endswith("\n") else stream


class JsonPrinter:
    """Prints one JSON object at the end: the outcome of all, and what each cell did."""

    trouble: OSError | None = None

    def __init__(self, language: str) -> None:
        """`language`: the kernel's."""
        self._language = language
        self._blocks: list[Json] = []
        self._kernel_state = "intact"
        self.status = 0  # of the command

    def begin(self, files: CellFiles) -> None:
        self._files = files

    def end(self, step: Step, result: ExecutionResult, place: str) -> None:
        error, text = result.error, render(result.outputs, result.note, self._files.save)
        block = {"source": step.cell["source"], "language": step.language or self._language, "status": result.status}
        block |= {"exit_code": result.exit_code, "duration": round(result.duration, 3)}
        block |= {"place": place, "error": error and {name: error[name] for name in ("ename", "evalue", "traceback")}}
        self._blocks.append(block | {"output": text, "output_files": self._files.paths})
        self._kernel_state = result.kernel_state

    def ask(self, prompt: str, password: bool) -> str:
        """Answer input() in the code."""
        return _ask("", password)

    def close(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        status = self.status if kind is None else 130 if kind is KeyboardInterrupt else 2
        if isinstance(error, SystemExit):  # by a signal
            status = int(error.code or 0)
        answer = {"exit_code": status, "kernel_state": self._kernel_state, "blocks": self._blocks}
        print_clean(sys.stdout, json.dumps(answer))


_EXAMPLES = """\
examples:
  jupyter-exec run -c "print(6 * 7)"
  jupyter-exec run analysis.py -- --rows 100        arguments of the script stand behind --
  jupyter-exec run report.ipynb -p year 2026 --notebook report-2026.ipynb
  jupyter-exec run notes.md --docker --hardened --base-image my/python
  jupyter-exec run job.py --server https://hub.example.com/user/ann/
"""


# Options of all commands that one kind of server takes -> (that kind, name of the value, help).
_PLACE_OPTIONS: dict[str, tuple[str, str, str]] = {
    "--cwd": ("local", "DIR", "working directory of the kernel"),
    "--network": ("docker", "NAME", "of the container: none, bridge (default), ..."),
    "--hardened": ("docker", "", "no network, nothing written but to memory, 1 GB, one processor"),
    "--memory": ("docker", "SIZE", "of the container, such as 512m or 2g"),
    "--mount": ("docker", "DIR", "a directory that code may read and write, as /workspace"),
    "--package": ("docker", "NAME", "to be in our image"),
    "--base-image": ("docker", "IMAGE", "what our image is built on"),
    "--token-file": ("server", "FILE", "the server's token, instead of JUPYTER_TOKEN"),
    "--ca-file": ("server", "FILE", "certificates to trust (https)"),
}


def _add_places(command: argparse.ArgumentParser) -> None:
    where = command.add_mutually_exclusive_group()
    where.add_argument("--python", metavar="PATH", help="the local interpreter that python3 means")
    where.add_argument("--docker", nargs="?", const="", metavar="IMAGE", help="in a container (give FILE first)")
    where.add_argument("--server", metavar="URL", help="on a Jupyter server; the token comes from JUPYTER_TOKEN")
    for name, (_, metavar, says) in _PLACE_OPTIONS.items():
        action: Json = {"metavar": metavar} if metavar else {"action": "store_true"}
        command.add_argument(name, help=says, **(action | ({"action": "append"} if name == "--package" else {})))


RUN_OUTPUT = 2**24  # characters of a cell's streams that are kept for --json and --notebook

# Options of `run` -> what argparse is told of them.
_RUN_OPTIONS: dict[str, Json] = {
    "--kernel": {"metavar": "NAME", "help": "kernel name (default: the notebook's own, else python3)"},
    "--timeout": {"metavar": "S", "type": float, "default": math.inf, "help": "seconds for one cell, at least 1"},
    "--keep-going": {"action": "store_true", "help": "run the next cell after one that failed"},
    "-p": {"metavar": ("NAME", "VALUE"), "nargs": 2, "help": "set a variable, as papermill does", "dest": "parameters"},
    "--output-dir": {"metavar": "DIR", "default": ".", "help": "where pictures and other files go (default: .)"},
    "--html": {"action": "store_true", "help": "save the HTML of tables too"},
    "--notebook": {
        "metavar": "FILE",
        "help": "write the notebook that was run, after each cell; it may be FILE itself",
    },
    "--unlabelled": {"action": "store_true", "help": "run blocks of a .md file that name no language, too"},
    "--json": {"action": "store_true", "help": "print one JSON object at the end instead of live output"},
    "--put": {"metavar": "FILE", "help": "bring it into the kernel's directory first; may be repeated"},
    "--get": {"metavar": "PATH", "help": "bring it to DIR at the end; may be repeated"},
}


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(prog="jupyter-exec", description="Run code in a stateful Jupyter kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a file, its cells in order, in one kernel", epilog=_EXAMPLES)
    run.formatter_class = argparse.RawDescriptionHelpFormatter
    what = run.add_mutually_exclusive_group(required=True)
    kinds = ".py (# %%%% begins a cell), .md (its fenced blocks), .ipynb, or - for stdin"
    what.add_argument("file", nargs="?", metavar="FILE", help=kinds)
    what.add_argument("-c", dest="code", metavar="CODE", help="run this code")
    for name, says in _RUN_OPTIONS.items():
        again: Json = {"action": "append", "default": []} if name in ("-p", "--put", "--get") else {}
        run.add_argument(name, **(again | says))
    kernels = commands.add_parser("kernels", help="list the kernels that can be started, and where they come from")
    mcp = commands.add_parser("mcp", help="serve run_code and other tools to a language model by MCP (stdio)")
    for command in (run, kernels, mcp):
        _add_places(command)
    return parser


def _server_of(options: argparse.Namespace) -> JupyterServer:
    kind = "docker" if options.docker is not None else "server" if options.server is not None else "local"
    for name, (needed, _, _) in _PLACE_OPTIONS.items():  # silently ignored, --network none would be a trap
        if getattr(options, name[2:].replace("-", "_")) and needed != kind:
            raise ValueError(f"{name} works only {'for local kernels' if needed == 'local' else f'with --{needed}'}.")
    if kind == "docker":
        return DockerJupyterServer(
            custom_image_name=options.docker or None,
            base_image=options.base_image,
            packages=options.package or (),
            network=options.network,
            hardened=options.hardened,
            bind_dir=options.mount,
            mem_limit=options.memory,
        )
    if kind == "local":
        return LocalJupyterServer(python=options.python, cwd=options.cwd)
    from urllib.parse import parse_qs, urlsplit

    url = urlsplit(options.server)
    if url.scheme not in ("http", "https") or not url.hostname:
        shown = options.server.partition("?")[0]
        raise ValueError(f"{shown} is no URL of a Jupyter server, such as https://host:8888/.")
    token = parse_qs(url.query).get("token", [os.environ.get("JUPYTER_TOKEN")])[0]
    if options.token_file:
        token = Path(options.token_file).read_text(encoding="utf-8").strip()
    base_url = re.sub(r"(?<!/user)/(lab|tree)\Z", "", url.path.rstrip("/")) or "/"  # as a server prints its address
    info = JupyterConnectionInfo(url.hostname, url.scheme == "https", url.port, token, base_url, options.ca_file)
    return RemoteJupyterServer(info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    It is that of the code (1 if it raised), 2 for any other trouble, 128 + N after signal N.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    options, unknown = (parser := _parser()).parse_known_args(words[:at])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (arguments of a script stand behind --)")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # show as an escape what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jupyter-exec: %(message)s"))
    logger.addHandler(handler)
    build_logger.setLevel(logging.INFO)
    for name in ("SIGTERM", "SIGHUP") if argv is None else ():  # the same clean-up as after Ctrl-C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        if options.command == "run":
            return _run(options, words[at + 1 :])
        return _serve_mcp(options) if options.command == "mcp" else _list_kernels(options)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our stdout has left
        return 141
    except (JupyterExecError, ValueError, OSError) as error:
        says = str(error) if isinstance(error, JupyterExecError | ValueError) else describe_os_error(error)
        with contextlib.suppress(OSError):
            say(says)
        return 2
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Drop what could not be written: at its end, Python would try again to write it, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    read = functools.partial(read_document, options.file, options.unlabelled, bool(options.kernel))
    document = read() if options.code is None else _script("code", options.code)
    kernel_name = options.kernel or document.kernel_name or "python3"
    if options.parameters:
        document.add_parameters(options.parameters)
    _check_paths(options)
    with _server_of(options) as server, contextlib.ExitStack() as stack:
        specs = server.kernelspecs()
        language = str(specs.get(kernel_among(kernel_name, specs) or "", {}).get("language") or "python")
        steps = list(_runnable(document, kernel_name, language))
        if not steps:
            raise ValueError(f"There is no code to run in {document.name}.")
        speaks_python = language.lower() == "python"
        if not speaks_python and (arguments or options.parameters):
            raise ValueError(f"Arguments and parameters are for Python, and the kernel speaks {language}.")
        printer = JsonPrinter(language) if options.json else LivePrinter(len(steps))
        stack.push(printer.close)
        executor = JupyterCodeExecutor(
            server,
            kernel_name,
            options.timeout,
            options.output_dir,
            max_output=RUN_OUTPUT,
            on_output=printer if isinstance(printer, LivePrinter) else None,
            on_input=printer.ask if sys.stdin and options.file != "-" else None,
            startup=_startup(document.is_script, options, arguments) if speaks_python else "",
        )
        stack.enter_context(executor)
        for source in options.put:
            if _is_elsewhere(source, options):
                executor.upload(source)
        folder = Folder(options.output_dir)  # code may put a link in its place
        printer.status = _run_steps(executor, document, steps, printer, folder, options)
        if speaks_python and document.is_script and executor._kernel.alive:
            printer.status = _wait_for_threads(executor, printer) or printer.status
        if not _bring_back(executor, options.get, folder):
            printer.status = printer.status or 2
        return printer.status


def _check_paths(options: argparse.Namespace) -> None:
    """Raise ValueError for files that would take each other's place."""
    if options.notebook:
        if not Path(options.notebook).parent.is_dir():
            raise ValueError(f"There is no directory for {options.notebook}.")
        with contextlib.suppress(OSError):  # one of them is no file
            is_notebook = options.file is None or options.file.lower().endswith(".ipynb")
            if not is_notebook and os.path.samefile(options.file, options.notebook):
                raise ValueError(f"--notebook {options.notebook} would take the place of the code.")
    put = [os.path.abspath(path) for path in options.put]
    for option, paths in ("--get", options.get), ("--put", put):
        names = list(map(os.path.basename, paths))
        if {"", ".", ".."} & set(names) or len(set(names)) < len(names):
            raise ValueError(
                f"{option} must name files, each with another last part: that is its name at the other end."
            )


def _bring_back(executor: JupyterCodeExecutor, paths: Sequence[str], folder: Folder) -> bool:
    """Bring files, under the last parts of their paths, from where the kernel runs; returns whether all have come."""
    have_come = True
    for path in paths:
        try:
            with folder.replace(os.path.basename(path)) as file:
                executor.download(path, file)
        except OSError as error:  # a FileTransferError is one
            say(error)
            have_come = False
    return have_come


def _is_elsewhere(source: str, options: argparse.Namespace) -> bool:
    """Whether a file is still to be brought to the kernel. Raises: ValueError if another of its name is there."""
    target = Path(options.cwd or "", os.path.basename(os.path.abspath(source)))
    if options.docker is not None or options.server is not None or not target.exists():
        return True
    if not target.samefile(source):
        raise ValueError(f"--put {source} would take the place of {target.absolute()}, which is there already.")
    return False


def _runnable(document: Document, kernel_name: str, language: str) -> Iterator[Step]:
    """Yield the cells that such a kernel can run; blocks in other languages are skipped."""
    for step in document.steps:
        is_code = step.cell.get("cell_type") == "code" and step.cell["source"].strip()
        if is_code and not step.has_tag("skip-execution"):
            try:
                cell_of(CodeBlock(step.cell["source"], step.language), kernel_name, language)
            except ValueError:
                say(f"{document.name}:{step.line}: skipped a block of {step.language}")
            else:
                yield step


def _startup(is_script: bool, options: argparse.Namespace, arguments: list[str]) -> str:
    """Return code by which a script finds what `python FILE` would give it: arguments, __file__, modules beside it."""
    # IPython warns of sys.exit(), with which many a script ends.
    lines = ["__import__('warnings').filterwarnings('ignore', 'To exit: use')"] if is_script else []
    lines += ["exit = quit = __import__('sys').exit"] if is_script else []  # IPython's would first run the rest
    if is_script or arguments:
        argv = ["-c" if options.code is not None else options.file, *arguments]
        lines += [f"__import__('sys').argv[:] = {argv!r}"]
    if is_script and options.file not in (None, "-"):
        path = os.path.abspath(options.file)
        lines += [f"__file__ = {path!r}"]
        if options.docker is None and options.server is None:
            lines += [f"__import__('sys').path.insert(0, {os.path.dirname(path)!r})"]
    return "\n".join(lines)


# What Python does at the end of a script: it ends the pools of concurrent.futures, and waits for threads.
_LAST_WAIT = """\
import threading
for end in reversed(getattr(threading, "_threading_atexits", [])):
    end()
for thread in threading.enumerate():
    if not (thread.daemon or thread is threading.current_thread()):
        thread.join()
"""


def _wait_for_threads(executor: JupyterCodeExecutor, printer: LivePrinter | JsonPrinter) -> int:
    """Wait for what a script has left running; returns the exit status if that goes wrong, else 0."""
    try:
        result = executor.execute(f"__import__('builtins').exec({_LAST_WAIT!r}, {{}})")
    except KeyboardInterrupt:
        raise printer.trouble or KeyboardInterrupt from None
    if result.status != "ok":
        say(f"while threads of the script went on: {result.note or 'they could not be waited for'}")
    return result.exit_code


def _ask(prompt: str, password: bool) -> str:
    if password and sys.stdin.isatty():
        import getpass

        return getpass.getpass(prompt)
    return input(prompt)


def _run_steps(
    executor: JupyterCodeExecutor,
    document: Document,
    steps: Sequence[Step],
    printer: LivePrinter | JsonPrinter,
    folder: Folder,
    options: argparse.Namespace,
) -> int:
    """Run cells, up to the first that fails unless `keep_going` is set; return the exit status."""
    status, stem = 0, Path(options.file or "code").stem.lstrip("-") or "stdin"
    notebook = Path(options.notebook or "").absolute()
    beside_notebook = Folder(notebook.parent) if options.notebook else folder
    kept: list[ExecutionResult] = []  # of the cells that have run, even if Ctrl-C ended the call

    def keep(step: Step, result: ExecutionResult) -> None:
        step.record(result)
        if options.notebook:
            document.save(beside_notebook, notebook.name, executor._notebook_metadata)
        kept.append(result)

    for number, step in enumerate(steps, 1):
        printer.begin(CellFiles(folder, f"{stem}-{step.number or number}", options.html))
        block = CodeBlock(step.cell["source"], step.language)
        try:
            result = executor.execute_block(block, on_result=functools.partial(keep, step))
        except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C, a signal, or the end of who reads our stdout
            if len(kept) == number and not printer.trouble:
                printer.end(step, kept[-1], document.place(step, kept[-1]))
            raise printer.trouble or error from None
        place = document.place(step, result)
        if step.has_tag("raises-exception"):
            result.status = "expected" if result.status == "error" else result.status
        elif exited := exit_of(result.error):
            result.outputs.remove(result.error or {})
            result.status, (result.exit_code, result.note) = "exited", exited
        printer.end(step, result, place)
        if result.status == "exited":
            if left := len(steps) - number:
                say(f"{place}: the code has ended the run here; not run: {left} cells")
            return status or result.exit_code
        if result.status not in ("ok", "expected"):
            had_no_kernel = result.status == "died" and result.death is None
            status = status or (2 if had_no_kernel else result.exit_code)
            if had_no_kernel or not options.keep_going:
                break
    return status


def _list_kernels(options: argparse.Namespace) -> int:
    with _server_of(options) as server:
        if not (specs := server.kernelspecs()):
            raise ValueError("No kernel is installed there: run python3 -m pip install ipykernel.")
        for name, spec in sorted(specs.items()):
            fields = (name, spec.get("display_name", ""), spec.get("resource_dir", ""))
            print_clean(sys.stdout, "\t".join(re.sub(r"\s", " ", str(field)) for field in fields))
    return 0


MCP_PATIENCE = 45.0  # seconds until a tool answers, whatever happens: clients give up after a minute
MCP_SESSIONS = 16  # kernels of one server
MCP_OUTPUT = 20_000  # characters of text in an answer
MCP_FILE = 2**24  # bytes of a file that read_file takes
MCP_END = 5.0  # seconds for the end of all kernels
_IMAGE_HEADS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_MCP_INSTRUCTIONS = """\
Code runs in Jupyter kernels, one for each session; variables and imports stay from call to call. Use the session
"default" unless you need several kernels at once. An error costs only the code that raised it."""


def _mcp_text(text: str) -> list[Json]:
    return [{"type": "text", "text": shorten(text, MCP_OUTPUT)}]


def _mcp_result(result: ExecutionResult) -> list[Json]:
    if result.status == "died" and result.death is None:  # there was no kernel
        raise JupyterExecError(result.note)
    if result.status == "error" and not result.error:
        result.note = result.note or f"exit status {result.exit_code}"
    result.note = "" if result.note == TRUNCATED else result.note  # the mark says more
    return result.to_messages("mcp", max_chars=MCP_OUTPUT) or _mcp_text("The code has ended well, without output.")


async def _soon(awaitable: Awaitable[_T]) -> _T:
    """Wait for something. Raises: ValueError if it takes too long."""
    import asyncio

    try:
        return await asyncio.wait_for(awaitable, MCP_PATIENCE)
    except asyncio.TimeoutError:
        why = "the kernel is still being started, or runs code that has to be waited for or interrupted"
        raise ValueError(f"Not done within {MCP_PATIENCE:g} s: {why}. Try again.") from None


class McpTools:
    """The tools of `jupyter-exec mcp`, by their names; their docstrings are for the language model."""

    def __init__(self, server: JupyterServer) -> None:
        self._server = server
        self._executors: dict[str, AsyncJupyterCodeExecutor] = {}
        self._jobs: dict[str, list[Job]] = {}  # by session, in order: the latest, and earlier ones that still matter
        self._untold: set[Job] = set()  # jobs whose result was not told yet, only that they still run

    def _executor(self, session: str) -> AsyncJupyterCodeExecutor:
        if session not in self._executors:
            if len(self._executors) >= MCP_SESSIONS:
                raise ValueError(f"There are {MCP_SESSIONS} sessions, and can be no more: {list(self._executors)}.")
            self._executors[session] = AsyncJupyterCodeExecutor(self._server, max_output=MCP_OUTPUT * 9 // 10)
        return self._executors[session]

    def _jobs_of(self, session: str) -> list[Job]:
        if not self._jobs.get(session):
            raise ValueError(f"No code was run in session {session!r}, or not since its restart.")
        return self._jobs[session]

    async def run_code(
        self, code: str, language: str = "python", timeout: float | None = None, session: str = "default"
    ) -> list[Json]:
        """Run code and return what it prints, its last value, its pictures, and the traceback if it raises.

        Variables stay for the next call in the same session; each session is a kernel of its own. Plots that are shown
        come back as images. `language` is "python" or "bash". After `timeout` seconds the code is interrupted, and
        variables are kept; without it the code may run as long as it needs. After 45 seconds this returns "still
        running", and the code goes on: call `wait` for the rest. Of more than 20,000 characters of output you get the
        beginning and the end. Nobody answers input().
        """
        call = CellCall(code, math.inf if timeout is None else timeout, language=language)
        deadline = Deadline(MCP_PATIENCE)
        executor = await _soon(self._executor(session)._started())
        jobs = self._jobs.setdefault(session, [])
        jobs.append(job := Job(executor, call, patient=True))
        try:
            await self._ended(job, deadline.within(MCP_PATIENCE))
        finally:  # it may have been cancelled before it began: then `wait` is for the code before it
            if job.interrupted and not job.has_begun and job in jobs:
                jobs.remove(job)
        if job in jobs and not (job.done or all(other.done for other in jobs[: jobs.index(job)])):
            job.interrupt()  # it has not begun
            jobs.remove(job)
            advice = "Wait for that, interrupt it, or use another session."
            raise ValueError(f"Session {session!r} still runs earlier code, so this code was not run. {advice}")
        return self._answer(jobs, job)

    async def _ended(self, job: Job, seconds: float) -> None:
        """Wait for the end of code, no longer than some seconds. If this is cancelled, interrupt the code."""
        import asyncio

        try:
            await job.until(job.ended.is_set, seconds)
        except asyncio.CancelledError:
            job.interrupt()
            raise

    def _answer(self, jobs: list[Job], job: Job) -> list[Json]:
        """Return what the code of a job has shown, and that of earlier ones of which nobody has heard."""
        if not job.done:
            self._untold.add(job)
            end = job.output[-MCP_OUTPUT // 10 :]
            says = f"The last of its output so far:\n{end}" if end else "It has shown nothing so far."
            return _mcp_text(f"The code is still running: call wait for the rest, or interrupt. {says}")
        self._untold.discard(job)
        own, earlier = _mcp_result(job.wait(0)), []
        for other in jobs[: jobs.index(job)] if job in jobs else ():
            if other in self._untold and other.done:
                try:
                    earlier += _mcp_result(other.wait(0))
                except JupyterExecError as error:
                    earlier += _mcp_text(clean_text(str(error)))
                self._untold.discard(other)
        jobs[:-1] = [other for other in jobs[:-1] if other in self._untold or not other.done]
        if earlier:
            told = _mcp_text("The earlier code of this session has ended:")
            earlier = [*told, *earlier, *_mcp_text("The code of this call:")]
        return earlier + own

    async def wait(self, session: str = "default", seconds: float = 45) -> list[Json]:
        """Wait for the latest code of a session, 45 seconds at most, and return all that run_code would have returned.

        If the code takes longer, this says so, and you may call it again.
        """
        jobs = self._jobs_of(session)
        await self._ended(job := jobs[-1], max(0, min(seconds, MCP_PATIENCE)))
        return self._answer(jobs, job)

    async def interrupt(self, session: str = "default") -> list[Json]:
        """Interrupt the code that runs in a session, and return what it has shown; variables are kept."""
        jobs = self._jobs_of(session)
        job = next((job for job in jobs if not job.done), jobs[-1])
        job.interrupt()
        await self._ended(job, MCP_PATIENCE)
        return self._answer(jobs, job)

    async def restart(self, session: str = "default") -> list[Json]:
        """Give a session a fresh kernel: its code is ended, all its variables are lost, files stay."""
        jobs = self._jobs.get(session, [])
        self._untold.difference_update(jobs)
        await _soon(self._executor(session).restart())
        jobs[:] = [job for job in jobs if not job.done]  # these came later, or waited for their turn
        return _mcp_text(f"Session {session!r} has a fresh kernel; all its variables are lost.")

    async def read_file(self, path: str, session: str = "default") -> list[Json]:
        """Return a file from where the code runs: text (20,000 characters of it), an image, or else base64.

        A relative path begins in the directory in which the session's kernel was started.
        """
        data = await _soon(self._executor(session).download(path, max_bytes=MCP_FILE))
        coded = base64.b64encode(data).decode("ascii")
        for head, mime_type in _IMAGE_HEADS.items():
            if data.startswith(head):
                output = {"output_type": "display_data", "data": {mime_type: coded}, "metadata": {}}
                return _mcp_result(ExecutionResult("ok", 0, "intact", "", [output]))
        try:
            return _mcp_text(data.decode("utf-8") or "The file is empty.")
        except UnicodeDecodeError:
            return _mcp_text(f"No text: {len(data)} bytes, in base64:\n{coded}")

    async def write_file(
        self, path: str, content: str, is_base64: bool = False, session: str = "default"
    ) -> list[Json]:
        """Write a file where the code runs: text (as UTF-8), or with `is_base64` any bytes.

        A relative path begins in the directory in which the session's kernel was started. Directories are made, and a
        file of that name is replaced.
        """
        data = base64.b64decode(content, validate=True) if is_base64 else content.encode("utf-8", "replace")
        await _soon(self._executor(session).upload(data, path))
        return _mcp_text(f"{len(data)} bytes were written to {path}.")

    async def list_files(self, path: str = ".", session: str = "default") -> list[Json]:
        """List a directory where the code runs: size in bytes, time of the last change (UTC), name."""
        lines = []
        for file in await _soon(self._executor(session).list_files(path)):
            name = file.name if file.name.isprintable() else repr(file.name)
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(max(0, min(file.modified, 2**37))))
            lines.append(f"{file.size:>10}  {when}  {name}{'/' * (file.kind == 'directory')}")
        return _mcp_text("\n".join(lines) or "The directory is empty.")

    def end(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(MCP_SESSIONS) as pool:
            list(pool.map(AsyncJupyterCodeExecutor._end, self._executors.values()))
        self._server.stop()


def _with_errors(tool: Callable[..., Awaitable[list[Json]]]) -> Callable[..., Awaitable[Any]]:
    """Return a tool as MCP wants it: what it raises is a result, too."""
    from mcp.types import CallToolResult

    @functools.wraps(tool)
    async def answer(*arguments: Any, **named: Any) -> Any:
        failed = False  # if code raised, the tool did not fail: of a failed tool, models may get no pictures
        try:
            content = await tool(*arguments, **named)
        except (JupyterExecError, ValueError) as error:
            content, failed = _mcp_text(clean_text(str(error))), True
        return CallToolResult.model_validate({"content": content, "isError": failed})

    return answer


def _serve_mcp(options: argparse.Namespace) -> int:
    """Serve until the end of stdin, or a signal."""
    import asyncio

    try:
        from mcp.server import MCPServer
    except ImportError:
        raise ValueError("This needs the MCP SDK, which is not here: pip install 'mcp>=2'.") from None
    if sys.stdin is None:
        raise ValueError("There is no stdin, over which a client would speak.")
    tools = McpTools(_server_of(options))
    mcp = MCPServer("jupyter-exec", version=__version__, instructions=_MCP_INSTRUCTIONS, log_level="WARNING")
    logger.propagate = False  # the SDK has given the root logger a handler, on stderr like ours

    for name in ("run_code", "wait", "interrupt", "restart", "read_file", "write_file", "list_files"):
        mcp.add_tool(_with_errors(getattr(tools, name)), structured_output=False)
    troubles: list[Exception] = []

    def serve() -> None:
        try:
            asyncio.run(mcp.run_stdio_async())
        except Exception as error:  # the client reads no more
            troubles.append(error)

    # In threads that nobody has to wait for: no signal ends the SDK's reading of stdin, or the start of a kernel.
    serving = threading.Thread(target=serve, daemon=True)
    ending = threading.Thread(target=tools.end, daemon=True)
    serving.start()
    try:
        while serving.is_alive():
            serving.join(1.0)
    finally:
        try:
            ending.start()
            ending.join(MCP_END)
        finally:
            if ending.is_alive():  # whatever was begun ends with this process
                os._exit(1)
    if troubles:
        raise JupyterExecError(f"The MCP server has ended: {troubles[0]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# ======================================================================================================
# 18. License
# ======================================================================================================
#
# MIT License
#
# Copyright (c) 2026 The jupyter_exec authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation
# the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and
# to permit persons to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of
# the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
# THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
# AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS
# IN THE SOFTWARE.
