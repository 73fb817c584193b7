"""inject, remove, merge_ and unmerge_ change a model whole or not at all, wherever an exception comes from.

An exception is raised at the call of one function of the package after another, as Ctrl-C and a lack of memory would.
"""

import sys
from pathlib import Path

import pytest
import torch
from situations import X, lora
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target

ROOT = str(Path(ak.torch.__file__).parent)
TABLES = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks", "_buffers")


class Interrupted(BaseException):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.inner(x))


def adapter():
    return Adapter({Target("inner.0"): (lora(16, 16),), Target("head"): (lora(8, 16),)})


def picture(model):
    """All that others can see of a model."""
    found = []
    for module in model.modules():
        tables = [[getattr(type(v), "__name__", v) for v in getattr(module, name).values()] for name in TABLES]
        parameters = [(name, id(p), p.requires_grad) for name, p in module._parameters.items()]
        own = {n: id(v) for n, v in module.__dict__.items() if not n.startswith("_") and n != "training"}
        found.append((tables, parameters, own, len(module.__dict__.get("_adapterkit_handles", ()))))
    return found


def interrupted(act, count):
    """Raise at the call number `count` of a function of the package; return whether there was one."""
    calls = 0

    def look(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            calls += 1
            if calls == count:
                sys.setprofile(None)
                raise Interrupted

    sys.setprofile(look)
    try:
        act()
    except Interrupted:
        return True
    finally:
        sys.setprofile(None)
    return None if calls >= count else False  # None: Python ignores exceptions in generators that are thrown away.


def merged(keep):
    def prepare(model):
        handle = ak.torch.inject(model, adapter())
        handle.merge_(keep=keep)
        return handle.unmerge_, handle

    return prepare


def attached(action):
    def prepare(model):
        handle = ak.torch.inject(model, adapter(), trainable=True)
        return lambda: action(handle), handle

    return prepare


def beside(model):
    ak.torch.inject(model, adapter(), name="other", trainable=True)
    return lambda: ak.torch.inject(model, adapter(), trainable=True), None


ACTIONS = {
    "inject": lambda model: (lambda: ak.torch.inject(model, adapter(), trainable=True), None),
    "inject beside another": beside,
    "remove": attached(lambda handle: handle.remove()),
    "merge": attached(lambda handle: handle.merge_(keep=True)),
    "merge, recompute": attached(lambda handle: handle.merge_(keep="recompute")),
    "unmerge": merged("copy"),
    "unmerge, recomputed": merged("recompute"),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_left_halfway(name):
    points = 0
    for count in range(1, 10_000, 9):
        model = Model().double()
        act, handle = ACTIONS[name](model)
        before, state, values = model(X), picture(model), [p.detach().clone() for p in model.parameters()]
        done = interrupted(act, count)
        if done is False:
            break
        if done is None:
            continue
        points += 1
        assert picture(model) == state
        assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
        assert torch.equal(model(X), before)
        if points % 5 == 0:  # What was interrupted can be done again.
            again = act() or handle
            torch.testing.assert_close(model(X), after(name))
            assert again is None or handle is None or again._state in ("attached", "removed", "merged")
    assert points > 4


def after(name):
    """What the whole action gives."""
    model = Model().double()
    act, _ = ACTIONS[name](model)
    act()
    return model(X)
