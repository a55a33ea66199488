"""Text, paths and numbers in settings: what a user types is what the settings hold, from both places they come from."""

import argparse
import logging
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_dist import typed_yaml
from ase_dist.commands import cli, train
from ase_dist.config import ALIASES, setting_keys, type_of
from ase_dist.errors import UserError
from ase_dist.read_config import build_settings, load_settings, override_settings, to_yaml, upgrade_tree

pytestmark = pytest.mark.single_gpu

NAMES = (  # text that must be one of a table
    "data.name",
    "data.augmentation",
    "model.head",
    "model.moe.gating",
    "train.balancing.method",
)
PATHS = ("output", "data.root")
PATHS_OR_NAMES = ("model.pretrained", "model.init_from", "resume")
TEXTS = ("model.backbone", "monitor.project")
KEYS = (*PATHS, *PATHS_OR_NAMES, *TEXTS)
OPTIONAL = ("data.root", "model.init_from")  # null means none here
WORDS = """
2024 2024-11-25 0100 0x1f 1_000 1e3 1e-4 .5 -0 +1 12:30:45 1:30 3.10 .inf .nan no yes on Off true False y none None NULL
Null = << - ? : # #1 a: a=b =b --out $HOME % %d %(a)s {} [] {a} [a a] [a] runs/{seed} @x `x` !x &a *a | > --- ... ./~ ~~
a~ ~nobody/x ' " 'a' "a" \\ a\\nb
"""
ODD = [*WORDS.split()]
ODD += [
    "runs/exp #2",
    "a #",
    "a: b",
    "key: value",
    "{a: 1}",
    "[1, 2]",
    "2024-11-25 10:00:00",
    "--- a",
    "null ",
    " null",
]
ODD += [
    " a",
    "a ",
    "  ",
    "\t",
    "a\tb",
    "a\nb",
    "\n",
    "a\r\nb",
    "bob's data",
    "!!python/object:os.system x",
    "a b " * 60,
]
ODD += [
    "\u00e4",
    "\u65e5\u672c",
    "\U0001f600",
    "e\u0301",
    "\u2028",
    "\x85",
    "\ufeff",
    "\x7f",
    "\x1b",
    "\udcff",
    "a" * 300,
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))  # as much as a shell can pass


BARE = [
    "2024",
    "2024-11-25",
    "0100",
    "no",
    "on",
    "1_000",
    "1e3",
    "12:30:45",
    "0x1f",
    "3.10",
    "2024-11-25T10:00:00Z",
    "a#2",
]


def value_of(tree, key):
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def expected(key, text):
    """The slow reference: the text, the home folder in place of a leading ~ where a path may stand."""
    expanded = os.path.expanduser(text)  # noqa: PTH111
    return Path(expanded) if key in PATHS else expanded if key in PATHS_OR_NAMES else text


def assert_as_typed(texts, folder):
    """Each key has its text: from the command line, from files, after a round trip and after another override."""
    wanted = {key: expected(key, text) for key, text in texts.items()}
    typed = load_settings(None, [f"{key}={text}" for key, text in texts.items()])
    tree = {}
    for key, text in texts.items():
        *path, name = key.split(".")
        (tree.setdefault(path[0], {}) if path else tree)[name] = text
    found = [typed, override_settings(typed, ["seed=3"]), build_settings(typed.model_dump())]
    for content in (to_yaml(typed), yaml.safe_dump(tree)):
        (folder / "config.yaml").write_text(content, encoding="ascii")
        found.append(load_settings(folder / "config.yaml"))
    for each in found:
        assert {key: value_of(each, key) for key in texts} == wanted


def test_every_text_and_path_of_the_settings_is_tried_here():
    texts = {key for key in setting_keys() if {str, Path} & set(typed_yaml.alternatives(type_of(key)))}
    assert texts == {*NAMES, *KEYS}


@pytest.mark.parametrize("text", ODD, ids=repr)
def test_odd_texts_come_back_as_typed(text, tmp_path):
    assert_as_typed(dict.fromkeys(KEYS, text), tmp_path)


