"""What can a user meet that is no defect of ours, and how is it told in one line?"""

from __future__ import annotations

# Settings, files and data that are not as expected. Anything else keeps its traceback.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, ArithmeticError, RuntimeError)
# As shells say that Ctrl-C ended a command.
EXIT_INTERRUPTED = 130


def describe_error(error: BaseException) -> str:
    """One line, with the file where the system refused one."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())
