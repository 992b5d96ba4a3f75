"""What tests of the diffusion room share."""

import functools

import jax

# For programs that run once or twice: most of a cold test is the compiler's work, not the program's.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
