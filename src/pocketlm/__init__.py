"""Make a small language model fit a device, and prove what that cost."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for each other by spinning, which on a machine with other work to do turns milliseconds into
# seconds: one busy neighbour on two cores made a forward pass ten times slower, and only twice with short spins.
# Read when OpenMP is loaded, so it must be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
