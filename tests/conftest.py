"""Set-up for all tests."""

import os
import signal
import sys

import torch

# A torchvision that another package brings may be built for another torch than the one installed here; transformers
# imports it wherever it finds it. No test needs it.
sys.modules.setdefault("torchvision", None)

# Who starts the tests in the background of a shell, or with nohup, has them ignore these signals, and with them every
# command that they start and then interrupt.
for _each, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_each) is signal.SIG_IGN:
        signal.signal(_each, _usual)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several test processes would wait for each other, spinning
