"""A real web server and a real S3 server on loopback, and a proxy before them that breaks things on request."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.session

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(root: Path) -> Iterator[int]:
    """Serves the files below a folder; its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=root)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def s3_server(root: Path) -> Iterator[int]:
    """Serves copies of ROOT/BUCKET/KEY as s3://BUCKET/KEY, in a process of its own; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        while True:
            assert server.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        client = botocore.session.Session().create_client(
            "s3",
            region_name=S3_ENVIRONMENT["AWS_DEFAULT_REGION"],
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=S3_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        )
        for bucket in root.iterdir():
            client.create_bucket(Bucket=bucket.name)
            for folder, _, names in os.walk(bucket):
                for path in (Path(folder, name) for name in names):
                    client.put_object(Bucket=bucket.name, Key=str(path.relative_to(bucket)), Body=path.read_bytes())
        client.close()
        yield port
        server.kill()


class Proxy:
    """Forwards one request per connection; counts them, and does to each what the next fault says."""

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []  # one for each of the next requests; what comes after is answered well
        self.always = ""  # a fault for all requests
        self.broken: dict[str, str] = {}  # a fault for all requests of a file
        self.slow_s = 0.0  # before each answer
        self.requests: Counter[str] = Counter()
        self.stalled = threading.Event()
        self._stop = threading.Event()
        self._upstream = port
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._start(self._listen)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        # Daemons: a test that fails before it closes its proxy must not keep the suite from ending.
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(20)
            try:
                request = client.makefile("rb")
                lines = list(itertools.takewhile(lambda line: line != b"\r\n", request))
                if not lines:  # a connection that was opened and not used
                    return
                name = lines[0].split()[1].decode().rpartition("/")[2]
                with self._lock:
                    self.requests[name] += 1
                    fault = self.broken.get(name, self.always) or (self.faults.pop(0) if self.faults else "")
                self._stop.wait(self.slow_s)
                self._answer(client, lines, fault)
            except OSError:  # the client gave up
                pass
            finally:
                request.close()

    def _answer(self, client: socket.socket, lines: list[bytes], fault: str) -> None:
        if fault.isdigit():
            client.sendall(f"HTTP/1.1 {fault} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            return
        if fault == "stall before the header":
            self._stall(client)
            return
        if fault in ("close", "garbage"):
            client.sendall(b"" if fault == "close" else bytes(range(256)))
            return
        lines = [line for line in lines if not line.lower().startswith(b"connection:")]
        with socket.create_connection(("127.0.0.1", self._upstream)) as upstream:
            upstream.sendall(b"".join(lines) + b"Connection: close\r\n\r\n")
            with upstream.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
        half = body[: len(body) // 2]
        if fault == "flip":
            body = half + bytes([body[len(half)] ^ 16]) + body[len(half) + 1 :]
        elif fault in ("truncate", "long"):
            body = half if fault == "truncate" else body + b"more"
            kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
            head = b"\r\n".join([*kept, b"Content-Length: %d" % len(body)])
        elif fault in ("stall in the body", "cut"):
            body = half
        client.sendall(head + b"\r\n\r\n" + body)
        if fault == "stall in the body":
            self._stall(client)
        elif fault == "cut":
            time.sleep(0.02)  # what was sent arrives before the reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _stall(self, client: socket.socket) -> None:
        """Until the client hangs up."""
        self.stalled.set()
        client.settimeout(0.05)
        while not self._stop.is_set():
            try:
                if not client.recv(1024):
                    return
            except TimeoutError:
                pass
