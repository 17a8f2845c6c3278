"""Compares checkpoints with their digests: `python -m xmc_jax.training.verify WORKDIR`.

A line for each, exit code 1 if one is not whole. The content is one SHA-256 over names, dtypes,
shapes and values of the state's arrays: of equal runs it is the same, while files differ, whose
names are random. With --arrays, each array's own digest too. Nothing is written.
"""

import dataclasses
import sys

from absl import logging

from xmc_jax.files import digests
from xmc_jax.runtime import command
from xmc_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What the flags ask for.

    Attributes:
        workdir: of the run, local or gs://...
        arrays: whether to print the digest of each array.
    """

    workdir: str
    arrays: bool


def verify(options: VerifyOptions) -> None:
    """Prints what is found.

    Raises:
        ValueError: there is no checkpoint, or one of them is not whole.
    """
    failed = []
    with checkpoint.Checkpoints(options.workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"{options.workdir}: expected checkpoints, found none")
        for step in steps:
            finding = checkpoints.finding(step)
            if finding.kind in ("damaged", "newer"):
                print(f"step {step}: {finding.kind}: {finding.reason}")
                failed.append(step)
                continue
            arrays = digests.of_arrays(checkpoints.arrays(step))
            note = f": {finding.reason}" if finding.reason else ""
            print(f"step {step}: {finding.kind}, content {digests.combined(arrays)}{note}")
            if options.arrays:
                print("".join(f"  {digest} {name}\n" for name, digest in arrays.items()), end="")
    if failed:
        raise ValueError(f"{options.workdir}: expected whole checkpoints, found others: {failed}")


def _parse() -> VerifyOptions:
    parser = command.Parser(prog="verify", description="Compare checkpoints with their digests.")
    parser.add_argument("workdir", help="of a run, local or gs://...")
    parser.add_argument("--arrays", action="store_true", help="print each array's digest")
    arguments = parser.parse_args()
    return VerifyOptions(arguments.workdir, arguments.arrays)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it writes nothing
    sys.exit(command.run("verify", _parse, verify))
