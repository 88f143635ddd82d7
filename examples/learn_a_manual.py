"""A pretrained model reads a manual, keeps what it learned, shows what has changed, and goes back.

python examples/learn_a_manual.py [MANUAL.txt] [--question "How do I ...?"] [--store memory]

Without a file it reads what `python -m pydoc argparse` prints. About 7,000 tokens, a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import pydoc
from collections.abc import Sequence
from pathlib import Path

from nestlearn import ContinualLearner
from nestlearn.convert import pull
from nestlearn.train.loading import load_model

QUESTION = "In Python's argparse, what does ArgumentParser.parse_known_args() return?"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("manual", nargs="?", type=Path, help="a text file")
    parser.add_argument("--question", default=QUESTION, help="asked before and after")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder of save_pretrained")
    parser.add_argument("--store", default="memory", help="where what is learned is kept")
    args = parser.parse_args(arguments)
    manual = args.manual.read_text() if args.manual else pydoc.plain(pydoc.render_doc(argparse))
    cut = manual.rfind("\n", 0, len(manual) * 9 // 10) + 1
    text, held_out = manual[:cut], manual[cut:]  # the last tenth is not read, it is measured on

    if args.model == "smollm2":
        pull("smollm2", report=print)
    learner = ContinualLearner(*load_model(args.model), store=args.store)

    def show(when: str) -> None:
        prompt = args.question + "\n"
        if learner.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": args.question}]
            prompt = learner.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = learner.generate(prompt, max_new_tokens=60, temperature=0)
        print(f"{when}: loss {learner.loss(held_out):.3f} on what is not read\n  {answer.strip()}\n", flush=True)

    before = learner.save()
    show("before")
    print(learner.read(text), end="\n\n", flush=True)
    after = learner.save()
    show("after")
    for level in learner.diff(before.id, after.id).levels:
        print(f"{level.name} moved by {100 * (level.relative or 0):.3f} % of its norm")
    learner.rollback(before.id)
    show("\nrolled back")
    print(f"to have it again: nestlearn memory rollback {args.store} {after.short}")


if __name__ == "__main__":
    main()
