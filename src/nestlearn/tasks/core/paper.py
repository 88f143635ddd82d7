"""The numbers of the paper (Behrouz et al. 2025) beside which the suite puts its own.

Models have the names of `nestlearn.tasks.core.models` where they are there; "transformer" is Table 2's Transformer++.
Figure 10 is read off the plot, to about 0.01.
"""

from __future__ import annotations

# Table 1: accuracy in percent of a needle in a haystack, by task and by length in tokens.
TABLE_1_LENGTHS = (4096, 8192, 16384)
TABLE_1: dict[str, dict[str, tuple[float, float, float]]] = {
    "S-NIAH-1": {
        "transformer": (88.6, 76.4, 79.8),
        "hope-attention": (100.0, 100.0, 100.0),
        "rwkv-7": (100.0, 100.0, 99.6),
        "comba": (100.0, 100.0, 99.4),
        "dla": (96.4, 71.2, 44.0),
        "titans": (100.0, 100.0, 100.0),
        "hope": (100.0, 100.0, 100.0),
    },
    "S-NIAH-2": {
        "transformer": (100.0, 98.8, 94.2),
        "hope-attention": (100.0, 98.4, 94.4),
        "rwkv-7": (93.8, 44.8, 12.6),
        "comba": (92.6, 47.2, 13.4),
        "dla": (79.6, 42.6, 28.2),
        "titans": (99.6, 84.6, 75.4),
        "hope": (99.2, 88.4, 78.2),
    },
    "S-NIAH-3": {
        "transformer": (78.0, 69.2, 40.8),
        "hope-attention": (76.8, 68.8, 42.4),
        "rwkv-7": (63.8, 13.2, 5.8),
        "comba": (62.4, 13.8, 7.4),
        "dla": (18.2, 8.8, 4.0),
        "titans": (74.2, 42.8, 21.2),
        "hope": (73.2, 46.2, 24.8),
    },
    "MK-NIAH": {
        "transformer": (79.4, 83.0, 61.4),
        "hope-attention": (80.2, 84.8, 60.8),
        "rwkv-7": (21.4, 18.8, 9.6),
        "comba": (21.4, 19.4, 8.2),
        "dla": (27.4, 20.0, 11.8),
        "titans": (26.4, 23.6, 8.2),
        "hope": (29.4, 24.8, 14.8),
    },
    "MQ-NIAH": {
        "transformer": (58.9, 48.0, 29.8),
        "hope-attention": (60.4, 47.8, 30.6),
        "rwkv-7": (20.4, 14.8, 8.6),
        "comba": (21.8, 15.2, 6.4),
        "dla": (26.4, 22.0, 6.4),
        "titans": (22.8, 19.8, 9.4),
        "hope": (31.7, 24.8, 14.2),
    },
    "MV-NIAH": {
        "transformer": (37.5, 34.1, 21.5),
        "hope-attention": (35.2, 34.4, 24.8),
        "rwkv-7": (16.2, 13.4, 6.8),
        "comba": (16.5, 13.5, 7.2),
        "dla": (25.6, 12.8, 9.6),
        "titans": (24.6, 15.1, 8.2),
        "hope": (31.4, 17.2, 11.4),
    },
}

