"""Export a model with adapters to ONNX.

MODEL is the folder of a transformers model. The graph of a causal language model takes the cache as inputs and returns
it as outputs. The cache contains keys and values, and the states of layers such as Mamba layers. The graph of an
encoder or a classifier takes the tokens as inputs. An encoder-decoder model is exported as the set of graphs that
optimum loads. A model that reads images is exported as the set of graphs that transformers.js loads. For any other
torch module, --model names a Python function that returns the module, and MODEL, if given, is the module's weight file.
The command writes the graph, the config and the tokenizer to DIR. With --mode slots, the command also writes an
.onnx_adapter file for each adapter. Unless --no-check is given, the command runs the graph and compares its outputs
with the outputs of the torch model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import _options
from ._graphs import checked, refuse
from ._render import View, counted, number, part, part_or_none, texts
from ._writing import is_done, made_from, refuse_place, show_written

ONLY_FOLDERS_OF_TRANSFORMERS = ("dtype", "share_weights")


@click.command(help=__doc__)
@click.argument("model", metavar="MODEL", required=False)
@click.option("-o", "--out", metavar="DIR", required=True, help="Folder to write.")
@click.option(
    "--model", "factory", metavar="MODULE:FUNCTION",
    help="Python function to call: it returns a torch module and a tuple of example inputs.",
)  # fmt: skip
@click.option("--adapter", "adapters", metavar="A", multiple=True, help="Adapter in any known format. Repeatable.")
@click.option(
    "--mode", type=click.Choice(["merged", "attached", "slots"]), default="merged", show_default=True,
    help="merged: add the adapters to the weights; attached: add the adapters as separate nodes; slots: make the "
    "adapters' tensors inputs of the graph, so that adapters can be exchanged at run time.",
)  # fmt: skip
@click.option(
    "--dtype", type=_options.ComputeType(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="Dtype in which the graph computes.",
)  # fmt: skip
@click.option(
    "--quantize", type=click.Choice(["int8", "int4"]),
    help="Quantize the linear layers with onnxruntime's quantizers; attached adapters and slots are not quantized.",
)  # fmt: skip
@click.option(
    "--share-weights", is_flag=True,
    help="Write the graph into the folder MODEL. The graph reads its weights from the safetensors files there, so no "
    "second copy is written.",
)  # fmt: skip
@click.option("--opset", type=int, metavar="N", help="Version of the ONNX operator set. Default: torch's choice.")
@_options.rename
@_options.compat
@_options.strict_base_of_read
@click.option("--check/--no-check", default=True, show_default=True, help="Run the graph and check its outputs.")
@_options.overwrite
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, model: str | None, out: str, factory: str | None, adapters: tuple[str, ...], mode: str,
    dtype: str, quantize: str | None, share_weights: bool, opset: int | None, check: bool, overwrite: bool,
    compat: str | None, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Run `adapterkit.onnx.export_pretrained`, or `adapterkit.onnx.export_factory`."""
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
        # The digest shows whether an earlier run already wrote this export. A model from --model gets no digest,
        # because it also depends on the user's code. An export with --share-weights does not save its digest, so there
        # is nothing to compare.
        decided = _decided_by(model, adapters)
        if is_done(ctx.obj, out, decided, overwrite):
            return
    if factory is not None:
        refuse(ctx, ONLY_FOLDERS_OF_TRANSFORMERS, "is only for the folder of a transformers model")
        report = export_factory(factory, out, weights=model, overwrite=overwrite, **options)
    elif model is None:
        raise click.UsageError("Missing argument 'MODEL' or option '--model'")
    else:
        report = export_pretrained(
            model, out, dtype=dtype, share_weights=share_weights, overwrite=overwrite, made_from=decided, **options
        )  # fmt: skip
    show_written(ctx.obj, {**report.record(), "mode": mode}, _view, decided)


def _decided_by(model: str, adapters: tuple[str, ...]) -> str | None:
    from importlib.util import find_spec

    from ..formats import files_read
    from ..io.locations import located
    from ..io.staging import files_below

    folder = located(model)
    if find_spec("transformers") is None or not folder.is_dir():
        return None  # The export will fail, so do not read all files to compute a digest.
    files = [file for file in files_below(folder) if file.is_file()]
    files += [file for adapter in adapters for file in files_read(located(adapter))]
    return made_from(files, ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"))


def _view(record: Mapping[str, object]) -> View:
    yield f"wrote {record['out']}: {record['mode']}; {checked(record)}"
    if damage := part_or_none(record, "damage"):
        errors = {name: number(part(damage, name), "error") for name in damage}
        worst = max(errors, key=lambda name: errors[name])
        worst_error = f"{errors[worst]:.2%} ({worst})"
        yield f"{counted(len(damage), 'weight')} quantized; the largest relative error of a weight is {worst_error}"
    yield f"  {', '.join(texts(record, 'files'))}"
    yield from _try(record)


def _try(record: Mapping[str, object]) -> View:
    """Yield the Python code that runs the exported graphs, line by line."""
    graph, graphs = Path(str(record["out"])), texts(record, "graphs") if record.get("graphs") else []
    adapters = [Path(file) for file in texts(record, "files") if file.endswith(".onnx_adapter")]
    yield "in Python:"
    if graphs:
        names = dict.fromkeys(path.name.removesuffix(".onnx_adapter").partition(".")[2] for path in adapters)
        yield f'  session = adapterkit.onnx.FolderSession("{graph}")'
        yield from (f'  session.load("{name}")' for name in names)
        which = f', adapter="{next(iter(names))}"' if names else ""
        if "encoder_model.onnx" in graphs:
            yield f"  session.generate(inputs{which})  # inputs: {{name: array}} for the encoder"
        else:
            yield f'  session.run("{graphs[0]}", inputs{which})  # the first argument is the graph to run'
        return
    loaded = ", ".join(f'"{path.stem}": "{graph.parent / path.name}"' for path in adapters)
    yield f'  session = adapterkit.onnx.Session("{graph}"' + (f", {{{loaded}}})" if loaded else ")")
    which = f', adapter="{adapters[0].stem}"' if adapters else ""
    yield f"  session.generate(input_ids{which})  # language models; other models: session.run({{name: array}})"
