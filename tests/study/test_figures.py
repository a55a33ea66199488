"""What the plots of a study show: panels, lines and their colours."""

import pytest
from matplotlib.figure import Figure

from ase_dist.study import figures

pytestmark = pytest.mark.single_gpu


def variant(name, *, gate=None, cosine=None):
    measured = {}
    if gate is not None:
        by_step = [[gate], [gate]]
        curve = [gate, gate]
        measured["shared_gate"] = {
            "steps": [1, 2], "gate": by_step, "by_task": {"semseg": curve, "edge": curve}, "by_layer": [curve] * 3
        }  # fmt: skip
    if cosine is not None:
        measured["conflict"] = {"steps": [1, 2], "conflicting": [[0.5], [0.5]], "cosine": [[cosine], [cosine]]}
    return {"name": name, "label": name, "group": "", "x": None, "seeds": [0], "delta_m": [1.0], **measured}


def test_gates_that_are_1_throughout_have_no_panel():
    variants = [variant("naive", gate=1.0), variant("ase", gate=0.1), variant("lora")]
    by_task, by_layer = (figures._gates(variants, by_task=each) for each in (True, False))
    assert [ax.get_title() for ax in by_task.axes] == [ax.get_title() for ax in by_layer.axes] == ["ase"]
    assert [text.get_text() for text in by_task.legends[0].get_texts()] == ["semseg", "edge"]
    assert len(by_layer.legends[0].get_texts()) == 3
    assert figures._gates(variants[:1], by_task=True) is None


def test_a_variant_has_one_colour_in_all_plots(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    variants = [variant("lora"), variant("naive", gate=1.0, cosine=0.0), variant("ase", gate=0.1, cosine=0.2)]
    figures.draw({"variants": variants, "tasks": []}, title="", axis="")
    colors = {}
    for figure in drawn:
        for line in figure.axes[0].get_lines():
            if line.get_label() in ("naive", "ase"):
                colors.setdefault(line.get_label(), []).append(line.get_color())
    assert len(colors["naive"]) == len(colors["ase"]) == 3
    assert len({*colors["naive"]}) == len({*colors["ase"]}) == 1 and colors["naive"] != colors["ase"]
