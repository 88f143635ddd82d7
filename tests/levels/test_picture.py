"""The picture: what it shows is legible, nothing lies on anything else."""

from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from nestlearn.errors import UserError
from nestlearn.levels import describe
from nestlearn.levels.describe.picture import make_figure
from nestlearn.optim import M3, LevelwiseOptimizer, matrix_groups, periods_of
from tests.levels.models import Oddity, OddSGD, hope, llama, residual_net


def trained(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters())


def of_levels() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = hope(cms_online="local", cms_variant="nested", momentum=True, cms_chunk_sizes=[8, 64, 512])
    inner = M3(matrix_groups(model), lr=0.02)
    return model, LevelwiseOptimizer(inner, periods_of(model, {"model.layers.0.memory": 8}))


CASES = {
    "residual net": lambda: trained(residual_net()),
    "llama": lambda: trained(llama(3)),
    "hope": of_levels,
    "hope without an optimizer": lambda: (hope(), None),
    "unknown": lambda: (odd := Oddity(), OddSGD(odd.parameters())),
    "nothing": lambda: (nn.ReLU(), None),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_is_cut_or_overlaps_another(case: str) -> None:
    figure = make_figure(describe(*CASES[case]()))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    renderer = canvas.get_renderer()
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts if t.get_text()]
    edge = figure.bbox
    for text, box in found:
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, text  # noqa: PT018
    for i, (text, box) in enumerate(found):
        for other, area in found[:i]:
            overlap_x = min(box.x1, area.x1) - max(box.x0, area.x0)
            overlap_y = min(box.y1, area.y1) - max(box.y0, area.y0)
            assert not (overlap_x > 1 and overlap_y > 3), (text, other)  # pixels; lines of a box may touch
    frames = [patch.get_window_extent(renderer) for patch in axes.patches]
    for text, box in found:
        inside = [f for f in frames if f.x0 <= box.x0 + 1 and f.y0 - 2 <= (box.y0 + box.y1) / 2 <= f.y1 + 2]
        holding = [f for f in inside if box.x0 < f.x1]
        assert all(box.x1 <= f.x1 + 1 for f in holding), text  # what begins in a frame ends in it


def test_it_names_levels_and_transfers() -> None:
    figure = make_figure(describe(*of_levels()))
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert {"level 0", "level 1", "initialisation", "outer loss L", "update", "gradients"} <= texts


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found = describe(nn.Linear(2, 2))
    found.draw(tmp_path / "levels.png")
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
    found.draw(str(tmp_path / "levels.svg"))
    with pytest.raises(UserError, match=r"cannot draw to .*levels\.pgn, whose ending is '\.pgn'; did you mean 'png'"):
        found.draw(tmp_path / "levels.pgn")
    with pytest.raises(UserError, match="whose ending is ''"):
        found.draw(tmp_path / "levels")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["levels.png", "levels.svg"]
