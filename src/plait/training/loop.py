"""Hugging Face's Trainer with Plait's optimiser groups, rules, losses, data order and checkpoints.

Imported only when training starts (it pulls in transformers). What is overridden, and why:

    create_optimizer        the rules' groups; every rule's hooks ride on callbacks
    training_step           routers find the padding mask and the step in the model's context, also
                            when gradient checkpointing runs a block again in backward
    compute_loss            adds what rules and routers ask for
    evaluate                mean over tokens, not over batches
    _save_checkpoint        the adapter instead of the base, in a folder that appears complete
    _load_...               the adapter was rebuilt (with its grown ranks) before the optimiser was
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from plait.adapter import Adapter, Rule, RuleStack, routing
from plait.rules._base_weights import base_parameters
from plait.training import checkpoint
from plait.training.data import IGNORE, LengthGroupedSampler
from plait.training.head import labelled_positions
from plait.training.recipe import Recipe


class PlaitTrainer(Trainer):
    """One run of a recipe on a model whose adapter is attached and active (or that has none)."""

    stack: RuleStack
    model: Any

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        total_steps: int,
        adapter: Adapter | None,
        rules: Sequence[Rule],
        train: Sequence[Any],
        evaluation: Sequence[Any] | None,
        collator: Any,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.recipe, self.adapter, self.rules = recipe, adapter, list(rules)
        self.tokens = torch.zeros((), dtype=torch.long)
        self.extra = torch.zeros(())
        super().__init__(
            model=model,
            args=training_arguments(recipe, total_steps, evaluation is not None),
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=collator,
            callbacks=[RuleHooks(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.args._n_gpu = min(1, self.args.n_gpu)  # DataParallel replicates what adapters rely on

    # -- optimiser and rules ----------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.stack = RuleStack(
                self.model,
                self.rules,
                lr=self.recipe.lr,
                weight_decay=self.recipe.weight_decay,
                total_steps=self.args.max_steps,
                seed=self.recipe.seed,
                validation=self._validation(),
            )
            self.optimizer = self.stack.optimizer
        return self.optimizer

    def _validation(self) -> HeldOut | None:
        rows: Any = self.eval_dataset
        if rows is None:
            return None
        size = self.args.per_device_train_batch_size
        return HeldOut(rows, size, self.data_collator, self.args.device)

    # -- one step ---------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        mask = padding_mask(inputs)
        seen = inputs["input_ids"].numel() if mask is None else mask.sum()
        self.tokens = self.tokens.to(self.args.device) + seen
        with self._routing(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if model.training and not return_outputs:
            inputs = labelled_positions(self.model, inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        extra = self.stack.extra_loss() if model.training else None
        if isinstance(extra, Tensor):
            # Where the model divides its loss by the tokens of all micro-batches, the Trainer
            # no longer divides by their number.
            shares = self.current_gradient_accumulation_steps
            scaled = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            loss = loss + extra / (shares if scaled else 1)
            self.extra = self.extra.to(extra.device) + extra.detach() / shares
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's count walks over all parameters at every step

    # -- data -------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset
        size = self.args.per_device_train_batch_size * self.args.world_size
        self.sampler = LengthGroupedSampler([len(r) for r in rows], size, self.recipe.seed)
        return self.sampler

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """{"eval_loss"}: cross-entropy per trained token of the evaluation data."""
        was, size = self.model.training, self.args.per_device_eval_batch_size
        self.model.eval()
        # Every process takes its own rows; a sampler that evens batches out would count some twice.
        rows: Any = self.eval_dataset
        mine = rows[self.args.process_index :: self.args.world_size]
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(mine), size):
            batch = self._prepare_inputs(self.data_collator(mine[start : start + size]))
            count = int((batch["labels"][:, 1:] != IGNORE).sum())
            with self._routing(batch):
                loss = float(self.compute_loss(self.model, batch)) if count else 0.0
            total += torch.tensor([loss * count, count], dtype=torch.float64)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        self.model.train(was)
        metrics = {"eval_loss": float(total[0] / total[1].clamp_min(1))}
        self.log(dict(metrics))
        return metrics

    def _routing(self, inputs: Any) -> AbstractContextManager[None]:
        """What routers need beside x, for one batch."""
        if self.adapter is None:
            return nullcontext()
        mask = padding_mask(inputs)
        return routing(self.model, attention_mask=mask, step=self.state.global_step)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.recipe.output)
        with checkpoint.staging(output, self.state.global_step, self.args.should_save) as work:
            self.save_weights(work)
            self._save_optimizer_and_scheduler(str(work))
            self._save_scaler(str(work))
            self._save_rng_state(str(work))
            if self.args.should_save:
                torch.save(self.stack.state_dict(), work / checkpoint.RULES)
                self.state.save_to_json(str(work / "trainer_state.json"))
        if self.args.should_save:
            checkpoint.rotate(output, self.recipe.keep_checkpoints)

    def save_weights(self, folder: Path) -> None:
        """The adapter, or the base weights that train."""
        if not self.args.should_save:
            return
        if self.adapter is not None:
            self.adapter.save(folder / checkpoint.ADAPTER)
        if self.adapter is None:
            save_file(trained_weights(self.model), folder / checkpoint.WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapter is None:
            load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            self._load_rules(Path(folder))

    def _load_rules(self, folder: Path) -> None:
        saved = torch.load(folder / checkpoint.RULES, map_location="cpu", weights_only=True)
        self.stack.load_state_dict(saved)

    def take_up(self, folder: Path) -> None:
        """Stand where training ended: for a run that was killed after its last checkpoint."""
        self._load_from_checkpoint(str(folder))
        self.args.max_steps = self.state.max_steps = checkpoint.step_of(folder)
        self.state.global_step = self.state.max_steps
        self.create_optimizer()
        self._load_rules(folder)
        self.stack.finish()


def padding_mask(inputs: Any) -> Tensor | None:
    """The mask [batch, length] of real tokens; None for packed rows (hardly any padding)."""
    mask = inputs.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else None


class HeldOut(Sequence[Any]):
    """The evaluation rows in batches, made when they are asked for."""

    def __init__(self, rows: Any, size: int, collate: Any, device: torch.device) -> None:
        self.rows, self.size, self.collate, self.device = rows, size, collate, device

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = [self.rows[i] for i in range(len(self.rows))[index * self.size :][: self.size]]
        return {name: value.to(self.device) for name, value in self.collate(chosen).items()}


class RuleHooks(TrainerCallback):
    """The rules' hooks at the Trainer's points of time, and the sampler's epoch."""

    def __init__(self, trainer: PlaitTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate's wrappers do not always hand the epoch on to a sampler of ours.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stack.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stack.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stack.finish()


def training_arguments(recipe: Recipe, total_steps: int, evaluates: bool) -> TrainingArguments:
    """The Trainer's view of a recipe."""
    every = recipe.save_every or max(1, total_steps // 10)
    timed = evaluates and recipe.eval_every is not None
    return TrainingArguments(
        output_dir=recipe.output,
        max_steps=total_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_steps(total_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every,
        eval_strategy="steps" if timed else "no",
        eval_steps=recipe.eval_every if timed else None,
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        log_level="warning",
    )


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every base weight by path; full and sampled training may have moved any of them."""
    return {n: p.detach().cpu().contiguous() for n, p in base_parameters(model).items()}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy trained base weights back in."""
    mine = base_parameters(model)
    with torch.no_grad():
        for name, value in load_file(folder / checkpoint.WEIGHTS).items():
            mine[name].copy_(value)
