"""Several data sets in one run: order at any world, mixing, augmentation, labels, scores, names of tasks, refusals."""

import itertools

import numpy as np
import pytest
import torch

from ase_dist.data.loader import build_eval_loader, build_train_loader, data_fingerprint, open_dataset
from ase_dist.data.mixed import MixedDataset
from ase_dist.data.sampler import MixedSampler
from ase_dist.errors import UserError
from ase_dist.evaluation.metrics import build_metric
from ase_dist.evaluation.scores import score_of
from ase_dist.models import ModelOutput
from ase_dist.read_config import load_settings, override_settings, to_yaml
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS, OfferedTasks, Task, join_tasks
from ase_dist.training.loop.evaluate import Gallery, evaluate, predict
from ase_dist.training.state.compare_settings import compare_settings
from tests.data.conftest import PascalFolder
from tests.data.own_folders import ids, metres, picture, save

pytestmark = pytest.mark.single_gpu

LENGTHS = {"a": 7, "b": 3, "c": 20}
SIZE = 16


# --- the order -------------------------------------------------------------------------------------------------------


def sampler(*, rank=0, world=1, batch=2, weights=None, lengths=LENGTHS, seed=1):
    return MixedSampler(lengths, weights, batch_size=batch, rank=rank, world_size=world, seed=seed)


def stream(images, *, world=1, batch=2, weights=None, state=None):
    """The next ``images`` draws of all ranks together, and the state behind them."""
    ranks = [sampler(rank=rank, world=world, batch=batch, weights=weights) for rank in range(world)]
    if state is not None:
        for each in ranks:
            each.load_state_dict(state)
    assert images % (world * batch) == 0
    steps = [[next(iter(each)) for each in ranks] for _ in range(images // (world * batch))]
    assert all(each.state_dict() == ranks[0].state_dict() for each in ranks)
    return [draw for step in steps for draws in step for draw in draws], ranks[0].state_dict()


@pytest.mark.parametrize("weights", (None, [1, 1, 1], [0.5, 0.3, 0.2]))
def test_the_order_is_the_same_at_every_world_and_goes_on_exactly_at_another(weights):
    whole, _ = stream(192, weights=weights)
    for world, batch in ((2, 2), (4, 1), (3, 4), (1, 8)):
        assert stream(192, world=world, batch=batch, weights=weights)[0] == whole
    head, state = stream(72, world=3, batch=2, weights=weights)
    for world, batch in ((1, 3), (2, 4), (4, 2)):
        tail, end = stream(120, world=world, batch=batch, weights=weights, state=state)
        assert head + tail == whole and end == stream(192, weights=weights)[1]


def set_of(image):
    return "a" if image < 7 else "b" if image < 10 else "c"


@pytest.mark.parametrize("weights", (None, [1, 1, 1], [0.5, 0.3, 0.2], [100, 1, 1]))
def test_every_prefix_has_the_shares_of_the_weights(weights):
    draws, _ = stream(600, weights=weights)
    shares = dict(zip(LENGTHS, weights or LENGTHS.values(), strict=True))
    taken = dict.fromkeys(LENGTHS, 0)
    for n, draw in enumerate(draws, start=1):
        taken[set_of(draw.image)] += 1
        for title, share in shares.items():
            assert abs(taken[title] - n * share / sum(shares.values())) < 2  # of three sets


def test_each_set_has_epochs_of_its_own_each_image_once_in_each():
    draws, _ = stream(600, weights=[1, 1, 1])
    for title, length in LENGTHS.items():
        own = [draw for draw in draws if set_of(draw.image) == title]
        assert [draw.epoch for draw in own] == [i // length for i in range(len(own))]
        epochs = [[draw.image for draw in group] for _, group in itertools.groupby(own, lambda draw: draw.epoch)]
        assert all(len(set(epoch)) == length for epoch in epochs[:-1]) and epochs[0] != epochs[1]
    one_epoch, _ = stream(30)
    assert sorted(draw.image for draw in one_epoch) == list(range(30)) and {draw.epoch for draw in one_epoch} == {0}
    assert sampler().steps_per_epoch == 15


def test_the_order_in_a_set_does_not_depend_on_the_other_sets():
    of_a = [draw for draw in stream(300)[0] if draw.image < 7]
    alone = MixedSampler({"a": 7}, None, batch_size=1, rank=0, world_size=1, seed=1)
    draws = [next(iter(alone))[0] for _ in range(len(of_a))]
    assert draws == of_a


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"epoch": 0, "consumed": 1, "length": 30}, "got a position in one data set, wanted one in a, b, c"),
        ({"sets": {"a": {}, "b": {}}}, "got a position in a, b, wanted one in a, b, c"),
        ({"sets": {title: {"epoch": 0, "consumed": 1, "length": 9} for title in LENGTHS}}, "a: got a position in 9 im"),
        ({"sets": {title: {"epoch": 0} for title in LENGTHS}}, "wanted epoch, consumed and length"),
    ],
)
def test_a_position_of_other_sets_is_refused(state, words):
    with pytest.raises(UserError, match=words):
        sampler().load_state_dict(state)


