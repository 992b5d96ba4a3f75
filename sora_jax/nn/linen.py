"""Pure functions of declared parameters as Flax Linen modules, for code that is written around modules.

module = as_module(denoiser_specs(config), lambda params, *inputs: denoise(params, config, *inputs))
variables = module.init(key, pack, x_BLP, times_BR)
module.apply(variables, pack, x_BLP, times_BR)   # equals denoise(variables["params"]["tree"], config, ...)
"""

from collections.abc import Callable

import flax.linen as nn

from sora_jax.nn.params import init

TREE = "tree"


def as_module(specs: dict, function: Callable) -> nn.Module:
    """A Linen module whose parameters are those of `specs`, under the one name TREE, and which calls `function`.

    `function(params, *inputs)` may return anything. The initial values are those of `init(specs, key)` with the key
    that Linen gives to a parameter. Trees of parameters go in and out unchanged: {"params": {TREE: params}}.
    """

    class Function(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            return function(self.param(TREE, lambda key: init(specs, key)), *inputs)

    return Function()
