"""Settings: defaults, overrides, and one sentence for everything that is wrong (fault 13)."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ase_dist.config import ON_RESUME, Settings, setting_keys
from ase_dist.read_config import build_settings, load_settings, shipped_configs, to_yaml

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_survives_its_own_yaml(name, tmp_path):
    settings = load_settings(name)
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(settings))
    assert load_settings(again) == settings


def test_the_paper_configs_are_what_their_names_say():
    for name in ("pascal_ase_16_3_1_4", "pascal_ase_32_6_2_2", "pascal_ase_64_12_4_1"):
        moe = load_settings(name).model.moe
        assert name == f"pascal_ase_{moe.num_experts}_{moe.k}_{moe.num_shared}_{moe.rank}"
        assert load_settings(name).data.size == (224, 224) and load_settings(name).train.epochs == 40


def test_overrides_apply_in_order_and_reach_every_depth():
    settings = load_settings(None, ["train.lr=1e-4", "model.moe.adapt=[fc2]", "tasks=[edge,semseg]", "train.lr=2e-4",
                                    "model.moe.num_experts=32", "model.backbone_args={depth: 2}"])  # fmt: skip
    assert settings.train.lr == 2e-4
    assert settings.model.moe.adapt == ("fc2",)
    assert settings.tasks == ("edge", "semseg")
    assert settings.model.moe.num_experts == 32
    assert settings.model.backbone_args == {"depth": 2}


def test_every_key_can_be_overridden_by_its_value():
    """The names that ``--print-keys`` gives are those that the command line takes."""
    settings = load_settings()
    for key in setting_keys():
        value = settings.model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        assert load_settings(None, [f"{key}={text}"]) == settings, key


def test_the_keys_that_scripts_rely_on_exist():
    moe = "num_experts k num_shared rank adapt gating dispatch ep_size every_n_blocks"
    keys = {
        "output",
        "resume",
        "seed",
        "tasks",
        "data.name",
        "data.root",
        "model.backbone",
        "model.pretrained",
        "train.max_steps",
        "train.epochs",
        "train.batch_size",
        "train.lr",
        "eval.every",
        "checkpoint.every",
    }
    assert keys | {f"model.moe.{key}" for key in moe.split()} <= set(setting_keys())


def test_every_setting_says_what_a_resumed_run_does_about_it():
    assert ON_RESUME.keys() == {*setting_keys()}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.moe.num_expert=32", r"model.moe.num_expert: there is no such setting, did you mean 'num_experts'\?"),
        ("num_experts=32", r"did you mean 'model.moe.num_experts'\?"),
        ("modle.moe.k=2", r"modle: there is no such setting, did you mean 'model'\?"),
        ("train.lr=fast", "train.lr: got 'fast'"),
        ("train.batch_size=0", "train.batch_size: got 0"),
        ("train.batch_size=2.5", "train.batch_size: got 2.5, wanted a whole number$"),
        ("train.bf16=x", "train.bf16: got 'x', wanted 'auto' or true or false$"),
        ("tasks=semseg", r"tasks: got 'semseg', wanted a list; write tasks=\[semseg\]$"),
        ("tasks=semseg,edge", r"write tasks=\[semseg,edge\]$"),
        ("model.moe.adapt=fc1", r"write model.moe.adapt=\[fc1\]$"),
        ("model.moe.aux_losses.q=1", "model.moe.aux_losses.q: got 'q', wanted 'mutual_information'"),
        ("model.moe=5", "model.moe: got '5', wanted names with values"),
        ("model.moe.gating=asee", "model.moe.gating: got 'asee'"),
        ("data.name=voc", "data.name: got 'voc'"),
        ("tasks=[semseg,edges]", r"scenes has no task 'edges', .* did you mean 'edge'\?"),
        ("tasks=[semseg,semseg]", "each at most once"),
        ("tasks=[]", "at least one task"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("train.lr", "wanted key=value"),
        ("=3", "wanted key=value"),
        ("train.betas=[0.9", "is not a YAML value"),
        ("tasks=!!python/object/apply:os.system ['touch ran']", "not plain YAML"),
        ("tasks=[edge] #2", "'#2' after the value would not be read"),
        ("seed=yes", "seed: got 'yes'"),
        ("seed=12:30:45", "seed: got '12:30:45'"),
        ("train.lr=1:30", "train.lr: got '1:30'"),
        ("train.lr=inf", "train.lr: got inf"),
        ("train.lr=nan", "train.lr: got nan"),
        ("train.max_steps=", "train.max_steps: got ''"),
        ("data.cache_in_memory=null", "data.cache_in_memory: got 'null'"),
        ("data.augmentation=artc", "data.augmentation: got 'artc', wanted one of .*, did you mean 'atrc'"),
        ("output=", "output: got an empty text, wanted a path"),
        ("data.root=", "data.root: got an empty text, wanted a path"),
        ("model.backbone_args={depth: 010}", "model.backbone_args.depth: got 010, which YAML does not read in base 10"),
        ("model.backbone_args={depth: 1, depth: 2}", "model.backbone_args.depth: stands twice, in lines 1 and 1"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_settings(None, ["seed=0", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("- 1\n- 2\n", "got a list at the top"),
        ("seed: [1\n", "not plain YAML"),
        ("seed: !!python/object/apply:os.system ['touch ran']\n", "not plain YAML"),
        ("trian: {lr: 1}\n", "did you mean 'train'"),
        ("\x00\x01", "not plain YAML"),
        ("seed: 1\ntrain: {lr: 1.0e-3}\nseed: 2\n", "config.yaml: seed: stands twice, in lines 1 and 3"),
        ("train:\n  lr: 1.0e-3\n  lr: 2.0e-3\n", "train.lr: stands twice, in lines 2 and 3"),
        ("train: {lr: 1.0e-3}\n\ntrain: {epochs: 2}\n", "train: stands twice, in lines 1 and 3"),
        ("data: {train_images: 4, scenes: {train_images: 8}}\n", "train_images is called data.scenes.train_images now"),
        ("seed: &a [*a]\n", "a part of itself"),
        ("seed: 12:30:45\n", "seed: got '12:30:45'"),
        ("seed: yes\n", "seed: got 'yes'"),
        ("output: ~\n", "output: got None"),
        ("output:\n", "output: got None"),
        ("? [a, b]\n: 1\n", "got a list or a mapping as a key"),
        ("a: " + "[" * 5000, "nested too deeply|not plain YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence_and_runs_nothing(text, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_settings(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("override", "losses"),
    [
        ("model.moe.aux_losses.z=0.1", {"mutual_information": 0.005, "z": 0.1}),
        ("model.moe.aux_losses.mutual_information=0.1", {"mutual_information": 0.1}),
        ("model.moe.aux_losses={z: 0.1}", {"z": 0.1}),
        ("model.moe={aux_losses: {z: 0.1}}", {"z": 0.1}),
    ],
)
def test_an_entry_of_a_dictionary_keeps_the_default_entries(override, losses, tmp_path):
    """As its value in the config does; a whole dictionary replaces it."""
    assert load_settings(None, [override]).model.moe.aux_losses == losses
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert load_settings(tmp_path / "config.yaml", [override]).model.moe.aux_losses == losses
    assert Settings().model.moe.aux_losses == {"mutual_information": 0.005}


def test_a_section_as_a_value_keeps_what_it_does_not_name():
    chosen = load_settings(None, ["model.moe.num_experts=8", "model.moe={k: 2, rank: 1}", "train={adam: {eps: 1e-6}}"])
    assert (chosen.model.moe.num_experts, chosen.model.moe.k, chosen.model.moe.rank) == (8, 2, 1)
    assert chosen.train.max_steps == load_settings(None).train.max_steps and chosen.train.adam.eps == 1e-6


def test_a_whole_number_may_be_written_as_a_float():
    assert load_settings(None, ["train.max_steps=1e4"]).train.max_steps == 10_000


@pytest.mark.parametrize("given", ["mine", "mine.yml", "mine.txt", "."])
def test_a_config_under_another_suffix_is_named(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    (tmp_path / "config.yaml").write_text("seed: 4\n")
    wanted = "config.yaml" if given == "." else "mine.yaml"
    for name in (given, str(tmp_path / given)):
        with pytest.raises(ValueError, match=f"--config: no file and no shipped config .*did you mean '.*{wanted}'"):
            load_settings(name)
    (tmp_path / "mine.txt").write_text("seed: 3\n")
    with pytest.raises(ValueError, match=r"--config: got 'mine.txt', wanted a name that ends with .yaml"):
        load_settings("mine.txt")


def test_an_unknown_config_names_the_shipped_ones():
    with pytest.raises(ValueError, match=r"did you mean 'pascal_ase_16_3_1_4'\? \(shipped: .*scenes"):
        load_settings("pascal_ase_16_3_1")


def test_settings_cannot_be_changed_once_read():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().train.lr = 1.0


def test_an_empty_tree_is_all_defaults():
    assert build_settings({}).model.moe.num_experts == 16


@pytest.mark.parametrize("arguments", [["--help"], ["--print-config", "seed=3"], ["--print-keys"]])
def test_questions_are_answered_without_torch(arguments):
    code = (
        "import sys; from ase_dist.commands.train import main\n"
        f"try:\n    code = main({arguments})\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code and 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "--print-config":
        assert yaml.safe_load(done.stdout)["seed"] == 3


def test_a_refused_command_exits_with_2_and_one_line():
    done = run("launch/train.py", "train.lrr=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "did you mean 'lr'" in done.stderr
