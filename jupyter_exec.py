# SPDX-License-Identifier: MIT - jupyter_exec - stateful code execution in Jupyter kernels, in one file
"""Run code in stateful Jupyter kernels: one file, without jupyter_client.

Variables live from block to block, an error costs only the failing block, and images come back as files::

    from jupyter_exec import CodeBlock, JupyterCodeExecutor, LocalJupyterServer

    with LocalJupyterServer() as server, JupyterCodeExecutor(server) as executor:
        print(executor.execute_code_blocks([CodeBlock("print('Hello, World!')")]))
    # exit_code=0 output='Hello, World!\\n' output_files=[]

The module speaks the kernel wire protocol itself. It needs ``pyzmq``; a kernel needs ``ipykernel`` in *its*
Python. To vendor it, copy this file: it may be imported under any name and keeps no state at module level.

Contents (a section uses names of the sections above it only; "pure" = no socket, clock, process or file)

    1  Errors         pure   one tree; data in attributes, the sentence in ``str()``
    2  Messages       pure   Message, KernelConnection
    3  Codecs         pure   ZmqCodec (multipart + HMAC), PipeCodec (the host's pipe), JsonCodec and V1Codec
    4  WebSocket      pure   the client's side of RFC 6455
    5  Execution      pure   state machine of one cell; folding and rendering of outputs
    6  Channels              Deadline, Loop, Pipe, the ways to reach a kernel
    7  Kernel client         one cell at a time: replies, outputs, deadline, interrupt, death
    8  Kernel host           kernelspecs, launch, watch, relay; runs at the other end of a pipe
    9  Jupyter servers       JupyterConnectionInfo, RemoteJupyterServer: REST and WebSockets
    10 Hosted servers        the link to a kernel host, CommandJupyterServer, LocalJupyterServer
    11 Docker                DockerJupyterServer
    12 Code executor         CodeBlock, CodeResult, MarkdownCodeExtractor, JupyterCodeExecutor and its async face
    13 Command line          ``jupyter-exec run``, ``jupyter-exec kernels``
    14 License

Where the kernels live: a server object starts a Python process, sends it this very source over stdin, and
the process becomes the *kernel host* that starts, watches and kills kernels. When your program ends, however it
ends, the pipe closes, and the host takes every kernel with it.

Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

from __future__ import annotations

import base64
import contextlib
import functools
import heapq
import io
import itertools
import json
import logging
import os
import queue
import re
import selectors
import signal
import socket
import string
import struct
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Protocol, TextIO, TypeVar, cast

if TYPE_CHECKING:  # what takes long to import is imported where it is used
    import argparse
    import hmac
    import subprocess

__version__ = "0.1.0"

__all__ = ["CODE_WRITER_SYSTEM_MESSAGE", "AsyncJupyterCodeExecutor", "CodeBlock", "CodeResult"]
__all__ += ["CommandJupyterServer", "ConnectionClosed", "DockerJupyterServer", "ExecutionError", "ExecutionResult"]
__all__ += ["ExecutionTimeout", "IPythonCodeResult", "JupyterCodeExecutor", "JupyterConnectionInfo"]
__all__ += ["JupyterExecError", "KernelClient", "KernelConnection", "KernelDied", "KernelError", "KernelSpecNotFound"]
__all__ += ["KernelStartFailed", "LocalJupyterServer", "MarkdownCodeExtractor", "ProtocolError"]
__all__ += ["RemoteJupyterServer", "SandboxError", "ServerError", "SignatureError"]

PROTOCOL_VERSION = "5.4"  # of the messaging spec; a header without it is taken for version 4 by most kernels
MAX_MESSAGE = 512 * 2**20  # bytes of one message, whoever sends it; a kernel's 200 MB print is legal
START_TIMEOUT = 60.0  # seconds from asking for a kernel to its first answer, host or container included
CONTROL_TIMEOUT = 10.0  # seconds for the host to answer a control request; it answers in milliseconds
INTERRUPT_GRACE = 5.0  # seconds that an interrupted cell has to end before its kernel is killed
EVICTION_RETRY = 0.2  # seconds between attempts of `stop` and `restart` to end the running cell
INTERRUPT_RETRY = 0.05  # seconds between the interrupts of a cancelled cell until it has begun and ended
FORK_TIMEOUT = 2.0  # seconds for a fork server that is at work to fork a kernel; it takes milliseconds
FENCE_DELAY = 1.0  # seconds between an execute_reply and its idle after which the other counts as overdue
SHUTDOWN_GRACE = 2.0  # seconds that a kernel has to end by itself after shutdown_request
READY_RETRY = 0.2  # seconds between kernel_info_requests while a kernel without iopub_welcome starts
RECONNECT_INTERVAL = 5  # ms; ZeroMQ's 100 ms would be added to each start of a kernel
READ_BATCH = 100  # messages that are read of one socket before the others have their turn
DEATH_DRAIN = 0.02  # seconds of silence after a kernel's death before its output counts as complete
PING_INTERVAL = 20.0  # seconds between pings; proxies cut a silent WebSocket after 60
RECONNECT_TIMEOUT = 15.0  # seconds of trying until a lost connection counts as lost for good
RECONNECT_DELAY = 0.2  # seconds before each try
# Listing is for clients; the limit would drop output; nobody could answer a question.
GATEWAY_OPTIONS = [
    "--JupyterApp.answer_yes=true",
    "--JupyterWebsocketPersonality.list_kernels=true",
    "--ZMQChannelsWebsocketConnection.limit_rate=False",
]
# The gateway tells its port once it listens, where nobody else can write: never is a token sent to whoever was faster.
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
ENGINE_TIMEOUT = 10  # seconds for the Docker engine to answer at all; asked twice
WAIT_TIMEOUT = 30  # seconds for the Docker engine to do something, such as start a container
STOP_TIMEOUT = 10  # seconds for the Docker engine to end a container; stop() lasts no longer
BUILD_TIMEOUT = 1800  # seconds without a word from the engine while it builds an image
PIDS_LIMIT = 512  # processes and threads in a container; a fork bomb ends there
TMPFS_SIZE = "512m"  # of each temporary file system of a container
NORMAL_USER = "1000:1000"  # as whom code runs in a container where it would be root
MAX_ANSWER = 4 * 2**20  # bytes of an HTTP answer, head included; hostile JSON takes thirty times as much when parsed
LARGE_PART = 2**16  # bytes of a part of a message beyond which it is used where ZeroMQ has it, not copied
STREAM_PIECE = 2**17  # bytes of a stream message that are parsed at a time
MAX_JSON = 64 * 2**20  # bytes of a message that is no stream; and of its Python objects, four times as much
MAX_HEADER = 2**20  # bytes of each of header, parent_header and metadata
MAILBOX_LIMIT = 64 * 2**20  # unread bytes of a kernel: beyond it output is dropped, at twice that it is killed
RELAY_LIMIT = 64 * 2**20  # bytes that wait at the host for a slow link, beyond which output is dropped
RELAY_PIECE = 2**18  # bytes of such output that go at a time, so that other things get their turn
SLOW_LINK = 1.0  # seconds that output has waited there when an interrupt drops it, since the cell is to end in time
MAX_OUTPUT = 100_000  # characters of text that one call returns; the whole goes to a file
MAX_SPILL = 256 * 2**20  # characters of such a file
MAX_STRAY = 20  # numbered messages that may be missing at a cell's end: of threads in mid-send, to other clients
MAX_OUTPUTS = 50_000  # outputs of one cell that are kept
MAX_KEPT = 128 * 2**20  # bytes of a cell's outputs other than streams that are kept
MAX_LINE = 2**20  # characters of a line that a carriage return or backspaces can still erase
LINE_PIECE = 256  # characters of such a line that are copied at a time
TEXT_PIECE = 4096  # characters of a stream up to which what follows is joined at once
MAX_FILES = 500  # files of one call
MAX_FILE_BYTES = 2**30  # bytes of them, and of a session's journal
TRUNCATED = "Of the text only head and tail were kept; max_output says how much"
STDERR_TAIL = 4096  # bytes of a kernel's stderr that are kept to explain its death
PORT_ATTEMPTS = 3  # launches of a tcp kernel whose ports were taken between choosing and binding them

Json = dict[str, Any]
logger = logging.getLogger("jupyter_exec")
logger.addHandler(logging.NullHandler())
build_logger = logger.getChild("build")  # of images: minutes of work, whose progress the command line shows

if __name__ not in sys.modules:  # loaded by hand; dataclasses and pickle look their module up by its name
    _by_hand: Any = type("module", (), {})()
    _by_hand.__dict__ = globals()
    sys.modules[__name__] = _by_hand


# ======================================================================================================
# 1. Errors (pure)
#
#   JupyterExecError
#     ProtocolError              a message, frame or file that breaks the protocol
#       SignatureError           its HMAC is wrong
#     ConnectionClosed           (ConnectionError) the other end is gone
#     ExecutionTimeout           (TimeoutError) a deadline passed
#     ExecutionError             the code of a cell raised
#     KernelError
#       KernelSpecNotFound       (ValueError) no kernel of that name
#       KernelStartFailed        the process ended, or did not answer, before it was ready
#       KernelDied               the process ended while it was in use
#     ServerError                a Jupyter server refuses, or is none
#     SandboxError               Docker: no engine, image or container
#
# Each keeps its data as attributes (every field has a default, so that pickle can rebuild it).
# ======================================================================================================


class JupyterExecError(Exception):
    """Base of every error that this module raises on its own account."""


class ProtocolError(JupyterExecError):
    """The peer, or a connection file, broke the protocol."""


class SignatureError(ProtocolError):
    """A message was not signed with the kernel's key."""


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
    """Something about one kernel."""


@dataclass(eq=False)
class KernelSpecNotFound(KernelError, ValueError):
    """No kernelspec of that name; says what there is, and where it was looked for."""

    name: str = ""
    available: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    python: str = ""

    def __str__(self) -> str:
        hint = f"Available: {', '.join(self.available) or 'none'}."
        if self.name in ("python", "python3"):
            hint = f"Install it with: {self.python or 'python3'} -m pip install ipykernel. {hint}"
        return f"Kernel {self.name} is not installed. {hint} Searched: {', '.join(self.searched)}"


@dataclass(eq=False)
class KernelStartFailed(KernelError):
    """A kernel that could not be brought to its first answer."""

    argv: list[str] = field(default_factory=list)
    reason: str = ""
    exit_code: int | None = None  # negative: killed by that signal
    stderr: str = ""

    def __str__(self) -> str:
        lines = [f"The kernel could not be started: {self.reason or describe_exit(self.exit_code)}."]
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
    retryable: bool = False  # the cause does not hold for a kernel that is started again

    def __str__(self) -> str:
        tail = f"\n{self.stderr.rstrip()}" if self.stderr.strip() else ""
        return f"The kernel died ({self.sentence()}); all variables are lost{tail}"

    def sentence(self) -> str:
        return self.cause or describe_exit(self.exit_code)

    def status(self) -> int:
        """Return the exit status that reports this death, by the shell's convention; 137 if it is unknown."""
        if self.exit_code is None:
            return 137
        return 128 - self.exit_code if self.exit_code < 0 else 1


@dataclass(eq=False)
class ServerError(JupyterExecError):
    """A Jupyter server's refusal, or an answer that no Jupyter server gives."""

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
    """A container that could not be had, or an engine that cannot be used."""

    reason: str = ""
    image: str = ""
    container: str = ""
    logs: str = ""

    def __str__(self) -> str:
        names = [f"image {self.image}"] * bool(self.image) + [f"container {self.container}"] * bool(self.container)
        where = f" ({', '.join(names)})" if names else ""
        return "\n".join([self.reason + where, *([self.logs.strip()] if self.logs.strip() else [])])


def describe_os_error(error: OSError) -> str:
    """Say what an OSError is about, without its number."""
    return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror or error)


def describe_exit(exit_code: int | None) -> str:
    """Say how a process ended: `exit_code` is negative for a signal, None if nobody knows."""
    if exit_code is None:
        return "cause unknown"
    if exit_code >= 0:
        return f"it ended by itself with exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"


# ======================================================================================================
# 2. Messages (pure)
# ======================================================================================================


def text_of(value: object) -> str:
    """Return a string, or a number, that a peer sent, else ""; a list may be nested too deeply for `str`."""
    return str(value) if isinstance(value, str | int | float) else ""


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
    size: int = field(default=0, compare=False)  # bytes that it takes in memory, about
    lost: bool = False  # its content was too large, or no JSON: {} stands for it

    @property
    def msg_type(self) -> str:
        return text_of(self.header.get("msg_type"))

    @property
    def msg_id(self) -> str:
        return text_of(self.header.get("msg_id"))

    @property
    def parent_id(self) -> str:
        return text_of(self.parent_header.get("msg_id"))


def new_message(channel: str, msg_type: str, content: Json, *, session: str, msg_id: str, date: str) -> Message:
    """Make a message of the client. `date` is ISO 8601 with a zone, as strict kernels (Deno, evcxr) demand it."""
    header = {
        "msg_id": msg_id,
        "session": session,
        "username": "jupyter_exec",
        "date": date,
        "msg_type": msg_type,
        "version": PROTOCOL_VERSION,
    }
    return Message(channel, header, {}, {}, content, [])


def execute_content(code: str, *, silent: bool = False, store_history: bool = True, allow_stdin: bool = False) -> Json:
    """Return the content of an execute_request.

    Spec: https://jupyter-client.readthedocs.io/en/stable/messaging.html#execute
    """
    # ipykernel never answers to code with surrogates: pairs become the character they mean, others U+FFFD.
    code = code.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return {
        "code": code,
        "silent": silent,
        "store_history": store_history,
        "user_expressions": {},
        "allow_stdin": allow_stdin,
        "stop_on_error": False,  # nothing is queued, and a kernel under load has aborted the next cell instead
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
        """Parse the text of a connection file. Raises ProtocolError with the name of the wrong field."""
        data = json_object(text, "connection file")
        values = {f.name: data[f.name] for f in fields(cls) if data.get(f.name) is not None}
        for name in ("ip", "shell_port", "iopub_port", "stdin_port", "control_port"):
            if name not in values:
                raise ProtocolError(f"The connection file has no {name!r}.")
        for name, value in values.items():
            if name.endswith("_port"):
                values[name] = _port(name, value)
            elif not isinstance(value, str):
                raise ProtocolError(f"The connection file's {name!r} is not a string.")
        connection = cls(**values)
        if connection.transport not in ("tcp", "ipc"):
            raise ProtocolError(f"The connection file's transport {connection.transport!r} is neither tcp nor ipc.")
        new_signer(connection.key, connection.signature_scheme)  # raises for an unknown scheme
        return connection

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def address(self, channel: str) -> str:
        """Return the ZeroMQ endpoint of `channel`."""
        port = getattr(self, f"{channel}_port")
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{port}"
        return f"tcp://[{self.ip}]:{port}" if ":" in self.ip else f"tcp://{self.ip}:{port}"


def _port(name: str, value: object) -> int:
    # JEP 106 allows ports as strings; xeus writes them so.
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise ProtocolError(f"The connection file's {name!r} is not a port number.")
    return value


def new_signer(key: str, signature_scheme: str) -> hmac.HMAC | None:
    """Return the HMAC to be copied for each message, None if messages are not signed.

    Raises: ProtocolError for an unknown signature scheme.
    """
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
    """Parse a JSON object that a peer sent; `what` names it in the ProtocolError."""
    try:
        if not isinstance(data, str):
            # ipykernel sends lone surrogates as raw bytes: "replace" keeps the rest of such a message.
            data = str(data, "utf-8", "replace")
        if len(data) > MAX_JSON or (len(data) > LARGE_PART and json_weight(data) > 4 * MAX_JSON):
            raise ProtocolError(f"The {what} is too large: {len(data)} characters.")
        value = json.loads(data, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"The {what} is not JSON: {error.__class__.__name__}.") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"The {what} is not a JSON object.")
    return value


def _parse_int(text: str) -> Any:
    # Thousands of digits take long to parse, and cannot be printed: they stay text.
    return int(text) if len(text) < 400 else text


def json_weight(text: str | bytes) -> int:
    """Return how many bytes JSON takes as Python objects, about: 60 MB of empty lists are 1.5 GB."""
    marks: Any = '[{,"' if isinstance(text, str) else (b"[", b"{", b",", b'"')
    return len(text) + 64 * sum(map(text.count, marks))


def _object_or_null(data: bytes | memoryview, what: str) -> Json:
    # Deviation: xeus kernels send null for an empty parent_header, metadata or transient.
    return {} if data in (b"{}", b"null") else json_object(data, what)


def dump_json(value: object) -> bytes:
    """Encode in pure ASCII: lone surrogates in a model's code survive as escapes, which is equally legal JSON."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


# ======================================================================================================
# 3. Codecs (pure)
# ======================================================================================================

DELIMITER = b"<IDS|MSG>"


class ZmqCodec:
    """Message <-> the parts of one ZeroMQ multipart message, signed with the kernel's key.

    There is no record of signatures seen: a forged copy can then never get a genuine message refused.

    Raises: ProtocolError for an unknown signature scheme.

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
        dicts = (message.header, message.parent_header, message.metadata, message.content)
        signed = [dump_json(part) for part in dicts]
        return [DELIMITER, self._sign(signed), *signed, *message.buffers]

    def decode(self, channel: str, parts: Sequence[bytes]) -> Iterator[Message]:
        """Verify and parse `parts`; identities and the topic, if any, stand before the delimiter.

        Yields one message; a huge one of type stream comes in pieces. Raises: SignatureError, ProtocolError.
        """
        from hmac import compare_digest

        try:
            start = parts.index(DELIMITER) + 1
        except ValueError:
            raise ProtocolError("A message has no delimiter.") from None
        if len(parts) - start < 5:
            raise ProtocolError("A message has fewer than five parts.")
        if sum(map(len, parts)) > MAX_MESSAGE:
            raise ProtocolError(f"A message is larger than {MAX_MESSAGE} bytes.")
        signature, header, parent_header, metadata, content = parts[start : start + 5]
        # "The signature is computed over the *serialized* parts exactly as sent; buffers are not signed."
        if not compare_digest(signature, self._sign((header, parent_header, metadata, content))):
            raise SignatureError("A message is not signed with the kernel's key.")
        yield from messages_of(channel, parts[start + 1 :])


# What is looked at besides names: a large message of another type is not parsed.
_CONTENTS = {"stream", "execute_result", "display_data", "update_display_data", "error", "input_request"}
_CONTENTS |= {"execute_reply", "kernel_info_reply"}
_STREAM_START = re.compile(rb'\{\s*"name"\s*:\s*"std(?:out|err)"\s*,\s*"text"\s*:\s*"')


def messages_of(channel: str, parts: Sequence[bytes]) -> Iterator[Message]:
    """Parse [header, parent_header, metadata, content, *buffers]; a huge message of type stream comes in pieces.

    Raises: ProtocolError.
    """
    if max(map(len, parts[:3])) > MAX_HEADER:
        raise ProtocolError(f"The header of a message is larger than {MAX_HEADER} bytes.")
    header, parent_header = json_object(parts[0], "header"), _object_or_null(parts[1], "parent_header")
    is_read = text_of(header.get("msg_type")) in _CONTENTS
    if len(parts[3]) > STREAM_PIECE and not is_read:
        parts = [*parts[:2], b"{}", b"{}"]
    metadata, content, buffers = _object_or_null(parts[2], "metadata"), parts[3], list(map(bytes, parts[4:]))
    if header.get("msg_type") == "stream" and _text_start(content):
        for piece in stream_pieces(content):
            yield Message(channel, header, parent_header, metadata, *_content(piece, buffers, len(piece)))
        return
    size, lost = sum(map(len, parts)) + 1000, is_read and len(content) > MAX_JSON
    if is_read and not lost:
        size += json_weight(bytes(content))
        lost = size > 4 * MAX_JSON
    rest = ({}, buffers, size, True) if lost else _content(content, buffers, size)
    yield Message(channel, header, parent_header, metadata, *rest)


def _content(data: bytes | memoryview, buffers: list[bytes], size: int) -> tuple[Json, list[bytes], int, bool]:
    """Return the last fields of a Message; a content that cannot be read, nested too deeply for one, counts as lost."""
    try:
        return _object_or_null(data, "content"), buffers, size, False
    except ProtocolError:
        return {}, buffers, size, True


