"""The same run twice: through `plait.training`, and with nothing but RuleStack and torch."""

from __future__ import annotations

import torch
from tiny_run import make_base, make_tokenizer, rows
from transformers import get_scheduler

import plait
from plait.rules._base_weights import base_parameters
from plait.training.data import Collator, encode_all, length_grouped_order, read_examples
from plait.training.dryrun import make_rules
from plait.training.trainer import train


def run(recipe, **more):
    given = {"model": make_base(), "tokenizer": make_tokenizer(), "data": rows(), "quiet": True}
    return train(recipe, **{**given, **more})


def bare_loop(recipe):
    """The same run with nothing but RuleStack, torch and a scheduler."""
    model, tokenizer = make_base(), make_tokenizer()
    data = encode_all(read_examples(rows()), tokenizer, recipe.max_length, recipe.template).items
    collate = Collator(0, max_length=recipe.max_length)
    if recipe.method != "none":
        first = [collate([d]) for d in data[:4]]
        needs = plait.get_method(recipe.method).initializer
        plait.attach(
            model,
            recipe.method,
            seed=recipe.seed,
            data=first if needs is not None and needs().needs else None,
            **recipe.options,
        )
    held_out = encode_all(
        read_examples(rows(6, 1)), tokenizer, recipe.max_length, recipe.template
    ).items
    size = recipe.batch_size
    stack = plait.RuleStack(
        model,
        make_rules(recipe),
        lr=recipe.lr,
        total_steps=recipe.steps,
        seed=recipe.seed,
        validation=[collate(held_out[s : s + size]) for s in range(0, len(held_out), size)],
    )
    warmup = recipe.warmup_steps(recipe.steps)
    schedule = get_scheduler(recipe.scheduler, stack.optimizer, warmup, recipe.steps)
    model.train()
    accumulate, losses, epoch = recipe.gradient_accumulation, [], 0
    while True:
        order = length_grouped_order([len(d) for d in data], size, recipe.seed, epoch)
        groups = [order[s : s + size] for s in range(0, len(order), size)]
        batches = [collate([data[i] for i in g]) for g in groups]
        for s in range(0, len(batches), accumulate):
            micro = batches[s : s + accumulate]
            tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
            total = 0.0
            for b in micro:
                share = int((b["labels"][:, 1:] != -100).sum()) / tokens
                loss = model(**b).loss * share + stack.extra_loss() / len(micro)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            stack.step()
            schedule.step()
            losses.append(total)
            if len(losses) == recipe.steps:
                stack.finish()
                return model, losses
        epoch += 1


def weights(model) -> dict[str, torch.Tensor]:
    state = plait.adapters(model)
    return state["default"].state_dict() if state else dict(base_parameters(model))
