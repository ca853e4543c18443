"""The feed-forward network, plain or gated: the module whose features are measured."""

from dataclasses import dataclass
from fractions import Fraction

from jaxtyping import Float
from torch import Tensor, nn

from nerve.config import require, require_choice
from nerve.nn.constraint import CONSTRAINTS, constrain

Width = int | float | str


@dataclass(frozen=True)
class FFNDesign:
    """The shape of the feed-forward networks.

    Attributes:
        width: d_ff / d_model, a number or a fraction such as `"8/3"`.
        d_ff: the hidden width itself; exactly one of `width` and `d_ff` is set.
        gated: whether the activation's output is multiplied by a second projection of the input.
        bias: whether the matrices add a bias.
        constraint: a key of `CONSTRAINTS`, applied to every matrix.

    Raises:
        ConfigError: for an invalid value, or for both `width` and `d_ff`.
    """

    width: Width | None = 4
    d_ff: int | None = None
    gated: bool = False
    bias: bool = True
    constraint: str = "none"

    def __post_init__(self) -> None:
        require_choice("ffn.constraint", self.constraint, CONSTRAINTS)
        require(
            self.width is not None or self.d_ff is not None,
            "One of ffn.width and ffn.d_ff must be set; both are null.",
        )
        check_width(self.width, self.d_ff, "ffn")

    def hidden_width(self, d_model: int) -> int:
        """d_ff in a network of width `d_model`.

        Raises:
            ConfigError: if `width` times `d_model` is not an integer.
        """
        return hidden_width(self.width, self.d_ff, d_model, "ffn")


def check_width(width: Width | None, d_ff: int | None, group: str) -> None:
    """Raises `ConfigError`, with the keys of `group`, for an invalid `width` or `d_ff`, or both."""
    require(
        width is None or d_ff is None,
        f"Only one of {group}.width and {group}.d_ff may be set; got {group}.width={width} and "
        f"{group}.d_ff={d_ff}. Set one of them to null.",
    )
    require(
        d_ff is None or (isinstance(d_ff, int) and d_ff > 0),
        f"{group}.d_ff must be a whole number of at least 1; got {d_ff!r}.",
    )
    require(
        width is None or _fraction(width) > 0,
        f"{group}.width must be a positive number or a fraction such as 8/3; got {width!r}.",
    )


def hidden_width(width: Width | None, d_ff: int | None, d_model: int, group: str) -> int:
    """`d_ff`, or else `width` · `d_model`, exactly.

    Raises:
        ConfigError: if the product is not an integer; names the keys of `group`.
    """
    if width is None:
        assert d_ff is not None
        return d_ff
    product = _fraction(width) * d_model
    require(
        product.denominator == 1,
        f"{group}.width times model.d_model must be a whole number; got {group}.width={width} and "
        f"model.d_model={d_model}, product {float(product):.2f}. Set {group}.width=null and "
        f"{group}.d_ff={round(product)}, or choose another width.",
    )
    return int(product)


def _fraction(width: Width) -> Fraction:
    """`width` as written in decimal, so 0.1 is one tenth; 0 if it is not a number."""
    try:
        return Fraction(str(width))
    except (ValueError, ZeroDivisionError):
        return Fraction(0)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) (Shazeer 2020).

    It has the attributes that a probe needs: `layer`, `name`, `pre`, `post` and `gated`, and, if
    known, `stream`.

    Args:
        d_in: width of the input and of the output.
        d_ff: hidden width, the number of features.
        act: the nonlinearity.
        gated, bias, constraint: as in `FFNDesign`.
        dropout: on the output, in training.
        layer: depth of the block, from 0.
        name: name of the FFN in its block: `ffn`, `token_mixing` or `channel_mixing`.
        stream: the module whose first argument is the residual stream before this FFN and its norm,
            and whose output is the stream after them; it is not a submodule of this module.
    """

    def __init__(
        self,
        d_in: int,
        d_ff: int,
        act: nn.Module,
        *,
        gated: bool = False,
        bias: bool = True,
        constraint: str = "none",
        dropout: float = 0.0,
        layer: int = 0,
        name: str = "ffn",
        stream: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.up = constrain(nn.Linear(d_in, d_ff, bias=bias), constraint)
        self.gate = constrain(nn.Linear(d_in, d_ff, bias=bias), constraint) if gated else None
        self.act = act
        self.down = constrain(nn.Linear(d_ff, d_in, bias=bias), constraint)
        self.dropout = nn.Dropout(dropout)
        self._around = (stream,)  # in a tuple, so that it does not become a submodule

    @property
    def stream(self) -> nn.Module | None:
        """The module that adds this FFN to the residual stream: its first argument is the stream
        before, its output the stream after."""
        return self._around[0]

    @property
    def pre(self) -> nn.Linear:
        """The matrix whose output is the pre-activation."""
        return self.up if self.gate is None else self.gate

    @property
    def gated(self) -> bool:
        """Whether the activation's output is multiplied by a second projection."""
        return self.gate is not None

    @property
    def post(self) -> nn.Linear:
        """The matrix whose input is the post-activation."""
        return self.down

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        hidden = self.act(self.pre(x))
        if self.gate is not None:
            hidden = hidden * self.up(x)
        return self.dropout(self.down(hidden))
