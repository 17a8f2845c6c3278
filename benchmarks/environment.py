"""Where and when something was measured, and the file that says it."""

import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, versions, date and commit.

    Args:
        packages: whose versions matter.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def save(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes results as JSON, and says where.

    Args:
        path: of the file; its folder is made.
        content: "benchmark", "settings", what `environment` gives, and "results".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")  # of Linux, where `platform` knows no model
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _commit() -> str:
    # git's, else that in the environment: a benchmark may run from a copy without history.
    if shutil.which("git"):
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            cwd=pathlib.Path(__file__).parent,
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return os.environ.get("COMMIT", "unknown")
