"""The suite at its smoke scale: every experiment, its report, and what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.tasks.speed import EXPERIMENTS, SCALES, decoding, peers, report, run
from nestlearn.tasks.speed.model import HOPE, pair
from nestlearn.tasks.speed.plan import cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    return run([], "smoke", None, folder, workers=2)


def test_every_experiment_is_timed_and_reported(result: dict, folder: Path) -> None:
    assert list(result["experiments"]) == list(EXPERIMENTS)
    text = Path(result["report"]).read_text()
    for name, title in report.TITLES.items():
        assert f"## {title}\n" in text
        assert (
            json.loads((folder / f"{name}.json").read_text())["cells"].keys()
            == result["experiments"][name]["cells"].keys()
        )
    json.dumps(result, allow_nan=False)


def test_every_timing_has_its_noise_and_its_peer(result: dict) -> None:
    experiments = result["experiments"]
    for name in ("block", "one-token", "model", "prefill", "decode", "muon"):
        for cell in experiments[name]["cells"].values():
            (again,) = [row for row in cell["rows"] if row["name"].endswith(", again")]
            assert list(again["times_as_fast"]) == [again["name"].removesuffix(", again")]
            assert all(0 < row["best"] <= row["seconds"] for row in cell["rows"])
    (block,) = experiments["block"]["cells"].values()
    own = [row for row in block["rows"] if "of_product" in row]
    assert len(own) == 5
    assert all(row["of_product"] > 0 for row in own)
    assert set(own[0]["times_as_fast"]) == {
        row["name"] for row in block["rows"] if not row["name"].startswith("nestlearn")
    }
    assert block["not_run"].keys() | peers.installed().keys() == peers.PEERS.keys()
    (decode,) = experiments["decode"]["cells"].values()
    sizes = decode["state_bytes"]
    assert sizes["Hope, 64 tokens before"] == sizes["Hope, 256 tokens before"]
    assert sizes["Llama, SDPA, 64 tokens before"] < sizes["Llama, SDPA, 256 tokens before"]


def test_a_long_stream_has_a_state_of_one_size(result: dict) -> None:
    (stream,) = result["experiments"]["stream"]["cells"].values()
    points = stream["points"]
    assert points[-1]["tokens"] == 2000
    assert len({point["state_bytes"] for point in points}) == 1
    assert all(point["finite"] and point["largest"] < 100 for point in points)


def test_what_a_block_keeps_is_counted_once_and_grows_with_the_sequence(result: dict) -> None:
    kept = result["experiments"]["memory"]["cells"]["memory-kept"]
    assert kept["lengths"] == [32, 64]
    for row in kept["rows"]:
        short, long = row["bytes"]
        assert 32 * 16 * 4 < short < long < 4 * short  # the input itself at least
    linear = kept["rows"][1]
    assert linear["states"] == 64 * 2 * (3 * 8 + 2) * 8 * 4  # (3 w + 2, w) float32 of each of two heads


def test_a_finished_folder_is_reported_and_not_timed_again(result: dict, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("nestlearn.tasks.speed.timing.in_turns", None)
    again = run(["block", "muon"], "smoke", None, folder, workers=1)
    assert again["experiments"]["muon"]["cells"] == result["experiments"]["muon"]["cells"]
    with pytest.raises(UserError, match="give another folder"):
        run(["muon"], "cpu", None, folder, workers=1)


def test_a_peer_that_is_not_installed_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    assert peers.installed() == {}
    assert peers.not_run()["titans-pytorch"] == "not installed: pip install titans-pytorch==0.5.5"
    assert [cell.arguments["others"] for cell in cells("block", "smoke")] == [[]]


def test_a_mistake_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown experiment 'blok'; did you mean 'block'"):
        run(["blok"], "smoke", None, tmp_path, workers=1)
    with pytest.raises(UserError, match="unknown scale"):
        run([], "gpu", None, tmp_path, workers=1)


def test_every_scale_names_each_cell_once() -> None:
    for scale in SCALES:
        names = [cell.name for experiment in EXPERIMENTS for cell in cells(experiment, scale)]
        assert len(set(names)) == len(names)
    stream = cells("stream", "full")[0].arguments
    assert stream["tokens"] == 10_000_000
    for scale in SCALES:  # every round of decoding has as many ends of a chunk
        (decode,) = cells("decode", scale)
        assert decode.arguments["steps"] % decoding.pair(decode.arguments["size"])[HOPE].config.chunk_size == 0


@torch.no_grad()
def test_a_context_reached_in_pieces_is_the_context_read_at_once() -> None:
    model = pair("nano")[HOPE].eval()
    reached = decoding.reach(model, [20, 50], piece=7, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    counts = [7, 7, 6, 7, 7, 7, 7, 2]
    tokens = torch.cat([torch.randint(64, (1, count), generator=generator) for count in counts], dim=1)
    whole = model(input_ids=tokens, use_cache=True)
    ends = model(input_ids=torch.tensor([[3]]), past_key_values=whole.past_key_values, use_cache=True).logits
    ours = model(input_ids=torch.tensor([[3]]), past_key_values=reached[50], use_cache=True).logits
    torch.testing.assert_close(ours, ends, rtol=1e-4, atol=1e-5)
    assert reached[20].get_seq_length() == 20
