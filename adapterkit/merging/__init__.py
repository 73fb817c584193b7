"""Merge adapters into the weights of a base, block by block; merges can be resumed and verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.arguments import checks_types, weights_of
from ..errors import PASS_AN_ADAPTER, Unsupported, UsageError, places_errors, shown, storage_error
from ..io.checkpoint import Checkpoint, opened
from ..io.locations import is_address, is_remote, local, located, outgoing, path_text, placing, ranged, streamed
from ..io.staging import Staging, check_free, is_within
from ..naming.renames import rule_texts
from .options import options_of
from .staging_dir import SUFFIX

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.licence_terms import Licence
    from ..io.resolving import PlacedOutput, StreamedBase
    from ..ops.resizing import Cut
    from .companions import Companions
    from .execute import Progress
    from .options import MergeOptions
    from .planned import Plan
    from .report import Report
    from .verification import Verification

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]

__all__ = ["merge", "plan", "remainder", "verify"]


@checks_types
@places_errors
def plan(
    base: Base,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
    tied: str | Mapping[str, str] | None = None,
    allow_partial: bool = False,
    quantized: str | None = None,
    onto: Base | None = None,
    seed: int | None = None,
    memory: int | None = None,
    link: bool = False,
    rename: str | Sequence[str] = (),
    tokenizer: str | PathLike[str] | None = None,
    strict_base: bool = False,
    strict_licence: bool = False,
    vocab: str | None = None,
    keep: str | None = None,
    calibration: str | PathLike[str] | None = None,
    options: MergeOptions | None = None,
) -> Plan:
    """Return the plan of a merge. The plan is made from file headers, and nothing is written.

    `plan(...).record()` returns the plan as plain data. The arguments have the same meaning as for `merge`.

    Raises:
        AdapterkitError: the inputs cannot be merged. `merge` refuses such inputs before it writes anything.
    """
    from .planning import make_plan

    # The import does not change the argument `quantized`, although pyright reports an assignment to it.
    from .quantized import as_merged, unneeded  # pyright: ignore[reportAssignmentType]
    from .requantize import uncalibrated

    adapters = _several(adapters)
    chosen = options_of(
        options, dtype=dtype, shard_size=shard_size, tied=tied, allow_partial=allow_partial, seed=seed, memory=memory,
        link=link, rename=rename, vocab=vocab, keep=keep, calibration=calibration,
    )  # fmt: skip
    checkpoint = as_merged(opened(base), quantized, onto, chosen.dtype, chosen.keep, chosen.calibration)
    named = _named(adapters, weights, checkpoint)
    planned = make_plan(checkpoint, named, chosen)
    warnings = (*unneeded(checkpoint, quantized), *uncalibrated(planned), *planned.warnings)
    planned = replace(planned, warnings=warnings)
    return _accompanied(planned, named, _folders(adapters), None, tokenizer, strict_base, strict_licence)


@checks_types
@places_errors
def merge(
    base: Base,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    shard_size: int | None = None,
    engine: str = "local",
    address: str | None = None,
    progress: Progress | None = None,
    tied: str | Mapping[str, str] | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    quantized: str | None = None,
    onto: Base | None = None,
    seed: int | None = None,
    memory: int | None = None,
    link: bool = False,
    stream: bool = False,
    checksums: bool = False,
    rename: str | Sequence[str] = (),
    tokenizer: str | PathLike[str] | None = None,
    strict_base: bool = False,
    strict_licence: bool = False,
    vocab: str | None = None,
    keep: str | None = None,
    calibration: str | PathLike[str] | None = None,
    options: MergeOptions | None = None,
) -> Report:
    """Merge adapters into a base: `W' = W + sum_i weight_i * (f_i(W) - W)`.

    Each element is rounded from float64 to the dtype of the output. The output becomes visible only when it is
    complete. To resume an interrupted merge, call the function again with the same arguments; the output then has the
    same bytes as without the interruption.

    Args:
        base: a folder of weights, one weight file, the uri of a base on a hub, or an open checkpoint.
        adapters: one adapter or a list of adapters, each given as a path, a uri or an `Adapter`.
        out: the folder to write, which must be empty or not exist; a `.safetensors` path if the base is one file; or
            an address on a hub, such as `oci://registry/name:tag`, to which the complete output is pushed.
        weights: one factor per adapter; default: 1.
        device: `auto` (CUDA if available), `cpu`, `cuda:N` or any torch device. With several devices, such as
            `cuda:0,cuda:1`, each output file is computed on the next device of the list. The code for torch devices
            was tested only with torch's CPU device, not on a GPU.
        dtype: the dtype to which all floating-point tensors are cast; default: the base's dtypes.
        shard_size: the largest size of an output file in bytes; default: split the weights into the base's files.
        engine: `local` runs the merge in threads of this process. `ray` runs one task per output file on a Ray cluster.
            A task uses the credentials of its node to download inputs from hubs and, if `out` is on a hub, to upload
            its file. Local inputs and outputs must have the same paths on all nodes.
        address: the address of the Ray cluster; default: the cluster to which this process is connected, or else a new
            local cluster.
        progress: a function that is called with (bytes done, total bytes) in the calling thread.
        tied: which layers an update changes if the base ties its head to its embedding. Default: the layers that the
            adapter's training tool changed. PEFT applies updates of token rows to both layers. It applies any other
            update only to the layer that the update names, unless the adapter's config sets `ensure_weight_tying`.
            `untie`: every update changes the layers that PEFT changes without `ensure_weight_tying`, and the head is
            written as a separate tensor. `merge`: every update changes both layers. Each kind of update may have its
            own choice, given as `rows=untie,embedding=merge` or as a mapping. The kinds are `rows` (token rows),
            `replacement` (PEFT's `modules_to_save`), `embedding` (other updates of the embedding) and `head` (other
            updates of the head).
        allow_partial: whether to skip targets that the base does not have, instead of refusing the adapter.
        overwrite: whether to replace an existing output at `out`.
        quantized: how to merge into a quantized base. `dequantize`: merge into the dequantized weights, and write
            16-bit weights. `requantize`: merge into the dequantized weights, and quantize the result in the base's
            scheme. `original`: merge into the 16-bit weights that you pass as `onto`.
        onto: only with `original`: the 16-bit weights from which the quantized base was made.
        keep: only with `requantize`. `adapter` adjusts the merged weights before they are rounded, so that rounding
            does not lose the adapters' effect on the inputs to which the adapters respond. The merge takes about ten
            times as long as without `keep`. Each weight that is adjusted must fit into memory as a whole.
        calibration: only with `keep`: a file of activations from `adapterkit.gating.calibrate`. The weights are then
            rounded so that the layers' outputs for these activations hardly change. Rounding errors count more in the
            input directions to which the adapters respond. This preserves far more of the adapters' effect than `keep`
            alone. To find this rounding, the merge quantizes each weight up to 200 times.
        seed: the seed of stochastic rounding; default: round to nearest, without random numbers. Each random number
            depends only on the seed, the tensor's name and the element's index.
        memory: the largest amount of memory to use, in bytes, not counting the memory of the imported libraries;
            default: half of the free memory.
        link: whether to write hard links to unchanged files of the base instead of copies. Never modify such an output
            in place, because that modifies the base.
        tokenizer: the source of the tokenizer (vocabulary, added tokens and chat template): `base`, `adapter` or a
            folder. By default, the base's tokenizer is copied, with one exception. If the adapter's folder has a
            complete tokenizer that differs from the base's, and the base has an embedding for each of its tokens, the
            adapter's tokenizer is copied, and the report contains a warning.
        strict_base: whether to refuse a base whose name, config or fingerprint differs from what an adapter records.
            If False, the report contains a warning instead.
        strict_licence: whether to refuse a merge if the licences of base and adapters contradict each other, or if a
            model card has no known licence. If False, the report only warns about contradictions.
        vocab: what to do if an adapter was trained with more tokens than the base's embedding has rows. `grow`: add
            rows to the embedding and the head, and change the config. A new row that is in no adapter's file becomes
            the mean of the base's rows. `keep`: drop the added tokens. Default: `grow` if the adapters' files
            contain all new rows; otherwise the merge is refused.
        checksums: whether to compute sha256 checksums of the bytes while they are written, so that `verify` can check
            the output without the base. This makes the merge slower.
        rename: rules for target names that cannot be resolved. Each rule is `FROM=TO`; both sides are dotted names or
            prefixes, with `{n}` and other placeholders for numbers. `@FILE` reads rules from a file, one per line. For
            each target, the first rule that matches the target's name is used; each rule must match at least one target
            of an adapter. `family:NAME` states the `model_type` of a base that has no config and whose tensor names and
            shapes fit two families. `rows:by_head` or `rows:by_part` states how a sharded MiniMax-H3 orders the rows of
            its fused query, key and value weights. `in_out:GLOB` or `out_in:GLOB` states the layout of square weights.
        stream: for a base on a hub: whether to download one weight file at a time, verify it, and delete it after use.
        options: a `MergeOptions` with several of these arguments. If you pass it, do not pass any argument that is an
            attribute of `MergeOptions`.

    Raises:
        TargetNotFound, ShapeMismatch: an adapter does not fit the base, or was trained with more tokens than the base
            has (see `vocab`).
        NotMergeable: an adapter's method changes outputs or the context, not weights.
        Unsupported: the base cannot be streamed; or the base is quantized and `quantized` is not given.
        CheckFailed: with `strict_base`, the base differs from the base that an adapter records; with `strict_licence`,
            licences contradict each other or are unknown.
        UsageError: arguments contradict each other, or it is unknown which layers an update of a tied weight changes
            (see `tied`).
        Malformed: a factor contains a NaN or an infinity, or a merged weight overflows the dtype of the output.
        StorageError: the disk is full, writing is not permitted, or `out` exists.
    """
    _check_engine(engine, address, stream)
    # List the adapters once, because an iterator has them only once.
    adapters = _several(adapters)
    chosen = options_of(
        options, dtype=dtype, shard_size=shard_size, tied=tied, allow_partial=allow_partial, seed=seed, memory=memory,
        link=link, checksums=checksums, rename=rename, vocab=vocab, keep=keep, calibration=calibration,
    )  # fmt: skip
    run = partial(
        _merged, base, adapters, weights=weights, device=str(device), engine=engine, address=address, progress=progress,
        quantized=quantized, onto=onto, stream=stream, tokenizer=tokenizer, strict_base=strict_base,
        strict_licence=strict_licence, chosen=chosen,
    )  # fmt: skip
    if not is_address(out):
        # The report names the output as the caller did, not by the resolved path at which it is written.
        target = Path(path_text(out))
        return replace(run(target, overwrite=overwrite), out=target)
    same: list[bool] = []
    unchanged = partial(same.append, True)
    if engine == "ray":
        with placing(out, overwrite=overwrite, unchanged=unchanged) as place:
            report = run(place.path, overwrite=True, place=place)
    else:
        with outgoing(out, overwrite=overwrite, unchanged=unchanged) as there:
            report = run(there, overwrite=True)
    return replace(report, out=str(out), already=bool(same))


def _merged(
    base: Base, adapters: Source | Sequence[Source], target: Path, *, weights: Sequence[float] | None, device: str,
    engine: str, address: str | None, progress: Progress | None, overwrite: bool, quantized: str | None,
    onto: Base | None, stream: bool, tokenizer: str | PathLike[str] | None, strict_base: bool, strict_licence: bool,
    chosen: MergeOptions, place: PlacedOutput | None = None,
) -> Report:  # fmt: skip
    """Merge into a local folder or file.

    If `place` is not None, the tasks of a cluster upload the weight files to a hub instead.
    """
    with ExitStack() as stack:
        checkpoint, shards, uri = stack.enter_context(_opened_base(base, target, stream, engine))
        if engine == "ray" and onto is not None and not isinstance(onto, Checkpoint) and is_remote(onto):
            beside = stack.enter_context(ranged(onto))
            onto, onto_uri = opened(beside.path), beside.uri
        else:
            onto_uri = None
        _check_target(target, checkpoint, adapters, onto, overwrite)
        from .planning import make_plan
        from .quantized import Original, as_merged, unneeded  # pyright: ignore[reportAssignmentType] - as in `plan`
        from .report import local, run_plan
        from .requantize import uncalibrated

        read = as_merged(checkpoint, quantized, onto, chosen.dtype, chosen.keep, chosen.calibration)
        named = _named(adapters, weights, read)
        started = time.perf_counter()
        from ..io.checkpoint import fingerprint, shapes_digest

        stored = read if isinstance(read, Original) else checkpoint
        # Do not compute the fingerprint of a base that is not on disk, because the fingerprint needs bytes of
        # every weight. With `original`, compute the fingerprint of the 16-bit weights, because the adapters are merged
        # into these weights.
        elsewhere = stream or (onto_uri if isinstance(read, Original) else uri) is not None
        taken = None if elsewhere else fingerprint(stored)
        planned = make_plan(read, named, chosen)
        warnings = (*unneeded(checkpoint, quantized), *uncalibrated(planned), *planned.warnings)
        planned = replace(planned, shapes=shapes_digest(stored), warnings=warnings)
        planned = _accompanied(planned, named, _folders(adapters), taken, tokenizer, strict_base, strict_licence)
        if engine == "ray":
            from .cluster import on_ray, recipe_of

            recipe = recipe_of(
                uri or checkpoint, quantized, onto_uri or onto, _several(adapters), chosen, device,
                placed=place is not None,
            )  # fmt: skip
            used = on_ray(recipe, named, address, place)
        elif shards is not None:
            from .execute import streamed_engine

            used = streamed_engine(device, shards)
        else:
            used = local(device)
        return run_plan(planned, target, used, progress, started, overwrite, placed=place is not None)


@checks_types
@places_errors
def verify(
    merged: Base,
    base: Base | None = None,
    adapters: Source | Sequence[Source] = (),
    *,
    weights: Sequence[float] | None = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
    seed: int | None = None,
    sample: int | None = None,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
    calibration: str | PathLike[str] | None = None,
) -> Verification:
    """Recompute a merge, and compare every element with the files on disk.

    If no base is given, compare the files with the checksums in the merge's record instead. Nothing is written.

    Args:
        merged: the output of a merge. If no base is given, `adapterkit.merge` must have written the output, with
            `checksums=True`; otherwise any tool may have written it.
        base: the base of the merge; after `quantized="original"`, the 16-bit weights that were passed as `onto`.
        adapters: the adapters.
        weights: one factor per adapter; default: 1.
        allow_partial: as in `merge`.
        progress: a function that is called with (bytes done, total bytes).
        seed: as in `merge`.
        sample: the number of changed tensors to draw at random and compare. The same number of unchanged tensors is
            also drawn and compared. Default: compare all tensors.
        rename: as in `merge`.
        calibration: the file of activations that the merge used for rounding, if any.
        strict_base: whether to refuse a base whose name, config or fingerprint differs from what an adapter records.
            If False, the result contains a warning instead.

    Returns:
        The number of compared tensors, and all differences; a difference raises no error. If the merge's record or an
        adapter contains the fingerprint of another base, the result reports this, too.

    Raises:
        UsageError: adapters or a sample are given without a base; or no base is given, and the output has no recorded
            checksums.
        CheckFailed: `strict_base` is set, and the base differs from the base that an adapter records.
        AdapterkitError: an input cannot be read, or the inputs do not fit together.
    """
    if base is None:
        from .verification import check_written

        if adapters or sample is not None:
            cure = "Pass --base BASE (base=); to compare checksums, omit --adapter (adapters=) and --sample (sample=)"
            raise UsageError("adapters or a sample are given, but the base is missing", cure=cure)
        return check_written(merged, progress)
    from ..naming.binding.fitting import check_base
    from .quantized import as_read
    from .verification import compare, compare_bases

    merged_model, given = opened(merged), opened(base)
    checkpoint = as_read(given, merged_model, calibration)
    named = _named(adapters, weights, checkpoint)
    warnings = check_base([(name, adapter) for name, adapter, _ in named], given, strict_base)
    differing = compare_bases(merged_model, given, named)
    compared = compare(
        merged_model, checkpoint, named, allow_partial, progress, seed, sample, differing, rule_texts(rename)
    )
    return replace(compared, warnings=warnings)


@places_errors
def remainder(
    merged: Base,
    base: Base,
    adapters: Source | Sequence[Source],
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    allow_partial: bool = False,
    rename: str | Sequence[str] = (),
    dtype: str | None = None,
    report: Callable[[Cut], object] | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Return a LoRA that restores what quantization lost in a merge; use the LoRA together with the quantized model.

    For each weight that the adapters change, the LoRA approximates the difference between the exact merged weight and
    the stored, quantized weight. The LoRA is the best approximation of the given rank in the Frobenius norm. At any
    time, one weight per processor is in memory, in float32.

    Args:
        merged: the output of `merge` with `quantized="requantize"`.
        base: the quantized base of the merge.
        adapters: the adapters.
        rank: the rank of the result.
        weights: one factor per adapter, as in the merge.
        allow_partial: as in `merge`.
        rename: as in `merge`.
        dtype: the dtype of the factors; default: float32.
        report: a function that is called with a `Cut` for each weight. `Cut.norm` is the norm of the quantization
            error, and `Cut.error` is the norm of the error that remains if the LoRA is used.
        progress: a function that is called with (bytes done, total bytes).

    Returns:
        A LoRA whose base is `merged`.

    Raises:
        UsageError: `merged` or `base` is not quantized, no adapter changes a quantized weight, or the rank is out of
            range.
        AdapterkitError: an input cannot be read, or the inputs do not fit together.

    Example:
        >>> adapterkit.merge("base-nf4", "lora", "merged", quantized="requantize")  # doctest: +SKIP
        >>> lost = adapterkit.merging.remainder("merged", "base-nf4", "lora", rank=8)  # doctest: +SKIP
        >>> adapterkit.write(lost, "remainder", format="peft")  # doctest: +SKIP
    """
    from ..quant import dequantized, is_quantized
    from .rounding_loss import remainder_of

    merged_model, given = opened(merged), opened(base)
    for each in (merged_model, given):
        if not is_quantized(each):
            cure = (
                "Pass the output of a merge with --quantized requantize (quantized='requantize'), and the quantized "
                "base of this merge"
            )
            raise UsageError("the weights are not quantized, so nothing was rounded", path=each.root, cure=cure)
    read = dequantized(given)
    return remainder_of(
        merged_model, read, _named(adapters, weights, read), rank, allow_partial=allow_partial,
        rename=rule_texts(rename), dtype=dtype, report=report, progress=progress,
    )  # fmt: skip


