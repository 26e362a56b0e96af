from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner

from moeify.cli import main
from moeify.kernels import selfcheck


def test_a_healthy_machine_passes() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["failed"] == [] and report["worst"].keys() == {"float32", "float16", "bfloat16"}
    if not torch.cuda.is_available():
        assert report["checked"] == "the CPU path; the Triton kernels need a GPU"
    assert report["torch"] == torch.__version__.split("+")[0] or report["torch"] == torch.__version__


def test_a_kernel_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_wrong(device: torch.device, dtype: torch.dtype) -> Iterator[selfcheck.Check]:
        yield selfcheck.Check("experts: output", 0.5 if dtype == torch.float32 else 0.0)

    monkeypatch.setattr(selfcheck, "self_check", one_wrong)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "experts: output in float32: 5.0e-01" in result.stdout


def test_a_check_that_cannot_run_is_a_failure_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, dtype: torch.dtype) -> Iterator[selfcheck.Check]:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(selfcheck, "self_check", broken)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1 and "and more" not in result.stdout
    assert "bfloat16 was not checked: RuntimeError: no kernel image" in result.stdout
