from xmc_jax.runtime.wording import counted


def test_numbers_with_their_nouns():
    said = [counted(n, "step") for n in (0, 1, 1200)]
    assert said == ["0 steps", "1 step", "1,200 steps"]
    assert [counted(n, "leaf", "leaves") for n in (1, 2)] == ["1 leaf", "2 leaves"]
