"""AdaMSS: with the bias and without, groups of one and of several ranks, another seed."""

from peft import AdamssConfig

from peft_cases import Layers, llama


def adamss(**options):
    given = {"r": 4, "num_subspaces": 2, "subspace_rank": 2, "init_weights": None, "target_modules": ["q", "up"]}
    return AdamssConfig(**{**given, **options})


CASES = {
    "adamss": (Layers, adamss()),
    "adamss of other ranks": (Layers, adamss(num_subspaces=3, use_dynamic_rank=True, svd_threshold=0.3)),
    "adamss of more than there is": (Layers, adamss(r=100, num_subspaces=9)),
    "adamss of another seed": (Layers, adamss(random_seed=11)),
    "adamss of llama": (llama, adamss(target_modules=["q_proj", "down_proj"], r=6, num_subspaces=3)),
}