def stream_pieces(content: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Cut the JSON of a stream message into several of the kind, of STREAM_PIECE bytes each.

    A print of 200 MB is then never parsed as a whole. Anything else comes through as it is.
    """
    position, end = _text_start(content), len(content) - 2
    if not position:
        yield content
        return
    head = bytes(content[:position])
    while position < end:
        piece = bytes(content[position : min(position + STREAM_PIECE, end)])
        if position + len(piece) < end:
            piece = _whole_characters(piece) or bytes(content[position:end])
        yield b"".join((head, piece, b'"}'))
        position += len(piece)


def _text_start(content: bytes | memoryview) -> int:
    """Return where the text of a stream message begins, if it is long and can be cut, else 0."""
    start = _STREAM_START.match(content[:100])
    return start.end() if start and len(content) > STREAM_PIECE and content[-2:] == b'"}' else 0


def _whole_characters(text: bytes) -> bytes:
    """Return the start of JSON text up to where its end tears neither a character nor an escape."""
    for back in range(1, 4):  # a character of UTF-8 has up to four bytes
        if text[-back] & 0xC0 == 0xC0:
            length = 2 + (text[-back] >= 0xE0) + (text[-back] >= 0xF0)
            text = text[:-back] if back < length else text
            break
    escape = text.rfind(b"\\", max(0, len(text) - 6))
    if escape >= 0 and _is_escape(text, escape):
        length = 6 if text[escape + 1 : escape + 2] == b"u" else 2
        text = text[:escape] if escape + length > len(text) else text
    # One half of a surrogate pair waits for the other.
    half = re.search(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z", text[-6:])
    return text[:-6] if half and _is_escape(text, len(text) - 6) else text


def _is_escape(text: bytes, position: int) -> bool:
    """Whether the backslash there begins an escape, and is not itself an escaped one."""
    before = text[: position + 1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


class PipeCodec:
    """Lists of byte strings <-> the byte stream between a server object and its kernel host.

    A frame is: b"JX", number of parts (u16), total length of the parts (u32), length of each part (u32),
    the parts; integers are big-endian. The first part is an address: b"" for control (one JSON part follows),
    b"KERNEL/CHANNEL" for a relayed message (the parts of the ZeroMQ message follow, signed end to end),
    b"+KERNEL" for a piece of the frame of a large one.
    """

    _HEAD = struct.Struct(">2sHI")

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._needed = self._HEAD.size

    @classmethod
    def encode(cls, parts: Sequence[bytes]) -> bytes:
        lengths = [len(part) for part in parts]
        head = cls._HEAD.pack(b"JX", len(parts), sum(lengths))
        return b"".join((head, struct.pack(f">{len(parts)}I", *lengths), *parts))

    def feed(self, data: bytes) -> Iterator[list[bytes]]:
        """Take bytes as they came; yield the parts of each complete frame. Raises ProtocolError: give up then."""
        self._buffer += data
        while len(self._buffer) >= self._needed:
            magic, count, total = self._HEAD.unpack_from(self._buffer)
            if magic != b"JX" or not count:
                raise ProtocolError("The pipe carries something that is not a frame.")
            if total > self._limit:
                raise ProtocolError(f"A frame of {total} bytes is over the limit of {self._limit}.")
            position = self._HEAD.size + 4 * count
            self._needed = position + total
            if len(self._buffer) < self._needed:
                return
            yield list(self._split(count, position))
            del self._buffer[: self._needed]
            self._needed = self._HEAD.size

    def _split(self, count: int, position: int) -> Iterator[bytes]:
        lengths = struct.unpack_from(f">{count}I", self._buffer, self._HEAD.size)
        if position + sum(lengths) != self._needed:
            raise ProtocolError("A frame's parts do not add up to its length.")
        with memoryview(self._buffer) as view:
            for length in lengths:
                yield bytes(view[position : position + length])
                position += length


CHANNELS = ("shell", "iopub", "stdin", "control")
V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
MAX_PARTS = 65535  # of one WebSocket message: more buffers than any widget has, few enough to allocate
_NULLABLE = ("parent_header", "metadata", "content")


class JsonCodec:
    """Message <-> WebSocket message without a subprotocol: JSON text, or binary if there are buffers.

    The binary form is a table (big-endian u32), the JSON, the buffers.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/websocket-protocols.html
    """

    def encode(self, message: Message) -> str | bytes:
        names = ("channel", "header", *_NULLABLE)
        text = dump_json({name: getattr(message, name) for name in names} | {"buffers": []})
        return _join_parts(">I", [text, *message.buffers]) if message.buffers else text.decode("ascii")

    def decode(self, data: str | bytes) -> Iterator[Message]:
        """Parse what the server sent. Raises: ProtocolError."""
        parts: list[Any] = [data] if isinstance(data, str) else _cut_parts(">I", data)
        body = json_object(parts[0], "message")
        # Deviation: xeus kernels send null for an empty object.
        body |= {name: {} for name in _NULLABLE if body.get(name) is None}
        if not all(isinstance(body.get(name), dict) for name in ("header", *_NULLABLE)):
            raise ProtocolError("A part of a message is not a JSON object.")
        channel, header = _channel(body.get("channel")), body["header"]
        parent_header, metadata, content = (body[name] for name in _NULLABLE)
        size = json_weight(parts[0]) + sum(map(len, parts[1:]))
        yield Message(channel, header, parent_header, metadata, content, parts[1:], size)


class V1Codec:
    """Message <-> binary WebSocket message of the subprotocol V1_SUBPROTOCOL.

    It is a table (little-endian u64), channel, header, parent_header, metadata, content, the buffers.
    """

    def encode(self, message: Message) -> bytes:
        objects = (message.header, message.parent_header, message.metadata, message.content)
        return _join_parts("<Q", [message.channel.encode(), *map(dump_json, objects), *message.buffers, b""])

    def decode(self, data: str | bytes) -> Iterator[Message]:
        """Parse what the server sent; a huge message of type stream comes in pieces. Raises: ProtocolError."""
        parts = [] if isinstance(data, str) else _cut_parts("<Q", data)
        # "offset_n is the number of bytes in the message": nothing is left after it.
        if len(parts) < 6 or parts.pop():
            raise ProtocolError("A message has fewer than five parts, or bytes after the last one.")
        yield from messages_of(_channel(parts[0].decode("utf-8", "replace")), parts[1:])


def _join_parts(word: str, parts: Sequence[bytes]) -> bytes:
    # The table is the number of parts, then the offset of each from the table's start, all in one format.
    offsets = itertools.accumulate(map(len, parts[:-1]), initial=struct.calcsize(word) * (len(parts) + 1))
    return b"".join((struct.pack(f"{word[0]}{len(parts) + 1}{word[1]}", len(parts), *offsets), *parts))


def _cut_parts(word: str, data: bytes) -> list[bytes]:
    size = struct.calcsize(word)
    count = struct.unpack_from(word, data)[0] if len(data) >= size else 0
    if not 1 <= count <= MAX_PARTS or len(data) < size * (count + 1):
        raise ProtocolError("A message's table of offsets is missing or too long.")
    # A hostile offset points back, into the table or behind the end.
    bounds = [size * (count + 1), *struct.unpack_from(f"{word[0]}{count}{word[1]}", data, size), len(data)]
    if bounds != sorted(bounds):
        raise ProtocolError("A message's offsets do not fit its length.")
    return [data[start:end] for start, end in itertools.pairwise(bounds[1:])]


def _channel(name: object) -> str:
    if name not in CHANNELS:
        raise ProtocolError("A message names no channel of a kernel.")
    return str(name)


# ======================================================================================================
# 4. WebSocket protocol (pure)
#
# The client's side: what the server's answer must say, then bytes in, messages and bytes out.
#
# Spec: https://www.rfc-editor.org/rfc/rfc6455; its sentences stand, by section, at the lines that obey or
# enforce them. An enforced one is the text of the ProtocolError.
# ======================================================================================================

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


def check_opening(key: str, header: Callable[[str], str | None]) -> str | None:
    """Check an answer with status 101; return the subprotocol, None for Jupyter's default one. Raises: ProtocolError.

    `key` is what the request had as Sec-WebSocket-Key, `header(name)` the value of one of the answer's headers.
    """
    import hashlib

    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    digest = hashlib.sha1(key.encode("ascii") + guid, usedforsecurity=False).digest()
    tokens = [token.strip() for token in (header("Connection") or "").lower().split(",")]
    # Jupyter: if no subprotocol is selected, "the Jupyter Server must reply with an empty string".
    subprotocol = header("Sec-WebSocket-Protocol") or None
    rules = {
        "4.2.2: an |Upgrade| header field with value websocket": (header("Upgrade") or "").lower() == "websocket",
        "4.2.2: a |Connection| header field with value Upgrade": "upgrade" in tokens,
        "4.2.2: a |Sec-WebSocket-Accept| header field that answers the key": (
            header("Sec-WebSocket-Accept") == base64.b64encode(digest).decode("ascii")
        ),
        '9: "A server MUST NOT respond with any extension not requested by the client."': (
            not header("Sec-WebSocket-Extensions")
        ),
        '4.1: "a subprotocol not requested by the client"': subprotocol in (None, V1_SUBPROTOCOL),
    }
    for rule, kept in rules.items():
        if not kept:
            raise ProtocolError(f"The WebSocket was not opened. RFC 6455, {rule}")
    return subprotocol


class WebSocket:
    """An open connection: iterate over `receive()` of what arrives, then send `data_to_send()`."""

    def __init__(self, mask: Callable[[], bytes], max_message: int) -> None:
        """`mask()` returns 4 unpredictable bytes at each call; `max_message`: bytes of one message of the server."""
        self._mask, self._max_message = mask, max_message
        self.closed = False  # by either side, or for a violation
        self._buffer = bytearray()  # received, not parsed yet
        self._ping: bytes | None = None  # of the server, not answered yet
        self._farewell = b""  # a Close frame that answers one, or a violation
        self._opcode = 0  # of a message of which fragments have come; 0: there is none
        self._message = bytearray()  # these fragments

    def receive(self, data: bytes) -> Iterator[str | bytes]:
        """Take bytes as they came; yield the messages that they complete. Raises ProtocolError: give up then."""
        self._buffer += data
        while not self.closed and (frame := self._next_frame()):
            yield from self._handle(*frame)

    def data_to_send(self) -> bytes:
        """Return, once, what answers the received bytes: Pong and Close frames."""
        # 5.5.3: "the endpoint MAY elect to send a Pong frame for only the most recently processed Ping frame."
        pong = b"" if self._ping is None else self._frame(PONG, self._ping)
        answers, self._ping, self._farewell = pong + self._farewell, None, b""
        return answers

    def send(self, data: str | bytes) -> bytes:
        """Return a message as one frame."""
        return self._frame(TEXT, data.encode()) if isinstance(data, str) else self._frame(BINARY, data)

    def ping(self) -> bytes:
        return self._frame(PING, b"")

    def pong(self) -> bytes:
        """Return an unsolicited Pong frame."""
        return self._frame(PONG, b"")

    def close(self, code: int = 1000) -> bytes:
        """Return a Close frame, b"" if there was one already; 5.5.1: nothing may be sent after it."""
        frame = b"" if self.closed else self._frame(CLOSE, code.to_bytes(2, "big"))
        self.closed = True
        return frame

    def _must(self, kept: object, rule: str, code: int = 1002) -> None:
        if not kept:
            # 7.1.7: "the endpoint SHOULD send a Close frame with an appropriate status code"
            self._farewell = self.close(code)
            raise ProtocolError(f"The WebSocket failed. RFC 6455, {rule}")

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        # Every rule is enforced before more bytes are waited for.
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
        if length < 126:
            head = struct.pack(">BB", 0x80 | opcode, 0x80 | length)
        elif length < 2**16:
            head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, length)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, length)
        # 5.3: "the client MUST pick a fresh masking key"
        key = self._mask()
        # As two big integers: octet by octet, 10 MB would take a second.
        keys = int.from_bytes((key * (length // 4 + 1))[:length], "little")
        masked = (int.from_bytes(payload, "little") ^ keys).to_bytes(length, "little")
        return b"".join((head, key, masked))


# ======================================================================================================
# 5. Execution (pure)
# ======================================================================================================

# What a terminal takes for a command: CSI (colours, cursor), strings with an end (titles, clipboard), two characters
# (character sets, reset), the C1 forms of these, any other control character. None of it is left by one pass.
_CONTROLS = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]{0,8}[0-Z\\^-~]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m|\r")
_DEFAULT_REPR = re.compile(r"<[^\n]*>\Z")  # <Figure size 640x480 with 1 Axes>, <IPython.core.display.HTML object>


def _as_text(content: Any) -> bytes:
    if isinstance(content, list):  # a notebook's way to write a string
        content = "".join(map(str, content))
    if not isinstance(content, str):
        raise ValueError("it is no string")
    return content.encode("utf-8", "replace")


def _as_binary(content: Any) -> bytes:
    return base64.b64decode(_as_text(content))


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


# What goes to a file, best first: MIME type -> (word of AutoGen's sentence, suffix, its bytes from what a kernel sent).
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


def clean_text(text: str, colours: bool = False) -> str:
    """Remove what a terminal would take for a command: of control characters only newline and tab are left.

    With `colours`, for a terminal, colours and carriage returns are left too.
    """
    text = text.replace("\r\n", "\n")
    return _CONTROLS.sub(lambda found: found[0] if colours and _COLOUR.fullmatch(found[0]) else "", text)


class Line:
    """The line that a terminal would be on: what carriage returns and backspaces have erased of it is gone."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._returned = False  # what comes next overwrites the line
        self.size = 0  # characters of the line, about

    def add(self, text: str) -> str:
        """Take text; return the lines that are finished, with their newlines."""
        lines = text.split("\n") if self._returned or "\r" in text or "\b" in text else [*text.rpartition("\n")[::2]]
        if "\n" not in text:
            lines = lines[-1:]
        finished = []
        for line in lines[:-1]:
            self._type(line)
            finished += [self.take(), "\n"]
        self._type(lines[-1])
        return "".join(finished)

    def _type(self, text: str) -> None:
        left = text.rstrip("\r")
        if left and (self._returned or "\r" in left):
            self.take()
            left = left.rpartition("\r")[2]
        self._returned = len(text) > len(text.rstrip("\r")) or (self._returned and not text)
        for piece in re.findall(r"\x08+|[^\x08]+", left) if "\b" in left else filter(None, [left]):
            if piece[0] == "\b":
                self._erase(len(piece))
            else:
                self._pieces.append(piece)
                self.size += len(piece)

    def _erase(self, count: int) -> None:
        while count and self._pieces:
            last = self._pieces.pop()
            if len(last) > 2 * LINE_PIECE:  # cut once, so that each character is copied a few times at most
                self._pieces += [last[i : i + LINE_PIECE] for i in range(0, len(last), LINE_PIECE)]
                continue
            left = last[:-count]
            self._pieces += [left] * bool(left)
            self.size -= len(last) - len(left)
            count -= len(last) - len(left)

    def take(self) -> str:
        """Return the line as it stands, and begin a new one."""
        text, self._pieces, self._returned, self.size = "".join(self._pieces), [], False, 0
        return text


def gap_mark(missing: int, where: str = "") -> str:
    """Return what stands for `missing` characters in a text; `where` says where they are."""
    return f"\n[{missing} characters are missing here{'; ' * bool(where)}{where}]\n"


def shorten(text: str, limit: int | None, gaps: Sequence[int], where: str) -> str:
    """Return head and tail of `text`, `limit` characters in all, with one mark that says `where` the rest is.

    `gaps` are the numbers of characters for which a mark stands in the text already.
    """
    if limit is None or len(text) <= limit:
        for missing in gaps:
            text = text.replace(gap_mark(missing), gap_mark(missing, where), 1)
        return text
    head, tail = text[: limit // 2], text[max(limit // 2, len(text) - limit // 2) :]
    missing = len(text) - len(head) - len(tail) + sum(gap - len(gap_mark(gap)) for gap in gaps)
    return f"{head}{gap_mark(missing, where)}{tail}"


class Outputs:
    """What a cell has shown, within one budget: head and tail of its streams, of the rest as much as there is room for.

    They are in three parts, in order: all up to the end of the head; what is no stream up to the tail; the tail.
    """

    def __init__(self, limit: int | None) -> None:
        """`limit`: characters that are kept of all streams, None for all."""
        self._head_room = 2**63 if limit is None else limit // 2
        self._tail_room = 2**63 if limit is None else limit - limit // 2
        self.clear()
        self.withheld = False  # something did not fit in

    def clear(self) -> None:
        self._head: list[Json] = []
        self._middle: list[Json] = []
        self._tail: deque[Json] = deque()
        self._head_size = self._tail_size = 0  # characters of streams
        self._line, self._name = Line(), ""  # the open line, and of which stream it is
        self._displays: dict[str, tuple[Json, int]] = {}  # display_id -> what it shows, and its size
        self._room = MAX_KEPT
        self.missing = 0  # characters between head and tail

    def write(self, name: str, text: str) -> None:
        """Take text of a stream."""
        if name != self._name:
            self._end_line()
            self._name = name
        self._put(self._line.add(text))
        if self._line.size > MAX_LINE:  # nothing erases as much
            self._put(self._line.take())

    def _end_line(self) -> None:
        self._put(self._line.take())

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
        """Keep an output that is no stream, and took `size` bytes, if there is room."""
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
        """Change every display of that id; returns False if there is none."""
        if display_id not in self._displays:
            return False
        room = self._room + self._displays[display_id][1] - size
        if room < 0:
            self.withheld = True
        else:
            self._room, self._displays[display_id] = room, (_bundle(content), size)
        return True

    def all(self) -> list[Json]:
        """Return the outputs, in nbformat's shape; nothing may be added afterwards."""
        self._end_line()
        if (excess := self._tail_size - self._tail_room) > 0:  # less than the first text: else it would be gone
            first = next(output for output in self._tail if "text" in output)
            first["text"], self.missing = first["text"][excess:], self.missing + excess
        name = self._head[-1].get("name", "stdout") if self._head else "stdout"
        gap = [{"output_type": "stream", "name": name, "text": gap_mark(self.missing)}] if self.missing else []
        found: list[Json] = []
        for name, outputs in itertools.groupby(
            [*self._head, *gap, *self._middle, *self._tail], lambda output: output.get("name")
        ):
            if name is not None:
                text = "".join(output["text"] for output in outputs)
                found += [{"output_type": "stream", "name": name, "text": text}] * bool(text)
                continue
            for output in outputs:
                shown = output.pop("transient", None)
                found.append(output | self._displays[shown["display_id"]][0] if shown else output)
        return found


def _append_text(outputs: list[Json] | deque[Json], name: str, text: str) -> None:
    if outputs and outputs[-1].get("name") == name and len(outputs[-1]["text"]) < TEXT_PIECE:
        outputs[-1]["text"] += text
    elif text:
        outputs.append({"output_type": "stream", "name": name, "text": text})


@dataclass
class ExecutionResult:
    """What one cell did.

    `status` is "ok", "error", "timeout", "interrupted", "died" or "exited"; `kernel_state` is "intact", "lost"
    (all variables are gone) or "busy"; `note` is the sentence about it, empty when all is well. `outputs` are
    dicts in the shape of nbformat 4 (stream, execute_result, display_data, error); `missing` is how many characters
    of streams are not in them, since there were more than `max_output`.
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
        return render(self.outputs, self.note, no_file)

    def raise_for_error(self) -> None:
        """Raise ExecutionError, ExecutionTimeout, KernelDied or JupyterExecError unless the cell ended well."""
        if self.status == "timeout":
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

    What ZeroMQ drops at the kernel, since this program was stopped or too slow, leaves a gap. Answers to other
    clients leave one, too, but the idle status after each is for all.
    """

    def __init__(self) -> None:
        self._prefix: str | None = None  # of the ids; "": the kernel has others
        self._first = self._came = 0
        self._latest = ""  # id; a huge message comes in pieces

    def is_short(self, message: Message, own: bool) -> bool:
        """Count a message; returns whether it is the cell's idle status and many before it are missing."""
        msg_id = message.msg_id
        if self._prefix is None and own and message.channel == "iopub":
            match = _NUMBERED.fullmatch(msg_id)
            self._prefix, self._first = (match[1], int(match[2])) if match else ("", 0)
        if not self._prefix or msg_id == self._latest or not msg_id.startswith(self._prefix):
            return False
        self._latest = msg_id
        idle = message.content.get("execution_state") == "idle"
        self._came += 1 + idle
        last = _NUMBERED.fullmatch(msg_id) if own and idle else None
        return last is not None and int(last[2]) - self._first > self._came + MAX_STRAY


class Execution:
    """State machine of one execute_request: messages in, outputs and an outcome out.

    It is done when the reply and the idle status have both come: they travel on different channels, so
    either may be first. One of them may be lost (a high-water mark, an interrupt at a bad moment): then the answer
    to a later request, whose id is in `fences`, tells that it will not come any more.
    """

    def __init__(self, msg_id: str, limit: int | None = None) -> None:
        """`limit`: characters that are kept of its streams."""
        self.msg_id = msg_id
        self._outputs = Outputs(limit)
        self.execution_count: int | None = None
        self.timed_out: float | None = None  # seconds, once the deadline has passed
        self.started = False  # the kernel is at it
        self.interrupted = False  # somebody asked for it
        self.signalled = False  # the kernel was told
        self.killed = False  # by us, since that did not help
        self.death: KernelDied | None = None
        self.fences: set[str] = set()
        self.reconnected = False  # both of reply and idle may be lost
        self.withheld = False  # output was dropped on its way
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
        """Whether outputs may be missing: the idle status that comes after them is, or somebody dropped them."""
        return self.withheld or self._outputs.withheld or (self._reply is not None and not self._idle)

    def feed(self, message: Message) -> Json | None:
        """Take any message from the kernel; return the output to show now, if there is one. It is the caller's."""
        if message.parent_id in self.fences and message.content.get("execution_state") != "busy":
            self._passed.add(message.channel)
        own = message.parent_id == self.msg_id
        self.withheld = self._tally.is_short(message, own) or self.withheld or (own and message.lost)
        if not own:
            return None
        self.started = self.started or (message.channel == "iopub" and message.msg_type != "status")
        handler = self._HANDLERS.get((message.channel, message.msg_type))
        # "Clients should ignore messages that they do not understand."
        return handler(self, message.content, message.size) if handler else None

    def _on_reply(self, content: Json, size: int) -> Json | None:
        self._reply = content
        self._count(content, 0)
        # Deprecated, but the only place of what `print?` and %load have to say.
        shown = None
        for entry in self._payload:
            text = entry.get("text") if entry.get("source") == "set_next_input" else None
            data = {"text/plain": text} if isinstance(text, str) else entry.get("data")
            if entry.get("source") in ("page", "set_next_input") and isinstance(data, dict):
                shown, size = self._show({"output_type": "display_data"}, {"data": data}, size), 0
        return shown

    @property
    def _payload(self) -> list[Json]:
        payload = (self._reply or {}).get("payload")
        return [entry for entry in payload if isinstance(entry, dict)] if isinstance(payload, list) else []

    def _on_status(self, content: Json, size: int) -> None:
        self._idle = self._idle or content.get("execution_state") == "idle"

    def _count(self, content: Json, size: int) -> None:
        if isinstance(content.get("execution_count"), int):
            self.execution_count = content["execution_count"]

    def _on_stream(self, content: Json, size: int) -> Json | None:
        name, text = content.get("name"), content.get("text")
        if name not in ("stdout", "stderr") or not isinstance(text, str):
            return None
        # A Jupyter server's limit on the rate of output; the cell goes on, its output is dropped.
        self.withheld = self.withheld or (name == "stderr" and bool(re.search(r"IOPub \w+ rate exceeded", text)))
        self._clear_if_due()
        self._outputs.write(name, text)
        return {"output_type": "stream", "name": name, "text": text}

    def _on_result(self, content: Json, size: int) -> Json:
        self._count(content, 0)
        return self._show({"output_type": "execute_result", "execution_count": self.execution_count}, content, size)

    def _on_display(self, content: Json, size: int) -> Json:
        return self._show({"output_type": "display_data"}, content, size)

    def _show(self, output: Json, content: Json, size: int) -> Json:
        self._clear_if_due()
        output |= _bundle(content)
        self._outputs.add(dict(output), size, _display_id(content))
        return output

    def _on_update(self, content: Json, size: int) -> Json:
        # "update_display_data: ... update any and all of the displays that have the given display_id"
        if not self._outputs.update(_display_id(content), content, size):
            self._show({"output_type": "display_data"}, content, size)  # of an earlier cell: said here, too
        return {"output_type": "update_display_data"} | _bundle(content)

    def _on_error(self, content: Json, size: int) -> Json:
        traceback = content.get("traceback")
        lines = [line for line in traceback if isinstance(line, str)] if isinstance(traceback, list) else []
        names = {name: text_of(content.get(name)) for name in ("ename", "evalue")}
        self._clear_if_due()
        self._outputs.add({"output_type": "error", **names, "traceback": lines}, size)
        return {"output_type": "error", **names, "traceback": lines}

    def _on_clear(self, content: Json, size: int) -> Json:
        # "wait: Wait to clear the output until new output is available."
        self._clear_next = True
        if not content.get("wait"):
            self._clear_if_due()
        return {"output_type": "clear_output", "wait": bool(content.get("wait"))}

    def _clear_if_due(self) -> None:
        if self._clear_next:
            self._outputs.clear()
            self._clear_next = False

    _HANDLERS: ClassVar[dict[tuple[str, str], Callable[[Execution, Json, int], Json | None]]] = {
        ("shell", "execute_reply"): _on_reply,
        ("iopub", "status"): _on_status,
        ("iopub", "execute_input"): _count,
        ("iopub", "stream"): _on_stream,
        ("iopub", "execute_result"): _on_result,
        ("iopub", "display_data"): _on_display,
        ("iopub", "update_display_data"): _on_update,
        ("iopub", "error"): _on_error,
        ("iopub", "clear_output"): _on_clear,
    }

    @property
    def ended_session(self) -> bool:
        """Whether the code called exit() or quit(), with or without an exit status."""
        return any(not keep or type(keep) is int for keep in self._exits)

    @property
    def _exits(self) -> list[Any]:
        # Deviation: exit(3) is to IPython exit(keep_kernel=3), and to everybody else an exit status.
        return [entry.get("keepkernel") for entry in self._payload if entry.get("source") == "ask_exit"]

    def result(self, duration: float) -> ExecutionResult:
        """Sum up, once; `duration` in seconds. The sentences are those of the README's table of failures."""
        outputs = self._outputs.all()
        status, exit_code, state, note = self._outcome()
        if status == "error" and self._reply and not any(output["output_type"] == "error" for output in outputs):
            # The error came with the reply only, or there was no room for it.
            outputs.append(self._on_error({"ename": "Aborted", "evalue": "the kernel did not run it"} | self._reply, 0))
        missing, count = self._outputs.missing, self.execution_count
        return ExecutionResult(status, exit_code, state, note, outputs, count, duration, self.death, missing)

    def _outcome(self) -> tuple[str, int, str, str]:
        if self.timed_out is not None:
            return self._timeout_outcome(f"{self.timed_out:g} s")
        if self.death:
            return "died", self.death.status(), "lost", clean_text(str(self.death))
        if self.interrupted:
            if self.done:
                return "interrupted", 130, "intact", "Interrupted; variables are kept"
            return "interrupted", 130, "busy", "Interrupted, but the kernel is still running the code"
        if self.ended_session:
            status = next((keep % 256 for keep in self._exits if type(keep) is int), 0)
            return "exited", status, "lost", "the session was ended by the code"
        if self._reply and self._reply.get("status") == "ok":
            return "ok", 0, "intact", self._loss_note
        if self._reply:
            return "error", 1, "intact", self._loss_note
        if self.reconnected and not self.started:
            return "error", 1, "intact", "The connection was lost; nobody knows whether the code ran"
        return "error", 1, "intact", "The kernel gave up the code, or its reply was lost"

    @property
    def _loss_note(self) -> str:
        if self.outputs_lost:
            return "Some of the output was lost on its way, or left out since there was too much of it"
        if self.reconnected:
            return "The connection was lost for a moment; some of the output may be missing"
        return TRUNCATED if self._outputs.missing else ""

    def _timeout_outcome(self, seconds: str) -> tuple[str, int, str, str]:
        if self.death:
            sentence = f"Timeout: the code ignored the interrupt after {seconds}; the kernel was killed and restarted"
            if not self.killed:
                sentence = f"Timeout: interrupted after {seconds}; the kernel died ({self.death.sentence()})"
            return "timeout", 124, "lost", f"{sentence}; all variables are lost"
        if self.done:
            return "timeout", 124, "intact", f"Timeout: interrupted after {seconds}; variables are kept"
        return "timeout", 124, "busy", f"Timeout: interrupted after {seconds}; the kernel is still running the code"


def _display_id(content: Json) -> str:
    transient = content.get("transient")  # null or absent in some kernels
    return text_of(transient.get("display_id")) if isinstance(transient, dict) else ""


def _bundle(content: Json) -> Json:
    data, metadata = content.get("data"), content.get("metadata")
    return {"data": data if isinstance(data, dict) else {}, "metadata": metadata if isinstance(metadata, dict) else {}}


def render(outputs: Iterable[Json], note: str, save: Callable[[Json], str | None]) -> str:
    """Return outputs as the text of one block: streams exactly as printed, everything else on lines of its own.

    `save(data)` may put the best representation of a MIME bundle into a file; it returns the line that says so.
    """
    pieces: list[str] = []
    line_open = False  # the last piece is no stream, and wants a line of its own
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


def no_file(data: Json) -> None:
    """A `save` of `render` for which everything is text."""


def _lines(output: Json, save: Callable[[Json], str | None]) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"{output['ename']}: {output['evalue']}"
        yield from output["traceback"]
        return
    data = output["data"]
    saved = save(data)
    # One representation: text/plain, unless it is only an object's default repr and something better is there.
    texts = [data.get(mime) for mime in ("text/plain", "text/markdown", "text/latex")]
    plain, *others = [text if isinstance(text, str) else "" for text in texts]
    if not plain or _DEFAULT_REPR.match(plain):
        plain = "" if saved else next(filter(None, others), plain)
    if not plain and not saved and data:
        plain = f"[an output that is not shown, of type {', '.join(map(str, data))[:500]}]"
    yield from filter(None, (plain, saved))


def best_file(data: Json) -> tuple[str, str, Callable[[], bytes]] | None:
    """Return (word, suffix, encode) of the representation that belongs into a file, None if there is none.

    `encode()` returns the bytes of the file. Raises: ValueError for content that cannot be such a file.
    """
    data = {_VEGA.sub("application/vnd.vega+json", mime): content for mime, content in data.items()}
    for mime, (word, suffix, encode) in FILE_TYPES.items():
        if data.get(mime) is not None:
            return word, suffix, functools.partial(encode, data[mime])
    return None


# ======================================================================================================
# 6. Channels
# ======================================================================================================


class Deadline:
    """A point in time, made once per public call and passed down. None as `seconds` never comes."""

    __slots__ = ("_at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        never = seconds is None or seconds >= threading.TIMEOUT_MAX
        self._at = None if seconds is None or never else time.monotonic() + seconds

    @property
    def remaining(self) -> float | None:
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def expired(self) -> bool:
        return self._at is not None and time.monotonic() >= self._at

    def within(self, seconds: float) -> float:
        """Return what is left, at most `seconds`."""
        remaining = self.remaining
        return seconds if remaining is None else min(seconds, remaining)


class Loop:
    """One thread that waits for readiness and calls back. Only `post` and `stop` may be used from other threads.

    It serves the client (as a daemon thread) and the kernel host (as its main thread) alike, and needs no zmq:
    a ZeroMQ socket is watched through its ZMQ_FD, which is edge-triggered, so its callback must read it empty.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._callbacks: dict[int, dict[int, Callable[[], None]]] = {}  # descriptor -> event -> callback
        self._jobs: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._waker, self.alarm = socket.socketpair()  # `alarm` may serve signal.set_wakeup_fd
        self._waker.setblocking(False)
        self.alarm.setblocking(False)
        self._awake = False
        self._running = True
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.on_readable(self._waker.fileno(), self._on_wake)

    def post(self, job: Callable[[], None]) -> None:
        """Have `job()` called in the loop's thread, soon and in the order of the calls."""
        if os.getpid() != self._pid:
            raise JupyterExecError("This process was forked from the one with the server: make a new server here.")
        self._jobs.append(job)
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full: it will wake up anyway; closed: nobody listens
                self.alarm.send(b"\0")

    def later(self, seconds: float, job: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), job))

    def on_readable(self, descriptor: int, callback: Callable[[], None] | None) -> None:
        self._watch(descriptor, selectors.EVENT_READ, callback)

    def on_writable(self, descriptor: int, callback: Callable[[], None] | None) -> None:
        self._watch(descriptor, selectors.EVENT_WRITE, callback)

    def _watch(self, descriptor: int, event: int, callback: Callable[[], None] | None) -> None:
        callbacks = self._callbacks.setdefault(descriptor, {})
        before = sum(callbacks)
        if callback:
            callbacks[event] = callback
        else:
            callbacks.pop(event, None)
        after = sum(callbacks)
        if not after:
            del self._callbacks[descriptor]
            if before:
                self._selector.unregister(descriptor)
        elif not before:
            self._selector.register(descriptor, after, callbacks)
        elif before != after:
            self._selector.modify(descriptor, after, callbacks)

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the jobs posted so far; wait for its thread, unless called in it."""
        self.post(self._finish)
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(CONTROL_TIMEOUT)

    def _finish(self) -> None:
        self._running = False

    def run(self) -> None:
        """Call back until `stop`; an exception in a callback is logged and costs that callback only."""
        while self._running:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                for event, callback in list(key.data.items()):
                    if events & event and key.data.get(event):  # an earlier callback may have ended the watch
                        self._call(callback)
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._call(heapq.heappop(self._timers)[2])
        while self._jobs:  # whoever waits for one of these must not wait for ever
            self._call(self._jobs.popleft())
        self._selector.close()
        self._waker.close()
        self.alarm.close()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._waker.recv(4096)
        self._awake = False  # before the jobs: a job posted from now on wakes the loop again
        for _ in range(len(self._jobs)):
            self._call(self._jobs.popleft())

    def _call(self, callback: Callable[[], None]) -> None:
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
    """A Stream over two descriptors, such as a process's stdin and stdout (POSIX)."""

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
        self._is_tcp = getattr(sock, "family", None) in (socket.AF_INET, socket.AF_INET6)  # Docker has pipes of Windows
        if self._is_tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, size: int, /) -> bytes:
        with _tls_as_plain():
            data = self.raw.recv(size)
            while getattr(self.raw, "pending", int)():  # decrypted already: no descriptor would tell of it
                data += self.raw.recv(size)
        if self._is_tcp and hasattr(socket, "TCP_QUICKACK"):
            # A delayed acknowledgement costs 40 ms where the other end leaves Nagle's algorithm on, as Jupyter servers
            # and Docker engines do; the setting is forgotten at each read.
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
    """Let a TLS socket that has to wait say so as any other; ssl itself is not imported for those without."""
    try:
        yield
    except OSError as error:
        if type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError"):
            raise BlockingIOError from None
        raise


def as_stream(read_fd: int, write_fd: int) -> Stream:
    """Return a Stream over two descriptors that are no sockets."""
    if os.name != "nt":
        return FdStream(read_fd, write_fd)
    # Windows cannot poll a pipe: two threads copy between it and a socket.
    near, far = socket.socketpair()
    near.setblocking(False)
    threading.Thread(target=_copy, args=(functools.partial(os.read, read_fd, 2**16), far.sendall), daemon=True).start()
    threading.Thread(target=_copy, args=(functools.partial(far.recv, 2**16), _writer(write_fd)), daemon=True).start()
    return near


