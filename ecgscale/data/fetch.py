"""Bytes of a remote file through fsspec: one request, no hidden retries, no endless wait."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from ecgscale.errors import InputError

T = TypeVar("T")

_BLOCK_BYTES = 2**20
_RANGE_BYTES = 4 * 2**20


class FetchError(Exception):
    """One attempt to read a remote file has failed.

    ``permanent``: another would as well. ``other_content``: all of it came, and it is not what was asked for.
    """

    def __init__(self, reason: str, permanent: bool = False, other_content: bool = False) -> None:
        super().__init__(reason)
        self.permanent, self.other_content = permanent, other_content


class RemoteFiles:
    """One scheme's fsspec filesystem, set to stop at the first failure: how often to try is ours to say."""

    def __init__(self, scheme: str, timeout_s: float, downloads: int) -> None:
        import aiohttp
        import fsspec  # both import slowly, and only remote shards need them

        self._timeout_s = timeout_s
        try:
            self._files = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme, timeout_s, downloads))
        except ImportError as error:
            extra = "s3" if scheme == "s3" else "gs"
            raise InputError(f"{scheme}:// cannot be read here: {error}; pip install 'ecgscale[{extra}]'") from error
        self._files.retries = 1
        self._errors: tuple[type[Exception], ...] = (OSError, aiohttp.ClientError, *_own_errors(scheme))
        self._streams = scheme not in ("gs", "gcs")
        if self._streams:
            # The client's set-up is computing, not network: it must not use up the time-out of the first answer.
            try:
                self._await(self._files.set_session())
            except self._errors as error:
                raise InputError(f"{scheme}:// cannot be read here: {_failed(error, timeout_s)}") from error

    def blocks(self, url: str, size: int | None) -> Iterator[bytes]:
        """The file's bytes, in one request where the client can; raises FetchError."""
        stream = _streamed(self._files, url, size) if self._streams else _ranged(self._files, url, size)
        try:
            while block := self._await(_next_block(stream, self._timeout_s)):
                yield block
        except self._errors as error:
            raise _failed(error, self._timeout_s) from error
        finally:
            self._await(stream.aclose())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        """Let fsspec's thread do it; this thread hashes and writes meanwhile, and can be interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._files.loop)
        try:
            return future.result()
        finally:
            future.cancel()


def _options(scheme: str, timeout_s: float, downloads: int) -> dict[str, Any]:
    """Time-outs, and no retries of the client's own, on top of what fsspec's configuration says."""
    from fsspec.config import conf

    own = conf.get(scheme, {})
    if scheme == "s3":
        client = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": max(10, downloads),
            "response_checksum_validation": "when_required",  # the sha256 says more
        }
        return {"config_kwargs": own.get("config_kwargs", {}) | client}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        # trust_env: clusters reach the world through $https_proxy, and passwords stand in ~/.netrc.
        client = {"trust_env": True, "headers": {"Accept-Encoding": "identity"}} | own.get("client_kwargs", {})
        return {"client_kwargs": client | {"timeout": timeout}}
    return {}


def _own_errors(scheme: str) -> tuple[type[Exception], ...]:
    names = {
        # ValueError: an endpoint that is no URL
        "s3": ("botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError", "builtins.ValueError"),
        "gs": ("gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError", "builtins.ValueError"),
    }
    paths = [name.rpartition(".") for name in names.get(scheme.replace("gcs", "gs"), ())]
    return tuple(getattr(importlib.import_module(module), name) for module, _, name in paths)


async def _next_block(stream: AsyncGenerator[bytes, None], timeout_s: float) -> bytes:
    """About a MiB, so that threads hand over seldom; less only at the end."""
    parts: list[bytes] = []
    while sum(map(len, parts)) < _BLOCK_BYTES:
        async with asyncio.timeout(timeout_s):
            part = await anext(stream, b"")
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


async def _streamed(files: Any, url: str, size: int | None) -> AsyncGenerator[bytes, None]:
    file = await files.open_async(url, "rb", size=size or 0)  # without a size fsspec asks the server for it first
    try:
        while part := await file.read(_BLOCK_BYTES):
            yield part
    finally:
        # s3fs leaves the answer open; and a file that nobody closes complains when it is collected.
        closed = file.r.close() if file.r is not None else None
        if inspect.isawaitable(closed):
            await closed
        await file.close()


async def _ranged(files: Any, url: str, size: int | None) -> AsyncGenerator[bytes, None]:
    """For gcsfs, which streams only into files of its own. It retries by itself; the time-out ends that too."""
    total = size or (await files._info(url))["size"]
    for start in range(0, total, _RANGE_BYTES):
        yield await files._cat_file(url, start=start, end=min(start + _RANGE_BYTES, total))


def _failed(error: Exception, timeout_s: float) -> FetchError:
    """What went wrong, in a line, and whether trying again is of no use."""
    status = _http_status(error)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, TimeoutError):
        return FetchError(f"no byte for {timeout_s:g} s")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FetchError("no such file or bucket there; check data.shards and that its upload is complete", True)
    if isinstance(error, PermissionError) or status in (401, 403) or text.startswith("Forbidden:"):  # the last: gcsfs
        return FetchError(f"access denied ({text}); check the credentials and the rights of their user", True)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return FetchError(f"{text}; give credentials (AWS_*), or FSSPEC_S3_ANON=true for a public bucket", True)
    if status is not None:
        permanent = 300 <= status < 500 and status not in (408, 425, 429)
        return FetchError(f"the server answered {status} ({text})", permanent)
    return FetchError(f"{type(error).__name__}: {text}")


def _http_status(error: BaseException) -> int | None:
    """s3fs translates botocore's errors, whose status is in the cause; aiohttp and gcsfs have attributes of theirs."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return int(response["ResponseMetadata"]["HTTPStatusCode"])
    if error.__cause__ is not None:  # aiohttp makes a status of its own, 400, of an answer that is no HTTP
        return None
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return status if isinstance(status, int) else None