# --- names of tasks --------------------------------------------------------------------------------------------------


def offered(title, *tasks, **names):
    return OfferedTasks(title, tasks, names)


def test_tasks_that_mean_the_same_are_one_and_others_are_named_after_their_sets():
    pascal, nyud = PASCAL_TASKS, NYUD_TASKS
    one, other = join_tasks(
        [
            offered("p", pascal["semseg"], pascal["normals"], pascal["saliency"]),
            offered("n", nyud["semseg"], nyud["normals"], nyud["depth"]),
        ]
    )
    assert [one["normals"], one["saliency"], other["depth"]] == [
        pascal["normals"],
        pascal["saliency"],
        nyud["depth"],
    ] and other["normals"] == one["normals"]
    assert (one["semseg"].name, other["semseg"].name) == ("p_semseg", "n_semseg")
    assert one["semseg"].title == "Semantic segmentation (p)" and other["semseg"].channels == 40
    first, second, third = join_tasks(
        [offered(t, PASCAL_TASKS["semseg"]) for t in "ab"] + [offered("c", nyud["semseg"])]
    )
    assert [x["semseg"].name for x in (first, second, third)] == ["a_semseg", "a_semseg", "c_semseg"]
    # edges that are matched with another tolerance have scores that do not compare
    assert [x["edge"].name for x in join_tasks([offered("p", pascal["edge"]), offered("n", nyud["edge"])])] == [
        "p_edge",
        "n_edge",
    ]


def test_names_that_are_given():
    (one, other) = join_tasks(
        [offered("a", PASCAL_TASKS["semseg"], semseg="garments"), offered("b", PASCAL_TASKS["semseg"])]
    )
    assert (one["semseg"].name, one["semseg"].title, other["semseg"].name) == ("garments", "Garments", "semseg")


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([offered("a", PASCAL_TASKS["semseg"], semsge="x")], "a has no task 'semsge' .*did you mean 'semseg'"),
        (
            [offered("a", *list(PASCAL_TASKS.values())[:2], semseg="human_parts")],
            "a has two tasks called 'human_parts'",
        ),
        (
            [offered("a", PASCAL_TASKS["saliency"], saliency="semseg"), offered("b", PASCAL_TASKS["semseg"])],
            "a and b would both call a task 'semseg', but they are not the same .kind mask and classes.",
        ),
    ],
)
def test_clashes_are_told(sets, words):
    with pytest.raises(UserError, match=words):
        join_tasks(sets)


# --- two sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """A PASCAL_MT folder without normals, another with normals but no parts, and a described one with depth."""
    first, second = PascalFolder(tmp_path / "people"), PascalFolder(tmp_path / "rooms")
    for i in range(5):
        first.add(f"p{i}", labels=("semseg", "human_parts", "saliency"))
        second.add(f"r{i}", labels=("saliency", "normals"), shape=(15, 20))
    for i in range(3):
        first.add(f"v{i}", split="val", labels=("semseg", "human_parts", "saliency"))
        second.add(f"w{i}", split="val", labels=("saliency", "normals"), shape=(15, 20))
    for i in range(6):
        save(tmp_path / f"garden/images/{i}.png", picture(i))
        save(tmp_path / f"garden/labels/{i}.png", ids(i))
        save(tmp_path / f"garden/depth/{i}.npy", metres(i))
    (tmp_path / "garden/dataset.yaml").write_text(
        """
images: images/{}.png
splits: {train: images, val_every: 3}
tasks:
  semseg: {kind: classes, files: "labels/{}.png", classes: [a, b, c, d, e]}
  depth: {kind: depth, files: "depth/{}.npy", unit: m}
"""
    )
    return tmp_path


PEOPLE = "{name: pascal_context, called: people, root: people, tasks: [semseg, human_parts, saliency]}"
ROOMS = "{name: pascal_context, called: rooms, root: rooms, tasks: [saliency, normals]}"
GARDEN = "{root: garden}"


def settings_of(places, *sets, batch=2, **data):
    words = [f"data.{key}={value}" for key, value in data.items()]
    return load_settings(
        None,
        [
            f"data.root={places}",
            f"data.sets=[{', '.join(sets)}]",
            f"data.size={SIZE}",
            f"train.batch_size={batch}",
            *words,
        ],
    )


def loader_of(settings, **place):
    return build_train_loader(settings, settings.chosen_tasks(), **{"rank": 0, "world_size": 1, **place})