def _check_engine(engine: str, address: str | None, stream: bool) -> None:
    if engine not in ("local", "ray"):
        raise Unsupported(f"unknown engine {engine!r}", cure="Choose --engine local or --engine ray (engine=)")
    if address is not None and engine != "ray":
        cure = "Choose --engine ray (engine='ray'), or omit --address (address=)"
        raise UsageError("the address of a cluster is given, but the engine is not ray", cure=cure)
    if stream and engine == "ray":
        raise UsageError(
            "--stream does not work with --engine ray, because each task downloads only the bytes that it needs",
            cure="Omit --stream (stream=), or choose --engine local (engine='local')",
        )


@contextmanager
def _opened_base(
    base: Base, out: Path, stream: bool, engine: str
) -> Iterator[tuple[Checkpoint, StreamedBase | None, str | None]]:
    """Yield (the open base, the `StreamedBase` if the base is streamed, the uri that the tasks of a cluster read).

    The second and the third value may be None.
    """
    if engine == "ray" and not isinstance(base, Checkpoint) and is_remote(base):
        with ranged(base, whole=True) as local_base:
            yield opened(local_base.path), None, local_base.uri
        return
    if not stream:
        yield opened(base), None, None
        return
    if isinstance(base, Checkpoint):
        raise UsageError(
            "an open checkpoint cannot be streamed", cure="Pass the base's uri, or omit --stream (stream=)"
        )
    with streamed(base, out) as shards:
        yield opened(shards.path), shards, None


