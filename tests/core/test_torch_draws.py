"""Decompositions that draw by torch's global generator give the same numbers in any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import torch

from adapterkit.linalg.rotations import singular_by_sketch


def by_torch(W, seed):
    torch.manual_seed(seed)
    U, S, V = torch.svd_lowrank(W, q=4, niter=1)
    return U, S, V.T.contiguous()


def test_threads_do_not_draw_each_others_numbers():
    weights = [torch.randn(64, 48, generator=torch.Generator().manual_seed(number)) for number in range(60)]
    alone = [by_torch(W, number) for number, W in enumerate(weights)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: singular_by_sketch(weights[at], 4, 1, at), range(len(weights))))
    for ours, theirs in zip(found, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_the_callers_generator_is_left_as_it_was():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    singular_by_sketch(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), 2, 1, 5)
    assert torch.equal(torch.rand(2), wanted)
