"""Set-up for all tests."""

import sys

# A torchvision that another package brings may be built for another torch than the one installed here; transformers
# imports it wherever it finds it. No test needs it.
sys.modules.setdefault("torchvision", None)
