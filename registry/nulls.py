"""Names of the null controls computed for every metric, and of further controls."""

NULLS = ("permuted_classes", "shuffled", "random", "neurons")
CONTROLS = ("planted",)
