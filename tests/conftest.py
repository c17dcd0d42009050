import importlib.util
import os

# Read when torch is imported: OpenMP's threads spin while they wait, which a busy machine pays for (benchmarks/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Two workers on two cores (make test): one thread each is faster than four threads that wait for each other.
torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from interpreter import look_up_builtins_once

        look_up_builtins_once()
