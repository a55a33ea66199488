"""Maps of experts against gates that are computed token by token, and the pictures that show them."""

import numpy as np
import pytest
import torch
from PIL import Image

from ase_dist.deployment import demo
from ase_dist.deployment.expert_maps import ExpertMaps, predict_with_experts, shares
from ase_dist.moe import MoEFFN
from ase_dist.pictures.heat import OPACITY, heat_over
from tests.deployment.conftest import photo

pytestmark = pytest.mark.single_gpu
LAYERS, EXPERTS, ACTIVE, SHARED, GRID = 2, 4, 2, 1, 2  # of the tiny export: 32 pixels, patches of 16


@pytest.fixture(scope="module")
def found(model):
    """The maps, and what each router was given."""
    inputs = []
    layers = [module for module in model.modules() if isinstance(module, MoEFFN)]
    handles = [
        layer.router.register_forward_pre_hook(lambda router, arguments: inputs.append((router, arguments[0].clone())))
        for layer in layers
    ]
    prediction, maps = predict_with_experts(model, photo())
    for handle in handles:
        handle.remove()
    return prediction, maps, inputs


def test_the_predictions_are_those_of_predict(model, found):
    (wanted,) = model.predict([photo()])
    assert found[0].keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[0][name], value)


def test_the_maps_are_the_gates_token_by_token(model, found):
    """Eq. 8-9: a softmax over the k best routed logits and the shared one; token 0 is a prefix."""
    _, maps, inputs = found
    assert list(maps) == [task.name for task in model.tasks] and len(inputs) == LAYERS
    for t, task in enumerate(model.tasks):
        for i, (router, x_tTD) in enumerate(inputs):
            for row in range(GRID):
                for column in range(GRID):
                    logits = [float(x_tTD[t, 1 + row * GRID + column] @ w_D) for w_D in router.weight[t]]
                    routed = sorted(range(EXPERTS - SHARED), key=lambda n: -logits[n])
                    chosen = [*routed[:ACTIVE], EXPERTS - 1]
                    weights = torch.tensor([logits[n] for n in chosen]).softmax(0).tolist()
                    wanted = np.zeros(EXPERTS)
                    wanted[chosen] = weights
                    assert np.allclose(maps[task.name].layers[i][:, row, column], wanted, atol=2e-5)


def test_shares_and_means_are_those_of_the_maps(found):
    maps = next(iter(found[1].values()))
    gates = np.stack(maps.layers)
    assert np.allclose(maps.mean_gates, gates.mean(axis=(2, 3)), atol=1e-6)
    assert np.allclose(maps.active, (gates > 0).mean(axis=(2, 3)))
    assert np.allclose(maps.gates(None), gates.mean(axis=0), atol=1e-6) and np.array_equal(maps.gates(1), gates[1])
    routed = maps.mean_gates[:, : EXPERTS - SHARED]
    assert maps.most_used(None) == routed.mean(axis=0).argmax() and maps.most_used(1) == routed[1].argmax()
    shapes = {key: value.shape for key, value in shares(found[1]).items()}
    assert shapes == dict.fromkeys(("Share of patches", "Mean gate"), (LAYERS, len(found[1]), EXPERTS))


def test_layers_of_other_grids_are_brought_to_the_finest():
    coarse, fine = np.ones((1, 1, 2), np.float32) * [[[2, 4]]], np.zeros((1, 2, 4), np.float32)
    maps = ExpertMaps((coarse.astype(np.float32), fine), 0, np.ones((2, 1)), np.ones((2, 1)))
    assert maps.gates(None).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]


def test_a_heat_map_lies_over_its_patches():
    image = np.full((20, 40, 3), 200, np.uint8)
    picture = np.asarray(heat_over(image, np.array([[0.0, 0.5]]), top=0.5)).astype(float)
    low, high = np.array([68, 1, 84]), np.array([253, 231, 36])  # viridis at 0 and at 1
    assert np.allclose(picture[:, :20], 200 * (1 - OPACITY) + low * OPACITY, atol=1.5)
    assert np.allclose(picture[:, 20:], 200 * (1 - OPACITY) + high * OPACITY, atol=1.5)


def test_a_picture_gives_a_prediction_and_a_heat_map_of_each_task(model):
    predictions, use, shown = demo.prediction_pictures(model, Image.fromarray(photo()).convert("RGBA"))
    titles = [task.title for task in model.tasks]
    assert [title for _, title in predictions] == titles and {picture.size for picture, _ in predictions} == {(56, 40)}
    assert use is not None and use.width > 300
    for expert in (None, 0, EXPERTS - 1):
        found = demo.heat_maps(model, shown, layer=None, expert=expert)
        assert [text.partition(":")[0] for _, text in found] == titles
        assert {picture.size for picture, _ in found} == {(56, 40)}
    assert all("expert 3 (shared), 100%, gate to " in text for _, text in found)
    one = demo.heat_maps(model, shown, layer=1, expert=0)
    share = shown.maps["semseg"].active[1, 0]
    assert f"expert 0, {share:.0%}, gate to {shown.maps['semseg'].layers[1][0].max():.2f}" in one[0][1]


def test_a_large_picture_is_shown_small_and_predicted_whole(model):
    predictions, _, shown = demo.prediction_pictures(model, Image.fromarray(photo(40, 2048)))
    assert {picture.size for picture, _ in predictions} == {(1024, 20)} and shown.image.shape == (20, 1024, 3)
