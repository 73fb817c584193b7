"""The index of all vectors: what each tests, what goes in, what comes out. Requirements are those of spec/README.md."""

from __future__ import annotations

import hashlib
import json
import struct
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from meeting import computed, meetings

INVALID = {
    "R-3.1": ["empty", "pickle", "cut_in_length", "cut_in_header", "length_*"],
    "R-3.2": [
        "header_mark",
        "header_utf8_*",
        "header_control",
        "header_form_feed",
        "header_comma",
        "header_comment",
        "header_single_quotes",
        "header_number_*",
        "header_array",
        "header_not_json",
        "header_not_utf8",
        "header_nul_padding",
        "header_text",
        "header_two_values",
    ],
    "R-3.3": ["entry_list", "entry_unknown_field", "dtype_missing"],
    "R-3.4": ["dtype_lowercase", "dtype_number", "dtype_unknown"],
    "R-3.5": [
        "shape_beyond_63_bits",
        "shape_exponent",
        "shape_bool",
        "shape_float",
        "shape_negative",
        "shape_number",
        "shape_text",
        "shape_too_many_axes",
        "shape_beyond_64_bits",
        "offsets_bool",
        "offsets_float",
        "offsets_negative",
        "offsets_three",
    ],
    "R-3.6": ["shape_disagrees", "shape_wraps_around", "shape_huge", "dtype_disagrees", "offsets_reversed"],
    "R-3.7": [
        "offsets_hole*",
        "offsets_overlap",
        "offsets_same*",
        "offsets_beyond_file",
        "cut_before_data",
        "cut_in_data",
        "trailing_bytes",
        "data_without_tensors",
    ],
    "R-3.8": ["metadata_list", "metadata_number", "metadata_object"],
    "R-3.9": ["record_missing", "metadata_null"],
    "R-4.1": [
        "entry_field_twice",
        "entry_field_for_another",
        "tensor_twice",
        "tensor_twice_by_an_escape",
        "metadata_twice",
        "record_key_twice",
    ],
    "R-4.2": ["index_nan", "record_nan", "record_infinity", "record_overflow", "shape_nan"],
    "R-4.3": ["index_half_surrogate", "config_half_surrogate", "header_half_surrogate", "record_half_surrogate"],
    "R-4.4": ["header_deep", "index_deep", "config_deep", "record_deep", "record_101_deep"],
    "R-6.1": ["record_mark", "record_control", "record_two_values", "record_empty", "record_not_json", "record_list"],
    "R-6.2": [
        "version_leading_zero",
        "version_major_alone",
        "version_minor_leading_zero",
        "version_missing",
        "version_number",
        "version_other_digits",
        "version_three_parts",
    ],
    "R-6.3": ["version_newer_major", "version_older_major"],
    "R-6.4": [
        "requires_null",
        "requires_number",
        "recipe_null",
        "recipe_args_list",
        "base_id_number",
        "extensions_null",
        "foreign_tensor_number",
        "foreign_data_null",
        "updates_null",
        "method_version_float",
        "method_version_exponent",
        "record_unknown_field",
        "updates_empty",
        "updates_missing",
        "updates_object",
        "update_unknown_field",
        "update_without_target",
        "target_text",
        "target_unknown_field",
        "path_missing",
        "path_number",
        "layout_null",
        "rows_float",
        "rows_negative",
        "rows_one",
        "rows_one_below_zero",
        "rows_three",
        "rows_three_below_zero",
        "unknown_field_newer",
        "method_empty",
        "method_number",
        "method_version_text",
        "method_version_zero",
        "tensor_name_number",
        "attributes_missing",
        "base_text",
        "base_unknown_field",
        "extensions_list",
        "foreign_without_format",
        "recipe_step_without_op",
        "requires_text",
    ],
    "R-6.5": ["requires_unknown"],
    "R-6.6": ["extensions_null_newer", "extensions_number_newer", "extensions_repeated_newer"],
    "R-7.1": ["method_dotted", "method_private", "method_unknown", "method_version_newer", "method_version_huge"],
    "R-7.2": ["attribute_unknown", "attribute_of_a_newer_version", "tensor_missing", "tensor_unknown_field"],
    "R-7.3": ["foreign_tensor_absent", "tensor_absent", "tensor_unreferenced"],
    "R-7.4": ["target_in_two_places"],
    "R-7.5": [
        "attribute_bool",
        "attribute_huge",
        "attribute_list",
        "attribute_null",
        "attribute_text",
        "attribute_word",
        "attribute_below",
        "attribute_above",
        "attribute_zero",
        "attribute_true",
        "attribute_fraction",
        "attribute_beyond_binary64",
    ],
    "R-7.6": [
        "path_empty",
        "path_empty_beside_context",
        "rows_of_the_model",
        "context_with_layout",
        "context_with_rows",
    ],
    "R-7.7": ["layout_unknown"],
    "R-7.8": ["rows_none", "rows_reversed"],
    "R-7.9": ["output_before_weight"],
    "R-8.1": [
        "quotient_of_none",
        "solved_at_last",
        "factor_one_axis",
        "factor_three_axes",
        "factors_disagree",
        "index_two_axes",
    ],
    "R-8.2": ["rows_huge", "rows_not_as_many_as_outputs", "updates_disagree", "updates_disagree_in_inputs"],
    "R-8.3": ["factor_bool", "factor_complex", "factor_integer", "index_bool", "index_float"],
    "R-8.4": ["experts_disagree", "layout_stacked_without_experts"],
    "R-9.1": ["dense_neither", "ia3_both", "ia3_neither", "oft_neither", "replacement_neither"],
    "R-9.3": ["rule_beyond_64_bits"],
    "R-9.2": ["rule_beyond_64_bits", "rule_of_blocks", "rule_of_fields", "rule_of_shapes", "rule_that_defines"],
    "R-10.1": ["nan_*", "infinity_*"],
    "R-10.2": ["index_beyond", "index_negative", "index_twice", "index_twice_in_an_expert", "pair_twice"],
    "R-12.1": [
        "two_files_one_hidden",
        "ending_in_capitals",
        "file_in_a_folder",
        "no_weights",
        "two_files_no_index",
        "index_and_whole",
    ],
    "R-12.2": [
        "index_list",
        "index_metadata_list",
        "index_map_empty",
        "index_map_numbers",
        "index_not_json",
        "index_without_map",
        "index_key_twice",
        "index_mark",
        "index_half_surrogate",
        "index_nan",
    ],
    "R-12.3": [
        "index_absolute",
        "index_backslash",
        "index_climbs",
        "index_climbs_inside",
        "index_drive",
        "index_file_url",
        "index_name_empty",
        "index_nul",
        "index_url",
        "index_part_empty",
        "index_part_dot",
        "index_part_long",
    ],
    "R-12.4": [
        "index_shards_swapped",
        "index_tensor_absent",
        "index_tensor_twice",
        "index_tensor_unlisted",
        "shard_missing",
        "shard_malformed",
        "index_folders_swapped",
    ],
    "R-12.5": ["config_*"],
    "R-13.2": ["two_faults_*"],
    "R-15.1": ["length_huge", "shape_huge", "shape_wraps_around"],
}
"""Requirement -> the invalid cases, or patterns of them, that break it."""

