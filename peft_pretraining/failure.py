"""How one process of several fails: what stands last on the screen is what went wrong, and where.

torchrun ends all processes of a machine when one has ended. Then it prints what the first of them to fail has left in a
file for it, as the "root cause". The others lose their connection to that process a moment earlier than torchrun looks,
and fail too: they have to be quiet, or one of them looks like the cause.
"""

import contextlib
import json
import os
import time
import traceback
from pathlib import Path

import torch.distributed as dist
from loguru import logger

GRACE = 5.0  # seconds in which torchrun, which looks ten times a second, finds the process that failed first
# What gloo says when it loses another process; NCCL and the store raise DistError.
_LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "gloo")


def tell_torchrun(message: str) -> None:
    """Leaves the message of this process for torchrun, whose page of some thirty lines ends with it.

    Without torchrun, does nothing.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        left = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": left}))


def lost_the_others(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer, and so has a cause elsewhere."""
    if not (dist.is_available() and isinstance(error, RuntimeError)):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _LOST)


def report_failure(error: Exception) -> int:
    """Reports an error that nobody has foreseen. Returns the exit status 1, or raises the error with its traceback.

    error: the error that is being handled. If it is the loss of another process, torchrun gets time to find that one.
    """
    if not lost_the_others(error):
        tell_torchrun(traceback.format_exc().rstrip())
        raise error
    reason = str(error).partition(". This is typically")[0].strip()
    message = f"another process is gone or does not answer; its own message says why ({reason})"
    logger.error(message)
    time.sleep(GRACE)
    tell_torchrun(message)
    return 1
