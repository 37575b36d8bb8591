"""What users see as one line: what they gave is wrong, the machine failed, or another process is gone."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a key, a value. No retry mends it.

    The message is one line that names the file or key, the offending value and what would be right.
    The command line prints it and exits with code 2.
    """


class Diverged(InputError):  # noqa: N818
    """What a run trains is not finite any more, or its gradient was not for train.max_skipped steps in a row.

    Every rank raises it at the same step; the checkpoints that are left are finite.
    """


class MachineError(Exception):
    """The machine did not do its part: a disk, a file system, a network. The same command may succeed later.

    The message is one line that names the file. The command line prints it and exits with code 1; the launcher tries
    again. Everything that is neither this nor InputError nor RankError is a defect of ecgscale.
    """


class RankError(RuntimeError):
    """Other processes of the job are missing or gone. The command line prints the message and exits with code 1."""


# What a path that the user gave can be wrong about; all else that a system call says is the machine's fault.
_OF_THE_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}

# What a disk, or who serves files, says when it fails: neither a path nor the content of a file brings these about.
_OF_THE_DISK = {
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

# How gloo and NCCL say that another process is gone.
_LOST_RANK = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


def file_error(path: Path | str, doing: str, error: OSError) -> InputError | MachineError:
    """The error to raise for a system call that failed over ``path``, such as ``doing`` = "cannot write".

    InputError where the path is wrong (not there, not ours to write), MachineError for all else (EIO, ESTALE, ENOSPC).
    """
    kind = InputError if error.errno in _OF_THE_PATH else MachineError
    return kind(f"{path}: {doing}: {error.strerror or error}")


def system_error(error: OSError) -> InputError | MachineError:
    """The same for a system call that nobody has put into words, with what it says of the file."""
    places = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return file_error(" -> ".join(places) or "a file without a name", type(error).__name__, error)


@contextmanager
def naming_file(path: Path | str, doing: str) -> Iterator[None]:
    """Errors of system calls inside come out as ``file_error(path, doing, error)``."""
    try:
        yield
    except OSError as error:
        raise file_error(path, doing, error) from error


def disk_failed(error: BaseException) -> bool:
    """Whether the machine is to blame where a library could not read a file; otherwise the file's content is."""
    return isinstance(error, OSError) and error.errno in _OF_THE_DISK


def unreadable(path: Path | str, what: str, error: Exception) -> InputError | MachineError:
    """The error to raise where a library could not read ``path``, such as ``what`` = "not a readable .npy".

    A library says much by OSError: only some of it is the disk's fault or the path's.
    """
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK | _OF_THE_PATH:
        return file_error(path, what, error)
    return InputError(f"{path}: {what} ({' '.join(str(error).split()) or type(error).__name__})")


def tells_of_lost_rank(error: BaseException) -> bool:
    """Whether an error only follows from that of another process."""
    return isinstance(error, RankError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_RANK)
    )


def one_line(text: str) -> str:
    """Without what would move a terminal's cursor: file names and their content may be anybody's."""
    return "".join(one if one.isprintable() else " " if one == "\n" else ascii(one)[1:-1] for one in text)
