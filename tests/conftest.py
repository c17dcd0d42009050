import os

import torch

# Two workers on two cores (make test): one thread each is faster than four threads that wait for each other.
torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
