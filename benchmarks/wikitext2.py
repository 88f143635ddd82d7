"""WikiText-2 at 5 M parameters: Hope and Hope-Attention beside Transformer++ with and without Hope's convolution.

Every model has the same parameters (within 2 %), tokens, order of the data and search: three learning rates with
seed 0, the best one on the validation set again with seeds 1 and 2. Figures are of the test set, read in fresh
windows of the training length and of four times it.

    python benchmarks/wikitext2.py run --data PATH_TO_WIKITEXT2     # resumable; --models runs a part of the cells
    python benchmarks/wikitext2.py table                            # the table in docs/results.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from nestlearn.data import load_corpus, load_tokenizer
from nestlearn.files import write_json
from nestlearn.train.baseline import matching_config
from nestlearn.train.evaluate import evaluate_text
from nestlearn.train.loading import load_model
from nestlearn.train.model import architecture, model_config, parameter_count
from nestlearn.train.recipe import BaselineRecipe, DataRecipe, ModelRecipe, Recipe, TrainRecipe
from nestlearn.train.run import train

LAYERS, LENGTH = 4, 512
RESULT = "wikitext2.json"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
HOPE = {
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "tie_word_embeddings": True,
}
ATTENTION = {**HOPE, "block_types": ["hope-attention"] * LAYERS}
MODELS: dict[str, dict[str, Any]] = {
    "Hope": HOPE,
    "Hope-Attention": ATTENTION,
    "Transformer++ with convolution": {**ATTENTION, "cms_chunk_sizes": [4096]},
    "Transformer++": {"kind": "transformer++"},
    "Hope, one CMS level": {**HOPE, "cms_chunk_sizes": [4096]},
    "Hope, static projections": {**HOPE, "inner_k": False, "inner_v": False, "inner_gates": False},
    "Hope, chunk 16": {**HOPE, "chunk_size": 16},
    "Hope, anchor reads, chunk 16": {**HOPE, "read": "anchor", "chunk_size": 16},
    "Hope, anchor reads": {**HOPE, "read": "anchor"},
    "Hope, retention toward zero": {**HOPE, "retention": "zero"},
    "Hope, full writes": {**HOPE, "write_scale": None},
    "Hope, no erasure": {**HOPE, "delta": False},
    "Hope, momentum": {**HOPE, "momentum": True},
    "Hope, MLP memories": {**HOPE, "memory_type": "mlp"},
}
SEARCHED = tuple(MODELS)[:4]
"""The models of the comparison; the others are ablations, run once with seed 0 at Hope's learning rate."""


def matched(name: str, tokenizer: Any) -> ModelRecipe:
    """The model called ``name`` with as many parameters as Hope."""
    hope = model_config(ModelRecipe("hope", HOPE), tokenizer, LENGTH)
    target = parameter_count(hope)
    if MODELS[name].get("kind") == "transformer++":
        return ModelRecipe("transformer++", architecture(matching_config(hope, target), "transformer++"))
    levels = len(MODELS[name].get("cms_chunk_sizes", hope.cms_chunk_sizes))

    def at(width: int) -> tuple[ModelRecipe, int]:
        recipe = ModelRecipe("hope", {**MODELS[name], "intermediate_size": width * levels})
        return recipe, parameter_count(model_config(recipe, tokenizer, LENGTH))

    one, two = at(1)[1], at(2)[1]
    recipe, count = at(round(1 + (target - one) / (two - one)))
    assert abs(count - target) <= 0.02 * target, (name, count, target)
    return recipe


def folder_of(name: str, rate: float, seed: int, args: argparse.Namespace) -> Path:
    return args.out / f"{name.replace(' ', '-').replace(',', '').replace('+', 'p')}_{rate:g}_{seed}"


def cell(name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one cell, or read what an earlier run measured."""
    folder = folder_of(name, rate, seed, args)
    done = folder / RESULT
    if done.is_file():
        return json.loads(done.read_text())
    corpus = load_corpus(str(args.data))
    spec = args.out / "tokenizer"
    if not (spec / "tokenizer.json").is_file():
        load_tokenizer("bpe:4096", corpus).save_pretrained(spec)
    tokenizer = load_tokenizer(str(spec), corpus)
    recipe = Recipe(
        seed=seed,
        data=DataRecipe(str(args.data), str(spec), LENGTH),
        model=matched(name, tokenizer),
        train=TrainRecipe(
            tokens=args.tokens,
            batch_size=4,
            learning_rate=rate,
            eval_every=100,
            eval_tokens=16_384,
            final_eval_tokens=100_000,
            save_every=100,
        ),
        baseline=BaselineRecipe("none"),
    )
    result = train(recipe, folder, resume=(folder / "run.toml").is_file())
    write_json(done, {**result["models"][0], "name": name, "learning_rate": rate, "seed": seed})
    return json.loads(done.read_text())


def measure(name: str, rate: float, seed: int, args: argparse.Namespace) -> None:
    """Add the test perplexities to a cell."""
    row = cell(name, rate, seed, args)
    if "test" in row:
        return
    folder = folder_of(name, rate, seed, args)
    model, tokenizer = load_model(str(folder))
    test = load_corpus(str(args.data)).test
    assert test is not None
    row["test"] = {
        str(context): evaluate_text(model, tokenizer, test, context_length=context, batch_size=8 * LENGTH // context)
        for context in (LENGTH, 4 * LENGTH)
    }
    write_json(folder / RESULT, row)


def best_rate(name: str, args: argparse.Namespace) -> float:
    """The learning rate with the lowest validation perplexity at seed 0."""
    searched = {rate: cell(name, rate, 0, args)["validation"]["perplexity"] for rate in LEARNING_RATES}
    return min(searched, key=lambda rate: searched[rate])


def run(args: argparse.Namespace) -> None:
    for name in args.models or MODELS:
        rate = best_rate(name if name in SEARCHED else "Hope", args)
        for seed in SEEDS if name in SEARCHED else (0,):
            measure(name, rate, seed, args)


def table(args: argparse.Namespace) -> None:
    cells = [json.loads(path.read_text()) for path in args.out.glob(f"*/{RESULT}")]
    print("| model | parameters | learning rate | test, 512 | test, 2048 | tokens/s | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        mine = [c for c in cells if c["name"] == name]
        if not any("test" in c for c in mine):
            print(f"| {name} | not run | | | | | |")
            continue
        rate = min((c for c in mine if c["seed"] == 0), key=lambda c: c["validation"]["perplexity"])["learning_rate"]
        final = [c for c in mine if c["learning_rate"] == rate and "test" in c]
        shown = [f"{final[0]['parameters']:,}", f"{rate:g}"]
        for context in (LENGTH, 4 * LENGTH):
            values = [c["test"][str(context)]["perplexity"] for c in final]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.1f}{spread}")
        shown.append(f"{statistics.median(c['tokens_per_second'] for c in final):,.0f}")
        print(f"| {name} | {' | '.join(shown)} | {len(final)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"), help="the three splits")
    parser.add_argument("--out", type=Path, default=Path("runs/wikitext2"), help="folder of the cells")
    parser.add_argument("--tokens", type=int, default=600_000, help="training tokens of each cell")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), help="only these")
    args = parser.parse_args()
    {"run": run, "table": table}[args.action](args)


if __name__ == "__main__":
    main()
