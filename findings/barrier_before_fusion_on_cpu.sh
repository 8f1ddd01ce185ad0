#!/usr/bin/env bash
# jax 0.10.2 on a CPU: jax.lax.optimization_barrier does not keep XLA from computing a scalar once for each of its
# readers. The barrier is in the program that JAX lowers, and gone before fusion: here forty floors of one scalar,
# read by thirty arrays, are 1,980 floors in the compiled program, with the barrier and without it. Compile time
# grows with them.
# Expected: what is behind a barrier is computed once, so forty floors.
# Way round: a jax.lax.cond whose predicate is never true, which XLA can't know: forty floors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp


def scalar(x):
    for k in range(40):
        x = jnp.where(x > k, x * 1.5 - jnp.floor(x), x + jnp.sqrt(jnp.abs(x)))
    return x


def by_condition(x, count):
    return jax.lax.cond(count < 0, lambda x: jnp.zeros_like(x), lambda x: x, x)


def floors(kept):
    def step(x, count, arrays):
        x = kept(scalar(x), count)
        return [jnp.where(x > number, array, -array) for number, array in enumerate(arrays)]

    lowered = jax.jit(step).lower(1.0, 0, [jnp.ones(100 + number) for number in range(30)])
    return lowered.compile().as_text().count(" floor(")


print("jax", jax.__version__)
print("as it is:", floors(lambda x, count: x))
print("barrier:", floors(lambda x, count: jax.lax.optimization_barrier(x)))
print("condition:", floors(by_condition))
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$found"
test "$found" = "jax 0.10.2
as it is: 1980
barrier: 1980
condition: 40"
