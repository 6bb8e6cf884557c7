"""What can a user meet that is no defect of ours, and how is it told in one line?"""

from __future__ import annotations

# As shells say that Ctrl-C ended a command.
EXIT_INTERRUPTED = 130


class CheckError(ArithmeticError):
    """The kernels do not train as the dense reference does, which --check was asked to find out."""


# Settings, files and data that are not as expected, what is not supported, and training that diverged.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, FloatingPointError, CheckError)


def is_user_error(error: BaseException) -> bool:
    """Whether a user can mend it; anything else is a defect of ours, whose traceback must not be lost."""
    return isinstance(error, _USER_ERRORS) or _is_out_of_memory(error)


def describe_error(error: BaseException) -> str:
    """One line, with the file where the system refused one."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    else:
        message = str(error) or type(error).__name__
    if _is_out_of_memory(error):
        message = f"not enough memory: {message} (smaller batches or images need less)"
    return " ".join(message.split())


def _is_out_of_memory(error: BaseException) -> bool:
    # Torch has a type of its own for GPUs, which is not imported for this, and none for CPUs.
    is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_torch)