def _named(
    adapters: Source | Sequence[Source], weights: Sequence[float] | None, checkpoint: Checkpoint
) -> list[tuple[str, Adapter, float]]:
    from ..core.adapter import Adapter
    from ..formats import read

    several = _several(adapters)
    if not several:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    factors = weights_of(weights, len(several))
    return [
        (a.__class__.__name__, a, w) if isinstance(a, Adapter) else (Path(a).name, read(a, base=checkpoint), w)
        for a, w in zip(several, factors, strict=True)
    ]


def _folders(adapters: Source | Sequence[Source]) -> list[Path | None]:
    """Return the local folder of each adapter, or None for an adapter that has no local folder.

    For an `Adapter` object, return the folder of the file from which its tensors were read, if the folder contains an
    `adapter_config.json`.
    """
    from ..core.adapter import Adapter
    from ..io.lazy import Lazy

    folders = []
    for each in _several(adapters):
        if not isinstance(each, Adapter):
            path = located(each)
            folders.append(path if path.is_dir() else None)
            continue
        leaves = (leaf for _, update in each for leaf in update.tensors.values())
        spans = (leaf.span for leaf in leaves if isinstance(leaf, Lazy))
        folder = next((Path(span.path).parent for span in spans if span is not None), None)
        folders.append(folder if folder is not None and (folder / "adapter_config.json").is_file() else None)
    return folders


