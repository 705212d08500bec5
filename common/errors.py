"""The error that every file raises for bad input."""


class InputError(ValueError):
    """Bad input from the user. The message is one line: what is wrong, where, and what to do.

    Commands print it to stderr and exit with status 2.
    """