def _copy(read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    with contextlib.suppress(OSError):
        while data := read():
            write(data)


def _writer(descriptor: int) -> Callable[[bytes], object]:
    return open(descriptor, "wb", buffering=0).write


_inherited: weakref.WeakSet[Pipe | Tail] = weakref.WeakSet()


def _close_inherited() -> None:
    """In a forked child: let go of its copies, so that the pipe closes when the parent ends."""
    null = os.open(os.devnull, os.O_RDWR)
    for end in list(_inherited):
        with contextlib.suppress(OSError):  # under the socket object, which may belong to gevent
            os.dup2(null, end.fileno(), inheritable=False)
    os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class Outbox:
    """Writes to a stream as far as it takes bytes now, the rest when it is ready again. For the loop's thread.

    What waits stands in lanes, which take turns: a flood in one stops no other. The lane "" goes before them all.
    `on_stuck(reason)` is called when the stream breaks, or takes nothing for CONTROL_TIMEOUT.
    """

    def __init__(self, loop: Loop, stream: Stream, on_stuck: Callable[[str], None]) -> None:
        self._loop, self._stream, self._on_stuck = loop, stream, on_stuck
        self.waits_for_ever = False  # the other end may be stopped in a debugger
        self._begun = memoryview(b"")
        self._lanes: dict[str, deque[tuple[bytes, bool, float]]] = {}  # data, whether it may be dropped, since when
        self.waiting = 0  # bytes in the lanes
        self._sent_at = 0.0
        self._watched = False  # a check of the progress is due
        self._descriptor: int = getattr(stream, "write_fileno", stream.fileno)()

    @property
    def busy(self) -> bool:
        """Whether there is something that the stream has not taken yet."""
        return bool(self._begun or self._lanes)

    def send(self, data: bytes, lane: str = "", may_be_lost: bool = False) -> None:
        """Write, or queue, `data`."""
        now, busy = time.monotonic(), self.busy
        self._lanes.setdefault(lane, deque()).append((data, may_be_lost, now))
        self.waiting += len(data)
        if not busy:
            self._sent_at = now
            self._write()

    def _write(self) -> None:
        try:
            while self.busy:
                self._begun = self._begun or self._next()
                sent = self._stream.send(self._begun)
                self._sent_at = time.monotonic()
                self._begun = self._begun[sent:]
        except (BlockingIOError, InterruptedError):
            self._loop.on_writable(self._descriptor, self._write)
            if not self._watched:
                self._watched = True
                self._loop.later(CONTROL_TIMEOUT, self._check_progress)
        except OSError as error:
            self._on_stuck(f"writing failed: {error.strerror}")
        else:
            self._loop.on_writable(self._descriptor, None)

    def _next(self) -> memoryview:
        lane = "" if "" in self._lanes else next(iter(self._lanes))
        queued = self._lanes.pop(lane)
        data = queued.popleft()[0]
        if queued:
            self._lanes[lane] = queued  # behind the others
        self.waiting -= len(data)
        return memoryview(data)

    def drop_old(self, lane: str, instead: bytes) -> bool:
        """Drop what may be dropped of a lane in which something has waited for SLOW_LINK, and send `instead`.

        Returns whether it did.
        """
        queued, now = self._lanes.get(lane), time.monotonic()
        kept = [entry for entry in queued or () if not entry[1]]
        if not queued or now - queued[0][2] < SLOW_LINK or len(kept) == len(queued):
            return False
        # First: what is dropped may be the rest of a message of which a piece has been sent.
        self._lanes[lane] = deque([(instead, False, now), *kept])
        self.waiting += len(instead) - sum(len(data) for data, may_be_lost, _ in queued if may_be_lost)
        return True

    def _check_progress(self) -> None:
        idle = time.monotonic() - self._sent_at
        self._watched = self.busy and (self.waits_for_ever or idle < CONTROL_TIMEOUT)
        if self._watched:
            self._loop.later(max(CONTROL_TIMEOUT - idle, CONTROL_TIMEOUT / 10), self._check_progress)
        elif self.busy:
            self._on_stuck(f"nothing was read for {CONTROL_TIMEOUT:g} s")

    def close(self) -> None:
        self._begun = memoryview(b"")
        self._lanes.clear()
        self._loop.on_writable(self._descriptor, None)


class Tail:
    """The end of what comes out of a pipe, such as a process's stderr; the rest is read and forgotten."""

    def __init__(self) -> None:
        self._descriptor, self.writer = os.pipe()  # `writer` is to be closed by whoever passes it on
        os.set_blocking(self._descriptor, False)
        self._data = bytearray()
        self._loop: Loop | None = None
        _inherited.add(self)

    def fileno(self) -> int:
        return self._descriptor

    def __str__(self) -> str:
        return self._data.decode("utf-8", "replace").strip()

    def watch(self, loop: Loop) -> None:
        self._loop = loop
        loop.on_readable(self._descriptor, self._on_readable)

    def _on_readable(self) -> None:
        self.read()

    def read(self) -> bool:
        """Read what is there; returns False at the end."""
        try:
            data = os.read(self._descriptor, 2**16)
        except BlockingIOError:
            return True
        self._data += data
        del self._data[:-STDERR_TAIL]
        if not data and self._loop:
            self._loop.on_readable(self._descriptor, None)
        return bool(data)

    def drain(self) -> None:
        """Read all that a pipe can hold: who has written may have ended."""
        for _ in range(16):
            if self._descriptor < 0 or not self.read():
                break

    def close(self) -> None:
        self.drain()
        if self._loop:
            self._loop.on_readable(self._descriptor, None)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._loop = -1, None


class Pipe:
    """One end of the pipe between a server object and its kernel host. Belongs to its loop's thread.

    `on_parts(parts)` gets each frame; `on_closed(reason)` is called once, when the other end is gone, does not
    read, or has sent something that is no frame: there is no resynchronising.
    """

    def __init__(
        self, loop: Loop, stream: Stream, on_parts: Callable[[list[bytes]], None], on_closed: Callable[[str], None]
    ) -> None:
        self._loop, self.stream = loop, stream
        self._on_parts, self._on_closed = on_parts, on_closed
        _inherited.add(self)
        self._codec = PipeCodec()
        self.outbox = Outbox(loop, stream, self.close)
        self._closed = False
        loop.on_readable(stream.fileno(), self._read)

    def fileno(self) -> int:
        return self.stream.fileno()

    def send(self, parts: Sequence[bytes], lane: str = "", may_be_lost: bool = False) -> None:
        if not self._closed:
            self.outbox.send(PipeCodec.encode(parts), lane, may_be_lost)

    def _read(self) -> None:
        try:
            data = self.stream.recv(2**18)
            if not data:
                self.close("the pipe was closed")
                return
            for parts in self._codec.feed(data):
                self._on_parts(parts)
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, ProtocolError) as error:
            self.close(str(error))

    def close(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self._loop.on_readable(self.stream.fileno(), None)
            self.outbox.close()
            self.stream.close()
            self._on_closed(reason)


RawMessage = tuple[str, Any]  # channel and parts, or "WebSocket" and a message, as they came


class Reconnected:
    """A connection that was lost is there again; what was on its way may be missing."""


MailItem = RawMessage | KernelDied | Reconnected


class Mailbox:
    """What came from one kernel, in order: raw messages put in by the I/O thread, taken out by the caller's.

    Beyond MAILBOX_LIMIT unread bytes output is dropped. A kernel that goes on to twice as much counts as dead.
    """

    def __init__(self, on_flood: Callable[[], None] | None = None) -> None:
        """`on_flood()` is called, once, in the I/O thread, when the kernel is to be ended for what it sends."""
        self._queue: queue.SimpleQueue[tuple[MailItem, int]] = queue.SimpleQueue()
        self._on_flood = on_flood
        self._put_bytes = self._got_bytes = 0  # each written by one thread only,
        self._put_replies = self._got_replies = 0  # as these
        self.dropped = False  # output, since nobody came for it
        self.ended = False  # the kernel's exit is in it

    @property
    def answered(self) -> bool:
        """Whether an answer of the kernel on shell is in it, unread."""
        return self._put_replies > self._got_replies

    def put(self, item: MailItem) -> None:
        size, unread = _size_of(item), self._put_bytes - self._got_bytes
        if isinstance(item, tuple) and unread > MAILBOX_LIMIT:
            if self.ended or not _is_vital(item, size):
                self.dropped = True
                return
            if unread > 2 * MAILBOX_LIMIT:
                item, size = KernelDied(cause=f"it was killed: {unread // 2**20} MB of its messages were unread"), 0
                if self._on_flood:
                    self._on_flood()
        self.ended = self.ended or isinstance(item, KernelDied)
        self._put_bytes += size
        self._put_replies += _is_reply(item)
        self._queue.put((item, size))

    def get(self, timeout: float | None) -> MailItem | None:
        """Return the next item, or None after `timeout` seconds."""
        try:
            item, size = self._queue.get_nowait()
        except queue.Empty:
            # Deviation: with a timeout of 0, Python 3.10 may wait for ever.
            if timeout is not None and timeout <= 0:
                return None
            try:
                item, size = self._queue.get(timeout=timeout)
            except queue.Empty:
                return None
        self._got_bytes += size
        self._got_replies += _is_reply(item)
        return item


def _size_of(item: MailItem) -> int:
    """Return how many bytes an item takes in memory, about."""
    if not isinstance(item, tuple):
        return 0
    return 1000 + (len(item[1]) if isinstance(item[1], (str, bytes)) else sum(map(len, item[1])))


def _is_reply(item: MailItem) -> bool:
    return isinstance(item, tuple) and item[0] in ("shell", "WebSocket") and _names(item, "execute_reply")


_VITAL = ("_reply", "status", "error", "input_request", "execute_result")


def _is_vital(item: RawMessage, size: int) -> bool:
    """Whether a message is small, and by its words one that ends a cell or says how it ended."""
    return size < LARGE_PART and any(_names(item, word) for word in _VITAL)


def _names(item: RawMessage, word: str) -> bool:
    data = item[1]
    heads = [data[:4000]] if isinstance(data, (str, bytes)) else [part[:4000] for part in data[:5]]
    return any((word.encode() if isinstance(head, bytes) else word) in head for head in heads)


class Channels(Protocol):
    """A way to exchange messages with one kernel. Usable from any thread."""

    def send(self, message: Message) -> None: ...
    def decode(self, raw: RawMessage) -> Iterator[Message]: ...
    def close(self) -> None: ...


class KernelControl(Protocol):
    """What can be done to a kernel besides sending it messages; implemented by the servers."""

    owned: bool  # False: attached to, not to be killed or restarted
    supervised: bool  # a server starts it anew when it ends by itself: only `kill` ends it
    argv: list[str]  # of the kernel's process, empty if unknown
    connection_file: str | None  # on this machine
    start_timeout: float  # seconds for the kernel to be ready

    def start(self, mailbox: Mailbox) -> Channels:
        """Start the kernel, or start it anew, and connect; `mailbox` gets all that comes from it, its death too."""

    def interrupt(self, sent: Callable[[], None]) -> bool:
        """Interrupt the running cell; `sent()` is called, in any thread, once the signal is out.

        Returns False, with nothing done, if the kernel wants an interrupt_request instead.
        """

    def kill(self) -> None:
        """End the kernel at once, if it is ours; the mailbox gets its KernelDied."""

    def abandon(self) -> None:
        """Give up what runs the kernel, since it did not answer to `kill`; the next start has a new one."""

    def close(self) -> None:
        """Free what `start` made, the channels aside."""


def read_connection_file(path: str | os.PathLike[str]) -> KernelConnection:
    """Read a connection file. Raises ProtocolError if it is broken, or readable by others than its owner."""
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
    """Write a file that only its owner may read; a file or link that is there is replaced, not followed."""
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


def open_sockets(context: Any, connection: KernelConnection, identity: bytes) -> dict[str, Any]:
    """Connect shell, iopub, stdin and control; returns {channel: zmq.Socket}. The caller closes them.

    Raises: zmq.ZMQError.
    """
    import zmq

    kinds = {"shell": zmq.DEALER, "iopub": zmq.SUB, "stdin": zmq.DEALER, "control": zmq.DEALER}
    sockets: dict[str, Any] = {}
    try:
        for channel, kind in kinds.items():
            sockets[channel] = sock = context.socket(kind)
            sock.linger = 0
            sock.reconnect_ivl = RECONNECT_INTERVAL
            sock.maxmsgsize = MAX_MESSAGE
            if channel == "iopub":
                # The default high-water mark of 1000 messages loses output, and the final idle with it.
                sock.rcvhwm = 0
                # Subscribe before connecting, or the welcome is missed; the unique topic gets one for certain.
                sock.subscribe(b"")
                sock.subscribe(identity)
            else:
                # "stdin: ... the client's identity must be the same as that of its shell socket."
                sock.identity = identity
            sock.connect(connection.address(channel))
    except zmq.ZMQError:  # too many open files
        for sock in sockets.values():
            sock.close()
        raise
    return sockets


def read_all(sock: Any, deliver: Callable[[list[bytes]], None]) -> None:
    """Read a ZeroMQ socket empty."""
    import zmq

    with contextlib.suppress(zmq.Again):
        while not sock.closed:
            deliver(sock.recv_multipart(zmq.NOBLOCK))


class SocketReader:
    """Reads a ZeroMQ socket when its descriptor tells of a change, in batches, so that a flood starves nobody."""

    def __init__(self, loop: Loop, sock: Any, deliver: Callable[[list[bytes]], None]) -> None:
        self._loop, self._socket, self._deliver = loop, sock, deliver
        self._again = False  # a further batch is on the loop's list
        loop.on_readable(sock.fd, self.read)

    def read(self) -> None:
        if not self._again:
            self._read_batch()

    def drain(self) -> None:
        """Read all that is there, since nothing will follow."""
        read_all(self._socket, self._deliver)

    def _read_batch(self) -> None:
        import zmq

        self._again = False
        with contextlib.suppress(zmq.Again):
            for _ in range(READ_BATCH):
                if self._socket.closed:
                    return
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                self._deliver([frame.bytes if len(frame) < LARGE_PART else frame.buffer for frame in frames])
            self._again = True
            self._loop.post(self._read_batch)


class ZmqChannels:
    """The channels of a kernel that this machine reaches over ZeroMQ; the loop's thread owns the sockets."""

    def __init__(
        self, loop: Loop, context: Any, connection: KernelConnection, mailbox: Mailbox, *, watch: bool = False
    ) -> None:
        """With `watch`, a lost connection is reported as the kernel's death: nobody else would."""
        self._loop = loop
        self._codec = ZmqCodec(connection.key, connection.signature_scheme)
        self._sockets: dict[str, Any] = {}
        self._readers: dict[str, SocketReader] = {}
        self._mailbox = mailbox
        loop.post(functools.partial(self._open, context, connection, watch))

    def _open(self, context: Any, connection: KernelConnection, watch: bool) -> None:
        import zmq

        try:
            self._open_all(context, connection, watch)
        except zmq.ZMQError as error:
            self._mailbox.put(KernelDied(cause=f"its sockets cannot be opened here: {error.strerror}"))

    def _open_all(self, context: Any, connection: KernelConnection, watch: bool) -> None:
        self._sockets = open_sockets(context, connection, os.urandom(16).hex().encode())
        for channel, sock in self._sockets.items():
            self._readers[channel] = SocketReader(self._loop, sock, functools.partial(self._deliver, channel))
        if watch:
            import zmq

            self._monitor = self._sockets["shell"].get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._loop.on_readable(self._monitor.fd, self._on_disconnected)
            read_all(self._monitor, lambda parts: None)

    def _deliver(self, channel: str, parts: list[bytes]) -> None:
        self._mailbox.put((channel, parts))

    def _on_disconnected(self) -> None:
        events: list[list[bytes]] = []
        read_all(self._monitor, events.append)
        if events:
            self._mailbox.put(KernelDied(cause="its connection was closed"))

    def send(self, message: Message) -> None:
        parts = self._codec.encode(message)
        self._loop.post(functools.partial(self._send, message.channel, parts))

    def _send(self, channel: str, parts: list[bytes]) -> None:
        if channel in self._sockets:
            import zmq

            with contextlib.suppress(zmq.Again):  # a kernel that takes nothing: its death or the deadline tells
                self._sockets[channel].send_multipart(parts, zmq.NOBLOCK)
            self._readers[channel].read()  # sending may have eaten the descriptor's signal

    def decode(self, raw: RawMessage) -> Iterator[Message]:
        return self._codec.decode(*raw)

    def close(self) -> None:
        self._loop.post(self._close)

    def _close(self) -> None:
        for channel, sock in self._sockets.items():
            self._loop.on_readable(sock.fd, None)
            if channel == "shell" and hasattr(self, "_monitor"):
                self._loop.on_readable(self._monitor.fd, None)
                sock.disable_monitor()
            sock.close()
        self._sockets = {}


class PipeChannels:
    """The channels of a kernel whose host relays the signed parts through the pipe."""

    def __init__(self, relay: Callable[[str, list[bytes]], None], key: str) -> None:
        self._relay = relay
        self._codec = ZmqCodec(key)

    def send(self, message: Message) -> None:
        self._relay(message.channel, self._codec.encode(message))

    def decode(self, raw: RawMessage) -> Iterator[Message]:
        return self._codec.decode(*raw)

    def close(self) -> None:
        pass  # the pipe serves other kernels too


Dial = Callable[[Deadline], "tuple[socket.socket, str | None]"]


class WebSocketChannels:
    """The channels of a kernel behind a Jupyter server; the loop's thread owns the socket.

    A dropped connection is made anew, as the same session: the server replays what it has kept, and what waits
    here is sent then; nothing is sent twice. `dial(deadline)` opens a WebSocket; it returns its socket and subprotocol.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/websocket-protocols.html
    """

    def __init__(self, loop: Loop, dial: Dial, mailbox: Mailbox) -> None:
        """Connect. Raises: ServerError, ConnectionClosed, ExecutionTimeout."""
        self._loop, self._dial, self._mailbox = loop, dial, mailbox
        self._backlog: list[str | bytes] = []  # to be sent when there is a connection again
        self._outbox: Outbox | None = None  # None: there is none
        self._heard_at = 0.0
        self._closed = False
        self._connect(Deadline(START_TIMEOUT))
        loop.post(self._take_over)

    def _connect(self, deadline: Deadline) -> None:
        sock, subprotocol = self._dial(deadline)
        sock.settimeout(0)
        self._socket, self._websocket = NetStream(sock), WebSocket(functools.partial(os.urandom, 4), MAX_MESSAGE)
        self._codec: V1Codec | JsonCodec = V1Codec() if subprotocol else JsonCodec()

    def _take_over(self) -> None:
        if self._closed:
            self._socket.close()
            return
        if self._heard_at:
            self._mailbox.put(Reconnected())
        else:
            self._loop.later(PING_INTERVAL, self._ping)
        self._heard_at = time.monotonic()
        self._outbox = Outbox(self._loop, self._socket, self._drop)
        self._loop.on_readable(self._socket.fileno(), self._read)
        backlog, self._backlog = self._backlog, []
        for data in backlog:
            self._send(data)
        self._read()  # TLS may have decrypted frames together with the answer: no descriptor would tell of them

    def _read(self) -> None:
        reason = ""
        try:
            data = self._socket.recv(2**18)
            self._heard_at = time.monotonic()
            for message in self._websocket.receive(data):
                self._mailbox.put(("WebSocket", message))
            if not data or self._websocket.closed:
                reason = "the server closed the connection"
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ProtocolError) as error:
            reason = str(error)
        self._answer()
        if reason:
            self._drop(reason)

    def _answer(self) -> None:
        # A server that asks and does not read must not fill the outbox: its last ping is answered when it has read.
        if self._outbox and not self._outbox.busy:
            answers = self._websocket.data_to_send()
            if not answers and not self._websocket.closed and not hasattr(socket, "TCP_QUICKACK"):
                answers = self._websocket.pong()  # what is sent takes the acknowledgement along
            if answers:
                self._outbox.send(answers)

    def _ping(self) -> None:
        """Keep the connection from being cut by a proxy, and notice when it is dead."""
        if self._closed:
            return
        if time.monotonic() - self._heard_at > 3 * PING_INTERVAL:
            self._drop("the server is silent")
        self._answer()
        if self._outbox and not self._outbox.busy:
            self._outbox.send(self._websocket.ping())
        self._loop.later(PING_INTERVAL, self._ping)

    def _drop(self, reason: str) -> None:
        if self._outbox and not self._closed:
            self._close_socket()
            # In a thread for the time of the attempts: other kernels of the server must not wait for them.
            threading.Thread(target=self._dial_again, args=(reason,), daemon=True).start()

    def _close_socket(self) -> None:
        if self._outbox:
            self._loop.on_readable(self._socket.fileno(), None)
            self._outbox.close()
            self._outbox = None
            self._socket.close()

    def _dial_again(self, reason: str) -> None:
        deadline = Deadline(RECONNECT_TIMEOUT)
        while not self._closed:
            time.sleep(RECONNECT_DELAY)  # a server that accepts and closes must not make this a race
            try:
                self._connect(Deadline(min(CONTROL_TIMEOUT, RECONNECT_TIMEOUT)))
                self._loop.post(self._take_over)
                if self._closed:  # so the loop may have ended
                    self._socket.close()
                return
            except JupyterExecError as error:
                if deadline.expired or (isinstance(error, ServerError) and error.status < 500):
                    cause = f"the connection to its server was lost: {reason}; {error}"
                    self._loop.post(functools.partial(self._mailbox.put, KernelDied(cause=cause)))
                    return

    def send(self, message: Message) -> None:
        data = self._codec.encode(message)
        if len(data) > MAX_WEBSOCKET_MESSAGE:
            raise ProtocolError(
                f"A message of {len(data)} bytes is over the server's limit of {MAX_WEBSOCKET_MESSAGE}."
            )
        self._loop.post(functools.partial(self._send, data))

    def _send(self, data: str | bytes) -> None:
        if self._outbox:
            self._outbox.send(self._websocket.send(data))
        else:
            self._backlog.append(data)

    def decode(self, raw: RawMessage) -> Iterator[Message]:
        return self._codec.decode(raw[1])

    def close(self) -> None:
        self._loop.post(self._close)

    def _close(self) -> None:
        self._closed = True
        if self._outbox:
            with contextlib.suppress(OSError):
                self._socket.send(memoryview(self._websocket.close()))
        self._close_socket()


# ======================================================================================================
# 7. Kernel client
# ======================================================================================================

OutputHook = Callable[[Json], None]
InputHook = Callable[[str, bool], str]


class Hooks:
    """What a caller wants to hear of a cell while it runs. What raises in them costs a warning in the log."""

    def __init__(
        self, on_output: OutputHook | None = None, on_input: InputHook | None = None, record: OutputHook | None = None
    ) -> None:
        self._on_output, self._on_input, self._record = on_output, on_input, record
        self.slow = bool(on_output or on_input)  # code of others, which may take its time
        self.muted = False  # it took too much

    def show(self, output: Json) -> None:
        if self._record:
            self._record(output)
        if self._on_output and not self.muted:
            try:
                self._on_output(output)
            except Exception:
                logger.warning("on_output raised; the cell goes on", exc_info=True)

    def answer(self, content: Json) -> str:
        """Return the answer to an input_request; "\x04" is the end of input: the cell gets EOFError."""
        if self._on_input:
            try:
                answer = self._on_input(text_of(content.get("prompt")), bool(content.get("password")))
                if isinstance(answer, str):
                    return answer
                if answer is not None:
                    getattr(answer, "close", int)()  # a coroutine that nobody will await
                    logger.warning("on_input must return a string, not %s; the cell gets EOFError", type(answer))
            except EOFError:
                pass
            except Exception:
                logger.warning("on_input raised; the cell gets EOFError", exc_info=True)
        return "\x04" if self._on_input else ""


class Watch:
    """What a running cell has time for, and by when what is due."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.deadline = Deadline(seconds)
        self.reading: Deadline | None = None  # of slow hooks, after a cell's end
        self.grace: Deadline | None = None  # of an interrupted cell to end by itself
        self.overdue: Deadline | None = None  # of the missing one of reply and idle

    def wait(self, half_done: bool) -> float | None:
        """Return how long to wait for a message."""
        limit = self.grace or self.deadline
        return limit.within(FENCE_DELAY) if half_done else limit.remaining


class KernelClient:
    """Runs cells on one kernel, one at a time, in the caller's thread.

    Not for two cells at once (the executor has the lock); `interrupt` may be called from any thread.
    """

    def __init__(self, control: KernelControl) -> None:
        self._control = control
        self._mailbox = self._new_mailbox()
        self._channels: Channels | None = None
        self._session = ""
        self._serial = itertools.count(1)
        self.ready = False
        self._running: Execution | None = None
        self._nudges: set[str] = set()  # interrupts whose effect is not yet known to be over
        self._death: KernelDied | None = None
        self._closing = False
        self._ended = False  # the code has called exit(): the process is about to end
        self.kernel_info: Json = {}

    @property
    def connection_file(self) -> str | None:
        """Path of the kernel's connection file on this machine, None if it is not here."""
        return self._control.connection_file

    @property
    def language(self) -> str:
        """The name of the language that the kernel speaks, as it said; "" before it is ready."""
        info = self.kernel_info.get("language_info")
        return text_of(info.get("name")) if isinstance(info, dict) else ""

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
        self._mailbox, self._death, self.ready, self.kernel_info = self._new_mailbox(), None, False, {}
        self._ended = self._closing = False
        self._nudges.clear()
        self._session = os.urandom(16).hex()
        self._channels = self._control.start(self._mailbox)

    def wait_ready(self) -> None:
        """Wait until the kernel answers on shell and is heard on iopub.

        Raises: KernelStartFailed.
        """
        deadline = Deadline(self._control.start_timeout)
        attempts = PORT_ATTEMPTS if self._control.owned else 1
        while not self.ready:
            attempts -= 1
            try:
                self._greet(deadline)
            except KernelStartFailed:
                # Its port was taken in the meantime, or its host or fork server is no more: nothing is lost.
                death = self._death
                if not attempts or not death or not (death.retryable or "Address already in use" in death.stderr):
                    self.give_up()
                    raise
                self.start()

    def _greet(self, deadline: Deadline) -> None:
        # Ready = shell answers and iopub is proven live: the kernel welcomes the subscription to our unique
        # topic (JEP 65), or else, as older kernels do not, publishes the status of a repeated request.
        heard = False
        self._send("shell", "kernel_info_request", {})
        while not (self.kernel_info and heard):
            item = self._mailbox.get(deadline.within(READY_RETRY))
            if isinstance(item, KernelDied):
                self._death = item
                raise KernelStartFailed(self._control.argv, item.cause, item.exit_code, item.stderr)
            if deadline.expired:
                raise KernelStartFailed(self._control.argv, f"no answer within {deadline.seconds:g} s")
            if item is None or isinstance(item, Reconnected):
                self._send("shell", "kernel_info_request", {})
            else:
                for message in self._decode(item):
                    heard = heard or message.channel == "iopub"
                    if message.msg_type == "kernel_info_reply":
                        self.kernel_info = message.content
        self.ready = True

    def execute(
        self,
        code: str,
        timeout: float | None,
        *,
        silent: bool = False,
        store_history: bool = True,
        max_output: int | None = None,
        on_output: OutputHook | None = None,
        on_input: InputHook | None = None,
        record: OutputHook | None = None,
        on_result: Callable[[ExecutionResult], None] | None = None,
    ) -> ExecutionResult:
        """Run one cell and return what it did; `timeout` is the wall clock in seconds, None for no limit.

        `max_output` is how many characters of its streams are kept, None for all. `record` gets every output before
        `on_output` does, and is quick. `on_result` gets the result even if Ctrl-C ends this call.

        Raises: KernelStartFailed, KernelDied or ConnectionClosed if there is no kernel to run it.
        """
        if self._running:
            raise JupyterExecError("A cell is running: its hooks cannot run another one.")
        content = execute_content(code, silent=silent, store_history=store_history, allow_stdin=on_input is not None)
        request = self._message("shell", "execute_request", content)
        execution = Execution(request.msg_id, max_output)
        hooks = Hooks(on_output, on_input, record)
        started, watch = time.monotonic(), Watch(timeout)

        def finish() -> ExecutionResult:
            self._ended = execution.ended_session
            result = execution.result(time.monotonic() - started)
            if on_result:
                on_result(result)
            return result

        self._settle(execution, hooks)
        self._running = execution
        # A hook may take longer than the cell has: the interrupt is then sent from a thread of its own.
        has_timer = hooks.slow and timeout is not None and timeout < threading.TIMEOUT_MAX
        timer = threading.Timer(timeout or 0, self._time_out, (execution, watch)) if has_timer else None
        try:
            if timer:
                timer.daemon = True
                timer.start()
            if not execution.death:
                self._post(request)
            self._run(execution, watch, hooks)
        except JupyterExecError:
            raise
        except BaseException:  # Ctrl-C, or a signal handler that raises
            self._stop_cell(execution)
            self._run(execution, Watch(INTERRUPT_GRACE), Hooks(record=record))
            finish()
            raise
        finally:
            if timer:
                timer.cancel()
            self._running = None
        return finish()

    def _run(self, execution: Execution, watch: Watch, hooks: Hooks) -> None:
        """Read messages until the cell is done; climb the ladder interrupt, kill as deadlines pass."""
        while not execution.done:
            item = self._mailbox.get(watch.wait(execution.half_done))
            for _ in self._take(item, execution, hooks):
                if not self._climb(execution, watch, hooks):
                    return

    def _climb(self, execution: Execution, watch: Watch, hooks: Hooks) -> bool:
        """Do what is due by now; returns whether to go on."""
        if not execution.half_done:
            watch.overdue = None
        if execution.done:
            return True
        if self._death:  # taken by whoever stopped the kernel in the meantime
            execution.death = self._death
        elif watch.overdue is None and execution.half_done:
            watch.overdue = Deadline(FENCE_DELAY)
        elif watch.overdue and watch.overdue.expired:
            self._fence(execution)
            watch.overdue = Deadline(FENCE_DELAY)
        elif not (watch.grace or watch.deadline).expired:
            pass
        elif self._mailbox.answered:  # the cell has ended; a slow hook kept this thread from seeing it
            watch.reading = watch.reading or Deadline(INTERRUPT_GRACE)
            hooks.muted = watch.reading.expired
        elif watch.grace is None:
            self._time_out(execution, watch)
        elif not self._control.owned:
            return False
        else:
            self._kill(execution)
        return True

    def _time_out(self, execution: Execution, watch: Watch) -> None:
        """Interrupt a cell whose time is over; in the caller's thread or that of a timer."""
        if execution.done:
            return
        if self._mailbox.answered:  # it has ended in time
            return
        execution.timed_out = watch.seconds
        self._stop_cell(execution)
        watch.grace = watch.grace or Deadline(INTERRUPT_GRACE)

    def _take(self, item: MailItem | None, execution: Execution, hooks: Hooks) -> Iterator[None]:
        """Take an item from the mailbox, in pieces: yields after each, and once if there is nothing."""
        if isinstance(item, KernelDied):
            self._drain(execution, hooks)
            self._death = execution.death = item
        elif isinstance(item, Reconnected):
            if self._running:
                execution.reconnected = True
                self._fence(execution)
        elif item:
            execution.withheld, self._mailbox.dropped = execution.withheld or self._mailbox.dropped, False
            for message in self._decode(item):
                self._feed(message, execution, hooks)
                yield
            return
        yield

    def _feed(self, message: Message, execution: Execution, hooks: Hooks) -> None:
        if death := _reported_death(message):
            self._mailbox.put(death)
        output = execution.feed(message) or self._late_output(message, execution)
        if message.msg_type == "input_request" and message.parent_id == execution.msg_id:
            self._send("stdin", "input_reply", {"value": hooks.answer(message.content)})
        elif output:
            hooks.show(output)
        if execution.started and execution.interrupted and not execution.signalled:
            self._signal(execution)

    def _late_output(self, message: Message, execution: Execution) -> Json | None:
        """Return what a thread of an earlier cell of ours has printed, marked as "late"."""
        if message.parent_id == execution.msg_id or message.parent_header.get("session") != self._session:
            return None
        output = Execution(message.parent_id).feed(message) if message.channel == "iopub" else None
        return output and output | {"late": True}

    def _drain(self, execution: Execution, hooks: Hooks) -> None:
        """Take what a dead kernel had sent: it may arrive after the news of its death."""
        deadline = Deadline(FENCE_DELAY)
        while (item := self._mailbox.get(DEATH_DRAIN)) is not None:
            if not isinstance(item, KernelDied):
                for _ in self._take(item, execution, hooks):
                    if deadline.expired:
                        return

    def _kill(self, execution: Execution) -> None:
        """Kill a kernel that ignores the interrupt and start it anew; its variables are lost."""
        execution.killed = True
        self._control.kill()
        deadline = Deadline(SHUTDOWN_GRACE)
        while not execution.death:
            for _ in self._take(self._mailbox.get(deadline.remaining), execution, Hooks()):
                if deadline.expired and not execution.death:
                    self._control.abandon()
                    self._death = execution.death = self._death or KernelDied(cause="it was killed")
        death = execution.death
        # A server takes its time, and so does a host that was silent just now: the kernel is started at the next call.
        quick = not self._control.supervised and not deadline.expired
        try:
            if quick and not self._closing:
                self.start()
        except JupyterExecError:
            self._death = death  # the next call tries again and reports

    def interrupt(self) -> None:
        """Interrupt the running cell, from any thread; without effect while none runs."""
        if running := self._running:
            self._stop_cell(running)

    def _stop_cell(self, execution: Execution) -> None:
        execution.interrupted = True
        # A kernel ignores the signal until it has begun with the cell: then the reading thread sends it.
        if execution.started and not execution.signalled:
            self._signal(execution)

    def _signal(self, execution: Execution) -> None:
        execution.signalled = True
        # ipykernel notices a SIGINT in `await` only when its event loop wakes up (ipykernel#881): a
        # kernel_info_request on shell wakes it. Its answer also tells that the signal can hit no later cell.
        nudge = self._message("shell", "kernel_info_request", {})
        self._nudges.add(nudge.msg_id)
        channels = self._channels
        if channels and not self._control.interrupt(functools.partial(channels.send, nudge)):
            # "interrupt_mode: ... message: the client sends an interrupt_request on the control channel"
            channels.send(self._message("control", "interrupt_request", {}))
            channels.send(nudge)

    def _fence(self, execution: Execution) -> None:
        """Ask something that the kernel will answer after all that belongs to the cell."""
        fence = self._message("shell", "kernel_info_request", {})
        execution.fences.add(fence.msg_id)
        self._post(fence)

    def _settle(self, execution: Execution, hooks: Hooks) -> None:
        """Wait until no earlier interrupt can hit this cell, and see whether the kernel has died since the last."""
        deadline = Deadline(INTERRUPT_GRACE)
        if self._mailbox.dropped:
            logger.warning("Output that came between two cells was dropped: there was too much of it")
            self._mailbox.dropped = False
        while (self._nudges or self._mailbox.ended) and not execution.death:
            for _ in self._take(self._mailbox.get(deadline.remaining), execution, hooks):
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
        self._closing = True
        if self._channels and self._control.owned:
            if self.ready and not self._death and not self._control.supervised:
                # Deviation: asked on control, where it belongs, ipykernel 7 often hangs at its end (its control thread
                # writes to an iopub thread that has gone).
                is_ipykernel = self.kernel_info.get("implementation") == "ipython"
                self._send("shell" if is_ipykernel else "control", "shutdown_request", {"restart": False})
                self._wait_exit(SHUTDOWN_GRACE)
            if not self._death or self._control.supervised:
                self._control.kill()
                self._wait_exit(SHUTDOWN_GRACE)
        self.close()

    def abort(self) -> None:
        """Kill the kernel, from any thread, so that a running cell ends; without effect on one that is not ours."""
        if self._control.owned:
            self._control.kill()

    def give_up(self) -> None:
        """Kill the kernel, if it is ours, and disconnect."""
        self.abort()
        self.close()

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

    def close(self) -> None:
        """Disconnect."""
        channels, self._channels = self._channels, None
        if channels:
            channels.close()
            self._control.close()

    def _message(self, channel: str, msg_type: str, content: Json) -> Message:
        msg_id = f"{self._session}_{next(self._serial)}"
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return new_message(channel, msg_type, content, session=self._session, msg_id=msg_id, date=date)

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


