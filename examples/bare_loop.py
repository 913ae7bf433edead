"""Train an adapter without any trainer: five lines of loop, rules included.

python examples/bare_loop.py data/home_en/train.jsonl
"""

import sys

import torch

import plait
from plait.training.bases import load_base
from plait.training.data import Collator, encode_all, read_jsonl

model, tokenizer = load_base("smollm2-135m")
plait.attach(model, "lora", rank=8, targets="all-linear", name="home", seed=0)
rows = encode_all(read_jsonl(sys.argv[1]), tokenizer, max_length=256)
collate = Collator(tokenizer.pad_token_id)

run = plait.RuleStack(model, ["lora-plus"], lr=5e-4, total_steps=20)
model.train()
for step in range(20):
    batch = collate([rows[i] for i in torch.randint(len(rows), (8,)).tolist()])
    loss = model(**batch).loss + run.extra_loss()
    loss.backward()
    run.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")
plait.adapters(model)["home"].save("out/bare-loop")
