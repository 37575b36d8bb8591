"""A source of records -> a folder of shards."""

from ecgscale.data.ingest.join import Ingested
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.run import ingest, ingest_part, merge_parts

__all__ = ["IngestOptions", "Ingested", "ingest", "ingest_part", "merge_parts"]
