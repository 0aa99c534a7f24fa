import os

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"  # whatever a test forgets to say, nothing leaves this machine

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