PROVENANCE = "made by tools/vectors, from formulas in float64 of their own"
EVERY_ERROR = ["R-13.1", "R-13.3"]
"""Requirements that every invalid case tests: the class of the error, and its place."""


def index(spec: Path, version: str) -> bytes:
    """The content of vectors/index.json, for what lies under `spec`."""
    cases = [
        *_methods(spec),
        *_invalid(spec),
        *_canonical(spec),
        *_merges(spec),
        *_computed(spec),
        *_migrations(spec),
        *_valid(spec),
        *_folders(spec),
    ]
    head = {"version": version, "licence": "Apache-2.0", "cases": sorted(cases, key=lambda case: str(case["case"]))}
    return (json.dumps(head, indent=1, ensure_ascii=False) + "\n").encode()


def requirements_of(name: str) -> list[str]:
    """The requirements that an invalid case breaks."""
    return [rule for rule, names in INVALID.items() if any(fnmatchcase(name, pattern) for pattern in names)]


def _methods(spec: Path) -> Iterator[dict[str, Any]]:
    for adapter in sorted((spec / "vectors" / "methods").glob("*.adapter.safetensors")):
        name = adapter.name.removesuffix(".adapter.safetensors")
        expected = adapter.with_name(f"{name}.expected.safetensors")
        kinds = {_kind(spec, update["method"]) for update in _record(adapter)["updates"]}
        conformance_class = "merger" if kinds <= {"additive", "weight"} else "runtime"
        files, tolerance = [adapter, expected], {"tolerance": 1e-12}
        rules = ["R-10.3", *(["R-10.10"] if name in ("bottleneck", "compacter") else [])]
        yield _case(spec, f"methods/{name}", conformance_class, "compute", rules, files, tolerance)
        yield _case(spec, f"digest/{name}", "reader", "check", ["R-11.1"], [adapter], {"digest": _digest(spec, name)})


