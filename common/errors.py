"""The error that every file raises for bad input, and how it quotes a text."""


class InputError(ValueError):
    """Bad input from the user. The message is one line: what is wrong, where, and what to do.

    Commands print it to stderr and exit with status 2.
    """


class BadImage(InputError):
    """An image that cannot be used. The loader skips its sample, and stops after too many."""


def printable(text, length=80):
    """Return at most `length` characters of a text from a file, control characters escaped."""
    return repr(str(text))[1:-1][:length]
