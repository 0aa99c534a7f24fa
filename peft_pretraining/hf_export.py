"""Makes `python -m peft_pretraining.hf_export` run peft_pretraining.export."""

import sys

from peft_pretraining.export.__main__ import command_line

if __name__ == "__main__":
    sys.exit(command_line())