def _reported_death(message: Message) -> KernelDied | None:
    """Return the end of the kernel if it says so on iopub, or a Jupyter server of its own, with no parent."""
    if message.msg_type == "shutdown_reply" and message.channel == "iopub":
        return KernelDied(cause="it was shut down or restarted by somebody else")
    state = message.content.get("execution_state")
    if message.msg_type == "status" and state in ("restarting", "dead") and not message.parent_id:
        return KernelDied(cause="its server found it dead" + (" and restarted it" if state == "restarting" else ""))
    return None


class AttachedKernelControl:
    """KernelControl of a kernel that somebody else started; it is never killed or restarted from here."""

    owned, supervised, start_timeout = False, False, START_TIMEOUT

    def __init__(self, connection: KernelConnection, connection_file: str | None) -> None:
        self._connection = connection
        self._loop: Loop | None = None
        self._context: Any = None
        self.argv: list[str] = []
        self.connection_file = connection_file

    def start(self, mailbox: Mailbox) -> Channels:
        self.close()
        self._loop, self._context = Loop(), new_context()
        self._loop.start("jupyter_exec I/O")
        return ZmqChannels(self._loop, self._context, self._connection, mailbox, watch=True)

    def interrupt(self, sent: Callable[[], None]) -> bool:
        return False

    def kill(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        if self._loop:
            self._loop.post(functools.partial(self._context.destroy, 0))
            self._loop.stop()
            self._loop = None


def attach_kernel(target: KernelConnection | str | os.PathLike[str]) -> KernelClient:
    """Connect to a running kernel by its connection file, or by the contents of one.

    Raises: ProtocolError for a broken file.
    """
    path = None if isinstance(target, KernelConnection) else os.path.abspath(target)
    connection = target if isinstance(target, KernelConnection) else read_connection_file(path or "")
    client = KernelClient(AttachedKernelControl(connection, path))
    client.start()
    return client


# ======================================================================================================
# 8. Kernel host
#
# Runs at the other end of a pipe, in a process that was started with BOOTSTRAP and got this module's source
# over its stdin. Everything here but the relay needs only the standard library. One thread, one Loop.
#
# Control requests are JSON objects {"id", "op", ...}; the answer is {"id", "result"} or {"id", "error",
# "data"}; {"event": "exit", ...} tells of a kernel's death, {"event": "loss", ...} of output that was dropped, the
# rest of a large message included.
# ======================================================================================================

# Parses and runs on any Python 3. `-c` has put the working directory on sys.path, where an agent's signal.py
# would shadow the standard library: that goes first. The program ("c": code, if both Pythons have the same bytecode;
# "s": source) is read unbuffered and exactly, since a buffered stdin would swallow the frames behind it.
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
exec(marshal.loads(program) if kind == b"c" else compile(program, "<jupyter_exec>", "exec"), module)
module["MAIN"](kind + size + program)
"""

# What ipykernel imports while a kernel starts.
FORKED_MODULES = ["IPython.core.completerlib", "IPython.core.debugger", "IPython.core.oinspect", "encodings.idna"]
FORKED_MODULES += ["IPython.extensions.storemagic", "faulthandler", "ipykernel.debugger", "ipykernel.kernelapp"]
FORKED_MODULES += ["tornado.platform.asyncio", "tornado.queues"]
CANNOT_FORK = 75  # exit status of a fork server that cannot be one
_PYTHON = re.compile(r"python[0-9.]*(\.exe)?\Z")
# What a kernel that serves a program does without: the history database and a pause after each cell. In, Out and
# %history are there all the same.
LEAN_OPTIONS = ["--HistoryManager.enabled=False", "--IPythonKernel._execute_sleep=0"]
_MARKER = "JUPYTER_EXEC_KERNEL"  # environment variable by which a kernel's runaway children are known
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # linux/prctl.h


def kernel_dirs(environ: Mapping[str, str]) -> list[str]:
    """Return the directories that may hold kernelspecs, best first, by Jupyter's rules for this Python.

    Source: https://docs.jupyter.org/en/latest/use/jupyter-directories.html#data-files
    """
    import sysconfig

    user = [environ.get("JUPYTER_DATA_DIR") or _user_data_dir(environ)]
    if site_user := sysconfig.get_path("data", f"{os.name}_user"):
        user.append(os.path.join(site_user, "share", "jupyter"))
    env = [os.path.join(sys.prefix, "share", "jupyter")]
    if os.name == "nt":
        program_data = environ.get("PROGRAMDATA") if environ.get("JUPYTER_USE_PROGRAMDATA") else None
        system = [os.path.join(program_data, "jupyter")] if program_data else []
    else:
        system = ["/usr/local/share/jupyter", "/usr/share/jupyter"]
    extra = [path for path in environ.get("JUPYTER_PATH", "").split(os.pathsep) if path]
    order = env + user if _prefers_env(environ) else user + env
    dirs = [os.path.join(base, "kernels") for base in [*extra, *order, *system]]
    return list(dict.fromkeys([*dirs, os.path.expanduser("~/.ipython/kernels")]))


def _user_data_dir(environ: Mapping[str, str]) -> str:
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Jupyter")
    if os.name == "nt":
        return os.path.join(environ.get("APPDATA") or os.path.expanduser("~/.jupyter/data"), "jupyter")
    return os.path.join(environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "jupyter")


def _prefers_env(environ: Mapping[str, str]) -> bool:
    """Whether the environment's directories come before the user's: in a virtual environment of one's own."""
    if "JUPYTER_PREFER_ENV_PATH" in environ:
        return environ["JUPYTER_PREFER_ENV_PATH"].lower() not in ("", "0", "n", "no", "false", "off")
    conda = environ.get("CONDA_PREFIX")
    in_conda = bool(conda) and sys.prefix.startswith(conda or "") and environ.get("CONDA_DEFAULT_ENV", "base") != "base"
    if sys.prefix == sys.base_prefix and not in_conda:
        return False
    return os.name == "nt" or os.stat(sys.prefix).st_uid == os.getuid()


def find_kernelspecs(environ: Mapping[str, str], own_python3: bool) -> dict[str, Json]:
    """Return {kernel name: content of its kernel.json, with "resource_dir" added}.

    `own_python3` makes "python3" mean this interpreter whatever the directories say; otherwise that is the
    fallback for when they say nothing. Needs ipykernel in this interpreter.

    Spec: https://jupyter-client.readthedocs.io/en/stable/kernels.html#kernel-specs
    """
    import importlib.util

    specs: dict[str, Json] = {}
    for directory in kernel_dirs(environ):
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(directory)):
                path = os.path.join(directory, entry)
                if entry.lower() not in specs and re.fullmatch(r"[A-Za-z0-9._-]+", entry):
                    with contextlib.suppress(OSError, ProtocolError):
                        specs[entry.lower()] = _read_kernelspec(path)
    if own_python3 or "python3" not in specs:
        specs.pop("python3", None)
        if importlib.util.find_spec("ipykernel"):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            names = {"display_name": "Python 3", "language": "python"}
            specs["python3"] = {"argv": argv, "resource_dir": sys.prefix, **names}
    return specs


def kernel_among(wanted: str, names: Iterable[str]) -> str | None:
    """Return which of the installed kernels `wanted` means: case does not matter, "python" may be python3."""
    installed = {name.lower(): name for name in names}
    return installed.get("python3" if wanted == "python" and "python" not in installed else wanted.lower())


def _read_kernelspec(directory: str) -> Json:
    with open(os.path.join(directory, "kernel.json"), "rb") as file:
        spec = json_object(file.read(), "kernelspec")
    argv = spec.get("argv")
    if not (isinstance(argv, list) and argv and all(isinstance(arg, str) for arg in argv)):
        raise ProtocolError(f"{directory}/kernel.json has no argv.")
    return spec | {"resource_dir": directory}


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
    """Whether a fork server can make this kernel; an environment of its own might have to be there from the start."""
    is_launcher = _is_ipykernel(argv) and argv[1:3] == ["-m", "ipykernel_launcher"]
    can_order = hasattr(socket, "SOCK_SEQPACKET") and hasattr(socket, "send_fds")
    return sys.platform == "linux" and can_order and is_launcher and not spec.get("env")


def _mark(name: str) -> str:
    """Return the value of _MARKER for a process; as long as a fork server's, whose place it takes."""
    return f"{os.getpid()}/{name:_<24}"


def make_directory() -> str:
    """Make a private directory for connection files and sockets. Raises: KernelStartFailed with what to do."""
    import tempfile

    try:
        # The path of a socket file may have 107 bytes (103 on macOS): a long TMPDIR is not used.
        base = tempfile.gettempdir()
        base = base if len(os.fsencode(base)) < 60 or os.name == "nt" else "/tmp"
        _remove_forgotten(base)
        return tempfile.mkdtemp(prefix=f"jx-{process_name(os.getpid())}-", dir=base)
    except OSError as error:
        reason = f"no temporary directory can be written to, set TMPDIR to one that can ({error.strerror or error})"
        raise KernelStartFailed([], reason) from None


def _remove_forgotten(base: str) -> None:
    """Remove directories whose owner was killed with its host, so that neither could."""
    import shutil

    with contextlib.suppress(OSError):
        for name in os.listdir(base):
            found = re.fullmatch(r"jx-([0-9a-f.]+)-\w+", name)
            path = os.path.join(base, name)
            if found and has_ended(found[1]) and os.lstat(path).st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)


def process_name(pid: int) -> str:
    """Name a process for good: its pid, when it started, and where that pid counts; "" if this cannot be known."""
    import zlib

    with contextlib.suppress(OSError, IndexError):
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        place = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"  # containers may share a directory
        return f"{pid}.{int(start):x}.{zlib.crc32(place.encode('utf-8')):08x}"
    return ""


