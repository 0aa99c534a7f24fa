"""How a program ends: what the user can repair is one line and status 2; a signal has a status of its own."""

import os
import sys
import warnings
from collections.abc import Callable

from loguru import logger

from peft_pretraining.errors import UserError, unusable_path
from peft_pretraining.failure import report_failure, tell_torchrun
from peft_pretraining.training.interruption import BY_HAND, Interrupted


def exit_status(main: Callable[[], None]) -> int:
    """Runs main. Returns the exit status: 2, after one line on stderr, for what the user can repair; or a signal's.

    Any other error is raised, unless it is the loss of another process, whose message counts.
    """
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    try:
        main()
    except UserError as error:
        # All ranks of a machine find what is wrong with the arguments or its files; one, what is wrong with a document.
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
            tell_torchrun(f"error: {error}")
        return 2
    except Interrupted as interrupted:
        tell_torchrun(str(interrupted))
        return interrupted.status
    except KeyboardInterrupt:
        return BY_HAND
    except Exception as error:
        told = unusable_path(error) if isinstance(error, OSError) else None
        if told is None:
            return report_failure(error)
        print(f"error: {told}", file=sys.stderr)
        tell_torchrun(f"error: {told}")
        return 2
    return 0
