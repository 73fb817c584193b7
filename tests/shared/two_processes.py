"""Runs a function in two processes at once, which are forks of the test's process: importing torch takes seconds."""

import torch

# A process whose backward has started threads for devices cannot fork. After torch.compile or torch.export, the first
# backward of torch 2.11's CUDA builds starts such threads even without a device, so let it come before all tests.
torch.ones(1, requires_grad=True).sum().backward()


def in_two_processes(work, *args):
    """Call `work(rank, *args)` with the ranks 0 and 1, and wait for both."""
    torch.multiprocessing.start_processes(work, args, nprocs=2, start_method="fork")