def has_ended(name: str) -> bool:
    """Whether the process of that `process_name` is surely gone; False for one of another machine or container."""
    found = re.fullmatch(r"(\d{1,9})\.[0-9a-f]+(\.[0-9a-f]{8})", name)
    if not found or not process_name(os.getpid()).endswith(found[2]):
        return False
    try:
        os.kill(int(found[1]), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return process_name(int(found[1])) not in ("", name)


class ChildProcess:
    """A process that the host has started, mostly a kernel, and what it knows of it."""

    def __init__(self, name: str, slot: str, argv: list[str], env: dict[str, str]) -> None:
        self.name = name  # of this process
        self.slot = slot  # of the kernel, restarts included
        self.argv, self.env = argv, env
        self.pid = 0  # not yet forked
        self.stderr: Tail | None = None
        self.process: subprocess.Popen[Any] | None = None  # None: forked
        self.preload: list[str] | None = None  # for the fork server that makes it; None: launched
        self.lean = False
        self.preload_failed = False  # and so it never was
        self.exit_code: int | None = None
        self.event = 0  # that interrupts it on Windows
        self.files: list[str] = []  # to be removed at its end
        self.loss_told = False  # to the client, of the output that is being dropped
        self.hurries = False  # its output is dropped unless the link is free
        self.sockets: dict[str, Any] = {}  # of a relayed kernel
        self.readers: dict[str, SocketReader] = {}


class ForkServer:
    """What the host knows of a fork server besides its process."""

    def __init__(self, channel: socket.socket, preload: list[str]) -> None:
        self.channel = channel
        self.preload = preload
        self.ordered = self.forked = 0  # kernels


class KernelHost:
    """Serves control requests, watches kernels and relays their messages until the pipe closes."""

    def __init__(self, loop: Loop, stream: Stream, directory: str, program: bytes) -> None:
        self._loop = loop
        self._directory = directory
        self._program = program  # this module, as it came
        self._kernels: dict[str, ChildProcess] = {}
        self._fork_servers: dict[str, ForkServer] = {}  # by interpreter
        self._serial = itertools.count()
        self._unforkable: set[str] = set()  # interpreters that cannot be one
        self.adopts = False  # what a dying process leaves: a forked kernel needs it
        self._context: Any = None
        self._oom_kills = _oom_kills()
        self._pipe = Pipe(loop, stream, self._on_parts, self._on_closed)
        self._pipe.outbox.waits_for_ever = True

    def _on_closed(self, reason: str) -> None:
        for kernel in self._kernels.values():
            self._end(kernel)
        for _ in range(10):  # what has left its kernel's session and environment was adopted by this process
            _kill_all(_children())
        signal.set_wakeup_fd(-1)  # the loop closes what it was
        self._loop.stop()

    def close(self) -> None:
        """End every kernel and the host."""
        self._pipe.close("the host ends")

    def _on_parts(self, parts: list[bytes]) -> None:
        if parts[0] == b"":
            self._on_request(json_object(parts[1], "control request"))
            return
        name, _, channel = parts[0].decode("ascii", "replace").partition("/")
        kernel = self._kernels.get(name)
        if kernel and channel in kernel.sockets:
            import zmq

            with contextlib.suppress(zmq.Again):
                kernel.sockets[channel].send_multipart(parts[1:], zmq.NOBLOCK)
            kernel.readers[channel].read()

    def _on_request(self, request: Json) -> None:
        try:
            result = self._OPERATIONS[request["op"]](self, request)
            answer = {"id": request["id"], "result": result}
        except KernelError as error:
            answer = {"id": request["id"], "error": error.__class__.__name__, "data": vars(error)}
        except Exception as error:  # ours, or a nonsensical environment: the client shall see it
            answer = {"id": request["id"], "error": "JupyterExecError", "data": f"{error.__class__.__name__}: {error}"}
        self._pipe.send([b"", dump_json(answer)])

    def _on_kernelspecs(self, request: Json) -> Json:
        return find_kernelspecs(os.environ, request["own_python3"])

    def _on_start(self, request: Json) -> Json:
        """Launch a kernel in a slot; the kernel that had the slot is killed, its connection file rewritten."""
        spec = self._spec(request)
        try:
            os.getcwd()
        except OSError:
            raise KernelStartFailed(
                spec["argv"], "the working directory was removed: make a server in another"
            ) from None
        if request["relay"]:
            self._open_context()
        for old in [kernel for kernel in self._kernels.values() if kernel.slot == request["slot"]]:
            self._end(self._kernels.pop(old.name))
        path = os.path.join(self._directory, f"kernel-{request['slot']}.json")
        argv = command_of(spec, path)
        lean = not request["launch"]["ipython_defaults"]
        argv += LEAN_OPTIONS if lean and _is_ipykernel(argv) else []
        with contextlib.ExitStack() as ports:
            connection = self._connection(request, argv, ports)
            write_private(path, connection.to_json())
            ports.close()  # as late as can be
            kernel = self._new_kernel(request["kernel"], request["slot"], argv, spec)
            if self.adopts and _is_forkable(argv, spec):
                kernel.preload, kernel.lean = request["launch"]["preload"], lean
            self._begin(kernel)
        kernel.files = [path, *_ipc_files(connection)]
        if request["relay"]:
            self._open_relay(kernel, connection, request["identity"])
        return {
            "argv": argv,
            "connection": connection.to_json(),
            "interrupt_mode": str(spec.get("interrupt_mode", "signal")),
        }

    def _spec(self, request: Json) -> Json:
        specs = find_kernelspecs(os.environ, request["own_python3"])
        if not (wanted := kernel_among(request["kernel_name"].lower(), specs)):
            raise KernelSpecNotFound(request["kernel_name"], sorted(specs), kernel_dirs(os.environ), sys.executable)
        provisioner = (specs[wanted].get("metadata") or {}).get("kernel_provisioner") or {}
        if provisioner.get("provisioner_name", "local-provisioner") != "local-provisioner":
            raise KernelStartFailed(
                specs[wanted]["argv"], "its kernelspec asks for a kernel provisioner, which this is not"
            )
        return specs[wanted]

    def _connection(self, request: Json, argv: list[str], held: contextlib.ExitStack) -> KernelConnection:
        """Choose where the kernel listens: socket files if it is surely able to, or ports that `held` keeps."""
        ports, ip, transport = [1, 2, 3, 4, 5], os.path.join(self._directory, request["slot"]), "ipc"
        if os.name == "nt" or not _is_ipykernel(argv):
            # Open together until the launch, so that no two kernels are given the same.
            listeners = [held.enter_context(contextlib.closing(socket.socket())) for _ in range(5)]
            for listener in listeners:
                listener.bind(("127.0.0.1", 0))
            ports, ip, transport = [listener.getsockname()[1] for listener in listeners], "127.0.0.1", "tcp"
        names = [f"{channel}_port" for channel in ("shell", "iopub", "stdin", "control", "hb")]
        addresses: Json = {"ip": ip, "transport": transport, **dict(zip(names, ports, strict=True))}
        return KernelConnection(**addresses, key=request["key"], kernel_name=request["kernel_name"])

    def _new_kernel(self, name: str, slot: str, argv: list[str], spec: Json) -> ChildProcess:
        env = dict(os.environ, JPY_PARENT_PID=str(os.getpid())) | {_MARKER: _mark(name)}
        env.pop("PYTHONEXECUTABLE", None)  # macOS: it would override the kernel's own idea of its interpreter
        extra = spec.get("env") if isinstance(spec.get("env"), dict) else {}
        env |= {key: string.Template(str(value)).safe_substitute(os.environ) for key, value in (extra or {}).items()}
        if not os.access(os.path.expanduser("~"), os.W_OK):  # a container's user: IPython and matplotlib want a home
            env["HOME"] = os.path.join(self._directory, "home")
            os.makedirs(env["HOME"], exist_ok=True)
        env.setdefault("USER", "jupyter")
        if _is_ipykernel(argv) and os.path.exists(os.path.join(os.path.dirname(argv[0]), os.pardir, "pyvenv.cfg")):
            # As if it were activated: `!pip` and `!python` are to be those of the kernel.
            env["PATH"] = os.pathsep.join((os.path.dirname(argv[0]), env.get("PATH", os.defpath)))
        return ChildProcess(name, slot, argv, env)

    def _begin(self, kernel: ChildProcess) -> None:
        """Have the kernel forked if that can be, else launch it, and watch it."""
        if kernel.preload is None or kernel.argv[0] in self._unforkable:
            kernel.preload = None
            self._launch(kernel)
        else:
            self._fork(kernel, kernel.preload)
        self._watch(kernel)

    def _launch(self, kernel: ChildProcess, stdin: Any = None, pass_fds: Sequence[int] = ()) -> None:
        """Start it as a process of its own."""
        import subprocess

        # stdout goes nowhere: a pipe that nobody reads stops the kernel after 64 KB of a subprocess's output.
        stderr = kernel.stderr = Tail()
        options: Json = {"stdin": stdin or subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr.writer}
        if os.name == "nt":
            kernel.event = _windows_event()
            kernel.env |= {"JPY_INTERRUPT_EVENT": str(kernel.event), "IPY_INTERRUPT_EVENT": str(kernel.event)}
            options |= {"close_fds": False}
        elif sys.platform == "linux":
            # If this host is killed, its kernels go too. Safe: the host has one thread of Python.
            options["preexec_fn"] = functools.partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        options |= {"pass_fds": pass_fds} if pass_fds else {}
        argv, env = kernel.argv, kernel.env
        try:
            process: subprocess.Popen[Any] = subprocess.Popen(argv, env=env, start_new_session=True, **options)
        except OSError as error:
            stderr.close()
            raise KernelStartFailed(argv, describe_os_error(error)) from None
        finally:
            os.close(stderr.writer)
        with contextlib.suppress(OSError):  # if memory runs out, kernels are to go, and this host to tell of it
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        kernel.process, kernel.pid = process, process.pid

    def _fork(self, kernel: ChildProcess, preload: list[str]) -> None:
        """Order a kernel from the fork server of its interpreter; its pid comes with the answer."""
        python = kernel.argv[0]
        if not (server := self._fork_servers.get(python)):
            server = self._start_fork_server(kernel, preload)
        kernel.stderr = Tail()
        order = {"kernel": kernel.name, "mark": _mark(kernel.name), "argv": kernel.argv[3:]}
        with contextlib.suppress(OSError):  # it has ended: what it leaves undone is begun anew
            socket.send_fds(server.channel, [dump_json(order)], [kernel.stderr.writer])
        os.close(kernel.stderr.writer)
        server.ordered += 1
        self._loop.later(FORK_TIMEOUT, functools.partial(self._check_order, python, server, server.ordered))

    def _start_fork_server(self, kernel: ChildProcess, preload: list[str]) -> ForkServer:
        import tempfile

        python, bootstrap = kernel.argv[0], BOOTSTRAP.replace("NONCE", "-").replace("MAIN", "fork_server_main")
        # Another Python could not read this module's code, and fork none of its kernels.
        check = (
            f"import sys; sys.implementation.cache_tag == {sys.implementation.cache_tag!r} or sys.exit({CANNOT_FORK})"
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The program has no name by which a kernel could exchange it; `ps` shows the word behind it.
        with theirs, tempfile.TemporaryFile(dir=self._directory, buffering=0) as program:
            program.write(self._program)
            program.seek(0)
            options = json.dumps([theirs.fileno(), kernel.lean, preload])
            argv = [python, "-c", f"{check}\n{bootstrap}", "ipykernel-fork-server", options]
            process = ChildProcess(
                python, python, argv, kernel.env | {_MARKER: _mark(f"fork-server-{next(self._serial)}")}
            )
            try:
                self._launch(process, program, [theirs.fileno()])
            except KernelStartFailed:
                ours.close()
                raise
        self._watch(process)
        ours.setblocking(False)
        server = self._fork_servers[python] = ForkServer(ours, preload)
        self._loop.on_readable(ours.fileno(), functools.partial(self._read_pids, server))
        return server

    def _check_order(self, python: str, server: ForkServer, number: int) -> None:
        """Kill a fork server that has forked kernels, but not this one in time, and launch what it was to fork."""
        if self._fork_servers.get(python) is not server or server.forked >= number:
            return
        if not server.forked:  # it is still at its preload, which may take long
            self._loop.later(FORK_TIMEOUT, functools.partial(self._check_order, python, server, number))
            return
        for kernel in self._kernels.values():
            if not kernel.pid and kernel.argv[0] == python:
                kernel.preload = None
        _kill_all([self._kernels[python].pid])

    def _read_pids(self, server: ForkServer) -> None:
        while True:
            try:
                answer = server.channel.recv(4096)
            except ConnectionResetError:  # it ended with orders unread; the answers come after this
                continue
            except BlockingIOError:
                return
            if not answer:
                self._loop.on_readable(server.channel.fileno(), None)
                return
            born = json_object(answer, "answer of a fork server")
            server.forked += 1
            if kernel := self._kernels.get(born["kernel"]):
                kernel.pid = born["pid"]
            else:  # it was given up before it was born
                _kill_all([born["pid"]])

    def _watch(self, kernel: ChildProcess) -> None:
        self._kernels[kernel.name] = kernel
        if kernel.stderr:
            kernel.stderr.watch(self._loop)

    def _open_context(self) -> None:
        try:
            self._context = self._context or new_context()
        except JupyterExecError:
            advice = f"pyzmq is not installed there; run {sys.executable} -m pip install pyzmq ipykernel"
            raise KernelStartFailed([sys.executable], advice) from None

    def _open_relay(self, kernel: ChildProcess, connection: KernelConnection, identity: str) -> None:
        kernel.sockets = open_sockets(self._context, connection, identity.encode("ascii"))
        for channel, sock in kernel.sockets.items():
            deliver = functools.partial(self._relay, kernel, channel)
            kernel.readers[channel] = SocketReader(self._loop, sock, deliver)

    def _relay(self, kernel: ChildProcess, channel: str, parts: list[bytes]) -> None:
        parts = [f"{kernel.name}/{channel}".encode("ascii"), *parts]
        waiting, is_large = self._pipe.outbox.waiting, sum(map(len, parts)) > RELAY_PIECE
        may_be_lost = (waiting > 0 or is_large) and channel == "iopub" and _may_be_lost(parts)
        kernel.hurries = kernel.hurries and channel != "shell"
        if may_be_lost and (waiting > RELAY_LIMIT or (kernel.hurries and (waiting or is_large))):
            self._tell_loss(kernel)
            return
        kernel.loss_told = kernel.loss_told and not may_be_lost
        if not is_large:
            self._pipe.send(parts, kernel.name, may_be_lost)
            return
        data = PipeCodec.encode(parts)
        for start in range(0, len(data), RELAY_PIECE):
            piece = data[start : start + RELAY_PIECE]
            self._pipe.send([f"+{kernel.name}".encode("ascii"), piece], kernel.name, may_be_lost)

    def _tell_loss(self, kernel: ChildProcess) -> None:
        if not kernel.loss_told:
            kernel.loss_told = True
            self._pipe.send(_loss(kernel.name), kernel.name)

    def _hurry(self, name: str) -> None:
        """Let the end of a kernel's cell overtake the output that waits for a slow link."""
        dropped = self._pipe.outbox.drop_old(name, PipeCodec.encode(_loss(name)))
        if dropped and (kernel := self._kernels.get(name)):
            kernel.hurries = kernel.loss_told = True  # until the cell's reply

    def _on_spawn(self, request: Json) -> None:
        """Run a program that is no kernel, such as a gateway, under the same watch."""
        kernel = self._new_kernel(request["kernel"], request["kernel"], request["argv"], {})
        kernel.env |= request["env"]
        self._begin(kernel)

    def _on_interrupt(self, request: Json) -> None:
        self._hurry(request["kernel"])
        if kernel := self._kernels.get(request["kernel"]):
            if os.name == "nt":
                _windows_kernel32().SetEvent(kernel.event)
            else:
                # The whole group: a cell's foreground subprocess is to stop too.
                with contextlib.suppress(ProcessLookupError):
                    if kernel.pid:
                        os.killpg(kernel.pid, signal.SIGINT)

    def _on_kill(self, request: Json) -> None:
        self._hurry(request["kernel"])
        if kernel := self._kernels.get(request["kernel"]):
            if not kernel.pid:
                self._report_exit(kernel)
            elif os.name == "nt":
                assert kernel.process
                kernel.process.kill()
            else:  # Popen.kill would collect the exit, which then nobody reports
                _kill_all([kernel.pid])

    def reap(self) -> None:
        """Collect every process that has ended: kernels, and orphans that this process has adopted."""
        for server in self._fork_servers.values():  # a fork server tells of a pid before its process is ours
            self._read_pids(server)
        for pid, exit_code in _ended_children([kernel.process for kernel in self._kernels.values()]):
            for kernel in [kernel for kernel in self._kernels.values() if kernel.pid == pid]:
                kernel.exit_code = exit_code
                if kernel.process:
                    kernel.process.returncode = exit_code
                # What the kernel wrote last may still be on its way through ZeroMQ.
                self._loop.later(DEATH_DRAIN if kernel.sockets else 0, functools.partial(self._report_exit, kernel))

    def _report_exit(self, kernel: ChildProcess) -> None:
        if kernel.name in self._kernels:
            for reader in kernel.readers.values():
                reader.drain()
            self._end(self._kernels.pop(kernel.name))
            if server := self._fork_servers.pop(kernel.name, None):
                self._end_fork_server(kernel, server)
                return
            event: Json = {"event": "exit", "kernel": kernel.name, "exit_code": kernel.exit_code}
            event["preload_failed"] = kernel.preload_failed
            event["stderr"] = str(kernel.stderr or "")
            oom_kills, self._oom_kills = self._oom_kills, _oom_kills()
            event["out_of_memory"] = self._oom_kills > oom_kills
            event["memory_limit"] = _cgroup_value("memory.max", "memory.limit_in_bytes")
            self._pipe.send([b"", dump_json(event)], kernel.name)

    def _end_fork_server(self, process: ChildProcess, server: ForkServer) -> None:
        """Begin anew what it has not yet forked, unless its preload is at fault. Its other kernels live on."""
        self._read_pids(server)
        self._loop.on_readable(server.channel.fileno(), None)
        server.channel.close()
        if not server.forked and (process.exit_code == CANNOT_FORK or not server.preload):
            self._unforkable.add(process.name)
        for kernel in list(self._kernels.values()):
            if not kernel.pid and kernel.argv[0] == process.name:
                kernel.preload_failed = not server.forked and process.name not in self._unforkable
                if kernel.stderr:
                    kernel.stderr.close()
                if kernel.preload_failed:
                    kernel.exit_code, kernel.stderr = process.exit_code, process.stderr
                else:
                    with contextlib.suppress(KernelStartFailed):
                        self._begin(kernel)
                        continue
                self._report_exit(kernel)

    def _end(self, kernel: ChildProcess) -> None:
        """Free what belongs to a kernel, dead or not."""
        if kernel.pid:
            _kill_family(kernel, f"\0{_MARKER}={kernel.env[_MARKER]}\0".encode())
        if kernel.stderr:
            kernel.stderr.close()
        for sock in kernel.sockets.values():
            self._loop.on_readable(sock.fd, None)
            sock.close()
        kernel.sockets = {}
        for path in kernel.files:
            with contextlib.suppress(OSError):
                os.unlink(path)

    _OPERATIONS: ClassVar[dict[str, Callable[[KernelHost, Json], Json | None]]] = {
        "kernelspecs": _on_kernelspecs,
        "start": _on_start,
        "spawn": _on_spawn,
        "interrupt": _on_interrupt,
        "kill": _on_kill,
    }


def _may_be_lost(parts: list[bytes]) -> bool:
    """Whether a message of iopub is output, which a slow link may lose: not a status, an error or a welcome."""
    with contextlib.suppress(ValueError, IndexError, ProtocolError):
        header = json_object(parts[parts.index(DELIMITER) + 2][:2000], "header")
        needed = header.get("msg_type") in ("status", "error", "iopub_welcome", "shutdown_reply")
        return not needed or sum(map(len, parts)) > LARGE_PART
    return True


def _loss(kernel: str) -> list[bytes]:
    return [b"", dump_json({"event": "loss", "kernel": kernel})]


def _oom_kills() -> int:
    """Return how often the out-of-memory killer has struck in our control group."""
    return _cgroup_value("memory.events", "memory.oom_control", "oom_kill ")


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


def _ipc_files(connection: KernelConnection) -> list[str]:
    return [f"{connection.ip}-{port}" for port in range(1, 6)] if connection.transport == "ipc" else []


def _ended_children(processes: list[subprocess.Popen[Any] | None]) -> Iterator[tuple[int, int]]:
    """Yield (pid, exit code) of children that have ended; on POSIX also of adopted ones."""
    if os.name == "nt":
        yield from ((process.pid, code) for process in processes if process and (code := process.poll()) is not None)
        return
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _kill_family(kernel: ChildProcess, marker: bytes) -> None:
    """Kill a kernel, its session, and whatever left the session but still has the kernel's mark."""
    if os.name == "nt":
        assert kernel.process
        kernel.process.kill()
        return
    _kill_all({kernel.pid, *_family(kernel.pid, marker)})
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(kernel.pid, signal.SIGKILL)


def _children() -> list[int]:
    """Return the pids of this process's children, adopted ones too (Linux)."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def _kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _family(session: int, marker: bytes) -> Iterator[int]:
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields_after_name = file.read().rpartition(b")")[2].split()
                with open(f"/proc/{entry}/environ", "rb") as file:
                    marked = marker in b"\0%b\0" % file.read()
                if marked or int(fields_after_name[3]) == session:
                    yield int(entry)


@functools.cache
def _libc() -> Any:
    """Return the C library, or None where Python cannot call it: built without ctypes, or linked statically."""
    try:
        import ctypes

        return ctypes.CDLL(None)
    except (ImportError, OSError):
        return None


def _prctl(option: int, value: int) -> bool:
    """Set an attribute of this process; returns whether that was possible."""
    return bool(_libc()) and _libc().prctl(option, value, 0, 0, 0) == 0


def _windows_kernel32() -> Any:
    import ctypes

    return ctypes.windll.kernel32  # type: ignore[attr-defined]


def _windows_event() -> int:
    """Make an inheritable auto-reset event, by which ipykernel lets itself be interrupted on Windows."""
    import ctypes

    class SecurityAttributes(ctypes.Structure):
        _fields_ = (("length", ctypes.c_int), ("descriptor", ctypes.c_void_p), ("inherit", ctypes.c_int))

    attributes = SecurityAttributes(ctypes.sizeof(SecurityAttributes), None, 1)
    return int(_windows_kernel32().CreateEventA(ctypes.byref(attributes), False, False, b""))


def show_as(title: str) -> None:
    """Have `ps` and `docker top` show these words for this process, and not the program it was given (Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5): fields 48 and 49, arg_start and arg_end, are the "address above which program command-line arguments
        # (argv) are placed", and below; the first field after the name is the third.
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
        if _libc() and 0 < start < end:
            import ctypes

            ctypes.memmove(start, title.encode().ljust(end - start, b"\0")[: end - start], end - start)


def fork_server_main(program: bytes) -> None:
    """Import ipykernel and what is preloaded, then fork a kernel for each order: a datagram with its stderr.

    This process never has a thread, a socket of ZeroMQ or a secret, for all kernels would have it too. A kernel's
    parent is not this process but the host, which adopts what a dying process leaves.
    """
    import gc

    host, (descriptor, lean, preload) = os.getppid(), json.loads(sys.argv[2])
    show_as("jupyter_exec: fork server")
    if host != int(os.environ["JPY_PARENT_PID"]):  # this Python was started through another process
        sys.exit(CANNOT_FORK)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    _prctl(_PR_SET_DUMPABLE, 0)  # no kernel can write into what the next one begins with
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    places = _preload(lean, preload)
    known, forked = _changes(places), False
    if threading.active_count() > 1:
        sys.exit(
            f"There are threads at the start, which no fork would have (use preload=None): {threading.enumerate()}"
        )
    gc.collect()
    getattr(gc, "freeze", int)()
    while channel.recv(1, socket.MSG_PEEK):
        if forked and _changes(places) != known:
            sys.exit("Packages were installed, or a preloaded file edited.")  # a fresh process is to look at them
        data, (errors,), _, _ = socket.recv_fds(channel, 2**18, 1)
        order = json.loads(data)
        if middle := _fork_twice(channel, order["kernel"]):
            channel.close()
            _become_kernel(host, middle, errors, order)
            return
        os.close(errors)
        forked = True


def _preload(lean: bool, names: list[str]) -> list[str]:
    """Import ipykernel and these modules; return the files and directories whose change makes them old."""
    import importlib
    import site

    modules: dict[str, Any] = sys.modules
    places = [*site.getsitepackages(), site.getusersitepackages()]
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel does, but sooner
    if lean:
        modules["debugpy"] = None  # a fifth of a kernel's start; a cell can import it
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
    """Fork a child of a child, and tell its pid; return 0 here, and in it the pid of the child between."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the threads of a preloaded library, which has to see to them itself
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
    """In a process that was just forked: be what a launched kernel is, and run it."""
    import ctypes
    import importlib.util

    while os.getppid() == middle:  # until then this is one of the fork server's, to be killed with it
        time.sleep(0.0005)
    os.setsid()
    os.dup2(errors, 2)
    os.close(errors)
    _prctl(_PR_SET_DUMPABLE, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # The mark is written where /proc shows it: what the kernel forks, even without exec, has it too.
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
    modules["ipykernel.kernelapp"].IPKernelApp.launch_instance(parent_handle=host)


def host_main(program: bytes) -> None:
    """Be a kernel host on stdin and stdout until the pipe closes, the parent ends or SIGTERM comes."""
    import shutil

    loop = Loop()
    stream = _own_stdio()
    try:
        directory = sys.argv[1] if len(sys.argv) > 1 else make_directory()
    except KernelStartFailed as error:
        sys.exit(str(error))
    host = KernelHost(loop, stream, directory, program)
    signal.signal(signal.SIGINT, lambda *_: None)  # SIG_IGN would be inherited by the kernels
    if os.getpid() != 1:  # as a container's first process it would hear any cell; without a handler it hears none
        signal.signal(signal.SIGTERM, lambda *_: loop.post(host.close))
    if os.name == "nt":
        _repeat(loop, 0.05, host.reap)
    else:
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.set_wakeup_fd(loop.alarm.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: loop.post(host.reap))
    if hasattr(signal, "pthread_sigmask"):  # what the program has blocked is inherited, by kernels too
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        # A kernel's daemonised children become ours, to be reaped; forked kernels too.
        host.adopts = _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_DUMPABLE, 0)  # code in a kernel can neither trace this process nor open its descriptors
    _watch_parent(loop, host)
    show_as("jupyter_exec: kernel host")
    loop.run()
    shutil.rmtree(directory, ignore_errors=True)


def _own_stdio() -> Stream:
    """Take stdin and stdout for the pipe alone: no kernel inherits them, no stray print gets into a frame."""
    read_fd, write_fd, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return as_stream(read_fd, write_fd)


def _watch_parent(loop: Loop, host: KernelHost) -> None:
    # A forked child of the client may hold the pipe open after the client's end.
    parent = os.getppid()
    try:
        loop.on_readable(os.pidfd_open(parent), host.close)
    except (OSError, AttributeError):  # the Pythons of conda and uv lack it, gVisor and old Linux too, macOS anyway
        if parent and os.name != "nt":  # a container's first process has none
            _repeat(loop, 0.5, lambda: None if os.getppid() == parent else host.close())


def _repeat(loop: Loop, seconds: float, job: Callable[[], None]) -> None:
    job()
    loop.later(seconds, functools.partial(_repeat, loop, seconds, job))


# ======================================================================================================
# 9. Jupyter servers
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
        return f"http{'s' * self.use_https}://{self.authority}{self.base_url.rstrip('/')}"


class DeadlineReader(io.RawIOBase):
    """What http.client reads an answer from: a socket with a deadline and a limit for all of it, however it drips."""

    def __init__(self, sock: socket.socket, deadline: Deadline, ahead: int) -> None:
        """`ahead`: bytes that may be read at once, and so beyond the end of the answer."""
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
        self._socket.settimeout(self._deadline.remaining or 1e-6)
        size = self._socket.recv_into(buffer[: self._left])
        self._left -= size
        return size


class RestClient:
    """The REST interface of a Jupyter server, and its WebSockets: JSON, one connection that is kept alive.

    Spec: https://jupyter-server.readthedocs.io/en/stable/developers/rest-api.html
    """

    def __init__(self, info: JupyterConnectionInfo) -> None:
        if not re.fullmatch(r"[\w.:-]+", info.host, re.ASCII):
            raise ValueError(f"host must be a name or an address, without scheme and path, not {info.host!r}.")
        self.info = info
        if not re.fullmatch(r"[!-~]*", (info.token or "") + info.base_url):
            raise ValueError("The token or base_url has characters that HTTP forbids.")  # and neither is shown
        self._prefix = "/" + info.base_url.strip("/") if info.base_url.strip("/") else ""
        # "Authorization: token X" is the one form that all servers accept (a kernel gateway no other).
        self._headers = {"Authorization": f"token {info.token}"} if info.token else {}
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def shown(self, text: object) -> str:
        """Return what a server says as it may be shown: short, printable, without the token that some echo."""
        return "".join(char if char.isprintable() else " " for char in self._redacted(str(text))[:500])

    def _redacted(self, text: str) -> str:
        return text.replace(self.info.token, "***") if self.info.token else text

    def request(self, method: str, path: str, body: object = None, *, timeout: float = CONTROL_TIMEOUT) -> Any:
        """Return the JSON that the server answers. Raises: ServerError, ConnectionClosed, ExecutionTimeout."""
        deadline = Deadline(timeout)
        with self._lock:
            kept, self._socket = self._socket, None  # one at a time; others dial for themselves
        if kept and method == "POST":  # never to be said twice, so not on a connection that may have ended
            kept.close()
        elif kept:
            with contextlib.suppress(ConnectionClosed):
                return self._request(kept, method, path, body, deadline)
        return self._request(self._dial(deadline), method, path, body, deadline)

    def _request(self, sock: socket.socket, method: str, path: str, body: object, deadline: Deadline) -> Any:
        payload = b"" if body is None else dump_json(body)
        headers = {"Accept": "application/json", "Content-Type": "application/json", "Content-Length": len(payload)}
        response, data = self._ask(sock, method, path, headers, payload, deadline)
        with self._lock:
            keep = not response.will_close and self._socket is None
            self._socket = sock if keep else self._socket
        if not keep:
            sock.close()
        if 200 <= response.status < 300:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data) if data else None
        raise self._refusal(method, path, response, data)

    def websocket(self, path: str, deadline: Deadline) -> tuple[socket.socket, str | None]:
        """Open a WebSocket; return its socket and the subprotocol. Raises: like `request`; ProtocolError."""
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers |= {"Sec-WebSocket-Key": key, "Sec-WebSocket-Protocol": V1_SUBPROTOCOL}
        sock = self._dial(deadline)
        # Byte by byte: what comes behind the answer are frames already.
        response, data = self._ask(sock, "GET", path, headers, b"", deadline, ahead=1)
        try:
            if response.status != 101:
                raise self._refusal("GET", path.partition("?")[0], response, data)
            return sock, check_opening(key, response.getheader)
        except JupyterExecError:
            sock.close()
            raise

    def _dial(self, deadline: Deadline) -> socket.socket:
        """Connect, with TLS if that is wanted. Raises: ConnectionClosed, ExecutionTimeout."""
        info = self.info
        port = info.port or (443 if info.use_https else 80)
        try:
            sock = socket.create_connection((info.host, port), deadline.within(CONTROL_TIMEOUT))
            return self._secure(sock) if info.use_https else sock
        except TimeoutError:
            raise ExecutionTimeout(f"No answer from {info.url} in time.") from None
        except (OSError, ValueError, OverflowError) as error:  # of names and numbers that are none, too
            if verdict := getattr(error, "verify_message", ""):
                raise ConnectionClosed(
                    f"The certificate of {info.url} is not trusted: {verdict}. Give ca_file."
                ) from None
            raise ConnectionClosed(f"Cannot connect to {info.url}: {getattr(error, 'strerror', 0) or error}.") from None

    def _secure(self, sock: socket.socket) -> socket.socket:
        import ssl

        try:
            context = ssl.create_default_context(cafile=self.info.ca_file)
            if not self.info.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self.info.client_cert:
                context.load_cert_chain(*self.info.client_cert)
            return context.wrap_socket(sock, server_hostname=self.info.host)
        except BaseException:
            sock.close()
            raise

    def _ask(
        self,
        sock: socket.socket,
        method: str,
        path: str,
        headers: Json,
        payload: bytes,
        deadline: Deadline,
        ahead: int = 8192,
    ) -> tuple[Any, bytes]:
        """Send a request; return the answer's head, an http.client.HTTPResponse, and body. Errors close the socket."""
        import http.client

        headers = {"Host": self.info.authority, **headers, **self._headers}
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        source: Any = DeadlineReader(sock, deadline, ahead)
        body = bytearray()
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            try:
                sock.settimeout(deadline.remaining or 1e-6)
                sock.sendall("\r\n".join((*lines, "", "")).encode("ascii") + payload)
                # Closed here, not by the garbage collector: then its reader may be closed before it.
                with contextlib.closing(http.client.HTTPResponse(source, method=method)) as response:
                    response.begin()
                    while more := response.read1(2**16):
                        body += more
                    if response.length:
                        raise EOFError("its answer is cut short")
            except TimeoutError:
                what = f"{method} {self.info.url}{path.partition('?')[0]}"
                raise ExecutionTimeout(f"No answer to {what} within {deadline.seconds:g} s.") from None
            except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
                # A server that is none may say anything; http.client lets some of its ValueErrors through.
                why = f"{type(error).__name__}: {self.shown(error)}"
                raise ConnectionClosed(f"{self.info.url} broke the connection: {why}.") from None
            stack.pop_all()
        return response, bytes(body)

    def _refusal(self, method: str, path: str, response: Any, data: bytes) -> ServerError:
        """Return an answer that is not the one that was asked for as an error."""
        kind = self.shown(response.getheader("Content-Type", "no type"))
        says = f"This is no Jupyter server: it sends {kind}."
        if response.status >= 400:
            says = self.shown(_explanation(self._redacted(data.decode("utf-8", "replace"))))
        elif response.status >= 300 and "/hub/user/" in response.getheader("Location", ""):
            # JupyterHub takes over the addresses of a server that does not run.
            says = "The server behind this JupyterHub does not run: start it there."
        elif response.status >= 300:
            says = "It redirects elsewhere, which is not followed with a token: check token, base_url, use_https."
        return ServerError(method, self.info.url + self.shown(path), response.status, says)

    def close(self) -> None:
        with self._lock:
            if self._socket:
                self._socket.close()
                self._socket = None


def _explanation(text: str) -> str:
    """Return what a server's error answer says: JSON's message or reason, or else the text of a page."""
    with contextlib.suppress(ProtocolError):
        answer = json_object(text, "answer")
        return " ".join(answer[name] for name in ("message", "reason") if isinstance(answer.get(name), str))
    return " ".join(re.sub(r"(?s)<(style|script|head)\b.*?</\1>|<[^<>]*>", " ", text[:10_000]).split())


class RemoteKernelControl:
    """KernelControl of a kernel on a Jupyter server, which starts it anew when it ends by itself."""

    supervised = True
    connection_file: str | None = None

    def __init__(self, server: RemoteJupyterServer, kernel_name: str, kernel_id: str | None) -> None:
        self._server, self._kernel_name, self._id = server, kernel_name, kernel_id
        self.start_timeout = server.start_timeout
        self.argv: list[str] = []
        self.owned = kernel_id is None
        self._mailbox: Mailbox | None = None
        self._channels: Channels | None = None

    def start(self, mailbox: Mailbox) -> Channels:
        rest, loop = self._server.rest, self._server.loop
        if self._id and self.owned:
            try:
                rest.request("POST", f"{self._path}/restart", {}, timeout=self.start_timeout)
            except ServerError:  # the kernel is gone, or the server just restarting it by itself
                self.kill()
        if not self._id:
            body = {"name": self._kernel_name, "env": self._server.env}
            try:
                model = rest.request("POST", "/api/kernels", body, timeout=self.start_timeout)
            except ServerError:
                # If the server is gone, this says so best: a JupyterHub that stands in for it speaks of a wrong token.
                rest.request("GET", "/api/kernelspecs")
                raise
            kernel_id = model.get("id") if isinstance(model, dict) else None
            self._id = kernel_id if isinstance(kernel_id, str) else ""
        self._mailbox = mailbox
        dial = functools.partial(rest.websocket, f"{self._path}/channels?session_id={os.urandom(16).hex()}")
        self._channels = WebSocketChannels(loop, dial, mailbox)
        return self._channels

    @property
    def _path(self) -> str:
        if not re.fullmatch(r"\w[\w.-]*", self._id or "", re.ASCII):
            raise ProtocolError(f"The id of a kernel cannot be {self._server.rest.shown(self._id)!r}.")
        return f"/api/kernels/{self._id}"

    def interrupt(self, sent: Callable[[], None]) -> bool:
        try:
            self._server.rest.request("POST", f"{self._path}/interrupt", {}, timeout=INTERRUPT_GRACE)
        except ServerError as error:
            if error.status == 404:
                self._report("it is no longer on the server")
        except JupyterExecError as error:
            logger.warning("The interrupt was not delivered: %s", error)
        sent()
        return True

    def kill(self) -> None:
        if self._id:
            with contextlib.suppress(JupyterExecError):
                self._server.rest.request("DELETE", self._path, timeout=INTERRUPT_GRACE)
            self._id = None
            self._report("it was deleted on the server")

    def abandon(self) -> None:
        pass  # the server is asked again

    def _report(self, cause: str) -> None:
        if self._mailbox:
            self._mailbox.put(KernelDied(cause=cause))

    def close(self) -> None:
        if self._channels:
            self._channels.close()


_S = TypeVar("_S")


class JupyterServer(Protocol):
    """What an executor wants of a server."""

    def start_kernel(self, kernel_name: str) -> KernelClient:
        """Ask for a kernel and return its client without waiting. Raises: KernelSpecNotFound, JupyterExecError."""

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict}. Raises: JupyterExecError."""

    def stop(self) -> None:
        """End all its kernels. May be called more than once."""

    def __enter__(self: _S) -> _S: ...
    def __exit__(self, *exc_info: object) -> None: ...


class Stoppable:
    """What all servers have in common: used until `stop`, or until a `with` is left."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stopped = False

    def _check_usable(self) -> None:
        if self._stopped:
            raise ConnectionClosed("The server was stopped: make a new one.")

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class RemoteJupyterServer(Stoppable):
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
        self.start_timeout = start_timeout
        self.connection_info = connection_info
        self.rest = RestClient(connection_info)
        self.env = dict(env or {})
        self._kernel_id = kernel_id
        self._loop: Loop | None = None
        self._controls: list[RemoteKernelControl] = []

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A server that nobody refers to deletes its kernels, in its I/O thread: see HostServer.__del__.
        if (loop := getattr(self, "_loop", None)) and not is_finalizing():
            with contextlib.suppress(JupyterExecError):  # this is a forked child
                loop.post(self.stop)

    @property
    def loop(self) -> Loop:
        with self._lock:
            self._check_usable()
            if self._loop is None:
                self._loop = Loop()
                self._loop.start("jupyter_exec I/O")
            return self._loop

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
        self._controls.append(control)
        client = KernelClient(control)
        client.start()
        return client

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict}."""
        answer = self.rest.request("GET", "/api/kernelspecs")
        models = answer.get("kernelspecs") if isinstance(answer, dict) else None
        if not isinstance(models, dict):
            raise self._is_none("/api/kernelspecs")
        specs = {name: model.get("spec") for name, model in models.items() if isinstance(model, dict)}
        return {name: spec for name, spec in specs.items() if isinstance(spec, dict) and name.isprintable()}

    def list_kernels(self) -> list[Json]:
        """Return the models of the server's running kernels (a gateway may forbid it: ServerError 403)."""
        models = self.rest.request("GET", "/api/kernels")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise self._is_none("/api/kernels")
        return models

    def _is_none(self, path: str) -> ServerError:
        return ServerError("GET", self.connection_info.url + path, 200, "This is no Jupyter server.")

    def stop(self) -> None:
        """Delete the kernels that were started here and disconnect. May be called more than once."""
        for control in self._controls:
            if control.owned:
                control.kill()
            control.close()
        self._controls.clear()
        self.rest.close()
        with self._lock:
            self._stopped = True
            loop, self._loop = self._loop, None
        if loop:
            loop.stop()


# ======================================================================================================
# 10. Hosted servers
# ======================================================================================================


class TimedStream(Stream, Protocol):
    """A Stream that can be told not to block, for the time before the loop has it."""

    def settimeout(self, seconds: float, /) -> None: ...


@dataclass
class FarEnd:
    """A process over there that was started to become a kernel host."""

    stream: TimedStream  # its stdin and stdout
    describe_end: Callable[[], str]  # once the stream is closed: what is known of the end of the process
    errors: Tail | None = None  # its stderr, to be read all the time


class HostLink:
    """The client's end of the pipe to one kernel host: requests with answers, events, relayed messages."""

    def __init__(self, far_end: FarEnd, pid: int, uid: int) -> None:
        self.pid, self.uid = pid, uid
        self.loop = Loop()
        self.mailboxes: dict[str, Mailbox] = {}  # of each kernel process, by its name
        self.lost: str | None = None  # why the host is gone
        self._begun: dict[str, PipeCodec] = {}  # by kernel, a large message of which pieces have come
        self._far_end = far_end
        self._closing = False
        self._serial = itertools.count(1)
        self._answers: dict[int, Callable[[Json], None]] = {}
        self._context: Any = None
        self._context_lock = threading.Lock()
        self._pipe = Pipe(self.loop, far_end.stream, self._on_parts, self._on_closed)
        if far_end.errors:
            far_end.errors.watch(self.loop)
        self.loop.start("jupyter_exec I/O")

    def context(self) -> Any:
        """Return the ZeroMQ context of the loop's sockets."""
        with self._context_lock:
            self._context = self._context or new_context()
            return self._context

    def call(self, op: str, **parameters: object) -> Any:
        """Ask the host and return its result.

        Raises: what the host reports; ConnectionClosed if it is gone or, having not answered, is given up.
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

    def ask(self, op: str, then: Callable[[Json], None], **parameters: object) -> None:
        """Send a request without waiting; `then(answer)` is called in the loop's thread."""
        if self.lost is not None:
            then({"error": "ConnectionClosed", "data": self.lost})
            return
        number = next(self._serial)
        frame = [b"", dump_json({"id": number, "op": op} | parameters)]
        self.loop.post(functools.partial(self._ask, number, then, frame))

    def _ask(self, number: int, then: Callable[[Json], None], frame: list[bytes]) -> None:
        self._answers[number] = then
        self._pipe.send(frame)
        if self.lost is not None:
            self._fail_answers()

    def relay(self, kernel: str, channel: str, parts: list[bytes]) -> None:
        frame = [f"{kernel}/{channel}".encode("ascii"), *parts]
        self.loop.post(functools.partial(self._pipe.send, frame))

    def _on_parts(self, parts: list[bytes]) -> None:
        # Whatever stands here may come from hostile code at the other end.
        if parts[0].startswith(b"+"):
            kernel = parts[0][1:].decode("ascii", "replace")
            if kernel in self.mailboxes:
                for whole in self._begun.setdefault(kernel, PipeCodec()).feed(b"".join(parts[1:])):
                    self._on_relayed(whole)
            return
        if parts[0]:
            self._on_relayed(parts)
            return
        message = json_object(b"".join(parts[1:]), "control message")
        kernel, event = text_of(message.get("kernel")), message.get("event")
        if event in ("loss", "exit"):
            self._begun.pop(kernel, None)
        if event == "loss" and kernel in self.mailboxes:
            self.mailboxes[kernel].dropped = True
        elif event == "exit":
            if mailbox := self.mailboxes.pop(kernel, None):
                mailbox.put(_death_of(message))
        elif isinstance(message.get("id"), int) and (then := self._answers.pop(message["id"], None)):
            self.loop.post(functools.partial(then, message))  # its failure is not the pipe's

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
        if self.lost is None:
            self.loop.post(functools.partial(self.hang_up, reason))
        self.loop.post(self._destroy_context)
        self.loop.stop()

    def hang_up(self, reason: str = "the server object is gone") -> None:
        """Close the pipe; for the loop's thread."""
        self._closing = True
        self._pipe.close(reason)

    def _destroy_context(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)


def _text(value: object) -> str:
    """Return what a host calls text, as far as it is some: the end of it, without lone surrogates."""
    return value[-STDERR_TAIL:].encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def _texts(value: object) -> list[str]:
    return list(map(_text, value[:1000])) if isinstance(value, list) else []


def _death_of(event: Json) -> KernelDied:
    code = event.get("exit_code")
    code = code if type(code) is int and -64 <= code < 2**32 else None
    limit, cause = event.get("memory_limit"), ""
    if event.get("out_of_memory") and code == -9:
        has_limit = isinstance(limit, int) and 0 < limit < 2**50  # cgroup v1 says "unlimited" by a huge number
        cause = f"out of memory (limit {limit // 2**20} MB)" if has_limit and limit else "out of memory"
    elif event.get("preload_failed"):
        cause = f"the fork server ended at its preload ({describe_exit(code)})"
    return KernelDied(cause, code, _text(event.get("stderr")))


