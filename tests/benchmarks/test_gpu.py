"""benchmarks/gpu from end to end, on a model of two small layers: that it runs, not how fast."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner


@pytest.mark.filterwarnings("ignore")  # other people's code, as for whoever runs the script
def test_the_script_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    import typer

    from benchmarks.gpu.__main__ import main

    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "gpu.json"
    result = CliRunner().invoke(
        app, ["--device", "cpu", "--tiny", "--no-tests", "--output", str(output)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(output.read_text())
    assert figures["weight_bytes"] == 4 * (300 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96))
    assert figures["adapter_bytes"] == 4 * 16 * 2 * (2 * 128 + 2 * 96 + 3 * 160)
    for name in ("base_step", "lora_step", "prefill", "prefill_lora", "transformers_prefill", "swap"):
        assert figures[name] > 0, name
    assert figures["peft_step"] is not None, figures["peft_note"]
    assert len(figures["ratios"]) == 6
    assert "LoRA rows / PEFT's mixed batch" in result.output
