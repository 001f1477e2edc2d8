"""Labelled texts of many clients: read from files, or dealt out of one set by a partition.

`load_path` reads what a user has (a folder with one sub-folder per client, or one file that is
split here); `load_icd10` is the packaged example. Both return `FederatedData`. Everything that
is wrong with the data raises `fedtune.errors.DataError` with one line of text.
"""

from fedtune.data.examples import ClientData, FederatedData, TextExamples, label_counts
from fedtune.data.icd10 import load_icd10
from fedtune.data.loading import load_path
from fedtune.data.partitioners import partition
from fedtune.data.spec import PartitionSpec

__all__ = [
    "ClientData",
    "FederatedData",
    "PartitionSpec",
    "TextExamples",
    "label_counts",
    "load_icd10",
    "load_path",
    "partition",
]
