"""The examples: five lines are enough, and the student becomes smaller at about the same accuracy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_five_lines_are_enough():
    lines = (EXAMPLES / "quickstart_kddp.py").read_text().splitlines()
    added = [line for line in lines if line.endswith("# kddp")]
    assert len(added) == 5
    plain = (EXAMPLES / "quickstart.py").read_text()
    assert not [line for line in added if line.removesuffix("# kddp").strip() in plain]


def accuracies(output):
    return [float(number) for number in re.findall(r"Accuracy: ([\d.]+)%", output)]


@pytest.mark.timeout(600)
def test_the_student_is_smaller_and_at_most_one_point_worse(tmp_path):
    outputs = [
        subprocess.run(
            [sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for name in ("quickstart.py", "quickstart_kddp.py")
    ]
    plain, pruned = accuracies(outputs[0])[-1], accuracies(outputs[1])[-1]
    assert plain > 95
    assert pruned >= plain - 1
    before, *_, after = [int(n.replace(",", "")) for n in re.findall(r"parameters ([\d,]+)", outputs[1])]
    assert after < before / 2
