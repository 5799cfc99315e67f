"""Names of the null controls that every metric stands beside, and of the further controls."""

NULLS = ("permuted_classes", "shuffled", "random", "neurons")
CONTROLS = ("planted",)
