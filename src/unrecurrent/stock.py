"""Whether a layer does what its weights say, nothing of one's own in their place, and is run rather than rewritten."""

import torch
from torch import Tensor, nn

#: the methods of a module by which it computes
_COMPUTING = {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward"}
#: what a subclass may define, beside special methods, without changing what a layer computes
_HARMLESS = {*vars(nn.Module), "extra_repr", "reset_parameters", "flatten_parameters"} - _COMPUTING


def is_traced() -> bool:
    """Whether torch is writing down what runs, for inputs of other lengths too, rather than running it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed(x: Tensor) -> bool:
    """Whether only ordinary operations will do: tracing, function transforms, forward-mode AD, autocast, modes."""
    return (
        is_traced()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )


def is_stock(module: nn.Module) -> bool:
    """Whether a recurrent layer does what its weights say: torch's or the package's, nothing replaced, no hooks."""
    if not isinstance(module, nn.RNNBase) and not hasattr(module, "cell_kind"):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or torch.nn.modules.module._has_any_global_hook()
    return not (hooked or is_replaced(module))


def is_replaced(layer: nn.Module) -> bool:
    """Whether a recurrent layer has a method, of its class or put on it, of which its weights say nothing."""
    own = vars(layer).keys() - _HARMLESS - {"_compiled_call_impl"}
    patched = any(callable(vars(layer)[name]) and hasattr(type(layer), name) for name in own)
    home = type(layer).forward.__module__
    known = home == nn.RNNBase.__module__ or home.startswith(f"{__package__}.")
    return not known or patched or _overridden(type(layer))


def _overridden(kind: type) -> bool:
    """Whether a class from elsewhere puts something of its own in the place of what a layer has."""
    known = {"_flat_weights", *(name for parent in kind.__mro__ if _is_ours(parent) for name in vars(parent))}
    foreign = {name for parent in kind.__mro__ if not _is_ours(parent) for name in vars(parent)}
    return bool({name for name in foreign & known if not name.startswith("__") or name == "__call__"} - _HARMLESS)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("torch", __package__, "builtins")
