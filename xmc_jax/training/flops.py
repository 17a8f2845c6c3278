"""Floating-point operations of a traced program: those of its matrix products, exactly.

Counted on the jaxpr, before any compiler: the same on every platform, loops as often as they turn,
what is computed again in the backward pass included, what nothing uses left out. XLA's own count
has the body of a loop once.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations over all devices; a product and a sum are two.

    Attributes:
        fast: of products in the hardware's usual precision (bfloat16, TF32).
        exact: of products that ask for more than that of float32 operands (precision "highest").
    """

    fast: int = 0
    exact: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.fast + self.exact

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.fast + other.fast, self.exact + other.exact)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.fast * times, self.exact * times)


def count(program: core.ClosedJaxpr) -> Flops:
    """The operations of one run of a program.

    Args:
        program: as traced, e.g. by `jax.jit(f).trace(...).jaxpr`.

    Raises:
        ValueError: it has a loop whose number of turns is not static.
    """
    used, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _of(used)


def _of(jaxpr: core.Jaxpr) -> Flops:
    total = Flops()
    for one in jaxpr.eqns:
        total += _of_one(one)
    return total


def _of_one(one: core.JaxprEqn) -> Flops:
    name, params = one.primitive.name, one.params
    if name == "dot_general":
        return _product(one)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel, out = one.invars[1].aval.shape, one.outvars[0].aval
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return _kind(one, 2 * out.size * per_output)
    if name == "scan":
        return _of(params["jaxpr"].jaxpr) * params["length"]
    if name == "while":
        inner = _of(params["body_jaxpr"].jaxpr) + _of(params["cond_jaxpr"].jaxpr)
        return inner * _turns(one) if inner.total else inner
    if name == "cond":
        return max((_of(branch.jaxpr) for branch in params["branches"]), key=lambda f: f.total)
    if name == "shard_map":  # its body is what one device does
        mesh = params["mesh"]  # the name of its axes has changed between versions
        manual = params.get("newly_manual_axes") or params["manual_axes"]
        return _of(_open(params["jaxpr"])) * math.prod(mesh.shape[axis] for axis in manual)
    total = Flops()
    for inner in jax.tree.leaves(
        [params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params],
        is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
    ):
        total += _of(_open(inner))
    return total


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _product(one: core.JaxprEqn) -> Flops:
    (contracted, _), _ = one.params["dimension_numbers"]
    left = one.invars[0].aval.shape
    return _kind(one, 2 * one.outvars[0].aval.size * math.prod(left[axis] for axis in contracted))


def _kind(one: core.JaxprEqn, flops: int) -> Flops:
    highest = jax.lax.Precision.HIGHEST
    precision = one.params["precision"]
    exact = precision == highest or (isinstance(precision, tuple) and highest in precision)
    wide = all(str(variable.aval.dtype) in ("float32", "float64") for variable in one.invars)
    return Flops(exact=flops) if exact and wide else Flops(fast=flops)


def _turns(one: core.JaxprEqn) -> int:
    """Of `fori_loop` between bounds that are numbers: `i < n`, i rising by one."""
    condition = one.params["cond_jaxpr"].jaxpr
    carried = one.invars[one.params["cond_nconsts"] + one.params["body_nconsts"] :]
    consts = one.invars[: one.params["cond_nconsts"]]
    values = dict(zip(condition.invars, [*consts, *carried]))

    def number(variable: Any) -> int | None:
        variable = variable if isinstance(variable, core.Literal) else values.get(variable)
        return int(variable.val) if isinstance(variable, core.Literal) else None

    if len(condition.eqns) == 1 and condition.eqns[0].primitive.name == "lt":
        first, last = map(number, condition.eqns[0].invars)
        if first is not None and last is not None:
            return max(last - first, 0)
    raise ValueError(
        "flops: expected loops that turn a fixed number of times, got a while loop with matrix "
        f"products in it at {one.source_info.name_stack}; use jax.lax.scan"
    )
