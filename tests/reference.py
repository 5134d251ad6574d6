"""Golden files hold what published code computed: `state.` its parameters, `grad.` their gradients."""


def below(tensors, prefix):
    """The tensors whose names start with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