def _host_error(answer: Json) -> JupyterExecError:
    """Rebuild an error of the host from {"error": class name, "data": attributes or sentence}."""
    data = answer.get("data")
    for kind in (KernelSpecNotFound, KernelStartFailed):
        if kind.__name__ == answer["error"] and isinstance(data, dict):
            error = kind()
            for key, default in vars(error).items():
                if default is not None:
                    setattr(error, key, (_texts if isinstance(default, list) else _text)(data.get(key)))
            return error
    if answer["error"] == "ConnectionClosed":
        return ConnectionClosed(f"The kernel host is gone: {_text(data)}.")
    return JupyterExecError(f"The kernel host reports: {_text(data)}")


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

    # Code first, but of no loader that rewrites what it loads: the host may not have what the new code wants.
    ways: list[tuple[bytes, Callable[[], bytes]]] = [
        (b"c", lambda: code() if type(loader) is importlib.machinery.SourceFileLoader else b""),
        (b"s", lambda: loader.get_source(name).encode("utf-8")),  # a zip has it too
        (b"s", lambda: Path(re.sub(r"\.pyc\Z", ".py", __file__)).read_bytes()),
        (b"c", code),  # a program without sources: only .pyc, or frozen
    ]
    for kind, way in ways:
        with contextlib.suppress(ImportError, OSError, AttributeError, NameError):
            if program := way():
                return b"%s%08d%s" % (kind, len(program), program)
    raise JupyterExecError(
        f"the source of {name} is not here, and its bytecode is none for that Python. Use one of version "
        f"{sys.version_info[0]}.{sys.version_info[1]}, or ship {name.rpartition('.')[2]}.py too (PyInstaller: "
        "--add-data, or module_collection_mode 'py')"
    )


_Result = TypeVar("_Result")


def _as_soon_as(
    stream: Stream, event: int, call: Callable[[], _Result], deadline: Deadline, errors: Tail | None
) -> _Result:
    """Return `call()` when it does not block any more; meanwhile read the stderr, for which the command may wait."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream.fileno(), event)
        if errors:
            selector.register(errors, selectors.EVENT_READ)
        while True:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                return call()
            if deadline.expired:
                raise TimeoutError
            for key, _ in selector.select(deadline.remaining):
                if key.fileobj is errors and errors and not errors.read():
                    selector.unregister(errors)


def greet_host(far_end: FarEnd, nonce: str, deadline: Deadline) -> tuple[int, int]:
    """Wait for the host's greeting, among whatever else is printed there, and send the source.

    Returns (pid, user id) of the host, as they are over there.

    Raises: ConnectionClosed, ExecutionTimeout, JupyterExecError if its Python is too old.
    """
    stream, errors, seen = far_end.stream, far_end.errors, b""
    pattern = rb"%s (\d{1,4}) (\d{1,4}) ([0-9a-f]{1,64}) (\d{1,10}) (\d{1,10})\n" % nonce.encode("ascii")
    stream.settimeout(0)
    try:
        while not (found := re.search(pattern, seen)):
            data = _as_soon_as(stream, selectors.EVENT_READ, lambda: stream.recv(4096), deadline, errors)
            if not data or len(seen) > 2**20:
                raise ConnectionClosed(f"no Python answered{_quote(seen)}")
            seen += data
        version = int(found[1]), int(found[2])
        if version < (3, 10):
            raise JupyterExecError("its Python {}.{} is too old, 3.10 or newer is needed".format(*version))
        unsent = memoryview(own_program(found[3].decode()))
        while unsent:
            sent = _as_soon_as(stream, selectors.EVENT_WRITE, functools.partial(stream.send, unsent), deadline, errors)
            unsent = unsent[sent:]
    except TimeoutError:
        raise ExecutionTimeout(f"no answer within {deadline.seconds:g} s{_quote(seen)}") from None
    except OSError as error:
        raise error if isinstance(error, ConnectionClosed) else ConnectionClosed("it ended at once") from None
    return int(found[4]), int(found[5])


def _quote(seen: bytes) -> str:
    return f"; it printed: {seen[-500:].decode('utf-8', 'replace').strip()}" if seen.strip() else ""


class HostedKernelControl:
    """KernelControl of a kernel that a server's host runs."""

    owned, supervised = True, False

    def __init__(self, server: HostServer, kernel_name: str) -> None:
        self._server = server
        self.start_timeout = server.launch.start_timeout
        self._kernel_name = kernel_name
        self._slot = f"k{next(server.serial)}"
        self._key = os.urandom(32).hex()
        self._starts = itertools.count(1)
        self._name = ""  # of the process; a new one at each start
        self._link: HostLink | None = None
        self._by_message = False
        self.argv: list[str] = []
        self.connection_file: str | None = None

    def start(self, mailbox: Mailbox) -> Channels:
        link = self._link = self._server.link()
        self._name = f"{self._slot}.{next(self._starts)}"
        link.mailboxes[self._name] = mailbox
        try:
            result = link.call(
                "start",
                kernel=self._name,
                slot=self._slot,
                kernel_name=self._kernel_name,
                key=self._key,
                identity=os.urandom(16).hex(),
                relay=self._server.relays,
                own_python3=self._server.own_python3,
                launch=asdict(self._server.launch),
            )
            return self._reach(link, mailbox, result)
        except JupyterExecError as error:
            link.mailboxes.pop(self._name, None)
            if isinstance(error, ProtocolError):
                link.close("it breaks the protocol")  # and with it the kernel that nobody reaches
            raise

    def _reach(self, link: HostLink, mailbox: Mailbox, result: Any) -> Channels:
        if not isinstance(result, dict):
            raise ProtocolError("The kernel host gives a strange answer.")
        self.argv = _texts(result.get("argv"))
        self._by_message = result.get("interrupt_mode") == "message"
        if self._server.relays:
            return PipeChannels(functools.partial(link.relay, self._name), self._key)
        self.connection_file = os.path.join(self._server.directory, f"kernel-{self._slot}.json")
        connection = KernelConnection.from_json(_text(result.get("connection")))
        places = [("tcp", "127.0.0.1"), ("ipc", os.path.join(self._server.directory, self._slot))]
        if (connection.transport, connection.ip) not in places or connection.key != self._key:
            raise ProtocolError("The kernel host names a connection that is not the kernel's.")
        return ZmqChannels(link.loop, link.context(), connection, mailbox)

    def interrupt(self, sent: Callable[[], None]) -> bool:
        if self._link and not self._by_message:
            self._link.ask("interrupt", lambda answer: sent(), kernel=self._name)
        return not self._by_message

    def kill(self) -> None:
        if self._link:
            self._link.ask("kill", lambda answer: None, kernel=self._name)

    def abandon(self) -> None:
        if self._link:
            self._link.close("the kernel host did not answer 'kill' in time")

    def close(self) -> None:
        pass  # the server has the link


@dataclass(frozen=True)
class LaunchOptions:
    """How kernels are launched: keywords of LocalJupyterServer, CommandJupyterServer and DockerJupyterServer alike.

    On Linux an ipykernel is forked, in a fifth of the time, from a process that has imported ipykernel and the modules
    that `preload` names; preload=None launches each kernel as a process of its own. `ipython_defaults` gives kernels
    back what they are started without: the history database, the debugger and a pause after each cell.
    `start_timeout` is how many seconds the start of a kernel host may take, and then that of each kernel.
    """

    preload: Sequence[str] | None = ()
    ipython_defaults: bool = False
    start_timeout: float = START_TIMEOUT

    def __post_init__(self) -> None:
        listed = isinstance(self.preload, Sequence) and not isinstance(self.preload, str)
        if self.preload is not None and not (listed and all(isinstance(name, str) for name in self.preload)):
            raise ValueError(f"preload must be a list of module names, or None, not {self.preload!r}.")
        if not self.start_timeout > 0:
            raise ValueError(f"start_timeout must be a number of seconds, not {self.start_timeout!r}.")

    @classmethod
    def names(cls) -> set[str]:
        return {option.name for option in fields(cls)}


class HostServer(Stoppable):
    """What servers whose kernels are run by a kernel host have in common. Starts on first use."""

    relays = True  # messages through the pipe, not straight over ZeroMQ
    own_python3 = False  # "python3" means the host's interpreter, whatever kernelspecs say
    directory = ""  # of the connection files, if they are on this machine
    _link: HostLink | None = None
    _gateway: RemoteJupyterServer | None = None

    def __init__(self, transport: str, launch: Json) -> None:
        if transport not in ("direct", "gateway"):
            raise ValueError(f'transport must be "direct" or "gateway", not {transport!r}.')
        for name in launch.keys() - LaunchOptions.names():
            raise TypeError(f"{type(self).__name__} has no keyword {name!r}.")
        super().__init__()
        self.launch = LaunchOptions(**launch)
        self.serial = itertools.count(1)
        self.transport = transport

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A server that nobody refers to ends, in its I/O thread: this may be called at any point of any thread, with
        # any lock held. That thread refers to no server; a job that does keeps it until the end is done.
        loop = self._link.loop if self._link else self._gateway and self._gateway._loop
        if loop and not is_finalizing():
            with contextlib.suppress(JupyterExecError):  # this is a forked child
                if self._link:
                    loop.post(self._link.hang_up)
                loop.post(self.stop)

    def _open(self, program: str) -> FarEnd:
        """Start a Python somewhere that runs `program`. Raises: KernelStartFailed, SandboxError."""
        raise NotImplementedError

    def _start_error(self, reason: str) -> JupyterExecError:
        """Return the error that says why there is no kernel host."""
        raise NotImplementedError

    def _connect(self) -> HostLink:
        """Start a kernel host and greet it within `start_timeout`. Raises: KernelStartFailed, SandboxError."""
        nonce, began = os.urandom(16).hex(), time.monotonic()
        far_end = self._open(BOOTSTRAP.replace("NONCE", nonce).replace("MAIN", "host_main"))
        try:
            who = greet_host(far_end, nonce, Deadline(self.launch.start_timeout))
        except BaseException as error:
            far_end.stream.close()
            end = far_end.describe_end() if isinstance(error, ConnectionClosed) else ""
            failed = self._start_error(f"{error}: {end}" if end else str(error))
            if far_end.errors:
                far_end.errors.close()
            self._disconnect()
            if not isinstance(error, JupyterExecError):  # such as Ctrl-C
                raise
            raise failed from None
        logger.info("Kernel host started: process %d, user %d, in %.2f s", *who, time.monotonic() - began)
        return HostLink(far_end, *who)

    def link(self) -> HostLink:
        """Return the link to the host, which is started if there is none or the last one is gone."""
        with self._lock:
            self._check_usable()
            if self._link is None or self._link.lost is not None:
                if self._link:
                    self._link.close()
                    self._disconnect()
                self._link = self._connect()
            return self._link

    def start_kernel(self, kernel_name: str = "python3") -> KernelClient:
        """Ask for a kernel and return its client without waiting: see KernelClient.wait_ready.

        Raises: KernelSpecNotFound, KernelStartFailed, ConnectionClosed.
        """
        if self.transport == "gateway":
            return self.get_client().start_kernel(kernel_name)
        client = KernelClient(HostedKernelControl(self, kernel_name))
        client.start()
        return client

    def kernelspecs(self) -> dict[str, Json]:
        """Return {kernel name: kernel.json as a dict, with "resource_dir"}."""
        if self.transport == "gateway":
            return self.get_client().kernelspecs()
        result = self.link().call("kernelspecs", own_python3=self.own_python3)
        specs = result if isinstance(result, dict) else {}
        return {_text(name): spec for name, spec in specs.items() if isinstance(spec, dict)}

    def get_client(self) -> RemoteJupyterServer:
        """Return the client of the kernel gateway, which is started on first use.

        Raises: AttributeError unless the transport is "gateway"; KernelStartFailed, SandboxError.
        """
        if self.transport != "gateway":
            raise AttributeError('There is no server to connect to by the direct way: ask for transport="gateway".')
        with self._lock:
            self._check_usable()
            if self._gateway and self._gateway_ended():
                self._gateway.stop()
                self._gateway = None
            if self._gateway is None:
                self._gateway = RemoteJupyterServer(self._start_gateway())
            return self._gateway

    def _gateway_ended(self) -> bool:
        return False

    def _start_gateway(self) -> JupyterConnectionInfo:
        raise NotImplementedError

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

    def stop(self) -> None:
        """End the host, or the gateway, and all its kernels. May be called more than once."""
        with self._lock:
            self._stopped = True
            link, self._link = self._link, None
            gateway, self._gateway = self._gateway, None
        if gateway:
            gateway.stop()
        if link:
            link.close()
        if link or gateway:
            self._disconnect()
            logger.info("Server stopped")

    def _disconnect(self) -> None:
        """Wait for the end of what `_connect` started."""


class _GenerateToken:
    """Stands for a token that is made up; AutoGen's default."""


def chosen_token(token: str | _GenerateToken | None) -> str:
    """Return the token, or a new one. Raises: ValueError for the empty one, which lets everybody in."""
    if token == "":
        raise ValueError("An empty token would open the gateway to everybody: leave it out, one is made up.")
    return token if isinstance(token, str) else os.urandom(32).hex()


def await_server(info: JupyterConnectionInfo, check: Callable[[], None]) -> JupyterConnectionInfo:
    """Wait until a server that was just started answers; `check()` waits a moment, and raises if it has ended."""
    rest, deadline = RestClient(info), Deadline(START_TIMEOUT)
    while True:
        try:
            rest.request("GET", "/api/kernelspecs", timeout=deadline.within(CONTROL_TIMEOUT))
            return info
        except (ConnectionClosed, ExecutionTimeout):
            check()
            if deadline.expired:
                raise
        finally:
            rest.close()


class CommandJupyterServer(HostServer):
    """Kernels at the other end of any command that gives a Python on stdin and stdout.

    `argv` is that command up to the interpreter: ["ssh", "box", "python3"], ["kubectl", "exec", "-i", "pod", "--",
    "python3"], ["podman", "exec", "-i", "name", "python3"]. Its Python needs ipykernel. `remote_shell` says whether
    what follows passes through a shell over there; None means that it does if the command is ssh. `env` and
    `cwd` are those of the command itself, `launch` the keywords of LaunchOptions.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        remote_shell: bool | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: str | None = None,
        transport: str = "direct",
        **launch: Any,
    ) -> None:
        super().__init__(transport, launch)
        if isinstance(argv, str) or not argv:
            raise ValueError("argv must be a list of strings: the command and its arguments.")
        if cwd is not None and not os.path.isdir(cwd):
            raise ValueError(f"Working directory {cwd} does not exist.")
        self._argv = list(argv)
        self._quoted = Path(argv[0]).stem == "ssh" if remote_shell is None else remote_shell
        self._cwd = cwd
        self._env = _merged_env(env or {})
        self._env.setdefault("SLURM_UNBUFFEREDIO", "1")  # srun would hold back what has no newline: all that is said
        self._process: subprocess.Popen[Any] | None = None  # the command

    def _open(self, program: str) -> FarEnd:
        errors = Tail()
        try:
            stream, process = _spawn(self._command(program), stderr=errors.writer, env=self._env, cwd=self._cwd)
        except OSError as error:
            errors.close()
            raise self._start_error(describe_os_error(error)) from None
        finally:
            os.close(errors.writer)
        self._process = process
        if not self.relays:
            with contextlib.suppress(ImportError):  # needed soon; meanwhile the other Python starts
                import zmq  # noqa: F401
        return FarEnd(stream, lambda: _describe_end(process, errors), errors)

    def _start_error(self, reason: str) -> JupyterExecError:
        return KernelStartFailed(self._argv, reason)

    def _command(self, program: str) -> list[str]:
        import shlex

        return [*self._argv, "-c", shlex.quote(program) if self._quoted else program]

    def _disconnect(self) -> None:
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
    GenerateToken = _GenerateToken

    def __init__(
        self,
        ip: str | None = None,
        port: int | None = None,
        token: str | _GenerateToken | None = None,
        log_file: str | os.PathLike[str] | None = None,
        log_level: str = "INFO",
        log_max_bytes: int = 2**20,
        log_backup_count: int = 3,
        *,
        python: str | os.PathLike[str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str | None] | None = None,
        transport: str | None = None,
        **launch: Any,
    ) -> None:
        implied = "direct" if ip is None and port is None and token is None else "gateway"
        cwd = None if cwd is None else os.fspath(cwd)
        compiled = globals().get("__compiled__")  # by Nuitka
        if not python and (
            getattr(sys, "frozen", False) or getattr(compiled, "standalone", compiled) or not sys.executable
        ):
            raise ValueError(
                "This program is frozen, it is no Python: give python=, the path of one that has ipykernel."
            )
        argv = [os.fspath(python or sys.executable)]
        super().__init__(argv, env=env, cwd=cwd, transport=transport or implied, **launch)
        self.own_python3 = python is not None
        self._address = ip or "127.0.0.1", port
        self._token = chosen_token(token)
        handler = {"class": "logging.handlers.RotatingFileHandler", "level": log_level, "maxBytes": log_max_bytes}
        handler |= {"backupCount": log_backup_count, "filename": os.path.abspath(log_file or os.devnull)}
        self._logging = {"handlers": {"file": handler}, "loggers": {"KernelGatewayApp": {"handlers": ["file"]}}}
        self._logs = log_file is not None
        self._gateway_mailbox = Mailbox()

    def _gateway_ended(self) -> bool:
        return self._gateway_mailbox.ended

    def _start_gateway(self) -> JupyterConnectionInfo:
        ip, port = self._address
        argv = [*self._argv, "-c", GATEWAY_PROGRAM, f"--KernelGatewayApp.ip={ip}"]
        argv += [f"--KernelGatewayApp.port={port or 0}", "--KernelGatewayApp.port_retries=0", *GATEWAY_OPTIONS]
        argv += [f"--JupyterApp.logging_config={json.dumps(self._logging)}"] if self._logs else []
        link, mailbox = self.link(), Mailbox()
        link.mailboxes["gateway"] = self._gateway_mailbox = mailbox
        said = Path(self.directory, os.urandom(8).hex())
        env = {"KG_AUTH_TOKEN": self._token, "JUPYTER_EXEC_PORT_FILE": str(said)}
        link.call("spawn", kernel="gateway", argv=argv, env=env)

        def check() -> None:
            if isinstance(end := mailbox.get(0.05), KernelDied):
                advice = (
                    f"; run {self._argv[0]} -m pip install jupyter_kernel_gateway" if "No module" in end.stderr else ""
                )
                advice = advice or f"; is port {port} of {ip} in use?" * bool(port)
                raise KernelStartFailed(argv[:1], f"the gateway has ended ({end.sentence()}){advice}", None, end.stderr)

        deadline = Deadline(START_TIMEOUT)
        while not (said.exists() and said.read_text().endswith("\n")):
            check()
            if deadline.expired:
                raise KernelStartFailed(argv[:1], f"the gateway does not listen within {START_TIMEOUT:g} s")
        return await_server(JupyterConnectionInfo(ip, False, int(said.read_text()), self._token), check)

    def _open(self, program: str) -> FarEnd:
        self._remove_directory()
        self.directory = make_directory()
        try:
            return super()._open(program)
        except BaseException:
            self._remove_directory()
            raise

    def _command(self, program: str) -> list[str]:
        return [*super()._command(program), self.directory]

    def _disconnect(self) -> None:
        if self._process:  # a host that was killed could not end what its kernels had started
            _kill_all(_family(-1, f"\0{_MARKER}={self._process.pid}/".encode()))
        super()._disconnect()
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self.directory:
            import shutil

            with contextlib.suppress(OSError):  # an empty one goes even where no more files can be opened
                os.rmdir(self.directory)
            shutil.rmtree(self.directory, ignore_errors=True)


def _spawn(argv: list[str], **options: Any) -> tuple[socket.socket, subprocess.Popen[Any]]:
    """Start a process in a session of its own (a Ctrl-C is not for it); return the socket to its stdin and stdout."""
    import subprocess

    if os.name == "nt":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP  # type: ignore[attr-defined]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=flags, **options)
        assert process.stdin and process.stdout
        stream = as_stream(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno()))
        process.stdin.close()
        process.stdout.close()
        return cast(socket.socket, stream), process
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            ends: Json = {"stdin": theirs, "stdout": theirs}
            return ours, subprocess.Popen(argv, start_new_session=True, **ends, **options)
        except BaseException:
            ours.close()
            raise


def _merged_env(changes: Mapping[str, str | None]) -> dict[str, str]:
    # MPLBACKEND is for this process: inherited by a kernel it would make inline pictures vanish.
    merged = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | dict(changes)
    return {key: value for key, value in merged.items() if value is not None}


def _describe_end(process: subprocess.Popen[Any], errors: Tail) -> str:
    import subprocess

    try:
        code = process.wait(0.2)
    except subprocess.TimeoutExpired:
        return ""
    errors.drain()
    return describe_exit(code) + (f"; its stderr: {errors}" if str(errors) else "")


# ======================================================================================================
# 11. Docker
# ======================================================================================================


class DockerStream(NetStream):
    """The attached streams of a container: its stdout is the pipe, its stderr the log, of which a tail is kept.

    Spec: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
    """

    _HEAD = struct.Struct(">BxxxI")

    def __init__(self, attached: Any) -> None:
        super().__init__(getattr(attached, "_sock", attached))
        self._attached = attached  # the SDK's wrapper: it closes the socket when it is collected
        self._buffer = bytearray()
        self.stderr = bytearray()

    def recv(self, size: int, /) -> bytes:
        while data := super().recv(size):
            if stdout := self._demultiplex(data):
                return stdout
        return b""

    def _demultiplex(self, data: bytes) -> bytes:
        self._buffer += data
        stdout, position = [], 0
        while len(self._buffer) - position >= self._HEAD.size:
            # "STREAM_TYPE can be: 0: stdin (is written on stdout), 1: stdout, 2: stderr"
            kind, length = self._HEAD.unpack_from(self._buffer, position)
            end = position + self._HEAD.size + length
            if kind > 2:
                raise ProtocolError("The attached container sends something that is no stream frame.")
            if len(self._buffer) < end:
                break
            payload = bytes(memoryview(self._buffer)[position + self._HEAD.size : end])
            if kind == 2:
                self.stderr += payload
                del self.stderr[:-STDERR_TAIL]
            else:
                stdout.append(payload)
            position = end
        del self._buffer[:position]
        return b"".join(stdout)

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

    Raises: ValueError for keywords that do not go together, TypeError for unknown ones. A kernel's start raises
    SandboxError.
    """

    GenerateToken = _GenerateToken
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

    # What the transport needs for itself -> what to use instead.
    _RESERVED: ClassVar[dict[str, str]] = {
        "command": "custom_image_name",
        "detach": "nothing",
        "image": "custom_image_name",
        "log_config": "nothing, the stdout of the container is the transport",
        "name": "container_name",
        "auto_remove": "auto_remove, which is a keyword of its own",
        "remove": "auto_remove",
        "stdin_open": "nothing",
        "stream": "nothing",
        "tty": "nothing",
    }

    def __init__(
        self,
        *,
        custom_image_name: str | None = None,
        container_name: str | None = None,
        auto_remove: bool = True,
        stop_container: bool = True,
        docker_env: Mapping[str, str] | None = None,
        token: str | _GenerateToken | None = None,
        base_image: str | None = None,
        packages: Sequence[str] = (),
        network: str | None = None,
        bind_dir: str | os.PathLike[str] | None = None,
        work_dir: str = "/workspace",
        transport: str | None = None,
        hardened: bool = False,
        **docker_kwargs: Any,
    ) -> None:
        implied = "direct" if token is None and stop_container else "gateway"
        launch = {name: docker_kwargs.pop(name) for name in LaunchOptions.names() & docker_kwargs.keys()}
        super().__init__(transport or implied, launch)
        for name in sorted(self._RESERVED.keys() & docker_kwargs.keys()):
            raise ValueError(f"{name!r} is not for docker_kwargs; use {self._RESERVED[name]}.")
        ours = {*(DockerJupyterServer.__init__.__kwdefaults__ or {}), *LaunchOptions.names()}
        _check_keywords(docker_kwargs, ours)
        limits = {"read_only": True, "mem_limit": "1g", "nano_cpus": 10**9} if hardened else {}
        if docker_kwargs.keys() & {"cpu_period", "cpu_quota"}:  # say the same in another way, and not both are allowed
            limits.pop("nano_cpus", None)
        given = limits | docker_kwargs
        self._docker_kwargs = {name: _listed(value) for name, value in given.items() if value is not None}
        if network is not None and "network_mode" in self._docker_kwargs:
            raise ValueError("Give network or network_mode, not both.")
        if custom_image_name and (packages or base_image):
            raise ValueError("packages and base_image are for the bundled image, not for custom_image_name.")
        if isinstance(token, str) and not token.strip():
            raise ValueError("An empty token would open the gateway to anybody: give one, or leave it out.")
        self._network = network or self._docker_kwargs.get("network_mode") or ("none" if hardened else "bridge")
        if self.transport == "gateway" and self._network == "none":
            raise ValueError('A gateway cannot be reached without a network: use transport="direct".')
        self._stop_container = stop_container
        self._token = token
        self._custom_image = custom_image_name
        self._container_name = container_name
        self._auto_remove = auto_remove
        self._env = dict(docker_env or {})
        self._base_image = base_image
        self._packages = _requirements(packages)
        self._bind_dir = None if bind_dir is None else os.path.abspath(bind_dir)
        self._work_dir = work_dir
        self._client: Any = None
        self._container: Any = None
        self._ended: Any = None  # the engine's answer to "wait", when it comes
        self._exit_status: int | None = None
        self._end_lock = threading.Lock()
        self._pid = 0  # of the process that has started the container
        for opening in _openings(self._docker_kwargs | {"network_mode": self._network}, self._bind_dir):
            logger.warning("The sandbox of Docker is opened: %s", opening)

    @property
    def container_id(self) -> str | None:
        """The id of the container, for `docker` commands; None while there is none."""
        return self._container.id if self._container else None

    def _open(self, program: str) -> FarEnd:
        client, stream = self._new_client(), None
        try:
            with _engine_errors(self._image_name):
                self._container = self._create(client, self._image(client), ["python3", "-c", program])
                stream = self._stream = self._attach(client)
                self._container.start()
            logger.info("Container %s started: %s", self._container.name, self._container.id)
        except BaseException:
            if stream:
                stream.close()
            self._disconnect(failed=True)
            raise
        server = weakref.ref(self)  # which ends when nobody else refers to it
        return FarEnd(stream, lambda: f"{this._describe_end() if (this := server()) else ''}{_log_of(stream)}")

    def _start_error(self, reason: str) -> JupyterExecError:
        logs = self._stream.stderr.decode("utf-8", "replace")
        return SandboxError(f"No kernel host answered: {reason}", self._image_name, self._container.name, logs)

    def _connect(self) -> HostLink:
        link = super()._connect()
        user = self._container.attrs["Config"]["User"]
        if link.uid == 0 and "user" not in self._docker_kwargs and not _is_root(user):
            link.close()
            self._disconnect()
            raise SandboxError(f"User {user} of the image is root: give user=, such as {NORMAL_USER}", self._image_name)
        if link.pid != 1:
            logger.warning(NOT_FIRST, self._container.name)
        return link

    def _start_gateway(self) -> JupyterConnectionInfo:
        """Run the image's own command, with the port published on the loopback address of the engine only."""
        client = self._new_client()
        token = chosen_token(self._token)
        try:
            with _engine_errors(self._image_name):
                _remove_orphans(client)
                image = self._image(client)
                options = self._options(client, image.attrs.get("Config") or {}, None)
                for name in ("stdin_open", "log_config", "auto_remove", *([] if self._bind_dir else ["working_dir"])):
                    del options[name]
                options["environment"]["TOKEN"] = token
                if self._stop_container:
                    options["labels"]["jupyter_exec.forsakable"] = "1"
                options["ports"] = {"8888/tcp": ("127.0.0.1", None)} | dict(options.get("ports") or {})
                self._container = client.containers.create(image.id, **options)
                if self._stop_container:
                    weakref.finalize(self, _remove_quietly, self._container, os.getpid())  # at the program's end, too
                self._container.start()
                self._container.reload()
                published = (self._container.ports.get("8888/tcp") or [{}])[0].get("HostPort", 0)
            return await_server(JupyterConnectionInfo("127.0.0.1", False, int(published), token), self._check_gateway)
        except BaseException:
            self._disconnect(failed=True)
            raise

    def _check_gateway(self) -> None:
        time.sleep(0.05)
        with _engine_errors(self._image_name):
            self._container.reload()
            if self._container.status in ("created", "running"):
                return
            logs = self._container.logs(tail=20).decode("utf-8", "replace")
        raise SandboxError("The container has ended before its gateway answered", self._image_name, "", logs)

    def _new_client(self) -> Any:
        self._pid = os.getpid()
        client = docker_client()
        here = client.api.base_url.startswith("http+docker://")  # a socket of this machine
        if here and self._bind_dir and not os.path.isdir(self._bind_dir):
            client.close()
            raise SandboxError(f"bind_dir {self._bind_dir} does not exist")  # the engine would make it, for root
        self._client = client
        return client

    @property
    def _target(self) -> str:
        return "gateway" if self.transport == "gateway" else "kernel"

    @property
    def _image_name(self) -> str:
        if self._custom_image:
            return self._custom_image
        content = json.dumps([self.DEFAULT_DOCKERFILE, self._base_image, self._packages, self._target])
        import hashlib

        return f"jupyter-exec:{hashlib.sha256(content.encode('utf-8')).hexdigest()[:12]}"

    def _image(self, client: Any) -> Any:
        """Return the image; the bundled one is built if it is not there, no other is ever pulled."""
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
        arguments = {"PACKAGES": "\n".join(self._packages)}
        if self._base_image:
            arguments["BASE_IMAGE"] = self._base_image
        build_logger.info("Building the image %s, once; this takes a minute", self._image_name)
        steps = client.api.build(
            fileobj=io.BytesIO(self.DEFAULT_DOCKERFILE.encode("utf-8")),
            tag=self._image_name,
            target=self._target,
            buildargs=arguments,
            decode=True,
            rm=True,
            forcerm=True,
            timeout=BUILD_TIMEOUT,
        )
        tail: deque[str] = deque(maxlen=20)
        cause, failed = "", False
        for step in steps:  # to the end: the engine's answer has to be read up
            text = clean_text(str(step.get("stream") or step.get("status") or step.get("error") or "")).strip()
            tail.extend([text] * bool(text))
            if text[:5].upper() == "STEP ":  # Podman shouts
                build_logger.info("%s", text[:100])
            if said := re.search(r"(?mi)^(?:error|e|fatal): *(.*)", text):  # pip's, apt's: what it is is said first
                cause = cause or said[1]
            if "error" in step:
                cause, failed = cause or text, True
        if failed:
            advice = (
                "" if self._base_image else " (where no registry is reached, base_image names an image that is there)"
            )
            reason = f"The image could not be built: {cause[:500]}{advice}"
            raise SandboxError(reason, self._image_name, "", "\n".join(tail))

    def _create(self, client: Any, image: Any, command: list[str]) -> Any:
        options = self._options(client, image.attrs.get("Config") or {}, command)
        if not self._bind_dir and not self._has_work_dir(client, image):  # the engine would make it, but for root
            options.setdefault("tmpfs", {}).setdefault(self._work_dir, _tmpfs(client, options["user"]))
        return client.containers.create(image.id, **options)

    def _has_work_dir(self, client: Any, image: Any) -> bool:
        import docker.errors

        if (image.attrs.get("Config") or {}).get("WorkingDir") == self._work_dir:
            return True
        probe = client.containers.create(image.id, ["never", "started"])
        try:
            probe.get_archive(self._work_dir)[0].close()
            return True
        except docker.errors.NotFound:
            return False
        finally:
            probe.remove()

    def _options(self, client: Any, config: Json, command: list[str] | None) -> Json:
        """Return the arguments of containers.create: ours, merged with those of the user."""
        user = self._docker_kwargs["user"] if "user" in self._docker_kwargs else self._user(client, config)
        options: Json = {
            "command": command,
            "name": self._container_name or f"jupyter-exec-{os.urandom(8).hex()}",
            "stdin_open": True,  # and not "detach": the engine then closes stdin when we have gone
            "auto_remove": self._auto_remove,
            "log_config": {"type": "none"},  # the stdout is our relay, not to be written to the engine's disk
            "network_mode": self._network,
            "use_config_proxy": self._network != "none",  # its proxies, and the passwords in their URLs
            "environment": dict(self._env),
            "working_dir": self._work_dir,
            "labels": {"jupyter_exec": __version__, "jupyter_exec.owner": process_name(os.getpid())},
            "user": user,
            # The kernel host is to be PID 1: code can neither stop it nor open its pipe, which an init before it would
            # have open too. It hears no SIGTERM either, so that `docker stop` would wait.
            "init": command is None,
            "stop_signal": None if command is None else "SIGKILL",
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "pids_limit": PIDS_LIMIT,
        }
        # Of the engine's memory at most a half, unless told otherwise; and no swap beside the limit.
        options["mem_limit"] = self._docker_kwargs.get("mem_limit") or client.info()["MemTotal"] // 2
        options["memswap_limit"] = options["mem_limit"]
        if self._bind_dir:
            options["volumes"] = {self._bind_dir: {"bind": self._work_dir, "mode": "rw"}}
        if self._docker_kwargs.get("read_only"):
            home = dict(entry.partition("=")[::2] for entry in config.get("Env") or []).get("HOME")
            places = ["/tmp", *([home] if home else []), *([] if self._bind_dir else [self._work_dir])]
            options["tmpfs"] = dict.fromkeys(places, _tmpfs(client, user))
        for name, value in self._docker_kwargs.items():
            options[name] = _merged(name, options.get(name), value)
        return options

    def _user(self, client: Any, config: Json) -> str:
        """Return whom to run as: the image's user, with a bind_dir its owner, but root neither way."""
        own = str(config.get("User") or "")
        info = client.info() if self._bind_dir else {}
        if self._bind_dir and info.get("OperatingSystem") != "Docker Desktop":
            # Docker says it among the security options, Podman in a field of its own.
            if info.get("Rootless") or any("rootless" in option for option in info.get("SecurityOptions") or ()):
                return "0:0"  # is the caller, outside
            with contextlib.suppress(OSError):  # on another host: nothing to see from here
                return _owner_of(self._bind_dir)
        return NORMAL_USER if _is_root(own) else own

    def _attach(self, client: Any) -> DockerStream:
        """Attach to the container, and wait for its end, both before it starts: later would be too late."""
        url = client.api._url("/containers/{0}", self._container.id)
        condition = "removed" if self._auto_remove else "next-exit"
        self._exit_status = None
        self._ended = client.api._post(
            f"{url}/wait", params={"condition": condition}, stream=True, timeout=STOP_TIMEOUT
        )
        # As attach_socket() does, which waits for ever if the engine does not answer.
        streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
        answer = client.api._post(f"{url}/attach", params=streams, headers=headers, stream=True, timeout=STOP_TIMEOUT)
        return DockerStream(client.api._get_raw_response_socket(answer))

    def _exit_code(self) -> int | None:
        """Wait, a while, for the end of the container, and for its removal if that is due."""
        with self._end_lock:  # the I/O thread asks when the pipe closes, stop() at the same time
            if self._ended is not None:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError), self._ended as answer:
                    self._exit_status = int(answer.json()["StatusCode"])
                self._ended = None
            return self._exit_status

    def _describe_end(self) -> str:
        code = self._exit_code()
        cause = " (killed, perhaps for want of memory)" if code == 137 else f" (exit code {code})"
        # Podman says 0 whatever it was; a host ends in no such way.
        return "" if code is None else f"the container has ended{cause if code else ''}"

    def _disconnect(self, failed: bool = False) -> None:
        """End the container by force: it may be paused, and its host stopped, or slow."""
        container, self._container = self._container, None
        if os.getpid() != self._pid:
            return  # a forked child has left the `with` of its parent
        self._client.api.timeout = STOP_TIMEOUT
        try:
            if container and (self._stop_container or failed):
                container.remove(force=True) if self._auto_remove or failed else container.kill()
        except Exception as error:  # whatever it is: the container is gone, or the engine is
            if "already in progress" in str(error):
                self._exit_code()
        with self._end_lock:
            if self._ended is not None:
                self._ended.close()
            self._ended = None
        self._client.close()


