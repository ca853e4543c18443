"""Tiny mixtures of experts: of transformers, in a list, and in stacked parameters."""

from typing import Any

import torch
import transformers
from by_hand import Plain
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

D, FF, N, TOP, VOCAB = 8, 12, 5, 2, 32
IDLE = 0

FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": N, "intermediate_size": FF}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": N, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 10},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": N, "moe_intermediate_size": FF, "head_dim": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": N, "intermediate_size": FF, "head_dim": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": N, "intermediate_size": FF}),
}


def model_of(family: str, ff: int = FF) -> Any:
    """A tiny random model in float64 whose first expert gets no token: among the logits of the
    others, which are those of v, -v, u and -u, two are always above its own, 0."""
    name, values = FAMILIES[family]
    values = {k: ff if v == FF else v for k, v in values.items()}
    config = getattr(transformers, name)(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=TOP,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        **values,
    )
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.AutoModel.from_config(config).double().eval()
    for layer in model.layers:
        with torch.no_grad():
            for weight in layer.mlp.experts.parameters():
                weight.normal_()
            v, u = torch.randn(2, D, dtype=torch.float64)
            router = router_of(layer.mlp)
            router.weight.copy_(torch.stack([torch.zeros_like(v), v, -v, u, -u]))
            if getattr(router, "bias", None) is not None:
                router.bias.zero_()
    return model


def router_of(mixture: Any) -> Any:
    """The module that chooses the experts; the third part of its output has their indices."""
    return mixture.gate if hasattr(mixture, "gate") else mixture.router


def batches_of(*, padded: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, VOCAB, (4, 7), generator=generator)
        lengths = torch.tensor([[7], [3], [5], [7 if not padded else 1]])
        mask = (torch.arange(7) < lengths).long() if padded else torch.ones_like(ids)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class Mixture(nn.Module):
    """Sends each token to the expert that a projection chooses, if any."""

    def __init__(self, experts: nn.Module, n: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.router, self.experts, self.n, self.scaled = nn.Linear(D, n), experts, n, scaled

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.router(tokens).argmax(-1)
        given = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            if len(rows):
                given[rows] = expert(tokens[rows] * (2 if self.scaled else 1))
        return x + given.reshape(x.shape)


class Net(nn.Module):
    """Embeds tokens, and runs two mixtures."""

    def __init__(self, mixtures: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCAB, D), nn.ModuleList(mixtures)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        x = x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
        for block in self.blocks:
            x = block(x)
        return x


def listed(**how: Any) -> Net:
    torch.manual_seed(3)
    with torch.random.fork_rng():
        mixtures: list[nn.Module] = []
        for _ in range(2):
            ffns = nn.ModuleList(Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(3))
            mixtures.append(Mixture(ffns, 3, **how))
        net = Net(mixtures).double().eval()
        with torch.no_grad():  # of equal weights and the larger bias: the third gets nothing
            for mixture in mixtures:
                mixture.router.weight[2] = mixture.router.weight[1]
                mixture.router.bias[2] = mixture.router.bias[1] - 1
    return net


class Stacked(nn.Module):
    """A mixture over slices, multiplied as `x @ W[e] + b[e]`."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.router, self.together = nn.Linear(D, 3), together
        self.up = nn.Parameter(torch.randn(3, D, FF))
        self.up_bias = nn.Parameter(torch.randn(3, FF))
        self.down = nn.Parameter(torch.randn(3, FF, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.router(tokens).argmax(-1)
        given = torch.zeros_like(tokens)
        if self.together:
            h = torch.relu(torch.einsum("nd,edf->enf", tokens, self.up))
            every = torch.einsum("enf,efd->end", h, self.down)
            return x + every[chosen, torch.arange(len(tokens))].reshape(x.shape)
        for e in range(3):
            rows = torch.where(chosen == e)[0]
            h = torch.relu(tokens[rows] @ self.up[e] + self.up_bias[e])
            given[rows] = h @ self.down[e]
        return x + given.reshape(x.shape)