def _record(adapter: Path) -> dict[str, Any]:
    data = adapter.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    record: dict[str, Any] = json.loads(header["__metadata__"]["adapterkit"])
    return record


def _kind(spec: Path, method: str) -> str:
    return str(tomllib.loads((spec / "methods" / f"{method}.toml").read_text("utf-8"))["kind"])


def _digest(spec: Path, name: str) -> str:
    return str(json.loads((spec / "vectors" / "digests.json").read_text("utf-8"))[name])


def _invalid(spec: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((spec / "vectors" / "invalid").glob("*.json")):
        said = json.loads(file.read_text("utf-8"))
        folder = file.with_suffix("")
        inputs = (
            sorted(p for p in folder.rglob("*") if p.is_file())
            if folder.is_dir()
            else [file.with_suffix(".safetensors")]
        )
        verb = "base" if said["opens"] == "base" else "check"
        reads = "validator" if said["stage"] == "values" else "reader"
        expected = {key: said[key] for key in ("error", "where", "stage", "exact") if key in said}
        rules = [*requirements_of(file.stem), *EVERY_ERROR]
        case = _case(
            spec, f"invalid/{file.stem}", "base reader" if verb == "base" else reads, verb, rules, inputs, expected
        )
        yield {**case, "path": (folder if folder.is_dir() else inputs[0]).relative_to(spec / "vectors").as_posix()}


def _canonical(spec: Path) -> Iterator[dict[str, Any]]:
    yield _case(spec, "canonical", "writer", "canonical", ["R-4.5"], [spec / "vectors" / "canonical.json"], {})
    yield _case(spec, "rules", "reader", "rules", ["R-9.3"], [spec / "vectors" / "rules.json"], {})


def _merges(spec: Path) -> Iterator[dict[str, Any]]:
    refused = {name: (["R-10.4"], "Malformed", "q.weight") for name in ("beyond_bf16", "norm_of_zero")}
    done = {name: ["R-10.4"] for name in ("lora", "rows")}
    for each in meetings():
        if each.merged is None:
            refused[each.name] = [*each.rules], each.error, each.where
        else:
            done[each.name] = [*each.rules]
    folder = spec / "vectors" / "merges"
    for name, rules in done.items():
        parts = [folder / f"{name}.{part}.safetensors" for part in ("adapter", "base", "merged")]
        yield _case(spec, f"merges/{name}", "merger", "merge", rules, parts, {})
    for name, (rules, error, where) in refused.items():
        parts = [folder / f"{name}.{part}.safetensors" for part in ("adapter", "base")]
        expected = {"error": error, "where": where}
        yield _case(spec, f"merges/{name}", "merger", "merge", [*rules, *EVERY_ERROR], parts, expected)


def _computed(spec: Path) -> Iterator[dict[str, Any]]:
    for each in computed():
        parts = [spec / "vectors" / "computed" / f"{each.name}.{part}.safetensors" for part in ("adapter", "expected")]
        expected = {"error": each.error, "where": each.where} if each.error else {"tolerance": 1e-12}
        rules = [*each.rules, *(EVERY_ERROR if each.error else ())]
        yield _case(spec, f"computed/{each.name}", "runtime", "compute", rules, parts, expected)


def _migrations(spec: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((spec / "vectors" / "migrations").glob("*.safetensors")):
        name = file.name.removesuffix(".safetensors")
        expected = {"digest": _digest(spec, f"migrations/{name.rpartition('.1.')[0]}")}
        yield _case(spec, f"migrations/{name}", "reader", "check", ["R-14.1", "R-11.1"], [file], expected)


def _valid(spec: Path) -> Iterator[dict[str, Any]]:
    rules = {
        "deep": ["R-4.4"],
        "sixty_four_deep": ["R-4.4"],
        "foreign_tensor": ["R-7.3"],
        "integer_scaling": ["R-7.5", "R-11.1"],
        "newer_minor": ["R-6.6"],
        "oldest_version": ["R-6.7"],
        "code_points": ["R-11.1"],
        "no_elements": ["R-3.5", "R-8.1", "R-15.1"],
        "targets_of_one_path": ["R-7.4", "R-7.9"],
        "older_version": ["R-6.7"],
        "addresses": ["R-15.2"],
        "given_numbers": ["R-11.1"],
        "equal_names": ["R-11.1", "R-7.4"],
        "negative_zero": ["R-7.5", "R-11.1"],
        "positions_beyond_53_bits": ["R-10.2"],
        "pairs_beyond_53_bits": ["R-10.2"],
        "context_beside_weight": ["R-7.9"],
        "nearest_digits": ["R-4.5", "R-11.1"],
        "white_space": ["R-3.2", "R-6.1"],
        "other_metadata": ["R-3.9"],
        "nulls": ["R-6.4", "R-11.1"],
        "empty_name": ["R-7.3"],
        "one_tensor_twice": ["R-7.3"],
        "foreign_of_any_bytes": ["R-10.1"],
        "unaligned": ["R-3.7"],
        "minus_zero_in_a_header": ["R-3.5"],
        "long_integers": ["R-7.5", "R-11.1"],
        "scaling_that_underflows": ["R-4.2", "R-11.1"],
        "experts_with_the_same_positions": ["R-10.2"],
    }
    for file in sorted((spec / "vectors" / "valid").glob("*.safetensors")):
        expected = {"digest": _digest(spec, file.stem)}
        yield _case(spec, f"valid/{file.stem}", "reader", "check", rules[file.stem], [file], expected)


def _folders(spec: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((spec / "vectors" / "folders").iterdir()):
        names = ("a.weight", "b.weight") if folder.name.startswith("indexed") else ("a.weight",)
        # A base may be one file: then section 3 alone is for it.
        rules = ["R-3.9"] if folder.is_file() else ["R-12.5"] if "config" in folder.name else ["R-12.1", "R-12.4"]
        expected = {"tensors": {name: ["F32", [2, 2]] for name in names}}
        files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        case = _case(
            spec, f"folders/{folder.name.removesuffix('.safetensors')}", "base reader", "base", rules, files, expected
        )
        yield {**case, "path": folder.relative_to(spec / "vectors").as_posix()}


def _case(
    spec: Path, name: str, conformance_class: str, verb: str, requirements: list[str], inputs: list[Path],
    expected: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    hashes = {
        path.relative_to(spec / "vectors").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs
    }
    oldest = tomllib.loads((spec / "1.0" / "manifest.toml").read_text("utf-8"))
    version = oldest["version"] if hashes.keys() <= oldest["vectors"].keys() else "1.1"
    return {
        "case": name, "class": conformance_class, "version": version, "verb": verb, "requirements": requirements,
        "methods": _methods_of(inputs), "inputs": hashes, "expected": expected, "provenance": PROVENANCE,
    }  # fmt: skip


def _methods_of(inputs: list[Path]) -> list[str]:
    """The methods of an adapter, as far as its record can be read; a program that lacks one may refuse the case."""
    try:
        updates = _record(inputs[0])["updates"]
        return sorted({update["method"] for update in updates if isinstance(update["method"], str)})
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError, MemoryError):
        return []