@settings(deadline=None, derandomize=True, max_examples=100, database=None)
@given(texts=st.fixed_dictionaries(dict.fromkeys(KEYS, ANY_TEXT)))
def test_any_text_comes_back_as_typed(texts, tmp_path_factory):
    kept = {
        key: text
        for key, text in texts.items()
        if (text or key not in PATHS) and (text != "null" or key not in OPTIONAL)
    }
    assert_as_typed(kept, tmp_path_factory.getbasetemp())


@settings(deadline=None, derandomize=True, max_examples=50, database=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
def test_any_text_reaches_the_settings_through_the_command(texts):
    """argparse neither drops nor changes what follows key=, however many settings there are."""
    words = [f"monitor.project={text}" for text in texts]
    arguments = train.parser().parse_intermixed_args(["--config", "ccp", *words])
    assert load_settings(arguments.config, arguments.settings).monitor.project == texts[-1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *zip(BARE, BARE, strict=True),
        *[("'a #2'", "a #2"), ('"a\\tb"', "a\tb"), ("runs/exp #2", "runs/exp")],  # YAML's own rules
    ],
)
@pytest.mark.parametrize("key", ["output", "data.root", "model.pretrained", "monitor.project"])
def test_bare_values_in_a_file_are_text_where_text_is_wanted(key, text, wanted, tmp_path):
    *path, name = key.split(".")
    (tmp_path / "c.yaml").write_text(
        "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(path)) + f"{'  ' * len(path)}{name}: {text}\n"
    )
    assert str(value_of(load_settings(tmp_path / "c.yaml"), key)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0100", 100),
        ("0224", 224),
        ("007", 7),
        ("1_000", 1000),
        ("1e3", 1000),
        ("1.0e3", 1000),
        ("+5", 5),
        (" 12 ", 12),
        ("0x10", 16),
        ("0b101", 5),
        ("0o17", 15),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_whole_numbers_are_decimal_everywhere(text, wanted, tmp_path):
    (tmp_path / "c.yaml").write_text(f"train: {{max_steps: {text}}}\n")
    for tree in (load_settings(None, [f"train.max_steps={text}"]), load_settings(tmp_path / "c.yaml")):
        assert tree.train.max_steps == wanted and type(tree.train.max_steps) is int


def test_numbers_inside_lists_and_dictionaries_are_decimal_too():
    tree = load_settings(None, ["train.loss_weights={semseg: 010, edge: 1e-3}", "train.adam.betas=[.5, 09e-1]"])
    assert tree.train.loss_weights == {"semseg": 10.0, "edge": 1e-3}
    assert tree.train.adam.betas == (0.5, 0.9)
    tree = load_settings(None, ["train.loss_weights.semseg=010", "model.moe={k: 02, aux_losses: {z: 1e-3}}"])
    assert (
        tree.train.loss_weights == {"semseg": 10.0}
        and tree.model.moe.k == 2
        and tree.model.moe.aux_losses == {"z": 1e-3}
    )


@pytest.mark.parametrize("text", ["1e20", "1:30", "1,000", "ten", "1e999", "\u0663", "9" * 5000, "0x", "1__e"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match=r"^train\.max_steps: got"):
        load_settings(None, [f"train.max_steps={text}"])


@pytest.mark.parametrize("text", ["null", "none", "None", "~", "NULL"])
def test_no_number_has_the_names_that_people_give_it(text):
    assert load_settings("ccp", [f"train.max_steps={text}"]).train.max_steps is None


@pytest.mark.parametrize(
    ("text", "wanted"), [("yes", True), ("no", False), ("on", True), ("off", False), ("True", True), ("false", False)]
)
def test_switches_take_the_words_of_yaml(text, wanted, tmp_path):
    (tmp_path / "c.yaml").write_text(f"data: {{cache_in_memory: {text}}}\ntrain: {{bf16: {text}}}\n")
    for tree in (
        load_settings(None, [f"data.cache_in_memory={text}", f"train.bf16={text}"]),
        load_settings(tmp_path / "c.yaml"),
    ):
        assert tree.data.cache_in_memory is wanted and tree.train.bf16 is wanted


def test_only_null_means_no_folder_and_a_folder_of_that_name_can_be_named():
    assert load_settings(None, ["data.root=x", "data.root=null"]).data.root is None
    assert load_settings(None, ["data.root=./null"]).data.root == Path("null")
    assert load_settings(None, ["output=null"]).output == Path("null")
    again = override_settings(load_settings(None, ["data.root=./null"]), [])
    assert again.data.root == Path("null")


def test_backbone_options_keep_their_types(tmp_path):
    given = "{a: 1e-3, b: '1e-3', c: no, d: [x, 2], e: 2024-11-25, f: ~, g: 0x10}"
    more = ["model.backbone_args.h=a #b", "model.backbone_args.i=3"]
    tree = load_settings(None, [f"model.backbone_args={given}", *more])
    wanted = {
        "a": 1e-3,
        "b": "1e-3",
        "c": False,
        "d": ["x", 2],
        "e": "2024-11-25",
        "f": None,
        "g": 16,
        "h": "a #b",
        "i": 3,
    }
    assert tree.model.backbone_args == wanted
    (tmp_path / "c.yaml").write_text(to_yaml(tree))
    assert load_settings(tmp_path / "c.yaml") == tree


def test_aliases_and_merges_of_yaml_are_read_and_a_few_lines_do_not_grow(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  moe: &moe {k: 2, num_experts: 8}\n  head: linear\n")
    assert load_settings(path).model.moe.k == 2
    path.write_text("model: {moe: {<<: {k: 2, num_experts: 8}, k: 4}}\n")
    moe = load_settings(path).model.moe
    assert (moe.k, moe.num_experts) == (4, 8)
    lines = [
        "a: &a [x, x]",
        *(f"{new}: &{new} [{', '.join(10 * [f'*{old}'])}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 20,000 values"):
        load_settings(path)
    merges = [
        f"{new}: &{new} {{<<: [{', '.join(10 * [f'*{old}'])}]}}"
        for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    path.write_text("\n".join(["a: &a {x: 1}", *merges]))
    with pytest.raises(ValueError, match="a: there is no such setting"):
        load_settings(path)


# ---------------------------------------------------------------------------------------------------------------------
# The home folder


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("output: ~/x\ndata: {root: ~/data}\nmodel: {init_from: ~/export}\n")
    tree = load_settings("~/mine.yaml", ["model.pretrained=~/w.pth", "resume=~/runs/x"])
    found = [tree.output, tree.data.root, tree.model.init_from, tree.model.pretrained, tree.resume]
    assert [str(each) for each in found] == [
        str(tmp_path / name) for name in ("x", "data", "export", "w.pth", "runs/x")
    ]
    assert load_settings(None, ["output=~"]).output == tmp_path
    assert load_settings(None, ["monitor.project=~/x"]).monitor.project == "~/x"  # no path
    there = load_settings(None, ["output=./~/x"])
    assert there.output == Path("~/x") and build_settings(yaml.safe_load(to_yaml(there))).output == Path("~/x")


def test_the_home_folder_in_every_path_option(tmp_path, monkeypatch):
    """Options that take a path have one of the two types that know the home folder, in every command."""
    from ase_dist.commands import (
        cluster_check,
        evaluate,
        export,
        make_scenes,
        plan,
        predict,
        prepare_data,
        pretrain_backbone,
        report,
        study,
    )

    monkeypatch.setenv("HOME", str(tmp_path))
    no_paths = {"settings", "name", "data of study", "data of prepare_data"}
    words = ("FILE", "DIR", "FOLDER", "RUN", "SRC", "WHICH", "ROOT", "EXPORT", "RESULTS", "file", "folder", "path")
    seen = 0
    for command in (
        cluster_check,
        evaluate,
        export,
        make_scenes,
        plan,
        predict,
        prepare_data,
        pretrain_backbone,
        report,
        study,
        train,
    ):
        for action in command.parser()._actions:
            said = f"{action.metavar} {action.dest}"
            takes_path = any(word in str(action.metavar) for word in words) or action.dest in (
                "run",
                "out",
                "hostfile",
                "config",
                "model",
            )
            if takes_path and action.dest not in no_paths:
                assert action.type in (cli.path, cli.path_or_name), f"{command.__name__}: {said}"
                seen += 1
    assert seen >= 20
    assert (
        cli.path("~/x") == tmp_path / "x" and cli.path_or_name("~") == str(tmp_path) and cli.path("a b") == Path("a b")
    )
    with pytest.raises(argparse.ArgumentTypeError, match="got an empty text"):
        cli.path("")


# ---------------------------------------------------------------------------------------------------------------------
# Old names


def test_old_names_of_settings_work_with_one_warning(tmp_path, caplog):
    (tmp_path / "old.yaml").write_text(
        "data: {train_images: 0007, scene_size: 48}\ntrain: {betas: [0.8, 0.9], eps: 1e-6}\n"
    )
    with caplog.at_level(logging.WARNING, logger="ase_dist"):
        tree = load_settings(tmp_path / "old.yaml")
    assert (tree.data.scenes.train_images, tree.data.scenes.size) == (7, (48, 48))
    assert (tree.train.adam.betas, tree.train.adam.eps) == ((0.8, 0.9), 1e-6)
    assert len(caplog.records) == 1 and "data.train_images is data.scenes.train_images" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ase_dist"):
        tree = load_settings(None, ["train.poly_power=2", "data.scene_seed=3"])
    assert (tree.train.poly.power, tree.data.scenes.seed) == (2.0, 3)
    assert len(caplog.records) == 2 and "train.poly_power is train.poly.power" in caplog.text


def test_every_old_name_leads_to_a_setting_and_a_whole_old_tree_is_read():
    assert set(ALIASES.values()) <= set(setting_keys()) and not set(ALIASES) & set(setting_keys())
    new = load_settings("scenes", ["data.scenes.seed=5", "train.adam.eps=1e-7"])
    old = new.model_dump(mode="json")
    scenes, adam, poly = old["data"].pop("scenes"), old["train"].pop("adam"), old["train"].pop("poly")
    old["data"] |= {"train_images": scenes["train_images"], "val_images": scenes["val_images"]}
    old["data"] |= {"scene_size": scenes["size"], "scene_seed": scenes["seed"]}
    old["train"] |= {"betas": adam["betas"], "eps": adam["eps"], "poly_power": poly["power"]}
    before = str(old)
    assert build_settings(upgrade_tree(old)) == new
    assert str(old) == before
    assert upgrade_tree(new.model_dump(mode="json")) == new.model_dump(mode="json")


def test_the_old_name_of_baseline_works_with_a_warning(capsys):
    assert train.main(["--row", "mtl_vit", "--print-config"]) == 0
    old = capsys.readouterr()
    assert train.main(["--baseline", "mtl_vit", "--print-config"]) == 0
    new = capsys.readouterr()
    assert old.out == new.out and "runs/scenes_mtl_vit" in new.out
    assert old.err == "warning: --row is called --baseline now; the old name will go\n" and not new.err


def test_every_setting_says_what_it_means():
    def fields(section):
        for name, field in section.model_fields.items():
            yield from (
                fields(field.annotation) if hasattr(field.annotation, "model_fields") else [(name, field.description)]
            )

    from ase_dist.config import Settings

    assert [name for name, said in fields(Settings) if not said] == []


def test_numbers_that_are_none_are_refused_in_a_tree_too():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"train\.lr"):
            build_settings({"train": {"lr": bad}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {name: [a]}", r"data\.name: got \['a'\], "),
        ('train: {adam: {betas: "\\n"}}', r"train\.adam\.betas: got '\\n', "),
    ],
)
def test_a_value_of_another_type_is_one_sentence(text, said, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as raised:
        load_settings(path)
    assert "\n" not in str(raised.value)
