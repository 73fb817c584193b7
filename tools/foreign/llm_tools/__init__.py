"""One module a tool: `write(folder, base, case)` lets it save an adapter, `merged(folder, base)` load one and fold it.

`base` maps the names of a small Llama to float32 arrays; what is folded comes back under the same names. `CASES` names
the adapters to save. `FILE` is what lies in the folder and is to be read.
"""
