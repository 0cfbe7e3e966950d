"""Prompts: where rows come from, how they become token ids, and the data module that streams them."""

from drift.data.benchmarks import Benchmark, EvaluationSet
from drift.data.datamodule import PromptDataModule
from drift.data.sources import Source, load_rows
from drift.data.template import PromptTemplate

__all__ = ["Benchmark", "EvaluationSet", "PromptDataModule", "PromptTemplate", "Source", "load_rows"]
