#!/usr/bin/env bash
# jax 0.10.2: jax.experimental.jet drops the rule of a jax.custom_jvp (and of a custom_vjp, in the same way)
# without a word where the function's body does nothing, such as a mark or a gradient that is scaled: the
# derivative is then that of the body. Where the body computes anything, jet fails with an
# UnexpectedTracerError. jax.grad follows the rule in both. Expected: the rule's derivative, or an error that
# names custom rules.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp
from jax.experimental.jet import jet


def with_rule(function):
    function = jax.custom_jvp(function)
    function.defjvp(lambda primals, tangents: (function(*primals), 100.0 * tangents[0]))
    return function


x, one = jnp.float32(3.0), jnp.float32(1.0)
print("jax", jax.__version__)
for name, function in (("identity", with_rule(lambda x: x)), ("square", with_rule(lambda x: x * x))):
    try:
        found = jet(function, (x,), ((one,),))[1][0]
    except jax.errors.UnexpectedTracerError as error:
        found = type(error).__name__
    print(name, "jax.grad", jax.grad(function)(x), "jet", found)
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$found"
test "$found" = "jax 0.10.2
identity jax.grad 100.0 jet 1.0
square jax.grad 100.0 jet UnexpectedTracerError"
