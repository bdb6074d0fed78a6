"""What processes of tests are forked with: everything that they would import for themselves, seconds of CPU each time.

Whatever is there at a fork is kept from the garbage collector, or each fork would go through all of it and copy it.
"""

import gc
import importlib

for _name in (
    "torch",
    "torch._dynamo",  # the first derivative of a process imports it
    "torch._decomp.decompositions_for_jvp",
    "numpy.ma",
    "distributed",
    "distributed.http.worker",  # a worker's first minutes
    "distributed.protocol.numpy",
    "importlib_metadata",
    "tornado.platform.asyncio",
    "pytest",
    "distinfluence.app.job",
    "distinfluence.cli",
    "distinfluence.scaling",
    "tests.scaling.sources",
    "tests.zoo",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()