def test_the_tasks_of_a_run_are_those_of_its_sets_and_settings_read_back(places):
    settings = settings_of(places, PEOPLE, ROOMS, GARDEN)
    names = ["people_semseg", "human_parts", "saliency", "normals", "garden_semseg", "depth"]
    assert [task.name for task in settings.chosen_tasks()] == names
    assert settings.data.name == "people+rooms+garden" and settings.data.sets[2].description is not None
    config = places / "config.yaml"
    config.write_text(to_yaml(settings))
    assert load_settings(config) == settings
    assert override_settings(settings, {"train.lr": 0.1}).data == settings.data
    renamed = settings_of(
        places, "{name: pascal_context, root: people, as: {semseg: garments}, tasks: [semseg]}", GARDEN
    )
    assert [task.name for task in renamed.chosen_tasks()] == ["garments", "semseg", "depth"]
    config.write_text(to_yaml(renamed))
    assert "as:\n" in config.read_text() and load_settings(config) == renamed


def test_a_record_has_the_labels_of_its_own_set_under_the_runs_names(places):
    settings = settings_of(places, PEOPLE, ROOMS, GARDEN)
    dataset = open_dataset(settings, settings.chosen_tasks(), split="train")
    assert isinstance(dataset, MixedDataset) and dataset.lengths == {"people": 5, "rooms": 5, "garden": 4}
    assert dataset.labelled_images() == {
        "people_semseg": 5, "human_parts": 5, "saliency": 10, "normals": 5, "garden_semseg": 4, "depth": 4,
    }  # fmt: skip
    for i in range(len(dataset)):
        record, title = dataset[i], dataset.set_of(i)
        assert record.name.startswith(f"{title}/") and dataset.sets[title] == set(record.labels)
    assert np.array_equal(dataset[10].labels["garden_semseg"], ids(int(dataset[10].name[-1])))
    fewer = override_settings(settings, {"tasks": ["normals"]})
    only = open_dataset(fewer, fewer.chosen_tasks(), split="train")
    assert only.names == [f"rooms/r{i}" for i in range(5)]
    assert data_fingerprint(only) != data_fingerprint(dataset)


def test_batches_are_the_same_at_any_world_and_an_images_augmentation_does_not_depend_on_other_sets(places):
    settings = settings_of(places, PEOPLE, ROOMS, batch=4)
    whole = loader_of(settings)
    ranks = [loader_of(settings_of(places, PEOPLE, ROOMS, batch=2), rank=rank, world_size=2) for rank in (0, 1)]
    seen = {}
    for _ in range(4):
        batch, parts = next(whole), [next(rank) for rank in ranks]
        assert batch.names == [name for part in parts for name in part.names]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        for task, label in batch.labels.items():
            assert torch.equal(label, torch.cat([part.labels[task] for part in parts]))
        assert batch.indices.tolist() == [whole.dataset.names.index(name) for name in batch.names]
        seen |= {name: image for name, image in zip(batch.names, batch.images, strict=True) if name not in seen}
    alone = loader_of(settings_of(places, ROOMS, GARDEN))
    others = {}
    for batch in (next(alone) for _ in range(6)):
        others |= {name: image for name, image in zip(batch.names, batch.images, strict=True) if name not in others}
    both = sorted(seen.keys() & others.keys())
    assert len(both) >= 3 and all(torch.equal(seen[name], others[name]) for name in both)
    for loader in (whole, alone, *ranks):
        loader.close()


def test_a_position_is_kept_by_the_loader(places):
    settings = settings_of(places, PEOPLE, GARDEN)
    loader = loader_of(settings)
    for _ in range(3):
        next(loader)
    state = loader.state_dict()
    wanted = [next(loader).names for _ in range(3)]
    loader.load_state_dict(state)
    assert [next(loader).names for _ in range(3)] == wanted and state["sets"].keys() == {"people", "garden"}
    loader.close()


