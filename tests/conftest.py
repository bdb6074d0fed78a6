"""Set-up for all tests."""

import os
import sys

import torch

# A torchvision that another package brings may be built for another torch than the one installed here; transformers
# imports it wherever it finds it. No test needs it.
sys.modules.setdefault("torchvision", None)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several test processes would wait for each other, spinning
