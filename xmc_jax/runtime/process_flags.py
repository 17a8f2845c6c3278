"""The flags that make a process one of several, and what is wrong with them."""

import os
import re
from collections.abc import Mapping
from typing import Any


def check(
    mode: str,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Checks what `initialize` takes, without starting anything.

    Raises:
        ValueError: one contradicts another.
    """
    given = flags_of(coordinator_address, num_processes, process_id)
    present = [flag for flag, value in given.items() if value is not None]
    if mode == "off" and present:
        raise ValueError(f"{present[0]}: expected none with --distributed=off, got one")
    if present and len(present) < len(given):
        missing = [flag for flag in given if flag not in present]
        raise ValueError(
            f"{present[0]}: expected {' and '.join(missing)} with it, or none of the three where "
            f"JAX finds the processes by itself"
        )
    if not present:
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator_address):
        raise ValueError(f"--coordinator_address: expected HOST:PORT, got {coordinator_address!r}")
    if num_processes < 1:
        raise ValueError(f"--num_processes: expected at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id: expected 0 to {num_processes - 1}, one less than --num_processes, got "
            f"{process_id}"
        )


def flags_of(address: str | None, count: int | None, number: int | None) -> dict[str, Any]:
    """The flags by their names."""
    return {"--coordinator_address": address, "--num_processes": count, "--process_id": number}


def described(flags: Mapping[str, Any]) -> str:
    """The flags as a command line has them."""
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    return " ".join(given) or "as JAX found them"


def is_lone_task() -> bool:
    """Whether SLURM started one task, as in an interactive job."""
    return os.environ.get("SLURM_NTASKS") == "1" and "OMPI_MCA_orte_hnp_uri" not in os.environ
