"""The one exception that is meant for a person."""


class InputError(Exception):
    """What a person gave us cannot be used.

    The message is one sentence: it names the thing, what is wrong with it and what would be right. The
    command line prints it without a traceback and exits with status 2; nothing on disk has changed.
    """


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): like Ctrl-C, with exit status 143."""
