"""The work of attaching adapters grows with the number of layers, not with its square."""

import cProfile
import pstats
from functools import partial

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.core.updates import Update
from adapterkit.methods import METHODS

METHODS_OF_LAYERS = [
    name
    for name, cls in METHODS.items()
    if cls.kind != "context" and cls.initial.__func__ is not Update.initial.__func__
]
"""Methods of weights and outputs that have a fresh value."""

NEEDS = {"rows": {"index": [1, 3]}, "alora": {"invocation": [1]}}
"""What a method must be told besides a rank."""

WORK = ("create", "inject", "adapter", "remove")

COUNTS = (8, 24, 40)
"""Numbers of layers in equal steps: calls that grow linearly rise by the same number in both steps."""


def counted(work):
    """Return the result of `work`, and how many functions it called."""
    profile = cProfile.Profile()
    result = profile.runcall(work)
    return result, sum(each[1] for each in pstats.Stats(profile).stats.values())


@pytest.mark.parametrize("method", METHODS_OF_LAYERS)
def test_the_work_grows_with_the_number_of_layers(method):
    totals = []
    for count in (2, *COUNTS):  # The first run fills caches.
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
        create = partial(ak.torch.create, model, method, targets=[nn.Linear], rank=2, **NEEDS.get(method, {}))
        adapter, calls_of_create = counted(create)
        handle, calls_of_inject = counted(partial(ak.torch.inject, model, adapter, trainable=True))
        _, calls_of_adapter = counted(handle.adapter)
        _, calls_of_remove = counted(handle.remove)
        totals.append((calls_of_create, calls_of_inject, calls_of_adapter, calls_of_remove))
    for name, (_, few, some, many) in zip(WORK, zip(*totals, strict=True), strict=True):
        assert many - some < 1.2 * (some - few), f"{name}: {few}, {some}, {many} calls"