# Table 2: perplexity of WikiText and LAMBADA, then accuracies in percent; by parameters and tokens.
TABLE_2_COLUMNS = (
    "wikitext ppl",
    "lambada ppl",
    "lambada",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc-easy",
    "arc-challenge",
    "siqa",
    "boolq",
)
TABLE_2: dict[str, dict[str, tuple[float, ...]]] = {
    "760M / 30B": {
        "transformer": (24.18, 24.27, 37.1, 67.2, 43.8, 53.0, 65.6, 33.4, 39.1, 61.7),
        "samba": (21.07, 22.85, 39.2, 68.9, 47.8, 53.1, 65.8, 34.9, 38.9, 63.1),
        "retnet": (25.77, 24.19, 34.5, 66.8, 41.2, 51.9, 63.6, 32.5, 38.8, 56.2),
        "deltanet": (24.52, 24.38, 36.8, 67.3, 44.5, 51.8, 64.2, 32.7, 39.6, 60.1),
        "rwkv-7": (23.75, 23.08, 37.1, 67.3, 47.6, 52.2, 64.7, 34.2, 39.4, 61.9),
        "comba": (22.41, 22.19, 37.5, 66.9, 48.2, 52.4, 65.1, 34.1, 40.1, 62.8),
        "ttt": (24.17, 23.51, 34.7, 67.3, 43.9, 51.0, 64.5, 33.8, 40.2, 59.6),
        "miras (memora)": (22.28, 22.31, 38.2, 67.8, 49.3, 53.3, 63.6, 36.1, 40.9, 63.0),
        "dla": (23.12, 22.09, 36.1, 68.0, 47.9, 52.7, 65.8, 34.6, 39.1, 59.6),
        "titans": (20.08, 21.52, 38.1, 69.1, 48.5, 52.7, 66.2, 35.7, 40.3, 62.8),
        "hope": (18.68, 20.07, 38.8, 69.2, 49.1, 53.6, 66.8, 36.1, 41.2, 63.4),
    },
    "1.3B / 100B": {
        "transformer": (17.92, 17.73, 42.6, 71.4, 52.3, 54.1, 69.9, 36.5, 41.8, 58.4),
        "samba": (16.15, 13.21, 45.2, 71.5, 53.8, 55.8, 69.1, 36.7, 40.6, 63.0),
        "retnet": (18.91, 17.04, 41.2, 71.3, 49.1, 55.2, 67.5, 34.1, 41.4, 61.0),
        "deltanet": (18.62, 17.1, 41.6, 70.1, 49.4, 52.7, 67.6, 35.2, 39.7, 54.8),
        "rwkv-7": (18.44, 15.96, 46.7, 72.4, 54.9, 57.5, 71.6, 38.2, 40.7, 60.4),
        "comba": (18.16, 14.87, 46.9, 73.1, 54.5, 57.7, 72.0, 39.1, 40.2, 60.6),
        "ttt": (18.42, 14.51, 46.8, 72.9, 55.2, 59.0, 71.8, 39.5, 39.8, 59.6),
        "miras (memora)": (15.9, 12.04, 48.7, 73.1, 56.0, 57.4, 71.5, 37.9, 40.2, 61.3),
        "dla": (16.31, 12.29, 44.5, 70.6, 53.9, 54.2, 69.6, 36.0, 40.8, 60.2),
        "titans": (15.6, 11.41, 49.1, 73.1, 56.3, 59.8, 72.4, 40.8, 42.1, 61.0),
        "hope": (14.39, 10.08, 51.0, 73.9, 57.5, 61.2, 73.8, 42.7, 42.8, 61.4),
    },
}

# Table 4: accuracy in percent on MAD.
TABLE_4_TASKS = ("compression", "in-context recall", "fuzzy recall", "selective copying", "memorisation")
TABLE_4: dict[str, tuple[float, ...]] = {
    "transformer": (49.4, 100.0, 47.9, 96.2, 83.7),
    "rwkv-7": (45.1, 100.0, 32.8, 95.6, 82.2),
    "comba": (46.3, 100.0, 32.8, 96.4, 82.9),
    "titans": (49.8, 100.0, 50.0, 99.4, 83.4),
    "hope": (51.2, 100.0, 52.1, 99.7, 85.2),
}

# Table 5: right words in percent, bin 0 and bin 1. The paper does not define the bins.
TABLE_5_LANGUAGES = ("Parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "Shuffle-2")
TABLE_5: dict[str, tuple[tuple[float, float], ...]] = {
    "lstm": ((100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
    "transformer": ((46.4, 0.0), (0.0, 0.0), (0.0, 0.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
    "linear": ((78.1, 0.0), (0.0, 0.0), (0.0, 0.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
    "deltanet": ((98.2, 10.1), (0.0, 0.0), (0.0, 0.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
    "srwm": ((100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
    "hope": ((100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0), (100.0, 100.0)),
}

# Table 6: average perplexity of language modelling and average accuracy of reasoning in percent.
TABLE_6: dict[str, tuple[float, float]] = {
    "hope": (12.24, 58.1),
    "without DGD": (13.41, 56.5),
    "without momentum": (13.58, 56.9),
    "without weight decay": (13.71, 57.2),
    "without CMS": (13.04, 57.3),
    "without inner-projection k": (13.77, 56.9),
    "without inner-projection v": (13.9, 55.1),
    "without inner-projection q": (12.19, 57.4),
}

# Figure 10: perplexity by the context used, in tokens.
FIGURE_10_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
FIGURE_10: dict[str, tuple[float, ...]] = {
    "transformer": (11.98, 10.75, 10.21, 9.9, 9.83),
    "titans": (11.83, 10.78, 10.37, 10.12, 10.08),
    "comba": (11.7, 10.7, 10.47, 10.29, 10.25),
    "hope without DGD": (11.94, 10.79, 10.3, 10.07, 10.0),
    "hope without CMS": (11.87, 10.54, 10.14, 9.95, 9.92),
    "hope": (11.92, 10.5, 10.17, 9.93, 9.87),
}
