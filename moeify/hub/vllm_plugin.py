"""vLLM's entry point: its Transformers backend serves checkpoints in moeify format.

That backend makes the model by `from_config`, which `register` taught to put the layers in place. Experts whose
parameters all have three dimensions it computes itself, as a SwiGLU with the sizes of the config, whatever they are;
what would come out wrong is refused. Experts with biases it leaves to the model.
"""

from __future__ import annotations

from moeify.errors import RefusedError
from moeify.hub import registration
from moeify.plan import Plan


def register() -> None:
    """Make vLLM read moeify checkpoints; it calls this in each of its processes."""
    registration.register(check)


def check(plan: Plan) -> None:
    """Refuse a model that vLLM would compute otherwise.

    Raises:
        RefusedError: It is one.
    """
    config, why = plan.config, None
    for site in plan.sites:
        biased = site.up_bias or site.down.bias is not None
        if not biased and (site.activation != "silu" or not site.gated):
            why = f"{site.path} has experts without biases that are no SwiGLU ({site.activation})"
        elif not biased and site.intermediate != plan.sites[0].intermediate:
            why = f"{site.path} has experts of another size than {plan.sites[0].path}"
    if config.router.name != "softmax":  # no other was run: some hold buffers, which vLLM leaves without values
        why = f"its router is {config.router.name!r} and not 'softmax'"
    if config.eval_capacity_factor is not None:
        why = "its experts have a capacity in evaluation"
    if why:
        raise RefusedError(f"vLLM would compute this model otherwise: {why}; serve it with transformers")
