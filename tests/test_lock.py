"""requirements.lock: the versions of requirements.txt, each with hashes, from no one index."""

import pathlib
import re

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]


def test_the_lock_is_of_the_pins():
    """`make lock` has been run since requirements.txt was changed."""
    text = (ROOT / "requirements.lock").read_text(encoding="ascii")
    locked = {}
    for block in text.replace(" \\\n", " ").splitlines():
        if not block or block.startswith("#"):
            continue
        words, *hashes = re.split(r" +--hash=sha256:", block.strip())
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), words
        requirement = Requirement(words)
        locked[requirement.name] = str(requirement.specifier), requirement.marker
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {
        pin.name: (str(pin.specifier), pin.marker)
        for line in lines
        if line and not line.startswith("#") and (pin := Requirement(line))
    }
    assert {name: of for name, (of, _) in locked.items()} == {n: of for n, (of, _) in pins.items()}
    linux = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
    for minor in range(11, 15):
        where = linux | {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
        for name, (_, marker) in locked.items():
            wanted = pins[name][1]
            assert (marker is None or marker.evaluate(where)) == (
                wanted is None or wanted.evaluate(where)
            )
    assert "://" not in text
