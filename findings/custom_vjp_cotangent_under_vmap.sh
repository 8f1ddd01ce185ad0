#!/usr/bin/env bash
# jax 0.10.2: a jax.custom_vjp under jax.vmap. Where an argument is not mapped, and the cotangent that the backward
# rule returns for it does not depend on anything mapped, that cotangent is counted once and not once for each copy.
# The same loss in a Python loop, or with jax.lax.map, has the right gradient. A constant is the simplest case; so
# is a sum over residuals that the copies share.
# Expected: 3.0 in all three lines, for three copies with a cotangent of 1 each.
# Way round: make what is returned depend on the cotangent that comes in, or broadcast it in a custom_vmap rule.
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


scaled.defvjp(lambda x, w: (x * w, w), lambda w, g: (g * w, jnp.float32(1.0)))
xs = jnp.arange(3.0)
print("jax", jax.__version__)
print("loop:", jax.grad(lambda w: sum(scaled(x, w) for x in xs))(2.0))
print("map:", jax.grad(lambda w: jax.lax.map(lambda x: scaled(x, w), xs).sum())(2.0))
print("vmap:", jax.grad(lambda w: jax.vmap(lambda x: scaled(x, w))(xs).sum())(2.0))
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$found"
test "$found" = "jax 0.10.2
loop: 3.0
map: 3.0
vmap: 1.0"
