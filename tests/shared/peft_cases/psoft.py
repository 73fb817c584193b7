"""PSOFT: rotations, exact and in a series, and free matrices; A and B from the base."""

from peft import PsoftConfig

from peft_cases import Layers, llama


def psoft(**options):
    return PsoftConfig(**{"r": 4, "psoft_alpha": 6, "init_weights": False, "target_modules": ["q", "up"], **options})


CASES = {
    "psoft": (Layers, psoft()),
    "psoft of both roots": (Layers, psoft(ab_svd_init="pissa_init")),
    "psoft without scales": (Layers, psoft(psoft_mag_a=False, psoft_mag_b=False)),
    "psoft in a series": (Layers, psoft(use_cayley_neumann=True, cayley_neumann_eps=0.9, psoft_mag_a=False)),
    "psoft in a longer series": (Layers, psoft(use_cayley_neumann=True, num_cayley_neumann_terms=8)),
    "psoft of a randomised decomposition": (
        Layers,
        psoft(psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=5),
    ),
    "free psoft": (Layers, psoft(psoft_orth=False, psoft_mag_b=False)),
    "psoft of llama": (llama, psoft(target_modules=["q_proj", "down_proj"], r=3)),
}