def _files_read(adapters: Iterable[object]) -> list[Path]:
    """Return the files from which the tensors of `Adapter` objects are still to be read."""
    from ..core.adapter import Adapter
    from ..io.lazy import Lazy

    updates = (update for each in adapters if isinstance(each, Adapter) for _, update in each)
    leaves = (leaf for update in updates for leaf in update.tensors.values() if isinstance(leaf, Lazy))
    return [Path(path) for path in dict.fromkeys(leaf.span.path for leaf in leaves if leaf.span is not None)]


def _accompanied(
    planned: Plan, named: list[tuple[str, Adapter, float]], folders: list[Path | None], fingerprint: str | None,
    tokenizer: str | PathLike[str] | None, strict_base: bool, strict_licence: bool,
) -> Plan:  # fmt: skip
    """Add the companion files, the base's fingerprint and all warnings to the plan."""
    from ..core.licence_terms import BASE, check_licences, conflicts
    from ..formats import warnings_of
    from ..naming.binding.fitting import check_bases
    from .companions import companions

    known = [(name, folder) for (name, _, _), folder in zip(named, folders, strict=True) if folder is not None]
    beside = companions(planned.base, known, tokenizer)
    if planned.vocabulary is not None and planned.vocabulary.get("rows"):
        beside = replace(beside, warnings=(*beside.warnings, *_unnamed_tokens(planned, beside)))
    licences = _licences(planned, named, folders)
    adapter_warnings = (f"{name}: {warning}" for name, adapter, _ in named for warning in warnings_of(adapter))
    bases = check_bases([(name, adapter) for name, adapter, _ in named], planned.base, fingerprint, strict_base)
    against = conflicts([*licences.items()])
    if strict_licence:
        parts = [(name, licences.get(name, {})) for name in (BASE, *(name for name, _, _ in named))]
        check_licences(parts, against, planned.base.root)
    told_of = (f"licences: {each}" for each in against)
    warnings = (*adapter_warnings, *bases, *_coarse(planned), *planned.warnings, *beside.warnings, *told_of)
    return replace(planned, companions=beside, fingerprint=fingerprint, licences=licences, warnings=warnings)


