"""Wrap pure functions of declared parameters in Flax Linen modules, for code that is written around modules.

module = as_module(denoiser_specs(config), lambda params, *inputs: denoise(params, config, *inputs))
variables = module.init(key, pack, x_BLP, times_BR)
module.apply(variables, pack, x_BLP, times_BR)   # equals denoise(variables["params"]["tree"], config, ...)
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from sora_jax.nn.params import init

TREE = "tree"


def as_module(specs: dict, function: Callable) -> nn.Module:
    """Return a Linen module that calls `function(params, *inputs)`, which may return anything.

    The module has one parameter, the tree declared by `specs`: its variables are {"params": {TREE: params}}. Initial
    values are those of `init(specs, key)` with the key that Linen gives to a parameter.
    """

    class Function(nn.Module):
        @nn.compact
        def __call__(self, *inputs: Any) -> Any:
            return function(self.param(TREE, lambda key: init(specs, key)), *inputs)

    return Function()
