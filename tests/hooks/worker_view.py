"""Preprocessing that shows what the worker process is: importable there, and imports nothing."""

import os
import sys

import numpy as np

LOOKED_FOR = ("sae_lens", "transformer_lens", "transformers", "pandas", "datasets", "torch")


def of_this_process(image):
    """float32 (3, 1, 7): the pid of the server, and for each of LOOKED_FOR whether it is imported."""
    seen = [os.getppid(), *(name in sys.modules for name in LOOKED_FOR)]
    return np.broadcast_to(np.array(seen, dtype=np.float32), (3, 1, len(seen)))