def _coarse(planned: Plan) -> Iterator[str]:
    """Yield a warning if merged weights are rounded to an 8-bit float without a scale, which loses small changes."""
    kinds = [
        output.dtype
        for output in planned.outputs()
        if output.folds and output.part is None and output.dtype.itemsize == 1
    ]
    for kind in dict.fromkeys(kinds):
        bits = {"F8_E4M3": 3, "F8_E5M2": 2}.get(kind.name)
        if bits is not None:
            yield (
                f"{kinds.count(kind)} merged weights are rounded to {kind.name}, whose mantissa has {bits} bits: "
                f"changes below 1/{2 ** (bits + 2)} of a weight are lost; to keep smaller changes, write "
                "a wider dtype with --dtype bfloat16 (dtype='bfloat16')"
            )


def _licences(
    planned: Plan, named: list[tuple[str, Adapter, float]], folders: list[Path | None]
) -> dict[str, Licence]:  # fmt: skip
    """Return the known licences of the base and the adapters, keyed by the names that messages use."""
    from ..core.licence_terms import BASE, licence_at, licence_called
    from ..core.metadata import metadata_of

    places = {BASE: planned.base.root}
    places |= {name: folder for (name, _, _), folder in zip(named, folders, strict=True) if folder is not None}
    licences = {name: licence_at(place) for name, place in places.items()}
    # If an adapter's folder has no known licence, use the licence in the metadata of the adapter's file. Adapters of
    # image models state their licence there.
    stated = {name: metadata_of(adapter).get("modelspec.license", "") for name, adapter, _ in named}
    licences |= {name: licence_called(text) for name, text in stated.items() if text and not licences.get(name)}
    return {name: licence for name, licence in licences.items() if licence}


