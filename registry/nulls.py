"""Names of the null controls computed for every metric, of further controls, and the level of a test."""

NULLS = ("permuted_classes", "shuffled", "random", "neurons")
CONTROLS = ("planted",)
CONSTRAINTS = ("frozen_decoder", "soft_frozen_decoder", "frozen_encoder")
"""The controls that are trained, each as an SAE of its own."""
DECISIVE = "permuted_classes"
"""The null of the hierarchy itself, whose p-values are adjusted over a report."""
LABEL_NULLS = (DECISIVE, "shuffled")
"""The nulls of labels: a verdict on what depends on labels needs both."""
LEVEL = 0.05
"""The p-value, and after Benjamini–Hochberg the q-value, up to which a number is past a null."""
LEAST_DRAWS = 19
"""The smallest number of draws with which p = (1 + draws at least as good) / (1 + draws) can be .05."""


def significant(p: float) -> bool:
    """Whether a p- or q-value is at most `LEVEL`, up to rounding; false for NaN."""
    return p <= LEVEL * (1 + 1e-9)
