"""Which of the FFNs that a forward pass has shown are experts, and which experts it has not shown.

Experts are the matrices of two stacked parameters, or the modules of a list among which its tokens
are distributed. Some may get no tokens in one pass; they are taken to be like the others.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from nerve.measuring.ffns import FFNAdapter, Site
from nerve.measuring.link import Link
from nerve.measuring.places import Place, Tree
from nerve.measuring.slices import Slice
from nerve.measuring.trial import Seen


class Experts(NamedTuple):
    """Experts that share the tokens of one mixture.

    Attributes:
        links: one for each expert, including those without tokens.
        labels: what distinguishes them, such as their numbers.
        mixture: the module whose tokens they receive.
    """

    links: list[Link]
    labels: list[str]
    mixture: nn.Module

    @property
    def modules(self) -> list[nn.Module]:
        """Their projections."""
        return [module for link in self.links for module in link.modules]

    def ffns(self, place: Place) -> list[FFNAdapter]:
        """One FFN for each expert; their samples are pooled under the name of the place."""
        single = place.name.removesuffix("s") if place.name.endswith("experts") else place.name
        return [
            FFNAdapter(
                place.layer,
                f"{single}_{label}",
                link.pre,
                link.post,
                n_runs=None,
                gated=link.kind == "gated",
                pool=place.name,
                tokens=Site(self.mixture, "input", axis=-1),
            )
            for link, label in zip(self.links, self.labels, strict=True)
        ]


def grouped(tree: Tree, seen: Seen, links: Iterable[Link]) -> list[Link | Experts]:
    """The links in order of appearance, with experts that belong together merged into one item."""
    groups: dict[Any, list[Link]] = defaultdict(list)
    for link in links:
        groups[_key(tree, seen, link)].append(link)
    found: list[Link | Experts] = []
    for key, members in groups.items():
        if isinstance(key[0], Link):
            found += members
        elif isinstance(members[0].post, Slice):
            found.append(_of_slices(tree, _usual(members)))
        else:
            found.append(_of_list(seen, key[0], key[1:], _usual(members)))
    return found


def _key(tree: Tree, seen: Seen, link: Link) -> tuple[Any, ...]:
    """What the links of experts that belong together have in common."""
    pre, post, part = link.pre.module, link.post, link.pre.part
    if isinstance(pre, Slice) and isinstance(post, Slice):
        return (pre.stack, post.stack, part.start, part.stop, part.step)
    for of_list in seen.mixtures:
        root = tree.paths[of_list] + "."
        paths = [tree.paths[module] for module in link.modules]
        if all(path.startswith(root) for path in paths):
            items = {path.removeprefix(root).partition(".")[0] for path in paths}
            inner = tuple(path.removeprefix(root).partition(".")[2] for path in paths)
            if len(items) == 1:
                return (of_list, *inner)
    return (link,)


def _usual(links: Sequence[Link]) -> Link:
    """A link of the most frequent kind; with few tokens a link may be unclear."""
    kinds = Counter(link.kind for link in links if link.kind != "unclear")
    kind = kinds.most_common(1)[0][0] if kinds else "unclear"
    return next(link for link in links if link.kind == kind)


def _of_slices(tree: Tree, usual: Link) -> Experts:
    pre, post = usual.pre.module, usual.post
    assert isinstance(pre, Slice)
    assert isinstance(post, Slice)
    other = None if usual.other is None else usual.other.module
    links = [
        replace(
            usual,
            pre=replace(usual.pre, module=up),
            post=down,
            other=None
            if usual.other is None or not isinstance(other, Slice)
            else replace(usual.other, module=other.stack.slices[index]),
        )
        for index, (up, down) in enumerate(zip(pre.stack.slices, post.stack.slices, strict=True))
    ]
    mixture = tree.module(tree.runs(tree.holder([pre, post])))
    return Experts(links, [str(index) for index in range(len(links))], mixture)


def _of_list(seen: Seen, of_list: nn.Module, inner: Sequence[str], usual: Link) -> Experts:
    links, labels = [], []
    for label, item in of_list.named_children():
        parts = dict(item.named_modules())
        if not all(path in parts for path in inner):  # of another kind
            continue
        modules = [parts[path] for path in inner]
        other = None if usual.other is None else replace(usual.other, module=modules[1])
        pre = replace(usual.pre, module=modules[0])
        links.append(replace(usual, pre=pre, post=modules[-1], other=other))
        labels.append(label.removeprefix("expert_"))
    return Experts(links, labels, seen.mixtures[of_list])