def test_a_task_is_scored_on_the_sets_that_have_it_and_on_each_of_several(places):
    settings = settings_of(places, PEOPLE, ROOMS, GARDEN)
    tasks = settings.chosen_tasks()
    loader = build_eval_loader(settings, tasks, rank=0, world_size=1)
    empty = torch.zeros(0)

    def logits_of(task: Task, images):
        return images.mean(1, keepdim=True) * torch.linspace(-1, 1, task.channels)[:, None, None]

    def forward(images):
        return ModelOutput({task.name: logits_of(task, images) for task in tasks}, empty.sum(), empty, empty)

    found = evaluate(
        forward,
        loader.until_error(),
        tasks,
        device=torch.device("cpu"),
        gallery=Gallery(limit=2),
        constants={},
        go_on=lambda error: True,
        dataset=loader.dataset,
    )
    assert found is not None
    saliency = next(task for task in tasks if task.name == "saliency")
    metrics = {title: build_metric(saliency) for title in ("people", "rooms", "both")}
    for batch in loader:
        for i, label in enumerate(batch.labels["saliency"]):
            if label is not None:
                prediction = predict(saliency, logits_of(saliency, batch.images[i : i + 1]), label)
                metrics[batch.names[i].partition("/")[0]].update(prediction, label)
                metrics["both"].update(prediction, label)
    loader.close()
    scores = found.results["saliency"]
    assert {key: scores[key] for key in ("miou", "mae")} == {
        key: pytest.approx(metrics["both"].result()[key]) for key in ("miou", "mae")
    }
    for title in ("people", "rooms"):
        assert scores[f"miou@{title}"] == metrics[title].result()["miou"] and scores[f"images@{title}"] == 3
    assert scores["images"] == 6 and score_of(saliency, "mae@rooms").title == "mean absolute error, rooms"
    assert found.results["depth"]["images"] == 2 and not any("@" in key for key in found.results["depth"])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ((PEOPLE, PEOPLE), "two are called 'people'; give each a name of its own with called:"),
        ((PEOPLE.replace("called", "weight: 1, called"), ROOMS), "some have a weight and others none"),
        ((PEOPLE.replace("[semseg,", "[semsge,"), ROOMS), "people has no task 'semsge'.*did you mean 'semseg'"),
        (("{root: nowhere}",), r"sets\.0\.name"),
        ((PEOPLE.replace("called", "wieght: 1, called"),), "wieght"),
        ((PEOPLE.replace("root: people", "root: people, split: test"),), "split"),
    ],
)
def test_settings_that_fit_no_sets_are_refused(places, sets, words):
    with pytest.raises(UserError, match=words):
        settings_of(places, *sets)


def test_splits_of_a_set(places):
    settings = settings_of(
        places, PEOPLE.replace("called", "split: train, called"), ROOMS.replace("called", "split: val, called")
    )
    tasks = [task for task in settings.chosen_tasks() if task.name != "normals"]
    assert set(open_dataset(settings, tuple(tasks), split="train").sets) == {"people"}
    assert set(open_dataset(settings, tuple(tasks), split="val").sets) == {"rooms"}
    with pytest.raises(UserError, match="no set that is trained on has a label of normals"):
        open_dataset(settings, settings.chosen_tasks(), split="train")
    only = override_settings(settings, {"tasks": ["human_parts"]})
    with pytest.raises(UserError, match=r"none of people\+rooms is for val and has a label of human_parts"):
        open_dataset(only, only.chosen_tasks(), split="val")


def test_images_may_lack_labels_in_a_set_too(places):
    (places / "rooms/sal_distill/r1.png").unlink()
    with pytest.raises(UserError, match=r"data\.partial=true"):
        loader_of(settings_of(places, PEOPLE, ROOMS))
    loader = loader_of(settings_of(places, PEOPLE, ROOMS, partial="true"))
    assert loader.dataset.labelled_images()["saliency"] == 9
    loader.close()


def test_a_resumed_run_may_move_folders_but_change_no_set(places):
    settings = settings_of(places, PEOPLE, GARDEN)
    names = [task.name for task in settings.chosen_tasks()]

    def compare(*sets, **data):
        now = settings_of(places, *sets, **data)
        return compare_settings(settings.model_dump(mode="json"), now, tasks=names, saved_tasks=names)

    same = compare(PEOPLE, GARDEN)
    assert not same.refused and not same.listed
    (places / "people").rename(places / "moved")
    moved = compare(PEOPLE.replace("root: people", "root: moved"), GARDEN)
    assert not moved.refused and list(moved.listed) == ["data.sets.people.root"]
    (places / "garden/dataset.yaml").write_text(
        (places / "garden/dataset.yaml").read_text().replace("unit: m}", "unit: cm}")
    )
    assert "data.sets.garden.description.tasks.depth.unit is m there and cm here" in compare(PEOPLE, GARDEN).why_refused
    assert "data.sets are people, garden there and garden, people here" in compare(GARDEN, PEOPLE).why_refused
    weighed = compare(PEOPLE.replace("called", "weight: 2, called"), "{root: garden, weight: 1}")
    assert "data.sets.people.weight is null there and 2.0 here" in weighed.why_refused


def test_one_set_of_several_keeps_the_names_of_the_run(places):
    settings = settings_of(places, PEOPLE, GARDEN)
    only = settings.data.only_set("garden")
    one = override_settings(settings, {"data.sets": [only.model_dump(mode="json")], "tasks": None})
    assert [task.name for task in one.chosen_tasks()] == ["garden_semseg", "depth"]
