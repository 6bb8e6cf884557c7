"""What can a user meet that is no defect of ours, and how is it told in one line?"""

from __future__ import annotations


class CheckError(ArithmeticError):
    """The kernels do not train as the dense reference does, which --check was asked to find out."""


# Settings, files and data that are not as expected, and training that diverged. Anything else is a defect of
# ours and keeps its traceback. Of RuntimeError only NotImplementedError, which names what is not supported.
USER_ERRORS = (ValueError, NotImplementedError, OSError, FloatingPointError, CheckError)


def describe_error(error: BaseException) -> str:
    """One line, with the file where the system refused one."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())
