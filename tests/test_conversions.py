"""Every format into every other, for every method of weights that both say they have: the same weights come out."""

from itertools import islice

import pytest
from llm_adapters import FILES, place
from method_matrices import IMAGE, LANGUAGE, cases, close, made_of, model

import adapterkit as ak
from adapterkit.errors import Unrepresentable

OF_IMAGES = {"comfyui", "diffusers", "kohya", "lycoris"}
OF_BOTH = {"peft"}
OF_ALL = {"adapterkit", "onnx_adapter"}
"""Formats of every method, which hold what was read as it is."""
OF_FLUX = {"bfl_control", "xlabs"}
"""Formats of one model's modules alone; their own tests have them."""

METHODS = [name for name, method in ak.METHODS.items() if method.kind in ("additive", "weight")]
WORLDS = {
    LANGUAGE: sorted(FILES.keys() - {"onnx_adapter"} | OF_BOTH | {"adapterhub"}),
    IMAGE: sorted(OF_IMAGES | OF_BOTH),
}


def test_every_format_is_here():
    known = {name for formats in WORLDS.values() for name in formats}
    assert set(ak.FORMATS) == known | OF_FLUX | OF_ALL | {"nola", "textual_inversion"}


def pairs():
    for pattern, formats in WORLDS.items():
        for method in METHODS:
            own = [name for name in formats if method in ak.FORMATS[name].methods]
            for first in own if len(own) > 1 else ():
                yield pytest.param(pattern, method, first, own, id=f"{pattern.partition(chr(46))[0]}-{method}-{first}")


def where(folder, name):
    if name in FILES:
        return place(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("a.safetensors" if name in OF_IMAGES | {"adapterkit"} else name)


def sayable(method, name, pattern, folder):
    """The first cases that a format has words for, each for itself."""
    kind = "f4" if name == "tensorrt_llm" else "f8"
    for number, case in enumerate(cases(method, kind)):
        adapter, base, _ = model([case], pattern, folder / f"base{number}")
        try:
            ak.write(adapter, where(folder / str(number), name), name, base, "fold")
        except Unrepresentable:
            continue
        yield number


@pytest.mark.parametrize(("pattern", "method", "first", "own"), list(pairs()))
def test_every_method_goes_from_each_into_each(pattern, method, first, own, tmp_path):
    numbers = list(islice(sayable(method, first, pattern, tmp_path / "first"), 2))
    assert numbers or first in ELSEWHERE.get(method, ())
    for second in own:
        for number in numbers if second != first else ():
            small = "tensorrt_llm" in (first, second)
            case = list(cases(method, "f4" if small else "f8"))[number]
            folder = tmp_path / second / str(number)
            adapter, base, expected = model([case], pattern, folder / "base")
            one, other = where(folder / "one", first), where(folder / "other", second)
            ak.write(adapter, one, first, base, "fold")
            try:
                ak.write(ak.read(one, first, base), other, second, base, "fold")
            except Unrepresentable:
                continue
            W = dict.fromkeys(expected, case[1])
            close(made_of(ak.read(other, second, base), W), expected, W, 5e-6 if small else 1e-6)


ELSEWHERE = {"dense": {"peft"}, "ia3": {"adapterhub"}, "replacement": {"mlx"}}
"""Formats that have a method for biases, or for other modules, alone: their own tests have them."""