NOT_FIRST = (
    "The kernel host is not the first process of container %s: its entrypoint does not `exec` its command, or init or "
    "pid_mode was given. Code can stop the host, write into its pipe, and live on after this program."
)


def _remove_quietly(container: Any, owner: int) -> None:
    with contextlib.suppress(Exception):  # it is gone already, or the engine is
        if os.getpid() == owner:  # finalizers run in forked children too
            container.remove(force=True)


def _remove_orphans(client: Any) -> None:
    """Remove the gateway containers of processes of this machine that are gone: nothing tells a gateway of that."""
    for container in client.containers.list(filters={"label": "jupyter_exec.forsakable"}, ignore_removed=True):
        if has_ended(container.labels.get("jupyter_exec.owner", "")):
            _remove_quietly(container, os.getpid())


def _log_of(stream: DockerStream) -> str:
    log = stream.stderr.decode("utf-8", "replace").strip()
    return f"; its log: {log}" if log else ""


def docker_client() -> Any:
    """Return a client of the engine that the environment names. Raises: SandboxError with what to do."""
    try:
        import docker
    except ImportError:
        raise SandboxError("The package docker is not installed: pip install docker") from None
    with _engine_errors():
        try:
            client = docker.DockerClient(**_engine_in_use(), timeout=ENGINE_TIMEOUT)
        except docker.errors.DockerException as error:
            if "timed out" not in str(error):
                raise
            client = docker.DockerClient(**_engine_in_use(), timeout=ENGINE_TIMEOUT)  # a machine under load
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
    except (docker.errors.DockerException, OSError, TypeError, ValueError) as error:  # the last of a keyword's value
        if "Permission denied" in str(error):
            reason = "No permission to use Docker: add yourself to the group docker, or use LocalJupyterServer"
        elif "timed out" in str(error):
            reason = f"The Docker engine does not answer: try again, restart it, or use LocalJupyterServer ({error})"
        elif isinstance(error, OSError) or "Error while fetching server" in str(error):
            reason = f"Docker is not running: start it, or use LocalJupyterServer ({error})"
        else:
            reason = f"Docker refuses: {error}"
        raise SandboxError(reason, image) from None


def _tmpfs(client: Any, user: object) -> str:
    # Docker's default is noexec, with which compiled wheels cannot be imported. Podman refuses an owner, and keeps the
    # mode; Docker has that of a directory which is there already.
    uid, _, gid = str(user).partition(":")
    podman = any("Podman" in part.get("Name", "") for part in client.version().get("Components") or ())
    owner = f",uid={uid},gid={gid or uid}" if uid.isdigit() and not podman else ""
    return f"exec,size={TMPFS_SIZE},mode=1777{owner}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def _merged(name: str, ours: Any, theirs: Any) -> Any:
    """Return an option of ours with that of the user, in whatever kind of collection it comes."""
    if isinstance(theirs, str) and isinstance(ours, dict | list):
        theirs = [theirs]
    if isinstance(theirs, list) and (separator := _SEPARATORS.get(name)):
        pairs = [entry.partition(separator) for entry in theirs]
        theirs = {key: value if found else None for key, found, value in pairs}
    if isinstance(ours, dict) and isinstance(theirs, list):  # volumes, as "SOURCE:TARGET:MODE"
        ours = [f"{source}:{target['bind']}:{target['mode']}" for source, target in ours.items()]
    if isinstance(theirs, Mapping):
        return (ours or {}) | dict(theirs)
    return ours + theirs if isinstance(ours, list) else theirs


# Where docker-py takes entries instead of a mapping -> what stands between name and value.
_SEPARATORS = {"environment": "=", "labels": "=", "tmpfs": ":"}


def _is_root(user: str) -> bool:
    name = user.partition(":")[0].strip()
    with contextlib.suppress(ValueError):
        return int(name) == 0  # "00" too
    return name in ("", "root")


def _owner_of(bind_dir: str) -> str:
    """Return as whom code may run in a directory: its owner, but not root, who could leave a setuid file there.

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
    if isinstance(packages, str) or not all(isinstance(package, str) for package in packages):
        raise ValueError("packages must be a list of strings.")
    for package in packages:
        if any(word.startswith("-") for word in package.split()):
            raise ValueError(f"packages are requirements of pip; {package!r} has an option of pip.")
    return sorted(" ".join(package.split()) for package in packages)


def _check_keywords(given: Mapping[str, Any], ours: Iterable[str]) -> None:
    """Raise TypeError for what docker-py would refuse, if it is installed."""
    if not given:
        return
    try:
        from docker.models.containers import RUN_CREATE_KWARGS, RUN_HOST_CONFIG_KWARGS
    except ImportError:
        return
    known = [*RUN_CREATE_KWARGS, *RUN_HOST_CONFIG_KWARGS, "networking_config", "ports", "volumes", *ours]
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
    volumes = _merged("volumes", [], options.get("volumes", []))
    sources = [str(volume).partition(":")[0] for volume in volumes] + [bind_dir or "-"]
    sources += [str(mount.get("Source")) for mount in options.get("mounts", [])]
    for source in sources:
        if source.endswith(".sock") or source.rstrip("/") in ("", "/run", "/var/run"):
            yield f"with {source} mounted, code may become master of the machine"


# ======================================================================================================
# 12. Code executor
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
    whether the variables survived: "intact", "lost", or "busy" (the code still runs).
    """

    exit_code: int
    output: str
    output_files: list[str] = field(default_factory=list)
    kernel_state: str = "intact"

    def __str__(self) -> str:
        return f"exit_code={self.exit_code} output={self.output!r} output_files={self.output_files!r}"


IPythonCodeResult = CodeResult

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)")
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


def _message_texts(message: str | Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    if message is None or isinstance(message, str):
        yield message or ""
        return
    for part in message:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text"):
            yield str(part.get("text") or "")
        elif kind not in ("image_url", "input_image", "image", "function", "tool_call", "tool_calls"):
            raise ValueError(f"Wrong content format: unknown type {kind} within the content")


def fenced_blocks(text: str) -> Iterator[tuple[int, str, CodeBlock]]:
    """Yield (number of the line at which the code begins, info string, block) of each fenced block of a text."""
    lines = enumerate(re.split(r"\r\n|\n|\r", text), 1)
    offset = 0  # column at which the content of the list item around begins
    for number, line in lines:
        line = line.expandtabs(4)
        while item := _LIST_ITEM.match(line):
            offset = item.end()
            line = " " * offset + line[offset:]
        indent = len(line) - len(line.lstrip(" "))
        if line.strip() and indent < offset:
            offset = 0
        opening = _FENCE.fullmatch(line)
        # "... preceded by up to three spaces of indentation"
        if opening and indent - offset <= 3:
            code = "\n".join(_fenced_lines(lines, opening["fence"], indent, offset))
            language = _LANGUAGE.match(opening["info"])
            yield number + 1, opening["info"], CodeBlock(code, (language and language[1]) or _guessed_language(code))


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


class Folder:
    """A directory that is held open: what is written into it is in it, whatever has taken the place of its path.

    Code in a sandbox may share it, and plant links. Raises: ValueError if it does not exist; OSError in each method.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise ValueError(f"Output directory {path} does not exist.")
        self._at: Json = {}
        if os.open in os.supports_dir_fd:  # not on Windows
            descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
            self._at = {"dir_fd": descriptor}
            weakref.finalize(self, os.close, descriptor)

    def _name(self, name: str) -> str:
        return name if self._at else str(self.path / name)

    def create(self, name: str) -> IO[bytes]:
        """Make a new file; one that is there, or a link, is an error."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return open(os.open(self._name(name), flags, 0o666, **self._at), "wb")

    @contextlib.contextmanager
    def replace(self, name: str) -> Iterator[IO[bytes]]:
        """Give a file to write to, which takes the place of `name` once it is complete."""
        new = f"{os.urandom(16).hex()}.part"
        ends = {"src_dir_fd": self._at["dir_fd"], "dst_dir_fd": self._at["dir_fd"]} if self._at else {}
        try:
            with self.create(new) as file:
                yield file
            os.replace(self._name(new), self._name(name), **ends)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self._name(new), **self._at)
            raise


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
        self._text_path = ""
        self._trouble = ""

    def new_name(self, suffix: str) -> str:
        return f"{os.urandom(16).hex()}{suffix}"

    def save(self, data: Json) -> str | None:
        """Write the best representation of a MIME bundle that belongs into a file, under a name of our own.

        Returns the line that names the file, or says what went wrong; None if text is the best there is.
        """
        best = best_file(data)
        if best is None:
            return None
        word, suffix, encode = best
        path = self._folder.path / self.new_name(suffix)
        try:
            if len(self.paths) >= MAX_FILES:
                raise ValueError(f"a call may write {MAX_FILES} files")
            written = encode()
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
        if self._limit is not None and output["output_type"] not in ("clear_output", "update_display_data"):
            is_stream = output["output_type"] == "stream"
            text = output["text"].replace("\r\n", "\n").replace("\r", "\n") if is_stream else ""
            self._add(clean_text(text) if is_stream else render([output], "", no_file) + "\n")

    def _add(self, text: str) -> None:
        before, self._size = self._size, self._size + len(text)
        if before >= MAX_SPILL or self._trouble:
            return
        self._text.append(text[: MAX_SPILL - before])
        if self._size > (self._limit or 0):
            try:
                self._flush()
            except OSError as error:
                self._trouble = str(error)

    def _flush(self) -> None:
        if self._file is None:
            name = f"{os.urandom(16).hex()}.txt"
            self._file, self._text_path = self._folder.create(name), str(self._folder.path / name)
        self._file.write("".join(self._text).encode("utf-8", "replace"))
        self._file.flush()
        self._text.clear()

    def close(self) -> str:
        """Say where the whole text is, for the mark in what is returned."""
        if self._file:
            self.paths.append(self._text_path)
            with contextlib.suppress(OSError):
                self._file.close()
        if self._trouble:
            return f"the full text could not be saved: {self._trouble}"
        beyond = f" (its first {MAX_SPILL} characters)" if self._size > MAX_SPILL else ""
        return f"the full text is in {self._text_path}{beyond}" if self._file else ""


class Journal:
    """The cells of a session, kept on disk for `save_notebook`: one line of JSON each."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0
        self._trouble = ""  # why cells are missing

    def add(self, code: str, result: ExecutionResult) -> None:
        """Keep a cell. A full disk, or an output that cannot be written, costs its place here, not its result."""
        try:
            line = self._line(code, result.execution_count, list(map(_notebook_output, result.outputs)), result.note)
            if self._size + len(line) > MAX_FILE_BYTES:
                line = self._line(code, result.execution_count, [], "The outputs of this cell were not kept: too large")
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

    def _line(self, code: str, count: int | None, outputs: list[Json], note: str) -> bytes:
        outputs += [{"output_type": "stream", "name": "stderr", "text": note}] * bool(note)
        cell = {"cell_type": "code", "id": os.urandom(4).hex(), "metadata": {}, "source": code, "outputs": outputs}
        return dump_json(cell | {"execution_count": count}) + b"\n"

    def write(self, file: IO[bytes], metadata: Json) -> None:
        """Write a notebook. Spec: https://nbformat.readthedocs.io/en/latest/format_description.html"""
        head = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata}
        file.write(dump_json(head)[:-1] + b',"cells":[\n')
        left, comma = self._size, b""
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


def _notebook_output(output: Json) -> Json:
    """Return an output as nbformat allows it: a MIME value is a string unless the type is JSON."""
    if "data" not in output:
        return output
    data = {
        mime: value if isinstance(value, str) or mime.endswith("json") else json.dumps(value)
        for mime, value in output["data"].items()
    }
    return output | {"data": data}


_PYTHON_NAMES = re.compile(r"i?py(thon)?[\d.]*")
_SHELLS = {"bash": "bash", "shell": "bash", "sh": "sh"}
_QUIET = "-qq --disable-pip-version-check"  # errors stay visible
# A line of IPython that runs pip; passed over is what may look like one: strings, comments, other shell lines.
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
_FRESH = "The kernel was restarted while this call waited: it is fresh, all earlier variables are lost"
_TEXT_CELL = re.compile(r"\s*%%(?!time|capture)")  # %%writefile, %%html, ...: what follows is no Python


def _silence_pip(code: str) -> str:
    def silent(line: re.Match[str]) -> str:
        if line["indent"] is None:
            return line[0]
        return f"""{line["indent"]}!"{{__import__('sys').executable}}" -m pip install {_QUIET}"""

    return _PIP_LINE.sub(silent, code) if "pip" in code and not _TEXT_CELL.match(code) else code


def run_shell(shell: str, script: str, pip_options: str) -> None:
    """Run a script in the kernel, to which this source is sent: IPython's %%bash as it should be.

    Raises: CalledProcessError with the exit status, without a traceback.
    """
    import os
    import subprocess
    import sys
    import tempfile

    silent = '{0}() {{ [ "${{1-}}" != install ] || set -- "$@" {1}; command {0} "$@"; }}; '
    command = "".join(silent.format(pip, pip_options) for pip in ("pip", "pip3")) + '. "$0"'
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    with tempfile.TemporaryFile() as file:  # an argument ends at 128 KB, and of stdin the script's commands would read
        file.write(script.encode("utf-8", "replace"))
        file.seek(0)
        try:
            process = subprocess.Popen(
                [shell, "-c", command, f"/dev/fd/{file.fileno()}"],
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[file.fileno()],
                start_new_session=True,
            )
            status = follow_shell(process)
        except FileNotFoundError:
            print(f"There is no {shell} where the kernel runs.", file=sys.stderr)
            status = 127
    if status:
        error = subprocess.CalledProcessError(status, shell)
        vars(error)["_render_traceback_"] = list  # IPython asks for it
        raise error


def follow_shell(process: subprocess.Popen[bytes]) -> int:
    """Show both streams as they come, and return the exit status when the script ends; sent with `run_shell`.

    An interrupt ends all that the script has started. What it has left in the background goes on, with its output.
    """
    import codecs
    import contextlib
    import os
    import selectors
    import signal
    import sys
    import threading
    import time

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
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            show(0.5)
    if selector.get_map():
        threading.Thread(target=show, args=(0, True), daemon=True).start()
    else:
        selector.close()
    status = process.poll()
    return 130 if status is None else status if status >= 0 else 128 - status


def cell_of(block: Any, kernel_name: str, kernel_language: str) -> tuple[str, str]:
    """Return the cell that runs a code block in a kernel of that name and language, and what a notebook says of it.

    These are the same but for a shell script.

    Raises: ValueError for a language that the kernel does not speak.
    """
    code, language = str(block.code), str(block.language or "").strip().lower()
    kernel_language = kernel_language or "python"  # a kernel that does not say
    speaks_python = kernel_language.lower() == "python"
    if speaks_python and language in _SHELLS and code.lstrip()[:1] not in ("!", "%"):
        shell, script = _SHELLS[language], code.replace("\r\n", "\n")
        shown = f"%%{shell}\n{script}"
        try:
            program = f"{functions_source((follow_shell, run_shell))}\nrun_shell({shell!r}, {script!r}, {_QUIET!r})"
        except ValueError:  # a frozen program without source files: IPython's own way, with its flaws
            return shown, shown
        return f"exec({program!r}, {{}})", shown
    own = {"", kernel_language.lower(), kernel_name.lower(), *(_SHELLS if speaks_python else ())}
    if language in own or (speaks_python and _PYTHON_NAMES.fullmatch(language)):
        cell = _silence_pip(code) if speaks_python else code
        return cell, cell
    others = " or bash" if speaks_python else ""
    raise ValueError(f"The kernel runs {kernel_language}{others}, not {block.language}: the block was not run.")


def functions_source(functions: Iterable[Callable[..., Any]]) -> str:
    """Return a program that defines functions in a kernel. Raises: ValueError, see `function_source`."""
    return "\n".join(["from __future__ import annotations", *map(function_source, functions)])


def function_source(function: Callable[..., Any]) -> str:
    """Return the source of a plain function, to be defined in a kernel. Raises: ValueError if it is not plain."""
    import inspect
    import textwrap

    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    if not source.startswith(("def ", "async def ")) or function.__closure__:
        raise ValueError(f"{function!r} cannot be sent to a kernel: it must be a plain function without closure.")
    return source


CODE_WRITER_SYSTEM_MESSAGE = """\
You can run Python code in a Jupyter kernel by writing it in a fenced code block that starts with ```python.
The kernel keeps its state: variables, imports and functions of earlier blocks are there in later ones, so write small
blocks, one step at a time, and never repeat what has already run. After an error only the failing block has to be
corrected and run again. The value of a block's last expression is shown, and so is what it prints.
Plots and other pictures come back as paths of files: call plt.show(). Install packages with `%pip install NAME`.
Shell commands go into a block that starts with ```bash. The code cannot ask for input.
If the reply says that all variables are lost, the kernel is fresh: run again what you need.
"""


class _UserCapability:
    """AutoGen 0.2.13 to 0.2.18: tells an agent how to write code for the executor."""

    def __init__(self, message: str) -> None:
        self._message = message

    def add_to_agent(self, agent: Any) -> None:
        agent.update_system_message(agent.system_message + self._message)


class Turns:
    """A re-entrant lock that lets threads in by the order in which they came; but one that evicts comes next."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._queue: list[int] = []  # thread ids; the first one is in
        self._depth = 0
        self.evictions = 0  # how many have come that evict
        self.overtaken = False  # whether one of them came before the thread that is in, while that one waited
        self.closed = False  # nobody waits any more, except to evict

    @contextlib.contextmanager
    def turn(self, evict: Callable[[], None] | None = None, since: int | None = None) -> Iterator[None]:
        """Wait until it is the caller's turn.

        With `evict` it is the next one: called again and again until the thread that is in leaves. `since` is the
        number of evictions when the waiting began, if that was before.

        Raises: JupyterExecError if it was closed while the caller waited.
        """
        self._enter(evict, since)
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._queue.pop(0)
                    self._changed.notify_all()

    def _enter(self, evict: Callable[[], None] | None, since: int | None) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._queue[:1] != [me]:
                self._queue.insert(1 if evict else len(self._queue), me)
                self.evictions += evict is not None
                since = self.evictions if since is None or evict else since
                try:
                    self._wait(me, evict)
                except BaseException:
                    self._queue.remove(me)
                    self._changed.notify_all()
                    raise
                self.overtaken = since != self.evictions
            self._depth += 1

    def _wait(self, me: int, evict: Callable[[], None] | None) -> None:
        while self._queue[0] != me:
            if evict:
                self._changed.release()
                try:
                    evict()
                finally:
                    self._changed.acquire()
                self._changed.wait_for(lambda: self._queue[0] == me, EVICTION_RETRY)
            elif self.closed:
                raise JupyterExecError(_STOPPED)
            else:
                self._changed.wait()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def _end_forgotten(kernel: KernelClient) -> None:
    if kernel.alive and not kernel.ended:
        warnings.warn("A JupyterCodeExecutor was forgotten, not stopped; its kernel is ended.", ResourceWarning, 2)
        # Not here: the garbage collector may have come in the middle of anything.
        threading.Thread(target=kernel.give_up, daemon=True).start()


class JupyterCodeExecutor:
    """Runs code blocks in a Jupyter kernel of its own, whose variables live from block to block and call to call.

    `jupyter_server` is a server object of this module, a JupyterConnectionInfo or an object that has one, or the
    path of a connection file (or a KernelConnection) to attach to a running kernel. `timeout` is the wall clock of
    one block in seconds; pictures and other files are written to `output_dir`. `on_output(output)` gets every output
    as it comes, in the shape of nbformat; what a thread prints after its cell has ended is marked "late".
    `on_input(prompt, password)` answers input() and getpass(); without it they raise in the cell. Of longer text
    than `max_output` characters a call returns head and tail, and names the file with the whole; None is no limit.
    `functions` (plain ones, with their source at hand) are defined in the kernel whenever it is fresh, and `startup`
    is code that runs there then, unseen.

    It may be called from any thread: cells run one after another. `stop`, or leaving a `with`, ends the kernel.
    What a hook raises ends nothing: the logger `jupyter_exec` tells of it as a warning, so listen to that.

    Raises: ValueError for a wrong argument, or a kernel that is not installed; KernelStartFailed.
    """

    # Plain values live in __dict__ and all else in slots, so that vars(executor) can be written as JSON:
    # AutoGen's runtime logging does that.
    UserCapability = _UserCapability
    CODE_WRITER_SYSTEM_MESSAGE = CODE_WRITER_SYSTEM_MESSAGE

    _SLOTS = "_folder", "_functions", "_hooks", "_journal", "_kernel", "_output_dir", "_own_server", "_server", "_turns"
    __slots__ = ("__dict__", "__weakref__", *_SLOTS)

    def __init__(
        self,
        jupyter_server: Any,
        kernel_name: str = "python3",
        timeout: float = 60,
        output_dir: str | os.PathLike[str] = ".",
        *,
        functions: Sequence[Callable[..., Any]] = (),
        startup: str = "",
        max_output: int | None = MAX_OUTPUT,
        on_output: OutputHook | None = None,
        on_input: InputHook | None = None,
    ) -> None:
        if not timeout >= 1:
            raise ValueError("Timeout must be greater than or equal to 1.")
        self._output_dir = Path(output_dir)
        self._folder = Folder(self._output_dir)
        self._timeout = timeout
        self._kernel_name = kernel_name
        self._max_output = max_output
        self._functions = tuple(functions)
        self._startup = startup
        self._prelude()  # raises for a function that cannot be sent
        self._journal = Journal()
        self._hooks = on_output, on_input
        self._turns = Turns()
        self._server = jupyter_server
        self._own_server: RemoteJupyterServer | None = None  # made here, for a JupyterConnectionInfo
        self._stopped = False
        self._kernel = self._new_kernel()
        weakref.finalize(self, _end_forgotten, self._kernel).atexit = False

    def _new_kernel(self) -> KernelClient:
        server = self._server
        if isinstance(server, (str, os.PathLike, KernelConnection)):
            return attach_kernel(server)
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
        """CODE_WRITER_SYSTEM_MESSAGE with the signatures and docstrings of the installed functions."""
        import inspect

        lines = [
            f"    {function.__name__}{inspect.signature(function)}: {inspect.getdoc(function) or ''}".rstrip(" :")
            for function in self._functions
        ]
        return "\n".join([CODE_WRITER_SYSTEM_MESSAGE + "These functions are defined already:" * bool(lines), *lines])

    @property
    def user_capability(self) -> _UserCapability:
        return _UserCapability(self.system_message)

    def _prelude(self) -> str:
        if not self._functions:
            return self._startup
        source = functions_source(self._functions)
        return f"exec(compile({source!r}, '<functions>', 'exec', dont_inherit=True), globals())\n{self._startup}"

    @property
    def connection_file(self) -> str | None:
        """Path of the kernel's connection file, for `jupyter console --existing`; None if it is not on this machine."""
        return self._kernel.connection_file

    def execute_code_blocks(self, code_blocks: Any) -> CodeResult:
        """Run blocks (objects with `code` and `language`) in order, up to the first that fails; or one, or a string.

        Never raises for what the code or the kernel did: `exit_code` and `output` tell (0 ended well, 1 raised,
        124 timeout, 130 interrupted, 128 + N killed by signal N, N exit status of a shell script).

        Raises: JupyterExecError after `stop`, also if that came while the call waited for its turn; TypeError for
        something that is no code block.
        """
        if isinstance(code_blocks, str) or hasattr(code_blocks, "code"):
            code_blocks = [CodeBlock(code_blocks) if isinstance(code_blocks, str) else code_blocks]
        code_blocks = list(code_blocks)
        if not all(hasattr(block, "code") and hasattr(block, "language") for block in code_blocks):
            raise TypeError("code_blocks must be a list of objects with the attributes code and language.")
        texts: list[str] = []
        exit_code, state = 0, "intact"
        files = CallFiles(self._folder, self._max_output)
        gaps: list[int] = []
        with self._turns.turn():
            self._check_usable()
            for block in code_blocks:
                result = self.execute_block(block, record=files.record)
                note = "" if result.note == TRUNCATED else result.note  # the mark says more
                texts.append(render(result.outputs, note, files.save))
                gaps += [result.missing] * result.truncated
                exit_code, state = result.exit_code, result.kernel_state
                if result.status != "ok":
                    break
        text = shorten("\n".join(texts), self._max_output, gaps, files.close())
        return CodeResult(exit_code, text, files.paths, state)

    def execute_block(
        self,
        block: Any,
        *,
        record: OutputHook | None = None,
        on_result: Callable[[ExecutionResult], None] | None = None,
    ) -> ExecutionResult:
        """Run one code block in its language. Like `execute`, but never raises for what the kernel did.

        `record` gets each output before the executor's hook does, and must be quick. `on_result` gets the result of a
        block that was run even if Ctrl-C ends this call.

        Raises: JupyterExecError after `stop`.
        """
        with self._turns.turn():
            self._check_usable()
            try:
                self._make_ready()
                cell, shown = cell_of(block, self._kernel_name, self._kernel.language)
                result = self._run_cell(cell, shown, self._timeout, *self._hooks, record, on_result)
            except (JupyterExecError, ValueError) as error:
                if self._kernel.alive and self._kernel.ready:  # too large for the server, not its language: not run
                    return ExecutionResult("error", 1, "intact", str(error), [])
                return ExecutionResult("died", 1, "lost", _STOPPED if self._stopped else str(error), [])
        raised = result.error if cell != shown else None
        if raised and (status := re.search(r" exit status (\d{1,3})\.\Z", raised["evalue"])):
            result.outputs.remove(raised)
            if result.status == "error":
                result.exit_code = int(status[1])
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
        with self._turns.turn():
            self._check_usable()
            self._make_ready()
            seconds = self._timeout if timeout is None else timeout
            return self._run_cell(code, code, seconds, on_output or self._hooks[0], on_input or self._hooks[1])

    def _run_cell(
        self,
        code: str,
        shown: str,
        timeout: float,
        on_output: OutputHook | None,
        on_input: InputHook | None,
        record: OutputHook | None = None,
        on_result: Callable[[ExecutionResult], None] | None = None,
    ) -> ExecutionResult:
        """Run a cell, which stands in the notebook as `shown`."""
        evictions = self._turns.evictions

        def keep(result: ExecutionResult) -> None:
            if result.status == "died" and self._turns.evictions != evictions:
                what = "executor was stopped" if self._stopped else "kernel was restarted"
                result.note = f"The {what} while the code ran; all variables are lost"
            if self._turns.overtaken:
                self._turns.overtaken = False
                result.note = "\n".join(filter(None, (_FRESH, result.note)))
            self._journal.add(shown, result)
            if on_result:
                on_result(result)

        return self._kernel.execute(
            code,
            timeout,
            max_output=self._max_output,
            on_output=on_output,
            on_input=on_input,
            record=record,
            on_result=keep,
        )

    def _make_ready(self) -> None:
        """Have a kernel that answers, with our functions in it."""
        if not self._kernel.alive:
            self._kernel.start()
        if not self._kernel.ready:
            self._kernel.wait_ready()
            if prelude := self._prelude():
                self._kernel.ready = False  # until it has run, whatever ends this
                result = self._kernel.execute(prelude, START_TIMEOUT, silent=True, store_history=False)
                if result.status != "ok":
                    raise JupyterExecError(f"The startup code or the functions failed in the kernel: {result.text}")
                self._kernel.ready = True

    def save_notebook(self, path: str | os.PathLike[str]) -> None:
        """Write the session so far as a notebook: each cell with its outputs, failed and timed-out ones too.

        Raises: OSError; ValueError if the directory does not exist.
        """
        with self._turns.turn():
            metadata: Json = {"kernelspec": {"name": self._kernel_name, "display_name": self._kernel_name}}
            if self._kernel.language:
                metadata["language_info"] = {"name": self._kernel.language}
            path = Path(path).absolute()
            if path.parent == Path("/dev"):  # not to be replaced
                with open(path, "wb") as file:
                    self._journal.write(file, metadata)
                return
            folder = self._folder if path.parent == self._folder.path else Folder(path.parent)
            with folder.replace(path.name) as file:
                self._journal.write(file, metadata)

    def interrupt(self) -> None:
        """Interrupt the running cell, from any thread; its variables are kept."""
        self._kernel.interrupt()

    def restart(self) -> None:
        """Replace the kernel by a fresh one; all variables are lost.

        It ends the running cell and goes before the calls that wait for their turn: their results say so.

        Raises: KernelError if it cannot be started, or is not ours (attached by a connection file).
        """
        with self._turns.turn(self._kernel.abort if self._kernel.owned else None):
            self._check_usable()
            self._kernel.restart()

    def stop(self) -> None:
        """End the kernel (or disconnect from one that was attached to). May be called more than once.

        It ends the running cell; calls that wait for their turn raise JupyterExecError at once.
        """
        self._stopped = True
        self._turns.close()
        with self._turns.turn(self._kernel.abort if self._kernel.owned else self._kernel.interrupt):
            self._kernel.shutdown()
            if self._own_server:
                self._own_server.stop()

    def _check_usable(self) -> None:
        if self._stopped:
            raise JupyterExecError(_STOPPED)

    def __enter__(self) -> JupyterCodeExecutor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __copy__(self) -> JupyterCodeExecutor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> JupyterCodeExecutor:
        return self  # frameworks copy their tools, and with them what must stay one kernel


