"""Export a model to ONNX, with adapters.

MODEL is a folder as transformers saves it: a causal language model gets its past keys and values as inputs and outputs,
an encoder or classifier its tokens. A model of encoder and decoder becomes the graphs that optimum loads, and one that
reads images those of transformers.js. For any other torch module, --model names the function that makes it, and MODEL,
if given, its weights. DIR holds the graph, config and tokenizer, and an .onnx_adapter file for each
adapter where these are slots. The result is run against the torch model, unless --no-check is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import _options
from ._graphs import checked, refuse
from ._render import View, counted, show
from ._writing import is_done, made_from, refuse_place

ONLY_FOLDERS_OF_TRANSFORMERS = ("dtype", "share_weights")


@click.command(help=__doc__)
@click.argument("model", metavar="MODEL", required=False)
@click.option("-o", "--out", metavar="DIR", required=True, help="Folder to write.")
@click.option(
    "--model", "factory", metavar="MODULE:FUNCTION",
    help="Python that is run: it returns a torch module and a tuple of example inputs.",
)  # fmt: skip
@click.option(
    "--adapter", "adapters", metavar="A", multiple=True, help="An adapter in any known format; may be repeated."
)
@click.option(
    "--mode", type=click.Choice(["merged", "attached", "slots"]), default="merged", show_default=True,
    help="Fold adapters into the weights, leave them nodes, or make them inputs that are exchanged at run time.",
)  # fmt: skip
@click.option(
    "--dtype", type=_options.ComputeType(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="What the graph computes in.",
)  # fmt: skip
@click.option(
    "--quantize", type=click.Choice(["int8", "int4"]),
    help="Pack the linear layers by onnxruntime's quantizers; adapters that are no weights stay as they are.",
)  # fmt: skip
@click.option(
    "--share-weights", is_flag=True,
    help="Write into MODEL itself: the graph names the bytes of its safetensors files, and no second copy is made.",
)  # fmt: skip
@click.option("--opset", type=int, metavar="N", help="Operator set; torch's own choice if absent.")
@_options.rename
@_options.compat
@_options.strict_base_of_read
@click.option("--check/--no-check", default=True, show_default=True, help="Run the result and compare it.")
@_options.overwrite
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, model: str | None, out: str, factory: str | None, adapters: tuple[str, ...], mode: str,
    dtype: str, quantize: str | None, share_weights: bool, opset: int | None, check: bool, overwrite: bool,
    compat: str | None, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Runs `adapterkit.onnx.export_pretrained`, or `adapterkit.onnx.export_factory`."""
    from ..io.locations import check_named

    refuse_place(out)
    check_named(model, *adapters)
    from ..onnx import export_factory, export_pretrained

    options: dict[str, Any] = {
        "adapter": _options.in_reading(adapters, compat, None if factory else model) or None,
        "mode": mode, "opset": opset, "quantize": quantize, "check": check, "rename": rename,
    }  # fmt: skip
    decided = None
    if factory is None and model is not None and not share_weights:
        # A model made by the user's own function depends on code, so its files do not identify it.
        decided = _decided_by(model, adapters)
        if is_done(ctx.obj, out, decided, overwrite):
            return
    if factory is not None:
        refuse(ctx, ONLY_FOLDERS_OF_TRANSFORMERS, "is for a folder of a transformers model")
        report = export_factory(factory, out, weights=model, overwrite=overwrite, **options)
    elif model is None:
        raise click.UsageError("Missing argument 'MODEL', or option '--model'")
    else:
        report = export_pretrained(
            model, out, dtype=dtype, share_weights=share_weights, overwrite=overwrite, made_from=decided, **options
        )  # fmt: skip
    show(ctx.obj, {**report.record(), "mode": mode}, _view)


def _decided_by(model: str, adapters: tuple[str, ...]) -> str | None:
    from importlib.util import find_spec

    from ..formats import files_read
    from ..io.locations import located
    from ..io.staging import files_below

    folder = located(model)
    if find_spec("transformers") is None or not folder.is_dir():
        return None  # Which the export itself refuses.
    files = [file for file in files_below(folder) if file.is_file()]
    files += [file for adapter in adapters for file in files_read(located(adapter))]
    return made_from(files, ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"))


def _view(record: Any) -> View:
    yield f"wrote {record['out']}: {record['mode']}; {checked(record)}"
    if damage := record.get("damage"):
        worst = max(damage, key=lambda name: damage[name]["error"])
        found = f"{damage[worst]['error']:.2%} ({worst})"
        yield f"{counted(len(damage), 'weight')} packed; the largest relative error of one is {found}"
    yield f"  {', '.join(record['files'])}"
    yield from _try(record)


def _try(record: Any) -> View:
    """Yield lines of Python that run what was written."""
    graph, parts = Path(record["out"]), record.get("graphs")
    adapters = [Path(file) for file in record["files"] if str(file).endswith(".onnx_adapter")]
    yield "in Python:"
    if parts:
        names = dict.fromkeys(path.name.removesuffix(".onnx_adapter").partition(".")[2] for path in adapters)
        yield f'  session = adapterkit.onnx.FolderSession("{graph}")'
        yield from (f'  session.load("{name}")' for name in names)
        which = f', adapter="{next(iter(names))}"' if names else ""
        if "encoder_model.onnx" in parts:
            yield f"  session.generate(inputs{which})  # inputs: {{name: array}} of the encoder"
        else:
            yield f'  session.run("{next(iter(parts))}", inputs{which})  # each graph by its name'
        return
    loaded = ", ".join(f'"{path.stem}": "{graph.parent / path.name}"' for path in adapters)
    yield f'  session = adapterkit.onnx.Session("{graph}"' + (f", {{{loaded}}})" if loaded else ")")
    which = f', adapter="{adapters[0].stem}"' if adapters else ""
    yield f"  session.generate(input_ids{which})  # a language model; others: session.run({{name: array}})"
