"""Regular expressions of configs: as `re` says, and in bounded time."""

import contextlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Unsupported
from adapterkit.formats.peft.patterns import Automaton, TooSlow, finds, first_match, fits, matches

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "q_proj", "", "a.b\n", "x\ny", "lm_head",
    "vision.encoder.layers.3.fc1", "Ünïcode.١٢.q", "a" * 40, "a" * 20 + "b", "model.layers.0", "..", "_",
]  # fmt: skip
PATTERNS = [
    r"(.*\.)?(q_proj)$", r".*\.layers\.\d+\.(self_attn|mlp)\..*", r"^model\.(layers\.([0-9]|1[0-1])\.)+\w+", r"(a|b)*",
    r"((\w|\.)+)+Q", r"(a+)+b", r"(a?){20}a{20}", r"(a|aa)+$", r"(.*)*x", r"\bq_proj\b", r"\B\w+", r"[^.]+\.[\w.]*\Z",
    r"(?s:.)*y", r"(?:.|\n)*?b", r"\D+\d{1,3}\.\w{2,}", r"", r"$", r"^", r"\A\w*\Z", r"(|a)*b?", r"(a*)*", r"((a*)*)*b",
    r"(x{0,3}y?){2,5}", r"[a-f0-9]{3,}|\w+\.", r"(?a:\w)+", r"(?a:\d)+\.", r"[^\W\d_]+", r"\S+\s\S", r"(a{2}){3,}",
    r".+?",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["match", "fullmatch", "search"])
def test_the_automaton_says_what_re_says(pattern: str, kind: str) -> None:
    """On names that are short enough for `re` to finish."""
    automaton = Automaton(pattern)
    for name in (name[:7] for name in NAMES):
        assert automaton.fits(name, kind) == (getattr(re, kind)(pattern, name) is not None), name


def test_the_automaton_says_what_re_says_of_random_patterns() -> None:
    draw = random.Random(0)

    def made(depth: int) -> str:
        choice = draw.randrange(8 if depth else 4)
        if choice < 4:
            return draw.choice(["a", "b", ".", r"\.", r"\w", "[ab]", "[^a]", r"\b", "^", "$", r"\d"])
        if choice < 6:
            return made(depth - 1) + made(depth - 1)
        if choice == 6:
            return f"({made(depth - 1)}|{made(depth - 1)})"
        return f"(?:{made(depth - 1)}){draw.choice(['*', '+', '?', '*?', '{2}', '{1,2}', '{0,3}'])}"

    compared = 0
    for _ in range(1500):
        pattern = made(4)
        name = "".join(draw.choice("ab.1\n") for _ in range(draw.randrange(8)))
        for kind in ("match", "fullmatch", "search"):
            expected = getattr(re, kind)(pattern, name) is not None
            assert Automaton(pattern).fits(name, kind) == expected, (pattern, name, kind)
            compared += expected
    assert 1000 < compared < 4000


EXPONENTIAL = [
    r"((\w|\.)+)+Q",
    r"(a+)+b",
    r"(a|a)*b",
    r"(.*)*x",
    r"(a?){40}a{40}b",
    r"(\w+\.?)+!",
    r".*.*.*.*.*.*.*.*x",
]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_what_re_would_never_finish_is_answered(pattern: str) -> None:
    names = ["a" * 60, "model.layers.0.self_attn.q_proj.and.many.more.words_of_it", "a" * 200]
    for name in names:
        assert not matches(pattern, name)
        assert not matches(rf"(.*\.)?({pattern})$", name)
        assert not finds(pattern, name)


@pytest.mark.parametrize("pattern", [r"(a+)+(?=b)", r"((a+)+)\1b", r"(?i:(a+)+b)", r"(?m:^(a+)+b)",
                                     r"(?>(a+)+b)c", r"((a)|b)+(?(2)c|d)"])  # fmt: skip
def test_what_no_automaton_says_is_refused_where_it_could_take_hours(pattern: str) -> None:
    with pytest.raises(Unsupported, match="may take hours") as raised:
        matches(pattern, "a" * 60)
    assert "list the names" in str(raised.value.cure)


@pytest.mark.parametrize("pattern", [r".*(?=q_proj)", r"(?i)MODEL\..*Q_PROJ", r"(?!lm_head).*proj", r"(q|k)_\w+\1?"])
def test_what_no_automaton_says_is_left_to_re_where_that_is_quick(pattern: str) -> None:
    for name in NAMES[:3]:
        assert matches(pattern, name) == (re.match(pattern, name) is not None)


def test_an_automaton_has_a_limit_of_its_own() -> None:
    with pytest.raises(TooSlow):
        fits("((" + "|".join(f"a{{1,{n}}}" for n in range(1, 120)) + ")+)+b", "a" * 50, "match")


def folder_of(path: Path, **config: object) -> Path:
    path.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj_of_a_long_name_of_words.lora_{}.weight"
    factors = {name.format("A"): np.ones((4, 2), np.float32), name.format("B"): np.ones((2, 4), np.float32)}
    save_file(factors, path / "adapter_model.safetensors")
    told = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj_of_a_long_name_of_words"],
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_a_config_with_such_a_pattern_is_read(tmp_path: Path, field: str) -> None:
    evil = r"((\w|\.)+)+Q"
    folder = folder_of(tmp_path / "a", **{field: evil if field == "target_modules" else {evil: 4}})
    if field == "target_modules":
        # PEFT would put the adapter nowhere; whatever is said of that, it is said soon.
        with contextlib.suppress(AdapterkitError):
            ak.read(folder)
        return
    (update,) = ak.read(folder).updates[ak.Target("model.layers.0.self_attn.q_proj_of_a_long_name_of_words")]
    assert update.scaling == 2.0


def test_patterns_are_those_of_peft() -> None:
    """PEFT's own function, on patterns that both finish."""
    from peft.utils.other import get_pattern_key

    patterns = ["q_proj", r"layers\.\d+\.mlp", r".*11.*", r"(down|up)_proj", "self_attn.q_proj", r"[a-z_.]+fc\d"]
    for name in filter(None, NAMES):
        for pattern in patterns:
            # PEFT gives the pattern that fits, or the name itself.
            theirs = get_pattern_key([pattern], name) == pattern
            assert (first_match({pattern: "fits"}, name, "") == "fits") == theirs, (pattern, name)
