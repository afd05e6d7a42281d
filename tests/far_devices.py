"""Devices that this machine lacks, as tensors see them: values lie in RAM, but each tensor has a home, and an operation
that mixes homes fails, as it would between two GPUs. So a transfer that is missing is found without a GPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "lazy"  # that PyTorch knows, for other uses, and that may be indexed


class _Far(torch.Tensor):
    """A tensor that says it is on a far device; `near` has its values."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, near: torch.Tensor, home: torch.device) -> "_Far":
        shape = {"strides": near.stride(), "dtype": near.dtype, "device": home}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, **shape)

    def __init__(self, near: torch.Tensor, home: torch.device) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


def _near(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == KIND else value
    return value.near if isinstance(value, _Far) else value


def _target(args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that an operation is told to put its result on."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.device)), None)


def _run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = op.overloadpacket.__name__
    checked = [args[0], args[2:]] if name in ("index", "index_put", "index_put_") else [args, kwargs]
    homes = {t.device for t in tree_leaves(checked) if isinstance(t, torch.Tensor) and t.dim()}
    if name.startswith("index"):  # indices may be on the CPU, too
        homes |= {t.device for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.device.type != "cpu"}
    if name not in ("to", "_to_copy", "copy_") and len(homes) > 1:
        raise RuntimeError(f"{op} mixes tensors of {', '.join(sorted(map(str, homes)))}")
    result = op(*tree_map(_near, args), **tree_map(_near, kwargs))
    if name.endswith("_") and op._schema.is_mutable:
        return args[0]
    everywhere = [t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    home = _target(args, kwargs) or next(iter(homes), (everywhere or [torch.device("cpu")])[0])
    return tree_map(lambda t: _Far(t, home) if isinstance(t, torch.Tensor) and home.type == KIND else t, result)


class FarDevices(TorchDispatchMode):
    """While it is entered there are as many devices lazy:0, lazy:1, ... as anybody names. `crossings`: source, target
    and shape of what went from one of them to another."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[str, str, tuple[int, ...]]] = []
        self._factories, self._inference = _Factories(), torch.inference_mode()

    def __enter__(self) -> "FarDevices":
        self._factories.__enter__()
        self._inference.__enter__()  # as the engine's steps are
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inference.__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source, target = getattr(args[0], "device", None) if args else None, _target(args, kwargs)
        if source is not None and target is not None and source.type == target.type == KIND and source != target:
            self.crossings.append((str(source), str(target), tuple(args[0].shape)))
        return _run(op, args, kwargs)


class _Factories(TorchFunctionMode):
    """torch.tensor copies to its device where a dispatch mode does not see it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == KIND:
            home = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(home)
        return function(*args, **kwargs)
