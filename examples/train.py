"""Train an adapter in a loop of your own, write it for PEFT, and merge it."""

import torch
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.demo.model import TASKS, build, held_out

model = build(load_file("base/model.safetensors"))
adapter = ak.torch.create(model, "lora", targets="*.q_proj", rank=4)
handle = ak.torch.inject(model, adapter, trainable=True)

images, labels = TASKS["rotated"](*held_out())
optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0]

ak.write(handle.adapter(), "trained", format="peft")
ak.merge("base", "trained", "trained-merged")
assert ak.verify("trained-merged", "base", "trained").ok