def _unnamed_tokens(planned: Plan, beside: Companions) -> Iterator[str]:
    """Yield warnings about what the user must change by hand if the vocabulary grows."""
    if not planned.base.root.is_dir():
        yield (
            "the base is one file, so no config is written: "
            f"set vocab_size to {(planned.vocabulary or {})['rows']} in the config yourself"
        )
    elif (beside.tokenizer or {}).get("from") != "adapter":
        yield (
            "the base's tokenizer is kept, but it may lack the added tokens; "
            'to copy another tokenizer, pass --tokenizer DIR (tokenizer="DIR")'
        )


def _several(adapters: Source | Sequence[Source]) -> list[Source]:
    from ..core.adapter import Adapter

    single = isinstance(adapters, (str, PathLike, Adapter))
    if not single and not isinstance(adapters, Iterable):
        cure = "Pass an Adapter, the path of an adapter, or a list of Adapters and paths"
        raise UsageError(f"{shown(adapters)} of type {type(adapters).__name__} is not an adapter or a list", cure=cure)
    several: list[Source] = [adapters] if single else list(adapters)  # type: ignore[list-item, arg-type]
    for each in several:
        if not isinstance(each, (str, PathLike, Adapter)):
            cure = "Pass each adapter as an Adapter or as its path"
            raise UsageError(f"{shown(each)} of type {type(each).__name__} is not an adapter", cure=cure)
    return several


