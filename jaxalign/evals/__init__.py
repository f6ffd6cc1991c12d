"""Evaluators: what a policy is measured by, while it is trained and after."""

from jaxalign.training.run import Evaluator

__all__ = ["Evaluator"]
