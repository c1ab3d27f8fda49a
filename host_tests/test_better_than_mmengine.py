"""Each test of `optim_wrapper/test_better.py` fails on MMEngine, for its reason."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

HERE = pathlib.Path(__file__).parent
TESTS = HERE.parent / "tests" / "optim_wrapper" / "test_better.py"
FAILURES = {
    "clip_grad_can_be_used_again": r"\['grad_value', 'grad_norm'\] ==",
    "loaded_dict_is_left_alone": "Extra items in the right set:\n.*base_param_settings",
    "failed_load_changes_nothing": r"'gen.lr': \[5.0\]",
    "state_of_another_model_is_refused_when_loaded": "DID NOT RAISE",
    "training_may_go_on_past_the_end": "loss_factor should be larger than zero",
    "resume_within_a_window_is_exact": "assert False",
    "counts_are_saved": "assert 0 == 3",
    "mixed_precision_on_the_cpu": "In CPU autocast, only support `torch.bfloat16`",
    "loss_scale_may_be_an_int": "must be of type float, dict.* but got 128",
    "bfloat16_needs_no_loss_scale": "assert 'loss_scaler' not in",
    "no_gradients_are_no_error": "No inf checks were recorded",
    "shared_scale_is_halved_once": "assert 16384.0 == 32768.0",
    "skipped_step_can_be_told": "no attribute 'skipped'",
    "norm_stays_on_the_device": "assert 3 == 0",
    "transform_stands_in_the_place_of_clip": "unexpected keyword argument 'transform'",
    "wrong_clip_grad_is_refused_at_once[clip0]": "AssertionError",
    "wrong_clip_grad_is_refused_at_once[clip1]": "DID NOT RAISE",
    "wrong_clip_grad_is_refused_at_once[clip2]": "DID NOT RAISE",
    "wrong_clip_grad_is_refused_at_once[clip3]": "DID NOT RAISE",
    "mistakes_are_value_errors": "AssertionError",
    "step_returns_what_the_optimizer_returns": "assert None == 1.5",
    "equal_groups_step_as_one": r"\[6, 6, 6, 6, 6, 6\] ==",
    "zero_grad_of_several_passes_arguments_on": "assert None is not None",
    "rules_for_all_parameters": r"\[0.1, 0.2, 0.1, 0.1, 0.1, 0.2\] ==",
    "rule_without_effect_warns": "matches no parameter",
    "misspelt_rule_is_refused": "DID NOT RAISE",
    "rms_norm_is_a_norm": r"\[0.01\] == \[0.0\]",
    "child_called_module_is_no_parallel_wrapper[rules0]": "Extra items in the right",
    "child_called_module_is_no_parallel_wrapper[rules1]": "Extra items in the right",
    "rules_can_compose": r"\[0.05, 0.01\d*\] ==",
    "summary_shows_the_whole_assignment": "no attribute 'summary'",
}
"""What pytest says about each test when MMEngine's classes stand in for ours."""


def test_each_test_fails_on_mmengine(tmp_path: pathlib.Path) -> None:
    """What is called better in the README is not so in MMEngine."""
    report = tmp_path / "report.xml"
    flags = ["-p", "mmengine_instead", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, f"--junitxml={report}", str(TESTS)],
        check=False,
        capture_output=True,
        text=True,
        cwd=TESTS.parent.parent,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    assert report.exists(), done.stdout + done.stderr
    cases = list(ET.parse(report).iter("testcase"))
    assert {f"test_{name}" for name in FAILURES} == {case.get("name") for case in cases}
    for case in cases:
        failure = case.find("failure")
        assert failure is not None, f"MMEngine passes {case.get('name')}"
        pattern = FAILURES[str(case.get("name")).removeprefix("test_")]
        said = f"{failure.get('message')}\n{failure.text}"
        assert re.search(pattern, said), said
