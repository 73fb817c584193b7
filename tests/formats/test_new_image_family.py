"""An image family that nothing in the tree names takes one TOML file, like a language model's."""

import json

import numpy as np
from checkouts import checkout, run  # noqa: F401 - a fixture
from safetensors.numpy import load_file, save_file

QUAGGA = """
format = 1
family = "quagga"
model_types = []
keyed = ["diffusers"]

[pipeline]
classes = ["QuaggaTransformer2DModel"]
words = ["quagga"]

[weights]
"herd_blocks.{n}.gaze.to_q" = { native = { name = "herd.{n}.gaze.qkv", part = 0, of = 3 } }
"herd_blocks.{n}.gaze.to_k" = { native = { name = "herd.{n}.gaze.qkv", part = 1, of = 3 } }
"herd_blocks.{n}.gaze.to_v" = { native = { name = "herd.{n}.gaze.qkv", part = 2, of = 3 } }
"herd_blocks.{n}.trot" = { native = "herd.{n}.trot_lin" }
"""


def test_convert_knows_its_names_in_every_spelling(checkout):  # noqa: F811
    (checkout / "spec" / "architectures" / "quagga.toml").write_text(QUAGGA)
    rng = np.random.default_rng(0)
    held, changes = {}, {}
    for name, out in (("gaze.to_q", 8), ("gaze.to_k", 8), ("gaze.to_v", 8), ("trot", 12)):
        A, B = rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(out, 2)).astype("f4")
        stem = f"transformer.herd_blocks.0.{name}"
        held |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        changes[stem] = B.astype("f8") @ A.astype("f8")
    save_file(held, checkout / "a.safetensors")
    steps = [checkout / f"{name}.safetensors" for name in ("a", "comfyui", "kohya", "back")]
    run(checkout, *(
        ("convert", one, other, "--to", to)
        for one, other, to in zip(steps, steps[1:], ("comfyui", "kohya", "diffusers"), strict=False)
    ))  # fmt: skip
    there = load_file(steps[1])
    assert {key.rpartition(".lora")[0] for key in there if "lora" in key} == {
        "diffusion_model.herd.0.gaze.qkv", "diffusion_model.herd.0.trot_lin",
    }  # fmt: skip
    assert "lora_unet_herd_0_gaze_qkv.lora_down.weight" in load_file(steps[2])
    back = load_file(steps[3])
    assert {key.rpartition(".lora")[0] for key in back} == set(changes)
    for stem, change in changes.items():
        made = back[f"{stem}.lora_B.weight"].astype("f8") @ back[f"{stem}.lora_A.weight"].astype("f8")
        np.testing.assert_allclose(made, change, rtol=1e-6, atol=1e-6)
    told = json.loads(run(checkout, ("inspect", steps[1], "--json")))
    assert told["families"] == ["quagga"]
    # No tool is known to load it, and no answer says that one does.
    answers = json.loads(run(checkout, ("list", "loaders", steps[1], "--json")))
    loads = {answer["tool"]: answer["loads"] for answer in answers["loaders"]}
    assert (loads["diffusers"], loads["comfyui"]) == ("no", "no")
