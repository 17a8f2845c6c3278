"""AdamW and its groups against numpy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xmc_jax.config import OptimizerConfig
from xmc_jax.training import optimizer

STEPS = 20
CONFIG = OptimizerConfig(
    lr=(("backbone/.*", 2e-3), (".*", 5e-3)),
    weight_decay=((".*bias", 0.0), ("free_vectors", 0.0), (".*", 0.1)),
    warmup_steps=5,
)
GROUPS = {  # lr, weight decay
    "backbone/dense/kernel": (2e-3, 0.1),
    "backbone/dense/bias": (2e-3, 0.0),
    "combiner/norm": (5e-3, 0.1),
    "free_vectors": (5e-3, 0.0),
}


def tree(rng):
    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "backbone": {"dense": {"kernel": array(4, 3), "bias": array(3)}},
        "combiner": {"norm": array(3)},
        "free_vectors": array(5, 2),
    }


def flat(params):
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in paths}


def run(cfg, params, grads, total=STEPS):
    transform = optimizer.build(cfg, params, total)

    @jax.jit
    def step(params, state, grad):
        updates, state = transform.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return flat(params)


def problem():
    rng = np.random.default_rng(0)
    return tree(rng), [tree(rng) for _ in range(STEPS)]


def rate(step):
    return step / 5 if step < 5 else (STEPS - step) / (STEPS - 5)


def test_adamw_is_the_definition_in_every_group():
    params, grads = problem()
    ours = run(CONFIG, params, grads)
    for name, (lr, decay) in GROUPS.items():
        x = flat(params)[name].astype(float)
        m = v = np.zeros_like(x)
        for t, grad in enumerate(grads):
            g = flat(grad)[name].astype(float)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            update = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-6)
            x = x - lr * rate(t) * (update + decay * x)
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-6, err_msg=name)


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    params, grads = problem()
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in flat(params).items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [tensors[name]], "lr": lr, "weight_decay": decay}
            for name, (lr, decay) in GROUPS.items()
        ],
        eps=1e-6,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    for grad in grads:
        for name, g in flat(grad).items():
            tensors[name].grad = torch.tensor(g)
        adamw.step()
        scheduler.step()
    for name, ours in run(CONFIG, params, grads).items():
        theirs = tensors[name].detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6, err_msg=name)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    params, grads = problem()
    norms = [np.sqrt(sum((g**2).sum() for g in flat(grad).values())) for grad in grads]
    assert min(norms) > 2
    scaled = [jax.tree.map(lambda g, n=n: g * 2 / n, grad) for grad, n in zip(grads, norms)]
    fields = {"lr": CONFIG.lr, "weight_decay": CONFIG.weight_decay, "warmup_steps": 5}
    clipped = run(OptimizerConfig(**fields, clip_norm=2.0), params, grads)
    by_hand = run(OptimizerConfig(**fields), params, scaled)
    for name in clipped:
        np.testing.assert_allclose(clipped[name], by_hand[name], atol=1e-6)
    untouched = run(OptimizerConfig(**fields, clip_norm=1e3), params, grads)
    for name, x in run(OptimizerConfig(**fields), params, grads).items():
        np.testing.assert_allclose(untouched[name], x, atol=1e-7)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (4, 10), (10, 10), (20, 10)])
def test_schedule_is_linear_up_and_down(warmup, total):
    for step in range(total + 2):
        if step < warmup:
            expected = step / max(1, warmup)
        else:
            expected = max(0.0, (total - step) / max(1, total - warmup))
        assert optimizer.schedule(step, warmup, total) == pytest.approx(expected, abs=1e-7)


def test_parts_go_together_again_and_only_one_is_trained():
    params, _ = problem()
    patterns = (("backbone/dense/bias", True), ("backbone/.*", False), (".*", True))
    trainable, frozen = optimizer.partition(params, patterns)
    assert set(flat(frozen)) == {"backbone/dense/kernel"}
    assert set(flat(trainable)) == {"backbone/dense/bias", "combiner/norm", "free_vectors"}
    merged = optimizer.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params)))
    everything, nothing = optimizer.partition(params, ((".*", True),))
    assert nothing == {} and flat(everything).keys() == flat(params).keys()
    assert optimizer.merge(everything, nothing).keys() == params.keys()


def test_names_are_enough_to_build():
    params, grads = problem()
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    transform = optimizer.build(CONFIG, shapes, STEPS)
    state = transform.init(params)
    updates, _ = transform.update(grads[0], state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("backbone/.*", 1.0),), r"optimizer.lr: no pattern .* matches \['combiner/norm'"),
        ((("bias", 1.0), (".*", 1.0)), r"optimizer.lr: \['bias'\]: expected to be the first match"),
        (((".*", 1.0), ("combiner/.*", 2.0)), r"optimizer.lr: \['combiner/\.\*'\]"),
    ],
)
def test_patterns_must_cover_and_count(groups, message):
    params, _ = problem()
    with pytest.raises(ValueError, match=message):
        optimizer.build(OptimizerConfig(lr=groups), params, STEPS)


def test_partition_refuses_patterns_that_do_not_count():
    with pytest.raises(ValueError, match=r"optimizer.trainable: \['lora.*'\]"):
        optimizer.partition(problem()[0], (("lora.*", True), (".*", False)))
