"""The one error that users see as a single line."""


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a key, a value.

    The message is one line that names the file or key, the offending value and what would be right.
    The command line prints it and exits with code 2; everything else is a defect of ecgscale.
    """
