"""Options for programs that a test compiles and runs once or twice."""

import jax

# Compiling costs these programs more than running them: no optimisation, and on JAX 0.10 XLA's older code generator, which
# takes a quarter of the time (a four-layer hybrid on two cores: 0.4 s instead of 1.8). From 0.11 on there is no other.
QUICK: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
