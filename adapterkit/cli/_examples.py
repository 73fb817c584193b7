"""Examples for the help of each command, and the command that is suggested after it succeeds.

Tests run these lines in a folder with the base `base`, the adapters `lora` and `other`, and the merged model `tuned`.
Lines that name a hub, a graph, a transformers model or another program are only parsed.
"""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "bom": ("adapterkit bom tuned", "adapterkit bom lora -o lora.cdx.json"),
    "combine": (
        "adapterkit combine lora other --method ties --base base --rank 8 -o combined",
        "adapterkit combine lora other --method linear --weight 0.7 --weight 0.3 --base base --rank 8 -o mix",
    ),
    "completion": (
        'eval "$(adapterkit completion bash)"',
        "adapterkit completion fish > ~/.config/fish/completions/adapterkit.fish",
    ),
    "conformance": ("adapterkit conformance -- python my_reader.py",),
    "convert": (
        "adapterkit convert lora lora.safetensors --to adapterkit",
        "adapterkit convert lora for-vllm --to peft --profile vllm --on-loss fold --base base",
        "adapterkit convert hf://org/lora lora.gguf --to gguf --base model",
    ),
    "demo": ("adapterkit demo",),
    "diff": ("adapterkit diff lora lora", "adapterkit diff lora lora --base base --no-signs --json"),
    "doctor": ("adapterkit doctor",),
    "export": (
        "adapterkit export MODEL -o graph",
        "adapterkit export MODEL -o graph --adapter lora --adapter other --mode slots",
    ),
    "extract": ("adapterkit extract tuned --base base --rank 12 -o extracted",),
    "gate": (
        "adapterkit gate MODEL lora",
        "adapterkit gate MODEL lora --merged merged --data texts.jsonl --min-kept 0.95",
        "adapterkit gate MODEL lora --onnx graph/model.onnx --json",
    ),
    "help": ("adapterkit help merge",),
    "inject": (
        "adapterkit inject model.onnx lora -o attached.onnx",
        "adapterkit inject model.onnx lora -o swappable.onnx --mode slots",
    ),
    "inspect": (
        "adapterkit inspect lora",
        "adapterkit inspect lora --layers",
        "adapterkit inspect lora --base base --all",
        "adapterkit inspect base",
    ),
    "list": ("adapterkit list formats", "adapterkit list combine"),
    "merge": (
        "adapterkit merge base lora -o merged --plan",
        "adapterkit merge base lora -o merged --verify",
        "adapterkit merge base lora other --weight 0.7 --weight 0.3 -o both",
        "adapterkit merge hf://org/model hf://org/lora -o merged --stream",
    ),
    "names": ("adapterkit names base", "adapterkit names base lora"),
    "pull": ("adapterkit pull hf://org/lora lora-from-hub", "adapterkit pull hf://org/model@main model --dry-run"),
    "push": ("adapterkit push lora hf://org/lora --private", "adapterkit push lora hf://org/lora --dry-run"),
    "report": (
        "adapterkit report lora -o report.html",
        "adapterkit report lora other --base base -o both.html --figures pictures",
        "adapterkit report lora --base base --merged tuned -o merged.html",
    ),
    "resize": ("adapterkit resize lora --rank 2 -o small", "adapterkit resize lora --energy 0.99 -o smaller"),
    "scan": ("adapterkit scan base", "adapterkit scan hf://org/lora --fail-on high"),
    "search": (
        "adapterkit search math code --data validation.jsonl --base MODEL -o best.yml",
        "adapterkit search math code --data validation.jsonl --base MODEL --method ties --budget 30 -o ties.yml",
        "adapterkit search math code --data validation.jsonl --base MODEL --start best.yml --start karcher -o new.yml",
    ),
    "sign": ("adapterkit sign lora --key key.pem", "adapterkit sign tuned --key key.pem -o tuned.sig --overwrite"),
    "ui": ("adapterkit ui", "adapterkit ui ~/models ~/adapters --port 7878 --no-browser"),
    "validate": ("adapterkit validate lora", "adapterkit validate lora --base base"),
    "verify": (
        "adapterkit verify tuned --base base --adapter lora",
        "adapterkit verify tuned --signature tuned.sig --key key.pub.pem",
    ),
}
"""Command -> one to four example lines."""

NEXT: Mapping[str, str] = {
    "combine": "adapterkit inspect {out}",
    "convert": "adapterkit inspect {dst}",
    "extract": "adapterkit diff {out} ADAPTER --base {base}",
    "merge": "adapterkit verify {out} --base {base} --adapter {adapters}",
    "pull": "adapterkit inspect {dst}",
    "resize": "adapterkit inspect {out}",
    "search": "adapterkit combine {out} -o OUT",
    "validate": "adapterkit merge {base} {src} -o MERGED --plan",
}
"""Command -> the command to suggest next. Nothing is suggested if a parameter in braces has no value."""


def epilog(command: str) -> str | None:
    """Return the examples for the end of a command's help."""
    lines = EXAMPLES.get(command, ())
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)]) if lines else None


def next_step(command: str, given: Mapping[str, object]) -> str | None:
    """Return the command to suggest next, or None.

    Args:
        command: the name of the command that succeeded.
        given: the values of that command's parameters.
    """
    import shlex
    import string

    text = NEXT.get(command)
    if text is None or given.get("only_plan") or given.get("verified"):
        return None
    values = {}
    for _, name, _, _ in string.Formatter().parse(text):
        value = given.get(name) if name else None
        if name and not value:
            return None
        if name:
            many = value if isinstance(value, tuple) else (value,)
            flag = " --adapter " if name == "adapters" else " "
            values[name] = flag.join(shlex.quote(str(each)) for each in many)
    return text.format(**values)
