"""A device behind TVM RPC: every call has a deadline, every failure is one sentence.

TVM's client waits for ever in C++. Here the connection's socket gets a timeout of its own before every call, which
makes TVM's call return with an error that is then reported for what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tvm import rpc

from dance_tvm.artifact.folder import Artifact, Manifest
from dance_tvm.core.errors import DanceError
from dance_tvm.device import holds
from dance_tvm.device.remote_program import RemoteProgram
from dance_tvm.device.session import DeviceSession, LoadedNetwork, kernel_table, require_fit

UPLOAD_CHUNK = 256 << 10
_BIG_CORES_FIRST = 1  # TVM's affinity mode for devices that cannot be told their CPUs one by one
_Result = TypeVar("_Result")

#: Whose turn it is to connect, by server.
_turns: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)


class Connection:
    """One RPC session and the socket under it."""

    def __init__(self, name: str, address: str, port: int, key: str, timeout: float, call_timeout: float) -> None:
        self.name = name
        self.call_timeout = call_timeout
        self.turn = threading.RLock()
        self._sockets: list[socket.socket] = []
        self._note: Path | None = None
        self.session = self._connect(address, port, key, timeout)
        self._note = holds.hold(address, port)

    def call(self, what: str, function: Callable[[], _Result], timeout: float | None = None) -> _Result:
        """`function()`, which talks to the device. Raises DanceError where it fails, dies or falls silent."""
        if self.session is None:
            raise DanceError(f"{self.name}: this session is closed, open the device again")
        limit = self.call_timeout if timeout is None else timeout
        try:
            with self.turn:
                self._give_up_after(limit)
                return function()
        except DanceError:
            raise
        except Exception as error:  # TVM raises many kinds for a lost connection
            message = str(error)
        if "temporarily unavailable" in message:  # EAGAIN: the socket's own timeout
            self.close()  # an answer that comes late would be taken for that of the next call
            raise DanceError(f"{self.name} gave no sign for {limit:g} s while {what}: it is stopped or too slow")
        if self._lost(message):
            raise DanceError(f"{self.name} closed the connection while {what}: its server or network died")
        raise DanceError(f"{self.name} failed while {what}: {_last_line(message)}")

    def hang_up(self) -> None:
        """End the call in flight, of whatever thread, with an error; what called closes."""
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the device back, whatever still refers to it."""
        self.session = None
        holds.release(self._note)
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._sockets = []

    def _connect(self, address: str, port: int, key: str, timeout: float) -> Any:
        """A session with the server. Its socket is TVM's, and is found as the only new one that leads there: so only
        one thread at a time connects to a server, and those to others are told apart by where they lead."""
        hosts = _hosts(address)
        deadline = time.monotonic() + timeout
        turn = _turns[min(hosts, default=address), port]
        busy = DanceError(
            f"{self.name} accepted no session within {timeout:g} s: it is busy with another session, or stopped"
        )
        if not turn.acquire(timeout=timeout):
            raise busy
        try:
            return self._connect_alone(address, hosts, port, key, max(0.0, deadline - time.monotonic()), busy)
        finally:
            turn.release()

    def _connect_alone(
        self, address: str, hosts: set[str], port: int, key: str, timeout: float, busy: DanceError
    ) -> Any:
        before = _open_sockets()
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            for connection in _new_sockets(before, hosts, port):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()

        watchdog = threading.Timer(timeout, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            session = rpc.connect(address, port, key)
        except Exception as error:  # TVM raises many kinds here
            if expired.is_set():
                raise busy from None
            if "RecvAll" in str(error):
                raise DanceError(f"{self.name} closed the connection before greeting: its server died") from None
            why = _last_line(str(error))
            if "sock.Connect" in why:
                why = f"nothing listens at {address}:{port}; start its server, or check the address"
            raise DanceError(f"{self.name} cannot be reached: {why}") from None
        finally:
            watchdog.cancel()
        self._sockets = _new_sockets(before, hosts, port)
        return session

    def _give_up_after(self, seconds: float) -> None:
        """Let the kernel end a wait for the device: a thread of ours could not, as some of TVM's calls keep Python's
        global lock while they wait."""
        timeout = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for connection in self._sockets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def _lost(self, message: str) -> bool:
        """Whether the other end closed the connection."""
        if "kShutdown" in message or "Connection reset" in message or "Broken pipe" in message:
            return True
        for connection in self._sockets:
            with contextlib.suppress(BlockingIOError):
                try:
                    if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        return True
                except ConnectionError:
                    return True
        return False


class RemoteSession(DeviceSession):
    """A device behind an RPC server: TVM's own, or `dance_tvm/device/serve.py` which can report and keep more.

    Closing the session ends what is ``running`` for it.
    """

    def __init__(self, connection: Connection) -> None:
        self.running = contextlib.ExitStack()
        self.name = connection.name
        self.connection = connection
        self.cpu = connection.session.cpu()
        self._functions: dict[str, Any | None] = {}
        self._uploaded: set[str] = set()
        self._threads: int | None = None
        self._facts = json.loads(self._ask("facts") or "{}")

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    def sensors(self) -> dict[str, Any]:
        return json.loads(self._ask("sensors") or "{}")

    def pin(self, cpus: list[int] | None, threads: int | None) -> None:
        self._threads = threads or (len(cpus) if cpus else None)
        pin = self.function("pin")
        if pin is not None:
            choice = json.dumps({"cpus": cpus, "threads": threads})
            self.connection.call("pinning its threads", lambda: pin(choice), timeout=60)
        elif cpus:
            raise DanceError(f"{self.name} runs TVM's own server, which cannot pin CPUs: start serve.py there")
        elif threads:
            configure = self.connection.session.get_function("runtime.config_threadpool")
            self.connection.call("setting its threads", lambda: configure(_BIG_CORES_FIRST, threads), timeout=60)

    def _load(self, artifact: Artifact) -> LoadedNetwork:
        if self._facts:
            require_fit(artifact, self.name, self._facts)
        library = self.upload(artifact.library)
        return RemoteProgram(self, artifact, library, self._threads or artifact.manifest.target.threads)

    def close(self) -> None:
        self._functions.clear()
        self.connection.close()
        self.running.close()

    def function(self, name: str) -> Any | None:
        """The function `dance.<name>` of the device, or None where it runs TVM's own server."""

        def find() -> Any | None:
            try:
                return self.connection.session.get_function(f"dance.{name}")
            except AttributeError:
                return None

        if name not in self._functions:
            self._functions[name] = self.connection.call("answering a question", find, timeout=60)
        return self._functions[name]

    def upload(self, path: Path) -> str:
        """Bring a file onto the device and give its path there; what the device has already is not sent again."""
        if not self._facts:
            return self._upload_whole(path)
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        what = f"taking {path.name} ({len(data) / 1e6:.1f} MB)"
        offset = self._store(what, path, "have", sha256, len(data))
        if offset >= 0:
            self._require_space(path, len(data) - offset)
            while offset < len(data):
                offset = self._store(what, path, "append", sha256, offset, data[offset : offset + UPLOAD_CHUNK])
            self._store(what, path, "finish", sha256)
        return self._store(what, path, "path", sha256)

    def place(self, uploaded: str) -> str:
        """Where the device itself finds an uploaded file; TVM's server names it within its folder."""
        if self._facts:
            return uploaded
        find = self.connection.session.get_function("tvm.rpc.server.workpath")
        return str(self.connection.call("answering a question", lambda: find(uploaded), timeout=60))

    def describe_kernels(self, manifest: Manifest) -> None:
        """Give `serve.py` the manifest's table of kernels; raises DanceError where the device cannot take it."""
        describe = self.function("kernels.describe")
        if describe is None:
            raise (
                self._other_version()
                if self._facts
                else DanceError(f"{self.name} runs TVM's own server, which has no kernel clock: start serve.py")
            )
        table = json.dumps(kernel_table(manifest))
        self.connection.call("taking the table of kernels", lambda: describe(table), timeout=60)

    def _other_version(self) -> DanceError:
        return DanceError(f"{self.name} has another version of serve.py: copy this one to it")

    def _store(self, what: str, path: Path, name: str, *arguments: Any) -> Any:
        function = self.function(f"store.{name}")
        if function is None:
            raise self._other_version()
        try:
            return self.connection.call(what, partial(function, *arguments))
        except DanceError as error:
            if "No space left" in str(error) or "quota" in str(error):
                raise self._no_space(path) from None
            raise

    def _upload_whole(self, path: Path) -> str:
        """For TVM's own server, whose uploads last as long as the session; a mapped library is never overwritten."""
        name = f"{hashlib.sha256(path.read_bytes()).hexdigest()}{path.suffix}"
        if name not in self._uploaded:
            self.connection.call(f"taking {path.name}", lambda: self.connection.session.upload(str(path), name))
            self._uploaded.add(name)
        return name

    def _require_space(self, path: Path, size: int) -> None:
        free = json.loads(self._ask("facts") or "{}").get("free_bytes", size)
        if free < size:
            raise self._no_space(path)

    def _no_space(self, path: Path) -> DanceError:
        return DanceError(f"{self.name} has no space left for {path.name} ({path.stat().st_size / 1e6:.1f} MB)")

    def _ask(self, name: str) -> Any:
        function = self.function(name)
        return None if function is None else self.connection.call("answering a question", function, timeout=60)


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


def _open_sockets() -> dict[int, int]:
    """Inode by file descriptor of every socket of this process."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found


def _new_sockets(before: dict[int, int], hosts: set[str], port: int) -> list[socket.socket]:
    """Duplicates of the sockets opened since `before` that are connected to the server, or on the way there."""
    found = []
    for descriptor, inode in _open_sockets().items():
        if before.get(descriptor) == inode:
            continue
        with contextlib.suppress(OSError):  # another thread has closed it by now
            connection = socket.socket(fileno=os.dup(descriptor))
            if _leads_to(connection, inode, hosts, port):
                found.append(connection)
            else:
                connection.close()
    return found


def _leads_to(connection: socket.socket, inode: int, hosts: set[str], port: int) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        host, its_port = connection.getpeername()[:2]
    except OSError:  # not connected yet
        host, its_port = _on_the_way(inode)
    return its_port == port and _plain(host) in hosts


def _on_the_way(inode: int) -> tuple[str, int]:
    """Where a socket leads that is not connected yet, as the kernel's table of connections has it; else nowhere."""
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[9] == str(inode):
                    address, _, port = words[2].partition(":")
                    numbers = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))  # each in host order
                    return socket.inet_ntop(family, struct.pack(f"={len(numbers)}I", *numbers)), int(port, 16)
    return "", 0


def _hosts(address: str) -> set[str]:
    """The addresses that a name stands for; none where it stands for none, which connecting will show."""
    with contextlib.suppress(OSError):
        return {_plain(str(found[4][0])) for found in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
    return set()


def _plain(host: str) -> str:
    """An address of version 4 that is written as one of version 6, as itself; no zone."""
    return host.partition("%")[0].removeprefix("::ffff:")