_OF_FILES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".zip", ".tar", ".gz"}
"""File extensions. If the base is a folder, a new output path with one of these extensions is refused.

The user probably expects a file there, but the output of such a merge is a folder.
"""


def _check_target(out: Path, base: Checkpoint, adapters: object, onto: Base | None, overwrite: bool) -> None:
    listed = adapters if isinstance(adapters, (list, tuple)) else [adapters]
    others = [*listed, onto.root if isinstance(onto, Checkpoint) else onto]
    paths = [base.root, *(local(a) for a in others if isinstance(a, (str, PathLike))), *_files_read(listed)]
    try:
        overlapped = next((path for path in paths if is_within(out, path) or is_within(path, out)), None)
    except OSError as error:
        raise storage_error(error, error.filename or out) from error
    except RuntimeError as error:
        raise UsageError(f"the path cannot be resolved ({error})", path=out, cure="Check the path") from error
    if base.root.is_dir() and out.suffix.lower() in _OF_FILES and not out.is_dir():
        why = f"the base is a folder, so the output must be a folder, too, but {out.suffix} is a file extension"
        raise UsageError(why, path=out, cure=f"Name a folder, such as {out.with_suffix('')}")
    if overlapped is not None:
        why = f"the output overlaps the input {overlapped}: they are the same path, or one contains the other"
        raise UsageError(why, path=out, cure="Write to another folder")
    stage = Staging(out, SUFFIX)
    # Do not refuse an existing output yet, because an earlier run of this merge may have written it. `run_plan` later
    # compares the output's digest with the plan's.
    check_free(out, overwrite or stage.folder.is_dir() or stage.has_record())
