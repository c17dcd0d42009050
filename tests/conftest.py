import torch

# Two workers on two cores (make test): one thread each is faster than four threads that wait for each other.
torch.set_num_threads(1)
