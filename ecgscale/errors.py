"""The one error that users see as a single line."""


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a key, a value.

    The message is one line that names the file or key, the offending value and what would be right.
    The command line prints it and exits with code 2; everything else is a defect of ecgscale.
    """


class RankError(RuntimeError):
    """Other processes of the job are missing or gone. The command line prints the message and exits with code 1."""


# How gloo and NCCL say that another process is gone.
_LOST_RANK = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


def tells_of_lost_rank(error: BaseException) -> bool:
    """Whether an error only follows from that of another process."""
    return isinstance(error, RankError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_RANK)
    )


def one_line(text: str) -> str:
    """Without what would move a terminal's cursor: file names and their content may be anybody's."""
    return "".join(one if one.isprintable() else " " if one == "\n" else ascii(one)[1:-1] for one in text)
