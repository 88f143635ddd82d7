"""The Hugging Face Trainer with checkpoints of our kind and a stop at the first number that is not finite.

Only the hooks that read and write files, or that see the loss, are overridden; the loop is the Trainer's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from nestlearn.data.corpus import RECIPE
from nestlearn.errors import UserError
from nestlearn.files import disk_errors
from nestlearn.nn import ContinuumLevel, continuum_periods
from nestlearn.optim import LevelwiseOptimizer
from nestlearn.train.checkpoint import commit, load_state, save_state
from nestlearn.train.evaluate import NotFinite
from nestlearn.train.optimizers import build
from nestlearn.train.recipe import Recipe, changes, dump, load_recipe
from nestlearn.train.sharding import part_of, parts_of_state, sharded, whole, whole_weights


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a recipe: AdamW fused, nothing reported anywhere, a batch shared by all processes.

    ``folder`` receives the checkpoints.
    """
    train = recipe.train
    gpu = torch.cuda.is_available()
    bf16 = train.precision == "bf16" or (train.precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=train.batch_size,  # of all processes together, as `split_batches` has it
        per_device_eval_batch_size=train.batch_size,
        accelerator_config={"split_batches": True},
        # There are none, see tests/contracts/test_block_types.py, but where a level learns along a sequence that is
        # shorter than its chunk: its own rate and value are not used.
        ddp_find_unused_parameters=recipe.model.options.get("cms_online") is not None,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        warmup_steps=math.ceil(train.warmup * recipe.steps),
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        weight_decay=train.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",  # 3.5 times faster than the plain loop on a CPU
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=bf16,
        use_cpu=not gpu,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # `training_step` stops at such a loss instead of hiding it
        eval_strategy="steps",
        eval_steps=train.eval_every,
        save_strategy="steps",
        save_steps=train.save_every,
        prediction_loss_only=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=True,  # the progress bar is a callback of ours
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never DataParallel: it would multiply the batch
    return arguments


class LanguageModelTrainer(Trainer):
    """``transformers.Trainer`` for a causal language model, resumable to the bit on a CPU.

    ``tokenizer`` is saved beside the weights; ``recipe`` and ``fingerprint``, which names the training data, are
    kept in every checkpoint, and resuming with others raises `UserError`. Raises `NotFinite` before a step that
    would spoil the weights, and before weights or a loss that are not finite are written.
    """

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, fingerprint: str, **kwargs: Any) -> None:
        model = kwargs["model"]
        use_cache = model.config.use_cache
        super().__init__(**kwargs)
        assert self.args.output_dir is not None
        self._folder = Path(self.args.output_dir)
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._fingerprint = fingerprint
        self._unlogged: tuple[torch.Tensor, int] | None = None  # of a checkpoint: the loss and step of `_tr_loss`
        self._use_cache = use_cache  # the Trainer turns it off while it trains
        self._sharded = sharded(model)
        if self._sharded and not hasattr(self, "is_distributed_loading_by_transformers"):
            raise UserError("train.sharded needs a transformers of 5.23 or newer: pip install -U transformers")
        # The Trainer's word for a model that is sharded already and is to be wrapped in nothing more.
        self.is_distributed_loading_by_transformers = self._sharded
        self._staging: Path | None = None

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """The gradients of a sharded model are reduced after each pass: whole ones would take the memory it lacks."""
        yield

    # The loss and the gradient

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss became {loss.item()}", self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise NotFinite(f"the gradient became {float(norm)}", self.state.global_step + 1)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_loss", "validation loss")):
            if not math.isfinite(logs.get(key, 0.0)):
                raise NotFinite(f"the {name} became {logs[key]}", self.state.global_step)
        super().log(logs, *args, **kwargs)

    # The optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight decay is for matrices: gains, biases and other vectors are left alone."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW is the Trainer's own; any other that the recipe names is built here, if none was handed over."""
        train, target = self._recipe.train, self.model if model is None else model
        assert target is not None
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if train.optimizer != "adamw":
            self.optimizer = build(train.optimizer, target, train.learning_rate, train.weight_decay)
        optimizer = super().create_optimizer(model)
        if train.levelwise and any(isinstance(module, ContinuumLevel) for module in target.modules()):
            periods = continuum_periods(target, self._recipe.tokens_per_step)
            self.optimizer = optimizer = LevelwiseOptimizer(optimizer, periods, error="mean")
        return optimizer

    # Saving: the Trainer writes into a folder that `commit` renames when all of it is on the disk

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        check_weights(model, self.state.global_step)

        def fill(folder: Path) -> None:
            # The Trainer makes `checkpoint-STEP` inside its output folder; its files belong one level up.
            self._staging = folder
            try:
                super(LanguageModelTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._staging = None
            for path in (folder / name).iterdir():
                path.rename(folder / path.name)
            (folder / name).rmdir()
            (folder / RECIPE).write_text(dump(self._recipe), encoding="utf-8")

        if self.is_world_process_zero():
            commit(self._folder, name, fill)
        else:  # what the processes do together, without a file
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        weights = whole_weights(model) if self._sharded else None
        if not self.args.should_save:
            return
        folder = self._folder if output_dir is None else Path(output_dir)
        export(model, self._tokenizer, folder, self._use_cache, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = {"optimizer": whole(self.optimizer.state_dict()), "scheduler": self.lr_scheduler.state_dict()}
        # The loss since the last line of the log, so that the line after a resume is a mean of all its steps.
        unlogged = (self.accelerator.reduce(self._tr_loss, "mean"), self._globalstep_last_logged)
        if self.args.should_save:
            save_state(Path(output_dir) / "optimizer", state | {"data": self._fingerprint, "unlogged": unlogged})

    def _save_rng_state(self, output_dir: str) -> None:
        state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state()}
        state["cpu"] = torch.random.get_rng_state()
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if self.args.should_save:  # the numbers of all processes are the same
            save_state(Path(output_dir) / "random", state)

    # Resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        assert model is not None
        self._check_origin(Path(resume_from_checkpoint))
        weights = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        shared = set(getattr(model, "all_tied_weights_keys", {}))  # saved once, under the other name
        own = model.state_dict()
        wrong = (set(own) - shared) ^ (set(weights) - shared)
        if wrong:
            raise UserError(f"{resume_from_checkpoint} holds another model: it differs in {sorted(wrong)[0]}")
        model.load_state_dict({name: part_of(value, own[name]) for name, value in weights.items()}, strict=False)

    def _check_origin(self, checkpoint: Path) -> None:
        """Raise `UserError` unless the checkpoint is of this recipe and this training data."""
        if (checkpoint / RECIPE).is_file():
            said = changes(self._recipe, load_recipe(checkpoint / RECIPE))
            if said:
                raise UserError(
                    f"the recipe of the run was changed since {checkpoint} ({said}): undo that in {RECIPE} "
                    "to resume, or start a new run in another folder"
                )
        if load_state(checkpoint / "optimizer")["data"] != self._fingerprint:
            raise UserError(
                f"the training data is not what {checkpoint} was trained on: restore it, or start a new run"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / "optimizer")
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.optimizer.load_state_dict(parts_of_state(state["optimizer"], self.optimizer))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._unlogged = state.get("unlogged")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._unlogged is not None:  # only here: the Trainer sets both to zero after the optimizer is loaded
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss = loss.to(self.args.device)
        state = load_state(Path(checkpoint) / "random")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.random.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Raise `NotFinite` if a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not torch.isfinite(here).all():
            raise NotFinite(f"the weights became NaN or infinite ({name})", step)


def export(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    use_cache: bool = True,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer, as ``from_pretrained`` reads them.

    ``weights``: in place of the model's own.
    """
    training = model.config.use_cache
    model.config.use_cache = use_cache
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # "Writing model shards" in the middle of our own bar
    try:
        with disk_errors():
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
    finally:
        model.config.use_cache = training
        if bars:
            hf_logging.enable_progress_bar()
