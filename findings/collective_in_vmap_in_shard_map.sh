#!/usr/bin/env bash
# jax 0.10.2: in a jax.shard_map that checks what varies (the default), a collective over the axis of a jax.vmap
# inside it fails with an assertion that has no message; with check_vma=False it is right. Two devices.
# Expected: the sum over the mapped axis, as outside the shard_map, or an error that names the axis.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def total(x):
    return jax.vmap(lambda a: jax.lax.psum(a, "i"), axis_name="i")(jnp.stack([x, x]))


mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.arange(4.0)
print("jax", jax.__version__)
for check in (False, True):
    sharded = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check))
    try:
        print("check_vma", check, sharded(x)[0])
    except AssertionError as error:
        print("check_vma", check, "AssertionError, message", repr(str(error)))
PROGRAM
found=$(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 "$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$found"
test "$found" = "jax 0.10.2
check_vma False [0. 2. 4. 6.]
check_vma True AssertionError, message ''"
