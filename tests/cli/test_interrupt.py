"""A real Ctrl-C to a real process, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shape_moe.demo.tasks import examples
from support.data import write_lines

EXAMPLES = 150


def test_ctrl_c_and_resume(embedded, tmp_path) -> None:
    """The resumed trace is that of an undisturbed run."""
    file = write_lines(tmp_path / "d.jsonl", examples("words", EXAMPLES, seed=1))

    def command(out: Path) -> list[str]:
        options = ["--samples", str(EXAMPLES), "--batch-size", "1", "--device", "cpu", "-o", str(out)]
        return [sys.executable, "-m", "shape_moe", "trace", str(embedded), "--data", str(file), *options]

    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # batches this small only wait for a second one
    with subprocess.Popen(
        command(tmp_path / "t"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=one_thread
    ) as process:
        for line in process.stderr:
            if line.startswith("Loading the model"):
                break
        time.sleep(0.3)  # some batches pass
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "Stopping after this batch" in err
    kept = f"Interrupted. What was finished is kept in {tmp_path / 't.partial'}; the same command resumes from there."
    assert err.splitlines()[-1] == kept
    assert "Traceback" not in err
    assert not (tmp_path / "t").exists()
    done = json.loads((tmp_path / "t.partial" / "so-far.json").read_text())["batches"]
    assert 0 < done < EXAMPLES
    for out in ("t", "whole"):
        again = subprocess.run(command(tmp_path / out), capture_output=True, text=True, check=False, env=one_thread)
        assert again.returncode == 0, again.stderr
    for layer in range(4):
        parts = [tmp_path / name / "coalitions" / f"layer-{layer:03d}.parquet" for name in ("t", "whole")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