class AsyncJupyterCodeExecutor:
    """JupyterCodeExecutor for asyncio: the same arguments, everything awaitable, cells run in a thread of its own.

    Cancelling the awaiting task (or autogen's `cancellation_token`) interrupts its cell; variables are kept. It serves
    as a code executor of autogen-agentchat 0.4 and newer (`result_type` is then their CodeResult, if there is a
    model_client), and as a CodeEnvironment of AG2 1.x.
    """

    supported_languages = ("python", "bash")

    def __init__(
        self, jupyter_server: Any, *args: Any, result_type: Callable[..., Any] = CodeResult, **options: Any
    ) -> None:
        self._make = functools.partial(JupyterCodeExecutor, jupyter_server, *args, **options)
        self._result_type = result_type
        self._executor: JupyterCodeExecutor | None = None
        self._pool: Any = None
        self._running: object = None  # what the thread of the pool is at
        self._guard = threading.Lock()  # of _running

    async def start(self) -> None:
        """Ask for the kernel. Raises what JupyterCodeExecutor raises."""
        await self._in_thread(lambda executor: None)

    async def _in_thread(self, function: Callable[[JupyterCodeExecutor], Any]) -> Any:
        """Call a function with the executor in the thread for cells, one after another."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        me = object()
        since = self._executor._turns.evictions if self._executor else None

        def work() -> Any:
            self._begin(me)
            try:
                self._executor = executor = self._executor or self._make()
                with executor._turns.turn(since=since):
                    return function(executor)
            finally:
                self._begin(None)

        self._pool = self._pool or ThreadPoolExecutor(1, "jupyter_exec cells")
        future = asyncio.wrap_future(submitted := self._pool.submit(work))
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            while not submitted.cancel() and not submitted.done():  # it has begun: its cell has, or will soon
                self._interrupt(me)
                with contextlib.suppress(asyncio.CancelledError):  # once more: it ends first all the same
                    await asyncio.sleep(INTERRUPT_RETRY)
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks
            raise
        return future.result()

    def _begin(self, work: object) -> None:
        with self._guard:
            self._running = work

    def _interrupt(self, work: object) -> None:
        with self._guard:  # so that no other cell begins meanwhile
            if self._running is work:
                self.interrupt()

    @staticmethod
    async def _aside(function: Callable[[], Any]) -> None:
        """Call a function in a thread of its own, since it is to overtake the cells."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(1, "jupyter_exec")
        try:
            await asyncio.shield(asyncio.wrap_future(pool.submit(function)))
        finally:
            pool.shutdown(wait=False)

    async def execute_code_blocks(self, code_blocks: Iterable[Any], cancellation_token: Any = None) -> Any:
        """Like JupyterCodeExecutor.execute_code_blocks. Raises: CancelledError."""
        import asyncio

        task = asyncio.ensure_future(self._in_thread(lambda executor: executor.execute_code_blocks(code_blocks)))
        if cancellation_token is not None:
            cancellation_token.link_future(task)
        try:
            result = await task
        except asyncio.CancelledError:
            task.cancel()
            raise
        if self._result_type is CodeResult:
            return result
        return self._result_type(exit_code=result.exit_code, output=result.output)

    async def execute(self, code: str, **options: Any) -> ExecutionResult:
        """Like JupyterCodeExecutor.execute."""
        result: ExecutionResult = await self._in_thread(lambda executor: executor.execute(code, **options))
        return result

    async def run(self, code: str, language: str = "python", *, context: Any = None) -> CodeResult:
        """Run one block: the CodeEnvironment of AG2 1.x."""
        block = CodeBlock(code, language)
        result: CodeResult = await self._in_thread(lambda executor: executor.execute_code_blocks([block]))
        return result

    async def restart(self) -> None:
        """Like JupyterCodeExecutor.restart."""
        if self._executor:
            await self._aside(self._executor.restart)
        else:
            await self.start()

    def interrupt(self) -> None:
        if self._executor:
            self._executor.interrupt()

    async def save_notebook(self, path: str | os.PathLike[str]) -> None:
        await self._in_thread(lambda executor: executor.save_notebook(path))

    async def stop(self) -> None:
        """End the kernel and the thread. May be called more than once."""
        pool, self._pool = self._pool, None
        if pool:
            made = pool.submit(lambda: None)

            def end() -> None:
                if not self._executor:
                    made.result()
                if self._executor:
                    self._executor.stop()

            pool.shutdown(wait=False)
            await self._aside(end)

    async def __aenter__(self) -> AsyncJupyterCodeExecutor:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def __copy__(self) -> AsyncJupyterCodeExecutor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncJupyterCodeExecutor:
        return self


# ======================================================================================================
# 13. Command line
# ======================================================================================================


@dataclass
class Step:
    """A cell of a document. `cell` is nbformat's, and gets the outputs."""

    cell: Json
    language: str = ""
    line: int = 0  # of the file, at which the source begins; 0: it is a notebook's
    count: int | None = None  # IPython's number of it, once it has run here

    @property
    def is_code(self) -> bool:
        return self.cell.get("cell_type") == "code"

    def has_tag(self, tag: str) -> bool:
        """Whether the cell's metadata have one of Jupyter's tags, such as "raises-exception"."""
        tags = self.cell["metadata"].get("tags")
        return isinstance(tags, list) and tag in tags

    def record(self, result: ExecutionResult, began: float) -> None:
        """Write what the cell did into it; `began` is in seconds since the epoch."""
        outputs = list(map(_notebook_output, result.outputs))
        outputs += [{"output_type": "stream", "name": "stderr", "text": result.note}] * bool(result.note)
        times = {"iopub.status.busy": began, "shell.execute_reply": began + result.duration}
        self.cell["metadata"]["execution"] = {
            name: f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at % 1 * 10**6):06}Z"
            for name, at in times.items()
        }
        self.count = result.execution_count
        self.cell |= {"outputs": outputs, "execution_count": self.count}


class Document:
    """What `run` was given, as a notebook, whatever it was. A cell's outputs are written into it when it has run."""

    def __init__(self, name: str, body: Json) -> None:
        """`name` is for people, `body` a notebook without cells."""
        self.name, self._body = name, {"nbformat": 4, "nbformat_minor": 5, "metadata": {}} | body
        self.steps: list[Step] = []

    @property
    def kernel_name(self) -> str | None:
        """The kernel that a notebook names."""
        metadata = self._body["metadata"]
        spec = metadata.get("kernelspec") if isinstance(metadata, dict) else None
        name = spec.get("name") if isinstance(spec, dict) else None
        return name if isinstance(name, str) else None

    def new_step(
        self, source: str, tags: Sequence[str] = (), kind: str = "code", language: str = "", line: int = 0
    ) -> Step:
        cell: Json = {
            "cell_type": kind,
            "id": os.urandom(4).hex(),
            "metadata": {"tags": list(tags)} if tags else {},
            "source": source,
        }
        return Step(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}), language, line)

    def add_parameters(self, pairs: Iterable[Sequence[str]]) -> None:
        """Set variables as papermill does: by a cell behind the one that is tagged "parameters", or at the top.

        Raises: ValueError for a name that is none.
        """
        lines = ["# Parameters"]
        for name, value in pairs:
            if not name.isidentifier():
                raise ValueError(f"-p {name}: this cannot be the name of a variable")
            lines.append(f"{name} = {_literal(value)}")
        self.steps = [step for step in self.steps if not step.has_tag("injected-parameters")]
        at = next((i for i, step in enumerate(self.steps, 1) if step.has_tag("parameters")), 0)
        self.steps.insert(at, self.new_step("\n".join(lines), ["injected-parameters"]))

    def save(self, path: Path) -> None:
        """Write the notebook. Raises: OSError; ValueError if its directory does not exist."""
        text = json.dumps(self._body | {"cells": [step.cell for step in self.steps]}, indent=1, ensure_ascii=False)
        with Folder(path.parent).replace(path.name) as file:
            file.write(text.encode("utf-8", "replace") + b"\n")

    def place(self, step: Step, result: ExecutionResult) -> str:
        """Say where the traceback of a step's cell ends, as an editor finds it, or where the cell begins."""
        code, line = [other for other in self.steps if other.is_code], 1
        text = clean_text("\n".join(map(text_of, result.error["traceback"]))) if result.error else ""
        for count, number in re.findall(r"(?m)^ *(?:Cell|Input) In ?\[(\d{1,9})\],.*?line:? ?(\d{1,9})", text):
            for other in code:
                if other.count == int(count):
                    step, line = other, int(number)
        source = step.cell["source"]
        line += source[: len(source) - len(source.lstrip())].count("\n")  # IPython takes empty first lines away
        if step.line:
            return f"{self.name}:{step.line + line - 1}"
        return f"{self.name}, cell {code.index(step) + 1}, line {line}"


def _literal(text: str) -> str:
    """Return, as Python, what papermill takes the text of a parameter for."""
    if text in ("True", "False", "None"):
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return repr(value) if value - value == 0 else f"float('{value}')"
    return repr(text)


def read_document(source: str, unlabelled: bool = False) -> Document:
    """Return the document in a .py, .md or .ipynb file, or on stdin for "-".

    In Python `# %%` begins a cell. Of a .md file the fenced blocks that name a language are code; `unlabelled`: all.

    Raises: OSError; ProtocolError for a notebook that is none.
    """
    if source == "-":
        return _script("<stdin>", sys.stdin.read())
    data = Path(source).read_bytes()
    if source.endswith(".ipynb"):
        return _notebook(source, json_object(data, f"notebook {source}"))
    text = data.decode("utf-8-sig", "replace")
    if not source.endswith((".md", ".markdown")):
        return _script(source, text)
    document = Document(source, {})
    for line, info, block in fenced_blocks(text):
        if info.strip() or unlabelled:
            document.steps.append(document.new_step(block.code, language=block.language, line=line))
        else:
            put(
                sys.stderr,
                f"jupyter-exec: {source}:{line}: skipped a block that names no language (--unlabelled runs it)",
            )
    return document


def _script(name: str, text: str) -> Document:
    document = Document(name, {})
    lines = text.replace("\r\n", "\n").split("\n")
    markers = [i for i, line in enumerate(lines) if re.match(r"# ?%%(?!%)", line)]
    for start, end in itertools.pairwise([0, *markers, len(lines)]):
        title = lines[start] if start in markers else ""
        code = "\n".join(lines[start + bool(title) : end])
        tags = re.findall(r"[\"']([^\"']+)[\"']", "".join(re.findall(r"tags *= *\[([^\]]*)\]", title)))
        if re.search(r"\[(markdown|md|raw)\]", title):
            document.steps.append(document.new_step(re.sub(r"(?m)^# ?", "", code), tags, "markdown"))
        elif code.strip():
            document.steps.append(document.new_step(code, tags, line=start + bool(title) + 1))
    return document


def _notebook(name: str, body: Json) -> Document:
    cells = body.get("cells")
    if not (isinstance(cells, list) and all(isinstance(cell, dict) for cell in cells)):
        advice = "; its format is old: jupyter nbconvert --to notebook makes it a new one" * ("worksheets" in body)
        raise ProtocolError(f"{name} is no notebook with cells{advice}.")
    document = Document(name, body)
    for cell in cells:
        source, metadata = cell.get("source"), cell.get("metadata")
        source = "".join(map(str, source)) if isinstance(source, list) else text_of(source)
        document.steps.append(
            Step(cell | {"source": source, "metadata": metadata if isinstance(metadata, dict) else {}})
        )
    return document


def put(stream: TextIO, text: str, end: str = "\n") -> None:
    """Print text, whoever wrote it: on a terminal colours pass, and what returns to the line's start; else nothing.

    Raises: OSError.
    """
    on_terminal = stream.isatty()
    lines = (text + end).replace("\r\n", "\n").split("\r")
    stream.write(("\r" if on_terminal else "\n").join(clean_text(line, on_terminal) for line in lines))
    stream.flush()


class CellFiles(CallFiles):
    """Saves what one cell shows, under names that say where it comes from: report-3-1.png."""

    def __init__(self, folder: Folder, stem: str, html: bool) -> None:
        super().__init__(folder, None)
        self._stem, self._html = stem, html

    def new_name(self, suffix: str) -> str:
        return f"{self._stem}-{len(self.paths) + 1}{suffix}"

    def save(self, data: Json) -> str | None:
        """Like CallFiles.save, but the HTML of what can be read as text, as a table can, is saved only if asked for."""
        plain = text_of(data.get("text/plain"))
        is_readable = bool(plain) and not _DEFAULT_REPR.match(plain)
        return super().save({mime: data[mime] for mime in data if mime != "text/html" or self._html or not is_readable})


class LivePrinter:
    """Prints outputs as they come: streams as they are, everything else on lines of its own.

    Where stderr is a terminal, a line there tells how far the run is, and goes away before anything is printed.
    """

    def __init__(self, count: int) -> None:
        """`count`: cells that will run."""
        self._count = count
        self._number = 0  # of the cell that runs
        self._files: CellFiles | None = None
        self._line_open = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.trouble: OSError | None = None  # why nothing more can be printed
        if sys.stderr.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._ended.wait(1):
            with self._lock:
                if self._number and not self._line_open:
                    seconds = time.monotonic() - self._started
                    sys.stderr.write(f"\r\x1b[Kcell {self._number} of {self._count}, {seconds:.0f} s\r")
                    sys.stderr.flush()

    def begin(self, files: CellFiles) -> None:
        self._started, self._files = time.monotonic(), files
        self._number += 1

    def end(self, step: Step, result: ExecutionResult, place: str) -> None:
        if result.status != "ok":
            error = result.error
            what = result.note or (
                f"{error['ename']}: {error['evalue']}" if error else f"exit status {result.exit_code}"
            )
            self._line(f"jupyter-exec: {place}: {what}", sys.stderr)
        elif result.note:
            self._line(f"jupyter-exec: {result.note}", sys.stderr)

    def close(self) -> None:
        self._ended.set()
        self._write(sys.stderr, "")

    def __call__(self, output: Json) -> None:
        kind = output["output_type"]
        if kind == "stream":
            self._write(sys.stdout if output["name"] == "stdout" else sys.stderr, output["text"])
        elif kind == "error":
            in_colours = sys.stderr.isatty() and output["traceback"]
            self._line("\n".join(output["traceback"]) if in_colours else render([output], "", no_file), sys.stderr)
        elif kind != "clear_output":
            save = self._files.save if self._files and kind != "update_display_data" else no_file
            self._line(render([output], "", save), sys.stdout)

    def _line(self, text: str, stream: TextIO) -> None:
        if text:
            self._write(stream, ("\n" if self._line_open else "") + text + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            if sys.stderr.isatty() and not self._line_open:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            try:
                put(stream, text, "")
            except OSError as error:  # nobody reads any more, or the disk is full: as good as Ctrl-C
                self.trouble = error
                raise KeyboardInterrupt from None
            self._line_open = not text.endswith("\n") if text else self._line_open


class JsonPrinter:
    """Prints one JSON object at the end: the outcome of all, and what each cell did."""

    trouble: OSError | None = None

    def __init__(self) -> None:
        self._blocks: list[Json] = []
        self._end = {"exit_code": 0, "kernel_state": "intact"}

    def __call__(self, output: Json) -> None:
        pass

    def begin(self, files: CellFiles) -> None:
        self._files = files

    def end(self, step: Step, result: ExecutionResult, place: str) -> None:
        text = render(result.outputs, result.note, self._files.save)
        block = {
            "source": step.cell["source"],
            "language": step.language,
            "status": result.status,
            "exit_code": result.exit_code,
        }
        self._blocks.append(
            block | {"duration": round(result.duration, 3), "output": text, "output_files": self._files.paths}
        )
        self._end = {"exit_code": self._end["exit_code"] or result.exit_code, "kernel_state": result.kernel_state}

    def close(self) -> None:
        put(sys.stdout, json.dumps(self._end | {"blocks": self._blocks}))


_EXAMPLES = """\
examples:
  jupyter-exec run -c "print(6 * 7)"
  jupyter-exec run analysis.py -- --rows 100        arguments of the script stand behind --
  jupyter-exec run report.ipynb -p year 2026 --notebook report-2026.ipynb
  jupyter-exec run notes.md --docker --hardened --base-image my/python
  jupyter-exec run job.py --server https://hub.example.com/user/ann/
"""


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(prog="jupyter-exec", description="Run code in a stateful Jupyter kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    as_written = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser(
        "run", help="run a file, its cells in order, in one kernel", epilog=_EXAMPLES, formatter_class=as_written
    )
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help=".py (# %%%% begins a cell), .md (its fenced blocks), .ipynb, or - for stdin",
    )
    what.add_argument("-c", dest="code", metavar="CODE", help="run this code")
    run.add_argument("--kernel", metavar="NAME", help="kernel name (default: the notebook's own, else python3)")
    run.add_argument(
        "--timeout", type=float, default=float("inf"), metavar="S", help="seconds for one cell (default: none)"
    )
    run.add_argument("--keep-going", action="store_true", help="run the next cell after one that failed")
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a variable, as papermill does",
    )
    run.add_argument("--output-dir", default=".", metavar="DIR", help="where pictures and other files go (default: .)")
    run.add_argument("--html", action="store_true", help="save the HTML of tables too")
    run.add_argument(
        "--notebook", metavar="FILE", help="write the notebook that was run, after each cell; it may be FILE itself"
    )
    run.add_argument("--unlabelled", action="store_true", help="run blocks of a .md file that name no language, too")
    run.add_argument("--json", action="store_true", help="print one JSON object at the end instead of live output")
    kernels = commands.add_parser("kernels", help="list the kernels that can be started, and where they come from")
    for command in (run, kernels):
        where = command.add_mutually_exclusive_group()
        where.add_argument("--python", metavar="PATH", help="the local interpreter that python3 means")
        where.add_argument("--docker", nargs="?", const="", metavar="IMAGE", help="in a container (give FILE first)")
        where.add_argument("--server", metavar="URL", help="on a Jupyter server; the token comes from JUPYTER_TOKEN")
        for name, (_, metavar, says) in _OPTIONS.items():
            action: Json = {"metavar": metavar} if metavar else {"action": "store_true"}
            command.add_argument(name, help=says, **(action | ({"action": "append"} if name == "--package" else {})))
    return parser


# Options that belong to one kind of server -> (that option, name of the value, help).
_OPTIONS: dict[str, tuple[str, str, str]] = {
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


def _server_of(options: argparse.Namespace) -> JupyterServer:
    kind = "docker" if options.docker is not None else "server" if options.server is not None else "local"
    for name, (needed, _, _) in _OPTIONS.items():  # silently ignored, --network none would be a trap
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
        raise ValueError(
            f"{options.server.partition('?')[0]} is no URL of a Jupyter server, such as https://host:8888/."
        )
    token = parse_qs(url.query).get("token", [os.environ.get("JUPYTER_TOKEN")])[0]
    if options.token_file:
        token = Path(options.token_file).read_text(encoding="utf-8").strip()
    base_url = url.path.rstrip("/") or "/"
    return RemoteJupyterServer(
        JupyterConnectionInfo(url.hostname, url.scheme == "https", url.port, token, base_url, options.ca_file)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    It is that of the code (1 if it raised), 2 for any other trouble, 128 + N after signal N.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:at])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show is not to vanish
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jupyter-exec: %(message)s"))
    logger.addHandler(handler)
    build_logger.setLevel(logging.INFO)
    for name in ("SIGTERM", "SIGHUP") if argv is None else ():  # the same clean-up as after Ctrl-C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        return _run(options, words[at + 1 :]) if options.command == "run" else _list_kernels(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout has left
        return 141
    except (JupyterExecError, ValueError, OSError) as error:
        says = str(error) if isinstance(error, JupyterExecError | ValueError) else describe_os_error(error)
        with contextlib.suppress(OSError):
            put(sys.stderr, f"jupyter-exec: {says}")
        return 2
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Let nothing that could not be written be tried again at the program's end: it would fail there, with noise."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    is_code = options.code is not None
    document = _script("code", options.code) if is_code else read_document(options.file, options.unlabelled)
    kernel_name = options.kernel or document.kernel_name or "python3"
    if options.parameters:
        document.add_parameters(options.parameters)
    notebook = Path(options.notebook) if options.notebook else None
    if notebook and not notebook.parent.is_dir():
        raise ValueError(f"There is no directory for {notebook}.")
    with _server_of(options) as server, contextlib.ExitStack() as stack:
        specs = server.kernelspecs()
        language = str(specs.get(kernel_among(kernel_name, specs) or "", {}).get("language") or "python")
        steps = list(_runnable(document.steps, kernel_name, language))
        if not steps:
            raise ValueError(f"There is no code to run in {document.name}.")
        speaks_python = language.lower() == "python"
        if not speaks_python and (arguments or options.parameters):
            raise ValueError(f"Arguments and parameters are for Python, and the kernel speaks {language}.")
        printer = JsonPrinter() if options.json else LivePrinter(len(steps))
        executor = JupyterCodeExecutor(
            server,
            kernel_name,
            options.timeout,
            options.output_dir,
            on_output=printer,
            on_input=_ask if sys.stdin and sys.stdin.isatty() and options.file != "-" else None,
            startup=_startup(options, arguments) if speaks_python else "",
        )
        stack.enter_context(executor)
        stack.callback(printer.close)

        def save() -> None:
            if notebook:
                document.save(notebook)

        return _run_steps(executor, document, steps, printer, options, save)


def _runnable(steps: Iterable[Step], kernel_name: str, language: str) -> Iterator[Step]:
    """Yield the cells that such a kernel can run; of a text, the others are there to be read."""
    for step in steps:
        if step.is_code and step.cell["source"].strip() and not step.has_tag("skip-execution"):
            try:
                cell_of(CodeBlock(step.cell["source"], step.language), kernel_name, language)
            except ValueError:
                put(sys.stderr, f"jupyter-exec: skipped a block of {step.language}")
            else:
                yield step


def _startup(options: argparse.Namespace, arguments: list[str]) -> str:
    """Return code by which a script finds what `python FILE` would give it: arguments, __file__, modules beside it."""
    is_script = options.code is not None or not options.file.endswith((".ipynb", ".md", ".markdown"))
    lines = []
    if is_script or arguments:
        argv = ["-c" if options.code is not None else options.file, *arguments]
        lines = [f"__import__('sys').argv[:] = {argv!r}"]
    if is_script and options.file not in (None, "-"):
        path = os.path.abspath(options.file)
        lines += [f"__file__ = {path!r}"]
        if options.docker is None and options.server is None:
            lines += [f"__import__('sys').path.insert(0, {os.path.dirname(path)!r})"]
    return "\n".join(lines)


def _ask(prompt: str, password: bool) -> str:
    if password:
        import getpass

        return getpass.getpass(prompt)
    return input(prompt)


def _run_steps(
    executor: JupyterCodeExecutor,
    document: Document,
    steps: Iterable[Step],
    printer: LivePrinter | JsonPrinter,
    options: argparse.Namespace,
    save: Callable[[], None],
) -> int:
    """Run cells until one fails; returns the exit status."""
    status, folder, stem = 0, Folder(options.output_dir), Path(options.file or "code").stem.lstrip("-") or "stdin"
    for number, step in enumerate(steps, 1):
        began = time.time()

        def keep(result: ExecutionResult, step: Step = step, began: float = began) -> None:
            step.record(result, began)
            save()

        printer.begin(CellFiles(folder, f"{stem}-{number}", options.html))
        try:
            result = executor.execute_block(CodeBlock(step.cell["source"], step.language), on_result=keep)
        except KeyboardInterrupt:
            raise printer.trouble or KeyboardInterrupt from None
        printer.end(step, result, document.place(step, result))
        if result.status == "exited":
            return result.exit_code
        if result.status != "ok" and not step.has_tag("raises-exception"):
            had_no_kernel = result.status == "died" and result.death is None
            status = status or (2 if had_no_kernel else result.exit_code)
            if had_no_kernel or not options.keep_going:
                break
    return status


def _list_kernels(options: argparse.Namespace) -> int:
    with _server_of(options) as server:
        for name, spec in sorted(server.kernelspecs().items()):
            fields = (name, spec.get("display_name", ""), spec.get("resource_dir", ""))
            put(sys.stdout, "\t".join(re.sub(r"\s", " ", str(field)) for field in fields))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# ======================================================================================================
# 14. License
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
