#!/usr/bin/env bash
# jax 0.10.2: jax.custom_vjp(..., symbolic_zeros=True), whose forward rule keeps other residuals where an argument
# is not perturbed, as it may know from `.perturbed`. Two calls of one jitted function, one with the argument
# perturbed and one without, share a trace, and with it one tree of residuals: the backward pass of the first call
# is given the tree of the second, and an assertion without a message fails. Without jit both calls are right.
# Expected: each call has the residuals that its forward rule returned, or the rule is told that it must not.
# Way round: residuals of one structure, with an array that says which case it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp


@jax.custom_vjp
def scaled(x, w):
    return x * w


def forward(x, w):
    kept = (x.value, w.value) if w.perturbed else (w.value,)
    return scaled(x.value, w.value), kept


def backward(kept, g):
    if len(kept) == 1:
        return g * kept[0], None
    x, w = kept
    return g * w, g * x


scaled.defvjp(forward, backward, symbolic_zeros=True)


def loss(function):
    return lambda x, w: function(x, w) + function(x, jnp.float32(5.0))


print("jax", jax.__version__)
print("without jit:", *jax.grad(loss(scaled), argnums=(0, 1))(jnp.float32(2.0), jnp.float32(3.0)))
try:
    print("with jit:", *jax.grad(loss(jax.jit(scaled)), argnums=(0, 1))(jnp.float32(2.0), jnp.float32(3.0)))
except AssertionError as error:
    print("with jit: AssertionError, message", repr(str(error)))
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$found"
test "$found" = "jax 0.10.2
without jit: 8.0 2.0
with jit: AssertionError, message ''"
