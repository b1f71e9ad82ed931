"""Mixed precision: fp32 masters, half compute weights, loss scaling."""

from mptrain.precision.loop import MasterWeights
from mptrain.precision.policy import LossScale, Policy

__all__ = ["LossScale", "MasterWeights", "Policy"]
