"""Every study has settings that a run takes, on every preset; no data is read."""

import pytest

from ase_dist.study.jobs import jobs_of
from ase_dist.study.presets import PRESETS, find_preset
from ase_dist.study.variants import STUDIES

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("name", PRESETS)
def test_every_study_has_runs_on_a_preset(name, tmp_path):
    preset = find_preset(name)
    for study in STUDIES.values():
        variants = study.variants(preset)
        jobs = jobs_of(variants, preset, seeds=1, out=tmp_path)
        assert {job.variant for job in jobs} >= {variant.name for variant in variants}
        for job in jobs:
            assert 0 < job.settings.train.max_steps <= preset.steps and job.settings.chosen_tasks()
    assert {task.name for task in jobs[0].settings.chosen_tasks()} >= {*preset.pair}


@pytest.mark.parametrize("name", ["nyuv2_13", "cityscapes"])
def test_the_sizes_of_libmtls_benchmarks_are_rectangles(name, tmp_path):
    preset = find_preset(name)
    jobs = jobs_of(STUDIES["resolution"].variants(preset), preset, seeds=1, out=tmp_path)
    assert {str(job.settings.data.size) for job in jobs} == {*preset.sizes}
    assert {job.settings.eval.delta for job in jobs} == {"delta_p"}
