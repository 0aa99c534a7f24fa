"""Makes `python -m peft_pretraining.run_glue` run peft_pretraining.glue."""

import sys

from peft_pretraining.glue.__main__ import command_line

if __name__ == "__main__":
    sys.exit(command_line())
