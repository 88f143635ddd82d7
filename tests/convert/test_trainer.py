"""A converted model in transformers' Trainer: trained as its base where something asks for a gradient, else refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from nestlearn.convert import convert
from nestlearn.errors import UserError
from tests.convert.models import make, tokens
from tests.convert.test_model import moved


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", ["everything", "adapters"])
def test_the_trainer_trains_what_asks_for_a_gradient_as_in_the_base(
    trained: str, smoothing: float, tmp_path: Path
) -> None:
    """With the columns of a data set that the base would get, shifted labels and the count of all of them."""
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")
    rows = [row.tolist() for row in tokens(8)]
    data = datasets.Dataset.from_list([{"input_ids": row, "labels": row, "text": "left out"} for row in rows])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        label_smoothing_factor=smoothing, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    found = []
    for model in (convert(make()), make()):
        if trained == "everything":
            model.requires_grad_(True)
        else:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        found.append((trainer.state.log_history[-1]["train_loss"], [p.detach() for p in model.parameters()]))
    (ours, mine), (theirs, expected) = found
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_a_training_step_of_the_trainer_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    converted, x = convert(make()), tokens(4)
    data = [{"input_ids": row, "labels": row} for row in x]
    trainer = Trainer(
        converted, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), train_dataset=data, eval_dataset=data
    )
    with pytest.raises(UserError, match="nothing here can be trained"):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(converted(x, labels=x).loss.item())
    count = torch.tensor(1)
    with converted.train().using(moved(converted)):  # a loop of one's own over learned weights
        converted(x, labels=x, num_items_in_batch=count).loss.backward()
