"""The fast lane: which modules of tests carry the marker ``fast`` (``conftest.py`` gives it to them).

Of these all tests but those of several processes, clusters, real photographs and nights. Every package of ``ase_dist``
is imported by one of them (``test_lanes.py``), and together they take under three minutes on two cores:
``pytest tests -m fast -n 2``.
"""

MODULES = """
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
FAST = frozenset(f"{name}.py" for name in MODULES.split())


def is_elsewhere(marks):
    """Whether a test of such marks is in no fast lane. A module of several processes may have tests of one."""
    return bool(marks & {"cluster", "shared_data", "nightly"}) or ("multi_gpu" in marks and "single_gpu" not in marks)
