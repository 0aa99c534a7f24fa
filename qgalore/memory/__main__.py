"""`python -m qgalore.memory CONFIG`: the memory of a run by every method, planned. peft_pretraining has the models."""

import sys
from importlib import import_module
from importlib.util import find_spec

NEEDED = ("peft_pretraining", "transformers")


def main() -> int:
    """Hands the command line on. Returns the exit status."""
    for name in NEEDED:
        if find_spec(name) is None:
            print(
                f"error: python -m qgalore.memory needs {name}, which is not installed: run it in a clone of this "
                "repository, after pip install -r requirements.txt.",
                file=sys.stderr,
            )
            return 2
    return import_module("peft_pretraining.memory").main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
