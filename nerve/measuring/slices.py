"""Matrices stacked in one parameter, such as those of experts, each treated as a projection.

A module may hold the weights of all its experts in three-dimensional parameters and multiply by one
slice after the other, so that there is no module for any of them. The memory address shows which
slice a product uses.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.ffns import Site
from nerve.measuring.tap import Hook

_PLACES = {"linear": (0, 1), "matmul": (0, 1), "mm": (0, 1), "addmm": (1, 2)}
"""For the name of a product: the positions of features and matrix among its arguments."""

PLAIN = "eager"
"""The name in transformers of the implementation that multiplies by one expert after the other."""


class Slice(nn.Module):
    """One of the matrices of a parameter, as a projection: products with it run through this
    module.

    It has no weights of its own, and no place among the model's modules.

    Attributes:
        stack: the matrices that it belongs to.
        holder: the module that has the parameter.
        index: the index of the matrix.
        in_features, out_features: widths of its input and output.
    """

    def __init__(self, stack: "Stack", index: int) -> None:
        super().__init__()
        self.stack, self.holder, self.index = stack, stack.holder, index
        a, b = stack.parameter.shape[-2:]
        self.out_features, self.in_features = (a, b) if stack.out_first else (b, a)

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`."""
        matrices = self.stack.parameter.detach().flatten(0, -3)
        return matrices[self.index] if self.stack.out_first else matrices[self.index].T

    @property
    def bias(self) -> Tensor | None:
        """`[out_features]`; None if none has been added so far."""
        if self.stack.bias_name is None:
            return None
        biases = getattr(self.holder, self.stack.bias_name).detach().flatten(0, -2)
        return biases[self.index]

    @property
    def label(self) -> str:
        """Its name in the holder, such as `down_proj[3]`."""
        return f"{self.stack.name}[{self.index}]"

    def forward(self, features: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """The product as the model computes it."""
        return multiply(features)


class Stack:
    """The matrices of one parameter.

    Attributes:
        holder: the module that has it.
        name: the name of the parameter.
        out_first: whether a matrix is `[out_features, in_features]`, as in a linear layer.
        slices: the matrices, in order.
        bias_name: the parameter of the biases added to the products, once that has been seen.
    """

    def __init__(self, products: "Products", name: str, *, out_first: bool) -> None:
        self.products, self.holder, self.name = products, products.holder, name
        self.out_first = out_first
        self.bias_name: str | None = None
        self.slices = [Slice(self, index) for index in range(self.parameter.shape[:-2].numel())]

    @property
    def may_have_bias(self) -> bool:
        """Whether the holder has a parameter with one vector per product."""
        size = (*self.parameter.shape[:-2], self.slices[0].out_features)
        return any(each.shape == size for each in self.holder.parameters(recurse=False))

    @property
    def parameter(self) -> Tensor:
        """`[*, a, b]`."""
        parameter = getattr(self.holder, self.name)
        assert isinstance(parameter, Tensor)
        return parameter


class Products:
    """Watches the products of one module with the matrices of its stacked parameters.

    If transformers computes them at once (grouped, batched), the module's plain implementation runs
    instead while they are watched: the same products, one expert after the other.

    Attributes:
        holder: the module.
        stacks: those used in products, by the name of the parameter.
    """

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder
        self.stacks: dict[str, Stack] = {}
        self.replaces: str | None = None
        """The implementation that the plain one has replaced."""
        self._is_watched = False

    def install(
        self, is_on: Callable[[], bool], found: Callable[[Slice], None] = lambda each: None
    ) -> list[RemovableHandle]:
        """Watches forward passes of the holder until the handles are removed; a pass that is
        already watched is not watched twice.

        Args:
            is_on: whether to watch a forward pass that begins.
            found: receives each slice before its first product.
        """
        running: list[_Watch] = []

        def enter(module: nn.Module, args: Any) -> None:
            # A replica of the holder shares this hook.
            if module is self.holder and is_on() and not self._is_watched:
                watch = _Watch(self, found)
                watch.__enter__()
                self._is_watched = True
                running.append(watch)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if running and module is self.holder:
                self._is_watched = False
                running.pop().__exit__(None, None, None)

        return [
            self.holder.register_forward_pre_hook(Hook(enter)),
            self.holder.register_forward_hook(Hook(leave), always_call=True),
        ]

    def slice_of(self, matrix: Any, *, is_linear: bool) -> Slice | None:
        """The slice used in a product; None for another tensor.

        Args:
            matrix: the matrix of the product.
            is_linear: whether it was given as `[out, in]`; otherwise as `[in, out]`.
        """
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            return None
        for name, parameter in stacked(self.holder):
            size = parameter.shape[-2:].numel()
            if (
                matrix.numel() != size
                or matrix.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
                or not parameter.is_contiguous()
            ):
                continue
            as_stored = matrix.shape == parameter.shape[-2:] and matrix.is_contiguous()
            out_first = is_linear == as_stored
            if name not in self.stacks:
                self.stacks[name] = Stack(self, name, out_first=out_first)
            stack = self.stacks[name]
            place = matrix.storage_offset() - parameter.storage_offset()
            if stack.out_first == out_first and place % size == 0:
                return stack.slices[place // size]
        return None


class _Watch(TorchFunctionMode):
    """One forward pass of a holder."""

    def __init__(self, products: Products, found: Callable[[Slice], None]) -> None:
        super().__init__()
        self._products, self._found = products, found
        self._waiting: tuple[Tensor, Slice, Tensor, Callable[[Tensor], Any]] | None = None
        self._config: Any = getattr(products.holder, "config", None)
        self._implementation = getattr(self._config, "_experts_implementation", None)

    def __enter__(self) -> "_Watch":
        holder = self._products.holder
        if torch.compiler.is_compiling():
            raise MeasurementError(
                "Experts whose weights are slices of one parameter, as in "
                f"{type(holder).__name__}, can only be measured in eager mode; the model is "
                "compiled. Measure held-out batches with nerve.measure, or train it uncompiled."
            )
        if self._implementation not in (None, PLAIN):
            if holder.training and torch.is_grad_enabled():
                raise MeasurementError(
                    "Experts are measured where the model multiplies by one after the other; "
                    f"{type(holder).__name__} takes all products at once "
                    f"({self._implementation}), and a training step is left as it is. Call "
                    f"model.set_experts_implementation({PLAIN!r}), or measure held-out batches."
                )
            self._products.replaces = self._implementation
            self._config._experts_implementation = PLAIN
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._implementation not in (None, PLAIN):
            self._config._experts_implementation = self._implementation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("add", "__add__") and len(args) == 2 and not kwargs:
            return self._sum(func, *args)
        place = _PLACES.get(name)
        if place is None or len(args) <= place[1]:
            return func(*args, **kwargs)
        at, of_matrix = place
        matrix = self._products.slice_of(args[of_matrix], is_linear=name == "linear")
        if matrix is None:
            return func(*args, **kwargs)
        self._found(matrix)

        def multiply(features: Tensor) -> Any:
            return func(*args[:at], features, *args[at + 1 :], **kwargs)

        is_whole = name == "addmm" or len(args) > 2 or bool(kwargs)
        if is_whole or not matrix.stack.may_have_bias:
            return matrix(args[at], multiply)
        # It runs when its bias is added, if that is the next operation on it.
        product = multiply(args[at])
        self._waiting = (product, matrix, args[at], multiply)
        return product

    def _sum(self, func: Any, one: Any, other: Any) -> Any:
        """A sum, which is the output of a slice if its bias is added to the product."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or one is not waiting[0] or not isinstance(other, Tensor):
            return func(one, other)
        _, matrix, features, multiply = waiting
        for name, biases in matrix.holder.named_parameters(recurse=False):
            if (
                biases.shape == (*matrix.stack.parameter.shape[:-2], matrix.out_features)
                and other.shape == biases.shape[-1:]
                and other.data_ptr() == biases.flatten(0, -2)[matrix.index].data_ptr()
            ):
                matrix.stack.bias_name = name
                return matrix(features, lambda given: func(multiply(given), other))
        return func(one, other)


def stacked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters that hold several matrices; those of a convolution hold one."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 3 and len(parameter.flatten(0, -3)) > 1:
            yield name, parameter


def products_of(pairs: Iterable[tuple[Site, Site]]) -> set[Products]:
    """The products whose slices are among the sites of FFNs."""
    modules = [site.module for pair in pairs for site in pair]
    return {each.stack.products for each in modules if isinstance(each, Slice)}
