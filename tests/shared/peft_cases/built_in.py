"""LoRA, DoRA, IA3, whole modules and token rows."""

from peft import IA3Config, LoraConfig, TrainableTokensConfig

from peft_cases import CONVOLUTIONS, Layers, gpt2, llama


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})


CASES = {
    "linear": (Layers, lora(target_modules=["q", "up"])),
    "rslora": (Layers, lora(target_modules=["q", "up"], use_rslora=True, r=6)),
    "patterns": (
        llama,
        lora(
            target_modules="all-linear",
            rank_pattern={r"layers\.1\.self_attn\.(q|k)_proj": 2, "q_proj": 3, "mlp.*": 5, "(.*)o_proj": 7},
            alpha_pattern={"down_proj": 3, r"layers.\d.mlp.up_proj": 11, "v_proj": 0},
        ),
    ),
    "layers": (llama, lora(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "convolutions": (Layers, lora(target_modules=CONVOLUTIONS)),
    "embedding": (Layers, lora(target_modules=["emb"])),
    "embedding and head": (llama, lora(target_modules=["embed_tokens", "lm_head"])),
    "conv1d of gpt-2": (gpt2, lora(target_modules=["c_attn", "c_proj", "wte", "lm_head"])),
    "attention": (Layers, lora(target_modules=["attn", "q"], rank_pattern={"attn": 3}, bias="lora_only")),
    "experts": (
        Layers,
        lora(
            target_modules=["q"],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
            rank_pattern={"down_proj": 2},
        ),
    ),
    "turned experts": (Layers, lora(target_modules=[], target_parameters=["turned.gate_up_proj", "turned.down_proj"])),
    "parameter": (Layers, lora(target_modules=[], target_parameters=["0.q.weight", "turned.down_proj"])),
    "bias of lora": (Layers, lora(target_modules=["q", "conv2", "head.1"], lora_bias=True)),
    "all biases": (Layers, lora(target_modules=["q"], bias="all")),
    "dora": (Layers, lora(target_modules=["q", "up", "emb", *CONVOLUTIONS], use_dora=True)),
    "dora of gpt-2": (gpt2, lora(target_modules=["c_attn", "c_proj", "wpe"], use_dora=True)),
    "ia3": (
        Layers,
        IA3Config(target_modules=["q", "up", "conv2", "conv3"], feedforward_modules=["up", "conv3"]),
    ),
    "ia3 of gpt-2": (gpt2, IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "saved modules": (llama, lora(target_modules=["q_proj"], modules_to_save=["model.norm", "lm_head"])),
    "saved tree": (Layers, lora(target_modules=["q"], modules_to_save=["head", "norm"])),
    "saved square of gpt-2": (gpt2, lora(target_modules=["c_attn"], modules_to_save=["attn.c_proj"])),
    "saved of gpt-2": (gpt2, lora(target_modules=["mlp.c_proj"], modules_to_save=["c_attn"])),
    "saved only": (llama, LoraConfig(target_modules="dummy-target-modules", modules_to_save=["embed_tokens"])),
    "ia3 and saved": (
        Layers,
        IA3Config(target_modules=["q"], feedforward_modules=[], modules_to_save=["conv1"]),
    ),
    "tokens": (llama, TrainableTokensConfig(token_indices=[3, 11, 7], target_modules=["embed_tokens"])),
    "lora and tokens": (llama, lora(target_modules=["q_proj", "lm_head"], trainable_token_indices=[19, 2])),
    "tokens by module": (gpt2, lora(target_modules=["c_attn"], trainable_token_indices={"wte": [1, 5], "wpe": [0]})),
}
