"""The plots of whole, one-point, resumed, broken and expert-free runs; their content through matplotlib's artists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ase_dist.training.record.metrics import Recorder, read_metrics
from ase_dist.training.record.plots import (
    draw_all,
    draw_heatmap,
    draw_losses,
    draw_metrics,
    draw_shared_gate,
    draw_task_weights,
)
from ase_dist.training.record.records import Records
from ase_dist.training.record.run_folder import RunFolder

pytestmark = pytest.mark.single_gpu

TASKS = ["semseg", "edge"]
RUN: dict[str, Any] = {"kind": "run", "step": 0, "tasks": TASKS, "data": "scenes", "shared_experts": [3]}
LAYERS, EXPERTS = 3, 4


def train_record(step: int, *, experts: bool = True) -> dict[str, Any]:
    record: dict[str, Any] = {"loss": 3.0 / (step + 1), "losses": {"semseg": 1.0 + step, "edge": 2.0}}
    if experts:
        load = np.full((LAYERS, len(TASKS), EXPERTS), step / 100)
        record |= {"expert_load": load, "mean_gates": load / 2, "shared_gate": load[..., -1] / 2}
    return record


def write_run(folder: Path, steps: range, *, experts: bool = True, evals: bool = True) -> None:
    recorder = Recorder(RunFolder(folder).metrics, enabled=True)
    recorder.write("run", step=steps.start, values={key: RUN[key] for key in ("tasks", "data", "shared_experts")})
    for step in steps:
        recorder.write("train", step=step, values=train_record(step, experts=experts))
    if evals:
        metrics = {"semseg": {"miou": 20.0, "acc": 1.0}, "edge": {"bce": 0.2}}
        recorder.write("eval", step=steps[-1], values={"metrics": metrics, "trivial": {"semseg": {"miou": 9.0}}})
    recorder.close()


def test_the_weights_of_the_losses_are_drawn_where_they_are_balanced(tmp_path: Path) -> None:
    recorder = Recorder(RunFolder(tmp_path).metrics, enabled=True)
    recorder.write("run", step=0, values={key: RUN[key] for key in ("tasks", "data", "shared_experts")})
    for step in (1, 2, 3):
        weights = {"semseg": 0.1 * step, "edge": -0.2 * step}
        recorder.write("train", step=step, values={**train_record(step, experts=False), "task_weights": weights})
    recorder.close()
    figure = draw_task_weights(Records(read_metrics(RunFolder(tmp_path).metrics)))
    assert figure is not None
    curves = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert [*curves.values()] == [pytest.approx([0.1, 0.2, 0.3]), pytest.approx([-0.2, -0.4, -0.6])]
    assert len(curves) == 2 and "task_weights.png" in {path.name for path in draw_all(RunFolder(tmp_path))}


HEATMAPS = ["expert_heatmap_edge.png", "expert_heatmap_semseg.png"]


@pytest.mark.parametrize(
    ("steps", "experts", "evals", "expected"),
    [
        (range(1, 8), True, True, [*HEATMAPS, "losses.png", "metrics.png", "shared_gate.png"]),
        (range(1, 2), True, True, [*HEATMAPS, "losses.png", "metrics.png", "shared_gate.png"]),
        (range(1, 4), False, True, ["losses.png", "metrics.png"]),
        (range(1, 4), False, False, ["losses.png"]),
    ],
    ids=["whole", "one point", "no experts", "never evaluated"],
)
def test_what_was_recorded_is_drawn(
    tmp_path: Path, steps: range, experts: bool, evals: bool, expected: list[str]
) -> None:
    write_run(tmp_path, steps, experts=experts, evals=evals)
    written = draw_all(RunFolder(tmp_path))
    assert sorted(path.name for path in written) == expected
    assert sorted(path.name for path in (tmp_path / "plots").glob("*.png")) == expected
    for path in written:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.min() < 100 and pixels.max() == 255  # ink on paper
        assert max(pixels.shape) < 2400


def test_a_resumed_run_is_drawn_over_both_of_its_parts(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 6))
    recorder = Recorder(RunFolder(tmp_path).metrics, enabled=True)
    recorder.truncate_after(3)
    recorder.close()
    write_run(tmp_path, range(4, 9))
    assert len(draw_all(RunFolder(tmp_path))) == 5


def test_a_run_without_a_line_draws_nothing(tmp_path: Path) -> None:
    assert draw_all(RunFolder(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def line_data(ax: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in ax.get_lines()]


def test_losses_show_the_sum_and_each_task() -> None:
    records = [{"kind": "train", "step": step, **train_record(step)} for step in (1, 2, 3)]
    figure = draw_losses(Records([RUN, *records]))
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes] == ["Weighted sum", "Semantic segmentation", "Edges"]
    assert line_data(figure.axes[1])[0] == ([1, 2, 3], [2, 3, 4])


def test_a_loss_that_was_not_finite_leaves_a_gap() -> None:
    records = [{"kind": "train", "step": step, "loss": None if step == 2 else 1.0} for step in (1, 2, 3)]
    figure = draw_losses(Records([RUN, *records]))
    assert figure is not None
    raw, smooth = (values for _, values in line_data(figure.axes[0]))
    assert np.isnan(raw).tolist() == [False, True, False] == np.isnan(smooth).tolist()


def test_metrics_show_the_table_s_metric_and_the_trivial_predictor() -> None:
    evals = [
        {"kind": "eval", "step": 0, "metrics": {"semseg": {"acc": 1.0, "miou": 5.0}, "odd": {"x": 1.0}},
         "trivial": {"semseg": {"miou": 9.0}}},
        {"kind": "eval", "step": 10, "metrics": {"semseg": {"acc": 1.0, "miou": 25.0}, "odd": {"x": 2.0}}},
    ]  # fmt: skip
    figure = draw_metrics(Records([RUN, *evals]))
    assert figure is not None
    semseg, odd = figure.axes[:2]
    trivial, curve = semseg.get_lines()
    assert trivial.get_linestyle() == "--" and set(trivial.get_ydata()) == {9.0}
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0, 10], [5, 25])
    assert semseg.get_ylabel() == "mIoU % (higher is better)"
    assert line_data(odd) == [([0, 10], [1, 2])]  # of no trivial predictor, and of no table


def test_heat_maps_are_the_first_the_middle_and_the_last_record() -> None:
    records = [{"kind": "train", "step": step, **train_record(step)} for step in (10, 20, 30, 40, 50)]
    figure = draw_heatmap(Records([RUN, *records]), task=1)
    assert figure is not None
    maps = [ax for ax in figure.axes if ax.get_images() and ax.get_xticklabels()[-1].get_text() == "S"]
    assert [ax.get_title() for ax in maps[:3]] == ["step 10", "step 30", "step 50"]
    shown = [np.asarray(ax.get_images()[0].get_array()) for ax in maps]
    assert [image.shape for image in shown] == [(LAYERS, EXPERTS)] * 6
    assert [float(image[0, 0]) for image in shown] == pytest.approx([0.1, 0.3, 0.5, 0.05, 0.15, 0.25])


def test_shared_gates_have_a_line_per_layer_and_their_mean() -> None:
    gates = np.array([[[0.8, 0.1]], [[0.4, 0.3]]])  # [records, layers, tasks]
    gates = np.concatenate([gates, gates / 2], axis=1)
    records = [{"kind": "train", "step": 5 * i, "shared_gate": value.tolist()} for i, value in enumerate(gates)]
    figure = draw_shared_gate(Records([RUN, *records]))
    assert figure is not None
    first, second, mean = line_data(figure.axes[0])
    assert (first, second) == (([0, 5], [0.8, 0.4]), ([0, 5], [0.4, 0.2]))
    assert mean[1] == pytest.approx([0.6, 0.3])
    assert all(figure.axes[i].get_ylim()[1] > 0.8 for i in (0, 1))
