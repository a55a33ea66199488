"""Which modules of tests carry the markers ``fast`` and ``deepspeed`` (``conftest.py`` gives them to their tests).

Of the fast ones all tests but those of several processes, clusters, real photographs and nights. Every package of
``ase_dist`` is imported by one of them (``test_lanes.py``), and together they take under three minutes on two cores:
``pytest tests -m fast -n 2``.

Those of DeepSpeed can end differently with another version of it: of ``moe`` all that name it or a layer of its kind,
and runs of every ZeRO stage, which read and write what it holds.
"""

_FAST = """
    cluster/test_environment cluster/test_hostfile cluster/test_kubernetes cluster/test_static
    commands/test_cli commands/test_main commands/test_start
    data/test_archive data/test_cache data/test_decode data/test_first_description data/test_lists data/test_matlab
    data/test_sampler data/test_transforms
    deployment/test_images deployment/test_predictor
    doctor/test_probes
    evaluation/test_binary evaluation/test_decode evaluation/test_delta_m evaluation/test_geometry
    evaluation/test_matching evaluation/test_metrics evaluation/test_nms evaluation/test_segmentation
    evaluation/test_tables evaluation/test_thinning
    examples/test_examples
    models/test_backbone models/test_heads models/test_lora models/test_names models/test_parameters
    moe/test_expert_parallel moe/test_gating moe/test_layer moe/test_router
    ops/test_gated_ffn ops/test_grouped ops/test_products
    pictures/test_grid pictures/test_sheet
    planning/test_activations planning/test_flops
    report/test_charts report/test_heatmaps report/test_listing report/test_settings report/test_text
    scenes/test_render
    study/test_tables
    training/test_balancing
    training/test_checkpoint_store training/test_console training/test_device training/test_ds_config
    training/test_history training/test_losses training/test_metrics training/test_records training/test_run_folder
    training/test_schedule
    test_baselines test_config test_config_text test_description test_errors test_files test_json_files test_lanes
    test_printable test_registries test_tables test_tasks test_versions test_workers
"""
_DEEPSPEED = """
    moe/test_adapters moe/test_deepspeed_checkpoint moe/test_deepspeed_engine moe/test_deepspeed_versions
    moe/test_gated_base moe/test_layer moe/test_robustness moe/test_task_ffn moe/test_transforms
    training/test_faults training/test_run_stages
"""
FAST, DEEPSPEED = (frozenset(f"{name}.py" for name in names.split()) for names in (_FAST, _DEEPSPEED))


def is_elsewhere(marks):
    """Whether a test of such marks is in no fast lane. A module of several processes may have tests of one."""
    return bool(marks & {"cluster", "shared_data", "nightly"}) or ("multi_gpu" in marks and "single_gpu" not in marks)
