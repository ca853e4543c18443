"""The paper's claims, each with the runs that it needs and the function that judges it."""

from judgement import Claim

from claims.cost import overhead
from claims.mixer import mixer_activations, mixer_optimizers
from claims.nonlinearity import depth_band, gelu_and_relu, reinjection
from claims.normfree import constraints, inertia, overcompensation
from claims.optimizer import middle_layers, repair_and_refinement
from claims.position import norm_placement, position
from claims.width import across_widths, within_runs

CLAIMS = (
    Claim(
        1,
        "The nonlinearity reinjects variance: SE and PR rise, EEE falls from pre to post",
        "Training makes the nonlinearity spread variance",
        "GELU SE 5.57 → 7.40, PR 125 → 860, EEE 0.925 → 0.45",
        ("activation_gpu",),
        reinjection,
        "overview",
    ),
    Claim(
        2,
        "GELU explores a broader subspace than ReLU, at a lower perplexity; ReLU settles earlier",
        "GELU beats ReLU in loss and dimensions",
        "perplexity GELU 2.714, ReLU 2.774; PR_post 860, 600",
        ("activation_gpu",),
        gelu_and_relu,
        "activation",
    ),
    Claim(
        3,
        "JS shows a band in depth",
        "JS shows a band in depth",
        "GELU: peak 0.28 in layers 2 to 4, low in layer 0",
        ("activation_gpu",),
        depth_band,
        "depth",
    ),
    Claim(
        4,
        "The metrics track the evaluation loss within a run",
        "Within a run the metrics follow the loss",
        "r: SE_pre -0.98 to -0.99, SE_post -0.84 to -0.87, PR_pre -0.97 to -0.99, PR_post -0.85 to "
        "-0.95",
        ("ffn_width_gpu",),
        within_runs,
        "width",
    ),
    Claim(
        5,
        "The final metrics rank configurations across widths",
        "Across widths the metrics rank the loss",
        "r: PreLN GELU SE_post -1.00, PR_post -1.00; norm-free ReLU SE_pre 0.03, SE_post -0.99",
        ("ffn_width_gpu",),
        across_widths,
        "width",
    ),
    Claim(
        6,
        "Norm-free GELU shows spectral inertia in early layers",
        "Norm-free GELU: inert early layers, a price",
        "through layer 6 EEE_post 0.95 to 1, JS near 0, PR gain near 1; perplexity 3.223",
        ("normfree_gpu",),
        inertia,
        "normfree",
    ),
    Claim(
        7,
        "Norm-free ReLU and learnable leaky ReLU overcompensate",
        "Norm-free ReLUs overcompensate in early layers",
        "PR gain up to 290 in layer 1, JS up to 0.48; perplexity 2.988, 3.081",
        ("normfree_gpu",),
        overcompensation,
        "normfree",
    ),
    Claim(
        8,
        "Without norms, perplexity follows the flattening that the FFN's weight geometry sustains",
        "Flatter norm-free FFNs have a lower loss",
        "perplexity spectral norm 3.000, weight norm 3.041, hyperspherical 3.122",
        ("ffn_constraint_gpu", "normfree_gpu"),
        constraints,
        "constraint",
    ),
    Claim(
        9,
        "PreLN turns width into usable dimensions best; PostLN has diminishing returns",
        "PreLN turns width into dimensions best",
        "PR_post at width 8: PreLN 1822, MixLN 233, PostLN 71",
        ("norm_placement_gpu",),
        norm_placement,
        "placement",
    ),
    Claim(
        10,
        "RoPE prevents the collapse of middle and deep layers",
        "RoPE prevents the collapse of deep layers",
        "perplexity with RoPE 15.20, without 16.78",
        ("position_gpu",),
        position,
        "position",
    ),
    Claim(
        11,
        "AdamW repairs, Muon refines, Dion lies between",
        "AdamW repairs, Muon refines, Dion between",
        "AdamW, Dion, Muon: largest PR gain 79, 20, 7.4; perplexity 33.24, 27.68, 25.68",
        ("optimizer_gpu",),
        repair_and_refinement,
        "optimizer",
    ),
    Claim(
        12,
        "Perplexity follows the middle layers' PR_post",
        "Middle layers' PR_post ranks the losses",
        "PR_post of all layers Dion 873, Muon 771, AdamW 576; of layers 8 to 14 as the perplexity",
        ("optimizer_gpu",),
        middle_layers,
        "optimizer",
    ),
    Claim(
        13,
        "MLP-Mixer shows the same pattern; channel mixing's activation matters more than token "
        "mixing's",
        "Mixers: the same; channel mixing matters more",
        "accuracy token/channel: GELU/GELU 66.96, ReLU/GELU 67.86, GELU/ReLU 66.99, ReLU/ReLU "
        "67.20",
        ("mixer_activation",),
        mixer_activations,
        "mixer",
    ),
    Claim(
        14,
        "On MLP-Mixer SGD gives a higher SE_post and PR_post than Adam, and better accuracy",
        "Mixers: SGD above Adam in PR and accuracy",
        "accuracy SGD 68.07, Adam 66.96",
        ("mixer_optimizer",),
        mixer_optimizers,
        "mixer",
    ),
    Claim(
        15,
        "Measuring costs about 1% of the training time at every 1000 steps",
        "Measuring costs 1% at every 1000 steps",
        "about 1% (RTX 3090)",
        (),
        overhead,
    ),
)
