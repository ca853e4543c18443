"""What a spectrum can describe: the sites in and around an FFN, and the groups of samples."""

from typing import Literal

SITES: tuple[Literal["pre", "post"], ...] = ("pre", "post")
"""Where features are measured: before and after the nonlinearity."""

GROUP_SITES = ("stream_in", "input", "pre", "post", "output", "stream_out")
"""The sites in the `groups` table, along a block: the residual stream before the FFN, the FFN's
input, before and after the nonlinearity, the FFN's output, and the stream after it."""

AROUND = ("stream_in", "input", "output", "stream_out")
"""The sites around the nonlinearity, the options of `monitor.sites`."""

GROUPINGS = {
    "position": ("0", "like_0", "q1", "q2", "q3", "q4"),
    "frequency": ("head", "mid", "tail"),
    "halves": ("a", "b"),
}
"""The groupings of samples, which are the options of `monitor.groups`, and the groups of each:

- by position in the sequence: 0 alone, and the others in four equal parts; `like_0` has as many
  samples as `0`, one from another position of each sequence, so that the two can be compared
- by the frequency of the token: the most frequent tokens, which account for a third of all
  occurrences, the next third, and the last
- halves: alternate sequences
"""

POOLED = "all"
"""The grouping, and the group, of rows with all samples of a site."""
