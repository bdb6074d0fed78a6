"""The result on disk: a zarr v3 group, written strip by strip by many processes, read lazily by anyone."""

from distinfluence.store.format.layout import Layout
from distinfluence.store.format.ranking import Ranking
from distinfluence.store.read.analysis import Grouped
from distinfluence.store.read.annotations import Sample, StoredPoints, annotate
from distinfluence.store.read.contributions import Contributions, Shares, write_contributions
from distinfluence.store.read.result import InfluenceResult, open_influences
from distinfluence.store.repair import Damage, find_damage, mend
from distinfluence.store.write.writer import InfluenceWriter

__all__ = [
    "Contributions",
    "Damage",
    "Grouped",
    "InfluenceResult",
    "InfluenceWriter",
    "Layout",
    "Ranking",
    "Sample",
    "Shares",
    "StoredPoints",
    "annotate",
    "find_damage",
    "mend",
    "open_influences",
    "write_contributions",
]
